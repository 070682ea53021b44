/* The native engine: its functions in the table. */

#include "native.h"

#include <poll.h>

#include "listener.h"
#include "loop.h"
#include "session.h"

/* Of libmilter, whose functions and protocol these are. */
static int
version(unsigned int *major, unsigned int *minor, unsigned int *patch)
{
    *major = SM_LM_VRS_MAJOR(SMFI_VERSION);
    *minor = SM_LM_VRS_MINOR(SMFI_VERSION);
    *patch = SM_LM_VRS_PLVL(SMFI_VERSION);
    return MI_SUCCESS;
}

static int
setdbg(int level)
{
    (void)level;
    return MI_SUCCESS;
}

static int
prepare_share(void)
{
    listener_share();
    return 0;
}

static int
wait_in_poll(struct pollfd *wait, nfds_t count, int timeout)
{
    return poll(wait, count, timeout);
}

/* A session knows what was agreed. */
static void
keep_agreement(SMFICTX *context, unsigned long actions, unsigned long protocol)
{
    (void)context;
    (void)actions;
    (void)protocol;
}

const struct engine native_engine = {
    .name = "native",
    .set_up = loop_set_up,
    .version = version,
    .setconn = listener_setconn,
    .settimeout = loop_settimeout,
    .setbacklog = listener_setbacklog,
    .setdbg = setdbg,
    .setmaxdatasize = loop_setmaxdatasize,
    .open = listener_open,
    .prepare_share = prepare_share,
    .run = loop_run,
    .wait = wait_in_poll,
    .share_changed = loop_share_changed,
    .stop_accepting = loop_stop_accepting,
    .end = loop_end,
    .finish = loop_finish,
    .forget = loop_forget,
    .setpriv = session_setpriv,
    .getpriv = session_getpriv,
    .getsymval = session_getsymval,
    .setreply = session_setreply,
    .setmlreply = session_setmlreply,
    .setsymlist = session_setsymlist,
    .recall_agreement = session_recall_agreement,
    .keep_agreement = keep_agreement,
    .progress = session_progress,
    .addheader = session_addheader,
    .insheader = session_insheader,
    .chgheader = session_chgheader,
    .chgfrom = session_chgfrom,
    .addrcpt = session_addrcpt,
    .addrcpt_par = session_addrcpt_par,
    .delrcpt = session_delrcpt,
    .replacebody = session_replacebody,
    .quarantine = session_quarantine,
    .suspend = loop_suspend,
    .resume = loop_resume,
    .attend = loop_attend,
    .take_turn = loop_take_turn,
    .dismiss = loop_dismiss,
};
