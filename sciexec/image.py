"""From a path to an image, and from that to a mounted root.  The content of the file decides what it is, never its name.

    SIF         header and descriptors at the front (sif.py); its primary partition is a SquashFS somewhere inside
    SquashFS    superblock at 0, or behind one line "#!/usr/bin/env run-singularity" (old .simg files)
    directory   an unpacked image ("sandbox")

A SquashFS is mounted through FUSE, or unpacked once where the host has none; a directory is bound.
"""

from __future__ import annotations

import os
import stat
import sys

from sciexec import kernel, sif, squashfs
from sciexec.errors import HostError, ImageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.sif import Sif

SQUASHFS_MAGIC = b"hsqs"
HEAD = 4096  # bytes at the front that are looked at; a first line ends in them or there is none


class Image:
    """An opened image.  The descriptor is what is mounted: a file renamed over the path later on changes nothing."""

    __slots__ = ("fd", "kind", "offset", "path", "sif", "size")
    path: str  # absolute, as the user named it
    kind: str  # "sif", "squashfs" or "directory"
    fd: int  # close-on-exec
    offset: int  # bytes, where the SquashFS begins; 0 for a directory
    size: int  # bytes of the SquashFS; 0 for a directory
    sif: Sif | None

    def __init__(self, path: str, kind: str, fd: int, offset: int = 0, size: int = 0, parsed: Sif | None = None) -> None:
        self.path, self.kind, self.fd, self.offset, self.size, self.sif = path, kind, fd, offset, size, parsed

    def describe(self) -> str:
        return f"{self.kind} {escaped(self.path)}" + (f" offset={self.offset} size={self.size}" if self.size else "")

    def key(self) -> str:
        """A name for the content, in hexadecimal: from the superblock, all tables behind the file data, and the file's own state.

        Reading the file data as well would take longer than unpacking it from a fast disk.
        """
        import hashlib  # here: only a host without FUSE needs it

        status = os.fstat(self.fd)
        sha = hashlib.sha256(repr((self.offset, status.st_size, status.st_mtime_ns, status.st_ino)).encode())
        superblock = squashfs.check_superblock(self.fd, self.offset, self.size, self.path)
        sha.update(os.pread(self.fd, 96, self.offset))
        start, end = self.offset + superblock.inode_table, self.offset + superblock.bytes_used
        while start < end:
            data = os.pread(self.fd, min(1 << 20, end - start), start)
            if not data:
                break
            sha.update(data)
            start += len(data)
        return sha.hexdigest()

    def unpack(self, directory: str) -> None:
        """Unpack the SquashFS into a directory that appears whole or not at all, whoever else does the same meanwhile.

        Raises HostError where it cannot be written, ImageError for a damaged image.
        """
        if sys.flags.no_site:  # an isolated start; the reader's libraries may lie elsewhere than we do
            import site

            site.main()
        from sciexec import unsquashfs

        parent = os.path.dirname(directory)
        partial = f"{directory}.{os.getpid()}.partial"
        try:
            os.makedirs(parent, 0o700, exist_ok=True)
            if os.stat(parent).st_uid != os.getuid():
                raise HostError(f"unpacking {escaped(self.path)}: {escaped(parent)} belongs to somebody else")
            os.mkdir(partial, 0o700)
            target = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
            try:
                unsquashfs.Reader(self.fd, self.offset, self.path).unpack(target)
            except BaseException:
                remove(partial)
                raise
            finally:
                os.close(target)
            try:
                os.rename(partial, directory)
            except OSError:
                remove(partial)
                if not os.path.isdir(directory):
                    raise
        except OSError as error:
            raise HostError(f"unpacking {escaped(self.path)} into {escaped(directory)}: {error.strerror}") from error


def remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def open_image(path: str) -> Image:
    """Open an image and check as much of it as costs nothing.

    Raises ImageError for what is no image or a damaged one, HostError where the file cannot be read.
    """
    absolute = os.path.abspath(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # NONBLOCK: a FIFO must not hang us
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            return Image(absolute, "directory", fd)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"opening {path}: neither a file nor a directory")
        head = os.pread(fd, HEAD, 0)
    except FileNotFoundError:
        raise ImageError(f"opening {path}: no such file or directory") from None
    except OSError as error:
        raise HostError(f"opening {path}: {error.strerror}") from error
    if sif.is_sif(head):
        parsed = sif.read(fd, path)
        partition = parsed.primary
        if partition.fs != sif.FS_SQUASHFS:
            kind = FILE_SYSTEMS.get(partition.fs, f"file system {partition.fs}")
            raise ImageError(f"opening {path}: its root is {kind}, and only SquashFS can be run")
        image = Image(absolute, "sif", fd, partition.offset, partition.size, parsed)
    else:
        offset = head.find(b"\n") + 1 if head.startswith(b"#!") else 0
        if head[offset : offset + 4] != SQUASHFS_MAGIC:
            raise ImageError(f"opening {path}: neither SIF nor SquashFS", "an image is a .sif, a .sqfs or an unpacked directory")
        image = Image(absolute, "squashfs", fd, offset, status.st_size - offset)
    squashfs.check_superblock(fd, image.offset, image.size, path)
    return image


FILE_SYSTEMS = {
    sif.FS_EXT3: "ext3",
    sif.FS_ARCHIVE: "an archive",
    sif.FS_RAW: "raw data",
    sif.FS_ENCRYPTED_SQUASHFS: "an encrypted SquashFS",
    sif.FS_GOCRYPTFS_SQUASHFS: "an encrypted SquashFS (gocryptfs)",
}


# --- mounting it ------------------------------------------------------------------------------------------------------------

# Where distributions, sites and Apptainer's own packages put it; the caller's PATH may lead anywhere.
SERVER = "squashfuse_ll"
SERVERS = tuple(
    f"{directory}/{SERVER}"
    for directory in (
        os.path.dirname(sys.executable), "/usr/bin", "/usr/local/bin", "/usr/libexec/apptainer/bin", "/usr/local/libexec/apptainer/bin"
    )
)  # fmt: skip


class Source:
    """What the root of a container is mounted from, in the order of its calls."""

    __slots__ = ()

    def describe(self) -> str:
        """One line."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What has to be done as the caller, before anything else."""

    def start(self) -> None:
        """What has to be done inside the user namespace that will mount, and in front of its mount namespace."""

    def mount(self, target: str) -> None:
        """Mount it, read-only.  Raises OSError."""
        raise NotImplementedError

    def finish(self) -> None:
        """What is left to do when everything is mounted."""


class Squash(Source):
    """A SquashFS, mounted through FUSE and served by squashfuse_ll, a process that nobody waits for.

    The server belongs to our first user namespace, so that the payload, which lives in one below, cannot trace it, but to the
    host's mount namespace, so that it does not keep ours alive: when the payload's last process ends, the kernel drops the
    mount and the server reads ENODEV and ends.  It starts with no descriptor, no variable and no capability of ours, and
    cannot write to any file system where the kernel has Landlock.

    Arguments:
        fd, offset: the SquashFS.  name: what to call it.  program: absolute path of squashfuse_ll.
    """

    __slots__ = ("_device", "_go", "_parent", "fd", "name", "offset", "program")

    def __init__(self, fd: int, offset: int, name: str, program: str) -> None:
        self.fd, self.offset, self.name, self.program = fd, offset, name, program
        self._device = self._go = self._parent = -1

    def describe(self) -> str:
        return f"squashfs {escaped(self.name)} offset={self.offset} served by {self.program}"

    def start(self) -> None:
        # the kernel wants the device opened in the user namespace that mounts it
        self._device = os.open("/dev/fuse", os.O_RDWR)
        ready, self._go = os.pipe()
        self._parent = os.fork()
        if self._parent == 0:
            try:
                os.setsid()
                if os.fork() == 0:  # its parent ends, so it is init's child, not the payload's
                    self._serve(ready)
            finally:
                os._exit(127)
        os.close(ready)

    def _serve(self, ready: int) -> None:
        os.chdir("/")
        image, device, ready = (above_standard(fd) for fd in (self.fd, self._device, ready))
        null = os.open("/dev/null", os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2 and number not in (image, device, ready):
                try:
                    os.close(number)
                except OSError:  # the listing's own
                    pass
        os.set_inheritable(image, True)
        os.set_inheritable(device, True)
        confine()
        arguments = [SERVER, "-f", "-o", f"ro,offset={self.offset}", kernel.magic(image), f"/dev/fd/{device}"]
        # read by the server before the mount exists, the device answers EPERM; by now it mostly does exist
        if os.read(ready, 1):
            os.execve(self.program, arguments, {})

    def mount(self, target: str) -> None:
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other"
        kernel.mount("squashfuse", target, "fuse", kernel.PRIVATE | kernel.MS_RDONLY, options)
        os.write(self._go, b".")
        os.close(self._go)
        # the server's must be the last: then its death is an error here and not a wait without end
        os.close(self._device)

    def finish(self) -> None:
        try:
            os.waitpid(self._parent, 0)
        except ChildProcessError:  # our caller ignores SIGCHLD, and so do we
            pass


class Directory(Source):
    """An unpacked image.  Arguments: path: absolute, on the host."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return f"directory {escaped(self.path)}"

    def mount(self, target: str) -> None:
        kernel.mount(self.path, target, "", kernel.MS_BIND | kernel.MS_REC)
        fd = os.open(target, os.O_PATH)
        kernel.make_read_only(fd, below=True)
        os.close(fd)


class Unpacked(Directory):
    """A SquashFS on a host without FUSE: unpacked once into the cache, from where it is then mounted like any directory.

    Arguments:
        reason: why it is not mounted, for the message that says so.
    """

    __slots__ = ("_image", "_quiet", "_reason")

    def __init__(self, image: Image, directory: str, reason: str, *, quiet: bool) -> None:
        super().__init__(directory)
        self._image = image
        self._reason = reason
        self._quiet = quiet

    def describe(self) -> str:
        return f"unpack {self._image.describe()} into {escaped(self.path)} ({self._reason})"

    def prepare(self) -> None:
        if not os.path.isdir(self.path):
            if not self._quiet:
                tell(f"INFO: {self._reason}: unpacking {escaped(self._image.path)}, once, into {escaped(self.path)}")
            self._image.unpack(self.path)


def above_standard(fd: int) -> int:
    """The same file on a descriptor above 2: who is started with a standard stream closed gets its number for the next file."""
    while fd <= 2:
        fd = os.dup(fd)
    return fd


def tell(text: str) -> None:
    """A line for the user; where standard error is closed, nobody wants to know."""
    try:
        os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def confine() -> None:
    """Give up what a process that reads hostile images should not have; the kernel's age decides how much that is."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)  # also keeps execve from giving capabilities back to our namespace's root
    try:
        kernel.landlock_restrict_writes()
    except OSError:  # before Linux 5.13, or turned off
        pass
    kernel.capset_none()
