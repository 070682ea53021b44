#include "context.h"

#include <stdlib.h>
#include <string.h>

#include "crew.h"
#include "engine/choice.h"
#include "metrics.h"
#include "process.h"
#include "report.h"
#include "wake.h"

static atomic_ulong created, deleted;
static atomic_long messages;

Census
take_census(void)
{
    Census census;

    do { /* until nothing changed meanwhile: deleted never gets ahead of created */
        census.deleted = atomic_load(&deleted);
        census.created = atomic_load(&created);
        census.messages = atomic_load(&messages);
    } while (census.deleted != atomic_load(&deleted));
    return census;
}

/* ----------------------------------------------------------- a connection */

static ContextObject *
new_context(module_state *state, SMFICTX *handle, enum stage stage)
{
    ContextObject *self = PyObject_GC_New(ContextObject, state->context_type);
    unsigned long actions, protocol;

    if (self == NULL) {
        return NULL;
    }
    memset((char *)self + sizeof(PyObject), 0, sizeof *self - sizeof(PyObject));
    pthread_mutex_init(&self->lock, NULL);
    self->state = state;
    self->handle = handle;
    self->stage = OUTSIDE;
    self->offered_actions = self->actions = SMFI_CURR_ACTS;
    if (stage == CONNECT && engine->recall_agreement(handle, &actions, &protocol)) {
        self->actions = actions;
        self->protocol = protocol;
    }
    PyObject_GC_Track(self); /* from here on gc.get_objects() shows it to other threads */
    return self;
}

ContextObject *
context_of(SMFICTX *handle, enum stage stage)
{
    ContextObject *context = engine->getpriv(handle);

    if (context == NULL && stage != ABORT && stage != CLOSE) {
        context = new_context(active_module, handle, stage);
        if (context != NULL) {
            engine->setpriv(handle, context);
            atomic_fetch_add(&created, 1);
            count_connection(1);
            count_new_connection();
        }
    }
    return (ContextObject *)Py_XNewRef(context);
}

void
lock_context(ContextObject *context)
{
    if (pthread_mutex_trylock(&context->lock) != 0) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&context->lock);
        Py_END_ALLOW_THREADS
    }
}

void
set_stage(ContextObject *context, int stage)
{
    lock_context(context);
    context->stage = stage;
    pthread_mutex_unlock(&context->lock);
}

/* --------------------------------------------------------------- its messages */

void
begin_message(ContextObject *context)
{
    atomic_fetch_add(&messages, 1);
    context->in_message = true;
    count_new_message();
}

void
end_message(ContextObject *context)
{
    context->debt = context->debt == OWED_FOR_MESSAGE ? NOTHING_OWED : context->debt;
    if (context->in_message) {
        context->in_message = false;
        if (atomic_fetch_sub(&messages, 1) == 1 && is_draining()) {
            wake_main();
        }
    }
}

/* --------------------------------------------------------------------- its end */

/* After this no method reaches libmilter.  Called with the context's lock held, which it gives
 * back. */
static void
let_go(ContextObject *context)
{
    SMFICTX *handle = context->handle;

    context->handle = NULL;
    context->stage = OUTSIDE;
    pthread_mutex_unlock(&context->lock);
    engine->setpriv(handle, NULL);
    atomic_fetch_add(&deleted, 1);
    count_connection(-1);
    if (is_draining()) {
        wake_main();
    }
}

/* What the context keeps, owned, or NULL; it keeps it no more. */
static PyObject *
take_away(PyObject **kept)
{
    PyObject *old;

    LOCK_STATE();
    old = *kept;
    *kept = NULL;
    UNLOCK_STATE();
    return old;
}

void
forget_connection(ContextObject *context)
{
    end_message(context);
    engine->keep_agreement(context->handle, context->actions, context->protocol);
    lock_context(context); /* another thread may be in the engine with this handle */
    let_go(context);
    /* The application's object and its variables may have the context: break these circles. */
    Py_XDECREF(take_away(&context->priv));
    Py_XDECREF(take_away(&context->variables));
    Py_DECREF(context); /* the reference that the engine's pointer owned */
}

void
lose_connection(ContextObject *context)
{
    end_message(context);
    pthread_mutex_lock(&context->lock);
    let_go(context);
}

/* ------------------------------------------------------------------- the object */

int
context_traverse(PyObject *op, visitproc visit, void *arg)
{
    ContextObject *self = (ContextObject *)op;

    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->priv);
    Py_VISIT(self->variables);
    return 0;
}

int
context_clear(PyObject *op)
{
    ContextObject *self = (ContextObject *)op;

    Py_CLEAR(self->priv);
    Py_CLEAR(self->variables);
    return 0;
}

void
context_dealloc(PyObject *op)
{
    ContextObject *self = (ContextObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    PyObject_GC_UnTrack(op);
    PyObject_ClearWeakRefs(op);
    context_clear(op);
    for (int i = SMFIM_FIRST; i <= SMFIM_LAST; i++) {
        free(self->macros[i]);
    }
    pthread_mutex_destroy(&self->lock);
    free(self->client);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyObject *
bad_context(ContextObject *self)
{
    PyErr_SetString(self->state->error, "bad context");
    return NULL;
}

PyObject *
context_setpriv(PyObject *op, PyObject *priv)
{
    ContextObject *self = (ContextObject *)op;
    PyObject *old = NULL;
    bool open;

    LOCK_STATE();
    open = self->handle != NULL; /* close clears this first: nothing is put into a closed one */
    if (open) {
        old = self->priv;
        self->priv = Py_NewRef(priv);
    }
    UNLOCK_STATE();
    if (!open) {
        return bad_context(self);
    }
    return old != NULL ? old : Py_NewRef(Py_None);
}

PyObject *
context_getpriv(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    ContextObject *self = (ContextObject *)op;
    PyObject *priv;

    if (self->handle == NULL) {
        return bad_context(self);
    }
    LOCK_STATE();
    priv = Py_NewRef(self->priv != NULL ? self->priv : Py_None);
    UNLOCK_STATE();
    return priv;
}
