/* One after the other to the interpreter lock: see turnstile.c. */

#ifndef PYMILTER_LIBMILTER_TURNSTILE_H
#define PYMILTER_LIBMILTER_TURNSTILE_H

#include <stdbool.h>

#include "stages.h"

/* setup.py sets it to 0 where there is no lock to queue for, or where it is not wanted. */
#ifndef PYMILTER_TURNSTILE
#define PYMILTER_TURNSTILE 1
#endif

#if PYMILTER_TURNSTILE

/* Before the interpreter lock is asked for. */
void enter_turnstile(void);

/* The interpreter lock is there.  `stage` is OUTSIDE for a callback that goes on after it had
 * given the lock up.  Returns what judge() needs. */
unsigned pass_turnstile(enum stage stage);

/* Once the interpreter lock is given back.  True where this thread was inside. */
bool leave_turnstile(void);

/* Learn from a callback that has ended, where somebody cares; still with the interpreter lock. */
void judge(enum stage stage, unsigned began);

#else

static inline void
enter_turnstile(void)
{
}

static inline unsigned
pass_turnstile(enum stage stage)
{
    (void)stage;
    return 0;
}

static inline bool
leave_turnstile(void)
{
    return false;
}

static inline void
judge(enum stage stage, unsigned began)
{
    (void)stage;
    (void)began;
}

#endif

#endif
