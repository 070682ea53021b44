/* The loop of the native engine: the leader waits for all connections, reads, and runs the
 * callbacks of all that have something to say in one batch; each answer goes out as soon as it is
 * there. */

#ifndef PYMILTER_ENGINE_NATIVE_LOOP_H
#define PYMILTER_ENGINE_NATIVE_LOOP_H

#include "engine.h"

int loop_set_up(const struct smfiDesc *filter, const struct engine_hooks *hooks);
int loop_settimeout(int seconds);
size_t loop_setmaxdatasize(size_t bytes);
int loop_run(const struct engine_share *share);
void loop_stop_accepting(void);
void loop_share_changed(void);
void loop_end(void);
bool loop_finish(void);
void loop_forget(void);
struct engine_suspended *loop_suspend(SMFICTX *context);
void loop_resume(struct engine_suspended *suspended, engine_completion complete, void *data);
int loop_attend(void);
long loop_take_turn(void);
void loop_dismiss(void);

#endif
