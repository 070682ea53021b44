/* The threads of the native engine: one leads each loop, those in callbacks that take long follow
 * on their own, the rest sleep until they are needed.  A watch sees to it that none of them holds
 * up the others. */

#ifndef PYMILTER_ENGINE_NATIVE_TEAM_H
#define PYMILTER_ENGINE_NATIVE_TEAM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

struct member;

/* The lead of a loop, which one member has at a time. */
struct seat {
    struct member *leader;
};

struct member {
    pthread_t thread;
    struct seat *seat; /* which it has, or has had last */
    pthread_cond_t wake;
    struct member *next_idle; /* of those that sleep */
    struct member *next;      /* of all */
    bool idle;
    bool has_mask;      /* that of callbacks */
    bool ended;         /* or about to: it is to be joined */
    bool in_turn;       /* the guest: see below */
    bool in_batch;      /* from before it enters the interpreter until it has left */
    atomic_llong began; /* its callback, in ns of the monotonic clock; 0: it is in none */
    char command;       /* of which it is the callback */
};

/* Guards all that the members share, of the team and of the loop. */
extern pthread_mutex_t team_lock;

/* Leads for as long as its turns last, on a thread of the program's: it is none of the members. */
extern struct member guest;

/* Begin, with one member for each of `count` seats, which leads; with the lock not held.  `lead` is
 * called with the lock held on whichever thread leads, and returns when that is no longer so;
 * `thread_ends` last on each.  Where not so many threads can be had the count is made less, down to
 * one.  0, or an errno. */
int team_begin(struct seat *const *seats, size_t *count, void (*lead)(struct member *self),
               void (*thread_ends)(void));

/* Before a member's callbacks: its signal mask is that of who called team_begin().  Until then it
 * blocks all, as a thread that begins, or unblocks, may take a signal that has woken another. */
void take_callback_mask(struct member *self);

/* --- with the lock held */

bool is_leader(const struct member *member);

/* Somebody else shall lead from now on: true where there is somebody.  `at_most`: there need not be
 * more members than that. */
bool hand_over(struct seat *seat, size_t at_most);

/* The guest's turn is over. */
void end_turn(void);

/* Around each batch.  While a leader is in one the watch is awake: it cannot know when the next
 * callback begins, which may be the one that takes long. */
void batch_begins(struct member *self);
void batch_ends(struct member *self);

/* Wait until `done` says so, for `seconds` at most; it is asked again at each tell_waiter(). */
void wait_for_team(bool (*done)(void), double seconds);
void tell_waiter(void);

/* All are to end, as soon as they are in no callback. */
void end_team(void);
bool team_is_ending(void);

/* Called by the watch before it has somebody else lead, as the leader's callback takes long. */
extern void (*leader_is_late)(struct seat *seat);

/* --- */

/* After end_team(): wait until all threads have ended, for `seconds` at most, and join them. False:
 * some have not. */
bool team_has_ended(double seconds);

/* In the child of a fork: they are not here. */
void team_forget(void);

/* Nanoseconds of the monotonic clock. */
long long clock_ns(void);

#define LATE_NS 500000LL /* a callback that takes longer holds up others */

#endif
