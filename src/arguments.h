/* The checks of what Python passes: each names the call, the argument and the rule. */

#ifndef PYMILTER_ARGUMENTS_H
#define PYMILTER_ARGUMENTS_H

#include "common.h"

/* Refuse an argument: InvalidArgument("CALL: ARGUMENT: RULE: VALUE"), the value cut short.  -1. */
int refuse(module_state *state, const char *call, const char *argument, const char *rule,
           PyObject *value);

/* Text on its way to the MTA: bytes, owned, or NULL with an exception set.  encode_text() is for a
 * str alone, and allows NUL. */
PyObject *encode_text(module_state *state, const char *call, const char *argument, PyObject *value);
PyObject *text_argument(module_state *state, const char *call, const char *argument,
                        PyObject *value);

/* Text that has to stay on one line: an address, a reason, a line of a reply. */
PyObject *line_argument(module_state *state, const char *call, const char *argument,
                        PyObject *value);
PyObject *nonempty_line_argument(module_state *state, const char *call, const char *argument,
                                 PyObject *value);

/* RFC 5322 section 3.6.8: printable characters without the colon.  Bytes beyond ASCII pass,
 * since a name that a callback received must be fit to be given back. */
PyObject *header_name_argument(module_state *state, const char *call, PyObject *value);

/* A header value may hold line ends only as folds: LF, or CRLF which goes out as LF, before a
 * space or tab (RFC 5322 section 2.2.3).  Anything else would begin a header of its own.  One
 * line end at the very end, as it is left by reading a line, is dropped. */
PyObject *header_value_argument(module_state *state, const char *call, PyObject *value);

/* The index of a header for addheader(), where below 0 means the end, or chgheader(), which takes
 * none below 0.  False with an exception set. */
bool header_index_argument(module_state *state, const char *call, PyObject *value, bool below_zero,
                           int *index);

/* The arguments of setsymlist(): the list in bytes, owned, or NULL with an exception set. */
PyObject *symlist_argument(module_state *state, PyObject *stage, PyObject *macros, int *number);

/* An int in the range of a setting, or -1 with an exception set. */
long setting_argument(module_state *state, const char *call, const char *argument, PyObject *value,
                      long least);

#endif
