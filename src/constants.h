/* The constants of <libmilter/mfapi.h> and <libmilter/mfdef.h>. */

#ifndef PYMILTER_CONSTANTS_H
#define PYMILTER_CONSTANTS_H

#include "common.h"

int add_constants(PyObject *module);

#endif
