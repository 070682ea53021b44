/* wire SOCKET [OPTION...]: hostile conversations with a milter, each made from a seed.
 *
 * Plays the MTA against fuzz/wire_filter.py, which does what the packets tell it: the last byte
 * of an argument is the verdict to return.  So the answer to every packet is known beforehand,
 * from a model of libmilter's state machine (which commands it takes in which state, which it
 * passes over in silence, which bits keep replies back) and of the module's rules for verdicts.
 *
 *     well-formed   packets as an MTA frames them, with any bytes in them, in any order, cut
 *                   anywhere on their way: each answer has to be the expected one
 *     malformed     damaged packets, absurd lengths, unknown commands: the filter has to live;
 *                   every 16th conversation is an honest one and has to be served
 *
 * Conversation N of seed S is always the same, so one that fails can be had alone:
 * --first N --conversations 1 --trace.
 *
 * What libmilter itself does wrong (see SECURITY.md) is part of the model, or is left out where
 * it ends the process; --with-known-faults sends that too.  --native: the filter runs on our own
 * engine, which differs as docs/internals.md declares.
 *
 * --orderly: well-formed ones in the order of an MTA, with aborts, further sessions and unknown
 * commands where an MTA may send them.
 *
 * --answers FILE writes a line for each conversation, for fuzz/differential.py: its number, how it
 * went (w well-formed, g the same and gone in the middle, m malformed, u left without reading all,
 * s with an end of message that libmilter does not see, e to where our own engine ends it as
 * declared), and a hash for each packet that came,
 * which goes over that packet and all before it.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "../benchmarks/packets.h"

enum { MAX_PACKET = 70000, MAX_OUT = 400000, MAX_FINDINGS = 20, MAX_HASHES = 4000 };

static struct {
    const char *socket;
    uint64_t seed;
    long first, conversations;
    int threads, timeout;
    double malformed; /* share of the conversations */
    bool bare;        /* the filter has no objects: see wire_filter.py */
    bool trace, known_faults;
    bool orderly; /* what an MTA sends, and aborts */
    bool native;  /* the filter is on our own engine */
    FILE *answers;
} options = {.conversations = 1000, .threads = 4, .timeout = 30};

static atomic_long next_conversation, done, packets, known_doubled, known_silent, refused;
static atomic_int findings;
static atomic_bool give_up;
static pthread_mutex_t print_lock = PTHREAD_MUTEX_INITIALIZER;

/* ----------------------------------------------------------------- protocol */

enum state {
    INIT,
    OPTS,
    CONN,
    HELO,
    MAIL,
    RCPT,
    DATA,
    HDRS,
    EOHS,
    BODY,
    ENDM,
    QUIT,
    ABRT,
    UNKN,
    Q_NC,
    STATES,
    IMPOSSIBLE = -1
};

#define TO(state) (1U << (state))

/* The transitions that libmilter allows. */
static const unsigned transitions[STATES] = {
    [INIT] = TO(OPTS),
    [OPTS] = TO(CONN) | TO(UNKN),
    [CONN] = TO(HELO) | TO(MAIL) | TO(UNKN),
    [HELO] = TO(HELO) | TO(MAIL) | TO(UNKN),
    [MAIL] = TO(RCPT) | TO(ABRT) | TO(UNKN),
    [RCPT] = TO(HDRS) | TO(EOHS) | TO(DATA) | TO(BODY) | TO(ENDM) | TO(RCPT) | TO(ABRT) | TO(UNKN),
    [DATA] = TO(EOHS) | TO(HDRS) | TO(ABRT),
    [HDRS] = TO(EOHS) | TO(HDRS) | TO(ABRT),
    [EOHS] = TO(BODY) | TO(ENDM) | TO(ABRT),
    [BODY] = TO(ENDM) | TO(BODY) | TO(ABRT),
    [ENDM] = TO(QUIT) | TO(MAIL) | TO(UNKN) | TO(Q_NC),
    [QUIT] = 0,
    [ABRT] = 0,
    [UNKN] = TO(HELO) | TO(MAIL) | TO(RCPT) | TO(ABRT) | TO(DATA) | TO(BODY) | TO(UNKN) | TO(QUIT) |
             TO(Q_NC),
    [Q_NC] = TO(CONN) | TO(UNKN),
};

#define ADDHDRS 0x01U
#define ALL_ACTIONS 0x1FFU
#define SKIP 0x400U
#define NR_BODY 0x80000U
#define NR_BITS 0xFF080U
#define FEATURES (SKIP | 0x800U | 0x100000U) /* SKIP, RCPT_REJ, HDR_LEADSPC */

#define SMTP_STATES (TO(CONN) | TO(HELO) | TO(MAIL) | TO(RCPT) | TO(ENDM))

static const unsigned no_reply_bit[STATES] = {
    [CONN] = 0x1000,  [HELO] = 0x2000, [MAIL] = 0x4000,  [RCPT] = 0x8000,  [DATA] = 0x10000,
    [UNKN] = 0x20000, [HDRS] = 0x80,   [EOHS] = 0x40000, [BODY] = NR_BODY,
};

static enum state
state_of(char command)
{
    switch (command) {
    case 'O':
        return OPTS;
    case 'C':
        return CONN;
    case 'H':
        return HELO;
    case 'M':
        return MAIL;
    case 'R':
        return RCPT;
    case 'T':
        return DATA;
    case 'L':
        return HDRS;
    case 'N':
        return EOHS;
    case 'B':
        return BODY;
    case 'E':
        return ENDM;
    case 'Q':
        return QUIT;
    case 'A':
        return ABRT;
    case 'U':
        return UNKN;
    case 'K':
        return Q_NC;
    default:
        return IMPOSSIBLE;
    }
}

static bool
in_message(enum state state)
{
    return state >= MAIL && state <= ENDM;
}

/* ------------------------------------------------------------- conversation */

enum debt { NO_DEBT, FOR_MESSAGE, FOR_CONNECTION };

typedef struct {
    long number;
    uint64_t random, random_cut; /* how it is cut depends on what the filter takes at a time */
    int fd;
    bool failed, over;

    enum state state;
    unsigned offered_actions, offered, wanted, actions;
    enum debt debt;
    enum state before_unknown;
    bool reconnected; /* after QUIT_NC the module may not know what was agreed */
    bool in_message;  /* as the module counts it */
    bool opened;      /* a context exists: something was called back */
    bool honest;
    int hostility;  /* percent of the verdicts that are not CONTINUE */
    int cut;        /* 0: packets whole, 1: pieces, 2: single bytes */
    char script[4]; /* verdicts of data, eoh, eom; whether abort raises */
    int actions_seen;

    char how;       /* it went: see --answers */
    bool deaf;      /* to what is not to be in the answers */
    uint64_t heard; /* hash of all packets that came */
    char hashes[MAX_HASHES * 9 + 1];
    size_t hashes_size;

    unsigned char out[MAX_OUT];
    size_t out_size;
    unsigned char in[MAX_PACKET];
    size_t in_size, in_used;
} Conversation;

static uint64_t
mix(uint64_t x)
{
    x += 0x9E3779B97F4A7C15U;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
}

static unsigned
number_below(uint64_t *random, unsigned limit)
{
    *random = mix(*random);
    return (unsigned)((*random >> 20) % limit);
}

static unsigned
below(Conversation *c, unsigned limit)
{
    return number_below(&c->random, limit);
}

static bool
chance(Conversation *c, unsigned percent)
{
    return below(c, 100) < percent;
}

/* Note a packet that came. */
static void
hear(Conversation *c, const unsigned char *packet, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        c->heard = (c->heard ^ packet[i]) * 0x100000001B3U;
    }
    c->heard = mix(c->heard ^ size);
    if (c->hashes_size < MAX_HASHES * 9) {
        c->hashes_size += (size_t)sprintf(c->hashes + c->hashes_size, " %08x", (unsigned)c->heard);
    }
}

static void
show(const char *way, const unsigned char *data, size_t size)
{
    size_t shown = size < 200 ? size : 200;

    fputs(way, stderr);
    for (size_t i = 0; i < shown; i++) {
        if (data[i] >= ' ' && data[i] < 127 && data[i] != '\\') {
            fputc(data[i], stderr);
        }
        else {
            fprintf(stderr, "\\x%02x", data[i]);
        }
    }
    fputs(shown < size ? "...\n" : "\n", stderr);
}

__attribute__((format(printf, 2, 3))) static void
finding(Conversation *c, const char *format, ...)
{
    char text[500];
    va_list arguments;

    if (c->failed) {
        return;
    }
    c->failed = true;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&print_lock);
    printf("FINDING: seed %llu, conversation %ld: %s\n", (unsigned long long)options.seed,
           c->number, text);
    fflush(stdout);
    pthread_mutex_unlock(&print_lock);
    if (atomic_fetch_add(&findings, 1) + 1 >= MAX_FINDINGS) {
        atomic_store(&give_up, true);
    }
}

static int
open_connection(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strncpy(address.sun_path, options.socket, sizeof address.sun_path - 1);
    for (int tries = 0; connect(fd, (struct sockaddr *)&address, sizeof address) != 0; tries++) {
        if ((errno != EAGAIN && errno != EINTR) || tries > 20000) {
            close(fd);
            return -1;
        }
        usleep(1000); /* the backlog is full */
    }
    return fd;
}

/* Read what there is, waiting for it.  False at the end, with a finding after the time-out. */
static bool
receive(Conversation *c)
{
    struct pollfd wait = {c->fd, POLLIN, 0};
    ssize_t got;
    int ready;

    do {
        ready = poll(&wait, 1, options.timeout * 1000);
    } while (ready < 0 && errno == EINTR);
    if (ready == 0) {
        finding(c, "no answer within %d s", options.timeout);
        return false;
    }
    if (c->in_used > 0) {
        memmove(c->in, c->in + c->in_used, c->in_size - c->in_used);
        c->in_size -= c->in_used;
        c->in_used = 0;
    }
    got = recv(c->fd, c->in + c->in_size, sizeof c->in - c->in_size, 0);
    if (got <= 0) {
        return false;
    }
    c->in_size += (size_t)got;
    return true;
}

/* Send what was collected.  False where the other side has closed. */
static bool
flush_out(Conversation *c)
{
    size_t at = 0;

    while (at < c->out_size) {
        size_t left = c->out_size - at, size = left;
        struct pollfd wait = {c->fd, POLLIN | POLLOUT, 0};
        ssize_t sent;

        if (c->cut == 1) {
            size = 1 + number_below(&c->random_cut, left < 50 ? (unsigned)left : 50);
        }
        else if (c->cut == 2 && at < 1000) {
            size = 1;
        }
        sent = send(c->fd, c->out + at, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            at += (size_t)sent;
            continue;
        }
        if (errno != EAGAIN && errno != EINTR) {
            c->out_size = 0;
            return false;
        }
        /* The filter may wait for us to read before it reads on. */
        if (poll(&wait, 1, options.timeout * 1000) == 0) {
            finding(c, "the filter reads nothing for %d s", options.timeout);
            return false;
        }
        if ((wait.revents & POLLIN) && c->in_size - c->in_used < 60000 && !receive(c)) {
            return false;
        }
    }
    c->out_size = 0;
    return true;
}

static void
put_packet(Conversation *c, char command, const void *data, size_t size)
{
    unsigned char *to;

    if (c->out_size + size + HEAD_BYTES > sizeof c->out) {
        flush_out(c);
    }
    to = c->out + c->out_size;
    if (options.trace) {
        fprintf(stderr, "  > %c ", command);
        show("", data, size);
    }
    write_head(to, command, size);
    if (size > 0) {
        memcpy(to + HEAD_BYTES, data, size);
    }
    c->out_size += size + HEAD_BYTES;
    atomic_fetch_add_explicit(&packets, 1, memory_order_relaxed);
}

/* The next packet from the filter, or NULL at the end. */
static const unsigned char *
get_packet(Conversation *c, size_t *size)
{
    for (;;) {
        const unsigned char *from = c->in + c->in_used;
        size_t have = c->in_size - c->in_used;
        if (have >= HEAD_BYTES) {
            size_t length = read_length(from);
            if (length == 0 || length > 65536 + 1) {
                finding(c, "a reply of %zu bytes", length);
                return NULL;
            }
            if (have >= LENGTH_BYTES + length) {
                c->in_used += LENGTH_BYTES + length;
                *size = length;
                if (options.trace) {
                    show("  < ", from + LENGTH_BYTES, length);
                }
                if (options.answers != NULL && !c->deaf) {
                    hear(c, from + LENGTH_BYTES, length);
                }
                return from + LENGTH_BYTES;
            }
        }
        if (!receive(c)) {
            return NULL;
        }
    }
}

/* ------------------------------------------------ what the filter may write */

static size_t
count_nul(const unsigned char *data, size_t size)
{
    size_t count = 0;

    for (size_t i = 0; i < size; i++) {
        count += data[i] == 0;
    }
    return count;
}

static bool
is_field_name(const char *name)
{
    if (*name == 0) {
        return false;
    }
    for (; *name; name++) {
        if ((unsigned char)*name <= 32 || *name == 127 || *name == ':') {
            return false;
        }
    }
    return true;
}

/* Line breaks stand before a space or tab only. */
static bool
is_folded(const char *value)
{
    for (; *value; value++) {
        if (*value == '\r' && value[1] != '\n') {
            return false;
        }
        if (*value == '\n' && value[1] != ' ' && value[1] != '\t') {
            return false;
        }
    }
    return true;
}

static bool
has_line_break(const char *text)
{
    return strpbrk(text, "\r\n") != NULL;
}

static bool
is_reply(const char *text, char class)
{
    const char *line = text;

    if (text[0] != class) {
        return false;
    }
    for (;;) {
        size_t size = strcspn(line, "\r\n");
        for (size_t i = 0; i < size; i++) {
            size_t run = strspn(line + i, "%");
            if (run % 2) {
                return false;
            }
            i += run;
        }
        if (size < 4 || memcmp(line, text, 3) != 0 || (line[3] != ' ' && line[3] != '-')) {
            return false;
        }
        if (line[size] == 0) {
            return line[3] == ' ';
        }
        if (line[size] != '\r' || line[size + 1] != '\n' || line[3] != '-') {
            return false;
        }
        line += size + 2;
    }
}

/* Why this packet at the end of a message could forge something, or NULL. */
static const char *
why_bad_action(const Conversation *c, const unsigned char *packet, size_t size)
{
    static const struct {
        char command;
        unsigned needs;
    } needs[] = {{'h', 1},    {'i', 1},    {'b', 2},    {'+', 4},    {'-', 8},
                 {'m', 0x10}, {'q', 0x20}, {'e', 0x40}, {'2', 0x80}, {'p', 0}};
    const char *text = (const char *)packet + 1, *second;
    size_t left = size - 1;

    for (size_t i = 0;; i++) {
        if (i == sizeof needs / sizeof *needs) {
            return "an unknown action";
        }
        if (needs[i].command == (char)*packet) {
            if (needs[i].needs && !(c->actions & needs[i].needs)) {
                return "an action that was not agreed";
            }
            break;
        }
    }
    if (*packet == 'p') {
        return left ? "progress with data" : NULL;
    }
    if (*packet == 'b') {
        return left > 65535 ? "too large a piece of body" : NULL;
    }
    if (*packet == 'i' || *packet == 'm') {
        if (left < 4) {
            return "an index is missing";
        }
        text += 4;
        left -= 4;
    }
    if (left == 0 || text[left - 1] != 0) {
        return "a text without its end";
    }
    second = text + strlen(text) + 1;
    if (strchr("him", (char)*packet)) {
        return count_nul((const unsigned char *)text, left) != 2 ? "not a name and a value"
               : !is_field_name(text)                            ? "a bad field name"
               : !is_folded(second)                              ? "a line break in a field"
                                                                 : NULL;
    }
    if (count_nul((const unsigned char *)text, left) > (strchr("e2", (char)*packet) ? 2U : 1U)) {
        return "too many texts";
    }
    if (*text == 0 || has_line_break(text)) {
        return "an empty text or one with a line break";
    }
    return second < text + left && has_line_break(second) ? "a line break in parameters" : NULL;
}

/* --------------------------------------------------------- the expectations */

/* Read the answer to a command: `wanted` is its letter. */
static void
expect(Conversation *c, char command, char wanted)
{
    size_t size;
    const unsigned char *packet;

    if (c->failed || c->over) {
        return;
    }
    if (!flush_out(c) && !c->failed) {
        finding(c, "the connection was closed before %c", command);
        return;
    }
    while ((packet = get_packet(c, &size)) != NULL) {
        char got = (char)*packet;
        const char *why;

        if (strchr("acdrstyO", got) == NULL && command == 'E') {
            c->actions_seen++;
            why = why_bad_action(c, packet, size);
            if (why != NULL) {
                finding(c, "%c in the answer to E: %s", got, why);
                return;
            }
            continue;
        }
        if (got == 'y' && (wanted == 'r' || wanted == 't')) {
            if (packet[size - 1] != 0 || count_nul(packet, size) != 1 ||
                !is_reply((const char *)packet + 1, wanted == 'r' ? '5' : '4')) {
                finding(c, "a malformed reply: %.100s", (const char *)packet);
            }
            return;
        }
        if (got != wanted || (got != 'y' && size != 1)) {
            finding(c, "the answer to %c is %c, not %c", command, got, wanted);
        }
        return;
    }
    if (!c->failed) {
        finding(c, "the connection was closed instead of an answer to %c", command);
    }
}

static void
end_message(Conversation *c)
{
    c->in_message = false;
    if (c->debt == FOR_MESSAGE) {
        c->debt = NO_DEBT;
    }
}

/* What the module makes of a callback that returns `letter`: the answer's letter, 'n' for none. */
static char
judge(Conversation *c, enum state stage, char letter)
{
    bool silent = (c->wanted & no_reply_bit[stage]) != 0;
    bool fault = false;
    char answer;

    if (stage == MAIL) {
        end_message(c);
    }
    c->opened = true;
    if (in_message(stage) && c->debt == NO_DEBT) {
        c->in_message = true;
    }
    if (c->debt != NO_DEBT && (in_message(stage) || stage == HELO)) {
        answer = silent ? 'n' : 't';
    }
    else {
        switch (letter) {
        case 'a':
        case 'r':
        case 't':
            answer = letter;
            break;
        case 'R':
        case 'T':
            answer = letter == 'R' ? 'r' : 't';
            break;
        case 'd':
            answer = 'd';
            fault = stage == CONN || stage == HELO;
            break;
        case 's':
            answer = 's';
            fault = !(c->wanted & c->offered & SKIP) ||
                    (stage != RCPT && stage != HDRS && stage != BODY && stage != UNKN);
            break;
        case 'n':
            /* Milter.connect_callback knows better where it is not agreed. */
            answer = stage == CONN && !silent && !options.bare ? 'c' : 'n';
            fault = !silent && answer == 'n';
            break;
        case 'x':
        case 'z':
            answer = 't';
            fault = true;
            break;
        default:
            answer = 'c';
        }
        if (silent && answer != 'n') {
            fault = fault || answer != 'c';
            answer = 'n';
        }
        else if (fault) {
            answer = 't';
        }
        else if (answer == 'a' && stage == UNKN && !c->in_message) {
            answer = 'c'; /* there is no message yet that could be accepted */
        }
        if (fault && silent) {
            c->debt = in_message(stage)                ? FOR_MESSAGE
                      : stage == CONN || stage == HELO ? FOR_CONNECTION
                                                       : c->debt;
        }
    }
    if (in_message(stage) && answer != 'n' &&
        (answer == 'a' || answer == 'd' || ((answer == 'r' || answer == 't') && stage != RCPT) ||
         stage == ENDM)) {
        end_message(c);
    }
    return answer;
}

/* Where libmilter goes on after a verdict. */
static void
follow(Conversation *c, enum state stage, char answer)
{
    if (answer == 'a' || (strchr("rdt", answer) != NULL && stage != RCPT && stage != UNKN)) {
        c->state = HELO;
    }
}

/* The end of message, which may bring the last piece of the body. */
static void
expect_end(Conversation *c, size_t size, char body_letter)
{
    char answer;
    bool deaf;

    if (size > 0) {
        answer = judge(c, BODY, body_letter);
        if (options.native) {
            if (strchr("cns", answer) == NULL) { /* there is one answer to one packet */
                expect(c, 'E', answer);
                follow(c, ENDM, answer);
                return;
            }
        }
        else if (answer == 'n') {
            atomic_fetch_add(&known_silent, 1); /* libmilter: no eom, no answer */
            c->how = 's';
            return;
        }
        else if (answer != 'c') {
            atomic_fetch_add(&known_doubled, 1); /* libmilter: answers twice */
            expect(c, 'E', answer);
            deaf = c->deaf;
            c->deaf = true;
            if (answer == 's') {
                c->how = 's'; /* no end of message either */
            }
            expect(c, 'E', answer);
            c->deaf = deaf;
            follow(c, ENDM, answer);
            return;
        }
    }
    answer = judge(c, ENDM, c->script[2]);
    expect(c, 'E', answer);
    follow(c, ENDM, answer);
}

/* Send a packet, follow libmilter's state machine, and check the answer. */
static void
say(Conversation *c, char command, const void *data, size_t size, char letter)
{
    enum state next = state_of(command);
    char answer;

    if (c->in_size > c->in_used) {
        finding(c, "%c came that answers nothing, before %c",
                c->in_size - c->in_used > 4 ? c->in[c->in_used + 4] : '?', command);
        return;
    }
    put_packet(c, command, data, size);
    if (next == IMPOSSIBLE) {
        return; /* macros */
    }
    if (next == Q_NC && !(transitions[c->state] & TO(next))) {
        c->deaf =
            true; /* libmilter drops it, and the session that follows; our own engine does not */
    }
    if (options.native && c->state == INIT) {
        c->how = 'e'; /* libmilter goes on as after a negotiation */
        c->over = true;
        return;
    }
    if (!(transitions[c->state] & TO(next)) && !(next == Q_NC && options.native)) {
        if (c->state >= MAIL && c->state < ENDM) {
            end_message(c); /* by its abort callback */
        }
        c->state = HELO;
        if (!(transitions[HELO] & TO(next))) {
            /* libmilter drops it without an answer, our own engine drops the connection. */
            c->how = command != 'Q' && options.native ? 'e' : c->how;
            c->over = command == 'Q' || options.native;
            return;
        }
    }
    if (next == UNKN && c->state != UNKN) {
        c->before_unknown = c->state;
    }
    c->state = next;
    switch (next) {
    case ABRT:
        end_message(c);
        return;
    case QUIT:
        c->over = true;
        return;
    case Q_NC:
        end_message(c);
        c->debt = NO_DEBT;
        c->reconnected = true;
        memcpy(c->script, "cccc", 4); /* it went with the session */
        return;
    case ENDM:
        expect_end(c, size, letter);
        return;
    default:
        answer = judge(c, next, letter);
        if (answer != 'n') {
            expect(c, command, answer);
        }
        else if (no_reply_bit[next] & c->wanted & ~c->offered) {
            expect(c, command, 'c'); /* libmilter answers for the filter */
        }
        follow(c, next, answer);
    }
}

/* ------------------------------------------------------------ well-formed */

/* A verdict for a stage, to be hidden in the packet. */
static char
letter_for(Conversation *c, enum state stage)
{
    static const char letters[] = "artdsnxzRT";

    if (c->honest || !chance(c, (unsigned)c->hostility)) {
        return 'c';
    }
    if (c->reconnected) {
        return no_reply_bit[stage] & c->wanted ? 'c' : "artRT"[below(c, stage == BODY ? 3 : 5)];
    }
    return letters[below(c, sizeof letters - 1)];
}

/* Any bytes but NUL; with a taste for what means something somewhere. */
static size_t
any_text(Conversation *c, unsigned char *to, unsigned longest)
{
    static const char *const words[] = {
        "\r\n",     "\n", "\r",       "%",         "%s%n",      ":",  "<>",    "\xff",
        "\xc3\xa9", "=?", "utf-8?Q?", "?=",        "\x80",      "@",  "..",    "\t",
        " ",        "\\", "\x1b[",    "X-Fuzz: y", "\r\n.\r\n", "\"", "[::1]", "\xf0\x9f\x93\xa7",
        ";",        "=",
    };
    unsigned wanted = below(c, 8) == 0 ? below(c, longest) : below(c, longest < 24 ? longest : 24);
    size_t size = 0;

    while (size < wanted) {
        if (chance(c, 35)) {
            const char *word = words[below(c, sizeof words / sizeof *words)];
            size_t length = strlen(word);
            if (size + length > longest) {
                break;
            }
            memcpy(to + size, word, length);
            size += length;
        }
        else if (chance(c, 60)) {
            to[size++] = (unsigned char)('a' + below(c, 26));
        }
        else {
            to[size++] = (unsigned char)(1 + below(c, 255));
        }
    }
    return size;
}

/* A text that ends with the verdict and its NUL. */
static size_t
put_text(Conversation *c, unsigned char *to, unsigned longest, char letter)
{
    size_t size = c->honest ? 0 : any_text(c, to, longest);

    to[size++] = (unsigned char)letter;
    to[size++] = 0;
    return size;
}

static void
negotiate(Conversation *c)
{
    unsigned selector = below(c, 1 << 12), version = chance(c, 90) ? 6 : 2 + below(c, 5);
    unsigned values[3];
    unsigned char data[12];
    size_t size;
    const unsigned char *packet;

    /* The filter wants what the high bits of the actions tell it: see wire_filter.py. */
    if (c->honest) {
        selector = 0;
    }
    c->offered_actions = chance(c, 80) || c->honest ? ALL_ACTIONS : 1 + below(c, ALL_ACTIONS);
    c->offered = chance(c, 80) || c->honest ? 0x1FFFFF : 1 + below(c, 0x1FFFFF);
    c->offered |= 0x7F; /* the steps of version 1 can always be left out */
    values[0] = version;
    values[1] = c->offered_actions | selector << 9;
    values[2] = c->offered;
    for (int i = 0; i < 12; i++) {
        data[i] = (unsigned char)(values[i / 4] >> (24 - 8 * (i % 4)));
    }
    put_packet(c, 'O', data, sizeof data);
    c->state = OPTS;
    c->opened = true;
    flush_out(c);
    packet = get_packet(c, &size);
    if ((selector & 0xE00) == 0xE00) { /* it refuses, or raises */
        if (packet != NULL) {
            finding(c, "an answer to a negotiation that was refused");
        }
        atomic_fetch_add(&refused, 1);
        c->over = true;
        return;
    }
    if (packet == NULL || *packet != 'O' || size < 13) {
        finding(c, "no answer to the negotiation");
        return;
    }
    for (int i = 0; i < 12; i++) {
        values[i / 4] = values[i / 4] << 8 | packet[1 + i];
    }
    c->actions = values[1];
    c->wanted = selector & 0x100 ? (selector & 0xFF ? NR_BITS : 0) : 0;
    if (c->wanted) {
        c->wanted = 0;
        for (int bit = 0; bit < 8; bit++) {
            /* conn, helo, mail, rcpt, data, unknown, eoh; header and body share the last */
            if (selector & 1U << bit) {
                c->wanted |= bit < 7 ? 0x1000U << bit : 0x80080U;
            }
        }
    }
    c->wanted |= FEATURES & c->offered;
    if (values[2] != (c->wanted & c->offered)) {
        finding(c, "agreed on %#x where %#x was expected", values[2], c->wanted & c->offered);
    }
    if ((c->actions & ~ALL_ACTIONS) || (c->actions & ~c->offered_actions)) {
        finding(c, "the filter asks for actions %#x of %#x", c->actions, c->offered_actions);
    }
}

static void
macros(Conversation *c, char stage)
{
    static const char *const known[] = {"i", "{i}", "j", "{fuzz}", "{client_addr}", "_", "{}", ""};
    unsigned char data[3000];
    size_t size = 0;
    unsigned pairs = below(c, 4);

    data[size++] = (unsigned char)stage;
    for (unsigned i = 0; i <= pairs; i++) {
        const char *name = known[below(c, sizeof known / sizeof *known)];
        memcpy(data + size, name, strlen(name) + 1);
        size += strlen(name) + 1;
        size += put_text(c, data + size, 200, 'c');
    }
    put_packet(c, 'D', data, size);
}

static void
connect_info(Conversation *c)
{
    unsigned char data[2000];
    char letter = letter_for(c, CONN);
    size_t size = put_text(c, data, 300, letter);
    static const char *const addresses[] = {"192.0.2.7", "IPv6:2001:db8::1", "/run/socket"};
    unsigned kind = below(c, 4);

    if (kind == 3) {
        data[size++] = 'U';
        say(c, 'C', data, size + 0, letter);
        return;
    }
    data[size++] = (unsigned char)"46L"[kind];
    data[size++] = (unsigned char)below(c, 256);
    data[size++] = (unsigned char)below(c, 256);
    memcpy(data + size, addresses[kind] + (kind == 1 ? 5 : 0), strlen(addresses[kind]) + 1);
    size += strlen(addresses[kind]) + 1 - (kind == 1 ? 5 : 0);
    say(c, 'C', data, size, letter);
}

static void
sender(Conversation *c)
{
    unsigned char data[8000];
    size_t size = 0;
    char letter = letter_for(c, MAIL);
    unsigned params = chance(c, 5) ? below(c, 40) : below(c, 3);

    c->script[0] = letter_for(c, DATA);
    c->script[1] = letter_for(c, EOHS);
    c->script[2] = letter_for(c, ENDM);
    size += (size_t)sprintf((char *)data, "<%c%c%c%c%u%08x@fuzz>", c->script[0], c->script[1],
                            c->script[2], chance(c, 3) && !c->honest ? 'x' : 'c',
                            c->honest ? 9 : below(c, 9), below(c, 1U << 31));
    size += 1;
    for (unsigned i = 0; i < params; i++) {
        size += put_text(c, data + size, 100, 'c');
    }
    size += put_text(c, data + size, 100, letter);
    say(c, 'M', data, size, letter);
}

static void
recipient(Conversation *c)
{
    unsigned char data[4000];
    size_t size = 0;
    char letter = letter_for(c, RCPT);

    for (unsigned i = below(c, 3); i > 0; i--) {
        size += put_text(c, data + size, 200, 'c');
    }
    size += put_text(c, data + size, 200, letter);
    say(c, 'R', data, size, letter);
}

static void
header(Conversation *c)
{
    unsigned char data[6000];
    char letter = letter_for(c, HDRS);
    size_t size = put_text(c, data, 60, 'c');

    size += put_text(c, data + size, 2000, letter);
    say(c, 'L', data, size, letter);
}

/* With verdict and any bytes, NUL among them; returns the size. */
static size_t
any_chunk(Conversation *c, unsigned char *to, char letter)
{
    size_t size = chance(c, 3) ? below(c, 65000) : below(c, 300);

    for (size_t i = 0; i < size; i += 4) {
        unsigned four = below(c, UINT32_MAX);
        memcpy(to + i, &four, 4);
    }
    to[size++] = (unsigned char)letter;
    return size;
}

static void
one_command(Conversation *c, char command)
{
    static _Thread_local unsigned char chunk[66000];
    unsigned char data[2000];
    char letter;
    size_t size;

    if (strchr("CHMRTEN", command) && chance(c, c->honest ? 100 : 40)) {
        macros(c, command);
    }
    switch (command) {
    case 'C':
        connect_info(c);
        break;
    case 'H':
        letter = letter_for(c, HELO);
        size = put_text(c, data, 300, letter);
        say(c, 'H', data, size, letter);
        break;
    case 'U':
        letter = letter_for(c, UNKN);
        size = put_text(c, data, 600, letter);
        say(c, 'U', data, size, letter);
        break;
    case 'M':
        sender(c);
        break;
    case 'R':
        recipient(c);
        break;
    case 'L':
        header(c);
        break;
    case 'B':
        letter = letter_for(c, BODY);
        size = any_chunk(c, chunk, letter);
        say(c, 'B', chunk, size, letter);
        break;
    case 'E':
        size = 0;
        letter = letter_for(c, BODY);
        if (!c->honest && chance(c, 30) && (options.known_faults || !(c->wanted & NR_BODY))) {
            size = any_chunk(c, chunk, letter);
        }
        say(c, 'E', chunk, size, letter);
        break;
    case 'T':
        say(c, 'T', NULL, 0, c->script[0]);
        break;
    case 'N':
        say(c, 'N', NULL, 0, c->script[1]);
        break;
    case 'D':
        macros(c, "CHMRTENX"[below(c, 8)]);
        break;
    default:
        say(c, command, NULL, 0, 'c');
    }
    if (c->out_size > 0 && chance(c, 50)) {
        flush_out(c); /* otherwise it goes with what follows */
    }
}

/* The command that an MTA would send next. */
static char
natural(Conversation *c)
{
    switch (c->state == UNKN ? c->before_unknown : c->state) {
    case OPTS:
    case Q_NC:
        return 'C';
    case CONN:
        return 'H';
    case HELO:
    case ABRT:
        return 'M';
    case MAIL:
        return 'R';
    case RCPT:
        return chance(c, 40) && !c->honest ? 'R' : 'T';
    case DATA:
        return 'L';
    case HDRS:
        return chance(c, 60) && !c->honest ? 'L' : 'N';
    case EOHS:
        return 'B';
    case BODY:
        return chance(c, 30) && !c->honest ? 'B' : 'E';
    case ENDM:
        return 'M';
    default:
        return 'M';
    }
}

/* A command between others that an MTA may send there. */
static char
between(Conversation *c)
{
    if (in_message(c->state) && c->state != ENDM) {
        return chance(c, 50) || !(TO(c->state) & SMTP_STATES) ? 'A' : 'U';
    }
    if (c->state == ENDM && chance(c, 30)) {
        return 'K';
    }
    return TO(c->state) & SMTP_STATES ? 'U' : natural(c);
}

/* Nothing may come but the end. */
static void
expect_nothing_more(Conversation *c)
{
    size_t size;
    const unsigned char *packet;

    if (c->failed || !flush_out(c)) {
        return;
    }
    shutdown(c->fd, SHUT_WR);
    packet = get_packet(c, &size);
    if (packet != NULL) {
        finding(c, "%c came that answers nothing", *packet);
    }
}

static void
well_formed(Conversation *c)
{
    static const char commands[] = "CHMRTLNBEAUKD";
    unsigned disorder = c->honest || options.orderly ? 0 : (unsigned[]){0, 2, 10, 40}[below(c, 4)];
    unsigned count = c->honest ? 40 : 4 + below(c, 30);

    c->hostility = (int[]){0, 3, 15, 40}[below(c, 4)];
    memcpy(c->script, "cccc", 4);
    /* Without a negotiation there is no filter object to call, and no MTA does so. */
    if (c->honest || options.orderly || !options.bare || chance(c, 97)) {
        negotiate(c);
    }
    for (unsigned i = 0; i < count && !c->failed && !c->over; i++) {
        char command = chance(c, disorder) ? commands[below(c, sizeof commands - 1)] : natural(c);

        if (options.orderly && !c->honest && chance(c, 4)) {
            command = between(c);
        }
        /* libmilter loses track of the session where an unknown command comes elsewhere than among
         * the commands of SMTP, or disorder follows. */
        if (c->state == UNKN || (command == 'U' && !(TO(c->state) & SMTP_STATES)) ||
            (command == 'A' && (!in_message(c->state) || c->state == ENDM))) {
            command = natural(c);
        }
        one_command(c, command);
        if (c->honest && c->state == ENDM) {
            break;
        }
    }
    if (c->honest && !c->failed && c->actions_seen != 1) {
        finding(c, "an honest message got %d changes where one was due", c->actions_seen);
    }
    if (c->failed || (!c->honest && chance(c, 10))) {
        c->how = c->how == 'w' ? 'g' : c->how;
        return; /* gone without a word */
    }
    if (!c->over && (c->honest || chance(c, 70))) {
        say(c, 'Q', NULL, 0, 'c');
    }
    expect_nothing_more(c);
}

/* -------------------------------------------------------------- malformed */

typedef struct {
    char command;
    size_t size;
    unsigned char data[300];
} Packet;

static void
sane_macros(Packet *packet)
{
    size_t nuls;

    if (packet->command != 'D' || packet->size == 0 || options.known_faults) {
        return;
    }
    /* A name without its value makes smfi_getsymval() read past its list. */
    nuls = count_nul(packet->data + 1, packet->size - 1);
    if (nuls % 2) {
        packet->data[packet->size++] = 0;
    }
}

static void
damage(Conversation *c, Packet *packet)
{
    size_t size = packet->size;

    switch (below(c, 8)) {
    case 0:
        for (unsigned i = 1 + below(c, 4); i > 0 && size > 0; i--) {
            packet->data[below(c, (unsigned)size)] = (unsigned char)below(c, 256);
        }
        break;
    case 1:
        packet->size = size > 0 ? below(c, (unsigned)size) : 0;
        break;
    case 2:
        while (packet->size < 250 && chance(c, 90)) {
            packet->data[packet->size++] = (unsigned char)below(c, 256);
        }
        break;
    case 3:
        packet->command = (char)below(c, 256);
        break;
    case 4:
        packet->size = 0;
        break;
    case 5:
        for (size_t i = 0; i < size; i++) {
            packet->data[i] = packet->data[i] == 0 ? 'x' : packet->data[i];
        }
        break;
    case 6:
        memset(packet->data, 0, size);
        break;
    default:
        packet->command = "OCHMRTLNBEAUKQD"[below(c, 15)];
    }
}

/* The command, or another one where libmilter would lose track of the session in silence: it drops
 * QUIT_NC but after a message, an abort before all else and a client after an unknown command, and
 * takes a sender after an unknown command for the first one. */
static char
expected_command(char command, char last)
{
    if (command == 'K' || (command == 'A' && (last == 0 || last == 'O'))) {
        return 'T';
    }
    return command == 'U' && last != 'C' && last != 'H' ? 'H' : command;
}

static void
malformed(Conversation *c)
{
    static const Packet dialogue[] = {
        {'O', 12, "\0\0\0\6\0\0\1\xff\0\x1f\xff\xff"},
        {'D', 11, "Cj\0mx\0{i}\0c"},
        {'C', 28,
         "client.example\0004\0\x19"
         "192.0.2.7"},
        {'H', 7, "helo.c"},
        {'U', 7, "XBOGUS"},
        {'D', 8, "Mi\0004XyZ\0"},
        {'M', 26, "<cccc31234abcd@b>\0SIZE=1c"},
        {'R', 19, "<c@d>\0NOTIFY=NEVER"},
        {'T', 0, ""},
        {'L', 14, "Subject\0hello"},
        {'L', 12, "X-Fuzz\0yesc"},
        {'N', 0, ""},
        {'B', 7, "text\r\nc"},
        {'E', 5, "more\n"},
        {'A', 0, ""},
        {'K', 0, ""},
        {'Q', 0, ""},
    };
    enum { STEPS = sizeof dialogue / sizeof *dialogue };
    unsigned wrong = 1 + below(c, 4), begin = chance(c, 90) ? 0 : below(c, STEPS);
    unsigned end = chance(c, 70) ? STEPS : below(c, STEPS + 1);
    char last = 0;
    size_t size;

    for (unsigned i = begin; i < end; i++) {
        Packet packet = dialogue[chance(c, 5) ? below(c, STEPS) : i];
        if (packet.command == 'D' && packet.data[packet.size - 1] != 0) {
            packet.size++; /* the literal's own NUL */
        }
        if (packet.command == 'O' && chance(c, 30)) {
            packet.data[6] = (unsigned char)below(c, 256);
            packet.data[5] = (unsigned char)below(c, 32);
        }
        if (below(c, STEPS) < wrong) {
            damage(c, &packet);
        }
        sane_macros(&packet);
        if (!options.known_faults && packet.command == 'E') {
            packet.size = 0;
        }
        if (!options.known_faults) {
            packet.command = expected_command(packet.command, last);
        }
        last = packet.command == 'D' ? last : packet.command;
        if (chance(c, 2)) {
            static const uint32_t lies[] = {0,       1,          65535,      65536,     65537,
                                            1048577, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
            uint32_t lie = lies[below(c, 9)];
            put_packet(c, packet.command, packet.data, packet.size);
            unsigned char *at = c->out + c->out_size - packet.size - 5;
            at[0] = (unsigned char)(lie >> 24);
            at[1] = (unsigned char)(lie >> 16);
            at[2] = (unsigned char)(lie >> 8);
            at[3] = (unsigned char)lie;
            break;
        }
        put_packet(c, packet.command, packet.data, packet.size);
    }
    if (chance(c, 10) && c->out_size > 0) {
        c->out_size = below(c, (unsigned)c->out_size);
    }
    if (chance(c, 5)) {
        for (unsigned i = below(c, 200); i > 0; i--) {
            c->out[c->out_size++] = (unsigned char)below(c, 256);
        }
    }
    if (!flush_out(c) || chance(c, 20)) {
        c->how = 'u';
        return;
    }
    shutdown(c->fd, SHUT_WR);
    while (get_packet(c, &size) != NULL) {
    }
}

/* ------------------------------------------------------------------ running */

static void
converse(Conversation *c, long number)
{
    memset(c, 0, offsetof(Conversation, out));
    c->out_size = c->in_size = c->in_used = 0;
    c->number = number;
    c->random = mix(options.seed * 0x2545F4914F6CDD1DU + (uint64_t)number);
    c->random_cut = c->random;
    c->honest = number % 16 == 0;
    c->cut = chance(c, 12) ? 1 + (int)below(c, 2) : 0;
    c->how = 'w';
    c->fd = open_connection();
    if (c->fd < 0) {
        finding(c, "cannot connect: %s", strerror(errno));
        atomic_store(&give_up, true);
        return;
    }
    if (!c->honest && below(c, 1000) < (unsigned)(options.malformed * 1000)) {
        c->how = 'm';
        malformed(c);
    }
    else {
        well_formed(c);
    }
    close(c->fd);
    if (options.answers != NULL) {
        pthread_mutex_lock(&print_lock);
        fprintf(options.answers, "%ld %c%s\n", number, c->how, c->hashes);
        pthread_mutex_unlock(&print_lock);
    }
}

static void *
worker(void *unused)
{
    Conversation *c = calloc(1, sizeof *c);
    long number;

    (void)unused;
    while (!atomic_load(&give_up) && (number = atomic_fetch_add(&next_conversation, 1)) <
                                         options.first + options.conversations) {
        converse(c, number);
        atomic_fetch_add(&done, 1);
    }
    free(c);
    return NULL;
}

static double
now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void *
report_progress(void *began)
{
    for (double next = now() + 10; !atomic_load(&give_up); next += 10) {
        while (now() < next) {
            usleep(100000);
        }
        double seconds = now() - *(double *)began;
        long count = atomic_load(&done);
        fprintf(stderr, "%7.0f s  %ld of %ld conversations, %.0f/s, %d findings\n", seconds, count,
                options.conversations, (double)count / seconds, atomic_load(&findings));
    }
    return NULL;
}

int
main(int argc, char **argv)
{
    static const struct option names[] = {{"seed", required_argument, NULL, 's'},
                                          {"first", required_argument, NULL, 'f'},
                                          {"conversations", required_argument, NULL, 'n'},
                                          {"threads", required_argument, NULL, 'j'},
                                          {"malformed", required_argument, NULL, 'm'},
                                          {"timeout", required_argument, NULL, 't'},
                                          {"bare", no_argument, NULL, 'b'},
                                          {"trace", no_argument, NULL, 'x'},
                                          {"with-known-faults", no_argument, NULL, 'k'},
                                          {"native", no_argument, NULL, 'N'},
                                          {"orderly", no_argument, NULL, 'o'},
                                          {"answers", required_argument, NULL, 'a'},
                                          {NULL, 0, NULL, 0}};
    int option;
    double began = now(), seconds;
    pthread_t *threads, progress;

    while ((option = getopt_long(argc, argv, "", names, NULL)) >= 0) {
        switch (option) {
        case 's':
            options.seed = strtoull(optarg, NULL, 0);
            break;
        case 'f':
            options.first = atol(optarg);
            break;
        case 'n':
            options.conversations = atol(optarg);
            break;
        case 'j':
            options.threads = atoi(optarg);
            break;
        case 'm':
            options.malformed = atof(optarg);
            break;
        case 't':
            options.timeout = atoi(optarg);
            break;
        case 'b':
            options.bare = true;
            break;
        case 'x':
            options.trace = true;
            break;
        case 'k':
            options.known_faults = true;
            break;
        case 'N':
            options.native = true;
            break;
        case 'o':
            options.orderly = true;
            break;
        case 'a':
            options.answers = fopen(optarg, "w");
            if (options.answers == NULL) {
                perror(optarg);
                return 2;
            }
            break;
        default:
            return 2;
        }
    }
    if (optind != argc - 1 || options.threads < 1) {
        fputs("usage: wire [OPTION...] SOCKET\n", stderr);
        return 2;
    }
    options.socket = argv[optind];
    signal(SIGPIPE, SIG_IGN);
    atomic_store(&next_conversation, options.first);
    threads = calloc((size_t)options.threads, sizeof *threads);
    for (int i = 0; i < options.threads; i++) {
        pthread_create(&threads[i], NULL, worker, NULL);
    }
    pthread_create(&progress, NULL, report_progress, &began);
    for (int i = 0; i < options.threads; i++) {
        pthread_join(threads[i], NULL);
    }
    seconds = now() - began;
    printf("%ld conversations, %ld packets, %.1f s, %.0f conversations/s; %ld negotiations "
           "refused; libmilter answered %ld times twice and %ld times not at all, as it is known "
           "to; %d findings\n",
           atomic_load(&done), atomic_load(&packets), seconds, (double)atomic_load(&done) / seconds,
           atomic_load(&refused), atomic_load(&known_doubled), atomic_load(&known_silent),
           atomic_load(&findings));
    if (options.answers != NULL && fclose(options.answers) != 0) {
        perror("--answers");
        return 2;
    }
    return atomic_load(&findings) > 0;
}
