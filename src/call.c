#include "call.h"

#include <stdlib.h>
#include <unistd.h>

#include "engine/choice.h"
#include "metrics.h"
#include "observer.h"
#include "process.h"
#include "report.h"
#include "threads.h"
#include "turns.h"
#include "verdict.h"
#include "wake.h"

/* ------------------------------------------------------------------ the way in */

/* Keep track of the message.  False where it must not begin, since the filter drains. */
static bool
track_message(Call *call)
{
    ContextObject *context = call->step.context;

    if (call->step.stage == ENVFROM) {
        end_message(context); /* sendmail may send no ABORT after an early verdict */
    }
    if (!stages[call->step.stage].in_message || context->in_message) {
        return true;
    }
    if (context->debt != NOTHING_OWED) {
        return true; /* answered by pay() before the application sees it */
    }
    begin_message(context); /* counted before the look at the flag, as main() looks at the count
                             * after setting it */
    if (!is_draining()) {
        return true;
    }
    end_message(context);
    call->verdict = refuse_message(&call->step);
    return false;
}

/* What is to be called, and its first argument. */
static void
find_callback(Call *call)
{
    ContextObject *context = call->step.context;
    module_state *state = context->state;
    PyObject *first = (PyObject *)context;

    LOCK_STATE();
    call->callback = Py_XNewRef(state->callbacks[call->step.stage]);
    call->direct = call->callback != NULL && call->callback == state->shortcuts[call->step.stage] &&
                   context->priv != NULL && context->priv != Py_None;
    if (call->direct) {
        first = context->priv;
    }
    if (call->callback != NULL) {
        call->args[1] = Py_NewRef(first);
        call->count = 1;
    }
    UNLOCK_STATE();
}

/* The verdict for a step that cannot enter Python.  Not without the filter's word: the MTA keeps or
 * refuses the message for now. */
static sfsistat
verdict_without_filter(enum stage stage)
{
    return stage == NEGOTIATE         ? SMFIS_REJECT
           : stages[stage].in_message ? SMFIS_TEMPFAIL
                                      : SMFIS_CONTINUE;
}

bool
begin(Call *call, SMFICTX *handle, enum stage stage)
{
    *call = (Call){.step = {.handle = handle, .stage = stage}, .verdict = SMFIS_CONTINUE};
    call->args = call->stack_args;
    call->attached = is_in_python();
    if (!call->attached) {
        call->verdict = verdict_without_filter(stage);
        return false;
    }
    call->entered = is_counting() || is_observed() ? count_clock() : 0;
    call->step.context = context_of(handle, stage);
    if (call->step.context == NULL) {
        if (PyErr_Occurred()) {
            call->verdict = take_policy(&call->step);
        }
        return false;
    }
    set_stage(call->step.context, stage);
    if (!track_message(call) || pay(&call->step, &call->verdict)) {
        return false;
    }
    if (stage == ABORT && !call->step.context->in_message) {
        return false; /* one abort for a message, and none after its verdict */
    }
    find_callback(call);
    return call->callback != NULL;
}

bool
make_room_for(Call *call, size_t count)
{
    PyObject **args;

    if (count + 2 > STACK_ARGS) {
        args = PyMem_New(PyObject *, count + 2);
        if (args == NULL) {
            PyErr_NoMemory();
            call->failed = true;
            return false;
        }
        args[1] = call->args[1];
        call->args = args;
    }
    return true;
}

void
add_argument(Call *call, PyObject *argument)
{
    if (argument == NULL) {
        call->failed = true;
    }
    else {
        call->args[++call->count] = argument;
    }
}

/* ---------------------------------------------------------- the end of a fork */

/* Call what belongs to the end of a program; what it raises is told. */
static void
call_at_end(PyObject *object, const char *method)
{
    PyObject *done = object == NULL ? NULL : PyObject_CallMethod(object, method, NULL);

    if (done == NULL && PyErr_Occurred()) {
        PyErr_WriteUnraisable(object);
    }
    Py_XDECREF(done);
}

/* The exit status for the exception that is set now, which is printed as at the end of a script. */
static int
status_of_exception(void)
{
    PyObject *exception, *code;
    int status = 1;

    if (!PyErr_ExceptionMatches(PyExc_SystemExit)) {
        PyErr_Print();
        return status;
    }
    exception = take_exception();
    code = PyObject_GetAttrString(exception, "code");
    if (code == Py_None) {
        status = 0;
    }
    else if (code != NULL && PyLong_Check(code)) {
        status = (int)PyLong_AsLong(code) & 0xFF;
    }
    else if (code != NULL) {
        PySys_FormatStderr("%S\n", code);
    }
    PyErr_Clear();
    Py_XDECREF(code);
    Py_DECREF(exception);
    return status;
}

/* The callback forked and this is the child: the engine's threads, and the right to answer the
 * MTA, are the parent's.  End as a script does when it runs out, but for the interpreter's own
 * end: CPython 3.13 crashes in it where another thread than the main one forked. */
static void
end_forked_child(PyObject *result)
{
    static const char *const streams[] = {"stdout", "stderr"};
    PyObject *module;
    int status;

    if (!is_forked()) {
        return;
    }
    status = result == NULL ? status_of_exception() : 0;
    module = PyImport_ImportModule("threading");
    call_at_end(module, "_shutdown");
    module = PyImport_ImportModule("atexit");
    call_at_end(module, "_run_exitfuncs");
    for (size_t i = 0; i < Py_ARRAY_LENGTH(streams); i++) {
        PyObject *stream = PySys_GetObject(streams[i]);
        call_at_end(stream == Py_None ? NULL : Py_XNewRef(stream), "flush");
    }
    _exit(status);
}

/* ------------------------------------------------- the variables of a connection */

/* The connection's contextvars context, owned; NULL with an exception set. */
static PyObject *
variables_of(ContextObject *context)
{
    if (context->variables == NULL) {
        context->variables = PyContext_New();
    }
    return Py_XNewRef(context->variables);
}

/* The context that is entered now, owned, or NULL where the callback runs without.  It is entered
 * for plain methods too: nobody knows beforehand whether one of them returns an awaitable, and what
 * a callback sets without would stay on the engine's thread, for other connections to see. */
static PyObject *
enter_variables(const Call *call)
{
    PyObject *variables;

    if (call->step.context == NULL) {
        return NULL;
    }
    variables = variables_of(call->step.context);
    if (variables == NULL || PyContext_Enter(variables) < 0) {
        PyErr_Clear();
        Py_CLEAR(variables);
    }
    return variables;
}

/* Takes over the reference.  An exception that is set stays so. */
static void
exit_variables(PyObject *variables)
{
    PyObject *exception;

    if (variables != NULL) {
        exception = PyErr_Occurred() ? take_exception() : NULL;
        if (PyContext_Exit(variables) < 0) {
            PyErr_Clear();
        }
        Py_DECREF(variables);
        if (exception != NULL) {
            raise_exception(exception);
        }
    }
}

/* ----------------------------------------------------------------- the way out */

PyObject *
call_back(Call *call)
{
    PyObject *result = NULL;
    size_t count = call->count | PY_VECTORCALL_ARGUMENTS_OFFSET;
    PyObject *variables = call->failed ? NULL : enter_variables(call);

    if (!call->failed && is_observed()) {
        call->observed = arguments_to_observe(call->args + 2, call->count - 1);
    }
    if (!call->failed && call->direct) {
        PyObject *method = call->step.context->state->names[stages[call->step.stage].method];
        result = PyObject_VectorcallMethod(method, call->args + 1, count, NULL);
    }
    else if (!call->failed) {
        result = PyObject_Vectorcall(call->callback, call->args + 1, count, NULL);
    }
    exit_variables(variables);
    for (size_t i = 1; i <= call->count; i++) {
        Py_DECREF(call->args[i]);
    }
    if (call->args != call->stack_args) {
        PyMem_Free(call->args);
    }
    call->count = 0;
    Py_CLEAR(call->callback);
    end_forked_child(result);
    return result;
}

/* What the MTA gets.  Where it does not wait for an answer none may go out, or it would be taken
 * for the answer to the next step. */
static sfsistat
verdict_to_send(const Call *call)
{
    /* The context is C memory that outlives the interpreter, so it may be looked at in any case. */
    const ContextObject *context =
        call->attached ? call->step.context : engine->getpriv(call->step.handle);

    return is_without_reply(context, call->step.stage) ? SMFIS_NOREPLY : call->verdict;
}

/* Tell those who count. */
static void
tell_of(Call *call, sfsistat verdict)
{
    uint64_t elapsed = count_clock() - call->entered;

    if (call->cut_off) {
        verdict = SMFIS_NOREPLY; /* nobody was there to get it */
    }
    if (is_counting()) {
        count_callback(call->step.stage, verdict, elapsed);
    }
    if (is_observed()) {
        observe_callback(call->step.context, call->step.stage, call->observed, verdict, elapsed);
    }
    Py_CLEAR(call->observed);
}

sfsistat
detach(Call *call)
{
    sfsistat verdict = verdict_to_send(call);
    enum stage stage = call->step.stage;
    ContextObject *context = call->step.context;

    if (!call->attached) {
        return verdict;
    }
    end_forked_child(Py_None); /* forked by an exception hook, or by what an object's end runs */
    if (context != NULL) {
        if (call->cut_off) {
            /* its message is not at its end */
        }
        else if (stage == ABORT || (stages[stage].in_message && verdict != SMFIS_NOREPLY &&
                                    ends_message(stage, verdict))) {
            end_message(context);
        }
        if (call->entered != 0) {
            tell_of(call, verdict);
        }
        if (context->handle != NULL) {
            set_stage(context, OUTSIDE);
        }
        Py_DECREF(context);
    }
    return verdict;
}

/* Turn the result of a callback into the verdict.  False with an exception set where it is none. */
static bool
take_verdict(Call *call, PyObject *result)
{
    ContextObject *context = call->step.context;
    enum stage stage = call->step.stage;
    int verdict;

    if (stage == ABORT || stage == CLOSE) {
        return true;
    }
    verdict = parse_verdict(context->state, stage, context->protocol, result);
    if (verdict < 0) {
        return false;
    }
    if (stage == UNKNOWN && verdict == SMFIS_ACCEPT && !context->in_message) {
        verdict = SMFIS_CONTINUE; /* Postfix's smtpd panics, and there is nothing to accept */
    }
    call->verdict = verdict;
    if (sends_reply(stage, verdict, context->reply_class)) {
        context->reply_class = 0; /* the engine sends and forgets it */
    }
    return true;
}

/* The verdict for what a callback returned, owned, or for the exception that is set. */
static void
judge(Call *call, PyObject *result)
{
    if (result == NULL || !take_verdict(call, result)) {
        call->verdict = take_policy(&call->step);
    }
    Py_XDECREF(result);
}

/* The end of a callback, and after close of the connection. */
static sfsistat
end_callback(Call *call)
{
    if (call->step.stage == CLOSE && call->step.context != NULL) {
        forget_connection(call->step.context);
    }
    else if (call->step.stage == CLOSE && !call->attached) {
        lose_connection(engine->getpriv(call->step.handle));
    }
    return detach(call);
}

/* ------------------------------------------------------------- what is waited for */

/* What has become of it; the same numbers as in Milter._awaited. */
enum outcome { RETURNED, RAISED, STOPPED_BY_DRAIN, HUNG_UP, WAITS };

/* A callback that returned an awaitable, from there until its answer is known. */
typedef struct {
    Call call;
    struct engine_suspended *suspended;
    enum outcome outcome;
    PyObject *value; /* owned: what it returned, or the exception */
} Waiting;

static atomic_long waiting_callbacks;

long
callbacks_that_wait(void)
{
    return atomic_load(&waiting_callbacks);
}

static void
count_waiting(int change)
{
    if (atomic_fetch_add(&waiting_callbacks, change) + change == 0 && is_draining()) {
        wake_main();
    }
}

/* The verdict for a callback that did not get to its end. */
static sfsistat
verdict_for_cancelled(const Waiting *waiting)
{
    const Step *step = &waiting->call.step;

    return waiting->outcome == STOPPED_BY_DRAIN && stages[step->stage].in_message
               ? put_off_message(step)
               : verdict_without_filter(step->stage);
}

/* The callback goes on, in a batch of the engine's, with its answer. */
static sfsistat
complete_callback(SMFICTX *Py_UNUSED(handle), void *data)
{
    Waiting *waiting = data;
    Call *call = &waiting->call;
    sfsistat verdict;

    call->attached = is_in_python();
    if (!call->attached) { /* the interpreter is gone, and what is kept of it */
        call->verdict = verdict_without_filter(call->step.stage);
        call->step.context = NULL;
    }
    else if (waiting->outcome == RETURNED) {
        judge(call, waiting->value);
    }
    else if (waiting->outcome == RAISED) {
        raise_exception(waiting->value);
        judge(call, NULL);
    }
    else {
        if (waiting->value == Py_None) {
            Py_DECREF(waiting->value);
        }
        else { /* what it raised as it was cancelled */
            raise_exception(waiting->value);
            take_exception_of(&call->step);
        }
        call->cut_off = waiting->outcome == HUNG_UP;
        call->verdict = verdict_for_cancelled(waiting);
    }
    verdict = end_callback(call);
    if (call->cut_off) {
        verdict = ENGINE_CUT_OFF;
    }
    free(waiting);
    count_waiting(-1);
    return verdict;
}

/* The answer is known; `value` is taken over.  From here on the callback acts no more. */
static void
resume_waiting(Waiting *waiting, enum outcome outcome, PyObject *value)
{
    waiting->outcome = outcome;
    waiting->value = value;
    set_stage(waiting->call.step.context, OUTSIDE);
    engine->resume(waiting->suspended, complete_callback, waiting);
}

/* The connection goes on with other variables than the callback had. */
static void
replace_variables(ContextObject *context, PyObject *variables)
{
    PyObject *old;

    if (PyContext_CheckExact(variables)) {
        LOCK_STATE();
        old = context->variables;
        context->variables = Py_NewRef(variables);
        UNLOCK_STATE();
        Py_XDECREF(old);
    }
}

/* Take what the capsule holds; NULL where that was done. */
static Waiting *
take_waiting(PyObject *capsule)
{
    Waiting *waiting = PyCapsule_GetPointer(capsule, NULL);

    LOCK_STATE();
    if (PyCapsule_GetContext(capsule) != NULL) {
        waiting = NULL; /* it may be freed by now */
    }
    else {
        PyCapsule_SetContext(capsule, capsule);
    }
    UNLOCK_STATE();
    return waiting;
}

/* answer(outcome, value, variables), for Milter._async: the first call counts. */
static PyObject *
answer(PyObject *capsule, PyObject *args)
{
    Waiting *waiting;
    PyObject *value, *variables;
    int outcome;

    if (!PyArg_ParseTuple(args, "iOO", &outcome, &value, &variables)) {
        return NULL;
    }
    if (is_forked() && PyExceptionInstance_Check(value)) {
        raise_exception(Py_NewRef(value));
        end_forked_child(NULL);
    }
    end_forked_child(value);
    waiting = take_waiting(capsule);
    if (waiting != NULL) {
        replace_variables(waiting->call.step.context, variables);
        resume_waiting(waiting, outcome, Py_NewRef(value));
    }
    Py_RETURN_NONE;
}

static PyMethodDef answer_definition = {"answer", answer, METH_VARARGS, NULL};

/* Call a function of Milter._async, or one in its place: with the awaitable, the connection's
 * context and variables, the stage, whether it is abort or close, and, where it is not NULL,
 * `last`. */
static PyObject *
call_async(PyObject *function, PyObject *awaitable, Call *call, PyObject *last)
{
    PyObject *variables = function == NULL ? NULL : variables_of(call->step.context);
    PyObject *stage =
        variables == NULL ? NULL : PyUnicode_InternFromString(stages[call->step.stage].name);
    PyObject *result = NULL;

    if (stage != NULL) {
        bool is_end = call->step.stage == ABORT || call->step.stage == CLOSE;
        PyObject *args[] = {awaitable, (PyObject *)call->step.context, variables,
                            stage,     is_end ? Py_True : Py_False,    last};
        result = PyObject_Vectorcall(function, args, last == NULL ? 5 : 6, NULL);
    }
    if (result == NULL) {
        close_awaitable(awaitable);
    }
    Py_XDECREF(stage);
    Py_XDECREF(variables);
    return result;
}

/* A function of Milter._async, owned. */
static PyObject *
async_function(const char *name)
{
    PyObject *module = PyImport_ImportModule("Milter._async");
    PyObject *function = module == NULL ? NULL : PyObject_GetAttrString(module, name);

    Py_XDECREF(module);
    return function;
}

/* Suspend the callback: a function that is to be called with its answer, owned.  NULL with an
 * exception set, or without where the engine cannot suspend this callback. */
static PyObject *
suspend(Call *call)
{
    Waiting *waiting = calloc(1, sizeof *waiting);
    PyObject *capsule = waiting == NULL ? PyErr_NoMemory() : PyCapsule_New(waiting, NULL, NULL);
    PyObject *function = capsule == NULL ? NULL : PyCFunction_New(&answer_definition, capsule);

    Py_XDECREF(capsule);
    if (function != NULL) {
        waiting->call = *call;
        waiting->suspended = engine->suspend(call->step.handle);
        if (waiting->suspended == NULL) {
            Py_CLEAR(function);
        }
    }
    if (function == NULL) {
        free(waiting);
        return NULL;
    }
    count_waiting(1);
    return function;
}

/* It could not be begun: the exception that is set is its answer. */
static void
answer_with_exception(PyObject *function)
{
    Waiting *waiting = take_waiting(PyCFunction_GET_SELF(function));

    if (waiting != NULL) {
        resume_waiting(waiting, RAISED, take_exception());
    }
}

/* Have the loop await it; the engine's thread need not.  False: an exception is set, or the engine
 * cannot suspend this callback. */
static bool
hand_over(Call *call, PyObject *awaitable)
{
    PyObject *function = suspend(call), *start, *started;

    if (function == NULL) {
        return false;
    }
    start = async_function("start");
    started = call_async(start, awaitable, call, function);
    if (started == NULL) {
        answer_with_exception(function);
    }
    Py_XDECREF(started);
    Py_XDECREF(start);
    Py_DECREF(function);
    return true;
}

/* In a turn of the loop: it waits, and goes on there.  False with an exception set. */
static bool
let_wait(Call *call, PyObject *waiting)
{
    PyObject *function = suspend(call), *exception = NULL, *expected;

    if (function == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_RuntimeError, "the engine cannot suspend this callback");
        }
        exception = take_exception();
    }
    expected = PyObject_CallMethod(waiting, "expect", "O", function == NULL ? Py_None : function);
    if (expected == NULL && function != NULL) {
        answer_with_exception(function);
    }
    Py_XDECREF(expected);
    if (exception != NULL) {
        PyErr_Clear();
        raise_exception(exception);
    }
    Py_XDECREF(function);
    return function != NULL;
}

/* In a turn of the loop: take the first step here and now, which may be all of it. */
static PyObject *
step_here(Call *call, PyObject *awaitable, bool *later)
{
    PyObject *step = call_async(first_step_here(), awaitable, call, NULL); /* (outcome, value) */
    PyObject *value = step == NULL ? NULL : Py_NewRef(PyTuple_GET_ITEM(step, 1));
    long outcome = step == NULL ? RAISED : PyLong_AsLong(PyTuple_GET_ITEM(step, 0));

    Py_XDECREF(step);
    if (outcome == RAISED && value != NULL) {
        raise_exception(value);
        value = NULL;
    }
    if (outcome == WAITS) {
        *later = let_wait(call, value);
        Py_CLEAR(value);
    }
    else {
        end_forked_child(value);
    }
    return value;
}

/* Wait on this thread, without the interpreter lock; what it returns, owned. */
static PyObject *
wait_for_it(Call *call, PyObject *awaitable)
{
    PyObject *wait = async_function("wait"), *result;

    count_waiting(1);
    result = call_async(wait, awaitable, call, NULL);
    count_waiting(-1);
    Py_XDECREF(wait);
    return result;
}

/* What the awaitable that a callback returned comes to, owned, or NULL with an exception set.  True
 * in *later: the answer comes later. */
static PyObject *
await_it(Call *call, PyObject *awaitable, bool *later)
{
    if (first_step_here() != NULL) {
        return step_here(call, awaitable, later);
    }
    *later = hand_over(call, awaitable);
    if (*later) {
        return NULL;
    }
    if (!PyErr_Occurred()) {
        return wait_for_it(call, awaitable);
    }
    close_awaitable(awaitable);
    return NULL;
}

sfsistat
finish(Call *call)
{
    if (call->callback != NULL) {
        PyObject *result = call_back(call);
        if (result != NULL && !PyLong_Check(result) && is_awaitable(result)) {
            PyObject *awaitable = result;
            bool later = false;
            result = await_it(call, awaitable, &later);
            Py_DECREF(awaitable);
            if (later) {
                return SMFIS_CONTINUE; /* which nobody reads: the answer comes later */
            }
        }
        judge(call, result);
    }
    return end_callback(call);
}

void
cancel_callback(SMFICTX *handle)
{
    ContextObject *context = is_in_python() ? engine->getpriv(handle) : NULL;
    PyObject *module = NULL, *done = NULL;
    int stage = OUTSIDE;

    if (context != NULL) {
        Py_INCREF(context);
        lock_context(context);
        stage = context->stage;
        pthread_mutex_unlock(&context->lock);
    }
    if (stage != OUTSIDE && stage != ABORT && stage != CLOSE) {
        module = PyImport_ImportModule("Milter._async");
        done = module == NULL ? NULL : PyObject_CallMethod(module, "hung_up", "O", context);
        if (done == NULL) {
            PyErr_WriteUnraisable(NULL);
        }
    }
    Py_XDECREF(done);
    Py_XDECREF(module);
    Py_XDECREF(context);
}
