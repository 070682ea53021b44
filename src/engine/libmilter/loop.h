/* libmilter's loop, from its start to its end. */

#ifndef PYMILTER_LIBMILTER_LOOP_H
#define PYMILTER_LIBMILTER_LOOP_H

#include <stdbool.h>

#include "engine.h"

/* struct engine: run(), stop_accepting(), end(), finish(), forget() */
int run_loop(const struct engine_share *surrounding);
void stop_accepting(void);
void end_loop(void);
bool finish_loop(void);
void forget_loop(void);

#endif
