/* What is raised, and what the log is told. */

#ifndef PYMILTER_REPORT_H
#define PYMILTER_REPORT_H

#include "common.h"

/* Take the current exception, with its traceback attached. */
PyObject *take_exception(void);

/* Raise an exception instance; takes over the reference. */
void raise_exception(PyObject *exception);

/* Raise milter.error with an OSError as its cause: "WHAT WHERE: the reason: MEND".  -1. */
int raise_os_error(module_state *state, int code, const char *what, const char *where,
                   const char *mend);

/* Ask main() to stop the filter and to raise the exception that is set now. */
void stop_with_exception(module_state *state);

/* Write a record to the logger `milter`; takes over `message`, of which NULL means that an
 * exception is set.  Never leaves an exception behind: it is called where nobody could handle one;
 * sys.exit() in a handler of the log stops the filter, as in a callback.  `exception` may be NULL.
 */
void log_record(const char *method, PyObject *message, PyObject *exception);

/* The same from any thread, without the interpreter lock: main() writes it.  Copied; dropped where
 * too many wait. */
void log_later(const char *method, const char *text);

/* In main(): write what waits. */
void log_what_waits(void);

#endif
