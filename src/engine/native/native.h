/* The engine that speaks the protocol itself. */

#ifndef PYMILTER_ENGINE_NATIVE_NATIVE_H
#define PYMILTER_ENGINE_NATIVE_NATIVE_H

#include "engine.h"

extern const struct engine native_engine;

#endif
