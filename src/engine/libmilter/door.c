/* Who of several processes accepts.
 *
 * Each process runs its own libmilter on the inherited descriptor.  Every libmilter would take what
 * it can get, and the one that is awake gets the next connection too.  So a process that has more
 * than its share stands back: the descriptor on which its libmilter listens is replaced by one that
 * nobody can reach; the door is closed.  A thread that never enters the filter, the porter, watches
 * the socket meanwhile.  When something arrives and the share has grown, the porter puts the
 * descriptor back at once; when nobody else takes the connection, after PATIENCE.
 *
 * The porter also watches the lifeline: see struct engine_share.
 */

#include "door.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "descriptors.h"
#include "listener.h"
#include "surroundings.h"
#include "wake.h"

#define PATIENCE 3          /* ms that a connection waits for the process whose turn it is */
#define PORTER_STACK 131072 /* bytes */

static int dummy = -1;       /* a socket that nobody can reach */
static atomic_int real = -1; /* a duplicate of the listening socket, while the door is in use */
static int bell[2] = {-1, -1};
static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;
static bool open_door = true; /* libmilter listens on the real socket; guarded by `door` */

int
share_door(void)
{
    int flags = fcntl(listening_descriptor(), F_GETFL);

    /* Two processes may wake for a connection that only one of them gets. */
    if (flags < 0 || fcntl(listening_descriptor(), F_SETFL, flags | O_NONBLOCK) < 0 ||
        (dummy = open_dummy_listener()) < 0) {
        return errno;
    }
    listener_is_shared();
    return 0;
}

void
prepare_door(sigset_t *mask)
{
    if (share != NULL && listening_descriptor() >= 0 && choose_wake_signal(mask) &&
        atomic_load(&real) < 0) {
        atomic_store(&real, fcntl(listening_descriptor(), F_DUPFD_CLOEXEC, 0));
    }
}

static void
ring_porter(void)
{
    (void)!write(bell[1], "", 1);
}

/* Called with `door` locked. */
static void
move_door(bool open)
{
    int socket = atomic_load(&real);

    if (open == open_door || socket < 0 ||
        !replace_descriptor(open ? socket : dummy, listening_descriptor())) {
        return;
    }
    open_door = open;
    if (open) {
        wake_listener();
    }
    else {
        ring_porter();
    }
}

/* Says whether the door is open. */
static bool
settle(void)
{
    bool open;

    pthread_mutex_lock(&door);
    move_door(!share->has_enough());
    open = open_door;
    pthread_mutex_unlock(&door);
    return open;
}

void
look_after_door(void)
{
    if (share != NULL && atomic_load(&real) >= 0) {
        (void)settle();
    }
}

void
open_the_door(void)
{
    if (share != NULL) {
        pthread_mutex_lock(&door);
        move_door(true);
        pthread_mutex_unlock(&door);
    }
}

static bool
stands_back(void)
{
    bool closed;

    pthread_mutex_lock(&door);
    closed = !open_door;
    pthread_mutex_unlock(&door);
    return closed;
}

static bool
is_readable(int fd)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};

    return poll(&wait, 1, 0) > 0;
}

/* This process has no more to do with the listening socket, which lives on where others have it. It
 * must not be shut down: libmilter would take that for a failure, and cut messages in progress. */
bool
close_the_door(void)
{
    bool closed;
    int socket;

    if (share == NULL) {
        return false;
    }
    pthread_mutex_lock(&door);
    move_door(false);
    closed = !open_door;
    socket = atomic_exchange(&real, -1);
    pthread_mutex_unlock(&door);
    if (socket >= 0) {
        close(socket);
        wake_listener();
    }
    return closed;
}

static void *
be_porter(void *arg)
{
    int lifeline = share->lifeline;
    char bytes[64];

    (void)arg;
    for (;;) {
        struct pollfd wait[] = {{.fd = bell[0], .events = POLLIN},
                                {.fd = lifeline, .events = POLLIN},
                                {.fd = stands_back() ? atomic_load(&real) : -1, .events = POLLIN}};
        poll(wait, 3, -1);
        while (read(bell[0], bytes, sizeof bytes) > 0) {
        }
        if (wait[1].revents != 0) {
            lifeline = -1;
            close_the_door();
            share->lifeline_ended();
        }
        if (wait[2].revents != 0 && !settle()) {
            unsigned long taken = share->taken();

            poll(wait, 2, PATIENCE);
            if (is_readable(atomic_load(&real)) && share->taken() == taken) {
                share->nobody_came();
                open_the_door();
            }
        }
    }
    return NULL;
}

static bool
start_thread(void)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    int code;

    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, PORTER_STACK);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    code = pthread_create(&thread, &attributes, be_porter, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return code == 0;
}

void
start_porter(void)
{
    if (share != NULL && (!open_wake_pipe(bell) || !start_thread())) {
        share->lifeline_ended(); /* nobody would see it */
    }
}

void
forget_door(void)
{
    int socket = atomic_exchange(&real, -1);

    if (socket >= 0) {
        close(socket);
    }
}
