#include "wake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <unistd.h>

static atomic_int main_pipe[2] = {-1, -1};

bool
open_wake_pipe(int ends[2])
{
#ifdef SOCK_CLOEXEC /* where there is this, there is also pipe2() */
    return pipe2(ends, O_NONBLOCK | O_CLOEXEC) == 0;
#else
    if (pipe(ends) < 0) {
        return false;
    }
    for (int i = 0; i < 2; i++) {
        fcntl(ends[i], F_SETFL, O_NONBLOCK);
        fcntl(ends[i], F_SETFD, FD_CLOEXEC);
    }
    return true;
#endif
}

bool
open_main_pipe(void)
{
    int ends[2];

    if (main_pipe[0] < 0) {
        if (!open_wake_pipe(ends)) {
            return false;
        }
        main_pipe[0] = ends[0];
        main_pipe[1] = ends[1];
    }
    return true;
}

void
close_main_pipe(void)
{
    for (int i = 0; i < 2; i++) {
        if (main_pipe[i] >= 0) {
            close(main_pipe[i]);
            main_pipe[i] = -1;
        }
    }
}

int
main_pipe_reader(void)
{
    return main_pipe[0];
}

int
main_pipe_writer(void)
{
    return main_pipe[1];
}

void
empty_main_pipe(void)
{
    char bytes[64];

    while (read(main_pipe[0], bytes, sizeof bytes) > 0) {
    }
}

void
wake_main(void)
{
    int saved = errno; /* also called from signal handlers */

    if (main_pipe[1] >= 0 && write(main_pipe[1], "", 1) < 0) {
        /* A full pipe wakes as well; nothing else can be done from here. */
    }
    errno = saved;
}
