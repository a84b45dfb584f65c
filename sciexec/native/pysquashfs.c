/* What libsquashfs lacks for sciexec.pysquashfs: a file that begins inside another, a table of the stored files, and one call for each
   directory entry.  It is compiled as part of the module that cffi makes of the declarations in sciexec/_pysquashfs_build.py. */
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sqfs/block.h>
#include <sqfs/block_processor.h>
#include <sqfs/block_writer.h>
#include <sqfs/compressor.h>
#include <sqfs/dir_writer.h>
#include <sqfs/error.h>
#include <sqfs/frag_table.h>
#include <sqfs/inode.h>
#include <sqfs/meta_writer.h>
#include <sqfs/super.h>
#include <sqfs/table.h>
#include <sqfs/xattr_writer.h>

#include "window.h"

#define SQUASHFS_BAD_NAME (-1000)
#define NONE 0xFFFFFFFFU
#define EXTENDED (SQFS_INODE_EXT_FILE - SQFS_INODE_FILE)  /* the extended types are the same ones, further up */

/* Two TiB at the default block size.  The list of block sizes, four bytes each, is held in memory here and by every reader. */
#define MAX_BLOCKS (1U << 24)

/* ---- an image being written --------------------------------------------------------------------------------------------- */

/* Whole blocks of zeros that libsquashfs never saw: it knows sparse blocks only from reading their zeros. */
typedef struct {
	uint32_t file;      /* index in files + 1 */
	uint32_t block;     /* where in the file */
	uint32_t count;
} hole_t;

typedef struct image_t {
	window_t window;
	sqfs_super_t super;
	sqfs_compressor_t *compressor, *uncompressor;
	sqfs_block_writer_t *blocks;
	sqfs_frag_table_t *fragments;
	sqfs_block_processor_t *processor;
	sqfs_xattr_writer_t *xattrs;
	sqfs_meta_writer_t *inodes, *listings;
	sqfs_dir_writer_t *directory;

	/* One inode per stored file.  The block processor fills them in until it is synchronised. */
	sqfs_inode_generic_t **files;
	uint32_t used, room;

	hole_t *holes;      /* ascending by file and block */
	size_t hole_count, hole_room;

	uint64_t length;    /* of the file that is being written */
} image_t;

static image_t *image_new(void)
{
	return calloc(1, sizeof(image_t));
}

static void image_free(image_t *image)
{
	uint32_t i;

	/* After a failed read-back of a fragment, libsquashfs 1.2 frees an entry that its table still holds, and would free it again
	   here: better leaked. */
	if (image->window.read_failed)
		return;
	sqfs_destroy(image->processor);
	sqfs_destroy(image->directory);
	sqfs_destroy(image->listings);
	sqfs_destroy(image->inodes);
	sqfs_destroy(image->xattrs);
	sqfs_destroy(image->fragments);
	sqfs_destroy(image->blocks);
	sqfs_destroy(image->uncompressor);
	sqfs_destroy(image->compressor);
	for (i = 0; i < image->used; ++i)
		sqfs_free(image->files[i]);
	free(image->files);
	free(image->holes);
	free(image);
}

static int image_errno(const image_t *image)
{
	return image->window.error;
}

static sqfs_s32 (*lz4_block)(sqfs_compressor_t *, const sqfs_u8 *, sqfs_u32, sqfs_u8 *, sqfs_u32);

/* libsquashfs up to 1.3 stores what LZ4 made larger, against its own interface, and unsquashfs refuses to read that. */
static sqfs_s32 lz4_smaller_block(sqfs_compressor_t *compressor, const sqfs_u8 *data, sqfs_u32 size, sqfs_u8 *out, sqfs_u32 room)
{
	sqfs_s32 ret = lz4_block(compressor, data, size, out, room);

	return ret > 0 && (sqfs_u32)ret >= size ? 0 : ret;
}

static int make_compressor(int compression, uint32_t level, uint16_t flags, uint32_t block_size, sqfs_compressor_t **out)
{
	sqfs_compressor_config_t config;
	int ret = sqfs_compressor_config_init(&config, compression, block_size, flags);

	if (ret != 0)
		return ret;
	if (level != 0)
		config.level = level;
	ret = sqfs_compressor_create(&config, out);
	if (ret == 0 && compression == SQFS_COMP_LZ4 && !(flags & SQFS_COMP_FLAG_UNCOMPRESS)) {
		lz4_block = (*out)->do_block;
		(*out)->do_block = lz4_smaller_block;
	}
	return ret;
}

static int make_processor(image_t *image, uint32_t workers, uint32_t backlog)
{
	sqfs_block_processor_desc_t description;

	memset(&description, 0, sizeof(description));
	description.size = sizeof(description);
	description.max_block_size = image->super.block_size;
	description.num_workers = workers;
	description.max_backlog = backlog;
	description.cmp = image->compressor;
	description.wr = image->blocks;
	description.tbl = image->fragments;
	/* With these two, equal checksums are not enough: fragments are compared byte by byte. */
	description.file = &image->window.base;
	description.uncmp = image->uncompressor;
	return sqfs_block_processor_create_ex(&description, &image->processor);
}

static int image_open(image_t *image, int fd, uint64_t offset, int compression, uint32_t level, uint16_t flags, uint32_t block_size,
		      uint32_t mtime, uint32_t workers, uint32_t backlog)
{
	sqfs_file_t *file = &image->window.base;
	int ret;

	image->window.fd = fd;
	image->window.offset = offset;
	file->read_at = window_read;
	file->write_at = window_write;
	file->get_size = window_size;
	file->truncate = window_truncate;

	ret = sqfs_super_init(&image->super, block_size, mtime, compression);
	if (ret == 0)
		ret = make_compressor(compression, level, flags, block_size, &image->compressor);
	if (ret == 0)
		ret = make_compressor(compression, level, flags | SQFS_COMP_FLAG_UNCOMPRESS, block_size, &image->uncompressor);
	if (ret == 0)
		ret = sqfs_super_write(&image->super, file);
	if (ret == 0)
		ret = image->compressor->write_options(image->compressor, file);
	if (ret < 0)
		return ret;
	if (ret > 0)
		image->super.flags |= SQFS_FLAG_COMPRESSOR_OPTIONS;

	image->blocks = sqfs_block_writer_create(file, SQFS_DEVBLK_SIZE, 0);
	image->fragments = sqfs_frag_table_create(0);
	image->xattrs = sqfs_xattr_writer_create(0);
	image->inodes = sqfs_meta_writer_create(file, image->compressor, 0);
	image->listings = sqfs_meta_writer_create(file, image->compressor, SQFS_META_WRITER_KEEP_IN_MEMORY);
	if (!image->blocks || !image->fragments || !image->xattrs || !image->inodes || !image->listings)
		return SQFS_ERROR_ALLOC;
	image->directory = sqfs_dir_writer_create(image->listings, 0);
	if (!image->directory)
		return SQFS_ERROR_ALLOC;

	ret = make_processor(image, workers, backlog);
	if (ret == SQFS_ERROR_INTERNAL && workers > 1)  /* so many threads are not allowed here */
		ret = make_processor(image, 1, backlog);
	return ret;
}

/* ---- data --------------------------------------------------------------------------------------------------------------- */

/* plain: as it is, in blocks of its own. */
static int image_begin(image_t *image, int plain)
{
	int ret;

	if (image->used == image->room) {
		uint32_t room = image->room ? 2 * image->room : 4096;
		sqfs_inode_generic_t **files;

		if (room <= image->room)
			return SQFS_ERROR_OVERFLOW;
		/* The processor points into the table as long as blocks are in flight. */
		ret = sqfs_block_processor_sync(image->processor);
		if (ret != 0)
			return ret;
		files = realloc(image->files, room * sizeof(*files));
		if (files == NULL)
			return SQFS_ERROR_ALLOC;
		image->files = files;
		image->room = room;
	}
	ret = sqfs_block_processor_begin_file(image->processor, &image->files[image->used], NULL,
					      plain ? SQFS_BLK_DONT_COMPRESS | SQFS_BLK_DONT_FRAGMENT : 0);
	if (ret != 0)
		return ret;
	image->used += 1;
	image->length = 0;
	return 0;
}

static int image_append(image_t *image, const void *data, size_t size)
{
	if (size == 0)  /* libsquashfs 1.2 looks at a block that it does not have */
		return 0;
	image->length += size;
	return sqfs_block_processor_append(image->processor, data, size);
}

static int append_zeros(image_t *image, uint64_t size)
{
	static const char zeros[65536];

	while (size > 0) {
		size_t count = size < sizeof(zeros) ? size : sizeof(zeros);
		int ret = image_append(image, zeros, count);

		if (ret != 0)
			return ret;
		size -= count;
	}
	return 0;
}

/* Only the ends of a hole, where it shares a block with data, become zeros. */
static int image_hole(image_t *image, uint64_t size)
{
	uint64_t block_size = image->super.block_size;
	uint64_t head = (block_size - image->length % block_size) % block_size;
	uint64_t whole;
	hole_t *holes;
	int ret;

	if (head > size)
		head = size;
	whole = (size - head) / block_size;
	if (whole > MAX_BLOCKS || (image->length + head) / block_size + whole > MAX_BLOCKS)
		return SQFS_ERROR_OVERFLOW;
	ret = append_zeros(image, head);
	if (ret != 0)
		return ret;
	if (whole > 0) {
		if (image->hole_count == image->hole_room) {
			size_t room = image->hole_room ? 2 * image->hole_room : 64;

			holes = realloc(image->holes, room * sizeof(*holes));
			if (holes == NULL)
				return SQFS_ERROR_ALLOC;
			image->holes = holes;
			image->hole_room = room;
		}
		image->holes[image->hole_count++] = (hole_t){
			.file = image->used, .block = image->length / block_size, .count = whole,
		};
		image->length += whole * block_size;
	}
	return append_zeros(image, (size - head) % block_size);
}

static int64_t image_end(image_t *image)
{
	int ret = sqfs_block_processor_end_file(image->processor);

	return ret != 0 ? ret : (int64_t)image->used;
}

/* A file whose data is at hand, as most are: one call, because each gives up Python's lock and takes it again. */
static int64_t image_file(image_t *image, const void *data, size_t size, int plain)
{
	int ret = image_begin(image, plain);

	if (ret == 0)
		ret = image_append(image, data, size);
	return ret != 0 ? ret : image_end(image);
}

/* The end of all data; what follows in the file is the inode table. */
static int image_sync(image_t *image)
{
	int ret = sqfs_block_processor_finish(image->processor);

	image->super.inode_table_start = image->window.size;
	return ret;
}

/* ---- extended attributes ------------------------------------------------------------------------------------------------ */

static int image_xattr_begin(image_t *image)
{
	return sqfs_xattr_writer_begin(image->xattrs, 0);
}

static int image_xattr_add(image_t *image, const char *key, const void *value, size_t size)
{
	return sqfs_xattr_writer_add(image->xattrs, key, value, size);
}

static int64_t image_xattr_end(image_t *image)
{
	sqfs_u32 index;
	int ret = sqfs_xattr_writer_end(image->xattrs, &index);

	return ret != 0 ? ret : (int64_t)index;
}

/* ---- the tree ----------------------------------------------------------------------------------------------------------- */

static hole_t *holes_of(const image_t *image, uint32_t file)
{
	size_t low = 0, high = image->hole_count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (image->holes[middle].file < file)
			low = middle + 1;
		else
			high = middle;
	}
	return image->holes + low;
}

static int write_sizes(image_t *image, const sqfs_u32 *sizes, uint32_t count)
{
	sqfs_u32 buffer[1024];

	while (count > 0) {
		uint32_t i, step = count < 1024 ? count : 1024;
		int ret;

		for (i = 0; i < step; ++i)
			buffer[i] = sizes != NULL ? htole32(sizes[i]) : 0;
		ret = sqfs_meta_writer_append(image->inodes, buffer, step * sizeof(buffer[0]));
		if (ret != 0)
			return ret;
		if (sizes != NULL)
			sizes += step;
		count -= step;
	}
	return 0;
}

/* The inode of a file, then the sizes of its blocks: what the processor found, with the holes put back.  libsquashfs would take
   the whole list onto the stack. */
static int write_file(image_t *image, sqfs_inode_generic_t *inode, uint32_t index, uint32_t links, uint32_t xattr)
{
	const hole_t *end = image->holes + image->hole_count, *hole, *first = holes_of(image, index);
	const sqfs_inode_generic_t *stored = index ? image->files[index - 1] : NULL;
	uint32_t count = stored ? sqfs_inode_get_file_block_count(stored) : 0, written = 0, position = 0, step;
	uint64_t sparse = 0, size;
	int ret;

	for (hole = first; hole < end && hole->file == index; ++hole)
		sparse += (uint64_t)hole->count * image->super.block_size;

	sqfs_inode_get_file_size(inode, &size);
	sqfs_inode_set_file_size(inode, size + sparse);
	if (links > 1 || xattr != NONE || sparse > 0)
		sqfs_inode_make_extended(inode);
	if (inode->base.type == SQFS_INODE_EXT_FILE) {
		inode->data.file_ext.nlink = links;
		inode->data.file_ext.xattr_idx = xattr;
		inode->data.file_ext.sparse += sparse;
	}
	inode->payload_bytes_used = 0;
	ret = sqfs_meta_writer_write_inode(image->inodes, inode);

	for (hole = first; ret == 0 && hole < end && hole->file == index; ++hole) {
		step = hole->block - position;
		ret = write_sizes(image, stored->extra + written, step);
		if (ret == 0)
			ret = write_sizes(image, NULL, hole->count);
		written += step;
		position += step + hole->count;
	}
	return ret == 0 && written < count ? write_sizes(image, stored->extra + written, count - written) : ret;
}

static int write_symlink(image_t *image, const sqfs_inode_generic_t *head, const char *target, size_t length)
{
	sqfs_inode_generic_t *inode = malloc(sizeof(*inode) + length);
	int ret;

	if (inode == NULL)
		return SQFS_ERROR_ALLOC;
	*inode = *head;
	inode->data.slink.target_size = length;
	memcpy(inode->extra, target, length);
	ret = sqfs_meta_writer_write_inode(image->inodes, inode);
	free(inode);
	return ret;
}

/* Bits 16 and up: the metadata block within the inode table; below: the offset within the uncompressed block. */
static int64_t next_place(const image_t *image)
{
	sqfs_u64 block;
	sqfs_u32 offset;

	sqfs_meta_writer_get_position(image->inodes, &block, &offset);
	return (int64_t)(block << 16 | offset);
}

static int image_directory_begin(image_t *image)
{
	return sqfs_dir_writer_begin(image->directory, 0);
}

static int image_link(image_t *image, const char *name, size_t length, uint16_t mode, uint32_t number, uint64_t place)
{
	if (length == 0 || length > 255 || strlen(name) != length || memchr(name, '/', length) || !strcmp(name, ".") || !strcmp(name, ".."))
		return SQUASHFS_BAD_NAME;
	return sqfs_dir_writer_add_entry(image->directory, name, number, place, mode);
}

/* payload: of a file, what image_end returned, or 0; of a device, its number as the kernel encodes it. */
static int64_t image_entry(image_t *image, const char *name, size_t length, uint16_t mode, uint16_t uid, uint16_t gid, uint32_t mtime,
			   uint32_t number, uint32_t links, uint32_t xattr, uint32_t payload, const char *target, size_t target_length)
{
	sqfs_inode_generic_t inode;
	int64_t place = next_place(image);
	int ret;

	memset(&inode, 0, sizeof(inode));
	if (S_ISREG(mode)) {
		if (payload > image->used)
			return SQFS_ERROR_ARG_INVALID;
		inode.base.type = SQFS_INODE_FILE;
		inode.data.file.fragment_index = inode.data.file.fragment_offset = NONE;
		if (payload > 0)
			inode = *image->files[payload - 1];
	}
	inode.base.mode = mode;
	inode.base.uid_idx = uid;
	inode.base.gid_idx = gid;
	inode.base.mod_time = mtime;
	inode.base.inode_number = number;
	switch (mode & S_IFMT) {
	case S_IFREG:
		ret = write_file(image, &inode, payload, links, xattr);
		break;
	case S_IFLNK:
		inode.base.type = SQFS_INODE_SLINK + (xattr == NONE ? 0 : EXTENDED);
		inode.data.slink_ext = (sqfs_inode_slink_ext_t){ .nlink = links, .xattr_idx = xattr };
		ret = write_symlink(image, &inode, target, target_length);
		break;
	case S_IFBLK:
	case S_IFCHR:
		inode.base.type = (S_ISBLK(mode) ? SQFS_INODE_BDEV : SQFS_INODE_CDEV) + (xattr == NONE ? 0 : EXTENDED);
		inode.data.dev_ext = (sqfs_inode_dev_ext_t){ .nlink = links, .devno = payload, .xattr_idx = xattr };
		ret = sqfs_meta_writer_write_inode(image->inodes, &inode);
		break;
	case S_IFIFO:
	case S_IFSOCK:
		inode.base.type = (S_ISFIFO(mode) ? SQFS_INODE_FIFO : SQFS_INODE_SOCKET) + (xattr == NONE ? 0 : EXTENDED);
		inode.data.ipc_ext = (sqfs_inode_ipc_ext_t){ .nlink = links, .xattr_idx = xattr };
		ret = sqfs_meta_writer_write_inode(image->inodes, &inode);
		break;
	default:
		return SQFS_ERROR_ARG_INVALID;
	}
	if (ret == 0)
		ret = image_link(image, name, length, mode, number, place);
	return ret != 0 ? ret : place;
}

static int64_t image_directory_end(image_t *image, uint16_t mode, uint16_t uid, uint16_t gid, uint32_t mtime, uint32_t number,
				   uint32_t links, uint32_t xattr, uint32_t parent)
{
	sqfs_inode_generic_t *inode;
	int64_t place = next_place(image);
	int ret = sqfs_dir_writer_end(image->directory);

	if (ret != 0)
		return ret;
	inode = sqfs_dir_writer_create_inode(image->directory, 0, xattr, parent);
	if (inode == NULL)
		return SQFS_ERROR_ALLOC;
	inode->base.mode = mode;
	inode->base.uid_idx = uid;
	inode->base.gid_idx = gid;
	inode->base.mod_time = mtime;
	inode->base.inode_number = number;
	/* libsquashfs counts every entry; find(1) wants two and one for each directory. */
	if (inode->base.type == SQFS_INODE_EXT_DIR)
		inode->data.dir_ext.nlink = links;
	else
		inode->data.dir.nlink = links;
	ret = sqfs_meta_writer_write_inode(image->inodes, inode);
	sqfs_free(inode);
	return ret != 0 ? ret : place;
}

/* The tables behind the data in their order, then the superblock; returns the bytes used, padded to a multiple of 4096. */
static int64_t image_finish(image_t *image, uint32_t inodes, uint64_t root, const uint32_t *ids, uint16_t id_count)
{
	sqfs_file_t *file = &image->window.base;
	sqfs_super_t *super = &image->super;
	uint64_t padded;
	int ret;

	super->inode_count = inodes;
	super->root_inode_ref = root;
	super->id_count = id_count;
	ret = sqfs_meta_writer_flush(image->inodes);
	if (ret == 0)
		ret = sqfs_meta_writer_flush(image->listings);
	super->directory_table_start = image->window.size;
	if (ret == 0)
		ret = sqfs_meta_write_write_to_file(image->listings);
	if (ret == 0)
		ret = sqfs_frag_table_write(image->fragments, file, super, image->compressor);
	if (ret == 0)
		ret = sqfs_write_table(file, image->compressor, ids, id_count * sizeof(*ids), &super->id_table_start);
	if (ret == 0)
		ret = sqfs_xattr_writer_flush(image->xattrs, file, super, image->compressor);
	super->bytes_used = image->window.size;
	if (ret == 0)
		ret = sqfs_super_write(super, file);
	if (ret != 0)
		return ret;

	padded = (super->bytes_used + SQFS_DEVBLK_SIZE - 1) / SQFS_DEVBLK_SIZE * SQFS_DEVBLK_SIZE;
	if (ftruncate(image->window.fd, image->window.offset + super->bytes_used) != 0
	    || ftruncate(image->window.fd, image->window.offset + padded) != 0) {
		image->window.error = errno;
		return SQFS_ERROR_IO;
	}
	return (int64_t)padded;
}

/* ---- reading: only the decompressors, because what is parsed may be hostile ------------------------------------------------ */

static sqfs_compressor_t *uncompressor_new(int compression, uint32_t block_size)
{
	sqfs_compressor_t *compressor = NULL;

	return make_compressor(compression, 0, SQFS_COMP_FLAG_UNCOMPRESS, block_size, &compressor) == 0 ? compressor : NULL;
}

static void uncompressor_free(sqfs_compressor_t *compressor)
{
	sqfs_destroy(compressor);
}

static int32_t uncompress(sqfs_compressor_t *compressor, const void *data, uint32_t size, void *out, uint32_t room)
{
	return compressor->do_block(compressor, data, size, out, room);
}

/* For the test that pins them. */
static size_t abi_size(int structure)
{
	const size_t sizes[] = {
		sizeof(sqfs_super_t), sizeof(sqfs_inode_generic_t), sizeof(sqfs_block_processor_desc_t),
		sizeof(sqfs_compressor_config_t), sizeof(sqfs_file_t), sizeof(sqfs_object_t),
	};
	return sizes[structure];
}
