/* libFuzzer on src/engine/native/packet.c: packets are the same however their bytes arrive.
 *
 * The first byte says in what pieces the rest comes.  Every packet is compared with what a plain
 * reading of the bytes finds; what goes in comes out of an outbox as it was.
 */

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "engine/native/packet.h"

enum { MAX_DATA = 5000 };

static size_t
plain_length(const uint8_t *bytes)
{
    return (size_t)bytes[0] << 24 | (size_t)bytes[1] << 16 | (size_t)bytes[2] << 8 | bytes[3];
}

/* Give bytes in, and take every packet that is there; false once one is bad. */
static bool
feed(struct inbox *inbox, const uint8_t *bytes, size_t count, const uint8_t *all, size_t *at,
     struct outbox *outbox, struct stock *stock)
{
    size_t room;
    char *to = inbox_room(inbox, count, &room, stock);
    struct packet packet;
    enum packet_state state;

    assert(to != NULL && room >= count);
    memcpy(to, bytes, count);
    inbox_add(inbox, count);
    for (;;) {
        bool ready = inbox_ready(inbox, MAX_DATA);
        size_t missing = inbox_missing(inbox);

        state = inbox_take(inbox, MAX_DATA, &packet);
        assert(ready == (state != PACKET_NOT_YET));
        if (state != PACKET_THERE) {
            assert(state == PACKET_BAD || missing > 0);
            return state == PACKET_NOT_YET;
        }
        assert(missing == 0);
        assert(packet.size + 1 == plain_length(all + *at));
        assert((uint8_t)packet.command == all[*at + 4]);
        assert(packet.size == 0 || memcmp(packet.data, all + *at + PACKET_HEAD, packet.size) == 0);
        *at += PACKET_HEAD + packet.size;
        size_t half = packet.size / 2;
        struct piece pieces[] = {{packet.data, half}, {packet.data + half, packet.size - half}};
        assert(outbox_add(outbox, packet.command, pieces, 2));
    }
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct inbox inbox = {0};
    struct outbox outbox = {0};
    struct stock stock = {0};
    size_t at = 0, given = 0, step;
    bool good = true;

    if (size == 0) {
        return 0;
    }
    step = data[0] == 0 ? size : data[0];
    data++;
    size--;
    while (good && given < size) {
        size_t count = step < size - given ? step : size - given;

        inbox_lend(&inbox, &stock);
        good = feed(&inbox, data + given, count, data, &at, &outbox, &stock);
        given += count;
        inbox_reclaim(&inbox, &stock);
        assert((inbox.bytes == NULL) == inbox_empty(&inbox));
        outbox_lend(&outbox, &stock);
        outbox_reclaim(&outbox, &stock);
        assert((outbox.bytes == NULL) == (at == 0));
    }
    if (!good) { /* it has no command, or is too large, and that could be seen */
        size_t length = plain_length(data + at);
        assert(length == 0 || length > MAX_DATA + 1);
    }
    else {
        assert(inbox_empty(&inbox) == (at == size));
    }
    assert(outbox_size(&outbox) == at);
    assert(at == 0 || memcmp(outbox.bytes + outbox.begin, data, at) == 0);
    while (outbox_size(&outbox) > 0) {
        size_t part = outbox_size(&outbox) < step ? outbox_size(&outbox) : step;
        outbox_sent(&outbox, part);
    }
    outbox_reclaim(&outbox, &stock);
    assert(outbox.bytes == NULL && outbox.room == 0);
    outbox_free(&outbox);
    inbox_free(&inbox);
    stock_free(&stock);
    return 0;
}
