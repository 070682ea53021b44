/* Which signals are for whom. */

#ifndef PYMILTER_SIGNAL_SETS_H
#define PYMILTER_SIGNAL_SETS_H

#include <signal.h>

/* Those that stop a filter. */
#define STOP_SIGNALS 3
extern const int stop_signals[STOP_SIGNALS];

/* All signals but those that tell of a fault in the program. */
void fill_but_faults(sigset_t *set);

/* Install a handler for the first real-time signal, from the top, that has none; 0: all have, or
 * there are none. */
int take_free_signal(const struct sigaction *action);

#endif
