/* Sessions that libmilter has lost: see lost.c. */

#ifndef PYMILTER_LIBMILTER_LOST_H
#define PYMILTER_LIBMILTER_LOST_H

/* Look, if it is time, and tell the log of what was found.  For main() alone. */
void look_for_lost_sessions(void);

/* Milliseconds until the next look. */
int time_to_look(void);

#endif
