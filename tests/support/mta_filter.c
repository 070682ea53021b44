/*
 * A filter on the real libmilter for the tests of Milter/mta/.
 *
 * It does what the environment says:
 *
 *   F_SOCKET          where to listen
 *   F_LOG             file that gets one line for each callback: its name and its
 *                     arguments in hexadecimal
 *   F_AFLAGS F_PFLAGS actions and protocol steps to ask for in negotiation
 *   F_SYMLISTS        macros to ask for: records of stage number and list
 *   F_MACROS          names of macros to log (as "macro") at the end of message
 *   F_VERDICT_name    what the callback "name" returns: a digit of SMFIS_*
 *   F_REPLY_name      SMTP reply to set there: fields code, enhanced code, lines
 *   F_ONLY_RCPT       the recipient that F_VERDICT_rcpt is for, all where it is not set
 *   F_EOM             actions at the end of message: records of fields, the first is
 *                     the call without "smfi_"
 *
 * Records end in 0x1e, fields are separated by 0x1f.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <libmilter/mfapi.h>

#define MAX_FIELDS 12

static FILE *log_file;

static const char *
setting(const char *prefix, const char *name)
{
    char variable[64];

    snprintf(variable, sizeof variable, "%s%s", prefix, name);
    return getenv(variable);
}

static unsigned long
number(const char *name, unsigned long otherwise)
{
    const char *text = getenv(name);

    return text == NULL ? otherwise : strtoul(text, NULL, 0);
}

static void
log_bytes(const void *data, size_t length)
{
    const unsigned char *byte = data;

    fputc(' ', log_file);
    if (length == 0) {
        fputc('-', log_file);
    }
    while (length-- > 0) {
        fprintf(log_file, "%02x", *byte++);
    }
}

static void
log_begin(const char *name)
{
    flockfile(log_file);
    fputs(name, log_file);
}

static void
log_text(const char *text)
{
    log_bytes(text, strlen(text));
}

static void
log_end(void)
{
    fputc('\n', log_file);
    fflush(log_file);
    funlockfile(log_file);
}

static void
log_call(const char *name)
{
    log_begin(name);
    log_end();
}

/* Cut the next record out of *cursor and split it; returns the number of fields. */
static int
next_record(char **cursor, char *fields[MAX_FIELDS])
{
    char *end = strchr(*cursor, 0x1e);
    int count = 0;

    memset(fields, 0, MAX_FIELDS * sizeof *fields);
    if (end == NULL) {
        return 0;
    }
    *end = '\0';
    fields[count++] = *cursor;
    for (char *at = *cursor; *at != '\0'; at++) {
        if (*at == 0x1f && count < MAX_FIELDS - 1) {
            *at = '\0';
            fields[count++] = at + 1;
        }
    }
    *cursor = end + 1;
    return count;
}

static void
set_reply(SMFICTX *ctx, const char *record)
{
    char *copy = strdup(record), *cursor = copy, *f[MAX_FIELDS];
    int count = next_record(&cursor, f), result;
    char *enhanced = f[1] != NULL && *f[1] != '\0' ? f[1] : NULL;

    if (count <= 3) {
        result = smfi_setreply(ctx, f[0], enhanced, f[2]);
    }
    else {
        result = smfi_setmlreply(ctx, f[0], enhanced, f[2], f[3], f[4], f[5], f[6], NULL);
    }
    if (result != MI_SUCCESS) {
        log_call("failed");
    }
    free(copy);
}

static sfsistat
verdict(SMFICTX *ctx, const char *name)
{
    const char *reply = setting("F_REPLY_", name);
    const char *code = setting("F_VERDICT_", name);

    if (reply != NULL) {
        set_reply(ctx, reply);
    }
    return code == NULL ? SMFIS_CONTINUE : atoi(code);
}

static sfsistat
on_negotiate(SMFICTX *ctx, unsigned long f0, unsigned long f1, unsigned long f2, unsigned long f3,
             unsigned long *pf0, unsigned long *pf1, unsigned long *pf2, unsigned long *pf3)
{
    const char *lists = getenv("F_SYMLISTS");

    (void)f2;
    (void)f3;
    log_begin("negotiate");
    fprintf(log_file, " %lx %lx", f0, f1);
    log_end();
    if (lists != NULL) {
        char *copy = strdup(lists), *cursor = copy, *f[MAX_FIELDS];

        while (next_record(&cursor, f) >= 2) {
            if (smfi_setsymlist(ctx, atoi(f[0]), f[1]) != MI_SUCCESS) {
                log_call("failed");
            }
        }
        free(copy);
    }
    *pf0 = number("F_AFLAGS", f0);
    *pf1 = number("F_PFLAGS", 0);
    *pf2 = 0;
    *pf3 = 0;
    return SMFIS_CONTINUE;
}

static sfsistat
on_connect(SMFICTX *ctx, char *host, _SOCK_ADDR *address)
{
    char text[INET6_ADDRSTRLEN] = "";

    log_begin("connect");
    log_text(host);
    if (address == NULL) {
        fputs(" none", log_file);
    }
    else if (address->sa_family == AF_INET) {
        struct sockaddr_in *in = (struct sockaddr_in *)address;

        inet_ntop(AF_INET, &in->sin_addr, text, sizeof text);
        fprintf(log_file, " inet %s %d", text, ntohs(in->sin_port));
    }
    else if (address->sa_family == AF_INET6) {
        struct sockaddr_in6 *in = (struct sockaddr_in6 *)address;

        inet_ntop(AF_INET6, &in->sin6_addr, text, sizeof text);
        fprintf(log_file, " inet6 %s %d", text, ntohs(in->sin6_port));
    }
    else {
        fprintf(log_file, " unix %s", ((struct sockaddr_un *)address)->sun_path);
    }
    log_end();
    return verdict(ctx, "connect");
}

static sfsistat
on_helo(SMFICTX *ctx, char *host)
{
    log_begin("helo");
    log_text(host);
    log_end();
    return verdict(ctx, "helo");
}

static void
log_arguments(const char *name, char **argv)
{
    log_begin(name);
    while (*argv != NULL) {
        log_text(*argv++);
    }
    log_end();
}

static sfsistat
on_mail(SMFICTX *ctx, char **argv)
{
    log_arguments("mail", argv);
    return verdict(ctx, "mail");
}

static sfsistat
on_rcpt(SMFICTX *ctx, char **argv)
{
    const char *mailer = smfi_getsymval(ctx, "{rcpt_mailer}");
    const char *only = getenv("F_ONLY_RCPT");

    log_arguments("rcpt", argv);
    if (mailer != NULL && strcmp(mailer, "error") == 0) {
        log_begin("rejected");
        log_text(smfi_getsymval(ctx, "{rcpt_host}"));
        log_text(smfi_getsymval(ctx, "{rcpt_addr}"));
        log_end();
    }
    if (only != NULL && strcmp(only, argv[0]) != 0) {
        return SMFIS_CONTINUE;
    }
    return verdict(ctx, "rcpt");
}

static sfsistat
on_data(SMFICTX *ctx)
{
    log_call("data");
    return verdict(ctx, "data");
}

static sfsistat
on_header(SMFICTX *ctx, char *name, char *value)
{
    log_begin("header");
    log_text(name);
    log_text(value);
    log_end();
    return verdict(ctx, "header");
}

static sfsistat
on_eoh(SMFICTX *ctx)
{
    log_call("eoh");
    return verdict(ctx, "eoh");
}

static sfsistat
on_body(SMFICTX *ctx, unsigned char *data, size_t length)
{
    log_begin("body");
    log_bytes(data, length);
    log_end();
    return verdict(ctx, "body");
}

static int
big_body(SMFICTX *ctx, int size)
{
    unsigned char *body = malloc(size);
    int result;

    memset(body, 'x', size);
    result = smfi_replacebody(ctx, body, size);
    free(body);
    return result;
}

static int
act(SMFICTX *ctx, char *f[MAX_FIELDS])
{
    if (strcmp(f[0], "addheader") == 0) {
        return smfi_addheader(ctx, f[1], f[2]);
    }
    if (strcmp(f[0], "insheader") == 0) {
        return smfi_insheader(ctx, atoi(f[1]), f[2], f[3]);
    }
    if (strcmp(f[0], "chgheader") == 0) {
        return smfi_chgheader(ctx, f[1], atoi(f[2]), f[3]);
    }
    if (strcmp(f[0], "addrcpt") == 0) {
        return smfi_addrcpt(ctx, f[1]);
    }
    if (strcmp(f[0], "addrcpt_par") == 0) {
        return smfi_addrcpt_par(ctx, f[1], f[2]);
    }
    if (strcmp(f[0], "delrcpt") == 0) {
        return smfi_delrcpt(ctx, f[1]);
    }
    if (strcmp(f[0], "chgfrom") == 0) {
        return smfi_chgfrom(ctx, f[1], f[2]);
    }
    if (strcmp(f[0], "replacebody") == 0) {
        return smfi_replacebody(ctx, (unsigned char *)f[1], (int)strlen(f[1]));
    }
    if (strcmp(f[0], "bigbody") == 0) {
        return big_body(ctx, atoi(f[1]));
    }
    if (strcmp(f[0], "quarantine") == 0) {
        return smfi_quarantine(ctx, f[1]);
    }
    if (strcmp(f[0], "progress") == 0) {
        return smfi_progress(ctx);
    }
    return MI_FAILURE;
}

static void
log_macros(SMFICTX *ctx, const char *names)
{
    char *copy = strdup(names), *rest = NULL;

    for (char *name = strtok_r(copy, " ", &rest); name != NULL; name = strtok_r(NULL, " ", &rest)) {
        const char *value = smfi_getsymval(ctx, name);

        log_begin("macro");
        log_text(name);
        if (value != NULL) {
            log_text(value);
        }
        log_end();
    }
    free(copy);
}

static sfsistat
on_eom(SMFICTX *ctx)
{
    const char *actions = getenv("F_EOM"), *macros = getenv("F_MACROS");

    log_call("eom");
    if (macros != NULL) {
        log_macros(ctx, macros);
    }
    if (actions != NULL) {
        char *copy = strdup(actions), *cursor = copy, *f[MAX_FIELDS];

        while (next_record(&cursor, f) > 0) {
            if (act(ctx, f) != MI_SUCCESS) {
                log_begin("failed");
                log_text(f[0]);
                log_end();
            }
        }
        free(copy);
    }
    return verdict(ctx, "eom");
}

static sfsistat
on_abort(SMFICTX *ctx)
{
    (void)ctx;
    log_call("abort");
    return SMFIS_CONTINUE;
}

static sfsistat
on_close(SMFICTX *ctx)
{
    (void)ctx;
    log_call("close");
    return SMFIS_CONTINUE;
}

static sfsistat
on_unknown(SMFICTX *ctx, const char *command)
{
    log_begin("unknown");
    log_text(command);
    log_end();
    return verdict(ctx, "unknown");
}

int
main(void)
{
    struct smfiDesc filter = {
        .xxfi_name = "mta_filter",
        .xxfi_version = SMFI_VERSION,
        .xxfi_flags = SMFIF_NONE,
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_mail,
        .xxfi_envrcpt = on_rcpt,
        .xxfi_header = on_header,
        .xxfi_eoh = on_eoh,
        .xxfi_body = on_body,
        .xxfi_eom = on_eom,
        .xxfi_abort = on_abort,
        .xxfi_close = on_close,
        .xxfi_unknown = on_unknown,
        .xxfi_data = on_data,
        .xxfi_negotiate = on_negotiate,
    };

    log_file = fopen(getenv("F_LOG"), "w");
    if (log_file == NULL || smfi_setconn(getenv("F_SOCKET")) != MI_SUCCESS ||
        smfi_register(filter) != MI_SUCCESS) {
        return 2;
    }
    return smfi_main() == MI_SUCCESS ? 0 : 1;
}
