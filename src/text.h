/* Text and addresses from the wire, as Python gets them and as the log does. */

#ifndef PYMILTER_TEXT_H
#define PYMILTER_TEXT_H

#include "common.h"

/* No byte that a client sends may become an exception here. */
PyObject *text_from(const char *s, size_t size);

/* For one line of a log: short, with nothing that could begin another, and fit for every encoding
 * that knows UTF-8. */
PyObject *text_for_log(const char *text);

/* The address of the SMTP client in the form that the module `socket` uses: (ip, port),
 * (ip6, port, flowinfo, scope_id), a path, or None where the MTA gave none or one of a
 * family that libmilter does not know. */
PyObject *client_address(const _SOCK_ADDR *address);

#endif
