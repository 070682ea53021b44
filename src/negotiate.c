#include "negotiate.h"

#include <stdlib.h>

#include "call.h"
#include "engine/choice.h"
#include "verdict.h"

/* What is asked for where the application leaves it to us: every action in `actions`, no step
 * for which there is no callback. */
static unsigned long
steps_to_leave_out(const module_state *state)
{
    unsigned long steps = 0;

    LOCK_STATE();
    for (int i = 0; i < STAGES; i++) {
        if (state->callbacks[i] == NULL) {
            steps |= stages[i].leave_out;
        }
    }
    UNLOCK_STATE();
    return steps;
}

/* Hand the engine the macro lists that setsymlist() collected: it takes one list for a stage.  In
 * `any` whether there are any.  False with an exception set where it refuses one. */
static bool
send_symlists(ContextObject *context, bool *any)
{
    bool done = true;

    lock_context(context);
    for (int stage = SMFIM_FIRST; stage <= SMFIM_LAST; stage++) {
        char *macros = context->macros[stage];
        *any = *any || macros != NULL;
        /* Older releases of libmilter refuse an empty list; then all macros come. */
        if (macros != NULL && engine->setsymlist(context->handle, stage, macros) != MI_SUCCESS) {
            done = done && macros[0] == '\0';
        }
        free(macros);
        context->macros[stage] = NULL;
    }
    pthread_mutex_unlock(&context->lock);
    if (!done) {
        PyErr_SetString(context->state->error, "smfi_setsymlist failed");
    }
    return done;
}

/* Read the list that the callback changed in place. */
static bool
read_options(PyObject *options, unsigned long values[4])
{
    Py_ssize_t size = PyList_Size(options);

    if (size < 2) {
        PyErr_SetString(PyExc_ValueError, "the negotiate callback left fewer than two options");
        return false;
    }
    for (Py_ssize_t i = 0; i < Py_MIN(size, 4); i++) {
        PyObject *value = PySequence_GetItem(options, i);
        values[i] = value == NULL ? 0 : PyLong_AsUnsignedLongMask(value);
        Py_XDECREF(value);
        if (PyErr_Occurred()) {
            return false;
        }
    }
    return true;
}

/* Run the application's negotiate callback.  False with an exception set where it failed. */
static bool
ask_application(Call *call, unsigned long values[4])
{
    PyObject *options, *result;
    int verdict;
    bool done = false;

    options = Py_BuildValue("[kkkk]", values[0], values[1], values[2], values[3]);
    add_argument(call, Py_XNewRef(options));
    result = call_back(call);
    if (result == NULL) {
        goto exit;
    }
    verdict = parse_verdict(call->step.context->state, NEGOTIATE, 0, result);
    if (verdict == SMFIS_CONTINUE) {
        done = read_options(options, values);
    }
    else if (verdict == SMFIS_ALL_OPTS) {
        values[1] = steps_to_leave_out(call->step.context->state) | SMFIP_SKIP;
        done = true;
    }
    else if (verdict == SMFIS_REJECT) {
        call->verdict = SMFIS_REJECT;
        done = true;
    }
exit:
    Py_XDECREF(options);
    Py_XDECREF(result);
    return done;
}

sfsistat
on_negotiate(SMFICTX *handle, unsigned long actions, unsigned long protocol, unsigned long f2,
             unsigned long f3, unsigned long *want_actions, unsigned long *want_protocol,
             unsigned long *want_f2, unsigned long *want_f3)
{
    Call call;
    unsigned long values[4] = {actions, protocol, f2, f3};
    bool asked = begin(&call, handle, NEGOTIATE);
    ContextObject *context = call.step.context;
    bool any_macros = false;

    if (context == NULL) {
        if (call.attached) {
            call.verdict = SMFIS_REJECT;
        }
        return detach(&call);
    }
    context->offered_actions = context->actions = actions;
    context->protocol = 0;
    if (asked && (!ask_application(&call, values) || !send_symlists(context, &any_macros))) {
        call.verdict = take_policy(&call.step);
    }
    else if (!asked) {
        values[0] = context->state->flags;
        values[1] = steps_to_leave_out(context->state);
    }
    /* libmilter ends the session where more is asked for than was offered. */
    values[0] |= any_macros ? SMFIF_SETSYMLIST : 0;
    context->actions = *want_actions = values[0] & actions;
    context->protocol = *want_protocol = values[1] & protocol;
    *want_f2 = *want_f3 = 0;
    return detach(&call);
}
