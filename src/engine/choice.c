#include "choice.h"

#include <stdlib.h>
#include <string.h>

#include "libmilter/libmilter.h"
#include "native/native.h"

#define ENGINES 2

static const struct engine *const engines[ENGINES] = {&libmilter_engine, &native_engine};
static const char *unknown;

const struct engine *engine = &libmilter_engine;

bool
choose_engine(const char *name)
{
    for (size_t i = 0; i < ENGINES; i++) {
        if (strcmp(engines[i]->name, name) == 0) {
            engine = engines[i];
            unknown = NULL;
            return true;
        }
    }
    return false;
}

bool
is_libmilter(void)
{
    return engine == &libmilter_engine;
}

const char *
unknown_engine(void)
{
    return unknown;
}

/* For programs that nobody wants to change. */
__attribute__((constructor)) static void
choose_by_environment(void)
{
    const char *name = getenv("PYMILTER_ENGINE");

    if (name != NULL && *name != '\0' && !choose_engine(name)) {
        unknown = strdup(name); /* whoever opens the socket is told */
    }
}

int
set_up_engines(const struct smfiDesc *filter, const struct engine_hooks *hooks)
{
    int result = MI_SUCCESS;

    for (size_t i = 0; i < ENGINES && result == MI_SUCCESS; i++) {
        result = engines[i]->set_up(filter, hooks);
    }
    return result;
}

int
set_engines_conn(char *address)
{
    int result = MI_SUCCESS;

    for (size_t i = 0; i < ENGINES && result == MI_SUCCESS; i++) {
        result = engines[i]->setconn(address);
    }
    return result;
}

void
set_engines_timeout(int seconds)
{
    for (size_t i = 0; i < ENGINES; i++) {
        engines[i]->settimeout(seconds);
    }
}

void
set_engines_backlog(int connections)
{
    for (size_t i = 0; i < ENGINES; i++) {
        engines[i]->setbacklog(connections);
    }
}

void
set_engines_dbg(int level)
{
    for (size_t i = 0; i < ENGINES; i++) {
        engines[i]->setdbg(level);
    }
}

size_t
set_engines_maxdatasize(size_t bytes)
{
    size_t before = 0;

    for (size_t i = 0; i < ENGINES; i++) {
        size_t old = engines[i]->setmaxdatasize(bytes);

        before = engines[i] == engine ? old : before;
    }
    return before;
}
