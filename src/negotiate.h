/* What is agreed with the MTA at the beginning of a connection. */

#ifndef PYMILTER_NEGOTIATE_H
#define PYMILTER_NEGOTIATE_H

#include "common.h"

sfsistat on_negotiate(SMFICTX *handle, unsigned long actions, unsigned long protocol,
                      unsigned long f2, unsigned long f3, unsigned long *want_actions,
                      unsigned long *want_protocol, unsigned long *want_f2, unsigned long *want_f3);

#endif
