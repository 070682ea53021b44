/* One way in to a callback, and one out. */

#ifndef PYMILTER_CALL_H
#define PYMILTER_CALL_H

#include "common.h"
#include "failure.h"

#define STACK_ARGS 16 /* arguments of a callback that need no allocation */

/* One call from the engine on its way through Python. */
typedef struct {
    Step step;
    bool attached;      /* this thread holds the interpreter lock */
    bool failed;        /* an exception is set */
    bool direct;        /* call the filter object's method: see milter__call_objects() */
    PyObject *callback; /* owned; NULL where nothing is to be called */
    PyObject **args;    /* owned references; [0] is room for vectorcall */
    size_t count;
    PyObject *stack_args[STACK_ARGS];
    PyObject *observed; /* owned: the arguments, for observe_callback(), or NULL */
    sfsistat verdict;
    bool cut_off;     /* it has not come to its end, as its MTA is gone; xxfi_abort comes next */
    uint64_t entered; /* when it began, for those who count, or 0 */
} Call;

/* The way in: find out what is to be called.  True where the callback's arguments are wanted; in
 * any case finish() comes next, or call_back() and detach(). */
bool begin(Call *call, SMFICTX *handle, enum stage stage);

/* Make room for so many arguments.  False with an exception set. */
bool make_room_for(Call *call, size_t count);

/* Add an argument for the callback; takes over the reference.  NULL means an exception is set. */
void add_argument(Call *call, PyObject *argument);

/* Make an argument, unless one before could not be made: nothing is to run with an exception set.
 */
#define ADD_ARGUMENT(call, expression)                                                             \
    do {                                                                                           \
        if (!(call)->failed) {                                                                     \
            add_argument(call, expression);                                                        \
        }                                                                                          \
    } while (0)

/* Call what is to be called; what it returns, owned, or NULL with an exception set. */
PyObject *call_back(Call *call);

/* Leave: record what the verdict means for the message, give everything back, and say what goes to
 * the MTA. */
sfsistat detach(Call *call);

/* The way out: call, validate, report, release; after close also let go of the connection. */
sfsistat finish(Call *call);

/* How many callbacks wait for something that they await. */
long callbacks_that_wait(void);

/* The hook hung_up() of the engine. */
void cancel_callback(SMFICTX *handle);

#endif
