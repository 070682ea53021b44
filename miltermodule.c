/* The extension module `milter`: mail filters in Python on sendmail's libmilter.
 *
 * libmilter talks to the MTA (Postfix or sendmail) and calls one C function for each
 * step of the SMTP dialogue.  This file turns each such call into a call of a Python
 * object, and the methods of the context object into calls of libmilter.
 *
 *     wire -> libmilter's thread -> begin() -> callback -> finish() -> libmilter -> wire
 *
 * Read it top to bottom: the threads, the verdicts, the way in and out, the trampolines,
 * the module's functions and definition.  Beside it, in src/: milter.h (what all share),
 * turnstile.c (one after the other to the interpreter lock), pool.c (libmilter's workers),
 * values.c (text, addresses, checks of arguments), context.c (the context object),
 * decoder.c (callbacks that get bytes), listener.c (the listening socket), signals.c (who
 * gets which signal), lifecycle.c (main() and stopping), workers.c (several processes on one
 * socket), metrics.c (counters), constants.c.
 *
 * The authority for every smfi_ call is libmilter's manual (package sendmail-doc) and
 * <libmilter/mfapi.h>.
 */

#include "milter.h"

const StageInfo stages[STAGES] = {
    [CONNECT] = {"connect", NAMES, SMFIP_NOCONNECT, SMFIP_NR_CONN, false},
    [HELO] = {"helo", HELLO_NAME, SMFIP_NOHELO, SMFIP_NR_HELO, false},
    [ENVFROM] = {"envfrom", ENVFROM_BYTES, SMFIP_NOMAIL, SMFIP_NR_MAIL, true},
    [ENVRCPT] = {"envrcpt", ENVRCPT_BYTES, SMFIP_NORCPT, SMFIP_NR_RCPT, true},
    [DATA] = {"data", DATA_NAME, SMFIP_NODATA, SMFIP_NR_DATA, true},
    [HEADER] = {"header", HEADER_BYTES, SMFIP_NOHDRS, SMFIP_NR_HDR, true},
    [EOH] = {"eoh", EOH_NAME, SMFIP_NOEOH, SMFIP_NR_EOH, true},
    [BODY] = {"body", BODY_NAME, SMFIP_NOBODY, SMFIP_NR_BODY, true},
    [EOM] = {"eom", EOM_NAME, 0, 0, true},
    [ABORT] = {"abort", ABORT_NAME, 0, 0, false},
    [CLOSE] = {"close", NAMES, 0, 0, false},
    [UNKNOWN] = {"unknown", UNKNOWN_NAME, SMFIP_NOUNKNOWN, SMFIP_NR_UNKN, false},
    [NEGOTIATE] = {"negotiate", NAMES, 0, 0, false},
};

static const char *const names[NAMES] = {
    [ABORT_NAME] = "abort",
    [BODY_NAME] = "body",
    [DATA_NAME] = "data",
    [ENVFROM_NAME] = "envfrom",
    [ENVFROM_BYTES] = "envfrom_bytes",
    [ENVFROM_ERRORS] = "_envfrom_errors",
    [ENVRCPT_NAME] = "envrcpt",
    [ENVRCPT_BYTES] = "envrcpt_bytes",
    [ENVRCPT_ERRORS] = "_envrcpt_errors",
    [EOH_NAME] = "eoh",
    [EOM_NAME] = "eom",
    [ERRORS_OF] = "_errors_of",
    [HEADER_NAME] = "header",
    [HEADER_BYTES] = "header_bytes",
    [HEADER_ERRORS] = "_header_errors",
    [HELLO_NAME] = "hello",
    [UNKNOWN_NAME] = "unknown",
};

Filter filter = {
    .listener = -1,
    .pipe = {-1, -1},
    .startup = PTHREAD_MUTEX_INITIALIZER,
    .drain_ms = DRAIN_SECONDS * 1000,
    .max_data = MILTER_MAX_DATA_SIZE,
};

/* ----------------------------------------------------- bridge: the threads */

/* libmilter runs the callbacks of one connection on whichever thread of its pool is free,
 * while a Python thread state belongs to one OS thread for life.  So each thread gets a state
 * at its first callback, keeps it, and gives it back when it ends. */
static _Thread_local PyThreadState *thread_state;
static _Thread_local bool is_worker; /* has run a callback other than close */

/* At thread exit PyThreadState_Clear() needs CPython's own thread-specific values.  These are
 * gone when the destructors of pthread keys run, but not yet when those of C++ thread_local
 * objects do; where the C library has the hook for these (glibc, FreeBSD) it is the place. */
#if !defined(THREAD_EXIT_HOOK) && (defined(__GLIBC__) || defined(__FreeBSD__))
#define THREAD_EXIT_HOOK 1
#elif !defined(THREAD_EXIT_HOOK)
#define THREAD_EXIT_HOOK 0
#endif
#if THREAD_EXIT_HOOK
extern int __cxa_thread_atexit_impl(void (*)(void *), void *, void *) __attribute__((weak));
extern void *__dso_handle __attribute__((visibility("hidden")));
#endif

static pthread_key_t thread_key;

/* The gate: false once the interpreter is going away, true with a seat inside otherwise.
 * CPython ends (3.13 and before) or parks threads that ask for its lock at that time, in the
 * middle of libmilter's code and with libmilter's locks held. */
static bool
pass_gate(void)
{
    atomic_fetch_add(&filter.inside, 1);
    if (!atomic_load(&filter.gate_closed)) {
        return true;
    }
    atomic_fetch_sub(&filter.inside, 1);
    return false;
}

static void
leave_gate(void)
{
    if (atomic_fetch_sub(&filter.inside, 1) == 1 &&
        (atomic_load(&filter.draining) || atomic_load(&filter.gate_closed))) {
        wake_main();
    }
}

static void
give_back_thread_state(void *state)
{
    if (is_worker) {
        atomic_fetch_sub(&filter.workers, 1);
    }
    if (!pass_gate()) {
        return; /* the interpreter frees what is left of its threads */
    }
    PyEval_RestoreThread(state);
    if (PyGILState_Check()) {
        PyThreadState_Clear(state);
        PyThreadState_DeleteCurrent();
    }
    else {
        /* No hook on this platform: clearing now would trip the checks of debug allocators.
         * Keep the state; threads that end with their connection have none any more. */
        PyEval_SaveThread();
    }
    thread_state = NULL;
    leave_gate();
}

/* Before the first callback. */
bool
prepare_threads(void)
{
    return pthread_key_create(&thread_key, give_back_thread_state) == 0;
}

/* Where a platform has no hook, a state can only be given back while the thread lives.  There a
 * libmilter without a pool, of which each connection has a thread, would leak one with each. */
static void
give_up_thread(void)
{
#if !THREAD_EXIT_HOOK
    PyThreadState *state = thread_state;

    thread_state = NULL;
    pthread_setspecific(thread_key, NULL);
    if (is_worker) {
        is_worker = false;
        atomic_fetch_sub(&filter.workers, 1);
    }
    PyThreadState_Clear(state);
    PyThreadState_DeleteCurrent();
    leave_turnstile();
    leave_gate();
#endif
}

static bool
adopt_thread(void)
{
    void *probe = malloc(PROBE_SIZE);

    /* Where memory is short now, CPython 3.11 crashes in PyThreadState_New(), and glibc ends the
     * process when it registers what is to be called at the thread's end. */
    if (probe == NULL) {
        return false;
    }
    free(probe);
    pthread_mutex_lock(&filter.startup);
    pthread_mutex_unlock(&filter.startup);
    thread_state = PyThreadState_New(filter.interpreter);
    if (thread_state == NULL) {
        return false;
    }
    /* libmilter blocks HUP, INT and TERM in its threads.  A process that a callback starts
     * would inherit that, and ignore a polite end for ever. */
    pthread_sigmask(SIG_SETMASK, &filter.mask, NULL);
#if THREAD_EXIT_HOOK
    if (__cxa_thread_atexit_impl != NULL &&
        __cxa_thread_atexit_impl(give_back_thread_state, thread_state, &__dso_handle) == 0) {
        return true;
    }
#endif
    pthread_setspecific(thread_key, thread_state);
    return true;
}

static bool
enter_python(enum stage stage)
{
    if (!pass_gate()) {
        return false;
    }
    if (thread_state == NULL && !adopt_thread()) {
        leave_gate();
        return false;
    }
    /* The thread that looks after libmilter's pool calls close for connections that idled too
     * long, and nothing else. */
    if (stage != CLOSE && !is_worker) {
        is_worker = true;
        atomic_fetch_add(&filter.workers, 1);
    }
    watch_pool();
    enter_turnstile();
    PyEval_RestoreThread(thread_state);
    return true;
}

static void
leave_python(void)
{
    PyEval_SaveThread();
    leave_turnstile();
    leave_gate();
}

/* Wait for a context's lock without the interpreter lock: its holder may be writing to the MTA. */
void
lock_context(ContextObject *context)
{
    if (pthread_mutex_trylock(&context->lock) != 0) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&context->lock);
        Py_END_ALLOW_THREADS
    }
}

/* ---------------------------------------------------- bridge: the verdicts */

/* One call from libmilter on its way through Python. */
typedef struct {
    SMFICTX *handle;
    enum stage stage;
    bool attached;          /* this thread holds the interpreter lock */
    bool failed;            /* an exception is set */
    bool direct;            /* call the filter object's method: see milter__call_objects() */
    ContextObject *context; /* owned, or NULL */
    PyObject *callback;     /* owned; NULL where nothing is to be called */
    PyObject **args;        /* owned references; [0] is room for vectorcall */
    size_t count;
    PyObject *stack_args[STACK_ARGS];
    sfsistat verdict;
    unsigned began;   /* for judge() */
    uint64_t entered; /* for count_callback(), or 0 */
} Call;

static bool
without_reply(const Call *call)
{
    return call->context != NULL && (call->context->protocol & stages[call->stage].no_reply) != 0;
}

/* Does this verdict, given at this stage, end the message for this filter? */
static bool
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

static void
set_reply(Call *call, const char *code, const char *enhanced, const char *text)
{
    int result;

    if (call->context == NULL ||
        strlen(code) + strlen(enhanced) + strlen(text) + 5 > filter.max_data) {
        return;
    }
    /* libmilter's prototype is not const; it copies.  A failure leaves the default reply. */
    lock_context(call->context);
    result = smfi_setreply(call->handle, (char *)code, (char *)enhanced, (char *)text);
    pthread_mutex_unlock(&call->context->lock);
    if (result == MI_SUCCESS) {
        call->context->reply_class = 0; /* it goes out with this very verdict */
    }
}

/* The filter's name, fit for a reply: cut short at a character, % doubled as replies need it. */
static void
name_for_reply(const module_state *state, char *out)
{
    const char *name, *end = out + 4 * NAME_IN_REPLY; /* that the NUL still has room at */
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

/* Answer with a verdict of our own.  Where the MTA does not wait for an answer none may go
 * out, or it would be taken for the answer to the next step: see owe(). */
static sfsistat
answer(Call *call, sfsistat verdict, const char *soft, const char *hard, const char *what)
{
    char name[4 * NAME_IN_REPLY + 1];
    char text[sizeof name + 80];

    if (without_reply(call)) {
        return SMFIS_NOREPLY;
    }
    name_for_reply(call->context != NULL ? call->context->state : filter.state, name);
    snprintf(text, sizeof text, "pymilter: %s %s", what, name);
    if (verdict == SMFIS_TEMPFAIL) {
        set_reply(call, "451", soft, text);
    }
    else if (verdict == SMFIS_REJECT) {
        set_reply(call, "554", hard, text);
    }
    return verdict;
}

static sfsistat
answer_exception(Call *call, sfsistat verdict)
{
    return answer(call, verdict, "4.3.0", "5.3.0", "untrapped exception in");
}

/* Remember the verdict for an exception in a step without reply; pay() gives it at the next
 * step that has one.  What goes wrong in connect or HELO holds for the whole connection. */
static void
owe(Call *call, sfsistat verdict)
{
    if (verdict == SMFIS_CONTINUE || call->context == NULL) {
        return;
    }
    if (call->stage == CONNECT || call->stage == HELO) {
        call->context->debt = OWED_FOR_CONNECTION;
    }
    else if (stages[call->stage].in_message) {
        call->context->debt = OWED_FOR_MESSAGE;
    }
    else {
        return; /* an unknown command, which is no part of a message */
    }
    call->context->owed = verdict;
}

static bool
pay(Call *call)
{
    if (call->context->debt == NOTHING_OWED ||
        !(stages[call->stage].in_message || call->stage == HELO)) {
        return false;
    }
    call->verdict = answer_exception(call, call->context->owed);
    return true;
}

/* Ask main() to stop the filter and to raise the exception that is set now. */
void
stop_with_exception(module_state *state)
{
    PyObject *exception = take_exception();

    if (PyErr_GivenExceptionMatches(exception, PyExc_SystemExit)) {
        ask_all_to_stop();
    }
    LOCK_STATE();
    if (state->raised == NULL) {
        state->raised = exception;
        exception = NULL;
    }
    UNLOCK_STATE();
    Py_XDECREF(exception); /* the first counts */
    atomic_store(&filter.stop_wanted, true);
    wake_main();
}

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

/* How many bytes of UTF-8 at `s` are something that could begin a line or steer a terminal. */
static size_t
size_of_control(const unsigned char *s)
{
    if (s[0] < ' ' || s[0] == 0x7F) {
        return 1;
    }
    if (s[0] == 0xC2 && s[1] >= 0x80 && s[1] < 0xA0) {
        return 2; /* C1 */
    }
    return s[0] == 0xE2 && s[1] == 0x80 && (s[2] == 0xA8 || s[2] == 0xA9) ? 3 : 0; /* separators */
}

/* Text of the MTA for one line of a log: short, with nothing that could begin another, and fit
 * for every encoding that knows UTF-8. */
static PyObject *
text_for_log(const char *text)
{
    const unsigned char *s = (const unsigned char *)text;
    char line[200];
    size_t size = 0;

    while (*s != '\0' && size < sizeof line) {
        size_t control = size_of_control(s);
        line[size++] = control > 0 ? '?' : (char)*s;
        s += Py_MAX(control, 1);
    }
    return PyUnicode_DecodeUTF8(line, (Py_ssize_t)size, "backslashreplace");
}

/* Remember who the client is, for reports, where the MTA sends no macro that tells it. */
static void
keep_client(Call *call, const char *hostname, const _SOCK_ADDR *address)
{
    char where[INET6_ADDRSTRLEN] = "", line[NI_MAXHOST + sizeof where + 4];

    if (smfi_getsymval(call->handle, "_") != NULL ||
        smfi_getsymval(call->handle, "{client_addr}") != NULL) {
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
    free(call->context->client);
    call->context->client = strdup(line); /* NULL is no matter */
}

static PyObject *
client_for_log(const Call *call)
{
    const char *both = smfi_getsymval(call->handle, "_");
    const char *name = smfi_getsymval(call->handle, "{client_name}");
    const char *address = smfi_getsymval(call->handle, "{client_addr}");
    char line[NI_MAXHOST + INET6_ADDRSTRLEN + 4];

    if (both == NULL && address != NULL) {
        snprintf(line, sizeof line, "%s [%s]", name != NULL ? name : "unknown", address);
        both = line;
    }
    if (both == NULL && call->context != NULL) {
        both = call->context->client;
    }
    return text_for_log(both != NULL ? both : "unknown");
}

/* Report the exception that is set now: once, with its traceback, the stage and the queue id. */
static void
report_exception(Call *call)
{
    PyObject *hook, *exception, *message, *done, *traceback, *id, *client;
    const char *queue_id = smfi_getsymval(call->handle, "i");

    exception = take_exception();
    id = text_for_log(queue_id != NULL ? queue_id : "unknown");
    client = id == NULL ? NULL : client_for_log(call);
    message = client == NULL
                  ? NULL
                  : PyUnicode_FromFormat("exception in the %s callback, queue id %U, client %U",
                                         stages[call->stage].name, id, client);
    Py_XDECREF(client);
    Py_XDECREF(id);
    if (message == NULL) {
        PyErr_WriteUnraisable(NULL); /* out of memory: without the facts then */
        message = PyUnicode_FromString("exception in a callback");
    }
    hook = message == NULL ? NULL : own_excepthook();
    if (hook == NULL) {
        log_record("error", message, exception);
        Py_DECREF(exception);
        return;
    }
#if PY_VERSION_HEX >= 0x030B0000
    done = PyObject_CallMethod(exception, "add_note", "O", message);
    if (done == NULL) {
        PyErr_Clear(); /* the note is a courtesy; the report matters */
    }
    Py_XDECREF(done);
#else
    if (message != NULL) {
        log_record("error", Py_NewRef(message), NULL); /* the hook sees no notes before 3.11 */
    }
#endif
    traceback = PyException_GetTraceback(exception);
    done = PyObject_CallFunctionObjArgs(hook, (PyObject *)Py_TYPE(exception), exception,
                                        traceback != NULL ? traceback : Py_None, NULL);
    if (done == NULL) {
        PyErr_WriteUnraisable(hook);
    }
    Py_XDECREF(done);
    Py_XDECREF(traceback);
    Py_XDECREF(message);
    Py_DECREF(hook);
    Py_DECREF(exception);
}

/* An exception is set, or a result was no verdict: report it and take the policy's verdict. */
static void
take_policy(Call *call)
{
    module_state *state = call->context != NULL ? call->context->state : filter.state;

    count_exception(call->stage);
    if (PyErr_ExceptionMatches(PyExc_SystemExit) ||
        PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        stop_with_exception(state);
    }
    else {
        report_exception(call);
    }
    if (call->stage == NEGOTIATE) {
        call->verdict = SMFIS_REJECT; /* the MTA goes on without the filter */
    }
    else if (call->stage == ABORT || call->stage == CLOSE) {
        call->verdict = SMFIS_CONTINUE; /* nobody waits for it */
    }
    else {
        call->verdict = answer_exception(call, state->policy);
        if (without_reply(call)) {
            owe(call, state->policy);
        }
    }
}

/* Why `verdict` may not be returned at this stage, or NULL where it may. */
static const char *
why_no_verdict(const Call *call, long verdict)
{
    bool silent = without_reply(call);

    switch (verdict) {
    case SMFIS_CONTINUE:
        return NULL;
    case SMFIS_NOREPLY:
        return silent ? NULL : "NOREPLY was not negotiated for this callback";
    case SMFIS_SKIP:
        if ((call->context->protocol & SMFIP_SKIP) == 0) {
            return "SKIP was not negotiated";
        }
        if (call->stage != ENVRCPT && call->stage != HEADER && call->stage != BODY &&
            call->stage != UNKNOWN) {
            return "SKIP is only for steps that repeat";
        }
        break;
    case SMFIS_DISCARD:
        if (call->stage == CONNECT || call->stage == HELO) {
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

/* libmilter drops a reply whose class does not fit the verdict without a word. */
static void
check_reply_class(Call *call)
{
    char wanted = call->verdict == SMFIS_TEMPFAIL ? '4' : call->verdict == SMFIS_REJECT ? '5' : 0;
    char have = call->context->reply_class;

    if (wanted == 0 || have == 0) {
        return;
    }
    if (wanted == have) {
        call->context->reply_class = 0; /* libmilter sends and forgets it */
        return;
    }
    log_record("warning",
               PyUnicode_FromFormat("the %s callback returned %s after setreply with a %cxx code: "
                                    "libmilter drops that reply, the verdict stands",
                                    stages[call->stage].name, wanted == '4' ? "TEMPFAIL" : "REJECT",
                                    have),
               NULL);
}

/* Turn the result of a callback into the verdict.  False with an exception set where it is none. */
static bool
take_verdict(Call *call, PyObject *result)
{
    const char *why;
    long verdict = -1;

    if (call->stage == ABORT || call->stage == CLOSE) {
        return true;
    }
    if (!PyLong_Check(result)) {
        why = "not an int";
    }
    else {
        verdict = PyLong_AsLong(result);
        if (verdict == -1) {
            PyErr_Clear(); /* too large, or -1: no verdict either way */
        }
        why = why_no_verdict(call, verdict);
    }
    if (why != NULL) {
        PyErr_Format(call->context->state->error, "the %s callback returned %R: %s",
                     stages[call->stage].name, result, why);
        return false;
    }
    if (call->stage == UNKNOWN && verdict == SMFIS_ACCEPT && !call->context->in_message) {
        verdict = SMFIS_CONTINUE; /* Postfix's smtpd panics, and there is nothing to accept */
    }
    call->verdict = without_reply(call) ? SMFIS_NOREPLY : (sfsistat)verdict;
    check_reply_class(call);
    return true;
}

/* ---------------------------------------------- bridge: one way in, one out */

/* The context object of a connection; libmilter's private pointer owns a reference to it.
 * NULL with an exception set where it cannot be made, without one where none is due. */
static ContextObject *
find_context(Call *call)
{
    ContextObject *context = smfi_getpriv(call->handle);

    if (context == NULL && call->stage != ABORT && call->stage != CLOSE) {
        context = new_context(filter.state, call->handle, call->stage);
        if (context != NULL) {
            smfi_setpriv(call->handle, context);
            atomic_fetch_add(&filter.created, 1);
            count_connection(1);
            count_new_connection();
        }
    }
    return (ContextObject *)Py_XNewRef(context);
}

void
end_message(ContextObject *context)
{
    context->debt = context->debt == OWED_FOR_MESSAGE ? NOTHING_OWED : context->debt;
    if (context->in_message) {
        context->in_message = false;
        if (atomic_fetch_sub(&filter.messages, 1) == 1 && atomic_load(&filter.draining)) {
            wake_main();
        }
    }
}

/* Keep track of the message.  False where it must not begin, since the filter drains. */
static bool
track_message(Call *call)
{
    ContextObject *context = call->context;

    if (call->stage == ENVFROM) {
        end_message(context); /* sendmail may send no ABORT after an early verdict */
    }
    if (!stages[call->stage].in_message || context->in_message) {
        return true;
    }
    if (context->debt != NOTHING_OWED) {
        return true; /* answered by pay() before the application sees it */
    }
    /* Counted before the look at the flag, as main() looks at the count after setting it. */
    atomic_fetch_add(&filter.messages, 1);
    context->in_message = true;
    count_new_message();
    if (!atomic_load(&filter.draining)) {
        return true;
    }
    end_message(context);
    call->verdict = answer(call, SMFIS_TEMPFAIL, "4.3.2", "5.3.2", "stopping, try again later:");
    return false;
}

static void
set_stage(ContextObject *context, int stage)
{
    lock_context(context);
    context->stage = stage;
    pthread_mutex_unlock(&context->lock);
}

/* What is to be called, and its first argument. */
static void
find_callback(Call *call)
{
    ContextObject *context = call->context;
    module_state *state = context->state;
    PyObject *first = (PyObject *)context;

    LOCK_STATE();
    call->callback = Py_XNewRef(state->callbacks[call->stage]);
    call->direct = call->callback != NULL && call->callback == state->shortcuts[call->stage] &&
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

/* The way in: attach this thread and find out what is to be called.  True where the callback's
 * arguments are wanted; in any case finish() comes next. */
static bool
begin(Call *call, SMFICTX *handle, enum stage stage)
{
    *call = (Call){.handle = handle, .stage = stage, .verdict = SMFIS_CONTINUE};
    call->args = call->stack_args;
    call->attached = enter_python(stage);
    if (!call->attached) {
        /* Not without the filter's word: the MTA keeps or refuses the message for now.  The
         * context is C memory that outlives the interpreter, so it may still be looked at. */
        call->context = smfi_getpriv(handle);
        call->verdict = stage == NEGOTIATE         ? SMFIS_REJECT
                        : without_reply(call)      ? SMFIS_NOREPLY
                        : stages[stage].in_message ? SMFIS_TEMPFAIL
                                                   : SMFIS_CONTINUE;
        call->context = NULL;
        return false;
    }
    call->began = pass_turnstile(stage);
    call->entered = is_counting() ? count_clock() : 0;
    call->context = find_context(call);
    if (call->context == NULL) {
        if (PyErr_Occurred()) {
            take_policy(call);
        }
        return false;
    }
    set_stage(call->context, stage);
    if (!track_message(call) || pay(call)) {
        return false;
    }
    if (stage == ABORT && !call->context->in_message) {
        return false; /* one abort for a message, and none after its verdict */
    }
    find_callback(call);
    if (call->callback == NULL) {
        call->verdict = without_reply(call) ? SMFIS_NOREPLY : SMFIS_CONTINUE;
        return false;
    }
    return true;
}

/* Add an argument for the callback; takes over the reference.  NULL means an exception is set. */
static void
add_argument(Call *call, PyObject *argument)
{
    if (argument == NULL) {
        call->failed = true;
    }
    else {
        call->args[++call->count] = argument;
    }
}

/* Make an argument, unless one before could not be made: nothing is to run with an exception set.
 */
#define ADD_ARGUMENT(call, expression)                                                             \
    do {                                                                                           \
        if (!(call)->failed) {                                                                     \
            add_argument(call, expression);                                                        \
        }                                                                                          \
    } while (0)

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

/* The callback forked and this is the child: libmilter's threads, and the right to answer the
 * MTA, are the parent's.  End as a script does when it runs out, but for the interpreter's own
 * end: CPython 3.13 crashes in it where another thread than the main one forked. */
static void
end_forked_child(PyObject *result)
{
    static const char *const streams[] = {"stdout", "stderr"};
    PyObject *module;
    int status;

    if (!atomic_load(&filter.forked)) {
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

static PyObject *
call_back(Call *call)
{
    PyObject *result = NULL;
    size_t count = call->count | PY_VECTORCALL_ARGUMENTS_OFFSET;

    if (!call->failed && call->direct) {
        PyObject *method = call->context->state->names[stages[call->stage].method];
        result = PyObject_VectorcallMethod(method, call->args + 1, count, NULL);
    }
    else if (!call->failed) {
        result = PyObject_Vectorcall(call->callback, call->args + 1, count, NULL);
    }
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

/* Leave: record what the verdict means for the message, and give everything back. */
static sfsistat
detach(Call *call)
{
    sfsistat verdict = call->verdict;
    ContextObject *context = call->context;

    if (!call->attached) {
        return verdict;
    }
    end_forked_child(Py_None); /* forked by an exception hook, or by what an object's end runs */
    if (context != NULL) {
        if (call->stage == ABORT || (stages[call->stage].in_message && verdict != SMFIS_NOREPLY &&
                                     ends_message(call->stage, verdict))) {
            end_message(context);
        }
        if (context->handle != NULL) {
            set_stage(context, OUTSIDE);
        }
        Py_DECREF(context);
        if (call->entered != 0) {
            count_callback(call->stage, verdict, call->entered);
        }
    }
    judge(call->stage, call->began);
    if (call->stage == CLOSE && !THREAD_EXIT_HOOK) {
        give_up_thread();
    }
    else {
        leave_python();
    }
    return verdict;
}

/* The way out: call, validate, report, release. */
static sfsistat
finish(Call *call)
{
    if (call->callback != NULL) {
        PyObject *result = call_back(call);
        if (result == NULL || !take_verdict(call, result)) {
            take_policy(call);
        }
        Py_XDECREF(result);
    }
    return detach(call);
}

/* ------------------------------------------------------------ trampolines */

static sfsistat
on_connect(SMFICTX *handle, char *hostname, _SOCK_ADDR *address)
{
    Call call;

    if (begin(&call, handle, CONNECT)) {
        keep_client(&call, hostname, address);
        ADD_ARGUMENT(&call, text_from(hostname, strlen(hostname)));
        ADD_ARGUMENT(&call, PyLong_FromLong(address != NULL ? address->sa_family : 0));
        ADD_ARGUMENT(&call, client_address(address));
    }
    return finish(&call);
}

static sfsistat
on_helo(SMFICTX *handle, char *hostname)
{
    Call call;

    if (begin(&call, handle, HELO)) {
        ADD_ARGUMENT(&call, text_from(hostname, strlen(hostname)));
    }
    return finish(&call);
}

/* MAIL and RCPT: the address and each ESMTP parameter, as bytes. */
static sfsistat
on_envelope(SMFICTX *handle, enum stage stage, char **argv)
{
    Call call;

    if (begin(&call, handle, stage)) {
        size_t count = 0;
        while (argv[count] != NULL) {
            count++;
        }
        if (count + 2 > STACK_ARGS) {
            PyObject **args = PyMem_New(PyObject *, count + 2);
            if (args == NULL) {
                PyErr_NoMemory();
                call.failed = true;
                return finish(&call);
            }
            args[1] = call.args[1];
            call.args = args;
        }
        for (size_t i = 0; i < count; i++) {
            ADD_ARGUMENT(&call, PyBytes_FromString(argv[i]));
        }
    }
    return finish(&call);
}

static sfsistat
on_envfrom(SMFICTX *handle, char **argv)
{
    return on_envelope(handle, ENVFROM, argv);
}

static sfsistat
on_envrcpt(SMFICTX *handle, char **argv)
{
    return on_envelope(handle, ENVRCPT, argv);
}

static sfsistat
on_header(SMFICTX *handle, char *name, char *value)
{
    Call call;

    if (begin(&call, handle, HEADER)) {
        ADD_ARGUMENT(&call, text_from(name, strlen(name)));
        ADD_ARGUMENT(&call, PyBytes_FromString(value));
    }
    return finish(&call);
}

static sfsistat
on_body(SMFICTX *handle, unsigned char *chunk, size_t size)
{
    Call call;

    if (begin(&call, handle, BODY)) {
        ADD_ARGUMENT(&call, PyBytes_FromStringAndSize((const char *)chunk, (Py_ssize_t)size));
    }
    return finish(&call);
}

/* libmilter passes on an unknown command without looking for its NUL; a broken MTA might have
 * sent none.  The allocation that holds it is the bound. */
static size_t
bounded_length(const char *command)
{
#if defined(__linux__) || defined(__FreeBSD__) || defined(__APPLE__)
    return strnlen(command, malloc_usable_size((void *)command));
#else
    return strlen(command);
#endif
}

static sfsistat
on_unknown(SMFICTX *handle, const char *command)
{
    Call call;

    if (begin(&call, handle, UNKNOWN)) {
        ADD_ARGUMENT(&call, text_from(command, bounded_length(command)));
    }
    return finish(&call);
}

static sfsistat
on_bare(SMFICTX *handle, enum stage stage)
{
    Call call;

    begin(&call, handle, stage);
    return finish(&call);
}

static sfsistat
on_data(SMFICTX *handle)
{
    return on_bare(handle, DATA);
}

static sfsistat
on_eoh(SMFICTX *handle)
{
    return on_bare(handle, EOH);
}

static sfsistat
on_eom(SMFICTX *handle)
{
    return on_bare(handle, EOM);
}

static sfsistat
on_abort(SMFICTX *handle)
{
    return on_bare(handle, ABORT);
}

static sfsistat
on_close(SMFICTX *handle)
{
    Call call;

    if (smfi_getpriv(handle) == NULL) {
        return SMFIS_CONTINUE; /* nothing was ever said here, as when nudge() connects */
    }
    begin(&call, handle, CLOSE);
    if (call.callback != NULL) {
        PyObject *result = call_back(&call);
        if (result == NULL) {
            take_policy(&call);
        }
        Py_XDECREF(result);
    }
    if (call.context != NULL) {
        forget_connection(call.context);
    }
    else if (!call.attached) {
        lose_connection(smfi_getpriv(handle));
    }
    return detach(&call);
}

/* --- negotiation */

/* sendmail may end a session and begin another on the same connection (SMFIC_QUIT_NC), without
 * a new negotiation.  libmilter goes on with what was agreed, and its context has the same
 * address, under which it is kept here.  Two connections may come to share a place; then the
 * later one wins, and the other's next session merely does not know of its options: libmilter
 * itself keeps replies back where none was agreed. */
static struct {
    const SMFICTX *handle;
    unsigned long actions, protocol;
} agreements[256];

static size_t
place_of(const SMFICTX *handle)
{
    return ((uintptr_t)handle >> 4) % Py_ARRAY_LENGTH(agreements);
}

void
remember(const ContextObject *context)
{
    size_t place = place_of(context->handle);

    LOCK_STATE();
    agreements[place].handle = context->handle;
    agreements[place].actions = context->actions;
    agreements[place].protocol = context->protocol;
    UNLOCK_STATE();
}

void
recall(ContextObject *context, enum stage stage)
{
    size_t place = place_of(context->handle);

    LOCK_STATE();
    /* A session after QUIT_NC begins with CONNECT; what else comes first is a new connection at
     * an old address, or an MTA that does not care what it is told. */
    if (stage == CONNECT && agreements[place].handle == context->handle) {
        context->actions = agreements[place].actions;
        context->protocol = agreements[place].protocol;
        agreements[place].handle = NULL;
    }
    UNLOCK_STATE();
}

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

/* Hand libmilter the macro lists that setsymlist() collected: it takes one list for a stage.  In
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
        if (macros != NULL && smfi_setsymlist(context->handle, stage, macros) != MI_SUCCESS) {
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
    long verdict = -1;
    bool done = false;

    options = Py_BuildValue("[kkkk]", values[0], values[1], values[2], values[3]);
    add_argument(call, Py_XNewRef(options));
    result = call_back(call);
    if (result == NULL) {
        goto exit;
    }
    if (PyLong_Check(result)) {
        verdict = PyLong_AsLong(result);
    }
    if (verdict == SMFIS_CONTINUE) {
        done = read_options(options, values);
    }
    else if (verdict == SMFIS_ALL_OPTS) {
        values[1] = steps_to_leave_out(call->context->state) | SMFIP_SKIP;
        done = true;
    }
    else if (verdict == SMFIS_REJECT) {
        call->verdict = SMFIS_REJECT;
        done = true;
    }
    else {
        PyErr_Clear();
        PyErr_Format(call->context->state->error,
                     "the negotiate callback returned %R: not CONTINUE, ALL_OPTS or REJECT",
                     result);
    }
exit:
    Py_XDECREF(options);
    Py_XDECREF(result);
    return done;
}

static sfsistat
on_negotiate(SMFICTX *handle, unsigned long actions, unsigned long protocol, unsigned long f2,
             unsigned long f3, unsigned long *want_actions, unsigned long *want_protocol,
             unsigned long *want_f2, unsigned long *want_f3)
{
    Call call;
    unsigned long values[4] = {actions, protocol, f2, f3};
    bool asked = begin(&call, handle, NEGOTIATE);
    ContextObject *context = call.context;
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
        take_policy(&call);
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

/* ------------------------------------------------------ module functions */

static module_state *
state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

static PyObject *
out_of_order(PyObject *module, const char *call, const char *why)
{
    PyErr_Format(state_of(module)->error, "%s: %s", call, why);
    return NULL;
}

static bool
before_start(PyObject *module, const char *call)
{
    if (filter.phase == STARTING || filter.phase == RUNNING) {
        out_of_order(module, call, "not while main() runs");
        return false;
    }
    return true;
}

PyDoc_STRVAR(main_doc,
             "main($module, /)\n--\n\n"
             "Run the filter until stop(), SIGTERM, SIGINT or SIGHUP; then let messages in\n"
             "progress end (see set_drain_timeout) and return.\n\n"
             "A signal for which the application installed a handler runs that handler instead.\n"
             "On another thread than the main one, a signal with its default action takes that\n"
             "action after the filter has drained.\n\n"
             "Raises error for a call out of order or where libmilter fails, and whatever a\n"
             "signal handler, or sys.exit() in a callback, raised.  libmilter: smfi_main.");

/* Claim the phase STARTING for `call`, which `opens` the socket; the phase before, or -1 with an
 * exception set. */
static int
claim_start(PyObject *module, const char *call, bool opens)
{
    module_state *state = state_of(module);
    bool named, may_start;
    int before;

    LOCK_STATE();
    before = filter.phase;
    named = state->name != NULL;
    may_start =
        (before == SETTING_UP || (before == SOCKET_OPEN && !opens)) && named && filter.conn != NULL;
    if (may_start) {
        filter.phase = STARTING; /* before anything lets another thread run */
    }
    UNLOCK_STATE();
    if (may_start) {
        return before;
    }
    out_of_order(module, call,
                 opens && before != SETTING_UP ? "the socket is open already"
                 : before == STARTING || before == RUNNING
                     ? "it runs already; there is one filter to a process"
                 : before == STOPPED
                     ? "libmilter cannot start again in a process where it was stopped"
                 : named ? "call setconn() first"
                         : "call register() first");
    return -1;
}

/* What a callback or a handler raised to stop the filter is main()'s to raise. */
static bool
raise_what_stopped(module_state *state)
{
    PyObject *raised;

    LOCK_STATE();
    raised = state->raised;
    state->raised = NULL;
    UNLOCK_STATE();
    if (raised != NULL) {
        raise_exception(raised);
    }
    return raised != NULL;
}

static PyObject *
milter_main(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = state_of(module);
    LocalAddress local = {0};
    int before = claim_start(module, "main", false);

    if (before < 0) {
        return NULL;
    }
    filter.state = state; /* the module may have been loaded anew since */
    if (atomic_load(&filter.stop_wanted)) {
        filter.phase = STOPPED;
        stop_listening(&local);
        release_descriptors();
        Py_RETURN_NONE;
    }
    if (before != SOCKET_OPEN && open_socket(state, false) < 0) {
        filter.phase = before;
        return NULL;
    }
    if (open_pipe(state) < 0 || hook_interpreter(module, state) < 0) {
        filter.phase = SOCKET_OPEN;
        return NULL;
    }
    /* A signal that came meanwhile: nothing after this runs its handler by the way. */
    if (PyErr_CheckSignals() < 0) {
        filter.phase = STOPPED;
        stop_listening(&local);
        release_descriptors();
        return NULL;
    }
    warn_of_few_descriptors();
    filter.interpreter = PyThreadState_GetInterpreter(PyThreadState_Get());
    if (run_filter(state) < 0 || raise_what_stopped(state)) {
        return NULL;
    }
    if (!atomic_load(&filter.stop_wanted) && !atomic_load(&filter.forked) &&
        atomic_load(&filter.result) != MI_SUCCESS && !libmilter_took_signal()) {
        PyErr_SetString(state->error, "smfi_main failed; libmilter wrote the reason to syslog");
        return NULL;
    }
    if (PyErr_CheckSignals() < 0) {
        return NULL; /* a handler that take_put_off_action() called for */
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(stop_doc,
             "stop($module, /)\n--\n\n"
             "Ask main() to stop the filter; from any thread, callback or signal handler.\n\n"
             "Returns at once.  Before main() it makes main() return at once.");

static PyObject *
milter_stop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    atomic_store(&filter.stop_wanted, true);
    ask_all_to_stop();
    wake_main();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    register_doc,
    "register($module, /, name, unknown=..., data=..., negotiate=...)\n--\n\n"
    "Tell libmilter the name of the filter; before opensocket() and main().\n\n"
    "name: one line, str; it appears in replies and in the system's log.  unknown, data,\n"
    "negotiate: set these callbacks, or remove them by None; one left out stays as it is.\n\n"
    "Raises error while the filter runs.  libmilter: smfi_register.");

static bool
may_be_callback(enum stage stage, PyObject *value)
{
    if (value == NULL || value == Py_None || PyCallable_Check(value)) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "the %s callback must be callable or None, not %.100s",
                 stages[stage].name, Py_TYPE(value)->tp_name);
    return false;
}

/* Put a callable, or None, in the place of a callback; returns the old one, owned, or NULL. */
static PyObject *
exchange_callback(PyObject **place, PyObject *value)
{
    PyObject *old, *made = value == Py_None ? NULL : Py_XNewRef(value);

    LOCK_STATE();
    old = *place;
    *place = made;
    UNLOCK_STATE();
    return old;
}

static void
set_given_callback(module_state *state, enum stage stage, PyObject *value)
{
    if (value != NULL) {
        Py_XDECREF(exchange_callback(&state->callbacks[stage], value));
    }
}

/* All of libmilter's callbacks are always ours; which of Python's are set is found out at each
 * call, so that they can be changed at any time. */
static int
describe_filter(char *name)
{
    struct smfiDesc description = {
        .xxfi_name = name,
        .xxfi_version = SMFI_VERSION,
        .xxfi_flags = SMFI_CURR_ACTS,
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_envfrom,
        .xxfi_envrcpt = on_envrcpt,
        .xxfi_header = on_header,
        .xxfi_eoh = on_eoh,
        .xxfi_body = on_body,
        .xxfi_eom = on_eom,
        .xxfi_abort = on_abort,
        .xxfi_close = on_close,
        .xxfi_unknown = on_unknown,
        .xxfi_data = on_data,
        .xxfi_negotiate = on_negotiate,
    };

    return smfi_register(description);
}

static PyObject *
milter_register(PyObject *module, PyObject *args, PyObject *keywords)
{
    static char *arguments[] = {"name", "unknown", "data", "negotiate", NULL};
    module_state *state = state_of(module);
    PyObject *name, *unknown = NULL, *data = NULL, *negotiate = NULL;
    char *copy;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|OOO:register", arguments, &name, &unknown,
                                     &data, &negotiate) ||
        !before_start(module, "register")) {
        return NULL;
    }
    name = nonempty_line_argument(state, "register", "name", name);
    if (name == NULL) {
        return NULL;
    }
    copy = strdup(PyBytes_AS_STRING(name));
    Py_DECREF(name);
    if (copy == NULL) {
        return PyErr_NoMemory();
    }
    if (!may_be_callback(UNKNOWN, unknown) || !may_be_callback(DATA, data) ||
        !may_be_callback(NEGOTIATE, negotiate)) {
        free(copy);
        return NULL;
    }
    LOCK_STATE();
    if (filter.phase != STARTING && filter.phase != RUNNING) {
        char *old = state->name;
        state->name = describe_filter(copy) == MI_SUCCESS ? copy : NULL;
        copy = state->name == NULL ? copy : NULL;
        free(old);
    }
    UNLOCK_STATE();
    if (copy != NULL) {
        free(copy);
        return !before_start(module, "register")
                   ? NULL
                   : out_of_order(module, "smfi_register",
                                  "the header and the library of libmilter are of different "
                                  "versions");
    }
    /* Last, as releasing the old ones may run any Python. */
    set_given_callback(state, UNKNOWN, unknown);
    set_given_callback(state, DATA, data);
    set_given_callback(state, NEGOTIATE, negotiate);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    setconn_doc,
    "setconn($module, name, /)\n--\n\n"
    "Say where the filter listens: 'unix:PATH' (or 'local:PATH', a bare path),\n"
    "'inet:PORT@HOST', 'inet:PORT' (all interfaces), 'inet6:PORT@[ADDRESS]', or 'fd:NUMBER'\n"
    "(a listening socket that is open already, where libmilter knows it).\n\n"
    "Raises InvalidArgument for anything else, the order of Postfix (inet:HOST:PORT)\n"
    "included; error once the socket is open.  libmilter: smfi_setconn.");

static PyObject *
milter_setconn(PyObject *module, PyObject *value)
{
    module_state *state = state_of(module);
    PyObject *bytes;
    const char *why;
    char advice[300];
    char *copy;
    bool open, done = false;

    if (filter.phase != SETTING_UP) {
        return out_of_order(module, "setconn", "the socket is open already");
    }
    if (!PyUnicode_FSConverter(value, &bytes)) {
        if (PyErr_ExceptionMatches(PyExc_ValueError)) {
            bool unencodable = PyErr_ExceptionMatches(PyExc_UnicodeEncodeError);
            PyErr_Clear();
            refuse(state, "setconn", "name",
                   unencodable ? "cannot be encoded as a path" : "must not hold NUL", value);
        }
        return NULL;
    }
    why = why_bad_conn(PyBytes_AS_STRING(bytes), advice, sizeof advice);
    if (why != NULL) {
        refuse(state, "setconn", "name", why, value);
        Py_DECREF(bytes);
        return NULL;
    }
    copy = strdup(PyBytes_AS_STRING(bytes));
    Py_DECREF(bytes);
    if (copy == NULL) {
        return PyErr_NoMemory();
    }
    LOCK_STATE();
    open = filter.phase != SETTING_UP; /* by another thread, meanwhile */
    if (!open && smfi_setconn(copy) == MI_SUCCESS) {
        char *old = filter.conn;
        filter.conn = copy;
        copy = old;
        done = true;
    }
    UNLOCK_STATE();
    free(copy);
    if (open) {
        return out_of_order(module, "setconn", "the socket is open already");
    }
    return done ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

PyDoc_STRVAR(
    opensocket_doc,
    "opensocket($module, rmsock, /)\n--\n\n"
    "Open the socket now, so that it can be given its mode before main().\n\n"
    "rmsock: whether to remove a unix socket that was left at the path; nothing but a\n"
    "socket is ever removed.\n\n"
    "A program that becomes a daemon may os.fork() between this and main(); the child serves.\n\n"
    "Raises error, with the OSError as its cause, that says what is wrong with the path or\n"
    "the port.  libmilter: smfi_opensocket.");

static PyObject *
milter_opensocket(PyObject *module, PyObject *value)
{
    module_state *state = state_of(module);
    int remove_old = PyObject_IsTrue(value);

    if (remove_old < 0) {
        return NULL;
    }
    if (claim_start(module, "opensocket", true) < 0) {
        return NULL;
    }
    if (open_socket(state, remove_old) < 0) {
        filter.phase = SETTING_UP;
        return NULL;
    }
    filter.phase = SOCKET_OPEN;
    Py_RETURN_NONE;
}

/* An int of Python in the range of a setting, or -1 with an exception set. */
static long
setting(PyObject *module, const char *call, const char *argument, PyObject *value, long least)
{
    long number = PyLong_AsLong(value);

    if (number == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (number < least || number > INT_MAX) {
        refuse(state_of(module), call, argument,
               number > INT_MAX ? "must fit into 32 bits"
               : least > 0      ? "must be positive"
                                : "must not be negative",
               value);
        return -1;
    }
    return number;
}

PyDoc_STRVAR(settimeout_doc,
             "settimeout($module, seconds, /)\n--\n\n"
             "How long the filter waits for the MTA before it gives a connection up; 0 means at\n"
             "once, libmilter's default is 7210 s.  libmilter: smfi_settimeout.");

static PyObject *
milter_settimeout(PyObject *module, PyObject *value)
{
    long seconds = setting(module, "settimeout", "seconds", value, 0);

    if (seconds < 0) {
        return NULL;
    }
    smfi_settimeout((int)seconds);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(setbacklog_doc,
             "setbacklog($module, n, /)\n--\n\n"
             "How many connections may wait to be accepted, from 1.  libmilter: smfi_setbacklog.");

static PyObject *
milter_setbacklog(PyObject *module, PyObject *value)
{
    long n = setting(module, "setbacklog", "n", value, 1);

    if (n < 0) {
        return NULL;
    }
    smfi_setbacklog((int)n);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    setdbg_doc,
    "setdbg($module, level, /)\n--\n\n"
    "How much libmilter prints of what it does: 0 (nothing) to 6.  libmilter: smfi_setdbg.");

static PyObject *
milter_setdbg(PyObject *module, PyObject *value)
{
    long level = setting(module, "setdbg", "level", value, 0);

    if (level < 0) {
        return NULL;
    }
    smfi_setdbg((int)level);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(setmaxdatasize_doc,
             "setmaxdatasize($module, size, /)\n--\n\n"
             "The largest packet, in bytes, that is taken from the MTA; returns the former limit.\n"
             "libmilter: smfi_setmaxdatasize.");

static PyObject *
milter_setmaxdatasize(PyObject *module, PyObject *value)
{
    long size = setting(module, "setmaxdatasize", "size", value, 1);
    size_t old;

    if (size < 0) {
        return NULL;
    }
    LOCK_STATE();
    filter.max_data = (size_t)size;
    old = smfi_setmaxdatasize((size_t)size);
    UNLOCK_STATE();
    return PyLong_FromSize_t(old);
}

PyDoc_STRVAR(set_drain_timeout_doc,
             "set_drain_timeout($module, seconds, /)\n--\n\n"
             "How long messages in progress may take to end after a stop; 30 s by default, 0 cuts\n"
             "them.  May be called at any time.");

static PyObject *
milter_set_drain_timeout(PyObject *module, PyObject *value)
{
    double seconds = PyFloat_AsDouble(value);

    if (seconds == -1.0 && PyErr_Occurred()) {
        return NULL;
    }
    if (!(seconds >= 0 && seconds <= 1e6)) {
        refuse(state_of(module), "set_drain_timeout", "seconds", "must be from 0 to 1000000",
               value);
        return NULL;
    }
    filter.drain_ms = (int)(seconds * 1000);
    share_drain_timeout();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_flags_doc,
             "set_flags($module, flags, /)\n--\n\n"
             "The actions that the filter wants: ADDHDRS, CHGBODY, ..., joined by '|'.\n\n"
             "They count where there is no negotiate callback, as far as the MTA offers them.");

static PyObject *
milter_set_flags(PyObject *module, PyObject *value)
{
    long flags = setting(module, "set_flags", "flags", value, 0);

    if (flags < 0) {
        return NULL;
    }
    state_of(module)->flags = (unsigned long)flags;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    set_exception_policy_doc,
    "set_exception_policy($module, code, /)\n--\n\n"
    "The verdict for an exception that a callback does not catch: TEMPFAIL (the default),\n"
    "REJECT, CONTINUE or ACCEPT.");

static PyObject *
milter_set_exception_policy(PyObject *module, PyObject *value)
{
    long code = PyLong_AsLong(value);

    if (code == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (code != SMFIS_TEMPFAIL && code != SMFIS_REJECT && code != SMFIS_CONTINUE &&
        code != SMFIS_ACCEPT) {
        refuse(state_of(module), "set_exception_policy", "code",
               "must be TEMPFAIL, REJECT, CONTINUE or ACCEPT", value);
        return NULL;
    }
    state_of(module)->policy = (int)code;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    getversion_doc,
    "getversion($module, /)\n--\n\n"
    "The version of the libmilter that is loaded: (major, minor, patch level).  VERSION is\n"
    "the one that was compiled against.  libmilter: smfi_version.");

static PyObject *
milter_getversion(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    unsigned int major, minor, patch;

    if (smfi_version(&major, &minor, &patch) != MI_SUCCESS) {
        return out_of_order(module, "smfi_version", "failed");
    }
    return Py_BuildValue("(III)", major, minor, patch);
}

PyDoc_STRVAR(
    getdiag_doc,
    "getdiag($module, /)\n--\n\n"
    "Counters of this process: (contexts created, contexts deleted, messages in progress,\n"
    "threads of libmilter in Python now).");

static PyObject *
milter_getdiag(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    unsigned long created, deleted;
    long messages, inside;

    do { /* until nothing changed meanwhile: deleted never gets ahead of created */
        deleted = atomic_load(&filter.deleted);
        created = atomic_load(&filter.created);
        messages = atomic_load(&filter.messages);
        inside = atomic_load(&filter.inside);
    } while (deleted != atomic_load(&filter.deleted));
    return Py_BuildValue("(kkll)", created, deleted, messages, inside);
}

#define CALLBACK_SETTER(name, STAGE, arguments)                                                    \
    PyDoc_STRVAR(set_##name##_callback_doc,                                                        \
                 "set_" #name "_callback($module, callback, /)\n--\n\n"                            \
                 "Set what is called for this step, as callback(" arguments "), or None for\n"     \
                 "nothing.  Returns the callback that it replaces, or None.  It takes effect\n"    \
                 "at once, for what the MTA was asked to send.");                                  \
    static PyObject *milter_set_##name##_callback(PyObject *module, PyObject *callback)            \
    {                                                                                              \
        return replace_callback(module, STAGE, callback);                                          \
    }

static PyObject *
replace_callback(PyObject *module, enum stage stage, PyObject *callback)
{
    PyObject *old;

    if (!may_be_callback(stage, callback)) {
        return NULL;
    }
    old = exchange_callback(&state_of(module)->callbacks[stage], callback);
    return old != NULL ? old : Py_NewRef(Py_None);
}

CALLBACK_SETTER(connect, CONNECT, "ctx, hostname, family, address")
CALLBACK_SETTER(helo, HELO, "ctx, hostname")
CALLBACK_SETTER(envfrom, ENVFROM, "ctx, sender, *parameters")
CALLBACK_SETTER(envrcpt, ENVRCPT, "ctx, recipient, *parameters")
CALLBACK_SETTER(header, HEADER, "ctx, name, value")
CALLBACK_SETTER(eoh, EOH, "ctx")
CALLBACK_SETTER(body, BODY, "ctx, chunk")
CALLBACK_SETTER(eom, EOM, "ctx")
CALLBACK_SETTER(abort, ABORT, "ctx")
CALLBACK_SETTER(close, CLOSE, "ctx")

/* Private to the package Milter.  {callback: function} of functions that do nothing but call
 * the method of that step of ctx.getpriv() with the rest of their arguments: where one of
 * these is what a callback is set to, and there is such an object, the method is called
 * without it. */
static PyObject *
milter__call_objects(PyObject *module, PyObject *functions)
{
    module_state *state = state_of(module);

    if (!PyDict_Check(functions)) {
        PyErr_SetString(PyExc_TypeError, "_call_objects: functions must be a dict");
        return NULL;
    }
    for (int i = 0; i < STAGES; i++) {
        if (stages[i].method != NAMES) {
            PyObject *function = PyMapping_GetItemString(functions, stages[i].name);
            if (function == NULL) {
                return NULL;
            }
            Py_XDECREF(exchange_callback(&state->shortcuts[i], function));
            Py_DECREF(function);
        }
    }
    Py_RETURN_NONE;
}

#define FUNCTION(name, flags)                                                                      \
    {                                                                                              \
#name, (PyCFunction)(void (*)(void))milter_##name, flags, name##_doc                       \
    }

static PyMethodDef milter_functions[] = {
    FUNCTION(getdiag, METH_NOARGS),
    FUNCTION(getversion, METH_NOARGS),
    FUNCTION(main, METH_NOARGS),
    FUNCTION(opensocket, METH_O),
    FUNCTION(register, METH_VARARGS | METH_KEYWORDS),
    FUNCTION(set_abort_callback, METH_O),
    FUNCTION(set_body_callback, METH_O),
    FUNCTION(set_close_callback, METH_O),
    FUNCTION(set_connect_callback, METH_O),
    FUNCTION(set_drain_timeout, METH_O),
    FUNCTION(set_envfrom_callback, METH_O),
    FUNCTION(set_envrcpt_callback, METH_O),
    FUNCTION(set_eoh_callback, METH_O),
    FUNCTION(set_eom_callback, METH_O),
    FUNCTION(set_exception_policy, METH_O),
    FUNCTION(set_flags, METH_O),
    FUNCTION(set_header_callback, METH_O),
    FUNCTION(set_helo_callback, METH_O),
    FUNCTION(setbacklog, METH_O),
    FUNCTION(setconn, METH_O),
    FUNCTION(setdbg, METH_O),
    FUNCTION(setmaxdatasize, METH_O),
    FUNCTION(settimeout, METH_O),
    FUNCTION(stop, METH_NOARGS),
    {"_call_objects", milter__call_objects, METH_O, NULL},
    {"_close_gate", close_gate, METH_NOARGS, NULL},
    {"_after_fork_in_child", after_fork_in_child, METH_NOARGS, NULL},
    {"_share_socket", share_socket, METH_O, NULL},
    {"_become_worker", become_worker, METH_VARARGS, NULL},
    {"_worker_gone", worker_gone, METH_O, NULL},
    {"_fork_worker", fork_worker, METH_O, NULL},
    {"_hold_signals", hold_signals, METH_O, NULL},
    {"_await", await_news, METH_VARARGS, NULL},
    {"_stop_state", stop_state, METH_NOARGS, NULL},
    {"_unique_id", unique_id, METH_NOARGS, NULL},
    {"_last_unique_id", last_unique_id, METH_NOARGS, NULL},
    {"_metrics", switch_counting, METH_O, NULL},
    {"_metrics_snapshot", counters_snapshot, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* ------------------------------------------------------ module definition */

PyDoc_STRVAR(
    module_doc,
    "Mail filters on sendmail's libmilter: the functions and constants of <libmilter/mfapi.h>.\n\n"
    "Most filters use the package Milter, which is built on this.");

PyDoc_STRVAR(error_doc, "What libmilter, or a call out of order, fails with.");

PyDoc_STRVAR(invalid_argument_doc,
             "A value that is refused before libmilter sees it: both an error and a ValueError.");

/* Add an object, which stays the caller's; NULL means that an exception is set. */
static int
add_object(PyObject *module, const char *name, PyObject *object)
{
    if (object != NULL && PyModule_AddObject(module, name, Py_NewRef(object)) < 0) {
        Py_DECREF(object); /* taken over only where it was added */
        return -1;
    }
    if (object == NULL && !PyErr_Occurred()) {
        PyErr_NoMemory(); /* CPython 3.11's PyType_FromModuleAndSpec() does not say so */
    }
    return object == NULL ? -1 : 0;
}

static int
add_exceptions(PyObject *module, module_state *state)
{
    PyObject *bases;

    state->error = PyErr_NewExceptionWithDoc("milter.error", error_doc, NULL, NULL);
    if (add_object(module, "error", state->error) < 0) {
        return -1;
    }
    bases = PyTuple_Pack(2, state->error, PyExc_ValueError);
    if (bases == NULL) {
        return -1;
    }
    state->invalid_argument =
        PyErr_NewExceptionWithDoc("milter.InvalidArgument", invalid_argument_doc, bases, NULL);
    Py_DECREF(bases);
    return add_object(module, "InvalidArgument", state->invalid_argument);
}

static int
add_types(PyObject *module, module_state *state)
{
    PyObject *decoder;
    int result;

    state->context_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &context_spec, NULL);
    if (add_object(module, "milterContext", (PyObject *)state->context_type) < 0) {
        return -1;
    }
#if PY_VERSION_HEX < 0x030A0000
    state->context_type->tp_new = NULL; /* no Py_TPFLAGS_DISALLOW_INSTANTIATION yet */
#endif
    decoder = PyType_FromModuleAndSpec(module, &decoder_spec, NULL);
    result = add_object(module, "_Decoder", decoder);
    Py_XDECREF(decoder);
    return result;
}

static int
milter_exec(PyObject *module)
{
    module_state *state = state_of(module);

    if (PyInterpreterState_Get() != PyInterpreterState_Main() || filter.phase == STARTING ||
        filter.phase == RUNNING) {
        PyErr_SetString(PyExc_ImportError,
                        "milter works in the main interpreter only, and is not to be loaded anew "
                        "while main() runs: libmilter is one to a process");
        return -1;
    }
    state->policy = SMFIS_TEMPFAIL;
    for (int i = 0; i < NAMES; i++) {
        state->names[i] = PyUnicode_InternFromString(names[i]);
        if (state->names[i] == NULL) {
            return -1;
        }
    }
    if (add_exceptions(module, state) < 0 || add_types(module, state) < 0 ||
        add_constants(module) < 0) {
        return -1;
    }
    if (filter.state == NULL || filter.phase != STOPPED) { /* after that, callbacks still end */
        filter.state = state;
    }
    return 0;
}

static int
milter_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = state_of(module);

    Py_VISIT(state->error);
    Py_VISIT(state->invalid_argument);
    Py_VISIT(state->context_type);
    Py_VISIT(state->raised);
    for (int i = 0; i < STAGES; i++) {
        Py_VISIT(state->callbacks[i]);
        Py_VISIT(state->shortcuts[i]);
    }
    return 0;
}

static int
milter_clear(PyObject *module)
{
    module_state *state = state_of(module);

    Py_CLEAR(state->error);
    Py_CLEAR(state->invalid_argument);
    Py_CLEAR(state->context_type);
    Py_CLEAR(state->raised);
    for (int i = 0; i < STAGES; i++) {
        Py_CLEAR(state->callbacks[i]);
        Py_CLEAR(state->shortcuts[i]);
    }
    for (int i = 0; i < NAMES; i++) {
        Py_CLEAR(state->names[i]);
    }
    return 0;
}

static void
milter_free(void *module)
{
    module_state *state = state_of(module);

    milter_clear(module);
    free(state->name);
    state->name = NULL;
    if (filter.state == state) {
        filter.state = NULL;
    }
}

static PyModuleDef_Slot milter_slots[] = {
    {Py_mod_exec, milter_exec},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef milter_module = {
    PyModuleDef_HEAD_INIT,         .m_name = "milter",
    .m_doc = module_doc,           .m_size = sizeof(module_state),
    .m_methods = milter_functions, .m_slots = milter_slots,
    .m_traverse = milter_traverse, .m_clear = milter_clear,
    .m_free = milter_free,
};

PyMODINIT_FUNC
PyInit_milter(void)
{
    return PyModuleDef_Init(&milter_module);
}
