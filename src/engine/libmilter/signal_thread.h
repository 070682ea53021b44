/* libmilter's signal thread is put to sleep: see signal_thread.c. */

#ifndef PYMILTER_LIBMILTER_SIGNAL_THREAD_H
#define PYMILTER_LIBMILTER_SIGNAL_THREAD_H

#include <signal.h>
#include <stdbool.h>

/* Before libmilter's threads start: choose a signal, and open it in their mask. */
void prepare_parking(sigset_t *mask);

/* libmilter's threads did not come to be. */
void cancel_parking(void);

/* Find the thread and put it to sleep; waits for that, but not for ever. */
void park_signal_thread(void);

/* A signal may come between the start of the thread and its parking, and be taken by it: then
 * libmilter ends by itself and closes its socket.  There were no messages yet, so that is the
 * clean stop that was asked for. */
bool libmilter_took_signal(void);

#endif
