"""From a path to an image, and from that to a mounted root.  The content of the file decides what it is, never its name.

    SIF         header and descriptors at the front (sif.py); its primary partition is a SquashFS somewhere inside
    SquashFS    superblock at 0, or behind one line "#!/usr/bin/env run-singularity" (old .simg files)
    directory   an unpacked image ("sandbox")

How each of them becomes the root of a container is told in sources.py.
"""

from __future__ import annotations

import os
import stat
import sys

from sciexec import sif, squashfs
from sciexec.errors import HostError, ImageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sciexec.sif import Descriptor, Sif

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


def open_image(path: str, choose: Callable[[Sif], Descriptor] = lambda parsed: parsed.primary) -> Image:
    """Open an image and check as much of it as costs nothing.

    Arguments:
        choose: which partition of a SIF is meant.
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
        return partition(absolute, fd, parsed, choose(parsed))
    offset = head.find(b"\n") + 1 if head.startswith(b"#!") else 0
    if head[offset : offset + 4] != SQUASHFS_MAGIC:
        raise ImageError(f"opening {path}: neither SIF nor SquashFS", "an image is a .sif, a .sqfs or an unpacked directory")
    squashfs.check_superblock(fd, offset, status.st_size - offset, path)
    return Image(absolute, "squashfs", fd, offset, status.st_size - offset)


def partition(path: str, fd: int, parsed: Sif, descriptor: Descriptor) -> Image:
    """A partition of an open SIF as an image.  Raises ImageError where it is no SquashFS that can be mounted."""
    if descriptor.fs != sif.FS_SQUASHFS:
        kind = FILE_SYSTEMS.get(descriptor.fs, f"file system {descriptor.fs}" if descriptor.fs else "no file system")
        what = "root" if descriptor.parttype == sif.PART_PRIMARY else f"object {descriptor.id}"
        raise ImageError(f"opening {path}: its {what} is {kind}, and only SquashFS can be mounted")
    squashfs.check_superblock(fd, descriptor.offset, descriptor.size, path)
    return Image(path, "sif", fd, descriptor.offset, descriptor.size, parsed)


FILE_SYSTEMS = {
    sif.FS_EXT3: "ext3",
    sif.FS_ARCHIVE: "an archive",
    sif.FS_RAW: "raw data",
    sif.FS_ENCRYPTED_SQUASHFS: "an encrypted SquashFS",
    sif.FS_GOCRYPTFS_SQUASHFS: "an encrypted SquashFS (gocryptfs)",
}
