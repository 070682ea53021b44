/* Waiting for descriptors. */

#include "poller.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

/* USE_POLL: as where there is nothing better, for the tests */
#if defined(__linux__) && !defined(USE_POLL)
#define USE_EPOLL 1
#include <sys/epoll.h>
#include <sys/eventfd.h>
#elif (defined(__FreeBSD__) || defined(__APPLE__) || defined(__OpenBSD__) ||                       \
       defined(__NetBSD__)) &&                                                                     \
    !defined(USE_POLL)
#define USE_KQUEUE 1
#include <sys/types.h>

#include <sys/event.h>
#include <sys/time.h>
#else
#include <poll.h>
#include <pthread.h>
#ifdef POLLRDHUP
#define END_OF_PEER POLLRDHUP
#else
#define END_OF_PEER 0 /* POLLHUP comes unasked */
#endif
#endif

#if USE_EPOLL /* ------------------------------------------------------------------ epoll */

struct poller {
    int fd;
    int waker;
};

struct poller *
poller_open(void)
{
    struct poller *poller = malloc(sizeof *poller);
    struct epoll_event event = {.events = EPOLLIN};

    if (poller == NULL) {
        return NULL;
    }
    poller->fd = epoll_create1(EPOLL_CLOEXEC);
    poller->waker = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    event.data.ptr = poller;
    if (poller->fd < 0 || poller->waker < 0 ||
        epoll_ctl(poller->fd, EPOLL_CTL_ADD, poller->waker, &event) < 0) {
        poller_close(poller);
        return NULL;
    }
    return poller;
}

void
poller_close(struct poller *poller)
{
    int code = errno;

    if (poller->fd >= 0) {
        close(poller->fd);
    }
    if (poller->waker >= 0) {
        close(poller->waker);
    }
    free(poller);
    errno = code;
}

void
poller_forget(struct poller *poller)
{
    poller_close(poller); /* closing a copy of its descriptor leaves the other one's as it is */
}

static bool
control(struct poller *poller, int how, int fd, void *tag, unsigned events)
{
    struct epoll_event event = {.events = events, .data.ptr = tag};

    return epoll_ctl(poller->fd, how, fd, &event) == 0;
}

bool
poller_add(struct poller *poller, int fd, void *tag, bool writing, bool shared)
{
    unsigned events = writing ? EPOLLOUT : EPOLLIN;

#ifdef EPOLLEXCLUSIVE
    if (shared && control(poller, EPOLL_CTL_ADD, fd, tag, events | EPOLLEXCLUSIVE)) {
        return true;
    }
#endif
    (void)shared;
    return control(poller, EPOLL_CTL_ADD, fd, tag, events);
}

bool
poller_change(struct poller *poller, int fd, void *tag, bool writing)
{
    return control(poller, EPOLL_CTL_MOD, fd, tag, writing ? EPOLLOUT : EPOLLIN);
}

void
poller_remove(struct poller *poller, int fd)
{
    control(poller, EPOLL_CTL_DEL, fd, NULL, 0);
}

bool
poller_watch_end(struct poller *poller, int fd, void *tag, bool watched)
{
    return control(poller, watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, tag, EPOLLRDHUP);
}

int
poller_wait(struct poller *poller, struct poller_event events[POLLER_EVENTS], int timeout)
{
    struct epoll_event found[POLLER_EVENTS];
    int count = epoll_wait(poller->fd, found, POLLER_EVENTS, timeout);
    int kept = 0;
    uint64_t wakes;

    for (int i = 0; i < count; i++) {
        unsigned what = found[i].events;

        if (found[i].data.ptr == poller) {
            (void)!read(poller->waker, &wakes, sizeof wakes);
            continue;
        }
        events[kept++] = (struct poller_event){
            .tag = found[i].data.ptr,
            .readable = (what & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0,
            .writable = (what & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0,
            .ended = (what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0,
        };
    }
    return kept;
}

int
poller_descriptor(const struct poller *poller)
{
    return fcntl(poller->fd, F_DUPFD_CLOEXEC, 0);
}

void
poller_wake(struct poller *poller)
{
    uint64_t one = 1;
    int code = errno;

    (void)!write(poller->waker, &one, sizeof one);
    errno = code;
}

#elif USE_KQUEUE /* ---------------------------------------------------------------- kqueue */

struct poller {
    int fd;
    int waker[2];
};

static bool
control(struct poller *poller, int fd, int filter, int how, void *tag)
{
    struct kevent change;

    EV_SET(&change, fd, filter, how, 0, 0, tag);
    return kevent(poller->fd, &change, 1, NULL, 0, NULL) == 0;
}

static bool
prepare_descriptor(int fd)
{
    return fcntl(fd, F_SETFD, FD_CLOEXEC) == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0;
}

struct poller *
poller_open(void)
{
    struct poller *poller = malloc(sizeof *poller);

    if (poller == NULL) {
        return NULL;
    }
    *poller = (struct poller){.fd = kqueue(), .waker = {-1, -1}};
    if (poller->fd < 0 || fcntl(poller->fd, F_SETFD, FD_CLOEXEC) < 0 || pipe(poller->waker) < 0 ||
        !prepare_descriptor(poller->waker[0]) || !prepare_descriptor(poller->waker[1]) ||
        !control(poller, poller->waker[0], EVFILT_READ, EV_ADD, poller)) {
        poller_close(poller);
        return NULL;
    }
    return poller;
}

static void
close_descriptors(struct poller *poller)
{
    int code = errno;

    if (poller->fd >= 0) {
        close(poller->fd);
    }
    for (int i = 0; i < 2; i++) {
        if (poller->waker[i] >= 0) {
            close(poller->waker[i]);
        }
    }
    free(poller);
    errno = code;
}

void
poller_close(struct poller *poller)
{
    close_descriptors(poller);
}

/* A kqueue is not handed down to the child: its number may be another file's by now. */
void
poller_forget(struct poller *poller)
{
    poller->fd = -1;
    close_descriptors(poller);
}

bool
poller_add(struct poller *poller, int fd, void *tag, bool writing, bool shared)
{
    (void)shared;
    return control(poller, fd, writing ? EVFILT_WRITE : EVFILT_READ, EV_ADD, tag);
}

bool
poller_change(struct poller *poller, int fd, void *tag, bool writing)
{
    poller_remove(poller, fd); /* a filter that was added with EV_CLEAR keeps it otherwise */
    return poller_add(poller, fd, tag, writing, false);
}

void
poller_remove(struct poller *poller, int fd)
{
    control(poller, fd, EVFILT_READ, EV_DELETE, NULL);
    control(poller, fd, EVFILT_WRITE, EV_DELETE, NULL);
}

/* Data that comes tells of itself once, by EV_CLEAR, and is not looked at. */
bool
poller_watch_end(struct poller *poller, int fd, void *tag, bool watched)
{
    if (watched) {
        poller_remove(poller, fd);
    }
    return control(poller, fd, EVFILT_READ, EV_ADD | EV_CLEAR, tag);
}

int
poller_wait(struct poller *poller, struct poller_event events[POLLER_EVENTS], int timeout)
{
    struct kevent found[POLLER_EVENTS];
    struct timespec limit = {.tv_sec = timeout / 1000, .tv_nsec = timeout % 1000 * 1000000L};
    int count = kevent(poller->fd, NULL, 0, found, POLLER_EVENTS, timeout < 0 ? NULL : &limit);
    int kept = 0;
    char bytes[64];

    for (int i = 0; i < count; i++) {
        if (found[i].udata == poller) {
            while (read(poller->waker[0], bytes, sizeof bytes) > 0) {
            }
            continue;
        }
        events[kept++] = (struct poller_event){
            .tag = found[i].udata,
            .readable = found[i].filter == EVFILT_READ,
            .writable = found[i].filter == EVFILT_WRITE,
            .ended = (found[i].flags & EV_EOF) != 0,
        };
    }
    return kept;
}

int
poller_descriptor(const struct poller *poller)
{
    return fcntl(poller->fd, F_DUPFD_CLOEXEC, 0);
}

void
poller_wake(struct poller *poller)
{
    int code = errno;

    (void)!write(poller->waker[1], "", 1);
    errno = code;
}

#else /* ----------------------------------------------------------------------------- poll */

struct poller {
    pthread_mutex_t lock; /* of the arrays */
    struct pollfd *wait;
    void **tags;
    size_t count, room;
    size_t next; /* where to look first: whoever was last has its turn, too */
    int waker[2];
};

static bool
prepare_descriptor(int fd)
{
    return fcntl(fd, F_SETFD, FD_CLOEXEC) == 0 && fcntl(fd, F_SETFL, O_NONBLOCK) == 0;
}

struct poller *
poller_open(void)
{
    struct poller *poller = calloc(1, sizeof *poller);

    if (poller == NULL) {
        return NULL;
    }
    pthread_mutex_init(&poller->lock, NULL);
    poller->waker[0] = poller->waker[1] = -1;
    if (pipe(poller->waker) < 0 || !prepare_descriptor(poller->waker[0]) ||
        !prepare_descriptor(poller->waker[1]) ||
        !poller_add(poller, poller->waker[0], poller, false, false)) {
        poller_close(poller);
        return NULL;
    }
    return poller;
}

void
poller_close(struct poller *poller)
{
    int code = errno;

    for (int i = 0; i < 2; i++) {
        if (poller->waker[i] >= 0) {
            close(poller->waker[i]);
        }
    }
    pthread_mutex_destroy(&poller->lock);
    free(poller->wait);
    free(poller->tags);
    free(poller);
    errno = code;
}

void
poller_forget(struct poller *poller)
{
    pthread_mutex_init(&poller->lock, NULL); /* its holder may not have been forked */
    poller_close(poller);
}

static bool
make_room(struct poller *poller)
{
    size_t room = poller->room ? 2 * poller->room : 64;
    struct pollfd *wait;
    void **tags;

    if (poller->count < poller->room) {
        return true;
    }
    wait = realloc(poller->wait, room * sizeof *wait);
    if (wait == NULL) {
        return false;
    }
    poller->wait = wait;
    tags = realloc(poller->tags, room * sizeof *tags);
    if (tags == NULL) {
        return false;
    }
    poller->tags = tags;
    poller->room = room;
    return true;
}

/* Where a descriptor stands in the arrays, `count` where it does not. */
static size_t
place_of(const struct poller *poller, int fd)
{
    size_t i = 0;

    while (i < poller->count && poller->wait[i].fd != fd) {
        i++;
    }
    return i;
}

static bool
add(struct poller *poller, int fd, void *tag, short events)
{
    bool added;

    pthread_mutex_lock(&poller->lock);
    added = make_room(poller);
    if (added) {
        poller->wait[poller->count] = (struct pollfd){.fd = fd, .events = events};
        poller->tags[poller->count++] = tag;
    }
    pthread_mutex_unlock(&poller->lock);
    if (added && tag != poller) {
        poller_wake(poller); /* who waits looks at a copy */
    }
    return added;
}

bool
poller_add(struct poller *poller, int fd, void *tag, bool writing, bool shared)
{
    (void)shared;
    return add(poller, fd, tag, writing ? POLLOUT : POLLIN);
}

bool
poller_change(struct poller *poller, int fd, void *tag, bool writing)
{
    poller_remove(poller, fd);
    return poller_add(poller, fd, tag, writing, false);
}

void
poller_remove(struct poller *poller, int fd)
{
    size_t place;

    pthread_mutex_lock(&poller->lock);
    place = place_of(poller, fd);
    if (place < poller->count) {
        poller->count--;
        poller->wait[place] = poller->wait[poller->count];
        poller->tags[place] = poller->tags[poller->count];
    }
    pthread_mutex_unlock(&poller->lock);
}

bool
poller_watch_end(struct poller *poller, int fd, void *tag, bool watched)
{
    if (watched) {
        poller_remove(poller, fd);
    }
    return add(poller, fd, tag, END_OF_PEER);
}

static int
take_events(struct poller *poller, const struct pollfd *seen, size_t count,
            struct poller_event events[POLLER_EVENTS])
{
    int kept = 0;
    char bytes[64];

    for (size_t looked_at = 0; looked_at < count && kept < POLLER_EVENTS; looked_at++) {
        size_t place, i = poller->next = (poller->next + 1) % count;

        if (seen[i].revents == 0) {
            continue;
        }
        place = place_of(poller, seen[i].fd);
        if (place == poller->count) {
            continue; /* removed meanwhile */
        }
        if (poller->tags[place] == poller) {
            while (read(poller->waker[0], bytes, sizeof bytes) > 0) {
            }
            continue;
        }
        events[kept++] = (struct poller_event){
            .tag = poller->tags[place],
            .readable = (seen[i].revents & ~POLLOUT) != 0,
            .writable = (seen[i].revents & ~POLLIN) != 0,
            .ended = (seen[i].revents & (END_OF_PEER | POLLHUP | POLLERR | POLLNVAL)) != 0,
        };
    }
    return kept;
}

int
poller_wait(struct poller *poller, struct poller_event events[POLLER_EVENTS], int timeout)
{
    struct pollfd *copy;
    size_t count;
    int kept = 0;

    pthread_mutex_lock(&poller->lock);
    count = poller->count;
    copy = malloc(count * sizeof *copy);
    for (size_t i = 0; copy != NULL && i < count; i++) {
        copy[i] = poller->wait[i];
    }
    pthread_mutex_unlock(&poller->lock);
    if (copy == NULL) {
        usleep(10000);
        return 0;
    }
    if (poll(copy, count, timeout) > 0) {
        pthread_mutex_lock(&poller->lock);
        kept = take_events(poller, copy, count, events);
        pthread_mutex_unlock(&poller->lock);
    }
    free(copy);
    return kept;
}

/* Nothing but poll() itself knows of events. */
int
poller_descriptor(const struct poller *poller)
{
    (void)poller;
    return -1;
}

void
poller_wake(struct poller *poller)
{
    int code = errno;

    (void)!write(poller->waker[1], "", 1);
    errno = code;
}

#endif
