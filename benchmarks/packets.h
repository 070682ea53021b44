/* Packets of the milter protocol, for programs that play the MTA: four bytes that count what
 * follows, a command, and its data. */

#ifndef PYMILTER_PACKETS_H
#define PYMILTER_PACKETS_H

#include <stddef.h>
#include <stdint.h>

#define LENGTH_BYTES 4
#define HEAD_BYTES (LENGTH_BYTES + 1)

/* Write the length: of the command and its data. */
static inline void
write_length(void *to, size_t length)
{
    unsigned char *bytes = to;

    for (int i = 0; i < LENGTH_BYTES; i++) {
        bytes[i] = (unsigned char)(length >> 8 * (LENGTH_BYTES - 1 - i));
    }
}

/* Write what stands before `size` bytes of data. */
static inline void
write_head(void *to, char command, size_t size)
{
    write_length(to, size + 1);
    ((char *)to)[LENGTH_BYTES] = command;
}

/* The length that stands at the beginning of a packet. */
static inline size_t
read_length(const void *from)
{
    const unsigned char *bytes = from;
    size_t length = 0;

    for (int i = 0; i < LENGTH_BYTES; i++) {
        length = length << 8 | bytes[i];
    }
    return length;
}

#endif
