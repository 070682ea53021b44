/* What the parts of the extension module `milter` share.  Private to it. */

#ifndef PYMILTER_MILTER_H
#define PYMILTER_MILTER_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <malloc.h>
#elif defined(__FreeBSD__)
#include <malloc_np.h>
#elif defined(__APPLE__)
#include <malloc/malloc.h>
#define malloc_usable_size malloc_size
#endif

#include <libmilter/mfapi.h>
#include <libmilter/mfdef.h>

#if PY_VERSION_HEX < 0x030A0000
#define Py_NewRef(object) (Py_INCREF(object), (PyObject *)(object))
#define Py_XNewRef(object) (Py_XINCREF(object), (PyObject *)(object))
#endif

#if PY_VERSION_HEX < 0x030D0000
#define Py_BEGIN_CRITICAL_SECTION(op) {
#define Py_END_CRITICAL_SECTION() }
#endif

/* What the interpreter lock guards where there is one.  Held for a few loads and stores, never
 * over a call that may run Python, release an object or wait. */
#ifdef Py_GIL_DISABLED
#define LOCK_STATE() PyMutex_Lock(&filter.guard)
#define UNLOCK_STATE() PyMutex_Unlock(&filter.guard)
#else
#define LOCK_STATE() ((void)0)
#define UNLOCK_STATE() ((void)0)
#endif

/* Limits that libmilter has and does not export (libmilter.h: MAXREPLYLEN, MAXREPLIES). */
#define MAX_REPLY_LINE 980
#define MAX_REPLY_LINES 32

#define NAME_IN_REPLY 40       /* characters of the filter's name in the reply to an exception */
#define DRAIN_SECONDS 30.0     /* how long messages in progress may take after a stop */
#define CLOSE_SECONDS 2.0      /* how long close callbacks may take once all is drained */
#define BEAT_MILLISECONDS 200  /* at least this often a drain shows that it is alive */
#define COMFORTABLE_FILES 1024 /* below this soft limit accept() may run out of descriptors */
#define PROBE_SIZE 4096        /* bytes that must be there when a thread first calls back */
#define LEAST_STACK (1 << 20)  /* bytes that the stack of libmilter's threads has */
#define STACK_ARGS 16          /* arguments of a callback that need no allocation */

/* The steps of the dialogue that reach Python. */
enum stage {
    CONNECT,
    HELO,
    ENVFROM,
    ENVRCPT,
    DATA,
    HEADER,
    EOH,
    BODY,
    EOM,
    ABORT,
    CLOSE,
    UNKNOWN,
    NEGOTIATE,
    STAGES,
    OUTSIDE = -1 /* no callback of this connection is running */
};

/* Names of Python objects that are looked up for each callback; interned once. */
enum name {
    ABORT_NAME,
    BODY_NAME,
    DATA_NAME,
    ENVFROM_NAME,
    ENVFROM_BYTES,
    ENVFROM_ERRORS,
    ENVRCPT_NAME,
    ENVRCPT_BYTES,
    ENVRCPT_ERRORS,
    EOH_NAME,
    EOM_NAME,
    ERRORS_OF,
    HEADER_NAME,
    HEADER_BYTES,
    HEADER_ERRORS,
    HELLO_NAME,
    UNKNOWN_NAME,
    NAMES
};

typedef struct {
    const char *name;
    enum name method;        /* of the filter object: see milter__call_objects() */
    unsigned long leave_out; /* P_NO*: the MTA need not send this step */
    unsigned long no_reply;  /* P_NR_*: the MTA does not wait for an answer */
    bool in_message;         /* belongs to one message, not to the connection */
} StageInfo;

extern const StageInfo stages[STAGES];

/* What belongs to the module object.  What changes is guarded by LOCK_STATE(). */
typedef struct {
    PyObject *error;            /* milter.error */
    PyObject *invalid_argument; /* milter.InvalidArgument: an error and a ValueError */
    PyTypeObject *context_type;
    PyObject *names[NAMES];
    PyObject *callbacks[STAGES]; /* NULL where none is set */
    PyObject *shortcuts[STAGES]; /* see milter__call_objects() */
    PyObject *raised;            /* what main() raises when the filter has drained */
    char *name;                  /* as registered, for replies and reports */
    atomic_ulong flags;          /* set_flags() */
    atomic_int policy;           /* set_exception_policy() */
    bool hooked;                 /* the interpreter calls us at exit and after a fork */
} module_state;

enum phase { SETTING_UP, SOCKET_OPEN, STARTING, RUNNING, STOPPED };
enum socket_kind { NO_SOCKET, UNIX_SOCKET, INET_SOCKET, INET6_SOCKET, INHERITED_SOCKET };

/* What belongs to the process: libmilter is one to a process and hands a callback nothing
 * but its own context, so one static object has to lead from there to the module. */
typedef struct {
    module_state *state;
    PyInterpreterState *interpreter;
#ifdef Py_GIL_DISABLED
    PyMutex guard; /* of LOCK_STATE() */
#endif
    atomic_int phase; /* changed under LOCK_STATE() */

    char *conn; /* as given to setconn() */
    enum socket_kind kind;
    char *path;   /* absolute, of a unix socket */
    dev_t device; /* what stood at path after it was bound */
    ino_t inode;
    int listener; /* libmilter's listening descriptor, or -1 */

    atomic_int pipe[2];      /* wakes main(): anything written to [1] does */
    int wakeup_before;       /* the descriptor that the application had set, or -1 */
    bool wakeup_set;         /* Python writes signals to it, guarded likewise */
    sigset_t mask;           /* of the thread that called main() */
    pthread_mutex_t startup; /* held until no signal can get lost: no callback before */
    atomic_int drain_ms;
    atomic_size_t max_data; /* bytes in a packet, setmaxdatasize() */

    /* Read and written by many threads, and by signal handlers. */
    atomic_bool stop_wanted;    /* by stop(), a signal, an exception */
    atomic_bool draining;       /* new messages are refused */
    atomic_bool forked;         /* this process is a child of the filter's */
    atomic_bool drained;        /* nothing more will be answered */
    atomic_bool listener_ended; /* smfi_main() has returned */
    atomic_bool gate_closed;    /* no thread of libmilter may enter Python any more */
    atomic_int result;          /* of smfi_main() */
    atomic_int signal;          /* the one that stopped the filter, or 0 */
    atomic_ulong beat;          /* counts the rounds of main()'s waiting */
    atomic_long inside;         /* threads of libmilter that are in Python now */
    atomic_long workers;        /* threads of libmilter that have been there */
    atomic_long messages;       /* in progress */
    atomic_ulong created;       /* contexts */
    atomic_ulong deleted;
} Filter;

extern Filter filter;

/* What an exception left unanswered: see owe(). */
enum debt { NOTHING_OWED, OWED_FOR_MESSAGE, OWED_FOR_CONNECTION };

typedef struct {
    PyObject_HEAD
    PyObject *weakrefs;
    PyObject *priv;      /* setpriv(): the application's object */
    module_state *state; /* borrowed: the type keeps the module alive */

    pthread_mutex_t lock;         /* guards what follows, and libmilter's context itself */
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
} ContextObject;

/* What the connections accepted from the listening socket have for their own address. */
typedef struct {
    struct sockaddr_storage name;
    socklen_t size;
} LocalAddress;

extern PyType_Spec context_spec;
extern PyType_Spec decoder_spec;

/* values.c: between C and Python, and the checks of arguments */
void wake_main(void);
double drain_seconds(void);
double monotonic_now(void);
PyObject *take_exception(void);
void raise_exception(PyObject *exception);
PyObject *text_from(const char *s, size_t size);
int refuse(module_state *state, const char *call, const char *argument, const char *rule,
           PyObject *value);
PyObject *encode_text(module_state *state, const char *call, const char *argument, PyObject *value);
PyObject *text_argument(module_state *state, const char *call, const char *argument,
                        PyObject *value);
PyObject *line_argument(module_state *state, const char *call, const char *argument,
                        PyObject *value);
PyObject *nonempty_line_argument(module_state *state, const char *call, const char *argument,
                                 PyObject *value);
PyObject *header_name_argument(module_state *state, const char *call, PyObject *value);
PyObject *header_value_argument(module_state *state, const char *call, PyObject *value);
void log_record(const char *method, PyObject *message, PyObject *exception);
PyObject *client_address(const _SOCK_ADDR *address);

/* miltermodule.c: the bridge */
bool prepare_threads(void);
void stop_with_exception(module_state *state);
void end_message(ContextObject *context);
PyObject *swap_priv(ContextObject *context, PyObject *priv);
void lock_context(ContextObject *context);
void remember(const ContextObject *context);
void recall(ContextObject *context, enum stage stage);

/* turnstile.c: one after the other to the interpreter lock */
#ifndef Py_GIL_DISABLED
void enter_turnstile(void);
unsigned pass_turnstile(int stage);
bool leave_turnstile(void);
void judge(enum stage stage, unsigned began);
#else
static inline void
enter_turnstile(void)
{
}

static inline unsigned
pass_turnstile(int Py_UNUSED(stage))
{
    return 0;
}

static inline bool
leave_turnstile(void)
{
    return false;
}

static inline void
judge(enum stage Py_UNUSED(stage), unsigned Py_UNUSED(began))
{
}
#endif

/* pool.c: libmilter's workers */
void watch_pool(void);
int poll_and_tend_pool(struct pollfd *wait, int timeout);

/* context.c: the context object */
ContextObject *new_context(module_state *state, SMFICTX *handle, enum stage stage);
void forget_connection(ContextObject *context);
void lose_connection(ContextObject *context);

/* listener.c: the listening socket */
int raise_os_error(module_state *state, int code, const char *what, const char *where,
                   const char *mend);
const char *why_bad_conn(const char *conn, char *advice, size_t advice_size);
bool is_listening(int fd);
int open_dummy_listener(void);
int open_socket(module_state *state, bool remove_old);
void remove_unix_socket(void);
void reserve_descriptors(void);
void release_descriptors(void);
void drop_sockets(void);
void poke_listener(void);
void end_connections(LocalAddress *local);
void stop_listening(LocalAddress *local);

/* signals.c */
void take_signals(bool on_main_thread);
void give_back_signals(void);
void take_put_off_action(void);
void fill_but_faults(sigset_t *set);
PyObject *hold_signals(PyObject *module, PyObject *value);
PyObject *await_news(PyObject *module, PyObject *args);
bool borrow_wakeup_fd(void);
void return_wakeup_fd(void);
void forward_signals(const char *bytes, ssize_t count);
int take_free_signal(const struct sigaction *action);
void prepare_parking(sigset_t *mask);
void park_signal_thread(void);
void cancel_parking(void);
bool libmilter_took_signal(void);

/* lifecycle.c: from main() to the end of the process */
bool open_wake_pipe(int ends[2]);
int open_pipe(module_state *state);
PyObject *close_gate(PyObject *module, PyObject *Py_UNUSED(ignored));
PyObject *after_fork_in_child(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored));
int hook_interpreter(PyObject *module, module_state *state);
void warn_of_few_descriptors(void);
int run_filter(module_state *state);

/* workers.c: one filter as several processes */
void prepare_door(sigset_t *mask);
void be_listener(void);
void open_the_door(void);
void count_connection(int change);
bool others_listen(void);
bool leave_socket(LocalAddress *local);
void wake_listener(void);
void begin_work(void);
bool is_worker_process(void);
void ask_all_to_stop(void);
void end_work(void);
void share_drain_timeout(void);
void forget_supervisor(void);
PyObject *share_socket(PyObject *module, PyObject *value);
PyObject *become_worker(PyObject *module, PyObject *args);
PyObject *fork_worker(PyObject *module, PyObject *serve);
PyObject *worker_gone(PyObject *module, PyObject *value);
PyObject *stop_state(PyObject *module, PyObject *Py_UNUSED(ignored));
PyObject *unique_id(PyObject *module, PyObject *Py_UNUSED(ignored));
PyObject *last_unique_id(PyObject *module, PyObject *Py_UNUSED(ignored));

/* metrics.c: what the callbacks do, counted */
extern atomic_bool counting;
uint64_t count_clock(void);
void count_callback(enum stage stage, sfsistat verdict, uint64_t began);
void count_exception(enum stage stage);
void count_new_connection(void);
void count_new_message(void);
void take_place_for_counting(int number);
PyObject *switch_counting(PyObject *module, PyObject *value);
PyObject *counters_snapshot(PyObject *module, PyObject *Py_UNUSED(ignored));

static inline bool
is_counting(void)
{
    return atomic_load_explicit(&counting, memory_order_acquire);
}

/* constants.c */
int add_constants(PyObject *module);

#endif
