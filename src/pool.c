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

#include "milter.h"

#define TICK 5         /* ms */
#define QUIET_TICKS 40 /* without need of a look, until main() sleeps again */
#define MAX_NUDGES 16  /* at a time */
#define MAX_PAUSE 200  /* ticks between nudges that bring nothing */

static atomic_bool ticking; /* main() looks at the pool every TICK */

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
    long inside = atomic_load(&filter.inside);

    return inside > 0 && inside >= atomic_load(&filter.workers);
}

/* On the way into a callback. */
void
watch_pool(void)
{
    if (!atomic_load(&ticking) && all_are_busy() && !atomic_exchange(&ticking, true)) {
        wake_main();
    }
}

static void
nudge(void)
{
    long workers = atomic_load(&filter.workers);
    bool helped = watch.nudges > 0 && workers > watch.workers;

    watch.nudges = helped ? Py_MIN(2 * watch.nudges, MAX_NUDGES) : 1;
    watch.next_pause = helped ? 1 : Py_MIN(2 * watch.next_pause + 1, MAX_PAUSE);
    watch.pause = watch.next_pause;
    watch.workers = workers;
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

/* poll() for main(), without the interpreter lock; the pool is looked after meanwhile. */
int
poll_and_tend_pool(struct pollfd *wait, int timeout)
{
    int ready = 0;

    while (timeout < 0 && ready == 0 && atomic_load(&ticking)) {
        ready = poll(wait, 1, TICK);
        if (!look()) {
            atomic_store(&ticking, false);
            /* A callback that was the last to begin may have relied on our looking. */
            if (all_are_busy()) {
                atomic_store(&ticking, true);
            }
        }
    }
    return ready != 0 ? ready : poll(wait, 1, timeout);
}
