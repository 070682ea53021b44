/* The client that an MTA tells of: host name and address, from the data of SMFIC_CONNECT. */

#ifndef PYMILTER_ENGINE_NATIVE_ADDRESSES_H
#define PYMILTER_ENGINE_NATIVE_ADDRESSES_H

#include <netinet/in.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

union client_address {
    struct sockaddr any;
    struct sockaddr_in inet;
    struct sockaddr_in6 inet6;
    struct sockaddr_un local;
};

enum client_state { CLIENT_BAD, CLIENT_UNKNOWN, CLIENT_KNOWN };

/* CLIENT_UNKNOWN: the MTA knows no address.  `data` begins with the host name and its NUL. */
enum client_state parse_client(const char *data, size_t size, union client_address *address);

#endif
