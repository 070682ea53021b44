#include "constants.h"

static const struct {
    const char *name;
    unsigned long value;
} constants[] = {
    {"VERSION", SMFI_VERSION},
    {"PROT_VERSION", SMFI_PROT_VERSION},
    {"SUCCESS", MI_SUCCESS},
    /* verdicts */
    {"CONTINUE", SMFIS_CONTINUE},
    {"REJECT", SMFIS_REJECT},
    {"DISCARD", SMFIS_DISCARD},
    {"ACCEPT", SMFIS_ACCEPT},
    {"TEMPFAIL", SMFIS_TEMPFAIL},
    {"NOREPLY", SMFIS_NOREPLY},
    {"SKIP", SMFIS_SKIP},
    {"ALL_OPTS", SMFIS_ALL_OPTS},
    /* actions */
    {"F_NONE", SMFIF_NONE},
    {"ADDHDRS", SMFIF_ADDHDRS},
    {"CHGBODY", SMFIF_CHGBODY},
    {"MODBODY", SMFIF_MODBODY},
    {"ADDRCPT", SMFIF_ADDRCPT},
    {"DELRCPT", SMFIF_DELRCPT},
    {"CHGHDRS", SMFIF_CHGHDRS},
    {"QUARANTINE", SMFIF_QUARANTINE},
    {"CHGFROM", SMFIF_CHGFROM},
    {"ADDRCPT_PAR", SMFIF_ADDRCPT_PAR},
    {"SETSYMLIST", SMFIF_SETSYMLIST},
    {"V1_ACTS", SMFI_V1_ACTS},
    {"V2_ACTS", SMFI_V2_ACTS},
    {"CURR_ACTS", SMFI_CURR_ACTS},
    /* stages that macros belong to */
    {"M_CONNECT", SMFIM_CONNECT},
    {"M_HELO", SMFIM_HELO},
    {"M_ENVFROM", SMFIM_ENVFROM},
    {"M_ENVRCPT", SMFIM_ENVRCPT},
    {"M_DATA", SMFIM_DATA},
    {"M_EOM", SMFIM_EOM},
    {"M_EOH", SMFIM_EOH},
    /* protocol: steps that the MTA need not send */
    {"P_NOCONNECT", SMFIP_NOCONNECT},
    {"P_NOHELO", SMFIP_NOHELO},
    {"P_NOMAIL", SMFIP_NOMAIL},
    {"P_NORCPT", SMFIP_NORCPT},
    {"P_NOBODY", SMFIP_NOBODY},
    {"P_NOHDRS", SMFIP_NOHDRS},
    {"P_NOEOH", SMFIP_NOEOH},
    {"P_NOUNKNOWN", SMFIP_NOUNKNOWN},
    {"P_NODATA", SMFIP_NODATA},
    /* protocol: steps that the MTA waits for no reply to */
    {"P_NR_CONN", SMFIP_NR_CONN},
    {"P_NR_HELO", SMFIP_NR_HELO},
    {"P_NR_MAIL", SMFIP_NR_MAIL},
    {"P_NR_RCPT", SMFIP_NR_RCPT},
    {"P_NR_DATA", SMFIP_NR_DATA},
    {"P_NR_UNKN", SMFIP_NR_UNKN},
    {"P_NR_HDR", SMFIP_NR_HDR},
    {"P_NOHREPL", SMFIP_NOHREPL},
    {"P_NR_EOH", SMFIP_NR_EOH},
    {"P_NR_BODY", SMFIP_NR_BODY},
    /* protocol: what else may be agreed */
    {"P_SKIP", SMFIP_SKIP},
    {"P_RCPT_REJ", SMFIP_RCPT_REJ},
    {"P_HDR_LEADSPC", SMFIP_HDR_LEADSPC},
#ifdef SMFIP_MDS_256K
    {"P_MDS_256K", SMFIP_MDS_256K},
#endif
#ifdef SMFIP_MDS_1M
    {"P_MDS_1M", SMFIP_MDS_1M},
#endif
    {"V1_PROT", SMFI_V1_PROT},
    {"V2_PROT", SMFI_V2_PROT},
    {"CURR_PROT", SMFI_CURR_PROT},
    {"CHUNK_SIZE", MILTER_CHUNK_SIZE},
    {"MAX_DATA_SIZE", MILTER_MAX_DATA_SIZE},
};

int
add_constants(PyObject *module)
{
    for (size_t i = 0; i < Py_ARRAY_LENGTH(constants); i++) {
        PyObject *value = PyLong_FromUnsignedLong(constants[i].value);
        if (value == NULL || PyModule_AddObject(module, constants[i].name, value) < 0) {
            Py_XDECREF(value);
            return -1;
        }
    }
    return PyModule_AddIntConstant(module, "FAILURE", MI_FAILURE);
}
