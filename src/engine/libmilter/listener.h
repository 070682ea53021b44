/* The socket that libmilter listens on, and the connections that came from it. */

#ifndef PYMILTER_LIBMILTER_LISTENER_H
#define PYMILTER_LIBMILTER_LISTENER_H

#include <signal.h>
#include <stdbool.h>

/* The descriptor on which libmilter listens, or -1. */
int listening_descriptor(void);

/* smfi_setconn() and smfi_opensocket(), and find what they opened. */
int set_listener(char *address);
int open_listener(bool remove_old, int *listener);

/* Other processes have the socket too: it is never shut down. */
void listener_is_shared(void);

/* Descriptors for the stop, taken before the filter serves: when it is asked to stop there may be
 * none left. */
void reserve_descriptors(void);
void release_descriptors(void);

/* A socket without a name, so that nobody can send to it: libmilter's listener, which asks only
 * whether there is something to accept, sleeps on it for good. */
int open_dummy_listener(void);

/* Was it accepted from the listening socket? */
bool is_accepted(int fd);

/* Have libmilter's listener look whether it shall stop, by a connection that ends at once. */
void poke_listener(void);

/* libmilter's listener sleeps in poll(), for up to five seconds, on what stood at its descriptor
 * before.  A signal wakes it, if one was free before libmilter's threads started; they take over
 * `mask`.  It runs on the thread that says so. */
bool choose_wake_signal(sigset_t *mask);
void be_listener(void);
void wake_listener(void);

/* Put a socket that nobody can reach in the place of the listening one. */
void stop_listening(void);

/* Shut down for reading what was accepted: libmilter still writes the replies that it owes, and
 * then finds the end of each connection. */
void end_connections(void);

/* In a forked child: what it held would stay open for the MTA when the filter closes it, and the
 * port would be taken, for as long as the child lives. */
void drop_sockets(void);

#endif
