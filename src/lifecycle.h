/* The life of a filter, from setting up to the end of the process: see lifecycle.c. */

#ifndef PYMILTER_LIFECYCLE_H
#define PYMILTER_LIFECYCLE_H

#include "common.h"
#include "engine.h"

extern const struct engine_hooks engine_hooks;

/* Where in its life the filter is; where LOCK_STATE() is held, that does not change. */
bool is_setting_up(void);
bool is_running(void); /* from the call of main() on, until it has returned */

/* Raise milter.error: "CALL: WHY".  NULL. */
PyObject *out_of_order(module_state *state, const char *call, const char *why);

/* The same where it has to be set up, and cannot be. */
PyObject *refuse_setting_up(module_state *state, const char *call);

/* False with that exception set while main() runs. */
bool check_not_running(module_state *state, const char *call);

/* opensocket() and main().  -1 with an exception set. */
int open_before_main(module_state *state, bool remove_old);
int run_main(PyObject *module);

/* In milliseconds. */
void set_drain_timeout(int wanted);

/* The module is loaded: that one is active from here on, unless callbacks of another still end. */
void activate(module_state *state);

/* milter._share_socket, milter._listening_socket, milter._accepts, milter._is_stopped,
 * milter._hand_over, milter._is_running, milter._leave_signals, milter._forget_stop,
 * milter._stop_with, milter._when_serving, milter._close_gate, milter._after_fork_in_child */
PyObject *duplicate_listener(PyObject *module, PyObject *ignored);
PyObject *accepts_connections(PyObject *module, PyObject *ignored);
PyObject *tell_if_stopped(PyObject *module, PyObject *ignored);
PyObject *hand_over_socket(PyObject *module, PyObject *value);
PyObject *share_open_socket(PyObject *module, PyObject *value);
PyObject *tell_if_running(PyObject *module, PyObject *ignored);
PyObject *leave_signals(PyObject *module, PyObject *value);
PyObject *forget_stop(PyObject *module, PyObject *ignored);
PyObject *stop_with(PyObject *module, PyObject *exception);
PyObject *when_serving(PyObject *module, PyObject *call);
PyObject *close_gate(PyObject *module, PyObject *ignored);
PyObject *after_fork_in_child(PyObject *module, PyObject *ignored);

#endif
