/* The life of a filter, from main() to the end of the process.
 *
 * main() runs libmilter's listener on a thread of its own and waits in poll() for a reason to
 * stop.  libmilter's own way to stop is not used: it cuts messages in progress, takes up to
 * five seconds and removes whatever then stands at the socket's path.  Instead:
 *
 *  1. The listening descriptor is replaced by one that nobody connects to, and the unix
 *     socket is removed if it is still ours.
 *  2. New messages are refused (451 4.3.2); those in progress may end, up to the deadline.
 *  3. The connections are shut down for reading.  libmilter still writes the replies that it
 *     owes, then sees the end of each connection and calls close.
 *  4. libmilter's threads stay asleep until the process ends; smfi_main() does not return.
 *
 * libmilter has a thread that waits for HUP, INT and TERM, which it blocks in its others.  The
 * kernel prefers the main thread of a process, where they are not blocked, so they arrive there:
 * in Python's handler if the application installed one, in on_stop_signal() otherwise.
 */

#include "milter.h"

#define STOP_SIGNALS 3
static const int stop_signals[STOP_SIGNALS] = {SIGTERM, SIGINT, SIGHUP};
static struct sigaction previous_actions[STOP_SIGNALS];
static bool taken_signals[STOP_SIGNALS];

static void
on_stop_signal(int number)
{
    int none = 0;

    atomic_compare_exchange_strong(&filter.signal, &none, number);
    atomic_store(&filter.stop_wanted, true);
    wake_main();
}

/* May we take this signal?  Yes where nobody else cares: the default action, or Python's own
 * handler of SIGINT, which raises KeyboardInterrupt. */
static bool
is_default_action(int number, const struct sigaction *action)
{
    PyObject *module, *handler = NULL, *theirs = NULL;
    bool is_default;

    if (action->sa_handler == SIG_DFL) {
        return true;
    }
    if (action->sa_handler == SIG_IGN || number != SIGINT) {
        return false;
    }
    module = PyImport_ImportModule("signal");
    if (module != NULL) {
        handler = PyObject_CallMethod(module, "getsignal", "i", number);
        theirs = PyObject_GetAttrString(module, "default_int_handler");
    }
    is_default = handler != NULL && handler == theirs;
    PyErr_Clear();
    Py_XDECREF(module);
    Py_XDECREF(handler);
    Py_XDECREF(theirs);
    return is_default;
}

static void
take_signals(void)
{
    struct sigaction action = {.sa_handler = on_stop_signal, .sa_flags = SA_RESTART};

    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < STOP_SIGNALS; i++) {
        struct sigaction *previous = &previous_actions[i];
        taken_signals[i] = sigaction(stop_signals[i], NULL, previous) == 0 &&
                           is_default_action(stop_signals[i], previous) &&
                           sigaction(stop_signals[i], &action, NULL) == 0;
    }
}

/* Also runs in a forked child, so only async-signal-safe calls. */
static void
give_back_signals(void)
{
    struct sigaction current;

    for (size_t i = 0; i < STOP_SIGNALS; i++) {
        if (taken_signals[i] && sigaction(stop_signals[i], NULL, &current) == 0 &&
            current.sa_handler == on_stop_signal) {
            sigaction(stop_signals[i], &previous_actions[i], NULL);
        }
        taken_signals[i] = false;
    }
}

static bool
in_main_thread(void)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread =
        threading == NULL ? NULL : PyObject_CallMethod(threading, "main_thread", NULL);
    PyObject *ident = thread == NULL ? NULL : PyObject_GetAttrString(thread, "ident");
    bool same = ident != NULL && PyLong_Check(ident) &&
                PyLong_AsUnsignedLong(ident) == PyThread_get_thread_ident();

    PyErr_Clear();
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    return same;
}

static bool
stop_is_wanted(void)
{
    return atomic_load(&filter.stop_wanted) || atomic_load(&filter.listener_ended);
}

static bool
messages_are_done(void)
{
    return atomic_load(&filter.messages) == 0;
}

static bool
contexts_are_closed(void)
{
    return atomic_load(&filter.created) == atomic_load(&filter.deleted);
}

static bool
gate_is_empty(void)
{
    return atomic_load(&filter.inside) == 0;
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
    char drop[64];

    while (!done()) {
        int timeout = deadline < 0 ? -1 : milliseconds_until(deadline);
        struct pollfd wait = {.fd = filter.pipe[0], .events = POLLIN};
        if (timeout == 0) {
            return false;
        }
        Py_BEGIN_ALLOW_THREADS
        if (poll(&wait, 1, timeout) > 0) {
            while (read(filter.pipe[0], drop, sizeof drop) > 0) {
            }
        }
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            stop_with_exception(state);
        }
    }
    return true;
}

/* Python's own C handler of signals writes to this descriptor: a signal whose handler is in
 * Python wakes main() whichever thread it arrives on.  Returns the one before, or -1. */
static int
set_wakeup_fd(int fd)
{
    PyObject *module = PyImport_ImportModule("signal");
    PyObject *function = NULL, *args = NULL, *keywords = NULL, *old = NULL;
    int before = -1;

    if (module != NULL && (function = PyObject_GetAttrString(module, "set_wakeup_fd")) != NULL &&
        (args = Py_BuildValue("(i)", fd)) != NULL &&
        (keywords = Py_BuildValue("{sO}", "warn_on_full_buffer", Py_False)) != NULL &&
        (old = PyObject_Call(function, args, keywords)) != NULL) {
        before = (int)PyLong_AsLong(old);
    }
    PyErr_Clear(); /* the application's descriptor may be closed by now */
    Py_XDECREF(old);
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return before;
}

/* Steps 1 to 3 of the comment above. */
static void
drain(module_state *state)
{
    double deadline = monotonic_now() + filter.drain_seconds;
    LocalAddress local = {0};

    atomic_store(&filter.draining, true);
    stop_listening(&local);
    if (!wait_until(state, messages_are_done, deadline)) {
        log_record("warning",
                   PyUnicode_FromFormat("stopped with %ld messages still in progress after %d s",
                                        atomic_load(&filter.messages), (int)filter.drain_seconds),
                   NULL);
    }
    end_connections(&local);
    wait_until(state, contexts_are_closed, monotonic_now() + CLOSE_SECONDS);
}

static void *
run_libmilter(void *Py_UNUSED(arg))
{
    atomic_store(&filter.result, smfi_main());
    atomic_store(&filter.listener_ended, true);
    wake_main();
    return NULL;
}

/* libmilter's threads start with every signal blocked that a program handles; a thread that
 * comes to run a callback goes back to the mask of the one that called main(). */
int
start_libmilter(module_state *state)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all;
    int code;

    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &filter.mask);
    code = pthread_create(&thread, &attributes, run_libmilter, NULL);
    pthread_sigmask(SIG_SETMASK, &filter.mask, NULL);
    pthread_attr_destroy(&attributes);
    if (code != 0) {
        return raise_os_error(state, code, "cannot start", "libmilter's thread", "");
    }
    return 0;
}

int
open_pipe(module_state *state)
{
    static bool hooked;

    if (filter.pipe[0] < 0) {
        if (pipe(filter.pipe) < 0) {
            return raise_os_error(state, errno, "cannot create", "a pipe", "");
        }
        for (int i = 0; i < 2; i++) {
            fcntl(filter.pipe[i], F_SETFL, O_NONBLOCK);
            fcntl(filter.pipe[i], F_SETFD, FD_CLOEXEC);
        }
    }
    if (!hooked) {
        hooked = prepare_threads() && pthread_atfork(NULL, NULL, give_back_signals) == 0;
    }
    return 0;
}

/* Registered with atexit: the interpreter goes, libmilter's threads stay.  A filter that runs
 * on another thread drains first; then nobody enters Python any more. */
PyObject *
close_gate(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = PyModule_GetState(module);
    double deadline = monotonic_now() + filter.drain_seconds + CLOSE_SECONDS + 1;

    if (filter.phase == RUNNING) {
        atomic_store(&filter.stop_wanted, true);
        while (filter.phase == RUNNING && monotonic_now() < deadline) {
            wake_main();
            Py_BEGIN_ALLOW_THREADS
            usleep(5000); /* main() has the pipe; it is not for two readers */
            Py_END_ALLOW_THREADS
        }
    }
    atomic_store(&filter.gate_closed, true);
    wait_until(state, gate_is_empty, monotonic_now() + 1);
    Py_RETURN_NONE;
}

/* Registered with os.register_at_fork: the child's signals are not the parent's business. */
PyObject *
leave_wakeup_fd(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    if (filter.wakeup_set) {
        filter.wakeup_set = false;
        set_wakeup_fd(-1);
    }
    Py_RETURN_NONE;
}

/* Have the interpreter call us when it exits, and in the children that it forks. */
int
hook_interpreter(PyObject *module, module_state *state)
{
    PyObject *atexit, *os, *function, *hook = NULL, *keywords = NULL, *done = NULL;

    if (state->hooked) {
        return 0;
    }
    atexit = PyImport_ImportModule("atexit");
    os = PyImport_ImportModule("os");
    hook = os == NULL ? NULL : PyObject_GetAttrString(os, "register_at_fork");
    function = PyObject_GetAttrString(module, "_leave_wakeup_fd");
    keywords = function == NULL ? NULL : Py_BuildValue("{sN}", "after_in_child", function);
    function = PyObject_GetAttrString(module, "_close_gate");
    if (atexit != NULL && hook != NULL && keywords != NULL && function != NULL) {
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

/* Take a signal's action that was put off until the filter had drained. */
static void
take_put_off_action(void)
{
    int number = atomic_load(&filter.signal);

    if (number != 0) {
        kill(getpid(), number);
    }
}

/* From a running libmilter to a drained one. */
void
run_filter(module_state *state)
{
    bool main_thread = in_main_thread();
    int wakeup = -1;

    take_signals();
    if (main_thread) {
        wakeup = set_wakeup_fd(filter.pipe[1]);
        filter.wakeup_set = true;
    }
    wait_until(state, stop_is_wanted, -1);
    drain(state);
    if (main_thread) {
        filter.wakeup_set = false;
        set_wakeup_fd(wakeup);
    }
    give_back_signals();
    filter.phase = STOPPED;
    if (!main_thread) {
        take_put_off_action();
    }
}
