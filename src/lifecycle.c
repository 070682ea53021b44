/* The life of a filter, from main() to the end of the process.
 *
 * main() runs libmilter's listener on a thread of its own and waits in poll() for a reason to
 * stop.  libmilter's own way to stop is not used: it cuts messages in progress, takes up to
 * five seconds and removes whatever then stands at the socket's path.  Instead:
 *
 *  1. The listening descriptor is replaced by one that nobody can reach, and the unix
 *     socket is removed if it is still ours.
 *  2. New messages are refused (451 4.3.2); those in progress may end, up to the deadline.
 *  3. The connections are shut down for reading.  libmilter still writes the replies that it
 *     owes, then sees the end of each connection and calls close.
 *  4. libmilter's threads stay asleep until the process ends; smfi_main() does not return.
 */

#include "milter.h"

static bool
stop_is_wanted(void)
{
    return atomic_load(&filter.stop_wanted) || atomic_load(&filter.listener_ended) ||
           atomic_load(&filter.forked);
}

static bool
messages_are_done(void)
{
    return atomic_load(&filter.messages) == 0;
}

static bool
gate_is_empty(void)
{
    return atomic_load(&filter.inside) == 0;
}

/* And the threads that closed them are out of Python again. */
static bool
contexts_are_closed(void)
{
    unsigned long deleted = atomic_load(&filter.deleted); /* first: it never gets ahead */

    return deleted == atomic_load(&filter.created) && gate_is_empty();
}

static int
milliseconds_until(double deadline)
{
    double left = deadline - monotonic_now();

    return left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1;
}

/* Wait until `done`, or for the deadline (< 0: none).  Python's signal handlers run meanwhile;
 * what they raise stops the filter. */
static bool
wait_until(module_state *state, bool (*done)(void), double deadline)
{
    char bytes[64];
    ssize_t count;

    while (!done()) {
        int timeout = deadline < 0 ? -1 : Py_MIN(milliseconds_until(deadline), BEAT_MILLISECONDS);
        struct pollfd wait = {.fd = filter.pipe[0], .events = POLLIN};
        /* First, as a signal may have come before Python knew of the pipe. */
        if (PyErr_CheckSignals() < 0) {
            stop_with_exception(state);
            continue;
        }
        if (atomic_load(&filter.forked)) {
            return true; /* a handler forked, and this is the child */
        }
        if (timeout == 0) {
            return false;
        }
        Py_BEGIN_ALLOW_THREADS
        if (poll_and_tend_pool(&wait, timeout) > 0) {
            while ((count = read(filter.pipe[0], bytes, sizeof bytes)) > 0) {
                forward_signals(bytes, count);
            }
        }
        Py_END_ALLOW_THREADS
        atomic_fetch_add(&filter.beat, 1);
    }
    return true;
}

/* Steps 1 to 3 of the comment above. */
static void
drain(module_state *state)
{
    double deadline = monotonic_now() + drain_seconds();
    LocalAddress local = {0};

    if (atomic_load(&filter.forked)) {
        return; /* sockets and connections are the parent's */
    }
    atomic_store(&filter.draining, true);
    stop_listening(&local);
    if (!wait_until(state, messages_are_done, deadline)) {
        log_record("warning",
                   PyUnicode_FromFormat("stopped with %ld messages still in progress after %d s",
                                        atomic_load(&filter.messages), (int)drain_seconds()),
                   NULL);
    }
    if (atomic_load(&filter.forked)) {
        return;
    }
    end_connections(&local);
    if (!atomic_load(&filter.listener_ended)) {
        wait_until(state, contexts_are_closed, monotonic_now() + CLOSE_SECONDS);
    }
}

/* libmilter's threads inherit this mask.  It is set in the new thread, which besides waits until
 * its maker is out of pthread_create(): a signal that came while the maker blocked signals, as
 * pthread_create() does too, would wait for libmilter's signal thread and be taken by it. */
static sigset_t libmilter_mask;
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;

static void *
run_libmilter(void *Py_UNUSED(arg))
{
    pthread_sigmask(SIG_SETMASK, &libmilter_mask, NULL);
    be_listener();
    pthread_mutex_lock(&starting);
    pthread_mutex_unlock(&starting);
    atomic_store(&filter.result, smfi_main());
    atomic_store(&filter.listener_ended, true);
    wake_main();
    return NULL;
}

/* libmilter takes the default size of stacks, which is 128 KiB with musl, and what `ulimit -s` says
 * with glibc; Python's limit of recursion relies on more. */
static void
ensure_stack(void)
{
#ifdef __linux__
    pthread_attr_t defaults;
    size_t size;

    if (pthread_getattr_default_np(&defaults) != 0) {
        return;
    }
    if (pthread_attr_getstacksize(&defaults, &size) == 0 && size < LEAST_STACK &&
        pthread_attr_setstacksize(&defaults, LEAST_STACK) == 0) {
        pthread_setattr_default_np(&defaults);
    }
    pthread_attr_destroy(&defaults);
#endif
}

/* libmilter's threads block every signal that a program handles; a thread that comes to run a
 * callback goes back to the mask of the one that called main(). */
static int
start_libmilter(module_state *state)
{
    pthread_t thread;
    pthread_attr_t attributes;
    int code;

    fill_but_faults(&libmilter_mask);
    ensure_stack();
    prepare_parking(&libmilter_mask);
    prepare_door(&libmilter_mask);
    pthread_sigmask(SIG_SETMASK, NULL, &filter.mask);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_mutex_lock(&filter.startup);
    pthread_mutex_lock(&starting);
    code = pthread_create(&thread, &attributes, run_libmilter, NULL);
    pthread_mutex_unlock(&starting);
    pthread_attr_destroy(&attributes);
    if (code == 0) {
        Py_BEGIN_ALLOW_THREADS
        park_signal_thread();
        Py_END_ALLOW_THREADS
    }
    pthread_mutex_unlock(&filter.startup);
    if (code != 0) {
        cancel_parking();
        return raise_os_error(state, code, "cannot start", "libmilter's thread", "");
    }
    return 0;
}

/* A pipe to wake poll() by; no matter how much is written to it. */
bool
open_wake_pipe(int ends[2])
{
#ifdef SOCK_CLOEXEC /* where there is this, there is also pipe2() */
    return pipe2(ends, O_NONBLOCK | O_CLOEXEC) == 0;
#else
    if (pipe(ends) < 0) {
        return false;
    }
    for (int i = 0; i < 2; i++) {
        fcntl(ends[i], F_SETFL, O_NONBLOCK);
        fcntl(ends[i], F_SETFD, FD_CLOEXEC);
    }
    return true;
#endif
}

int
open_pipe(module_state *state)
{
    static bool hooked;
    static bool prepared;
    int ends[2];

    if (filter.pipe[0] < 0) {
        if (!open_wake_pipe(ends)) {
            return raise_os_error(state, errno, "cannot create", "a pipe", "");
        }
        filter.pipe[0] = ends[0];
        filter.pipe[1] = ends[1];
    }
    prepared = prepared || prepare_threads();
    hooked = hooked || (prepared && pthread_atfork(NULL, NULL, give_back_signals) == 0);
    return hooked ? 0 : raise_os_error(state, EAGAIN, "cannot prepare", "threads", "");
}

static bool
main_runs(void)
{
    return filter.phase == STARTING || filter.phase == RUNNING;
}

/* Registered with atexit: the interpreter goes, libmilter's threads stay.  A filter that runs
 * on another thread drains first; then nobody enters Python any more. */
PyObject *
close_gate(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = PyModule_GetState(module);
    double deadline = monotonic_now() + drain_seconds() + CLOSE_SECONDS + 1;

    if (main_runs()) {
        atomic_store(&filter.stop_wanted, true);
        while (main_runs() && monotonic_now() < deadline) {
            if (PyErr_CheckSignals() < 0) {
                stop_with_exception(state); /* enough of waiting */
                break;
            }
            wake_main();
            Py_BEGIN_ALLOW_THREADS
            usleep(5000); /* main() has the pipe; it is not for two readers */
            Py_END_ALLOW_THREADS
        }
    }
    atomic_store(&filter.gate_closed, true);
    if (!atomic_load(&filter.forked)) {
        wait_until(state, gate_is_empty, monotonic_now() + 1);
    }
    Py_RETURN_NONE;
}

/* Registered with os.register_at_fork: the filter is the parent's.  libmilter's threads are not
 * here, so nothing will end what they began, and the socket is not ours to remove. */
PyObject *
after_fork_in_child(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return_wakeup_fd();
#ifdef Py_GIL_DISABLED
    filter.guard = (PyMutex){0}; /* its holder may not have been forked */
#endif
    filter.phase = STOPPED;
    for (int i = 0; i < 2; i++) {
        if (filter.pipe[i] >= 0) {
            close(filter.pipe[i]); /* what is written there is for the parent */
            filter.pipe[i] = -1;
        }
    }
    release_descriptors();
    drop_sockets();
    free(filter.path);
    filter.path = NULL;
    atomic_store(&filter.gate_closed, true);
    atomic_store(&filter.inside, 0);
    atomic_store(&filter.forked, true);
    forget_supervisor();
    Py_RETURN_NONE;
}

/* Have the interpreter call us when it exits, and in the children that it forks. */
int
hook_interpreter(PyObject *module, module_state *state)
{
    PyObject *threading, *atexit, *os, *function, *hook = NULL, *keywords = NULL, *done = NULL;

    if (state->hooked) {
        return 0;
    }
    /* Before CPython 3.13, whichever thread imports it first is the main thread for it. */
    threading = PyImport_ImportModule("threading");
    if (threading == NULL) {
        return -1;
    }
    Py_DECREF(threading);
    atexit = PyImport_ImportModule("atexit");
    os = atexit == NULL ? NULL : PyImport_ImportModule("os");
    if (os == NULL) {
        Py_XDECREF(atexit);
        return -1;
    }
    hook = PyObject_GetAttrString(os, "register_at_fork");
    function = hook == NULL ? NULL : PyObject_GetAttrString(module, "_after_fork_in_child");
    keywords = function == NULL ? NULL : Py_BuildValue("{sN}", "after_in_child", function);
    function = keywords == NULL ? NULL : PyObject_GetAttrString(module, "_close_gate");
    if (function != NULL) {
        PyObject *none = PyTuple_New(0);
        done = none == NULL ? NULL : PyObject_Call(hook, none, keywords);
        Py_XDECREF(none);
        Py_XSETREF(done,
                   done == NULL ? NULL : PyObject_CallMethod(atexit, "register", "O", function));
    }
    state->hooked = done != NULL;
    Py_XDECREF(atexit);
    Py_XDECREF(os);
    Py_XDECREF(hook);
    Py_XDECREF(keywords);
    Py_XDECREF(function);
    Py_XDECREF(done);
    return state->hooked ? 0 : -1;
}

void
warn_of_few_descriptors(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < COMFORTABLE_FILES) {
        log_record("warning",
                   PyUnicode_FromFormat("the limit of open files is %d; each connection of the MTA "
                                        "takes one, and libmilter spins when none is left",
                                        (int)limit.rlim_cur),
                   NULL);
    }
}

/* From opening the doors to an empty house. */
int
run_filter(module_state *state)
{
    bool main_thread = borrow_wakeup_fd();
    PyObject *failure = NULL;
    int started;

    take_signals(main_thread);
    filter.phase = RUNNING;
    reserve_descriptors();
    started = start_libmilter(state);
    if (started == 0) {
        begin_work();
        wait_until(state, stop_is_wanted, -1);
        end_work();
        drain(state);
    }
    else {
        failure = take_exception(); /* what follows must not run with it set */
    }
    return_wakeup_fd();
    release_descriptors();
    atomic_store(&filter.drained, started == 0);
    /* A worker process ends now; who stops its whole group may send it one more until then. */
    if (!is_worker_process()) {
        give_back_signals();
    }
    filter.phase = started == 0 ? STOPPED : SOCKET_OPEN;
    if (!atomic_load(&filter.forked)) {
        take_put_off_action();
    }
    if (failure != NULL) {
        raise_exception(failure);
    }
    return started;
}
