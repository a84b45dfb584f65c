/* What squashfs.c and data.c share. */
#ifndef SCIEXEC_IMAGE_H
#define SCIEXEC_IMAGE_H

#include "decompress.h"
#include "squashfs.h"

#include <endian.h>
#include <pthread.h>
#include <string.h>

#define METADATA 8192
#define METADATA_SLOTS 1024      /* 8 MiB at most; the kernel keeps names and attributes, so that a block is mostly needed once */
#define METADATA_WAYS 4
#define DATA_BYTES (16U << 20)   /* of decompressed blocks that are kept for reads of a part of them, fragments above all */
#define DATA_SLOTS_MAX 128
#define DATA_SLOTS_MIN 16        /* more than there are threads: each of them holds one */
#define LONG_FILES 16            /* for which it is remembered where every so many blocks are */

typedef struct { uint64_t place, next; uint32_t length, stamp; uint8_t *bytes; } metadata_slot;
typedef struct { uint64_t place, stamp; uint32_t length; int users, state; uint8_t *bytes; } data_slot;
typedef struct { uint64_t reference, stamp; uint32_t known, room; squashfs_cursor *sizes; uint64_t *places; } long_file;

struct squashfs {
	int fd;
	uint64_t base, bytes, root, id_table, inode_table, directory_table, fragment_table, xattr_table;
	uint32_t inodes, block_size, fragments, ids;
	uint32_t *id;
	decompressor *decompress;
	uint64_t xattr_values;        /* where the keys and values begin */
	uint32_t xattrs;

	pthread_mutex_t metadata_lock;
	metadata_slot metadata[METADATA_SLOTS];
	uint32_t metadata_clock;

	pthread_mutex_t data_lock;
	pthread_cond_t data_ready;
	data_slot data[DATA_SLOTS_MAX];
	unsigned data_slots;
	uint64_t data_clock;

	pthread_mutex_t long_lock;
	long_file longs[LONG_FILES];
	uint64_t long_clock;
};

static inline uint16_t u16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return le16toh(v); }
static inline uint32_t u32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return le32toh(v); }
static inline uint64_t u64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return le64toh(v); }

/* Bytes of the file system; those behind its end are an error. */
int image_read(const squashfs *image, uint64_t place, void *into, size_t length);

/* One block of `stored` bytes at `place`; returns its length when decompressed, at most `room`, or -errno. */
int image_unpack(squashfs *image, uint64_t place, uint32_t stored, int compressed, uint8_t *into, uint32_t room);

/* Bytes of metadata from the cursor on, which goes on behind them; `into` NULL skips them. */
int image_metadata(squashfs *image, squashfs_cursor *at, void *into, uint64_t length);

/* Entry `index` of a table that is a list of places of metadata blocks: ids, fragments, xattr ids. */
int image_entry(squashfs *image, uint64_t list, uint32_t index, uint32_t width, void *into);

#endif
