/* The forms of callbacks that get bytes: see decoder.c. */

#ifndef PYMILTER_DECODER_H
#define PYMILTER_DECODER_H

#include "common.h"

/* The class from which Milter.Base inherits, owned; NULL with an exception set. */
PyObject *make_decoder_type(PyObject *module);

#endif
