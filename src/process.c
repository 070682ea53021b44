#include "process.h"

#include <stddef.h>

#include "wake.h"

#define DRAIN_SECONDS 30.0 /* how long messages in progress may take after a stop */

struct process_flags process_flags = {.drain_ms = DRAIN_SECONDS * 1000};

static void (*tell_all)(void);

void
ask_to_stop(void)
{
    atomic_store(&process_flags.stop_wanted, true);
    wake_main();
}

void
ask_all_to_stop(void)
{
    atomic_store(&process_flags.stop_wanted, true);
    if (tell_all != NULL) {
        tell_all();
    }
    wake_main();
}

void
when_all_are_to_stop(void (*tell)(void))
{
    tell_all = tell;
}

double
drain_seconds(void)
{
    return atomic_load(&process_flags.drain_ms) / 1000.0;
}
