/* An event loop of the program's leads the engine, a turn at a time.
 *
 * That is worth it, and harmless, where each callback that the application wrote is a coroutine:
 * its first step is taken on the loop's thread anyway, so it need not be brought there and its
 * answer need not be brought back.  A plain callback may block, and would block the loop: where
 * there is one, the engine's own threads lead, for good. */

#include "turns.h"

#include "engine/choice.h"
#include "threads.h"

static atomic_bool coroutines; /* a class was seen that has no other callbacks */
static atomic_bool plain;      /* or one that has: no loop leads any more */
static _Thread_local PyObject *first_step;

static void
dismiss_for_good(void)
{
    atomic_store(&plain, true);
    if (engine->attend != NULL) {
        engine->dismiss();
    }
}

/* _note_coroutines(only_coroutines): of a class with coroutines */
PyObject *
note_coroutines(PyObject *Py_UNUSED(module), PyObject *only_coroutines)
{
    if (only_coroutines == Py_True) {
        atomic_store(&coroutines, true);
    }
    else {
        dismiss_for_good();
    }
    Py_RETURN_NONE;
}

/* _attend(first_step): the descriptor, or -1 */
PyObject *
attend(PyObject *module, PyObject *function)
{
    module_state *state = PyModule_GetState(module);
    int descriptor = -1;

    if (engine->attend != NULL && atomic_load(&coroutines) && !atomic_load(&plain)) {
        LOCK_STATE();
        PyObject *old = state->first_step;
        state->first_step = Py_NewRef(function);
        UNLOCK_STATE();
        Py_XDECREF(old);
        descriptor = engine->attend();
    }
    return PyLong_FromLong(descriptor);
}

/* _take_turn(): as engine->take_turn() */
PyObject *
take_turn(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = PyModule_GetState(module);
    PyObject *outer = first_step;
    long next;

    if (outer != NULL) {
        return PyLong_FromLong(TURN_ON_CALL); /* a callback runs the loop, which is in a turn */
    }
    if (engine->attend == NULL || !join_engine()) {
        return PyLong_FromLong(TURN_OVER);
    }
    LOCK_STATE();
    first_step = Py_XNewRef(state->first_step); /* a callback may have it replaced */
    UNLOCK_STATE();
    next = engine->take_turn();
    Py_CLEAR(first_step);
    leave_engine();
    return PyLong_FromLong(next);
}

/* _dismiss(): no loop can lead, or a class was seen whose callbacks are plain */
PyObject *
dismiss_loop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    dismiss_for_good();
    Py_RETURN_NONE;
}

PyObject *
first_step_here(void)
{
    return first_step;
}
