/* What a filter does to a message, and asks of its connection: the methods of the context object.
 */

#ifndef PYMILTER_ACTIONS_H
#define PYMILTER_ACTIONS_H

#include "common.h"

extern PyType_Spec context_spec;

/* May libmilter's `call`, one of those that change something, be made in the callback of `stage`,
 * with these actions agreed?  False with milter.error set, which says why not. */
bool check_moment(const module_state *state, const char *call, enum stage stage,
                  unsigned long agreed);

/* What setmaxdatasize() allows, in bytes, for a packet to the MTA. */
size_t get_packet_limit(void);
void set_packet_limit(size_t size);

#endif
