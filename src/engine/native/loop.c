/* The loop of the native engine. */

#include "loop.h"

#include <errno.h>
#include <limits.h>
#include <stddef.h>
#include <sys/socket.h>
#include <unistd.h>

#include "acceptor.h"
#include "clock.h"
#include "connection.h"
#include "poller.h"
#include "team.h"

#define TIMEOUT 7210             /* seconds for the MTA's next command: libmilter's */
#define MOST_DATA 65535          /* bytes in a packet: libmilter's MILTER_CHUNK_SIZE */
#define PACKETS_AT_ONCE 64       /* of one connection, while others wait */
#define HELD_BACK 262144         /* bytes that may wait to be sent before a callback has to wait */
#define SPIN_NS 50000            /* so long a leader looks before it sleeps */
#define SPIN_CONNECTIONS 2       /* with so few */
#define SPIN_CREDIT 8            /* times in a row that it may be in vain */
#define SLOW_NS 150000LL         /* a step that takes longer may wait for something: it is slow */
#define SLOW_FOR_NS 1000000000LL /* so long a step that was slow is taken for slow */
#define FLUSH_SECONDS 5.0        /* for MTAs to take what is due to them, when all has ended */
#define FINISH_SECONDS 1.0       /* for threads to end */
#define MOST_LOOPS 64
#define TURN_NS 1000000LL /* so long a turn may go on, where there is something to do */
#define ALARM_EARLY 0.002 /* seconds: libuv counts milliseconds, and is early by a part of one */

_Static_assert(SESSION_CUT_OFF == ENGINE_CUT_OFF, "the session passes on what completions return");

static struct smfiDesc filter;
static const struct engine_hooks *hooks;
static const struct engine_share *share;
static atomic_int timeout_seconds = TIMEOUT;
static atomic_size_t max_data = MOST_DATA;

/* One where callbacks take turns, else one for each processor.  All with the team's lock held. */
struct loop {
    struct seat seat; /* first: from a leader to its loop */
    struct poller *poller;
    struct connection *all;
    size_t connections;
    struct connection *queue, **queue_end;
    struct connection *served_by_leader;
    struct stock stock;
    double next_timeout; /* not before then has a connection waited for too long */
    atomic_bool polling; /* the leader waits, and has to be woken */
    bool all_told;       /* all that were watched are queued, since they are to end */
    bool claimed;        /* its leader makes room for the guest */
    int spin_credit;
};

static struct loop loops[MOST_LOOPS];
static struct seat *seats[MOST_LOOPS];
static size_t loop_count;   /* that have a leader */
static size_t poller_count; /* 0: nothing runs */
static size_t connections;  /* of all loops */
static bool ending;         /* end(): connections are to be closed */
static bool forked;

/* How long the last callback of a kind took, and when. */
static struct {
    atomic_llong duration;
    atomic_llong ended;
} steps[256];

/* The first loop accepts for all. */
static char listener_tag, lifeline_tag;

/* The guest leads the first loop, where that is the only one. */
static struct connection *served_by_guest; /* also after it has lost the lead */
static bool guest_dismissed;
static double guest_alarm; /* when it was promised a turn last */

/* How long a connection waits for its MTA, in seconds.  Not less than one, as there must be time to
 * look at what comes. */
static int
patience(void)
{
    return timeout_seconds > 0 ? timeout_seconds : 1;
}

/* ------------------------------------------------------------------------ queue */

static struct loop *
loop_of(const struct member *leader)
{
    return (struct loop *)leader->seat;
}

static void
wake_leader(struct loop *loop)
{
    if (loop->polling) {
        loop->polling = false;
        poller_wake(loop->poller);
    }
}

static void
wake_leaders(void)
{
    for (size_t i = 0; i < loop_count; i++) {
        wake_leader(&loops[i]);
    }
}

static void
enqueue(struct connection *connection)
{
    struct loop *loop = connection->loop;

    connection->state = QUEUED;
    connection->next_queued = NULL;
    *loop->queue_end = connection;
    loop->queue_end = &connection->next_queued;
}

static struct connection *
dequeue(struct loop *loop)
{
    struct connection *first = loop->queue;

    if (first != NULL) {
        loop->queue = first->next_queued;
        if (loop->queue == NULL) {
            loop->queue_end = &loop->queue;
        }
    }
    return first;
}

/* ----------------------------------------------------------------- connections */

static void
link_connection(struct loop *loop, struct connection *connection)
{
    connection->loop = loop;
    connection->previous = NULL;
    connection->next = loop->all;
    if (loop->all != NULL) {
        loop->all->previous = connection;
    }
    loop->all = connection;
    loop->connections++;
    connections++;
}

static void
unlink_connection(struct connection *connection)
{
    if (connection->previous != NULL) {
        connection->previous->next = connection->next;
    }
    else {
        connection->loop->all = connection->next;
    }
    if (connection->next != NULL) {
        connection->next->previous = connection->previous;
    }
    connection->loop->connections--;
    connections--;
}

static void
unwatch(struct connection *connection)
{
    if (connection->watched) {
        connection->watched = false;
        poller_remove(connection->loop->poller, connection->fd);
    }
}

/* Have the poller wait for what comes next of it; until then it takes little.  A connection that it
 * cannot wait for is over. */
static void
watch_connection(struct connection *connection)
{
    bool writing = connection_unsent(connection) > 0, done = true;

    connection_reclaim(connection, &connection->loop->stock);
    if (!connection->watched) {
        done = poller_add(connection->loop->poller, connection->fd, connection, writing, false);
        connection->watched = done;
    }
    else if (writing != connection->writing || connection->end_alone) {
        done = poller_change(connection->loop->poller, connection->fd, connection, writing);
    }
    connection->end_alone = false;
    connection->writing = writing;
    if (!done) {
        connection->at_end = true;
        connection->session.broken = true;
        enqueue(connection);
    }
}

/* Its callback is suspended: what comes of it waits, but that its MTA hangs up is of interest. */
static void
watch_for_end(struct connection *connection)
{
    connection->state = SUSPENDED;
    if (connection->hung_up) {
        unwatch(connection);
        if (!connection->told) {
            enqueue(connection);
            wake_leader(connection->loop);
        }
        return;
    }
    connection->watched =
        poller_watch_end(connection->loop->poller, connection->fd, connection, connection->watched);
    connection->end_alone = connection->watched;
    connection->writing = false;
}

static void
destroy(struct connection *connection)
{
    unwatch(connection);
    unlink_connection(connection);
    connection_reclaim(connection, &connection->loop->stock);
    connection_free(connection);
    if (ending) {
        tell_waiter(); /* that may have been the last */
    }
    if (acceptor_has_room()) {
        wake_leader(&loops[0]);
    }
}

/* ------------------------------------------------------------ serving connections */

/* In the event loop a coroutine's first step may take longer, as it has to go there anyhow. */
static bool
is_slow(const struct member *self, char command)
{
    long long limit = self == &guest ? LATE_NS : SLOW_NS;

    return atomic_load(&steps[(unsigned char)command].duration) > limit &&
           clock_ns() - atomic_load(&steps[(unsigned char)command].ended) < SLOW_FOR_NS;
}

/* The leader goes on with this connection alone: others shall be served meanwhile. */
static void
leave_lead(struct connection *connection)
{
    if (hand_over(&connection->loop->seat, connections + loop_count)) {
        unwatch(connection);
    }
}

static void
begin_callback(struct member *self, struct connection *connection, char command)
{
    if (is_slow(self, command)) {
        pthread_mutex_lock(&team_lock);
        if (is_leader(self)) {
            leave_lead(connection);
        }
        pthread_mutex_unlock(&team_lock);
    }
    self->command = command;
    atomic_store(&self->began, clock_ns());
}

static void
end_callback(struct member *self)
{
    long long now = clock_ns(), began = atomic_exchange(&self->began, 0);
    unsigned char command = (unsigned char)self->command;

    if (now - began > SLOW_NS || atomic_load(&steps[command].duration) > SLOW_NS) {
        atomic_store(&steps[command].duration, now - began);
        atomic_store(&steps[command].ended, now);
    }
}

/* With the lock held. */
static void
lead_is_late(struct seat *seat)
{
    struct connection *served = ((struct loop *)seat)->served_by_leader;

    if (served != NULL) {
        leave_lead(served);
    }
}

static enum session_result
next_step(struct member *self, struct connection *connection)
{
    struct packet packet;
    enum session_result result;

    if (connection->session.suspended) {
        engine_completion complete = connection->suspended.complete;

        connection->suspended.complete = NULL;
        connection->told = false; /* another one may be suspended, and is told again */
        begin_callback(self, connection, connection->session.command);
        result = session_complete(&connection->session, complete, connection->suspended.data);
        end_callback(self);
        return result;
    }
    switch (inbox_take(&connection->inbox, connection->session.max_data, &packet)) {
    case PACKET_NOT_YET:
        return SESSION_GOES_ON;
    case PACKET_BAD:
        hooks->log("error", "a packet without a command, or too large; the connection is closed");
        return SESSION_ENDS;
    case PACKET_THERE:
        break;
    }
    if (!session_calls(&connection->session, &packet)) {
        return session_take(&connection->session, &packet);
    }
    begin_callback(self, connection, packet.command);
    result = session_take(&connection->session, &packet);
    end_callback(self);
    return result;
}

static bool
has_packet(const struct connection *connection)
{
    return inbox_ready(&connection->inbox, connection->session.max_data);
}

/* Is there something to do for it, with what has come? */
static bool
has_work(const struct connection *connection)
{
    if (connection->session.suspended) {
        return connection->suspended.complete != NULL;
    }
    return connection->at_end || has_packet(connection) || connection->session.state == STATE_ENDED;
}

/* Its MTA has hung up while its callback is suspended: the filter need not go on. */
static void
tell_of_hang_up(struct connection *connection)
{
    if (connection->hung_up && !connection->told) {
        connection->told = true;
        if (hooks->hung_up != NULL) {
            hooks->hung_up(&connection->session);
        }
    }
}

/* Run its callbacks, as many as can be; false where it is over. */
static bool
serve(struct member *self, struct connection *connection)
{
    for (int count = 0; count < PACKETS_AT_ONCE; count++) {
        bool resumed = connection->session.suspended;

        if (resumed && connection->suspended.complete == NULL) {
            tell_of_hang_up(connection);
            return true;
        }
        if (!resumed && (connection->session.broken || !has_packet(connection))) {
            break;
        }
        if (!resumed && connection_unsent(connection) > 0) {
            return true; /* the MTA does not take what it asked for */
        }
        switch (next_step(self, connection)) {
        case SESSION_GOES_ON:
            connection_send(connection);
            break;
        case SESSION_SUSPENDED:
            return true; /* from here on the outbox belongs to who completes it */
        case SESSION_ENDS:
            connection_send(connection);
            return false;
        }
    }
    return !connection->session.broken && (!connection->at_end || has_packet(connection));
}

/* The end of a connection, with the callbacks that belong to it; false where one is suspended. */
static bool
close_connection(struct member *self, struct connection *connection)
{
    enum session_result result;

    begin_callback(self, connection, SMFIC_QUIT);
    result = session_end(&connection->session);
    end_callback(self);
    return result != SESSION_SUSPENDED;
}

/* End it for the MTA; what the filter has of the connection stays. */
static void
hang_up(struct connection *connection)
{
    shutdown(connection->fd, SHUT_RDWR);
}

/* What is next for a connection that was served: an end, or what it waits for.  With the lock. */
static void
settle(struct connection *connection, bool over)
{
    if (team_is_ending()) {
        hang_up(connection); /* nobody is there any more to serve it */
        connection->state = SUSPENDED;
    }
    else if (over && (connection_unsent(connection) == 0 || connection->session.broken)) {
        destroy(connection);
    }
    else if (over) {
        connection->active = monotonic_now();
        connection->state = FLUSHING;
        watch_connection(connection);
    }
    else if (connection->session.suspended) {
        if (connection->suspended.complete != NULL) {
            enqueue(connection); /* resumed meanwhile */
            wake_leader(connection->loop);
        }
        else {
            watch_for_end(connection);
        }
    }
    else if (ending) {
        connection_read_rest(connection, &connection->loop->stock);
        enqueue(connection);
        wake_leader(connection->loop);
    }
    else if (connection_unsent(connection) == 0 && has_work(connection)) {
        enqueue(connection);
        wake_leader(connection->loop); /* which this thread may not be */
    }
    else {
        connection->active = monotonic_now(); /* the MTA's time begins */
        connection->state = WATCHED;
        watch_connection(connection);
    }
}

/* Whether it is to be closed as all are, now that nothing of it is in progress. */
static bool
is_to_end(const struct connection *connection)
{
    return ending && !connection->session.suspended && !connection->has_rest;
}

static void
serve_queued(struct member *self, struct connection *connection)
{
    bool goes_on, over;
    bool end_now = is_to_end(connection);

    connection->state = SERVED;
    connection->has_rest |= ending && connection->session.suspended;
    if (!connection->session.suspended) { /* else the outbox belongs to who completes it */
        outbox_lend(&connection->session.outbox, &connection->loop->stock);
    }
    if (is_leader(self)) {
        connection->loop->served_by_leader = connection;
    }
    if (self == &guest) {
        served_by_guest = connection;
    }
    pthread_mutex_unlock(&team_lock);
    goes_on = !end_now && serve(self, connection);
    over = !goes_on && close_connection(self, connection);
    pthread_mutex_lock(&team_lock);
    if (is_leader(self)) {
        connection->loop->served_by_leader = NULL;
    }
    if (self == &guest) {
        served_by_guest = NULL;
    }
    settle(connection, over);
}

/* Does it lead, and shall it go on? */
static bool
goes_on_leading(const struct member *self)
{
    return is_leader(self) && !team_is_ending() &&
           !(self == &guest ? guest_dismissed : loop_of(self)->claimed);
}

/* What is queued, by who is in a batch, up to when it is time to look who else has come. */
static void
serve_all(struct member *self)
{
    struct loop *loop = loop_of(self);
    long long until = clock_ns() + TURN_NS;

    while (loop->queue != NULL && goes_on_leading(self) && clock_ns() < until) {
        serve_queued(self, dequeue(loop));
    }
}

/* The same, in one entry into the interpreter. */
static void
run_batch(struct member *self)
{
    bool inside;

    batch_begins(self);
    pthread_mutex_unlock(&team_lock);
    take_callback_mask(self);
    inside = hooks->enter();
    pthread_mutex_lock(&team_lock);
    serve_all(self);
    pthread_mutex_unlock(&team_lock);
    if (inside) {
        hooks->leave();
    }
    pthread_mutex_lock(&team_lock);
    batch_ends(self);
}

/* ------------------------------------------------------------- new connections */

static int driver_written(SMFICTX *session, bool urgent);
static void driver_log(const char *level, const char *text);
static const struct session_driver driver = {driver_written, driver_log};

static struct loop *
idlest_loop(void)
{
    struct loop *found = &loops[0];

    for (size_t i = 1; i < loop_count; i++) {
        if (loops[i].connections < found->connections) {
            found = &loops[i];
        }
    }
    return found;
}

static bool
take_in(int fd)
{
    struct connection *connection = connection_new(fd, &filter, &driver, max_data);
    struct loop *loop = idlest_loop();
    double timeout;

    if (connection == NULL) {
        close(fd);
        return false;
    }
    timeout = connection->active + patience();
    link_connection(loop, connection);
    watch_connection(connection);
    if (loop->next_timeout > timeout) {
        loop->next_timeout = timeout;
    }
    if (loop->connections == 1 || loop->next_timeout == timeout || connection->state == QUEUED) {
        wake_leader(loop); /* to look at the time, or at the connection */
    }
    return true;
}

static const struct acceptor_client acceptor_client = {take_in, driver_log};

/* ----------------------------------------------------------------- the leader's work */

static void
on_lifeline(void)
{
    poller_remove(loops[0].poller, share->lifeline);
    acceptor_close(forked);
    pthread_mutex_unlock(&team_lock);
    share->lifeline_ended();
    pthread_mutex_lock(&team_lock);
}

static void
on_connection(struct connection *connection, const struct poller_event *event)
{
    if (connection->session.suspended) {
        if (event->ended && connection->state == SUSPENDED && !connection->hung_up) {
            connection->hung_up = true;
            unwatch(connection);
            enqueue(connection);
        }
        return;
    }
    if (connection->state == FLUSHING) {
        connection_send(connection);
        if (connection_unsent(connection) == 0 || connection->session.broken) {
            destroy(connection);
        }
        return;
    }
    if (connection->writing && event->writable) {
        connection_send(connection);
        watch_connection(connection);
    }
    if (event->readable && !connection->writing && connection->state == WATCHED) {
        connection_read(connection, &connection->loop->stock);
    }
    if (connection->state == WATCHED && has_work(connection) && !connection->writing) {
        enqueue(connection);
    }
}

/* Has it waited for too long for its MTA?  If this process had no time for as long, what came
 * meanwhile has not been seen yet. */
static bool
has_timed_out(struct connection *connection, double now)
{
    if (connection->active + patience() > now) {
        return false;
    }
    if (connection->state == WATCHED && !connection->writing) {
        connection_read(connection, &connection->loop->stock);
    }
    return connection->active + patience() <= now;
}

static void
end_of_patience(struct connection *connection)
{
    if (connection->state == FLUSHING) {
        destroy(connection);
        return;
    }
    if (connection->writing) {
        connection_break(connection); /* its MTA does not take its answer */
    }
    connection->at_end = true;
    enqueue(connection);
}

static void
look_for_timeouts(struct loop *loop, double now)
{
    double earliest = now + patience();

    for (struct connection *each = loop->all, *next; each != NULL; each = next) {
        next = each->next;
        if (each->state != WATCHED && each->state != FLUSHING) {
            continue; /* its time begins when it was served; until then others write `active` */
        }
        if (has_timed_out(each, now)) {
            end_of_patience(each);
        }
        else if (each->state == WATCHED && has_work(each) && !each->writing) {
            enqueue(each);
        }
        else if (each->active + patience() < earliest) {
            earliest = each->active + patience();
        }
    }
    loop->next_timeout = earliest;
}

static void
queue_all(struct loop *loop)
{
    loop->all_told = true;
    for (struct connection *each = loop->all; each != NULL; each = each->next) {
        if (each->state == WATCHED) {
            enqueue(each);
        }
    }
}

/* How long the leader may sleep, in milliseconds. */
static int
time_to_sleep(const struct loop *loop)
{
    double until = loop == &loops[0] ? acceptor_due() : 0;

    if (loop->connections > 0 && (until == 0 || loop->next_timeout < until)) {
        until = loop->next_timeout;
    }
    return until == 0 ? -1 : milliseconds_until(until);
}

/* Look for a little while before going to sleep, where that has helped of late: to be woken takes
 * longer than an MTA takes for its next command. */
static int
poll_and_spin(struct loop *loop, struct poller_event events[POLLER_EVENTS], int timeout,
              bool may_spin)
{
    long long began = clock_ns();
    int count = 0;

    if (may_spin && loop->spin_credit > 0) {
        do {
            count = poller_wait(loop->poller, events, 0);
        } while (count == 0 && loop->polling && clock_ns() - began < SPIN_NS);
        loop->spin_credit = count > 0 ? SPIN_CREDIT : loop->spin_credit - 1;
        if (count > 0 || !loop->polling) {
            return count; /* woken: the poller has told so once and will not again */
        }
    }
    count = poller_wait(loop->poller, events, timeout);
    if (may_spin && count > 0 && clock_ns() - began < 2 * SPIN_NS) {
        loop->spin_credit = SPIN_CREDIT;
    }
    return count;
}

/* Wait for up to `timeout` milliseconds, and take in what there is. */
static void
poll_once(struct loop *loop, int timeout)
{
    struct poller_event events[POLLER_EVENTS];
    bool may_spin = timeout != 0 && loop->connections > 0 && connections <= SPIN_CONNECTIONS;
    int count;

    loop->polling = true;
    pthread_mutex_unlock(&team_lock);
    count = poll_and_spin(loop, events, timeout, may_spin);
    pthread_mutex_lock(&team_lock);
    loop->polling = false;
    for (int i = 0; i < count; i++) {
        if (events[i].tag == &listener_tag) {
            acceptor_event();
        }
        else if (events[i].tag == &lifeline_tag) {
            on_lifeline();
        }
        else {
            on_connection(events[i].tag, &events[i]);
        }
    }
    if (loop == &loops[0]) {
        acceptor_look();
    }
    if (loop->connections > 0 && monotonic_now() >= loop->next_timeout) {
        look_for_timeouts(loop, monotonic_now());
    }
}

/* The guest leads from here on, and has its first turn as soon as its loop has time. */
static void
make_room(struct loop *loop)
{
    loop->claimed = false;
    loop->seat.leader = &guest;
    guest.seat = &loop->seat;
    loop->polling = true;
    wake_leader(loop);
}

static void
lead(struct member *self)
{
    struct loop *loop = loop_of(self);

    while (is_leader(self) && !team_is_ending()) {
        if (loop->claimed) {
            make_room(loop);
            return;
        }
        if (ending && !loop->all_told) {
            queue_all(loop);
        }
        if (loop->queue == NULL) {
            poll_once(loop, time_to_sleep(loop));
            continue;
        }
        run_batch(self);
        if (loop->queue != NULL && is_leader(self) && !team_is_ending()) {
            poll_once(loop, 0);
        }
    }
}

/* --------------------------------------------------------- a loop of the program's */

int
loop_attend(void)
{
    int descriptor = -1;

    pthread_mutex_lock(&team_lock);
    if (poller_count == 1 && loop_count == 1 && !ending && !team_is_ending() && !forked) {
        descriptor = poller_descriptor(loops[0].poller);
    }
    if (descriptor >= 0) {
        guest_dismissed = false;
        guest_alarm = 0;
        loops[0].claimed = !is_leader(&guest);
        wake_leader(&loops[0]);
    }
    pthread_mutex_unlock(&team_lock);
    return descriptor;
}

/* One of the members leads again.  Where none can be had, the guest goes on. */
static void
take_lead_back(void)
{
    guest_dismissed = false;
    hand_over(&loops[0].seat, connections + loop_count);
}

static void
serve_for_a_while(struct loop *loop)
{
    long long began = clock_ns();

    do {
        if (ending && !loop->all_told) {
            queue_all(loop);
        }
        if (loop->queue == NULL) {
            poll_once(loop, 0);
        }
        if (loop->queue == NULL) {
            break;
        }
        batch_begins(&guest);
        serve_all(&guest);
        batch_ends(&guest);
    } while (goes_on_leading(&guest) && clock_ns() - began < TURN_NS);
}

/* When the guest's next turn is due, if nothing wakes it before. */
static long
next_turn(struct loop *loop)
{
    int sleep = time_to_sleep(loop);
    double now = monotonic_now(), until = now + sleep / 1000.0;

    loop->polling = true;
    if (loop->queue != NULL) {
        wake_leader(loop); /* others of its event loop come first */
    }
    if (sleep < 0 || (guest_alarm > now + ALARM_EARLY && guest_alarm <= until)) {
        return TURN_ON_CALL;
    }
    guest_alarm = until;
    return sleep;
}

long
loop_take_turn(void)
{
    struct loop *loop = &loops[0];
    long next = TURN_OVER;

    pthread_mutex_lock(&team_lock);
    if (loop->claimed || guest.in_turn) {
        next = TURN_ON_CALL; /* who led is about to make room; or a turn within a turn */
    }
    else if (is_leader(&guest) && !team_is_ending()) {
        guest.in_turn = true;
        loop->polling = false;
        serve_for_a_while(loop);
        end_turn();
        if (guest_dismissed && is_leader(&guest)) {
            take_lead_back();
        }
        if (is_leader(&guest) && !team_is_ending()) {
            next = next_turn(loop);
        }
    }
    pthread_mutex_unlock(&team_lock);
    return next;
}

/* With the lock held. */
static void
dismiss(void)
{
    loops[0].claimed = false;
    guest_dismissed = true;
    if (is_leader(&guest) && !guest.in_turn) {
        take_lead_back();
    }
}

void
loop_dismiss(void)
{
    pthread_mutex_lock(&team_lock);
    if (poller_count > 0) {
        dismiss();
    }
    pthread_mutex_unlock(&team_lock);
}

/* ------------------------------------------------------- what callbacks have written */

/* Is it served by a coroutine, or by the guest's turn? */
static bool
runs_in_event_loop(struct connection *connection)
{
    bool by_guest;

    pthread_mutex_lock(&team_lock);
    by_guest = served_by_guest == connection;
    pthread_mutex_unlock(&team_lock);
    return by_guest || connection->session.suspended;
}

static int
driver_written(SMFICTX *session, bool urgent)
{
    struct connection *connection = connection_of(session);
    void *released;
    bool sent;

    if (!urgent && connection_unsent(connection) < HELD_BACK) {
        return MI_SUCCESS;
    }
    if (!connection_send(connection)) {
        return MI_FAILURE;
    }
    if (connection_unsent(connection) == 0 ||
        (urgent && connection_unsent(connection) < HELD_BACK)) {
        return MI_SUCCESS;
    }
    if (runs_in_event_loop(connection)) {
        return MI_SUCCESS; /* which cannot wait: the rest goes out after the callback */
    }
    released = hooks->release();
    sent =
        connection_send_all(connection, patience() < INT_MAX / 1000 ? patience() * 1000 : INT_MAX);
    hooks->reacquire(released);
    return sent ? MI_SUCCESS : MI_FAILURE;
}

static void
driver_log(const char *level, const char *text)
{
    hooks->log(level, text);
}

struct engine_suspended *
loop_suspend(SMFICTX *context)
{
    struct connection *connection = connection_of(context);

    return session_suspend(context) ? &connection->suspended : NULL;
}

void
loop_resume(struct engine_suspended *suspended, engine_completion complete, void *data)
{
    struct connection *connection =
        (struct connection *)((char *)suspended - offsetof(struct connection, suspended));

    pthread_mutex_lock(&team_lock);
    suspended->data = data;
    suspended->complete = complete;
    if (connection->state == SUSPENDED) {
        enqueue(connection);
        wake_leader(connection->loop);
    }
    pthread_mutex_unlock(&team_lock);
}

/* ------------------------------------------------------------------------- life */

int
loop_set_up(const struct smfiDesc *description, const struct engine_hooks *surrounding)
{
    filter = *description;
    hooks = surrounding;
    return MI_SUCCESS;
}

int
loop_settimeout(int seconds)
{
    timeout_seconds = seconds;
    return MI_SUCCESS;
}

size_t
loop_setmaxdatasize(size_t bytes)
{
    size_t before = max_data;

    max_data = bytes;
    return before;
}

/* Callbacks that can run at once do so in loops of their own; where processes share the work, each
 * of them is one. */
static size_t
wanted_loops(void)
{
    size_t parallel = share == NULL ? hooks->parallel() : 1;

    return parallel < 1 ? 1 : parallel > MOST_LOOPS ? MOST_LOOPS : parallel;
}

/* What emptied boxes have left. */
static void
free_stocks(void)
{
    for (size_t i = 0; i < poller_count; i++) {
        stock_free(&loops[i].stock);
    }
}

static void
close_loops(void (*close_poller)(struct poller *poller))
{
    for (size_t i = 0; i < poller_count; i++) {
        close_poller(loops[i].poller);
        loops[i].poller = NULL;
        loops[i].polling = false;
    }
    loop_count = poller_count = 0;
}

/* 0, or an errno.  Where not all can be had, fewer do. */
static int
open_loops(void)
{
    size_t wanted = wanted_loops();

    while (poller_count < wanted) {
        struct loop *loop = &loops[poller_count];

        *loop = (struct loop){.poller = poller_open(), .queue_end = &loop->queue};
        if (loop->poller == NULL) {
            break;
        }
        loop->next_timeout = monotonic_now() + patience();
        seats[poller_count++] = &loop->seat;
    }
    return poller_count > 0 ? 0 : errno;
}

/* 0, or an errno. */
static int
begin_loops(void)
{
    if (!acceptor_begin(loops[0].poller, &listener_tag, share, &acceptor_client) ||
        (share != NULL && share->lifeline >= 0 &&
         !poller_add(loops[0].poller, share->lifeline, &lifeline_tag, false, false))) {
        return errno;
    }
    leader_is_late = lead_is_late;
    loop_count = poller_count;
    return team_begin(seats, &loop_count, lead, hooks->thread_ends);
}

int
loop_run(const struct engine_share *surrounding)
{
    int code;

    share = surrounding;
    ending = false;
    code = open_loops();
    if (code == 0) {
        code = begin_loops();
    }
    if (code != 0) {
        close_loops(poller_close);
        acceptor_forget();
    }
    return code;
}

/* Accept what is in the backlog: the kernel has told these that they are connected. */
void
loop_stop_accepting(void)
{
    pthread_mutex_lock(&team_lock);
    if (poller_count > 0) {
        acceptor_take_rest();
    }
    acceptor_close(forked);
    wake_leaders();
    pthread_mutex_unlock(&team_lock);
}

void
loop_share_changed(void)
{
    pthread_mutex_lock(&team_lock);
    if (poller_count > 0 && acceptor_share_changed()) {
        wake_leader(&loops[0]);
    }
    pthread_mutex_unlock(&team_lock);
}

void
loop_end(void)
{
    pthread_mutex_lock(&team_lock);
    ending = true;
    if (poller_count > 0) {
        dismiss(); /* its loop may be blocked, or end before us */
    }
    wake_leaders();
    pthread_mutex_unlock(&team_lock);
}

/* Whether nothing is left that the filter knows of. */
static bool
let_go_of_all(void)
{
    bool clean = true;

    for (size_t i = 0; i < MOST_LOOPS; i++) {
        struct loop *loop = &loops[i];

        for (struct connection *each = loop->all, *next; each != NULL; each = next) {
            next = each->next;
            if (session_has_to_close(&each->session) || each->session.suspended) {
                clean = false; /* the filter has its context still */
                hang_up(each);
            }
            else {
                unlink_connection(each);
                connection_free(each);
            }
        }
        loop->queue = NULL;
        loop->queue_end = &loop->queue;
    }
    return clean;
}

/* Some threads are left behind in callbacks; their connections are theirs. */
static void
hang_up_on_idle_ones(void)
{
    pthread_mutex_lock(&team_lock);
    for (size_t i = 0; i < loop_count; i++) {
        for (struct connection *each = loops[i].all; each != NULL; each = each->next) {
            if (each->state != SERVED) {
                hang_up(each);
            }
        }
    }
    pthread_mutex_unlock(&team_lock);
}

static bool
all_is_sent(void)
{
    for (size_t i = 0; i < loop_count; i++) {
        for (struct connection *each = loops[i].all; each != NULL; each = each->next) {
            if (each->state == FLUSHING) {
                return false;
            }
        }
    }
    return true;
}

bool
loop_finish(void)
{
    bool clean;

    if (forked) {
        return false;
    }
    pthread_mutex_lock(&team_lock);
    if (poller_count > 0) {
        wait_for_team(all_is_sent, FLUSH_SECONDS);
        end_team();
        wake_leaders();
    }
    pthread_mutex_unlock(&team_lock);
    if (poller_count > 0 && !team_has_ended(FINISH_SECONDS)) {
        hang_up_on_idle_ones();
        acceptor_close(forked);
        return false; /* some are in callbacks that do not return */
    }
    clean = let_go_of_all();
    acceptor_close(forked);
    free_stocks();
    close_loops(poller_close);
    return clean;
}

void
loop_forget(void)
{
    forked = true;
    team_forget();
    for (size_t i = 0; i < loop_count; i++) {
        for (struct connection *each = loops[i].all; each != NULL; each = each->next) {
            close(each->fd);
            each->fd = -1;
            each->session.broken = true;
        }
    }
    close_loops(poller_forget);
    acceptor_forget();
    acceptor_close(true);
}
