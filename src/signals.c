/* Signals while a filter runs.
 *
 * libmilter blocks HUP, INT and TERM in its threads and has one that waits for them in sigwait()
 * and stops at once, whatever is in progress.  That thread is put to sleep for good as soon as it
 * is there.  So signals reach the program's own threads as if there were no libmilter: Python's
 * handler if the application installed one, on_stop_signal() where the default action, or
 * Python's KeyboardInterrupt, was in place.
 */

#include "milter.h"

#ifdef __linux__
#include <sys/syscall.h>
#include <sched.h>
#include <ucontext.h>
#endif

#define STOP_SIGNALS 3
static const int stop_signals[STOP_SIGNALS] = {SIGTERM, SIGINT, SIGHUP};
static struct sigaction previous_actions[STOP_SIGNALS];
static bool taken_signals[STOP_SIGNALS];

static atomic_bool action_put_off; /* main() is not on the main thread: the action comes later */
static atomic_bool held_back;      /* the main thread waits in hold_back() */

/* ------------------------------------------------ a signal that stops the filter */

static void
take_action(int number)
{
    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (stop_signals[i] != number) {
            continue;
        }
        if (previous_actions[i].sa_handler == SIG_DFL) {
            sigaction(number, &previous_actions[i], NULL);
            raise(number);
        }
        else {
            previous_actions[i].sa_handler(number); /* Python's: it makes a note */
        }
    }
}

/* main() runs on another thread, and the main thread of the program sleeps in a system call
 * that this signal would end: a program would go on that should die, but not before the filter
 * has drained.  So sleep on here.  Only without the interpreter lock, which draining needs; and
 * only while draining shows a sign of life, should this thread hold some other lock. */
static void
hold_back(int number)
{
    double end = monotonic_now() + drain_seconds() + CLOSE_SECONDS + 1;
    double last_sign = monotonic_now();
    unsigned long beat = atomic_load(&filter.beat);

    if (atomic_exchange(&held_back, true)) {
        return;
    }
    while (!atomic_load(&filter.drained) && monotonic_now() < end &&
           monotonic_now() < last_sign + CLOSE_SECONDS) {
        poll(NULL, 0, 10);
        if (beat != atomic_load(&filter.beat)) {
            beat = atomic_load(&filter.beat);
            last_sign = monotonic_now();
        }
    }
    atomic_store(&held_back, false); /* from here on main() takes the action, if it comes first */
    if (atomic_load(&filter.drained) && atomic_exchange(&filter.signal, 0) != 0) {
        take_action(number);
    }
}

static bool
main_thread_sleeps(void)
{
#ifdef __linux__
    return syscall(SYS_gettid) == getpid() && !PyGILState_Check();
#else
    return false;
#endif
}

static void
on_stop_signal(int number)
{
    int saved = errno;
    int none = 0;

    atomic_compare_exchange_strong(&filter.signal, &none, number);
    atomic_store(&filter.stop_wanted, true);
    wake_main();
    if (atomic_load(&action_put_off) && main_thread_sleeps()) {
        hold_back(number);
    }
    errno = saved;
}

/* ------------------------------------------------------------- which signals */

/* May we take this signal?  Yes where nobody else cares: the default action, or Python's own
 * handler of SIGINT, which raises KeyboardInterrupt. */
static bool
is_default_action(int number, const struct sigaction *action)
{
    PyObject *module, *handler = NULL, *theirs = NULL;
    bool is_default;

    if (action->sa_handler == SIG_DFL) {
        return true;
    }
    if (action->sa_handler == SIG_IGN || number != SIGINT) {
        return false;
    }
    module = PyImport_ImportModule("_signal"); /* in C: no handler runs, and raises, in its calls */
    if (module != NULL) {
        handler = PyObject_CallMethod(module, "getsignal", "i", number);
    }
    if (handler != NULL) {
        theirs = PyObject_GetAttrString(module, "default_int_handler");
    }
    is_default = handler != NULL && handler == theirs;
    PyErr_Clear();
    Py_XDECREF(module);
    Py_XDECREF(handler);
    Py_XDECREF(theirs);
    return is_default;
}

void
take_signals(bool on_main_thread)
{
    /* No signal is blocked while the handler runs: a second one would be for somebody else.
     * System calls are not restarted after it, as with Python's own handlers. */
    struct sigaction action = {.sa_handler = on_stop_signal, .sa_flags = SA_NODEFER};

    atomic_store(&action_put_off, !on_main_thread);
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < STOP_SIGNALS; i++) {
        struct sigaction *previous = &previous_actions[i];
        taken_signals[i] = sigaction(stop_signals[i], NULL, previous) == 0 &&
                           is_default_action(stop_signals[i], previous) &&
                           sigaction(stop_signals[i], &action, NULL) == 0;
    }
}

/* Also runs in a forked child, so only async-signal-safe calls. */
void
give_back_signals(void)
{
    struct sigaction current;

    for (int i = 0; i < STOP_SIGNALS; i++) {
        if (taken_signals[i] && sigaction(stop_signals[i], NULL, &current) == 0 &&
            current.sa_handler == on_stop_signal) {
            sigaction(stop_signals[i], &previous_actions[i], NULL);
        }
        taken_signals[i] = false;
    }
}

/* Take the action of a signal, which was put off until the filter had drained. */
void
take_put_off_action(void)
{
    int number;

    if (!atomic_load(&action_put_off) || atomic_load(&held_back)) {
        return;
    }
    number = atomic_exchange(&filter.signal, 0);
    if (number != 0) {
        kill(getpid(), number);
    }
}

/* ------------------------------------------------------------ Python's signals */

/* Python's own C handler of signals writes their numbers to this descriptor: a signal whose
 * handler is in Python wakes main() whichever thread it arrives on.  The one before in `before`.
 * False with an exception set; no Python code, and so no handler, runs. */
static bool
set_wakeup_fd(int fd, bool warn, int *before)
{
    PyObject *module = PyImport_ImportModule("_signal");
    PyObject *function = NULL, *args = NULL, *keywords = NULL, *old = NULL;

    if (module != NULL && (function = PyObject_GetAttrString(module, "set_wakeup_fd")) != NULL &&
        (args = Py_BuildValue("(i)", fd)) != NULL &&
        (keywords = Py_BuildValue("{sO}", "warn_on_full_buffer", warn ? Py_True : Py_False)) !=
            NULL &&
        (old = PyObject_Call(function, args, keywords)) != NULL) {
        *before = (int)PyLong_AsLong(old);
    }
    Py_XDECREF(keywords);
    Py_XDECREF(args);
    Py_XDECREF(function);
    Py_XDECREF(module);
    Py_XDECREF(old);
    return old != NULL;
}

/* Also tells whether this is the main thread: on another one CPython refuses, by ValueError. */
bool
borrow_wakeup_fd(void)
{
    bool main_thread;

    filter.wakeup_set = set_wakeup_fd(filter.pipe[1], false, &filter.wakeup_before);
    main_thread = filter.wakeup_set || !PyErr_ExceptionMatches(PyExc_ValueError);
    PyErr_Clear();
    return main_thread;
}

void
return_wakeup_fd(void)
{
    if (filter.wakeup_set) {
        int ours;
        filter.wakeup_set = false;
        if (!set_wakeup_fd(filter.wakeup_before, true, &ours)) {
            PyErr_Clear(); /* the application's descriptor may be closed by now */
        }
    }
}

/* All signals but those that tell of a fault in the program. */
void
fill_but_faults(sigset_t *set)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};

    sigfillset(set);
    for (size_t i = 0; i < Py_ARRAY_LENGTH(faults); i++) {
        sigdelset(set, faults[i]);
    }
}

/* ------------------------------------------------------ the supervisor's signals
 *
 * A handler may raise, and in Python there is no place where it may not.  So the process that
 * supervises workers holds signals back but while it waits, in here, and every handler that is
 * due has run when it goes on. */

static sigset_t open_mask;
static bool held;

/* Run the handlers of all signals that have come.  The first exception counts. */
static bool
run_handlers(void)
{
    PyObject *first = NULL;

    while (PyErr_CheckSignals() < 0) {
        PyObject *exception = take_exception();
        if (first != NULL) {
            Py_DECREF(exception);
        }
        else {
            first = exception;
        }
    }
    if (first != NULL) {
        raise_exception(first);
        return false;
    }
    return true;
}

/* _hold_signals(on): block signals, or put back the mask of before; raises what a handler does. */
PyObject *
hold_signals(PyObject *Py_UNUSED(module), PyObject *value)
{
    int on = PyObject_IsTrue(value);
    sigset_t set;

    if (on > 0 && !held) {
        fill_but_faults(&set);
        held = pthread_sigmask(SIG_BLOCK, &set, &open_mask) == 0;
    }
    else if (on == 0 && held) {
        held = pthread_sigmask(SIG_SETMASK, &open_mask, NULL) != 0;
    }
    return on >= 0 && run_handlers() ? Py_NewRef(Py_None) : NULL;
}

/* _await(descriptors, timeout): wait, with signals let in, until one of the descriptors can be
 * read, a signal has come, or for so many milliseconds, where negative without end.  Raises what a
 * handler does. */
PyObject *
await_news(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *descriptors;
    struct pollfd *wait;
    sigset_t blocked;
    Py_ssize_t count;
    int timeout;

    if (!PyArg_ParseTuple(args, "O!i:_await", &PyList_Type, &descriptors, &timeout)) {
        return NULL;
    }
    count = PyList_GET_SIZE(descriptors);
    wait = PyMem_New(struct pollfd, (size_t)count);
    if (wait == NULL) {
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        wait[i] = (struct pollfd){.fd = (int)PyLong_AsLong(PyList_GET_ITEM(descriptors, i)),
                                  .events = POLLIN};
    }
    if (!PyErr_Occurred()) {
        Py_BEGIN_ALLOW_THREADS
        if (held) {
            pthread_sigmask(SIG_SETMASK, &open_mask, &blocked);
        }
        (void)poll(wait, (nfds_t)count, timeout);
        if (held) {
            pthread_sigmask(SIG_SETMASK, &blocked, NULL);
        }
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(wait);
    return !PyErr_Occurred() && run_handlers() ? Py_NewRef(Py_None) : NULL;
}

/* Pass on to the application's descriptor what Python wrote to ours.  The zeros are our own. */
void
forward_signals(const char *bytes, ssize_t count)
{
    for (ssize_t i = 0; i < count; i++) {
        if (bytes[i] != 0 && filter.wakeup_set && filter.wakeup_before >= 0) {
            (void)!write(filter.wakeup_before, &bytes[i], 1);
        }
    }
}

/* ---------------------------------------------------- libmilter's signal thread
 *
 * It is found by what makes it different from all others: it came after smfi_main() was called,
 * and has every signal blocked except those that it waits for (the kernel takes these out of a
 * thread's mask while it is in sigwait) and one that is reserved to park it.  What it took in
 * the moment before is sent again.  Where there is no /proc the thread stays; then it gets a
 * signal that the kernel finds no better thread for.
 */

#ifdef __linux__

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
park(int Py_UNUSED(number), siginfo_t *Py_UNUSED(info), void *context)
{
    long result = interrupted_result(context);

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

/* Install a handler for the first real-time signal, from the top, that has none; 0: all have. */
int
take_free_signal(const struct sigaction *action)
{
    struct sigaction current;

    for (int number = SIGRTMAX; number >= SIGRTMIN; number--) {
        if (sigaction(number, NULL, &current) == 0 && current.sa_handler == SIG_DFL &&
            sigaction(number, action, NULL) == 0) {
            return number;
        }
    }
    return 0;
}

/* Before libmilter's threads start: choose the signal, and open it in their mask. */
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

/* libmilter's threads did not come to be. */
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
        if (atomic_load(&parked) || atomic_load(&filter.listener_ended)) {
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

/* A signal may come between the start of the thread and its parking, and be taken by it: then
 * libmilter ends by itself and closes its socket.  There were no messages yet, so that is the
 * clean stop that was asked for. */
bool
libmilter_took_signal(void)
{
    return park_signal != 0 && !atomic_load(&parked) && !is_listening(filter.listener);
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
prepare_parking(sigset_t *Py_UNUSED(mask))
{
}

void
park_signal_thread(void)
{
}

#endif
