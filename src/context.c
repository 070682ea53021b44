/* The context object: what a callback gets first, and its calls into libmilter. */

#include "milter.h"

ContextObject *
new_context(module_state *state, SMFICTX *handle, enum stage stage)
{
    ContextObject *self = PyObject_GC_New(ContextObject, state->context_type);

    if (self == NULL) {
        return NULL;
    }
    memset((char *)self + sizeof(PyObject), 0, sizeof *self - sizeof(PyObject));
    pthread_mutex_init(&self->lock, NULL);
    self->state = state;
    self->handle = handle;
    self->stage = OUTSIDE;
    self->offered_actions = self->actions = SMFI_CURR_ACTS;
    recall(self, stage);
    PyObject_GC_Track(self); /* from here on gc.get_objects() shows it to other threads */
    return self;
}

/* After this no method reaches libmilter.  Called with the context's lock held, which it gives
 * back. */
static void
let_go(ContextObject *context)
{
    SMFICTX *handle = context->handle;

    context->handle = NULL;
    context->stage = OUTSIDE;
    pthread_mutex_unlock(&context->lock);
    smfi_setpriv(handle, NULL);
    atomic_fetch_add(&filter.deleted, 1);
    count_connection(-1);
    if (atomic_load(&filter.draining)) {
        wake_main();
    }
}

/* The connection is closed. */
void
forget_connection(ContextObject *context)
{
    end_message(context);
    remember(context);
    lock_context(context); /* another thread may be in libmilter with this handle */
    let_go(context);
    Py_XDECREF(swap_priv(context, NULL)); /* breaks the cycle with the application's object */
    Py_DECREF(context);                   /* the reference that libmilter's pointer owned */
}

/* The same where this thread cannot enter Python: the objects stay behind. */
void
lose_connection(ContextObject *context)
{
    end_message(context);
    pthread_mutex_lock(&context->lock);
    let_go(context);
}

/* The object that the context keeps; returns the one before, owned, or NULL. */
PyObject *
swap_priv(ContextObject *context, PyObject *priv)
{
    PyObject *old;

    LOCK_STATE();
    old = context->priv;
    context->priv = Py_XNewRef(priv);
    UNLOCK_STATE();
    return old;
}

static int
context_traverse(PyObject *op, visitproc visit, void *arg)
{
    ContextObject *self = (ContextObject *)op;

    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->priv);
    return 0;
}

static int
context_clear(PyObject *op)
{
    ContextObject *self = (ContextObject *)op;

    Py_CLEAR(self->priv);
    return 0;
}

static void
context_dealloc(PyObject *op)
{
    ContextObject *self = (ContextObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    PyObject_GC_UnTrack(op);
    PyObject_ClearWeakRefs(op);
    context_clear(op);
    for (int i = SMFIM_FIRST; i <= SMFIM_LAST; i++) {
        free(self->macros[i]);
    }
    pthread_mutex_destroy(&self->lock);
    free(self->client);
    type->tp_free(op);
    Py_DECREF(type);
}

/* --- calls into libmilter */

enum { ANY_CALLBACK = -2 };

typedef struct {
    const char *call;    /* libmilter's name, for errors */
    int stage;           /* where it is allowed, or ANY_CALLBACK */
    unsigned long needs; /* SMFIF_* that must have been agreed, or 0 */
    const char *needs_name;
    bool writes; /* it sends to the MTA, which may take long */
    int (*run)(SMFICTX *handle, void *operands);
} Action;

static const char a_fork[] = "this process is a fork of the filter, which alone answers the MTA";

/* Why an action is refused now, or NULL.  Called with the context's lock held. */
static const char *
why_not(const ContextObject *self, const Action *action)
{
    if (self->handle == NULL) {
        return "bad context";
    }
    if (action->writes && atomic_load(&filter.forked)) {
        return a_fork;
    }
    if (action->stage != ANY_CALLBACK && self->stage != action->stage) {
        return action->stage == EOM ? "only allowed in the eom callback"
                                    : "only allowed in the negotiate callback";
    }
    if (self->stage == OUTSIDE) {
        return "only allowed while a callback of this connection runs";
    }
    if (action->needs != 0 && (self->actions & action->needs) == 0) {
        return "was not negotiated";
    }
    return NULL;
}

/* The one road to libmilter: lock the context, check, call, turn failure into an exception.  The
 * lock keeps the connection from being closed under a call from another thread; whoever waits
 * for it does so without the interpreter lock.  In a forked child nobody waits: the thread that
 * holds it may not have been forked. */
static bool
perform(ContextObject *self, const Action *action, void *operands)
{
    const char *why;
    int result = MI_FAILURE;
    bool forked = atomic_load(&filter.forked);
    bool locked = (forked || !action->writes) && pthread_mutex_trylock(&self->lock) == 0;
    bool in_turnstile = false;
    PyThreadState *saved = NULL;

    if (!locked && !forked) {
        saved = PyEval_SaveThread();
        in_turnstile = leave_turnstile();
        locked = pthread_mutex_lock(&self->lock) == 0;
    }
    why = locked ? why_not(self, action) : a_fork;
    if (why == NULL) {
        result = action->run(self->handle, operands);
    }
    if (locked) {
        pthread_mutex_unlock(&self->lock);
    }
    if (saved != NULL && in_turnstile) {
        enter_turnstile();
        PyEval_RestoreThread(saved);
        pass_turnstile(OUTSIDE);
    }
    else if (saved != NULL) {
        PyEval_RestoreThread(saved);
    }
    if (result == MI_SUCCESS) {
        return true;
    }
    if (why == NULL) {
        PyErr_Format(self->state->error, "%s failed%s", action->call,
                     action->writes ? ": the connection to the MTA is broken" : "");
    }
    else if (self->handle == NULL) {
        PyErr_SetString(self->state->error, why);
    }
    else if (strcmp(why, "was not negotiated") == 0) {
        PyErr_Format(self->state->error, "%s: %s %s with the MTA", action->call, action->needs_name,
                     why);
    }
    else {
        PyErr_Format(self->state->error, "%s: %s", action->call, why);
    }
    return false;
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

    return s->index < 0 ? smfi_addheader(handle, s->first, s->second)
                        : smfi_insheader(handle, s->index, s->first, s->second);
}

static int
run_chgheader(SMFICTX *handle, void *operands)
{
    Strings *s = operands;
    return smfi_chgheader(handle, s->first, s->index, s->second);
}

static int
run_addrcpt(SMFICTX *handle, void *operands)
{
    return smfi_addrcpt(handle, ((Strings *)operands)->first);
}

static int
run_addrcpt_par(SMFICTX *handle, void *operands)
{
    Strings *s = operands;
    return smfi_addrcpt_par(handle, s->first, s->second);
}

static int
run_delrcpt(SMFICTX *handle, void *operands)
{
    return smfi_delrcpt(handle, ((Strings *)operands)->first);
}

static int
run_chgfrom(SMFICTX *handle, void *operands)
{
    Strings *s = operands;
    return smfi_chgfrom(handle, s->first, s->second);
}

static int
run_quarantine(SMFICTX *handle, void *operands)
{
    return smfi_quarantine(handle, ((Strings *)operands)->first);
}

static int
run_progress(SMFICTX *handle, void *Py_UNUSED(operands))
{
    return smfi_progress(handle);
}

/* smfi_replacebody takes an int; a larger body goes out in pieces, as it would in one. */
static int
run_replacebody(SMFICTX *handle, void *operands)
{
    Py_buffer *body = operands;
    unsigned char *from = body->buf;
    Py_ssize_t left = body->len;
    size_t packet = filter.max_data;
    /* libmilter cuts it into chunks, whatever setmaxdatasize() says. */
    Py_ssize_t most = packet < MILTER_CHUNK_SIZE ? (Py_ssize_t)packet : MILTER_CHUNK_SIZE * 1024;
    int result;

    do {
        int size = (int)Py_MIN(left, most);
        result = smfi_replacebody(handle, from, size);
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
    const char *value = smfi_getsymval(handle, lookup->name);

    if (value != NULL) {
        lookup->copy = strdup(value);
        lookup->no_memory = lookup->copy == NULL;
    }
    return MI_SUCCESS;
}

typedef struct {
    char *code, *enhanced;
    char *lines[MAX_REPLY_LINES];
    int count;
} Reply;

static int
run_setreply(SMFICTX *handle, void *operands)
{
    Reply *r = operands;
    char **l = r->lines;

    if (r->count < 2) {
        return smfi_setreply(handle, r->code, r->enhanced, l[0]);
    }
    /* A list of variable length that ends at its first NULL: the lines beyond count are NULL. */
    return smfi_setmlreply(handle, r->code, r->enhanced, l[0], l[1], l[2], l[3], l[4], l[5], l[6],
                           l[7], l[8], l[9], l[10], l[11], l[12], l[13], l[14], l[15], l[16], l[17],
                           l[18], l[19], l[20], l[21], l[22], l[23], l[24], l[25], l[26], l[27],
                           l[28], l[29], l[30], l[31], (char *)NULL);
}

typedef struct {
    ContextObject *context;
    int stage;
    const char *names;
    bool not_offered, no_memory;
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

    wanted->not_offered = (wanted->context->offered_actions & SMFIF_SETSYMLIST) == 0;
    if (wanted->not_offered) {
        return MI_FAILURE;
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
static const Action action_progress = {"smfi_progress", EOM, 0, NULL, true, run_progress};
static const Action action_getsymval = {"smfi_getsymval", ANY_CALLBACK, 0, NULL, false,
                                        run_getsymval};
static const Action action_setreply = {"smfi_setreply", ANY_CALLBACK, 0, NULL, false, run_setreply};
static const Action action_setsymlist = {"smfi_setsymlist", NEGOTIATE, 0, NULL, false,
                                         run_setsymlist};
#undef NEEDS

static char *
string_of(PyObject *bytes)
{
    return bytes == NULL ? NULL : PyBytes_AS_STRING(bytes);
}

/* libmilter refuses a packet that is larger than the limit, and does not say why. */
static bool
fits_packet(ContextObject *self, const Action *action, size_t size)
{
    size_t limit = filter.max_data;

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

/* An index as long, where out of range as its end.  False with TypeError set where it is no int. */
static bool
index_argument(PyObject *value, long *index)
{
    int overflow;

    *index = PyLong_AsLongAndOverflow(value, &overflow);
    if (overflow != 0) {
        *index = overflow < 0 ? LONG_MIN : LONG_MAX;
    }
    return *index != -1 || !PyErr_Occurred();
}

/* --- methods */

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
    long idx = -1;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|O:addheader", names, &name, &value,
                                     &idx_object) ||
        (idx_object != NULL && !index_argument(idx_object, &idx))) {
        return NULL;
    }
    if (idx > INT_MAX) {
        refuse(self->state, "addheader", "idx", "must fit into 32 bits", idx_object);
        return NULL;
    }
    name = header_name_argument(self->state, "addheader", name);
    value = name == NULL ? NULL : header_value_argument(self->state, "addheader", value);
    return perform_strings(self, idx < 0 ? &action_addheader : &action_insheader, name, value,
                           idx < 0 ? -1 : (int)idx);
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
    long number;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO:chgheader", names, &name, &idx_object,
                                     &value)) {
        return NULL;
    }
    if (!index_argument(idx_object, &number)) {
        return NULL;
    }
    if (number < 0 || number > INT_MAX) {
        refuse(self->state, "chgheader", "idx",
               number < 0 ? "must not be negative" : "must fit into 32 bits", idx_object);
        return NULL;
    }
    name = header_name_argument(self->state, "chgheader", name);
    if (name != NULL) {
        value = value == Py_None ? NULL : header_value_argument(self->state, "chgheader", value);
    }
    return perform_strings(self, &action_chgheader, name, name == NULL ? NULL : value, (int)number);
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
    "Tell the MTA that the filter still works, so that it waits on; only in the eom callback.\n\n"
    "Raises error where the connection is broken.  libmilter: smfi_progress.");

static PyObject *
context_progress(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    ContextObject *self = (ContextObject *)op;

    if (!perform(self, &action_progress, NULL)) {
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

/* RFC 3463: class "." subject "." detail, as libmilter checks it. */
static bool
is_enhanced_code(const char *s)
{
    if ((*s != '2' && *s != '4' && *s != '5') || s[1] != '.') {
        return false;
    }
    s += 2;
    for (int part = 0; part < 2; part++) {
        size_t digits = strspn(s, "0123456789");
        if (digits < 1 || digits > 3 || s[digits] != (part == 0 ? '.' : '\0')) {
            return false;
        }
        s += digits + 1;
    }
    return true;
}

static bool
is_reply_code(const char *s)
{
    return strlen(s) == 3 && (*s == '4' || *s == '5') && strspn(s, "0123456789") == 3;
}

/* sendmail formats the text of a reply: a lone % would be dropped, or worse. */
static bool
has_lone_percent(const char *s)
{
    while ((s = strchr(s, '%')) != NULL) {
        size_t run = strspn(s, "%");
        if (run % 2 != 0) {
            return true;
        }
        s += run;
    }
    return false;
}

static PyObject *
reply_line_argument(module_state *state, PyObject *value)
{
    PyObject *bytes = line_argument(state, "setreply", "msg", value);
    const char *rule = NULL;

    if (bytes == NULL) {
        return NULL;
    }
    if (PyBytes_GET_SIZE(bytes) > MAX_REPLY_LINE) {
        rule = "a line must not be longer than 980 bytes";
    }
    else if (has_lone_percent(PyBytes_AS_STRING(bytes))) {
        rule = "'%' must be doubled";
    }
    if (rule != NULL) {
        refuse(state, "setreply", "msg", rule, value);
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* Check the two codes; each comes back as bytes, owned.  None passes for the second. */
static bool
reply_codes(module_state *state, PyObject **code, PyObject **enhanced)
{
    PyObject *code_value = *code, *enhanced_value = *enhanced;

    *enhanced = NULL;
    *code = text_argument(state, "setreply", "rcode", code_value);
    if (*code == NULL) {
        return false;
    }
    if (!is_reply_code(PyBytes_AS_STRING(*code))) {
        refuse(state, "setreply", "rcode", "must be three digits, the first 4 or 5", code_value);
        return false;
    }
    if (enhanced_value == Py_None) {
        return true;
    }
    *enhanced = text_argument(state, "setreply", "xcode", enhanced_value);
    if (*enhanced == NULL) {
        return false;
    }
    if (!is_enhanced_code(PyBytes_AS_STRING(*enhanced))) {
        refuse(state, "setreply", "xcode", "must have the form of '5.7.1'", enhanced_value);
        return false;
    }
    if (PyBytes_AS_STRING(*enhanced)[0] != PyBytes_AS_STRING(*code)[0] &&
        PyErr_WarnFormat(PyExc_RuntimeWarning, 1,
                         "setreply: the class of the enhanced code %s is not that of %s",
                         PyBytes_AS_STRING(*enhanced), PyBytes_AS_STRING(*code)) < 0) {
        return false;
    }
    return true;
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
    static char *names[] = {"rcode", "xcode", "msg", NULL};
    PyObject *code = NULL, *enhanced = Py_None, *msg = Py_None, *head;
    PyObject *lines[MAX_REPLY_LINES] = {NULL};
    Reply reply = {0};
    Py_ssize_t given = PyTuple_GET_SIZE(args);
    size_t size = 1;
    bool done = false;

    head = PyTuple_GetSlice(args, 0, 3);
    if (head == NULL || !PyArg_ParseTupleAndKeywords(head, keywords, "O|OO:setreply", names, &code,
                                                     &enhanced, &msg)) {
        Py_XDECREF(head);
        return NULL;
    }
    if (given - 2 > MAX_REPLY_LINES) {
        PyErr_Format(self->state->invalid_argument,
                     "setreply: msg: a reply has at most 32 lines: %zd were given", given - 2);
        code = enhanced = NULL;
        goto exit;
    }
    if (!reply_codes(self->state, &code, &enhanced)) {
        goto exit;
    }
    for (Py_ssize_t i = 0; i == 0 || i + 2 < given; i++) {
        PyObject *value = i == 0 ? msg : PyTuple_GET_ITEM(args, i + 2);
        if (value == Py_None) {
            continue;
        }
        lines[reply.count] = reply_line_argument(self->state, value);
        if (lines[reply.count] == NULL) {
            goto exit;
        }
        reply.lines[reply.count] = PyBytes_AS_STRING(lines[reply.count]);
        reply.count++;
        size += strlen("550-5.7.100 \r\n") + (size_t)PyBytes_GET_SIZE(lines[reply.count - 1]);
    }
    reply.code = PyBytes_AS_STRING(code);
    reply.enhanced = string_of(enhanced);
    done = fits_packet(self, &action_setreply, size) && perform(self, &action_setreply, &reply);
    if (done) {
        self->reply_class = reply.code[0];
    }
exit:
    for (int i = 0; i < MAX_REPLY_LINES; i++) {
        Py_XDECREF(lines[i]);
    }
    Py_XDECREF(code);
    Py_XDECREF(enhanced);
    Py_DECREF(head);
    return done ? Py_NewRef(Py_None) : NULL;
}

PyDoc_STRVAR(
    setsymlist_doc,
    "setsymlist($self, /, stage, macros)\n--\n\n"
    "Ask the MTA to send only these macros at a stage; only in the negotiate callback.\n\n"
    "stage: M_CONNECT ... M_EOH.  macros: names separated by spaces, str or bytes.  Lists\n"
    "for one stage are merged.  sendmail takes at most five.\n\n"
    "Raises error where the MTA did not offer SETSYMLIST.  libmilter: smfi_setsymlist.");

static PyObject *
context_setsymlist(PyObject *op, PyObject *args, PyObject *keywords)
{
    ContextObject *self = (ContextObject *)op;
    static char *names[] = {"stage", "macros", NULL};
    PyObject *stage, *macros;
    SymbolList wanted = {.context = self};
    long number;
    bool done;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!O:setsymlist", names, &PyLong_Type, &stage,
                                     &macros)) {
        return NULL;
    }
    number = PyLong_AsLong(stage);
    if (number < SMFIM_FIRST || number > SMFIM_LAST) {
        PyErr_Clear();
        refuse(self->state, "setsymlist", "stage", "must be one of M_CONNECT to M_EOH", stage);
        return NULL;
    }
    macros = line_argument(self->state, "setsymlist", "macros", macros);
    if (macros == NULL) {
        return NULL;
    }
    wanted.stage = (int)number;
    wanted.names = PyBytes_AS_STRING(macros);
    done = perform(self, &action_setsymlist, &wanted);
    if (wanted.not_offered) {
        PyErr_SetString(self->state->error, "smfi_setsymlist: the MTA did not offer SETSYMLIST");
    }
    else if (wanted.no_memory) {
        PyErr_NoMemory();
    }
    Py_DECREF(macros);
    return done ? Py_NewRef(Py_None) : NULL;
}

static PyObject *
bad_context(ContextObject *self)
{
    PyErr_SetString(self->state->error, "bad context");
    return NULL;
}

PyDoc_STRVAR(setpriv_doc,
             "setpriv($self, priv, /)\n--\n\n"
             "Keep an object for this connection; returns the one that it replaces, or None.");

static PyObject *
context_setpriv(PyObject *op, PyObject *priv)
{
    ContextObject *self = (ContextObject *)op;
    PyObject *old = NULL;
    bool open;

    LOCK_STATE();
    open = self->handle != NULL; /* close clears this first: nothing is put into a closed one */
    if (open) {
        old = self->priv;
        self->priv = Py_NewRef(priv);
    }
    UNLOCK_STATE();
    if (!open) {
        return bad_context(self);
    }
    return old != NULL ? old : Py_NewRef(Py_None);
}

PyDoc_STRVAR(getpriv_doc, "getpriv($self, /)\n--\n\n"
                          "The object that setpriv() kept for this connection, or None.");

static PyObject *
context_getpriv(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    ContextObject *self = (ContextObject *)op;
    PyObject *priv;

    if (self->handle == NULL) {
        return bad_context(self);
    }
    LOCK_STATE();
    priv = Py_NewRef(self->priv != NULL ? self->priv : Py_None);
    UNLOCK_STATE();
    return priv;
}

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

#define KEYWORD_METHOD(name)                                                                       \
    {                                                                                              \
#name, (PyCFunction)(void (*)(void))context_##name, METH_VARARGS | METH_KEYWORDS,          \
            name##_doc                                                                             \
    }

static PyMethodDef context_methods[] = {
    KEYWORD_METHOD(addheader),
    KEYWORD_METHOD(addrcpt),
    KEYWORD_METHOD(chgfrom),
    KEYWORD_METHOD(chgheader),
    KEYWORD_METHOD(delrcpt),
    KEYWORD_METHOD(getsymval),
    KEYWORD_METHOD(quarantine),
    KEYWORD_METHOD(replacebody),
    KEYWORD_METHOD(setreply),
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
