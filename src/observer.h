/* One who is told what callbacks and actions come to: see observer.c. */

#ifndef PYMILTER_OBSERVER_H
#define PYMILTER_OBSERVER_H

#include "common.h"

#include "context.h"

extern atomic_bool observed;

static inline bool
is_observed(void)
{
    return atomic_load_explicit(&observed, memory_order_acquire);
}

/* The arguments of a callback for observe_callback(), owned; NULL where nobody asks for them. */
PyObject *arguments_to_observe(PyObject *const *args, size_t count);

/* A callback has ended with what the MTA is told, and took so many nanoseconds.  `args` may be
 * NULL. */
void observe_callback(ContextObject *context, enum stage stage, PyObject *args, sfsistat verdict,
                      uint64_t elapsed);

/* A method of the context has returned `result`, which is passed on; NULL where it raised. */
PyObject *observe_action(PyObject *context, const char *method, PyObject *args, PyObject *keywords,
                         PyObject *result);

/* A reply of our own goes out with the verdict. */
void observe_reply(ContextObject *context, const char *code, const char *enhanced,
                   const char *text);

/* milter._observe */
PyObject *set_observer(PyObject *module, PyObject *observer);

#endif
