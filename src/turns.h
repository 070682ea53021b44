/* An event loop of the program's leads the engine, a turn at a time, where all callbacks await. */

#ifndef PYMILTER_TURNS_H
#define PYMILTER_TURNS_H

#include "common.h"

/* For the module. */
PyObject *note_coroutines(PyObject *module, PyObject *only_coroutines);
PyObject *attend(PyObject *module, PyObject *first_step);
PyObject *take_turn(PyObject *module, PyObject *ignored);
PyObject *dismiss_loop(PyObject *module, PyObject *ignored);

/* first_step() of Milter._async's Runner, borrowed, for callbacks that this thread runs in a turn;
 * NULL outside of one. */
PyObject *first_step_here(void);

#endif
