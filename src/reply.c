#include "reply.h"

#include <string.h>

#include "arguments.h"

#define MAX_REPLY_LINE 980 /* bytes; libmilter.h: MAXREPLYLEN */

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

/* Keep what a part of the reply points into.  NULL where there is none, as an exception is set. */
static char *
own(Reply *reply, PyObject *bytes)
{
    if (bytes == NULL) {
        return NULL;
    }
    reply->owned[reply->owned_count++] = bytes;
    return PyBytes_AS_STRING(bytes);
}

static bool
parse_code(module_state *state, PyObject *value, Reply *reply)
{
    reply->code = own(reply, text_argument(state, "setreply", "rcode", value));
    if (reply->code == NULL) {
        return false;
    }
    if (!is_reply_code(reply->code)) {
        refuse(state, "setreply", "rcode", "must be three digits, the first 4 or 5", value);
        return false;
    }
    return true;
}

static bool
parse_enhanced_code(module_state *state, PyObject *value, int stack_level, Reply *reply)
{
    if (value == Py_None) {
        return true;
    }
    reply->enhanced = own(reply, text_argument(state, "setreply", "xcode", value));
    if (reply->enhanced == NULL) {
        return false;
    }
    if (!is_enhanced_code(reply->enhanced)) {
        refuse(state, "setreply", "xcode", "must have the form of '5.7.1'", value);
        return false;
    }
    return reply->enhanced[0] == reply->code[0] ||
           PyErr_WarnFormat(PyExc_RuntimeWarning, stack_level,
                            "setreply: the class of the enhanced code %s is not that of %s",
                            reply->enhanced, reply->code) == 0;
}

static bool
parse_line(module_state *state, PyObject *value, Reply *reply)
{
    PyObject *bytes;

    if (value == Py_None) {
        return true;
    }
    bytes = reply_line_argument(state, value);
    reply->lines[reply->count] = own(reply, bytes);
    if (bytes == NULL) {
        return false;
    }
    reply->count++;
    reply->size += strlen("550-5.7.100 \r\n") + (size_t)PyBytes_GET_SIZE(bytes);
    return true;
}

/* (rcode, xcode=None, msg=None, *more): the first three may be given by name. */
bool
parse_reply(module_state *state, PyObject *args, PyObject *keywords, int stack_level, Reply *reply)
{
    static char *names[] = {"rcode", "xcode", "msg", NULL};
    PyObject *code, *enhanced = Py_None, *msg = Py_None;
    PyObject *head = PyTuple_GetSlice(args, 0, 3);
    Py_ssize_t more = Py_MAX(PyTuple_GET_SIZE(args) - 3, 0);
    bool parsed = head != NULL && PyArg_ParseTupleAndKeywords(head, keywords, "O|OO:setreply",
                                                              names, &code, &enhanced, &msg);

    *reply = (Reply){.size = 1};
    if (parsed && more >= MAX_REPLY_LINES) {
        PyErr_Format(state->invalid_argument,
                     "setreply: msg: a reply has at most 32 lines: %zd were given", more + 1);
        parsed = false;
    }
    parsed = parsed && parse_code(state, code, reply) &&
             parse_enhanced_code(state, enhanced, stack_level, reply) &&
             parse_line(state, msg, reply);
    for (Py_ssize_t i = 0; parsed && i < more; i++) {
        parsed = parse_line(state, PyTuple_GET_ITEM(args, 3 + i), reply);
    }
    Py_XDECREF(head); /* whose items `args` and `keywords` have too */
    return parsed;
}

void
free_reply(Reply *reply)
{
    while (reply->owned_count > 0) {
        Py_DECREF(reply->owned[--reply->owned_count]);
    }
}
