/* A session of the milter protocol, from the filter's side. */

#include "session.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "addresses.h"

#define LEAST_VERSION 2
#define NEGOTIATION_SIZE 12 /* bytes: version, actions, steps */
#define MAX_REPLY_TEXT 980
#define MAX_REPLY_LINES 32

/* An answer that is none of the filter's: the connection ends. */
#define FAIL ((sfsistat)(-1))

/* The steps of which the MTA need not wait for an answer; the filter may ask for that also where it
 * does wait: then it gets one all the same. */
#define CAN_BE_FAKED                                                                               \
    (SMFIP_NR_CONN | SMFIP_NR_HELO | SMFIP_NR_MAIL | SMFIP_NR_RCPT | SMFIP_NR_DATA |               \
     SMFIP_NR_UNKN | SMFIP_NR_HDR | SMFIP_NR_EOH | SMFIP_NR_BODY)

/* --------------------------------------------------------------------- order
 *
 * What may follow on what; and what need not be sent, so that what follows on it may come instead.
 */

#define TO(state) (1u << (state))

static const struct {
    unsigned next;
    unsigned long left_out; /* by this step */
} order[SESSION_STATES] = {
    [STATE_BEGIN] = {TO(STATE_NEGOTIATED), 0},
    [STATE_NEGOTIATED] = {TO(STATE_CONNECT), 0},
    [STATE_CONNECT] = {TO(STATE_HELO) | TO(STATE_MAIL), SMFIP_NOCONNECT},
    [STATE_HELO] = {TO(STATE_HELO) | TO(STATE_MAIL), SMFIP_NOHELO},
    [STATE_MAIL] = {TO(STATE_RCPT), SMFIP_NOMAIL},
    [STATE_RCPT] = {TO(STATE_RCPT) | TO(STATE_DATA) | TO(STATE_HEADER) | TO(STATE_EOH) |
                        TO(STATE_BODY) | TO(STATE_EOM),
                    SMFIP_NORCPT},
    [STATE_DATA] = {TO(STATE_HEADER) | TO(STATE_EOH), SMFIP_NODATA},
    [STATE_HEADER] = {TO(STATE_HEADER) | TO(STATE_EOH), SMFIP_NOHDRS},
    [STATE_EOH] = {TO(STATE_BODY) | TO(STATE_EOM), SMFIP_NOEOH},
    [STATE_BODY] = {TO(STATE_BODY) | TO(STATE_EOM), SMFIP_NOBODY},
    [STATE_EOM] = {TO(STATE_HELO) | TO(STATE_MAIL), 0},
    [STATE_ENDED] = {0, 0},
};

static bool
can_follow(const SMFICTX *session, enum session_state from, enum session_state to)
{
    for (unsigned state = from; state < STATE_ENDED; state++) {
        if (state != (unsigned)from && !(session->steps & order[state].left_out)) {
            return false;
        }
        if (order[state].next & TO(to)) {
            return true;
        }
    }
    return false;
}

bool
session_in_message(const SMFICTX *session)
{
    return session->state >= STATE_MAIL && session->state < STATE_EOM;
}

/* ---------------------------------------------------------------------- log */

static void
complain(const SMFICTX *session, const char *format, ...)
{
    char text[256];
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    session->driver->log("error", text);
}

/* What cannot be read as the command that it is. */
static sfsistat
reject_packet(SMFICTX *session, const struct packet *packet)
{
    complain(session, "a packet that no MTA sends: command 0x%02x with %zu bytes",
             (unsigned char)packet->command, packet->size);
    return FAIL;
}

/* ------------------------------------------------------------------- macros */

static void
forget_macros(SMFICTX *session, int first)
{
    for (int i = first; i < MACRO_STAGES; i++) {
        free(session->macros[i]);
        session->macros[i] = NULL;
    }
}

/* Where the macros of a step are kept: those of later steps hide those of earlier ones, which is
 * the order of SMFIM_… but for the last two. */
enum { EOH_PLACE = 5, EOM_PLACE = 6 };

static int
macro_stage(char command)
{
    switch (command) {
    case SMFIC_CONNECT:
        return SMFIM_CONNECT;
    case SMFIC_HELO:
        return SMFIM_HELO;
    case SMFIC_MAIL:
        return SMFIM_ENVFROM;
    case SMFIC_RCPT:
        return SMFIM_ENVRCPT;
    case SMFIC_DATA:
        return SMFIM_DATA;
    case SMFIC_EOH:
        return EOH_PLACE;
    case SMFIC_BODYEOB:
        return EOM_PLACE;
    default:
        return -1; /* of no stage for which a filter can ask */
    }
}

/* How many bytes stand before what comes after the last NUL. */
static size_t
whole_strings(const char *bytes, size_t size)
{
    while (size > 0 && bytes[size - 1] != '\0') {
        size--;
    }
    return size;
}

static sfsistat
take_macros(SMFICTX *session, const struct packet *packet)
{
    int stage;
    size_t size;
    struct macros *macros;

    if (packet->size == 0) {
        return reject_packet(session, packet);
    }
    stage = macro_stage(packet->data[0]);
    if (stage < 0) {
        return SMFIS_NOREPLY;
    }
    size = whole_strings(packet->data + 1, packet->size - 1);
    if (size == 0) {
        return SMFIS_NOREPLY;
    }
    macros = malloc(sizeof *macros + size);
    if (macros == NULL) {
        return FAIL; /* better than a filter that misses what it needs to know */
    }
    macros->size = size;
    memcpy(macros->bytes, packet->data + 1, size);
    free(session->macros[stage]);
    session->macros[stage] = macros;
    return SMFIS_NOREPLY;
}

/* Whether a macro goes under this name: {x} is x. */
static bool
is_macro(const char *name, size_t size, const char *wanted, size_t wanted_size)
{
    if (size == wanted_size) {
        return memcmp(name, wanted, size) == 0;
    }
    if (size == 1 && wanted_size == 3) {
        return wanted[0] == '{' && wanted[1] == name[0] && wanted[2] == '}';
    }
    return size == 3 && wanted_size == 1 && name[0] == '{' && name[1] == wanted[0] &&
           name[2] == '}';
}

char *
session_getsymval(SMFICTX *session, char *name)
{
    size_t size = name != NULL ? strlen(name) : 0;

    if (size == 0) {
        return NULL;
    }
    for (int i = MACRO_STAGES - 1; i >= 0; i--) {
        struct macros *macros = session->macros[i];
        char *at = macros != NULL ? macros->bytes : NULL;
        char *end = macros != NULL ? at + macros->size : NULL;

        while (at < end) {
            size_t name_size = strlen(at);
            char *value = at + name_size + 1;

            if (value >= end) {
                break; /* a name without a value */
            }
            if (is_macro(at, name_size, name, size)) {
                return value;
            }
            at = value + strlen(value) + 1;
        }
    }
    return NULL;
}

/* -------------------------------------------------------------- negotiation */

/* The steps for which the filter has no callback. */
static unsigned long
unwanted_steps(const struct smfiDesc *filter)
{
    return (filter->xxfi_connect ? 0 : SMFIP_NOCONNECT) | (filter->xxfi_helo ? 0 : SMFIP_NOHELO) |
           (filter->xxfi_envfrom ? 0 : SMFIP_NOMAIL) | (filter->xxfi_envrcpt ? 0 : SMFIP_NORCPT) |
           (filter->xxfi_header ? 0 : SMFIP_NOHDRS) | (filter->xxfi_eoh ? 0 : SMFIP_NOEOH) |
           (filter->xxfi_body ? 0 : SMFIP_NOBODY) | (filter->xxfi_data ? 0 : SMFIP_NODATA) |
           (filter->xxfi_unknown ? 0 : SMFIP_NOUNKNOWN);
}

/* The filter's own wishes. */
static bool
ask_filter(SMFICTX *session, unsigned long actions, unsigned long *wanted)
{
    unsigned long steps = session->steps | (session->mta_steps & SMFIP_SKIP);
    unsigned long asked = actions, none2 = 0, none3 = 0;
    sfsistat result;

    session->actions = session->filter->xxfi_flags;
    *wanted = session->steps;
    if (session->filter->xxfi_negotiate == NULL) {
        return true;
    }
    result = session->filter->xxfi_negotiate(session, actions, session->mta_steps | CAN_BE_FAKED, 0,
                                             0, &asked, &steps, &none2, &none3);
    if (result == SMFIS_ALL_OPTS) {
        session->actions = actions;
        *wanted |= session->mta_steps & SMFIP_SKIP;
        return true;
    }
    if (result != SMFIS_CONTINUE) {
        complain(session,
                 "the filter refused what the MTA offered: result %d, actions 0x%lx, steps 0x%lx",
                 (int)result, actions, session->mta_steps);
        return false;
    }
    session->actions = asked;
    session->steps = *wanted = steps;
    return true;
}

static bool
answer_negotiation(SMFICTX *session, uint32_t version, unsigned long steps)
{
    char head[NEGOTIATION_SIZE];
    char stages[MACRO_STAGES][4];
    struct piece pieces[1 + 2 * MACRO_STAGES];
    size_t count = 0;

    number_to(head, version);
    number_to(head + 4, (uint32_t)session->actions);
    number_to(head + 8, (uint32_t)steps);
    pieces[count++] = (struct piece){head, sizeof head};
    for (int i = 0; i < MACRO_STAGES; i++) {
        if (session->lists[i] != NULL) {
            number_to(stages[i], (uint32_t)i);
            pieces[count++] = (struct piece){stages[i], sizeof stages[i]};
            pieces[count++] = (struct piece){session->lists[i], strlen(session->lists[i]) + 1};
        }
    }
    return outbox_add(&session->outbox, SMFIC_OPTNEG, pieces, count);
}

static sfsistat
agree(SMFICTX *session, const struct packet *packet)
{
    uint32_t version;
    unsigned long actions, steps, wanted;

    if (packet->size < NEGOTIATION_SIZE) {
        complain(session, "an offer of %zu bytes, which has 12 at least", packet->size);
        return FAIL;
    }
    version = number_from(packet->data);
    if ((int32_t)version < LEAST_VERSION) {
        complain(session, "the MTA speaks version %ld of the protocol, and 2 is the least",
                 (long)(int32_t)version);
        return FAIL;
    }
    actions = number_from(packet->data + 4);
    steps = number_from(packet->data + 8);
    actions = actions ? actions : SMFI_V1_ACTS;
    session->mta_steps = (steps ? steps : SMFI_V1_PROT) & ~SMFI_INTERNAL;
    session->steps = unwanted_steps(session->filter);
    if (!ask_filter(session, actions, &wanted)) {
        return FAIL;
    }
    if (session->actions & ~actions) {
        complain(session, "the MTA offers actions 0x%lx, and the filter asks for 0x%lx", actions,
                 session->actions);
        return FAIL;
    }
    /* What the MTA does not know need not be asked of it, where it can do without. */
    wanted &= session->mta_steps | ~(CAN_BE_FAKED | SMFIP_NODATA | SMFIP_NOUNKNOWN);
    if (wanted & ~session->mta_steps) {
        complain(session, "the MTA offers steps 0x%lx, and the filter asks for 0x%lx",
                 session->mta_steps, wanted);
        return FAIL;
    }
    session->was_negotiated = true;
    if (version > SMFI_PROT_VERSION) {
        version = SMFI_PROT_VERSION;
    }
    return answer_negotiation(session, version, wanted & ~SMFI_INTERNAL) ? SMFIS_NOREPLY : FAIL;
}

static sfsistat
negotiate(SMFICTX *session, const struct packet *packet)
{
    char *lists[MACRO_STAGES] = {NULL};
    sfsistat result;

    forget_macros(session, 0);
    session->lists = lists;
    result = agree(session, packet);
    session->lists = NULL;
    for (int i = 0; i < MACRO_STAGES; i++) {
        free(lists[i]);
    }
    return result;
}

/* -------------------------------------------------------------- callbacks
 *
 * Each takes the data of its packet apart and asks the filter; FAIL for what no MTA sends. */

static sfsistat
on_connect(SMFICTX *session, const struct packet *packet)
{
    union client_address address;
    struct sockaddr *given = NULL;

    forget_macros(session, SMFIM_CONNECT + 1);
    if (session->filter->xxfi_connect == NULL) {
        return SMFIS_CONTINUE;
    }
    switch (parse_client(packet->data, packet->size, &address)) {
    case CLIENT_BAD:
        return reject_packet(session, packet);
    case CLIENT_UNKNOWN:
        break;
    case CLIENT_KNOWN:
        given = &address.any;
    }
    return session->filter->xxfi_connect(session, packet->data, given);
}

static bool
is_string(const struct packet *packet)
{
    return packet->size > 0 && packet->data[packet->size - 1] == '\0';
}

static sfsistat
on_helo(SMFICTX *session, const struct packet *packet)
{
    forget_macros(session, SMFIM_HELO + 1);
    if (session->filter->xxfi_helo == NULL) {
        return SMFIS_CONTINUE;
    }
    return is_string(packet) ? session->filter->xxfi_helo(session, packet->data)
                             : reject_packet(session, packet);
}

/* Call with a list of the strings in the packet, which NULL ends. */
static sfsistat
with_strings(SMFICTX *session, const struct packet *packet, sfsistat (*call)(SMFICTX *, char **))
{
    char *few[16], **strings = few;
    size_t size = whole_strings(packet->data, packet->size);
    size_t count = 0;
    sfsistat result;

    for (size_t i = 0; i < size; i++) {
        count += packet->data[i] == '\0';
    }
    if (count == 0) {
        return reject_packet(session, packet);
    }
    if (count >= sizeof few / sizeof few[0]) {
        strings = malloc((count + 1) * sizeof *strings);
        if (strings == NULL) {
            return FAIL;
        }
    }
    strings[0] = packet->data;
    for (size_t i = 0, n = 1; n < count; i++) {
        if (packet->data[i] == '\0') {
            strings[n++] = packet->data + i + 1;
        }
    }
    strings[count] = NULL;
    result = call(session, strings);
    if (strings != few) {
        free(strings);
    }
    return result;
}

static sfsistat
on_mail(SMFICTX *session, const struct packet *packet)
{
    forget_macros(session, SMFIM_ENVFROM + 1);
    if (session->filter->xxfi_envfrom == NULL) {
        return SMFIS_CONTINUE;
    }
    return with_strings(session, packet, session->filter->xxfi_envfrom);
}

static sfsistat
on_rcpt(SMFICTX *session, const struct packet *packet)
{
    forget_macros(session, SMFIM_ENVRCPT + 1);
    if (session->filter->xxfi_envrcpt == NULL) {
        return SMFIS_CONTINUE;
    }
    return with_strings(session, packet, session->filter->xxfi_envrcpt);
}

static sfsistat
on_data(SMFICTX *session, const struct packet *packet)
{
    (void)packet;
    return session->filter->xxfi_data ? session->filter->xxfi_data(session) : SMFIS_CONTINUE;
}

static sfsistat
on_header(SMFICTX *session, const struct packet *packet)
{
    size_t name_size;

    if (session->filter->xxfi_header == NULL) {
        return SMFIS_CONTINUE;
    }
    if (!is_string(packet)) {
        return reject_packet(session, packet);
    }
    name_size = strlen(packet->data) + 1;
    if (name_size == 1 || name_size >= packet->size) {
        return reject_packet(session, packet);
    }
    return session->filter->xxfi_header(session, packet->data, packet->data + name_size);
}

static sfsistat
on_eoh(SMFICTX *session, const struct packet *packet)
{
    (void)packet;
    return session->filter->xxfi_eoh ? session->filter->xxfi_eoh(session) : SMFIS_CONTINUE;
}

static sfsistat
on_body(SMFICTX *session, const struct packet *packet)
{
    if (packet->size == 0) {
        return reject_packet(session, packet);
    }
    if (session->filter->xxfi_body == NULL) {
        return SMFIS_CONTINUE;
    }
    return session->filter->xxfi_body(session, (unsigned char *)packet->data, packet->size);
}

static sfsistat
on_end_of_message(SMFICTX *session)
{
    return session->filter->xxfi_eom ? session->filter->xxfi_eom(session) : SMFIS_CONTINUE;
}

static sfsistat
on_eom(SMFICTX *session, const struct packet *packet)
{
    if (packet->size > 0 && session->filter->xxfi_body != NULL) {
        session->eom_follows = true;
        return on_body(session, packet);
    }
    return on_end_of_message(session);
}

static sfsistat
on_unknown(SMFICTX *session, const struct packet *packet)
{
    if (session->filter->xxfi_unknown == NULL) {
        return SMFIS_CONTINUE;
    }
    return is_string(packet) ? session->filter->xxfi_unknown(session, packet->data)
                             : reject_packet(session, packet);
}

static void
abort_message(SMFICTX *session)
{
    session->state = STATE_HELO;
    if (session->filter->xxfi_abort != NULL) {
        session->filter->xxfi_abort(session);
    }
}

static void
close_session(SMFICTX *session)
{
    if (!session->closed) {
        session->closed = true;
        if (session->filter->xxfi_close != NULL && session->priv != NULL) {
            session->filter->xxfi_close(session);
        }
    }
}

/* ------------------------------------------------------------------ commands */

static const struct command {
    sfsistat (*call)(SMFICTX *session, const struct packet *packet);
    enum session_state state; /* into which it leads */
    unsigned long no_reply;   /* with this step the MTA does not wait */
    bool refuses_one;         /* what refuses it does not end the message */
} commands[256] = {
    [SMFIC_OPTNEG] = {negotiate, STATE_NEGOTIATED, 0, false},
    [SMFIC_CONNECT] = {on_connect, STATE_CONNECT, SMFIP_NR_CONN, false},
    [SMFIC_HELO] = {on_helo, STATE_HELO, SMFIP_NR_HELO, false},
    [SMFIC_MAIL] = {on_mail, STATE_MAIL, SMFIP_NR_MAIL, false},
    [SMFIC_RCPT] = {on_rcpt, STATE_RCPT, SMFIP_NR_RCPT, true},
    [SMFIC_DATA] = {on_data, STATE_DATA, SMFIP_NR_DATA, false},
    [SMFIC_HEADER] = {on_header, STATE_HEADER, SMFIP_NR_HDR, false},
    [SMFIC_EOH] = {on_eoh, STATE_EOH, SMFIP_NR_EOH, false},
    [SMFIC_BODY] = {on_body, STATE_BODY, SMFIP_NR_BODY, false},
    [SMFIC_BODYEOB] = {on_eom, STATE_EOM, 0, false},
    [SMFIC_UNKNOWN] = {on_unknown, SESSION_STATES, SMFIP_NR_UNKN, true},
};

static const struct command *
command_of(char command)
{
    return &commands[(unsigned char)command];
}

bool
session_goes_unanswered(const SMFICTX *session)
{
    return session_in_message(session) &&
           (command_of(session->command)->no_reply & session->steps & session->mta_steps) != 0;
}

/* -------------------------------------------------------------------- answers */

static bool
add_answer(SMFICTX *session, char answer)
{
    return outbox_add(&session->outbox, answer, NULL, 0);
}

static bool
add_refusal(SMFICTX *session, sfsistat verdict)
{
    char *reply = session->reply;
    bool added;

    if (reply == NULL || reply[0] != (verdict == SMFIS_REJECT ? '5' : '4')) {
        return add_answer(session, verdict == SMFIS_REJECT ? SMFIR_REJECT : SMFIR_TEMPFAIL);
    }
    added =
        outbox_add(&session->outbox, SMFIR_REPLYCODE, &(struct piece){reply, strlen(reply) + 1}, 1);
    free(reply);
    session->reply = NULL;
    return added;
}

static bool
add_verdict(SMFICTX *session, sfsistat verdict)
{
    unsigned long no_reply = command_of(session->command)->no_reply & session->steps;

    if (no_reply != 0 &&
        ((verdict >= SMFIS_CONTINUE && verdict < SMFIS_NOREPLY) || verdict == SMFIS_SKIP)) {
        complain(session, "an answer (%d) where the filter had said that it gives none",
                 (int)verdict);
        verdict = SMFIS_NOREPLY;
    }
    switch (verdict) {
    case SMFIS_CONTINUE:
        return add_answer(session, SMFIR_CONTINUE);
    case SMFIS_REJECT:
    case SMFIS_TEMPFAIL:
        return add_refusal(session, verdict);
    case SMFIS_DISCARD:
        return add_answer(session, SMFIR_DISCARD);
    case SMFIS_ACCEPT:
        return add_answer(session, SMFIR_ACCEPT);
    case SMFIS_SKIP:
        return add_answer(session, SMFIR_SKIP);
    case SMFIS_NOREPLY:
        /* The filter gives no answer, and the MTA waits for one. */
        if (no_reply != 0 && !(session->mta_steps & no_reply)) {
            return add_answer(session, SMFIR_CONTINUE);
        }
        return true;
    default:
        return true;
    }
}

/* What follows for the session from an answer. */
static void
go_on_after(SMFICTX *session, sfsistat verdict)
{
    if (verdict == SMFIS_ACCEPT ||
        ((verdict == SMFIS_REJECT || verdict == SMFIS_DISCARD || verdict == SMFIS_TEMPFAIL) &&
         !command_of(session->command)->refuses_one)) {
        session->state = STATE_HELO;
    }
}

static enum session_result
fail(SMFICTX *session)
{
    session->eom_follows = false;
    return SESSION_ENDS;
}

/* A callback has returned; perhaps the next one is to be called, or it will answer later. */
static enum session_result
settle(SMFICTX *session, sfsistat verdict)
{
    while (!session->suspended && session->eom_follows) {
        session->eom_follows = false;
        if (verdict == SMFIS_CONTINUE || verdict == SMFIS_NOREPLY || verdict == SMFIS_SKIP) {
            verdict = on_end_of_message(session);
        }
    }
    session->in_callback = false;
    if (session->suspended) {
        return SESSION_SUSPENDED;
    }
    if (verdict == FAIL || !add_verdict(session, verdict)) {
        return fail(session);
    }
    go_on_after(session, verdict);
    return SESSION_GOES_ON;
}

/* Call what is left of xxfi_abort and xxfi_close; either may be suspended. */
static enum session_result
go_on_ending(SMFICTX *session)
{
    session->in_callback = true;
    if (session->to_abort) {
        session->to_abort = false;
        abort_message(session);
    }
    if (session->to_close && !session->suspended) {
        session->to_close = false;
        close_session(session);
    }
    session->in_callback = false;
    if (session->suspended) {
        return SESSION_SUSPENDED;
    }
    session->ending = false;
    if (session->command == SMFIC_QUIT) {
        forget_macros(session, 0);
        session->state = STATE_ENDED;
        return SESSION_ENDS;
    }
    if (session->command == SMFIC_QUIT_NC) {
        forget_macros(session, 0);
        session->closed = false;
        session->session_before = true;
        session->state = STATE_NEGOTIATED;
    }
    return SESSION_GOES_ON;
}

/* The three commands without an answer. */
static enum session_result
take_end(SMFICTX *session, char command)
{
    bool reachable = session_in_message(session) || can_follow(session, STATE_HELO, STATE_EOM);

    session->command = command;
    session->ending = true;
    session->to_abort = reachable && (command == SMFIC_ABORT || session_in_message(session));
    session->to_close = command != SMFIC_ABORT;
    return go_on_ending(session);
}

enum session_result
session_take(SMFICTX *session, const struct packet *packet)
{
    const struct command *command = command_of(packet->command);

    switch (packet->command) {
    case SMFIC_MACRO:
        return take_macros(session, packet) == FAIL ? fail(session) : SESSION_GOES_ON;
    case SMFIC_ABORT:
    case SMFIC_QUIT:
    case SMFIC_QUIT_NC:
        return take_end(session, packet->command);
    }
    if (command->call == NULL) {
        complain(session, "a command that no MTA sends: 0x%02x", (unsigned char)packet->command);
        return fail(session);
    }
    session->in_callback = true;
    session->command = packet->command;
    if (command->state == SESSION_STATES) { /* goes everywhere once there is a connection */
        if (session->state < STATE_NEGOTIATED) {
            return fail(session);
        }
        return settle(session, command->call(session, packet));
    }
    if (!can_follow(session, session->state, command->state)) {
        if (session_in_message(session)) {
            abort_message(session);
            if (session->suspended) {
                session->in_callback = false;
                session->held = true;
                session->packet = *packet; /* the inbox reads nothing before it is played */
                return SESSION_SUSPENDED;
            }
        }
        if (session->state == STATE_BEGIN || !can_follow(session, STATE_HELO, command->state)) {
            session->in_callback = false;
            complain(session, "a command out of order: %c", packet->command);
            return fail(session);
        }
    }
    session->state = command->state;
    return settle(session, command->call(session, packet));
}

bool
session_calls(const SMFICTX *session, const struct packet *packet)
{
    (void)session;
    return packet->command != SMFIC_MACRO;
}

enum session_result
session_complete(SMFICTX *session, session_completion complete, void *data)
{
    sfsistat verdict;

    session->suspended = false;
    session->in_callback = true;
    if (session->ending) {
        complete(session, data);
        return go_on_ending(session);
    }
    verdict = complete(session, data);
    if (session->held && !session->suspended) {
        session->in_callback = session->held = false;
        return session_take(session, &session->packet);
    }
    if (session->held) {
        session->in_callback = false;
        return SESSION_SUSPENDED;
    }
    if (verdict == SESSION_CUT_OFF && !session->suspended) {
        session->in_callback = false;
        session->state = session->state == STATE_EOM ? STATE_BODY : session->state;
        return fail(session);
    }
    return settle(session, verdict);
}

bool
session_suspend(SMFICTX *session)
{
    if (!session->in_callback || session->suspended) {
        return false;
    }
    session->suspended = true;
    return true;
}

/* --------------------------------------------------------------------- life */

void
session_begin(SMFICTX *session, const struct smfiDesc *filter, const struct session_driver *driver,
              size_t max_data)
{
    *session = (SMFICTX){.filter = filter, .driver = driver, .max_data = max_data};
    session->actions = filter->xxfi_flags;
    session->steps = unwanted_steps(filter);
}

bool
session_has_to_close(const SMFICTX *session)
{
    return session->priv != NULL && !session->closed;
}

enum session_result
session_end(SMFICTX *session)
{
    session->command = SMFIC_QUIT;
    session->ending = true;
    session->to_abort = session_in_message(session) && session->priv != NULL;
    session->to_close = true;
    return go_on_ending(session);
}

void
session_free(SMFICTX *session)
{
    forget_macros(session, 0);
    free(session->reply);
    outbox_free(&session->outbox);
}

/* --------------------------------------------- what the filter may do: state */

int
session_setpriv(SMFICTX *session, void *priv)
{
    session->priv = priv;
    return MI_SUCCESS;
}

void *
session_getpriv(SMFICTX *session)
{
    return session->priv;
}

int
session_setsymlist(SMFICTX *session, int stage, char *macros)
{
    if (macros == NULL || stage < SMFIM_FIRST || stage > SMFIM_LAST || session->lists == NULL ||
        session->lists[stage] != NULL) {
        return MI_FAILURE;
    }
    session->lists[stage] = strdup(macros);
    return session->lists[stage] != NULL ? MI_SUCCESS : MI_FAILURE;
}

bool
session_recall_agreement(SMFICTX *session, unsigned long *actions, unsigned long *protocol)
{
    if (!session->session_before || !session->was_negotiated) {
        return false;
    }
    *actions = session->actions;
    *protocol = session->steps;
    return true;
}

/* ------------------------------------------------- what the filter may do: replies */

static bool
is_code(const char *code)
{
    return code != NULL && (code[0] == '4' || code[0] == '5') && isdigit((unsigned char)code[1]) &&
           isdigit((unsigned char)code[2]) && code[3] == '\0';
}

/* One to three digits. */
static size_t
count_digits(const char *text)
{
    size_t count = 0;

    while (count < 3 && isdigit((unsigned char)text[count])) {
        count++;
    }
    return count;
}

/* RFC 3463 */
static bool
is_enhanced_code(const char *code)
{
    size_t subject, detail;

    if ((code[0] != '2' && code[0] != '4' && code[0] != '5') || code[1] != '.') {
        return false;
    }
    subject = count_digits(code + 2);
    if (subject == 0 || code[2 + subject] != '.') {
        return false;
    }
    detail = count_digits(code + 3 + subject);
    return detail > 0 && code[3 + subject + detail] == '\0';
}

static bool
is_reply_text(const char *text)
{
    return strlen(text) <= MAX_REPLY_TEXT && strpbrk(text, "\r\n") == NULL;
}

static int
keep_reply(SMFICTX *session, char *reply)
{
    if (reply == NULL) {
        return MI_FAILURE;
    }
    free(session->reply);
    session->reply = reply;
    return MI_SUCCESS;
}

int
session_setreply(SMFICTX *session, char *code, char *enhanced, char *text)
{
    size_t size;
    char *reply;

    if (!is_code(code) || (enhanced != NULL && !is_enhanced_code(enhanced)) ||
        (text != NULL && !is_reply_text(text))) {
        return MI_FAILURE;
    }
    size = sizeof "### " + (enhanced ? strlen(enhanced) + 1 : 0) + (text ? strlen(text) : 0);
    reply = malloc(size);
    if (reply != NULL) {
        snprintf(reply, size, "%s %s%s%s", code, enhanced ? enhanced : "",
                 enhanced != NULL && text != NULL ? " " : "", text ? text : "");
    }
    return keep_reply(session, reply);
}

int
session_setmlreply(SMFICTX *session, char *code, char *enhanced, char **lines)
{
    size_t count = 0, size = 1, at = 0;
    char *reply;

    if (!is_code(code) || (enhanced != NULL && !is_enhanced_code(enhanced))) {
        return MI_FAILURE;
    }
    if (enhanced == NULL) {
        enhanced = code[0] == '4' ? "4.0.0" : "5.0.0";
    }
    for (; lines[count] != NULL; count++) {
        if (count == MAX_REPLY_LINES || !is_reply_text(lines[count])) {
            return MI_FAILURE;
        }
        size += strlen("###-") + strlen(enhanced) + 1 + strlen(lines[count]) + 2;
    }
    if (count == 0) {
        return MI_FAILURE;
    }
    reply = malloc(size);
    for (size_t i = 0; reply != NULL && i < count; i++) {
        at += (size_t)snprintf(reply + at, size - at, "%s%s%c%s %s", i ? "\r\n" : "", code,
                               i + 1 < count ? '-' : ' ', enhanced, lines[i]);
    }
    return keep_reply(session, reply);
}

/* ------------------------------------------------- what the filter may do: messages */

static int
write_packet(SMFICTX *session, char command, const struct piece *pieces, size_t count)
{
    if (session->broken || !outbox_add(&session->outbox, command, pieces, count)) {
        return MI_FAILURE;
    }
    return session->driver->written(session, command == SMFIR_PROGRESS);
}

/* Whether the filter may do this now: it was agreed, and the end of the message has come. */
static bool
may(const SMFICTX *session, unsigned long action)
{
    return session->state == STATE_EOM && (session->actions & action) != 0;
}

static struct piece
string(const char *text)
{
    return (struct piece){text, strlen(text) + 1};
}

static int
write_header(SMFICTX *session, char command, int index, const char *name, const char *value)
{
    char number[4];
    struct piece pieces[3];
    size_t count = 0;

    if (name == NULL || *name == '\0' || value == NULL) {
        return MI_FAILURE;
    }
    if (command != SMFIR_ADDHEADER) {
        number_to(number, (uint32_t)index);
        pieces[count++] = (struct piece){number, sizeof number};
    }
    pieces[count++] = string(name);
    pieces[count++] = string(value);
    return write_packet(session, command, pieces, count);
}

/* One string that is not empty, and perhaps another. */
static int
write_strings(SMFICTX *session, unsigned long action, char command, const char *first,
              const char *second)
{
    struct piece pieces[2];

    if (first == NULL || *first == '\0' || !may(session, action)) {
        return MI_FAILURE;
    }
    pieces[0] = string(first);
    if (second != NULL) {
        pieces[1] = string(second);
    }
    return write_packet(session, command, pieces, second != NULL ? 2 : 1);
}

int
session_progress(SMFICTX *session)
{
    return write_packet(session, SMFIR_PROGRESS, NULL, 0);
}

int
session_addheader(SMFICTX *session, char *name, char *value)
{
    if (!may(session, SMFIF_ADDHDRS)) {
        return MI_FAILURE;
    }
    return write_header(session, SMFIR_ADDHEADER, 0, name, value);
}

int
session_insheader(SMFICTX *session, int index, char *name, char *value)
{
    if (!may(session, SMFIF_ADDHDRS) || index < 0) {
        return MI_FAILURE;
    }
    return write_header(session, SMFIR_INSHEADER, index, name, value);
}

int
session_chgheader(SMFICTX *session, char *name, int index, char *value)
{
    if (!may(session, SMFIF_CHGHDRS) || index < 0) {
        return MI_FAILURE;
    }
    return write_header(session, SMFIR_CHGHEADER, index, name, value != NULL ? value : "");
}

int
session_chgfrom(SMFICTX *session, char *sender, char *parameters)
{
    return write_strings(session, SMFIF_CHGFROM, SMFIR_CHGFROM, sender, parameters);
}

int
session_addrcpt(SMFICTX *session, char *recipient)
{
    return write_strings(session, SMFIF_ADDRCPT, SMFIR_ADDRCPT, recipient, NULL);
}

int
session_addrcpt_par(SMFICTX *session, char *recipient, char *parameters)
{
    return write_strings(session, SMFIF_ADDRCPT_PAR, SMFIR_ADDRCPT_PAR, recipient, parameters);
}

int
session_delrcpt(SMFICTX *session, char *recipient)
{
    return write_strings(session, SMFIF_DELRCPT, SMFIR_DELRCPT, recipient, NULL);
}

int
session_quarantine(SMFICTX *session, char *reason)
{
    return write_strings(session, SMFIF_QUARANTINE, SMFIR_QUARANTINE, reason, NULL);
}

int
session_replacebody(SMFICTX *session, unsigned char *body, int size)
{
    if (size < 0 || (body == NULL && size > 0) || !may(session, SMFIF_CHGBODY)) {
        return MI_FAILURE;
    }
    do { /* an empty body is one packet too */
        int count = size < MILTER_CHUNK_SIZE ? size : MILTER_CHUNK_SIZE;
        struct piece piece = {body, (size_t)count};

        if (write_packet(session, SMFIR_REPLBODY, &piece, 1) != MI_SUCCESS) {
            return MI_FAILURE;
        }
        body += count;
        size -= count;
    } while (size > 0);
    return MI_SUCCESS;
}
