/* What any part may ask of the life of this process; who changes it says lifecycle.c. */

#ifndef PYMILTER_PROCESS_H
#define PYMILTER_PROCESS_H

#include <stdatomic.h>
#include <stdbool.h>

/* Read through the functions below alone. */
extern struct process_flags {
    atomic_bool stop_wanted;
    atomic_bool draining;
    atomic_bool forked;
    atomic_int drain_ms;
    atomic_int patience_ms;
} process_flags;

/* Has somebody asked for a stop: stop(), a signal, an exception?  Asking wakes main(); it may be
 * done on any thread and in a signal handler. */
static inline bool
stop_is_wanted(void)
{
    return atomic_load(&process_flags.stop_wanted);
}

void ask_to_stop(void);

/* The same, and of all processes that serve the same socket. */
void ask_all_to_stop(void);

/* What ask_all_to_stop() calls beside: it tells the others. */
void when_all_are_to_stop(void (*tell)(void));

/* Are new messages refused? */
static inline bool
is_draining(void)
{
    return atomic_load(&process_flags.draining);
}

/* Is this process a child of the filter's, so that the filter is not here? */
static inline bool
is_forked(void)
{
    return atomic_load(&process_flags.forked);
}

/* How long messages in progress may take after a stop. */
double drain_seconds(void);

#define CLOSE_SECONDS 2.0 /* how long close callbacks may take once all is drained */
#define HURRY_SECONDS 1.5 /* and, after these, what waits in coroutines, cancelled */

#endif
