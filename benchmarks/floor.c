/*
 * The floor: the least that a filter can do, in C on libmilter.
 *
 * Every callback is set, and each message gets one header.  What a binding for another language
 * takes beyond this is the cost of the binding.
 *
 * usage: floor SOCKET [--count-body] [--block-ms N] [--nodelay]
 *
 *   --count-body   the header tells the length of the body
 *   --block-ms N   MAIL takes N milliseconds, in which nothing is computed
 *   --nodelay      connections have TCP_NODELAY
 */

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>

#include <libmilter/mfapi.h>

#define FIELD "X-Bench"
#define VALUE "checked"
#define SECONDS 600 /* for the MTA to answer */

static bool count_body;
static bool nodelay;
static long block_ms;

/* What a connection has of its own, as a binding has at the least. */
struct state {
    size_t body;
};

static sfsistat
on_connect(SMFICTX *ctx, char *hostname, _SOCK_ADDR *address)
{
    struct state *state = calloc(1, sizeof *state);

    (void)hostname;
    (void)address;
    if (state == NULL) {
        return SMFIS_TEMPFAIL;
    }
    smfi_setpriv(ctx, state);
    return SMFIS_CONTINUE;
}

static sfsistat
on_helo(SMFICTX *ctx, char *hostname)
{
    (void)ctx;
    (void)hostname;
    return SMFIS_CONTINUE;
}

static sfsistat
on_envfrom(SMFICTX *ctx, char **arguments)
{
    struct state *state = smfi_getpriv(ctx);
    struct timespec pause = {.tv_sec = block_ms / 1000, .tv_nsec = block_ms % 1000 * 1000000};

    (void)arguments;
    if (state != NULL) {
        state->body = 0;
    }
    if (block_ms > 0) {
        nanosleep(&pause, NULL);
    }
    return SMFIS_CONTINUE;
}

static sfsistat
on_envrcpt(SMFICTX *ctx, char **arguments)
{
    (void)ctx;
    (void)arguments;
    return SMFIS_CONTINUE;
}

static sfsistat
on_data(SMFICTX *ctx)
{
    (void)ctx;
    return SMFIS_CONTINUE;
}

static sfsistat
on_header(SMFICTX *ctx, char *name, char *value)
{
    (void)ctx;
    (void)name;
    (void)value;
    return SMFIS_CONTINUE;
}

static sfsistat
on_eoh(SMFICTX *ctx)
{
    (void)ctx;
    return SMFIS_CONTINUE;
}

static sfsistat
on_body(SMFICTX *ctx, unsigned char *chunk, size_t length)
{
    struct state *state = smfi_getpriv(ctx);

    (void)chunk;
    if (state != NULL) {
        state->body += length;
    }
    return SMFIS_CONTINUE;
}

static sfsistat
on_eom(SMFICTX *ctx)
{
    struct state *state = smfi_getpriv(ctx);
    char length[24] = VALUE;

    if (count_body && state != NULL) {
        snprintf(length, sizeof length, "%zu", state->body);
    }
    return smfi_addheader(ctx, FIELD, length) == MI_SUCCESS ? SMFIS_CONTINUE : SMFIS_TEMPFAIL;
}

static sfsistat
on_abort(SMFICTX *ctx)
{
    (void)ctx;
    return SMFIS_CONTINUE;
}

static sfsistat
on_unknown(SMFICTX *ctx, const char *command)
{
    (void)ctx;
    (void)command;
    return SMFIS_CONTINUE;
}

static sfsistat
on_close(SMFICTX *ctx)
{
    free(smfi_getpriv(ctx));
    smfi_setpriv(ctx, NULL);
    return SMFIS_CONTINUE;
}

/* All actions and all callbacks with their replies, as the Python filters ask for. */
static sfsistat
on_negotiate(SMFICTX *ctx, unsigned long actions, unsigned long steps, unsigned long f2,
             unsigned long f3, unsigned long *want_actions, unsigned long *want_steps,
             unsigned long *want2, unsigned long *want3)
{
    (void)ctx;
    (void)f2;
    (void)f3;
    *want_actions = actions;
    *want_steps = steps & SMFIP_SKIP;
    *want2 = *want3 = 0;
    return SMFIS_CONTINUE;
}

static struct smfiDesc description = {
    .xxfi_name = "floor",
    .xxfi_version = SMFI_VERSION,
    .xxfi_flags = SMFIF_ADDHDRS,
    .xxfi_connect = on_connect,
    .xxfi_helo = on_helo,
    .xxfi_envfrom = on_envfrom,
    .xxfi_envrcpt = on_envrcpt,
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

static void
parse_options(int count, char **arguments)
{
    for (int i = 2; i < count; i++) {
        if (strcmp(arguments[i], "--count-body") == 0) {
            count_body = true;
        }
        else if (strcmp(arguments[i], "--block-ms") == 0 && i + 1 < count) {
            block_ms = strtol(arguments[++i], NULL, 10);
        }
        else if (strcmp(arguments[i], "--nodelay") == 0) {
            nodelay = true;
        }
        else {
            fprintf(stderr, "floor: unknown argument: %s\n", arguments[i]);
            exit(2);
        }
    }
}

/* Connections inherit TCP_NODELAY of the socket that accepts them; libmilter, which keeps that one
 * to itself, does not set it. */
static bool
set_nodelay(void)
{
    for (int fd = 3; fd < 256; fd++) {
        int listens = 0;
        socklen_t size = sizeof listens;

        if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens) {
            return setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)) == 0;
        }
    }
    return false;
}

int
main(int count, char **arguments)
{
    if (count < 2) {
        fputs("usage: floor SOCKET [--count-body] [--block-ms N] [--nodelay]\n", stderr);
        return 2;
    }
    parse_options(count, arguments);
    if (smfi_setconn(arguments[1]) != MI_SUCCESS || smfi_settimeout(SECONDS) != MI_SUCCESS ||
        smfi_register(description) != MI_SUCCESS || smfi_opensocket(true) != MI_SUCCESS) {
        fprintf(stderr, "floor: cannot listen on %s\n", arguments[1]);
        return 1;
    }
    if (nodelay && !set_nodelay()) {
        fputs("floor: cannot set TCP_NODELAY\n", stderr);
        return 1;
    }
    return smfi_main() == MI_SUCCESS ? 0 : 1;
}
