/* libmilter as an engine: its functions in the table. */

#include "libmilter.h"

#include <pthread.h>
#include <stdint.h>

#include "callbacks.h"
#include "door.h"
#include "listener.h"
#include "loop.h"
#include "pool.h"
#include "surroundings.h"

static int
set_up(const struct smfiDesc *filter, const struct engine_hooks *surrounding)
{
    hooks = surrounding;
    return register_callbacks(filter);
}

/* ----------------------------------------------------------- what was agreed
 *
 * sendmail may end a session and begin another on the same connection (SMFIC_QUIT_NC), without a
 * new negotiation.  libmilter goes on with what was agreed, and its context has the same address,
 * under which it is kept here.  Two connections may come to share a place; then the later one
 * wins, and the other's next session merely does not know of its options: libmilter itself keeps
 * replies back where none was agreed.  What comes to an old address without having been there is a
 * new connection of an MTA that does not care what it is told. */

#define PLACES 256

static pthread_mutex_t agreements_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    const SMFICTX *context;
    unsigned long actions, protocol;
} agreements[PLACES];

static size_t
place_of(const SMFICTX *context)
{
    return ((uintptr_t)context >> 4) % PLACES;
}

static void
keep_agreement(SMFICTX *context, unsigned long actions, unsigned long protocol)
{
    size_t place = place_of(context);

    pthread_mutex_lock(&agreements_lock);
    agreements[place].context = context;
    agreements[place].actions = actions;
    agreements[place].protocol = protocol;
    pthread_mutex_unlock(&agreements_lock);
}

static bool
recall_agreement(SMFICTX *context, unsigned long *actions, unsigned long *protocol)
{
    size_t place = place_of(context);
    bool known;

    pthread_mutex_lock(&agreements_lock);
    known = agreements[place].context == context;
    if (known) {
        *actions = agreements[place].actions;
        *protocol = agreements[place].protocol;
        agreements[place].context = NULL;
    }
    pthread_mutex_unlock(&agreements_lock);
    return known;
}

/* ------------------------------------------------------------------- replies */

/* smfi_setmlreply() takes a list of variable length that ends at its first NULL; it takes 32 lines
 * at most, and refuses more by itself. */
static int
setmlreply(SMFICTX *context, char *code, char *enhanced, char **lines)
{
    char *l[33] = {NULL};

    for (int i = 0; i < 33 && lines[i] != NULL; i++) {
        l[i] = lines[i];
    }
    return smfi_setmlreply(context, code, enhanced, l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7],
                           l[8], l[9], l[10], l[11], l[12], l[13], l[14], l[15], l[16], l[17],
                           l[18], l[19], l[20], l[21], l[22], l[23], l[24], l[25], l[26], l[27],
                           l[28], l[29], l[30], l[31], l[32], (char *)NULL);
}

/* -------------------------------------------------------------- what writes */

#define PAUSED(call)                                                                               \
    do {                                                                                           \
        Pause pause = pause_callback();                                                            \
        int result = call;                                                                         \
        end_pause(pause);                                                                          \
        return result;                                                                             \
    } while (0)

static int
progress(SMFICTX *context)
{
    PAUSED(smfi_progress(context));
}

static int
addheader(SMFICTX *context, char *name, char *value)
{
    PAUSED(smfi_addheader(context, name, value));
}

static int
insheader(SMFICTX *context, int index, char *name, char *value)
{
    PAUSED(smfi_insheader(context, index, name, value));
}

static int
chgheader(SMFICTX *context, char *name, int index, char *value)
{
    PAUSED(smfi_chgheader(context, name, index, value));
}

static int
chgfrom(SMFICTX *context, char *sender, char *parameters)
{
    PAUSED(smfi_chgfrom(context, sender, parameters));
}

static int
addrcpt(SMFICTX *context, char *recipient)
{
    PAUSED(smfi_addrcpt(context, recipient));
}

static int
addrcpt_par(SMFICTX *context, char *recipient, char *parameters)
{
    PAUSED(smfi_addrcpt_par(context, recipient, parameters));
}

static int
delrcpt(SMFICTX *context, char *recipient)
{
    PAUSED(smfi_delrcpt(context, recipient));
}

static int
replacebody(SMFICTX *context, unsigned char *body, int size)
{
    PAUSED(smfi_replacebody(context, body, size));
}

static int
quarantine(SMFICTX *context, char *reason)
{
    PAUSED(smfi_quarantine(context, reason));
}

const struct engine libmilter_engine = {
    .name = "libmilter",
    .set_up = set_up,
    .version = smfi_version,
    .setconn = set_listener,
    .settimeout = smfi_settimeout,
    .setbacklog = smfi_setbacklog,
    .setdbg = smfi_setdbg,
    .setmaxdatasize = smfi_setmaxdatasize,
    .open = open_listener,
    .prepare_share = share_door,
    .run = run_loop,
    .wait = poll_and_tend_pool,
    .share_changed = look_after_door,
    .stop_accepting = stop_accepting,
    .end = end_loop,
    .finish = finish_loop,
    .forget = forget_loop,
    .setpriv = smfi_setpriv,
    .getpriv = smfi_getpriv,
    .getsymval = smfi_getsymval,
    .setreply = smfi_setreply,
    .setmlreply = setmlreply,
    .setsymlist = smfi_setsymlist,
    .recall_agreement = recall_agreement,
    .keep_agreement = keep_agreement,
    .progress = progress,
    .addheader = addheader,
    .insheader = insheader,
    .chgheader = chgheader,
    .chgfrom = chgfrom,
    .addrcpt = addrcpt,
    .addrcpt_par = addrcpt_par,
    .delrcpt = delrcpt,
    .replacebody = replacebody,
    .quarantine = quarantine,
    .suspend = suspend_callback,
    .resume = resume_callback,
};
