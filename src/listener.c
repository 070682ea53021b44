/* The listening socket: what setconn() says, opening it, and ending it. */

#include "milter.h"

/* A child that is started meanwhile must not hold a connection open. */
#ifdef SOCK_CLOEXEC
#define CLOEXEC SOCK_CLOEXEC
#else
#define CLOEXEC 0
#endif

/* Raise milter.error with an OSError as its cause. */
int
raise_os_error(module_state *state, int code, const char *what, const char *where, const char *mend)
{
    /* In the words, and the encoding, of the locale. */
    PyObject *reason = PyUnicode_DecodeLocale(strerror(code), "surrogateescape");
    PyObject *hint = PyUnicode_DecodeLocale(mend, "surrogateescape");
    PyObject *cause = NULL, *error;

    if (reason != NULL && hint != NULL) {
        cause = PyObject_CallFunction(PyExc_OSError, "iO", code, reason);
    }
    if (cause != NULL) {
        PyErr_Format(state->error, "%s %s: %U%s%U", what, where, reason,
                     mend[0] != '\0' ? ": " : "", hint);
        error = take_exception();
        PyException_SetCause(error, cause);
        raise_exception(error);
    }
    Py_XDECREF(reason);
    Py_XDECREF(hint);
    return -1;
}

/* What `conn` says, in libmilter's form [scheme:]rest. */
typedef struct {
    enum socket_kind kind;
    const char *rest; /* a path, a descriptor, or a port */
    size_t port_size;
    const char *host; /* after '@', or NULL */
} Address;

static bool
all_digits(const char *s, size_t size)
{
    return size > 0 && strspn(s, "0123456789") >= size;
}

static const char *
parse_inet(Address *address, char *advice, size_t advice_size)
{
    const char *rest = address->rest;
    const char *at = strchr(rest, '@');
    const char *colon = strrchr(rest, ':');
    size_t port = at != NULL ? (size_t)(at - rest) : strlen(rest);

    if (at == NULL && colon != NULL && all_digits(colon + 1, strlen(colon + 1))) {
        /* Postfix's order.  libmilter would take the digits at the start for the port. */
        snprintf(advice, advice_size, "that is the order of Postfix; it is written %s:%s@%.*s here",
                 address->kind == INET6_SOCKET || *rest == '[' ? "inet6" : "inet", colon + 1,
                 (int)Py_MIN(colon - rest, 200), rest);
        return advice;
    }
    if (port == 0) {
        return "the port is missing: inet:PORT or inet:PORT@HOST";
    }
    if (*rest >= '0' && *rest <= '9' &&
        (!all_digits(rest, port) || port > 5 || strtol(rest, NULL, 10) > 65535)) {
        return "the port must be a number up to 65535, or the name of a service";
    }
    if (at != NULL && at[1] == '\0') {
        return "the host after '@' is missing";
    }
    if (at != NULL && at[1] == '[' && at[strlen(at) - 1] != ']') {
        return "the ']' after the host is missing";
    }
    address->port_size = port;
    address->host = at != NULL ? at + 1 : NULL;
    return NULL;
}

/* Take a socket's description apart.  Returns why it is wrong, or NULL. */
static const char *
parse_conn(const char *conn, Address *address, char *advice, size_t advice_size)
{
    static const struct {
        const char *name;
        enum socket_kind kind;
    } schemes[] = {
        {"", UNIX_SOCKET},     {"unix", UNIX_SOCKET},   {"local", UNIX_SOCKET},
        {"inet", INET_SOCKET}, {"inet6", INET6_SOCKET}, {"fd", INHERITED_SOCKET},
    };
    const char *colon = strchr(conn, ':');
    size_t size = colon != NULL ? (size_t)(colon - conn) : 0;

    *address = (Address){.kind = NO_SOCKET, .rest = colon != NULL ? colon + 1 : conn};
    for (size_t i = 0; i < Py_ARRAY_LENGTH(schemes); i++) {
        if (size == strlen(schemes[i].name) && strncasecmp(conn, schemes[i].name, size) == 0) {
            address->kind = schemes[i].kind;
        }
    }
    switch (address->kind) {
    case NO_SOCKET:
        return "unknown scheme: use unix:PATH, inet:PORT@HOST, inet6:PORT@[ADDRESS] or fd:NUMBER";
    case UNIX_SOCKET:
        return *address->rest == '\0' ? "the path is missing" : NULL;
    case INHERITED_SOCKET:
        return all_digits(address->rest, strlen(address->rest)) && strlen(address->rest) < 10
                   ? NULL
                   : "fd: needs the number of a descriptor";
    default:
        return parse_inet(address, advice, advice_size);
    }
}

/* Why setconn() refuses a description, or NULL; `advice` is room for a text made to measure. */
const char *
why_bad_conn(const char *conn, char *advice, size_t advice_size)
{
    Address address;

    return parse_conn(conn, &address, advice, advice_size);
}

/* Call `visit` for every open descriptor until it returns true. */
static void
each_descriptor(bool (*visit)(int fd, void *arg), void *arg)
{
#if defined(__linux__) || defined(__APPLE__)
    DIR *directory = opendir("/dev/fd"); /* on Linux a link to /proc/self/fd */
#else
    DIR *directory = NULL; /* FreeBSD shows but the first three there */
#endif
    struct dirent *entry;
    struct rlimit limit;

    if (directory != NULL) {
        while ((entry = readdir(directory)) != NULL) {
            if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(directory) &&
                visit(atoi(entry->d_name), arg)) {
                break;
            }
        }
        closedir(directory);
    }
    else if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        for (int fd = 0; fd < (int)Py_MIN(limit.rlim_cur, 65536); fd++) {
            if (visit(fd, arg)) {
                break;
            }
        }
    }
}

bool
is_listening(int fd)
{
    int listening = 0;
    socklen_t size = sizeof listening;

    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening;
}

/* libmilter does not say which descriptor it listens on: it is the listening socket at that
 * address that was not there before.  Other threads may open listening sockets meanwhile. */
#define LOOKED_AT 65536 /* descriptors */

typedef struct {
    const Address *address;
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
is_at(int fd, const Address *address)
{
    struct sockaddr_storage name = {0};
    socklen_t size = sizeof name;
    int family = address->kind == UNIX_SOCKET    ? AF_UNIX
                 : address->kind == INET6_SOCKET ? AF_INET6
                                                 : AF_INET;
    long port = strtol(address->rest, NULL, 10); /* 0: the name of a service */

    if (getsockname(fd, (struct sockaddr *)&name, &size) < 0 || name.ss_family != family) {
        return false;
    }
    switch (address->kind) {
    case UNIX_SOCKET:
        return strcmp(((struct sockaddr_un *)&name)->sun_path, address->rest) == 0;
    case INET6_SOCKET:
        return port == 0 || ntohs(((struct sockaddr_in6 *)&name)->sin6_port) == port;
    default:
        return port == 0 || ntohs(((struct sockaddr_in *)&name)->sin_port) == port;
    }
}

static bool
find_new_listener(int fd, void *arg)
{
    ListenerSearch *search = arg;

    if (!is_listening(fd) || (fd < LOOKED_AT && search->known[fd / 8] & 1 << fd % 8) ||
        !is_at(fd, search->address)) {
        return false;
    }
    search->found = fd;
    return true;
}

/* libmilter keeps the reason of a failure to itself (it goes to syslog): find it out. */
static int
probe_bind(const struct sockaddr *address, socklen_t size)
{
    int on = 1, code = 0;
    int fd = socket(address->sa_family, SOCK_STREAM | CLOEXEC, 0);

    if (fd < 0) {
        return errno;
    }
    if (address->sa_family != AF_UNIX) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }
    if (bind(fd, address, size) < 0 || listen(fd, 1) < 0) {
        code = errno;
    }
    else if (address->sa_family == AF_UNIX) {
        unlink(((const struct sockaddr_un *)address)->sun_path);
    }
    close(fd);
    return code;
}

static const char *
how_to_mend(int code, enum socket_kind kind)
{
    switch (code) {
    case ENOENT:
        return "create the directory first";
    case ENOTDIR:
        return "a part of the path is no directory";
    case EACCES:
    case EPERM:
        return kind == UNIX_SOCKET ? "let the filter's user write to the directory"
                                   : "ports below 1024 need privileges";
    case EADDRINUSE:
        return kind == UNIX_SOCKET
                   ? "another filter may be running; opensocket(True) removes what it left behind"
                   : "another process listens there; end it or use another port";
    case EADDRNOTAVAIL:
        return "this host has no such address";
    case EROFS:
        return "the file system is read-only";
    case ENAMETOOLONG:
        return "use a shorter path";
    default:
        return "";
    }
}

static int
check_unix_path(module_state *state, const char *path)
{
    struct sockaddr_un address;
    struct stat status;

    if (strlen(path) + 2 > sizeof address.sun_path) {
        return raise_os_error(state, ENAMETOOLONG, "cannot open the unix socket", path,
                              how_to_mend(ENAMETOOLONG, UNIX_SOCKET));
    }
    if (lstat(path, &status) == 0 && !S_ISSOCK(status.st_mode)) {
        return raise_os_error(state, EEXIST, "cannot open the unix socket", path,
                              "it is no socket and is left alone; use another path");
    }
    return 0;
}

static int
raise_unix_failure(module_state *state, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int code;

    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    code = probe_bind((struct sockaddr *)&address, sizeof address);
    return raise_os_error(state, code != 0 ? code : EIO, "cannot open the unix socket", path,
                          code != 0 ? how_to_mend(code, UNIX_SOCKET) : "see the system's log");
}

/* Resolve host and port as libmilter would, to say what is wrong with them. */
static int
raise_inet_failure(module_state *state, const Address *address)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *list = NULL;
    char port[64], host[NI_MAXHOST] = "";
    bool known;
    int code = 0;

    hints.ai_family = address->kind == INET6_SOCKET ? AF_INET6 : AF_INET;
    snprintf(port, sizeof port, "%.*s", (int)address->port_size, address->rest);
    if (address->host != NULL) {
        size_t size = strlen(address->host);
        bool bracketed = address->host[0] == '[';
        snprintf(host, sizeof host, "%.*s", (int)(bracketed ? size - 2 : size),
                 address->host + bracketed);
    }
    Py_BEGIN_ALLOW_THREADS /* the resolver may take its time */
    known = all_digits(port, strlen(port)) || getservbyname(port, "tcp") != NULL;
    if (known) {
        code = getaddrinfo(host[0] != '\0' ? host : NULL, port, &hints, &list);
    }
    Py_END_ALLOW_THREADS
    if (!known) {
        return raise_os_error(state, EINVAL, "cannot listen on", filter.conn,
                              "there is no TCP service of that name");
    }
    if (code != 0) {
        return raise_os_error(state, EADDRNOTAVAIL, "cannot listen on", filter.conn,
                              gai_strerror(code));
    }
    code = probe_bind(list->ai_addr, list->ai_addrlen);
    freeaddrinfo(list);
    return raise_os_error(state, code != 0 ? code : EIO, "cannot listen on", filter.conn,
                          code != 0 ? how_to_mend(code, address->kind) : "see the system's log");
}

static LocalAddress own_address; /* of the listening socket; no size where it is not known */

/* Remember what was bound, so that at stop only that is removed, wherever the process is then. */
static void
note_unix_socket(const char *path)
{
    struct stat status;
    char directory[4096];

    if (path[0] == '/' || getcwd(directory, sizeof directory) == NULL) {
        filter.path = strdup(path);
    }
    else {
        size_t size = strlen(directory) + strlen(path) + 2;
        filter.path = malloc(size);
        if (filter.path != NULL) {
            snprintf(filter.path, size, "%s/%s", directory, path);
        }
    }
    if (filter.path != NULL && lstat(filter.path, &status) == 0) {
        filter.device = status.st_dev;
        filter.inode = status.st_ino;
    }
}

int
open_socket(module_state *state, bool remove_old)
{
    Address address;
    ListenerSearch search = {.address = &address, .found = -1};
    char advice[300];
    int result, on = 1;

    (void)parse_conn(filter.conn, &address, advice, sizeof advice);
    if (address.kind == UNIX_SOCKET && check_unix_path(state, address.rest) < 0) {
        return -1;
    }
    if (address.kind == INHERITED_SOCKET && !is_listening(atoi(address.rest))) {
        return raise_os_error(state, ENOTSOCK, "cannot listen on", filter.conn,
                              "it must be a listening socket");
    }
    each_descriptor(note_listener, &search);
    Py_BEGIN_ALLOW_THREADS
    result = smfi_opensocket(remove_old);
    Py_END_ALLOW_THREADS
    if (result != MI_SUCCESS) {
        if (address.kind == UNIX_SOCKET) {
            return raise_unix_failure(state, address.rest);
        }
        if (address.kind == INHERITED_SOCKET) {
            return raise_os_error(state, EINVAL, "cannot listen on", filter.conn,
                                  "this libmilter does not know fd:");
        }
        return raise_inet_failure(state, &address);
    }
    filter.kind = address.kind;
    if (address.kind == INHERITED_SOCKET) {
        search.found = atoi(address.rest);
    }
    else {
        each_descriptor(find_new_listener, &search);
    }
    filter.listener = search.found;
    own_address.size = sizeof own_address.name;
    if (getsockname(search.found, (struct sockaddr *)&own_address.name, &own_address.size) < 0) {
        own_address.size = 0;
    }
    if (address.kind == UNIX_SOCKET) {
        note_unix_socket(address.rest);
    }
    else if (filter.listener >= 0) {
        /* libmilter writes a reply and each modification in a packet of its own; the second
         * would wait for the delayed acknowledgement of the first, 40 ms.  Connections take
         * the option over from the listening socket. */
        setsockopt(filter.listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    return 0;
}

/* A socket without a name, so that nobody can send to it: libmilter's listener, which asks only
 * whether there is something to accept, sleeps on it for good. */
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

/* Descriptors for the stop, taken before the filter serves: when it is asked to stop there may be
 * none left. */
static int dummy = -1; /* libmilter's listener will sleep on it */
static int spare = -1; /* its number is for one duplicate at a time */

/* What `spare` stands for while it is not in use. */
static int
idle_descriptor(void)
{
    return dummy >= 0 ? dummy : filter.pipe[0];
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

/* Have `fd` stand for what `source` stands for; a child that is started meanwhile has neither. */
static bool
replace_descriptor(int source, int fd)
{
#ifdef SOCK_CLOEXEC /* where there is this, there is also dup3() */
    return dup3(source, fd, O_CLOEXEC) >= 0;
#else
    return dup2(source, fd) >= 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
#endif
}

static bool
hold_in_spare(int fd)
{
    return spare >= 0 && replace_descriptor(fd, spare);
}

void
remove_unix_socket(void)
{
    struct stat status;

    if (filter.path != NULL && lstat(filter.path, &status) == 0 && S_ISSOCK(status.st_mode) &&
        status.st_dev == filter.device && status.st_ino == filter.inode) {
        unlink(filter.path);
    }
    free(filter.path);
    filter.path = NULL;
}

/* Was a socket with this address accepted from the listening one?  That may have no host of its
 * own; an unnamed unix socket must not pass for one with an abstract name. */
static bool
same_local_address(const LocalAddress *local, const struct sockaddr_storage *other,
                   socklen_t other_size)
{
    const struct sockaddr_in *in = (const struct sockaddr_in *)&local->name;
    const struct sockaddr_in *other_in = (const struct sockaddr_in *)other;
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)&local->name;
    const struct sockaddr_in6 *other_in6 = (const struct sockaddr_in6 *)other;

    if (local->name.ss_family != other->ss_family) {
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
        return local->size == other_size && memcmp(&local->name, other, other_size) == 0;
    }
}

static bool
is_connection(int fd, const LocalAddress *local)
{
    struct sockaddr_storage name = {0};
    socklen_t size = sizeof name;

    return getsockname(fd, (struct sockaddr *)&name, &size) == 0 && !is_listening(fd) &&
           same_local_address(local, &name, size);
}

static bool
end_reading(int fd, void *arg)
{
    struct stat status;

    /* Sockets only: closing a duplicate of a file would end the process's locks on the file.  And
     * a duplicate, as the number may be used anew while we look at it. */
    if (fd == spare || fstat(fd, &status) < 0 || !S_ISSOCK(status.st_mode) || !hold_in_spare(fd)) {
        return false;
    }
    if (is_connection(spare, arg)) {
        shutdown(spare, SHUT_RD);
    }
    (void)hold_in_spare(idle_descriptor());
    return false;
}

static bool
close_connection(int fd, void *Py_UNUSED(arg))
{
    if (is_connection(fd, &own_address)) {
        close(fd);
    }
    return false;
}

/* In a forked child: what it held would stay open for the MTA when the filter closes it, and the
 * port would be taken, for as long as the child lives. */
void
drop_sockets(void)
{
    if (own_address.size > 0) {
        each_descriptor(close_connection, NULL);
    }
    if (filter.listener >= 0) {
        close(filter.listener);
        filter.listener = -1;
    }
}

/* Have libmilter's listener look whether it shall stop, by a connection that ends at once. */
void
poke_listener(void)
{
    struct sockaddr_storage name = {0};
    socklen_t size = sizeof name;
    struct sockaddr_in *in = (struct sockaddr_in *)&name;
    struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&name;
    int fd;

    if (getsockname(filter.listener, (struct sockaddr *)&name, &size) < 0) {
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

/* Put a socket that nobody can reach in the place of the one that libmilter listens on.  Its
 * poll() holds the old one until it returns, up to five seconds later, so that is shut down as
 * well: new connections are refused at once, and the port is free for a successor.  A socket
 * that was inherited is left as it is, since other processes may listen on it too; so is that of
 * several workers. */
void
stop_listening(LocalAddress *local)
{
    bool alone;

    if (leave_socket(local)) {
        return;
    }
    local->size = sizeof local->name;
    if (atomic_load(&filter.listener_ended) || filter.listener < 0 ||
        getsockname(filter.listener, (struct sockaddr *)&local->name, &local->size) < 0) {
        remove_unix_socket();
        return;
    }
    if (spare < 0) {
        reserve_descriptors(); /* stopped before it has served, or a supervisor */
    }
    alone = filter.kind != INHERITED_SOCKET && !others_listen() && hold_in_spare(filter.listener);
    if (dummy >= 0 && replace_descriptor(dummy, filter.listener)) {
        if (alone) {
            shutdown(spare, SHUT_RD);
        }
        wake_listener();
    }
    remove_unix_socket(); /* while our socket lives, nobody else has its inode */
    (void)hold_in_spare(idle_descriptor());
}

/* Shut down for reading what was accepted from the listening socket: libmilter still writes
 * the replies that it owes, and then finds the end of each connection. */
void
end_connections(LocalAddress *local)
{
    if (local->size > 0) {
        each_descriptor(end_reading, local);
    }
}
