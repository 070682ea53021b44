/* libFuzzer on src/engine/native/session.c: whatever the packets are, the filter is called in
 * order, with strings that end, and what is answered are packets.
 *
 * The first two bytes say which callbacks the filter has; the rest is what the MTA sends.  What a
 * callback does depends on the bytes that it gets.
 */

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/native/session.h"

static unsigned choice; /* mixed from all that was seen */
static bool in_message, closed, suspended_now;
static int depth;
static char *const lines[] = {"one", "two 100%% of it", NULL};

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

static sfsistat
done(SMFICTX *ctx)
{
    static const sfsistat verdicts[] = {
        SMFIS_CONTINUE, SMFIS_CONTINUE, SMFIS_CONTINUE, SMFIS_REJECT,  SMFIS_TEMPFAIL,
        SMFIS_ACCEPT,   SMFIS_DISCARD,  SMFIS_SKIP,     SMFIS_NOREPLY, (sfsistat)99,
    };

    assert(!closed && depth == 0);
    depth++;
    act(ctx);
    if ((choice >> 20 & 7) == 0) {
        suspended_now = session_suspend(ctx);
    }
    depth--;
    return verdicts[(choice >> 3) % (sizeof verdicts / sizeof *verdicts)];
}

static sfsistat
on_connect(SMFICTX *ctx, char *name, _SOCK_ADDR *address)
{
    session_setpriv(ctx, &closed);
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
on_mail(SMFICTX *ctx, char **strings)
{
    in_message = true;
    return on_strings(ctx, strings);
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
    (void)ctx;
    assert(!closed && depth == 0);
    in_message = false;
    return SMFIS_CONTINUE;
}

static sfsistat
on_close(SMFICTX *ctx)
{
    assert(!closed && depth == 0);
    session_setpriv(ctx, NULL);
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

static sfsistat
complete(SMFICTX *session, void *data)
{
    (void)session;
    return *(sfsistat *)data;
}

static void
check_outbox(const struct outbox *outbox)
{
    struct inbox inbox = {outbox->bytes, outbox->begin, outbox->end, outbox->room};
    struct packet packet;

    while (inbox_take(&inbox, 70000, &packet) == PACKET_THERE) {
        assert(strchr("+-2<Qbcdehimqrstapy4fO", packet.command) != NULL);
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
    filter->xxfi_envfrom = bits & 4 ? NULL : on_mail;
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

    if (size < 2) {
        return 0;
    }
    choice = 2166136261u;
    in_message = closed = suspended_now = false;
    choose_callbacks(&filter, (unsigned)(data[0] | data[1] << 8));
    session_begin(&session, &filter, &driver, 65535);
    to = inbox_room(&inbox, size, &room);
    memcpy(to, data + 2, size - 2);
    inbox_add(&inbox, size - 2);
    while (inbox_take(&inbox, 65535, &packet) == PACKET_THERE) {
        enum session_result result = session_take(&session, &packet);

        for (int again = 0; result == SESSION_SUSPENDED; again++) {
            sfsistat verdict = again == 0 ? SMFIS_CONTINUE : SMFIS_TEMPFAIL;
            suspended_now = false;
            result = session_complete(&session, complete, &verdict);
            if (suspended_now) {
                assert(again < 2);
            }
        }
        check_outbox(&session.outbox);
        session.broken = (choice >> 24) == 1;
        if (result == SESSION_ENDS) {
            break;
        }
        outbox_sent(&session.outbox, outbox_size(&session.outbox) / 2);
        outbox_sent(&session.outbox, outbox_size(&session.outbox));
    }
    session_end(&session);
    closed = true;
    session_free(&session);
    inbox_free(&inbox);
    return 0;
}
