/* The part of a file from an offset on, as libsquashfs sees files; so a SquashFS can grow inside a SIF. */
#ifndef WINDOW_H
#define WINDOW_H

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#include <sqfs/error.h>
#include <sqfs/io.h>

typedef struct {
	sqfs_file_t base;
	int fd;
	int error;          /* errno of the last failure */
	int read_failed;
	uint64_t offset;
	uint64_t size;
} window_t;

static int window_transfer(window_t *window, uint64_t position, char *buffer, size_t size, int writing)
{
	while (size > 0) {
		off_t at = window->offset + position;
		ssize_t count = writing ? pwrite(window->fd, buffer, size, at) : pread(window->fd, buffer, size, at);

		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0) {
			window->error = count < 0 ? errno : EIO;
			return SQFS_ERROR_IO;
		}
		buffer += count;
		position += count;
		size -= count;
	}
	return 0;
}

static int window_read(sqfs_file_t *base, sqfs_u64 position, void *buffer, size_t size)
{
	int ret = window_transfer((window_t *)base, position, buffer, size, 0);

	((window_t *)base)->read_failed |= ret != 0;
	return ret;
}

static int window_write(sqfs_file_t *base, sqfs_u64 position, const void *buffer, size_t size)
{
	window_t *window = (window_t *)base;
	int ret = window_transfer(window, position, (char *)buffer, size, 1);

	if (ret == 0 && position + size > window->size)
		window->size = position + size;
	return ret;
}

static sqfs_u64 window_size(const sqfs_file_t *base)
{
	return ((const window_t *)base)->size;
}

/* Called for every file that turns out to be stored already.  What lies behind is overwritten, and cut off at the end. */
static int window_truncate(sqfs_file_t *base, sqfs_u64 size)
{
	((window_t *)base)->size = size;
	return 0;
}

#endif
