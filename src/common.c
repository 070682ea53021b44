#include "common.h"

const StageInfo stages[STAGES] = {
    [CONNECT] = {"connect", NAMES, SMFIP_NOCONNECT, SMFIP_NR_CONN, false},
    [HELO] = {"helo", HELLO_NAME, SMFIP_NOHELO, SMFIP_NR_HELO, false},
    [ENVFROM] = {"envfrom", ENVFROM_BYTES, SMFIP_NOMAIL, SMFIP_NR_MAIL, true},
    [ENVRCPT] = {"envrcpt", ENVRCPT_BYTES, SMFIP_NORCPT, SMFIP_NR_RCPT, true},
    [DATA] = {"data", DATA_NAME, SMFIP_NODATA, SMFIP_NR_DATA, true},
    [HEADER] = {"header", HEADER_BYTES, SMFIP_NOHDRS, SMFIP_NR_HDR, true},
    [EOH] = {"eoh", EOH_NAME, SMFIP_NOEOH, SMFIP_NR_EOH, true},
    [BODY] = {"body", BODY_NAME, SMFIP_NOBODY, SMFIP_NR_BODY, true},
    [EOM] = {"eom", EOM_NAME, 0, 0, true},
    [ABORT] = {"abort", ABORT_NAME, 0, 0, false},
    [CLOSE] = {"close", NAMES, 0, 0, false},
    [UNKNOWN] = {"unknown", UNKNOWN_NAME, SMFIP_NOUNKNOWN, SMFIP_NR_UNKN, false},
    [NEGOTIATE] = {"negotiate", NAMES, 0, 0, false},
};

const char *const names[NAMES] = {
    [ABORT_NAME] = "abort",
    [BODY_NAME] = "body",
    [DATA_NAME] = "data",
    [ENVFROM_NAME] = "envfrom",
    [ENVFROM_BYTES] = "envfrom_bytes",
    [ENVFROM_ERRORS] = "_envfrom_errors",
    [ENVRCPT_NAME] = "envrcpt",
    [ENVRCPT_BYTES] = "envrcpt_bytes",
    [ENVRCPT_ERRORS] = "_envrcpt_errors",
    [EOH_NAME] = "eoh",
    [EOM_NAME] = "eom",
    [HEADER_NAME] = "header",
    [HEADER_BYTES] = "header_bytes",
    [HEADER_ERRORS] = "_header_errors",
    [HELLO_NAME] = "hello",
    [UNKNOWN_NAME] = "unknown",
};

#ifdef Py_GIL_DISABLED
PyMutex state_guard;
#endif

module_state *active_module;
