#include "trampolines.h"

#include <string.h>
#include <sys/socket.h>

#include "call.h"
#include "negotiate.h"
#include "text.h"

static sfsistat
on_connect(SMFICTX *handle, char *hostname, _SOCK_ADDR *address)
{
    Call call;

    if (begin(&call, handle, CONNECT)) {
        keep_client(&call.step, hostname, address);
        ADD_ARGUMENT(&call, text_from(hostname, strlen(hostname)));
        ADD_ARGUMENT(&call, PyLong_FromLong(address != NULL ? address->sa_family : 0));
        ADD_ARGUMENT(&call, client_address(address));
    }
    return finish(&call);
}

static sfsistat
on_helo(SMFICTX *handle, char *hostname)
{
    Call call;

    if (begin(&call, handle, HELO)) {
        ADD_ARGUMENT(&call, text_from(hostname, strlen(hostname)));
    }
    return finish(&call);
}

/* MAIL and RCPT: the address and each ESMTP parameter, as bytes. */
static sfsistat
on_envelope(SMFICTX *handle, enum stage stage, char **argv)
{
    Call call;

    if (begin(&call, handle, stage)) {
        size_t count = 0;
        while (argv[count] != NULL) {
            count++;
        }
        if (!make_room_for(&call, count)) {
            return finish(&call);
        }
        for (size_t i = 0; i < count; i++) {
            ADD_ARGUMENT(&call, PyBytes_FromString(argv[i]));
        }
    }
    return finish(&call);
}

static sfsistat
on_envfrom(SMFICTX *handle, char **argv)
{
    return on_envelope(handle, ENVFROM, argv);
}

static sfsistat
on_envrcpt(SMFICTX *handle, char **argv)
{
    return on_envelope(handle, ENVRCPT, argv);
}

static sfsistat
on_header(SMFICTX *handle, char *name, char *value)
{
    Call call;

    if (begin(&call, handle, HEADER)) {
        ADD_ARGUMENT(&call, text_from(name, strlen(name)));
        ADD_ARGUMENT(&call, PyBytes_FromString(value));
    }
    return finish(&call);
}

static sfsistat
on_body(SMFICTX *handle, unsigned char *chunk, size_t size)
{
    Call call;

    if (begin(&call, handle, BODY)) {
        ADD_ARGUMENT(&call, PyBytes_FromStringAndSize((const char *)chunk, (Py_ssize_t)size));
    }
    return finish(&call);
}

static sfsistat
on_unknown(SMFICTX *handle, const char *command)
{
    Call call;

    if (begin(&call, handle, UNKNOWN)) {
        ADD_ARGUMENT(&call, text_from(command, strlen(command)));
    }
    return finish(&call);
}

static sfsistat
on_bare(SMFICTX *handle, enum stage stage)
{
    Call call;

    begin(&call, handle, stage);
    return finish(&call);
}

static sfsistat
on_data(SMFICTX *handle)
{
    return on_bare(handle, DATA);
}

static sfsistat
on_eoh(SMFICTX *handle)
{
    return on_bare(handle, EOH);
}

static sfsistat
on_eom(SMFICTX *handle)
{
    return on_bare(handle, EOM);
}

static sfsistat
on_abort(SMFICTX *handle)
{
    return on_bare(handle, ABORT);
}

static sfsistat
on_close(SMFICTX *handle)
{
    return on_bare(handle, CLOSE);
}

struct smfiDesc
describe_filter(char *name)
{
    return (struct smfiDesc){
        .xxfi_name = name,
        .xxfi_version = SMFI_VERSION,
        .xxfi_flags = SMFI_CURR_ACTS,
        .xxfi_connect = on_connect,
        .xxfi_helo = on_helo,
        .xxfi_envfrom = on_envfrom,
        .xxfi_envrcpt = on_envrcpt,
        .xxfi_header = on_header,
        .xxfi_eoh = on_eoh,
        .xxfi_body = on_body,
        .xxfi_eom = on_eom,
        .xxfi_abort = on_abort,
        .xxfi_close = on_close,
        .xxfi_unknown = on_unknown,
        .xxfi_data = on_data,
        .xxfi_negotiate = on_negotiate,
    };
}
