/* Keep libmilter's pool of workers from running dry.
 *
 * Where libmilter is built with a pool (Debian, Fedora), a command goes to an idle worker, and a
 * new worker is started only where none is idle.  A worker counts as idle until it has woken
 * up, however many commands were handed to it meanwhile: after a burst most of them wait in a
 * queue, with nobody coming.  That is no matter as long as callbacks take microseconds.  But if
 * the few workers then block, on a look-up for instance, everybody else waits for them, and a
 * filter that could serve 600 messages in a second serves 40.
 *
 * Nobody outside of libmilter can see that queue; it may hold connections that have not even
 * negotiated.  So while all the workers that we know of are in callbacks, main() looks at them
 * every TICK.  Where that lasts it nudges libmilter: by a connection that ends at once, for
 * which it has to start a worker, which then takes what waits in the queue.  If no new worker
 * shows up in a callback there was nothing, and the next nudge is put off for longer.
 */

#include "pool.h"

#include <stdatomic.h>

#include "door.h"
#include "listener.h"
#include "lost.h"
#include "wake.h"

#define TICK 5         /* ms */
#define QUIET_TICKS 40 /* without need of a look, until main() sleeps again */
#define MAX_NUDGES 16  /* at a time */
#define MAX_PAUSE 200  /* ticks between nudges that bring nothing */

#define MIN(a, b) ((a) < (b) ? (a) : (b))

static atomic_bool ticking; /* main() looks at the pool every TICK */
static atomic_long workers; /* threads of libmilter that have run a callback other than close */
static atomic_long busy;    /* threads of libmilter that are in a callback, or on the way */

/* What main() remembers from tick to tick. */
static struct {
    int quiet;  /* ticks since all were busy */
    int busy;   /* ticks for which all have been */
    int nudges; /* how many at the last time */
    int pause;  /* ticks to wait before the next */
    int next_pause;
    long workers; /* at the last nudge */
} watch;

static bool
all_are_busy(void)
{
    long in_callbacks = atomic_load(&busy);

    return in_callbacks > 0 && in_callbacks >= atomic_load(&workers);
}

void
count_worker(int change)
{
    atomic_fetch_add(&workers, change);
}

void
enter_pool(void)
{
    atomic_fetch_add(&busy, 1);
    if (!atomic_load(&ticking) && all_are_busy() && !atomic_exchange(&ticking, true)) {
        wake_main();
    }
}

void
leave_pool(void)
{
    atomic_fetch_sub(&busy, 1);
}

static void
nudge(void)
{
    long now = atomic_load(&workers);
    bool helped = watch.nudges > 0 && now > watch.workers;

    watch.nudges = helped ? MIN(2 * watch.nudges, MAX_NUDGES) : 1;
    watch.next_pause = helped ? 1 : MIN(2 * watch.next_pause + 1, MAX_PAUSE);
    watch.pause = watch.next_pause;
    watch.workers = now;
    open_the_door(); /* with several processes on the socket, another may take a nudge */
    for (int i = 0; i < watch.nudges; i++) {
        poke_listener();
    }
}

/* One look at the pool.  False once it needs no more for a while. */
static bool
look(void)
{
    watch.pause -= watch.pause > 0;
    if (all_are_busy()) {
        watch.quiet = 0;
        if (++watch.busy > 1 && watch.pause == 0) {
            nudge();
        }
        return true;
    }
    watch.busy = 0;
    if (++watch.quiet <= QUIET_TICKS) {
        return true;
    }
    watch.quiet = watch.nudges = watch.pause = watch.next_pause = 0;
    return false;
}

/* Look, and decide whether to look again. */
static void
tend_pool(void)
{
    if (!look()) {
        atomic_store(&ticking, false);
        /* A callback that has just begun and found `ticking` set did not wake main(). */
        if (all_are_busy()) {
            atomic_store(&ticking, true);
        }
    }
}

int
poll_and_tend_pool(struct pollfd *wait, nfds_t count, int timeout)
{
    int ready = 0;

    if (timeout >= 0) {
        return poll(wait, count, timeout);
    }
    while (ready == 0) {
        look_for_lost_sessions();
        if (atomic_load(&ticking)) {
            ready = poll(wait, count, TICK);
            tend_pool();
        }
        else {
            ready = poll(wait, count, time_to_look());
        }
    }
    return ready;
}
