/* The seam between the filter and who speaks to the MTA: an engine, as a table of functions.
 *
 * An engine accepts connections, speaks the milter protocol on them, and calls the filter, which is
 * a `struct smfiDesc` of libmilter.  What a callback may do meanwhile are the functions of
 * libmilter, with its signatures and its results (MI_SUCCESS, MI_FAILURE), as members of the table.
 * Whoever calls them cannot tell which engine it is.
 *
 * An engine knows nothing of Python and includes nothing of it.  There are two things that it has
 * to know of its surroundings, and gets when it is set up: the hooks, by which a thread of its own
 * enters and leaves the interpreter, and, where several processes serve one socket, the share, by
 * which it finds out whose turn it is to accept.
 *
 * One engine serves in a process: see engine/choice.h.
 *
 *     set_up  setconn settimeout setbacklog setdbg setmaxdatasize
 *        open  [prepare_share  fork]  run  wait...  stop_accepting  wait...  end  wait...  finish
 *
 * Order.  Callbacks of one connection never overlap, come in the order of libmilter's manual, and
 * need not all come on one thread.  Those of different connections may overlap.
 *
 * Strings and buffers that a callback gets are the engine's, and good until it returns; so is what
 * getsymval() gives.  What the table's functions are given is copied before they return.  That
 * parameters are not const is libmilter's; no engine changes what they point to.
 *
 * Contexts.  A SMFICTX is the engine's that made it, opaque to all others, and good from the first
 * callback of a connection until xxfi_close has returned.
 */

#ifndef PYMILTER_ENGINE_H
#define PYMILTER_ENGINE_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include <libmilter/mfapi.h>
#include <libmilter/mfdef.h>

/* What an engine asks of the filter's side.  All may be called from any thread. */
struct engine_hooks {
    /* Before a batch of callbacks, on the thread that will run them: get the right to run the
     * filter (in Python: the interpreter lock), however long that takes.  A batch is at least one
     * callback, of one connection or of several.  False: there is no such right, as memory is
     * short or the program ends.  Then the callbacks of the batch are called all the same, and
     * answer by themselves; leave() is not called.  Never called by a thread that is inside. */
    bool (*enter)(void);

    /* After the batch. */
    void (*leave)(void);

    /* How many threads can be inside and run at once, without waiting for each other: 1 where the
     * filter's callbacks take turns.  Asked before run(). */
    size_t (*parallel)(void);

    /* In a function of the table, called by a thread that has the right: give it up for a while,
     * since what follows may wait; and get it back.  What release() returns is for reacquire() on
     * the same thread.  No callback between them. */
    void *(*release)(void);
    void (*reacquire)(void *released);

    /* On a thread that has been inside, outside of a batch, as the last call before it ends: what
     * is kept for the thread is released.  An engine whose threads end without a chance to call
     * this loses some memory with each. */
    void (*thread_ends)(void);

    /* The engine cannot serve any longer, and nobody told it to stop: MI_FAILURE for a fault that
     * it has logged, MI_SUCCESS where it did what an administrator asked for.  Called once at
     * most, outside of a batch. */
    void (*ended)(int result);

    /* In a batch: the MTA of a connection whose callback is suspended has hung up, so that nobody
     * waits for its answer.  The callback may be resumed early.  Once for a suspended callback, by
     * engines that can tell; NULL where the filter does not care. */
    void (*hung_up)(SMFICTX *context);

    /* A line for the log of the filter, from any thread, in or outside of a batch: copied, and
     * written soon.  It is UTF-8 text without line ends; whoever calls this limits how often. */
    void (*log)(const char *level, const char *text); /* "error", "warning", "info" or "debug" */
};

/* Several processes serve one listening socket: what an engine that does so asks.  All functions
 * are quick, take no locks of the engine, and may be called from any thread, in a batch or not. */
struct engine_share {
    /* Can be read, at its end, when this process is to accept nothing any more; -1: none. */
    int lifeline;

    /* That has happened, or the engine cannot tell: it has stopped accepting by itself. */
    void (*lifeline_ended)(void);

    /* Has this process more connections than its share, so that another should take the next? */
    bool (*has_enough)(void);

    /* How many connections all processes have taken so far: who leaves one to the others can tell
     * whether the one that still waits is another. */
    unsigned long (*taken)(void);

    /* This process came for a connection that another had just taken: it is not one that leaves
     * them waiting.  An engine that cannot notice need not call it. */
    void (*came_late)(void);

    /* A connection was left to the others for a while, and nobody came: this process is about to
     * take it, and need not wait for the same ones again. */
    void (*nobody_came)(void);
};

/* Where a callback was suspended: see suspend(). */
struct engine_suspended;
typedef sfsistat (*engine_completion)(SMFICTX *context, void *data);

/* What a completion may return after hung_up(): the callback has not come to its end.  Nothing is
 * answered, and the connection ends, with xxfi_abort where a message was in progress. */
#define ENGINE_CUT_OFF (-2)

struct engine {
    const char *name; /* as users write it */

    /* --- before open(); all but set_up() also while the engine runs, for what begins later
     *
     * Not called by two threads at once. */

    /* The filter, and its surroundings; the description is copied, hooks and its xxfi_name have to
     * outlive the engine.  Again, with another one, only before run().  MI_FAILURE: xxfi_version is
     * not what the engine was made for. */
    int (*set_up)(const struct smfiDesc *filter, const struct engine_hooks *hooks);

    /* Like smfi_...() */
    int (*version)(unsigned int *major, unsigned int *minor, unsigned int *patch);
    int (*setconn)(char *address);
    int (*settimeout)(int seconds);
    int (*setbacklog)(int connections);
    int (*setdbg)(int level);
    size_t (*setmaxdatasize)(size_t bytes);

    /* --- life, all on the thread that runs main(), but for what is said otherwise
     *
     * None of these is called from within a batch.  They may wait as long as opening a socket or
     * starting a thread takes, so they are called without the right to run the filter. */

    /* Open the listening socket of setconn().  `remove_old`: remove a unix socket that is left
     * there.  In *listener goes the descriptor, which stays the engine's: others may set options
     * or ask for its address, not close it; -1 where the engine does not know.  MI_FAILURE: no
     * socket was opened; whoever called finds out why. */
    int (*open)(bool remove_old, int *listener);

    /* In the process that will fork those that serve: make the socket fit to be shared.  0, or an
     * errno. */
    int (*prepare_share)(void);

    /* Begin to serve, on threads of the engine's own, and return as soon as it has begun; callbacks
     * may come before that.  `share` is NULL where this process is alone, and outlives the engine.
     * The signal mask of the caller is that of the threads in callbacks; no other thread of the
     * engine takes a signal that a program may want.  0, or an errno: nothing was begun then. */
    int (*run)(const struct engine_share *share);

    /* poll() on `count` descriptors, for the thread in main(); what the engine has to do from time
     * to time is done meanwhile. */
    int (*wait)(struct pollfd *wait, nfds_t count, int timeout);

    /* From here on no connection is accepted, and who tries is refused at once, unless others
     * listen on the socket: an inherited one, or one that is shared.  Connections that there are
     * go on.  Also where run() was never called.  A unix socket's path is not touched; as long as
     * this has not returned, the socket's inode is not given to another. */
    void (*stop_accepting)(void);

    /* Where processes share a socket: the number of connections here or elsewhere has changed, so
     * that has_enough() may say otherwise now.  From any thread, in a batch or not; quick. */
    void (*share_changed)(void);

    /* Nothing more is read: answers that are due are still written, then each connection is
     * closed, with its xxfi_close.  Returns at once.  A callback that runs may take its time; one
     * that is suspended is waited for, and if its step has no answer, what the MTA has sent
     * meanwhile is taken up to one that has: without waiting for more than is there. */
    void (*end)(void);

    /* The last call: the caller waits no longer, whether all connections are closed or not, and
     * the engine gives back what it can.  True where open() and run() may be called anew. */
    bool (*finish)(void);

    /* In the child of a fork: the engine, its threads and connections are the parent's.  Close the
     * descriptors that this process has of them.  Afterwards nothing is called but what does not
     * write, for the callback that forked. */
    void (*forget)(void);

    /* --- of a connection, from the first callback on until xxfi_close returns
     *
     * From any thread, in a callback or while one runs or is suspended; the caller sees to it that
     * it is one call at a time for each connection, and that the context is still good.  Those that
     * write may wait for the MTA, for as long as settimeout() says; they call release() and
     * reacquire() meanwhile.  Any other returns at once. */

    /* An object of the filter's, NULL at the beginning.  A connection that has none when it ends is
     * closed without xxfi_close, and without a batch. */
    int (*setpriv)(SMFICTX *context, void *priv);
    void *(*getpriv)(SMFICTX *context);

    char *(*getsymval)(SMFICTX *context, char *name);
    int (*setreply)(SMFICTX *context, char *code, char *enhanced, char *text);
    /* smfi_setmlreply(), with an array in which NULL follows the last line. */
    int (*setmlreply)(SMFICTX *context, char *code, char *enhanced, char **lines);

    /* In xxfi_negotiate. */
    int (*setsymlist)(SMFICTX *context, int stage, char *macros);

    /* At xxfi_connect without a negotiation before it: has this connection had an earlier session
     * (SMFIC_QUIT_NC), and what was agreed then?  keep_agreement() is told at xxfi_close, by a
     * filter that may be asked for it; an engine that knows by itself need not listen. */
    bool (*recall_agreement)(SMFICTX *context, unsigned long *actions, unsigned long *protocol);
    void (*keep_agreement)(SMFICTX *context, unsigned long actions, unsigned long protocol);

    /* These write. */
    int (*progress)(SMFICTX *context);
    int (*addheader)(SMFICTX *context, char *name, char *value);
    int (*insheader)(SMFICTX *context, int index, char *name, char *value);
    int (*chgheader)(SMFICTX *context, char *name, int index, char *value);
    int (*chgfrom)(SMFICTX *context, char *sender, char *parameters);
    int (*addrcpt)(SMFICTX *context, char *recipient);
    int (*addrcpt_par)(SMFICTX *context, char *recipient, char *parameters);
    int (*delrcpt)(SMFICTX *context, char *recipient);
    int (*replacebody)(SMFICTX *context, unsigned char *body, int size);
    int (*quarantine)(SMFICTX *context, char *reason);

    /* In a callback but xxfi_negotiate, on its thread: what it returns is no answer, as that comes
     * later.  NULL, for want of memory, or since it is suspended already, and with an engine that
     * cannot: then the answer is what it returns.  No other callback of the connection comes
     * meanwhile. */
    struct engine_suspended *(*suspend)(SMFICTX *context);

    /* Go on, from any thread, in a batch or not; once for each suspend(), and also before the
     * suspended callback has returned.  Once it has, `complete` is called on a thread of the
     * engine's, in a batch, like a callback: it may suspend itself anew, and what it returns is the
     * answer.  `suspended` is the engine's again.  Never fails, and never waits. */
    void (*resume)(struct engine_suspended *suspended, engine_completion complete, void *data);

    /* --- an event loop of the program's that leads
     *
     * Where callbacks await, their steps are taken on the thread of an event loop.  If that waits
     * for the engine's connections too, no callback has to change threads.  All three are called by
     * a thread that has the right to run the filter; attend() is NULL where the engine has no use
     * for a loop. */

    /* Let the loop of this thread lead, from its next turn on: a descriptor, which is the caller's
     * to close, that can be read when a turn is due; -1: the engine goes on by itself. */
    int (*attend)(void);

    /* A turn: do what there is to do, for about a millisecond at most but for what callbacks take,
     * in batches for which neither enter() nor leave() is called.  How many milliseconds from now
     * the next one is due in any case; TURN_ON_CALL: not before the descriptor can be read;
     * TURN_OVER: the loop leads no longer, since the engine ends or a callback took long. */
    long (*take_turn)(void);

    /* The engine shall go on by itself; from any thread.  The next turn is the last. */
    void (*dismiss)(void);
};

#define TURN_ON_CALL (-1)
#define TURN_OVER (-2)

#endif
