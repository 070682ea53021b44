/* The engine that is libmilter. */

#ifndef PYMILTER_LIBMILTER_LIBMILTER_H
#define PYMILTER_LIBMILTER_LIBMILTER_H

#include "engine.h"

extern const struct engine libmilter_engine;

#endif
