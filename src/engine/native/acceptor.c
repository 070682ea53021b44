/* Accepting connections. */

#include "acceptor.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#include "clock.h"
#include "listener.h"

#define ACCEPT_AT_ONCE 16
#define ACCEPT_PAUSE 1.0 /* seconds, where descriptors or memory have run out */
#define SHORTAGE_OVER 60 /* seconds without one, after which the next is told of again */
#define PATIENCE 0.003   /* seconds for another process to take a connection */

static struct poller *poller;
static void *listener_tag;
static const struct engine_share *share;
static const struct acceptor_client *client;

/* With the team's lock held. */
static bool accepting;
static bool listener_watched;
static double accept_again; /* when the listener is watched again; 0: it is, or is not to be */
static bool listener_left;  /* to other processes, until then */
static unsigned long taken; /* by all processes when it was left */
static double last_shortage;

/* ------------------------------------------------------------ watching the socket */

static void
watch_listener(void)
{
    int fd = listener_descriptor();

    accept_again = 0;
    listener_left = false;
    if (accepting && fd >= 0 && !listener_watched) {
        listener_watched = poller_add(poller, fd, listener_tag, false, false);
        if (!listener_watched) {
            accept_again = monotonic_now() + ACCEPT_PAUSE; /* the system has no room for it now */
        }
    }
}

static void
unwatch_listener(void)
{
    if (listener_watched) {
        poller_remove(poller, listener_descriptor());
        listener_watched = false;
    }
}

static void
pause_listener(double seconds)
{
    unwatch_listener();
    accept_again = monotonic_now() + seconds;
}

/* -------------------------------------------------------------------- accepting */

static void
note_shortage(int code)
{
    char text[160];
    double now = monotonic_now();

    if (now - last_shortage > SHORTAGE_OVER) {
        snprintf(text, sizeof text,
                 "cannot accept connections for now: %s; goes on by itself when that has changed",
                 strerror(code));
        client->log("error", text);
    }
    last_shortage = now;
    pause_listener(ACCEPT_PAUSE);
}

/* Take what waits to be accepted; `most` at a time. */
static void
accept_waiting(int most)
{
    for (int i = 0; accepting && i < most; i++) {
        int fd = listener_accept();

        if (fd >= 0 && client->take_in(fd)) {
            continue;
        }
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) {
            continue;
        }
        if (fd < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            if (share != NULL) {
                share->came_late();
            }
            return;
        }
        note_shortage(fd < 0 ? errno : ENOMEM);
        return;
    }
}

void
acceptor_event(void)
{
    if (share != NULL && share->has_enough()) {
        listener_left = true;
        taken = share->taken();
        pause_listener(PATIENCE);
        return;
    }
    accept_waiting(share != NULL ? 1 : ACCEPT_AT_ONCE);
}

/* --------------------------------------------------------------- accepting again */

static bool
someone_waits(void)
{
    struct pollfd wait = {.fd = listener_descriptor(), .events = POLLIN};

    return poll(&wait, 1, 0) > 0;
}

/* The time for others is over, or for a shortage. */
static void
listen_again(void)
{
    bool left = listener_left;

    watch_listener();
    if (left && accepting && someone_waits() && share->taken() == taken) {
        share->nobody_came();
        accept_waiting(1);
    }
}

double
acceptor_due(void)
{
    return accept_again;
}

void
acceptor_look(void)
{
    if (accept_again != 0 && monotonic_now() >= accept_again) {
        listen_again();
    }
}

/* Closed connections make room for new ones. */
bool
acceptor_has_room(void)
{
    if (accept_again == 0 || listener_left) {
        return false;
    }
    accept_again = 1; /* at once */
    return true;
}

/* It is judged anew when next something waits: that the others had no time says nothing of them. */
bool
acceptor_share_changed(void)
{
    bool was_left = listener_left;

    if (was_left) {
        listener_left = false;
        accept_again = 1; /* at once */
    }
    return was_left;
}

/* ------------------------------------------------------------------------- life */

bool
acceptor_begin(struct poller *waiting, void *tag, const struct engine_share *surrounding,
               const struct acceptor_client *served)
{
    poller = waiting;
    listener_tag = tag;
    share = surrounding;
    client = served;
    accepting = true;
    last_shortage = -SHORTAGE_OVER - 1;
    watch_listener();
    return listener_watched;
}

void
acceptor_take_rest(void)
{
    if (share == NULL) {
        accept_waiting(SOMAXCONN);
    }
}

void
acceptor_close(bool forked)
{
    unwatch_listener();
    accepting = false;
    accept_again = 0;
    listener_close(forked);
}

void
acceptor_forget(void)
{
    listener_watched = false;
}
