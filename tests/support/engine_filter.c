/* A filter in C on the engine that is chosen: engine_filter SOCKET PARALLEL.  Without Python, so
 * that it shows what an engine does by itself, and that it needs nothing else.  PARALLEL is how
 * many callbacks can run at once; with 1 a lock makes them take turns, as Python's does.
 *
 * MAIL is suspended; a thread of our own resumes it twice: the first completion suspends anew.  The
 * verdict is TEMPFAIL for a sender with an odd number of characters.  A header X-Slow takes 3 ms.
 * What is wrong goes to standard error, and ends the process.
 */

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/choice.h"
#include "wake.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "wrong: %s, line %d\n", #condition, __LINE__);                         \
            _exit(3);                                                                              \
        }                                                                                          \
    } while (0)

/* ------------------------------------------------------------------------ hooks */

static pthread_mutex_t right = PTHREAD_MUTEX_INITIALIZER; /* to run the filter */
static _Thread_local bool inside;
static size_t parallel;
static atomic_bool stopping;
static atomic_int ended = -1;

static bool
enter(void)
{
    CHECK(!inside);
    if (parallel == 1) {
        pthread_mutex_lock(&right);
    }
    inside = true;
    return true;
}

static void
leave(void)
{
    CHECK(inside);
    inside = false;
    if (parallel == 1) {
        pthread_mutex_unlock(&right);
    }
}

static size_t
at_once(void)
{
    return parallel;
}

static void *
release(void)
{
    leave();
    return &right;
}

static void
reacquire(void *released)
{
    CHECK(released == &right);
    enter();
}

static void
thread_ends(void)
{
    CHECK(!inside);
}

static void
note_end(int result)
{
    ended = result;
    wake_main();
}

static void
write_log(const char *level, const char *text)
{
    fprintf(stderr, "%s: %s\n", level, text);
}

static const struct engine_hooks hooks = {
    .enter = enter,
    .leave = leave,
    .parallel = at_once,
    .release = release,
    .reacquire = reacquire,
    .thread_ends = thread_ends,
    .ended = note_end,
    .log = write_log,
};

/* ------------------------------------------------------- what goes on elsewhere */

typedef struct Job {
    struct engine_suspended *suspended;
    engine_completion complete;
    void *data;
    struct Job *next;
} Job;

static pthread_mutex_t jobs_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t new_job = PTHREAD_COND_INITIALIZER;
static Job *jobs;

static void
resume_later(struct engine_suspended *suspended, engine_completion complete, void *data)
{
    Job *job = malloc(sizeof *job);

    CHECK(suspended != NULL && job != NULL);
    *job = (Job){suspended, complete, data, NULL};
    pthread_mutex_lock(&jobs_lock);
    job->next = jobs;
    jobs = job;
    pthread_cond_signal(&new_job);
    pthread_mutex_unlock(&jobs_lock);
}

static void *
resume_all(void *arg)
{
    (void)arg;
    for (;;) {
        Job *job;
        pthread_mutex_lock(&jobs_lock);
        while (jobs == NULL) {
            pthread_cond_wait(&new_job, &jobs_lock);
        }
        job = jobs;
        jobs = job->next;
        pthread_mutex_unlock(&jobs_lock);
        engine->resume(job->suspended, job->complete, job->data);
        free(job);
    }
    return NULL;
}

/* -------------------------------------------------------------------- callbacks */

static sfsistat
judge_sender(SMFICTX *context, void *data)
{
    char *sender = data;
    size_t size = strlen(sender);

    CHECK(inside && engine->getpriv(context) == data);
    free(sender);
    engine->setpriv(context, (void *)&hooks);
    return size % 2 == 0 ? SMFIS_CONTINUE : SMFIS_TEMPFAIL;
}

static sfsistat
suspend_again(SMFICTX *context, void *data)
{
    CHECK(inside);
    resume_later(engine->suspend(context), judge_sender, data);
    return SMFIS_REJECT; /* which is no answer */
}

static sfsistat
on_envfrom(SMFICTX *context, char **argv)
{
    char *sender = strdup(argv[0]);
    struct engine_suspended *suspended = engine->suspend(context);

    CHECK(inside && sender != NULL);
    CHECK(engine->suspend(context) == NULL);
    engine->setpriv(context, sender);
    if (strchr(sender, '!') != NULL) { /* before the callback has returned */
        engine->resume(suspended, suspend_again, sender);
    }
    else {
        resume_later(suspended, suspend_again, sender);
    }
    return SMFIS_REJECT;
}

static sfsistat
on_eom(SMFICTX *context)
{
    char name[] = "X-Engine", *value = strdup(engine->name);

    CHECK(inside);
    CHECK(engine->addheader(context, name, value) == MI_SUCCESS);
    CHECK(inside);
    free(value);
    return SMFIS_CONTINUE;
}

static sfsistat
on_close(SMFICTX *context)
{
    CHECK(inside && engine->getpriv(context) == &hooks);
    engine->setpriv(context, NULL);
    return SMFIS_CONTINUE;
}

static sfsistat
go_on(SMFICTX *context)
{
    CHECK(inside);
    engine->setpriv(context, (void *)&hooks);
    return SMFIS_CONTINUE;
}

static sfsistat
on_negotiate(SMFICTX *context, unsigned long actions, unsigned long protocol, unsigned long f2,
             unsigned long f3, unsigned long *want_actions, unsigned long *want_protocol,
             unsigned long *want_f2, unsigned long *want_f3)
{
    (void)f2;
    (void)f3;
    *want_actions = actions & SMFIF_ADDHDRS;
    *want_protocol = protocol & 0;
    *want_f2 = *want_f3 = 0;
    return go_on(context);
}

static sfsistat
on_connect(SMFICTX *context, char *name, _SOCK_ADDR *address)
{
    (void)name;
    (void)address;
    return go_on(context);
}

static sfsistat
on_text(SMFICTX *context, char *text)
{
    (void)text;
    return go_on(context);
}

static sfsistat
on_texts(SMFICTX *context, char **texts)
{
    (void)texts;
    return go_on(context);
}

static sfsistat
on_header(SMFICTX *context, char *name, char *value)
{
    (void)value;
    if (strcmp(name, "X-Slow") == 0) { /* so that another thread goes on with the others */
        nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL);
    }
    return go_on(context);
}

static sfsistat
on_body(SMFICTX *context, unsigned char *chunk, size_t size)
{
    (void)chunk;
    (void)size;
    return go_on(context);
}

static sfsistat
on_unknown(SMFICTX *context, const char *command)
{
    (void)command;
    return go_on(context);
}

static char filter_name[] = "engine_filter";
static const struct smfiDesc description = {
    .xxfi_name = filter_name,
    .xxfi_version = SMFI_VERSION,
    .xxfi_flags = SMFI_CURR_ACTS,
    .xxfi_connect = on_connect,
    .xxfi_helo = on_text,
    .xxfi_envfrom = on_envfrom,
    .xxfi_envrcpt = on_texts,
    .xxfi_header = on_header,
    .xxfi_eoh = go_on,
    .xxfi_body = on_body,
    .xxfi_eom = on_eom,
    .xxfi_abort = go_on,
    .xxfi_close = on_close,
    .xxfi_unknown = on_unknown,
    .xxfi_data = go_on,
    .xxfi_negotiate = on_negotiate,
};

/* ------------------------------------------------------------------------- life */

static void
on_signal(int number)
{
    (void)number;
    stopping = true;
    wake_main();
}

int
main(int argc, char **argv)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct pollfd wait;
    pthread_t thread;
    int listener;

    CHECK(argc == 3 && open_main_pipe());
    parallel = strtoul(argv[2], NULL, 10);
    sigaction(SIGTERM, &action, NULL);
    CHECK(engine->set_up(&description, &hooks) == MI_SUCCESS);
    CHECK(engine->setconn(argv[1]) == MI_SUCCESS);
    CHECK(engine->open(true, &listener) == MI_SUCCESS && listener >= 0);
    CHECK(pthread_create(&thread, NULL, resume_all, NULL) == 0);
    CHECK(engine->run(NULL) == 0);
    puts("serving");
    fflush(stdout);
    while (!stopping && ended < 0) {
        wait = (struct pollfd){.fd = main_pipe_reader(), .events = POLLIN};
        engine->wait(&wait, 1, -1);
    }
    engine->stop_accepting();
    engine->end();
    engine->finish();
    CHECK(ended < 0);
    puts("ended");
    return 0;
}
