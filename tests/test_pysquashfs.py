"""The SquashFS writer: what the tools of others find in its images, and what it refuses to write."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from squashfs_fixtures import (
    EVERYTHING,
    NOISE,
    TEXT,
    Need,
    Tree,
    content,
    directory,
    everything,
    file,
    read,
    run,
    sha,
    sparse_sha,
    store,
    symlink,
    write,
)  # fmt: skip

from sciexec import _pysquashfs
from sciexec.errors import HostError, ImageError, LimitError
from sciexec.pysquashfs import COMPRESSIONS, EMPTY, NO_XATTR, Node, Reader, Writer


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("image") / "image.sqfs", everything, mtime=1_700_000_000)


# --- what others make of it -----------------------------------------------------------------------------------------------------


def test_unsquashfs_lists_every_kind_with_its_attributes(image: Path, need: Need) -> None:
    listing = run(need("unsquashfs"), "-UTC", "-d", "", "-llnumeric", image)
    lines = {line.split(maxsplit=5)[-1]: line for line in listing.splitlines() if line}
    assert lines["/hello"].split()[:5] == ["-rwsr-xr-x", "1000/50", "5", "2020-09-13", "12:26"]
    assert lines["/dir/hard link"].split()[:2] == ["-rwsr-xr-x", "1000/50"]
    assert lines["/sparse"].split()[2] == str((1 << 26) + len(TEXT) + 5 + 1 + (1 << 20) + 3 + 70_000)
    assert lines["/dir"].startswith("drwx-----T")
    assert lines["/dir/link -> ../hello"].startswith("lrwxrwxrwx")
    assert [line.split()[:4] for line in listing.splitlines() if line.endswith("/dir/null")] == [["crw-rw-rw-", "0/0", "1,", "3"]]
    assert lines["/dir/fifo"].startswith("prw")
    assert lines["/dir/socket"].startswith("srw")


def test_rdsquashfs_sees_the_largest_device(image: Path, need: Need) -> None:
    assert "nod dir/disk 0660 0 6 b 4095 1048575" in run(need("rdsquashfs"), "-d", image).splitlines()


def test_unsquashfs_reads_the_superblock(image: Path, need: Need) -> None:
    told = run(need("unsquashfs"), "-UTC", "-s", image)
    assert "Compression zstd\n\tcompression-level 3\n" in told
    assert "Tue Nov 14 22:13:20 2023" in told
    assert "Number of inodes 16\n" in told
    assert "not exportable" in told


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("block_size", [4096, 131072, 1 << 20])
def test_all_compressions_and_block_sizes_are_unpacked_by_others(compression: str, block_size: int, need: Need, tmp_path: Path) -> None:
    path = write(tmp_path / "image.sqfs", everything, compression=compression, block_size=block_size, level=1)
    target = tmp_path / "out"
    subprocess.run([need("unsquashfs"), "-q", "-n", "-d", str(target), str(path)], capture_output=True, check=False)  # 2: no mknod for us
    for name, data in EVERYTHING.items():
        assert (target / name).read_bytes() == data
    assert sha(target / "sparse") == sparse_sha()
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 23
    assert (target / "hello").stat().st_ino == (target / "dir/hard link").stat().st_ino
    assert (target / "hello").stat().st_mtime == 1_600_000_000
    reader = read(path)
    assert reader.superblock().compression_name == compression
    for name, data in EVERYTHING.items():
        assert content(reader, name) == data


@pytest.mark.parametrize(("compression", "level"), [("lz4", 12), ("gzip", 1), ("xz", 9), ("zstd", 19), ("zstd", None)])
def test_levels(compression: str, level: int | None, need: Need, tmp_path: Path) -> None:
    path = write(tmp_path / "image.sqfs", lambda writer: {b"text": file(store(writer, TEXT))}, compression=compression, level=level)
    assert run(need("unsquashfs"), "-cat", path, "text").encode() == TEXT


@pytest.mark.parametrize(
    "settings", [{"compression": "lzo"}, {"level": 23}, {"compression": "gzip", "level": 0}, {"block_size": 5000}, {"block_size": 0}]
)
def test_settings_that_cannot_be(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="^writing the image: "):
        write(tmp_path / "image.sqfs", lambda writer: {}, **settings)


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    images = [write(tmp_path / f"{workers}.sqfs", everything, workers=workers).read_bytes() for workers in (1, 2, 5)]
    assert images[0] == images[1] == images[2]


def test_one_image_at_an_offset_in_a_larger_file(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"header" * 2000 + bytes(1 << 24))  # what lies behind the offset is lost
    write(path, everything, offset=8192, mtime=1_700_000_000)
    whole = path.read_bytes()
    assert whole[:8192] == (b"header" * 2000)[:8192]
    assert whole[8192:] == image.read_bytes()
    with path.open("rb") as opened:
        assert content(Reader(opened.fileno(), 8192, "large"), "text") == TEXT


def test_equal_files_are_stored_once(tmp_path: Path) -> None:
    def copies(count: int) -> Callable[[Writer], Tree]:
        return lambda writer: {b"%d" % n: file(store(writer, NOISE[:-1], NOISE[-1:])) for n in range(count)}

    one = write(tmp_path / "one", copies(1)).stat().st_size
    many = write(tmp_path / "many", copies(100)).stat().st_size
    assert many <= one + 4096


def test_files_of_equal_checksum_and_size_stay_different(tmp_path: Path, need: Need) -> None:
    """libsquashfs looks for equal data by XXH32, of which 2**16 files have two alike by chance."""
    pair = xxh32_collision()
    path = write(tmp_path / "image.sqfs", lambda writer: {b"%d" % n: file(store(writer, data)) for n, data in enumerate(pair)})
    assert [run(need("unsquashfs"), "-cat", path, str(n)) for n in range(2)] == [data.decode("latin-1") for data in pair]


def xxh32_collision() -> tuple[bytes, bytes]:
    """Two texts of eight bytes with the same XXH32 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md)."""
    prime2, prime3, prime4, prime5, mask = 2246822519, 3266489917, 668265263, 374761393, 0xFFFFFFFF
    seen: dict[int, bytes] = {}
    for number in range(1 << 19):
        data = hashlib.md5(b"%d" % number).hexdigest()[:8].encode()
        value = prime5 + len(data)
        for lane in struct.unpack("<2I", data):
            value = (value + lane * prime3) & mask
            value = ((value << 17 | value >> 15) * prime4) & mask
        value = (value ^ value >> 15) * prime2 & mask
        value = (value ^ value >> 13) * prime3 & mask
        value ^= value >> 16
        other = seen.setdefault(value, data)
        if other != data:
            return other, data
    raise AssertionError("no collision")


@pytest.mark.parametrize("sets", [1, 511, 512, 513, 1536, 5000])
def test_extended_attributes(sets: int, tmp_path: Path, need: Need) -> None:
    def make(writer: Writer) -> Tree:
        long = b"long " * 2000
        return {
            b"%d" % n: file(EMPTY, xattr=writer.xattrs({b"user.n": b"%d" % n, b"security.long": long, b"trusted.nul": b"a\0b"}))
            for n in range(sets)
        }

    path = write(tmp_path / "image.sqfs", make)
    reader = read(path)
    for n in {0, sets // 2, sets - 1}:
        entry = reader.lookup(b"%d" % n)
        assert entry is not None
        assert reader.xattrs(entry) == {b"user.n": b"%d" % n, b"security.long": b"long " * 2000, b"trusted.nul": b"a\0b"}
        assert f"user.n={n}\n" in run(need("rdsquashfs"), "-x", f"/{n}", path)


def test_every_kind_can_have_extended_attributes(tmp_path: Path, need: Need) -> None:
    def make(writer: Writer) -> Tree:
        x = writer.xattrs({b"user.a": b"1"})
        return {
            b"f": file(EMPTY, xattr=x), b"d": Node("d", 0o755, 0, 0, 0, x, {}), b"l": Node("l", 0o777, 0, 0, 0, x, b"f"),
            b"c": Node("c", 0o600, 0, 0, 0, x, (5, 1)), b"b": Node("b", 0o600, 0, 0, 0, x, (8, 1)),
            b"p": Node("p", 0o600, 0, 0, 0, x), b"s": Node("s", 0o600, 0, 0, 0, x),
        }  # fmt: skip

    path = write(tmp_path / "image.sqfs", make)
    reader = read(path)
    for name, entry in reader.walk():
        assert reader.xattrs(entry) == ({b"user.a": b"1"} if name else {})
        assert not name or run(need("rdsquashfs"), "-x", os.fsdecode(name), path) == "user.a=1\n"


@pytest.mark.parametrize("key", [b"system.posix_acl_access", b"user.", b"user", b"user.a\0b", b"user." + b"k" * 251])
def test_extended_attributes_that_cannot_be(key: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="extended attribute"):
        write(tmp_path / "image.sqfs", lambda writer: {b"f": file(EMPTY, xattr=writer.xattrs({key: b""}))})


def test_a_hundred_thousand_entries_and_as_many_hard_links(tmp_path: Path, need: Need) -> None:
    def make(writer: Writer) -> Tree:
        linked = file(store(writer, b"linked"))
        return {
            b"files": directory({b"a file with number %06d" % n: file(EMPTY) for n in range(100_000)}),
            b"links": directory({b"%06d" % n: linked for n in range(100_000)}),
            b"mixed": directory({b"%05d" % n: directory({}) if n % 2 else file(EMPTY) for n in range(2000)}),
        }

    path = write(tmp_path / "image.sqfs", make)
    listing = run(need("unsquashfs"), "-l", "-d", "", path).splitlines()
    assert len([line for line in listing if line.startswith("/files/")]) == 100_000
    assert len([line for line in listing if line.startswith("/links/")]) == 100_000
    assert run(need("rdsquashfs"), "-c", "links/077777", path) == "linked"
    reader = read(path)
    entry = reader.lookup(b"links/099999")
    assert entry is not None
    assert entry.links == 100_000
    mixed = reader.lookup(b"mixed")
    assert mixed is not None
    assert mixed.links == 1002  # as find(1) counts on
    assert len(reader.listdir(mixed)) == 2000


def test_deep_directories_need_no_recursion(tmp_path: Path) -> None:
    top: Tree = {}
    below = top
    for _ in range(100_000):
        below[b"d"] = directory({})
        below = below[b"d"].payload
    reader = read(write(tmp_path / "image.sqfs", lambda _: top))
    assert reader.superblock().inodes == 100_001
    with pytest.raises(LimitError, match="512 deep"):
        list(reader.walk())


def test_a_tree_can_be_written_twice(tmp_path: Path) -> None:
    linked = file(EMPTY)
    tree = {b"a": linked, b"b": linked, b"c": directory({b"d": directory({})})}
    images = [write(tmp_path / str(n), lambda _: tree).read_bytes() for n in range(2)]
    assert images[0] == images[1]


def test_times_outside_of_32_bits_are_moved_inside(tmp_path: Path) -> None:
    reader = read(write(tmp_path / "i", lambda _: {b"old": file(EMPTY, mtime=-5), b"new": file(EMPTY, mtime=1 << 70)}, mtime=1 << 40))
    assert [entry.mtime for _, entry in reader.walk()] == [1, 0xFFFFFFFF, 0]
    assert reader.superblock().mtime == 0xFFFFFFFF


def test_owners(tmp_path: Path) -> None:
    def make(count: int) -> Callable[[Writer], Tree]:
        return lambda _: {b"%d" % n: file(EMPTY, uid=n, gid=0xFFFFFFFF - n) for n in range(count)}

    reader = read(write(tmp_path / "most", make(32767)))  # with root's 65,535: as many as there can be
    entry = reader.lookup(b"32766")
    assert entry is not None
    assert (entry.uid, entry.gid) == (32766, 0xFFFFFFFF - 32766)
    with pytest.raises(ImageError, match="more than 65535 different owners"):
        write(tmp_path / "more", make(32769))
    with pytest.raises(ImageError, match="owner 4294967296"):
        write(tmp_path / "wide", lambda _: {b"f": file(EMPTY, uid=1 << 32)})


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"n" * 256])
def test_names_that_cannot_be(name: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="cannot be called"):
        write(tmp_path / "image.sqfs", lambda _: {name: file(EMPTY)})
    with pytest.raises(ImageError, match="cannot be called"):
        write(tmp_path / "image.sqfs", lambda _: {name: directory({})})


@pytest.mark.parametrize(
    "node",
    [
        symlink(b""), symlink(b"t" * 4096), symlink(b"a\0b"), Node("c", 0, 0, 0, 0, NO_XATTR, (4096, 0)),
        Node("b", 0, 0, 0, 0, NO_XATTR, (0, 1 << 20)), Node("f", 0, 0, 0, 0), Node("f", 0, 0, 0, 0, NO_XATTR, 99),
    ],
)  # fmt: skip
def test_nodes_that_cannot_be(node: Node, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="^writing the image: "):
        write(tmp_path / "image.sqfs", lambda _: {b"x": node})


def test_a_directory_has_one_name(tmp_path: Path) -> None:
    twice = directory({})
    with pytest.raises(ImageError, match="is in the tree twice"):
        write(tmp_path / "image.sqfs", lambda _: {b"a": twice, b"b": twice})
    twice.payload[b"itself"] = twice
    with pytest.raises(ImageError, match="is in the tree twice"):
        write(tmp_path / "image.sqfs", lambda _: {b"a": twice})


def test_holes_of_any_shape(tmp_path: Path, need: Need) -> None:
    shapes: list[list[bytes | int]] = [
        [4096], [4095], [1], [8192, b"a"], [b"a", 8192], [b"a" * 4096, 8192, b"b" * 4096], [b"a" * 4096, 4096],
        [b"ab", 4094, b"c" * 5000, 12_288],
        [100, 100, 100, b"x"], [40960, 40960, b"x" * 10, 40960, 1], [b"a" * 10000, 10000, b"b" * 10000, 10000, b"c" * 10000],
    ]  # fmt: skip
    whole = [b"".join(bytes(piece) if isinstance(piece, int) else piece for piece in shape) for shape in shapes]
    path = write(
        tmp_path / "image.sqfs", lambda writer: {b"%d" % n: file(store(writer, *shape)) for n, shape in enumerate(shapes)}, block_size=4096
    )
    reader = read(path)
    for n, data in enumerate(whole):
        assert content(reader, str(n)) == data
        assert run(need("rdsquashfs"), "-c", str(n), path).encode() == data
        assert run(need("unsquashfs"), "-cat", path, str(n)).encode() == data


def test_a_hole_of_a_tebibyte_costs_nothing_and_larger_ones_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "image.sqfs", lambda writer: {b"f": file(store(writer, 1 << 40, b"end"))})
    assert path.stat().st_size < 1 << 17
    entry = read(path).lookup(b"f")
    assert entry is not None
    assert entry.size == (1 << 40) + 3
    for size in (1 << 42, 1 << 63, 1 << 80):
        with pytest.raises(LimitError, match="sparse"):
            write(tmp_path / "image.sqfs", lambda writer, size=size: {b"f": file(store(writer, size))})  # type: ignore[misc]


# --- when the disk fails ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_says_so() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(HostError, match="^writing the image: No space left on device$") as caught:
        Writer(fd, 0)
    assert "room" in caught.value.hint


def test_a_file_that_cannot_be_read_back_says_so(tmp_path: Path) -> None:
    """Equal data are compared with what is on disk; where that fails, libsquashfs must not be cleaned up."""
    fd = os.open(tmp_path / "image", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(HostError, match="^writing the image: Bad file descriptor$"), Writer(fd, 0) as writer:
        for _ in range(3):  # more than libsquashfs keeps in flight
            for n in range(300):
                store(writer, NOISE[n * 900 : n * 900 + 3000])
        writer.finish(directory({}))


@pytest.mark.parametrize("size", [4096, 100_000, 250_000])
def test_a_limit_on_file_sizes_ends_in_one_line(size: int, tmp_path: Path) -> None:
    program = f"""
import os, random, resource
from sciexec.pysquashfs import *
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
noise = random.Random(1)
try:
    with Writer(os.open({str(tmp_path / "image")!r}, os.O_RDWR | os.O_CREAT), 0) as writer:
        tree = {{}}
        for n in range(100):
            writer.file()
            writer.append(noise.randbytes(n * 1000))
            tree[b"%d" % n] = Node("f", 0, 0, 0, 0, NO_XATTR, writer.end())
        writer.finish(Node("d", 0, 0, 0, 0, NO_XATTR, tree))
except Exception as error:
    print(type(error).__name__, error)
"""
    assert run(sys.executable, "-c", program) == "HostError writing the image: File too large\n"


def test_memory_stays_small(tmp_path: Path) -> None:
    program = f"""
import os
from sciexec.pysquashfs import *
with Writer(os.open({str(tmp_path / "image")!r}, os.O_RDWR | os.O_CREAT), 0) as writer:
    root = Node("d", 0o755, 0, 0, 0, NO_XATTR, {{}})
    for n in range(300_000):
        if n % 100 == 0:
            directory = root.payload[b"%d" % n] = Node("d", 0o755, 0, 0, 0, NO_XATTR, {{}})
        directory.payload[b"module_%d.py" % n] = Node("f", 0o644, 0, 0, 1_600_000_000 + n // 100, NO_XATTR, EMPTY)
    writer.finish(root)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    assert int(run(sys.executable, "-c", program)) < 120 << 10  # KiB: 300 bytes a file and the interpreter


# --- the boundary to C --------------------------------------------------------------------------------------------------------------


def test_sizes_of_structures_are_those_of_libsquashfs_1() -> None:
    assert [_pysquashfs.lib.abi_size(n) for n in range(6)] == [96, 64, 56, 32, 48, 16]


def test_more_than_announced_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with Writer(os.open(tmp_path / "i", os.O_RDWR | os.O_CREAT), 0) as writer:
        writer.file(3)
        writer.append(b"abc")
        with pytest.raises(ValueError, match="3 bytes"):
            writer.append(b"d")


def test_a_writer_may_be_dropped_at_any_time(tmp_path: Path) -> None:
    for steps in range(4):
        writer = Writer(os.open(tmp_path / str(steps), os.O_RDWR | os.O_CREAT), 0)
        if steps > 0:
            writer.file()
        if steps > 1:
            writer.append(TEXT)
        if steps > 2:
            writer.end()
        writer.close()
        writer.close()


@pytest.mark.root
def test_the_kernel_agrees(image: Path, tmp_path: Path) -> None:
    command = ["mount", "-o", "loop,ro", "-t", "squashfs", str(image), str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"the kernel does not mount SquashFS: {mounted.stderr.strip()}")
    try:
        for name, data in EVERYTHING.items():
            assert (tmp_path / name).read_bytes() == data
        assert sha(tmp_path / "sparse") == sparse_sha()
        assert (tmp_path / "sparse").stat().st_blocks * 512 < 1 << 21
        assert (tmp_path / "dir/disk").stat().st_rdev == os.makedev(4095, 1048575)
        assert (tmp_path / "hello").stat().st_nlink == 2
        assert os.getxattr(tmp_path / "hello", "user.colour") == b"blue"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
