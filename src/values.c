/* Between C and Python: text, exceptions, the checks of arguments, addresses, log records. */

#include "milter.h"

void
wake_main(void)
{
    int saved = errno; /* also called from signal handlers */

    if (filter.pipe[1] >= 0 && write(filter.pipe[1], "", 1) < 0) {
        /* A full pipe wakes as well; nothing else can be done from here. */
    }
    errno = saved;
}

/* How long messages in progress may take after a stop. */
double
drain_seconds(void)
{
    return atomic_load(&filter.drain_ms) / 1000.0;
}

double
monotonic_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* ------------------------------------------------------------------- text */

/* Take the current exception, with its traceback attached. */
PyObject *
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
void
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
PyObject *
text_from(const char *s, size_t size)
{
    return PyUnicode_DecodeUTF8(s, (Py_ssize_t)size, "surrogateescape");
}

/* Refuse an argument: InvalidArgument("CALL: ARGUMENT: RULE: VALUE"), the value cut short. */
int
refuse(module_state *state, const char *call, const char *argument, const char *rule,
       PyObject *value)
{
    bool plain = PyUnicode_CheckExact(value) || PyBytes_CheckExact(value);
    PyObject *part = plain ? PySequence_GetSlice(value, 0, 80) : Py_NewRef(value);
    PyObject *shown = part == NULL ? NULL : PyObject_Repr(part);

    Py_XDECREF(part);
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

/* Text on its way to libmilter: bytes, owned. */
PyObject *
encode_text(module_state *state, const char *call, const char *argument, PyObject *value)
{
    PyObject *bytes = PyUnicode_AsEncodedString(value, "utf-8", "surrogateescape");

    if (bytes == NULL && PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
        PyErr_Clear();
        refuse(state, call, argument, "holds a surrogate that stands for no byte", value);
    }
    return bytes;
}

PyObject *
text_argument(module_state *state, const char *call, const char *argument, PyObject *value)
{
    PyObject *bytes;

    if (PyUnicode_Check(value)) {
        bytes = encode_text(state, call, argument, value);
    }
    else if (PyBytes_CheckExact(value)) {
        bytes = Py_NewRef(value);
    }
    else if (PyBytes_Check(value)) { /* without the methods of a subclass */
        bytes = PyBytes_FromStringAndSize(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
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
PyObject *
line_argument(module_state *state, const char *call, const char *argument, PyObject *value)
{
    PyObject *bytes = text_argument(state, call, argument, value);

    if (bytes != NULL && strpbrk(PyBytes_AS_STRING(bytes), "\r\n") != NULL) {
        refuse(state, call, argument, "must not hold CR or LF", value);
        Py_CLEAR(bytes);
    }
    return bytes;
}

PyObject *
nonempty_line_argument(module_state *state, const char *call, const char *argument, PyObject *value)
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
PyObject *
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
PyObject *
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

/* What logging takes as exc_info; an exception alone may be false by its own __bool__. */
static PyObject *
info_of(PyObject *exception)
{
    PyObject *traceback = PyException_GetTraceback(exception);
    PyObject *info =
        PyTuple_Pack(3, Py_TYPE(exception), exception, traceback != NULL ? traceback : Py_None);

    Py_XDECREF(traceback);
    return info;
}

/* Write a record to the logger `milter`.  Never leaves an exception behind: it is called where
 * nobody could handle one; sys.exit() in a handler of the log stops the filter, as in a callback.
 * `exception` may be NULL. */
void
log_record(const char *method, PyObject *message, PyObject *exception)
{
    PyObject *logging = NULL, *logger = NULL, *log = NULL, *args = NULL, *keywords = NULL;
    PyObject *info = NULL, *done = NULL;

    if (message != NULL && (logging = PyImport_ImportModule("logging")) != NULL &&
        (logger = PyObject_CallMethod(logging, "getLogger", "s", "milter")) != NULL &&
        (log = PyObject_GetAttrString(logger, method)) != NULL &&
        (args = Py_BuildValue("(sO)", "%s", message)) != NULL &&
        (keywords = PyDict_New()) != NULL &&
        (exception == NULL || ((info = info_of(exception)) != NULL &&
                               PyDict_SetItemString(keywords, "exc_info", info) == 0))) {
        done = PyObject_Call(log, args, keywords);
    }
    if (done == NULL && !PyErr_ExceptionMatches(PyExc_Exception)) {
        stop_with_exception(filter.state);
    }
    else if (done == NULL) {
        PyErr_WriteUnraisable(message);
    }
    Py_XDECREF(done);
    Py_XDECREF(info);
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(log);
    Py_XDECREF(logger);
    Py_XDECREF(logging);
    Py_XDECREF(message); /* taken over from the caller */
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
PyObject *
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
