/* The descriptors of this process. */

#ifndef PYMILTER_DESCRIPTORS_H
#define PYMILTER_DESCRIPTORS_H

#include <stdbool.h>
#include <sys/socket.h>

/* For socket(): a child that is started meanwhile must not hold a connection open. */
#ifdef SOCK_CLOEXEC
#define CLOEXEC SOCK_CLOEXEC
#else
#define CLOEXEC 0
#endif

/* Call `visit` for every open descriptor until it returns true. */
void each_descriptor(bool (*visit)(int fd, void *arg), void *arg);

bool is_listening(int fd);

/* Have `fd` stand for what `source` stands for; programs that are started have neither. */
bool replace_descriptor(int source, int fd);

#endif
