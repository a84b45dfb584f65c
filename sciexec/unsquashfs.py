"""Reads a SquashFS without mounting it: looks files up, lists, reads, and unpacks as an ordinary user.

Images come from strangers.  So all of it is parsed here, in a language where a wrong number raises an error and overwrites nothing;
from libsquashfs come only the decompressors, and without libsquashfs the standard library's serve (zstd: the package zstandard).

    inode     type u16, mode u16, uid and gid u16 (indices in the id table), mtime u32, number u32; then, by type
      1 directory   listing's block u32, links u32, listing's size + 3 u16, offset u16, parent u32
      2 file        first block u32, fragment u32, offset in it u32, size u32; u32 for each block: its size on disk
      3 symlink     links u32, size u32, target
      4 5 devices   links u32, number u32            6 7 FIFO, socket   links u32
      8 to 14       the same with an index of extended attributes, and wider numbers
    listing   entries - 1 u32, block of their inodes u32, number of an inode u32; then for each entry
                    offset of the inode u16, its number - that number i16, type u16, size of the name - 1 u16, name

A size of a data block has bit 24 set if it is stored uncompressed; 0 is a block of zeros.  A file has fragment 0xFFFFFFFF if its
end is a block like the others.  A place is the metadata block << 16 | the offset within it, uncompressed.

Source: Linux, fs/squashfs/squashfs_fs.h; squashfs-tools-ng, doc/format.adoc.  The superblock is drawn in sciexec.squashfs.
"""

from __future__ import annotations

import errno
import lzma
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sciexec import squashfs
from sciexec.errors import HostError, ImageError, LimitError, escaped

MAX_ENTRIES = 10_000_000  # names in an image, far above what has been seen
MAX_DEPTH = 512  # directories within directories; each keeps a descriptor open while an image is unpacked
MAX_BLOCKS = 1 << 24  # in one file: 2 TiB at the default block size
MAX_LISTING = 1 << 27  # bytes of one directory's listing
MAX_TARGET = 4095  # bytes of a symbolic link's target, as for Linux
MAX_XATTR = 1 << 16  # bytes of an attribute's value, and number of attributes of one file

_NONE = 0xFFFFFFFF
_SIZE, _UNCOMPRESSED = 0xFFFFFF, 1 << 24  # of a data block on disk
_CHUNK = 4 << 20  # bytes of a file unpacked between two writes
_CACHED = 16  # fragment blocks kept, and sixteen times as many metadata blocks
_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
_VALUE_ELSEWHERE = 0x100

_BASE = struct.Struct("<4H2I")
_BODY = {
    1: ("d", struct.Struct("<IIHHI")), 2: ("f", struct.Struct("<4I")), 3: ("l", struct.Struct("<II")),
    4: ("b", struct.Struct("<II")), 5: ("c", struct.Struct("<II")), 6: ("p", struct.Struct("<I")), 7: ("s", struct.Struct("<I")),
    8: ("d", struct.Struct("<4I2HI")), 9: ("f", struct.Struct("<3Q4I")), 10: ("l", struct.Struct("<II")),
    11: ("b", struct.Struct("<3I")), 12: ("c", struct.Struct("<3I")), 13: ("p", struct.Struct("<II")), 14: ("s", struct.Struct("<II")),
}  # fmt: skip

Uncompress = Callable[[memoryview, memoryview], int]  # from, to -> bytes; 0 or less: damaged


class Entry:
    """A file of whatever kind in an image.

    kind, mode (12 bits), uid, gid, mtime (Unix s), links; size of a file in bytes; target of a link; rdev (major, minor) of a device;
    place, equal for the names of one file only.
    """

    __slots__ = (
        "blocks", "fragment", "gid", "kind", "links", "mode", "mtime", "offset", "place", "rdev", "size", "sizes", "start", "target", "uid",
        "xattr",
    )  # fmt: skip

    def __init__(self, kind: str, place: int, mode: int, uid: int, gid: int, mtime: int) -> None:
        self.kind, self.place, self.mode, self.uid, self.gid, self.mtime = kind, place, mode & 0o7777, uid, gid, mtime
        self.links, self.size, self.target, self.rdev, self.xattr = 1, 0, b"", (0, 0), _NONE
        # Of a file: where its blocks begin, how many they are and where their sizes stand, fragment and offset in it;
        # of a directory: place of the listing as start << 16 | offset.
        self.start, self.blocks, self.fragment, self.offset = 0, 0, _NONE, 0
        self.sizes: _Stream | None = None


class Skipped(NamedTuple):
    """What an ordinary user cannot unpack: how many devices and sockets were left out."""

    devices: int
    sockets: int


class Reader:
    """One SquashFS inside an open file.

    Arguments:
        fd: of the image, open for reading; the caller keeps and closes it.
        offset: where in it the SquashFS begins.
        name: of the image, for errors.

    Raises, here and in every method: ImageError for a damaged or hostile image, LimitError for one beyond all measure, HostError where
    the file cannot be read or its compression is not known here.
    """

    def __init__(self, fd: int, offset: int, name: str) -> None:
        self.name = name
        self._fd, self._offset = fd, offset
        self._super = block = squashfs.check_superblock(fd, offset, os.fstat(fd).st_size - offset, name)
        self._uncompress = _uncompressor(block, name)
        self._metadata: dict[int, tuple[bytes, int]] = {}
        self._fragments: dict[int, bytes] = {}
        self._owners: dict[int, int] = {}
        self.root = self._inode(block.root)
        if self.root.kind != "d":
            raise self._damaged("its root is not a directory")

    def superblock(self) -> squashfs.Superblock:
        return self._super

    # --- looking around ---

    def lookup(self, path: bytes) -> Entry | None:
        """What lies at a path from the root, or None.  Symbolic links are not followed, and '..' leads nowhere."""
        entry = self.root
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            place = self._listing(entry).get(name) if entry.kind == "d" else None
            if place is None:
                return None
            entry = self._inode(place)
        return entry

    def listdir(self, entry: Entry) -> list[bytes]:
        """The names in a directory, in the order of the image, which is sorted."""
        return list(self._listing(entry))

    def walk(self) -> Iterator[tuple[bytes, Entry]]:
        """All paths, without a slash at the front, and what lies there; the root is b"".  A directory comes before what it holds."""
        yield b"", self.root
        pending = [(b"", self.root, 0)]
        seen = {self.root.place}
        count = 0
        while pending:
            path, directory, depth = pending.pop()
            if depth == MAX_DEPTH:
                raise LimitError(f"reading {self.name}: directories {depth} deep at {escaped(path[:200])}")
            below = []
            for name, place in self._listing(directory).items():
                count += 1
                entry = self._inode(place)
                where = path + b"/" + name if path else name
                if entry.kind == "d":
                    if place in seen:
                        raise self._damaged(f"{escaped(where)} is a directory with two names")
                    seen.add(place)
                    below.append((where, entry, depth + 1))
                yield where, entry
            if count > MAX_ENTRIES:
                raise LimitError(f"reading {self.name}: more than {MAX_ENTRIES} files")
            pending += reversed(below)

    # --- data ---

    def read(self, entry: Entry, limit: int) -> bytes:
        """The whole of a regular file.  Raises LimitError if that is more than `limit` bytes."""
        if entry.kind != "f":
            raise ImageError(f"reading {self.name}: not a regular file")
        if entry.size > limit:
            raise LimitError(f"reading {self.name}: a file of {entry.size} bytes, and no more than {limit} were expected")
        data = bytearray(entry.size)
        for position, piece in self.pieces(entry):
            data[position : position + len(piece)] = piece
        return bytes(data)

    def pieces(self, entry: Entry) -> Iterator[tuple[int, memoryview]]:
        """(position, data) of what is not a hole, ascending, some MiB at a time; valid until the next one is asked for."""
        block_size = self._super.block_size
        end = entry.size if entry.fragment == _NONE else entry.blocks * block_size
        group = max(_CHUNK // block_size, 1)  # blocks read at once
        buffer = memoryview(bytearray(min(group * block_size, end)))
        list_of_sizes = entry.sizes.copy() if entry.sizes else None
        source, position = entry.start, 0
        for index in range(0, entry.blocks, group):
            assert list_of_sizes is not None
            count = min(group, entry.blocks - index)
            sizes = struct.unpack(f"<{count}I", list_of_sizes.read(4 * count))
            if not any(sizes):
                position += count * block_size
                continue
            if any(size & _SIZE > block_size for size in sizes):
                raise self._damaged("a data block larger than blocks are")
            total = sum(size & _SIZE for size in sizes)
            stored, taken = self._stored(source, total), 0
            filled = 0
            for size in sizes:
                expected = min(block_size, end - position)
                if size & _SIZE:
                    self._unpacked(stored[taken : taken + (size & _SIZE)], size, buffer[filled : filled + expected], exact=True)
                    filled += expected
                    taken += size & _SIZE
                elif filled:
                    yield position - filled, buffer[:filled]
                    filled = 0
                position += expected
            if filled:
                yield position - filled, buffer[:filled]
            source += total
        if entry.fragment != _NONE and entry.size > end:
            tail = memoryview(self._fragment(entry.fragment))[entry.offset : entry.offset + entry.size - end]
            if len(tail) != entry.size - end:
                raise self._damaged("the end of a file lies outside of its fragment")
            yield end, tail

    def _fragment(self, index: int) -> bytes:
        found = self._fragments.get(index)
        if found is not None:
            return found
        block = self._super
        if index >= block.fragments:
            raise self._damaged(f"it has no fragment {index}")
        start, size, _ = struct.unpack("<QII", self._row(block.fragment_table, index, 16))
        target = memoryview(bytearray(block.block_size))
        if size & _SIZE > block.block_size:
            raise self._damaged("a fragment larger than blocks are")
        length = self._unpacked(self._stored(start, size & _SIZE), size, target)
        if len(self._fragments) >= _CACHED:
            del self._fragments[next(iter(self._fragments))]
        self._fragments[index] = data = bytes(target[:length])
        return data

    def _unpacked(self, stored: memoryview, size: int, target: memoryview, exact: bool = False) -> int:
        """A data block as it is on disk -> its bytes in target, and how many; exact: it must fill the target."""
        if size & _UNCOMPRESSED:
            length = len(stored)
            if length <= len(target):
                target[:length] = stored
        else:
            length = self._uncompress(stored, target)
        if length <= 0 or length > len(target) or (exact and length != len(target)):
            raise self._damaged("a data block that cannot be unpacked")
        return length

    # --- unpacking ---

    def unpack(self, target: int, max_bytes: int | None = None) -> Skipped:
        """Unpack everything into the directory open as `target`, with what an ordinary user can keep of it.

        Kept are modes without set-user-id and set-group-id, times, links of both kinds, holes and user.* attributes; owners are not,
        devices and sockets are left out.  Directories may be entered and written by their owner, so that the tree can be removed.
        No link is followed, and nothing that is there already is touched: it is an error.

        Arguments:
            max_bytes: of data, holes not counted; None: no limit.  Beyond it LimitError is raised.
        """
        return _Unpacking(self, target, max_bytes).run()

    # --- extended attributes ---

    def xattrs(self, entry: Entry) -> dict[bytes, bytes]:
        """The extended attributes of a file; the names begin with user., trusted. or security."""
        block = self._super
        if entry.xattr == _NONE or block.xattr_table == squashfs.NO_TABLE or block.flags & squashfs.NO_XATTRS:
            return {}
        start, count, _ = struct.unpack("<QII", self._stored(block.xattr_table, 16))
        if entry.xattr >= count:
            raise self._damaged(f"it has no extended attributes {entry.xattr}")
        place, count, _ = struct.unpack("<QII", self._row(block.xattr_table + 16, entry.xattr, 16))
        if count > MAX_XATTR:
            raise LimitError(f"reading {self.name}: a file with {count} extended attributes")
        stream = _Stream(self, start, block.xattr_table, place)
        found = {}
        for _ in range(count):
            kind, size = struct.unpack("<HH", stream.read(4))
            if kind & 0xFF >= len(_XATTR_PREFIXES):
                raise self._damaged(f"an extended attribute of type {kind}")
            key = _XATTR_PREFIXES[kind & 0xFF] + stream.read(size)
            value = stream
            if kind & _VALUE_ELSEWHERE:
                value = _Stream(self, start, block.xattr_table, struct.unpack("<Q", stream.read(12)[4:])[0])
            (size,) = struct.unpack("<I", value.read(4))
            if size > MAX_XATTR:
                raise LimitError(f"reading {self.name}: an extended attribute of {size} bytes")
            found[key] = value.read(size)
        return found

    # --- metadata ---

    def _listing(self, directory: Entry) -> dict[bytes, int]:
        """Names in a directory -> places of their inodes."""
        block = self._super
        found: dict[bytes, int] = {}
        size = directory.size - 3  # Linux gives its first three positions to '.' and '..'
        if size <= 0:
            return found
        if size > MAX_LISTING:
            raise LimitError(f"reading {self.name}: a directory with a listing of {size} bytes")
        data = _Stream(self, block.directory_table, block.bytes_used, directory.start << 16 | directory.offset).read(size)
        position = 0
        try:
            while position < size:
                count, start, _ = struct.unpack_from("<III", data, position)
                position += 12
                if count >= 256:
                    raise self._damaged(f"a directory header of {count + 1} entries")
                for _ in range(count + 1):
                    offset, _, _, length = struct.unpack_from("<HhHH", data, position)
                    position += 8
                    name = data[position : position + length + 1]
                    position += length + 1
                    if len(name) != length + 1 or length > 254 or name in (b".", b"..") or b"/" in name or b"\0" in name or name in found:
                        raise self._damaged(f"the name {escaped(name[:300])!r}")
                    found[name] = start << 16 | offset
        except struct.error:
            raise self._damaged("a listing that breaks off") from None
        return found

    def _inode(self, place: int) -> Entry:
        block = self._super
        stream = _Stream(self, block.inode_table, block.directory_table, place)
        kind, mode, uid, gid, mtime, _ = _BASE.unpack(stream.read(_BASE.size))
        if kind not in _BODY:
            raise self._damaged(f"an inode of type {kind}")
        letter, body = _BODY[kind]
        fields = body.unpack(stream.read(body.size))
        entry = Entry(letter, place, mode, self._owner(uid), self._owner(gid), mtime)
        if kind == 1:
            entry.start, entry.links, entry.size, entry.offset, _ = fields
        elif kind == 8:
            entry.links, entry.size, entry.start, _, _, entry.offset, entry.xattr = fields
        elif kind == 2:
            entry.start, entry.fragment, entry.offset, entry.size = fields
        elif kind == 9:
            entry.start, entry.size, _, entry.links, entry.fragment, entry.offset, entry.xattr = fields
        elif letter == "l":
            entry.links, size = fields
            if not 0 < size <= MAX_TARGET:
                raise self._damaged(f"a symbolic link with a target of {size} bytes")
            entry.target = stream.read(size)
            if kind == 10:
                (entry.xattr,) = struct.unpack("<I", stream.read(4))
        elif letter in "bc":
            entry.links, number = fields[:2]
            entry.rdev = number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00
            entry.xattr = fields[2] if kind > 10 else _NONE
        else:
            entry.links = fields[0]
            entry.xattr = fields[1] if kind > 10 else _NONE
        if letter == "f":
            entry.blocks, rest = divmod(entry.size, block.block_size)
            entry.blocks += bool(rest and entry.fragment == _NONE)
            if entry.blocks > MAX_BLOCKS:
                raise LimitError(f"reading {self.name}: a file of {entry.size} bytes")
            entry.sizes = stream
        return entry

    def _owner(self, index: int) -> int:
        found = self._owners.get(index)
        if found is None:
            if index >= self._super.ids:
                raise self._damaged(f"owner {index} of {self._super.ids}")
            self._owners[index] = found = int.from_bytes(self._row(self._super.id_table, index, 4), "little")
        return found

    def _row(self, table: int, index: int, size: int) -> bytes:
        """One row of a table whose metadata blocks are listed at `table`; the table as a whole may be made up."""
        block, offset = divmod(index * size, squashfs.METADATA_SIZE)
        position = int.from_bytes(self._stored(table + 8 * block, 8), "little")
        row = self._block(position)[0][offset : offset + size]
        if len(row) != size:
            raise self._damaged("a table that breaks off")
        return row

    def _block(self, position: int) -> tuple[bytes, int]:
        """The metadata block at a position in the image, uncompressed, and the position of the next."""
        found = self._metadata.get(position)
        if found is not None:
            return found
        header = int.from_bytes(self._stored(position, 2), "little")
        size = header & 0x7FFF
        stored = self._stored(position + 2, size)
        target = memoryview(bytearray(squashfs.METADATA_SIZE))
        if header & 0x8000:
            target = stored
        elif size:
            target = target[: max(self._uncompress(stored, target), 0)]
        if not 0 < size <= squashfs.METADATA_SIZE or not 0 < len(target) <= squashfs.METADATA_SIZE:
            raise self._damaged("a metadata block that cannot be unpacked")
        if len(self._metadata) >= 16 * _CACHED:
            del self._metadata[next(iter(self._metadata))]
        self._metadata[position] = found = bytes(target), position + 2 + size
        return found

    def _stored(self, position: int, length: int) -> memoryview:
        """Bytes of the image as they are on disk."""
        if position + length > self._super.bytes_used:
            raise self._damaged("something lies outside of it")
        try:
            data = os.pread(self._fd, length, self._offset + position)
        except (OSError, OverflowError) as error:
            raise HostError(f"reading {self.name}: {error}") from error
        if len(data) != length:
            raise self._damaged("truncated")
        return memoryview(data)

    def _damaged(self, what: str) -> ImageError:
        return ImageError(f"reading {self.name}: damaged SquashFS: {what}", "get or build the image again")


class _Stream:
    """Metadata from a place on, across its blocks, never beyond the end of the table."""

    __slots__ = ("_end", "_next", "_offset", "_reader")

    def __init__(self, reader: Reader, table: int, end: int, place: int) -> None:
        self._reader, self._end = reader, end
        self._next, self._offset = table + (place >> 16), place & 0xFFFF

    def copy(self) -> _Stream:
        return _Stream(self._reader, self._next, self._end, self._offset)

    def read(self, length: int) -> bytes:
        pieces: list[bytes] = []
        while True:
            if self._next >= self._end:
                raise self._reader._damaged("metadata that breaks off")
            data, following = self._reader._block(self._next)
            piece = data[self._offset : self._offset + length]
            length -= len(piece)
            self._offset += len(piece)
            if self._offset >= len(data):
                if self._offset > len(data):
                    raise self._reader._damaged("a place beyond its metadata block")
                self._next, self._offset = following, 0
            if not length:
                return piece if not pieces else b"".join([*pieces, piece])
            pieces.append(piece)


def _uncompressor(block: squashfs.Superblock, name: str) -> Uncompress:
    """What unpacks one block of the image: libsquashfs where it is installed, else the standard library."""
    try:
        from sciexec._pysquashfs import ffi, lib
    except ImportError:
        return _standard_uncompressor(block.compression_name, name)
    compressor = lib.uncompressor_new(block.compression, block.block_size)
    if not compressor:
        raise HostError(f"reading {name}: libsquashfs cannot unpack {block.compression_name} here")
    compressor = ffi.gc(compressor, lib.uncompressor_free)

    def uncompress(source: memoryview, target: memoryview) -> int:
        length: int = lib.uncompress(compressor, ffi.from_buffer(source), len(source), ffi.from_buffer(target), len(target))
        return length

    return uncompress


def _standard_uncompressor(compression: str, name: str) -> Uncompress:
    unpack: Callable[[memoryview, int], bytes]
    if compression == "gzip":
        unpack = lambda source, room: zlib.decompressobj().decompress(source, room)  # noqa: E731
    elif compression in ("xz", "lzma"):
        unpack = lambda source, room: lzma.LZMADecompressor(memlimit=65 << 20).decompress(source, room)  # noqa: E731
    else:
        try:
            if compression != "zstd":
                raise ImportError
            import zstandard
        except ImportError:
            hint = "install gcc and libsquashfs-dev (Debian, Ubuntu) or squashfs-tools-ng-devel (EPEL), and reinstall sciexec with pip"
            raise HostError(f"reading {name}: nothing here can unpack {compression}", hint) from None
        # Not decompress(), which believes the size that the data claim.
        unpack = lambda source, room: zstandard.ZstdDecompressor().stream_reader(source).read(room + 1)  # noqa: E731

    def uncompress(source: memoryview, target: memoryview) -> int:
        try:
            data = unpack(source, len(target))
        except Exception:  # each library has its own; all of them mean damaged data
            return -1
        target[: len(data)] = data[: len(target)]
        return len(data) if len(data) <= len(target) else -1

    return uncompress


# --- unpacking --------------------------------------------------------------------------------------------------------------


class _Unpacking:
    """One run of Reader.unpack."""

    def __init__(self, reader: Reader, target: int, max_bytes: int | None) -> None:
        self._reader, self._target, self._room = reader, target, max_bytes
        self._path = b""  # for errors
        self._linked: dict[int, bytes] = {}  # place -> first path of a file with several names
        self._seen = {reader.root.place}
        self._count = self._devices = self._sockets = 0

    def run(self) -> Skipped:
        # Directories that are being filled, each with what is still to come below it.
        stack: list[tuple[int, bytes, Entry, list[tuple[bytes, Entry]]]] = []
        try:
            top = os.dup(self._target)
            stack.append((top, b"", self._reader.root, []))
            stack[0][3].extend(self._fill(top, b"", self._reader.root))
            while stack:
                fd, path, directory, below = stack[-1]
                if not below:
                    self._path = path
                    os.fchmod(fd, directory.mode & 0o1777 | stat.S_IRWXU)
                    os.utime(fd, (directory.mtime, directory.mtime))
                    os.close(stack.pop()[0])
                    continue
                name, entry = below.pop()
                self._path = where = path + b"/" + name
                if len(stack) == MAX_DEPTH:
                    raise LimitError(f"unpacking {self._reader.name}: directories {MAX_DEPTH} deep at {escaped(where[:200])}")
                if entry.place in self._seen:
                    raise self._reader._damaged(f"{escaped(where)} is a directory with two names")
                self._seen.add(entry.place)
                os.mkdir(name, 0o700, dir_fd=fd)
                opened = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                stack.append((opened, where, entry, []))
                stack[-1][3].extend(self._fill(opened, where, entry))
        except OSError as error:
            raise HostError(f"unpacking {self._reader.name}: {escaped(self._path) or '/'}: {error.strerror}") from error
        finally:
            for frame in stack:
                os.close(frame[0])
        return Skipped(self._devices, self._sockets)

    def _fill(self, fd: int, path: bytes, directory: Entry) -> list[tuple[bytes, Entry]]:
        """Unpack what is in a directory, and return its subdirectories, last one first."""
        reader = self._reader
        below = []
        for name, place in reader._listing(directory).items():
            entry = reader._inode(place)
            self._count += 1
            if self._count > MAX_ENTRIES:
                raise LimitError(f"unpacking {reader.name}: more than {MAX_ENTRIES} files")
            if entry.kind == "d":
                below.append((name, entry))
                continue
            self._path = where = path + b"/" + name
            if entry.links > 1 and self._link(fd, name, where, entry):
                continue
            if entry.kind == "f":
                self._file(fd, name, entry)
            elif entry.kind == "l":
                os.symlink(entry.target, name, dir_fd=fd)
                os.utime(name, (entry.mtime, entry.mtime), dir_fd=fd, follow_symlinks=False)
            elif entry.kind == "p":
                os.mkfifo(name, entry.mode & 0o777, dir_fd=fd)
            elif entry.kind == "s":
                self._sockets += 1
            else:
                self._devices += 1
        return below[::-1]

    def _link(self, fd: int, name: bytes, where: bytes, entry: Entry) -> bool:
        """Link to the first name of the file, if there is one: its directories were all made here, so none is a symbolic link."""
        first = self._linked.setdefault(entry.place, where)
        if first is where or entry.kind not in "fl":
            return False
        try:
            os.link(first[1:], name, src_dir_fd=self._target, dst_dir_fd=fd, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.ENAMETOOLONG, errno.EXDEV):
                raise
            return False  # the file system has no such link; a copy reads the same
        return True

    def _file(self, directory: int, name: bytes, entry: Entry) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            end = 0
            for position, piece in self._reader.pieces(entry):
                if self._room is not None:
                    self._room -= len(piece)
                    if self._room < 0:
                        raise LimitError(f"unpacking {self._reader.name}: more data than the limit allows")
                end = position + len(piece)
                while piece:
                    written = os.pwrite(fd, piece, position)
                    position, piece = position + written, piece[written:]
            if end < entry.size:
                os.ftruncate(fd, entry.size)
            if entry.xattr != _NONE:
                self._xattrs(fd, entry)
            os.fchmod(fd, entry.mode & 0o777)
            os.utime(fd, (entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def _xattrs(self, fd: int, entry: Entry) -> None:
        for key, value in self._reader.xattrs(entry).items():
            if key.startswith(b"user."):
                try:
                    os.setxattr(fd, key, value)
                except OSError:  # not every file system has them, and none has room without end
                    return
