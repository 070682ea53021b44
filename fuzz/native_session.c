/* libFuzzer on src/engine/native/session.c: whatever the packets are, the filter is called in
 * order, with strings that end, and what is answered are packets.
 *
 * The first two bytes say which callbacks the filter has, and how often memory is short; the rest
 * is what the MTA sends.  What a callback does depends on the bytes that it gets: it may be
 * suspended, any number of times, and while it is, it does what a callback may do.
 */

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/native/session.h"

static unsigned choice;   /* mixed from all that was seen */
static bool known;        /* the filter has a context, and is to be told when the session is over */
static bool over;         /* the connection: nothing is called any more */
static bool waiting;      /* a callback is suspended: no other one is called */
static bool ending;       /* that callback is xxfi_abort or xxfi_close: it gives no answer */
static bool closing;      /* it is xxfi_close: then the session is forgotten */
static unsigned patience; /* so often may callbacks still be suspended */
static int depth;
static char *const lines[] = {"one", "two 100%% of it", NULL};

static unsigned shortage; /* each allocation of so many fails; 0: none does */
static unsigned allocations;

/* By the linker's --wrap. */
void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
char *__real_strdup(const char *text);
char *__wrap_strdup(const char *text);

static bool
memory_is_short(void)
{
    return shortage != 0 && ++allocations % shortage == 0;
}

void *
__wrap_malloc(size_t size)
{
    return memory_is_short() ? NULL : __real_malloc(size);
}

char *
__wrap_strdup(const char *text)
{
    return memory_is_short() ? NULL : __real_strdup(text);
}

static void
see(const char *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        choice = (choice ^ (unsigned char)bytes[i]) * 16777619u;
    }
}

static void
see_string(const char *text)
{
    see(text, strlen(text));
}

static void
act(SMFICTX *ctx)
{
    static char name[] = "X-Name", value[] = "a\n b", address[] = "<a@b>", code[] = "550";
    static char xcode[] = "5.7.1", text[] = "no", macro[] = "{i}", empty[] = "";
    static unsigned char body[70000];

    switch (choice >> 8 & 15) {
    case 0:
        session_addheader(ctx, name, value);
        break;
    case 1:
        session_insheader(ctx, (int)(choice >> 12), name, value);
        break;
    case 2:
        session_chgheader(ctx, name, (int)(choice >> 12), choice & 1 ? NULL : empty);
        break;
    case 3:
        session_chgfrom(ctx, address, choice & 1 ? NULL : text);
        break;
    case 4:
        session_addrcpt(ctx, address);
        break;
    case 5:
        session_addrcpt_par(ctx, address, text);
        break;
    case 6:
        session_delrcpt(ctx, address);
        break;
    case 7:
        session_replacebody(ctx, body, (int)(choice >> 12 & 0xFFFF));
        break;
    case 8:
        session_quarantine(ctx, text);
        break;
    case 9:
        session_progress(ctx);
        break;
    case 10:
        session_setreply(ctx, code, xcode, text);
        break;
    case 11:
        session_setmlreply(ctx, code, xcode, (char **)lines);
        break;
    default: {
        char *found = session_getsymval(ctx, macro);
        if (found != NULL) {
            see_string(found);
        }
    }
    }
}

/* A callback begins; its connection is known from the first one on. */
static void
begin(SMFICTX *ctx)
{
    assert(!over && !waiting && depth == 0);
    depth++;
    if (session_getpriv(ctx) == NULL) {
        session_setpriv(ctx, &known);
    }
    known = true;
    assert(session_getpriv(ctx) == &known);
}

/* It returns, or is suspended before it does. */
static void
end(SMFICTX *ctx)
{
    act(ctx);
    if ((choice >> 20 & 7) == 0 && patience > 0) {
        waiting = session_suspend(ctx);
        patience -= waiting;
        assert(!waiting || !session_suspend(ctx));
    }
    depth--;
}

static sfsistat
verdict(void)
{
    static const sfsistat verdicts[] = {
        SMFIS_CONTINUE, SMFIS_CONTINUE, SMFIS_CONTINUE, SMFIS_REJECT,  SMFIS_TEMPFAIL,
        SMFIS_ACCEPT,   SMFIS_DISCARD,  SMFIS_SKIP,     SMFIS_NOREPLY, (sfsistat)99,
    };

    return verdicts[(choice >> 3) % (sizeof verdicts / sizeof *verdicts)];
}

static sfsistat
done(SMFICTX *ctx)
{
    begin(ctx);
    end(ctx);
    return verdict();
}

static sfsistat
on_connect(SMFICTX *ctx, char *name, _SOCK_ADDR *address)
{
    see_string(name);
    if (address != NULL) {
        see((const char *)address, sizeof(struct sockaddr));
    }
    return done(ctx);
}

static sfsistat
on_text(SMFICTX *ctx, char *text)
{
    see_string(text);
    return done(ctx);
}

static sfsistat
on_unknown(SMFICTX *ctx, const char *text)
{
    see_string(text);
    return done(ctx);
}

static sfsistat
on_strings(SMFICTX *ctx, char **strings)
{
    assert(strings[0] != NULL);
    for (; *strings != NULL; strings++) {
        see_string(*strings);
    }
    return done(ctx);
}

static sfsistat
on_header(SMFICTX *ctx, char *name, char *value)
{
    assert(*name != '\0');
    see_string(name);
    see_string(value);
    return done(ctx);
}

static sfsistat
on_body(SMFICTX *ctx, unsigned char *bytes, size_t size)
{
    assert(size > 0);
    see((const char *)bytes, size);
    return done(ctx);
}

static sfsistat
on_step(SMFICTX *ctx)
{
    return done(ctx);
}

static sfsistat
on_abort(SMFICTX *ctx)
{
    see("abort", 5);
    ending = true;
    done(ctx);
    ending = waiting;
    return SMFIS_CONTINUE;
}

static void
forget(SMFICTX *ctx)
{
    session_setpriv(ctx, NULL);
    known = false;
}

static sfsistat
on_close(SMFICTX *ctx)
{
    assert(known && session_getpriv(ctx) == &known);
    see("close", 5);
    ending = closing = true;
    done(ctx);
    ending = closing = waiting;
    if (!waiting) {
        forget(ctx);
    }
    return SMFIS_CONTINUE;
}

static sfsistat
on_negotiate(SMFICTX *ctx, unsigned long actions, unsigned long steps, unsigned long two,
             unsigned long three, unsigned long *want_actions, unsigned long *want_steps,
             unsigned long *want_two, unsigned long *want_three)
{
    static char list[] = "i {x}";

    (void)two;
    (void)three;
    begin(ctx);
    depth--;
    see((const char *)&actions, sizeof actions);
    see((const char *)&steps, sizeof steps);
    session_setsymlist(ctx, (int)(choice % 9), list);
    *want_actions = actions & choice;
    *want_steps = steps & choice >> 3;
    *want_two = *want_three = 0;
    return choice & 64 ? SMFIS_ALL_OPTS : SMFIS_CONTINUE;
}

static int
written(SMFICTX *session, bool urgent)
{
    (void)urgent;
    return session->broken ? MI_FAILURE : MI_SUCCESS;
}

static void
write_log(const char *level, const char *text)
{
    see_string(level);
    see_string(text);
}

/* Once `waiting` is over; like a callback, which may be suspended again. */
static sfsistat
complete(SMFICTX *session, void *data)
{
    assert(data == &waiting && !waiting && depth == 0 && session_getpriv(session) == &known);
    depth++;
    see("complete", 8);
    end(session);
    if (waiting) {
        return SMFIS_CONTINUE;
    }
    if (closing) {
        forget(session);
    }
    ending = closing = false;
    return (choice >> 16 & 15) == 0 ? SESSION_CUT_OFF : verdict();
}

/* Complete what is suspended; meanwhile the filter does this and that. */
static enum session_result
await(SMFICTX *session, enum session_result result)
{
    while (result == SESSION_SUSPENDED) {
        assert(waiting);
        act(session);
        waiting = false;
        result = session_complete(session, complete, &waiting);
    }
    assert(!waiting && !ending);
    return result;
}

/* Packets that a filter may send; one at most, and that the last one, is the answer. */
static void
check_outbox(const struct outbox *outbox, bool may_answer)
{
    struct inbox inbox = {outbox->bytes, outbox->begin, outbox->end, outbox->room};
    struct packet packet;

    while (inbox_take(&inbox, 70000, &packet) == PACKET_THERE) {
        bool answer = strchr("Oacdrsty", packet.command) != NULL;

        assert(answer || strchr("+-2beihmpq", packet.command) != NULL);
        assert(!answer || (may_answer && inbox_empty(&inbox)));
    }
    assert(inbox_empty(&inbox));
}

static void
choose_callbacks(struct smfiDesc *filter, unsigned bits)
{
    *filter = (struct smfiDesc){.xxfi_name = "fuzzed", .xxfi_version = SMFI_VERSION};
    filter->xxfi_flags = SMFIF_ADDHDRS | SMFIF_CHGBODY;
    filter->xxfi_connect = bits & 1 ? NULL : on_connect;
    filter->xxfi_helo = bits & 2 ? NULL : on_text;
    filter->xxfi_envfrom = bits & 4 ? NULL : on_strings;
    filter->xxfi_envrcpt = bits & 8 ? NULL : on_strings;
    filter->xxfi_header = bits & 16 ? NULL : on_header;
    filter->xxfi_eoh = bits & 32 ? NULL : on_step;
    filter->xxfi_body = bits & 64 ? NULL : on_body;
    filter->xxfi_eom = bits & 128 ? NULL : on_step;
    filter->xxfi_abort = bits & 256 ? NULL : on_abort;
    filter->xxfi_close = bits & 512 ? NULL : on_close;
    filter->xxfi_unknown = bits & 1024 ? NULL : on_unknown;
    filter->xxfi_data = bits & 2048 ? NULL : on_step;
    filter->xxfi_negotiate = bits & 4096 ? NULL : on_negotiate;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct session_driver driver = {.written = written, .log = write_log};
    struct smfiDesc filter;
    struct smfi_str session;
    struct inbox inbox = {0};
    struct packet packet;
    size_t room;
    char *to;
    enum session_result result;

    if (size < 2) {
        return 0;
    }
    choice = 2166136261u;
    known = over = waiting = ending = closing = false;
    patience = 1000;
    choose_callbacks(&filter, (unsigned)(data[0] | data[1] << 8));
    session_begin(&session, &filter, &driver, 65535);
    to = inbox_room(&inbox, size, &room, NULL);
    memcpy(to, data + 2, size - 2);
    inbox_add(&inbox, size - 2);
    allocations = 0;
    shortage = data[1] >> 5;
    while (inbox_take(&inbox, 65535, &packet) == PACKET_THERE) {
        bool may_answer = strchr("ADQK", packet.command) == NULL;

        session_calls(&session, &packet);
        result = await(&session, session_take(&session, &packet));
        check_outbox(&session.outbox, may_answer);
        session.broken = (choice >> 24) == 1;
        outbox_sent(&session.outbox, outbox_size(&session.outbox) / 2);
        outbox_sent(&session.outbox, outbox_size(&session.outbox));
        if (result == SESSION_ENDS) {
            break;
        }
    }
    assert(filter.xxfi_close == NULL || session_has_to_close(&session) == known);
    result = await(&session, session_end(&session));
    assert(result == SESSION_ENDS);
    check_outbox(&session.outbox, false);
    assert(!known || filter.xxfi_close == NULL);
    over = true;
    shortage = 0;
    session_free(&session);
    inbox_free(&inbox);
    return 0;
}
