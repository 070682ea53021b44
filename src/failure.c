#include "failure.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "actions.h"
#include "engine/choice.h"
#include "metrics.h"
#include "observer.h"
#include "process.h"
#include "report.h"
#include "text.h"

#define NAME_IN_REPLY 40 /* characters of the filter's name in the reply to an exception */

/* ------------------------------------------------------------------- the MTA */

static void
set_reply(const Step *step, const char *code, const char *enhanced, const char *text)
{
    int result;

    if (step->context == NULL ||
        strlen(code) + strlen(enhanced) + strlen(text) + 5 > get_packet_limit()) {
        return;
    }
    /* The prototype is not const; engines copy.  A failure leaves the default reply. */
    lock_context(step->context);
    result = engine->setreply(step->handle, (char *)code, (char *)enhanced, (char *)text);
    pthread_mutex_unlock(&step->context->lock);
    if (result == MI_SUCCESS) {
        step->context->reply_class = 0; /* it goes out with this very verdict */
        observe_reply(step->context, code, enhanced, text);
    }
}

/* The filter's name, fit for a reply: cut short at a character, % doubled as replies need it. */
static void
name_for_reply(const module_state *state, char *out)
{
    const char *name, *end = out + 4 * NAME_IN_REPLY; /* the NUL's place */
    int characters = 0;

    LOCK_STATE();
    for (name = state->name != NULL ? state->name : "filter"; *name != '\0'; name++) {
        bool begins_character = ((unsigned char)*name & 0xC0) != 0x80;
        if ((begins_character && characters++ == NAME_IN_REPLY) || out + (*name == '%') >= end) {
            break;
        }
        if (*name == '%') {
            *out++ = '%';
        }
        *out++ = *name;
    }
    UNLOCK_STATE();
    *out = '\0';
}

/* Set the reply to a verdict of our own: not at a step without an answer, as it would be kept for
 * one that has nothing to do with it. */
static void
explain(const Step *step, sfsistat verdict, const char *soft, const char *hard, const char *what)
{
    char name[4 * NAME_IN_REPLY + 1];
    char text[sizeof name + 80];

    if (is_without_reply(step->context, step->stage)) {
        return;
    }
    name_for_reply(step->context != NULL ? step->context->state : active_module, name);
    snprintf(text, sizeof text, "pymilter: %s %s", what, name);
    if (verdict == SMFIS_TEMPFAIL) {
        set_reply(step, "451", soft, text);
    }
    else if (verdict == SMFIS_REJECT) {
        set_reply(step, "554", hard, text);
    }
}

static void
explain_exception(const Step *step, sfsistat verdict)
{
    explain(step, verdict, "4.3.0", "5.3.0", "untrapped exception in");
}

static void
explain_stop(const Step *step)
{
    explain(step, SMFIS_TEMPFAIL, "4.3.2", "5.3.2", "stopping, try again later:");
}

sfsistat
refuse_message(const Step *step)
{
    explain_stop(step);
    return SMFIS_TEMPFAIL;
}

/* Remember the verdict for an exception in a step without reply, or for the stop that cut it short;
 * pay() gives it at the next step that has one.  What goes wrong in connect or HELO holds for the
 * whole connection. */
static void
owe(const Step *step, sfsistat verdict, bool by_stop)
{
    if (verdict == SMFIS_CONTINUE || step->context == NULL) {
        return;
    }
    if (step->stage == CONNECT || step->stage == HELO) {
        step->context->debt = OWED_FOR_CONNECTION;
    }
    else if (stages[step->stage].in_message) {
        step->context->debt = OWED_FOR_MESSAGE;
    }
    else {
        return; /* an unknown command, which is no part of a message */
    }
    step->context->owed = verdict;
    step->context->owed_by_stop = by_stop;
}

sfsistat
put_off_message(const Step *step)
{
    if (is_without_reply(step->context, step->stage)) {
        owe(step, SMFIS_TEMPFAIL, is_draining()); /* else the program has cancelled it */
    }
    return refuse_message(step);
}

bool
pay(const Step *step, sfsistat *verdict)
{
    if (step->context->debt == NOTHING_OWED ||
        !(stages[step->stage].in_message || step->stage == HELO)) {
        return false;
    }
    *verdict = step->context->owed;
    if (step->context->owed_by_stop) {
        explain_stop(step);
    }
    else {
        explain_exception(step, *verdict);
    }
    return true;
}

/* ------------------------------------------------------------------- the log */

/* sys.excepthook where the application has replaced it, owned; else NULL. */
static PyObject *
own_excepthook(void)
{
    PyObject *sys = PyImport_ImportModule("sys");
    PyObject *hook = sys == NULL ? NULL : PyObject_GetAttrString(sys, "excepthook");
    PyObject *standard = hook == NULL ? NULL : PyObject_GetAttrString(sys, "__excepthook__");

    if (standard == NULL) {
        PyErr_Clear(); /* then it is not there to be called */
    }
    if (hook == Py_None || hook == standard) {
        Py_CLEAR(hook);
    }
    Py_XDECREF(standard);
    Py_XDECREF(sys);
    return hook;
}

void
keep_client(const Step *step, const char *hostname, const _SOCK_ADDR *address)
{
    char where[INET6_ADDRSTRLEN] = "", line[NI_MAXHOST + sizeof where + 4];

    if (engine->getsymval(step->handle, "_") != NULL ||
        engine->getsymval(step->handle, "{client_addr}") != NULL) {
        return;
    }
    if (address != NULL && address->sa_family == AF_INET) {
        inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, where, sizeof where);
    }
    else if (address != NULL && address->sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, where,
                  sizeof where);
    }
    snprintf(line, sizeof line, where[0] != '\0' ? "%s [%s]" : "%s%s", hostname, where);
    free(step->context->client);
    step->context->client = strdup(line); /* NULL is no matter */
}

static PyObject *
client_for_log(const Step *step)
{
    const char *both = engine->getsymval(step->handle, "_");
    const char *name = engine->getsymval(step->handle, "{client_name}");
    const char *address = engine->getsymval(step->handle, "{client_addr}");
    char line[NI_MAXHOST + INET6_ADDRSTRLEN + 4];

    if (both == NULL && address != NULL) {
        snprintf(line, sizeof line, "%s [%s]", name != NULL ? name : "unknown", address);
        both = line;
    }
    if (both == NULL && step->context != NULL) {
        both = step->context->client;
    }
    return text_for_log(both != NULL ? both : "unknown");
}

/* Tell the application's own hook. */
static void
call_hook(PyObject *hook, PyObject *exception, PyObject *message)
{
    PyObject *done, *traceback;

#if PY_VERSION_HEX >= 0x030B0000
    done = PyObject_CallMethod(exception, "add_note", "O", message);
    if (done == NULL) {
        PyErr_Clear(); /* the note is a courtesy; the report matters */
    }
    Py_XDECREF(done);
#else
    log_record("error", Py_NewRef(message), NULL); /* the hook sees no notes before 3.11 */
#endif
    traceback = PyException_GetTraceback(exception);
    done = PyObject_CallFunctionObjArgs(hook, (PyObject *)Py_TYPE(exception), exception,
                                        traceback != NULL ? traceback : Py_None, NULL);
    if (done == NULL) {
        PyErr_WriteUnraisable(hook);
    }
    Py_XDECREF(done);
    Py_XDECREF(traceback);
}

/* For a method that cannot be called with its callback's arguments: where it stands, as the
 * traceback ends before it; else an empty text.  NULL with an exception set. */
static PyObject *
place_of_method(const Step *step, PyObject *exception)
{
    PyObject *module, *filter = NULL, *place;

    if (PyErr_GivenExceptionMatches(exception, PyExc_TypeError) && step->context != NULL) {
        LOCK_STATE();
        filter = Py_XNewRef(step->context->priv);
        UNLOCK_STATE();
    }
    if (filter == NULL) {
        return PyUnicode_FromString("");
    }
    module = PyImport_ImportModule("Milter._advice");
    place = module == NULL ? NULL
                           : PyObject_CallMethod(module, "place_of", "OOs", exception, filter,
                                                 stages[step->stage].name);
    Py_XDECREF(module);
    Py_DECREF(filter);
    if (place == NULL) {
        PyErr_Clear(); /* what is said beyond the report is a courtesy */
        place = PyUnicode_FromString("");
    }
    return place;
}

/* What the report says beside the traceback.  NULL with an exception set. */
static PyObject *
describe_step(const Step *step, PyObject *exception)
{
    const char *queue_id = engine->getsymval(step->handle, "i");
    PyObject *id = text_for_log(queue_id != NULL ? queue_id : "unknown");
    PyObject *client = id == NULL ? NULL : client_for_log(step);
    PyObject *place = client == NULL ? NULL : place_of_method(step, exception);
    PyObject *message =
        place == NULL
            ? NULL
            : PyUnicode_FromFormat("exception in the %s callback, queue id %U, client %U%U",
                                   stages[step->stage].name, id, client, place);

    Py_XDECREF(place);
    Py_XDECREF(client);
    Py_XDECREF(id);
    return message;
}

/* Report the exception that is set now: once, with its traceback, the stage and the queue id. */
static void
report_exception(const Step *step)
{
    PyObject *exception = take_exception();
    PyObject *message = describe_step(step, exception);
    PyObject *hook;

    if (message == NULL) {
        PyErr_WriteUnraisable(NULL); /* out of memory: without the facts then */
        message = PyUnicode_FromString("exception in a callback");
    }
    hook = message == NULL ? NULL : own_excepthook();
    if (hook == NULL) {
        log_record("error", message, exception);
    }
    else {
        call_hook(hook, exception, message);
        Py_XDECREF(message);
        Py_DECREF(hook);
    }
    Py_DECREF(exception);
}

static module_state *
state_of(const Step *step)
{
    return step->context != NULL ? step->context->state : active_module;
}

void
take_exception_of(const Step *step)
{
    count_exception(step->stage);
    if (PyErr_ExceptionMatches(PyExc_SystemExit) ||
        PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        stop_with_exception(state_of(step));
    }
    else {
        report_exception(step);
    }
}

sfsistat
take_policy(const Step *step)
{
    sfsistat policy;

    take_exception_of(step);
    if (step->stage == NEGOTIATE) {
        return SMFIS_REJECT; /* the MTA goes on without the filter */
    }
    if (step->stage == ABORT || step->stage == CLOSE) {
        return SMFIS_CONTINUE; /* nobody waits for it */
    }
    policy = state_of(step)->policy; /* a report may have run anything */
    explain_exception(step, policy);
    if (is_without_reply(step->context, step->stage)) {
        owe(step, policy, false);
    }
    return policy;
}
