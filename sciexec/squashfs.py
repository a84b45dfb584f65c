"""The superblock of a SquashFS 4.0, and the check that no foreign image gets round before anything else looks at it.

    0      +--------------------------+  superblock, 96 bytes
           |  0  magic       u32      |    "hsqs"
           |  4  inodes      u32      |    how many
           |  8  mtime       u32      |    Unix s
           | 12  block size  u32      |    of data, a power of two, 4 KiB to 1 MiB
           | 16  fragments   u32      |    how many fragment blocks
           | 20  compression u16      |    1 gzip, 2 lzma, 3 lzo, 4 xz, 5 lz4, 6 zstd
           | 22  block log   u16      |    log2 of the block size
           | 24  flags       u16      |    1024: compressor options follow the superblock
           | 26  ids         u16      |    how many owners and groups
           | 28  version     u16 u16  |    4, 0
           | 32  root        u64      |    place of the root's inode: metadata block << 16 | offset within
           | 40  bytes used  u64      |    by the whole file system, padding not counted
           | 48  id table    u64  -----------+
           | 56  xattr table u64  ---------+ |   of these four, the place of the list of their metadata blocks;
           | 64  inodes      u64  ----+    | |   no such table: all bits set
           | 72  directories u64  --+ |    | |
           | 80  fragments   u64    | |    | |
           | 88  exports     u64    | |    | |
           +--------------------------+    | |
           |  compressor options      |    | |
           |  data and fragments      |    | |
           |  inode table             | <--+ |   metadata: blocks of at most 8 KiB, each behind a u16 with its size on disk,
           |  directory table         |      |   bit 15 set: stored uncompressed
           |  fragment, export tables |      |
           |  id table                | <----+
           |  xattr table             |
           +--------------------------+

All integers are little-endian.  Source: Linux, fs/squashfs/squashfs_fs.h; squashfs-tools-ng, doc/format.adoc.

A run imports this module, so it stands on `os` and `struct` alone.
"""

from __future__ import annotations

import os
import struct

from sciexec.errors import HostError, ImageError

MAGIC = 0x73717368
COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
METADATA_SIZE = 8192
NO_TABLE = 0xFFFFFFFFFFFFFFFF
NO_XATTRS = 0x0200  # flag: there is no xattr table, whatever its place says

_SUPERBLOCK = struct.Struct("<5I6H8Q")


class Superblock:
    """The fields as they are on disk, checked by `check_superblock`; `compression` is a number, `compression_name` its name."""

    __slots__ = (
        "block_log", "block_size", "bytes_used", "compression", "directory_table", "export_table", "flags", "fragment_table", "fragments",
        "id_table", "ids", "inode_table", "inodes", "magic", "major", "minor", "mtime", "root", "xattr_table",
    )  # fmt: skip

    def __init__(self, raw: bytes) -> None:
        (
            self.magic, self.inodes, self.mtime, self.block_size, self.fragments,
            self.compression, self.block_log, self.flags, self.ids, self.major, self.minor,
            self.root, self.bytes_used, self.id_table, self.xattr_table,
            self.inode_table, self.directory_table, self.fragment_table, self.export_table,
        ) = _SUPERBLOCK.unpack(raw)  # fmt: skip

    @property
    def compression_name(self) -> str:
        return COMPRESSIONS[self.compression]


def check_superblock(fd: int, offset: int, size: int, name: str = "") -> Superblock:
    """The superblock of the SquashFS that begins `offset` bytes into a file, if nothing in it can lead a reader astray.

    Arguments:
        size: bytes from offset to the end of the file or partition.
        name: of the image, for the error; without it the error says "the image".

    Raises: ImageError for a bad magic, version or block size, and for tables that lie outside of the image or in no sane order;
        HostError where the file cannot be read.
    """

    def damaged(what: str) -> ImageError:
        return ImageError(f"reading {name or 'the image'}: damaged SquashFS: {what}", "get or build the image again")

    try:
        raw = os.pread(fd, _SUPERBLOCK.size, offset)
    except OSError as error:
        raise HostError(f"reading {name or 'the image'}: {error.strerror}") from error
    if len(raw) < _SUPERBLOCK.size or size < _SUPERBLOCK.size:
        raise ImageError(f"reading {name or 'the image'}: too short for a SquashFS")
    block = Superblock(raw)
    if block.magic != MAGIC:
        raise ImageError(f"reading {name or 'the image'}: not a SquashFS")
    if (block.major, block.minor) != (4, 0):
        raise ImageError(f"reading {name or 'the image'}: SquashFS of version {block.major}.{block.minor}, and only 4.0 can be read")
    if not 12 <= block.block_log <= 20 or block.block_size != 1 << block.block_log:
        raise damaged(f"block size {block.block_size} (log2 {block.block_log})")
    if block.compression not in COMPRESSIONS:
        raise damaged(f"compression {block.compression} is unknown")
    if block.bytes_used > size:
        raise damaged(f"truncated, {block.bytes_used - size} of its {block.bytes_used} bytes are missing")
    if not block.inodes or not block.ids:
        raise damaged("it counts no inodes or no owners")

    end = block.bytes_used
    if not _SUPERBLOCK.size <= block.inode_table < block.directory_table < block.id_table:
        raise damaged("its tables are out of order")
    tables = [("id", block.id_table, block.ids * 4)]
    if block.fragments:
        tables.append(("fragment", block.fragment_table, block.fragments * 16))
    if block.export_table != NO_TABLE:
        tables.append(("export", block.export_table, block.inodes * 8))
    for what, start, length in tables:
        if start < block.directory_table or start + 8 * -(-length // METADATA_SIZE) > end:
            raise damaged(f"the {what} table lies outside of it")
    if block.xattr_table != NO_TABLE and not block.id_table < block.xattr_table <= end - 16:
        raise damaged("the xattr table lies outside of it")
    if block.inode_table + (block.root >> 16) >= block.directory_table or block.root & 0xFFFF >= METADATA_SIZE:
        raise damaged("the root lies outside of the inode table")
    return block
