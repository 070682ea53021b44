/* The one grammar of socket names.  No I/O: whether there is such a host or path is not asked. */

#ifndef PYMILTER_SOCKET_NAME_H
#define PYMILTER_SOCKET_NAME_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/un.h>

enum socket_kind { NO_SOCKET, UNIX_SOCKET, INET_SOCKET, INET6_SOCKET, INHERITED_SOCKET };

/* libmilter's form, [scheme:]rest, taken apart; it points into the text. */
typedef struct {
    enum socket_kind kind;
    const char *path; /* of UNIX_SOCKET */
    int descriptor;   /* of INHERITED_SOCKET */

    /* Of INET_SOCKET and INET6_SOCKET.  The port may be the name of a service; the host, without
     * its brackets, is NULL where none is given: all interfaces. */
    const char *port;
    size_t port_size;
    const char *host;
    size_t host_size;
} SocketName;

/* Postfix writes inet:host:port where libmilter writes inet:port@host.  libmilter itself takes the
 * digits at the start of the former for the port. */
enum socket_order { LIBMILTER_ORDER, EITHER_ORDER };

/* The longest path of a unix socket, in bytes: libmilter wants room for two more. */
enum { MAX_SOCKET_PATH = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 2 };

/* Room for why a text is no name of a socket. */
enum { SOCKET_ADVICE = 300 };

/* Take a name apart.  Returns why it is none, or NULL; `advice` is room for a text made to measure.
 * EITHER_ORDER also takes Postfix's where it cannot be mistaken: no '@', and an IPv6 address in
 * brackets.  How long a path may be is not asked. */
const char *parse_socket_name(const char *text, enum socket_order order, SocketName *name,
                              char advice[SOCKET_ADVICE]);

/* The port as a number, 0 where it is the name of a service. */
int socket_port(const SocketName *name);

#endif
