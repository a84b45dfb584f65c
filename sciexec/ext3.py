"""An ext2, ext3 or ext4 file system in a file: as much of it as a run must know before a server is started on it.

    1024   +--------------------------+  superblock, 1024 bytes
           |   0  inodes      u32     |    how many
           |  20  first       u32     |    block with data: 1 where blocks have 1 KiB, else 0
           |  24  log size    u32     |    a block has 1024 << log size bytes
           |  40  per group   u32     |    inodes
           |  56  magic       u16     |    0xEF53
           |  58  state       u16     |    1 closed cleanly, 2 errors found
           |  76  revision    u32     |    0: inodes have 128 bytes
           |  88  inode size  u16     |
           |  96  incompat    u32     |    4 the journal must be replayed, 0x80 descriptors of groups have 64 bytes
           +--------------------------+
           |  group descriptors       |  from the block behind; 32 bytes each: 8 block of the inode table u32, 16 directories u16
           +--------------------------+
    inode     0 mode u16, 2 uid u16, 4 size u32, 24 gid u16, 26 links u16, 32 flags u32 (0x80000: extents), 40 blocks 15 * u32:
              12 of data, one of block numbers ...; 120 uid and 122 gid, high halves u16
    directory blocks of entries: inode u32, length of the entry u16, length of the name u8, type u8, name

All integers are little-endian.  Source: Linux, Documentation/filesystems/ext4.
"""

from __future__ import annotations

import os
import struct

from sciexec.errors import HostError, ImageError, escaped

MAGIC_OFFSET, MAGIC = 1080, b"\x53\xef"
ROOT_INODE = 2
CLEAN, ERRORS = 1, 2
RECOVER, WIDE = 0x4, 0x80
EXTENTS, EXTENT_MAGIC = 0x80000, 0xF30A
DIRECT = 12  # blocks of a file that its inode names itself
LARGEST_BLOCK = 1 << 16

_SUPERBLOCK = struct.Struct("<I16xII12xI12xHH16xI8xH6xI")
_IS_DIRECTORY = bytes(high >> 4 == 4 for high in range(256))  # by the high byte of a mode


class Ext3:
    """A file system in `file`, from `offset` on.  Raises ImageError where it is none or damaged, HostError where it cannot be read.

    Arguments:
        name: what to call it in an error.
    """

    def __init__(self, fd: int, offset: int, name: str) -> None:
        self._fd, self._offset, self._name = fd, offset, name
        raw = self._read(1024, 1024)
        self._inodes, self._first, log, self._per_group, magic, self.state, revision, size, self._incompat = _SUPERBLOCK.unpack_from(raw)
        if magic != 0xEF53:
            raise ImageError(f"opening {escaped(name)}: not an ext3 file system")
        self._block = 1024 << log if log < 7 else 0
        self._inode_size = size if revision else 128
        if not self._block or not 128 <= self._inode_size <= self._block or not 0 < self._per_group <= 8 * self._block:
            raise self._damaged()
        if not _IS_DIRECTORY[self._inode(ROOT_INODE)[1]]:
            raise self._damaged()

    @property
    def _descriptor(self) -> int:
        return 64 if self._incompat & WIDE else 32

    @property
    def needs_replay(self) -> bool:
        """Whether the journal holds changes that are not in their places yet."""
        return bool(self._incompat & RECOVER)

    def owner(self, name: str) -> tuple[int, int] | None:
        """Uid and gid of a directory in the root directory; None where there is none of that name."""
        root = self._inode(ROOT_INODE)
        for block in self._blocks(root):
            data = self._read(block * self._block, self._block)
            place = 0
            while place + 8 <= len(data):
                number, length, size = struct.unpack_from("<IHB", data, place)
                if length < 8:
                    raise self._damaged()
                if number and data[place + 8 : place + 8 + size] == name.encode():
                    return owner_of(self._inode(number))
                place += length
        return None

    def has_whiteouts(self) -> bool:
        """Whether names that begin with .wh. may be there: a file removed by fuse-overlayfs, which the kernel's overlay does not know.

        All directories are looked through, in about a second for 100,000 of them.  Yes where that would be too much work.
        """
        length = self._inode_size * self._per_group
        for group in range(-(-self._inodes // self._per_group)):
            descriptor = self._read((self._first + 1) * self._block + group * self._descriptor, 32)
            table, directories = struct.unpack_from("<I4xH", descriptor, 8)
            if not directories:
                continue
            inodes = self._read(table * self._block, length)
            marks = inodes[1 :: self._inode_size].translate(_IS_DIRECTORY)
            index = marks.find(1)
            while index >= 0:
                blocks = self._all_blocks(inodes[index * self._inode_size :][:128])
                if blocks is None or any(b".wh." in self._read(block * self._block, self._block) for block in blocks):
                    return True
                index = marks.find(1, index + 1)
        return False

    def root_owner(self) -> tuple[int, int]:
        return owner_of(self._inode(ROOT_INODE))

    def _inode(self, number: int) -> bytes:
        group, index = divmod(number - 1, self._per_group)
        place = (self._first + 1) * self._block + group * self._descriptor
        (table,) = struct.unpack_from("<I", self._read(place, 32), 8)
        return self._read(table * self._block + index * self._inode_size, 128)

    def _blocks(self, inode: bytes) -> list[int]:
        """The blocks of a small directory, which is what a root directory is."""
        (size,), (flags,) = struct.unpack_from("<I", inode, 4), struct.unpack_from("<I", inode, 32)
        count = min(-(-size // self._block), DIRECT)
        if not flags & EXTENTS:
            return [block for block in struct.unpack_from(f"<{count}I", inode, 40) if block]
        magic, entries, _, depth = struct.unpack_from("<4H", inode, 40)
        if magic != EXTENT_MAGIC or entries > 4 or depth:
            return []
        found: list[int] = []
        for entry in range(entries):
            _, length, _, start = struct.unpack_from("<IHHI", inode, 52 + 12 * entry)
            found += range(start, start + min(length, DIRECT))
        return found[:DIRECT]

    def _all_blocks(self, inode: bytes) -> list[int] | None:
        """The blocks of any directory; None where they are more than its inode and one block name."""
        (flags,) = struct.unpack_from("<I", inode, 32)
        if flags & EXTENTS:
            _, _, _, depth = struct.unpack_from("<4H", inode, 40)
            size = struct.unpack_from("<I", inode, 4)[0] // self._block
            return None if depth or size > DIRECT else self._blocks(inode)
        *direct, indirect, double, triple = struct.unpack_from("<15I", inode, 40)
        if double or triple:
            return None
        more = struct.unpack(f"<{self._block // 4}I", self._read(indirect * self._block, self._block)) if indirect else ()
        return [block for block in (*direct, *more) if block]

    def _read(self, place: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, self._offset + place)
        except OSError as error:
            raise HostError(f"reading {escaped(self._name)}: {error.strerror}") from error
        if len(data) < size:
            raise self._damaged()
        return data

    def _damaged(self) -> ImageError:
        return ImageError(f"reading {escaped(self._name)}: damaged ext3 file system", f"`e2fsck -f {escaped(self._name)}` may mend it")


def owner_of(inode: bytes) -> tuple[int, int]:
    uid, gid, uid_high, gid_high = (struct.unpack_from("<H", inode, place)[0] for place in (2, 24, 120, 122))
    return uid_high << 16 | uid, gid_high << 16 | gid
