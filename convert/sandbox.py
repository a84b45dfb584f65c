"""A sandbox directory -> the tree of an image, its data in a SquashFS."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from convert.tarheader import keeps_xattr
from sciexec.errors import HostError, escaped
from sciexec.pysquashfs import NO_XATTR, Node, Writer, is_read_at_start

PIECE = 1 << 20  # bytes read at a time

_KINDS = {
    stat.S_IFDIR: "d", stat.S_IFREG: "f", stat.S_IFLNK: "l", stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p", stat.S_IFSOCK: "s",
}  # fmt: skip


def pack(path: str, writer: Writer) -> Node:
    """Store the directory `path` and all below it; returns its node.

    Names are taken in sorted order, so that the same tree gives the same bytes.  Files of the caller become root's, as they were
    before they were unpacked by somebody who is not root; other owners stay.  Hard links within the tree stay hard links, holes
    stay holes.  Raises HostError naming the file that cannot be read.
    """
    top = os.fsencode(path)
    owners = {os.getuid(): 0}, {os.getgid(): 0}
    linked: dict[tuple[int, int], Node] = {}
    try:
        root = _node(top, os.stat(top), writer, owners)
        stack = [(top, root)]
        while stack:
            directory, node = stack.pop()
            for name in sorted(os.listdir(directory)):
                below = directory + b"/" + name
                status = os.lstat(below)
                identity = (status.st_dev, status.st_ino)
                child = linked.get(identity)
                if child is None:
                    child = _node(below, status, writer, owners)
                    if status.st_nlink > 1 and child.kind != "d":
                        linked[identity] = child
                node.payload[name] = child
                if child.kind == "d":
                    stack.append((below, child))
    except OSError as error:
        where = error.filename if error.filename is not None else path
        raise HostError(
            f"reading {escaped(os.fsencode(where))}: {error.strerror}", "an image can hold only what you may read (chmod -R u+rX)"
        ) from error
    return root


def _node(path: bytes, status: os.stat_result, writer: Writer, owners: tuple[dict[int, int], dict[int, int]]) -> Node:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    payload: object = None
    if kind == "d":
        payload = {}
    elif kind == "f":
        payload = _store(path, status.st_size, writer)
    elif kind == "l":
        payload = os.readlink(path)
    elif kind in "cb":
        payload = (os.major(status.st_rdev), os.minor(status.st_rdev))
    uid, gid = owners[0].get(status.st_uid, status.st_uid), owners[1].get(status.st_gid, status.st_gid)
    return Node(kind, stat.S_IMODE(status.st_mode), uid, gid, int(status.st_mtime), _xattrs(path, writer), payload)


def _xattrs(path: bytes, writer: Writer) -> int:
    try:
        names = os.listxattr(path, follow_symlinks=False)
        pairs = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names if keeps_xattr(os.fsencode(name))}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA, errno.EPERM):
            return NO_XATTR
        raise
    return writer.xattrs(pairs) if pairs else NO_XATTR


def _store(path: bytes, size: int, writer: Writer) -> object:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.closing(open(fd, "rb", buffering=0)) as file:
        writer.file(size, plain=is_read_at_start(path))
        position = 0
        for start, end in _extents(fd, size):
            if start > position:
                writer.hole(start - position)
            file.seek(start)
            position = start
            while position < end and (piece := file.read(min(PIECE, end - position))):
                writer.append(piece)
                position += len(piece)
            if position < end:
                raise OSError(errno.EIO, "the file became shorter while it was read", os.fsdecode(path))
        if size > position:
            writer.hole(size - position)
        return writer.end()


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the file's data between its holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole to the end
                return
            start, end = position, size  # a file system that knows no holes
        if start >= size:
            return
        yield start, end
        position = end
