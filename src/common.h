/* What all parts of the extension module `milter` build on: CPython's versions, the module's state,
 * and the tables of the steps that reach Python. */

#ifndef PYMILTER_COMMON_H
#define PYMILTER_COMMON_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdatomic.h>
#include <stdbool.h>

#include <libmilter/mfapi.h>
#include <libmilter/mfdef.h>

#include "stages.h"

#if PY_VERSION_HEX < 0x030A0000
#define Py_NewRef(object) (Py_INCREF(object), (PyObject *)(object))
#define Py_XNewRef(object) (Py_XINCREF(object), (PyObject *)(object))
#endif

#if PY_VERSION_HEX < 0x030D0000
#define Py_BEGIN_CRITICAL_SECTION(op) {
#define Py_END_CRITICAL_SECTION() }
#endif

/* What the interpreter lock guards where there is one.  Held for a few loads and stores, never
 * over a call that may run Python, release an object or wait. */
#ifdef Py_GIL_DISABLED
extern PyMutex state_guard;
#define LOCK_STATE() PyMutex_Lock(&state_guard)
#define UNLOCK_STATE() PyMutex_Unlock(&state_guard)
#else
#define LOCK_STATE() ((void)0)
#define UNLOCK_STATE() ((void)0)
#endif

/* Names of Python objects that are looked up for each callback; interned once. */
enum name {
    ABORT_NAME,
    BODY_NAME,
    DATA_NAME,
    ENVFROM_NAME,
    ENVFROM_BYTES,
    ENVFROM_ERRORS,
    ENVRCPT_NAME,
    ENVRCPT_BYTES,
    ENVRCPT_ERRORS,
    EOH_NAME,
    EOM_NAME,
    HEADER_NAME,
    HEADER_BYTES,
    HEADER_ERRORS,
    HELLO_NAME,
    UNKNOWN_NAME,
    NAMES
};

typedef struct {
    const char *name;
    enum name method;        /* of the filter object: see milter__call_objects() */
    unsigned long leave_out; /* P_NO*: the MTA need not send this step */
    unsigned long no_reply;  /* P_NR_*: the MTA does not wait for an answer */
    bool in_message;         /* belongs to one message, not to the connection */
} StageInfo;

extern const StageInfo stages[STAGES];
extern const char *const names[NAMES];

/* What belongs to the module object.  What changes is guarded by LOCK_STATE(). */
typedef struct {
    PyObject *error;            /* milter.error */
    PyObject *invalid_argument; /* milter.InvalidArgument: an error and a ValueError */
    PyTypeObject *context_type;
    PyTypeObject *diagnostics_type; /* of what getdiag() returns */
    PyObject *names[NAMES];
    PyObject *callbacks[STAGES]; /* NULL where none is set */
    PyObject *shortcuts[STAGES]; /* see milter__call_objects() */
    PyObject *raised;            /* what main() raises when the filter has drained */
    PyObject *observer;          /* see observer.c, or NULL */
    PyObject *when_serving;      /* see _when_serving(), or NULL */
    PyObject *first_step;        /* see turns.c, or NULL */
    char *name;                  /* as registered, for replies and reports */
    atomic_ulong flags;          /* set_flags() */
    atomic_int policy;           /* set_exception_policy() */
    bool hooked;                 /* the interpreter calls us at exit and after a fork */
} module_state;

/* The module that callbacks belong to: an engine hands a callback nothing but its own context, so
 * one static object has to lead from there to the module. */
extern module_state *active_module;

#endif
