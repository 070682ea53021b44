/*
 * Preloaded into a filter, it makes calls fail on demand: allocations and the creation of threads
 * where libmilter or the module `milter` call for them (or the latter alone, in its main thread),
 * processes and writes to files wherever.  A disk that is filling up takes half of the first write.
 * What libmilter sends may be made to take its time, and the kernel to have no room for one more
 * descriptor that an epoll instance waits for.
 *
 * Beside that, these variables of the environment change one call each:
 *   FAULTS_SIGNAL    a number: listen() raises this signal, once it listens
 *   FAULTS_STRERROR  what strerror() says of any error
 *   FAULTS_RESOLVER  a connected socket's descriptor: getaddrinfo() writes a byte to it and waits
 *                    for one, for EAI_AGAIN; it fails with EAI_FAIL where none comes
 *
 * The file that FAULTS names is shared with the test, which says there what is to fail and reads
 * how many such calls there were: see tests/support/faults.py.
 */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define DEPTH 14 /* how many callers are looked at: Python's allocator has some of its own */

#define SLOW_MICROSECONDS 500000
#define RESOLVER_MILLISECONDS 3000

enum {
    NOTHING,
    ALLOCATIONS,
    THREADS,
    WRITES,
    SHORT_WRITES,
    SLOW_SENDING,
    THREADS_OF_MAIN,
    PROCESSES,
    WATCHES,
};

static struct {
    _Atomic int64_t kind;  /* what is to fail */
    _Atomic int64_t first; /* from this call on, counted from 1 */
    _Atomic int64_t count; /* so many of them */
    _Atomic int64_t seen;  /* such calls since it was armed */
} * told;

static struct range {
    uintptr_t begin, end;
} watched[2], loader, spared[2];
static atomic_int watched_count;
static bool shown; /* FAULTS_SHOW is set: who calls for what fails */
static __thread bool inside __attribute__((tls_model("initial-exec")));

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);

/* A function that does not survive without memory, whatever its callers do. */
static void
spare(int place, const char *name)
{
    if (name != NULL) {
        spared[place].begin = (uintptr_t)dlsym(RTLD_DEFAULT, name);
        spared[place].end = spared[place].begin + 1024;
    }
}

__attribute__((constructor)) static void
begin(void)
{
    const char *name = getenv("FAULTS");
    int fd = name != NULL ? open(name, O_RDWR | O_CLOEXEC) : -1;
    void *frames[2];

    if (fd >= 0) {
        void *memory = mmap(NULL, sizeof *told, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

        backtrace(frames, 2);                 /* it allocates the first time */
        spare(0, "__cxa_thread_atexit_impl"); /* glibc ends the process there */
        spare(1, getenv("FAULTS_SPARE"));
        shown = getenv("FAULTS_SHOW") != NULL;
        told = memory != MAP_FAILED ? memory : NULL;
        close(fd);
    }
}

static int
find_watched(struct dl_phdr_info *info, size_t size, void *data)
{
    const char *name = strrchr(info->dlpi_name, '/');
    int *count = data;
    bool is_loader = name != NULL && strncmp(name, "/ld-", 4) == 0;

    (void)size;
    if (name == NULL || (*count == 2 && !is_loader) ||
        (strncmp(name, "/milter.", 8) != 0 && strncmp(name, "/libmilter.", 11) != 0 &&
         !is_loader)) {
        return 0;
    }
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];

        if (part->p_type == PT_LOAD && part->p_flags & PF_X) {
            struct range *range = is_loader ? &loader : &watched[(*count)++];

            range->begin = info->dlpi_addr + part->p_vaddr;
            range->end = range->begin + part->p_memsz;
            break;
        }
    }
    return 0;
}

static bool
is_in(uintptr_t address, const struct range *range)
{
    return address >= range->begin && address < range->end;
}

static bool
is_evaluation(void *address)
{
    Dl_info found;

    return dladdr(address, &found) != 0 && found.dli_sname != NULL &&
           strncmp(found.dli_sname, "_PyEval_EvalFrame", 17) == 0;
}

static bool
is_watched(void)
{
    void *frames[DEPTH];
    int depth;

    if (atomic_load(&watched_count) < 2) {
        int count = 0;

        dl_iterate_phdr(find_watched, &count);
        atomic_store(&watched_count, count);
    }
    depth = backtrace(frames, DEPTH);
    for (int i = 2; i < depth; i++) {
        /* Python code that the module calls is the interpreter's matter. */
        if (is_evaluation(frames[i])) {
            return false;
        }
        /* glibc itself ends a process that has no memory for thread-local data. */
        if (is_in((uintptr_t)frames[i], &loader) || is_in((uintptr_t)frames[i], &spared[0]) ||
            is_in((uintptr_t)frames[i], &spared[1])) {
            return false;
        }
        for (int j = 0; j < atomic_load(&watched_count); j++) {
            if (is_in((uintptr_t)frames[i], &watched[j])) {
                return true;
            }
        }
    }
    return false;
}

/* Whether this call is to fail. */
static __attribute__((noinline)) bool
fails(int kind)
{
    bool chosen = false;

    if (told != NULL && atomic_load(&told->kind) == kind && !inside) {
        inside = true;
        if (kind == WRITES || kind == SHORT_WRITES || kind == PROCESSES || is_watched()) {
            int64_t number = atomic_fetch_add(&told->seen, 1) + 1;
            int64_t first = atomic_load(&told->first);

            chosen = number >= first && number - first < atomic_load(&told->count);
            if (chosen && shown) {
                void *frames[DEPTH];

                backtrace_symbols_fd(frames, backtrace(frames, DEPTH), STDERR_FILENO);
            }
        }
        inside = false;
    }
    return chosen;
}

static void *
refuse(void)
{
    errno = ENOMEM;
    return NULL;
}

void *
malloc(size_t size)
{
    return fails(ALLOCATIONS) ? refuse() : __libc_malloc(size);
}

void *
calloc(size_t count, size_t size)
{
    return fails(ALLOCATIONS) ? refuse() : __libc_calloc(count, size);
}

void *
realloc(void *old, size_t size)
{
    return fails(ALLOCATIONS) ? refuse() : __libc_realloc(old, size);
}

int
pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
               void *argument)
{
    int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
        dlsym(RTLD_NEXT, "pthread_create");

    if (fails(THREADS) || (getpid() == gettid() && fails(THREADS_OF_MAIN))) {
        return EAGAIN;
    }
    return next(thread, attributes, start, argument);
}

pid_t
fork(void)
{
    pid_t (*next)(void) = dlsym(RTLD_NEXT, "fork");

    if (fails(PROCESSES)) {
        errno = EAGAIN;
        return -1;
    }
    return next();
}

static bool
is_of(int fd, mode_t type)
{
    struct stat status;

    return fstat(fd, &status) == 0 && (status.st_mode & S_IFMT) == type;
}

/* How much of so many bytes there is room for. */
static ssize_t
room_for(int fd, size_t size)
{
    int64_t kind = told != NULL ? atomic_load(&told->kind) : NOTHING;

    if ((kind != WRITES && kind != SHORT_WRITES) || !is_of(fd, S_IFREG) || !fails((int)kind)) {
        return (ssize_t)size;
    }
    if (kind == SHORT_WRITES && atomic_load(&told->seen) == atomic_load(&told->first) && size > 1) {
        return (ssize_t)size / 2;
    }
    errno = ENOSPC;
    return -1;
}

static void
take_time(int fd)
{
    if (told != NULL && atomic_load(&told->kind) == SLOW_SENDING && is_of(fd, S_IFSOCK) &&
        fails(SLOW_SENDING)) {
        usleep(SLOW_MICROSECONDS);
    }
}

ssize_t
write(int fd, const void *data, size_t size)
{
    ssize_t (*next)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    ssize_t room = room_for(fd, size);

    take_time(fd);
    return room < 0 ? -1 : next(fd, data, (size_t)room);
}

ssize_t
writev(int fd, const struct iovec *parts, int count)
{
    ssize_t (*next)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "writev");

    take_time(fd);
    return next(fd, parts, count);
}

ssize_t
send(int fd, const void *data, size_t size, int flags)
{
    ssize_t (*next)(int, const void *, size_t, int) = dlsym(RTLD_NEXT, "send");

    take_time(fd);
    return next(fd, data, size, flags);
}

ssize_t
pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    ssize_t (*next)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    ssize_t room = room_for(fd, size);

    return room < 0 ? -1 : next(fd, data, (size_t)room, offset);
}

ssize_t
pwrite(int fd, const void *data, size_t size, off_t offset)
{
    return pwrite64(fd, data, size, offset);
}

int
epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event)
{
    int (*next)(int, int, int, struct epoll_event *) = dlsym(RTLD_NEXT, "epoll_ctl");

    if (operation == EPOLL_CTL_ADD && fails(WATCHES)) {
        errno = ENOSPC;
        return -1;
    }
    return next(epoll, operation, fd, event);
}

int
listen(int fd, int backlog)
{
    int (*next)(int, int) = dlsym(RTLD_NEXT, "listen");
    const char *number = getenv("FAULTS_SIGNAL");
    int result = next(fd, backlog);

    if (number != NULL) {
        raise(atoi(number));
    }
    return result;
}

char *
strerror(int code)
{
    char *(*next)(int) = dlsym(RTLD_NEXT, "strerror");
    char *words = getenv("FAULTS_STRERROR");

    return words != NULL ? words : next(code);
}

int
getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
            struct addrinfo **list)
{
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    const char *number = getenv("FAULTS_RESOLVER");
    struct pollfd answer = {.fd = number != NULL ? atoi(number) : -1, .events = POLLIN};

    if (number == NULL) {
        return next(host, service, hints, list);
    }
    return send(answer.fd, "?", 1, 0) == 1 && poll(&answer, 1, RESOLVER_MILLISECONDS) == 1
               ? EAI_AGAIN
               : EAI_FAIL;
}
