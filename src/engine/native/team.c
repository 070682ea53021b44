/* The threads of the native engine. */

#include "team.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>

#include "clock.h"
#include "signal_sets.h"

#define IDLE_SECONDS 60       /* so long a thread sleeps before it ends */
#define WATCH_NS 20000000LL   /* so long the watch stays awake after the last batch */
#define RECRUIT_NS 20000000LL /* so long none is looked for where the last one could not be had */
#define LEAST_STACK (1 << 20) /* bytes: Python's limit of recursion relies on it */

pthread_mutex_t team_lock = PTHREAD_MUTEX_INITIALIZER;
struct member guest;
void (*leader_is_late)(struct seat *seat);

static void (*lead_loop)(struct member *self);
static void (*last_words)(void);

/* With the lock held. */
static struct seat *const *seats;
static size_t seat_count;
static struct member *members; /* all that have not been joined */
static struct member *idle;
static size_t count; /* of members that have not ended */
static bool ending;
static long long no_recruit;    /* when the last one could not be had */
static pthread_cond_t progress; /* for who waits for the team: someone has ended, for one */
static sigset_t callback_mask;  /* of who called team_begin() */
static struct {
    pthread_t thread;
    pthread_cond_t wake;
    bool runs;
    bool asleep;
    long long active; /* when the last batch ended */
} watch;

long long
clock_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void
make_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
#ifndef __APPLE__ /* whose waits are relative by another function */
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* Wait for up to `seconds`; false where the time is over. */
static bool
wait_for(pthread_cond_t *condition, double seconds)
{
    struct timespec limit;

#ifdef __APPLE__
    clock_gettime(CLOCK_REALTIME, &limit);
#else
    clock_gettime(CLOCK_MONOTONIC, &limit);
#endif
    limit.tv_sec += (time_t)seconds;
    limit.tv_nsec += (long)((seconds - (double)(time_t)seconds) * 1e9);
    if (limit.tv_nsec >= 1000000000L) {
        limit.tv_sec++;
        limit.tv_nsec -= 1000000000L;
    }
    return pthread_cond_timedwait(condition, &team_lock, &limit) != ETIMEDOUT;
}

/* ------------------------------------------------------------------ members */

bool
is_leader(const struct member *member)
{
    return member->seat != NULL && member->seat->leader == member;
}

static void
leave_idle(struct member *self)
{
    struct member **at = &idle;

    while (*at != NULL && *at != self) {
        at = &(*at)->next_idle;
    }
    if (*at == self) {
        *at = self->next_idle;
    }
    self->idle = false;
}

/* Sleep until it is to lead; false: enough of that. */
static bool
sleep_until_needed(struct member *self)
{
    bool in_time = true;

    self->idle = true;
    self->next_idle = idle;
    idle = self;
    while (!is_leader(self) && !ending && in_time) {
        in_time = wait_for(&self->wake, IDLE_SECONDS);
    }
    if (self->idle) {
        leave_idle(self);
    }
    /* While the guest leads, one stays to take its place. */
    return is_leader(self) || (!ending && (in_time || count <= seat_count));
}

/* Those that have ended by themselves. */
static void
bury_the_dead(void)
{
    struct member **at = &members;

    while (*at != NULL) {
        struct member *member = *at;

        if (member->ended) {
            *at = member->next;
            pthread_join(member->thread, NULL); /* it holds no lock any more */
            pthread_cond_destroy(&member->wake);
            free(member);
        }
        else {
            at = &member->next;
        }
    }
}

static void *
be_member(void *argument)
{
    struct member *self = argument;

    pthread_mutex_lock(&team_lock);
    while (!ending) {
        if (is_leader(self)) {
            lead_loop(self);
        }
        else if (!sleep_until_needed(self)) {
            break;
        }
    }
    if (is_leader(self)) {
        self->seat->leader = NULL;
    }
    pthread_mutex_unlock(&team_lock);
    last_words();
    pthread_mutex_lock(&team_lock);
    bury_the_dead(); /* so that one at most waits for that */
    self->ended = true;
    count--;
    tell_waiter();
    pthread_mutex_unlock(&team_lock);
    return NULL;
}

void
take_callback_mask(struct member *self)
{
    if (!self->has_mask) {
        pthread_sigmask(SIG_SETMASK, &callback_mask, NULL);
        self->has_mask = true;
    }
}

/* Threads of the C library may have little stack (musl: 128 KiB).  The new one blocks all signals
 * but faults. */
static int
start(pthread_t *thread, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, mask;
    size_t size;
    int code;

    fill_but_faults(&all);
    pthread_attr_init(&attributes);
    if (pthread_attr_getstacksize(&attributes, &size) == 0 && size < LEAST_STACK) {
        pthread_attr_setstacksize(&attributes, LEAST_STACK);
    }
    pthread_sigmask(SIG_SETMASK, &all, &mask);
    code = pthread_create(thread, &attributes, run, argument);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    pthread_attr_destroy(&attributes);
    return code;
}

/* A new member, which leads. */
static int
recruit_leader(struct seat *seat)
{
    struct member *member = calloc(1, sizeof *member);
    struct member *before = seat->leader;
    int code;

    if (member == NULL) {
        return ENOMEM;
    }
    make_condition(&member->wake);
    member->seat = seat;
    seat->leader = member;
    code = start(&member->thread, be_member, member);
    if (code != 0) {
        seat->leader = before;
        pthread_cond_destroy(&member->wake);
        free(member);
        return code;
    }
    member->next = members;
    members = member;
    count++;
    return 0;
}

bool
hand_over(struct seat *seat, size_t at_most)
{
    bury_the_dead();
    if (idle != NULL) {
        struct member *member = idle;

        leave_idle(member);
        member->seat = seat;
        seat->leader = member;
        pthread_cond_signal(&member->wake);
        return true;
    }
    if (count >= at_most || clock_ns() - no_recruit < RECRUIT_NS) {
        return false;
    }
    if (recruit_leader(seat) != 0) {
        no_recruit = clock_ns();
        return false;
    }
    return true;
}

void
tell_waiter(void)
{
    pthread_cond_signal(&progress);
}

void
wait_for_team(bool (*done)(void), double seconds)
{
    double deadline = monotonic_now() + seconds;

    while (!done() && monotonic_now() < deadline) {
        wait_for(&progress, deadline - monotonic_now());
    }
}

void
end_turn(void)
{
    guest.in_turn = false;
    tell_waiter();
}

void
end_team(void)
{
    ending = true;
    for (struct member *member = idle; member != NULL; member = member->next_idle) {
        pthread_cond_signal(&member->wake);
    }
    pthread_cond_signal(&watch.wake);
}

bool
team_is_ending(void)
{
    return ending;
}

/* -------------------------------------------------------------------- the watch */

void
batch_begins(struct member *self)
{
    self->in_batch = true;
    if (watch.asleep) {
        watch.asleep = false;
        pthread_cond_signal(&watch.wake);
    }
}

void
batch_ends(struct member *self)
{
    self->in_batch = false;
    watch.active = clock_ns();
}

/* When the callback began in which this leader is; 0: in none. */
static long long
leader_began(const struct seat *seat)
{
    return seat->leader != NULL ? atomic_load(&seat->leader->began) : 0;
}

static bool
some_leader_is_in_a_batch(void)
{
    for (size_t i = 0; i < seat_count; i++) {
        if (seats[i]->leader != NULL && seats[i]->leader->in_batch) {
            return true;
        }
    }
    return false;
}

static void
look_after_leaders(void)
{
    for (size_t i = 0; i < seat_count; i++) {
        long long began = leader_began(seats[i]);

        if (began != 0 && clock_ns() - began > LATE_NS) {
            leader_is_late(seats[i]);
        }
    }
}

static void *
be_watch(void *argument)
{
    const struct timespec tick = {.tv_nsec = LATE_NS};

    (void)argument;
    pthread_mutex_lock(&team_lock);
    while (!ending) {
        if (!some_leader_is_in_a_batch() && clock_ns() - watch.active > WATCH_NS) {
            watch.asleep = true;
            while (watch.asleep && !ending) {
                pthread_cond_wait(&watch.wake, &team_lock);
            }
            continue;
        }
        pthread_mutex_unlock(&team_lock);
        nanosleep(&tick, NULL);
        pthread_mutex_lock(&team_lock);
        if (!ending) {
            look_after_leaders();
        }
    }
    pthread_mutex_unlock(&team_lock);
    return NULL;
}

/* --------------------------------------------------------------------- life */

int
team_begin(struct seat *const *all, size_t *most, void (*lead)(struct member *self),
           void (*thread_ends)(void))
{
    int code = 0;

    lead_loop = lead;
    last_words = thread_ends;
    make_condition(&progress);
    make_condition(&watch.wake);
    pthread_mutex_lock(&team_lock);
    ending = false;
    guest = (struct member){.has_mask = true};
    no_recruit = -RECRUIT_NS;
    watch.asleep = false;
    pthread_sigmask(SIG_SETMASK, NULL, &callback_mask);
    seats = all;
    for (seat_count = 0; seat_count < *most && code == 0; seat_count += code == 0) {
        code = recruit_leader(seats[seat_count]);
    }
    if (seat_count > 0) {
        *most = seat_count;
        code = 0;
    }
    /* Without it a callback that takes long holds up the others; they are served all the same. */
    watch.runs = code == 0 && start(&watch.thread, be_watch, NULL) == 0;
    pthread_mutex_unlock(&team_lock);
    return code;
}

/* Those that are left are in callbacks.  The others' end is near. */
static bool
none_is_about_to_end(void)
{
    for (const struct member *member = members; member != NULL; member = member->next) {
        if (!member->ended && atomic_load(&member->began) == 0) {
            return false;
        }
    }
    return !guest.in_turn || atomic_load(&guest.began) != 0;
}

bool
team_has_ended(double seconds)
{
    bool all;

    pthread_mutex_lock(&team_lock);
    wait_for_team(none_is_about_to_end, seconds);
    bury_the_dead();
    all = count == 0 && !guest.in_turn;
    pthread_mutex_unlock(&team_lock);
    if (watch.runs) {
        pthread_join(watch.thread, NULL);
        watch.runs = false;
    }
    return all;
}

void
team_forget(void)
{
    pthread_mutex_init(&team_lock, NULL); /* its holder may not have been forked */
    idle = members = NULL;
    guest = (struct member){.has_mask = true};
    count = seat_count = 0;
    watch.runs = false;
    ending = true;
}
