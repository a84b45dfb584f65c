/* sciexec-fuse: serves one SquashFS to the kernel, in as many threads as there is work for, until the last mount of it is gone.

       sciexec-fuse IMAGE DEVICE GO OFFSET       descriptors of the image, of /dev/fuse and of a pipe; bytes to the SquashFS

   It is started before the mount is there, and reads one byte from GO to learn that it is.  Whoever starts it waits for its first
   process, which ends at once; the second one belongs to nobody, has no descriptor of the starter's but these, no capability, no
   place to write to, and few system calls.

   Nothing is ever written to or changed, so everything that the kernel is told, it may keep for good: names, their absence,
   attributes, contents.  A file is not even opened here: the first OPEN is answered "no need to ask", which the kernel takes for all
   files.

   Source: linux/fuse.h; Linux, Documentation/filesystems/fuse.rst and fs/fuse/. */
#define _GNU_SOURCE
#include "squashfs.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/fuse.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define FOREVER (10ULL * 365 * 86400)   /* seconds */
#define THREADS_MAX 15                  /* fewer than there are slots for data */
#define REQUEST_SIZE 16384              /* bytes; twice what the kernel asks for at least */
#define WRITE_MAX 4096
#define READ_MAX (1U << 20)             /* what max_read says in the options of the mount */
#define FIRST_ENTRIES 2                 /* . and .. */
#define CLOSE_RANGE 436                 /* Linux 5.9 */

#ifndef FUSE_CACHE_SYMLINKS             /* headers before Linux 4.20 and 5.1; the numbers are the kernel's for good */
#define FUSE_CACHE_SYMLINKS (1 << 23)
#endif
#ifndef FUSE_NO_OPENDIR_SUPPORT
#define FUSE_NO_OPENDIR_SUPPORT (1 << 24)
#endif
#ifndef FUSE_MAX_PAGES
#define FUSE_MAX_PAGES (1 << 22)
#endif

/* struct fuse_init_out as it is since 7.28; older headers have its last fields as padding */
struct init_reply {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t unused[8];
};

static squashfs *image;
static int device;
static uint32_t offered;                /* flags of the kernel's INIT */
static atomic_uint threads = 1, threads_max, idle;

/* ---- numbers and attributes ------------------------------------------------------------------------------------------------- */

/* The kernel's name for an inode is its place in the image; only the root has another, FUSE_ROOT_ID, and so has whatever lies there. */
static uint64_t node_of(uint64_t reference) { return reference == squashfs_root(image) ? FUSE_ROOT_ID : reference + 2; }
static uint64_t reference_of(uint64_t node) { return node == FUSE_ROOT_ID ? squashfs_root(image) : node - 2; }

static void fill(const squashfs_inode *inode, struct fuse_attr *attr)
{
	uint64_t size = S_ISDIR(inode->mode) && inode->size < 3 ? 0 : inode->size;
	memset(attr, 0, sizeof *attr);
	attr->ino = inode->number;
	attr->size = size;
	attr->blocks = (size + 511) / 512;
	attr->atime = attr->mtime = attr->ctime = inode->mtime;
	attr->mode = inode->mode;
	attr->nlink = inode->links;
	/* Everything is root's: of all users only root, who is the caller, is mapped into the namespace that mounts.  Whatever
	 * is somebody else's could be read, but no overlay could copy it (EOVERFLOW). */
	attr->uid = attr->gid = 0;
	attr->rdev = inode->device;
	attr->blksize = squashfs_block_size(image);
}

/* The answer to a lookup, and half of an entry with its attributes. */
static int describe(uint64_t reference, struct fuse_entry_out *out)
{
	squashfs_inode inode;
	int failed = squashfs_inode_get(image, reference, &inode);
	memset(out, 0, sizeof *out);
	if (failed)
		return failed;
	out->nodeid = node_of(reference);
	out->entry_valid = out->attr_valid = FOREVER;
	fill(&inode, &out->attr);
	return 0;
}

/* ---- requests ----------------------------------------------------------------------------------------------------------------- */

/* Each answers with the length of what it put into `out` (READ_MAX bytes and more), or -errno. */

static int init(const struct fuse_init_in *in, uint8_t *out)
{
	uint32_t wanted = FUSE_ASYNC_READ | FUSE_PARALLEL_DIROPS | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_NO_OPEN_SUPPORT |
			  FUSE_NO_OPENDIR_SUPPORT | FUSE_CACHE_SYMLINKS | FUSE_MAX_PAGES;
	struct init_reply reply = {
		.major = FUSE_KERNEL_VERSION,
		.minor = in->minor < 31 ? in->minor : 31,
		.max_readahead = in->max_readahead,
		.flags = in->flags & wanted,
		.max_background = 64,
		.congestion_threshold = 48,
		.max_write = WRITE_MAX,
		.time_gran = 1,
		.max_pages = (uint16_t)(READ_MAX / (unsigned long)sysconf(_SC_PAGESIZE)),
	};
	if (in->major != FUSE_KERNEL_VERSION || in->minor < 23)
		return -EPROTO;
	offered = in->flags;
	memcpy(out, &reply, sizeof reply);
	return sizeof reply;
}

/* "No need to ask" is what a kernel understands that has offered to; Linux 5.1 was the first to do so for directories. */
static int open_(uint32_t support, uint32_t flags, uint8_t *out)
{
	struct fuse_open_out reply = {.open_flags = flags};
	if (offered & support)
		return -ENOSYS;
	memcpy(out, &reply, sizeof reply);
	return sizeof reply;
}

static int lookup(uint64_t node, const char *name, size_t room, uint8_t *out)
{
	struct fuse_entry_out reply;
	squashfs_inode directory;
	squashfs_dirent entry;
	int failed = squashfs_inode_get(image, reference_of(node), &directory);
	if (!failed)
		failed = squashfs_lookup(image, &directory, name, strnlen(name, room), &entry);
	if (failed == -ENOENT) {  /* node 0 and a time: nothing is there, and that will not change */
		memset(&reply, 0, sizeof reply);
		reply.entry_valid = FOREVER;
	} else if (failed || (failed = describe(entry.reference, &reply))) {
		return failed;
	}
	memcpy(out, &reply, sizeof reply);
	return sizeof reply;
}

static int getattr(uint64_t node, uint8_t *out)
{
	struct fuse_attr_out reply = {.attr_valid = FOREVER};
	squashfs_inode inode;
	int failed = squashfs_inode_get(image, reference_of(node), &inode);
	if (failed)
		return failed;
	fill(&inode, &reply.attr);
	memcpy(out, &reply, sizeof reply);
	return sizeof reply;
}

/* Without default_permissions the kernel asks us: who can read the image file can read all of it, but a program must be one. */
static int may(uint64_t node, uint32_t mask)
{
	squashfs_inode inode;
	int failed = squashfs_inode_get(image, reference_of(node), &inode);
	if (failed)
		return failed;
	if (mask & W_OK)
		return -EROFS;
	return mask & X_OK && S_ISREG(inode.mode) && !(inode.mode & 0111) ? -EACCES : 0;
}

static int readlink_(uint64_t node, uint8_t *out)
{
	squashfs_inode inode;
	int failed = squashfs_inode_get(image, reference_of(node), &inode);
	return failed ? failed : squashfs_readlink(image, &inode, (char *)out, READ_MAX);
}

static int read_(uint64_t node, const struct fuse_read_in *in, uint8_t *out)
{
	squashfs_inode inode;
	if (in->size > READ_MAX)
		return -EINVAL;  /* fewer bytes than asked for would mean the end of the file */
	int failed = squashfs_inode_get(image, reference_of(node), &inode);
	return failed ? failed : squashfs_read(image, &inode, in->offset, in->size, out);
}

/* Entries from in->offset on, as many as fit; with `plus`, each behind what a lookup of it would answer. */
static int readdir_(uint64_t node, const struct fuse_read_in *in, int plus, uint8_t *out)
{
	size_t room = in->size < READ_MAX ? in->size : READ_MAX, used = 0, before = plus ? sizeof(struct fuse_entry_out) : 0;
	uint64_t offset = in->offset;
	squashfs_inode directory;
	squashfs_listing listing;
	int got = squashfs_inode_get(image, reference_of(node), &directory);
	if (!got)
		got = squashfs_list(image, &directory, offset < FIRST_ENTRIES ? 0 : offset - FIRST_ENTRIES, &listing);
	if (got)
		return got;
	for (;;) {
		squashfs_dirent entry = {.number = directory.number, .type = 1};
		if (offset < FIRST_ENTRIES) {
			entry.length = (unsigned)offset + 1;
			memcpy(entry.name, "..", 2);
			entry.next = offset + 1 - FIRST_ENTRIES;
		} else if ((got = squashfs_next(image, &listing, &entry)) <= 0) {
			return got && !used ? got : (int)used;
		}
		static const unsigned types[] = {0, 4, 8, 10, 6, 2, 1, 12};  /* DT_DIR ... of dirent.h */
		struct fuse_dirent head = {
			.ino = entry.number, .off = entry.next + FIRST_ENTRIES, .namelen = entry.length, .type = types[entry.type],
		};
		size_t length = FUSE_DIRENT_ALIGN(before + FUSE_NAME_OFFSET + entry.length);
		if (length > room - used)
			return (int)used;
		memset(out + used, 0, length);
		if (plus && offset >= FIRST_ENTRIES && (got = describe(entry.reference, (struct fuse_entry_out *)(void *)(out + used))))
			return used ? (int)used : got;
		memcpy(out + used + before, &head, FUSE_NAME_OFFSET);
		memcpy(out + used + before + FUSE_NAME_OFFSET, entry.name, entry.length);
		used += length;
		offset = head.off;
	}
}

static int statfs_(uint8_t *out)
{
	uint32_t size = squashfs_block_size(image);
	struct fuse_statfs_out reply = {.st = {
		.blocks = (squashfs_bytes(image) + size - 1) / size, .files = squashfs_inodes(image),
		.bsize = size, .frsize = size, .namelen = SQUASHFS_NAME_MAX,
	}};
	memcpy(out, &reply, sizeof reply);
	return sizeof reply;
}

/* The kernel asks for the length first, with a size of 0. */
static int xattr(uint64_t node, const struct fuse_getxattr_in *in, const char *name, uint8_t *out)
{
	squashfs_inode inode;
	if (!squashfs_has_xattrs(image))
		return -ENOSYS;  /* it never asks again */
	int got = squashfs_inode_get(image, reference_of(node), &inode);
	if (!got)
		got = squashfs_xattr(image, &inode, name, out, in->size < READ_MAX ? in->size : READ_MAX);
	if (got < 0 || in->size)
		return got > 0 && (uint32_t)got > in->size ? -ERANGE : got;
	struct fuse_getxattr_out reply = {.size = (uint32_t)got};
	memcpy(out, &reply, sizeof reply);
	return sizeof reply;
}

static int answer(const struct fuse_in_header *in, uint8_t *out)
{
	const uint8_t *body = (const uint8_t *)(in + 1);
	size_t length = in->len - sizeof *in;
	/* the kernel terminates names, and sends what its requests are made of; a short one is not looked at */
	static const struct { uint32_t opcode, size; } sizes[] = {
		{FUSE_INIT, 16}, {FUSE_LOOKUP, 1}, {FUSE_ACCESS, sizeof(struct fuse_access_in)}, {FUSE_READ, sizeof(struct fuse_read_in)},
		{FUSE_READDIR, sizeof(struct fuse_read_in)}, {FUSE_READDIRPLUS, sizeof(struct fuse_read_in)},
		{FUSE_GETXATTR, sizeof(struct fuse_getxattr_in) + 1}, {FUSE_LISTXATTR, sizeof(struct fuse_getxattr_in)},
	};
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
		if (in->opcode == sizes[i].opcode && length < sizes[i].size)
			return -EINVAL;
	switch (in->opcode) {
	case FUSE_INIT: return init((const void *)body, out);
	case FUSE_LOOKUP: return lookup(in->nodeid, (const char *)body, length, out);
	case FUSE_GETATTR: return getattr(in->nodeid, out);
	case FUSE_ACCESS: return may(in->nodeid, ((const struct fuse_access_in *)(const void *)body)->mask);
	case FUSE_READLINK: return readlink_(in->nodeid, out);
	case FUSE_READ: return read_(in->nodeid, (const void *)body, out);
	case FUSE_READDIR: return readdir_(in->nodeid, (const void *)body, 0, out);
	case FUSE_READDIRPLUS: return readdir_(in->nodeid, (const void *)body, 1, out);
	case FUSE_STATFS: return statfs_(out);
	case FUSE_GETXATTR: return xattr(in->nodeid, (const void *)body, (const char *)body + sizeof(struct fuse_getxattr_in), out);
	case FUSE_LISTXATTR: return xattr(in->nodeid, (const void *)body, NULL, out);
	case FUSE_OPEN: return open_(FUSE_NO_OPEN_SUPPORT, FOPEN_KEEP_CACHE, out);
	case FUSE_OPENDIR: return open_(FUSE_NO_OPENDIR_SUPPORT, 0, out);
	case FUSE_RELEASE: case FUSE_RELEASEDIR: case FUSE_DESTROY: return 0;
	default: return -ENOSYS;
	}
}

/* ---- threads -------------------------------------------------------------------------------------------------------------------- */

/* Takes requests until the file system is gone.  Who was the last one free starts another one, up to one for each CPU: as many
   as there was ever work for at once, and one to spare. */
static void *serve(void *unused)
{
	union { struct fuse_in_header header; uint8_t bytes[REQUEST_SIZE]; } *request = malloc(sizeof *request);
	uint8_t *out = malloc(READ_MAX);
	if (!request || !out)
		return unused;  /* the others go on */
	for (;;) {
		idle++;
		ssize_t got = read(device, request, sizeof *request);
		unsigned left = --idle;
		if (got < 0 && (errno == EINTR || errno == ENOENT || errno == EAGAIN))  /* ENOENT: interrupted before it was read */
			continue;
		if (got < (ssize_t)sizeof request->header)
			_exit(got < 0 && errno != ENODEV);  /* exit() would unload libraries that other threads are in */
		uint32_t opcode = request->header.opcode;
		if (opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT)  /* no answer is expected */
			continue;
		unsigned count = threads;
		pthread_t thread;
		if (!left && opcode != FUSE_INIT && count < threads_max && atomic_compare_exchange_strong(&threads, &count, count + 1)) {
			if (pthread_create(&thread, NULL, serve, NULL))
				threads_max = count;  /* the user's limit of processes; we go on with those there are */
			else
				pthread_detach(thread);
		}
		int length = answer(&request->header, out);
		struct fuse_out_header reply = {.error = length < 0 ? length : 0, .unique = request->header.unique};
		struct iovec parts[2] = {{&reply, sizeof reply}, {out, length < 0 ? 0 : (size_t)length}};
		reply.len = (uint32_t)(parts[0].iov_len + parts[1].iov_len);
		if (writev(device, parts, 2) < 0 && errno == ENODEV)
			_exit(0);
	}
}

#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#elif defined __powerpc64__ && defined __LITTLE_ENDIAN__
#define ARCHITECTURE AUDIT_ARCH_PPC64LE
#elif defined __s390x__
#define ARCHITECTURE AUDIT_ARCH_S390X
#elif defined __riscv && __riscv_xlen == 64
#define ARCHITECTURE AUDIT_ARCH_RISCV64
#elif defined __loongarch64 && defined AUDIT_ARCH_LOONGARCH64
#define ARCHITECTURE AUDIT_ARCH_LOONGARCH64
#endif

/* From here on nothing but reading, answering, memory and threads: what an image that breaks us could use ends here. */
static void confine(void)
{
#ifdef ARCHITECTURE
	static const int allowed[] = {
		SYS_read, SYS_pread64, SYS_writev, SYS_futex, SYS_mmap, SYS_munmap, SYS_mprotect, SYS_madvise, SYS_mremap, SYS_brk, SYS_exit,
		SYS_exit_group, SYS_clone, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_set_robust_list, SYS_sched_yield, SYS_getrandom,
		SYS_sched_getaffinity, SYS_restart_syscall, SYS_close,
#ifdef SYS_clone3
		SYS_clone3,
#endif
#ifdef SYS_rseq
		SYS_rseq,
#endif
	};
	enum { COUNT = sizeof allowed / sizeof *allowed, ALLOW = COUNT + 4 };
	struct sock_filter program[ALLOW + 1] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 0, COUNT + 1),  /* another table's numbers mean other calls */
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
	};
	for (unsigned i = 0; i < COUNT; i++)
		program[i + 3] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)allowed[i], (uint8_t)(COUNT - i), 0);
	program[ALLOW - 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
	program[ALLOW] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog filter = {ALLOW + 1, program};
	/* where the kernel has no seccomp, we are as confined as any other process of the caller's */
	syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &filter);
#endif
}

/* Landlock, Linux 5.13: no file system can be written to; the numbers are those of linux/landlock.h, which is younger than many hosts. */
static void forbid_writing(void)
{
	enum { CREATE_RULESET = 444, RESTRICT_SELF = 446, VERSION = 1 };
	uint64_t rights = 0x1FF2;  /* all of the first version but EXECUTE, READ_FILE and READ_DIR */
	long version = syscall(CREATE_RULESET, NULL, 0, VERSION);
	if (version >= 3)
		rights |= 1 << 14;  /* TRUNCATE */
	int rules = version < 1 ? -1 : (int)syscall(CREATE_RULESET, &rights, sizeof rights, 0);
	if (rules >= 0) {
		syscall(RESTRICT_SELF, rules, 0);
		close(rules);
	}
}

/* Leaves the starter's session, directory, descriptors and capabilities. */
static void detach(const int *kept, unsigned count)
{
	static const struct __user_cap_header_struct version = {_LINUX_CAPABILITY_VERSION_3, 0};
	static const struct __user_cap_data_struct none[2];
	int null = open("/dev/null", O_RDWR);
	setsid();
	if (fork())
		_exit(0);
	if (chdir("/"))
		_exit(1);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	int highest = 0;
	for (unsigned i = 0; i < count; i++)
		highest = kept[i] > highest ? kept[i] : highest;
	for (int fd = 3; fd < highest; fd++) {
		unsigned i = 0;
		while (i < count && kept[i] != fd)
			i++;
		if (i == count)
			close(fd);
	}
	if (syscall(CLOSE_RANGE, highest + 1, ~0U, 0))
		for (int fd = highest + 1; fd < 1024; fd++)
			close(fd);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	forbid_writing();
	syscall(SYS_capset, &version, none);
}

int main(int count, char **arguments)
{
	char go;
	cpu_set_t cpus;
	if (count != 5)
		return 2;
	int kept[3] = {atoi(arguments[1]), atoi(arguments[2]), atoi(arguments[3])};
	detach(kept, 3);
	device = kept[1];
	if (squashfs_open(&image, kept[0], strtoull(arguments[4], NULL, 10)))
		return 3;
	unsigned usable = sched_getaffinity(0, sizeof cpus, &cpus) ? THREADS_MAX : (unsigned)CPU_COUNT(&cpus);  /* EINVAL: very many */
	threads_max = usable < THREADS_MAX ? usable : THREADS_MAX;
	confine();
	if (squashfs_tables(image))
		return 3;
	if (read(kept[2], &go, 1) != 1)
		return 0;  /* whoever started us has gone */
	close(kept[2]);
	serve(NULL);
	return 1;
}
