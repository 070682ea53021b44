#include "crew.h"

#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>

#include "engine/choice.h"
#include "process.h"

#define TOLERANCE 8 /* one connection in so many more than others have is no matter */

typedef struct {
    _Alignas(64) atomic_long connections;
    atomic_bool serving;
    atomic_bool slow; /* left a connection waiting, and has not come for one since */
} Worker;

typedef struct {
    atomic_ulong numbers; /* given out by next_number() */
    atomic_ulong taken;   /* connections, by any of them */
    atomic_int drain_ms;  /* the longest that any process wants */
    atomic_int patience_ms;
    Worker workers[MAX_WORKERS];
} Crew;

static atomic_ulong own_numbers;
static atomic_ulong *numbers = &own_numbers;
static Crew *crew;             /* once there is one, it is kept for the next */
static atomic_int crew_places; /* 0: there is no crew now */
static Worker *me;             /* NULL but in a worker */

/* Numbers go on where the one before, or this process, had come to. */
static bool
map_crew(void)
{
    void *memory =
        mmap(NULL, sizeof(Crew), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (memory == MAP_FAILED) {
        return false;
    }
    crew = memory;
    atomic_store(&crew->numbers, atomic_load(numbers));
    numbers = &crew->numbers;
    return true;
}

int
make_crew(int count)
{
    if (crew == NULL && !map_crew()) {
        return errno;
    }
    for (int i = 0; i < count; i++) {
        leave_crew(i);
    }
    atomic_store(&crew->drain_ms, 0);
    atomic_store(&crew->patience_ms, 0);
    atomic_store(&crew_places, count);
    return 0;
}

void
end_crew(void)
{
    atomic_store(&crew_places, 0);
}

static bool
is_there_a_crew(void)
{
    return atomic_load(&crew_places) > 0;
}

bool
is_place_in_crew(long index)
{
    return index >= 0 && index < atomic_load(&crew_places);
}

void
join_crew(int index)
{
    me = &crew->workers[index];
    atomic_store(&me->connections, 0);
    atomic_store(&me->slow, false);
}

void
say_serving(bool serving)
{
    atomic_store(&me->serving, serving);
}

void
leave_crew(long index)
{
    atomic_store(&crew->workers[index].serving, false);
    atomic_store(&crew->workers[index].connections, 0);
}

void
forget_crew(void)
{
    me = NULL;
}

bool
is_in_crew(void)
{
    return me != NULL;
}

bool
has_too_many(void)
{
    long mine = atomic_load(&me->connections), least = LONG_MAX;

    for (int i = 0; i < atomic_load(&crew_places); i++) {
        Worker *other = &crew->workers[i];
        if (other != me && atomic_load(&other->serving) && !atomic_load(&other->slow)) {
            long theirs = atomic_load(&other->connections);
            least = theirs < least ? theirs : least;
        }
    }
    return least != LONG_MAX && mine > least + least / TOLERANCE;
}

/* So that they are not waited for again. */
void
call_others_slow(void)
{
    long mine = atomic_load(&me->connections);

    for (int i = 0; i < atomic_load(&crew_places); i++) {
        Worker *other = &crew->workers[i];
        if (other != me && atomic_load(&other->connections) < mine) {
            atomic_store(&other->slow, true);
        }
    }
}

void
call_this_one_ready(void)
{
    atomic_store(&me->slow, false);
}

unsigned long
connections_taken(void)
{
    return atomic_load(&crew->taken);
}

void
count_connection(int change)
{
    if (me == NULL || is_forked()) {
        return;
    }
    atomic_fetch_add(&me->connections, change);
    if (change > 0) {
        atomic_store(&me->slow, false);
        atomic_fetch_add(&crew->taken, 1);
    }
    engine->share_changed();
}

void
share_drain_timeout(int wanted)
{
    int known;

    if (is_there_a_crew()) {
        known = atomic_load(&crew->drain_ms);
        while (known < wanted && !atomic_compare_exchange_weak(&crew->drain_ms, &known, wanted)) {
        }
    }
}

int
longest_drain_timeout(void)
{
    return atomic_load(is_there_a_crew() ? &crew->drain_ms : &process_flags.drain_ms);
}

bool
crew_serves(void)
{
    for (int i = 0; i < atomic_load(&crew_places); i++) {
        if (atomic_load(&crew->workers[i].serving)) {
            return true;
        }
    }
    return false;
}

void
set_patience(int milliseconds)
{
    atomic_store(is_there_a_crew() ? &crew->patience_ms : &process_flags.patience_ms, milliseconds);
}

int
patience(void)
{
    return atomic_load(is_there_a_crew() ? &crew->patience_ms : &process_flags.patience_ms);
}

unsigned long
next_number(void)
{
    return atomic_fetch_add(numbers, 1) + 1;
}

unsigned long
last_number(void)
{
    return atomic_load(numbers);
}
