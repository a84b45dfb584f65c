/* The contents of files; see squashfs.h. */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

#define STRIDE (METADATA / 4)    /* sizes of blocks in one metadata block */
#define STRIDES_MAX (1U << 16)   /* a file of 16 TiB in blocks of 128 KiB */
#define UNCOMPRESSED (1U << 24)

enum { EMPTY, LOADING, READY };

/* A block that is wanted in part, kept for the next who wants another part of it.  Whoever finds it being decompressed waits.
   The caller gives it back with data_release(). */
static int data_block(squashfs *image, uint64_t place, uint32_t stored, data_slot **found)
{
	pthread_mutex_lock(&image->data_lock);
	for (;;) {
		data_slot *oldest = NULL, *slot = image->data, *end = image->data + image->data_slots;
		for (; slot < end && !(slot->state != EMPTY && slot->place == place); slot++)
			if (!slot->users && (!oldest || slot->stamp < oldest->stamp))
				oldest = slot;
		if (slot < end && slot->state == READY) {
			slot->users++;
			slot->stamp = ++image->data_clock;
			pthread_mutex_unlock(&image->data_lock);
			*found = slot;
			return 0;
		}
		if (slot < end || !oldest) {
			pthread_cond_wait(&image->data_ready, &image->data_lock);
			continue;
		}
		oldest->place = place;
		oldest->state = LOADING;
		oldest->users = 1;
		oldest->stamp = ++image->data_clock;
		pthread_mutex_unlock(&image->data_lock);
		int got = -ENOMEM;
		if (oldest->bytes || (oldest->bytes = malloc(image->block_size)))
			got = image_unpack(image, place, stored, 1, oldest->bytes, image->block_size);
		pthread_mutex_lock(&image->data_lock);
		oldest->state = got < 0 ? EMPTY : READY;
		oldest->users -= got < 0;
		oldest->length = got < 0 ? 0 : (uint32_t)got;
		pthread_cond_broadcast(&image->data_ready);
		pthread_mutex_unlock(&image->data_lock);
		*found = oldest;
		return got < 0 ? got : 0;
	}
}

static void data_release(squashfs *image, data_slot *slot)
{
	pthread_mutex_lock(&image->data_lock);
	if (!--slot->users)
		pthread_cond_broadcast(&image->data_ready);
	pthread_mutex_unlock(&image->data_lock);
}

/* `size` bytes from `skip` on, of the `length` bytes of the block or fragment block at `place`. */
static int data_part(squashfs *image, uint64_t place, uint32_t stored, uint32_t length, uint32_t skip, uint32_t size, uint8_t *into)
{
	if (!(stored & (UNCOMPRESSED - 1))) {  /* a hole */
		memset(into, 0, size);
		return 0;
	}
	if (!skip && size == length) {  /* all of it: the kernel keeps that, so we need not */
		int got = image_unpack(image, place, stored & (UNCOMPRESSED - 1), !(stored & UNCOMPRESSED), into, length);
		return got < 0 ? got : (uint32_t)got == length ? 0 : -EIO;
	}
	if (stored & UNCOMPRESSED)
		return skip + (uint64_t)size > (stored & (UNCOMPRESSED - 1)) ? -EIO : image_read(image, place + skip, into, size);
	data_slot *slot;
	int failed = data_block(image, place, stored, &slot);
	if (failed)
		return failed;
	if (skip > slot->length || size > slot->length - skip)
		failed = -EIO;
	else
		memcpy(into, slot->bytes + skip, size);
	data_release(image, slot);
	return failed;
}

/* Adds up the sizes of `count` blocks from the cursor on. */
static int sum_sizes(squashfs *image, squashfs_cursor *sizes, uint32_t count, uint64_t *place)
{
	uint8_t raw[METADATA];
	while (count) {
		uint32_t part = count < STRIDE ? count : STRIDE;
		int failed = image_metadata(image, sizes, raw, part * 4);
		if (failed)
			return failed;
		for (uint32_t i = 0; i < part; i++)
			*place += u32(raw + 4 * i) & (UNCOMPRESSED - 1);
		count -= part;
	}
	return 0;
}

/* Where block `index` of a file lies, and the cursor at its size.  For a long file, every STRIDE-th place is remembered. */
static int find_block(squashfs *image, const squashfs_inode *inode, uint64_t index, squashfs_cursor *sizes, uint64_t *place)
{
	uint64_t stride = index / STRIDE;
	*sizes = inode->rest;
	*place = inode->start;
	if (!stride)
		return sum_sizes(image, sizes, (uint32_t)index, place);
	if (stride >= STRIDES_MAX)
		return -EFBIG;
	pthread_mutex_lock(&image->long_lock);
	long_file *file = image->longs;
	for (long_file *other = image->longs; other < image->longs + LONG_FILES; other++) {
		if (other->room && other->reference == inode->reference) {
			file = other;
			break;
		}
		if (other->stamp < file->stamp)
			file = other;
	}
	if (!file->room || file->reference != inode->reference) {
		file->reference = inode->reference;
		file->known = 0;
	}
	file->stamp = ++image->long_clock;
	int failed = 0;
	if (file->room < stride) {
		uint32_t room = (uint32_t)stride * 2;
		squashfs_cursor *more_sizes = realloc(file->sizes, room * sizeof *more_sizes);
		file->sizes = more_sizes ? more_sizes : file->sizes;
		uint64_t *more_places = realloc(file->places, room * sizeof *more_places);
		file->places = more_places ? more_places : file->places;
		if (more_sizes && more_places)
			file->room = room;
		else
			failed = -ENOMEM;
	}
	while (!failed && file->known < stride) {
		if (file->known) {
			*sizes = file->sizes[file->known - 1];
			*place = file->places[file->known - 1];
		}
		failed = sum_sizes(image, sizes, STRIDE, place);
		if (!failed) {
			file->sizes[file->known] = *sizes;
			file->places[file->known++] = *place;
		}
	}
	if (!failed) {
		*sizes = file->sizes[stride - 1];
		*place = file->places[stride - 1];
	}
	pthread_mutex_unlock(&image->long_lock);
	return failed ? failed : sum_sizes(image, sizes, (uint32_t)(index % STRIDE), place);
}

int squashfs_read(squashfs *image, const squashfs_inode *inode, uint64_t offset, uint32_t size, uint8_t *into)
{
	if (!S_ISREG(inode->mode))
		return -EINVAL;
	if (offset >= inode->size)
		return 0;
	if (size > inode->size - offset)
		size = (uint32_t)(inode->size - offset);
	uint32_t block_size = image->block_size, done = 0;
	uint64_t whole = inode->size / block_size;  /* blocks but for a tail */
	uint64_t blocks = whole + (inode->fragment == SQUASHFS_NONE && inode->size % block_size);
	squashfs_cursor sizes;
	uint64_t place = 0, index = offset / block_size;
	int failed = 0;
	if (index < blocks && (failed = find_block(image, inode, index, &sizes, &place)))
		return failed;
	while (done < size) {
		uint32_t skip = (uint32_t)((offset + done) % block_size), stored;
		uint32_t length = index < whole ? block_size : (uint32_t)(inode->size % block_size);
		uint32_t part = length - skip < size - done ? length - skip : size - done;
		uint8_t raw[16];
		if (index < blocks) {
			if ((failed = image_metadata(image, &sizes, raw, 4)))
				return failed;
			stored = u32(raw);
			failed = data_part(image, place, stored, length, skip, part, into + done);
			place += stored & (UNCOMPRESSED - 1);
		} else {
			if (inode->fragment >= image->fragments)
				return -EIO;
			if ((failed = image_entry(image, image->fragment_table, inode->fragment, 16, raw)))
				return failed;
			stored = u32(raw + 8);
			if (!(stored & (UNCOMPRESSED - 1)) || inode->fragment_offset >= block_size)
				return -EIO;
			failed = data_part(image, u64(raw), stored, UINT32_MAX, inode->fragment_offset + skip, part, into + done);
		}
		if (failed)
			return failed;
		done += part;
		index++;
	}
	return (int)done;
}

