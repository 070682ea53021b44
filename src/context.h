/* The context object: one for each connection, as long as the filter has a use for it. */

#ifndef PYMILTER_CONTEXT_H
#define PYMILTER_CONTEXT_H

#include "common.h"

#include <pthread.h>

/* What an exception, or the end of a drain, left unanswered: see owe(). */
enum debt { NOTHING_OWED, OWED_FOR_MESSAGE, OWED_FOR_CONNECTION };

typedef struct {
    PyObject_HEAD
    PyObject *weakrefs;
    PyObject *priv;      /* setpriv(): the application's object */
    PyObject *variables; /* the contextvars context of its callbacks, or NULL */
    module_state *state; /* borrowed: the type keeps the module alive */

    pthread_mutex_t lock;         /* guards what follows, and the engine's context itself */
    _Atomic(SMFICTX *) handle;    /* NULL once the connection is closed */
    int stage;                    /* which callback runs now */
    char *macros[SMFIM_LAST + 1]; /* by stage, what setsymlist() asked for, or NULL */

    atomic_ulong offered_actions;
    atomic_ulong actions;    /* SMFIF_*, agreed with the MTA */
    atomic_ulong protocol;   /* SMFIP_*, agreed with the MTA */
    atomic_char reply_class; /* '4' or '5' of the reply that waits, or 0 */

    /* For the thread that runs the callback alone. */
    char *client;    /* for reports, where no macro tells it, or NULL */
    bool in_message; /* a message has begun and has no final verdict yet */
    enum debt debt;
    sfsistat owed;
    bool owed_by_stop; /* not for an exception: the callback was cancelled, as the filter stops */
} ContextObject;

/* The context of a connection; the engine's pointer owns a reference to it.  Owned.  NULL with an
 * exception set where it cannot be made, without one where none is due at this stage. */
ContextObject *context_of(SMFICTX *handle, enum stage stage);

/* Wait for a context's lock without the interpreter lock: its holder may be writing to the MTA. */
void lock_context(ContextObject *context);
void set_stage(ContextObject *context, int stage);

/* Where the MTA waits for no answer to a step none may be sent, or it would be taken for the answer
 * to the next one. */
static inline bool
is_without_reply(const ContextObject *context, enum stage stage)
{
    return context != NULL && (context->protocol & stages[stage].no_reply) != 0;
}

/* A message begins on the connection, or has ended, if one had begun. */
void begin_message(ContextObject *context);
void end_message(ContextObject *context);

/* The connection is closed: no method reaches the engine any more.  lose_connection() is for a
 * thread that cannot enter Python; the objects stay behind. */
void forget_connection(ContextObject *context);
void lose_connection(ContextObject *context);

/* What getdiag() counts. */
typedef struct {
    unsigned long created, deleted; /* contexts */
    long messages;                  /* in progress */
} Census;

Census take_census(void);

/* For the type: see actions.c. */
int context_traverse(PyObject *op, visitproc visit, void *arg);
int context_clear(PyObject *op);
void context_dealloc(PyObject *op);
PyObject *context_setpriv(PyObject *op, PyObject *priv);
PyObject *context_getpriv(PyObject *op, PyObject *ignored);

#endif
