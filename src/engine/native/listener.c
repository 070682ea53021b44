/* The listening socket of the native engine. */

#include "listener.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <libmilter/mfapi.h>

#include "socket_name.h"

#define PORT_SIZE 64
#define HOST_SIZE 1025

static char *conn;               /* as given to setconn() */
static int backlog = MI_FAILURE; /* none was given */
static int listener = -1;
static bool others_listen; /* inherited, or shared */

int
listener_setconn(char *address)
{
    char *copy = strdup(address);

    if (copy == NULL) {
        return MI_FAILURE;
    }
    free(conn);
    conn = copy;
    return MI_SUCCESS;
}

int
listener_setbacklog(int connections)
{
    if (connections <= 0) {
        return MI_FAILURE;
    }
    backlog = connections;
    return MI_SUCCESS;
}

int
listener_descriptor(void)
{
    return listener;
}

void
listener_share(void)
{
    others_listen = true;
}

/* ----------------------------------------------------------------- opening it */

static int
new_socket(int family)
{
    int fd = socket(family, SOCK_STREAM, 0);

    if (fd >= 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static bool
start_listening(int fd, const struct sockaddr *address, socklen_t size)
{
    if (bind(fd, address, size) == 0 && listen(fd, backlog > 0 ? backlog : SOMAXCONN) == 0) {
        listener = fd;
        return true;
    }
    close(fd);
    return false;
}

static bool
open_unix(const char *path, bool remove_old)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat status;
    int fd;

    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return false;
    }
    strcpy(address.sun_path, path);
    if (remove_old && lstat(path, &status) == 0 && S_ISSOCK(status.st_mode)) {
        unlink(path);
    }
    fd = new_socket(AF_UNIX);
    return fd >= 0 && start_listening(fd, (struct sockaddr *)&address, sizeof address);
}

static void
copy_part(char *to, size_t room, const char *from, size_t size)
{
    snprintf(to, room, "%.*s", (int)size, from);
}

static bool
open_inet(const SocketName *name)
{
    char host[HOST_SIZE], port[PORT_SIZE];
    int family = name->kind == INET6_SOCKET ? AF_INET6 : AF_INET, on = 1, fd = -1;
    struct addrinfo hints = {
        .ai_family = family, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *found;

    copy_part(port, sizeof port, name->port, name->port_size);
    if (name->host != NULL) {
        copy_part(host, sizeof host, name->host, name->host_size);
    }
    if (getaddrinfo(name->host != NULL ? host : NULL, port, &hints, &found) != 0) {
        errno = EADDRNOTAVAIL;
        return false;
    }
    fd = new_socket(family);
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }
    if (fd < 0 || !start_listening(fd, found->ai_addr, found->ai_addrlen)) {
        freeaddrinfo(found);
        return false;
    }
    freeaddrinfo(found);
    return true;
}

int
listener_open(bool remove_old, int *opened)
{
    SocketName name;
    char advice[SOCKET_ADVICE];
    bool done;

    if (conn == NULL || parse_socket_name(conn, LIBMILTER_ORDER, &name, advice) != NULL) {
        return MI_FAILURE;
    }
    others_listen = name.kind == INHERITED_SOCKET;
    switch (name.kind) {
    case UNIX_SOCKET:
        done = open_unix(name.path, remove_old);
        break;
    case INHERITED_SOCKET:
        listener = name.descriptor;
        done = true;
        break;
    default:
        done = open_inet(&name);
    }
    /* Between the news of a connection and accept() another process may take it, or the peer
     * change its mind. */
    if (!done || fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK) < 0) {
        return MI_FAILURE;
    }
    /* Accepted connections inherit it: an MTA's host that has vanished is noticed in the end. */
    setsockopt(listener, SOL_SOCKET, SO_KEEPALIVE, &(int){1}, sizeof(int));
    *opened = listener;
    return MI_SUCCESS;
}

/* ------------------------------------------------------------------- using it */

int
listener_accept(void)
{
    int fd;
#ifdef SOCK_NONBLOCK
    fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
    fd = accept(listener, NULL, NULL);
    if (fd >= 0 && (fcntl(fd, F_SETFL, O_NONBLOCK) < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)) {
        close(fd);
        fd = -1;
    }
#endif
#ifdef SO_NOSIGPIPE /* where send() has no such flag */
    if (fd >= 0) {
        setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &(int){1}, sizeof(int));
    }
#endif
    return fd;
}

void
listener_close(bool forked)
{
    if (listener >= 0) {
        if (!others_listen && !forked) {
            shutdown(listener, SHUT_RDWR); /* also where a child of the filter has it still */
        }
        close(listener);
        listener = -1;
    }
}
