/* The listening socket: what setconn() says, and opening it. */

#ifndef PYMILTER_SOCKET_H
#define PYMILTER_SOCKET_H

#include "common.h"

/* The name of a socket from Python as bytes, owned, that parse_socket_name() takes; NULL with an
 * exception set, which says what is wrong. */
PyObject *socket_name_argument(module_state *state, PyObject *value);

/* Where the filter will listen; with LOCK_STATE() held.  False: the engine has no memory. */
bool set_socket_name(const char *name);
bool has_socket_name(void);

/* Open the socket.  -1 with milter.error set, which says what is wrong and how to mend it. */
int open_socket(module_state *state, bool remove_old);

/* The descriptor of the open socket, which is the engine's; -1 where there is none. */
int listening_socket(void);

/* Remove the unix socket's path, if it is still ours. */
void remove_unix_socket(void);

/* It is not ours to remove: another process opened it. */
void forget_unix_socket(void);

/* milter._parse_socket */
PyObject *parse_socket(PyObject *module, PyObject *args);

#endif
