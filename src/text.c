#include "text.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

PyObject *
text_from(const char *s, size_t size)
{
    return PyUnicode_DecodeUTF8(s, (Py_ssize_t)size, "surrogateescape");
}

/* How many bytes of UTF-8 at `s` are something that could begin a line or steer a terminal. */
static size_t
size_of_control(const unsigned char *s)
{
    if (s[0] < ' ' || s[0] == 0x7F) {
        return 1;
    }
    if (s[0] == 0xC2 && s[1] >= 0x80 && s[1] < 0xA0) {
        return 2; /* C1 */
    }
    return s[0] == 0xE2 && s[1] == 0x80 && (s[2] == 0xA8 || s[2] == 0xA9) ? 3 : 0; /* separators */
}

PyObject *
text_for_log(const char *text)
{
    const unsigned char *s = (const unsigned char *)text;
    char line[200];
    size_t size = 0;

    while (*s != '\0' && size < sizeof line) {
        size_t control = size_of_control(s);
        line[size++] = control > 0 ? '?' : (char)*s;
        s += Py_MAX(control, 1);
    }
    return PyUnicode_DecodeUTF8(line, (Py_ssize_t)size, "backslashreplace");
}

static PyObject *
ip_text(int family, const void *address)
{
    char text[INET6_ADDRSTRLEN];

    if (inet_ntop(family, address, text, sizeof text) == NULL) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyUnicode_FromString(text);
}

PyObject *
client_address(const _SOCK_ADDR *address)
{
    if (address != NULL && address->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;
        return Py_BuildValue("(Ni)", ip_text(AF_INET, &in->sin_addr), ntohs(in->sin_port));
    }
    if (address != NULL && address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)address;
        return Py_BuildValue("(NiII)", ip_text(AF_INET6, &in6->sin6_addr), ntohs(in6->sin6_port),
                             ntohl(in6->sin6_flowinfo), in6->sin6_scope_id);
    }
    if (address != NULL && address->sa_family == AF_UNIX) {
        const struct sockaddr_un *un = (const struct sockaddr_un *)address;
        /* A path that fills the array has no NUL at its end. */
        return text_from(un->sun_path, strnlen(un->sun_path, sizeof un->sun_path));
    }
    Py_RETURN_NONE;
}
