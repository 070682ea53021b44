#include "verdict.h"

#include "report.h"

bool
ends_message(enum stage stage, sfsistat verdict)
{
    switch (verdict) {
    case SMFIS_ACCEPT:
    case SMFIS_DISCARD:
        return true;
    case SMFIS_REJECT:
    case SMFIS_TEMPFAIL:
        return stage != ENVRCPT; /* there it is about one recipient */
    default:
        return stage == EOM;
    }
}

/* Why `verdict` may not be returned at this stage, or NULL where it may. */
static const char *
why_no_verdict(enum stage stage, unsigned long protocol, long verdict)
{
    bool silent = (protocol & stages[stage].no_reply) != 0;

    switch (verdict) {
    case SMFIS_CONTINUE:
        return NULL;
    case SMFIS_NOREPLY:
        return silent ? NULL : "NOREPLY was not negotiated for this callback";
    case SMFIS_SKIP:
        if ((protocol & SMFIP_SKIP) == 0) {
            return "SKIP was not negotiated";
        }
        if (stage != ENVRCPT && stage != HEADER && stage != BODY && stage != UNKNOWN) {
            return "SKIP is only for steps that repeat";
        }
        break;
    case SMFIS_DISCARD:
        if (stage == CONNECT || stage == HELO) {
            return "DISCARD is not allowed before there is a message";
        }
        break;
    case SMFIS_REJECT:
    case SMFIS_ACCEPT:
    case SMFIS_TEMPFAIL:
        break;
    default:
        return "not one of CONTINUE, REJECT, DISCARD, ACCEPT, TEMPFAIL, SKIP, NOREPLY";
    }
    return silent ? "no reply was negotiated for this callback" : NULL;
}

/* The same for negotiate, whose result is no verdict. */
static const char *
why_no_negotiation(long result)
{
    return result == SMFIS_CONTINUE || result == SMFIS_ALL_OPTS || result == SMFIS_REJECT
               ? NULL
               : "not CONTINUE, ALL_OPTS or REJECT";
}

#define NOTHING_RETURNED "not an int; let it return a verdict, such as Milter.CONTINUE"

/* What a callback returned as a number; -1, which is no verdict, where it is none or too large. */
static long
number_of(PyObject *result)
{
    long number = PyLong_Check(result) ? PyLong_AsLong(result) : -1;

    if (number == -1) {
        PyErr_Clear();
    }
    return number;
}

/* Whether it is a generator that types.coroutine lets be awaited. */
static bool
is_iterable_coroutine(PyObject *result)
{
    PyObject *code = PyGen_CheckExact(result) ? PyObject_GetAttrString(result, "gi_code") : NULL;
    PyObject *flags = code == NULL ? NULL : PyObject_GetAttrString(code, "co_flags");
    long number = flags == NULL ? 0 : PyLong_AsLong(flags);

    Py_XDECREF(flags);
    Py_XDECREF(code);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return (number & CO_ITERABLE_COROUTINE) != 0;
}

bool
is_awaitable(PyObject *result)
{
    PyAsyncMethods *methods = Py_TYPE(result)->tp_as_async;

    return (methods != NULL && methods->am_await != NULL) || is_iterable_coroutine(result);
}

void
close_awaitable(PyObject *awaitable)
{
    PyObject *exception = PyErr_Occurred() ? take_exception() : NULL;
    PyObject *done = PyObject_CallMethod(awaitable, "close", NULL);

    if (done == NULL) {
        PyErr_Clear(); /* it has no such method, or will not be closed */
    }
    Py_XDECREF(done);
    if (exception != NULL) {
        raise_exception(exception);
    }
}

/* Something to be awaited where a verdict is due. */
static const char *
why_not_awaited(enum stage stage)
{
    return stage == NEGOTIATE
               ? "the MTA waits for its answer before all else, so it is no coroutine; write it "
                 "without async"
               : "not an int; the coroutine that returned it must await it";
}

int
parse_verdict(module_state *state, enum stage stage, unsigned long protocol, PyObject *result)
{
    long verdict = number_of(result);
    const char *why = stage == NEGOTIATE     ? why_no_negotiation(verdict)
                      : PyLong_Check(result) ? why_no_verdict(stage, protocol, verdict)
                      : result == Py_None    ? NOTHING_RETURNED
                                             : "not an int";

    if (why != NULL) {
        bool awaitable = is_awaitable(result);
        PyErr_Format(state->error, "the %s callback returned %R: %s", stages[stage].name, result,
                     awaitable ? why_not_awaited(stage) : why);
        if (awaitable) {
            close_awaitable(result);
        }
        return -1;
    }
    return (int)verdict;
}

bool
sends_reply(enum stage stage, sfsistat verdict, char reply_class)
{
    char wanted = verdict == SMFIS_TEMPFAIL ? '4' : verdict == SMFIS_REJECT ? '5' : 0;

    if (wanted == 0 || reply_class == 0 || wanted == reply_class) {
        return wanted != 0 && reply_class != 0;
    }
    log_record("warning",
               PyUnicode_FromFormat("the %s callback returned %s after setreply with a %cxx code: "
                                    "libmilter drops that reply, the verdict stands",
                                    stages[stage].name, wanted == '4' ? "TEMPFAIL" : "REJECT",
                                    reply_class),
               NULL);
    return false;
}
