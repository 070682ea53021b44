/* Sessions that libmilter has lost.
 *
 * Where libmilter cannot start a thread for a session it has accepted, its pool forgets that
 * session: it writes a line to syslog, keeps the connection and never reads from it.  The MTA
 * waits until its own time-out.  Nothing outside of libmilter can serve such a session any more,
 * but it can be told from all others: the MTA has sent its negotiation, which still lies unread.
 * So main() looks at the accepted descriptors every LOOK_INTERVAL, and what it finds at two looks
 * running goes into the log.
 */

#include "lost.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "clock.h"
#include "descriptors.h"
#include "listener.h"
#include "surroundings.h"

#define LOOK_INTERVAL 5.0  /* s */
#define WARN_INTERVAL 60.0 /* s */
#define REMEMBERED 64      /* connections; more are not told from each other */

typedef struct {
    ino_t connections[REMEMBERED]; /* that waited at this look */
    int count;
    int lasting; /* of them, those that waited at the look before */
} Look;

static Look looks[2];
static int latest;         /* of the looks */
static double next_look;   /* by monotonic_now() */
static double next_report; /* likewise */
static int reported;       /* lasting ones that the log knows of */

/* Is the first packet of this connection, the MTA's offer, still unread? */
static bool
waits_for_negotiation(int fd)
{
    static const unsigned char offer[] = {0, 0, 0, 13, 'O'}; /* its length, and SMFIC_OPTNEG */
    unsigned char head[sizeof offer];

    return recv(fd, head, sizeof head, MSG_PEEK | MSG_DONTWAIT) == sizeof head &&
           memcmp(head, offer, sizeof head) == 0;
}

static bool
has_connection(const Look *look, ino_t inode)
{
    for (int i = 0; i < look->count; i++) {
        if (look->connections[i] == inode) {
            return true;
        }
    }
    return false;
}

static bool
look_at_descriptor(int fd, void *arg)
{
    Look *now = &looks[latest];
    struct stat status;

    (void)arg;
    if (is_accepted(fd) && waits_for_negotiation(fd) && fstat(fd, &status) == 0) {
        now->lasting += has_connection(&looks[!latest], status.st_ino);
        now->connections[now->count++] = status.st_ino;
    }
    return now->count == REMEMBERED;
}

static void
report_lost_sessions(int lost)
{
    char text[300];

    snprintf(
        text, sizeof text,
        "%d%s of the MTA's connections had no answer to their first packet for %d s: libmilter "
        "has no thread for them, and may have lost them; raise the limits of threads and "
        "memory, or have the MTA make fewer connections",
        lost, lost == REMEMBERED ? " or more" : "", (int)LOOK_INTERVAL);
    hooks->log("error", text);
}

void
look_for_lost_sessions(void)
{
    double now = monotonic_now();
    int lost;

    if (now >= next_look) {
        next_look = now + LOOK_INTERVAL;
        latest = !latest;
        looks[latest].count = looks[latest].lasting = 0;
        each_descriptor(look_at_descriptor, NULL);
        lost = looks[latest].lasting;
        if (lost > reported && now >= next_report) {
            next_report = now + WARN_INTERVAL;
            report_lost_sessions(lost);
            reported = lost;
        }
        reported = lost < reported ? lost : reported;
    }
}

int
time_to_look(void)
{
    return milliseconds_until(next_look);
}
