/* The life of a filter, from main() to the end of the process.
 *
 * main() has the engine serve on threads of its own and waits in poll() for a reason to stop. Then:
 *
 *  1. The unix socket is removed if it is still ours, and the engine stops accepting.
 *  2. New messages are refused (451 4.3.2); those in progress may end, up to the deadline.
 *  3. The engine ends the connections: it still writes the replies that it owes, and calls close.
 */

#include "lifecycle.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

#include "call.h"
#include "clock.h"
#include "context.h"
#include "crew.h"
#include "engine/choice.h"
#include "process.h"
#include "report.h"
#include "signals.h"
#include "socket.h"
#include "threads.h"
#include "wake.h"
#include "workers.h"

#define BEAT_MILLISECONDS 200 /* at least this often a drain shows that it is alive */
#define QUIET_SECONDS 1.0     /* a filter whose socket others have ends after so long with nobody */
#define COMFORTABLE_FILES 1024 /* below this soft limit accept() may run out of descriptors */

/* ------------------------------------------------------------------ its phases */

static atomic_int phase; /* changed under LOCK_STATE(), or by the thread that is in main() */
enum { SETTING_UP, SOCKET_OPEN, STARTING, RUNNING, STOPPED };

static atomic_bool stopped_listening;
static bool listener_is_shared;
static double last_connection; /* when there was one, after the handing over */

bool
is_setting_up(void)
{
    return phase == SETTING_UP;
}

bool
is_running(void)
{
    return phase == STARTING || phase == RUNNING;
}

/* _is_running(): is a thread in main()? */
PyObject *
tell_if_running(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(is_running());
}

static atomic_bool signals_left; /* to the program: main() takes none */

/* _leave_signals(on) */
PyObject *
leave_signals(PyObject *Py_UNUSED(module), PyObject *value)
{
    int on = PyObject_IsTrue(value);

    if (on < 0) {
        return NULL;
    }
    atomic_store(&signals_left, on);
    Py_RETURN_NONE;
}

/* _forget_stop(): it was meant for the filter that has ended, and shall not stop the next one. */
PyObject *
forget_stop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    if (phase == SETTING_UP || phase == SOCKET_OPEN) {
        atomic_store(&process_flags.stop_wanted, false);
    }
    Py_RETURN_NONE;
}

/* _stop_with(exception): stop the filter as if a callback had raised it. */
PyObject *
stop_with(PyObject *module, PyObject *exception)
{
    if (!PyExceptionInstance_Check(exception)) {
        PyErr_SetString(PyExc_TypeError, "_stop_with: an exception is needed");
        return NULL;
    }
    raise_exception(Py_NewRef(exception));
    stop_with_exception(PyModule_GetState(module));
    Py_RETURN_NONE;
}

static PyObject *
exchange_when_serving(module_state *state, PyObject *call)
{
    PyObject *before;

    LOCK_STATE();
    before = state->when_serving;
    state->when_serving = call;
    UNLOCK_STATE();
    return before;
}

/* _when_serving(call): what the next main() calls as soon as the filter serves and signals are
 * handled as they will be; before, libmilter's own thread may take one. */
PyObject *
when_serving(PyObject *module, PyObject *call)
{
    Py_XDECREF(exchange_when_serving(PyModule_GetState(module), Py_NewRef(call)));
    Py_RETURN_NONE;
}

/* What it raises ends the filter, as in a callback. */
static void
tell_that_it_serves(module_state *state)
{
    PyObject *call = exchange_when_serving(state, NULL), *result;

    if (call == NULL) {
        return;
    }
    result = PyObject_CallNoArgs(call);
    Py_DECREF(call);
    if (result == NULL) {
        stop_with_exception(state);
    }
    Py_XDECREF(result);
}

PyObject *
out_of_order(module_state *state, const char *call, const char *why)
{
    PyErr_Format(state->error, "%s: %s", call, why);
    return NULL;
}

bool
check_not_running(module_state *state, const char *call)
{
    return !is_running() || out_of_order(state, call, "not while main() runs") != NULL;
}

/* Why nothing can be set up in this phase; NULL in SETTING_UP. */
static const char *
why_no_setting_up(int now)
{
    return now == SETTING_UP    ? NULL
           : now == SOCKET_OPEN ? "the socket is open already"
           : now != STOPPED     ? "it runs already; there is one filter to a process"
           : is_forked()        ? "the filter is that of the process which forked this one"
           : is_libmilter()     ? "libmilter cannot start again in a process where it was stopped"
                                : "callbacks of the filter that was stopped have not returned";
}

PyObject *
refuse_setting_up(module_state *state, const char *call)
{
    const char *why = why_no_setting_up(phase);

    /* It may be over since the caller looked: our own engine serves again. */
    return out_of_order(state, call, why != NULL ? why : "not while main() runs");
}

/* Why the phase STARTING may not be claimed from this one. */
static const char *
why_no_start(int before, bool opens, bool named)
{
    return before != SETTING_UP && (opens || before != SOCKET_OPEN) ? why_no_setting_up(before)
           : named                                                  ? "call setconn() first"
                                                                    : "call register() first";
}

/* Claim the phase STARTING for `call`, which `opens` the socket; the phase before, or -1 with an
 * exception set. */
static int
claim_start(module_state *state, const char *call, bool opens)
{
    bool named, may_start;
    int before;

    LOCK_STATE();
    before = phase;
    named = state->name != NULL;
    may_start =
        (before == SETTING_UP || (before == SOCKET_OPEN && !opens)) && named && has_socket_name();
    if (may_start) {
        phase = STARTING; /* before anything lets another thread run */
        if (before == SETTING_UP) {
            atomic_store(&stopped_listening, false); /* a socket will be opened */
            listener_is_shared = false;
        }
    }
    UNLOCK_STATE();
    if (may_start) {
        return before;
    }
    out_of_order(state, call, why_no_start(before, opens, named));
    return -1;
}

void
activate(module_state *state)
{
    if (active_module == NULL || phase != STOPPED) {
        active_module = state;
    }
}

/* Not when it is set, as a program may choose by itself. */
static bool
is_engine_known(module_state *state)
{
    if (unknown_engine() != NULL) {
        PyErr_Format(state->invalid_argument,
                     "PYMILTER_ENGINE in the environment must be " ENGINE_NAMES ", not '%.80s'",
                     unknown_engine());
        return false;
    }
    return true;
}

int
open_before_main(module_state *state, bool remove_old)
{
    if (claim_start(state, "opensocket", true) < 0) {
        return -1;
    }
    if (!is_engine_known(state) || open_socket(state, remove_old) < 0) {
        phase = SETTING_UP;
        return -1;
    }
    phase = SOCKET_OPEN;
    return 0;
}

PyObject *
share_open_socket(PyObject *module, PyObject *value)
{
    return share_socket(module, value, phase == SOCKET_OPEN);
}

/* _listening_socket(): a duplicate of the listening socket, for another process, which is not
 * shut down with this one. */
PyObject *
duplicate_listener(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = PyModule_GetState(module);
    int code = 0, fd;

    /* In a hurry it is asked for between the service manager's READY=1 and the first callback. */
    if (phase == SETTING_UP || phase == STOPPED || stop_is_wanted() ||
        atomic_load(&stopped_listening) || listening_socket() < 0) {
        return out_of_order(state, "_listening_socket", "not now");
    }
    if (!listener_is_shared && !is_place_in_crew(0)) { /* else the crew has seen to it */
        code = engine->prepare_share();
    }
    listener_is_shared = code == 0;
    fd = code == 0 ? fcntl(listening_socket(), F_DUPFD_CLOEXEC, 3) : -1;
    if (fd < 0) {
        raise_os_error(state, code != 0 ? code : errno, "cannot share", "the listening socket", "");
        return NULL;
    }
    return PyLong_FromLong(fd);
}

/* _accepts(): may a new connection still come to this process, or to one of its workers? */
PyObject *
accepts_connections(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(is_place_in_crew(0) ? crew_serves() : !atomic_load(&stopped_listening));
}

/* _is_stopped(): was a stop asked for, or has it come so far that this is forgotten? */
PyObject *
tell_if_stopped(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(stop_is_wanted() || atomic_load(&stopped_listening));
}

/* _hand_over(milliseconds): another process serves the socket from now on, and removes its path.
 * Once stopped, this one goes on for so long with the connections that it has. */
PyObject *
hand_over_socket(PyObject *Py_UNUSED(module), PyObject *value)
{
    long milliseconds = PyLong_AsLong(value);

    if (milliseconds == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (milliseconds > 0) {
        forget_unix_socket();
    }
    set_patience((int)Py_MAX(0, Py_MIN(milliseconds, INT_MAX / 2)));
    wake_main();
    Py_RETURN_NONE;
}

void
set_drain_timeout(int wanted)
{
    atomic_store(&process_flags.drain_ms, wanted);
    share_drain_timeout(wanted);
}

/* ------------------------------------------------- what the engine tells and asks */

static atomic_bool engine_ended;
static atomic_int engine_result;
static bool engine_failed; /* and nobody had asked for a stop */

static void
note_end_of_engine(int result)
{
    atomic_store(&engine_result, result);
    atomic_store(&engine_ended, true);
    wake_main();
}

const struct engine_hooks engine_hooks = {
    .enter = enter_python,
    .leave = leave_python,
    .parallel = callbacks_at_once,
    .release = release_python,
    .reacquire = reacquire_python,
    .thread_ends = give_back_thread_state,
    .ended = note_end_of_engine,
    .hung_up = cancel_callback,
    .log = log_later,
};

/* --------------------------------------------------------------------- waiting */

static bool
has_reason_to_stop(void)
{
    return stop_is_wanted() || atomic_load(&engine_ended) || is_forked();
}

/* And callbacks that wait, be it before a message. */
static bool
messages_are_done(void)
{
    return take_census().messages == 0 && callbacks_that_wait() == 0;
}

static bool
gate_is_empty(void)
{
    return threads_inside() == 0;
}

/* And the threads that closed them are out of Python again. */
static bool
contexts_are_closed(void)
{
    Census census = take_census();

    return census.deleted == census.created && gate_is_empty();
}

/* Sleep until main() is woken or the time is over. */
static void
sleep_in_poll(int timeout)
{
    struct pollfd wait = {.fd = main_pipe_reader(), .events = POLLIN};
    char bytes[64];
    ssize_t count;

    if (engine->wait(&wait, 1, timeout) > 0) {
        while ((count = read(wait.fd, bytes, sizeof bytes)) > 0) {
            forward_signals(bytes, count);
        }
    }
}

/* Wait until `done`, or for the deadline (< 0: none).  Python's signal handlers run meanwhile;
 * what they raise stops the filter. */
static bool
wait_until(module_state *state, bool (*done)(void), double deadline)
{
    while (!done()) {
        int timeout = deadline < 0 ? -1 : Py_MIN(milliseconds_until(deadline), BEAT_MILLISECONDS);
        /* First, as a signal may have come before Python knew of the pipe. */
        if (PyErr_CheckSignals() < 0) {
            stop_with_exception(state);
            set_patience(0); /* a signal asks for the end, as one does that has no such handler */
            continue;
        }
        if (is_forked()) {
            return true; /* a handler forked, and this is the child */
        }
        log_what_waits();
        if (timeout == 0) {
            return false;
        }
        Py_BEGIN_ALLOW_THREADS
        sleep_in_poll(timeout);
        Py_END_ALLOW_THREADS
        show_sign_of_life();
    }
    return true;
}

/* -------------------------------------------------------------------- stopping */

/* First the path, as while our socket lives, nobody else has its inode. */
static void
stop_listening(void)
{
    if (atomic_load(&stopped_listening)) {
        return;
    }
    remove_unix_socket();
    Py_BEGIN_ALLOW_THREADS
    engine->stop_accepting();
    Py_END_ALLOW_THREADS
    atomic_store(&stopped_listening, true);
}

/* The engine's end; the phase in which the process is then.  Its threads give back what they have
 * of Python as they end, so they have to get in. */
static int
finish_engine(void)
{
    bool anew;

    Py_BEGIN_ALLOW_THREADS
    anew = engine->finish();
    Py_END_ALLOW_THREADS
    return anew && !is_forked() ? SETTING_UP : STOPPED;
}

/* Where it may serve again, what was asked of it is done. */
static void
enter_phase(int next)
{
    if (next == SETTING_UP) {
        atomic_store(&process_flags.stop_wanted, false);
        atomic_store(&process_flags.draining, false);
        atomic_store(&engine_ended, false);
    }
    phase = next;
}

/* main() was stopped before the engine ran. */
static void
end_before_start(void)
{
    phase = STOPPED;
    stop_listening();
    enter_phase(finish_engine());
}

/* Tell the loop of coroutines, where there is one. */
static void
tell_coroutines(const char *function)
{
    PyObject *modules = PyImport_GetModuleDict();
    PyObject *module = Py_XNewRef(PyDict_GetItemString(modules, "Milter._async"));
    PyObject *done = module == NULL ? NULL : PyObject_CallMethod(module, function, NULL);

    if (module != NULL && done == NULL) {
        PyErr_WriteUnraisable(module);
    }
    Py_XDECREF(done);
    Py_XDECREF(module);
}

/* Another generation accepts by now: is there nobody left here to be served, or no more time? */
static bool
is_deserted(void)
{
    if (patience() == 0 || atomic_load(&engine_ended)) {
        return true;
    }
    if (!contexts_are_closed()) {
        last_connection = monotonic_now();
    }
    /* One that was accepted at the last moment has no context before it speaks. */
    return monotonic_now() >= last_connection + QUIET_SECONDS;
}

/* Until each connection is closed.  Coroutines that are left in abort or close by then are
 * cancelled; that of a close which follows such an abort, too, for as long as the loop is there. */
static void
wait_for_close(module_state *state)
{
    if (!wait_until(state, contexts_are_closed, monotonic_now() + CLOSE_SECONDS) &&
        callbacks_that_wait() > 0) {
        tell_coroutines("cancel_rest");
        wait_until(state, contexts_are_closed, monotonic_now() + HURRY_SECONDS);
    }
}

/* The deadline is over, and not all have ended. */
static void
warn_of_messages(void)
{
    char *seconds = PyOS_double_to_string(drain_seconds(), 'r', 0, 0, NULL);
    PyObject *message =
        seconds == NULL
            ? NULL
            : PyUnicode_FromFormat("stopped with %ld messages still in progress after %s s",
                                   take_census().messages, seconds);

    log_record("warning", message, NULL);
    PyMem_Free(seconds);
}

/* Where others serve the socket by now: serve whom there is.  Then steps 1 to 3, as at the top of
 * this file. */
static void
drain(module_state *state)
{
    double deadline;

    if (is_forked()) {
        return; /* sockets and connections are the parent's */
    }
    if (patience() > 0) {
        stop_listening();
        last_connection = monotonic_now();
        wait_until(state, is_deserted, last_connection + patience() / 1000.0);
        if (is_forked()) {
            return;
        }
    }
    deadline = monotonic_now() + drain_seconds();
    atomic_store(&process_flags.draining, true);
    stop_listening();
    if (!wait_until(state, messages_are_done, deadline) && take_census().messages > 0) {
        warn_of_messages();
    }
    if (is_forked()) {
        return;
    }
    /* In this order: the engine has to know that it ends when it completes those. */
    Py_BEGIN_ALLOW_THREADS
    engine->end();
    Py_END_ALLOW_THREADS
    tell_coroutines("cancel_all");
    if (!atomic_load(&engine_ended)) {
        wait_for_close(state);
    }
}

/* Registered with atexit: the interpreter goes, the engine's threads stay.  A filter that runs
 * on another thread drains first; then nobody enters Python any more. */
PyObject *
close_gate(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = PyModule_GetState(module);
    double deadline = monotonic_now() + drain_seconds() + CLOSE_SECONDS + HURRY_SECONDS + 1;

    if (is_running()) {
        ask_to_stop();
        while (is_running() && monotonic_now() < deadline) {
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
    shut_gate();
    if (!is_forked()) {
        wait_until(state, gate_is_empty, monotonic_now() + 1);
    }
    Py_RETURN_NONE;
}

/* CPython before 3.11.8 and 3.12.2: where the thread that forked is an engine's, and threading
 * knows of it, as it logged for one, it is the main thread from now on but cannot end as such,
 * which all that waits for the threads of the child trips over.  There it becomes what it would be,
 * had threading not known of it.  Errors are cleared: the end of the child tells of them. */
static void
become_main_thread(void)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *kind = threading == NULL ? NULL : PyObject_GetAttrString(threading, "_DummyThread");
    PyObject *thread = kind == NULL ? NULL : PyObject_GetAttrString(threading, "_main_thread");
    PyObject *made = NULL;

    if (thread != NULL && (PyObject *)Py_TYPE(thread) == kind) {
        made = PyObject_CallMethod(threading, "_MainThread", NULL);
    }
    if (made != NULL) {
        PyObject_SetAttrString(threading, "_main_thread", made);
    }
    PyErr_Clear();
    Py_XDECREF(made);
    Py_XDECREF(thread);
    Py_XDECREF(kind);
    Py_XDECREF(threading);
}

/* Registered with os.register_at_fork: the filter is the parent's.  The engine's threads are not
 * here, so nothing will end what they began, and the socket is not ours to remove.  Where a filter
 * has ended and the next one is being set up, nothing was begun: the child may go on with that. */
PyObject *
after_fork_in_child(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
#ifdef Py_GIL_DISABLED
    state_guard = (PyMutex){0}; /* its holder may not have been forked */
#endif
    if (phase == SETTING_UP || phase == SOCKET_OPEN) {
        Py_RETURN_NONE;
    }
    return_wakeup_fd();
    phase = STOPPED;
    close_main_pipe();
    engine->forget();
    forget_unix_socket();
    forget_threads();
    atomic_store(&process_flags.forked, true);
    forget_supervisor();
    become_main_thread();
    Py_RETURN_NONE;
}

/* -------------------------------------------------------------------- starting */

/* Have the interpreter call us in the children that it forks. */
static bool
hook_forks(PyObject *module)
{
    PyObject *os = PyImport_ImportModule("os");
    PyObject *hook = os == NULL ? NULL : PyObject_GetAttrString(os, "register_at_fork");
    PyObject *function =
        hook == NULL ? NULL : PyObject_GetAttrString(module, "_after_fork_in_child");
    PyObject *keywords =
        function == NULL ? NULL : Py_BuildValue("{sN}", "after_in_child", function);
    PyObject *none = keywords == NULL ? NULL : PyTuple_New(0);
    PyObject *done = none == NULL ? NULL : PyObject_Call(hook, none, keywords);
    bool hooked = done != NULL;

    Py_XDECREF(done);
    Py_XDECREF(none);
    Py_XDECREF(keywords);
    Py_XDECREF(hook);
    Py_XDECREF(os);
    return hooked;
}

/* Have the interpreter call us when it exits. */
static bool
hook_exit(PyObject *module)
{
    PyObject *atexit = PyImport_ImportModule("atexit");
    PyObject *function = atexit == NULL ? NULL : PyObject_GetAttrString(module, "_close_gate");
    PyObject *done =
        function == NULL ? NULL : PyObject_CallMethod(atexit, "register", "O", function);
    bool hooked = done != NULL;

    Py_XDECREF(done);
    Py_XDECREF(function);
    Py_XDECREF(atexit);
    return hooked;
}

static int
hook_interpreter(PyObject *module, module_state *state)
{
    PyObject *threading;

    if (state->hooked) {
        return 0;
    }
    /* Before CPython 3.13, whichever thread imports it first is the main thread for it. */
    threading = PyImport_ImportModule("threading");
    if (threading == NULL) {
        return -1;
    }
    Py_DECREF(threading);
    state->hooked = hook_forks(module) && hook_exit(module);
    return state->hooked ? 0 : -1;
}

/* What lasts as long as the process. */
static int
prepare_process(module_state *state)
{
    static bool hooked;

    if (!open_main_pipe()) {
        return raise_os_error(state, errno, "cannot create", "a pipe", "");
    }
    hooked = hooked || pthread_atfork(NULL, NULL, give_back_signals) == 0;
    return hooked ? 0 : raise_os_error(state, EAGAIN, "cannot prepare", "threads", "");
}

/* Nobody else would have the log keep it, so that logging need not be there for this. */
static void
tell_which_engine(void)
{
    PyObject *modules = PyImport_GetModuleDict();

    if (PyDict_GetItemString(modules, "logging") != NULL) {
        log_record("info", PyUnicode_FromFormat("the engine is %s", engine->name), NULL);
    }
}

static void
warn_of_few_descriptors(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < COMFORTABLE_FILES) {
        log_record("warning",
                   PyUnicode_FromFormat("the limit of open files is %d; each connection of the MTA "
                                        "takes one, and %s when none is left",
                                        (int)limit.rlim_cur,
                                        is_libmilter() ? "libmilter spins" : "further ones wait"),
                   NULL);
    }
}

static int
start_engine(module_state *state)
{
    int code;

    Py_BEGIN_ALLOW_THREADS
    code = engine->run(share_of_worker());
    Py_END_ALLOW_THREADS
    return code == 0 ? 0
                     : raise_os_error(state, code, "cannot start",
                                      is_libmilter() ? "libmilter's thread" : "a thread", "");
}

/* Serve until there is a reason to stop, then drain; what was before is put back. */
static int
run_filter(module_state *state)
{
    bool main_thread = borrow_wakeup_fd();
    PyObject *failure = NULL;
    int started, next = SOCKET_OPEN;

    if (!signals_left) {
        take_signals(main_thread);
    }
    phase = RUNNING;
    started = start_engine(state);
    if (started == 0) {
        begin_work();
        tell_that_it_serves(state);
        wait_until(state, has_reason_to_stop, -1);
        end_work();
        drain(state);
    }
    else {
        failure = take_exception(); /* what follows must not run with it set */
    }
    return_wakeup_fd();
    engine_failed = !stop_is_wanted() && atomic_load(&engine_result) != MI_SUCCESS;
    if (started == 0) {
        if (!is_forked()) {
            tell_coroutines("end");
        }
        next = finish_engine();
    }
    say_drained(started == 0);
    /* A worker process ends now; who stops its whole group may send it one more until then. */
    if (!is_worker_process()) {
        give_back_signals();
    }
    enter_phase(next);
    if (!is_forked()) {
        take_put_off_action();
    }
    if (failure != NULL) {
        raise_exception(failure);
    }
    return started;
}

/* What a callback or a handler raised to stop the filter is main()'s to raise. */
static bool
raise_what_stopped(module_state *state)
{
    PyObject *raised;

    LOCK_STATE();
    raised = state->raised;
    state->raised = NULL;
    UNLOCK_STATE();
    if (raised != NULL) {
        raise_exception(raised);
    }
    return raised != NULL;
}

/* Run a filter whose socket is open, and judge how it ended. */
static int
run_to_the_end(module_state *state)
{
    warn_of_few_descriptors();
    tell_which_engine();
    let_threads_in();
    if (run_filter(state) < 0 || raise_what_stopped(state)) {
        return -1;
    }
    if (engine_failed && !is_forked()) {
        PyErr_SetString(state->error, is_libmilter()
                                          ? "smfi_main failed; libmilter wrote the reason to syslog"
                                          : "main: it cannot go on; the log has the reason");
        return -1;
    }
    return PyErr_CheckSignals(); /* a handler that take_put_off_action() called for */
}

int
run_main(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    int before = claim_start(state, "main", false);

    if (before < 0) {
        return -1;
    }
    active_module = state; /* the module may have been loaded anew since */
    if (stop_is_wanted()) {
        end_before_start();
        return 0;
    }
    if (before != SOCKET_OPEN && (!is_engine_known(state) || open_socket(state, false) < 0)) {
        phase = before;
        return -1;
    }
    if (prepare_process(state) < 0 || hook_interpreter(module, state) < 0) {
        phase = SOCKET_OPEN;
        return -1;
    }
    /* A signal that came meanwhile: nothing after this runs its handler by the way. */
    if (PyErr_CheckSignals() < 0) {
        PyObject *raised = take_exception();
        end_before_start();
        raise_exception(raised);
        return -1;
    }
    return run_to_the_end(state);
}
