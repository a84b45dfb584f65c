r"""A strict, linear, bounded, streaming reader of tar archives: the layers of an image, and archives on disk.

An archive is a row of 512-byte blocks: a header, its data padded to whole blocks, the next header ..., two blocks of zeros.

    +--------+------------+--------+--------------------+--------+---------+--------+-----------+
    | x      | PAX        | L      | a long name, GNU   | 0      | data    | 0 0    | anything  |
    | header | records    | header |                    | header |         | zeros  |           |
    +--------+------------+--------+--------------------+--------+---------+--------+-----------+
     \______ extend the next member _________/ \________ member ___________/  the end  ignored

Headers are v7, ustar, GNU (old and new), star and PAX (convert.tarheader); sparse files are old GNU and PAX 0.0, 0.1 and 1.0.

Other readers disagree about archives that break the rules, and somebody who builds such an archive wants exactly that.  So what
GNU tar, libarchive and Go's archive/tar (Docker, containerd, umoci) read differently is an error here:

- An archive may end between two members without blocks of zeros, as for all three, and right behind the last member's data, as
  `umoci insert` writes it and Go reads it; anywhere else the end is an error.
- A single block of zeros followed by something else is an error.
- Data of anything but a regular file are an error.  A hard link alone may have its file's size in the header, and no data
  follow (GNU tar and Go; libarchive guesses); a PAX size that says so is an error.
- A regular file whose name ends in "/" is a directory, as before POSIX, and an error if it has data.
- A second extended header of one kind before a member is an error, and so are an L (K) and a PAX path (linkpath) that differ.
- A global PAX header may hold comments; one that sets what an image contains is an error (only GNU tar would obey it).
- A PAX record without a value, which POSIX says restores the header's, is an error if its key is one that is used.

Names are bytes and stay as they are.  Nothing is allocated because a header says so: only bytes that are there are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Callable, Union

from convert import tarheader
from convert.tarheader import BLOCK, MAX_COMPONENT, MAX_EXTENTS, ZEROS, Malformed
from sciexec.errors import HostError, ImageError, LimitError, escaped

Chunk = Union[bytes, bytearray, memoryview]
KINDS = {b"0": "f", b"\0": "f", b"7": "f", b"S": "f", b"1": "h", b"2": "l", b"3": "c", b"4": "b", b"5": "d", b"6": "p"}
EXTENSIONS = {b"x": "PAX header", b"g": "global PAX header", b"L": "long name", b"K": "long link"}

MAX_EXTENDED = 1 << 20  # bytes of one extended header
MAX_CHAIN = 16  # extended headers in a row
MAX_XATTR = 1 << 16  # bytes of one value: XATTR_SIZE_MAX of the kernel
MAX_TIME = (1 << 32) - 1  # SquashFS holds an unsigned 32-bit time
MAX_TARGET = 4095  # bytes of a symbolic link's target: PATH_MAX without its NUL; Linux refuses a SquashFS with longer ones
MAX_MAJOR, MAX_MINOR = 0xFFF, 0xFFFFF  # device numbers, as the kernel's dev_t and SquashFS hold them

HINT = "raise the limit with {} if you trust the image"


@dataclass
class Limits:
    """What an image may hold, and what of it has been used: one object for all the layers of one image.

    Arguments:
        max_entries: members in all layers together.
        max_bytes: uncompressed bytes of all layers together, holes of sparse files included.
    """

    max_entries: int = 500_000
    max_bytes: int = 1 << 40
    entries: int = field(default=0, init=False)
    size: int = field(default=0, init=False)

    def count(self, where: str, *, entries: int = 0, size: int = 0) -> None:
        """Raises LimitError."""
        self.entries += entries
        self.size += size
        if self.entries > self.max_entries:
            raise LimitError(f"reading {where}: more than {self.max_entries} members", HINT.format("--max-entries"))
        if self.size > self.max_bytes:
            raise LimitError(f"reading {where}: more than {self.max_bytes} bytes uncompressed", HINT.format("--max-bytes"))


class Member:
    """One entry of an archive.

    path    normalised: no leading or trailing "/", no "." and never ".."; b"" is the root, always a directory
    kind    "f" file, "d" directory, "l" symbolic link, "h" hard link, "c" and "b" devices, "p" FIFO
    mode    12 bits, set-id and sticky included
    mtime   Unix seconds, rounded down, clamped to 0..2**32-1
    size    bytes of a file with its holes, else 0
    link    target: of "l" as it stands, of "h" normalised as path is
    rdev    (major, minor) of "c" and "b"
    xattrs  those worth keeping, see tarheader.keeps_xattr()
    sparse  None, or the (offset, length) of the stored data in the file, in order and disjoint
    offset  of the stored data, in bytes from the start of the archive
    """

    __slots__ = ("gid", "kind", "link", "mode", "mtime", "offset", "path", "rdev", "size", "sparse", "uid", "xattrs")

    def __init__(self, path: bytes, kind: str, mode: int, uid: int, gid: int, mtime: int, size: int = 0, link: bytes = b"") -> None:
        self.path = path
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.size = size
        self.link = link
        self.rdev = (0, 0)
        self.xattrs: dict[bytes, bytes] = {}
        self.sparse: list[tuple[int, int]] | None = None
        self.offset = 0

    def __repr__(self) -> str:
        return f"Member({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


# --- the reader -------------------------------------------------------------------------------------------------------------


class Reader:
    """The members of one archive, in order; a member's data can be read until the next member is asked for.

    Arguments:
        chunks: the archive's bytes in pieces of any length; they must not change afterwards, data() hands out views of them.
            The iterator is read to its end, also what follows the archive's end: whoever makes the chunks verifies a digest there.
        limits: shared by the layers of one image; a fresh Limits() if None.
        where: names image and layer in errors.
        skip: passes over so many bytes of the chunks' source (archives on disk); without it they are read.

    Attributes:
        dropped_xattrs: extended attributes left out so far, see tarheader.keeps_xattr().

    Raises while iterating and reading data: ImageError "reading WHERE: MEMBER: cause", LimitError, and what `chunks` raises.
    """

    def __init__(
        self, chunks: Iterable[Chunk], limits: Limits | None = None, where: str = "archive", *, skip: Callable[[int], None] | None = None
    ) -> None:
        self._chunks = iter(chunks)
        self._limits = limits or Limits()
        self._where = where
        self._skip = skip
        self._view = memoryview(b"")  # the current chunk
        self._base = 0  # where it begins in the archive
        self._position = 0  # in the current chunk
        self._header = 0  # where the next header begins in the archive
        self._end = 0  # where the current member's data end in the archive
        self._member: Member | None = None
        self._name = b""  # for errors
        self.dropped_xattrs = 0

    def __iter__(self) -> Iterator[Member]:
        try:
            while (member := self._next()) is not None:
                yield member
            self._finish()
        except Malformed as cause:
            raise self._error(cause) from None

    def data(self) -> Iterator[memoryview]:
        """The stored data of the current member that have not been read yet: of a sparse file without its holes."""
        try:
            yield from self._until(self._end)
        except Malformed as cause:
            raise self._error(cause) from None

    def pieces(self) -> Iterator[memoryview | int]:
        """The content of the current file from its beginning: data, or the length of a hole in bytes."""
        member = self._member
        if member is None or member.sparse is None:
            yield from self.data()
            return
        end = 0
        start = member.offset
        try:
            for offset, length in member.sparse:
                if offset > end:
                    yield offset - end
                end = offset + length
                start += length
                yield from self._until(start)
        except Malformed as cause:
            raise self._error(cause) from None
        if member.size > end:
            yield member.size - end

    # the stream

    def _refill(self) -> bool:
        """Go on to the next chunk that holds anything; False at the end of the archive."""
        self._base += len(self._view)
        self._position = 0
        self._view = memoryview(b"")
        for chunk in self._chunks:
            if chunk:
                self._view = memoryview(chunk)
                return True
        return False

    def _seek(self, target: int) -> None:
        """Go forward to an offset of the archive."""
        while (ahead := target - self._base) > len(self._view):
            if self._skip is not None:
                self._skip(ahead - len(self._view))
                self._base, self._view = target, memoryview(b"")
            elif not self._refill():
                if self._base + len(self._view) != self._end:
                    raise Malformed("the archive ends inside its data")
                target = self._end  # all data is there, only its padding is not
        self._position = target - self._base

    def _until(self, target: int) -> Iterator[memoryview]:
        while (left := target - self._base - self._position) > 0:
            if self._position == len(self._view) and not self._refill():
                raise Malformed("the archive ends inside its data")
            piece = self._view[self._position : self._position + left]
            self._position += len(piece)
            yield piece

    def _read(self, length: int) -> bytes:
        return b"".join(self._until(self._base + self._position + length))

    def _block(self) -> bytes:
        """The next block; b"" if the archive ends right before it."""
        block = self._view[self._position : self._position + BLOCK].tobytes()
        self._position += len(block)
        while len(block) < BLOCK:
            if not self._refill():
                if block:
                    raise Malformed("the archive ends inside a block")
                return b""
            rest = self._view[: BLOCK - len(block)]
            self._position = len(rest)
            block += rest.tobytes()
        return block

    def _finish(self) -> None:
        """Read what follows the end of the archive: padding of tape records, in most archives."""
        self._member, self._end = None, 0
        while self._skip is None and self._refill():
            self._limits.count(self._where, size=len(self._view))

    def _error(self, cause: Malformed) -> ImageError:
        name = escaped(self._name if len(self._name) < 256 else self._name[:252] + b"...")
        return ImageError(f"reading {self._where}: {name or f'header at byte {self._header}'}: {cause}")

    # the headers

    def _next(self) -> Member | None:
        records: dict[bytes, bytes] = {}
        chain = b""
        while True:
            self._seek(self._header)  # over what was left of the last member's data, which still has its name
            self._name = b""
            block = self._block()
            if not block or block == ZEROS:
                if chain:
                    raise Malformed("the archive ends after an extended header")
                if block and self._block() not in (b"", ZEROS):
                    raise Malformed("a single block of zeros in the middle of the archive")
                return None
            name, permissions, size, mtime, checksum, flag, link, magic, prefix = tarheader.HEADER.unpack(block)
            tarheader.verify_checksum(block, checksum)
            name = name.partition(b"\0")[0]
            if magic.startswith(tarheader.POSIX):
                name = prefix.partition(b"\0")[0] + b"/" + name if prefix[0] else name
            elif magic != tarheader.GNU and magic.startswith(b"ustar"):
                raise Malformed(f"the header's magic {escaped(magic)!r} is neither POSIX's nor GNU's")
            self._name = name
            stored = tarheader.byte_count(tarheader.number(size))
            if flag not in EXTENSIONS:
                break
            if flag in chain and flag != b"g":
                raise Malformed(f"a second {EXTENSIONS[flag]} before one member")
            if len(chain) == MAX_CHAIN:
                raise Malformed(f"more than {MAX_CHAIN} extended headers before one member")
            chain += flag
            self._extension(flag, stored, records)
        kind = KINDS.get(flag)
        if kind is None:
            raise Malformed(f"type {escaped(flag)!r} is not known")
        member = Member(name, kind, *tarheader.permissions(permissions), tarheader.number(mtime))
        if kind in "hl":
            member.link = link.partition(b"\0")[0]
            stored = 0 if kind == "h" else stored
        elif kind in "cb":
            member.rdev = (tarheader.number(block[329:337]), tarheader.number(block[337:345]))
        sparse = False
        if records:
            stored, sparse = self._extend(member, records, stored)
        self._member = member
        member.size = stored
        if flag == b"S" or sparse:
            if kind != "f" or (flag == b"S" and (sparse or magic != tarheader.GNU)):
                raise Malformed("a sparse file of an unknown format")
            stored = self._old_gnu_map(member, block) if flag == b"S" else self._pax_map(member, records)
        self._settle(member)
        member.offset = self._base + self._position
        self._end = member.offset + stored
        self._header = self._end + -self._end % BLOCK
        self._limits.count(self._where, entries=1, size=member.size)
        return member

    def _extension(self, flag: bytes, size: int, records: dict[bytes, bytes]) -> None:
        """Read an extended header into `records`; GNU's long names go under the keys that PAX has for the same."""
        if size > MAX_EXTENDED:
            raise Malformed(f"a {EXTENSIONS[flag]} of {size} bytes; at most {MAX_EXTENDED} are read")
        data = self._read(size)
        self._header += BLOCK + size + -size % BLOCK
        if flag in b"xg":
            new = tarheader.pax_records(data)
        else:
            text = data.rstrip(b"\0")
            if not text:
                raise Malformed(f"an empty {EXTENSIONS[flag]}")
            new = {b"path" if flag == b"L" else b"linkpath": text}
        if flag == b"g":
            for key in new:
                if key in tarheader.MEANINGFUL or key.startswith(tarheader.MEANINGFUL_PREFIXES):
                    raise Malformed(f"a global PAX header sets {escaped(key)} for all members")
            return
        for key in (b"path", b"linkpath"):
            if key in new and new[key] != records.get(key, new[key]):
                raise Malformed(f"GNU's extended header and the PAX header disagree on its {key.decode()}")
        records.update(new)

    def _extend(self, member: Member, records: dict[bytes, bytes], stored: int) -> tuple[int, bool]:
        """Let the extended headers have their say.  Returns the bytes stored, and whether the file is sparse."""
        sparse = False
        xattrs: dict[bytes, bytes] = {}
        for key, value in records.items():
            if key.startswith(tarheader.SCHILY):
                xattrs[key[len(tarheader.SCHILY) :]] = value
            elif key.startswith(tarheader.LIBARCHIVE):  # bsdtar writes both, and star's is the simpler
                xattrs.setdefault(*tarheader.libarchive_xattr(key, value))
            elif key.startswith(tarheader.SPARSE):
                sparse = True
            elif key == b"path":
                member.path = self._name = tarheader.pax_text(value)
            elif key == b"linkpath":
                member.link = tarheader.pax_text(value)
            elif key == b"mtime":
                member.mtime = tarheader.pax_time(value)
            elif key == b"uid":
                member.uid = tarheader.owner_id(tarheader.decimal(value))
            elif key == b"gid":
                member.gid = tarheader.owner_id(tarheader.decimal(value))
            elif key == b"size":
                stored = tarheader.byte_count(tarheader.decimal(value))
            elif key == b"SCHILY.devmajor":
                member.rdev = (tarheader.decimal(value), member.rdev[1])
            elif key == b"SCHILY.devminor":
                member.rdev = (member.rdev[0], tarheader.decimal(value))
        for name, value in xattrs.items():
            if not tarheader.keeps_xattr(name):
                self.dropped_xattrs += 1
            elif b"\0" in name or len(name) > MAX_COMPONENT or len(value) > MAX_XATTR:
                raise Malformed(f"the extended attribute {escaped(name[:MAX_COMPONENT])} is too long")
            else:
                member.xattrs[name] = value
        if b"GNU.sparse.name" in records:
            member.path = self._name = tarheader.pax_text(records[b"GNU.sparse.name"])
        return stored, sparse

    def _settle(self, member: Member) -> None:
        """Bring names and times into the form in which an image holds them."""
        name, kind = member.path, member.kind
        if not name:
            raise Malformed("a member without a name")
        if kind != "f":
            if member.size:
                raise Malformed(f"it is no regular file, but has {member.size} bytes of data")
        elif name.endswith(b"/"):
            if member.size or not name.strip(b"/"):
                raise Malformed('a regular file whose name ends in "/"')
            member.kind = kind = "d"
        member.path = tarheader.normalised(name)
        if kind != "d" and (not member.path or name.endswith(b"/.")):
            raise Malformed('only a directory can be the root or be called "."')
        if kind == "h":
            member.link = tarheader.normalised(member.link)
            if not member.link:
                raise Malformed("a hard link to the root")
        elif kind == "l":
            if not 0 < len(member.link) <= MAX_TARGET:
                raise Malformed(f"a symbolic link to {len(member.link)} bytes of text; 1 to {MAX_TARGET} can be stored")
        else:
            member.link = b""
        if kind in "cb" and not (0 <= member.rdev[0] <= MAX_MAJOR and 0 <= member.rdev[1] <= MAX_MINOR):
            raise Malformed(f"the device number {member.rdev[0]}:{member.rdev[1]} cannot be stored")
        member.mtime = min(max(member.mtime, 0), MAX_TIME)

    # the sparse maps: where the stored data belong in the file

    def _old_gnu_map(self, member: Member, block: bytes) -> int:
        """The map of type "S" (GNU tar manual, "Old GNU Format"); returns the bytes that follow it.

        386                            482            483        495
        +------------------------------+--------------+----------+    each extent: offset 12, length 12, octal
        | 4 extents                    | more follows | realsize |
        +------------------------------+--------------+----------+    in the blocks after it: 21 extents, then
                                                                      at 504 whether one more block follows
        """
        numbers: list[int] = []
        table, more, size = block[386:482], block[482], tarheader.byte_count(tarheader.number(block[483:495]))
        while True:
            for start in range(0, len(table), 24):
                offset, length = table[start : start + 12], table[start + 12 : start + 24]
                if not (offset[0] or length[0]):
                    if more:
                        raise Malformed("the sparse map ends, and goes on")
                    break
                numbers += (tarheader.number(offset), tarheader.number(length))
            if not more:
                break
            if len(numbers) > 2 * MAX_EXTENTS:
                raise Malformed(f"the sparse map has more than {MAX_EXTENTS} extents")
            table = self._read(BLOCK)
            more, table = table[504], table[:504]
        stored = member.size
        member.size, member.sparse = size, tarheader.sparse_extents(numbers, size, stored)
        return stored

    def _pax_map(self, member: Member, records: dict[bytes, bytes]) -> int:
        """The map of PAX 0.0, 0.1 (among the records) or 1.0 (before the data); returns the bytes that follow it.

        GNU tar manual, "PAX Format, Versions 0.0 and 0.1" and "PAX Format, Version 1.0".
        """
        version = records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")
        sizes = {records[key] for key in (b"GNU.sparse.size", b"GNU.sparse.realsize") if key in records}
        if len(sizes) != 1:
            raise Malformed("the sparse file's size is missing, or there are two")
        size, stored = tarheader.byte_count(tarheader.decimal(sizes.pop())), member.size
        if version == (b"1", b"0"):
            numbers, stored = self._leading_map(stored)
        elif version in ((None, None), (b"0", b"0"), (b"0", b"1")):
            text = records.get(b"GNU.sparse.map", b"")
            numbers = [tarheader.decimal(number) for number in text.split(b",")] if text else []
            count = records.get(b"GNU.sparse.numblocks")
            if count is not None and 2 * tarheader.decimal(count) != len(numbers):
                raise Malformed("the sparse map does not have as many extents as it says")
        else:
            raise Malformed("a sparse file of an unknown format")
        member.size, member.sparse = size, tarheader.sparse_extents(numbers, size, stored)
        return stored

    def _leading_map(self, stored: int) -> tuple[list[int], int]:
        """PAX 1.0: count, offset, length, offset ... in decimal lines before the data, padded to whole blocks."""
        numbers: list[int] = []
        wanted = 1
        line = b""
        while len(numbers) < wanted:
            if stored < BLOCK or len(line) > 20:
                raise Malformed("the sparse map is incomplete")
            *lines, line = (line + self._read(BLOCK)).split(b"\n")
            stored -= BLOCK
            if lines and not numbers:
                wanted = 1 + 2 * min(tarheader.decimal(lines[0]), MAX_EXTENTS + 1)
            numbers += map(tarheader.decimal, lines[: wanted - len(numbers)])
        return numbers[1:], stored


# --- archives on disk -------------------------------------------------------------------------------------------------------


class _File:
    """An open file as chunks that can be passed over."""

    def __init__(self, fd: int, where: str) -> None:
        self._fd, self._where = fd, where
        self._position = 0

    def __iter__(self) -> Iterator[bytes]:
        try:
            while chunk := os.pread(self._fd, 1 << 14, self._position):
                self._position += len(chunk)
                yield chunk
        except OSError as error:
            raise HostError(f"reading {self._where}: {error.strerror}") from None

    def skip(self, length: int) -> None:
        self._position += length
        if self._position > os.fstat(self._fd).st_size:
            raise Malformed("the archive ends inside its data")


def index(fd: int, where: str = "archive", limits: Limits | None = None) -> list[Member]:
    """The members of an uncompressed archive on disk; the data of one lie at its `offset` and are not read.

    Arguments:
        fd: a regular file, read with pread(2) from its start.

    Raises: ImageError, LimitError; HostError if the file cannot be read.
    """
    file = _File(fd, where)
    return list(Reader(file, limits, where, skip=file.skip))
