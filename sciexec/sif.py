"""The Singularity Image Format: one file that holds an image's file system and what is to be known about it.

    0      +--------------------------+  header, 128 bytes
           |  0  launch     32 bytes  |    "#!/usr/bin/env run-singularity\\n" NUL
           | 32  magic      10        |    "SIF_MAGIC" NUL
           | 42  version     3        |    "01" NUL
           | 45  arch        3        |    of the primary partition, two digits and NUL; "00": there is none
           | 48  uuid       16        |
           | 64  created    i64       |    seconds since 1970
           | 72  modified   i64       |
           | 80  free       i64       |    descriptors not in use
           | 88  total      i64       |    descriptors in the table
           | 96  offset     i64       |    of the table
           |104  size       i64       |    of the table: total * 585
           |112  data       i64       |    where the objects begin
           |120  data size  i64       |    from there to the end of the last object
    4096   +--------------------------+  table of descriptors, 585 bytes each
           |  0  type       i32       |
           |  4  used        u8       |
           |  5  id         u32       |    index in the table + 1
           |  9  group      u32       |    0xF0000000 | group; none: 0xF0000000
           | 13  link       u32       |    an id, or 0xF0000000 | group; none: 0
           | 17  offset     i64  -----------+
           | 25  size       i64       |     |
           | 33  padded     i64       |     |   size + the gap in front of the object
           | 41  created    i64       |     |
           | 49  modified   i64       |     |
           | 57  uid        i64       |     |
           | 65  gid        i64       |     |
           | 73  name      128 bytes  |     |   NUL padded
           |201  extra     384 bytes  |     |   by type; a partition: fs i32, parttype i32, arch 3 bytes
    32176  +--------------------------+  <--+  48 descriptors further: the objects, back to back;
           |  objects                 |        only a partition begins at a multiple of 4096
           +--------------------------+

All integers are little-endian, and nothing is padded.
Source: the files that Apptainer and SingularityCE write, and github.com/sylabs/sif, pkg/sif.

A run imports this module, so it stands on `os` and `struct` alone.
"""

from __future__ import annotations

import os
import struct

from sciexec.errors import HostError, ImageError, LimitError, escaped

DEFFILE = 0x4001
ENVVAR = 0x4002
LABELS = 0x4003
PARTITION = 0x4004
SIGNATURE = 0x4005
GENERIC_JSON = 0x4006
GENERIC = 0x4007
CRYPTO_MESSAGE = 0x4008
SBOM = 0x4009
OCI_ROOT_INDEX = 0x400A
OCI_BLOB = 0x400B

FS_SQUASHFS = 1
FS_EXT3 = 2
FS_ARCHIVE = 3
FS_RAW = 4
FS_ENCRYPTED_SQUASHFS = 5
FS_GOCRYPTFS_SQUASHFS = 6

PART_SYSTEM = 1
PART_PRIMARY = 2
PART_DATA = 3
PART_OVERLAY = 4

# Go's name of an architecture -> its code in header and partition
ARCHITECTURES = {
    "386": "01",
    "amd64": "02",
    "arm": "03",
    "arm64": "04",
    "ppc64": "05",
    "ppc64le": "06",
    "mips": "07",
    "mipsle": "08",
    "mips64": "09",
    "mips64le": "10",
    "s390x": "11",
    "riscv64": "12",
    "loong64": "13",
}

LAUNCH = b"#!/usr/bin/env run-singularity\n"
MAGIC = b"SIF_MAGIC\0"
VERSION = b"01\0"
MAGIC_OFFSET = 32
HEADER_ARCH, HEADER_MODIFIED, HEADER_DATA_SIZE = 45, 72, 120  # places of fields that are written alone

HEADER = struct.Struct("<32s10s3s3s16s8q")
DESCRIPTOR = struct.Struct("<iBIIIqqqqqqq128s384s")
PARTITION_EXTRA = struct.Struct("<ii3s")
SUPERBLOCK = struct.Struct("<40xQ16xQ24x")  # of SquashFS 4.0, two fields of it: bytes used, where the inode table begins

TABLE_OFFSET = 4096
SLOTS = 48
DATA_OFFSET = TABLE_OFFSET + SLOTS * DESCRIPTOR.size
PARTITION_ALIGNMENT = 4096
GROUP_MASK = 0xF0000000

NAME_SIZE = 128
EXTRA_SIZE = 384

MAX_DESCRIPTORS = 1024  # no writer goes beyond 48; the number comes from the file and is multiplied by 585
MAX_OBJECT = 1 << 20  # bytes of an object that is read whole into memory


class Descriptor:
    """One object of the file: what it is and where it lies.  Offsets and sizes are in bytes, times in seconds since 1970."""

    __slots__ = (
        "created", "extra", "gid", "group", "id", "link", "modified", "name",
        "offset", "padded_size", "raw", "size", "type", "uid", "used",
    )  # fmt: skip
    type: int
    used: bool
    id: int
    group: int  # without its mask; 0 for none
    link: int  # an id, or GROUP_MASK | group, or 0
    offset: int
    size: int
    padded_size: int
    created: int
    modified: int
    uid: int
    gid: int
    name: str
    extra: bytes
    raw: bytes  # the 585 bytes as they are, which signatures cover

    def __init__(self, raw: bytes) -> None:
        fields = DESCRIPTOR.unpack(raw)
        self.raw = raw
        self.type, self.used, self.id, self.group, self.link, self.offset, self.size, self.padded_size = fields[:8]
        self.created, self.modified, self.uid, self.gid, name, self.extra = fields[8:]
        self.used = bool(self.used)
        self.group &= ~GROUP_MASK
        self.name = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")

    @property
    def fs(self) -> int:
        """File system of a partition, FS_SQUASHFS and so on; 0 for any other object."""
        return int(PARTITION_EXTRA.unpack_from(self.extra)[0]) if self.type == PARTITION else 0

    @property
    def parttype(self) -> int:
        """Purpose of a partition, PART_PRIMARY and so on; 0 for any other object."""
        return int(PARTITION_EXTRA.unpack_from(self.extra)[1]) if self.type == PARTITION else 0

    @property
    def arch(self) -> str:
        """Architecture of a partition as Go names it; "unknown" for a code that is not known, "" for any other object."""
        return architecture(PARTITION_EXTRA.unpack_from(self.extra)[2]) if self.type == PARTITION else ""


class Sif:
    """The header of a SIF and its used descriptors, in the table's order.  Offsets and sizes are in bytes, times in seconds since 1970."""

    __slots__ = (
        "arch", "created", "data_offset", "data_size", "descriptors", "free", "launch",
        "modified", "name", "table_offset", "table_size", "total", "uuid", "version",
    )  # fmt: skip
    name: str  # of the file, for errors
    launch: str
    version: str
    arch: str  # as Go names it; "unknown" where there is no primary partition
    uuid: bytes
    created: int
    modified: int
    free: int
    total: int
    table_offset: int
    table_size: int
    data_offset: int
    data_size: int
    descriptors: list[Descriptor]

    def __init__(self, header: bytes, name: str) -> None:
        launch, _, version, arch, *numbers = HEADER.unpack(header)
        self.name = name
        self.launch = launch.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        self.version = version.partition(b"\0")[0].decode("ascii", "backslashreplace")
        self.arch = architecture(arch)
        self.uuid, self.created, self.modified, self.free, self.total, self.table_offset, self.table_size = numbers[:7]
        self.data_offset, self.data_size = numbers[7:]
        self.descriptors = []

    def find(self, name: str) -> Descriptor | None:
        """The first object of that name."""
        for descriptor in self.descriptors:
            if descriptor.name == name:
                return descriptor
        return None

    def by_type(self, datatype: int) -> Descriptor | None:
        """The first object of that type, DEFFILE and so on."""
        for descriptor in self.descriptors:
            if descriptor.type == datatype:
                return descriptor
        return None

    @property
    def primary(self) -> Descriptor:
        """The partition that holds the root file system.  Raises ImageError where the file has none."""
        for descriptor in self.descriptors:
            if descriptor.parttype == PART_PRIMARY:
                return descriptor
        data = any(descriptor.parttype == PART_DATA for descriptor in self.descriptors)
        hint = "it holds data: --data shows them in a container" if data else ""
        raise ImageError(f"opening {self.name}: the SIF holds no primary system partition", hint)


def architecture(code: bytes) -> str:
    """Go's name for the two digits of a header or a partition; "unknown" for any that have no name."""
    digits = code.partition(b"\0")[0].decode("ascii", "replace")
    for name, known in ARCHITECTURES.items():
        if known == digits:
            return name
    return "unknown"


def is_sif(head: bytes) -> bool:
    """Whether a file that begins with these bytes (42 or more) claims to be a SIF."""
    return head[MAGIC_OFFSET : MAGIC_OFFSET + len(MAGIC)] == MAGIC


def read(fd: int, name: str) -> Sif:
    """Read header and descriptors: two preads, whatever the file's size.

    Nothing in the file is believed: the table and every object lie inside the file and apart from each other, ids are
    unique, and at most one partition is the primary one, so that no two readers can disagree about what is run.

    Arguments:
        fd: the file, open for reading; its position is not moved.
        name: what to call it in an error.
    Raises ImageError for anything that is not a sound SIF, HostError where the file cannot be read.
    """
    try:
        end = os.fstat(fd).st_size
        header = os.pread(fd, HEADER.size, 0)
        if not is_sif(header):
            raise ImageError(f"opening {name}: not a SIF (no magic number)")
        if len(header) < HEADER.size:
            raise ImageError(f"opening {name}: the SIF ends inside its header")
        sif = Sif(header, name)
        if sif.version != "01":
            raise ImageError(f"opening {name}: SIF version {escaped(sif.version)!r} is not known (01 is)")
        if not 0 <= sif.total <= MAX_DESCRIPTORS:
            raise ImageError(f"opening {name}: the SIF claims {sif.total} descriptors (at most {MAX_DESCRIPTORS} are read)")
        length = sif.total * DESCRIPTOR.size
        if not HEADER.size <= sif.table_offset <= end - length:
            raise ImageError(f"opening {name}: the table of descriptors lies outside the file (truncated?)")
        table = os.pread(fd, length, sif.table_offset)
    except OSError as error:
        raise HostError(f"reading {name}: {error.strerror}") from error
    if len(table) < length:
        raise ImageError(f"opening {name}: the file ends inside its table of descriptors")
    for start in range(0, length, DESCRIPTOR.size):
        if table[start + 4]:
            sif.descriptors.append(Descriptor(table[start : start + DESCRIPTOR.size]))
    _check(sif, end)
    return sif


def _check(sif: Sif, end: int) -> None:
    """Refuse objects outside the file of `end` bytes, objects that share bytes, ids used twice, a second primary partition."""
    ids = set()
    primaries = 0
    extents = [(0, HEADER.size, 0), (sif.table_offset, sif.total * DESCRIPTOR.size, 0)]
    for descriptor in sif.descriptors:
        if descriptor.id == 0 or descriptor.id in ids:
            raise ImageError(f"opening {sif.name}: SIF object id {descriptor.id} is zero or used twice")
        ids.add(descriptor.id)
        partition = descriptor.type == PARTITION
        if descriptor.size < partition or not 0 <= descriptor.offset <= end - descriptor.size:
            raise ImageError(
                f"opening {sif.name}: SIF object {descriptor.id} (offset {descriptor.offset}, size {descriptor.size})"
                f" lies outside the file of {end} bytes",
                "the file is truncated or damaged; pull it again",
            )
        primaries += descriptor.parttype == PART_PRIMARY
        if descriptor.size:
            extents.append((descriptor.offset, descriptor.size, descriptor.id))
    if primaries > 1:
        raise ImageError(f"opening {sif.name}: the SIF holds {primaries} primary system partitions, one is allowed")
    extents.sort()
    for (offset, size, first), (following, _, second) in zip(extents, extents[1:]):
        if offset + size > following:
            raise ImageError(f"opening {sif.name}: SIF objects {first} and {second} overlap (0 is the header)")


def read_object(fd: int, sif: Sif, descriptor: Descriptor, limit: int = MAX_OBJECT) -> bytes:
    """The bytes of one object.

    Raises LimitError above `limit` bytes, ImageError where the file shrank meanwhile, HostError where it cannot be read.
    """
    what = f"reading {sif.name}: SIF object {descriptor.id}"
    if descriptor.size > limit:
        raise LimitError(f"{what} has {descriptor.size} bytes, more than {limit}")
    try:
        data = os.pread(fd, descriptor.size, descriptor.offset)
    except OSError as error:
        raise HostError(f"{what}: {error.strerror}") from error
    if len(data) < descriptor.size:
        raise ImageError(f"{what} ends early (the file was truncated)")
    return data


class Builder:
    """Writes a SIF with one partition, front to back, so that the file system can be streamed into its place.

        builder = Builder(fd, arch="amd64", created=0)
        builder.add(DEFFILE, "", b"bootstrap: docker\\n...")
        ... write the SquashFS at builder.partition_offset() ...
        builder.finish(partition_size)

    The same calls give the same bytes.  The header is written last: until then no reader takes the file for a SIF.
    OSErrors are passed on: the caller knows the path.

    Arguments:
        fd: an empty file, open for reading and writing; its position is not used.
        arch: Go's name of the architecture; one without a code is written as unknown.
        created: seconds since 1970, the only time that gets into the file.
    """

    def __init__(self, fd: int, *, arch: str, created: int) -> None:
        self._fd = fd
        self._arch = ARCHITECTURES.get(arch, "00").encode() + b"\0"
        self._created = created
        self._end = DATA_OFFSET
        self._table: list[bytes] = []
        self._objects: list[bytes] = []

    def add(self, datatype: int, name: str, data: bytes, extra: bytes = b"", group: int = 1) -> None:
        """Write an object in front of the partition.

        Arguments:
            name: at most 127 bytes in UTF-8.
            extra: at most 384 bytes, by type.
            group: 0 for none.
        """
        self._describe(datatype, name, (self._end, len(data)), extra, group)
        self._objects.append(data)
        _write(self._fd, data, self._end)
        self._end += len(data)

    def partition_offset(self) -> int:
        """Where the file system begins, in bytes; final once everything is added."""
        return -(-self._end // PARTITION_ALIGNMENT) * PARTITION_ALIGNMENT

    def finish(self, partition_size: int, *, fs: int = FS_SQUASHFS, parttype: int = PART_PRIMARY, name: str = "") -> None:
        """Describe the partition, whose bytes are in the file already, and write table and header.

        Arguments:
            partition_size: bytes, padding at its end included; the file is cut or extended to end there.
            name: of the partition, at most 127 bytes in UTF-8.
        """
        offset = self.partition_offset()
        extra = PARTITION_EXTRA.pack(fs, parttype, self._arch)
        self._describe(PARTITION, name, (offset, partition_size), extra, 1)
        self._end = offset + partition_size
        os.ftruncate(self._fd, self._end)
        arch = self._arch if parttype == PART_PRIMARY else b"00\0"
        uuid = self._uuid(arch, offset, partition_size, fs)
        _write(self._fd, b"".join(self._table), TABLE_OFFSET)
        _write(self._fd, self._header(arch, uuid), 0)

    def _describe(self, datatype: int, name: str, extent: tuple[int, int], extra: bytes, group: int) -> None:
        raw_name = name.encode("utf-8", "surrogateescape")
        if len(self._table) == SLOTS or len(raw_name) >= NAME_SIZE or len(extra) > EXTRA_SIZE:
            raise ValueError(f"SIF object {name!r}: the table is full, or name or extra data are too long")
        head = datatype, 1, len(self._table) + 1, GROUP_MASK | group, 0
        offset, size = extent
        padded_size = offset - self._end + size
        times = self._created, self._created
        self._table.append(DESCRIPTOR.pack(*head, *extent, padded_size, *times, 0, 0, raw_name, extra))

    def _header(self, arch: bytes, uuid: bytes) -> bytes:
        times = self._created, self._created
        table = SLOTS - len(self._table), SLOTS, TABLE_OFFSET, SLOTS * DESCRIPTOR.size
        return HEADER.pack(LAUNCH, MAGIC, VERSION, arch, uuid, *times, *table, DATA_OFFSET, self._end - DATA_OFFSET)

    def _uuid(self, arch: bytes, offset: int, size: int, fs: int) -> bytes:
        """A UUID of version 8 (RFC 9562, section 5.8) from the content: the first 128 bits of the SHA-256 over

            the header with a zero UUID, every descriptor, every object in front of the partition, and of the partition
            the SquashFS superblock and all tables behind the file data (of another file system everything),

        with the six bits of version and variant set.  File data is left out: reading a large image once more would cost
        more than the name is worth, and an imported image names its manifest's digest, and so its data, in an object.
        """
        import hashlib  # here: a run never writes a SIF

        sha = hashlib.sha256(self._header(arch, bytes(16)))
        for part in (*self._table, *self._objects):
            sha.update(part)
        start = 0
        if fs == FS_SQUASHFS and size >= SUPERBLOCK.size:
            superblock = os.pread(self._fd, SUPERBLOCK.size, offset)
            sha.update(superblock)
            used, inode_table = SUPERBLOCK.unpack(superblock)
            start, size = min(inode_table, size), min(used, size)
        while start < size:
            chunk = os.pread(self._fd, min(1 << 20, size - start), offset + start)
            if not chunk:
                break
            sha.update(chunk)
            start += len(chunk)
        uuid = bytearray(sha.digest()[:16])
        uuid[6] = uuid[6] & 0x0F | 0x80
        uuid[8] = uuid[8] & 0x3F | 0x80
        return bytes(uuid)


def add_partition(
    fd: int, sif: Sif, extent: tuple[int, int], *, fs: int, parttype: int, created: int, name: str = "", apart: bool = False
) -> int:
    """Describe a file system that lies behind the last object already, and give back the id of the new object.

    First the descriptor, then the header, each on the disk before the next is written: the table says itself which of its
    slots are in use, so a reader finds the whole partition or none.  OSErrors are passed on: the caller knows the path.

    Arguments:
        fd: the file, open for reading and writing.  sif: what was read of it.
        extent: (offset, size) in bytes; the file ends there.  created: seconds since 1970.
        name: at most 127 bytes in UTF-8.
        apart: in a group of its own, to be signed by itself; a signature of the other objects then stays what it is.
    Raises ImageError where the table is full.
    """
    if not sif.free or len(sif.descriptors) == sif.total:
        raise ImageError(f"adding to {sif.name}: all of its {sif.total} descriptors are in use")
    slots = os.pread(fd, sif.total * DESCRIPTOR.size, sif.table_offset)[4 :: DESCRIPTOR.size]
    slot = slots.index(0)
    arch = os.pread(fd, 3, HEADER_ARCH)
    end = max((descriptor.offset + descriptor.size for descriptor in sif.descriptors), default=sif.data_offset)
    padded_size = extent[0] - end + extent[1]
    group = max((descriptor.group for descriptor in sif.descriptors), default=0) + 1 if apart else 1
    head = PARTITION, 1, slot + 1, GROUP_MASK | group, 0
    raw_name, extra = name.encode("utf-8", "surrogateescape"), PARTITION_EXTRA.pack(fs, parttype, arch)
    raw = DESCRIPTOR.pack(*head, *extent, padded_size, created, created, 0, 0, raw_name, extra)
    _write(fd, raw, sif.table_offset + slot * DESCRIPTOR.size)
    os.fsync(fd)
    numbers = struct.pack("<qq", created, sif.free - 1), struct.pack("<q", extent[0] + extent[1] - sif.data_offset)
    _write(fd, numbers[0], HEADER_MODIFIED)
    _write(fd, numbers[1], HEADER_DATA_SIZE)
    os.fsync(fd)
    return slot + 1


def _write(fd: int, data: bytes, offset: int) -> None:
    """pwrite all of `data`, in as many calls as the kernel takes."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
