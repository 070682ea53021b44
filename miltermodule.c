/* The extension module `milter`: mail filters in Python on sendmail's libmilter.
 *
 * An engine talks to the MTA (Postfix or sendmail) and calls one C function for each step of the
 * SMTP dialogue, which becomes the call of a Python object; the methods of the context object
 * become calls of the engine:
 *
 *     wire -> engine -> trampoline -> begin() -> callback -> finish() -> engine -> wire
 *
 * Here are the module's functions and its definition.  The rest is in src/, by floors: a file
 * includes headers of lower floors and of its own, never of a higher one
 * (tests/packaging/test_includes.py).
 *
 *   0  clock, stages, wake, descriptors, signal_sets, process: what needs no Python; common
 *   1  text, arguments, reply, report, constants, socket_name; engine.h: the seam
 *   2  engine/: who speaks to the MTA
 *   3  threads, turns, crew, metrics, context, observer, actions: connections and what is done to a
 *      message
 *   4  verdict, failure, call, negotiate, trampolines, decoder, rules: a callback's way in and out
 *   5  signals, socket, workers, lifecycle: from main() to the end of the process
 *
 * The authority for every smfi_ call is libmilter's manual (package sendmail-doc) and
 * <libmilter/mfapi.h>.
 */

#include "common.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "actions.h"
#include "arguments.h"
#include "call.h"
#include "constants.h"
#include "context.h"
#include "decoder.h"
#include "engine/choice.h"
#include "lifecycle.h"
#include "metrics.h"
#include "observer.h"
#include "process.h"
#include "rules.h"
#include "signals.h"
#include "socket.h"
#include "socket_name.h"
#include "threads.h"
#include "trampolines.h"
#include "turns.h"
#include "workers.h"

/* ------------------------------------------------------ module functions */

static module_state *
state_of(PyObject *module)
{
    return PyModule_GetState(module);
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
    return run_main(module) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(stop_doc,
             "stop($module, /)\n--\n\n"
             "Ask main() to stop the filter; from any thread, callback or signal handler.\n\n"
             "Returns at once.  Before main() it makes main() return at once.");

static PyObject *
milter_stop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    ask_all_to_stop();
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

/* Give the engine its filter under a new name, which is taken over where that succeeds.  False with
 * an exception set. */
static bool
rename_filter(module_state *state, char *name)
{
    struct smfiDesc description = describe_filter(name);
    char *old = NULL;
    bool running, done = false;

    LOCK_STATE();
    running = is_running(); /* by another thread, meanwhile */
    if (!running) {
        old = state->name;
        done = set_up_engines(&description, &engine_hooks) == MI_SUCCESS;
        state->name = done ? name : NULL;
    }
    UNLOCK_STATE();
    free(old);
    if (running) {
        out_of_order(state, "register", "not while main() runs");
    }
    else if (!done) {
        out_of_order(state, "smfi_register",
                     "the header and the library of libmilter are of different versions");
    }
    return done;
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
        !check_not_running(state, "register")) {
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
        !may_be_callback(NEGOTIATE, negotiate) || !rename_filter(state, copy)) {
        free(copy);
        return NULL;
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
    PyObject *name;
    bool may_set, done = false;

    if (!is_setting_up()) {
        return refuse_setting_up(state, "setconn");
    }
    name = socket_name_argument(state, value);
    if (name == NULL) {
        return NULL;
    }
    LOCK_STATE();
    may_set = is_setting_up(); /* another thread may have opened it meanwhile */
    if (may_set) {
        done = set_socket_name(PyBytes_AS_STRING(name));
    }
    UNLOCK_STATE();
    Py_DECREF(name);
    if (!may_set) {
        return refuse_setting_up(state, "setconn");
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
    int remove_old = PyObject_IsTrue(value);

    if (remove_old < 0 || open_before_main(state_of(module), remove_old) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    set_engine_doc,
    "set_engine($module, name, /)\n--\n\n"
    "Choose who speaks to the MTA, until the socket is open: 'libmilter', the default, or\n"
    "'native', which is faster; for the filter both are the same.  Without a call it is what\n"
    "the environment variable PYMILTER_ENGINE says.\n\n"
    "Raises InvalidArgument for another name; error once the socket is open.");

static PyObject *
milter_set_engine(PyObject *module, PyObject *value)
{
    module_state *state = state_of(module);
    const char *name;
    bool may_choose, known = false;

    if (!PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "set_engine: name must be a str, not %.100s",
                     Py_TYPE(value)->tp_name);
        return NULL;
    }
    name = PyUnicode_AsUTF8(value);
    if (name == NULL && !PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) {
        return NULL;
    }
    PyErr_Clear();
    LOCK_STATE();
    may_choose = is_setting_up();
    if (may_choose) {
        known = name != NULL && choose_engine(name);
    }
    UNLOCK_STATE();
    if (!may_choose) {
        return refuse_setting_up(state, "set_engine");
    }
    if (!known) {
        refuse(state, "set_engine", "name", "must be " ENGINE_NAMES, value);
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(settimeout_doc,
             "settimeout($module, seconds, /)\n--\n\n"
             "How long the filter waits for the MTA before it gives a connection up; 0: as short\n"
             "as can be, which is a second with our own engine; by default 7210 s.  libmilter:\n"
             "smfi_settimeout.");

static PyObject *
milter_settimeout(PyObject *module, PyObject *value)
{
    long seconds = setting_argument(state_of(module), "settimeout", "seconds", value, 0);

    if (seconds < 0) {
        return NULL;
    }
    set_engines_timeout((int)seconds);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(setbacklog_doc,
             "setbacklog($module, n, /)\n--\n\n"
             "How many connections may wait to be accepted, from 1.  libmilter: smfi_setbacklog.");

static PyObject *
milter_setbacklog(PyObject *module, PyObject *value)
{
    long n = setting_argument(state_of(module), "setbacklog", "n", value, 1);

    if (n < 0) {
        return NULL;
    }
    set_engines_backlog((int)n);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    setdbg_doc,
    "setdbg($module, level, /)\n--\n\n"
    "How much libmilter prints of what it does: 0 (nothing) to 6.  libmilter: smfi_setdbg.");

static PyObject *
milter_setdbg(PyObject *module, PyObject *value)
{
    long level = setting_argument(state_of(module), "setdbg", "level", value, 0);

    if (level < 0) {
        return NULL;
    }
    set_engines_dbg((int)level);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(setmaxdatasize_doc,
             "setmaxdatasize($module, size, /)\n--\n\n"
             "The largest packet, in bytes, that is taken from the MTA; returns the former limit.\n"
             "libmilter: smfi_setmaxdatasize.");

static PyObject *
milter_setmaxdatasize(PyObject *module, PyObject *value)
{
    long size = setting_argument(state_of(module), "setmaxdatasize", "size", value, 1);
    size_t old;

    if (size < 0) {
        return NULL;
    }
    LOCK_STATE();
    set_packet_limit((size_t)size);
    old = set_engines_maxdatasize((size_t)size);
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
    set_drain_timeout((int)(seconds * 1000));
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_flags_doc,
             "set_flags($module, flags, /)\n--\n\n"
             "The actions that the filter wants: ADDHDRS, CHGBODY, ..., joined by '|'.\n\n"
             "They count where there is no negotiate callback, as far as the MTA offers them.");

static PyObject *
milter_set_flags(PyObject *module, PyObject *value)
{
    long flags = setting_argument(state_of(module), "set_flags", "flags", value, 0);

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

    if (engine->version(&major, &minor, &patch) != MI_SUCCESS) {
        return out_of_order(state_of(module), "smfi_version", "failed");
    }
    return Py_BuildValue("(III)", major, minor, patch);
}

PyDoc_STRVAR(
    getdiag_doc,
    "getdiag($module, /)\n--\n\n"
    "Counters of this process: a tuple of two, (contexts created, contexts deleted), that has\n"
    "four by name: .created, .deleted, .messages (in progress now) and .inside (threads of\n"
    "libmilter that are in Python now).");

/* A tuple of two as far as its length goes, as applications unpack it. */
static PyStructSequence_Field diagnostics_fields[] = {
    {"created", "contexts created"},
    {"deleted", "contexts deleted"},
    {"messages", "messages in progress"},
    {"inside", "threads of libmilter in Python now"},
    {NULL, NULL},
};

static PyStructSequence_Desc diagnostics_desc = {"milter._Diagnostics", "What getdiag() returns.",
                                                 diagnostics_fields, 2};

static PyObject *
milter_getdiag(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    Census census = take_census();
    PyObject *values[4], *diagnostics = PyStructSequence_New(state_of(module)->diagnostics_type);

    if (diagnostics == NULL) {
        return NULL;
    }
    values[0] = PyLong_FromUnsignedLong(census.created);
    values[1] = PyLong_FromUnsignedLong(census.deleted);
    values[2] = PyLong_FromLong(census.messages);
    values[3] = PyLong_FromLong(threads_inside());
    for (int i = 0; i < 4; i++) {
        PyStructSequence_SetItem(diagnostics, i, values[i]);
    }
    if (PyErr_Occurred()) {
        Py_CLEAR(diagnostics);
    }
    return diagnostics;
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
    FUNCTION(set_engine, METH_O),
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
    {"_share_socket", share_open_socket, METH_O, NULL},
    {"_end_sharing", end_sharing, METH_NOARGS, NULL},
    {"_listening_socket", duplicate_listener, METH_NOARGS, NULL},
    {"_accepts", accepts_connections, METH_NOARGS, NULL},
    {"_is_stopped", tell_if_stopped, METH_NOARGS, NULL},
    {"_is_running", tell_if_running, METH_NOARGS, NULL},
    {"_leave_signals", leave_signals, METH_O, NULL},
    {"_forget_stop", forget_stop, METH_NOARGS, NULL},
    {"_stop_with", stop_with, METH_O, NULL},
    {"_when_serving", when_serving, METH_O, NULL},
    {"_note_coroutines", note_coroutines, METH_O, NULL},
    {"_attend", attend, METH_O, NULL},
    {"_take_turn", take_turn, METH_NOARGS, NULL},
    {"_dismiss", dismiss_loop, METH_NOARGS, NULL},
    {"_hand_over", hand_over_socket, METH_O, NULL},
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
    {"_observe", set_observer, METH_O, NULL},
    {"_parse_socket", parse_socket, METH_VARARGS, NULL},
    {"_text", check_text, METH_VARARGS, NULL},
    {"_line", check_line, METH_VARARGS, NULL},
    {"_nonempty_line", check_nonempty_line, METH_VARARGS, NULL},
    {"_header_name", check_header_name, METH_VARARGS, NULL},
    {"_header_value", check_header_value, METH_VARARGS, NULL},
    {"_check_reply", (PyCFunction)(void (*)(void))check_reply, METH_VARARGS | METH_KEYWORDS, NULL},
    {"_header_index", check_header_index, METH_VARARGS, NULL},
    {"_symlist", check_symlist, METH_VARARGS, NULL},
    {"_steps", list_steps, METH_NOARGS, NULL},
    {"_check_moment", check_action, METH_VARARGS, NULL},
    {"_verdict", check_verdict, METH_VARARGS, NULL},
    {"_ends_message", check_ends_message, METH_VARARGS, NULL},
    {"_sends_reply", check_sends_reply, METH_VARARGS, NULL},
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
    state->diagnostics_type = PyStructSequence_NewType(&diagnostics_desc);
    if (add_object(module, "_Diagnostics", (PyObject *)state->diagnostics_type) < 0) {
        return -1;
    }
    decoder = make_decoder_type(module);
    result = add_object(module, "_Decoder", decoder);
    Py_XDECREF(decoder);
    return result;
}

static int
milter_exec(PyObject *module)
{
    module_state *state = state_of(module);

    if (PyInterpreterState_Get() != PyInterpreterState_Main() || is_running()) {
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
        add_constants(module) < 0 ||
        PyModule_AddIntConstant(module, "_MAX_SOCKET_PATH", MAX_SOCKET_PATH) < 0) {
        return -1;
    }
    activate(state);
    return 0;
}

static int
milter_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = state_of(module);

    Py_VISIT(state->error);
    Py_VISIT(state->invalid_argument);
    Py_VISIT(state->context_type);
    Py_VISIT(state->diagnostics_type);
    Py_VISIT(state->raised);
    Py_VISIT(state->when_serving);
    Py_VISIT(state->first_step);
    Py_VISIT(state->observer);
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
    Py_CLEAR(state->diagnostics_type);
    Py_CLEAR(state->raised);
    Py_CLEAR(state->when_serving);
    Py_CLEAR(state->first_step);
    Py_CLEAR(state->observer);
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
    if (active_module == state) {
        active_module = NULL;
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
