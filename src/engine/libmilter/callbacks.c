/* libmilter's callbacks on their way to the filter's: each is a batch of one.
 *
 * libmilter runs the callbacks of one connection on whichever thread of its pool is free, and
 * neither says when it starts a thread nor when it ends one.
 */

#include "callbacks.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <malloc.h>
#elif defined(__FreeBSD__)
#include <malloc_np.h>
#elif defined(__APPLE__)
#include <malloc/malloc.h>
#define malloc_usable_size malloc_size
#endif

#include "pool.h"
#include "stages.h"
#include "surroundings.h"
#include "turnstile.h"

#define PROBE_SIZE 4096 /* bytes that must be there when a thread first calls back */

static struct smfiDesc filter;

/* ---------------------------------------------------------------- the threads */

static pthread_mutex_t startup = PTHREAD_MUTEX_INITIALIZER; /* held: no callback goes on */
static sigset_t callback_mask;

typedef struct Batch Batch;

/* In one, as each look at a thread's own memory is a call. */
static _Thread_local struct {
    bool known;     /* has been here before */
    bool is_worker; /* has run a callback other than close */
    Batch *batch;   /* in which it is now */
} self;

/* At thread exit, what CPython has to clear for a thread needs CPython's own thread-specific
 * values.  These are gone when the destructors of pthread keys run, but not yet when those of C++
 * thread_local objects do; where the C library has the hook for these (glibc, FreeBSD) it is the
 * place. */
#if !defined(THREAD_EXIT_HOOK) && (defined(__GLIBC__) || defined(__FreeBSD__))
#define THREAD_EXIT_HOOK 1
#elif !defined(THREAD_EXIT_HOOK)
#define THREAD_EXIT_HOOK 0
#endif
#if THREAD_EXIT_HOOK
extern int __cxa_thread_atexit_impl(void (*)(void *), void *, void *) __attribute__((weak));
extern void *__dso_handle __attribute__((visibility("hidden")));
#endif

static pthread_key_t thread_key;

static void
thread_exits(void *value)
{
    (void)value;
    if (self.is_worker) {
        count_worker(-1);
    }
    hooks->thread_ends();
}

int
prepare_threads_for_callbacks(void)
{
    static bool prepared;

    prepared = prepared || pthread_key_create(&thread_key, thread_exits) == 0;
    return prepared ? 0 : EAGAIN;
}

void
hold_callbacks(const sigset_t *mask)
{
    pthread_mutex_lock(&startup);
    callback_mask = *mask;
}

void
let_callbacks_in(void)
{
    pthread_mutex_unlock(&startup);
}

/* The first callback on this thread.  False where memory is so short that it cannot be one. */
static bool
get_to_know_thread(void)
{
    void *probe = malloc(PROBE_SIZE);

    if (probe == NULL) {
        return false; /* glibc ends the process where it cannot register an exit hook */
    }
    free(probe);
    pthread_mutex_lock(&startup);
    pthread_mutex_unlock(&startup);
    /* libmilter blocks HUP, INT and TERM in its threads.  A process that a callback starts
     * would inherit that, and ignore a polite end for ever. */
    pthread_sigmask(SIG_SETMASK, &callback_mask, NULL);
    self.known = true;
#if THREAD_EXIT_HOOK
    if (__cxa_thread_atexit_impl != NULL &&
        __cxa_thread_atexit_impl(thread_exits, NULL, &__dso_handle) == 0) {
        return true;
    }
#endif
    pthread_setspecific(thread_key, &thread_key);
    return true;
}

/* Where a platform has no hook, what is kept for a thread can only be released while the thread
 * lives.  There a libmilter without a pool, of which each connection has a thread, would lose some
 * memory with each. */
static void
part_from_thread(void)
{
#if !THREAD_EXIT_HOOK
    pthread_setspecific(thread_key, NULL);
    thread_exits(NULL);
    self.is_worker = self.known = false;
#endif
}

/* -------------------------------------------------------------------- a batch */

struct engine_suspended {
    SMFICTX *context;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t resumed;
    engine_completion complete; /* NULL until it is resumed */
    void *data;
};

struct Batch {
    enum stage stage;
    bool inside;
    unsigned began;                     /* for judge() */
    struct engine_suspended *suspended; /* its callback is, on this thread, which waits */
};

static void
enter(Batch *batch)
{
    enter_turnstile();
    batch->inside = hooks->enter();
    if (batch->inside) {
        batch->began = pass_turnstile(batch->stage);
    }
    else {
        leave_turnstile();
    }
}

static void
leave(Batch *batch)
{
    if (batch->inside) {
        judge(batch->stage, batch->began);
        hooks->leave();
        leave_turnstile();
    }
}

static void
begin_batch(Batch *batch, enum stage stage)
{
    *batch = (Batch){.stage = stage};
    self.batch = batch;
    if (!self.known && !get_to_know_thread()) {
        return;
    }
    /* The thread that looks after libmilter's pool calls close for connections that idled too
     * long, and nothing else. */
    if (stage != CLOSE && !self.is_worker) {
        self.is_worker = true;
        count_worker(1);
    }
    enter_pool();
    enter(batch);
}

/* The callback on this thread was suspended: wait until it goes on, and complete it. */
static sfsistat
wait_for_completion(Batch *batch)
{
    struct engine_suspended *suspended = batch->suspended;

    pthread_mutex_lock(&suspended->lock);
    while (suspended->complete == NULL) {
        pthread_cond_wait(&suspended->resumed, &suspended->lock);
    }
    pthread_mutex_unlock(&suspended->lock);
    batch->suspended = NULL;
    enter(batch);
    return suspended->complete(suspended->context, suspended->data);
}

static void
free_suspended(struct engine_suspended *suspended)
{
    pthread_cond_destroy(&suspended->resumed);
    pthread_mutex_destroy(&suspended->lock);
    free(suspended);
}

static sfsistat
end_batch(Batch *batch, sfsistat verdict)
{
    leave(batch);
    while (batch->suspended != NULL) {
        struct engine_suspended *suspended = batch->suspended;
        verdict = wait_for_completion(batch);
        leave(batch);
        free_suspended(suspended);
    }
    self.batch = NULL;
    if (self.known) {
        leave_pool();
    }
    if (batch->stage == CLOSE) {
        part_from_thread();
    }
    return verdict;
}

struct engine_suspended *
suspend_callback(SMFICTX *context)
{
    struct engine_suspended *suspended;

    if (self.batch == NULL || self.batch->suspended != NULL) {
        return NULL;
    }
    suspended = calloc(1, sizeof *suspended);
    if (suspended != NULL) {
        suspended->context = context;
        pthread_mutex_init(&suspended->lock, NULL);
        pthread_cond_init(&suspended->resumed, NULL);
        self.batch->suspended = suspended;
    }
    return suspended;
}

void
resume_callback(struct engine_suspended *suspended, engine_completion complete, void *data)
{
    pthread_mutex_lock(&suspended->lock);
    suspended->complete = complete;
    suspended->data = data;
    pthread_cond_signal(&suspended->resumed);
    pthread_mutex_unlock(&suspended->lock);
}

Pause
pause_callback(void)
{
    Pause pause = {.released = hooks->release()};

    pause.in_turnstile = leave_turnstile();
    return pause;
}

void
end_pause(Pause pause)
{
    if (pause.in_turnstile) {
        enter_turnstile();
    }
    hooks->reacquire(pause.released);
    if (pause.in_turnstile) {
        pass_turnstile(OUTSIDE);
    }
}

/* ------------------------------------------------------------ libmilter's calls */

#define IN_BATCH(stage, call)                                                                      \
    do {                                                                                           \
        Batch batch;                                                                               \
        begin_batch(&batch, stage);                                                                \
        return end_batch(&batch, call);                                                            \
    } while (0)

static sfsistat
on_negotiate(SMFICTX *context, unsigned long actions, unsigned long protocol, unsigned long f2,
             unsigned long f3, unsigned long *want_actions, unsigned long *want_protocol,
             unsigned long *want_f2, unsigned long *want_f3)
{
    IN_BATCH(NEGOTIATE, filter.xxfi_negotiate(context, actions, protocol, f2, f3, want_actions,
                                              want_protocol, want_f2, want_f3));
}

static sfsistat
on_connect(SMFICTX *context, char *hostname, _SOCK_ADDR *address)
{
    IN_BATCH(CONNECT, filter.xxfi_connect(context, hostname, address));
}

static sfsistat
on_helo(SMFICTX *context, char *hostname)
{
    IN_BATCH(HELO, filter.xxfi_helo(context, hostname));
}

static sfsistat
on_envfrom(SMFICTX *context, char **argv)
{
    IN_BATCH(ENVFROM, filter.xxfi_envfrom(context, argv));
}

static sfsistat
on_envrcpt(SMFICTX *context, char **argv)
{
    IN_BATCH(ENVRCPT, filter.xxfi_envrcpt(context, argv));
}

static sfsistat
on_data(SMFICTX *context)
{
    IN_BATCH(DATA, filter.xxfi_data(context));
}

/* libmilter passes on an unknown command without looking for its NUL; a broken MTA might have sent
 * none.  The end of the memory that holds it is the bound.  That the pointer is what malloc() gave
 * is no promise of libmilter's: it is so in 8.12 to 8.18, where the command is the whole packet
 * (mi_engine.c: st_unknown).  Elsewhere than here the pointer is only read up to its NUL. */
static char *
copy_of_unterminated(const char *command)
{
#if defined(__linux__) || defined(__FreeBSD__) || defined(__APPLE__)
    size_t size = malloc_usable_size((void *)command);

    return strnlen(command, size) < size ? NULL : strndup(command, size);
#else
    (void)command;
    return NULL;
#endif
}

static sfsistat
on_unknown(SMFICTX *context, const char *command)
{
    char *copy = copy_of_unterminated(command);
    Batch batch;
    sfsistat verdict;

    begin_batch(&batch, UNKNOWN);
    verdict = end_batch(&batch, filter.xxfi_unknown(context, copy != NULL ? copy : command));
    free(copy);
    return verdict;
}

static sfsistat
on_header(SMFICTX *context, char *name, char *value)
{
    IN_BATCH(HEADER, filter.xxfi_header(context, name, value));
}

static sfsistat
on_eoh(SMFICTX *context)
{
    IN_BATCH(EOH, filter.xxfi_eoh(context));
}

static sfsistat
on_body(SMFICTX *context, unsigned char *chunk, size_t size)
{
    IN_BATCH(BODY, filter.xxfi_body(context, chunk, size));
}

static sfsistat
on_eom(SMFICTX *context)
{
    IN_BATCH(EOM, filter.xxfi_eom(context));
}

static sfsistat
on_abort(SMFICTX *context)
{
    IN_BATCH(ABORT, filter.xxfi_abort(context));
}

static sfsistat
on_close(SMFICTX *context)
{
    if (smfi_getpriv(context) == NULL) {
        return SMFIS_CONTINUE; /* nothing was ever said here, as when poke_listener() connects */
    }
    IN_BATCH(CLOSE, filter.xxfi_close(context));
}

int
register_callbacks(const struct smfiDesc *wanted)
{
    struct smfiDesc description = {
        .xxfi_name = wanted->xxfi_name,
        .xxfi_version = wanted->xxfi_version,
        .xxfi_flags = wanted->xxfi_flags,
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_envfrom,
        .xxfi_envrcpt = on_envrcpt,
        .xxfi_header = on_header,
        .xxfi_eoh = on_eoh,
        .xxfi_body = on_body,
        .xxfi_eom = on_eom,
        .xxfi_abort = on_abort,
        .xxfi_close = on_close,
        .xxfi_unknown = on_unknown,
        .xxfi_data = on_data,
        .xxfi_negotiate = on_negotiate,
    };

    filter = *wanted;
    return smfi_register(description);
}
