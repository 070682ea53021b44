/* The turnstile in front of the interpreter lock.
 *
 * libmilter calls back on as many threads as there are busy connections.  A callback is in
 * Python for a microsecond or two, so that two rarely meet; but once one thread is taken off
 * its core while it has the interpreter lock, the others arrive, go to sleep on the lock, and
 * from then on every release wakes one of them: a convoy, which costs six futex calls and two
 * changes of context for each callback and does not dissolve by itself.
 *
 * So libmilter's threads pass a turnstile first, one at a time:
 *
 *  - Whoever finds it taken spins for the length of a few callbacks before going to sleep, and
 *    a release wakes one sleeper only where none is on its way already.  At most one thread
 *    of libmilter waits for the interpreter lock, the others wait here.
 *  - A callback may give up the interpreter lock and block.  Nobody outside of CPython can see
 *    that, but time tells: one of the sleepers, the watcher, takes over from a holder that
 *    has been in its callback for longer than PATIENCE.
 *  - That would still cost each blocking callback PATIENCE of everybody's time.  So it is
 *    remembered which steps tend to be slow: these only walk through, and leave the
 *    turnstile behind as soon as they have the interpreter lock.
 *
 * Nothing depends on the turnstile but speed: being overtaken, or two threads inside at a
 * time, is no error.  Without a global interpreter lock there is nothing to queue for, and it is
 * left out (PYMILTER_TURNSTILE in setup.py).
 */

#include "turnstile.h"

#if PYMILTER_TURNSTILE

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#include "surroundings.h"

#ifdef SYS_futex /* 32-bit systems of late have another one only */
#define USE_FUTEX 1
#else
#define USE_FUTEX 0
#endif

#define PATIENCE 500   /* µs in a callback after which the holder is overtaken */
#define BACKSTOP 20000 /* µs that the sleepers wait who do not watch */
#define SPINS 60       /* rounds, each of some 50 ns */
#define SLOW 200       /* µs from which a callback counts as slow */
#define SLOW_STEP 16   /* what a slow callback adds to its step's score; a quick one takes 1 */
#define SLOW_LIMIT 64

/* `holder` is NOBODY, or WAITS_FOR_LOCK while a thread that has passed waits for the interpreter
 * lock, or (start_µs << 1) | 1 while a callback runs that began at start_µs. */
enum { NOBODY = 0, WAITS_FOR_LOCK = 2 };

static struct {
    _Alignas(64) atomic_uint holder;
    atomic_int sleepers;
    atomic_bool waking;  /* one of them is on its way */
    atomic_bool watched; /* one of them watches the holder's age */
} turnstile;

/* How slow each step has been lately; written by whoever has the interpreter lock. */
static atomic_int slowness[STAGES];

/* What this thread wrote into `holder`, or NOBODY. */
static _Thread_local unsigned ticket;

static unsigned
microseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned)((unsigned long long)now.tv_sec * 1000000 + (unsigned)(now.tv_nsec / 1000));
}

/* What `holder` is for a callback that begins now. */
static unsigned
running_since_now(void)
{
    return microseconds() << 1 | 1;
}

/* Microseconds since a callback began, from what `holder` is for it. */
static unsigned
age_of(unsigned running)
{
    return (running_since_now() - running) >> 1;
}

static void
relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
    __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__arm__) && __ARM_ARCH >= 7)
    __asm__ __volatile__("yield");
#endif
}

#if USE_FUTEX

static void
sleep_while(unsigned seen, unsigned patience)
{
    /* The kernel's own timespec, which is not the C library's where that has 64-bit times. */
    long timeout[2] = {0, (long)patience * 1000};

    syscall(SYS_futex, &turnstile.holder, FUTEX_WAIT_PRIVATE, seen, timeout, NULL, 0);
}

static void
wake_one(void)
{
    syscall(SYS_futex, &turnstile.holder, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}
#else

static pthread_mutex_t bench = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t bell = PTHREAD_COND_INITIALIZER;

static void
sleep_while(unsigned seen, unsigned patience)
{
    struct timespec until;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)patience * 1000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&bench);
    if (atomic_load(&turnstile.holder) == seen) {
        pthread_cond_timedwait(&bell, &bench, &until);
    }
    pthread_mutex_unlock(&bench);
}

static void
wake_one(void)
{
    pthread_mutex_lock(&bench);
    pthread_cond_signal(&bell);
    pthread_mutex_unlock(&bench);
}
#endif

static bool
take_place_of(unsigned holder)
{
    if (atomic_compare_exchange_strong(&turnstile.holder, &holder, WAITS_FOR_LOCK)) {
        ticket = WAITS_FOR_LOCK;
        return true;
    }
    return false;
}

static bool
spin(void)
{
    for (int i = 0; i < SPINS; i++) {
        relax();
        if (atomic_load_explicit(&turnstile.holder, memory_order_relaxed) == NOBODY &&
            take_place_of(NOBODY)) {
            return true;
        }
    }
    return false;
}

static void
queue_up(void)
{
    bool inside = false;

    atomic_fetch_add(&turnstile.sleepers, 1);
    while (!inside) {
        unsigned holder = atomic_load(&turnstile.holder);
        bool watcher;

        if (holder == NOBODY || ((holder & 1) != 0 && age_of(holder) > PATIENCE)) {
            inside = take_place_of(holder);
            if (inside && holder != NOBODY && atomic_load(&turnstile.sleepers) > 1) {
                wake_one(); /* to watch in our place */
            }
            continue;
        }
        watcher = !atomic_exchange(&turnstile.watched, true);
        sleep_while(holder, watcher ? PATIENCE : BACKSTOP);
        if (watcher) {
            atomic_store(&turnstile.watched, false);
        }
        atomic_store(&turnstile.waking, false);
        inside = spin();
    }
    atomic_fetch_sub(&turnstile.sleepers, 1);
}

void
enter_turnstile(void)
{
    if (atomic_load(&forked)) {
        return; /* whoever was inside is in the parent */
    }
    if (!take_place_of(NOBODY) && !spin()) {
        queue_up();
    }
}

bool
leave_turnstile(void)
{
    unsigned mine = ticket;

    if (mine == NOBODY) {
        return false;
    }
    ticket = NOBODY;
    if (atomic_compare_exchange_strong(&turnstile.holder, &mine, NOBODY) &&
        atomic_load(&turnstile.sleepers) > 0 && !atomic_exchange(&turnstile.waking, true)) {
        wake_one();
    }
    return true;
}

/* From here on the patience of the others counts. */
unsigned
pass_turnstile(enum stage stage)
{
    unsigned now = running_since_now();

    if (stage != OUTSIDE &&
        atomic_load_explicit(&slowness[stage], memory_order_relaxed) > SLOW_STEP) {
        leave_turnstile();
    }
    else {
        /* WAITS_FOR_LOCK has no age, so that nobody has overtaken us: a plain store will do. */
        atomic_store(&turnstile.holder, now);
        ticket = now;
    }
    return now;
}

void
judge(enum stage stage, unsigned began)
{
    int score = atomic_load_explicit(&slowness[stage], memory_order_relaxed);

    if (score == 0 && atomic_load_explicit(&turnstile.sleepers, memory_order_relaxed) == 0) {
        return;
    }
    score += age_of(began) > SLOW ? SLOW_STEP : -1;
    score = score < 0 ? 0 : score > SLOW_LIMIT ? SLOW_LIMIT : score;
    atomic_store_explicit(&slowness[stage], score, memory_order_relaxed);
}

#endif
