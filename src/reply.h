/* The rules of setreply(). */

#ifndef PYMILTER_REPLY_H
#define PYMILTER_REPLY_H

#include "common.h"

/* A limit that libmilter has and does not export (libmilter.h: MAXREPLIES). */
#define MAX_REPLY_LINES 32

/* A checked reply. */
typedef struct {
    char *code, *enhanced;                /* `enhanced` is NULL for none */
    char *lines[MAX_REPLY_LINES + 1];     /* NULL follows the last one */
    int count;                            /* of lines */
    size_t size;                          /* of the packet that it makes */
    PyObject *owned[MAX_REPLY_LINES + 2]; /* what the above points into */
    int owned_count;
} Reply;

/* Check the arguments of setreply(); free_reply() is due in any case.  False with an exception set,
 * that says which rule is broken.  A warning names the line that is `stack_level` calls up, 1 for
 * the one that called C. */
bool parse_reply(module_state *state, PyObject *args, PyObject *keywords, int stack_level,
                 Reply *reply);
void free_reply(Reply *reply);

#endif
