/* Packets of the milter protocol, as bytes: no I/O, no meaning.
 *
 * A packet is a length of four bytes in network order, one byte that says what it is, and data, of
 * one byte less than the length says. */

#ifndef PYMILTER_ENGINE_NATIVE_PACKET_H
#define PYMILTER_ENGINE_NATIVE_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PACKET_HEAD 5 /* bytes before the data */

struct packet {
    char command; /* SMFIC_* */
    char *data;   /* within the inbox: good until more is put into it */
    size_t size;
};

#define BOX_ROOM 512 /* bytes that a box has at least, where it has any */
#define MOST_IN_STOCK 64
#define LARGE_ROOM_FROM 16384 /* more than that is LARGE_ROOM at once: an MTA's body chunk */
#define LARGE_ROOM (65536 + 4096)
#define MOST_LARGE_IN_STOCK 8

/* Memory of boxes that were emptied, for those that are filled next: what waits for its MTA has
 * none.  All zero is empty. */
struct stock {
    size_t count;
    char *rooms[MOST_IN_STOCK]; /* of BOX_ROOM bytes */
    size_t large_count;
    char *large[MOST_LARGE_IN_STOCK]; /* of LARGE_ROOM bytes */
};

void stock_free(struct stock *stock);

/* What has come from the peer and was not taken yet.  All zero is empty. */
struct inbox {
    char *bytes;
    size_t begin; /* of what was not taken */
    size_t end;
    size_t room;
};

enum packet_state { PACKET_THERE, PACKET_NOT_YET, PACKET_BAD };

/* Where to put what is read next, at least `least` bytes; *size says how much room there is.  It
 * may come from the stock.  NULL: no memory.  Moves what is there, so that no packet that was taken
 * is good any longer. */
char *inbox_room(struct inbox *inbox, size_t least, size_t *size, struct stock *stock);
void inbox_add(struct inbox *inbox, size_t count);

/* Take the next packet.  PACKET_BAD: one without a command, or with more than `max_data` bytes. */
enum packet_state inbox_take(struct inbox *inbox, size_t max_data, struct packet *packet);

/* How many bytes are missing to the next packet, as far as can be seen; 0 where it is there. */
size_t inbox_missing(const struct inbox *inbox);

/* Whether inbox_take() has something to say: a packet is there, or can be seen to be bad. */
bool inbox_ready(const struct inbox *inbox, size_t max_data);

/* Whether nothing of a packet has come that was not taken. */
bool inbox_empty(const struct inbox *inbox);

/* Give it memory from the stock where it has none, and back where there is nothing in it. */
void inbox_lend(struct inbox *inbox, struct stock *stock);
void inbox_reclaim(struct inbox *inbox, struct stock *stock);
void inbox_free(struct inbox *inbox);

/* What is to be sent.  All zero is empty. */
struct outbox {
    char *bytes;
    size_t begin; /* of what was not sent */
    size_t end;
    size_t room;
};

/* A piece of the data of a packet. */
struct piece {
    const void *bytes;
    size_t size;
};

/* Add a packet, of pieces put together.  False: no memory, and nothing was added. */
bool outbox_add(struct outbox *outbox, char command, const struct piece *pieces, size_t count);

static inline size_t
outbox_size(const struct outbox *outbox)
{
    return outbox->end - outbox->begin;
}

/* So many bytes were sent. */
void outbox_sent(struct outbox *outbox, size_t count);

/* As with an inbox. */
void outbox_lend(struct outbox *outbox, struct stock *stock);
void outbox_reclaim(struct outbox *outbox, struct stock *stock);
void outbox_free(struct outbox *outbox);

uint32_t number_from(const char *bytes);
void number_to(char *bytes, uint32_t number);

#endif
