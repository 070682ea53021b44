/* The listening socket of the native engine. */

#ifndef PYMILTER_ENGINE_NATIVE_LISTENER_H
#define PYMILTER_ENGINE_NATIVE_LISTENER_H

#include <stdbool.h>

/* As libmilter's functions of the same names. */
int listener_setconn(char *address);
int listener_setbacklog(int connections);

/* Open what setconn() named: MI_SUCCESS or MI_FAILURE.  `remove_old`: remove a unix socket that is
 * left there. */
int listener_open(bool remove_old, int *opened);

/* Its descriptor, or -1.  */
int listener_descriptor(void);

/* Other processes will accept from it too. */
void listener_share(void);

/* Accept one connection, whose descriptor does not block: -1, and errno, where there is none. */
int listener_accept(void);

/* Stop listening: who tries is refused, unless others listen.  `forked`: only let go of it. */
void listener_close(bool forked);

#endif
