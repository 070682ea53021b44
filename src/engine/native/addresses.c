/* The client that an MTA tells of. */

#include "addresses.h"

#include <arpa/inet.h>
#include <string.h>
#include <strings.h>

#include <libmilter/mfapi.h>
#include <libmilter/mfdef.h>

/* sendmail writes this before the addresses of RFC 5321, section 4.1.3; not all MTAs do. */
#define IPV6_TAG "IPv6:"

static enum client_state
parse_inet6(const char *text, struct sockaddr_in6 *address)
{
    if (strncasecmp(text, IPV6_TAG, sizeof IPV6_TAG - 1) == 0) {
        text += sizeof IPV6_TAG - 1;
    }
    address->sin6_family = AF_INET6;
    return inet_pton(AF_INET6, text, &address->sin6_addr) == 1 ? CLIENT_KNOWN : CLIENT_BAD;
}

static enum client_state
parse_inet(const char *text, struct sockaddr_in *address)
{
    address->sin_family = AF_INET;
    return inet_aton(text, &address->sin_addr) == 1 ? CLIENT_KNOWN : CLIENT_BAD;
}

static enum client_state
parse_local(const char *text, struct sockaddr_un *address)
{
    size_t size = strlen(text) + 1;

    if (size > sizeof address->sun_path) {
        return CLIENT_BAD;
    }
    address->sun_family = AF_UNIX;
    memcpy(address->sun_path, text, size);
    return CLIENT_KNOWN;
}

enum client_state
parse_client(const char *data, size_t size, union client_address *address)
{
    size_t host = strnlen(data, size) + 1; /* with its NUL */
    in_port_t port;
    const char *text;

    if (host >= size) {
        return CLIENT_BAD;
    }
    if (data[host] == SMFIA_UNKNOWN) {
        return CLIENT_UNKNOWN;
    }
    if (host + 1 + sizeof port >= size || data[size - 1] != '\0') {
        return CLIENT_BAD;
    }
    memset(address, 0, sizeof *address);
    memcpy(&port, data + host + 1, sizeof port); /* in network order */
    text = data + host + 1 + sizeof port;
    switch (data[host]) {
    case SMFIA_INET:
        address->inet.sin_port = port;
        return parse_inet(text, &address->inet);
    case SMFIA_INET6:
        address->inet6.sin6_port = port;
        return parse_inet6(text, &address->inet6);
    case SMFIA_UNIX:
        return parse_local(text, &address->local);
    default:
        return CLIENT_BAD;
    }
}
