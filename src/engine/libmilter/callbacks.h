/* libmilter's callbacks on their way to the filter's. */

#ifndef PYMILTER_LIBMILTER_CALLBACKS_H
#define PYMILTER_LIBMILTER_CALLBACKS_H

#include <signal.h>

#include "engine.h"

/* smfi_register(), with callbacks that call those of `filter`. */
int register_callbacks(const struct smfiDesc *filter);

/* Before the first callback.  0, or an errno. */
int prepare_threads_for_callbacks(void);

/* Callbacks that come between these two wait.  Those that come later have `mask`. */
void hold_callbacks(const sigset_t *mask);
void let_callbacks_in(void);

/* struct engine: suspend() and resume() */
struct engine_suspended *suspend_callback(SMFICTX *context);
void resume_callback(struct engine_suspended *suspended, engine_completion complete, void *data);

/* What the right to run the filter is given up for: a call that may wait for the MTA. */
typedef struct {
    void *released;
    bool in_turnstile;
} Pause;

Pause pause_callback(void);
void end_pause(Pause pause);

#endif
