#include "socket_name.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define DIGITS "0123456789"

static bool
all_digits(const char *s, size_t size)
{
    return size > 0 && strspn(s, DIGITS) >= size;
}

/* Names of services, numbers and addresses hold none of this, nor blanks. */
static bool
holds_mark(const char *s, size_t size, const char *marks)
{
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c <= ' ' || c == 0x7f || strchr(marks, c) != NULL) {
            return true;
        }
    }
    return false;
}

static const char *
set_port(SocketName *name, const char *port, size_t size)
{
    bool number = size > 0 && *port >= '0' && *port <= '9';

    name->port = port;
    name->port_size = size;
    if (size == 0) {
        return "the port is missing: inet:PORT or inet:PORT@HOST";
    }
    if (number ? !all_digits(port, size) || size > 5 || strtol(port, NULL, 10) > 65535
               : holds_mark(port, size, ":[]")) {
        return "the port must be a number up to 65535, or the name of a service";
    }
    return NULL;
}

static const char *
set_host(SocketName *name, const char *host, size_t size)
{
    if (size > 0 && *host == '[') {
        if (host[size - 1] != ']') {
            return "the ']' after the host is missing";
        }
        host++;
        size -= 2;
    }
    name->host = host;
    name->host_size = size;
    if (size == 0) {
        return "the host after '@' is missing";
    }
    if (holds_mark(host, size, "@[]")) {
        return "the host must not hold a blank, '@' or a bracket";
    }
    if (name->kind == INET_SOCKET && memchr(host, ':', size) != NULL) {
        return "an IPv6 address is written inet6:PORT@[ADDRESS]";
    }
    return NULL;
}

/* HOST:PORT, which Postfix writes after inet: for both families. */
static const char *
parse_postfix_order(const char *rest, const char *colon, SocketName *name)
{
    size_t size = (size_t)(colon - rest);
    const char *why = set_port(name, colon + 1, strlen(colon + 1));

    if (why != NULL) {
        return why;
    }
    if (size == 0) {
        return "the host before the port is missing";
    }
    if (memchr(rest, ':', size) != NULL) {
        if (*rest != '[') {
            return "in the order of Postfix an IPv6 address stands in brackets: "
                   "inet:[ADDRESS]:PORT";
        }
        name->kind = INET6_SOCKET;
    }
    return set_host(name, rest, size);
}

/* The colon before the port in the order of Postfix, or NULL.  No service has a name with one. */
static const char *
postfix_colon(const char *rest)
{
    const char *colon = strchr(rest, '@') == NULL ? strrchr(rest, ':') : NULL;

    return colon != NULL && strchr(colon, ']') == NULL ? colon : NULL;
}

static const char *
parse_inet(const char *rest, enum socket_order order, SocketName *name, char *advice)
{
    const char *at = strchr(rest, '@');
    const char *colon = postfix_colon(rest);
    const char *why;

    if (colon != NULL) {
        why = parse_postfix_order(rest, colon, name);
        if (why != NULL || order == EITHER_ORDER) {
            return why;
        }
        snprintf(advice, SOCKET_ADVICE,
                 "that is the order of Postfix; it is written %s:%.40s@%.*s here",
                 name->kind == INET6_SOCKET ? "inet6" : "inet", colon + 1,
                 colon - rest < 200 ? (int)(colon - rest) : 200, rest);
        return advice;
    }
    why = set_port(name, rest, at != NULL ? (size_t)(at - rest) : strlen(rest));
    return why != NULL || at == NULL ? why : set_host(name, at + 1, strlen(at + 1));
}

static const char *
parse_descriptor(const char *rest, SocketName *name)
{
    if (!all_digits(rest, strlen(rest)) || strlen(rest) >= 10) {
        return "fd: needs the number of a descriptor";
    }
    name->descriptor = atoi(rest);
    return NULL;
}

const char *
parse_socket_name(const char *text, enum socket_order order, SocketName *name,
                  char advice[SOCKET_ADVICE])
{
    static const struct {
        const char *name;
        enum socket_kind kind;
    } schemes[] = {
        {"", UNIX_SOCKET},     {"unix", UNIX_SOCKET},   {"local", UNIX_SOCKET},
        {"inet", INET_SOCKET}, {"inet6", INET6_SOCKET}, {"fd", INHERITED_SOCKET},
    };
    const char *colon = strchr(text, ':');
    const char *rest = colon != NULL ? colon + 1 : text;
    size_t size = colon != NULL ? (size_t)(colon - text) : 0;

    *name = (SocketName){.kind = NO_SOCKET};
    for (size_t i = 0; i < sizeof schemes / sizeof *schemes; i++) {
        if (size == strlen(schemes[i].name) && strncasecmp(text, schemes[i].name, size) == 0) {
            name->kind = schemes[i].kind;
        }
    }
    switch (name->kind) {
    case NO_SOCKET:
        if (memchr(text, '/', size) != NULL) {
            return "unknown scheme: a path that holds ':' is written unix:PATH";
        }
        return "unknown scheme: use unix:PATH, inet:PORT@HOST, inet6:PORT@[ADDRESS] or fd:NUMBER";
    case UNIX_SOCKET:
        name->path = rest;
        return *rest == '\0' ? "the path is missing" : NULL;
    case INHERITED_SOCKET:
        return parse_descriptor(rest, name);
    default:
        return parse_inet(rest, order, name, advice);
    }
}

int
socket_port(const SocketName *name)
{
    return (int)strtol(name->port, NULL, 10);
}
