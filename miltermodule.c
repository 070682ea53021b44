/* The extension module `milter`: mail filters in Python on sendmail's libmilter.
 *
 * libmilter talks to the MTA (Postfix or sendmail) and calls one C function for each
 * step of the SMTP dialogue.  This file turns each such call into a call of a Python
 * object, and the methods of the context object into calls of libmilter.
 *
 *     wire -> libmilter's thread -> begin() -> callback -> finish() -> libmilter -> wire
 *
 * Read it top to bottom: state, text, addresses, the bridge into Python, the
 * trampolines, the context object, the listening socket, the life of a filter,
 * the module's functions, its constants, its definition.
 *
 * The authority for every smfi_ call is libmilter's manual (package sendmail-doc) and
 * <libmilter/mfapi.h>.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if defined(__GLIBC__) || defined(__linux__)
#include <malloc.h>
#endif

#include <libmilter/mfapi.h>
#include <libmilter/mfdef.h>

#if PY_VERSION_HEX < 0x030A0000
#define Py_NewRef(object) (Py_INCREF(object), (PyObject *)(object))
#define Py_XNewRef(object) (Py_XINCREF(object), (PyObject *)(object))
#endif

/* Limits that libmilter has and does not export (libmilter.h: MAXREPLYLEN, MAXREPLIES). */
#define MAX_REPLY_LINE 980
#define MAX_REPLY_LINES 32

#define NAME_IN_REPLY 40          /* bytes of the filter's name in the reply to an exception */
#define DRAIN_SECONDS 30.0        /* how long messages in progress may take after a stop */
#define CLOSE_SECONDS 2.0         /* how long close callbacks may take once all is drained */
#define COMFORTABLE_FILES 1024    /* below this soft limit accept() may run out of descriptors */
#define STACK_ARGS 16             /* arguments of a callback that need no allocation */

/* ------------------------------------------------------------------ state */

/* The steps of the dialogue that reach Python. */
enum stage {
    CONNECT, HELO, ENVFROM, ENVRCPT, DATA, HEADER, EOH, BODY, EOM,
    ABORT, CLOSE, UNKNOWN, NEGOTIATE, STAGES,
    OUTSIDE = -1                  /* no callback of this connection is running */
};

static const struct {
    const char *name;
    unsigned long leave_out;      /* P_NO*: the MTA need not send this step */
    unsigned long no_reply;       /* P_NR_*: the MTA does not wait for an answer */
    bool in_message;              /* belongs to one message, not to the connection */
} stages[STAGES] = {
    [CONNECT] = {"connect", SMFIP_NOCONNECT, SMFIP_NR_CONN, false},
    [HELO] = {"helo", SMFIP_NOHELO, SMFIP_NR_HELO, false},
    [ENVFROM] = {"envfrom", SMFIP_NOMAIL, SMFIP_NR_MAIL, true},
    [ENVRCPT] = {"envrcpt", SMFIP_NORCPT, SMFIP_NR_RCPT, true},
    [DATA] = {"data", SMFIP_NODATA, SMFIP_NR_DATA, true},
    [HEADER] = {"header", SMFIP_NOHDRS, SMFIP_NR_HDR, true},
    [EOH] = {"eoh", SMFIP_NOEOH, SMFIP_NR_EOH, true},
    [BODY] = {"body", SMFIP_NOBODY, SMFIP_NR_BODY, true},
    [EOM] = {"eom", 0, 0, true},
    [ABORT] = {"abort", 0, 0, false},
    [CLOSE] = {"close", 0, 0, false},
    [UNKNOWN] = {"unknown", SMFIP_NOUNKNOWN, SMFIP_NR_UNKN, false},
    [NEGOTIATE] = {"negotiate", 0, 0, false},
};

/* What belongs to the module object.  All of it is guarded by the interpreter lock. */
typedef struct {
    PyObject *error;              /* milter.error */
    PyObject *invalid_argument;   /* milter.InvalidArgument: an error and a ValueError */
    PyTypeObject *context_type;
    PyObject *callbacks[STAGES];  /* NULL where none is set */
    PyObject *agreed;             /* {address of a SMFICTX: (actions, protocol)}, see recall() */
    PyObject *raised;             /* what main() raises when the filter has drained */
    char *name;                   /* as registered, for replies and reports */
    unsigned long flags;          /* set_flags() */
    int policy;                   /* set_exception_policy() */
    bool hooked;                  /* the interpreter calls us at exit and after a fork */
} module_state;

enum phase { SETTING_UP, SOCKET_OPEN, RUNNING, STOPPED };
enum socket_kind { NO_SOCKET, UNIX_SOCKET, INET_SOCKET, INET6_SOCKET, INHERITED_SOCKET };

/* What belongs to the process: libmilter is one to a process and hands a callback nothing
 * but its own context, so one static object has to lead from there to the module. */
static struct {
    module_state *state;
    PyInterpreterState *interpreter;
    enum phase phase;             /* guarded by the interpreter lock */

    char *conn;                   /* as given to setconn() */
    enum socket_kind kind;
    char *path;                   /* absolute, of a unix socket */
    dev_t device;                 /* what stood at path after it was bound */
    ino_t inode;
    int listener;                 /* libmilter's listening descriptor, or -1 */

    int pipe[2];                  /* wakes main(): anything written to [1] does */
    bool wakeup_set;              /* Python writes signals to it, guarded likewise */
    sigset_t mask;                /* of the thread that called main() */
    double drain_seconds;

    /* Read and written by many threads, and by signal handlers. */
    atomic_bool stop_wanted;      /* by stop(), a signal, an exception */
    atomic_bool draining;         /* new messages are refused */
    atomic_bool listener_ended;   /* smfi_main() has returned */
    atomic_bool gate_closed;      /* no thread of libmilter may enter Python any more */
    atomic_int result;            /* of smfi_main() */
    atomic_int signal;            /* the one that stopped the filter, or 0 */
    atomic_long inside;           /* threads of libmilter that are in Python now */
    atomic_long messages;         /* in progress */
    atomic_ulong created;         /* contexts */
    atomic_ulong deleted;
} filter = {
    .listener = -1,
    .pipe = {-1, -1},
    .drain_seconds = DRAIN_SECONDS,
};

/* What an exception left unanswered: see owe(). */
enum debt { NOTHING_OWED, OWED_FOR_MESSAGE, OWED_FOR_CONNECTION };

typedef struct {
    PyObject_HEAD
    PyObject *weakrefs;
    PyObject *priv;               /* setpriv(): the application's object */
    PyObject *symlists;           /* {stage: [macro, ...]} during negotiation, else NULL */
    module_state *state;          /* borrowed: the type keeps the module alive */

    pthread_mutex_t lock;         /* guards what follows, and libmilter's context itself */
    SMFICTX *handle;              /* NULL once the connection is closed */
    int stage;                    /* which callback runs now */

    unsigned long offered_actions;
    unsigned long actions;        /* SMFIF_*, agreed with the MTA */
    unsigned long protocol;       /* SMFIP_*, agreed with the MTA */
    bool in_message;              /* a message has begun and has no final verdict yet */
    char reply_class;             /* '4' or '5' of the reply that waits, or 0 */
    enum debt debt;
    sfsistat owed;
} ContextObject;

static void
wake_main(void)
{
    int saved = errno;            /* also called from signal handlers */

    if (filter.pipe[1] >= 0 && write(filter.pipe[1], "", 1) < 0) {
        /* A full pipe wakes as well; nothing else can be done from here. */
    }
    errno = saved;
}

static double
monotonic_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* ------------------------------------------------------------------- text */

/* Take the current exception, with its traceback attached. */
static PyObject *
take_exception(void)
{
#if PY_VERSION_HEX >= 0x030C0000
    return PyErr_GetRaisedException();
#else
    PyObject *type, *value, *traceback;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL) {
        PyException_SetTraceback(value, traceback);
    }
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
#endif
}

/* Raise an exception instance; takes over the reference. */
static void
raise_exception(PyObject *exception)
{
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(exception);
#else
    PyObject *traceback = PyException_GetTraceback(exception);

    PyErr_Restore(Py_NewRef(Py_TYPE(exception)), exception, traceback);
#endif
}

/* Text from the wire.  No byte that a client sends may become an exception here. */
static PyObject *
text_from(const char *s, size_t size)
{
    return PyUnicode_DecodeUTF8(s, (Py_ssize_t)size, "surrogateescape");
}

/* Refuse an argument: InvalidArgument("CALL: ARGUMENT: RULE: VALUE"), the value cut short. */
static int
refuse(module_state *state, const char *call, const char *argument, const char *rule,
       PyObject *value)
{
    PyObject *shown = PyObject_Repr(value);

    if (shown != NULL && PyUnicode_GetLength(shown) > 80) {
        PyObject *start = PyUnicode_Substring(shown, 0, 77);
        Py_XSETREF(shown, start == NULL ? NULL : PyUnicode_FromFormat("%U...", start));
        Py_XDECREF(start);
    }
    if (shown != NULL) {
        PyErr_Format(state->invalid_argument, "%s: %s: %s: %U", call, argument, rule, shown);
        Py_DECREF(shown);
    }
    return -1;
}

/* A text argument on its way to libmilter: bytes, owned. */
static PyObject *
text_argument(module_state *state, const char *call, const char *argument, PyObject *value)
{
    PyObject *bytes;

    if (PyUnicode_Check(value)) {
        bytes = PyUnicode_AsEncodedString(value, "utf-8", "surrogateescape");
        if (bytes == NULL && PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
            /* A surrogate that stands for no byte of the wire. */
            PyErr_Clear();
            refuse(state, call, argument, "holds a surrogate that stands for no byte", value);
        }
    }
    else if (PyBytes_Check(value)) {
        bytes = Py_NewRef(value);
    }
    else {
        PyErr_Format(PyExc_TypeError, "%s: %s must be str or bytes, not %.100s", call, argument,
                     Py_TYPE(value)->tp_name);
        return NULL;
    }
    if (bytes != NULL &&
        memchr(PyBytes_AS_STRING(bytes), '\0', (size_t)PyBytes_GET_SIZE(bytes)) != NULL) {
        refuse(state, call, argument, "must not hold NUL", value);
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* A text argument that has to stay on one line: an address, a reason, a line of a reply. */
static PyObject *
line_argument(module_state *state, const char *call, const char *argument, PyObject *value)
{
    PyObject *bytes = text_argument(state, call, argument, value);

    if (bytes != NULL && strpbrk(PyBytes_AS_STRING(bytes), "\r\n") != NULL) {
        refuse(state, call, argument, "must not hold CR or LF", value);
        Py_CLEAR(bytes);
    }
    return bytes;
}

static PyObject *
nonempty_line_argument(module_state *state, const char *call, const char *argument,
                       PyObject *value)
{
    PyObject *bytes = line_argument(state, call, argument, value);

    if (bytes != NULL && PyBytes_GET_SIZE(bytes) == 0) {
        refuse(state, call, argument, "must not be empty", value);
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* RFC 5322 section 3.6.8: printable characters without the colon.  Bytes beyond ASCII pass,
 * since a name that a callback received must be fit to be given back. */
static PyObject *
header_name_argument(module_state *state, const char *call, PyObject *value)
{
    PyObject *bytes = text_argument(state, call, "name", value);
    const char *rule = NULL;

    if (bytes == NULL) {
        return NULL;
    }
    if (PyBytes_GET_SIZE(bytes) == 0) {
        rule = "must not be empty";
    }
    for (const char *p = PyBytes_AS_STRING(bytes); *p != '\0' && rule == NULL; p++) {
        unsigned char c = (unsigned char)*p;
        if (c <= ' ' || c == 0x7f || c == ':') {
            rule = "must not hold a colon, a space or a control character";
        }
    }
    if (rule != NULL) {
        refuse(state, call, "name", rule, value);
        Py_CLEAR(bytes);
    }
    return bytes;
}

/* A header value may hold line ends only as folds: LF, or CRLF which goes out as LF, before a
 * space or tab (RFC 5322 section 2.2.3).  Anything else would begin a header of its own.  One
 * line end at the very end, as it is left by reading a line, is dropped. */
static PyObject *
header_value_argument(module_state *state, const char *call, PyObject *value)
{
    PyObject *bytes = text_argument(state, call, "value", value);
    PyObject *folded;
    const char *from;
    char *to;

    if (bytes == NULL || strpbrk(PyBytes_AS_STRING(bytes), "\r\n") == NULL) {
        return bytes;
    }
    folded = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(bytes));
    if (folded == NULL) {
        Py_DECREF(bytes);
        return NULL;
    }
    to = PyBytes_AS_STRING(folded);
    for (from = PyBytes_AS_STRING(bytes); *from != '\0'; from++) {
        if (*from == '\r' && from[1] == '\n') {
            continue;
        }
        if (*from == '\n' && from[1] == '\0') {
            break;
        }
        if (*from == '\r' || (*from == '\n' && from[1] != ' ' && from[1] != '\t')) {
            refuse(state, call, "value",
                   "CR and LF are only allowed in a fold, before space or tab", value);
            Py_DECREF(bytes);
            Py_DECREF(folded);
            return NULL;
        }
        *to++ = *from;
    }
    Py_DECREF(bytes);
    if (_PyBytes_Resize(&folded, to - PyBytes_AS_STRING(folded)) < 0) {
        return NULL;
    }
    return folded;
}

/* Write a record to the logger `milter`.  Never leaves an exception behind: it is called where
 * nobody could handle one.  `exception` may be NULL. */
static void
log_record(const char *method, PyObject *message, PyObject *exception)
{
    PyObject *logging = NULL, *logger = NULL, *log = NULL, *args = NULL, *keywords = NULL;
    PyObject *done = NULL;

    if (message != NULL && (logging = PyImport_ImportModule("logging")) != NULL &&
        (logger = PyObject_CallMethod(logging, "getLogger", "s", "milter")) != NULL &&
        (log = PyObject_GetAttrString(logger, method)) != NULL &&
        (args = Py_BuildValue("(sO)", "%s", message)) != NULL &&
        (keywords = PyDict_New()) != NULL &&
        (exception == NULL || PyDict_SetItemString(keywords, "exc_info", exception) == 0)) {
        done = PyObject_Call(log, args, keywords);
    }
    if (done == NULL) {
        PyErr_WriteUnraisable(message);
    }
    Py_XDECREF(done);
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(log);
    Py_XDECREF(logger);
    Py_XDECREF(logging);
    Py_XDECREF(message);          /* taken over from the caller */
}

/* -------------------------------------------------------------- addresses */

static PyObject *
ip_text(int family, const void *address)
{
    char text[INET6_ADDRSTRLEN];

    if (inet_ntop(family, address, text, sizeof text) == NULL) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyUnicode_FromString(text);
}

/* The address of the SMTP client in the form that the module `socket` uses: (ip, port),
 * (ip6, port, flowinfo, scope_id), a path, or None where the MTA gave none or one of a
 * family that libmilter does not know. */
static PyObject *
client_address(const _SOCK_ADDR *address)
{
    if (address != NULL && address->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;
        return Py_BuildValue("(Ni)", ip_text(AF_INET, &in->sin_addr), ntohs(in->sin_port));
    }
    if (address != NULL && address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)address;
        return Py_BuildValue("(NiII)", ip_text(AF_INET6, &in6->sin6_addr), ntohs(in6->sin6_port),
                             ntohl(in6->sin6_flowinfo), in6->sin6_scope_id);
    }
    if (address != NULL && address->sa_family == AF_UNIX) {
        const struct sockaddr_un *un = (const struct sockaddr_un *)address;
        /* A path that fills the array has no NUL at its end. */
        return text_from(un->sun_path, strnlen(un->sun_path, sizeof un->sun_path));
    }
    Py_RETURN_NONE;
}

/* ----------------------------------------------------- bridge: the threads */

/* libmilter runs the callbacks of one connection on whichever thread of its pool is free,
 * while a Python thread state belongs to one OS thread for life.  So each thread gets a state
 * at its first callback, keeps it, and gives it back when it ends. */
static _Thread_local PyThreadState *thread_state;

/* At thread exit PyThreadState_Clear() needs CPython's own thread-specific values.  These are
 * gone when the destructors of pthread keys run, but not yet when those of C++ thread_local
 * objects do; where the C library has the hook for these (glibc, FreeBSD) it is the place. */
#if defined(__GLIBC__) || defined(__FreeBSD__)
#define THREAD_EXIT_HOOK 1
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
    if (atomic_fetch_sub(&filter.inside, 1) == 1 && atomic_load(&filter.gate_closed)) {
        wake_main();
    }
}

static void
give_back_thread_state(void *state)
{
    if (!pass_gate()) {
        return;                   /* the interpreter frees what is left of its threads */
    }
    PyEval_RestoreThread(state);
    if (PyGILState_Check()) {
        PyThreadState_Clear(state);
        PyThreadState_DeleteCurrent();
    }
    else {
        /* No hook on this platform: clearing now would trip the checks of debug allocators.
         * Keep the state; it is small, and pools keep their threads. */
        PyEval_SaveThread();
    }
    thread_state = NULL;
    leave_gate();
}

static bool
adopt_thread(void)
{
    thread_state = PyThreadState_New(filter.interpreter);
    if (thread_state == NULL) {
        return false;
    }
    /* libmilter blocks HUP, INT and TERM in its threads.  A process that a callback starts
     * would inherit that, and ignore a polite end for ever. */
    pthread_sigmask(SIG_SETMASK, &filter.mask, NULL);
#ifdef THREAD_EXIT_HOOK
    if (__cxa_thread_atexit_impl != NULL &&
        __cxa_thread_atexit_impl(give_back_thread_state, thread_state, &__dso_handle) == 0) {
        return true;
    }
#endif
    pthread_setspecific(thread_key, thread_state);
    return true;
}

static bool
enter_python(void)
{
    if (!pass_gate()) {
        return false;
    }
    if (thread_state == NULL && !adopt_thread()) {
        leave_gate();
        return false;
    }
    PyEval_RestoreThread(thread_state);
    return true;
}

static void
leave_python(void)
{
    PyEval_SaveThread();
    leave_gate();
}

/* ---------------------------------------------------- bridge: the verdicts */

/* One call from libmilter on its way through Python. */
typedef struct {
    SMFICTX *handle;
    enum stage stage;
    bool attached;                /* this thread holds the interpreter lock */
    bool failed;                  /* an exception is set */
    ContextObject *context;       /* owned, or NULL */
    PyObject *callback;           /* owned; NULL where nothing is to be called */
    PyObject **args;              /* owned references; [0] is room for vectorcall */
    size_t count;
    PyObject *stack_args[STACK_ARGS];
    sfsistat verdict;
} Call;

static bool
without_reply(const Call *call)
{
    return call->context != NULL &&
           (call->context->protocol & stages[call->stage].no_reply) != 0;
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
        return stage != ENVRCPT;  /* there it is about one recipient */
    default:
        return stage == EOM;
    }
}

static void
set_reply(Call *call, const char *code, const char *enhanced, const char *text)
{
    /* libmilter's prototype is not const; it copies.  A failure leaves the default reply. */
    if (smfi_setreply(call->handle, (char *)code, (char *)enhanced, (char *)text) == MI_SUCCESS &&
        call->context != NULL) {
        call->context->reply_class = code[0];
    }
}

/* The filter's name, fit for a reply: cut short, % doubled as replies need it. */
static void
name_for_reply(const module_state *state, char *out)
{
    const char *name = state->name != NULL ? state->name : "filter";

    for (int i = 0; i < NAME_IN_REPLY && name[i] != '\0'; i++) {
        if (name[i] == '%') {
            *out++ = '%';
        }
        *out++ = name[i];
    }
    *out = '\0';
}

/* Answer with a verdict of our own.  Where the MTA does not wait for an answer none may go
 * out, or it would be taken for the answer to the next step: see owe(). */
static sfsistat
answer(Call *call, sfsistat verdict, const char *soft, const char *hard, const char *what)
{
    char name[2 * NAME_IN_REPLY + 1];
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
    call->context->owed = verdict;
    if (stages[call->stage].in_message) {
        call->context->debt = OWED_FOR_MESSAGE;
    }
    else if (call->stage == CONNECT || call->stage == HELO) {
        call->context->debt = OWED_FOR_CONNECTION;
    }
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
static void
stop_with_exception(module_state *state)
{
    PyObject *exception = take_exception();

    if (state->raised == NULL) {
        state->raised = exception;
    }
    else {
        Py_DECREF(exception);
    }
    atomic_store(&filter.stop_wanted, true);
    wake_main();
}

static bool
excepthook_replaced(PyObject **hook)
{
    *hook = PySys_GetObject("excepthook"); /* borrowed */
    return *hook != NULL && *hook != Py_None && *hook != PySys_GetObject("__excepthook__");
}

/* Report the exception that is set now: once, with its traceback, the stage and the queue id. */
static void
report_exception(Call *call)
{
    PyObject *hook, *exception, *message, *done, *traceback, *id = NULL;
    const char *queue_id = smfi_getsymval(call->handle, "i");

    exception = take_exception();
    id = queue_id != NULL ? text_from(queue_id, strlen(queue_id)) : PyUnicode_FromString("unknown");
    message = id == NULL ? NULL
                         : PyUnicode_FromFormat("exception in the %s callback, queue id %U",
                                                stages[call->stage].name, id);
    Py_XDECREF(id);
    if (!excepthook_replaced(&hook)) {
        log_record("error", message, exception);
        Py_DECREF(exception);
        return;
    }
    Py_INCREF(hook);
#if PY_VERSION_HEX >= 0x030B0000
    done = message == NULL ? NULL : PyObject_CallMethod(exception, "add_note", "O", message);
    if (done == NULL) {
        PyErr_Clear();            /* the note is a courtesy; the report matters */
    }
    Py_XDECREF(done);
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
    module_state *state = filter.state;

    if (PyErr_ExceptionMatches(PyExc_SystemExit) ||
        PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        stop_with_exception(state);
    }
    else {
        report_exception(call);
    }
    if (call->stage == NEGOTIATE) {
        call->verdict = SMFIS_REJECT;   /* the MTA goes on without the filter */
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
                                    stages[call->stage].name,
                                    wanted == '4' ? "TEMPFAIL" : "REJECT", have),
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
            PyErr_Clear();        /* too large, or -1: no verdict either way */
        }
        why = why_no_verdict(call, verdict);
    }
    if (why != NULL) {
        PyErr_Format(filter.state->error, "the %s callback returned %R: %s",
                     stages[call->stage].name, result, why);
        return false;
    }
    call->verdict = without_reply(call) ? SMFIS_NOREPLY : (sfsistat)verdict;
    check_reply_class(call);
    return true;
}

/* ---------------------------------------------- bridge: one way in, one out */

static ContextObject *new_context(module_state *state, SMFICTX *handle);

/* The context object of a connection; libmilter's private pointer owns a reference to it.
 * NULL with an exception set where it cannot be made, without one where none is due. */
static ContextObject *
find_context(Call *call)
{
    ContextObject *context = smfi_getpriv(call->handle);

    if (context == NULL && call->stage != ABORT && call->stage != CLOSE) {
        context = new_context(filter.state, call->handle);
        if (context != NULL) {
            smfi_setpriv(call->handle, context);
            atomic_fetch_add(&filter.created, 1);
        }
    }
    return (ContextObject *)Py_XNewRef(context);
}

static void
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
        end_message(context);     /* sendmail may send no ABORT after an early verdict */
    }
    if (!stages[call->stage].in_message || context->in_message) {
        return true;
    }
    if (context->debt != NOTHING_OWED) {
        return true;              /* answered by pay() before the application sees it */
    }
    /* Counted before the look at the flag, as main() looks at the count after setting it. */
    atomic_fetch_add(&filter.messages, 1);
    context->in_message = true;
    if (!atomic_load(&filter.draining)) {
        return true;
    }
    end_message(context);
    call->verdict = answer(call, SMFIS_TEMPFAIL, "4.3.2", "5.3.2", "stopping, try again later:");
    return false;
}

/* Wait for a context's lock without the interpreter lock: its holder may be writing to the MTA. */
static void
lock_context(ContextObject *context)
{
    if (pthread_mutex_trylock(&context->lock) != 0) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&context->lock);
        Py_END_ALLOW_THREADS
    }
}

static void
set_stage(ContextObject *context, int stage)
{
    lock_context(context);
    context->stage = stage;
    pthread_mutex_unlock(&context->lock);
}

/* The way in: attach this thread and find out what is to be called.  True where the callback's
 * arguments are wanted; in any case finish() comes next. */
static bool
begin(Call *call, SMFICTX *handle, enum stage stage)
{
    *call = (Call){.handle = handle, .stage = stage, .verdict = SMFIS_CONTINUE};
    call->args = call->stack_args;
    call->attached = enter_python();
    if (!call->attached) {
        /* Not without the filter's word: the MTA keeps or refuses the message for now.  The
         * context is C memory that outlives the interpreter, so it may still be looked at. */
        call->context = smfi_getpriv(handle);
        call->verdict = stage == NEGOTIATE        ? SMFIS_REJECT
                        : without_reply(call)     ? SMFIS_NOREPLY
                        : stages[stage].in_message ? SMFIS_TEMPFAIL
                                                  : SMFIS_CONTINUE;
        call->context = NULL;
        return false;
    }
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
        return false;             /* one abort for a message, and none after its verdict */
    }
    call->callback = Py_XNewRef(call->context->state->callbacks[stage]);
    if (call->callback == NULL) {
        call->verdict = without_reply(call) ? SMFIS_NOREPLY : SMFIS_CONTINUE;
        return false;
    }
    call->count = 1;
    call->args[1] = Py_NewRef(call->context);
    return true;
}

/* Add an argument for the callback; takes over the reference.  NULL means an exception is set. */
static void
add_argument(Call *call, PyObject *argument)
{
    if (argument == NULL) {
        call->failed = true;
    }
    else if (call->failed) {
        Py_DECREF(argument);
    }
    else {
        call->args[++call->count] = argument;
    }
}

static PyObject *
call_back(Call *call)
{
    PyObject *result = NULL;

    if (!call->failed) {
        result = PyObject_Vectorcall(call->callback, call->args + 1,
                                     call->count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    }
    for (size_t i = 1; i <= call->count; i++) {
        Py_DECREF(call->args[i]);
    }
    if (call->args != call->stack_args) {
        PyMem_Free(call->args);
    }
    call->count = 0;
    Py_CLEAR(call->callback);
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
    if (context != NULL) {
        if (call->stage == ABORT || (stages[call->stage].in_message && verdict != SMFIS_NOREPLY &&
                                     ends_message(call->stage, verdict))) {
            end_message(context);
        }
        if (context->handle != NULL) {
            set_stage(context, OUTSIDE);
        }
        Py_DECREF(context);
    }
    leave_python();
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
        add_argument(&call, text_from(hostname, strlen(hostname)));
        add_argument(&call, PyLong_FromLong(address != NULL ? address->sa_family : 0));
        add_argument(&call, client_address(address));
    }
    return finish(&call);
}

static sfsistat
on_helo(SMFICTX *handle, char *hostname)
{
    Call call;

    if (begin(&call, handle, HELO)) {
        add_argument(&call, text_from(hostname, strlen(hostname)));
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
            add_argument(&call, PyBytes_FromString(argv[i]));
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
        add_argument(&call, text_from(name, strlen(name)));
        add_argument(&call, PyBytes_FromString(value));
    }
    return finish(&call);
}

static sfsistat
on_body(SMFICTX *handle, unsigned char *chunk, size_t size)
{
    Call call;

    if (begin(&call, handle, BODY)) {
        add_argument(&call, PyBytes_FromStringAndSize((const char *)chunk, (Py_ssize_t)size));
    }
    return finish(&call);
}

/* libmilter passes on an unknown command without looking for its NUL; a broken MTA might have
 * sent none.  The allocation that holds it is the bound. */
static size_t
bounded_length(const char *command)
{
#if defined(__GLIBC__) || defined(__linux__)
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
        add_argument(&call, text_from(command, bounded_length(command)));
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

static void forget_connection(ContextObject *context);

static sfsistat
on_close(SMFICTX *handle)
{
    Call call;

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
    if (!call.attached) {
        smfi_setpriv(handle, NULL); /* libmilter logs what is left there */
    }
    return detach(&call);
}

/* --- negotiation */

/* sendmail may end a session and begin another on the same connection (SMFIC_QUIT_NC), without
 * a new negotiation.  libmilter goes on with what was agreed, so it is kept under the address
 * of its context until that address is used for a new connection, which negotiates. */
static void
remember(ContextObject *context, SMFICTX *handle)
{
    PyObject *key = PyLong_FromVoidPtr(handle);
    PyObject *value = Py_BuildValue("(kk)", context->actions, context->protocol);

    if (key == NULL || value == NULL || PyDict_SetItem(context->state->agreed, key, value) < 0) {
        PyErr_Clear();            /* out of memory: the next session has no extra options */
    }
    Py_XDECREF(key);
    Py_XDECREF(value);
}

static void
recall(ContextObject *context, SMFICTX *handle)
{
    PyObject *key = PyLong_FromVoidPtr(handle);
    PyObject *value = key == NULL ? NULL
                                  : PyDict_GetItemWithError(context->state->agreed, key);

    if (value != NULL) {
        (void)PyArg_ParseTuple(value, "kk", &context->actions, &context->protocol);
        (void)PyDict_DelItem(context->state->agreed, key);
    }
    PyErr_Clear();
    Py_XDECREF(key);
}

/* What is asked for where the application leaves it to us: every action in `actions`, no step
 * for which there is no callback. */
static unsigned long
steps_to_leave_out(const module_state *state)
{
    unsigned long steps = 0;

    for (int i = 0; i < STAGES; i++) {
        if (state->callbacks[i] == NULL) {
            steps |= stages[i].leave_out;
        }
    }
    return steps;
}

/* Hand libmilter the macro lists that setsymlist() collected: it takes one list for a stage. */
static bool
send_symlists(ContextObject *context)
{
    PyObject *symlists = context->symlists;
    PyObject *stage, *macros, *space, *joined;
    Py_ssize_t position = 0;
    bool done = true;

    context->symlists = NULL;
    while (symlists != NULL && done && PyDict_Next(symlists, &position, &stage, &macros)) {
        space = PyBytes_FromString(" ");
        joined = space == NULL ? NULL : PyObject_CallMethod(space, "join", "O", macros);
        done = joined != NULL;
        if (done && smfi_setsymlist(context->handle, (int)PyLong_AsLong(stage),
                                    PyBytes_AS_STRING(joined)) != MI_SUCCESS) {
            PyErr_SetString(context->state->error, "smfi_setsymlist failed");
            done = false;
        }
        Py_XDECREF(joined);
        Py_XDECREF(space);
    }
    Py_XDECREF(symlists);
    return done;
}

/* Read the list that the callback changed in place. */
static bool
read_options(PyObject *options, unsigned long values[4])
{
    if (PyList_GET_SIZE(options) < 2) {
        PyErr_SetString(PyExc_ValueError, "the negotiate callback left fewer than two options");
        return false;
    }
    for (Py_ssize_t i = 0; i < 4 && i < PyList_GET_SIZE(options); i++) {
        values[i] = PyLong_AsUnsignedLongMask(PyList_GET_ITEM(options, i));
        if (values[i] == (unsigned long)-1 && PyErr_Occurred()) {
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

    if (context == NULL) {
        if (call.attached) {
            call.verdict = SMFIS_REJECT;
        }
        return detach(&call);
    }
    context->offered_actions = context->actions = actions;
    context->protocol = 0;
    if (asked) {
        if (!ask_application(&call, values) || !send_symlists(context)) {
            take_policy(&call);
        }
    }
    else {
        values[0] = context->state->flags;
        values[1] = steps_to_leave_out(context->state);
    }
    Py_CLEAR(context->symlists);
    /* libmilter ends the session where more is asked for than was offered. */
    context->actions = *want_actions = values[0] & actions;
    context->protocol = *want_protocol = values[1] & protocol;
    *want_f2 = *want_f3 = 0;
    return detach(&call);
}

/* ----------------------------------------------------- the context object */

static ContextObject *
new_context(module_state *state, SMFICTX *handle)
{
    ContextObject *self = (ContextObject *)state->context_type->tp_alloc(state->context_type, 0);

    if (self == NULL) {
        return NULL;
    }
    pthread_mutex_init(&self->lock, NULL);
    self->state = state;
    self->handle = handle;
    self->stage = OUTSIDE;
    self->offered_actions = self->actions = SMFI_CURR_ACTS;
    recall(self, handle);
    return self;
}

/* The connection is closed: after this no method reaches libmilter. */
static void
forget_connection(ContextObject *context)
{
    SMFICTX *handle = context->handle;

    end_message(context);
    remember(context, handle);
    lock_context(context);        /* another thread may be in libmilter with this handle */
    context->handle = NULL;
    context->stage = OUTSIDE;
    pthread_mutex_unlock(&context->lock);
    smfi_setpriv(handle, NULL);
    atomic_fetch_add(&filter.deleted, 1);
    if (atomic_load(&filter.draining)) {
        wake_main();
    }
    Py_CLEAR(context->priv);      /* breaks the cycle with the application's object */
    Py_DECREF(context);           /* the reference that libmilter's private pointer owned */
}

static int
context_traverse(PyObject *op, visitproc visit, void *arg)
{
    ContextObject *self = (ContextObject *)op;

    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->priv);
    Py_VISIT(self->symlists);
    return 0;
}

static int
context_clear(PyObject *op)
{
    ContextObject *self = (ContextObject *)op;

    Py_CLEAR(self->priv);
    Py_CLEAR(self->symlists);
    return 0;
}

static void
context_dealloc(PyObject *op)
{
    ContextObject *self = (ContextObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) {
        PyObject_ClearWeakRefs(op);
    }
    context_clear(op);
    pthread_mutex_destroy(&self->lock);
    type->tp_free(op);
    Py_DECREF(type);
}

/* --- calls into libmilter */

enum { ANY_CALLBACK = -2 };

typedef struct {
    const char *call;             /* libmilter's name, for errors */
    int stage;                    /* where it is allowed, or ANY_CALLBACK */
    unsigned long needs;          /* SMFIF_* that must have been agreed, or 0 */
    const char *needs_name;
    bool writes;                  /* it sends to the MTA, which may take long */
    int (*run)(SMFICTX *handle, void *operands);
} Action;

/* Why an action is refused now, or NULL.  Called with the context's lock held. */
static const char *
why_not(const ContextObject *self, const Action *action)
{
    if (self->handle == NULL) {
        return "bad context";
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
 * for it does so without the interpreter lock. */
static bool
perform(ContextObject *self, const Action *action, void *operands)
{
    const char *why;
    int result = MI_FAILURE;
    PyThreadState *saved = NULL;

    if (action->writes || pthread_mutex_trylock(&self->lock) != 0) {
        saved = PyEval_SaveThread();
        pthread_mutex_lock(&self->lock);
    }
    why = why_not(self, action);
    if (why == NULL) {
        result = action->run(self->handle, operands);
    }
    pthread_mutex_unlock(&self->lock);
    if (saved != NULL) {
        PyEval_RestoreThread(saved);
    }
    if (result == MI_SUCCESS) {
        return true;
    }
    if (why == NULL) {
        PyErr_Format(self->state->error, "%s failed: the connection to the MTA is broken",
                     action->call);
    }
    else if (self->handle == NULL) {
        PyErr_SetString(self->state->error, why);
    }
    else if (strcmp(why, "was not negotiated") == 0) {
        PyErr_Format(self->state->error, "%s: %s %s with the MTA", action->call,
                     action->needs_name, why);
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
    int result;

    do {
        int size = (int)Py_MIN(left, (Py_ssize_t)(MILTER_CHUNK_SIZE * 1024));
        result = smfi_replacebody(handle, from, size);
        from += size;
        left -= size;
    } while (result == MI_SUCCESS && left > 0);
    return result;
}

/* The value is copied under the lock: it stays libmilter's memory. */
typedef struct {
    char *name;
    char *copy;                   /* NULL where the macro is not defined; free() it */
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
                           l[7], l[8], l[9], l[10], l[11], l[12], l[13], l[14], l[15], l[16],
                           l[17], l[18], l[19], l[20], l[21], l[22], l[23], l[24], l[25], l[26],
                           l[27], l[28], l[29], l[30], l[31], (char *)NULL);
}

static int
run_nothing(SMFICTX *Py_UNUSED(handle), void *Py_UNUSED(operands))
{
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
static const Action action_setreply = {"smfi_setreply", ANY_CALLBACK, 0, NULL, false,
                                       run_setreply};
static const Action action_setsymlist = {"smfi_setsymlist", NEGOTIATE, 0, NULL, false,
                                         run_nothing};
#undef NEEDS

static char *
string_of(PyObject *bytes)
{
    return bytes == NULL ? NULL : PyBytes_AS_STRING(bytes);
}

/* Run an action on one or two checked strings; takes over both references.  `first` NULL means
 * that an exception is set; `second` may be NULL for none. */
static PyObject *
perform_strings(ContextObject *self, const Action *action, PyObject *first, PyObject *second,
                int index)
{
    bool done = false;

    if (first != NULL && !PyErr_Occurred()) {
        Strings strings = {string_of(first), string_of(second), index};
        done = perform(self, action, &strings);
    }
    Py_XDECREF(first);
    Py_XDECREF(second);
    if (!done) {
        return NULL;
    }
    Py_RETURN_NONE;
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
context_addheader(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"name", "value", "idx", NULL};
    PyObject *name, *value;
    int idx = -1;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OO|i:addheader", names, &name, &value,
                                     &idx)) {
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
context_chgheader(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"name", "idx", "value", NULL};
    PyObject *name, *value, *idx_object;
    int idx;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOO:chgheader", names, &name, &idx_object,
                                     &value)) {
        return NULL;
    }
    idx = (int)PyLong_AsLong(idx_object);
    if (idx == -1 && PyErr_Occurred()) {
        return NULL;
    }
    if (idx < 0) {
        refuse(self->state, "chgheader", "idx", "must not be negative", idx_object);
        return NULL;
    }
    name = header_name_argument(self->state, "chgheader", name);
    if (name != NULL) {
        value = value == Py_None ? NULL : header_value_argument(self->state, "chgheader", value);
    }
    return perform_strings(self, &action_chgheader, name, name == NULL ? NULL : value, idx);
}

PyDoc_STRVAR(addrcpt_doc,
"addrcpt($self, /, rcpt, params=None)\n--\n\n"
"Add a recipient to the envelope; only in the eom callback.\n\n"
"rcpt: the address, str or bytes.  params: ESMTP parameters, separated by spaces.\n\n"
"Raises InvalidArgument for a line break or NUL, error where ADDRCPT (with params:\n"
"ADDRCPT_PAR) was not negotiated.  libmilter: smfi_addrcpt, smfi_addrcpt_par.");

static PyObject *
context_addrcpt(ContextObject *self, PyObject *args, PyObject *keywords)
{
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
context_delrcpt(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"rcpt", NULL};
    PyObject *rcpt;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:delrcpt", names, &rcpt)) {
        return NULL;
    }
    rcpt = nonempty_line_argument(self->state, "delrcpt", "rcpt", rcpt);
    return perform_strings(self, &action_delrcpt, rcpt, NULL, 0);
}

PyDoc_STRVAR(chgfrom_doc,
"chgfrom($self, /, sender, params=None)\n--\n\n"
"Replace the envelope sender; only in the eom callback.\n\n"
"sender: the address, str or bytes.  params: ESMTP parameters, separated by spaces.\n\n"
"Raises InvalidArgument for a line break or NUL, error where CHGFROM was not\n"
"negotiated.  libmilter: smfi_chgfrom.");

static PyObject *
context_chgfrom(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"sender", "params", NULL};
    PyObject *sender, *params = Py_None;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O:chgfrom", names, &sender, &params)) {
        return NULL;
    }
    sender = nonempty_line_argument(self->state, "chgfrom", "sender", sender);
    if (sender != NULL) {
        params = params == Py_None ? NULL
                                   : line_argument(self->state, "chgfrom", "params", params);
    }
    return perform_strings(self, &action_chgfrom, sender, sender == NULL ? NULL : params, 0);
}

PyDoc_STRVAR(quarantine_doc,
"quarantine($self, /, reason)\n--\n\n"
"Have the MTA hold the message; only in the eom callback, and a verdict is still due.\n\n"
"reason: one line for the MTA's log, str or bytes, not empty.\n\n"
"Raises InvalidArgument for a line break or NUL, error where QUARANTINE was not\n"
"negotiated.  libmilter: smfi_quarantine.");

static PyObject *
context_quarantine(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"reason", NULL};
    PyObject *reason;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:quarantine", names, &reason)) {
        return NULL;
    }
    reason = nonempty_line_argument(self->state, "quarantine", "reason", reason);
    return perform_strings(self, &action_quarantine, reason, NULL, 0);
}

PyDoc_STRVAR(progress_doc,
"progress($self, /)\n--\n\n"
"Tell the MTA that the filter still works, so that it waits on; only in the eom callback.\n\n"
"Raises error where the connection is broken.  libmilter: smfi_progress.");

static PyObject *
context_progress(ContextObject *self, PyObject *Py_UNUSED(ignored))
{
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
context_replacebody(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"body", NULL};
    PyObject *body;
    Py_buffer buffer;
    bool done;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O:replacebody", names, &body)) {
        return NULL;
    }
    if (PyUnicode_Check(body)) {
        body = PyUnicode_AsEncodedString(body, "utf-8", "surrogateescape");
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
context_getsymval(ContextObject *self, PyObject *args, PyObject *keywords)
{
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
context_setreply(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"rcode", "xcode", "msg", NULL};
    PyObject *code = NULL, *enhanced = Py_None, *msg = Py_None, *head;
    PyObject *lines[MAX_REPLY_LINES] = {NULL};
    Reply reply = {0};
    Py_ssize_t given = PyTuple_GET_SIZE(args);
    bool done = false;

    head = PyTuple_GetSlice(args, 0, 3);
    if (head == NULL || !PyArg_ParseTupleAndKeywords(head, keywords, "O|OO:setreply", names, &code,
                                                     &enhanced, &msg)) {
        Py_XDECREF(head);
        return NULL;
    }
    if (given - 2 > MAX_REPLY_LINES) {
        refuse(self->state, "setreply", "msg", "a reply has at most 32 lines", args);
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
    }
    reply.code = PyBytes_AS_STRING(code);
    reply.enhanced = string_of(enhanced);
    done = perform(self, &action_setreply, &reply);
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

PyDoc_STRVAR(setsymlist_doc,
"setsymlist($self, /, stage, macros)\n--\n\n"
"Ask the MTA to send only these macros at a stage; only in the negotiate callback.\n\n"
"stage: M_CONNECT ... M_EOH.  macros: names separated by spaces, str or bytes.  Lists\n"
"for one stage are merged.  sendmail takes at most five.\n\n"
"Raises error where the MTA did not offer SETSYMLIST.  libmilter: smfi_setsymlist.");

/* Merge macros, a bytes object, into the list of a stage. */
static bool
merge_symlist(ContextObject *self, PyObject *stage, PyObject *macros)
{
    PyObject *names, *known;
    bool done = false;

    if (self->symlists == NULL && (self->symlists = PyDict_New()) == NULL) {
        return false;
    }
    names = PyObject_CallMethod(macros, "split", NULL);
    known = PyDict_GetItemWithError(self->symlists, stage);
    if (known != NULL) {
        Py_INCREF(known);
    }
    else if (!PyErr_Occurred() && (known = PyList_New(0)) != NULL &&
             PyDict_SetItem(self->symlists, stage, known) < 0) {
        Py_CLEAR(known);
    }
    if (names != NULL && known != NULL) {
        done = true;
        for (Py_ssize_t i = 0; done && i < PyList_GET_SIZE(names); i++) {
            PyObject *name = PyList_GET_ITEM(names, i);
            int there = PySequence_Contains(known, name);
            done = there >= 0 && (there == 1 || PyList_Append(known, name) == 0);
        }
    }
    Py_XDECREF(names);
    Py_XDECREF(known);
    return done;
}

static PyObject *
context_setsymlist(ContextObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"stage", "macros", NULL};
    PyObject *stage, *macros;
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
    done = perform(self, &action_setsymlist, NULL);
    if (done && (self->offered_actions & SMFIF_SETSYMLIST) == 0) {
        PyErr_SetString(self->state->error, "smfi_setsymlist: the MTA did not offer SETSYMLIST");
        done = false;
    }
    done = done && merge_symlist(self, stage, macros);
    Py_DECREF(macros);
    return done ? Py_NewRef(Py_None) : NULL;
}

static bool
still_open(ContextObject *self)
{
    if (self->handle == NULL) {
        PyErr_SetString(self->state->error, "bad context");
        return false;
    }
    return true;
}

PyDoc_STRVAR(setpriv_doc,
"setpriv($self, priv, /)\n--\n\n"
"Keep an object for this connection; returns the one that it replaces, or None.");

static PyObject *
context_setpriv(ContextObject *self, PyObject *priv)
{
    PyObject *old;

    if (!still_open(self)) {
        return NULL;
    }
    old = self->priv;
    self->priv = Py_NewRef(priv);
    return old != NULL ? old : Py_NewRef(Py_None);
}

PyDoc_STRVAR(getpriv_doc,
"getpriv($self, /)\n--\n\n"
"The object that setpriv() kept for this connection, or None.");

static PyObject *
context_getpriv(ContextObject *self, PyObject *Py_UNUSED(ignored))
{
    if (!still_open(self)) {
        return NULL;
    }
    return Py_NewRef(self->priv != NULL ? self->priv : Py_None);
}

#define KEYWORD_METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))context_##name, METH_VARARGS | METH_KEYWORDS, name##_doc}

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
    {"getpriv", (PyCFunction)context_getpriv, METH_NOARGS, getpriv_doc},
    {"progress", (PyCFunction)context_progress, METH_NOARGS, progress_doc},
    {"setpriv", (PyCFunction)context_setpriv, METH_O, setpriv_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef context_members[] = {
    {"actions", T_ULONG, offsetof(ContextObject, actions), READONLY,
     "The actions agreed with the MTA: ADDHDRS, CHGBODY, ..."},
    {"protocol", T_ULONG, offsetof(ContextObject, protocol), READONLY,
     "The protocol options agreed with the MTA: P_SKIP, P_NR_HDR, ..."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ContextObject, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(context_doc,
"The connection of an MTA, first argument of every callback.\n\n"
"Made by the module only.  After the close callback every method raises\n"
"error('bad context').");

static PyType_Slot context_slots[] = {
    {Py_tp_doc, (void *)context_doc},
    {Py_tp_methods, context_methods},
    {Py_tp_members, context_members},
    {Py_tp_traverse, context_traverse},
    {Py_tp_clear, context_clear},
    {Py_tp_dealloc, context_dealloc},
    {0, NULL},
};

static PyType_Spec context_spec = {
    .name = "milter.milterContext",
    .basicsize = sizeof(ContextObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC
#if PY_VERSION_HEX >= 0x030A0000
             | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE
#endif
    ,
    .slots = context_slots,
};

/* -------------------------------------------------- the listening socket */

/* Raise milter.error with an OSError as its cause. */
static int
raise_os_error(module_state *state, int code, const char *what, const char *where,
               const char *mend)
{
    PyObject *cause = PyObject_CallFunction(PyExc_OSError, "is", code, strerror(code));
    PyObject *error;

    if (cause == NULL) {
        return -1;
    }
    PyErr_Format(state->error, "%s %s: %s%s%s", what, where, strerror(code),
                 mend[0] != '\0' ? ": " : "", mend);
    error = take_exception();
    PyException_SetCause(error, cause);
    raise_exception(error);
    return -1;
}

/* What `conn` says, in libmilter's form [scheme:]rest. */
typedef struct {
    enum socket_kind kind;
    const char *rest;             /* a path, a descriptor, or a port */
    size_t port_size;
    const char *host;             /* after '@', or NULL */
} Address;

static bool
all_digits(const char *s, size_t size)
{
    return size > 0 && strspn(s, "0123456789") >= size;
}

static const char *
parse_inet(Address *address, char *advice, size_t advice_size)
{
    const char *rest = address->rest;
    const char *at = strchr(rest, '@');
    const char *colon = strrchr(rest, ':');
    size_t port = at != NULL ? (size_t)(at - rest) : strlen(rest);

    if (at == NULL && colon != NULL && all_digits(colon + 1, strlen(colon + 1))) {
        /* Postfix's order.  libmilter would take the digits at the start for the port. */
        snprintf(advice, advice_size, "that is the order of Postfix; it is written %s:%s@%.*s here",
                 address->kind == INET6_SOCKET || *rest == '[' ? "inet6" : "inet", colon + 1,
                 (int)Py_MIN(colon - rest, 200), rest);
        return advice;
    }
    if (port == 0) {
        return "the port is missing: inet:PORT or inet:PORT@HOST";
    }
    if (*rest >= '0' && *rest <= '9' &&
        (!all_digits(rest, port) || port > 5 || strtol(rest, NULL, 10) > 65535)) {
        return "the port must be a number up to 65535, or the name of a service";
    }
    if (at != NULL && at[1] == '\0') {
        return "the host after '@' is missing";
    }
    if (at != NULL && at[1] == '[' && at[strlen(at) - 1] != ']') {
        return "the ']' after the host is missing";
    }
    address->port_size = port;
    address->host = at != NULL ? at + 1 : NULL;
    return NULL;
}

/* Take a socket's description apart.  Returns why it is wrong, or NULL. */
static const char *
parse_conn(const char *conn, Address *address, char *advice, size_t advice_size)
{
    static const struct {
        const char *name;
        enum socket_kind kind;
    } schemes[] = {
        {"", UNIX_SOCKET},     {"unix", UNIX_SOCKET}, {"local", UNIX_SOCKET},
        {"inet", INET_SOCKET}, {"inet6", INET6_SOCKET}, {"fd", INHERITED_SOCKET},
    };
    const char *colon = strchr(conn, ':');
    size_t size = colon != NULL ? (size_t)(colon - conn) : 0;

    *address = (Address){.kind = NO_SOCKET, .rest = colon != NULL ? colon + 1 : conn};
    for (size_t i = 0; i < Py_ARRAY_LENGTH(schemes); i++) {
        if (size == strlen(schemes[i].name) && strncasecmp(conn, schemes[i].name, size) == 0) {
            address->kind = schemes[i].kind;
        }
    }
    switch (address->kind) {
    case NO_SOCKET:
        return "unknown scheme: use unix:PATH, inet:PORT@HOST, inet6:PORT@[ADDRESS] or fd:NUMBER";
    case UNIX_SOCKET:
        return *address->rest == '\0' ? "the path is missing" : NULL;
    case INHERITED_SOCKET:
        return all_digits(address->rest, strlen(address->rest)) ? NULL
                                                                : "fd: needs a number";
    default:
        return parse_inet(address, advice, advice_size);
    }
}

/* Call `visit` for every open descriptor until it returns true. */
static void
each_descriptor(bool (*visit)(int fd, void *arg), void *arg)
{
    DIR *directory = opendir("/dev/fd"); /* on Linux a link to /proc/self/fd */
    struct dirent *entry;
    struct rlimit limit;

    if (directory != NULL) {
        while ((entry = readdir(directory)) != NULL) {
            if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(directory) &&
                visit(atoi(entry->d_name), arg)) {
                break;
            }
        }
        closedir(directory);
    }
    else if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        for (int fd = 0; fd < (int)Py_MIN(limit.rlim_cur, 65536); fd++) {
            if (visit(fd, arg)) {
                break;
            }
        }
    }
}

static bool
is_listening(int fd)
{
    int listening = 0;
    socklen_t size = sizeof listening;

    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening;
}

/* libmilter does not say which descriptor it listens on: it is the listening socket that was
 * not there before. */
typedef struct {
    int known[64];
    int count;
    int found;
} ListenerSearch;

static bool
note_listener(int fd, void *arg)
{
    ListenerSearch *search = arg;

    if (search->count < (int)Py_ARRAY_LENGTH(search->known) && is_listening(fd)) {
        search->known[search->count++] = fd;
    }
    return false;
}

static bool
find_new_listener(int fd, void *arg)
{
    ListenerSearch *search = arg;

    if (!is_listening(fd)) {
        return false;
    }
    for (int i = 0; i < search->count; i++) {
        if (search->known[i] == fd) {
            return false;
        }
    }
    search->found = fd;
    return true;
}

/* libmilter keeps the reason of a failure to itself (it goes to syslog): find it out. */
static int
probe_bind(const struct sockaddr *address, socklen_t size)
{
    int on = 1, code = 0;
    int fd = socket(address->sa_family, SOCK_STREAM, 0);

    if (fd < 0) {
        return errno;
    }
    if (address->sa_family != AF_UNIX) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }
    if (bind(fd, address, size) < 0 || listen(fd, 1) < 0) {
        code = errno;
    }
    else if (address->sa_family == AF_UNIX) {
        unlink(((const struct sockaddr_un *)address)->sun_path);
    }
    close(fd);
    return code;
}

static const char *
how_to_mend(int code, enum socket_kind kind)
{
    switch (code) {
    case ENOENT:
        return "create the directory first";
    case ENOTDIR:
        return "a part of the path is no directory";
    case EACCES:
    case EPERM:
        return kind == UNIX_SOCKET ? "let the filter's user write to the directory"
                                   : "ports below 1024 need privileges";
    case EADDRINUSE:
        return kind == UNIX_SOCKET
                   ? "another filter may be running; opensocket(True) removes what it left behind"
                   : "another process listens there; end it or use another port";
    case EADDRNOTAVAIL:
        return "this host has no such address";
    case EROFS:
        return "the file system is read-only";
    case ENAMETOOLONG:
        return "use a shorter path";
    default:
        return "";
    }
}

static int
check_unix_path(module_state *state, const char *path)
{
    struct sockaddr_un address;
    struct stat status;

    if (strlen(path) + 2 > sizeof address.sun_path) {
        return raise_os_error(state, ENAMETOOLONG, "cannot open the unix socket", path,
                              how_to_mend(ENAMETOOLONG, UNIX_SOCKET));
    }
    if (stat(path, &status) == 0 && !S_ISSOCK(status.st_mode)) {
        return raise_os_error(state, EEXIST, "cannot open the unix socket", path,
                              "it is no socket and is left alone; use another path");
    }
    return 0;
}

static int
raise_unix_failure(module_state *state, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int code;

    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    code = probe_bind((struct sockaddr *)&address, sizeof address);
    return raise_os_error(state, code != 0 ? code : EIO, "cannot open the unix socket", path,
                          code != 0 ? how_to_mend(code, UNIX_SOCKET) : "see the system's log");
}

/* Resolve host and port as libmilter would, to say what is wrong with them. */
static int
raise_inet_failure(module_state *state, const Address *address)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *list = NULL;
    char port[64], host[NI_MAXHOST] = "";
    int code;

    hints.ai_family = address->kind == INET6_SOCKET ? AF_INET6 : AF_INET;
    snprintf(port, sizeof port, "%.*s", (int)address->port_size, address->rest);
    if (address->host != NULL) {
        size_t size = strlen(address->host);
        bool bracketed = address->host[0] == '[';
        snprintf(host, sizeof host, "%.*s", (int)(bracketed ? size - 2 : size),
                 address->host + bracketed);
    }
    if (!all_digits(port, strlen(port)) && getservbyname(port, "tcp") == NULL) {
        return raise_os_error(state, EINVAL, "cannot listen on", filter.conn,
                              "there is no TCP service of that name");
    }
    code = getaddrinfo(host[0] != '\0' ? host : NULL, port, &hints, &list);
    if (code != 0) {
        return raise_os_error(state, EADDRNOTAVAIL, "cannot listen on", filter.conn,
                              gai_strerror(code));
    }
    code = probe_bind(list->ai_addr, list->ai_addrlen);
    freeaddrinfo(list);
    return raise_os_error(state, code != 0 ? code : EIO, "cannot listen on", filter.conn,
                          code != 0 ? how_to_mend(code, address->kind) : "see the system's log");
}

/* Remember what was bound, so that at stop only that is removed, wherever the process is then. */
static void
note_unix_socket(const char *path)
{
    struct stat status;
    char directory[4096];

    if (path[0] == '/' || getcwd(directory, sizeof directory) == NULL) {
        filter.path = strdup(path);
    }
    else {
        size_t size = strlen(directory) + strlen(path) + 2;
        filter.path = malloc(size);
        if (filter.path != NULL) {
            snprintf(filter.path, size, "%s/%s", directory, path);
        }
    }
    if (filter.path != NULL && lstat(filter.path, &status) == 0) {
        filter.device = status.st_dev;
        filter.inode = status.st_ino;
    }
}

static int
open_socket(module_state *state, bool remove_old)
{
    ListenerSearch search = {.found = -1};
    Address address;
    char advice[300];
    int result, on = 1;

    (void)parse_conn(filter.conn, &address, advice, sizeof advice);
    if (address.kind == UNIX_SOCKET && check_unix_path(state, address.rest) < 0) {
        return -1;
    }
    if (address.kind == INHERITED_SOCKET && !is_listening(atoi(address.rest))) {
        return raise_os_error(state, ENOTSOCK, "cannot listen on", filter.conn,
                              "it must be a listening socket");
    }
    each_descriptor(note_listener, &search);
    Py_BEGIN_ALLOW_THREADS
    result = smfi_opensocket(remove_old);
    Py_END_ALLOW_THREADS
    if (result != MI_SUCCESS) {
        if (address.kind == UNIX_SOCKET) {
            return raise_unix_failure(state, address.rest);
        }
        if (address.kind == INHERITED_SOCKET) {
            return raise_os_error(state, EINVAL, "cannot listen on", filter.conn,
                                  "this libmilter does not know fd:");
        }
        return raise_inet_failure(state, &address);
    }
    filter.kind = address.kind;
    if (address.kind == INHERITED_SOCKET) {
        search.found = atoi(address.rest);
    }
    else {
        each_descriptor(find_new_listener, &search);
    }
    filter.listener = search.found;
    if (address.kind == UNIX_SOCKET) {
        note_unix_socket(address.rest);
    }
    else if (filter.listener >= 0) {
        /* libmilter writes a reply and each modification in a packet of its own; the second
         * would wait for the delayed acknowledgement of the first, 40 ms.  Connections take
         * the option over from the listening socket. */
        setsockopt(filter.listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    filter.phase = SOCKET_OPEN;
    return 0;
}

/* ---------------------------------------------------- the life of a filter
 *
 * main() runs libmilter's listener on a thread of its own and waits in poll() for a reason to
 * stop.  libmilter's own way to stop is not used: it cuts messages in progress, takes up to
 * five seconds and removes whatever then stands at the socket's path.  Instead:
 *
 *  1. The listening descriptor is replaced by one that nobody connects to, and the unix
 *     socket is removed if it is still ours.
 *  2. New messages are refused (451 4.3.2); those in progress may end, up to the deadline.
 *  3. The connections are shut down for reading.  libmilter still writes the replies that it
 *     owes, then sees the end of each connection and calls close.
 *  4. libmilter's threads stay asleep until the process ends; smfi_main() does not return.
 *
 * libmilter has a thread that waits for HUP, INT and TERM, which it blocks in its others.  The
 * kernel prefers the main thread of a process, where they are not blocked, so they arrive there:
 * in Python's handler if the application installed one, in on_stop_signal() otherwise.
 */

#define STOP_SIGNALS 3
static const int stop_signals[STOP_SIGNALS] = {SIGTERM, SIGINT, SIGHUP};
static struct sigaction previous_actions[STOP_SIGNALS];
static bool taken_signals[STOP_SIGNALS];

static void
on_stop_signal(int number)
{
    int none = 0;

    atomic_compare_exchange_strong(&filter.signal, &none, number);
    atomic_store(&filter.stop_wanted, true);
    wake_main();
}

/* May we take this signal?  Yes where nobody else cares: the default action, or Python's own
 * handler of SIGINT, which raises KeyboardInterrupt. */
static bool
is_default_action(int number, const struct sigaction *action)
{
    PyObject *module, *handler = NULL, *theirs = NULL;
    bool is_default;

    if (action->sa_handler == SIG_DFL) {
        return true;
    }
    if (action->sa_handler == SIG_IGN || number != SIGINT) {
        return false;
    }
    module = PyImport_ImportModule("signal");
    if (module != NULL) {
        handler = PyObject_CallMethod(module, "getsignal", "i", number);
        theirs = PyObject_GetAttrString(module, "default_int_handler");
    }
    is_default = handler != NULL && handler == theirs;
    PyErr_Clear();
    Py_XDECREF(module);
    Py_XDECREF(handler);
    Py_XDECREF(theirs);
    return is_default;
}

static void
take_signals(void)
{
    struct sigaction action = {.sa_handler = on_stop_signal, .sa_flags = SA_RESTART};

    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < STOP_SIGNALS; i++) {
        struct sigaction *previous = &previous_actions[i];
        taken_signals[i] = sigaction(stop_signals[i], NULL, previous) == 0 &&
                           is_default_action(stop_signals[i], previous) &&
                           sigaction(stop_signals[i], &action, NULL) == 0;
    }
}

/* Also runs in a forked child, so only async-signal-safe calls. */
static void
give_back_signals(void)
{
    struct sigaction current;

    for (size_t i = 0; i < STOP_SIGNALS; i++) {
        if (taken_signals[i] && sigaction(stop_signals[i], NULL, &current) == 0 &&
            current.sa_handler == on_stop_signal) {
            sigaction(stop_signals[i], &previous_actions[i], NULL);
        }
        taken_signals[i] = false;
    }
}

static bool
in_main_thread(void)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading == NULL ? NULL
                                         : PyObject_CallMethod(threading, "main_thread", NULL);
    PyObject *ident = thread == NULL ? NULL : PyObject_GetAttrString(thread, "ident");
    bool same = ident != NULL && PyLong_Check(ident) &&
                PyLong_AsUnsignedLong(ident) == PyThread_get_thread_ident();

    PyErr_Clear();
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    return same;
}

static bool
stop_is_wanted(void)
{
    return atomic_load(&filter.stop_wanted) || atomic_load(&filter.listener_ended);
}

static bool
messages_are_done(void)
{
    return atomic_load(&filter.messages) == 0;
}

static bool
contexts_are_closed(void)
{
    return atomic_load(&filter.created) == atomic_load(&filter.deleted);
}

static bool
gate_is_empty(void)
{
    return atomic_load(&filter.inside) == 0;
}

static int
milliseconds_until(double deadline)
{
    double left = deadline - monotonic_now();

    return left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1;
}

/* Wait until `done`, or for the deadline (< 0: none).  Python's signal handlers run meanwhile;
 * what they raise stops the filter. */
static bool
wait_until(module_state *state, bool (*done)(void), double deadline)
{
    char drop[64];

    while (!done()) {
        int timeout = deadline < 0 ? -1 : milliseconds_until(deadline);
        struct pollfd wait = {.fd = filter.pipe[0], .events = POLLIN};
        if (timeout == 0) {
            return false;
        }
        Py_BEGIN_ALLOW_THREADS
        if (poll(&wait, 1, timeout) > 0) {
            while (read(filter.pipe[0], drop, sizeof drop) > 0) {
            }
        }
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            stop_with_exception(state);
        }
    }
    return true;
}

/* Python's own C handler of signals writes to this descriptor: a signal whose handler is in
 * Python wakes main() whichever thread it arrives on.  Returns the one before, or -1. */
static int
set_wakeup_fd(int fd)
{
    PyObject *module = PyImport_ImportModule("signal");
    PyObject *function = NULL, *args = NULL, *keywords = NULL, *old = NULL;
    int before = -1;

    if (module != NULL && (function = PyObject_GetAttrString(module, "set_wakeup_fd")) != NULL &&
        (args = Py_BuildValue("(i)", fd)) != NULL &&
        (keywords = Py_BuildValue("{sO}", "warn_on_full_buffer", Py_False)) != NULL &&
        (old = PyObject_Call(function, args, keywords)) != NULL) {
        before = (int)PyLong_AsLong(old);
    }
    PyErr_Clear();                /* the application's descriptor may be closed by now */
    Py_XDECREF(old);
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(function);
    Py_XDECREF(module);
    return before;
}

/* A listening socket that nobody can know of: libmilter's listener sleeps on it for good. */
static int
open_dummy_listener(void)
{
#ifdef __linux__
    struct sockaddr_storage address = {.ss_family = AF_UNIX};
    socklen_t size = sizeof address.ss_family; /* autobind: a random abstract name */
#else
    struct sockaddr_storage address = {.ss_family = AF_INET};
    socklen_t size = sizeof(struct sockaddr_in);
    ((struct sockaddr_in *)&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
#endif
    int fd = socket(address.ss_family, SOCK_STREAM, 0);

    if (fd < 0) {
        return -1;
    }
    if (bind(fd, (struct sockaddr *)&address, size) < 0 || listen(fd, 1) < 0 ||
        fcntl(fd, F_SETFL, O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* poll() in libmilter's listener keeps the old socket alive until it returns: make it.  A
 * socket that was inherited may be shared with other processes; it is left as it is. */
static void
wake_listener(int old, struct sockaddr_storage *name, socklen_t size)
{
    int fd;

    if (filter.kind == UNIX_SOCKET) {
        shutdown(old, SHUT_RD);
    }
    else if (filter.kind != INHERITED_SOCKET) {
        struct sockaddr_in *in = (struct sockaddr_in *)name;
        struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)name;
        if (in->sin_family == AF_INET && in->sin_addr.s_addr == htonl(INADDR_ANY)) {
            in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        }
        if (in6->sin6_family == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&in6->sin6_addr)) {
            in6->sin6_addr = in6addr_loopback;
        }
        fd = socket(name->ss_family, SOCK_STREAM, 0);
        if (fd >= 0) {
            fcntl(fd, F_SETFL, O_NONBLOCK);
            (void)!connect(fd, (struct sockaddr *)name, size);
            close(fd);
        }
    }
}

static void
remove_unix_socket(void)
{
    struct stat status;

    if (filter.path != NULL && lstat(filter.path, &status) == 0 && S_ISSOCK(status.st_mode) &&
        status.st_dev == filter.device && status.st_ino == filter.inode) {
        unlink(filter.path);
    }
    free(filter.path);
    filter.path = NULL;
}

/* The connections that were accepted from the listening socket have its address for their own. */
typedef struct {
    struct sockaddr_storage name;
    socklen_t size;
} Local;

static bool
same_local_address(const Local *local, const struct sockaddr_storage *other)
{
    if (local->name.ss_family != other->ss_family) {
        return false;
    }
    if (other->ss_family == AF_UNIX) {
        return strncmp(((const struct sockaddr_un *)&local->name)->sun_path,
                       ((const struct sockaddr_un *)other)->sun_path,
                       sizeof((struct sockaddr_un *)0)->sun_path) == 0;
    }
    /* The port is at the same place for both families; the host may have been a wildcard. */
    return ((const struct sockaddr_in *)&local->name)->sin_port ==
           ((const struct sockaddr_in *)other)->sin_port;
}

static bool
end_reading(int fd, void *arg)
{
    struct sockaddr_storage name = {0};
    socklen_t size = sizeof name;
    int own = dup(fd);            /* the number may be used anew while we look at it */

    if (own >= 0) {
        if (getsockname(own, (struct sockaddr *)&name, &size) == 0 && !is_listening(own) &&
            same_local_address(arg, &name)) {
            shutdown(own, SHUT_RD);
        }
        close(own);
    }
    return false;
}

static void
stop_listening(Local *local)
{
    int dummy, old;

    local->size = sizeof local->name;
    if (atomic_load(&filter.listener_ended) || filter.listener < 0 ||
        getsockname(filter.listener, (struct sockaddr *)&local->name, &local->size) < 0) {
        remove_unix_socket();
        return;
    }
    old = filter.kind == UNIX_SOCKET ? dup(filter.listener) : -1;
    dummy = open_dummy_listener();
    if (dummy >= 0 && dup2(dummy, filter.listener) >= 0) {
        struct sockaddr_storage target = local->name;
        fcntl(filter.listener, F_SETFD, FD_CLOEXEC);
        wake_listener(old, &target, local->size);
    }
    remove_unix_socket();         /* while our socket lives, nobody else has its inode */
    if (dummy >= 0) {
        close(dummy);
    }
    if (old >= 0) {
        close(old);
    }
}

/* Steps 1 to 3 of the comment above. */
static void
drain(module_state *state)
{
    double deadline = monotonic_now() + filter.drain_seconds;
    Local local = {0};

    atomic_store(&filter.draining, true);
    stop_listening(&local);
    if (!wait_until(state, messages_are_done, deadline)) {
        log_record("warning",
                   PyUnicode_FromFormat("stopped with %ld messages still in progress after %d s",
                                        atomic_load(&filter.messages), (int)filter.drain_seconds),
                   NULL);
    }
    if (local.size > 0) {
        each_descriptor(end_reading, &local);
    }
    wait_until(state, contexts_are_closed, monotonic_now() + CLOSE_SECONDS);
}

static void *
run_libmilter(void *Py_UNUSED(arg))
{
    atomic_store(&filter.result, smfi_main());
    atomic_store(&filter.listener_ended, true);
    wake_main();
    return NULL;
}

/* libmilter's threads start with every signal blocked that a program handles; a thread that
 * comes to run a callback goes back to the mask of the one that called main(). */
static int
start_libmilter(module_state *state)
{
    pthread_t thread;
    pthread_attr_t attributes;
    sigset_t all;
    int code;

    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &filter.mask);
    code = pthread_create(&thread, &attributes, run_libmilter, NULL);
    pthread_sigmask(SIG_SETMASK, &filter.mask, NULL);
    pthread_attr_destroy(&attributes);
    if (code != 0) {
        return raise_os_error(state, code, "cannot start", "libmilter's thread", "");
    }
    return 0;
}

static int
open_pipe(module_state *state)
{
    static bool hooked;

    if (filter.pipe[0] < 0) {
        if (pipe(filter.pipe) < 0) {
            return raise_os_error(state, errno, "cannot create", "a pipe", "");
        }
        for (int i = 0; i < 2; i++) {
            fcntl(filter.pipe[i], F_SETFL, O_NONBLOCK);
            fcntl(filter.pipe[i], F_SETFD, FD_CLOEXEC);
        }
    }
    if (!hooked) {
        hooked = pthread_key_create(&thread_key, give_back_thread_state) == 0 &&
                 pthread_atfork(NULL, NULL, give_back_signals) == 0;
    }
    return 0;
}

/* Registered with atexit: the interpreter goes, libmilter's threads stay.  A filter that runs
 * on another thread drains first; then nobody enters Python any more. */
static PyObject *
close_gate(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = PyModule_GetState(module);
    double deadline = monotonic_now() + filter.drain_seconds + CLOSE_SECONDS + 1;

    if (filter.phase == RUNNING) {
        atomic_store(&filter.stop_wanted, true);
        while (filter.phase == RUNNING && monotonic_now() < deadline) {
            wake_main();
            Py_BEGIN_ALLOW_THREADS
            usleep(5000);         /* main() has the pipe; it is not for two readers */
            Py_END_ALLOW_THREADS
        }
    }
    atomic_store(&filter.gate_closed, true);
    wait_until(state, gate_is_empty, monotonic_now() + 1);
    Py_RETURN_NONE;
}

/* Registered with os.register_at_fork: the child's signals are not the parent's business. */
static PyObject *
leave_wakeup_fd(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    if (filter.wakeup_set) {
        filter.wakeup_set = false;
        set_wakeup_fd(-1);
    }
    Py_RETURN_NONE;
}

/* Have the interpreter call us when it exits, and in the children that it forks. */
static int
hook_interpreter(PyObject *module, module_state *state)
{
    PyObject *atexit, *os, *function, *hook = NULL, *keywords = NULL, *done = NULL;

    if (state->hooked) {
        return 0;
    }
    atexit = PyImport_ImportModule("atexit");
    os = PyImport_ImportModule("os");
    hook = os == NULL ? NULL : PyObject_GetAttrString(os, "register_at_fork");
    function = PyObject_GetAttrString(module, "_leave_wakeup_fd");
    keywords = function == NULL ? NULL : Py_BuildValue("{sN}", "after_in_child", function);
    function = PyObject_GetAttrString(module, "_close_gate");
    if (atexit != NULL && hook != NULL && keywords != NULL && function != NULL) {
        PyObject *none = PyTuple_New(0);
        done = none == NULL ? NULL : PyObject_Call(hook, none, keywords);
        Py_XDECREF(none);
        Py_XSETREF(done, done == NULL ? NULL
                                      : PyObject_CallMethod(atexit, "register", "O", function));
    }
    state->hooked = done != NULL;
    Py_XDECREF(atexit);
    Py_XDECREF(os);
    Py_XDECREF(hook);
    Py_XDECREF(keywords);
    Py_XDECREF(function);
    Py_XDECREF(done);
    return state->hooked ? 0 : -1;
}

static void
warn_of_few_descriptors(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < COMFORTABLE_FILES) {
        log_record("warning",
                   PyUnicode_FromFormat("the limit of open files is %d; each connection of the MTA "
                                        "takes one, and libmilter spins when none is left",
                                        (int)limit.rlim_cur),
                   NULL);
    }
}

/* Take a signal's action that was put off until the filter had drained. */
static void
take_put_off_action(void)
{
    int number = atomic_load(&filter.signal);

    if (number != 0) {
        kill(getpid(), number);
    }
}

/* From a running libmilter to a drained one. */
static void
run_filter(module_state *state)
{
    bool main_thread = in_main_thread();
    int wakeup = -1;

    take_signals();
    if (main_thread) {
        wakeup = set_wakeup_fd(filter.pipe[1]);
        filter.wakeup_set = true;
    }
    wait_until(state, stop_is_wanted, -1);
    drain(state);
    if (main_thread) {
        filter.wakeup_set = false;
        set_wakeup_fd(wakeup);
    }
    give_back_signals();
    filter.phase = STOPPED;
    if (!main_thread) {
        take_put_off_action();
    }
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
    if (filter.phase == RUNNING) {
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

static PyObject *
milter_main(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    module_state *state = state_of(module);

    if (filter.phase == RUNNING) {
        return out_of_order(module, "main", "it runs already; there is one filter to a process");
    }
    if (filter.phase == STOPPED) {
        return out_of_order(module, "main",
                            "libmilter cannot start again in a process where it was stopped");
    }
    if (state->name == NULL || filter.conn == NULL) {
        return out_of_order(module, "main",
                            state->name == NULL ? "call register() first" : "call setconn() first");
    }
    if (atomic_load(&filter.stop_wanted)) {
        filter.phase = STOPPED;
        remove_unix_socket();
        Py_RETURN_NONE;
    }
    if ((filter.phase != SOCKET_OPEN && open_socket(state, false) < 0) || open_pipe(state) < 0 ||
        hook_interpreter(module, state) < 0) {
        return NULL;
    }
    warn_of_few_descriptors();
    filter.interpreter = PyThreadState_GetInterpreter(PyThreadState_Get());
    filter.phase = RUNNING;
    if (start_libmilter(state) < 0) {
        filter.phase = SOCKET_OPEN;
        return NULL;
    }
    run_filter(state);
    if (state->raised != NULL) {
        PyObject *raised = state->raised;
        state->raised = NULL;
        raise_exception(raised);
        return NULL;
    }
    if (atomic_load(&filter.listener_ended) && atomic_load(&filter.result) != MI_SUCCESS) {
        PyErr_SetString(state->error, "smfi_main failed; libmilter wrote the reason to syslog");
        return NULL;
    }
    if (PyErr_CheckSignals() < 0) {
        return NULL;              /* a handler that take_put_off_action() called for */
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
    wake_main();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(register_doc,
"register($module, /, name, unknown=..., data=..., negotiate=...)\n--\n\n"
"Tell libmilter the name of the filter; before opensocket() and main().\n\n"
"name: one line, str; it appears in replies and in the system's log.  unknown, data,\n"
"negotiate: set these callbacks, or remove them by None; one left out stays as it is.\n\n"
"Raises error while the filter runs.  libmilter: smfi_register.");

static int
set_given_callback(module_state *state, enum stage stage, PyObject *value)
{
    if (value == NULL) {
        return 0;
    }
    if (value != Py_None && !PyCallable_Check(value)) {
        PyErr_Format(PyExc_TypeError, "the %s callback must be callable or None, not %.100s",
                     stages[stage].name, Py_TYPE(value)->tp_name);
        return -1;
    }
    Py_XSETREF(state->callbacks[stage], value == Py_None ? NULL : Py_NewRef(value));
    return 0;
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
    static char *names[] = {"name", "unknown", "data", "negotiate", NULL};
    module_state *state = state_of(module);
    PyObject *name, *unknown = NULL, *data = NULL, *negotiate = NULL;
    char *copy;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|OOO:register", names, &name, &unknown,
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
    if (set_given_callback(state, UNKNOWN, unknown) < 0 ||
        set_given_callback(state, DATA, data) < 0 ||
        set_given_callback(state, NEGOTIATE, negotiate) < 0) {
        free(copy);
        return NULL;
    }
    free(state->name);
    state->name = copy;
    if (describe_filter(copy) != MI_SUCCESS) {
        return out_of_order(module, "smfi_register", "the header and the library of libmilter "
                                                     "are of different versions");
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(setconn_doc,
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
    Address address;
    const char *why;
    char advice[300];
    char *copy;

    if (filter.phase != SETTING_UP) {
        return out_of_order(module, "setconn", "the socket is open already");
    }
    if (!PyUnicode_FSConverter(value, &bytes)) {
        if (PyErr_ExceptionMatches(PyExc_ValueError)) {
            PyErr_Clear();
            refuse(state, "setconn", "name", "must not hold NUL", value);
        }
        return NULL;
    }
    why = parse_conn(PyBytes_AS_STRING(bytes), &address, advice, sizeof advice);
    if (why != NULL) {
        refuse(state, "setconn", "name", why, value);
        Py_DECREF(bytes);
        return NULL;
    }
    copy = strdup(PyBytes_AS_STRING(bytes));
    Py_DECREF(bytes);
    if (copy == NULL || smfi_setconn(copy) != MI_SUCCESS) {
        free(copy);
        return PyErr_NoMemory();
    }
    free(filter.conn);
    filter.conn = copy;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(opensocket_doc,
"opensocket($module, rmsock, /)\n--\n\n"
"Open the socket now, so that it can be given its mode before main().\n\n"
"rmsock: whether to remove a unix socket that was left at the path; nothing but a\n"
"socket is ever removed.\n\n"
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
    if (filter.phase != SETTING_UP) {
        return out_of_order(module, "opensocket", "the socket is open already");
    }
    if (state->name == NULL || filter.conn == NULL) {
        return out_of_order(module, "opensocket",
                            state->name == NULL ? "call register() first" : "call setconn() first");
    }
    if (open_socket(state, remove_old) < 0) {
        return NULL;
    }
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
               least > 0 ? "must be positive" : "must not be negative", value);
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

PyDoc_STRVAR(setdbg_doc,
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

    if (size < 0) {
        return NULL;
    }
    return PyLong_FromSize_t(smfi_setmaxdatasize((size_t)size));
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
    filter.drain_seconds = seconds;
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

PyDoc_STRVAR(set_exception_policy_doc,
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

PyDoc_STRVAR(getversion_doc,
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

PyDoc_STRVAR(getdiag_doc,
"getdiag($module, /)\n--\n\n"
"Counters of this process: (contexts created, contexts deleted, messages in progress,\n"
"threads of libmilter in Python now).");

static PyObject *
milter_getdiag(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return Py_BuildValue("(kkll)", atomic_load(&filter.created), atomic_load(&filter.deleted),
                         atomic_load(&filter.messages), atomic_load(&filter.inside));
}

#define CALLBACK_SETTER(name, STAGE, arguments)                                                 \
    PyDoc_STRVAR(set_##name##_callback_doc,                                                     \
                 "set_" #name "_callback($module, callback, /)\n--\n\n"                         \
                 "Set what is called for this step, as callback(" arguments "), or None for\n"  \
                 "nothing.  Returns the callback that it replaces, or None.  It takes effect\n" \
                 "at once, for what the MTA was asked to send.");                               \
    static PyObject *milter_set_##name##_callback(PyObject *module, PyObject *callback)         \
    {                                                                                           \
        return replace_callback(module, STAGE, callback);                                       \
    }

static PyObject *
replace_callback(PyObject *module, enum stage stage, PyObject *callback)
{
    module_state *state = state_of(module);
    PyObject *old = Py_XNewRef(state->callbacks[stage]);

    if (set_given_callback(state, stage, callback) < 0) {
        Py_XDECREF(old);
        return NULL;
    }
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

#define FUNCTION(name, flags) {#name, (PyCFunction)(void (*)(void))milter_##name, flags, name##_doc}

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
    {"_close_gate", close_gate, METH_NOARGS, NULL},
    {"_leave_wakeup_fd", leave_wakeup_fd, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* -------------------------------------------------------------- constants */

static const struct {
    const char *name;
    unsigned long value;
} constants[] = {
    {"VERSION", SMFI_VERSION},
    {"PROT_VERSION", SMFI_PROT_VERSION},
    {"SUCCESS", MI_SUCCESS},
    /* verdicts */
    {"CONTINUE", SMFIS_CONTINUE},
    {"REJECT", SMFIS_REJECT},
    {"DISCARD", SMFIS_DISCARD},
    {"ACCEPT", SMFIS_ACCEPT},
    {"TEMPFAIL", SMFIS_TEMPFAIL},
    {"NOREPLY", SMFIS_NOREPLY},
    {"SKIP", SMFIS_SKIP},
    {"ALL_OPTS", SMFIS_ALL_OPTS},
    /* actions */
    {"F_NONE", SMFIF_NONE},
    {"ADDHDRS", SMFIF_ADDHDRS},
    {"CHGBODY", SMFIF_CHGBODY},
    {"MODBODY", SMFIF_MODBODY},
    {"ADDRCPT", SMFIF_ADDRCPT},
    {"DELRCPT", SMFIF_DELRCPT},
    {"CHGHDRS", SMFIF_CHGHDRS},
    {"QUARANTINE", SMFIF_QUARANTINE},
    {"CHGFROM", SMFIF_CHGFROM},
    {"ADDRCPT_PAR", SMFIF_ADDRCPT_PAR},
    {"SETSYMLIST", SMFIF_SETSYMLIST},
    {"V1_ACTS", SMFI_V1_ACTS},
    {"V2_ACTS", SMFI_V2_ACTS},
    {"CURR_ACTS", SMFI_CURR_ACTS},
    /* stages that macros belong to */
    {"M_CONNECT", SMFIM_CONNECT},
    {"M_HELO", SMFIM_HELO},
    {"M_ENVFROM", SMFIM_ENVFROM},
    {"M_ENVRCPT", SMFIM_ENVRCPT},
    {"M_DATA", SMFIM_DATA},
    {"M_EOM", SMFIM_EOM},
    {"M_EOH", SMFIM_EOH},
    /* protocol: steps that the MTA need not send */
    {"P_NOCONNECT", SMFIP_NOCONNECT},
    {"P_NOHELO", SMFIP_NOHELO},
    {"P_NOMAIL", SMFIP_NOMAIL},
    {"P_NORCPT", SMFIP_NORCPT},
    {"P_NOBODY", SMFIP_NOBODY},
    {"P_NOHDRS", SMFIP_NOHDRS},
    {"P_NOEOH", SMFIP_NOEOH},
    {"P_NOUNKNOWN", SMFIP_NOUNKNOWN},
    {"P_NODATA", SMFIP_NODATA},
    /* protocol: steps that the MTA waits for no reply to */
    {"P_NR_CONN", SMFIP_NR_CONN},
    {"P_NR_HELO", SMFIP_NR_HELO},
    {"P_NR_MAIL", SMFIP_NR_MAIL},
    {"P_NR_RCPT", SMFIP_NR_RCPT},
    {"P_NR_DATA", SMFIP_NR_DATA},
    {"P_NR_UNKN", SMFIP_NR_UNKN},
    {"P_NR_HDR", SMFIP_NR_HDR},
    {"P_NOHREPL", SMFIP_NOHREPL},
    {"P_NR_EOH", SMFIP_NR_EOH},
    {"P_NR_BODY", SMFIP_NR_BODY},
    /* protocol: what else may be agreed */
    {"P_SKIP", SMFIP_SKIP},
    {"P_RCPT_REJ", SMFIP_RCPT_REJ},
    {"P_HDR_LEADSPC", SMFIP_HDR_LEADSPC},
#ifdef SMFIP_MDS_256K
    {"P_MDS_256K", SMFIP_MDS_256K},
#endif
#ifdef SMFIP_MDS_1M
    {"P_MDS_1M", SMFIP_MDS_1M},
#endif
    {"V1_PROT", SMFI_V1_PROT},
    {"V2_PROT", SMFI_V2_PROT},
    {"CURR_PROT", SMFI_CURR_PROT},
    {"CHUNK_SIZE", MILTER_CHUNK_SIZE},
    {"MAX_DATA_SIZE", MILTER_MAX_DATA_SIZE},
};

static int
add_constants(PyObject *module)
{
    for (size_t i = 0; i < Py_ARRAY_LENGTH(constants); i++) {
        PyObject *value = PyLong_FromUnsignedLong(constants[i].value);
        if (value == NULL || PyModule_AddObject(module, constants[i].name, value) < 0) {
            Py_XDECREF(value);
            return -1;
        }
    }
    return PyModule_AddIntConstant(module, "FAILURE", MI_FAILURE);
}

/* ------------------------------------------------------ module definition */

PyDoc_STRVAR(module_doc,
"Mail filters on sendmail's libmilter: the functions and constants of <libmilter/mfapi.h>.\n\n"
"Most filters use the package Milter, which is built on this.");

PyDoc_STRVAR(error_doc,
"What libmilter, or a call out of order, fails with.");

PyDoc_STRVAR(invalid_argument_doc,
"A value that is refused before libmilter sees it: both an error and a ValueError.");

static int
add_exceptions(PyObject *module, module_state *state)
{
    PyObject *bases;

    state->error = PyErr_NewExceptionWithDoc("milter.error", error_doc, NULL, NULL);
    if (state->error == NULL) {
        return -1;
    }
    bases = PyTuple_Pack(2, state->error, PyExc_ValueError);
    if (bases == NULL) {
        return -1;
    }
    state->invalid_argument =
        PyErr_NewExceptionWithDoc("milter.InvalidArgument", invalid_argument_doc, bases, NULL);
    Py_DECREF(bases);
    if (state->invalid_argument == NULL ||
        PyModule_AddObject(module, "error", Py_NewRef(state->error)) < 0 ||
        PyModule_AddObject(module, "InvalidArgument", Py_NewRef(state->invalid_argument)) < 0) {
        return -1;
    }
    return 0;
}

static int
milter_exec(PyObject *module)
{
    module_state *state = state_of(module);
    PyObject *type;

    if (filter.state != NULL) {
        PyErr_SetString(PyExc_ImportError,
                        "milter can be loaded once in a process: libmilter is one to a process");
        return -1;
    }
    state->policy = SMFIS_TEMPFAIL;
    state->agreed = PyDict_New();
    type = PyType_FromModuleAndSpec(module, &context_spec, NULL);
    if (state->agreed == NULL || type == NULL || add_exceptions(module, state) < 0 ||
        add_constants(module) < 0) {
        return -1;
    }
    state->context_type = (PyTypeObject *)type;
#if PY_VERSION_HEX < 0x030A0000
    state->context_type->tp_new = NULL; /* no Py_TPFLAGS_DISALLOW_INSTANTIATION yet */
#endif
    if (PyModule_AddObject(module, "milterContext", Py_NewRef(type)) < 0) {
        return -1;
    }
    filter.state = state;
    return 0;
}

static int
milter_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = state_of(module);

    Py_VISIT(state->error);
    Py_VISIT(state->invalid_argument);
    Py_VISIT(state->context_type);
    Py_VISIT(state->agreed);
    Py_VISIT(state->raised);
    for (int i = 0; i < STAGES; i++) {
        Py_VISIT(state->callbacks[i]);
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
    Py_CLEAR(state->agreed);
    Py_CLEAR(state->raised);
    for (int i = 0; i < STAGES; i++) {
        Py_CLEAR(state->callbacks[i]);
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
    {0, NULL},
};

static struct PyModuleDef milter_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "milter",
    .m_doc = module_doc,
    .m_size = sizeof(module_state),
    .m_methods = milter_functions,
    .m_slots = milter_slots,
    .m_traverse = milter_traverse,
    .m_clear = milter_clear,
    .m_free = milter_free,
};

PyMODINIT_FUNC
PyInit_milter(void)
{
    return PyModuleDef_Init(&milter_module);
}
