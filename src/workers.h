/* One filter as several processes: see workers.c. */

#ifndef PYMILTER_WORKERS_H
#define PYMILTER_WORKERS_H

#include "common.h"
#include "engine.h"

/* What the engine is told of the other processes; NULL but in a worker. */
const struct engine_share *share_of_worker(void);

/* In a worker: it serves, it takes no more. */
void begin_work(void);
void end_work(void);

bool is_worker_process(void);

/* A child that a worker forks is no worker. */
void forget_supervisor(void);

/* milter._share_socket and the like; the first one is told whether the socket is open. */
PyObject *share_socket(PyObject *module, PyObject *value, bool is_open);
PyObject *end_sharing(PyObject *module, PyObject *ignored);
PyObject *become_worker(PyObject *module, PyObject *args);
PyObject *fork_worker(PyObject *module, PyObject *serve);
PyObject *worker_gone(PyObject *module, PyObject *value);
PyObject *stop_state(PyObject *module, PyObject *ignored);
PyObject *unique_id(PyObject *module, PyObject *ignored);
PyObject *last_unique_id(PyObject *module, PyObject *ignored);

#endif
