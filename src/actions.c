/* One road leads to the engine: parse, check, find the context, call, turn failure into an
 * exception.  The authority for each call is libmilter's manual (package sendmail-doc). */

#include "actions.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

#include "arguments.h"
#include "context.h"
#include "engine/choice.h"
#include "observer.h"
#include "process.h"
#include "reply.h"
#include "report.h"
#include "text.h"

static atomic_size_t packet_limit = MILTER_MAX_DATA_SIZE;

size_t
get_packet_limit(void)
{
    return packet_limit;
}

void
set_packet_limit(size_t size)
{
    packet_limit = size;
}

/* -------------------------------------------------------- calls to the engine */

enum { ANY_CALLBACK = -2, ANYWHERE = -3 };

typedef struct {
    const char *call;    /* libmilter's name, for errors */
    int stage;           /* where it is allowed, or ANY_CALLBACK, or ANYWHERE until close */
    unsigned long needs; /* SMFIF_* that must have been agreed, or 0 */
    const char *needs_name;
    bool writes; /* it sends to the MTA, which may take long */
    int (*run)(SMFICTX *handle, void *operands);
} Action;

/* Why an action may not be taken now. */
enum refusal {
    ALLOWED,
    CLOSED,
    NOT_IN_A_FORK,
    NOT_AT_THIS_STAGE,
    NOT_OUTSIDE,
    NOT_NEGOTIATED,
};

/* May it be taken in the callback of this stage, with these actions agreed? */
static enum refusal
judge_moment(const Action *action, enum stage stage, unsigned long agreed)
{
    if (action->stage >= 0 && (int)stage != action->stage) {
        return NOT_AT_THIS_STAGE;
    }
    if (stage == OUTSIDE && action->stage != ANYWHERE) {
        return NOT_OUTSIDE;
    }
    return action->needs != 0 && (agreed & action->needs) == 0 ? NOT_NEGOTIATED : ALLOWED;
}

/* Called with the context's lock held. */
static enum refusal
judge_action(const ContextObject *self, const Action *action)
{
    if (self->handle == NULL) {
        return CLOSED;
    }
    if (action->writes && is_forked()) {
        return NOT_IN_A_FORK;
    }
    return judge_moment(action, self->stage, self->actions);
}

static void
raise_refusal(const module_state *state, const Action *action, enum refusal why)
{
    PyObject *error = state->error;

    switch (why) {
    case CLOSED:
        PyErr_SetString(error, "bad context");
        break;
    case NOT_IN_A_FORK:
        PyErr_Format(error, "%s: this process is a fork of the filter, which alone answers the MTA",
                     action->call);
        break;
    case NOT_AT_THIS_STAGE:
        PyErr_Format(error, "%s: only allowed in the %s callback", action->call,
                     stages[action->stage].name);
        break;
    case NOT_OUTSIDE:
        PyErr_Format(error, "%s: only allowed while a callback of this connection runs",
                     action->call);
        break;
    case NOT_NEGOTIATED:
        PyErr_Format(error, "%s: %s was not negotiated with the MTA", action->call,
                     action->needs_name);
        break;
    case ALLOWED: /* the call itself failed */
        PyErr_Format(error, "%s failed%s", action->call,
                     action->writes ? ": the connection to the MTA is broken" : "");
    }
}

/* The one road: lock the context, check, call.  The lock keeps the connection from being closed
 * under a call from another thread; whoever waits for it does so without the interpreter lock.  In
 * a forked child nobody waits: the thread that holds it may not have been forked. */
static bool
perform(ContextObject *self, const Action *action, void *operands)
{
    enum refusal why;
    int result = MI_FAILURE;

    if (!is_forked()) {
        lock_context(self);
    }
    else if (pthread_mutex_trylock(&self->lock) != 0) {
        raise_refusal(self->state, action, NOT_IN_A_FORK);
        return false;
    }
    why = judge_action(self, action);
    if (why == ALLOWED) {
        result = action->run(self->handle, operands);
    }
    pthread_mutex_unlock(&self->lock);
    if (result != MI_SUCCESS) {
        raise_refusal(self->state, action, why);
    }
    return result == MI_SUCCESS;
}

/* Operands of the calls that take up to two strings and an index. */
typedef struct {
    char *first, *second;
    int index;
} Strings;

static int
run_addheader(SMFICTX *handle, void *operands)
{
    Strings *s = operands;

    return s->index < 0 ? engine->addheader(handle, s->first, s->second)
                        : engine->insheader(handle, s->index, s->first, s->second);
}

static int
run_chgheader(SMFICTX *handle, void *operands)
{
    Strings *s = operands;
    return engine->chgheader(handle, s->first, s->index, s->second);
}

static int
run_addrcpt(SMFICTX *handle, void *operands)
{
    return engine->addrcpt(handle, ((Strings *)operands)->first);
}

static int
run_addrcpt_par(SMFICTX *handle, void *operands)
{
    Strings *s = operands;
    return engine->addrcpt_par(handle, s->first, s->second);
}

static int
run_delrcpt(SMFICTX *handle, void *operands)
{
    return engine->delrcpt(handle, ((Strings *)operands)->first);
}

static int
run_chgfrom(SMFICTX *handle, void *operands)
{
    Strings *s = operands;
    return engine->chgfrom(handle, s->first, s->second);
}

static int
run_quarantine(SMFICTX *handle, void *operands)
{
    return engine->quarantine(handle, ((Strings *)operands)->first);
}

/* libmilter would send it at any time, and sendmail gives the filter up for one that it does not
 * expect: at every other step there is nothing to do. */
static int
run_progress(SMFICTX *handle, void *operands)
{
    const ContextObject *context = operands;

    return context->stage == EOM ? engine->progress(handle) : MI_SUCCESS;
}

/* smfi_replacebody takes an int; a larger body goes out in pieces, as it would in one. */
static int
run_replacebody(SMFICTX *handle, void *operands)
{
    Py_buffer *body = operands;
    unsigned char *from = body->buf;
    Py_ssize_t left = body->len;
    size_t packet = packet_limit;
    /* libmilter cuts it into chunks, whatever setmaxdatasize() says. */
    Py_ssize_t most = packet < MILTER_CHUNK_SIZE ? (Py_ssize_t)packet : MILTER_CHUNK_SIZE * 1024;
    int result;

    do {
        int size = (int)Py_MIN(left, most);
        result = engine->replacebody(handle, from, size);
        from += size;
        left -= size;
    } while (result == MI_SUCCESS && left > 0);
    return result;
}

/* The value is copied under the lock: it stays libmilter's memory. */
typedef struct {
    char *name;
    char *copy; /* NULL where the macro is not defined; free() it */
    bool no_memory;
} MacroLookup;

static int
run_getsymval(SMFICTX *handle, void *operands)
{
    MacroLookup *lookup = operands;
    const char *value = engine->getsymval(handle, lookup->name);

    if (value != NULL) {
        lookup->copy = strdup(value);
        lookup->no_memory = lookup->copy == NULL;
    }
    return MI_SUCCESS;
}

static int
run_setreply(SMFICTX *handle, void *operands)
{
    Reply *r = operands;

    return r->count < 2 ? engine->setreply(handle, r->code, r->enhanced, r->lines[0])
                        : engine->setmlreply(handle, r->code, r->enhanced, r->lines);
}

typedef struct {
    ContextObject *context;
    int stage;
    const char *names;
    bool no_memory;
} SymbolList;

#define BLANKS " \t\v\f"

static bool
is_among(const char *list, const char *name, size_t size)
{
    size_t length;

    for (; *list != '\0'; list += length + strspn(list + length, BLANKS)) {
        length = strcspn(list, BLANKS);
        if (length == size && memcmp(list, name, size) == 0) {
            return true;
        }
    }
    return false;
}

/* Merge names into the list of a stage; libmilter, which takes one list for each, gets them when
 * the callback has ended. */
static int
run_setsymlist(SMFICTX *Py_UNUSED(handle), void *operands)
{
    SymbolList *wanted = operands;
    char **place = &wanted->context->macros[wanted->stage];
    size_t have = *place == NULL ? 0 : strlen(*place);
    const char *name = wanted->names + strspn(wanted->names, BLANKS);
    size_t size;
    char *list;

    if ((wanted->context->offered_actions & SMFIF_SETSYMLIST) == 0) {
        return MI_SUCCESS; /* an MTA that takes no lists sends what it always sends */
    }
    list = realloc(*place, have + strlen(name) + 2);
    wanted->no_memory = list == NULL;
    if (list == NULL) {
        return MI_FAILURE;
    }
    list[have] = '\0';
    for (; *name != '\0'; name += size + strspn(name + size, BLANKS)) {
        size = strcspn(name, BLANKS);
        if (!is_among(list, name, size)) {
            if (have > 0) {
                list[have++] = ' ';
            }
            memcpy(list + have, name, size);
            have += size;
            list[have] = '\0';
        }
    }
    *place = list;
    return MI_SUCCESS;
}

#define NEEDS(flag) SMFIF_##flag, #flag
static const Action action_addheader = {"smfi_addheader", EOM, NEEDS(ADDHDRS), true, run_addheader};
static const Action action_insheader = {"smfi_insheader", EOM, NEEDS(ADDHDRS), true, run_addheader};
static const Action action_chgheader = {"smfi_chgheader", EOM, NEEDS(CHGHDRS), true, run_chgheader};
static const Action action_addrcpt = {"smfi_addrcpt", EOM, NEEDS(ADDRCPT), true, run_addrcpt};
static const Action action_addrcpt_par = {"smfi_addrcpt_par", EOM, NEEDS(ADDRCPT_PAR), true,
                                          run_addrcpt_par};
static const Action action_delrcpt = {"smfi_delrcpt", EOM, NEEDS(DELRCPT), true, run_delrcpt};
static const Action action_chgfrom = {"smfi_chgfrom", EOM, NEEDS(CHGFROM), true, run_chgfrom};
static const Action action_replacebody = {"smfi_replacebody", EOM, NEEDS(CHGBODY), true,
                                          run_replacebody};
static const Action action_quarantine = {"smfi_quarantine", EOM, NEEDS(QUARANTINE), true,
                                         run_quarantine};
static const Action action_progress = {"smfi_progress", ANYWHERE, 0, NULL, true, run_progress};
static const Action action_getsymval = {"smfi_getsymval", ANY_CALLBACK, 0, NULL, false,
                                        run_getsymval};
static const Action action_setreply = {"smfi_setreply", ANY_CALLBACK, 0, NULL, false, run_setreply};
static const Action action_setsymlist = {"smfi_setsymlist", NEGOTIATE, 0, NULL, false,
                                         run_setsymlist};
#undef NEEDS

bool
check_moment(const module_state *state, const char *call, enum stage stage, unsigned long agreed)
{
    static const Action *const known[] = {
        &action_addheader,   &action_insheader,  &action_chgheader, &action_addrcpt,
        &action_addrcpt_par, &action_delrcpt,    &action_chgfrom,   &action_replacebody,
        &action_quarantine,  &action_setsymlist,
    };

    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(known[i]->call, call) == 0) {
            enum refusal why = judge_moment(known[i], stage, agreed);
            if (why != ALLOWED) {
                raise_refusal(state, known[i], why);
            }
            return why == ALLOWED;
        }
    }
    PyErr_Format(PyExc_ValueError, "no action of that name: %s", call);
    return false;
}

static char *
string_of(PyObject *bytes)
{
    return bytes == NULL ? NULL : PyBytes_AS_STRING(bytes);
}

/* libmilter refuses a packet that is larger than the limit, and does not say why. */
static bool
fits_packet(ContextObject *self, const Action *action, size_t size)
{
    size_t limit = packet_limit;

#ifdef SMFIP_MDS_1M
    limit = self->protocol & SMFIP_MDS_1M     ? Py_MAX(limit, 1024 * 1024 - 1)
            : self->protocol & SMFIP_MDS_256K ? Py_MAX(limit, 256 * 1024 - 1)
                                              : limit;
#endif
    if (size <= limit) {
        return true;
    }
    PyErr_Format(self->state->invalid_argument,
                 "%s: %zu bytes are too many, a packet to the MTA holds %zu (see setmaxdatasize)",
                 action->call, size, limit);
    return false;
}

/* Run an action on one or two checked strings; takes over both references.  `first` NULL means
 * that an exception is set; `second` may be NULL for none. */
static PyObject *
perform_strings(ContextObject *self, const Action *action, PyObject *first, PyObject *second,
                int index)
{
    size_t size = sizeof(uint32_t); /* the index that some carry */
    bool done = false;

    size += first == NULL ? 0 : (size_t)PyBytes_GET_SIZE(first) + 1;
    size += second == NULL ? 0 : (size_t)PyBytes_GET_SIZE(second) + 1;
    if (first != NULL && !PyErr_Occurred() && fits_packet(self, action, size)) {
        Strings strings = {string_of(first), string_of(second), index};
        done = perform(self, action, &strings);
    }
    Py_XDECREF(first);
    Py_XDECREF(second);
    return done ? Py_NewRef(Py_None) : NULL;
}

/* ------------------------------------------------------------------- methods */

PyDoc_STRVAR(addheader_doc,
             "addheader($self, /, name, value, idx=-1)\n--\n\n"
             "Add a header field to the message; only in the eom callback.\n\n"
             "name, value: str (sent as UTF-8) or bytes.  A value may be folded with LF, or\n"
             "CRLF, before a space or tab.  idx: at which place among all header fields, 0 for\n"
             "the top; below 0 the field goes to the end.\n\n"
             "Raises InvalidArgument for what could forge a header, error where ADDHDRS was not\n"
             "negotiated.  libmilter: smfi_addheader, smfi_insheader.");

static PyObject *
context_addheader(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"name", "value", "idx", NULL};
    PyObject *name, *value, *idx_object = NULL;
    int idx = -1;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|O:addheader", names, &name, &value,
                                     &idx_object) ||
        (idx_object != NULL &&
         !header_index_argument(self->state, "addheader", idx_object, true, &idx))) {
        return NULL;
    }
    name = header_name_argument(self->state, "addheader", name);
    value = name == NULL ? NULL : header_value_argument(self->state, "addheader", value);
    return perform_strings(self, idx < 0 ? &action_addheader : &action_insheader, name, value, idx);
}

PyDoc_STRVAR(chgheader_doc,
             "chgheader($self, /, name, idx, value)\n--\n\n"
             "Change or delete a header field of the message; only in the eom callback.\n\n"
             "idx: which of the fields of that name, counted from 1.  value: str, bytes, or None\n"
             "(or empty) to delete it.\n\n"
             "Raises InvalidArgument for what could forge a header, error where CHGHDRS was not\n"
             "negotiated.  libmilter: smfi_chgheader.");

static PyObject *
context_chgheader(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"name", "idx", "value", NULL};
    PyObject *name, *value, *idx_object;
    int number;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO:chgheader", names, &name, &idx_object,
                                     &value)) {
        return NULL;
    }
    if (!header_index_argument(self->state, "chgheader", idx_object, false, &number)) {
        return NULL;
    }
    name = header_name_argument(self->state, "chgheader", name);
    if (name != NULL) {
        value = value == Py_None ? NULL : header_value_argument(self->state, "chgheader", value);
    }
    return perform_strings(self, &action_chgheader, name, name == NULL ? NULL : value, number);
}

PyDoc_STRVAR(addrcpt_doc,
             "addrcpt($self, /, rcpt, params=None)\n--\n\n"
             "Add a recipient to the envelope; only in the eom callback.\n\n"
             "rcpt: the address, str or bytes.  params: ESMTP parameters, separated by spaces.\n\n"
             "Raises InvalidArgument for a line break or NUL, error where ADDRCPT (with params:\n"
             "ADDRCPT_PAR) was not negotiated.  libmilter: smfi_addrcpt, smfi_addrcpt_par.");

static PyObject *
context_addrcpt(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"rcpt", "params", NULL};
    PyObject *rcpt, *params = Py_None;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O:addrcpt", names, &rcpt, &params)) {
        return NULL;
    }
    rcpt = nonempty_line_argument(self->state, "addrcpt", "rcpt", rcpt);
    if (params == Py_None || rcpt == NULL) {
        return perform_strings(self, &action_addrcpt, rcpt, NULL, 0);
    }
    params = line_argument(self->state, "addrcpt", "params", params);
    if (params != NULL && PyBytes_GET_SIZE(params) == 0 &&
        (self->actions & SMFIF_ADDRCPT_PAR) == 0) {
        Py_CLEAR(params); /* none at all, for which the other action will do */
        return perform_strings(self, &action_addrcpt, rcpt, NULL, 0);
    }
    return perform_strings(self, &action_addrcpt_par, rcpt, params, 0);
}

PyDoc_STRVAR(delrcpt_doc,
             "delrcpt($self, /, rcpt)\n--\n\n"
             "Remove a recipient from the envelope; only in the eom callback.\n\n"
             "rcpt: the address as the envrcpt callback got it, str or bytes.\n\n"
             "Raises InvalidArgument for a line break or NUL, error where DELRCPT was not\n"
             "negotiated.  libmilter: smfi_delrcpt.");

static PyObject *
context_delrcpt(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"rcpt", NULL};
    PyObject *rcpt;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:delrcpt", names, &rcpt)) {
        return NULL;
    }
    rcpt = nonempty_line_argument(self->state, "delrcpt", "rcpt", rcpt);
    return perform_strings(self, &action_delrcpt, rcpt, NULL, 0);
}

PyDoc_STRVAR(
    chgfrom_doc,
    "chgfrom($self, /, sender, params=None)\n--\n\n"
    "Replace the envelope sender; only in the eom callback.\n\n"
    "sender: the address, str or bytes.  params: ESMTP parameters, separated by spaces.\n\n"
    "Raises InvalidArgument for a line break or NUL, error where CHGFROM was not\n"
    "negotiated.  libmilter: smfi_chgfrom.");

static PyObject *
context_chgfrom(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"sender", "params", NULL};
    PyObject *sender, *params = Py_None;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O:chgfrom", names, &sender, &params)) {
        return NULL;
    }
    sender = nonempty_line_argument(self->state, "chgfrom", "sender", sender);
    if (sender != NULL) {
        params = params == Py_None ? NULL : line_argument(self->state, "chgfrom", "params", params);
    }
    return perform_strings(self, &action_chgfrom, sender, sender == NULL ? NULL : params, 0);
}

PyDoc_STRVAR(
    quarantine_doc,
    "quarantine($self, /, reason)\n--\n\n"
    "Have the MTA hold the message; only in the eom callback, and a verdict is still due.\n\n"
    "reason: one line for the MTA's log, str or bytes, not empty.\n\n"
    "Raises InvalidArgument for a line break or NUL, error where QUARANTINE was not\n"
    "negotiated.  libmilter: smfi_quarantine.");

static PyObject *
context_quarantine(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"reason", NULL};
    PyObject *reason;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:quarantine", names, &reason)) {
        return NULL;
    }
    reason = nonempty_line_argument(self->state, "quarantine", "reason", reason);
    return perform_strings(self, &action_quarantine, reason, NULL, 0);
}

PyDoc_STRVAR(
    progress_doc,
    "progress($self, /)\n--\n\n"
    "Tell the MTA that the filter still works, so that it waits on.  MTAs expect that in the eom\n"
    "callback alone; elsewhere nothing is sent.\n\n"
    "Raises error where the connection is broken.  libmilter: smfi_progress.");

static PyObject *
context_progress(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    ContextObject *self = (ContextObject *)op;

    if (!perform(self, &action_progress, self)) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(replacebody_doc,
             "replacebody($self, /, body)\n--\n\n"
             "Replace the body of the message; only in the eom callback.\n\n"
             "body: bytes or any bytes-like object of any size (sent as it is, with CRLF line\n"
             "ends), or str (sent as UTF-8).  Further calls append.\n\n"
             "Raises error where CHGBODY was not negotiated.  libmilter: smfi_replacebody.");

static PyObject *
context_replacebody(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"body", NULL};
    PyObject *body;
    Py_buffer buffer;
    bool done;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:replacebody", names, &body)) {
        return NULL;
    }
    if (PyUnicode_Check(body)) {
        body = encode_text(self->state, "replacebody", "body", body);
        if (body == NULL) {
            return NULL;
        }
    }
    else {
        Py_INCREF(body);
    }
    if (PyObject_GetBuffer(body, &buffer, PyBUF_SIMPLE) < 0) {
        Py_DECREF(body);
        return NULL;
    }
    done = perform(self, &action_replacebody, &buffer);
    PyBuffer_Release(&buffer);
    Py_DECREF(body);
    if (!done) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(getsymval_doc,
             "getsymval($self, /, name)\n--\n\n"
             "The value of a macro that the MTA sent, str, or None where it sent none.\n\n"
             "name: e.g. 'i' (the queue id) or '{client_addr}'; braces may be left out around one\n"
             "letter.  libmilter: smfi_getsymval.");

static PyObject *
context_getsymval(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"name", NULL};
    PyObject *name, *value;
    MacroLookup lookup = {0};
    bool done;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:getsymval", names, &name)) {
        return NULL;
    }
    name = text_argument(self->state, "getsymval", "name", name);
    if (name == NULL) {
        return NULL;
    }
    lookup.name = PyBytes_AS_STRING(name);
    done = perform(self, &action_getsymval, &lookup);
    Py_DECREF(name);
    if (!done) {
        return NULL;
    }
    if (lookup.no_memory) {
        return PyErr_NoMemory();
    }
    if (lookup.copy == NULL) {
        Py_RETURN_NONE;
    }
    value = text_from(lookup.copy, strlen(lookup.copy));
    free(lookup.copy);
    return value;
}

PyDoc_STRVAR(setreply_doc,
             "setreply($self, /, rcode, xcode=None, msg=None, *more)\n--\n\n"
             "Set the SMTP reply that goes with the next REJECT or TEMPFAIL verdict.\n\n"
             "rcode: '4xx' or '5xx'; it fits TEMPFAIL or REJECT by its first digit, otherwise\n"
             "libmilter drops it (logged).  xcode: an enhanced code such as '5.7.1' (RFC 3463).\n"
             "msg, more: up to 32 lines of at most 980 bytes, str or bytes, '%' doubled.\n\n"
             "Raises InvalidArgument, which says what rule is broken.  libmilter: smfi_setreply,\n"
             "smfi_setmlreply.");

static PyObject *
context_setreply(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    Reply reply;
    bool done = parse_reply(self->state, args, keywords, 1, &reply) &&
                fits_packet(self, &action_setreply, reply.size) &&
                perform(self, &action_setreply, &reply);

    if (done) {
        self->reply_class = reply.code[0];
    }
    free_reply(&reply);
    return done ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(
    setsymlist_doc,
    "setsymlist($self, /, stage, macros)\n--\n\n"
    "Ask the MTA to send only these macros at a stage; only in the negotiate callback.\n\n"
    "stage: M_CONNECT ... M_EOH.  macros: names separated by spaces, str or bytes.  Lists\n"
    "for one stage are merged.  sendmail takes at most five.  Where the MTA did not offer\n"
    "SETSYMLIST it sends what it always sends.  libmilter: smfi_setsymlist.");

static PyObject *
context_setsymlist(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"stage", "macros", NULL};
    PyObject *stage, *macros;
    SymbolList wanted = {.context = self};
    bool done;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O:setsymlist", names, &PyLong_Type, &stage,
                                     &macros)) {
        return NULL;
    }
    macros = symlist_argument(self->state, stage, macros, &wanted.stage);
    if (macros == NULL) {
        return NULL;
    }
    wanted.names = PyBytes_AS_STRING(macros);
    done = perform(self, &action_setsymlist, &wanted);
    if (wanted.no_memory) {
        PyErr_NoMemory();
    }
    Py_DECREF(macros);
    return done ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(setpriv_doc,
             "setpriv($self, priv, /)\n--\n\n"
             "Keep an object for this connection; returns the one that it replaces, or None.");

PyDoc_STRVAR(getpriv_doc, "getpriv($self, /)\n--\n\n"
                          "The object that setpriv() kept for this connection, or None.");

static PyObject *
context_actions(PyObject *op, void *Py_UNUSED(closure))
{
    ContextObject *self = (ContextObject *)op;

    return PyLong_FromUnsignedLong(self->actions);
}

static PyObject *
context_protocol(PyObject *op, void *Py_UNUSED(closure))
{
    ContextObject *self = (ContextObject *)op;

    return PyLong_FromUnsignedLong(self->protocol);
}

/* Those that do something to the message, or to the answer, are told of. */
#define OBSERVED(name)                                                                             \
    static PyObject *observed_##name(PyObject *op, PyObject *args, PyObject *keywords)             \
    {                                                                                              \
        return observe_action(op, #name, args, keywords, context_##name(op, args, keywords));      \
    }

OBSERVED(addheader)
OBSERVED(addrcpt)
OBSERVED(chgfrom)
OBSERVED(chgheader)
OBSERVED(delrcpt)
OBSERVED(quarantine)
OBSERVED(replacebody)
OBSERVED(setreply)

#define OBSERVED_METHOD(name)                                                                      \
    {                                                                                              \
#name, (PyCFunction)(void (*)(void))observed_##name, METH_VARARGS | METH_KEYWORDS,         \
            name##_doc                                                                             \
    }

#define KEYWORD_METHOD(name)                                                                       \
    {                                                                                              \
#name, (PyCFunction)(void (*)(void))context_##name, METH_VARARGS | METH_KEYWORDS,          \
            name##_doc                                                                             \
    }

static PyMethodDef context_methods[] = {
    OBSERVED_METHOD(addheader),
    OBSERVED_METHOD(addrcpt),
    OBSERVED_METHOD(chgfrom),
    OBSERVED_METHOD(chgheader),
    OBSERVED_METHOD(delrcpt),
    KEYWORD_METHOD(getsymval),
    OBSERVED_METHOD(quarantine),
    OBSERVED_METHOD(replacebody),
    OBSERVED_METHOD(setreply),
    KEYWORD_METHOD(setsymlist),
    {"getpriv", context_getpriv, METH_NOARGS, getpriv_doc},
    {"progress", context_progress, METH_NOARGS, progress_doc},
    {"setpriv", context_setpriv, METH_O, setpriv_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef context_getters[] = {
    {"actions", context_actions, NULL,
     "The actions agreed with the MTA, such as ADDHDRS and CHGBODY.", NULL},
    {"protocol", context_protocol, NULL,
     "The protocol steps agreed with the MTA, such as P_SKIP and P_NR_HDR.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef context_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ContextObject, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(context_doc, "The connection of an MTA, first argument of every callback.\n\n"
                          "Made by the module only.  After the close callback every method raises\n"
                          "error('bad context').");

static PyType_Slot context_slots[] = {
    {Py_tp_doc, (void *)context_doc},   {Py_tp_methods, context_methods},
    {Py_tp_members, context_members},   {Py_tp_getset, context_getters},
    {Py_tp_traverse, context_traverse}, {Py_tp_clear, context_clear},
    {Py_tp_dealloc, context_dealloc},   {0, NULL},
};

PyType_Spec context_spec = {
    .name = "milter.milterContext",
    .basicsize = sizeof(ContextObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC
#if PY_VERSION_HEX >= 0x030A0000
             | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE
#endif
    ,
    .slots = context_slots,
};
