/* libmilter's signal thread.
 *
 * libmilter blocks HUP, INT and TERM in its threads and has one that waits for them in sigwait()
 * and stops at once, whatever is in progress.  That thread is put to sleep for good as soon as it
 * is there, so that signals reach the program's own threads as if there were no libmilter.
 *
 * It is found by what makes it different from all others: it came after smfi_main() was called,
 * and has every signal blocked except those that it waits for (the kernel takes these out of a
 * thread's mask while it is in sigwait) and one that is reserved to park it.  What it took in
 * the moment before is sent again.
 *
 * Where there is no /proc the thread stays.  Then the kernel gives it a signal only if every other
 * thread of the process blocks that signal.
 */

#include "signal_thread.h"

#ifdef __linux__

#include <dirent.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "descriptors.h"
#include "listener.h"
#include "signal_sets.h"
#include "surroundings.h"

#define MAX_TASKS 512
#define QUICK_ATTEMPTS 200    /* to find the thread, without a pause between them */
#define PARKING_ATTEMPTS 1200 /* the others a millisecond apart */

#define POKE_INTERVAL 100 /* attempts */

static int park_signal;
static atomic_bool parked;
static atomic_int taken_too_soon; /* by the thread, in the moment when it was parked */
static sigset_t set_aside;        /* pending when main() was called, since they are blocked */
static long known_tasks[MAX_TASKS];
static int known_count;

/* What the system call returned that a signal's handler has interrupted. */
static long
interrupted_result(const ucontext_t *context)
{
#if defined(__x86_64__)
    return (long)context->uc_mcontext.gregs[REG_RAX];
#elif defined(__i386__)
    return context->uc_mcontext.gregs[REG_EAX];
#elif defined(__aarch64__)
    return (long)context->uc_mcontext.regs[0];
#elif defined(__arm__)
    return (long)context->uc_mcontext.arm_r0;
#elif defined(__riscv)
    return (long)context->uc_mcontext.__gregs[REG_A0];
#elif defined(__s390x__)
    return (long)context->uc_mcontext.gregs[2];
#else
    (void)context;
    return 0;
#endif
}

static void
park(int number, siginfo_t *info, void *context)
{
    long result = interrupted_result(context);

    (void)number;
    (void)info;
    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (result == stop_signals[i]) {
            atomic_store(&taken_too_soon, stop_signals[i]);
        }
    }
    atomic_store(&parked, true);
    for (;;) {
        pause(); /* the handler's mask blocks everything */
    }
}

/* Call `visit` for every thread of this process until it returns true. */
static bool
each_task(bool (*visit)(long task))
{
    DIR *directory = opendir("/proc/self/task");
    struct dirent *entry;
    bool found = false;

    while (directory != NULL && !found && (entry = readdir(directory)) != NULL) {
        if (entry->d_name[0] != '.') {
            found = visit(atol(entry->d_name));
        }
    }
    if (directory != NULL) {
        closedir(directory);
    }
    return found;
}

static bool
note_task(long task)
{
    known_tasks[known_count++] = task;
    return known_count == MAX_TASKS;
}

/* The signals that a thread blocks, bit n - 1 for signal n. */
static unsigned long long
blocked_by(long task)
{
    char path[64], line[256];
    unsigned long long blocked = 0;
    FILE *status;

    snprintf(path, sizeof path, "/proc/self/task/%ld/status", task);
    status = fopen(path, "re");
    while (status != NULL && fgets(line, sizeof line, status) != NULL) {
        if (sscanf(line, "SigBlk: %llx", &blocked) == 1) {
            break;
        }
    }
    if (status != NULL) {
        fclose(status);
    }
    return blocked;
}

static bool
park_if_signal_thread(long task)
{
    unsigned long long blocked, waited_for = 0, others = 0;

    for (int i = 0; i < known_count; i++) {
        if (known_tasks[i] == task) {
            return false;
        }
    }
    for (int i = 0; i < STOP_SIGNALS; i++) {
        waited_for |= 1ULL << (stop_signals[i] - 1);
    }
    others = 1ULL << (SIGUSR1 - 1) | 1ULL << (SIGUSR2 - 1) | 1ULL << (SIGALRM - 1) |
             1ULL << (SIGCHLD - 1) | 1ULL << (SIGQUIT - 1);
    blocked = blocked_by(task);
    return (blocked & others) == others && (blocked & waited_for) == 0 &&
           syscall(SYS_tgkill, getpid(), task, park_signal) == 0;
}

/* Signals that the program blocks may be pending, for whoever will wait for them in the program. */
static void
set_pending_aside(void)
{
    static const struct timespec at_once;
    sigset_t one;

    sigpending(&set_aside);
    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (sigismember(&set_aside, stop_signals[i])) {
            sigemptyset(&one);
            sigaddset(&one, stop_signals[i]);
            sigtimedwait(&one, NULL, &at_once);
        }
    }
}

static void
send_again(void)
{
    int taken = atomic_load(&taken_too_soon);

    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (sigismember(&set_aside, stop_signals[i]) || stop_signals[i] == taken) {
            kill(getpid(), stop_signals[i]);
        }
    }
}

void
prepare_parking(sigset_t *mask)
{
    struct sigaction action = {.sa_sigaction = park, .sa_flags = SA_SIGINFO};

    set_pending_aside();
    known_count = 0;
    each_task(note_task);
    if (known_count == MAX_TASKS) {
        return; /* the program has more threads than we can tell from libmilter's */
    }
    sigfillset(&action.sa_mask);
    park_signal = take_free_signal(&action);
    if (park_signal != 0) {
        sigdelset(mask, park_signal);
    }
}

void
cancel_parking(void)
{
    struct sigaction none = {.sa_handler = SIG_DFL};

    if (park_signal != 0) {
        sigaction(park_signal, &none, NULL);
        park_signal = 0;
    }
    send_again();
}

void
park_signal_thread(void)
{
    struct sigaction none = {.sa_handler = SIG_DFL};
    bool sent = false;

    for (int i = 0; park_signal != 0 && i < PARKING_ATTEMPTS; i++) {
        sent = sent || each_task(park_if_signal_thread);
        if (atomic_load(&parked) || atomic_load(&loop_ended)) {
            break;
        }
        if (i <= QUICK_ATTEMPTS) {
            sched_yield();
        }
        else {
            usleep(1000);
            if (i % POKE_INTERVAL == 0) {
                poke_listener(); /* the thread may be ending libmilter for a signal */
            }
        }
    }
    if (park_signal != 0 && (!sent || atomic_load(&parked))) {
        sigaction(park_signal, &none, NULL); /* else the signal may still arrive */
    }
    send_again();
}

bool
libmilter_took_signal(void)
{
    return park_signal != 0 && !atomic_load(&parked) && !is_listening(listening_descriptor());
}

#else

bool
libmilter_took_signal(void)
{
    return false;
}

void
cancel_parking(void)
{
}

void
prepare_parking(sigset_t *mask)
{
    (void)mask;
}

void
park_signal_thread(void)
{
}

#endif
