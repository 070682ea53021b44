/* The forms of callbacks that get bytes: they decode and call the form that gets text.
 *
 * They are the methods of a class from which Milter.Base inherits, so that a filter may
 * override them or assign to them like any method; where it does not, there is no Python
 * frame between libmilter and the application's own callback.
 */

#include "decoder.h"

#include "call.h"

/* The values of a call on their way; args[0] is room for vectorcall, args[1] the filter object. */
typedef struct {
    PyObject *stack[STACK_ARGS];
    PyObject **args;
    Py_ssize_t count; /* of owned references, from args[2] on */
} Decoded;

static bool
make_room(Decoded *decoded, Py_ssize_t count)
{
    decoded->count = 0;
    decoded->args = decoded->stack;
    if (count + 2 > STACK_ARGS) {
        decoded->args = PyMem_New(PyObject *, (size_t)count + 2);
        if (decoded->args == NULL) {
            PyErr_NoMemory();
            return false;
        }
    }
    return true;
}

static void
drop_values(Decoded *decoded, Py_ssize_t keep)
{
    while (decoded->count > keep) {
        Py_DECREF(decoded->args[1 + decoded->count--]);
    }
}

static bool
decode_values(Decoded *decoded, PyObject *const *values, Py_ssize_t count, const char *errors)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *text = PyBytes_Check(values[i])
                             ? PyUnicode_DecodeUTF8(PyBytes_AS_STRING(values[i]),
                                                    PyBytes_GET_SIZE(values[i]), errors)
                             : PyUnicode_FromEncodedObject(values[i], "utf-8", errors);
        if (text == NULL) {
            return false;
        }
        decoded->args[2 + decoded->count++] = text;
    }
    return true;
}

static void
keep_values(Decoded *decoded, PyObject *const *values, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        decoded->args[2 + decoded->count++] = Py_NewRef(values[i]);
    }
}

/* By the strategy of @decode: "bytes" passes them through, "strict" does so where one of them
 * is not UTF-8, anything else is a codec's error handler. */
static bool
decode_by(Decoded *decoded, PyObject *strategy, PyObject *const *values, Py_ssize_t count)
{
    const char *errors = PyUnicode_AsUTF8(strategy);
    Py_ssize_t before = decoded->count;

    if (errors == NULL) {
        return false;
    }
    if (strcmp(errors, "bytes") == 0) {
        keep_values(decoded, values, count);
        return true;
    }
    if (decode_values(decoded, values, count, errors)) {
        return true;
    }
    if (strcmp(errors, "strict") != 0 || !PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) {
        return false;
    }
    PyErr_Clear();
    drop_values(decoded, before);
    keep_values(decoded, values, count);
    return true;
}

/* The strategy of each callback is worked out when it is first needed, as subclasses and instances
 * may replace the method, and kept in an attribute of the object; None stands for not yet. */
static const char *const strategies[] = {"_envfrom_errors", "_envrcpt_errors", "_header_errors"};

/* Which strategy a callback asks for is an attribute of the function; it is set by @decode. */
#define DECODE_MARK "error_strategy"
#define DEFAULT_STRATEGY "surrogateescape"

static PyObject *
work_out_strategy(PyObject *self, PyObject *callback, PyObject *kept_in)
{
    PyObject *method = PyObject_GetAttr(self, callback);
    PyObject *strategy = method == NULL ? NULL : PyObject_GetAttrString(method, DECODE_MARK);

    if (method != NULL && strategy == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        strategy = PyUnicode_FromString(DEFAULT_STRATEGY);
    }
    Py_XDECREF(method);
    if (strategy != NULL && PyObject_SetAttr(self, kept_in, strategy) < 0) {
        Py_CLEAR(strategy);
    }
    return strategy;
}

static PyObject *
strategy_of(PyObject *self, PyObject *callback, PyObject *kept_in)
{
    PyObject *strategy = PyObject_GetAttr(self, kept_in);

    if (strategy == Py_None) {
        Py_SETREF(strategy, work_out_strategy(self, callback, kept_in));
    }
    if (strategy != NULL && !PyUnicode_Check(strategy)) {
        PyErr_Format(PyExc_TypeError, "the decoding strategy must be str, not %.100s",
                     Py_TYPE(strategy)->tp_name);
        Py_CLEAR(strategy);
    }
    return strategy;
}

/* Call `callback` of the filter object with `values`, those after the first `as_is` decoded. */
static PyObject *
call_text_form(PyObject *self, enum name callback, enum name kept_in, PyObject *const *values,
               Py_ssize_t count, Py_ssize_t as_is)
{
    PyObject **names_of, *strategy, *result = NULL;
    Decoded decoded;

    if (active_module == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the module milter is gone");
        return NULL;
    }
    names_of = active_module->names;
    strategy = strategy_of(self, names_of[callback], names_of[kept_in]);
    if (strategy == NULL || !make_room(&decoded, count)) {
        Py_XDECREF(strategy);
        return NULL;
    }
    decoded.args[1] = self;
    keep_values(&decoded, values, as_is);
    if (decode_by(&decoded, strategy, values + as_is, count - as_is)) {
        result =
            PyObject_VectorcallMethod(names_of[callback], decoded.args + 1,
                                      ((size_t)count + 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    }
    drop_values(&decoded, 0);
    if (decoded.args != decoded.stack) {
        PyMem_Free(decoded.args);
    }
    Py_DECREF(strategy);
    return result;
}

PyDoc_STRVAR(envfrom_bytes_doc, "envfrom_bytes($self, /, *b)\n--\n\n"
                                "Decode what came with MAIL and call ``envfrom``.\n\n"
                                "Override it, or assign to it, to get bytes.\n\n"
                                "Args:\n"
                                "    b: the sender and the ESMTP parameters.\n\n"
                                "Returns:\n"
                                "    The verdict of ``envfrom``.");

static PyObject *
envfrom_bytes(PyObject *self, PyObject *const *values, Py_ssize_t count)
{
    return call_text_form(self, ENVFROM_NAME, ENVFROM_ERRORS, values, count, 0);
}

PyDoc_STRVAR(envrcpt_bytes_doc, "envrcpt_bytes($self, /, *b)\n--\n\n"
                                "Decode what came with RCPT and call ``envrcpt``.\n\n"
                                "Override it, or assign to it, to get bytes.\n\n"
                                "Args:\n"
                                "    b: the recipient and the ESMTP parameters.\n\n"
                                "Returns:\n"
                                "    The verdict of ``envrcpt``.");

static PyObject *
envrcpt_bytes(PyObject *self, PyObject *const *values, Py_ssize_t count)
{
    return call_text_form(self, ENVRCPT_NAME, ENVRCPT_ERRORS, values, count, 0);
}

PyDoc_STRVAR(header_bytes_doc,
             "header_bytes($self, /, fld, val)\n--\n\n"
             "Decode a header's value and call ``header``.\n\n"
             "Override it, or assign to it (``self.header_bytes = self.header``), to get bytes.\n\n"
             "Args:\n"
             "    fld: the header's name.\n"
             "    val: its value.\n\n"
             "Returns:\n"
             "    The verdict of ``header``.");

/* The name and the value of a header, whichever way they are passed. */
static bool
header_arguments(PyObject *const *values, Py_ssize_t count, PyObject *keywords, PyObject *pair[2])
{
    static const char *const parameters[] = {"fld", "val"};
    Py_ssize_t named = keywords == NULL ? 0 : PyTuple_GET_SIZE(keywords);
    bool right = count + named == 2;

    for (Py_ssize_t i = 0; right && i < 2; i++) {
        pair[i] = i < count ? values[i] : NULL;
        for (Py_ssize_t k = 0; pair[i] == NULL && k < named; k++) {
            if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, k), parameters[i]) ==
                0) {
                pair[i] = values[count + k];
            }
        }
        right = pair[i] != NULL;
    }
    if (!right) {
        PyErr_SetString(PyExc_TypeError, "header_bytes() takes two arguments, fld and val");
    }
    return right;
}

static PyObject *
header_bytes(PyObject *self, PyObject *const *values, Py_ssize_t count, PyObject *keywords)
{
    PyObject *pair[2];

    if (!header_arguments(values, count, keywords, pair)) {
        return NULL;
    }
    return call_text_form(self, HEADER_NAME, HEADER_ERRORS, pair, 2, 1);
}

#define BYTES_FORM(name, flags)                                                                    \
    {                                                                                              \
#name, (PyCFunction)(void (*)(void))name, flags, name##_doc                                \
    }

static PyMethodDef decoder_methods[] = {
    BYTES_FORM(envfrom_bytes, METH_FASTCALL),
    BYTES_FORM(envrcpt_bytes, METH_FASTCALL),
    BYTES_FORM(header_bytes, METH_FASTCALL | METH_KEYWORDS),
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(decoder_doc,
             "What Milter.Base inherits: callbacks that decode and call their text form.");

static PyType_Slot decoder_slots[] = {
    {Py_tp_doc, (void *)decoder_doc},
    {Py_tp_methods, decoder_methods},
    {0, NULL},
};

static PyType_Spec decoder_spec = {
    .name = "milter._Decoder",
    .basicsize = sizeof(PyObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = decoder_slots,
};

PyObject *
make_decoder_type(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &decoder_spec, NULL);

    for (size_t i = 0; type != NULL && i < Py_ARRAY_LENGTH(strategies); i++) {
        if (PyObject_SetAttrString(type, strategies[i], Py_None) < 0) {
            Py_CLEAR(type);
        }
    }
    return type;
}
