/* Reading a SquashFS 4.0 that nobody vouches for: every place and length in it is checked before it is used.

   The format is drawn in sciexec/squashfs.py.  All functions may be called by several threads at once; those that can fail
   return 0, or a length where they say so, or -errno (EIO: the image is damaged). */
#ifndef SCIEXEC_SQUASHFS_H
#define SCIEXEC_SQUASHFS_H

#include <stddef.h>
#include <stdint.h>

#define SQUASHFS_NONE 0xFFFFFFFFU
#define SQUASHFS_NAME_MAX 256
#define SQUASHFS_LINK_MAX 65535

/* A place in a row of metadata blocks: where the block is, counted from the start of the file system, and how far into it. */
typedef struct {
	uint64_t block;
	uint32_t offset;
} squashfs_cursor;

typedef struct {
	uint64_t reference;       /* its place: metadata block << 16 | offset, as directories name it */
	uint32_t mode;            /* with the bits of its type, as in stat(2) */
	uint32_t uid, gid, mtime, number, links;
	uint32_t device;          /* of a device file, as new_encode_dev */
	uint64_t size;            /* bytes; of a directory: of its listing, and 3 more */
	uint32_t xattr;           /* SQUASHFS_NONE for none */
	uint64_t start;           /* file: where its first block is.  directory: metadata block of its listing */
	uint32_t fragment, fragment_offset;
	uint32_t listing_offset, indexes;
	squashfs_cursor rest;     /* file: the sizes of its blocks.  link: its text.  directory: its index */
} squashfs_inode;

typedef struct {
	uint64_t reference;
	uint32_t number;
	unsigned type;            /* of the inode, 1 to 7 */
	uint64_t next;            /* where the listing goes on, for squashfs_list; ascending, and small: 32-bit programs get it, too */
	unsigned length;
	char name[SQUASHFS_NAME_MAX + 1];
} squashfs_dirent;

typedef struct {
	squashfs_cursor at;            /* behind what is in the buffer */
	uint64_t place, end;           /* bytes of the listing: where we are, where all ends */
	uint32_t left;                 /* entries of this run that are still to come */
	uint32_t block, number;        /* what its entries count from */
	uint32_t used, filled;         /* bytes of the buffer */
	uint8_t buffer[8192];
} squashfs_listing;

typedef struct squashfs squashfs;

/* Opens the file system `offset` bytes into fd and loads the library for its compression.  Returns 0, -EINVAL for what is no
   SquashFS, -ENOTSUP where the library is missing, or another -errno. */
int squashfs_open(squashfs **image, int fd, uint64_t offset);

/* Reads the tables that are kept in memory, once, before anything below is called.  It is the first that decompresses. */
int squashfs_tables(squashfs *image);

uint64_t squashfs_root(const squashfs *image);
uint64_t squashfs_bytes(const squashfs *image);
uint32_t squashfs_inodes(const squashfs *image);
uint32_t squashfs_block_size(const squashfs *image);
int squashfs_has_xattrs(const squashfs *image);

int squashfs_inode_get(squashfs *image, uint64_t reference, squashfs_inode *inode);

/* The text of a link, not terminated; returns its length. */
int squashfs_readlink(squashfs *image, const squashfs_inode *inode, char *text, size_t room);

/* Starts to read a directory at `where`: 0 for its beginning, or the `next` of an entry. */
int squashfs_list(squashfs *image, const squashfs_inode *directory, uint64_t where, squashfs_listing *listing);

/* The next entry; returns 1, or 0 at the end. */
int squashfs_next(squashfs *image, squashfs_listing *listing, squashfs_dirent *entry);

/* The entry of a name; returns -ENOENT where there is none. */
int squashfs_lookup(squashfs *image, const squashfs_inode *directory, const char *name, size_t length, squashfs_dirent *entry);

/* Bytes of a file; returns how many, fewer than asked for at its end only. */
int squashfs_read(squashfs *image, const squashfs_inode *inode, uint64_t offset, uint32_t size, uint8_t *into);

/* The value of an extended attribute, or, with name NULL, all names with a NUL behind each.  Returns the length, also where `room`
   is too small for it, or -ENODATA. */
int squashfs_xattr(squashfs *image, const squashfs_inode *inode, const char *name, uint8_t *into, size_t room);

#endif
