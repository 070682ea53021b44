/* Counters of what the callbacks do, for Milter.metrics.
 *
 * They are counted here, and not in Python, so that they cost next to nothing: two looks at the
 * clock and three additions for each callback.  With an interpreter lock its holder is the only
 * one who counts; without, threads are spread over several sets of counters.
 *
 * The counters lie in memory that forked processes share.  Each worker process of a filter has
 * a place of its own there, which a successor takes over, so that sums never go back; whoever
 * reads them gets the sum over all.
 */

#include "metrics.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "report.h"

#define PLACES 513 /* one for each worker, and one for the process that started them */
#define VERDICTS (SMFIS_SKIP + 1)
#define BUCKETS 26 /* less than 1, 2, 4, ... 2^24 µs, and what took longer */

#ifdef Py_GIL_DISABLED
#define SHARDS 16
#define ADD(counter, number) (void)__atomic_fetch_add(&(counter), number, __ATOMIC_RELAXED)
#else
#define SHARDS 1
#define ADD(counter, number) ((counter) += (number))
#endif

typedef struct {
    _Alignas(64) uint64_t verdicts[VERDICTS];
    uint64_t exceptions;
    uint64_t nanoseconds;
    uint64_t buckets[BUCKETS];
} StageCounters;

typedef struct {
    StageCounters stages[STAGES];
    _Alignas(64) uint64_t connections;
    uint64_t messages;
} Shard;

typedef struct {
    Shard shards[SHARDS];
    uint64_t lost; /* connections that ended with a worker that was killed */
} Place;

typedef struct {
    atomic_int used; /* the places up to this one */
    Place places[PLACES];
} Counters;

atomic_bool counting;
static _Atomic(Counters *) counters; /* NULL until counting is first wanted */
static int own_place;

static Place *
places(void)
{
    /* Who asks has seen `counting` set, which comes after this. */
    return atomic_load_explicit(&counters, memory_order_relaxed)->places;
}

static Shard *
own_shard(void)
{
#ifdef Py_GIL_DISABLED
    static atomic_uint next;
    static _Thread_local unsigned number; /* 0: none yet */

    if (number == 0) {
        number = atomic_fetch_add(&next, 1) % SHARDS + 1;
    }
    return &places()[own_place].shards[number - 1];
#else
    return places()[own_place].shards;
#endif
}

uint64_t
count_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void
count_callback(enum stage stage, sfsistat verdict, uint64_t elapsed)
{
    StageCounters *stage_counters = &own_shard()->stages[stage];
    uint64_t microseconds = elapsed / 1000;
    int bucket = microseconds == 0 ? 0 : 64 - __builtin_clzll(microseconds);

    if (verdict >= 0 && verdict < VERDICTS) {
        ADD(stage_counters->verdicts[verdict], 1);
    }
    ADD(stage_counters->nanoseconds, elapsed);
    ADD(stage_counters->buckets[Py_MIN(bucket, BUCKETS - 1)], 1);
}

void
count_exception(enum stage stage)
{
    if (is_counting()) {
        ADD(own_shard()->stages[stage].exceptions, 1);
    }
}

void
count_new_connection(void)
{
    if (is_counting()) {
        ADD(own_shard()->connections, 1);
    }
}

void
count_new_message(void)
{
    if (is_counting()) {
        ADD(own_shard()->messages, 1);
    }
}

/* ------------------------------------------------------------------ reading */

/* Other processes may be counting meanwhile. */
static uint64_t
look_at(const uint64_t *counter)
{
#ifdef Py_GIL_DISABLED
    return __atomic_load_n(counter, __ATOMIC_RELAXED);
#else
    return *(const volatile uint64_t *)counter;
#endif
}

static void
add_stage(StageCounters *sum, const StageCounters *more)
{
    for (int i = 0; i < VERDICTS; i++) {
        sum->verdicts[i] += look_at(&more->verdicts[i]);
    }
    sum->exceptions += look_at(&more->exceptions);
    sum->nanoseconds += look_at(&more->nanoseconds);
    for (int i = 0; i < BUCKETS; i++) {
        sum->buckets[i] += look_at(&more->buckets[i]);
    }
}

static void
add_place(Shard *sum, const Place *place)
{
    for (int i = 0; i < SHARDS; i++) {
        for (int stage = 0; stage < STAGES; stage++) {
            add_stage(&sum->stages[stage], &place->shards[i].stages[stage]);
        }
        sum->connections += look_at(&place->shards[i].connections);
        sum->messages += look_at(&place->shards[i].messages);
    }
}

static uint64_t
calls_of(const StageCounters *stage)
{
    uint64_t calls = 0;

    for (int i = 0; i < BUCKETS; i++) {
        calls += stage->buckets[i];
    }
    return calls;
}

/* In a worker process, before it serves: count at its own place from now on.  What an earlier
 * process had there is kept, but for its connections: those were not closed, they are gone. */
void
take_place_for_counting(int number)
{
    Shard sum = {0};
    atomic_int *shared;
    int used;

    if (number >= PLACES) {
        return;
    }
    own_place = number;
    if (atomic_load(&counters) == NULL) {
        return; /* what is counted here later is for this process only */
    }
    add_place(&sum, &places()[number]);
    places()[number].lost = sum.connections - calls_of(&sum.stages[CLOSE]);
    shared = &atomic_load(&counters)->used;
    used = atomic_load(shared);
    while (used < number && !atomic_compare_exchange_weak(shared, &used, number)) {
    }
}

static PyObject *
tuple_from(const uint64_t *numbers, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);

    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);
        if (number == NULL) {
            Py_CLEAR(tuple);
        }
        else {
            PyTuple_SET_ITEM(tuple, i, number);
        }
    }
    return tuple;
}

static PyObject *
describe_stages(const Shard *sum)
{
    PyObject *described = PyDict_New();

    for (int i = 0; described != NULL && i < STAGES; i++) {
        const StageCounters *stage = &sum->stages[i];
        PyObject *value = Py_BuildValue(
            "(NKKN)", tuple_from(stage->verdicts, VERDICTS), (unsigned long long)stage->exceptions,
            (unsigned long long)stage->nanoseconds, tuple_from(stage->buckets, BUCKETS));
        if (value == NULL || PyDict_SetItemString(described, stages[i].name, value) < 0) {
            Py_CLEAR(described);
        }
        Py_XDECREF(value);
    }
    return described;
}

/* _metrics(on): begin to count, or pause; returns whether it was counted before. */
PyObject *
switch_counting(PyObject *module, PyObject *value)
{
    int on = PyObject_IsTrue(value);

    if (on < 0) {
        return NULL;
    }
    if (on && atomic_load(&counters) == NULL) {
        Counters *none = NULL;
        Counters *memory =
            mmap(NULL, sizeof(Counters), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            raise_os_error(PyModule_GetState(module), errno, "cannot share memory", "for metrics",
                           "");
            return NULL;
        }
        atomic_store(&memory->used, own_place);
        if (!atomic_compare_exchange_strong(&counters, &none, memory)) {
            munmap(memory, sizeof(Counters)); /* another thread was first */
        }
    }
    return PyBool_FromLong(atomic_exchange(&counting, on));
}

/* _metrics_snapshot(): the sums over this process and those that share its counters, as
 * {"connections": int, "open": int, "messages": int, "place": int, "stages": {stage:
 * (verdicts, exceptions, nanoseconds, buckets)}}.  `place` is 0 but in a worker process. */
PyObject *
counters_snapshot(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    Counters *shared = atomic_load(&counters);
    Shard sum = {0};
    uint64_t lost = 0, gone;

    for (int i = 0; shared != NULL && i <= atomic_load(&shared->used); i++) {
        add_place(&sum, &shared->places[i]);
        lost += look_at(&shared->places[i].lost);
    }
    gone = lost + calls_of(&sum.stages[CLOSE]);
    return Py_BuildValue("{sKsKsKsisN}", "connections", (unsigned long long)sum.connections, "open",
                         (unsigned long long)(sum.connections > gone ? sum.connections - gone : 0),
                         "messages", (unsigned long long)sum.messages, "place", own_place, "stages",
                         describe_stages(&sum));
}
