/* Does to images all that sciexec-fuse can be asked to do to one; built with sanitizers, for images that somebody spoiled.

       walk SECONDS THREADS IMAGE...      says for each image what came of it, and at last the most memory that one of them took

   Every image has a process of its own.  What ends by a signal, a sanitizer or the time limit makes the exit status 1. */
#define _GNU_SOURCE
#include "../../sciexec/native/squashfs.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PIECE (1U << 20)
#define DEPTH 12       /* a directory may be in itself */
#define VISITS 20000   /* and many names may mean one */
#define READS 48       /* per file: the first pieces, and places all over it */

typedef struct {
	squashfs *image;
	unsigned visits, files, directories, links, xattrs, errors;
	unsigned long long bytes;
	uint8_t *piece;
	const char *trouble;
} walk;

static int count(walk *w, int got)
{
	w->errors += got < 0;
	if (got < -4095)
		w->trouble = "an error that is none";
	return got;
}

static void attributes(walk *w, const squashfs_inode *inode)
{
	char names[PIECE / 8];
	int length = count(w, squashfs_xattr(w->image, inode, NULL, (uint8_t *)names, sizeof names));
	for (int at = 0; at < length; at += (int)strlen(names + at) + 1) {
		w->xattrs++;
		count(w, squashfs_xattr(w->image, inode, names + at, w->piece, 0));
		count(w, squashfs_xattr(w->image, inode, names + at, w->piece, PIECE));
	}
	squashfs_xattr(w->image, inode, "user.none", w->piece, PIECE);
}

static void contents(walk *w, const squashfs_inode *inode)
{
	static const uint32_t sizes[] = {PIECE, 4096, 1, 131072, 70000};
	uint64_t offset = 0;
	for (unsigned i = 0; i < READS; i++) {
		uint32_t size = sizes[i % 5];
		int got = count(w, squashfs_read(w->image, inode, offset, size, w->piece));
		if (got > (int)size)
			w->trouble = "more bytes than were asked for";
		w->bytes += got > 0 ? (unsigned)got : 0;
		if (i < READS / 2)
			offset += size;
		else  /* a stride of a third, then the end */
			offset = i % 4 ? (offset + inode->size / 3 + 12345) % (inode->size + 1) : inode->size - 1;
		if (offset >= inode->size && i < READS / 2)
			i = READS / 2;
	}
}

static void visit(walk *w, uint64_t reference, unsigned depth)
{
	squashfs_inode inode;
	if (w->visits++ > VISITS || count(w, squashfs_inode_get(w->image, reference, &inode)))
		return;
	attributes(w, &inode);
	if (S_ISREG(inode.mode)) {
		w->files++;
		contents(w, &inode);
	} else if (S_ISLNK(inode.mode)) {
		w->links++;
		count(w, squashfs_readlink(w->image, &inode, (char *)w->piece, PIECE));
	} else if (S_ISDIR(inode.mode) && depth < DEPTH) {
		squashfs_listing *listing = malloc(2 * sizeof *listing);
		squashfs_dirent entry, again;
		uint64_t before = 0;
		w->directories++;
		int got = listing ? count(w, squashfs_list(w->image, &inode, 0, listing)) : -1;
		while (!got && w->visits < VISITS && count(w, squashfs_next(w->image, listing, &entry)) > 0) {
			if (entry.next <= before)
				w->trouble = "a listing that goes back";
			if (w->visits % 16 == 0 && !count(w, squashfs_list(w->image, &inode, before, listing + 1)) &&
			    (count(w, squashfs_next(w->image, listing + 1, &again)) != 1 || strcmp(entry.name, again.name)) && !w->errors)
				w->trouble = "a listing goes on with another entry";
			before = entry.next;
			if (count(w, squashfs_lookup(w->image, &inode, entry.name, entry.length, &again)) && !w->errors)
				w->trouble = "a listed name is not found";
			entry.name[0] ^= 1;
			squashfs_lookup(w->image, &inode, entry.name, entry.length, &again);
			visit(w, entry.reference, depth + 1);
		}
		free(listing);
	}
}

static void *whole(void *given)
{
	walk *w = given;
	w->piece = malloc(PIECE);
	if (w->piece)
		visit(w, squashfs_root(w->image), 0);
	free(w->piece);
	return NULL;
}

static int look(const char *path, unsigned threads)
{
	walk walks[16] = {{0}};
	pthread_t others[16];
	squashfs *image;
	int fd = open(path, O_RDONLY), failed = fd < 0 ? -errno : squashfs_open(&image, fd, 0);
	if (failed || (failed = squashfs_tables(image)))
		return printf("%s: %s\n", path, strerror(-failed)), 0;
	for (unsigned i = 0; i < threads; i++) {
		walks[i].image = image;
		if (pthread_create(others + i, NULL, whole, walks + i))
			return 1;
	}
	const char *trouble = NULL;
	for (unsigned i = 0; i < threads; i++) {
		pthread_join(others[i], NULL);
		trouble = walks[i].trouble ? walks[i].trouble : trouble;
	}
	printf("%s: files %u directories %u links %u xattrs %u errors %u bytes %llu%s%s\n", path, walks->files, walks->directories, walks->links,
	       walks->xattrs, walks->errors, walks->bytes, trouble ? " TROUBLE: " : "", trouble ? trouble : "");
	return trouble != NULL;
}

int main(int argc, char **argv)
{
	int bad = 0;
	for (int i = 3; i < argc; i++) {
		int status;
		fflush(stdout);
		pid_t child = fork();
		if (!child) {
			alarm((unsigned)atoi(argv[1]));
			int result = look(argv[i], (unsigned)atoi(argv[2]));
			fflush(stdout);
			_exit(result);
		}
		if (child < 0 || waitpid(child, &status, 0) != child || status) {
			printf("%s: status %x\n", argv[i], status);
			bad = 1;
		}
	}
	struct rusage used;
	getrusage(RUSAGE_CHILDREN, &used);
	printf("memory %ld KiB\n", used.ru_maxrss);
	return bad;
}
