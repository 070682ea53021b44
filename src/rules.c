/* The rules that stand in for the connection of an MTA asks: what the context object and the way
 * out of a callback check, and what they say, without a connection.  Private to the package. */

#include "rules.h"

#include <string.h>

#include "actions.h"
#include "arguments.h"
#include "reply.h"
#include "verdict.h"

typedef PyObject *(*Check)(module_state *state, const char *call, const char *argument,
                           PyObject *value);

/* (call, argument, value) -> bytes */
static PyObject *
check_argument(PyObject *module, PyObject *args, Check check)
{
    const char *call, *argument;
    PyObject *value;

    if (!PyArg_ParseTuple(args, "ssO", &call, &argument, &value)) {
        return NULL;
    }
    return check(PyModule_GetState(module), call, argument, value);
}

/* _text(call, argument, value): as it goes to the MTA, in bytes. */
PyObject *
check_text(PyObject *module, PyObject *args)
{
    return check_argument(module, args, text_argument);
}

/* _line(call, argument, value): likewise, on one line. */
PyObject *
check_line(PyObject *module, PyObject *args)
{
    return check_argument(module, args, line_argument);
}

/* _nonempty_line(call, argument, value) */
PyObject *
check_nonempty_line(PyObject *module, PyObject *args)
{
    return check_argument(module, args, nonempty_line_argument);
}

/* _header_name(call, value) */
PyObject *
check_header_name(PyObject *module, PyObject *args)
{
    const char *call;
    PyObject *value;

    if (!PyArg_ParseTuple(args, "sO", &call, &value)) {
        return NULL;
    }
    return header_name_argument(PyModule_GetState(module), call, value);
}

/* _header_value(call, value) */
PyObject *
check_header_value(PyObject *module, PyObject *args)
{
    const char *call;
    PyObject *value;

    if (!PyArg_ParseTuple(args, "sO", &call, &value)) {
        return NULL;
    }
    return header_value_argument(PyModule_GetState(module), call, value);
}

/* _header_index(call, value, below_zero) */
PyObject *
check_header_index(PyObject *module, PyObject *args)
{
    const char *call;
    PyObject *value;
    int below_zero, index;

    if (!PyArg_ParseTuple(args, "sOp:_header_index", &call, &value, &below_zero) ||
        !header_index_argument(PyModule_GetState(module), call, value, below_zero, &index)) {
        return NULL;
    }
    return PyLong_FromLong(index);
}

/* _symlist(stage, macros): the list of setsymlist(), in bytes. */
PyObject *
check_symlist(PyObject *module, PyObject *args)
{
    PyObject *stage, *macros;
    int number;

    if (!PyArg_ParseTuple(args, "O!O:_symlist", &PyLong_Type, &stage, &macros)) {
        return NULL;
    }
    return symlist_argument(PyModule_GetState(module), stage, macros, &number);
}

/* _check_reply(rcode, xcode=None, msg=None, *more): the arguments of setreply() -> (code, enhanced
 * code or None, lines), in bytes.  A warning names the line that called the caller. */
PyObject *
check_reply(PyObject *module, PyObject *args, PyObject *keywords)
{
    Reply reply;
    PyObject *lines = NULL, *checked = NULL;

    if (parse_reply(PyModule_GetState(module), args, keywords, 2, &reply)) {
        lines = PyList_New(0);
    }
    for (int i = 0; lines != NULL && i < reply.count; i++) {
        PyObject *line = PyBytes_FromString(reply.lines[i]);
        if (line == NULL || PyList_Append(lines, line) < 0) {
            Py_CLEAR(lines);
        }
        Py_XDECREF(line);
    }
    if (lines != NULL) {
        checked = Py_BuildValue("(yyN)", reply.code, reply.enhanced, lines);
    }
    free_reply(&reply);
    return checked;
}

/* The stage of a callback by its name in the extension, or OUTSIDE with an exception set. */
static enum stage
stage_of(const char *name)
{
    for (int i = 0; i < STAGES; i++) {
        if (strcmp(stages[i].name, name) == 0) {
            return i;
        }
    }
    PyErr_Format(PyExc_ValueError, "no callback of that name: %s", name);
    return OUTSIDE;
}

/* _steps() -> {callback: (P_NR_*, P_NO*, whether it belongs to a message)} */
PyObject *
list_steps(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    PyObject *steps = PyDict_New();

    for (int i = 0; steps != NULL && i < STAGES; i++) {
        PyObject *step = Py_BuildValue("(kkO)", stages[i].no_reply, stages[i].leave_out,
                                       stages[i].in_message ? Py_True : Py_False);
        if (step == NULL || PyDict_SetItemString(steps, stages[i].name, step) < 0) {
            Py_CLEAR(steps);
        }
        Py_XDECREF(step);
    }
    return steps;
}

/* _check_moment(call, step, actions): may libmilter's `call` be made in that callback, None for
 * outside of any, with these actions agreed? */
PyObject *
check_action(PyObject *module, PyObject *args)
{
    const char *call, *name;
    unsigned long agreed;
    enum stage stage = OUTSIDE;

    if (!PyArg_ParseTuple(args, "szk:_check_moment", &call, &name, &agreed)) {
        return NULL;
    }
    if (name != NULL) {
        stage = stage_of(name);
        if (stage == OUTSIDE) {
            return NULL;
        }
    }
    return check_moment(PyModule_GetState(module), call, stage, agreed) ? Py_NewRef(Py_None) : NULL;
}

/* _verdict(step, result, protocol): what the MTA gets for what a callback returned; NOREPLY where
 * no reply is due, CONTINUE where nobody reads it. */
PyObject *
check_verdict(PyObject *module, PyObject *args)
{
    const char *name;
    PyObject *result;
    unsigned long protocol;
    enum stage stage;
    int verdict = SMFIS_CONTINUE;

    if (!PyArg_ParseTuple(args, "sOk:_verdict", &name, &result, &protocol)) {
        return NULL;
    }
    stage = stage_of(name);
    if (stage == OUTSIDE) {
        return NULL;
    }
    if (stage != ABORT && stage != CLOSE) {
        verdict = parse_verdict(PyModule_GetState(module), stage, protocol, result);
        if (verdict < 0) {
            return NULL;
        }
    }
    return PyLong_FromLong((protocol & stages[stage].no_reply) != 0 ? SMFIS_NOREPLY : verdict);
}

/* _ends_message(step, verdict): does it end the message for this filter? */
PyObject *
check_ends_message(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name;
    int verdict;
    enum stage stage;

    if (!PyArg_ParseTuple(args, "si:_ends_message", &name, &verdict)) {
        return NULL;
    }
    stage = stage_of(name);
    return stage == OUTSIDE ? NULL : PyBool_FromLong(ends_message(stage, verdict));
}

/* _sends_reply(step, verdict, rcode): does the reply go out with the verdict? */
PyObject *
check_sends_reply(PyObject *Py_UNUSED(module), PyObject *args)
{
    const char *name, *code;
    int verdict;
    enum stage stage;

    if (!PyArg_ParseTuple(args, "sis:_sends_reply", &name, &verdict, &code)) {
        return NULL;
    }
    stage = stage_of(name);
    return stage == OUTSIDE ? NULL : PyBool_FromLong(sends_reply(stage, verdict, code[0]));
}
