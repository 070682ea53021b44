/* Who of several processes accepts: see door.c. */

#ifndef PYMILTER_LIBMILTER_DOOR_H
#define PYMILTER_LIBMILTER_DOOR_H

#include <signal.h>
#include <stdbool.h>

/* In the process that forks the others.  0, or an errno. */
int share_door(void);

/* Before libmilter's threads start, which take over `mask`. */
void prepare_door(sigset_t *mask);

/* Once libmilter serves. */
void start_porter(void);

/* Take part in accepting, whatever the share; until the number of connections changes. */
void open_the_door(void);

/* The number of connections, ours or another's, has changed. */
void look_after_door(void);

/* For good.  False where this process has no door. */
bool close_the_door(void);

/* In a forked child. */
void forget_door(void);

#endif
