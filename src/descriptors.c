#include "descriptors.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#define MOST_LOOKED_AT 65536 /* where they cannot be listed */

void
each_descriptor(bool (*visit)(int fd, void *arg), void *arg)
{
#if defined(__linux__) || defined(__APPLE__)
    DIR *directory = opendir("/dev/fd"); /* on Linux a link to /proc/self/fd */
#else
    DIR *directory = NULL; /* FreeBSD shows but the first three there */
#endif
    struct dirent *entry;
    struct rlimit limit;

    if (directory != NULL) {
        while ((entry = readdir(directory)) != NULL) {
            if (entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(directory) &&
                visit(atoi(entry->d_name), arg)) {
                break;
            }
        }
        closedir(directory);
    }
    else if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        int most = limit.rlim_cur < MOST_LOOKED_AT ? (int)limit.rlim_cur : MOST_LOOKED_AT;
        for (int fd = 0; fd < most; fd++) {
            if (visit(fd, arg)) {
                break;
            }
        }
    }
}

bool
is_listening(int fd)
{
    int listening = 0;
    socklen_t size = sizeof listening;

    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) == 0 && listening;
}

bool
replace_descriptor(int source, int fd)
{
#ifdef SOCK_CLOEXEC /* where there is this, there is also dup3() */
    return dup3(source, fd, O_CLOEXEC) >= 0;
#else
    return dup2(source, fd) >= 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
#endif
}
