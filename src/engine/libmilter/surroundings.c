#include "surroundings.h"

const struct engine_hooks *hooks;
const struct engine_share *share;
atomic_bool forked;
atomic_bool loop_ended;
