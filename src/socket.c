#include "socket.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "arguments.h"
#include "descriptors.h"
#include "engine/choice.h"
#include "report.h"
#include "socket_name.h"

static char *conn; /* as given to setconn() */

/* Of a unix socket: its absolute path, and what stood there after it was bound.  One thread may
 * remove it while another has handed it over: guarded by LOCK_STATE(), and whoever frees the path
 * has taken it out. */
typedef struct {
    char *path; /* NULL: there is none */
    dev_t device;
    ino_t inode;
} BoundSocket;

static BoundSocket bound;

/* ------------------------------------------------------------------- its name */

/* The name in bytes, owned.  NULL with an exception set, or with why it is none. */
static PyObject *
encode_name(PyObject *value, enum socket_order order, SocketName *name, char advice[SOCKET_ADVICE],
            const char **why)
{
    PyObject *bytes;

    *why = NULL;
    if (!PyUnicode_FSConverter(value, &bytes)) {
        if (PyErr_ExceptionMatches(PyExc_ValueError)) {
            *why = PyErr_ExceptionMatches(PyExc_UnicodeEncodeError) ? "cannot be encoded as a path"
                                                                    : "must not hold NUL";
            PyErr_Clear();
        }
        return NULL;
    }
    *why = parse_socket_name(PyBytes_AS_STRING(bytes), order, name, advice);
    if (*why != NULL) {
        Py_CLEAR(bytes);
    }
    return bytes;
}

PyObject *
socket_name_argument(module_state *state, PyObject *value)
{
    SocketName name;
    char advice[SOCKET_ADVICE];
    const char *why;
    PyObject *bytes = encode_name(value, LIBMILTER_ORDER, &name, advice, &why);

    if (why != NULL) {
        refuse(state, "setconn", "name", why, value);
    }
    return bytes;
}

bool
set_socket_name(const char *name)
{
    char *copy = strdup(name);

    if (copy == NULL || set_engines_conn(copy) != MI_SUCCESS) {
        free(copy);
        return false;
    }
    free(conn);
    conn = copy;
    return true;
}

bool
has_socket_name(void)
{
    return conn != NULL;
}

static const char *
family_of(const SocketName *name)
{
    switch (name->kind) {
    case UNIX_SOCKET:
        return "unix";
    case INET_SOCKET:
        return "inet";
    case INET6_SOCKET:
        return "inet6";
    default:
        return "fd";
    }
}

static PyObject *
path_text(const char *s, size_t size)
{
    return s == NULL ? Py_NewRef(Py_None) : PyUnicode_DecodeFSDefaultAndSize(s, (Py_ssize_t)size);
}

/* _parse_socket(text, either_order=False) -> (family, where, port): "unix" and its path, "inet" or
 * "inet6" with the host, which is None for all interfaces, and the port or service as text, or "fd"
 * with its number.  `either_order` takes Postfix's inet:HOST:PORT as well.  ValueError says what is
 * wrong. */
PyObject *
parse_socket(PyObject *Py_UNUSED(module), PyObject *args)
{
    SocketName name;
    char advice[SOCKET_ADVICE];
    PyObject *value, *bytes, *described;
    const char *why;
    int either = 0;

    if (!PyArg_ParseTuple(args, "O|p:_parse_socket", &value, &either)) {
        return NULL;
    }
    bytes = encode_name(value, either ? EITHER_ORDER : LIBMILTER_ORDER, &name, advice, &why);
    if (why != NULL) {
        PyErr_SetString(PyExc_ValueError, why);
    }
    if (bytes == NULL) {
        return NULL;
    }
    if (name.kind == UNIX_SOCKET) {
        described = Py_BuildValue("(sNO)", family_of(&name),
                                  path_text(name.path, strlen(name.path)), Py_None);
    }
    else if (name.kind == INHERITED_SOCKET) {
        described = Py_BuildValue("(siO)", family_of(&name), name.descriptor, Py_None);
    }
    else {
        described = Py_BuildValue("(sNN)", family_of(&name), path_text(name.host, name.host_size),
                                  path_text(name.port, name.port_size));
    }
    Py_DECREF(bytes);
    return described;
}

/* ---------------------------------------------------- why it cannot be opened */

/* An engine keeps the reason of a failure to itself: find it out. */
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
    struct stat status;

    if (strlen(path) > MAX_SOCKET_PATH) {
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

/* Resolve host and port as the engine would, to say what is wrong with them. */
static int
raise_inet_failure(module_state *state, const SocketName *name)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *list = NULL;
    char port[64], host[NI_MAXHOST] = "";
    bool known;
    int code = 0;

    hints.ai_family = name->kind == INET6_SOCKET ? AF_INET6 : AF_INET;
    snprintf(port, sizeof port, "%.*s", (int)name->port_size, name->port);
    if (name->host != NULL) {
        snprintf(host, sizeof host, "%.*s", (int)name->host_size, name->host);
    }
    Py_BEGIN_ALLOW_THREADS /* the resolver may take its time */
    known = (*port >= '0' && *port <= '9') || getservbyname(port, "tcp") != NULL;
    if (known) {
        code = getaddrinfo(host[0] != '\0' ? host : NULL, port, &hints, &list);
    }
    Py_END_ALLOW_THREADS
    if (!known) {
        return raise_os_error(state, EINVAL, "cannot listen on", conn,
                              "there is no TCP service of that name");
    }
    if (code != 0) {
        return raise_os_error(state, EADDRNOTAVAIL, "cannot listen on", conn, gai_strerror(code));
    }
    code = probe_bind(list->ai_addr, list->ai_addrlen);
    freeaddrinfo(list);
    return raise_os_error(state, code != 0 ? code : EIO, "cannot listen on", conn,
                          code != 0 ? how_to_mend(code, name->kind) : "see the system's log");
}

static int
raise_failure(module_state *state, const SocketName *name)
{
    switch (name->kind) {
    case UNIX_SOCKET:
        return raise_unix_failure(state, name->path);
    case INHERITED_SOCKET:
        return raise_os_error(state, EINVAL, "cannot listen on", conn,
                              "this libmilter does not know fd:");
    default:
        return raise_inet_failure(state, name);
    }
}

/* ----------------------------------------------------------------- opening it */

static BoundSocket
exchange_bound(BoundSocket next)
{
    BoundSocket before;

    LOCK_STATE();
    before = bound;
    bound = next;
    UNLOCK_STATE();
    return before;
}

/* Remember what was bound, so that at stop only that is removed, wherever the process is then. */
static void
note_unix_socket(const char *path)
{
    BoundSocket now = {.path = NULL};
    struct stat status;
    char directory[4096];

    if (path[0] == '/' || getcwd(directory, sizeof directory) == NULL) {
        now.path = strdup(path);
    }
    else {
        size_t size = strlen(directory) + strlen(path) + 2;
        now.path = malloc(size);
        if (now.path != NULL) {
            snprintf(now.path, size, "%s/%s", directory, path);
        }
    }
    if (now.path != NULL && lstat(now.path, &status) == 0) {
        now.device = status.st_dev;
        now.inode = status.st_ino;
    }
    free(exchange_bound(now).path);
}

static int listener = -1;

int
listening_socket(void)
{
    return listener;
}

int
open_socket(module_state *state, bool remove_old)
{
    SocketName name;
    char advice[SOCKET_ADVICE];
    int result, on = 1;

    listener = -1;
    (void)parse_socket_name(conn, LIBMILTER_ORDER, &name, advice);
    if (name.kind == UNIX_SOCKET && check_unix_path(state, name.path) < 0) {
        return -1;
    }
    if (name.kind == INHERITED_SOCKET && !is_listening(name.descriptor)) {
        return raise_os_error(state, ENOTSOCK, "cannot listen on", conn,
                              "it must be a listening socket");
    }
    Py_BEGIN_ALLOW_THREADS
    result = engine->open(remove_old, &listener);
    if (result == MI_SUCCESS && name.kind != UNIX_SOCKET && listener >= 0) {
        /* libmilter writes a reply and each modification in a packet of its own; the second
         * would wait for the delayed acknowledgement of the first, 40 ms.  Connections take
         * the option over from the listening socket: at once, so that hardly one is before it. */
        setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    Py_END_ALLOW_THREADS
    if (result != MI_SUCCESS) {
        return raise_failure(state, &name);
    }
    if (name.kind == UNIX_SOCKET) {
        note_unix_socket(name.path);
    }
    return 0;
}

/* ---------------------------------------------------------------- removing it */

void
remove_unix_socket(void)
{
    BoundSocket ours = exchange_bound((BoundSocket){.path = NULL});
    struct stat status;

    if (ours.path != NULL && lstat(ours.path, &status) == 0 && S_ISSOCK(status.st_mode) &&
        status.st_dev == ours.device && status.st_ino == ours.inode) {
        unlink(ours.path);
    }
    free(ours.path);
}

void
forget_unix_socket(void)
{
    free(exchange_bound((BoundSocket){.path = NULL}).path);
}
