/* Signals while a filter runs.
 *
 * They reach the program's own threads: no thread of an engine takes one.  It is Python's handler
 * that runs if the application installed one, on_stop_signal() where the default action, or
 * Python's KeyboardInterrupt, was in place.
 */

#include "signals.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include "clock.h"
#include "process.h"
#include "report.h"
#include "signal_sets.h"
#include "wake.h"

static struct sigaction previous_actions[STOP_SIGNALS];
static bool taken_signals[STOP_SIGNALS];

static atomic_bool action_put_off; /* main() is not on the main thread: the action comes later */
static atomic_bool held_back;      /* the main thread waits in hold_back() */
static atomic_int stopped_by;      /* the signal that stopped the filter, or 0 */
static atomic_bool drained;        /* nothing more will be answered */
static atomic_ulong beat;          /* counts the rounds of main()'s waiting */

static int wakeup_before; /* the descriptor that the application had set, or -1 */
static bool wakeup_set;   /* Python writes signals to main()'s pipe */

void
show_sign_of_life(void)
{
    atomic_fetch_add(&beat, 1);
}

void
say_drained(bool is_drained)
{
    atomic_store(&drained, is_drained);
}

/* ------------------------------------------------ a signal that stops the filter */

static void
take_action(int number)
{
    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (stop_signals[i] != number) {
            continue;
        }
        if (previous_actions[i].sa_handler == SIG_DFL) {
            sigaction(number, &previous_actions[i], NULL);
            raise(number);
        }
        else {
            previous_actions[i].sa_handler(number); /* Python's: it makes a note */
        }
    }
}

/* main() runs on another thread, and the main thread of the program sleeps in a system call
 * that this signal would end: a program would go on that should die, but not before the filter
 * has drained.  So sleep on here.  Only without the interpreter lock, which draining needs; and
 * only while draining shows a sign of life, should this thread hold some other lock. */
static void
hold_back(int number)
{
    double end = monotonic_now() + drain_seconds() + CLOSE_SECONDS + HURRY_SECONDS + 1;
    double last_sign = monotonic_now();
    unsigned long seen = atomic_load(&beat);

    if (atomic_exchange(&held_back, true)) {
        return;
    }
    while (!atomic_load(&drained) && monotonic_now() < end &&
           monotonic_now() < last_sign + CLOSE_SECONDS) {
        poll(NULL, 0, 10);
        if (seen != atomic_load(&beat)) {
            seen = atomic_load(&beat);
            last_sign = monotonic_now();
        }
    }
    atomic_store(&held_back, false); /* from here on main() takes the action, if it comes first */
    if (atomic_load(&drained) && atomic_exchange(&stopped_by, 0) != 0) {
        take_action(number);
    }
}

static bool
main_thread_sleeps(void)
{
#ifdef __linux__
    return syscall(SYS_gettid) == getpid() && !PyGILState_Check();
#else
    return false;
#endif
}

static void
on_stop_signal(int number)
{
    int saved = errno;
    int none = 0;

    atomic_compare_exchange_strong(&stopped_by, &none, number);
    ask_to_stop();
    if (atomic_load(&action_put_off) && main_thread_sleeps()) {
        hold_back(number);
    }
    errno = saved;
}

/* ------------------------------------------------------------- which signals */

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
    module = PyImport_ImportModule("_signal"); /* in C: no handler runs, and raises, in its calls */
    if (module != NULL) {
        handler = PyObject_CallMethod(module, "getsignal", "i", number);
    }
    if (handler != NULL) {
        theirs = PyObject_GetAttrString(module, "default_int_handler");
    }
    is_default = handler != NULL && handler == theirs;
    PyErr_Clear();
    Py_XDECREF(module);
    Py_XDECREF(handler);
    Py_XDECREF(theirs);
    return is_default;
}

void
take_signals(bool on_main_thread)
{
    /* No signal is blocked while the handler runs: a second one would be for somebody else.
     * System calls are not restarted after it, as with Python's own handlers. */
    struct sigaction action = {.sa_handler = on_stop_signal, .sa_flags = SA_NODEFER};

    atomic_store(&action_put_off, !on_main_thread);
    atomic_store(&stopped_by, 0);
    atomic_store(&drained, false);
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < STOP_SIGNALS; i++) {
        struct sigaction *previous = &previous_actions[i];
        taken_signals[i] = sigaction(stop_signals[i], NULL, previous) == 0 &&
                           is_default_action(stop_signals[i], previous) &&
                           sigaction(stop_signals[i], &action, NULL) == 0;
    }
}

/* Also runs in a forked child, so only async-signal-safe calls. */
void
give_back_signals(void)
{
    struct sigaction current;

    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (taken_signals[i] && sigaction(stop_signals[i], NULL, &current) == 0 &&
            current.sa_handler == on_stop_signal) {
            sigaction(stop_signals[i], &previous_actions[i], NULL);
        }
        taken_signals[i] = false;
    }
}

void
take_put_off_action(void)
{
    int number;

    if (!atomic_load(&action_put_off) || atomic_load(&held_back)) {
        return;
    }
    number = atomic_exchange(&stopped_by, 0);
    if (number != 0) {
        kill(getpid(), number);
    }
}

/* ------------------------------------------------------------ Python's signals */

/* Python's own C handler of signals writes their numbers to this descriptor: a signal whose
 * handler is in Python wakes main() whichever thread it arrives on.  The one before in `before`.
 * False with an exception set; no Python code, and so no handler, runs. */
static bool
set_wakeup_fd(int fd, bool warn, int *before)
{
    PyObject *module = PyImport_ImportModule("_signal");
    PyObject *function = NULL, *args = NULL, *keywords = NULL, *old = NULL;

    if (module != NULL && (function = PyObject_GetAttrString(module, "set_wakeup_fd")) != NULL &&
        (args = Py_BuildValue("(i)", fd)) != NULL &&
        (keywords = Py_BuildValue("{sO}", "warn_on_full_buffer", warn ? Py_True : Py_False)) !=
            NULL &&
        (old = PyObject_Call(function, args, keywords)) != NULL) {
        *before = (int)PyLong_AsLong(old);
    }
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(function);
    Py_XDECREF(module);
    Py_XDECREF(old);
    return old != NULL;
}

/* On another thread than the main one CPython refuses, by ValueError. */
bool
borrow_wakeup_fd(void)
{
    bool main_thread;

    wakeup_set = set_wakeup_fd(main_pipe_writer(), false, &wakeup_before);
    main_thread = wakeup_set || !PyErr_ExceptionMatches(PyExc_ValueError);
    PyErr_Clear();
    return main_thread;
}

void
return_wakeup_fd(void)
{
    if (wakeup_set) {
        int ours;
        wakeup_set = false;
        if (!set_wakeup_fd(wakeup_before, true, &ours)) {
            PyErr_Clear(); /* the application's descriptor may be closed by now */
        }
    }
}

/* ------------------------------------------------------ the supervisor's signals
 *
 * A handler may raise, and in Python there is no place where it may not.  So in the process that
 * supervises workers a note is made of each signal that Python handles, and Python learns of it
 * where the process waits, in here: every handler that is due has run when it goes on.  No signal
 * is blocked for that, as programs and threads that a handler starts would have it blocked, too. */

#define NUMBERS 128 /* more than there are signals */

static struct sigaction pythons_actions[NUMBERS];
static bool held_signals[NUMBERS];
static atomic_int noted[NUMBERS]; /* the process that the signal came to, or 0 */
static bool holding;

static sigset_t mask_before_fork;
static bool blocked_for_fork;

static void
note_signal(int number)
{
    atomic_store(&noted[number], getpid());
    wake_main();
}

static bool
is_noted(int number)
{
    return atomic_load(&noted[number]) != 0 && atomic_exchange(&noted[number], 0) == getpid();
}

static bool
is_still_held(int number)
{
    struct sigaction current;

    return held_signals[number] && sigaction(number, NULL, &current) == 0 &&
           current.sa_handler == note_signal;
}

/* Has the application a handler in Python for this signal?  Errors are cleared. */
static bool
is_handled_in_python(PyObject *module, int number)
{
    PyObject *handler = PyObject_CallMethod(module, "getsignal", "i", number);
    bool is_handled = handler != NULL && PyCallable_Check(handler);

    PyErr_Clear();
    Py_XDECREF(handler);
    return is_handled;
}

/* Make notes of the signals that Python handles.  Is one of them new? */
static bool
hold_pythons_signals(void)
{
    PyObject *module = PyImport_ImportModule("_signal");
    struct sigaction current;
    sigset_t others;
    bool any = false;

    fill_but_faults(&others);
    for (int i = 1; module != NULL && i < NUMBERS; i++) {
        if (sigismember(&others, i) == 1 && sigaction(i, NULL, &current) == 0 &&
            (current.sa_flags & SA_SIGINFO) == 0 && current.sa_handler != SIG_DFL &&
            current.sa_handler != SIG_IGN && current.sa_handler != note_signal &&
            is_handled_in_python(module, i)) {
            pythons_actions[i] = current;
            held_signals[i] = true;
            current.sa_handler = note_signal;
            any = sigaction(i, &current, NULL) == 0 || any;
        }
    }
    PyErr_Clear();
    Py_XDECREF(module);
    return any;
}

/* Have Python know of what was noted. */
static void
tell_python(void)
{
    for (int i = 1; i < NUMBERS; i++) {
        if (is_noted(i)) {
            if (is_still_held(i)) {
                pythons_actions[i].sa_handler(i); /* it makes a note of its own */
            }
            else {
                raise(i);
            }
        }
    }
}

/* Also runs in a forked child, so only async-signal-safe calls. */
static void
let_go_of_signals(void)
{
    for (int i = 1; i < NUMBERS; i++) {
        if (is_still_held(i)) {
            sigaction(i, &pythons_actions[i], NULL);
        }
        held_signals[i] = false;
    }
    for (int i = 1; i < NUMBERS; i++) {
        if (is_noted(i)) {
            raise(i);
        }
    }
    holding = false;
}

/* Run the handlers of all signals that Python knows of.  The first exception counts. */
static bool
run_handlers(void)
{
    PyObject *first = NULL;

    do {
        while (PyErr_CheckSignals() < 0) {
            PyObject *exception = take_exception();
            if (first != NULL) {
                Py_DECREF(exception);
            }
            else {
                first = exception;
            }
        }
    } while (holding && hold_pythons_signals()); /* a handler may have set others */
    if (first != NULL) {
        raise_exception(first);
        return false;
    }
    return true;
}

void
block_for_fork(void)
{
    sigset_t set;

    fill_but_faults(&set);
    blocked_for_fork = pthread_sigmask(SIG_BLOCK, &set, &mask_before_fork) == 0;
}

void
unblock_after_fork(void)
{
    if (blocked_for_fork) {
        blocked_for_fork = pthread_sigmask(SIG_SETMASK, &mask_before_fork, NULL) != 0;
    }
}

/* _hold_signals(on): have handlers run in _await() alone, or, also in a worker that was forked, as
 * ever; raises what a handler does. */
PyObject *
hold_signals(PyObject *Py_UNUSED(module), PyObject *value)
{
    static bool hooked;
    int on = PyObject_IsTrue(value);

    if (on > 0) {
        hooked = hooked || pthread_atfork(NULL, NULL, let_go_of_signals) == 0;
        if (!hooked) {
            return PyErr_NoMemory();
        }
        holding = true;
    }
    else if (on == 0) {
        let_go_of_signals();
        unblock_after_fork();
    }
    return on >= 0 && run_handlers() ? Py_NewRef(Py_None) : NULL;
}

/* _await(descriptors, timeout): wait until one of the descriptors can be read, a signal has come,
 * another thread has called stop(), or for so many milliseconds, where negative without end.
 * Handlers run, and what they raise is raised. */
PyObject *
await_news(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *descriptors;
    struct pollfd *wait;
    Py_ssize_t count;
    int timeout;

    if (!PyArg_ParseTuple(args, "O!i:_await", &PyList_Type, &descriptors, &timeout)) {
        return NULL;
    }
    count = PyList_GET_SIZE(descriptors);
    wait = PyMem_New(struct pollfd, (size_t)count + 1);
    if (wait == NULL) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        wait[i] = (struct pollfd){.fd = (int)PyLong_AsLong(PyList_GET_ITEM(descriptors, i)),
                                  .events = POLLIN};
    }
    wait[count] = (struct pollfd){.fd = main_pipe_reader(), .events = POLLIN};
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS
        if (poll(wait, (nfds_t)count + 1, timeout) > 0 && wait[count].revents != 0) {
            empty_main_pipe();
        }
        Py_END_ALLOW_THREADS
        tell_python(); /* after that: what comes now has filled the pipe again */
    }
    PyMem_Free(wait);
    return !PyErr_Occurred() && run_handlers() ? Py_NewRef(Py_None) : NULL;
}

/* The zeros are our own. */
void
forward_signals(const char *bytes, ssize_t count)
{
    for (ssize_t i = 0; i < count; i++) {
        if (bytes[i] != 0 && wakeup_set && wakeup_before >= 0) {
            (void)!write(wakeup_before, &bytes[i], 1);
        }
    }
}
