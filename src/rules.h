/* The rules of what may be sent and returned, for the package's stand-ins: see rules.c. */

#ifndef PYMILTER_RULES_H
#define PYMILTER_RULES_H

#include "common.h"

PyObject *check_text(PyObject *module, PyObject *args);
PyObject *check_line(PyObject *module, PyObject *args);
PyObject *check_nonempty_line(PyObject *module, PyObject *args);
PyObject *check_header_name(PyObject *module, PyObject *args);
PyObject *check_header_value(PyObject *module, PyObject *args);
PyObject *check_header_index(PyObject *module, PyObject *args);
PyObject *check_symlist(PyObject *module, PyObject *args);
PyObject *check_reply(PyObject *module, PyObject *args, PyObject *keywords);
PyObject *list_steps(PyObject *module, PyObject *ignored);
PyObject *check_action(PyObject *module, PyObject *args);
PyObject *check_verdict(PyObject *module, PyObject *args);
PyObject *check_ends_message(PyObject *module, PyObject *args);
PyObject *check_sends_reply(PyObject *module, PyObject *args);

#endif
