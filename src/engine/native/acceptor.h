/* Accepting connections: when the listening socket is watched, when it is left to other processes
 * or rests, as there is no room, and how many connections are taken at a time. */

#ifndef PYMILTER_ENGINE_NATIVE_ACCEPTOR_H
#define PYMILTER_ENGINE_NATIVE_ACCEPTOR_H

#include <stdbool.h>

#include "engine.h"
#include "poller.h"

/* What is accepted goes to `take_in`, which closes it and returns false where there is no memory
 * for it. */
struct acceptor_client {
    bool (*take_in)(int fd);
    void (*log)(const char *level, const char *text);
};

/* Have `poller` watch the listening socket, which goes by `tag`; before anybody waits with it.
 * `share`: as with run().  False: errno tells why. */
bool acceptor_begin(struct poller *poller, void *tag, const struct engine_share *share,
                    const struct acceptor_client *client);

/* --- with the team's lock held */

/* The poller has told that somebody waits to be accepted. */
void acceptor_event(void);

/* When acceptor_look() has something to do, in seconds of the monotonic clock; 0: there is nothing
 * to wait for. */
double acceptor_due(void);

/* Watch the listening socket again, where the time has come. */
void acceptor_look(void);

/* A connection was closed, or processes have other shares now.  True: acceptor_look() is due at
 * once, and who waits with the poller is to be woken. */
bool acceptor_has_room(void);
bool acceptor_share_changed(void);

/* Nothing is to be accepted any more but what waits now: that has been told that it is
 * connected.  Where processes share the socket another one takes it. */
void acceptor_take_rest(void);

/* Accept nothing more, and close the socket.  `forked`: only let go of it. */
void acceptor_close(bool forked);

/* --- */

/* The poller is closed, and watches nothing any more. */
void acceptor_forget(void);

#endif
