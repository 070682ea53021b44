/* libmilter's pool of workers is kept from running dry: see pool.c. */

#ifndef PYMILTER_LIBMILTER_POOL_H
#define PYMILTER_LIBMILTER_POOL_H

#include <poll.h>
#include <stdbool.h>

/* A thread of libmilter has come with its first callback that only a worker runs, or such a one
 * ends. */
void count_worker(int change);

/* On the way into a callback, and out of it. */
void enter_pool(void);
void leave_pool(void);

/* poll() for main(); the pool, and what libmilter lost, are looked after meanwhile, where there is
 * no time-out (< 0). */
int poll_and_tend_pool(struct pollfd *wait, nfds_t count, int timeout);

#endif
