/* Worker processes.
 *
 * They are forked in Python (Milter/_workers.py) once the listening socket is open; each runs its
 * own engine on the inherited descriptor.  Whose turn it is to accept is found out by counting
 * (crew.c).  The supervisor holds the other end of a pipe, the lifeline, which comes to its end
 * when the supervisor closes it, and when the supervisor dies.
 */

#include "workers.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>
#ifdef __linux__
#include <signal.h>
#include <sys/prctl.h>
#endif

#include "crew.h"
#include "engine/choice.h"
#include "metrics.h"
#include "process.h"
#include "report.h"
#include "signals.h"
#include "socket.h"
#include "wake.h"

static pid_t supervisor;
static int lifeline = -1; /* at its end when the supervisor wants us to stop, or is no more */
static int report = -1;   /* to the supervisor */

static struct engine_share share = {
    .lifeline = -1,
    .lifeline_ended = ask_to_stop,
    .has_enough = has_too_many,
    .taken = connections_taken,
    .came_late = call_this_one_ready,
    .nobody_came = call_others_slow,
};

const struct engine_share *
share_of_worker(void)
{
    share.lifeline = lifeline;
    return is_in_crew() ? &share : NULL;
}

bool
is_worker_process(void)
{
    return is_in_crew() && !is_forked();
}

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

/* A stop that is asked for here, by stop() or sys.exit(), is for all workers, though this one may
 * have been stopped before; a signal from outside, or a failure, is ours alone. */
static void
ask_others_to_stop(void)
{
    static atomic_bool asked;

    if (is_worker_process() && !atomic_exchange(&asked, true)) {
        tell_supervisor('s');
    }
}

void
begin_work(void)
{
    if (!is_in_crew()) {
        return;
    }
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, 0); /* from here on we drain when the supervisor dies */
#endif
    say_serving(true);
    tell_supervisor('r');
}

void
end_work(void)
{
    if (is_worker_process()) {
        say_serving(false);
    }
}

void
forget_supervisor(void)
{
    forget_crew();
    if (report >= 0) {
        close(report);
    }
    if (lifeline >= 0) {
        close(lifeline);
    }
    report = lifeline = -1;
}

/* ------------------------------------------------------------- from Python */

/* _share_socket(count): in the supervisor, before the first fork. */
PyObject *
share_socket(PyObject *module, PyObject *value, bool is_open)
{
    module_state *state = PyModule_GetState(module);
    long count = PyLong_AsLong(value);
    int code;

    if (count == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (!is_open || is_place_in_crew(0) || count < 1 || count > MAX_WORKERS) {
        PyErr_SetString(state->error, "_share_socket: not now");
        return NULL;
    }
    code = engine->prepare_share();
    if (code != 0) {
        raise_os_error(state, code, "cannot share", "the listening socket", "");
        return NULL;
    }
    if (!open_main_pipe()) {
        raise_os_error(state, errno, "cannot create", "a pipe", "");
        return NULL;
    }
    code = make_crew((int)count);
    if (code != 0) {
        raise_os_error(state, code, "cannot share memory", "between workers", "");
        return NULL;
    }
    supervisor = getpid();
    Py_RETURN_NONE;
}

/* _end_sharing(): in the supervisor, once all workers have ended; another filter may follow. */
PyObject *
end_sharing(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    end_crew();
    supervisor = 0;
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
    if (!is_place_in_crew(index) || getpid() == supervisor) {
        PyErr_SetString(state->error, "_become_worker: no worker here");
        return NULL;
    }
    forget_unix_socket();
    take_place_for_counting(index + 1);
    join_crew(index);
    when_all_are_to_stop(ask_others_to_stop);
#ifdef __linux__
    /* While it prepares, nothing has begun that would have to end well. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    if (getppid() != supervisor) {
        lifeline = -1;
        ask_to_stop();
    }
    Py_RETURN_NONE;
}

/* _fork_worker(serve): like os.fork(), but the child calls serve() and ends with the status that
 * it returns: no frame of the caller goes on there, whatever is raised. */
PyObject *
fork_worker(PyObject *Py_UNUSED(module), PyObject *serve)
{
    PyObject *os = PyImport_ImportModule("os");
    PyObject *pid, *status;
    long code;

    block_for_fork();
    pid = os == NULL ? NULL : PyObject_CallMethod(os, "fork", NULL);
    Py_XDECREF(os);
    if (pid == NULL || PyLong_AsLong(pid) != 0) {
        unblock_after_fork();
        return pid;
    }
    close_main_pipe(); /* the supervisor's */
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
    if (is_place_in_crew(index)) {
        leave_crew(index);
    }
    Py_RETURN_NONE;
}

/* _stop_state(): (was stop() called?, how long a process may serve on and drain, how long close
 * callbacks may take), both in milliseconds */
PyObject *
stop_state(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    share_drain_timeout(atomic_load(&process_flags.drain_ms));
    return Py_BuildValue("(Nii)", PyBool_FromLong(stop_is_wanted()),
                         longest_drain_timeout() + patience(),
                         (int)((CLOSE_SECONDS + HURRY_SECONDS) * 1000));
}

/* _unique_id(): a number that no process of this filter has given out before. */
PyObject *
unique_id(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLong(next_number());
}

PyObject *
last_unique_id(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLong(last_number());
}
