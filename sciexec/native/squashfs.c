/* See squashfs.h.  No libsquashfs here: what serves an image must start at once, decompress in every thread at once, and
   be small enough to be read in full by who must trust it. */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KINDS 7
enum { DIRECTORY = 1, FILE_, LINK, BLOCK, CHARACTER, FIFO, SOCKET };

/* ---- blocks ------------------------------------------------------------------------------------------------------------------ */

int image_read(const squashfs *image, uint64_t place, void *into, size_t length)
{
	if (place > image->bytes || length > image->bytes - place)
		return -EIO;
	for (size_t done = 0; done < length;) {
		ssize_t got = pread(image->fd, (uint8_t *)into + done, length - done, (off_t)(image->base + place + done));
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got ? -errno : -EIO;  /* truncated under our feet */
		done += (size_t)got;
	}
	return 0;
}

static _Thread_local uint8_t *packed;  /* a block as it is on disk; as large as the image's largest */

static uint8_t *packed_room(const squashfs *image)
{
	if (!packed)
		packed = malloc(image->block_size > METADATA ? image->block_size : METADATA);
	return packed;
}

int image_unpack(squashfs *image, uint64_t place, uint32_t stored, int compressed, uint8_t *into, uint32_t room)
{
	if (!compressed) {
		int failed = stored > room ? -EIO : image_read(image, place, into, stored);
		return failed ? failed : (int)stored;
	}
	uint8_t *from = packed_room(image);
	if (!from)
		return -ENOMEM;
	if (!stored || stored > (image->block_size > METADATA ? image->block_size : METADATA))
		return -EIO;
	int failed = image_read(image, place, from, stored);
	return failed ? failed : image->decompress(from, stored, into, room);
}

/* ---- metadata --------------------------------------------------------------------------------------------------------------- */

/* The metadata block at `place`; called with the lock held, and good for as long as it is. */
static int metadata_block(squashfs *image, uint64_t place, metadata_slot **found)
{
	metadata_slot *set = &image->metadata[(place * 0x9E3779B97F4A7C15U >> 40) % (METADATA_SLOTS / METADATA_WAYS) * METADATA_WAYS];
	metadata_slot *oldest = set;
	for (metadata_slot *slot = set; slot < set + METADATA_WAYS; slot++) {
		if (slot->bytes && slot->length && slot->place == place) {
			slot->stamp = ++image->metadata_clock;
			*found = slot;
			return 0;
		}
		if (slot->stamp < oldest->stamp)
			oldest = slot;
	}
	uint8_t header[2];
	int got = image_read(image, place, header, 2);
	if (got)
		return got;
	uint32_t stored = u16(header) & 0x7FFF;
	if (!stored || stored > METADATA)
		return -EIO;
	if (!oldest->bytes && !(oldest->bytes = malloc(METADATA)))
		return -ENOMEM;
	oldest->length = 0;
	got = image_unpack(image, place + 2, stored, !(u16(header) & 0x8000), oldest->bytes, METADATA);
	if (got <= 0)
		return got ? got : -EIO;
	oldest->place = place;
	oldest->next = place + 2 + stored;
	oldest->length = (uint32_t)got;
	oldest->stamp = ++image->metadata_clock;
	*found = oldest;
	return 0;
}

int image_metadata(squashfs *image, squashfs_cursor *at, void *into, uint64_t length)
{
	int failed = 0;
	pthread_mutex_lock(&image->metadata_lock);
	while (length && !failed) {
		metadata_slot *slot;
		if ((failed = metadata_block(image, at->block, &slot)))
			break;
		if (at->offset > slot->length) {
			failed = -EIO;
			break;
		}
		uint64_t part = slot->length - at->offset;
		if (part > length)
			part = length;
		if (into) {
			memcpy(into, slot->bytes + at->offset, part);
			into = (uint8_t *)into + part;
		}
		length -= part;
		at->offset += (uint32_t)part;
		if (at->offset == slot->length && length) {
			at->block = slot->next;
			at->offset = 0;
		}
	}
	pthread_mutex_unlock(&image->metadata_lock);
	return failed;
}

int image_entry(squashfs *image, uint64_t list, uint32_t index, uint32_t width, void *into)
{
	uint8_t raw[8];
	uint64_t byte = (uint64_t)index * width;
	int failed = image_read(image, list + byte / METADATA * 8, raw, 8);
	if (failed)
		return failed;
	squashfs_cursor at = {u64(raw), (uint32_t)(byte % METADATA)};
	return image_metadata(image, &at, into, width);
}

/* ---- opening ---------------------------------------------------------------------------------------------------------------- */

int squashfs_open(squashfs **opened, int fd, uint64_t offset)
{
	uint8_t raw[96];
	squashfs *image = calloc(1, sizeof *image);
	if (!image)
		return -ENOMEM;
	*image = (squashfs){.fd = fd, .base = offset, .bytes = sizeof raw};
	int failed = image_read(image, 0, raw, sizeof raw);
	if (!failed && (u32(raw) != 0x73717368 || u16(raw + 28) != 4 || u16(raw + 22) < 12 || u16(raw + 22) > 20 || !u16(raw + 26)))
		failed = -EINVAL;
	if (!failed && (offset > INT64_MAX || u64(raw + 40) > INT64_MAX - offset))
		failed = -EINVAL;
	if (!failed && !(image->decompress = decompressor_of(u16(raw + 20))))
		failed = -ENOTSUP;
	if (failed) {
		free(image);
		return failed;
	}
	image->inodes = u32(raw + 4);
	image->block_size = 1U << u16(raw + 22);
	image->fragments = u32(raw + 16);
	image->ids = u16(raw + 26);
	image->root = u64(raw + 32);
	image->bytes = u64(raw + 40);
	image->id_table = u64(raw + 48);
	image->xattr_table = u16(raw + 24) & 0x0200 ? UINT64_MAX : u64(raw + 56);
	image->inode_table = u64(raw + 64);
	image->directory_table = u64(raw + 72);
	image->fragment_table = u64(raw + 80);
	image->data_slots = DATA_BYTES / image->block_size;
	if (image->data_slots > DATA_SLOTS_MAX)
		image->data_slots = DATA_SLOTS_MAX;
	if (image->data_slots < DATA_SLOTS_MIN)
		image->data_slots = DATA_SLOTS_MIN;
	pthread_mutex_init(&image->metadata_lock, NULL);
	pthread_mutex_init(&image->data_lock, NULL);
	pthread_mutex_init(&image->long_lock, NULL);
	pthread_cond_init(&image->data_ready, NULL);
	*opened = image;
	return 0;
}

int squashfs_tables(squashfs *image)
{
	if (image->xattr_table != UINT64_MAX) {
		uint8_t header[16];
		int failed = image_read(image, image->xattr_table, header, sizeof header);
		if (failed)
			return failed;
		image->xattr_values = u64(header);
		image->xattrs = u32(header + 8);
	}
	image->id = calloc(image->ids, sizeof *image->id);
	if (!image->id)
		return -ENOMEM;
	for (uint32_t i = 0; i < image->ids; i++) {
		uint8_t raw[4];
		int failed = image_entry(image, image->id_table, i, sizeof raw, raw);
		if (failed)
			return failed;
		image->id[i] = u32(raw);
	}
	return 0;
}

uint64_t squashfs_root(const squashfs *image) { return image->root; }
uint64_t squashfs_bytes(const squashfs *image) { return image->bytes; }
uint32_t squashfs_inodes(const squashfs *image) { return image->inodes; }
uint32_t squashfs_block_size(const squashfs *image) { return image->block_size; }
int squashfs_has_xattrs(const squashfs *image) { return image->xattrs != 0; }

/* ---- inodes ----------------------------------------------------------------------------------------------------------------- */

int squashfs_inode_get(squashfs *image, uint64_t reference, squashfs_inode *inode)
{
	static const uint32_t formats[KINDS + 1] = {0, S_IFDIR, S_IFREG, S_IFLNK, S_IFBLK, S_IFCHR, S_IFIFO, S_IFSOCK};
	static const unsigned short_sizes[KINDS + 1] = {0, 16, 16, 8, 8, 8, 4, 4}, long_sizes[KINDS + 1] = {0, 24, 40, 8, 12, 12, 8, 8};
	uint8_t head[16], body[40];
	uint64_t block = reference >> 16;
	if (block >= image->directory_table - image->inode_table)
		return -EIO;
	squashfs_cursor at = {image->inode_table + block, (uint32_t)(reference & 0xFFFF)};
	int failed = image_metadata(image, &at, head, sizeof head);
	if (failed)
		return failed;
	unsigned type = u16(head);
	int is_long = type > KINDS;
	unsigned kind = is_long ? type - KINDS : type;
	if (kind < DIRECTORY || kind > KINDS)
		return -EIO;
	*inode = (squashfs_inode){.reference = reference, .xattr = SQUASHFS_NONE, .fragment = SQUASHFS_NONE};
	inode->mode = formats[kind] | (u16(head + 2) & 07777);
	inode->mtime = u32(head + 8);
	inode->number = u32(head + 12);
	if (u16(head + 4) >= image->ids || u16(head + 6) >= image->ids)
		return -EIO;
	inode->uid = image->id[u16(head + 4)];
	inode->gid = image->id[u16(head + 6)];
	if ((failed = image_metadata(image, &at, body, is_long ? long_sizes[kind] : short_sizes[kind])))
		return failed;
	inode->rest = at;
	switch (kind) {
	case DIRECTORY:
		if (is_long) {
			inode->links = u32(body);
			inode->size = u32(body + 4);
			inode->start = u32(body + 8);
			inode->indexes = u16(body + 16);
			inode->listing_offset = u16(body + 18);
			inode->xattr = u32(body + 20);
		} else {
			inode->start = u32(body);
			inode->links = u32(body + 4);
			inode->size = u16(body + 8);
			inode->listing_offset = u16(body + 10);
		}
		return 0;
	case FILE_:
		if (is_long) {
			inode->start = u64(body);
			inode->size = u64(body + 8);
			inode->links = u32(body + 24);
			inode->fragment = u32(body + 28);
			inode->fragment_offset = u32(body + 32);
			inode->xattr = u32(body + 36);
		} else {
			inode->start = u32(body);
			inode->fragment = u32(body + 4);
			inode->fragment_offset = u32(body + 8);
			inode->size = u32(body + 12);
			inode->links = 1;
		}
		return inode->size > INT64_MAX ? -EIO : 0;
	case LINK:
		inode->links = u32(body);
		inode->size = u32(body + 4);
		if (inode->size > SQUASHFS_LINK_MAX)
			return -EIO;
		if (is_long) {
			uint8_t raw[4];
			if ((failed = image_metadata(image, &at, NULL, inode->size)) || (failed = image_metadata(image, &at, raw, 4)))
				return failed;
			inode->xattr = u32(raw);
		}
		return 0;
	default:
		inode->links = u32(body);
		if (kind == BLOCK || kind == CHARACTER)
			inode->device = u32(body + 4);
		if (is_long)
			inode->xattr = u32(body + long_sizes[kind] - 4);
		return 0;
	}
}

int squashfs_readlink(squashfs *image, const squashfs_inode *inode, char *text, size_t room)
{
	if (!S_ISLNK(inode->mode) || inode->size > room)
		return -EINVAL;
	squashfs_cursor at = inode->rest;
	int failed = image_metadata(image, &at, text, inode->size);
	return failed ? failed : (int)inode->size;
}

/* ---- directories ------------------------------------------------------------------------------------------------------------ */

/* A listing is runs of at most 256 entries, each run behind a header that its entries count from.  A place in it is its bytes up to
   there.  Long listings have an index: first name, place and metadata block of some of the runs. */
#define RUN_HEADER 12
#define RUN_ENTRIES 256

static int compare(const char *a, size_t a_length, const char *b, size_t b_length)
{
	int order = memcmp(a, b, a_length < b_length ? a_length : b_length);
	return order ? order : (a_length > b_length) - (a_length < b_length);
}

/* Begins at the last run in the index that is not behind a name, or, with name NULL, not behind a place. */
static int begin(squashfs *image, const squashfs_inode *directory, const char *name, size_t length, uint64_t where,
		 squashfs_listing *listing)
{
	squashfs_cursor at = directory->rest;
	if (!S_ISDIR(directory->mode))
		return -ENOTDIR;
	listing->at = (squashfs_cursor){image->directory_table + directory->start, directory->listing_offset};
	listing->place = listing->left = listing->used = listing->filled = 0;
	listing->end = directory->size > 3 ? directory->size - 3 : 0;  /* what is counted for . and .. */
	for (uint32_t i = 0; i < directory->indexes; i++) {
		uint8_t raw[12];
		char first[SQUASHFS_NAME_MAX];
		int failed = image_metadata(image, &at, raw, sizeof raw);
		if (failed)
			return failed;
		uint32_t run = u32(raw), first_length = u32(raw + 8) + 1;
		if (!first_length || first_length > sizeof first)
			return -EIO;
		if ((failed = image_metadata(image, &at, first, first_length)))
			return failed;
		if (name ? compare(first, first_length, name, length) > 0 : run > where)
			break;
		listing->place = run;
		listing->at = (squashfs_cursor){image->directory_table + u32(raw + 4), (directory->listing_offset + run) % METADATA};
	}
	return 0;
}

/* Bytes of a listing, by way of a buffer: a lock for each would be most of the work. */
static int listing_read(squashfs *image, squashfs_listing *listing, void *into, uint32_t length)
{
	if (length > listing->end - listing->place)
		return -EIO;
	while (length) {
		if (listing->used == listing->filled) {  /* up to the end of its metadata block: the next one may not be needed */
			uint32_t rest = listing->at.offset < METADATA ? METADATA - listing->at.offset : METADATA;
			if (rest > listing->end - listing->place)
				rest = (uint32_t)(listing->end - listing->place);
			int failed = image_metadata(image, &listing->at, listing->buffer, rest);
			if (failed)
				return failed;
			listing->used = 0;
			listing->filled = rest;
		}
		uint32_t part = listing->filled - listing->used < length ? listing->filled - listing->used : length;
		memcpy(into, listing->buffer + listing->used, part);
		into = (uint8_t *)into + part;
		listing->used += part;
		listing->place += part;
		length -= part;
	}
	return 0;
}

int squashfs_next(squashfs *image, squashfs_listing *listing, squashfs_dirent *entry)
{
	uint8_t raw[RUN_HEADER];
	int failed = 0;
	if (listing->place >= listing->end)
		return 0;
	if (!listing->left) {
		if ((failed = listing_read(image, listing, raw, RUN_HEADER)))
			return failed;
		if (u32(raw) >= RUN_ENTRIES)
			return -EIO;
		listing->left = u32(raw) + 1;
		listing->block = u32(raw + 4);
		listing->number = u32(raw + 8);
	}
	if ((failed = listing_read(image, listing, raw, 8)))
		return failed;
	entry->reference = (uint64_t)listing->block << 16 | u16(raw);
	entry->number = listing->number + (uint32_t)(int16_t)u16(raw + 2);
	entry->type = u16(raw + 4);
	entry->length = u16(raw + 6) + 1U;
	if (entry->length > SQUASHFS_NAME_MAX || entry->type < DIRECTORY || entry->type > KINDS)
		return -EIO;
	if ((failed = listing_read(image, listing, entry->name, entry->length)))
		return failed;
	entry->name[entry->length] = 0;
	if (strlen(entry->name) != entry->length || strchr(entry->name, '/') || !strcmp(entry->name, ".") || !strcmp(entry->name, ".."))
		return -EIO;
	listing->left--;
	entry->next = listing->place;
	return 1;
}

int squashfs_list(squashfs *image, const squashfs_inode *directory, uint64_t where, squashfs_listing *listing)
{
	squashfs_dirent passed;
	int got = begin(image, directory, NULL, 0, where, listing);
	while (!got && listing->place < where && (got = squashfs_next(image, listing, &passed)) > 0)
		got = 0;
	return got;
}

int squashfs_lookup(squashfs *image, const squashfs_inode *directory, const char *name, size_t length, squashfs_dirent *entry)
{
	squashfs_listing listing;
	int got = begin(image, directory, name, length, 0, &listing);
	if (got)
		return got;
	while ((got = squashfs_next(image, &listing, entry)) > 0) {
		int order = compare(entry->name, entry->length, name, length);
		if (!order)
			return 0;
		if (order > 0)
			break;  /* listings are sorted */
	}
	return got < 0 ? got : -ENOENT;
}

/* ---- extended attributes ------------------------------------------------------------------------------------------------------ */

#define XATTR_VALUE_MAX 65536

int squashfs_xattr(squashfs *image, const squashfs_inode *inode, const char *name, uint8_t *into, size_t room)
{
	static const char *const prefixes[] = {"user.", "trusted.", "security."};
	uint8_t raw[16];
	size_t listed = 0;
	if (inode->xattr == SQUASHFS_NONE || inode->xattr >= image->xattrs)
		return name ? -ENODATA : 0;
	int failed = image_entry(image, image->xattr_table + 16, inode->xattr, 16, raw);
	if (failed)
		return failed;
	squashfs_cursor at = {image->xattr_values + (u64(raw) >> 16), (uint32_t)(u64(raw) & 0xFFFF)};
	for (uint32_t count = u32(raw + 8); count; count--) {  /* each adds to `listed`, so that this ends */
		char key[16 + SQUASHFS_NAME_MAX];
		if ((failed = image_metadata(image, &at, raw, 4)))
			return failed;
		unsigned type = u16(raw) & 0xFF, length = u16(raw + 2);
		if (type > 2 || !length || length > SQUASHFS_NAME_MAX)
			return -EIO;
		size_t prefix = strlen(prefixes[type]);
		memcpy(key, prefixes[type], prefix);
		if ((failed = image_metadata(image, &at, key + prefix, length)))
			return failed;
		key[prefix + length] = 0;
		int elsewhere = u16(raw) & 0x100;  /* the value is a reference to another's */
		if ((failed = image_metadata(image, &at, raw, 4)))
			return failed;
		uint32_t size = u32(raw);
		size_t whole = strlen(key) + 1;
		if (!name && listed + whole <= room)
			memcpy(into + listed, key, whole);
		listed += whole;
		if (size > XATTR_VALUE_MAX || listed > XATTR_VALUE_MAX)
			return -EIO;
		if (name && !strcmp(name, key)) {
			if (elsewhere) {
				if (size != 8 || (failed = image_metadata(image, &at, raw, 8)))
					return failed ? failed : -EIO;
				at = (squashfs_cursor){image->xattr_values + (u64(raw) >> 16), (uint32_t)(u64(raw) & 0xFFFF)};
				if ((failed = image_metadata(image, &at, raw, 4)))
					return failed;
				size = u32(raw);
			}
			if (size > XATTR_VALUE_MAX)
				return -EIO;
			if (size <= room && (failed = image_metadata(image, &at, into, size)))
				return failed;
			return (int)size;
		}
		if ((failed = image_metadata(image, &at, NULL, size)))
			return failed;
	}
	return name ? -ENODATA : (int)listed;
}
