/* Threads of an engine in Python, and the gate that they pass. */

#ifndef PYMILTER_THREADS_H
#define PYMILTER_THREADS_H

#include "common.h"

/* For struct engine_hooks: enter(), leave(), parallel(), release(), reacquire(), thread_ends() */
bool enter_python(void);
void leave_python(void);
size_t callbacks_at_once(void);
void *release_python(void);
void reacquire_python(void *released);
void give_back_thread_state(void);

/* For a thread of the interpreter's own, which has its lock: go in as one of the engine's, and out
 * again.  False: nobody comes in any more. */
bool join_engine(void);
void leave_engine(void);

/* Has this thread come in by one of these? */
bool is_in_python(void);

/* In main(), before the first thread comes. */
void let_threads_in(void);

/* Once the interpreter goes: nobody comes in any more.  In a forked child those who were inside are
 * in the parent. */
void shut_gate(void);
void forget_threads(void);

/* How many threads of the engine are in Python, or wait for its lock. */
long threads_inside(void);

#endif
