#include "report.h"

#include <pthread.h>
#include <string.h>

#include "process.h"
#include "wake.h"

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

int
raise_os_error(module_state *state, int code, const char *what, const char *where, const char *mend)
{
    /* In the words, and the encoding, of the locale. */
    PyObject *reason = PyUnicode_DecodeLocale(strerror(code), "surrogateescape");
    PyObject *hint = PyUnicode_DecodeLocale(mend, "surrogateescape");
    PyObject *cause = NULL, *error;

    if (reason != NULL && hint != NULL) {
        cause = PyObject_CallFunction(PyExc_OSError, "iO", code, reason);
    }
    if (cause != NULL) {
        PyErr_Format(state->error, "%s %s: %U%s%U", what, where, reason,
                     mend[0] != '\0' ? ": " : "", hint);
        error = take_exception();
        PyException_SetCause(error, cause);
        raise_exception(error);
    }
    Py_XDECREF(reason);
    Py_XDECREF(hint);
    return -1;
}

void
stop_with_exception(module_state *state)
{
    PyObject *exception = take_exception();
    bool for_all = PyErr_GivenExceptionMatches(exception, PyExc_SystemExit);

    LOCK_STATE();
    if (state->raised == NULL) {
        state->raised = exception;
        exception = NULL;
    }
    UNLOCK_STATE();
    Py_XDECREF(exception); /* the first counts */
    if (for_all) {
        ask_all_to_stop();
    }
    else {
        ask_to_stop();
    }
}

/* The logger `milter`, by way of the function that sees to it that its records forge no line; where
 * the package cannot be imported (a program took `milter` out of sys.modules) as logging has it. */
static PyObject *
milter_logger(void)
{
    PyObject *logger = NULL, *module = PyImport_ImportModule("Milter._logging");

    if (module != NULL) {
        logger = PyObject_CallMethod(module, "logger", NULL);
    }
    else if (PyErr_ExceptionMatches(PyExc_ImportError)) {
        PyErr_Clear(); /* what is to be told counts for more */
        module = PyImport_ImportModule("logging");
        logger = module == NULL ? NULL : PyObject_CallMethod(module, "getLogger", "s", "milter");
    }
    Py_XDECREF(module);
    return logger;
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

void
log_record(const char *method, PyObject *message, PyObject *exception)
{
    PyObject *logger = NULL, *log = NULL, *args = NULL, *keywords = NULL;
    PyObject *info = NULL, *done = NULL;

    if (message != NULL && (logger = milter_logger()) != NULL &&
        (log = PyObject_GetAttrString(logger, method)) != NULL &&
        (args = Py_BuildValue("(sO)", "%s", message)) != NULL &&
        (keywords = PyDict_New()) != NULL &&
        (exception == NULL || ((info = info_of(exception)) != NULL &&
                               PyDict_SetItemString(keywords, "exc_info", info) == 0))) {
        done = PyObject_Call(log, args, keywords);
    }
    if (done == NULL && !PyErr_ExceptionMatches(PyExc_Exception)) {
        stop_with_exception(active_module);
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
    Py_XDECREF(message); /* taken over from the caller */
}

/* --------------------------------------------------------- what main() writes */

#define WAITING 8
#define WAITING_SIZE 300

static pthread_mutex_t waiting_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    char method[16];
    char text[WAITING_SIZE];
} waiting[WAITING];
static int waiting_count;

void
log_later(const char *method, const char *text)
{
    pthread_mutex_lock(&waiting_lock);
    if (waiting_count < WAITING) {
        snprintf(waiting[waiting_count].method, sizeof waiting->method, "%s", method);
        snprintf(waiting[waiting_count].text, sizeof waiting->text, "%s", text);
        waiting_count++;
    }
    pthread_mutex_unlock(&waiting_lock);
    wake_main();
}

/* Take the record that has waited longest.  False where there is none. */
static bool
take_waiting(char method[sizeof waiting->method], char text[WAITING_SIZE])
{
    bool any;

    pthread_mutex_lock(&waiting_lock);
    any = waiting_count > 0;
    if (any) {
        memcpy(method, waiting[0].method, sizeof waiting->method);
        memcpy(text, waiting[0].text, WAITING_SIZE);
        waiting_count--;
        memmove(&waiting[0], &waiting[1], (size_t)waiting_count * sizeof *waiting);
    }
    pthread_mutex_unlock(&waiting_lock);
    return any;
}

void
log_what_waits(void)
{
    char method[sizeof waiting->method], text[WAITING_SIZE];

    while (take_waiting(method, text)) {
        log_record(method, PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace"), NULL);
    }
}
