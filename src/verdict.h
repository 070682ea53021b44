/* What a callback may return, and what that means. */

#ifndef PYMILTER_VERDICT_H
#define PYMILTER_VERDICT_H

#include "common.h"
#include "context.h"

/* Does this verdict, given at this stage, end the message for this filter? */
bool ends_message(enum stage stage, sfsistat verdict);

/* Is what a callback returned something to be awaited? */
bool is_awaitable(PyObject *result);

/* It will not be awaited, and need not complain of that.  An exception that is set stays so. */
void close_awaitable(PyObject *awaitable);

/* The verdict that is the result of a callback, with `protocol` agreed, which may be NOREPLY or
 * CONTINUE where no reply is due (of negotiate: CONTINUE, ALL_OPTS or REJECT); -1 with milter.error
 * set where it is none. */
int parse_verdict(module_state *state, enum stage stage, unsigned long protocol, PyObject *result);

/* Does a reply of this class, '4' or '5', go out with the verdict?  libmilter drops one that does
 * not fit without a word: the log is told. */
bool sends_reply(enum stage stage, sfsistat verdict, char reply_class);

#endif
