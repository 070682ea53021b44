/* Counters of what the callbacks do: see metrics.c. */

#ifndef PYMILTER_METRICS_H
#define PYMILTER_METRICS_H

#include "common.h"

extern atomic_bool counting;

static inline bool
is_counting(void)
{
    return atomic_load_explicit(&counting, memory_order_acquire);
}

/* Nanoseconds, from wherever. */
uint64_t count_clock(void);

/* A callback has ended that took so many nanoseconds; only while is_counting(). */
void count_callback(enum stage stage, sfsistat verdict, uint64_t elapsed);

void count_exception(enum stage stage);
void count_new_connection(void);
void count_new_message(void);

/* In a worker process, before it serves. */
void take_place_for_counting(int number);

/* milter._metrics, milter._metrics_snapshot */
PyObject *switch_counting(PyObject *module, PyObject *value);
PyObject *counters_snapshot(PyObject *module, PyObject *ignored);

#endif
