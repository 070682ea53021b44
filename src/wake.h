/* A pipe that wakes poll(), and the one that wakes main(). */

#ifndef PYMILTER_WAKE_H
#define PYMILTER_WAKE_H

#include <stdbool.h>

/* Both ends never wait, and are closed in programs that are started; no matter how much is written.
 * False: errno says why. */
bool open_wake_pipe(int ends[2]);

/* The pipe of main().  It stays open once it is; false: errno says why. */
bool open_main_pipe(void);

/* In a forked child: what is written there is for the parent. */
void close_main_pipe(void);

/* For poll(), -1 before it is open. */
int main_pipe_reader(void);

/* What was written there is known. */
void empty_main_pipe(void);

/* For those who write to it by themselves, as Python's signal handler does. */
int main_pipe_writer(void);

/* Have main() look at what has changed; from any thread, and from signal handlers. */
void wake_main(void);

#endif
