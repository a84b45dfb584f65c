#ifndef SCIEXEC_DECOMPRESS_H
#define SCIEXEC_DECOMPRESS_H

#include <stddef.h>
#include <stdint.h>

/* Returns the length of what came out, at most `room`, or -EIO for damaged data, -ENOMEM.  Every thread has a context of its own. */
typedef int decompressor(const uint8_t *from, size_t length, uint8_t *into, size_t room);

/* The one for a superblock's number of a compression; NULL where the host lacks the library, or nobody uses it (lzma, lzo). */
decompressor *decompressor_of(unsigned compression);

#endif
