/* The clock that nobody sets. */

#ifndef PYMILTER_CLOCK_H
#define PYMILTER_CLOCK_H

#include <time.h>

/* Seconds. */
static inline double
monotonic_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* For poll(): rounded up, 0 where the deadline has passed. */
static inline int
milliseconds_until(double deadline)
{
    double left = deadline - monotonic_now();

    return left <= 0 ? 0 : left > 1e6 ? 1000000000 : (int)(left * 1000) + 1;
}

#endif
