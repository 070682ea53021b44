/* A Python thread state belongs to one OS thread for life.  So each thread of an engine gets a
 * state when it first comes, keeps it, and gives it back when it ends. */

#include "threads.h"

#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "process.h"
#include "wake.h"

#define PROBE_SIZE 4096 /* bytes that must be there when a thread first comes */

static PyInterpreterState *interpreter;
static atomic_bool gate_closed;
static atomic_long inside;
static size_t at_once = 1;

/* In one, as each look at a thread's own memory is a call. */
static _Thread_local struct {
    PyThreadState *state;
    bool attached; /* by enter_python() or join_engine() */
} self;

/* The gate: false once the interpreter is going away, true with a seat inside otherwise.
 * CPython ends (3.13 and before) or parks threads that ask for its lock at that time, in the
 * middle of the engine's code and with the engine's locks held. */
static bool
pass_gate(void)
{
    atomic_fetch_add(&inside, 1);
    if (!atomic_load(&gate_closed)) {
        return true;
    }
    atomic_fetch_sub(&inside, 1);
    return false;
}

static void
leave_gate(void)
{
    if (atomic_fetch_sub(&inside, 1) == 1 && (is_draining() || atomic_load(&gate_closed))) {
        wake_main();
    }
}

static bool
make_thread_state(void)
{
    void *probe = malloc(PROBE_SIZE);

    /* Where memory is short now, CPython 3.11 crashes in PyThreadState_New(). */
    if (probe != NULL) {
        free(probe);
        self.state = PyThreadState_New(interpreter);
    }
    return self.state != NULL;
}

/* Call a function of the module sys with what threading.settrace() or setprofile() left. */
static void
take_hook(PyObject *threading, const char *hook, const char *setter)
{
    PyObject *function = PyObject_GetAttrString(threading, hook), *set, *done = NULL;

    if (function != NULL && function != Py_None) {
        set = PySys_GetObject(setter); /* borrowed */
        if (set != NULL) {
            done = PyObject_CallFunctionObjArgs(set, function, NULL);
        }
        Py_XDECREF(done);
    }
    Py_XDECREF(function);
    PyErr_Clear();
}

/* What threading.Thread does when its thread begins: debuggers and coverage tools ask for it. */
static void
take_hooks(void)
{
    PyObject *threading = PyDict_GetItemString(PyImport_GetModuleDict(), "threading");

    if (threading != NULL) {
        take_hook(threading, "_trace_hook", "settrace");
        take_hook(threading, "_profile_hook", "setprofile");
    }
}

bool
enter_python(void)
{
    bool is_new = self.state == NULL;

    if (!pass_gate()) {
        return false;
    }
    if (is_new && !make_thread_state()) {
        leave_gate();
        return false;
    }
    PyEval_RestoreThread(self.state);
    self.attached = true;
    if (is_new) {
        take_hooks();
    }
    return true;
}

void
leave_python(void)
{
    self.attached = false;
    PyEval_SaveThread();
    leave_gate();
}

bool
join_engine(void)
{
    self.attached = pass_gate();
    return self.attached;
}

void
leave_engine(void)
{
    self.attached = false;
    leave_gate();
}

void *
release_python(void)
{
    return PyEval_SaveThread();
}

void
reacquire_python(void *released)
{
    PyEval_RestoreThread(released);
}

void
give_back_thread_state(void)
{
    PyThreadState *state = self.state;

    if (state == NULL || !pass_gate()) {
        return; /* the interpreter frees what is left of its threads */
    }
    PyEval_RestoreThread(state);
    if (PyGILState_Check()) {
        PyThreadState_Clear(state);
        PyThreadState_DeleteCurrent();
    }
    else {
        /* CPython's thread-specific values are gone already, as the engine has no place to say so
         * in time: clearing now would trip the checks of debug allocators.  Keep the state. */
        PyEval_SaveThread();
    }
    self.state = NULL;
    leave_gate();
}

bool
is_in_python(void)
{
    return self.attached;
}

#ifdef Py_GIL_DISABLED
/* Another module may have had the interpreter lock switched on.  Errors are cleared. */
static bool
is_without_lock(void)
{
    PyObject *answer = NULL, *is_enabled = PySys_GetObject("_is_gil_enabled"); /* borrowed */
    bool without = false;

    if (is_enabled != NULL) {
        answer = PyObject_CallNoArgs(is_enabled);
        without = answer == Py_False;
        Py_XDECREF(answer);
    }
    PyErr_Clear();
    return without;
}

static size_t
processors(void)
{
    long count = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef CPU_COUNT
    cpu_set_t allowed;

    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        count = CPU_COUNT(&allowed);
    }
#endif
    return count > 1 ? (size_t)count : 1;
}
#endif

void
let_threads_in(void)
{
    interpreter = PyThreadState_GetInterpreter(PyThreadState_Get());
#ifdef Py_GIL_DISABLED
    at_once = is_without_lock() ? processors() : 1;
#endif
}

size_t
callbacks_at_once(void)
{
    return at_once;
}

void
shut_gate(void)
{
    atomic_store(&gate_closed, true);
}

void
forget_threads(void)
{
    atomic_store(&gate_closed, true);
    atomic_store(&inside, 0);
}

long
threads_inside(void)
{
    return atomic_load(&inside);
}
