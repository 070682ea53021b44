/* Packets of the milter protocol, as bytes. */

#include "packet.h"

#include <stdlib.h>
#include <string.h>

#define KEPT_ROOM 4096 /* of an empty box that was used a moment ago */

uint32_t
number_from(const char *bytes)
{
    const unsigned char *b = (const unsigned char *)bytes;

    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

void
number_to(char *bytes, uint32_t number)
{
    bytes[0] = (char)(number >> 24);
    bytes[1] = (char)(number >> 16);
    bytes[2] = (char)(number >> 8);
    bytes[3] = (char)number;
}

/* -------------------------------------------------------------------------- stock */

/* Memory for *size bytes, or for more, which *size then says.  The C library keeps
 * what a thread freed for that thread, so large rooms are handed around by ourselves. */
static char *
new_room(size_t *size, struct stock *stock)
{
    if (stock == NULL || *size <= LARGE_ROOM_FROM || *size > LARGE_ROOM) {
        return malloc(*size);
    }
    *size = LARGE_ROOM;
    return stock->large_count > 0 ? stock->large[--stock->large_count] : malloc(LARGE_ROOM);
}

static void
lend(char **bytes, size_t *room, struct stock *stock)
{
    if (*bytes == NULL && stock->count > 0) {
        *bytes = stock->rooms[--stock->count];
        *room = BOX_ROOM;
    }
}

static void
reclaim(char **bytes, size_t *room, struct stock *stock)
{
    if (*bytes == NULL) {
        return;
    }
    if (*room == BOX_ROOM && stock->count < MOST_IN_STOCK) {
        stock->rooms[stock->count++] = *bytes;
    }
    else if (*room == LARGE_ROOM && stock->large_count < MOST_LARGE_IN_STOCK) {
        stock->large[stock->large_count++] = *bytes;
    }
    else {
        free(*bytes);
    }
    *bytes = NULL;
    *room = 0;
}

void
stock_free(struct stock *stock)
{
    while (stock->count > 0) {
        free(stock->rooms[--stock->count]);
    }
    while (stock->large_count > 0) {
        free(stock->large[--stock->large_count]);
    }
}

/* Make room for `least` more bytes at the end, moving what is there to the front; of the stock,
 * where there is one. */
static bool
make_room(char **bytes, size_t *begin, size_t *end, size_t *room, size_t least, struct stock *stock)
{
    size_t used = *end - *begin;

    if (least > SIZE_MAX / 2 - used) {
        return false;
    }
    if (*begin > 0 && used + least <= *room) {
        memmove(*bytes, *bytes + *begin, used);
        *begin = 0;
        *end = used;
    }
    if (*end + least > *room) {
        size_t wanted = used + least > 2 * used ? used + least : 2 * used;
        size_t size = wanted > BOX_ROOM ? wanted : BOX_ROOM;
        char *bigger = new_room(&size, stock);

        if (bigger == NULL) {
            return false;
        }
        if (used > 0) {
            memcpy(bigger, *bytes + *begin, used);
        }
        free(*bytes);
        *bytes = bigger;
        *begin = 0;
        *end = used;
        *room = size;
    }
    return true;
}

/* ------------------------------------------------------------------ what comes in */

char *
inbox_room(struct inbox *inbox, size_t least, size_t *size, struct stock *stock)
{
    if (!make_room(&inbox->bytes, &inbox->begin, &inbox->end, &inbox->room, least, stock)) {
        return NULL;
    }
    *size = inbox->room - inbox->end;
    return inbox->bytes + inbox->end;
}

void
inbox_add(struct inbox *inbox, size_t count)
{
    inbox->end += count;
}

enum packet_state
inbox_take(struct inbox *inbox, size_t max_data, struct packet *packet)
{
    size_t there = inbox->end - inbox->begin;
    char *head;
    uint32_t length;

    if (there < 4) {
        return PACKET_NOT_YET;
    }
    head = inbox->bytes + inbox->begin;
    length = number_from(head);
    if (length == 0 || length - 1 > max_data) {
        return PACKET_BAD;
    }
    if (there < 4 + (size_t)length) {
        return PACKET_NOT_YET;
    }
    packet->command = head[4];
    packet->data = head + PACKET_HEAD;
    packet->size = length - 1;
    inbox->begin += 4 + (size_t)length;
    if (inbox->begin == inbox->end) {
        inbox->begin = inbox->end = 0; /* what was taken stays where it is */
    }
    return PACKET_THERE;
}

size_t
inbox_missing(const struct inbox *inbox)
{
    size_t there = inbox->end - inbox->begin;
    size_t whole = PACKET_HEAD;

    if (there >= 4) {
        whole = 4 + (size_t)number_from(inbox->bytes + inbox->begin);
    }
    return there < whole ? whole - there : 0;
}

bool
inbox_ready(const struct inbox *inbox, size_t max_data)
{
    size_t there = inbox->end - inbox->begin;
    uint32_t length;

    if (there < 4) {
        return false;
    }
    length = number_from(inbox->bytes + inbox->begin);
    return length == 0 || length - 1 > max_data || there >= 4 + (size_t)length;
}

bool
inbox_empty(const struct inbox *inbox)
{
    return inbox->begin == inbox->end;
}

void
inbox_lend(struct inbox *inbox, struct stock *stock)
{
    lend(&inbox->bytes, &inbox->room, stock);
}

void
inbox_reclaim(struct inbox *inbox, struct stock *stock)
{
    if (inbox->begin == inbox->end) {
        inbox->begin = inbox->end = 0;
        reclaim(&inbox->bytes, &inbox->room, stock);
    }
}

void
inbox_free(struct inbox *inbox)
{
    free(inbox->bytes);
    *inbox = (struct inbox){0};
}

/* ----------------------------------------------------------------- what goes out */

bool
outbox_add(struct outbox *outbox, char command, const struct piece *pieces, size_t count)
{
    size_t size = 0;
    char *to;

    for (size_t i = 0; i < count; i++) {
        size += pieces[i].size;
    }
    if (size >= UINT32_MAX || !make_room(&outbox->bytes, &outbox->begin, &outbox->end,
                                         &outbox->room, PACKET_HEAD + size, NULL)) {
        return false;
    }
    to = outbox->bytes + outbox->end;
    number_to(to, (uint32_t)size + 1);
    to[4] = command;
    to += PACKET_HEAD;
    for (size_t i = 0; i < count; i++) {
        if (pieces[i].size > 0) {
            memcpy(to, pieces[i].bytes, pieces[i].size);
            to += pieces[i].size;
        }
    }
    outbox->end += PACKET_HEAD + size;
    return true;
}

void
outbox_sent(struct outbox *outbox, size_t count)
{
    outbox->begin += count;
    if (outbox->begin == outbox->end) {
        outbox->begin = outbox->end = 0;
        if (outbox->room > KEPT_ROOM) {
            outbox_free(outbox);
        }
    }
}

void
outbox_lend(struct outbox *outbox, struct stock *stock)
{
    lend(&outbox->bytes, &outbox->room, stock);
}

void
outbox_reclaim(struct outbox *outbox, struct stock *stock)
{
    if (outbox->begin == outbox->end) {
        outbox->begin = outbox->end = 0;
        reclaim(&outbox->bytes, &outbox->room, stock);
    }
}

void
outbox_free(struct outbox *outbox)
{
    free(outbox->bytes);
    *outbox = (struct outbox){0};
}
