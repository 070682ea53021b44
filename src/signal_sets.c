#include "signal_sets.h"

#include <stddef.h>

const int stop_signals[STOP_SIGNALS] = {SIGTERM, SIGINT, SIGHUP};

void
fill_but_faults(sigset_t *set)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};

    sigfillset(set);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        sigdelset(set, faults[i]);
    }
}

int
take_free_signal(const struct sigaction *action)
{
#ifdef SIGRTMAX
    struct sigaction current;

    for (int number = SIGRTMAX; number >= SIGRTMIN; number--) {
        if (sigaction(number, NULL, &current) == 0 && current.sa_handler == SIG_DFL &&
            sigaction(number, action, NULL) == 0) {
            return number;
        }
    }
#else
    (void)action;
#endif
    return 0;
}
