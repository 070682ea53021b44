/* Which engine serves.
 *
 * One does, and it may be chosen until its socket is open; what is set up before that is set up in
 * all that there are, so that the choice may come at any time. */

#ifndef PYMILTER_ENGINE_CHOICE_H
#define PYMILTER_ENGINE_CHOICE_H

#include "engine.h"

/* The one that serves in this process; libmilter, where nothing else was asked for. */
extern const struct engine *engine;

/* "'libmilter' or 'native'": those that there are, for messages. */
#define ENGINE_NAMES "'libmilter' or 'native'"

/* By the name that users write.  False, and nothing has changed, where there is none such. */
bool choose_engine(const char *name);

/* The one that is chosen is libmilter. */
bool is_libmilter(void);

/* What PYMILTER_ENGINE says, where that names none and nothing was chosen since; or NULL. */
const char *unknown_engine(void);

/* struct engine: in all of them; the result is that of the chosen one, or of the first failure. */
int set_up_engines(const struct smfiDesc *filter, const struct engine_hooks *hooks);
int set_engines_conn(char *address);
void set_engines_timeout(int seconds);
void set_engines_backlog(int connections);
void set_engines_dbg(int level);
size_t set_engines_maxdatasize(size_t bytes);

#endif
