/* One connection of an MTA: its descriptor, what was read and not understood yet, its session. */

#ifndef PYMILTER_ENGINE_NATIVE_CONNECTION_H
#define PYMILTER_ENGINE_NATIVE_CONNECTION_H

#include <stdatomic.h>
#include <stdbool.h>

#include "engine.h"
#include "session.h"

enum connection_state {
    WATCHED,   /* in the poller, and the leader's */
    QUEUED,    /* there is something to do for it */
    SERVED,    /* by a thread, which runs its callbacks */
    SUSPENDED, /* its callback will be completed; the poller waits for a hang-up alone */
    FLUSHING   /* in the poller until the last of its answer is sent, then it is closed */
};

/* What suspend() gives: it is one for each connection. */
struct engine_suspended {
    void *data;
    _Atomic(engine_completion) complete; /* NULL until it is resumed; set after the data */
};

struct loop;

struct connection {
    SMFICTX session; /* first: from a context to its connection */
    struct loop *loop;
    int fd;
    struct inbox inbox;
    struct engine_suspended suspended;
    enum connection_state state;
    bool watched;   /* in the poller */
    bool writing;   /* the poller waits until more can be written */
    bool end_alone; /* the poller waits for nothing but a hang-up */
    bool at_end;    /* of what the peer sends; or the connection is broken, or has timed out */
    bool hung_up;   /* the peer has, while a callback was suspended */
    bool told;      /* the filter knows, for the callback that is suspended now */
    bool has_rest;  /* at the end: what has come while a callback was suspended is answered still */
    double active;  /* when something last came or went, in seconds of the monotonic clock */
    struct connection *previous, *next;
    struct connection *next_queued;
};

static inline struct connection *
connection_of(SMFICTX *session)
{
    return (struct connection *)session;
}

/* NULL: no memory. */
struct connection *connection_new(int fd, const struct smfiDesc *filter,
                                  const struct session_driver *driver, size_t max_data);

/* Close the descriptor, and free all. */
void connection_free(struct connection *connection);

/* Read what there is, without waiting. */
void connection_read(struct connection *connection, struct stock *stock);

/* Where `has_rest`, in a message whose last step had no answer: read what there is, up to the next
 * packet.  If there is none, or an answer went out, it has no rest any more. */
void connection_read_rest(struct connection *connection, struct stock *stock);

/* What has nothing in it takes no memory. */
void connection_reclaim(struct connection *connection, struct stock *stock);

/* It is over: what was not sent is dropped, and nothing more is sent.  False. */
bool connection_break(struct connection *connection);

/* Send what can be sent without waiting.  False where the connection is broken. */
bool connection_send(struct connection *connection);

/* Send all; may wait, up to `timeout` milliseconds for each piece.  False: broken. */
bool connection_send_all(struct connection *connection, int timeout);

static inline size_t
connection_unsent(const struct connection *connection)
{
    return outbox_size(&connection->session.outbox);
}

#endif
