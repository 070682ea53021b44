/* A session of the milter protocol, from the filter's side: what an MTA may say when, what the
 * filter is asked then, and what is answered.  Packets in, packets out, no I/O and no threads:
 * whoever drives it brings the packets one after the other, and sends what stands in the outbox. */

#ifndef PYMILTER_ENGINE_NATIVE_SESSION_H
#define PYMILTER_ENGINE_NATIVE_SESSION_H

#include <stdbool.h>
#include <stddef.h>

#include <libmilter/mfapi.h>
#include <libmilter/mfdef.h>

#include "packet.h"

#define MACRO_STAGES (SMFIM_LAST + 1)

/* Where a session stands; in the order in which an MTA goes through them. */
enum session_state {
    STATE_BEGIN,      /* nothing was said */
    STATE_NEGOTIATED, /* (SMFIC_QUIT_NC leads here again) */
    STATE_CONNECT,
    STATE_HELO, /* also between messages */
    STATE_MAIL,
    STATE_RCPT,
    STATE_DATA,
    STATE_HEADER,
    STATE_EOH,
    STATE_BODY,
    STATE_EOM,
    STATE_ENDED, /* closed, or to be closed */
    SESSION_STATES
};

enum session_result {
    SESSION_GOES_ON,   /* bring the next packet */
    SESSION_SUSPENDED, /* a callback will answer later: session_complete() */
    SESSION_ENDS       /* the connection is to be closed, once the outbox is sent: session_end() */
};

/* What a session asks of whoever drives it. */
struct session_driver {
    /* Something was put into the outbox, in a callback; `urgent`: it should be on its way when this
     * returns.  MI_FAILURE: the connection is broken. */
    int (*written)(SMFICTX *session, bool urgent);

    /* A line for the log. */
    void (*log)(const char *level, const char *text);
};

typedef sfsistat (*session_completion)(SMFICTX *session, void *data);

/* What it may return where nobody waits for an answer: the session ends, and its message with it.
 */
#define SESSION_CUT_OFF (-2)

struct macros {
    size_t size;
    char bytes[]; /* names and values in turn, each with its NUL */
};

/* The session, which is the context that callbacks get.  What is not named here is session.c's. */
struct smfi_str {
    const struct smfiDesc *filter;
    const struct session_driver *driver;
    struct outbox outbox;
    void *priv;      /* setpriv() */
    size_t max_data; /* in a packet that comes */
    bool broken;     /* what is written goes nowhere */

    enum session_state state;
    char command;     /* that is being answered, or ends the session */
    bool eom_follows; /* the body in SMFIC_BODYEOB is being answered, the end comes next */
    bool in_callback;
    bool suspended; /* the callback that runs, or has returned, answers later */
    bool ending;    /* xxfi_abort or xxfi_close are being called */
    bool to_abort;  /* then: xxfi_abort is to be called */
    bool to_close;  /* then: xxfi_close is to be called */
    bool closed;    /* xxfi_close was called, or need not be */
    bool held;      /* the abort that this packet implies is suspended: it comes after it */
    struct packet packet;
    bool session_before; /* SMFIC_QUIT_NC has ended one on this connection */
    bool was_negotiated;
    unsigned long actions;   /* SMFIF_*, agreed */
    unsigned long steps;     /* SMFIP_*, as the filter wants them */
    unsigned long mta_steps; /* SMFIP_*, that the MTA can do */
    char *reply;             /* setreply(), or NULL */
    char **lists;            /* setsymlist(), by stage, while xxfi_negotiate runs; else NULL */
    struct macros *macros[MACRO_STAGES];
};

void session_begin(SMFICTX *session, const struct smfiDesc *filter,
                   const struct session_driver *driver, size_t max_data);

/* The next packet.  Its data stays as it is until the answer is there. */
enum session_result session_take(SMFICTX *session, const struct packet *packet);

/* Whether taking this packet calls a callback; which one, for who keeps an eye on slow ones. */
bool session_calls(const SMFICTX *session, const struct packet *packet);

/* The callback that was suspended has an answer, which `complete` gives. */
enum session_result session_complete(SMFICTX *session, session_completion complete, void *data);

/* The connection is over: xxfi_abort where a message was in progress, and xxfi_close.  Not while a
 * callback is suspended.  SESSION_SUSPENDED where one of the two is: session_complete(), which
 * gives SESSION_ENDS at the end. */
enum session_result session_end(SMFICTX *session);

/* Whether session_end() calls a callback. */
bool session_has_to_close(const SMFICTX *session);

void session_free(SMFICTX *session);

/* A message is in progress. */
bool session_in_message(const SMFICTX *session);

/* And its MTA waits for no answer to the last step: it may have sent the next one. */
bool session_goes_unanswered(const SMFICTX *session);

/* --- what libmilter's functions of the same name do, with their results */
int session_setpriv(SMFICTX *session, void *priv);
void *session_getpriv(SMFICTX *session);
char *session_getsymval(SMFICTX *session, char *name);
int session_setreply(SMFICTX *session, char *code, char *enhanced, char *text);
int session_setmlreply(SMFICTX *session, char *code, char *enhanced, char **lines);
int session_setsymlist(SMFICTX *session, int stage, char *macros);
bool session_recall_agreement(SMFICTX *session, unsigned long *actions, unsigned long *protocol);
int session_progress(SMFICTX *session);
int session_addheader(SMFICTX *session, char *name, char *value);
int session_insheader(SMFICTX *session, int index, char *name, char *value);
int session_chgheader(SMFICTX *session, char *name, int index, char *value);
int session_chgfrom(SMFICTX *session, char *sender, char *parameters);
int session_addrcpt(SMFICTX *session, char *recipient);
int session_addrcpt_par(SMFICTX *session, char *recipient, char *parameters);
int session_delrcpt(SMFICTX *session, char *recipient);
int session_replacebody(SMFICTX *session, unsigned char *body, int size);
int session_quarantine(SMFICTX *session, char *reason);

/* In a callback: its answer comes later.  False: it cannot, or is suspended already. */
bool session_suspend(SMFICTX *session);

#endif
