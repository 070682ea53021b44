/* The listening socket of libmilter.
 *
 * libmilter neither says which descriptor it listens on nor stops listening when it is told to: it
 * looks at a flag every five seconds, and then cuts what is in progress.  So the descriptor is
 * found when it is opened, and to stop listening another one, which nobody can reach, is put in
 * its place.
 */

#include "listener.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <libmilter/mfapi.h>

#include "descriptors.h"
#include "signal_sets.h"
#include "socket_name.h"
#include "surroundings.h"
#include "wake.h"

#define LOOKED_AT 65536 /* descriptors, for one that is new */

static char *conn; /* as given to setconn() */
static int listener = -1;
static bool others_listen; /* the socket was inherited, or is shared: it must not be shut down */

/* The address of the listening socket, which accepted connections have for their own too; no size
 * where it is not known. */
static struct {
    struct sockaddr_storage name;
    socklen_t size;
} own_address;

int
listening_descriptor(void)
{
    return listener;
}

/* ------------------------------------------------------------- opening it */

int
set_listener(char *address)
{
    char *copy = strdup(address);

    if (copy == NULL || smfi_setconn(address) != MI_SUCCESS) {
        free(copy);
        return MI_FAILURE;
    }
    free(conn);
    conn = copy;
    return MI_SUCCESS;
}

typedef struct {
    const SocketName *name;
    unsigned char known[LOOKED_AT / 8];
    int found;
} ListenerSearch;

static bool
note_listener(int fd, void *arg)
{
    ListenerSearch *search = arg;

    if (fd < LOOKED_AT && is_listening(fd)) {
        search->known[fd / 8] |= (unsigned char)(1 << fd % 8);
    }
    return false;
}

static bool
is_at(int fd, const SocketName *name)
{
    struct sockaddr_storage found = {0};
    socklen_t size = sizeof found;
    int family = name->kind == UNIX_SOCKET    ? AF_UNIX
                 : name->kind == INET6_SOCKET ? AF_INET6
                                              : AF_INET;

    if (getsockname(fd, (struct sockaddr *)&found, &size) < 0 || found.ss_family != family) {
        return false;
    }
    switch (name->kind) {
    case UNIX_SOCKET:
        return strcmp(((struct sockaddr_un *)&found)->sun_path, name->path) == 0;
    case INET6_SOCKET:
        return socket_port(name) == 0 ||
               ntohs(((struct sockaddr_in6 *)&found)->sin6_port) == socket_port(name);
    default:
        return socket_port(name) == 0 ||
               ntohs(((struct sockaddr_in *)&found)->sin_port) == socket_port(name);
    }
}

static bool
find_new_listener(int fd, void *arg)
{
    ListenerSearch *search = arg;

    if (!is_listening(fd) || (fd < LOOKED_AT && search->known[fd / 8] & 1 << fd % 8) ||
        !is_at(fd, search->name)) {
        return false;
    }
    search->found = fd;
    return true;
}

int
open_listener(bool remove_old, int *opened)
{
    SocketName name;
    ListenerSearch search = {.name = &name, .found = -1};
    char advice[SOCKET_ADVICE];

    if (conn == NULL || parse_socket_name(conn, LIBMILTER_ORDER, &name, advice) != NULL) {
        return MI_FAILURE;
    }
    each_descriptor(note_listener, &search);
    if (smfi_opensocket(remove_old) != MI_SUCCESS) {
        return MI_FAILURE;
    }
    if (name.kind == INHERITED_SOCKET) {
        others_listen = true;
        search.found = name.descriptor;
    }
    else {
        each_descriptor(find_new_listener, &search);
    }
    *opened = listener = search.found;
    own_address.size = sizeof own_address.name;
    if (getsockname(listener, (struct sockaddr *)&own_address.name, &own_address.size) < 0) {
        own_address.size = 0;
    }
    return MI_SUCCESS;
}

void
listener_is_shared(void)
{
    others_listen = true;
}

/* ------------------------------------------- the socket that nobody can reach */

static int dummy = -1; /* libmilter's listener will sleep on it */
static int spare = -1; /* its number is for one duplicate at a time */

int
open_dummy_listener(void)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM | CLOEXEC, 0);

    if (fd >= 0 && fcntl(fd, F_SETFL, O_NONBLOCK) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* What `spare` stands for while it is not in use. */
static int
idle_descriptor(void)
{
    return dummy >= 0 ? dummy : main_pipe_reader();
}

void
reserve_descriptors(void)
{
    dummy = open_dummy_listener();
    spare = fcntl(idle_descriptor(), F_DUPFD_CLOEXEC, 0);
}

void
release_descriptors(void)
{
    if (dummy >= 0) {
        close(dummy);
    }
    if (spare >= 0) {
        close(spare);
    }
    dummy = spare = -1;
}

static bool
hold_in_spare(int fd)
{
    return spare >= 0 && replace_descriptor(fd, spare);
}

/* ----------------------------------------------------- waking its thread */

void
poke_listener(void)
{
    struct sockaddr_storage name = {0};
    socklen_t size = sizeof name;
    struct sockaddr_in *in = (struct sockaddr_in *)&name;
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&name;
    int fd;

    if (getsockname(listener, (struct sockaddr *)&name, &size) < 0) {
        return;
    }
    if (name.ss_family == AF_INET && in->sin_addr.s_addr == htonl(INADDR_ANY)) {
        in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    }
    if (name.ss_family == AF_INET6 && IN6_IS_ADDR_UNSPECIFIED(&in6->sin6_addr)) {
        in6->sin6_addr = in6addr_loopback;
    }
    fd = socket(name.ss_family, SOCK_STREAM | CLOEXEC, 0);
    if (fd >= 0) {
        fcntl(fd, F_SETFL, O_NONBLOCK);
        (void)!connect(fd, (struct sockaddr *)&name, size);
        close(fd);
    }
}

#ifdef __linux__

static int wake_signal;
static atomic_long listener_task;

static void
no_action(int number)
{
    (void)number;
}

bool
choose_wake_signal(sigset_t *mask)
{
    struct sigaction action = {.sa_handler = no_action};

    sigfillset(&action.sa_mask);
    if (wake_signal == 0 && (wake_signal = take_free_signal(&action)) == 0) {
        return false;
    }
    sigdelset(mask, wake_signal);
    return true;
}

void
be_listener(void)
{
    atomic_store(&listener_task, syscall(SYS_gettid));
}

void
wake_listener(void)
{
    if (wake_signal != 0 && !atomic_load(&loop_ended)) {
        syscall(SYS_tgkill, getpid(), atomic_load(&listener_task), wake_signal);
    }
}

#else

bool
choose_wake_signal(sigset_t *mask)
{
    (void)mask;
    return false;
}

void
be_listener(void)
{
}

void
wake_listener(void)
{
}

#endif

/* ------------------------------------------------------------ its connections */

/* Is this the address of a socket that was accepted from the listening one?  That may have no host
 * of its own; an unnamed unix socket must not pass for one with an abstract name. */
static bool
is_own_address(const struct sockaddr_storage *other, socklen_t other_size)
{
    const struct sockaddr_in *in = (const struct sockaddr_in *)&own_address.name;
    const struct sockaddr_in *other_in = (const struct sockaddr_in *)other;
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)&own_address.name;
    const struct sockaddr_in6 *other_in6 = (const struct sockaddr_in6 *)other;

    if (own_address.name.ss_family != other->ss_family) {
        return false;
    }
    switch (other->ss_family) {
    case AF_INET:
        return in->sin_port == other_in->sin_port &&
               (in->sin_addr.s_addr == htonl(INADDR_ANY) ||
                in->sin_addr.s_addr == other_in->sin_addr.s_addr);
    case AF_INET6:
        return in6->sin6_port == other_in6->sin6_port &&
               (IN6_IS_ADDR_UNSPECIFIED(&in6->sin6_addr) ||
                IN6_ARE_ADDR_EQUAL(&in6->sin6_addr, &other_in6->sin6_addr));
    default:
        return own_address.size == other_size && memcmp(&own_address.name, other, other_size) == 0;
    }
}

bool
is_accepted(int fd)
{
    struct sockaddr_storage name = {0};
    socklen_t size = sizeof name;

    return own_address.size > 0 && getsockname(fd, (struct sockaddr *)&name, &size) == 0 &&
           !is_listening(fd) && is_own_address(&name, size);
}

static bool
end_reading(int fd, void *arg)
{
    struct stat status;

    (void)arg;
    /* Sockets only: closing a duplicate of a file would end the process's locks on the file.  And
     * a duplicate, as the number may be used anew while we look at it. */
    if (fd == spare || fstat(fd, &status) < 0 || !S_ISSOCK(status.st_mode) || !hold_in_spare(fd)) {
        return false;
    }
    if (is_accepted(spare)) {
        shutdown(spare, SHUT_RD);
    }
    (void)hold_in_spare(idle_descriptor());
    return false;
}

static bool
close_connection(int fd, void *arg)
{
    (void)arg;
    if (is_accepted(fd)) {
        close(fd);
    }
    return false;
}

void
end_connections(void)
{
    each_descriptor(end_reading, NULL);
}

void
drop_sockets(void)
{
    each_descriptor(close_connection, NULL);
    if (listener >= 0) {
        close(listener);
        listener = -1;
    }
}

/* ------------------------------------------------------------------- stopping */

/* libmilter's poll() holds the old socket until it returns, up to five seconds later, so that is
 * shut down as well: new connections are refused at once, and the port is free for a successor.  A
 * socket that others may have is left as it is. */
void
stop_listening(void)
{
    bool alone;

    if (atomic_load(&loop_ended) || listener < 0) {
        return;
    }
    if (spare < 0) {
        reserve_descriptors(); /* stopped before it has served, or never to serve */
    }
    alone = !others_listen && hold_in_spare(listener);
    if (dummy >= 0 && replace_descriptor(dummy, listener)) {
        if (alone) {
            shutdown(spare, SHUT_RD);
        }
        wake_listener();
    }
    (void)hold_in_spare(idle_descriptor());
}
