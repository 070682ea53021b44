/* The steps of the dialogue that reach a filter. */

#ifndef PYMILTER_STAGES_H
#define PYMILTER_STAGES_H

enum stage {
    CONNECT,
    HELO,
    ENVFROM,
    ENVRCPT,
    DATA,
    HEADER,
    EOH,
    BODY,
    EOM,
    ABORT,
    CLOSE,
    UNKNOWN,
    NEGOTIATE,
    STAGES,
    OUTSIDE = -1 /* no callback of this connection is running */
};

#endif
