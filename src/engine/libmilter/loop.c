/* libmilter's loop.
 *
 * smfi_main() runs on a thread of its own.  libmilter's own way to stop, smfi_stop(), is not used:
 * it cuts messages in progress, takes up to five seconds and removes whatever then stands at the
 * socket's path.  libmilter's threads stay asleep until the process ends; smfi_main() does not
 * return, and cannot be called again.
 */

#include "loop.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "callbacks.h"
#include "door.h"
#include "listener.h"
#include "signal_sets.h"
#include "signal_thread.h"
#include "surroundings.h"

#define LEAST_STACK (1 << 20) /* bytes that the stack of libmilter's threads has */

/* libmilter's threads inherit this mask.  It is set in the new thread, which besides waits until
 * its maker is out of pthread_create(): a signal that came while the maker blocked signals, as
 * pthread_create() does too, would wait for libmilter's signal thread and be taken by it. */
static sigset_t libmilter_mask;
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;

static void *
run_libmilter(void *arg)
{
    int result;

    (void)arg;
    pthread_sigmask(SIG_SETMASK, &libmilter_mask, NULL);
    be_listener();
    pthread_mutex_lock(&starting);
    pthread_mutex_unlock(&starting);
    result = smfi_main();
    atomic_store(&loop_ended, true);
    hooks->ended(libmilter_took_signal() ? MI_SUCCESS : result);
    return NULL;
}

/* libmilter takes the default size of stacks, which is 128 KiB with musl, and what `ulimit -s` says
 * with glibc; Python's limit of recursion relies on more. */
static void
ensure_stack(void)
{
#ifdef __linux__
    pthread_attr_t defaults;
    size_t size;

    if (pthread_getattr_default_np(&defaults) != 0) {
        return;
    }
    if (pthread_attr_getstacksize(&defaults, &size) == 0 && size < LEAST_STACK &&
        pthread_attr_setstacksize(&defaults, LEAST_STACK) == 0) {
        pthread_setattr_default_np(&defaults);
    }
    pthread_attr_destroy(&defaults);
#endif
}

static int
start_thread(void)
{
    pthread_t thread;
    pthread_attr_t attributes;
    int code;

    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_mutex_lock(&starting);
    code = pthread_create(&thread, &attributes, run_libmilter, NULL);
    pthread_mutex_unlock(&starting);
    pthread_attr_destroy(&attributes);
    return code;
}

/* libmilter's threads block every signal that a program handles; a thread that comes to run a
 * callback goes back to the mask of the one that called run_loop(). */
int
run_loop(const struct engine_share *surrounding)
{
    sigset_t mask;
    int code = prepare_threads_for_callbacks();

    if (code != 0) {
        return code;
    }
    share = surrounding;
    reserve_descriptors();
    fill_but_faults(&libmilter_mask);
    ensure_stack();
    prepare_parking(&libmilter_mask);
    prepare_door(&libmilter_mask);
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    hold_callbacks(&mask);
    code = start_thread();
    if (code == 0) {
        park_signal_thread();
    }
    let_callbacks_in();
    if (code != 0) {
        cancel_parking();
        release_descriptors();
        return code;
    }
    start_porter();
    return 0;
}

void
stop_accepting(void)
{
    if (!close_the_door()) {
        stop_listening();
    }
}

void
end_loop(void)
{
    if (!atomic_load(&loop_ended)) {
        end_connections();
    }
}

bool
finish_loop(void)
{
    release_descriptors();
    return false;
}

void
forget_loop(void)
{
    atomic_store(&forked, true);
    release_descriptors();
    drop_sockets();
    forget_door();
    share = NULL;
}
