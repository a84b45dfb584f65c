"""Images that somebody spoiled, given to the C code that serves images: no memory is touched that is not its own, and all ends.

tests/native/walk.c asks for everything that a kernel could ask for, and is built with gcc's sanitizers.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespace_fixtures import Need
from squashfs_fixtures import run

from sciexec import squashfs
from sciexec.unsquashfs import Reader

TREE = Path(__file__).resolve().parent.parent
SOURCES = [TREE / "tests/native/walk.c", *(TREE / f"sciexec/native/{name}.c" for name in ("squashfs", "data", "decompress"))]
RAW = "-noI -noId -noX -noF -noD".split()  # what is not compressed can be spoiled behind the decompressor
EXTREMES = (0, 1, 0x7F, 0xFF, 0x1FFF, 0x2000, 0x7FFF, 0x8000, 0xFFFF, 0x01000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
MEMORY = 200_000  # KiB for one image with the sanitizer's own: 16 MiB of data, 8 of metadata, and what knows where long files lie
AT_ONCE = 400

Walk = Callable[..., "list[str]"]


@pytest.fixture(scope="module", params=["address,undefined"])
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, need: Need) -> Walk:
    """walk(images, threads=1) -> its lines; fails where one crashed, hung, or took too much memory."""
    return walker(request.param, tmp_path_factory.mktemp("walk"), need)


def walker(sanitizers: str, directory: Path, need: Need, *prefix: str) -> Walk:
    program = directory / "walk"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    run(need("gcc"), *flags, "-o", program, *SOURCES, "-ldl", "-lpthread")

    def walk(images: list[Path], threads: int = 1) -> list[str]:
        done = subprocess.run(
            [*prefix, program, "20", str(threads), *images], capture_output=True, text=True, errors="replace", timeout=280, check=False
        )
        bad = [line for line in done.stdout.splitlines() if "status" in line or "TROUBLE" in line]
        if done.returncode or bad:
            pytest.fail("\n".join([*bad[:5], done.stderr[:5000]]))
        *lines, memory = done.stdout.splitlines()
        assert len(lines) == len(images)
        assert int(memory.split()[1]) < MEMORY, memory
        return lines

    return walk


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind; a directory so long that it has an index; attributes stored once for two files."""
    top = tmp_path_factory.mktemp("spoiled") / "tree"
    (top / "deep/er").mkdir(parents=True)
    (top / "many").mkdir()
    (top / "text").write_text("hello")
    (top / "noise").write_bytes(random.Random(1).randbytes(9000))
    (top / "sparse").write_bytes(bytes(20000) + b"x" * 5000)
    os.link(top / "text", top / "deep/hard")
    (top / "deep/soft").symlink_to("../text")
    os.mkfifo(top / "deep/er/fifo")
    for name in ("text", "noise"):
        os.setxattr(top / name, "user.shared", b"1" * 40)
    os.setxattr(top / "noise", "user.long", b"x" * 300)
    os.setxattr(top / "deep", "user.two", b"22")
    for number in range(250):
        (top / f"many/{'n' * 40}{number:03}").write_text(str(number))
    return top


def image(tree: Path, path: Path, *options: str) -> Path:
    run("mksquashfs", tree, path, "-quiet", "-no-progress", "-noappend", "-nopad", "-b", "4096", *options)
    return path


def flush(walk: Walk, directory: Path, mutants: Iterator[bytes]) -> list[str]:
    """Walk over all of them, some hundred at once, and return what was said."""
    said: list[str] = []
    batch: list[Path] = []
    for number, data in enumerate(mutants):
        batch.append(directory / f"{number}.sqfs")
        batch[-1].write_bytes(data)
        if len(batch) == AT_ONCE:
            said += walk(batch)
            for path in batch:
                path.unlink()
            batch = []
    if batch:
        said += walk(batch)
    return said


def errors(line: str) -> int:
    found = re.search(r"errors (\d+)", line)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("options", [("gzip",), ("xz",), ("lz4",), ("zstd",), ("gzip", *RAW), ("zstd", "-no-fragments")], ids=" ".join)
def test_a_sound_image_has_no_errors(walk: Walk, tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    (line,) = walk([image(tree, tmp_path / "image", "-comp", *options)], 2)
    assert "files 254 directories 4 links 1 xattrs 5 errors 0 " in line  # text and deep/hard are one inode, met twice


@pytest.mark.parametrize("options", [("gzip", *RAW), ("gzip",), ("xz",), ("lz4",), ("zstd",)], ids=" ".join)
def test_random_bytes(walk: Walk, tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    shutil.rmtree(shutil.copytree(tree, tmp_path / "tree", symlinks=True, copy_function=os.link) / "many")
    sound = image(tmp_path / "tree", tmp_path / "image", "-comp", *options).read_bytes()
    dice = random.Random(" ".join(options))

    def mutants() -> Iterator[bytes]:
        for _ in range(150):
            spoiled = bytearray(sound)
            for _ in range(dice.choice((1, 1, 2, 8))):
                # of everything, or of what is not the contents of files: the superblock, and the tables at the end
                at = dice.choice((dice.randrange(len(spoiled)), dice.randrange(96), len(spoiled) - 1 - dice.randrange(1200)))
                spoiled[at] = dice.choice((0, 0xFF, spoiled[at] ^ 1 << dice.randrange(8), dice.randrange(256)))
            yield bytes(spoiled)
        for _ in range(30):
            yield sound[: dice.randrange(len(sound))]

    said = flush(walk, tmp_path, mutants())
    assert len(said) == 180 and any(errors(line) for line in said)


def test_each_field_of_the_superblock(walk: Walk, tree: Path, tmp_path: Path) -> None:
    sound = image(tree, tmp_path / "image", "-comp", "gzip", *RAW).read_bytes()

    def mutants() -> Iterator[bytes]:
        for at in range(4, 96, 4):
            for value in (*EXTREMES, len(sound), len(sound) - 1, len(sound) + 1):
                yield sound[:at] + struct.pack("<I", value) + sound[at + 4 :]
        for at in range(32, 96, 8):
            for value in (1 << 63, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 2, (1 << 64) - 96, (1 << 48) - 1):
                yield sound[:at] + struct.pack("<Q", value) + sound[at + 8 :]

    said = flush(walk, tmp_path, mutants())
    assert sum("Invalid argument" in line for line in said) > 10 and sum("Input/output error" in line for line in said) > 10


def test_each_field_of_every_table(walk: Walk, tree: Path, tmp_path: Path) -> None:
    """Each two bytes, and each four, of one inode of each kind, of listings, of their index, of fragments, owners and attributes."""
    path = image(tree, tmp_path / "image", "-comp", "gzip", *RAW)
    sound = path.read_bytes()
    with path.open("rb") as opened:
        block = squashfs.check_superblock(opened.fileno(), 0, len(sound))
        reader = Reader(opened.fileno(), 0, "image")
        entries = dict(reader.walk())
    names = [b"", b"text", b"noise", b"sparse", b"many", b"deep", b"deep/soft", b"deep/er/fifo"]
    places: set[int] = set()
    for name in names:
        entry = entries[name]
        inode = block.inode_table + (entry.place >> 16) + 2 + (entry.place & 0xFFFF)
        places.update(range(inode, inode + 56, 2))
        if entry.kind == "d":
            listing = block.directory_table + entry.start + 2 + entry.offset
            places.update(range(listing, listing + 50, 2))
    places.update(range(block.directory_table, block.directory_table + 2))
    places.update(range(block.inode_table, block.inode_table + 2))
    places.update(range(block.fragment_table - 40, len(sound) - 4, 2))  # fragments, owners, attributes, and the lists of their blocks

    def mutants() -> Iterator[bytes]:
        for at in sorted(place for place in places if place < len(sound) - 4):
            dice = random.Random(at)
            for value in dice.sample(EXTREMES, 2):
                if value < 0x10000:
                    yield sound[:at] + struct.pack("<H", value) + sound[at + 2 :]
                else:
                    yield sound[:at] + struct.pack("<I", value) + sound[at + 4 :]

    said = flush(walk, tmp_path, mutants())
    assert len(said) > 500 and sum(errors(line) > 0 for line in said) > 200


def test_threads_do_not_race(tmp_path_factory: pytest.TempPathFactory, tree: Path, tmp_path: Path, need: Need) -> None:
    setarch = [need("setarch"), "-R"]  # the sanitizer cannot place its memory where the kernel randomizes much
    walk = walker("thread", tmp_path_factory.mktemp("walk"), need, *setarch)
    assert "errors 0 " in walk([image(tree, tmp_path / "image", "-comp", "zstd")], 4)[0]
