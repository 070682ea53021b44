/* An exception in a callback: who is told what. */

#ifndef PYMILTER_FAILURE_H
#define PYMILTER_FAILURE_H

#include "common.h"
#include "context.h"

/* One step of the dialogue on its way through Python. */
typedef struct {
    SMFICTX *handle;
    enum stage stage;
    ContextObject *context; /* NULL where it could not be made */
} Step;

/* Remember who the client is, for reports, where the MTA sends no macro that tells it. */
void keep_client(const Step *step, const char *hostname, const _SOCK_ADDR *address);

/* An exception is set, or a result was no verdict: report it.  The verdict of the policy. */
sfsistat take_policy(const Step *step);

/* An exception is set, of a callback that judges nothing: report it. */
void take_exception_of(const Step *step);

/* Is an earlier exception or put_off_message() still unanswered, and can it be answered now?  Then
 * the verdict goes into *verdict, and its reply is set. */
bool pay(const Step *step, sfsistat *verdict);

/* The verdict for a message that must not begin, since the filter drains. */
sfsistat refuse_message(const Step *step);

/* The verdict for a message of which a callback was cancelled; where the MTA does not wait for it,
 * the next step has it. */
sfsistat put_off_message(const Step *step);

#endif
