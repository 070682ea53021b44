/* What the processes of one filter share: how many connections each has, and numbers. */

#ifndef PYMILTER_CREW_H
#define PYMILTER_CREW_H

#include <stdbool.h>

#define MAX_WORKERS 512

/* In the process that forks the others: make room for so many.  0, or an errno. */
int make_crew(int count);

/* There, once all have ended. */
void end_crew(void);

/* Is `index` the place of a worker?  False as well where there is no crew. */
bool is_place_in_crew(long index);

/* In a worker. */
void join_crew(int index);
void say_serving(bool serving);

/* The worker there has ended. */
void leave_crew(long index);

/* A child of a worker has no place among the workers. */
void forget_crew(void);

bool is_in_crew(void);

/* For struct engine_share: has_enough(), nobody_came() */
bool has_too_many(void);
void call_others_slow(void);
void call_this_one_ready(void);

/* By all workers, since the first began. */
unsigned long connections_taken(void);

/* A connection of this process has come (1) or gone (-1). */
void count_connection(int change);

/* How long any process has been allowed to drain, in milliseconds; the supervisor waits for as
 * long as the longest of them. */
void share_drain_timeout(int wanted);
int longest_drain_timeout(void);

/* Does any process of it serve, and take new connections? */
bool crew_serves(void);

/* How long all processes, once they stop, serve the connections that they have, as another
 * generation serves the new ones; in milliseconds, 0 for not at all. */
void set_patience(int milliseconds);
int patience(void);

/* Numbers that no process of this filter has given out before. */
unsigned long next_number(void);
unsigned long last_number(void);

#endif
