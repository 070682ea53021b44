/* What the parts of this engine know of the process that it serves in. */

#ifndef PYMILTER_LIBMILTER_SURROUNDINGS_H
#define PYMILTER_LIBMILTER_SURROUNDINGS_H

#include <stdatomic.h>

#include "engine.h"

/* Of set_up(). */
extern const struct engine_hooks *hooks;

/* Of run(); NULL where this process is alone, and in a child that it forked. */
extern const struct engine_share *share;

/* This process is a child of the filter's: libmilter's threads are not here. */
extern atomic_bool forked;

/* smfi_main() has returned. */
extern atomic_bool loop_ended;

#endif
