/* From the engine's callbacks to Python's. */

#ifndef PYMILTER_TRAMPOLINES_H
#define PYMILTER_TRAMPOLINES_H

#include "common.h"

/* The filter as an engine sees it.  All callbacks are always ours; which of Python's are set is
 * found out at each call, so that they can be changed at any time. */
struct smfiDesc describe_filter(char *name);

#endif
