/* Signals while a filter runs: see signals.c. */

#ifndef PYMILTER_SIGNALS_H
#define PYMILTER_SIGNALS_H

#include "common.h"

#include <sys/types.h>

/* From main(): signals stop the filter from here on, and no longer. */
void take_signals(bool on_main_thread);
void give_back_signals(void); /* also in a forked child, by pthread_atfork() */

/* Take the action of a signal, which was put off until the filter had drained. */
void take_put_off_action(void);

/* While the filter drains, main() shows that it goes on; and that nothing more will be answered. */
void show_sign_of_life(void);
void say_drained(bool drained);

/* Python writes signals to main()'s pipe.  borrow_wakeup_fd() also tells whether this is the main
 * thread. */
bool borrow_wakeup_fd(void);
void return_wakeup_fd(void);

/* Pass on to the application's descriptor what Python wrote to ours. */
void forward_signals(const char *bytes, ssize_t count);

/* Around the fork of a worker, where none is for this moment; the worker goes on with
 * _hold_signals(False). */
void block_for_fork(void);
void unblock_after_fork(void);

/* milter._hold_signals, milter._await */
PyObject *hold_signals(PyObject *module, PyObject *value);
PyObject *await_news(PyObject *module, PyObject *args);

#endif
