/*
 * Mixed load for hours: plays many MTAs to the filter filters/soak.py, each on a thread of its
 * own, and checks each answer.
 *
 * Each session is one of the kinds below, chosen by chance: short and long ones, messages of
 * several sizes, changes, refused recipients, callbacks that raise or block, aborted messages,
 * and connections that are dropped anywhere, in the middle of a packet too.  The sender's
 * address, or the client's name, tells the filter what it is to do.
 *
 * One line of JSON a second on standard output says how far it is; the last one has "done".
 */

#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <libmilter/mfdef.h>

#include "packets.h"

#define VERSION 6
#define ALL_ACTIONS ((uint32_t)SMFI_CURR_ACTS)
#define ROOM (128 * 1024) /* one command, or one answer */
#define PATIENCE 60       /* seconds for an answer */
#define TOLERATED 1000
#define CHANGES 5 /* that the filter makes where it is asked to */

enum kind { QUICK, LONG, CHANGE, REFUSE, RAISE, BLOCK, ABORT, REUSE, DROP, MUTE, KINDS };

static const struct {
    const char *name;
    int weight; /* of 100 sessions */
} kinds[KINDS] = {
    [QUICK] = {"quick", 48},  [LONG] = {"long", 1},   [CHANGE] = {"change", 10},
    [REFUSE] = {"refuse", 8}, [RAISE] = {"raise", 8}, [BLOCK] = {"block", 2},
    [ABORT] = {"cut", 6},     [REUSE] = {"reuse", 4}, [DROP] = {"drop", 9},
    [MUTE] = {"mute", 4},
};

/* Where the filter may be asked to raise. */
static const char *const stages[] = {"connect", "hello", "envfrom", "envrcpt", "data", "header",
                                     "eoh",     "body",  "eom",     "abort",   "close"};
#define STAGES (sizeof stages / sizeof stages[0])

static struct sockaddr_un address = {.sun_family = AF_UNIX};
static atomic_ullong connections, messages, errors, sessions[KINDS];
static atomic_bool stopping;
static unsigned long long wanted; /* connections and messages; 0: until the time is over */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char first_error[256];

struct client {
    int fd;
    uint64_t chance;
    uint32_t agreed;
    bool broken;    /* nothing more can be said on this connection */
    bool leaving;   /* on purpose */
    int drop_after; /* commands; -1: never */
    int changes;
    char last;     /* command */
    size_t length; /* of what is to be sent */
    uint8_t out[ROOM];
    uint8_t in[ROOM];
};

static void
die(const char *what)
{
    fprintf(stderr, "soak: %s\n", what);
    exit(2);
}

static unsigned
roll(struct client *client, unsigned sides)
{
    client->chance ^= client->chance << 13;
    client->chance ^= client->chance >> 7;
    client->chance ^= client->chance << 17;
    return (unsigned)(client->chance >> 33) % sides;
}

/* Note what the filter did wrong; the connection ends. */
static void
fail(struct client *client, const char *format, ...)
{
    va_list arguments;

    client->broken = true;
    if (client->leaving || atomic_fetch_add(&errors, 1) != 0) {
        return;
    }
    pthread_mutex_lock(&lock);
    va_start(arguments, format);
    vsnprintf(first_error, sizeof first_error, format, arguments);
    va_end(arguments);
    pthread_mutex_unlock(&lock);
}

/* --- packets ---------------------------------------------------------------------------------- */

static void
put(struct client *client, const void *data, size_t length)
{
    if (client->length + length > ROOM) {
        die("a command is too long");
    }
    memcpy(client->out + client->length, data, length);
    client->length += length;
}

static void
put_packet(struct client *client, char command, const void *data, size_t length)
{
    char head[HEAD_BYTES];

    client->last = command;
    write_head(head, command, length);
    put(client, head, sizeof head);
    put(client, data, length);
}

static void
flush(struct client *client)
{
    size_t at = 0;

    if (client->drop_after >= 0 && client->drop_after-- == 0) {
        client->leaving = client->broken = true;
        /* The last packet may be whole, torn, or missing. */
        client->length = roll(client, (unsigned)client->length + 1);
    }
    while (at < client->length && (client->leaving || !client->broken)) {
        ssize_t sent = send(client->fd, client->out + at, client->length - at, MSG_NOSIGNAL);

        if (sent < 0 && errno != EINTR) {
            fail(client, "sending: %s", strerror(errno));
            break;
        }
        at += sent > 0 ? (size_t)sent : 0;
    }
    client->length = 0;
}

static bool
receive(struct client *client, void *data, size_t length)
{
    uint8_t *to = data;

    while (length > 0 && !client->broken) {
        ssize_t got = recv(client->fd, to, length, 0);

        if (got > 0) {
            to += got;
            length -= (size_t)got;
        }
        else if (got == 0 || errno != EINTR) {
            fail(client, "no answer to '%c': %s", client->last,
                 got == 0 ? "the filter hung up" : strerror(errno));
        }
    }
    return !client->broken;
}

/* The next answer that is a verdict; changes before it are counted.  '\0' where there is none. */
static char
verdict(struct client *client)
{
    char head[LENGTH_BYTES];

    flush(client);
    while (receive(client, head, sizeof head)) {
        size_t size = read_length(head);

        if (size == 0 || size > ROOM) {
            fail(client, "an answer of %zu bytes", size);
        }
        if (!receive(client, client->in, size)) {
            break;
        }
        if (strchr("hmi+-2eqbp", client->in[0]) == NULL) {
            return (char)client->in[0];
        }
        client->changes++;
    }
    return '\0';
}

static char
ask(struct client *client, char command, const void *data, size_t length)
{
    put_packet(client, command, data, length);
    return verdict(client);
}

static char
ask_text(struct client *client, char command, const char *text)
{
    return ask(client, command, text, *text == '\0' ? 0 : strlen(text) + 1);
}

/* --- a session -------------------------------------------------------------------------------- */

static bool
negotiate(struct client *client)
{
    uint32_t steps = roll(client, 2) ? SMFIP_NR_HDR | SMFIP_HDR_LEADSPC : 0;
    const uint32_t offer[] = {htonl(VERSION), htonl(ALL_ACTIONS), htonl(steps)};
    uint32_t answer[3];

    if (ask(client, SMFIC_OPTNEG, offer, sizeof offer) != SMFIC_OPTNEG) {
        fail(client, "negotiation refused");
        return false;
    }
    memcpy(answer, client->in + 1, sizeof answer);
    client->agreed = ntohl(answer[2]);
    return true;
}

static bool
expect(struct client *client, const char *where, char got, char due)
{
    if (!client->broken && got != due) {
        fail(client, "%s: answer '%c' instead of '%c'", where, got, due);
    }
    return !client->broken;
}

static bool
raises(const char *trouble, const char *stage)
{
    return strcmp(trouble, stage) == 0;
}

/* From connect to HELO; false where the session is over. */
static bool
greet(struct client *client, const char *trouble)
{
    static const char macros[] = "Cj\0mail.example.org\0_\0mx [192.0.2.25]\0v\0Postfix 3.7.11";
    char connect[80];
    uint16_t port = htons(40025);
    int length = snprintf(connect, sizeof connect, "%s.example.com", trouble) + 1;

    connect[length++] = '4';
    memcpy(connect + length, &port, sizeof port);
    length += (int)sizeof port;
    length += snprintf(connect + length, sizeof connect - (size_t)length, "192.0.2.25") + 1;
    put_packet(client, SMFIC_MACRO, macros, sizeof macros);
    if (!expect(client, "connect", ask(client, SMFIC_CONNECT, connect, (size_t)length),
                raises(trouble, "connect") ? SMFIR_REPLYCODE : SMFIR_CONTINUE) ||
        raises(trouble, "connect")) {
        return false;
    }
    return expect(client, "hello", ask_text(client, SMFIC_HELO, "mx2.example.com"),
                  raises(trouble, "hello") ? SMFIR_REPLYCODE : SMFIR_CONTINUE) &&
           !raises(trouble, "hello");
}

static void
put_header(struct client *client, unsigned number)
{
    char header[160];
    int length = snprintf(header, sizeof header, "X-Header-%u", number) + 1;

    length += snprintf(header + length, sizeof header - (size_t)length,
                       "%sone of %u, which says nothing more",
                       client->agreed & SMFIP_HDR_LEADSPC ? " " : "", number) +
              1;
    put_packet(client, SMFIC_HEADER, header, (size_t)length);
}

static void
abort_message(struct client *client)
{
    put_packet(client, SMFIC_ABORT, "", 0);
    flush(client);
}

/* One step of a message that may raise: false where the message is over. */
static bool
step(struct client *client, const char *trouble, const char *stage, char got)
{
    bool raised = raises(trouble, stage);

    if (!expect(client, stage, got, raised ? SMFIR_REPLYCODE : SMFIR_CONTINUE)) {
        return false;
    }
    if (raised && roll(client, 2)) {
        abort_message(client); /* an MTA may say so, or begin the next one */
    }
    return !raised;
}

static bool
headers(struct client *client, const char *trouble, unsigned count)
{
    bool silent = client->agreed & SMFIP_NR_HDR;

    for (unsigned i = 0; i < count && !client->broken; i++) {
        put_header(client, i);
        /* The filter does not answer headers; libmilter does it where we know no silence. */
        if (!silent && !expect(client, "header", verdict(client), SMFIR_CONTINUE)) {
            return false;
        }
    }
    /* An exception there is answered at the next step. */
    return step(client, raises(trouble, "header") ? "eoh" : trouble, "eoh",
                ask_text(client, SMFIC_EOH, ""));
}

static bool
body(struct client *client, const char *trouble, size_t length)
{
    static uint8_t text[MILTER_CHUNK_SIZE];

    while (length > 0) {
        size_t size = length < sizeof text ? length : sizeof text;

        if (!step(client, trouble, "body", ask(client, SMFIC_BODY, text, size))) {
            return false;
        }
        length -= size;
    }
    return true;
}

/* A message; where it is aborted, `abort_at` says after which step. */
static void
message(struct client *client, const char *what, unsigned fields, size_t size, int abort_at)
{
    static const char mail_macros[] = "M{mail_addr}\0alice@example.com";
    static const char data_macros[] = "Ti\0"
                                      "4XyZ0123";
    char sender[80];
    bool raised_at_recipient = raises(what, "envrcpt");

    put_packet(client, SMFIC_MACRO, mail_macros, sizeof mail_macros);
    snprintf(sender, sizeof sender, "<%s@example.com>", what);
    if (!step(client, what, "envfrom", ask_text(client, SMFIC_MAIL, sender))) {
        atomic_fetch_add(&messages, !client->broken);
        return;
    }
    if (raises(what, "refuse") &&
        !expect(client, "a refused recipient",
                ask_text(client, SMFIC_RCPT, "<refused@example.org>"), SMFIR_REPLYCODE)) {
        return;
    }
    if (!expect(client, "envrcpt", ask_text(client, SMFIC_RCPT, "<bob@example.org>"),
                raised_at_recipient ? SMFIR_REPLYCODE : SMFIR_CONTINUE)) {
        return;
    }
    if (raised_at_recipient || raises(what, "abort") || abort_at == 0) {
        abort_message(client);
        atomic_fetch_add(&messages, !client->broken);
        return;
    }
    put_packet(client, SMFIC_MACRO, data_macros, sizeof data_macros);
    if (step(client, what, "data", ask_text(client, SMFIC_DATA, "")) &&
        headers(client, what, fields)) {
        if (abort_at == 1) {
            abort_message(client);
        }
        else if (body(client, what, size)) {
            client->changes = 0;
            step(client, what, "eom", ask_text(client, SMFIC_BODYEOB, ""));
            if (!client->broken && client->changes != (raises(what, "change") ? CHANGES : 0)) {
                fail(client, "%d changes by the filter", client->changes);
            }
        }
    }
    atomic_fetch_add(&messages, !client->broken);
}

static void
open_connection(struct client *client)
{
    struct timeval patience = {.tv_sec = PATIENCE};

    client->broken = client->leaving = false;
    client->drop_after = -1;
    client->length = 0;
    client->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client->fd < 0) {
        die(strerror(errno));
    }
    setsockopt(client->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    setsockopt(client->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) != 0) {
        fail(client, "connecting: %s", strerror(errno));
        return;
    }
    atomic_fetch_add(&connections, 1);
}

static void
quit(struct client *client, bool reuse)
{
    put_packet(client, reuse ? SMFIC_QUIT_NC : SMFIC_QUIT, "", 0);
    flush(client);
}

static void
long_session(struct client *client)
{
    static const size_t sizes[] = {0, 1, 2000, 30000, MILTER_CHUNK_SIZE + 1, 200000};

    if (greet(client, "long")) {
        for (unsigned i = 0; i < 20 && !client->broken; i++) {
            message(client, "long", roll(client, 30), sizes[roll(client, 6)],
                    roll(client, 8) ? -1 : (int)roll(client, 2));
        }
    }
}

static void
raising_session(struct client *client)
{
    const char *trouble = stages[roll(client, STAGES)];

    if (greet(client, trouble)) {
        message(client, trouble, 2, 500, -1);
        if (!client->broken) {
            message(client, "after", 2, 500, -1);
        }
    }
}

static enum kind
choose(struct client *client)
{
    int at = (int)roll(client, 100);
    enum kind kind = QUICK;

    while (kind < KINDS - 1 && (at -= kinds[kind].weight) >= 0) {
        kind++;
    }
    return kind;
}

static void
session(struct client *client)
{
    enum kind kind = choose(client);

    open_connection(client);
    atomic_fetch_add(&sessions[kind], 1);
    if (kind == DROP) {
        client->drop_after = (int)roll(client, 14);
    }
    if (!client->broken && kind != MUTE && negotiate(client)) {
        switch (kind) {
        case LONG:
            long_session(client);
            break;
        case RAISE:
            raising_session(client);
            break;
        default:
            if (greet(client, kinds[kind].name)) {
                message(client, kinds[kind].name, 3, 500,
                        kind == ABORT ? (int)roll(client, 2) : -1);
            }
        }
        if (kind == REUSE && !client->broken) {
            quit(client, true);
            if (greet(client, "again")) { /* what was agreed holds on */
                message(client, "again", 3, 500, -1);
            }
        }
        quit(client, false);
    }
    close(client->fd);
}

static void *
play(void *argument)
{
    struct client *client = calloc(1, sizeof *client);

    if (client == NULL) {
        die("out of memory");
    }
    client->chance = (uint64_t)(uintptr_t)argument * 0x9E3779B97F4A7C15ULL + 1;
    while (!atomic_load(&stopping)) {
        session(client);
        if (atomic_load(&errors) > TOLERATED) {
            break; /* there is nothing to be learned from more of them */
        }
        if (wanted && atomic_load(&connections) >= wanted && atomic_load(&messages) >= wanted) {
            atomic_store(&stopping, true);
        }
    }
    free(client);
    return NULL;
}

/* --- the report ------------------------------------------------------------------------------- */

static void
report(bool done)
{
    char *error = first_error;

    pthread_mutex_lock(&lock);
    for (; *error != '\0'; error++) {
        if (*error == '"' || *error == '\\' || (unsigned char)*error < ' ' || *error & 0x80) {
            *error = '?';
        }
    }
    printf("{\"connections\": %llu, \"messages\": %llu, \"errors\": %llu, \"error\": \"%s\", ",
           atomic_load(&connections), atomic_load(&messages), atomic_load(&errors), first_error);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < KINDS; i++) {
        printf("\"%s\": %llu, ", kinds[i].name, atomic_load(&sessions[i]));
    }
    printf("\"done\": %s}\n", done ? "true" : "false");
    fflush(stdout);
}

int
main(int count, char **arguments)
{
    long at_a_time = count == 5 ? atol(arguments[2]) : 0;
    double seconds = count == 5 ? atof(arguments[4]) : 0;
    pthread_t *threads = calloc((size_t)at_a_time + 1, sizeof *threads);
    struct timespec begun, now, second = {.tv_sec = 1}, moment = {.tv_nsec = 10000000};

    if (at_a_time < 1 || threads == NULL || strlen(arguments[1]) >= sizeof address.sun_path) {
        die("usage: soak SOCKET-PATH CONNECTIONS-AT-A-TIME COUNT SECONDS; 0 where unlimited");
    }
    strcpy(address.sun_path, arguments[1]);
    wanted = strtoull(arguments[3], NULL, 10);
    for (long i = 0; i < at_a_time; i++) {
        if (pthread_create(&threads[i], NULL, play, (void *)(uintptr_t)(i + 1)) != 0) {
            die("no more threads");
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &begun);
    while (!atomic_load(&stopping)) {
        nanosleep(wanted && wanted < 50000 ? &moment : &second, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (atomic_load(&errors) > TOLERATED) {
            atomic_store(&stopping, true);
        }
        if (seconds > 0 && (double)(now.tv_sec - begun.tv_sec) >= seconds) {
            atomic_store(&stopping, true);
        }
        report(false);
    }
    for (long i = 0; i < at_a_time; i++) {
        pthread_join(threads[i], NULL);
    }
    report(true);
    return atomic_load(&errors) > 0;
}
