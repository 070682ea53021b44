/* Waiting for descriptors: epoll, kqueue, or poll where there is neither. */

#ifndef PYMILTER_ENGINE_NATIVE_POLLER_H
#define PYMILTER_ENGINE_NATIVE_POLLER_H

#include <stdbool.h>
#include <stdint.h>

#define POLLER_EVENTS 64 /* at a time */

struct poller_event {
    void *tag;
    bool readable; /* or at its end, or broken: reading tells */
    bool writable;
    bool ended; /* the peer will send nothing more */
};

struct poller;

/* NULL: errno tells why. */
struct poller *poller_open(void);
void poller_close(struct poller *poller);

/* In the child of a fork: its descriptors are closed, and what others do with them goes on. */
void poller_forget(struct poller *poller);

/* Watch a descriptor, which goes by `tag`; `shared`: other processes watch it too, and it is enough
 * that one of them wakes.  From any thread, also while another waits.  False: errno tells why. */
bool poller_add(struct poller *poller, int fd, void *tag, bool writing, bool shared);
bool poller_change(struct poller *poller, int fd, void *tag, bool writing);
void poller_remove(struct poller *poller, int fd);

/* Wait for nothing but the end of what the peer sends, or that the connection breaks; `watched`:
 * the descriptor is watched already.  Whether it is watched now. */
bool poller_watch_end(struct poller *poller, int fd, void *tag, bool watched);

/* Wait for up to `timeout` milliseconds (-1: for ever), or until poller_wake().  How many events
 * there are; 0 also where it was woken. */
int poller_wait(struct poller *poller, struct poller_event events[POLLER_EVENTS], int timeout);

/* A descriptor, the caller's, that can be read while there are events; -1: there is none such. */
int poller_descriptor(const struct poller *poller);

/* Have who waits, or will wait next, return.  From any thread, and from a signal handler. */
void poller_wake(struct poller *poller);

#endif
