"""Writes SquashFS images: data as it comes, then the tree; and the Reader of sciexec.unsquashfs, which here can also copy into a Writer.

It stands on libsquashfs (squashfs-tools-ng), which compresses in threads, finds what is stored already, byte by byte, and packs the
ends of files into shared fragment blocks.  Whatever the number of threads, the same calls give the same bytes.

Source: Linux, fs/squashfs/squashfs_fs.h; squashfs-tools-ng, doc/format.adoc.  The superblock is drawn in sciexec.squashfs.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from typing import Any, Union

from sciexec import unsquashfs
from sciexec.errors import HostError, ImageError, LimitError, SciexecError, escaped
from sciexec.unsquashfs import Entry

_missing: ImportError | None = None
try:
    from sciexec._pysquashfs import ffi, lib
except ImportError as error:
    _missing = error

__all__ = [
    "COMPRESSIONS", "EMPTY", "NO_XATTR", "Buffer", "Data", "Entry", "Node", "Reader", "Writer", "available", "is_read_at_start"
]  # fmt: skip

# name -> number in the superblock, default level, highest level; lz4 is LZ4HC above level 1
COMPRESSIONS = {"zstd": (6, 3, 22), "gzip": (1, 9, 9), "lz4": (5, 1, 12), "xz": (4, 6, 9)}
NO_XATTR = 0xFFFFFFFF

Data = int  # what Writer.end returns: the number of a stored file
EMPTY: Data = 0  # of every file of size 0

_LZ4_HC = 1
_MAX_IDS = 65535
_MAX_NUMBER = 0xFFFFFFFF
_MAX_TARGET = 4095  # bytes of a symbolic link's target: PATH_MAX without the NUL; Linux refuses longer ones
_MAX_XATTR = 65536  # bytes of an attribute's value: Linux, XATTR_SIZE_MAX
_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
_BACKLOG = 32 << 20  # bytes of uncompressed data waiting for the workers

_TYPES = {
    "d": stat.S_IFDIR, "f": stat.S_IFREG, "l": stat.S_IFLNK, "c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO, "s": stat.S_IFSOCK,
}  # fmt: skip

# libsquashfs, sqfs/error.h
_NO_MEMORY, _IO, _UNSUPPORTED, _OVERFLOW = -1, -2, -6, -7
_CAUSES = {
    -3: "the compressor failed",
    -4: "the compression threads cannot be started",
    -5: "damaged data",
    _UNSUPPORTED: "this build of libsquashfs lacks what was asked for",
    _OVERFLOW: "too large for a SquashFS",
    -11: "the block size is not a power of two from 4 KiB to 1 MiB",
}

Buffer = Union[bytes, bytearray, memoryview]


def available() -> None:
    """Raises HostError, with the packages that are missing, if images cannot be written here."""
    if _missing is not None:
        raise HostError(
            f"writing SquashFS images: sciexec was installed without its compiled part ({_missing})",
            "install gcc and libsquashfs-dev (Debian, Ubuntu) or squashfs-tools-ng-devel (EPEL), and reinstall sciexec with pip",
        )


# --- the tree ---------------------------------------------------------------------------------------------------------------


class Node:
    """A file of whatever kind in the tree that Writer.finish writes; one object under two names is a hard link.

    Arguments:
        kind: 'd' directory, 'f' file, 'l' symbolic link, 'c' and 'b' devices, 'p' FIFO, 's' socket.
        mode: the lower 12 bits: permissions, set-user-id, set-group-id, sticky.
        mtime: Unix s; what does not fit into 32 bits without sign is moved to the nearest that does.
        xattr: what Writer.xattrs returned, or NO_XATTR.
        payload: of 'd' a dict[bytes, Node], of 'f' the Data, of 'l' the target, of 'c' and 'b' (major, minor).
    """

    __slots__ = ("gid", "kind", "links", "mode", "mtime", "payload", "uid", "xattr")

    def __init__(self, kind: str, mode: int, uid: int, gid: int, mtime: int, xattr: int = NO_XATTR, payload: Any = None) -> None:
        self.kind = kind
        self.mode = _shared(mode)
        self.uid = _shared(uid)
        self.gid = _shared(gid)
        self.mtime = _shared(mtime)
        self.xattr = xattr
        self.payload = payload
        self.links = 0  # names found so far, while Writer.finish runs


_numbers: dict[int, int] = {}


def _shared(number: int) -> int:
    """An equal number that others hold too: a tar gives a new object of 32 bytes for each, and a million files repeat a few."""
    found = _numbers.get(number)
    if found is None:
        if len(_numbers) < 65536:
            _numbers[number] = number
        return number
    return found


class _Ids(dict[int, int]):
    """Owner or group -> its index in the id table, given in the order of first use."""

    def __missing__(self, owner: int) -> int:
        if not 0 <= owner <= _MAX_NUMBER:
            raise ImageError(f"writing the image: owner {owner} is not a number of 32 bits")
        if len(self) == _MAX_IDS:
            raise ImageError(f"writing the image: more than {_MAX_IDS} different owners and groups, and a SquashFS cannot hold them")
        self[owner] = index = len(self)
        return index


# --- writing ----------------------------------------------------------------------------------------------------------------


class Writer:
    """Writes one SquashFS into a file from an offset on: data first, in any order, then the tree.

        with Writer(fd, offset) as writer:
            writer.file(5)
            writer.append(b"hello")
            data = writer.end()
            size = writer.finish(Node("d", 0o755, 0, 0, 0, NO_XATTR, {b"greeting": Node("f", 0o644, 0, 0, 0, NO_XATTR, data)}))

    Arguments:
        fd: open for reading and writing, seekable; what it holds behind the offset is lost.  The caller keeps and closes it.
        compression: a name in COMPRESSIONS.  level: 1 to the highest there; None for the default.
        block_size: bytes, a power of two from 4 KiB to 1 MiB.
        mtime: of the file system as a whole, Unix s.
        workers: threads that compress; None for as many as there are CPUs, at most 8.

    After an exception the image is worthless and the writer can only be closed.  Not for use by two threads at a time.

    Raises: HostError where libsquashfs is missing and for what the disk says (ENOSPC ...); ImageError for what a SquashFS cannot hold.
    """

    def __init__(
        self,
        fd: int,
        offset: int,
        *,
        compression: str = "zstd",
        level: int | None = None,
        block_size: int = 131072,
        mtime: int = 0,
        workers: int | None = None,
    ) -> None:
        available()
        if compression not in COMPRESSIONS:
            raise ImageError(f"writing the image: unknown compression {compression}", "one of " + ", ".join(COMPRESSIONS))
        number, default, highest = COMPRESSIONS[compression]
        level = default if level is None else level
        if not 1 <= level <= highest:
            raise ImageError(f"writing the image: {compression} has no level {level}", f"1 to {highest}")
        flags = 0
        if compression == "lz4":  # for libsquashfs, it has a high mode and no levels
            flags, level = _LZ4_HC if level > 1 else 0, 0
        workers = workers or min(len(os.sched_getaffinity(0)), 8)
        backlog = max(_BACKLOG // block_size, 4 * workers) if block_size > 0 else 0
        self._hint = 0
        self._plain = False
        self._data: Data | None = EMPTY  # of the file begun last; None while it is being written
        self._sets = 0  # of extended attributes
        self._image: Any = ffi.gc(lib.image_new(), lib.image_free)
        self._checked(lib.image_open(self._image, fd, offset, number, level, flags, block_size, _clamped(mtime), workers, backlog))

    def file(self, size_hint: int = 0, *, plain: bool = False) -> None:
        """Begin the data of a regular file.

        Arguments:
            size_hint: its size in bytes, if it is known: a small file is then stored in one go.
            plain: store it uncompressed and in blocks of its own; see `is_read_at_start`.
        """
        self._hint = size_hint
        self._plain = plain
        self._data = EMPTY

    def append(self, data: Buffer) -> None:
        """Add to the file; the data is copied or compressed before this returns."""
        size = len(data)
        if self._data is not None:
            if not size:
                return
            if self._data != EMPTY:
                raise ValueError(f"more than the {self._hint} bytes that were announced")
            if size == self._hint:
                stored: int = lib.image_file(self._image, ffi.from_buffer(data), size, self._plain)
                self._data = stored if stored > 0 else self._checked(stored)
                return
            self._begin()
        code: int = lib.image_append(self._image, ffi.from_buffer(data), size)
        if code:
            self._checked(code)

    def hole(self, length: int) -> None:
        """Add `length` zeros; whole blocks of them cost neither time nor room.  Raises LimitError if the file gets too large."""
        if not length:
            return
        if self._data is not None:
            self._begin()
        code: int = lib.image_hole(self._image, length) if length < 1 << 63 else _OVERFLOW
        if code == _OVERFLOW:
            raise LimitError(f"writing the image: a sparse file of more than {length >> 30} GiB")
        self._checked(code)

    def end(self) -> Data:
        """What the tree has to name as payload of the file; files of equal content share their room on disk."""
        if self._data is None:
            self._data = self._checked(lib.image_end(self._image))
        return self._data

    def _begin(self) -> None:
        self._data = None
        self._checked(lib.image_begin(self._image, self._plain))

    def xattrs(self, pairs: dict[bytes, bytes]) -> int:
        """Store a set of extended attributes, equal sets once; returns what Node wants.

        Raises ImageError for names that do not begin with user., trusted. or security., and for what Linux would not take.
        """
        if not pairs:
            return NO_XATTR
        self._checked(lib.image_xattr_begin(self._image))
        for key in sorted(pairs):
            value = pairs[key]
            if not key.startswith(_XATTR_PREFIXES) or key in _XATTR_PREFIXES or len(key) > 255 or b"\0" in key:
                raise ImageError(f"writing the image: a SquashFS cannot hold the extended attribute {escaped(key)}")
            if len(value) > _MAX_XATTR:
                raise ImageError(f"writing the image: the extended attribute {escaped(key)} has {len(value)} bytes, {_MAX_XATTR} at most")
            self._checked(lib.image_xattr_add(self._image, key, ffi.from_buffer(value), len(value)))
        index = self._checked(lib.image_xattr_end(self._image))
        self._sets = max(self._sets, index + 1)
        return index

    def finish(self, root: Node) -> int:
        """Write the tree and the superblock; returns the bytes used, padded to a multiple of 4096, which is where the file ends.

        Raises ImageError for a name, number or directory that cannot be, naming it.
        """
        if root.kind != "d":
            raise ImageError("writing the image: its root is not a directory")
        if self._sets and self._sets % 512 == 0:
            # libsquashfs up to 1.3 writes one table entry too many if the sets fill their last metadata block.
            self.xattrs({b"user.sciexec.padding": b"%d" % self._sets})
        self._checked(lib.image_sync(self._image))
        directories, parents = _directories(root)
        ids = _Ids()
        number = len(directories)  # directories are 1 to this, the rest comes behind
        placed: dict[int, tuple[int, int]] = {}  # directories and hard links -> number and place of their inodes
        linked: list[Node] = []
        # Children before parents: an entry names the place of its inode.
        for index in range(len(directories) - 1, -1, -1):
            directory = directories[index]
            number = self._directory(directory, number, ids, placed, linked)
            place = self._checked(
                lib.image_directory_end(
                    self._image, directory.mode & 0o7777, ids[directory.uid], ids[directory.gid], _clamped(directory.mtime), index + 1,
                    directory.links + 1, directory.xattr, parents[index] or 0,
                )
            )  # fmt: skip
            placed[id(directory)] = (index + 1, place)
            directory.links = 0
        for node in linked:
            node.links = 0
        table = struct.pack(f"<{len(ids)}I", *ids)
        root_place = placed[id(root)][1]
        return self._checked(lib.image_finish(self._image, number, root_place, ffi.cast("uint32_t *", ffi.from_buffer(table)), len(ids)))

    def _directory(self, directory: Node, number: int, ids: _Ids, placed: dict[int, tuple[int, int]], linked: list[Node]) -> int:
        """Write the inodes of what is in a directory, its subdirectories excepted, and its listing; returns the highest number."""
        image = self._image
        entry, link = lib.image_entry, lib.image_link
        self._checked(lib.image_directory_begin(image))
        children: dict[bytes, Node] = directory.payload
        for name in sorted(children):
            node = children[name]
            kind = node.kind
            mode = _TYPES[kind] | node.mode & 0o7777
            known = placed.get(id(node)) if kind == "d" or node.links > 1 else None
            if known is not None:
                code = link(image, name, len(name), mode, *known)
            else:
                number += 1
                target = ffi.NULL
                payload = length = 0
                if kind == "f":
                    payload = node.payload
                    if payload is None:
                        raise ImageError(f"writing the image: {escaped(name)} is a file without data")
                elif kind == "l":
                    target, length = node.payload, len(node.payload)
                    if not 0 < length <= _MAX_TARGET or b"\0" in target:
                        raise ImageError(f"writing the image: the target of the symbolic link {escaped(name)} is empty or too long")
                elif kind in "cb":
                    payload = _device(name, node.payload)
                mtime = node.mtime
                if not 0 <= mtime <= _MAX_NUMBER:
                    mtime = _clamped(mtime)
                code = entry(
                    image, name, len(name), mode, ids[node.uid], ids[node.gid], mtime, number, node.links, node.xattr, payload,
                    target, length,
                )  # fmt: skip
                if node.links > 1:
                    placed[id(node)] = (number, code)
                    linked.append(node)
                else:
                    node.links = 0
            if code < 0:
                if code == lib.SQUASHFS_BAD_NAME:
                    raise ImageError(f"writing the image: a file cannot be called {escaped(name[:300])!r}")
                self._checked(code)
        return number

    def close(self) -> None:
        """Release threads and memory; the image is as finish left it.  May be called twice."""
        if self._image is not None:
            ffi.release(self._image)
            self._image = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, code: int) -> int:
        """What a C function returned, if it is no error."""
        if code >= 0:
            return code
        if code == _IO:
            raise _io_error("writing the image", lib.image_errno(self._image))
        if code == _NO_MEMORY:
            raise HostError("writing the image: out of memory")
        raise ImageError(f"writing the image: {_CAUSES.get(code, f'libsquashfs error {code}')}")


def _io_error(act: str, number: int) -> SciexecError:
    hint = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room there, or write to another file system"
    elif number == errno.EFBIG:
        hint = "the file system or the limit on file sizes (ulimit -f) allows no larger file"
    return HostError(f"{act}: {os.strerror(number)}", hint)


def _clamped(number: int) -> int:
    return min(max(number, 0), _MAX_NUMBER)


def _device(name: bytes, numbers: tuple[int, int]) -> int:
    """The number of a device as the kernel encodes it on disk (Linux, include/linux/kdev_t.h, new_encode_dev)."""
    major, minor = numbers
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise ImageError(f"writing the image: {escaped(name)}: no device has the numbers {major}, {minor}")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _directories(root: Node) -> tuple[list[Node], list[int]]:
    """The directories, parents before children and siblings together, and the number (index + 1) of the parent of each.

    On the way it counts names: in `links`, of directories the subdirectories and one.  Without recursion: a tree may be deep.
    """
    directories = [root]
    parents = [0]
    root.links = 1
    for number, directory in enumerate(directories, 1):  # the list grows below
        children: dict[bytes, Node] = directory.payload
        below = []
        for name, node in children.items():
            node.links += 1
            if node.kind == "d":
                if node.links > 1:
                    raise ImageError(f"writing the image: the directory {escaped(name)} is in the tree twice")
                below.append(name)
        directory.links += len(below)
        below.sort()
        directories += [children[name] for name in below]
        parents += [number] * len(below)
    parents[0] = len(directories) + 1  # nothing: as mksquashfs has it
    return directories, parents


_LOADERS = (b"ld-linux", b"ld-musl-", b"ld64.so", b"libc.so.", b"libc-2.")
_AT_START = (b"bin/sh", b"bin/dash", b"bin/bash", b"bin/busybox", b"etc/passwd", b"etc/group", b"etc/ld.so.cache")


def is_read_at_start(path: bytes) -> bool:
    """Whether every start of a container waits for this file: loader, C library, shells, and what names the user.

    Stored as they are, they cost an image two megabytes and save each start the time of a dozen decompressed blocks.
    """
    return path.endswith(_AT_START) or path.rpartition(b"/")[2].startswith(_LOADERS)


# --- copying ----------------------------------------------------------------------------------------------------------------


class Reader(unsquashfs.Reader):
    """The Reader of sciexec.unsquashfs, and what needs a Writer as well."""

    def copy(self, writer: Writer) -> Node:
        """Store the data of all files in another image, and return the tree, for writer.finish.

        Owners, modes, times, links, devices, holes and extended attributes stay as they are.
        """
        top = Node("d", 0, 0, 0, 0, NO_XATTR, {})  # above the root, whose path and name are empty
        directories = {}
        linked: dict[int, Node] = {}
        for path, entry in self.walk():
            node = linked.get(entry.place)
            if node is None:
                payload: Any = {"d": {}, "l": entry.target, "c": entry.rdev, "b": entry.rdev}.get(entry.kind)
                if entry.kind == "f":
                    payload = self._data_in(writer, entry, path)
                xattr = writer.xattrs(self.xattrs(entry))
                node = Node(entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime, xattr, payload)
            if entry.kind == "d":
                directories[path] = node
            elif entry.links > 1:
                linked[entry.place] = node
            parent, _, name = path.rpartition(b"/")
            (directories[parent] if path else top).payload[name] = node
        root: Node = top.payload[b""]
        return root

    def _data_in(self, writer: Writer, entry: Entry, path: bytes) -> Data:
        writer.file(entry.size, plain=is_read_at_start(path))
        end = 0
        for position, piece in self.pieces(entry):
            writer.hole(position - end)
            writer.append(piece)
            end = position + len(piece)
        writer.hole(entry.size - end)
        return writer.end()
