/* One object of the package's own, the access log of `python -m Milter run`, that is told what each
 * callback and each action came to: what the MTA gets, by whichever way.
 *
 * As long as there is none, all that it costs is a look at a flag, here and there.
 */

#include "observer.h"

atomic_bool observed;

static PyObject *
take_observer(module_state *state)
{
    PyObject *observer;

    LOCK_STATE();
    observer = Py_XNewRef(state->observer);
    UNLOCK_STATE();
    return observer;
}

/* What it raises is told, and goes no further: mail does not depend on it. */
static void
release(PyObject *observer, PyObject *done)
{
    if (done == NULL) {
        PyErr_WriteUnraisable(observer);
    }
    Py_XDECREF(done);
    Py_XDECREF(observer);
}

PyObject *
arguments_to_observe(PyObject *const *args, size_t count)
{
    PyObject *tuple = is_observed() ? PyTuple_New((Py_ssize_t)count) : NULL;

    for (size_t i = 0; tuple != NULL && i < count; i++) {
        PyTuple_SET_ITEM(tuple, (Py_ssize_t)i, Py_NewRef(args[i]));
    }
    PyErr_Clear(); /* without them, then */
    return tuple;
}

void
observe_callback(ContextObject *context, enum stage stage, PyObject *args, sfsistat verdict,
                 uint64_t elapsed)
{
    PyObject *observer = take_observer(context->state);

    if (observer == NULL) {
        return;
    }
    set_stage(context, stage); /* a coroutine's is over by now, and macros are asked for */
    release(observer, PyObject_CallMethod(observer, "ended", "OsOiK", context, stages[stage].name,
                                          args != NULL ? args : Py_None, (int)verdict,
                                          (unsigned long long)elapsed));
}

PyObject *
observe_action(PyObject *context, const char *method, PyObject *args, PyObject *keywords,
               PyObject *result)
{
    PyObject *observer;

    if (result == NULL || !is_observed()) {
        return result;
    }
    observer = take_observer(((ContextObject *)context)->state);
    if (observer != NULL) {
        release(observer, PyObject_CallMethod(observer, "acted", "OsOO", context, method, args,
                                              keywords != NULL ? keywords : Py_None));
    }
    return result;
}

void
observe_reply(ContextObject *context, const char *code, const char *enhanced, const char *text)
{
    PyObject *observer = is_observed() ? take_observer(context->state) : NULL;

    if (observer != NULL) {
        release(observer, PyObject_CallMethod(observer, "acted", "Os(sss)O", context, "setreply",
                                              code, enhanced, text, Py_None));
    }
}

/* _observe(observer): tell it from now on; None tells nobody. */
PyObject *
set_observer(PyObject *module, PyObject *observer)
{
    module_state *state = PyModule_GetState(module);
    PyObject *old;
    bool on = observer != Py_None;

    LOCK_STATE();
    old = state->observer;
    state->observer = on ? Py_NewRef(observer) : NULL;
    UNLOCK_STATE();
    Py_XDECREF(old);
    atomic_store(&observed, on);
    Py_RETURN_NONE;
}
