"""The SquashFS reader: images of others, without libsquashfs too, unpacking, and images that are damaged or made to do harm."""

from __future__ import annotations

import os
import random
import stat
import struct
import sys
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
    everything,
    file,
    read,
    run,
    sha,
    sparse_sha,
    store,
    write,
)  # fmt: skip

from sciexec import squashfs
from sciexec.errors import HostError, ImageError, LimitError, SciexecError
from sciexec.pysquashfs import COMPRESSIONS, NO_XATTR, Reader, Writer


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("image") / "image.sqfs", everything, mtime=1_700_000_000)


# --- reading and unpacking ----------------------------------------------------------------------------------------------------------


def test_lookup(image: Path) -> None:
    reader = read(image)
    link = reader.lookup(b"/dir/./link")
    assert link is not None
    assert (link.kind, link.target) == ("l", b"../hello")
    disk = reader.lookup(b"dir/disk")
    assert disk is not None
    assert (disk.kind, disk.rdev, disk.gid) == ("b", (4095, 1048575), 6)
    for nowhere in (b"nothing", b"dir/link/x", b"hello/x", b"..", b"dir/../hello"):
        assert reader.lookup(nowhere) is None
    assert reader.lookup(b"") is reader.root
    entry = reader.lookup(b"text")
    assert entry is not None
    with pytest.raises(LimitError):
        reader.read(entry, len(TEXT) - 1)
    with pytest.raises(ImageError):
        reader.read(reader.root, 100)


@pytest.mark.parametrize("compression", ["gzip", "lzo", "lz4", "xz", "zstd"])
def test_images_of_mksquashfs_are_read_and_unpacked(compression: str, tmp_path: Path, need: Need) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for n in range(300):
        (source / f"file {n}").write_bytes(TEXT[: n * n])
    (source / "noise").write_bytes(NOISE)
    with (source / "sparse").open("wb") as opened:
        opened.seek(5_000_000)
        opened.write(TEXT)
    os.setxattr(source / "noise", "user.a", b"1")
    (source / "ro").mkdir()
    (source / "ro/link").symlink_to("../noise")
    os.link(source / "noise", source / "ro/hard")
    (source / "ro").chmod(0o500)
    (source / "noise").chmod(0o6751)
    path = tmp_path / "image.sqfs"
    run(need("mksquashfs"), source, path, "-comp", compression, "-quiet", "-no-progress", "-no-exports")
    if compression == "lzo":  # Debian's libsquashfs has none
        with pytest.raises(HostError, match="lzo"):
            read(path)
        return
    target = tmp_path / "target"
    target.mkdir()
    assert read(path).unpack(os.open(target, os.O_RDONLY)) == (0, 0)
    run("diff", "-r", "--no-dereference", source, target)
    noise = (target / "noise").stat()
    assert stat.S_IMODE(noise.st_mode) == 0o751
    assert noise.st_mtime == int((source / "noise").stat().st_mtime)
    assert os.getxattr(target / "noise", "user.a") == b"1"
    assert noise.st_nlink == 2
    assert (target / "ro/hard").stat().st_ino == noise.st_ino
    assert stat.S_IMODE((target / "ro").stat().st_mode) == 0o700
    assert (target / "ro").stat().st_mtime == int((source / "ro").stat().st_mtime)
    assert (target / "sparse").stat().st_blocks * 512 < 2_000_000


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_without_libsquashfs_the_standard_library_reads(compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "image.sqfs", everything, compression=compression, level=1)
    monkeypatch.setitem(sys.modules, "sciexec._pysquashfs", None)
    reader = read(path)
    for name, data in EVERYTHING.items():
        assert content(reader, name) == data


def test_without_libsquashfs_writing_says_what_to_install() -> None:
    program = """
import sys
sys.modules["sciexec._pysquashfs"] = None
from sciexec import errors, pysquashfs
try:
    pysquashfs.Writer(1, 0)
except errors.HostError as error:
    print(error.hint)
"""
    assert "libsquashfs-dev" in run(sys.executable, "-c", program)


def test_unpacking_leaves_devices_out_and_special_bits(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert read(image).unpack(os.open(target, os.O_RDONLY)) == (2, 1)
    assert stat.S_IMODE((target / "hello").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "dir").stat().st_mode) == 0o1700
    assert stat.S_ISFIFO((target / "dir/fifo").stat().st_mode)
    assert not (target / "dir/null").exists()
    assert (target / os.fsdecode(b"dir/\xff\xfe")).read_bytes() == b"a name that is no UTF-8"
    assert sha(target / "sparse") == sparse_sha()


def test_unpacking_touches_nothing_that_is_there(image: Path, tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "dir").symlink_to(outside)
    with pytest.raises(HostError, match="unpacking .*/dir: File exists"):
        read(image).unpack(os.open(target, os.O_RDONLY))
    assert list(outside.iterdir()) == []


def test_unpacking_no_more_than_wanted(image: Path, tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="more data"):
        read(image).unpack(os.open(tmp_path, os.O_RDONLY), max_bytes=1000)


def test_a_copy_has_all_that_the_image_has(image: Path, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    with Writer(fd, 0, mtime=1_700_000_000) as writer:
        writer.finish(read(image).copy(writer))
    one, other = read(image), read(tmp_path / "copy")
    for (path, entry), (path2, entry2) in zip(one.walk(), other.walk()):
        assert path == path2
        for name in ("kind", "mode", "uid", "gid", "mtime", "links", "size", "target", "rdev"):
            assert getattr(entry, name) == getattr(entry2, name)
        assert one.xattrs(entry) == other.xattrs(entry2)
        if entry.kind == "f":
            assert list(map(bytes_of, one.pieces(entry))) == list(map(bytes_of, other.pieces(entry2)))
    assert (tmp_path / "copy").stat().st_size <= image.stat().st_size


def bytes_of(piece: tuple[int, memoryview]) -> tuple[int, bytes]:
    return piece[0], bytes(piece[1])


# --- damaged and hostile images -----------------------------------------------------------------------------------------------------


def exhaust(path: Path) -> None:
    """All that a reader can do; damage ends in one of our errors, or goes unseen."""
    fd = os.open(path, os.O_RDONLY)
    try:
        reader = Reader(fd, 0, "damaged")
        for _, entry in reader.walk():
            reader.xattrs(entry)
            if entry.kind == "f" and entry.size < 1 << 24:
                reader.read(entry, 1 << 24)
    except SciexecError as error:
        assert "\n" not in error.message
    finally:
        os.close(fd)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_flipped_bits_and_cut_ends(compression: str, tmp_path: Path) -> None:
    def small(writer: Writer) -> Tree:
        return {name: node for name, node in everything(writer).items() if name in (b"hello", b"text", b"dir")}

    path = write(tmp_path / "image.sqfs", small, compression=compression, level=1)
    good = path.read_bytes()
    used = squashfs.Superblock(good[:96]).bytes_used
    tables = squashfs.Superblock(good[:96]).inode_table
    chance = random.Random(compression)
    places = [*range(96 * 8), *(chance.randrange(tables * 8, used * 8) for _ in range(600))]
    for place in [*places, *(chance.randrange(used * 8) for _ in range(100))]:
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        exhaust(path)
    for length in [*range(100), *(chance.randrange(used) for _ in range(50))]:
        path.write_bytes(good[:length])
        with pytest.raises(ImageError):
            read(path)


NO_TABLE = squashfs.NO_TABLE


def forge(path: Path, table: bytes, listing: bytes = b"", data: bytes = b"", root: int = 0, **fields: int) -> Reader:
    """An image of one metadata block of inodes and one of listings, all uncompressed; data is at 96, and is its one fragment too."""

    def metadata(block: bytes) -> bytes:
        return struct.pack("<H", len(block) | 0x8000) + block

    image = bytes(96) + data
    inode_table = len(image)
    image += metadata(table)
    directory_table = len(image)
    image += metadata(listing) if listing else b""
    fragment_table = len(image) + 18
    image += metadata(struct.pack("<QII", 96, fields.pop("fragment_size", len(data) | 1 << 24), 0)) + struct.pack("<Q", fragment_table - 18)
    id_table = len(image) + 6
    image += metadata(bytes(4)) + struct.pack("<Q", id_table - 6)
    values = {
        "magic": squashfs.MAGIC, "inodes": 10, "mtime": 0, "block_size": 4096, "fragments": 1,
        "compression": 1, "block_log": 12, "flags": 0, "ids": 1, "major": 4, "minor": 0,
        "root": root, "bytes_used": len(image), "id_table": id_table, "xattr_table": NO_TABLE,
        "inode_table": inode_table, "directory_table": directory_table, "fragment_table": fragment_table, "export_table": NO_TABLE,
        **fields,
    }  # fmt: skip
    path.write_bytes(struct.pack("<5I6H8Q", *values.values()) + image[96:])
    return read(path)


def base(kind: int, uid: int = 0) -> bytes:
    return struct.pack("<4H2I", kind, 0o755, uid, 0, 0, 1)


def top(size: int, start: int = 0, offset: int = 0) -> bytes:
    return base(1) + struct.pack("<IIHHI", start, 2, size + 3, offset, 1)


def entries(*names: bytes, place: int = 32, count: int = 0) -> bytes:
    listing = struct.pack("<III", (count or len(names)) - 1, 0, 1)
    for name in names:
        listing += struct.pack("<HhHH", place, 0, 2, len(name) - 1) + name
    return listing


def plain(size: int, start: int = 96, fragment: int = 0xFFFFFFFF, offset: int = 0, sizes: tuple[int, ...] = ()) -> bytes:
    return base(2) + struct.pack("<4I", start, fragment, offset, size) + struct.pack(f"<{len(sizes)}I", *sizes)


def test_a_forged_image_can_be_sound(tmp_path: Path) -> None:
    listing = entries(b"f")
    reader = forge(tmp_path / "image", top(len(listing)) + plain(4100, 96, 0, 7, (4096 | 1 << 24,)), listing, data=NOISE[:4096])
    assert content(reader, "f") == NOISE[:4096] + NOISE[7:11]


@pytest.mark.parametrize(
    "names", [(b"a", b"a"), (b"..",), (b".",), (b"a/b",), (b"/",), (b"a\0",), (b"n" * 256,)], ids=lambda names: repr(names)[:20]
)  # fmt: skip
def test_hostile_names(names: tuple[bytes, ...], tmp_path: Path) -> None:
    listing = entries(*names)
    reader = forge(tmp_path / "image", top(len(listing)) + plain(0), listing)
    for use in (lambda: list(reader.walk()), lambda: reader.unpack(os.open(tmp_path, os.O_RDONLY)), lambda: reader.lookup(b"x")):
        with pytest.raises(ImageError, match="the name"):
            use()


@pytest.mark.parametrize(
    ("inode", "error"),
    [
        (plain(1, 1 << 31, sizes=(1,)), "outside"),
        (plain(4096, sizes=(4097,)), "larger than blocks"),
        (plain(4096, sizes=(0xFFFFFF | 1 << 24,)), "larger than blocks"),
        (plain(4096, sizes=(100 | 1 << 24,)), "cannot be unpacked"),
        (plain(4096, sizes=(100,)), "cannot be unpacked"),
        (plain(100, fragment=1), "no fragment 1"),
        (plain(100, fragment=0, offset=4000), "outside of its fragment"),
        (plain(100, fragment=0, offset=0xFFFFFFF0), "outside of its fragment"),
        (plain(40960), "metadata"),
        (base(9) + struct.pack("<3Q4I", 96, 1 << 63, 0, 1, 0xFFFFFFFF, 0, 0xFFFFFFFF), "a file of 9223372036854775808 bytes"),
        (base(3) + struct.pack("<II", 1, 0xFFFFFFFF), "target"),
        (base(3) + struct.pack("<II", 1, 0), "target"),
        (base(3) + struct.pack("<II", 1, 4000), "metadata"),
        (base(2, uid=1) + bytes(16), "owner 1 of 1"),
        (base(15) + bytes(40), "type 15"),
        (base(0) + bytes(40), "type 0"),
    ],
)
def test_hostile_inodes(inode: bytes, error: str, tmp_path: Path) -> None:
    listing = entries(b"f")
    reader = forge(tmp_path / "image", top(len(listing)) + inode, listing, data=NOISE[:4096])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ImageError, match=error):
        reader.unpack(os.open(out, os.O_RDONLY))
    with pytest.raises(ImageError, match=error):
        for _, entry in reader.walk():
            if entry.kind == "f":
                reader.read(entry, 1 << 20)


@pytest.mark.parametrize(
    ("root", "listing", "error"),
    [
        (top(60000), entries(b"f"), "outside of it|cannot be unpacked|breaks off"),
        (top(21, start=9000), entries(b"f"), "metadata that breaks off"),
        (top(21, offset=8000), entries(b"f"), "beyond its metadata block"),
        (top(25), entries(b"f") + bytes(4), "breaks off"),
        (top(21), entries(b"f", count=200), "breaks off"),
        (top(21), entries(b"f", count=257), "257 entries"),
        (top(21), entries(b"f", place=8000), "beyond its metadata block"),
        (base(8) + struct.pack("<4I2HI", 2, 1 << 31, 0, 1, 0, 0, NO_XATTR), entries(b"f"), "listing of"),
        (top(21), entries(b"f", place=0), "two names"),  # the root in itself
    ],
)
def test_hostile_directories(root: bytes, listing: bytes, error: str, tmp_path: Path) -> None:
    reader = forge(tmp_path / "image", root, listing)
    with pytest.raises(ImageError, match=error):
        list(reader.walk())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ImageError, match=error):
        reader.unpack(os.open(out, os.O_RDONLY))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"magic": 1}, "not a SquashFS"), ({"major": 3}, "version 3.0"),
        ({"block_log": 0}, "block size"), ({"block_log": 63}, "block size"),
        ({"block_size": 1 << 31, "block_log": 31}, "block size"), ({"block_size": 4097}, "block size"),
        ({"compression": 7}, "unknown"), ({"compression": 0}, "unknown"),
        ({"bytes_used": 1 << 60}, "truncated"), ({"bytes_used": 97}, "outside"),
        ({"inodes": 0}, "no inodes"), ({"ids": 0}, "no owners"), ({"ids": 65535}, "id table"), ({"id_table": 1 << 62}, "id table"),
        ({"inode_table": 0}, "out of order"), ({"inode_table": 1 << 63}, "out of order"), ({"directory_table": 1 << 62}, "out of order"),
        ({"fragments": 0xFFFFFFFF}, "fragment table"), ({"fragment_table": 0}, "fragment table"),
        ({"export_table": 0}, "export table"), ({"export_table": 1 << 63}, "export table"),
        ({"xattr_table": 0}, "xattr table"), ({"xattr_table": 1 << 63}, "xattr table"),
        ({"root": 1 << 40}, "root lies"), ({"root": 9000}, "root lies"), ({"root": 8000}, "beyond"),
    ],
    ids=repr,
)  # fmt: skip
def test_hostile_superblocks(fields: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=error):
        forge(tmp_path / "image", top(0), b"", b"", **fields)


def test_a_root_that_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="root is not a directory"):
        forge(tmp_path / "image", plain(0))


def test_a_bomb_of_metadata_is_not_read_for_a_look(tmp_path: Path) -> None:
    """A file of 2 TiB has a list of 64 MiB; who only looks at the tree does not load it."""
    path = write(tmp_path / "image", lambda writer: {b"f": file(store(writer, (1 << 24) * 131072))})
    program = f"""
import os
from sciexec.pysquashfs import Reader
assert len(list(Reader(os.open({str(path)!r}, os.O_RDONLY), 0, "bomb").walk())) == 2
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    assert int(run(sys.executable, "-c", program)) < 40 << 10
