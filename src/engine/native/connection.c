/* One connection of an MTA. */

#include "connection.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"

#define READ_SIZE 16384 /* bytes at a time, where nothing tells how many will come */
#define LARGE 4096      /* what is missing of a packet is read to where it belongs */

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

struct connection *
connection_new(int fd, const struct smfiDesc *filter, const struct session_driver *driver,
               size_t max_data)
{
    struct connection *connection = malloc(sizeof *connection);

    if (connection == NULL) {
        return NULL;
    }
    *connection = (struct connection){.fd = fd, .state = WATCHED, .active = monotonic_now()};
    session_begin(&connection->session, filter, driver, max_data);
    return connection;
}

void
connection_free(struct connection *connection)
{
    close(connection->fd);
    inbox_free(&connection->inbox);
    session_free(&connection->session);
    free(connection);
}

/* ------------------------------------------------------------------- reading */

/* What recv() said; the number of bytes, 0 where there are none now. */
static size_t
judge_read(struct connection *connection, ssize_t count)
{
    if (count > 0) {
        connection->active = monotonic_now();
        return (size_t)count;
    }
    if (count == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) {
        connection->at_end = true;
    }
    return 0;
}

/* Into the inbox itself. */
static size_t
read_in_place(struct connection *connection, size_t missing, struct stock *stock)
{
    size_t room;
    char *to = inbox_room(&connection->inbox, missing, &room, stock);
    size_t count;

    if (to == NULL) {
        connection->at_end = true;
        return 0;
    }
    count = judge_read(connection, recv(connection->fd, to, room, 0));
    inbox_add(&connection->inbox, count);
    return count;
}

/* By way of the stack, as an inbox that is as large as what may come would be kept for nothing. */
static size_t
read_by_the_way(struct connection *connection, struct stock *stock)
{
    char bytes[READ_SIZE];
    size_t room, count = judge_read(connection, recv(connection->fd, bytes, sizeof bytes, 0));
    char *to;

    if (count == 0) {
        return 0;
    }
    if (count <= BOX_ROOM) {
        inbox_lend(&connection->inbox, stock);
    }
    to = inbox_room(&connection->inbox, count, &room, stock);
    if (to == NULL) {
        connection->at_end = true;
        return 0;
    }
    memcpy(to, bytes, count);
    inbox_add(&connection->inbox, count);
    return count;
}

void
connection_read(struct connection *connection, struct stock *stock)
{
    size_t missing = inbox_missing(&connection->inbox);

    if (missing >= LARGE && missing <= connection->session.max_data + PACKET_HEAD) {
        read_in_place(connection, missing, stock);
    }
    else {
        read_by_the_way(connection, stock);
    }
}

void
connection_read_rest(struct connection *connection, struct stock *stock)
{
    const struct inbox *inbox = &connection->inbox;
    size_t before;
    bool ready;

    if (!connection->has_rest || connection->session.broken || connection_unsent(connection) > 0 ||
        !session_goes_unanswered(&connection->session)) {
        connection->has_rest = false;
        return;
    }
    do {
        ready = inbox_ready(inbox, connection->session.max_data);
        before = inbox->end - inbox->begin;
        if (!ready) {
            connection_read(connection, stock);
        }
    } while (inbox->end - inbox->begin > before);
    connection->has_rest = ready;
}

void
connection_reclaim(struct connection *connection, struct stock *stock)
{
    inbox_reclaim(&connection->inbox, stock);
    outbox_reclaim(&connection->session.outbox, stock);
}

/* ------------------------------------------------------------------- writing */

bool
connection_break(struct connection *connection)
{
    connection->session.broken = true;
    connection->at_end = true;
    outbox_free(&connection->session.outbox);
    return false;
}

bool
connection_send(struct connection *connection)
{
    struct outbox *outbox = &connection->session.outbox;

    if (connection->session.broken) { /* perhaps in the middle of a packet: nothing may follow */
        return connection_break(connection);
    }
    while (outbox_size(outbox) > 0) {
        ssize_t count =
            send(connection->fd, outbox->bytes + outbox->begin, outbox_size(outbox), MSG_NOSIGNAL);

        if (count >= 0) {
            outbox_sent(outbox, (size_t)count);
            connection->active = monotonic_now();
        }
        else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return true;
        }
        else if (errno != EINTR) {
            return connection_break(connection);
        }
    }
    return true;
}

bool
connection_send_all(struct connection *connection, int timeout)
{
    while (connection_send(connection) && connection_unsent(connection) > 0) {
        struct pollfd wait = {.fd = connection->fd, .events = POLLOUT};
        int count = poll(&wait, 1, timeout);

        if (count == 0 || (count < 0 && errno != EINTR)) {
            return connection_break(connection);
        }
    }
    return !connection->session.broken;
}
