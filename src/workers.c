/* Worker processes: what the workers of one filter share, and who of them accepts.
 *
 * The processes are forked in Python (Milter/_workers.py) once the listening socket is open;
 * each runs its own libmilter on the inherited descriptor.  Every libmilter would take what it
 * can get, and the one that is awake gets the next connection too.  So each worker says in
 * shared memory how many connections it has, and one that has more than its share stands
 * back: the descriptor on which its libmilter listens is replaced by one that nobody can
 * reach.  A thread without Python, the porter, watches the socket meanwhile.  When
 * something arrives and the worker's share has grown, the porter puts the descriptor back at
 * once; when nobody else takes the connection, after PATIENCE.
 *
 * The porter also watches the lifeline, a pipe that only the supervisor holds the other end of:
 * it comes to its end when the supervisor closes it, and when the supervisor dies.
 */

#include "milter.h"

#include <sys/mman.h>

#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#define MAX_WORKERS 512
#define PATIENCE 3          /* ms that a connection waits for the worker whose turn it is */
#define TOLERANCE 8         /* one connection in so many more than others have is no matter */
#define PORTER_STACK 131072 /* bytes */

typedef struct {
    _Alignas(64) atomic_long connections;
    atomic_bool serving;
    atomic_bool slow; /* left a connection waiting, and has accepted none since */
} Worker;

typedef struct {
    atomic_ulong numbers; /* given out by _unique_id() */
    atomic_int drain_ms;  /* the longest that any process wants */
    int count;
    Worker workers[];
} Crew;

static atomic_ulong own_numbers;
static atomic_ulong *numbers = &own_numbers;
static Crew *crew;
static Worker *me; /* NULL but in a worker */
static pid_t supervisor;
static int lifeline = -1; /* at its end when the supervisor wants us to stop, or is no more */
static int report = -1;   /* to the supervisor */
static atomic_bool lifeline_ended;

/* The supervisor is gone, or wants us to be. */
static void
end_of_line(void)
{
    lifeline = -1;
    atomic_store(&lifeline_ended, true);
    atomic_store(&filter.stop_wanted, true);
}

/* ------------------------------------------------------ who accepts */

static int dummy = -1;       /* a socket that nobody can reach */
static atomic_int real = -1; /* a duplicate of the listening socket, while the door is in use */
static LocalAddress address; /* of the listening socket */
static int bell[2] = {-1, -1};
static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
static bool open_door = true; /* libmilter listens on the real socket; guarded by `door` */

static bool
has_too_many(void)
{
    long mine = atomic_load(&me->connections), least = LONG_MAX;

    for (int i = 0; i < crew->count; i++) {
        Worker *other = &crew->workers[i];
        if (other != me && atomic_load(&other->serving) && !atomic_load(&other->slow)) {
            least = Py_MIN(least, atomic_load(&other->connections));
        }
    }
    return least != LONG_MAX && mine > least + least / TOLERANCE;
}

static void
ring_porter(void)
{
    (void)!write(bell[1], "", 1);
}

#ifdef __linux__

static int wake_signal;
static atomic_long listener_task;

/* libmilter sleeps in poll(), for up to five seconds, on what stood at the descriptor before. */
void
wake_listener(void)
{
    if (wake_signal != 0 && !atomic_load(&filter.listener_ended)) {
        syscall(SYS_tgkill, getpid(), atomic_load(&listener_task), wake_signal);
    }
}

static void
no_action(int Py_UNUSED(number))
{
}

/* Before libmilter's threads start, which take over `mask`. */
void
prepare_door(sigset_t *mask)
{
    struct sigaction action = {.sa_handler = no_action};

    if (me == NULL || filter.listener < 0) {
        return;
    }
    sigfillset(&action.sa_mask);
    if (wake_signal == 0 && (wake_signal = take_free_signal(&action)) == 0) {
        return;
    }
    sigdelset(mask, wake_signal);
    address.size = sizeof address.name;
    if (atomic_load(&real) < 0 &&
        getsockname(filter.listener, (struct sockaddr *)&address.name, &address.size) == 0) {
        atomic_store(&real, fcntl(filter.listener, F_DUPFD_CLOEXEC, 0));
    }
}

/* libmilter's listener runs on this thread. */
void
be_listener(void)
{
    atomic_store(&listener_task, syscall(SYS_gettid));
}

/* Called with `door` locked. */
static void
move_door(bool open)
{
    int socket = atomic_load(&real);

    if (open == open_door || socket < 0 ||
        dup3(open ? socket : dummy, filter.listener, O_CLOEXEC) < 0) {
        return;
    }
    open_door = open;
    if (open) {
        wake_listener();
    }
    else {
        ring_porter();
    }
}

#else

void
wake_listener(void)
{
}

void
prepare_door(sigset_t *Py_UNUSED(mask))
{
}

void
be_listener(void)
{
}

static void
move_door(bool Py_UNUSED(open))
{
}

#endif

/* The number of connections, ours or another's, has changed.  Says whether the door is open. */
static bool
settle(void)
{
    bool open;

    pthread_mutex_lock(&door);
    move_door(!has_too_many());
    open = open_door;
    pthread_mutex_unlock(&door);
    return open;
}

/* Take part in accepting, whatever the share; until the number of connections changes. */
void
open_the_door(void)
{
    if (me != NULL) {
        pthread_mutex_lock(&door);
        move_door(true);
        pthread_mutex_unlock(&door);
    }
}

/* Nobody has taken what waits: let us do it, and not wait for the same workers again. */
static void
stand_in(void)
{
    long mine = atomic_load(&me->connections);

    for (int i = 0; i < crew->count; i++) {
        Worker *other = &crew->workers[i];
        if (other != me && atomic_load(&other->connections) < mine) {
            atomic_store(&other->slow, true);
        }
    }
    open_the_door();
}

static bool
stands_back(void)
{
    bool closed;

    pthread_mutex_lock(&door);
    closed = !open_door;
    pthread_mutex_unlock(&door);
    return closed;
}

static bool
is_readable(int fd)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};

    return poll(&wait, 1, 0) > 0;
}

/* For good: this process has no more to do with the listening socket, which lives on where
 * others have it.  It must not be shut down: libmilter would take that for a failure, and cut
 * messages in progress. */
static bool
close_the_door(void)
{
    bool closed;
    int socket;

    pthread_mutex_lock(&door);
    move_door(false);
    closed = !open_door;
    socket = atomic_exchange(&real, -1);
    pthread_mutex_unlock(&door);
    if (socket >= 0) {
        close(socket);
        wake_listener();
    }
    return closed;
}

static void *
be_porter(void *Py_UNUSED(arg))
{
    char bytes[64];

    for (;;) {
        struct pollfd wait[] = {{.fd = bell[0], .events = POLLIN},
                                {.fd = lifeline, .events = POLLIN},
                                {.fd = stands_back() ? atomic_load(&real) : -1, .events = POLLIN}};
        poll(wait, 3, -1);
        while (read(bell[0], bytes, sizeof bytes) > 0) {
        }
        if (wait[1].revents != 0) {
            end_of_line();
            close_the_door();
            wake_main();
        }
        if (wait[2].revents != 0 && !settle()) {
            poll(wait, 2, PATIENCE);
            if (is_readable(atomic_load(&real))) {
                stand_in();
            }
        }
    }
    return NULL;
}

static bool
start_porter(void)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    int code;

    if (!open_wake_pipe(bell)) {
        return false;
    }
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, PORTER_STACK);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    code = pthread_create(&thread, &attributes, be_porter, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return code == 0;
}

/* A connection has come (1) or gone (-1). */
void
count_connection(int change)
{
    if (me == NULL || atomic_load(&filter.forked)) {
        return;
    }
    atomic_fetch_add(&me->connections, change);
    if (change > 0) {
        atomic_store(&me->slow, false);
    }
    if (atomic_load(&real) >= 0) {
        (void)settle();
    }
}

/* ------------------------------------------------- worker and supervisor */

static void
tell_supervisor(char what)
{
    struct {
        char what;
        int pid;
    } message;

    memset(&message, 0, sizeof message); /* what lies between goes out as well */
    message.what = what;
    message.pid = getpid();
    if (report >= 0) {
        (void)!write(report, &message, sizeof message);
    }
}

/* Are there, besides this process, others with its listening socket? */
bool
others_listen(void)
{
    return crew != NULL;
}

/* In a worker, stop listening and say where we did.  False where that is to be done otherwise. */
bool
leave_socket(LocalAddress *local)
{
    if (me == NULL || !close_the_door()) {
        return false;
    }
    *local = address;
    return true;
}

/* libmilter is there. */
void
begin_work(void)
{
    if (me == NULL) {
        return;
    }
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, 0); /* from here on we drain when the supervisor dies */
#endif
    if (!start_porter()) {
        end_of_line();
    }
    atomic_store(&me->serving, true);
    tell_supervisor('r');
}

bool
is_worker_process(void)
{
    return me != NULL && !atomic_load(&filter.forked);
}

/* A stop that is asked for here, by stop() or sys.exit(), is for all workers, though this one may
 * have been stopped before; a signal from outside, or a failure, is ours alone. */
void
ask_all_to_stop(void)
{
    static atomic_bool asked;

    if (is_worker_process() && !atomic_exchange(&asked, true)) {
        tell_supervisor('s');
    }
}

/* This worker takes no more. */
void
end_work(void)
{
    if (is_worker_process()) {
        atomic_store(&me->serving, false);
    }
}

/* The supervisor waits for as long as any worker has ever been allowed to drain. */
void
share_drain_timeout(void)
{
    int wanted = atomic_load(&filter.drain_ms), known;

    if (crew != NULL) {
        known = atomic_load(&crew->drain_ms);
        while (known < wanted && !atomic_compare_exchange_weak(&crew->drain_ms, &known, wanted)) {
        }
    }
}

/* A child of a worker is none. */
void
forget_supervisor(void)
{
    int socket = atomic_exchange(&real, -1);

    me = NULL;
    if (socket >= 0) {
        close(socket);
    }
    if (report >= 0) {
        close(report);
    }
    if (lifeline >= 0) {
        close(lifeline);
    }
    report = lifeline = -1;
}

/* _share_socket(count): in the supervisor, before the first fork. */
PyObject *
share_socket(PyObject *module, PyObject *value)
{
    module_state *state = PyModule_GetState(module);
    long count = PyLong_AsLong(value);
    int flags;
    void *memory;

    if (count == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (filter.phase != SOCKET_OPEN || crew != NULL || count < 1 || count > MAX_WORKERS) {
        PyErr_SetString(state->error, "_share_socket: not now");
        return NULL;
    }
    memory = mmap(NULL, sizeof(Crew) + (size_t)count * sizeof(Worker), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        raise_os_error(state, errno, "cannot share memory", "between workers", "");
        return NULL;
    }
    /* Two workers may wake for a connection that only one of them gets. */
    flags = fcntl(filter.listener, F_GETFL);
    if (flags < 0 || fcntl(filter.listener, F_SETFL, flags | O_NONBLOCK) < 0 ||
        (dummy = open_dummy_listener()) < 0) {
        int code = errno;
        munmap(memory, sizeof(Crew) + (size_t)count * sizeof(Worker));
        raise_os_error(state, code, "cannot share", "the listening socket", "");
        return NULL;
    }
    crew = memory;
    crew->count = (int)count;
    atomic_store(&crew->numbers, atomic_load(numbers));
    numbers = &crew->numbers;
    supervisor = getpid();
    Py_RETURN_NONE;
}

/* _become_worker(index, lifeline, report): in the child, after the fork.  The socket's path is
 * the supervisor's to remove. */
PyObject *
become_worker(PyObject *module, PyObject *args)
{
    module_state *state = PyModule_GetState(module);
    int index;

    if (!PyArg_ParseTuple(args, "iii:_become_worker", &index, &lifeline, &report)) {
        return NULL;
    }
    if (crew == NULL || index < 0 || index >= crew->count || getpid() == supervisor) {
        PyErr_SetString(state->error, "_become_worker: no worker here");
        return NULL;
    }
    free(filter.path);
    filter.path = NULL;
    take_place_for_counting(index + 1);
    me = &crew->workers[index];
    atomic_store(&me->connections, 0);
    atomic_store(&me->slow, false);
#ifdef __linux__
    /* While it prepares, nothing has begun that would have to end well. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (getppid() != supervisor) {
        end_of_line();
    }
    Py_RETURN_NONE;
}

/* _fork_worker(serve): like os.fork(), but the child calls serve() and ends with the status that
 * it returns: no frame of the caller goes on there, whatever is raised. */
PyObject *
fork_worker(PyObject *Py_UNUSED(module), PyObject *serve)
{
    PyObject *os = PyImport_ImportModule("os");
    PyObject *pid = os == NULL ? NULL : PyObject_CallMethod(os, "fork", NULL);
    PyObject *status;
    long code;

    Py_XDECREF(os);
    if (pid == NULL || PyLong_AsLong(pid) != 0) {
        return pid;
    }
    status = PyObject_CallNoArgs(serve);
    code = status == NULL ? -1 : PyLong_AsLong(status);
    if (PyErr_Occurred()) {
        PyErr_WriteUnraisable(serve);
        code = 1;
    }
    _exit((int)code & 0xFF);
}

/* _worker_gone(index): in the supervisor, once the worker has ended. */
PyObject *
worker_gone(PyObject *Py_UNUSED(module), PyObject *value)
{
    long index = PyLong_AsLong(value);

    if (index == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (crew != NULL && index >= 0 && index < crew->count) {
        atomic_store(&crew->workers[index].serving, false);
        atomic_store(&crew->workers[index].connections, 0);
    }
    Py_RETURN_NONE;
}

/* _stop_state(): (was stop() called?, the drain timeout, how long close callbacks may take), both
 * in milliseconds */
PyObject *
stop_state(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    share_drain_timeout();
    return Py_BuildValue("(Nii)", PyBool_FromLong(atomic_load(&filter.stop_wanted)),
                         atomic_load(crew != NULL ? &crew->drain_ms : &filter.drain_ms),
                         (int)(CLOSE_SECONDS * 1000));
}

/* _unique_id(): a number that no process of this filter has given out before. */
PyObject *
unique_id(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLong(atomic_fetch_add(numbers, 1) + 1);
}

PyObject *
last_unique_id(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLong(atomic_load(numbers));
}
