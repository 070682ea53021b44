/*
 * Load generator: plays the MTA to a mail filter, checks each of its answers and measures.
 *
 * One thread, one epoll; a connection is in step with its filter as an MTA is: it sends one
 * command with its macros, waits for the reply where one is due, and goes on.  What a message
 * must get is one added header (--field, --value) and the verdict (--verdict); anything else is
 * an error, is told, and makes the exit status 1.
 *
 * Connections negotiate as Postfix 3.7 does: version 6, all actions, all protocol steps.  Steps
 * that the filter does not want are not sent, and where it agreed not to answer nothing is
 * awaited.  Macros are those that Postfix sends with its default configuration.
 *
 * The result, one line of JSON on standard output, is about a window that begins when all
 * connections were served for --warmup seconds.  CPU time is read from the clocks of the
 * processes, which count threads that have ended too.
 */

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netdb.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <libmilter/mfdef.h>

#include "packets.h"

#define VERSION 6
#define NANO 1000000000LL
#define TICK (NANO / 10) /* how often it is looked whether a connection has stalled */
#define MAX_REPLY 4096   /* no answer that this program expects is longer */
#define MAX_PROCESSES 256
#define MAX_EVENTS 256
#define MAX_SCRIPTS 8
#define BATCH (64 * 1024) /* commands that need no reply are sent together up to this size */
#define COPIED 4096       /* longer packets are sent from the script itself */
#define ID_LENGTH 12

#define ALL_ACTIONS ((uint32_t)SMFI_CURR_ACTS)
#define ALL_STEPS ((uint32_t)SMFI_CURR_PROT)
#define ADDHDRS 0x01u /* SMFIF_ADDHDRS, which stands in mfapi.h */

/* --- what is asked for ------------------------------------------------------------------------ */

static struct {
    const char *socket;
    long connections;
    long idle;
    long per_connection; /* messages before a connection is replaced; 0: it stays */
    long headers;
    long recipients;
    long body;
    long chunk;
    double warmup;
    double duration;
    double timeout;
    const char *field;
    const char *value;
    char verdict;
    bool print_message;
    pid_t processes[MAX_PROCESSES];
    int process_count;
} options = {
    .connections = 1,
    .headers = 20,
    .recipients = 3,
    .body = 10 * 1024,
    .chunk = MILTER_CHUNK_SIZE,
    .warmup = 0.3,
    .duration = 1.0,
    .timeout = 30.0,
    .field = "X-Bench",
    .value = "checked",
    .verdict = SMFIR_CONTINUE,
};

/* --- a message, as packets -------------------------------------------------------------------- */

struct step {
    char command; /* SMFIC_* */
    bool replied; /* whether the filter answers it */
    size_t length;
    size_t id_at[2]; /* where the packet holds the queue ID; 0: nowhere */
    uint8_t *packet; /* the macros, where there are any, and the command */
};

/* Everything from CONNECT to the end of a message, for filters that agreed on the same steps. */
struct script {
    uint32_t agreed;
    size_t count;
    size_t message; /* the first step of the message */
    struct step *steps;
};

static struct script scripts[MAX_SCRIPTS];
static size_t script_count;

enum phase { NEGOTIATING, TALKING, IDLING, LEAVING, GONE };

struct connection {
    int fd;
    enum phase phase;
    bool idle;
    bool awaiting; /* a reply is due */
    bool blocked;  /* the socket took no more */
    const struct script *script;
    size_t at; /* the step that is on its way, or the next one */
    long messages;
    long served;         /* messages that were completed in the window */
    int added;           /* headers that the filter added to this message */
    long long began;     /* when MAIL was sent */
    long long moved;     /* when something was last sent or received */
    const uint8_t *data; /* what is to be sent */
    size_t left;
    uint8_t *batch;
    size_t batched;
    uint8_t in[MAX_REPLY];
    size_t received;
};

static struct connection *connections;
static long living; /* connections that have not ended for good */
static long idling; /* of these, idle ones that are ready */
static int poller;

/* --- what is measured ------------------------------------------------------------------------- */

static struct {
    bool stopping;
    bool counting; /* this is the window */
    bool measured; /* it is over */
    long long began, ended;
    unsigned long long replies;   /* commands that were done in the window */
    unsigned long long steps;     /* of these, such as belong to a message */
    unsigned long long completed; /* messages that were completed in the window */
    unsigned long long messages;  /* and at any time */
    unsigned long long sessions;  /* connections that were opened */
    long long filter_cpu, own_cpu;
    long long machine_cpu; /* that of all processes */
    uint32_t *latencies;   /* microseconds */
    size_t latency_count, latency_room;
    unsigned long errors;
    char error[512]; /* the first one */
} result;

static void
die(const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static void *
allocate(void *old, size_t size)
{
    void *memory = realloc(old, size);

    if (memory == NULL) {
        die("out of memory");
    }
    return memory;
}

static long long
clock_time(clockid_t clock)
{
    struct timespec now;

    if (clock_gettime(clock, &now) != 0) {
        die("clock: %s", strerror(errno));
    }
    return now.tv_sec * NANO + now.tv_nsec;
}

static long long
monotonic(void)
{
    return clock_time(CLOCK_MONOTONIC);
}

/* The CPU time that the filter's processes have used, in nanoseconds. */
static long long
filter_time(void)
{
    long long total = 0;
    clockid_t clock;

    for (int i = 0; i < options.process_count; i++) {
        int failed = clock_getcpuclockid(options.processes[i], &clock);

        if (failed) {
            die("process %ld: %s", (long)options.processes[i], strerror(failed));
        }
        total += clock_time(clock);
    }
    return total;
}

/* The CPU time that all processes of the machine have used, in nanoseconds; 0 where unknown. */
static long long
machine_time(void)
{
    FILE *file = fopen("/proc/stat", "r");
    long long user = 0, nice = 0, system = 0;

    if (file == NULL || fscanf(file, "cpu %lld %lld %lld", &user, &nice, &system) != 3) {
        user = nice = system = 0;
    }
    if (file != NULL) {
        fclose(file);
    }
    return (user + nice + system) * (NANO / sysconf(_SC_CLK_TCK));
}

/* --- building packets ------------------------------------------------------------------------- */

struct packet {
    uint8_t *data;
    size_t length;
    size_t begin; /* where the present command's length stands */
};

static void
put(struct packet *packet, const void *data, size_t length)
{
    packet->data = allocate(packet->data, packet->length + length);
    memcpy(packet->data + packet->length, data, length);
    packet->length += length;
}

static void
put_text(struct packet *packet, const char *text)
{
    put(packet, text, strlen(text) + 1);
}

static void
begin_command(struct packet *packet, char command)
{
    packet->begin = packet->length;
    put(packet, "\0\0\0\0", 4);
    put(packet, &command, 1);
}

static void
end_command(struct packet *packet)
{
    write_length(packet->data + packet->begin, packet->length - packet->begin - LENGTH_BYTES);
}

/* Macros for a command: pairs of name and value up to a NULL.  Returns where the queue ID is. */
static size_t
put_macros(struct packet *packet, char command, const char *const *pairs)
{
    size_t id_at = 0;

    begin_command(packet, SMFIC_MACRO);
    put(packet, &command, 1);
    for (; *pairs != NULL; pairs += 2) {
        put_text(packet, pairs[0]);
        if (strcmp(pairs[0], "i") == 0) {
            id_at = packet->length;
        }
        put_text(packet, pairs[1]);
    }
    end_command(packet);
    return id_at;
}

/* --- the message ------------------------------------------------------------------------------ */

static const char no_id[ID_LENGTH + 1] = "4XXXXXXXXXXX";

/* Realistic ones, as parsers take most of their time for addresses, dates and folds. */
static const char *const header_fields[][2] = {
    {"Received", "from mx2.example.com (mx2.example.com [192.0.2.25])\n\tby mail.example.org"
                 " (Postfix) with ESMTPS id 4XyZ0123\n\tfor <bob@example.org>;"
                 " Thu, 1 Jan 2026 00:00:03 +0000 (UTC)"},
    {"Received", "from mx1.example.com (unknown [198.51.100.7])\n\tby mx2.example.com with ESMTP"
                 " id a1b2c3;\n\tThu, 1 Jan 2026 00:00:02 +0000"},
    {"Received", "from desk.example.com by mx1.example.com; Thu, 1 Jan 2026 00:00:01 +0000"},
    {"DKIM-Signature",
     "v=1; a=rsa-sha256; c=relaxed/relaxed; d=example.com; s=s1;\n\t"
     "h=from:to:subject:date; bh=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=;\n\t"
     "b=dzdVyOfAKCdLXdJOc9G2q8LoXSlEniSbav+yuU4zGeeruD00lszZ"},
    {"From", "\"Alice Example\" <alice@example.com>"},
    {"To", "Bob <bob@example.org>, \"C. Carol\" <carol@example.org>"},
    {"Cc", "Dave <dave@example.net>"},
    {"Subject", "=?utf-8?q?Gr=C3=BC=C3=9Fe?= about the next meeting"},
    {"Date", "Thu, 1 Jan 2026 00:00:00 +0000"},
    {"Message-ID", "<20260101000000.4XyZ0123@desk.example.com>"},
    {"In-Reply-To", "<20251231235959.1234@mail.example.org>"},
    {"References", "<20251230120000.1@mail.example.org>\n\t<20251231235959.1234@mail.example.org>"},
    {"MIME-Version", "1.0"},
    {"Content-Type", "text/plain; charset=us-ascii"},
    {"Content-Transfer-Encoding", "7bit"},
    {"User-Agent", "Mutt/2.2.9 (2022-11-12)"},
    {"List-Id", "Friends of mail <friends.example.org>"},
    {"List-Unsubscribe", "<https://lists.example.org/u/123>, <mailto:leave@example.org>"},
    {"X-Priority", "3"},
    {"X-Originating-IP", "[192.0.2.77]"},
};

#define HEADER_FIELDS (sizeof header_fields / sizeof header_fields[0])

static void
header_of(long number, char name[32], const char **value)
{
    if ((size_t)number < HEADER_FIELDS) {
        snprintf(name, 32, "%s", header_fields[number][0]);
        *value = header_fields[number][1];
    }
    else {
        snprintf(name, 32, "X-Filler-%ld", number);
        *value = "a header that says no more than that it is one more";
    }
}

/* A piece of the body, which is one line again and again. */
static void
fill_body(uint8_t *data, size_t length, size_t offset)
{
    static const char line[] = "It is a truth universally acknowledged, that a single man in "
                               "possession\r\n";
    const size_t size = sizeof line - 1;

    for (size_t i = 0; i < length; i++) {
        data[i] = (uint8_t)line[(offset + i) % size];
    }
}

static void
print_message(void)
{
    uint8_t *body = allocate(NULL, (size_t)options.body + 1);
    char name[32];
    const char *value;

    for (long i = 0; i < options.headers; i++) {
        header_of(i, name, &value);
        printf("%s: %s\r\n", name, value);
    }
    fputs("\r\n", stdout);
    fill_body(body, (size_t)options.body, 0);
    fwrite(body, 1, (size_t)options.body, stdout);
    free(body);
}

/* --- scripts ---------------------------------------------------------------------------------- */

/* The bits with which a filter declines a step, and its right to answer it. */
static const struct {
    char command;
    uint32_t unwanted;
    uint32_t unanswered;
} agreements[] = {
    {SMFIC_CONNECT, SMFIP_NOCONNECT, SMFIP_NR_CONN}, {SMFIC_HELO, SMFIP_NOHELO, SMFIP_NR_HELO},
    {SMFIC_MAIL, SMFIP_NOMAIL, SMFIP_NR_MAIL},       {SMFIC_RCPT, SMFIP_NORCPT, SMFIP_NR_RCPT},
    {SMFIC_DATA, SMFIP_NODATA, SMFIP_NR_DATA},       {SMFIC_HEADER, SMFIP_NOHDRS, SMFIP_NR_HDR},
    {SMFIC_EOH, SMFIP_NOEOH, SMFIP_NR_EOH},          {SMFIC_BODY, SMFIP_NOBODY, SMFIP_NR_BODY},
};

/* Append a step, unless the filter does not want it. */
static void
add_step(struct script *script, char command, struct packet *packet, size_t id_at)
{
    struct step step = {.command = command, .replied = true, .id_at = {id_at, 0}};

    step.packet = packet->data;
    step.length = packet->length;
    for (size_t i = 0; i < sizeof agreements / sizeof agreements[0]; i++) {
        if (agreements[i].command == command) {
            if (script->agreed & agreements[i].unwanted) {
                free(packet->data);
                return;
            }
            step.replied = !(script->agreed & agreements[i].unanswered);
        }
    }
    script->steps = allocate(script->steps, (script->count + 1) * sizeof step);
    script->steps[script->count++] = step;
}

static void
add_connect(struct script *script)
{
    static const char *const macros[] = {
        "j",
        "mail.example.org",
        "{daemon_name}",
        "mail.example.org",
        "{daemon_addr}",
        "192.0.2.1",
        "v",
        "Postfix 3.7.11",
        "_",
        "mx2.example.com [192.0.2.25]",
        NULL,
    };
    uint16_t port = htons(40025);
    struct packet packet = {0};

    put_macros(&packet, SMFIC_CONNECT, macros);
    begin_command(&packet, SMFIC_CONNECT);
    put_text(&packet, "mx2.example.com");
    put(&packet, "4", 1);
    put(&packet, &port, sizeof port);
    put_text(&packet, "192.0.2.25");
    end_command(&packet);
    add_step(script, SMFIC_CONNECT, &packet, 0);
}

static void
add_helo(struct script *script)
{
    struct packet packet = {0};

    begin_command(&packet, SMFIC_HELO);
    put_text(&packet, "mx2.example.com");
    end_command(&packet);
    add_step(script, SMFIC_HELO, &packet, 0);
}

static void
add_mail(struct script *script)
{
    static const char *const macros[] = {
        "{mail_addr}",
        "alice@example.com",
        "{mail_host}",
        "mx.example.com",
        "{mail_mailer}",
        "smtp",
        NULL,
    };
    struct packet packet = {0};

    put_macros(&packet, SMFIC_MAIL, macros);
    begin_command(&packet, SMFIC_MAIL);
    put_text(&packet, "<alice@example.com>");
    put_text(&packet, "SIZE=12345");
    put_text(&packet, "BODY=8BITMIME");
    end_command(&packet);
    add_step(script, SMFIC_MAIL, &packet, 0);
}

static void
add_recipient(struct script *script, long number)
{
    char address[48], bracketed[52];
    /* Postfix has a queue ID once it has a recipient. */
    const char *const macros[] = {
        "{rcpt_addr}",           address, "{rcpt_host}", "example.org", "{rcpt_mailer}", "local",
        number > 0 ? "i" : NULL, no_id,   NULL,
    };
    struct packet packet = {0};
    size_t id_at;

    snprintf(address, sizeof address, "user%ld@example.org", number);
    snprintf(bracketed, sizeof bracketed, "<%s>", address);
    id_at = put_macros(&packet, SMFIC_RCPT, macros);
    begin_command(&packet, SMFIC_RCPT);
    put_text(&packet, bracketed);
    end_command(&packet);
    add_step(script, SMFIC_RCPT, &packet, id_at);
}

/* A command without arguments, which comes with the queue ID. */
static void
add_bare(struct script *script, char command)
{
    static const char *const macros[] = {"i", no_id, NULL};
    struct packet packet = {0};
    size_t id_at = put_macros(&packet, command, macros);

    begin_command(&packet, command);
    end_command(&packet);
    add_step(script, command, &packet, id_at);
}

static void
add_header(struct script *script, long number)
{
    struct packet packet = {0};
    char name[32];
    const char *value;

    header_of(number, name, &value);
    begin_command(&packet, SMFIC_HEADER);
    put_text(&packet, name);
    if (script->agreed & SMFIP_HDR_LEADSPC) {
        put(&packet, " ", 1);
    }
    put_text(&packet, value);
    end_command(&packet);
    add_step(script, SMFIC_HEADER, &packet, 0);
}

static void
add_body(struct script *script)
{
    for (long offset = 0; offset < options.body; offset += options.chunk) {
        long left = options.body - offset;
        size_t size = (size_t)(left < options.chunk ? left : options.chunk);
        uint8_t *piece = allocate(NULL, size);
        struct packet packet = {0};

        fill_body(piece, size, (size_t)offset);
        begin_command(&packet, SMFIC_BODY);
        put(&packet, piece, size);
        end_command(&packet);
        free(piece);
        add_step(script, SMFIC_BODY, &packet, 0);
    }
}

/* The script for what was agreed, made when it is first needed; NULL: too many of them. */
static const struct script *
script_for(uint32_t agreed)
{
    struct script *script;

    for (size_t i = 0; i < script_count; i++) {
        if (scripts[i].agreed == agreed) {
            return &scripts[i];
        }
    }
    if (script_count == MAX_SCRIPTS) {
        return NULL;
    }
    script = &scripts[script_count++];
    script->agreed = agreed;
    add_connect(script);
    add_helo(script);
    script->message = script->count;
    add_mail(script);
    for (long i = 0; i < options.recipients; i++) {
        add_recipient(script, i);
    }
    add_bare(script, SMFIC_DATA);
    for (long i = 0; i < options.headers; i++) {
        add_header(script, i);
    }
    add_bare(script, SMFIC_EOH);
    add_body(script);
    add_bare(script, SMFIC_BODYEOB);
    return script;
}

/* --- sockets ---------------------------------------------------------------------------------- */

static struct sockaddr_storage peer;
static socklen_t peer_length;

static void
parse_unix(const char *path)
{
    struct sockaddr_un *address = (struct sockaddr_un *)&peer;

    if (strlen(path) >= sizeof address->sun_path) {
        die("--socket: path too long: %s", path);
    }
    address->sun_family = AF_UNIX;
    strcpy(address->sun_path, path);
    peer_length = sizeof *address;
}

static void
parse_inet(const char *text, int family)
{
    struct addrinfo hints = {.ai_family = family, .ai_socktype = SOCK_STREAM}, *found;
    char port[16];
    const char *at = strchr(text, '@');
    int failed;

    if (at == NULL || (size_t)(at - text) >= sizeof port) {
        die("--socket: not port@host: %s", text);
    }
    snprintf(port, sizeof port, "%.*s", (int)(at - text), text);
    failed = getaddrinfo(at + 1, port, &hints, &found);
    if (failed) {
        die("--socket %s: %s", text, gai_strerror(failed));
    }
    memcpy(&peer, found->ai_addr, found->ai_addrlen);
    peer_length = found->ai_addrlen;
    freeaddrinfo(found);
}

static void
parse_socket(const char *text)
{
    const char *colon = strchr(text, ':');

    if (strncmp(text, "unix:", 5) == 0 || strncmp(text, "local:", 6) == 0) {
        parse_unix(colon + 1);
    }
    else if (strncmp(text, "inet:", 5) == 0) {
        parse_inet(colon + 1, AF_INET);
    }
    else if (strncmp(text, "inet6:", 6) == 0) {
        parse_inet(colon + 1, AF_INET6);
    }
    else if (*text == '/') {
        parse_unix(text);
    }
    else {
        die("--socket: neither unix:/path nor inet:port@host: %s", text);
    }
}

/* A connected socket, -1 with errno.  A filter that is behind with accepting is waited for. */
static int
open_socket(void)
{
    struct timeval patience = {.tv_sec = (time_t)options.timeout + 1};
    int fd = socket(peer.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (connect(fd, (struct sockaddr *)&peer, peer_length) != 0 ||
        fcntl(fd, F_SETFL, O_NONBLOCK) != 0) {
        int reason = errno;

        close(fd);
        errno = reason;
        return -1;
    }
    return fd;
}

/* --- a connection ----------------------------------------------------------------------------- */

static const char *
command_name(char command)
{
    static const struct {
        char command;
        const char *name;
    } names[] = {
        {SMFIC_OPTNEG, "negotiation"}, {SMFIC_CONNECT, "connect"},
        {SMFIC_HELO, "HELO"},          {SMFIC_MAIL, "MAIL"},
        {SMFIC_RCPT, "RCPT"},          {SMFIC_DATA, "DATA"},
        {SMFIC_HEADER, "header"},      {SMFIC_EOH, "end of headers"},
        {SMFIC_BODY, "body"},          {SMFIC_BODYEOB, "end of message"},
    };

    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (names[i].command == command) {
            return names[i].name;
        }
    }
    return "quit";
}

static const char *
stage_of(const struct connection *connection)
{
    switch (connection->phase) {
    case NEGOTIATING:
        return "negotiation";
    case TALKING:
        return command_name(connection->script->steps[connection->at].command);
    case IDLING:
        return "idle";
    default:
        return "quit";
    }
}

static void
hang_up(struct connection *connection)
{
    if (connection->fd >= 0) {
        close(connection->fd);
        connection->fd = -1;
    }
    if (connection->phase == IDLING) {
        idling--;
    }
    connection->phase = GONE;
    living--;
}

/* Note what the filter did wrong; the connection ends and is not replaced. */
static void
fail(struct connection *connection, const char *format, ...)
{
    va_list arguments;

    if (result.errors++ == 0) {
        int length = snprintf(result.error, sizeof result.error, "%s: ", stage_of(connection));

        va_start(arguments, format);
        vsnprintf(result.error + length, sizeof result.error - (size_t)length, format, arguments);
        va_end(arguments);
    }
    hang_up(connection);
}

static void
watch(struct connection *connection, int operation, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = connection};

    if (epoll_ctl(poller, operation, connection->fd, &event) != 0) {
        die("epoll: %s", strerror(errno));
    }
}

/* Send what is pending.  False where the socket is full, or the connection has failed. */
static bool
flush(struct connection *connection)
{
    while (connection->left > 0) {
        ssize_t sent = send(connection->fd, connection->data, connection->left, MSG_NOSIGNAL);

        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            if (!connection->blocked) {
                connection->blocked = true;
                watch(connection, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            }
            return false;
        }
        if (sent < 0) {
            fail(connection, "sending: %s", strerror(errno));
            return false;
        }
        connection->data += sent;
        connection->left -= (size_t)sent;
    }
    connection->batched = 0;
    if (connection->blocked) {
        connection->blocked = false;
        watch(connection, EPOLL_CTL_MOD, EPOLLIN);
    }
    return true;
}

/* Copy a packet behind those that are pending already. */
static void
add_to_batch(struct connection *connection, const uint8_t *packet, size_t length)
{
    if (connection->batch == NULL) {
        connection->batch = allocate(NULL, BATCH + COPIED);
    }
    if (connection->left == 0) {
        connection->batched = 0;
        connection->data = connection->batch;
    }
    memcpy(connection->batch + connection->batched, packet, length);
    connection->batched += length;
    connection->left += length;
}

/* Make a step's packet pending.  False where what is pending has to be sent first. */
static bool
enqueue(struct connection *connection, const struct step *step)
{
    if (step->length > COPIED) {
        if (connection->left > 0) {
            return false;
        }
        connection->data = step->packet;
        connection->left = step->length;
        return true;
    }
    if (connection->left > 0 && (connection->batched == 0 || connection->batched > BATCH)) {
        return false;
    }
    add_to_batch(connection, step->packet, step->length);
    if (step->id_at[0]) {
        char id[ID_LENGTH + 1];

        snprintf(id, sizeof id, "4%03lX%08lX", (unsigned long)(connection - connections) & 0xfff,
                 (unsigned long)connection->messages & 0xffffffff);
        memcpy(connection->batch + connection->batched - step->length + step->id_at[0], id,
               ID_LENGTH);
    }
    return true;
}

/* Say the next steps, up to one that has to be answered, or until the socket is full. */
static void
talk(struct connection *connection)
{
    while (connection->phase == TALKING && !connection->awaiting) {
        const struct script *script = connection->script;
        const struct step *step = &script->steps[connection->at];

        if (connection->idle && connection->at == script->message) {
            connection->phase = IDLING;
            idling++;
            break;
        }
        if (!enqueue(connection, step)) {
            if (!flush(connection)) {
                return;
            }
            continue;
        }
        if (connection->at == script->message) {
            connection->began = monotonic();
        }
        connection->awaiting = step->replied;
        if (!step->replied) {
            if (result.counting) {
                result.replies++;
                result.steps += connection->at >= script->message;
            }
            connection->at++;
        }
    }
    flush(connection);
}

static void
say_quit(struct connection *connection)
{
    struct packet packet = {0};

    begin_command(&packet, SMFIC_QUIT);
    end_command(&packet);
    if (connection->phase == IDLING) {
        idling--;
    }
    connection->phase = LEAVING;
    connection->awaiting = false;
    add_to_batch(connection, packet.data, packet.length);
    free(packet.data);
    flush(connection);
}

static void
begin_session(struct connection *connection)
{
    struct packet packet = {0};
    const uint32_t offer[] = {htonl(VERSION), htonl(ALL_ACTIONS), htonl(ALL_STEPS)};

    connection->phase = NEGOTIATING;
    connection->received = connection->left = connection->at = 0;
    connection->messages = 0;
    connection->added = 0;
    connection->blocked = false;
    connection->awaiting = true;
    connection->moved = monotonic();
    connection->fd = open_socket();
    if (connection->fd < 0) {
        fail(connection, "connecting: %s", strerror(errno));
        return;
    }
    result.sessions++;
    watch(connection, EPOLL_CTL_ADD, EPOLLIN);
    begin_command(&packet, SMFIC_OPTNEG);
    put(&packet, offer, sizeof offer);
    end_command(&packet);
    add_to_batch(connection, packet.data, packet.length);
    free(packet.data);
    flush(connection);
}

static void
end_session(struct connection *connection)
{
    if (connection->received > 0) {
        fail(connection, "the filter hung up in the middle of a packet");
        return;
    }
    if (connection->phase != LEAVING) {
        fail(connection, "the filter hung up");
        return;
    }
    if (result.stopping) {
        hang_up(connection);
        return;
    }
    close(connection->fd);
    begin_session(connection);
}

/* --- what the filter says --------------------------------------------------------------------- */

static void
note_latency(long long nanoseconds)
{
    if (result.latency_count == result.latency_room) {
        result.latency_room = result.latency_room ? result.latency_room * 2 : 4096;
        result.latencies =
            allocate(result.latencies, result.latency_room * sizeof *result.latencies);
    }
    result.latencies[result.latency_count++] = (uint32_t)(nanoseconds / 1000);
}

static void
end_message(struct connection *connection)
{
    int due = *options.field != '\0';

    if (connection->added != due) {
        fail(connection, "%d headers added instead of %d", connection->added, due);
        return;
    }
    connection->added = 0;
    connection->messages++;
    result.messages++;
    if (result.counting) {
        result.completed++;
        connection->served++;
    }
    /* Those that the window's end found under way are among them: they may have waited longest. */
    if (result.counting || result.measured) {
        note_latency(monotonic() - connection->began);
    }
    if (result.stopping || connection->messages == options.per_connection) {
        say_quit(connection);
    }
    else {
        connection->at = connection->script->message;
    }
}

static void
agree(struct connection *connection, char command, const uint8_t *data, size_t length)
{
    uint32_t version, actions, agreed;

    if (command != SMFIC_OPTNEG || length < MILTER_OPTLEN) {
        fail(connection, "answered with '%c' and %zu bytes", command, length);
        return;
    }
    memcpy(&version, data, 4);
    memcpy(&actions, data + 4, 4);
    memcpy(&agreed, data + 8, 4);
    version = ntohl(version);
    actions = ntohl(actions);
    agreed = ntohl(agreed);
    if (version < 2 || version > VERSION || actions & ~ALL_ACTIONS || agreed & ~ALL_STEPS) {
        fail(connection, "asked for version %u, actions %#x, steps %#x", version, actions, agreed);
        return;
    }
    if (*options.field != '\0' && !(actions & ADDHDRS)) {
        fail(connection, "the filter does not ask for the right to add headers");
        return;
    }
    connection->script = script_for(agreed);
    if (connection->script == NULL) {
        fail(connection, "the filter never asks for the same steps (now %#x)", agreed);
        return;
    }
    connection->phase = TALKING;
    connection->awaiting = false;
}

/* A header that the filter adds: it must be the one that is expected. */
static void
check_added(struct connection *connection, const uint8_t *data, size_t length)
{
    size_t name = strlen(options.field) + 1, value = strlen(options.value) + 1;

    if (length != name + value || memcmp(data, options.field, name) != 0 ||
        memcmp(data + name, options.value, value) != 0) {
        fail(connection, "added %.60s: %.200s instead of %.60s: %.100s", (const char *)data,
             length > strlen((const char *)data) + 1
                 ? (const char *)data + strlen((const char *)data) + 1
                 : "",
             options.field, options.value);
        return;
    }
    connection->added++;
}

/* Leave out what is left of a message's headers, recipients or body chunks. */
static void
skip(struct connection *connection, char command)
{
    const struct script *script = connection->script;

    while (script->steps[connection->at + 1].command == command) {
        connection->at++;
    }
}

static void
take_reply(struct connection *connection, char reply, const uint8_t *data, size_t length)
{
    const struct step *step = &connection->script->steps[connection->at];
    char command = step->command;
    char due = command == SMFIC_BODYEOB ? options.verdict : SMFIR_CONTINUE;

    if (command == SMFIC_BODYEOB && reply == SMFIR_ADDHEADER) {
        check_added(connection, data, length);
        return;
    }
    if (reply == SMFIR_SKIP && connection->script->agreed & SMFIP_SKIP &&
        (command == SMFIC_BODY || command == SMFIC_HEADER || command == SMFIC_RCPT)) {
        skip(connection, command);
        reply = due;
    }
    if (reply != due) {
        fail(connection, "answered with '%c' instead of '%c'", reply, due);
        return;
    }
    connection->awaiting = false;
    if (result.counting) {
        result.replies++;
        result.steps += connection->at >= connection->script->message;
    }
    connection->at++;
    if (command == SMFIC_BODYEOB) {
        /* Where it failed, the step is still named. */
        connection->at--;
        end_message(connection);
    }
}

static void
take_packet(struct connection *connection, char command, const uint8_t *data, size_t length)
{
    if (!connection->awaiting) {
        fail(connection, "the filter said '%c' unasked", command);
    }
    else if (connection->phase == NEGOTIATING) {
        agree(connection, command, data, length);
    }
    else if (command != SMFIR_PROGRESS) {
        take_reply(connection, command, data, length);
    }
}

/* Go through the packets that have arrived; an unfinished one is kept. */
static void
take_packets(struct connection *connection)
{
    size_t at = 0;

    while (connection->phase != GONE && connection->received - at >= LENGTH_BYTES) {
        size_t length = read_length(connection->in + at);

        if (length == 0 || length > MAX_REPLY - LENGTH_BYTES - 1) {
            fail(connection, "a packet of %zu bytes", length);
            return;
        }
        if (connection->received - at - LENGTH_BYTES < length) {
            break;
        }
        at += LENGTH_BYTES;
        take_packet(connection, (char)connection->in[at], connection->in + at + 1, length - 1);
        at += length;
    }
    connection->received -= at;
    memmove(connection->in, connection->in + at, connection->received);
}

static void
receive(struct connection *connection)
{
    /* The last byte stays free, so that texts end in a NUL. */
    ssize_t length = recv(connection->fd, connection->in + connection->received,
                          MAX_REPLY - 1 - connection->received, 0);

    if (length < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (length < 0) {
        fail(connection, "receiving: %s", strerror(errno));
        return;
    }
    if (length == 0) {
        end_session(connection);
        return;
    }
    connection->received += (size_t)length;
    connection->in[connection->received] = '\0';
    take_packets(connection);
    if (connection->phase == TALKING) {
        talk(connection);
    }
}

/* --- the loop --------------------------------------------------------------------------------- */

static void
handle(const struct epoll_event *event)
{
    struct connection *connection = event->data.ptr;

    /* One that has failed on the way here. */
    if (connection->fd < 0) {
        return;
    }
    connection->moved = monotonic();
    if (event->events & EPOLLOUT && flush(connection) && connection->phase == TALKING) {
        talk(connection);
    }
    if (connection->fd >= 0 && event->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        receive(connection);
    }
}

static void
look_for_stalled(long long now)
{
    static long long looked;
    const long long patience = (long long)(options.timeout * NANO);

    if (now - looked < TICK) {
        return;
    }
    looked = now;
    for (long i = 0; i < options.connections + options.idle; i++) {
        struct connection *connection = &connections[i];

        if (connection->fd >= 0 && connection->phase != IDLING &&
            now - connection->moved > patience) {
            fail(connection, "no answer in %g s", options.timeout);
        }
    }
}

/* Serve the connections until a moment, or until there is nothing left to do. */
static void
serve(long long until, bool (*done)(void))
{
    struct epoll_event events[MAX_EVENTS];
    long long now;

    while (!done() && (now = monotonic()) < until) {
        long long left = until - now < TICK ? until - now : TICK;
        int count = epoll_wait(poller, events, MAX_EVENTS, (int)((left + 999999) / 1000000));

        if (count < 0 && errno != EINTR) {
            die("epoll: %s", strerror(errno));
        }
        for (int i = 0; i < count; i++) {
            handle(&events[i]);
        }
        look_for_stalled(monotonic());
    }
}

static bool
all_gone(void)
{
    return living == 0;
}

static bool
all_idling(void)
{
    return idling == living;
}

static bool
released(void)
{
    char byte;

    return all_gone() || read(STDIN_FILENO, &byte, 1) == 0;
}

static long long
in_seconds(double seconds)
{
    return monotonic() + (long long)(seconds * NANO);
}

/*
 * All connections get as far as HELO before the first message begins: under load, libmilter may
 * leave a new connection unserved for seconds, and the load would be another one than is said.
 * One begins after the other, as each process of an MTA does by itself: what takes turns in
 * accepting them is not to see a burst that comes from one loop.
 */
static void
open_connections(void)
{
    long all = options.connections + options.idle;
    long long until = in_seconds(options.timeout);

    for (long i = 0; i < all; i++) {
        connections[i].idle = true;
        living++;
        begin_session(&connections[i]);
        serve(until, all_idling);
    }
    if (idling < living && result.errors++ == 0) {
        snprintf(result.error, sizeof result.error, "%ld connections do not get past HELO",
                 living - idling);
    }
}

static void
begin_message(struct connection *connection)
{
    connection->idle = false;
    if (connection->phase == IDLING) {
        idling--;
        connection->phase = TALKING;
        connection->moved = monotonic();
        talk(connection);
    }
}

/*
 * One connection after the other begins, spread over the first half of the warm-up: where all of
 * them begin at the same moment, libmilter makes too few threads, and may stay with them.
 */
static void
begin_messages(void)
{
    long long begun = monotonic();
    double step = options.warmup / 2 / (double)options.connections * NANO;

    for (long i = 0; i < options.connections; i++) {
        begin_message(&connections[i]);
        serve(begun + (long long)(step * (double)(i + 1)), all_gone);
    }
}

/* Without a load, idle connections stay until standard input ends, or for --duration. */
static void
hold(void)
{
    printf("{\"idling\": %ld}\n", idling);
    fflush(stdout);
    fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
    result.began = monotonic();
    serve(in_seconds(options.duration), released);
    result.ended = monotonic();
}

static void
measure(void)
{
    begin_messages();
    serve(in_seconds(options.warmup / 2), all_gone);
    result.filter_cpu = -filter_time();
    result.machine_cpu = -machine_time();
    result.own_cpu = -clock_time(CLOCK_PROCESS_CPUTIME_ID);
    result.began = monotonic();
    result.counting = true;
    serve(in_seconds(options.duration), all_gone);
    result.counting = false;
    result.measured = true;
    result.ended = monotonic();
    result.own_cpu += clock_time(CLOCK_PROCESS_CPUTIME_ID);
    result.filter_cpu += filter_time();
    result.machine_cpu += machine_time();
}

/* Messages that are under way are finished, and the filter must let go of each connection. */
static void
finish(void)
{
    result.stopping = true;
    for (long i = 0; i < options.connections + options.idle; i++) {
        if (connections[i].phase == IDLING) {
            say_quit(&connections[i]);
        }
    }
    serve(in_seconds(options.timeout + 1), all_gone);
    if (living > 0 && result.errors++ == 0) {
        snprintf(result.error, sizeof result.error, "%ld connections do not end", living);
    }
}

/* --- the report ------------------------------------------------------------------------------- */

static int
compare(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

    return (a > b) - (a < b);
}

static unsigned
percentile(double share)
{
    size_t index = (size_t)(share * (double)result.latency_count);

    if (result.latency_count == 0) {
        return 0;
    }
    return result.latencies[index < result.latency_count ? index : result.latency_count - 1];
}

static void
print_text(const char *text)
{
    putchar('"');
    for (; *text != '\0'; text++) {
        unsigned char byte = (unsigned char)*text;

        if (byte == '"' || byte == '\\') {
            printf("\\%c", byte);
        }
        else if (byte < 0x20 || byte >= 0x7f) {
            printf("\\u%04x", byte);
        }
        else {
            putchar(byte);
        }
    }
    putchar('"');
}

/* How unequal connections were treated: the messages of the one that got the least and the most. */
static void
print_fairness(void)
{
    long least = options.connections > 0 ? connections[0].served : 0, most = least;

    for (long i = 1; i < options.connections; i++) {
        long served = connections[i].served;

        least = served < least ? served : least;
        most = served > most ? served : most;
    }
    printf("\"least\": %ld, \"most\": %ld, ", least, most);
}

static void
report(void)
{
    double seconds = (double)(result.ended - result.began) / NANO;
    const struct script *script = &scripts[0];
    size_t steps = script->count - script->message;
    double rate =
        steps && options.connections ? (double)result.steps / (double)steps / seconds : 0.0;

    if (result.latency_count > 0) {
        qsort(result.latencies, result.latency_count, sizeof *result.latencies, compare);
    }
    printf("{\"connections\": %ld, \"idle\": %ld, \"seconds\": %.6f, ", options.connections,
           options.idle, seconds);
    printf("\"completed\": %llu, \"messages\": %llu, \"sessions\": %llu, ", result.completed,
           result.messages, result.sessions);
    /* By steps, as few messages fit into a short window where each takes long. */
    printf("\"rate\": %.3f, \"callbacks\": %llu, \"steps\": %zu, ", rate, result.replies, steps);
    printf("\"filter_cpu\": %.6f, \"own_cpu\": %.6f, \"own_share\": %.4f, ",
           (double)result.filter_cpu / NANO, (double)result.own_cpu / NANO,
           (double)result.own_cpu / NANO / seconds);
    printf("\"foreign_share\": %.4f, ",
           (double)(result.machine_cpu - result.filter_cpu - result.own_cpu) / NANO / seconds);
    print_fairness();
    printf("\"p50\": %u, \"p99\": %u, \"max\": %u, ", percentile(0.5), percentile(0.99),
           percentile(1.0));
    printf("\"errors\": %lu, \"error\": ", result.errors);
    print_text(result.error);
    printf("}\n");
}

/* --- the command line ------------------------------------------------------------------------- */

static const char usage[] =
    "usage: load --socket unix:/PATH | inet:PORT@HOST [OPTION...]\n"
    "\n"
    "  --connections N     at a time (1)\n"
    "  --idle N            further connections that stay idle after HELO (0); with --connections "
    "0\n"
    "                      they stay until standard input ends, for --duration seconds at most\n"
    "  --per-connection N  messages before a connection is replaced by a new one (0: it stays)\n"
    "  --headers N         in a message (20)\n"
    "  --recipients N      of a message (3)\n"
    "  --body BYTES        of a message (10240)\n"
    "  --chunk BYTES       of the body in one command (65535)\n"
    "  --warmup SECONDS    before the window (0.3)\n"
    "  --duration SECONDS  of the window (1)\n"
    "  --timeout SECONDS   for each answer (30)\n"
    "  --field NAME        of the header that the filter must add; empty: it must add none\n"
    "  --value TEXT        of that header\n"
    "  --verdict LETTER    that a message must get, as on the wire (c)\n"
    "  --pid PID,...       the filter's processes, whose CPU time is counted\n"
    "  --print-message     print the message and do nothing else\n";

static long
number(const char *name, const char *text, long least, long most)
{
    char *end;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    if (errno || end == text || *end != '\0' || value < least || value > most) {
        die("--%s %s: not a number from %ld to %ld", name, text, least, most);
    }
    return value;
}

static double
seconds(const char *name, const char *text)
{
    char *end;
    double value = strtod(text, &end);

    if (end == text || *end != '\0' || !(value >= 0.0 && value <= 3600.0)) {
        die("--%s %s: not a number of seconds from 0 to 3600", name, text);
    }
    return value;
}

static void
parse_processes(const char *text)
{
    char *copy = strdup(text), *rest = copy, *item;

    while (copy != NULL && (item = strsep(&rest, ",")) != NULL) {
        if (options.process_count == MAX_PROCESSES) {
            die("--pid: more than %d processes", MAX_PROCESSES);
        }
        options.processes[options.process_count++] = (pid_t)number("pid", item, 1, INT32_MAX);
    }
    free(copy);
}

static const struct option known[] = {
    {"socket", required_argument, NULL, 's'},  {"connections", required_argument, NULL, 'c'},
    {"idle", required_argument, NULL, 'i'},    {"per-connection", required_argument, NULL, 'k'},
    {"headers", required_argument, NULL, 'h'}, {"recipients", required_argument, NULL, 'r'},
    {"body", required_argument, NULL, 'b'},    {"chunk", required_argument, NULL, 'u'},
    {"warmup", required_argument, NULL, 'w'},  {"duration", required_argument, NULL, 'd'},
    {"timeout", required_argument, NULL, 't'}, {"field", required_argument, NULL, 'f'},
    {"value", required_argument, NULL, 'v'},   {"verdict", required_argument, NULL, 'e'},
    {"pid", required_argument, NULL, 'p'},     {"print-message", no_argument, NULL, 'm'},
    {"help", no_argument, NULL, '?'},          {NULL, 0, NULL, 0},
};

static void
set_number(int letter, const char *name, const char *text)
{
    static const struct {
        int letter;
        long *target, least, most;
    } numbers[] = {
        {'c', &options.connections, 0, 100000},        {'i', &options.idle, 0, 100000},
        {'k', &options.per_connection, 0, 1000000000}, {'h', &options.headers, 0, 10000},
        {'r', &options.recipients, 1, 10000},          {'b', &options.body, 0, 1L << 30},
        {'u', &options.chunk, 1, MILTER_CHUNK_SIZE},
    };

    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (numbers[i].letter == letter) {
            *numbers[i].target = number(name, text, numbers[i].least, numbers[i].most);
        }
    }
}

static void
set_option(int letter, const char *name, const char *text)
{
    switch (letter) {
    case 's':
        options.socket = text;
        break;
    case 'w':
        options.warmup = seconds(name, text);
        break;
    case 'd':
        options.duration = seconds(name, text);
        break;
    case 't':
        options.timeout = seconds(name, text);
        break;
    case 'f':
        options.field = text;
        break;
    case 'v':
        options.value = text;
        break;
    case 'e':
        options.verdict = *text;
        break;
    case 'p':
        parse_processes(text);
        break;
    case 'm':
        options.print_message = true;
        break;
    default:
        set_number(letter, name, text);
    }
}

static void
parse_options(int count, char **arguments)
{
    int letter, index = 0;

    while ((letter = getopt_long(count, arguments, "", known, &index)) != -1) {
        if (letter == '?') {
            fputs(usage, stderr);
            exit(2);
        }
        set_option(letter, known[index].name, optarg);
    }
    if (optind < count) {
        die("unknown argument: %s", arguments[optind]);
    }
    if (options.socket == NULL && !options.print_message) {
        die("--socket is needed (see --help)");
    }
}

static void
allow_many_files(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int
main(int count, char **arguments)
{
    size_t all;

    parse_options(count, arguments);
    if (options.print_message) {
        print_message();
        return 0;
    }
    parse_socket(options.socket);
    allow_many_files();
    all = (size_t)(options.connections + options.idle);
    connections = calloc(all + 1, sizeof *connections);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (connections == NULL || poller < 0) {
        die("starting: %s", strerror(errno));
    }
    for (size_t i = 0; i < all; i++) {
        connections[i].fd = -1;
        connections[i].phase = GONE;
    }
    open_connections();
    if (options.connections > 0) {
        measure();
    }
    else {
        hold();
    }
    finish();
    report();
    return result.errors > 0;
}
