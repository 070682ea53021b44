#include "arguments.h"

#include <limits.h>
#include <string.h>

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

PyObject *
encode_text(module_state *state, const char *call, const char *argument, PyObject *value)
{
    PyObject *bytes = PyUnicode_AsEncodedString(value, "utf-8", "surrogateescape");

    if (bytes == NULL && PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
        PyErr_Clear();
        refuse(state, call, argument, "cannot be encoded, as it holds a lone surrogate", value);
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

/* An index as a long, or the nearest there is.  False with TypeError set where it is no int. */
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

bool
header_index_argument(module_state *state, const char *call, PyObject *value, bool below_zero,
                      int *index)
{
    const char *rule = NULL;
    long number;

    if (!index_argument(value, &number)) {
        return false;
    }
    if (number < 0 && !below_zero) {
        rule = "must not be negative";
    }
    else if (number > INT_MAX) {
        rule = "must fit into 32 bits";
    }
    *index = (int)Py_MAX(number, -1);
    return rule == NULL || refuse(state, call, "idx", rule, value) == 0;
}

PyObject *
symlist_argument(module_state *state, PyObject *stage, PyObject *macros, int *number)
{
    long given = PyLong_AsLong(stage);

    if (given < SMFIM_FIRST || given > SMFIM_LAST) {
        PyErr_Clear();
        refuse(state, "setsymlist", "stage", "must be one of M_CONNECT to M_EOH", stage);
        return NULL;
    }
    *number = (int)given;
    return line_argument(state, "setsymlist", "macros", macros);
}

long
setting_argument(module_state *state, const char *call, const char *argument, PyObject *value,
                 long least)
{
    long number = PyLong_AsLong(value);

    if (number == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (number < least || number > INT_MAX) {
        return refuse(state, call, argument,
                      number > INT_MAX ? "must fit into 32 bits"
                      : least > 0      ? "must be positive"
                                       : "must not be negative",
                      value);
    }
    return number;
}
