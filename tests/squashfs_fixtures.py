"""SquashFS images for the tests of writer and reader, and the tools of others to look at them."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sciexec.pysquashfs import EMPTY, NO_XATTR, Buffer, Data, Node, Reader, Writer

Need = Callable[..., str]
Tree = dict[bytes, Node]

TEXT = b"".join(b"line %d of a file that can be compressed\n" % n for n in range(20000))  # seven blocks
NOISE = random.Random(1).randbytes(300_000)


# --- making images ------------------------------------------------------------------------------------------------------------


def store(writer: Writer, *pieces: Buffer | int, hint: int = 0) -> Data:
    writer.file(hint)
    for piece in pieces:
        if isinstance(piece, int):
            writer.hole(piece)
        else:
            writer.append(piece)
    return writer.end()


def directory(children: Tree, mode: int = 0o755, mtime: int = 1) -> Node:
    return Node("d", mode, 0, 0, mtime, NO_XATTR, children)


def file(data: Data, mode: int = 0o644, uid: int = 0, gid: int = 0, mtime: int = 1, xattr: int = NO_XATTR) -> Node:
    return Node("f", mode, uid, gid, mtime, xattr, data)


def symlink(target: bytes) -> Node:
    return Node("l", 0o777, 0, 0, 1, NO_XATTR, target)


def write(path: Path, make: Callable[[Writer], Tree], offset: int = 0, **settings: Any) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with Writer(fd, offset, **settings) as writer:
            used = writer.finish(directory(make(writer)))
        assert os.fstat(fd).st_size == offset + used
        assert used % 4096 == 0
    finally:
        os.close(fd)
    return path


def everything(writer: Writer) -> Tree:
    """One of each kind, and each way to store data."""
    xattr = writer.xattrs({b"user.colour": b"blue", b"user.empty": b""})
    hello = file(store(writer, b"hello", hint=5), 0o4755, 1000, 50, 1_600_000_000, xattr)
    return {
        b"hello": hello,
        b"text": file(store(writer, TEXT)),
        b"noise": file(store(writer, memoryview(NOISE)[:1000], bytearray(NOISE[1000:]))),
        b"empty": file(EMPTY),
        b"zeros": file(store(writer, bytes(400_000))),
        b"sparse": file(store(writer, 1 << 26, TEXT, 5, b"x", 1 << 20, b"end", 70_000)),
        b"dir": directory(
            {
                b"hard link": hello,
                b"\xff\xfe": file(store(writer, b"a name that is no UTF-8")),
                b"n" * 255: directory({}),
                b"link": symlink(b"../hello"),
                b"long": symlink(b"t" * 4095),
                b"null": Node("c", 0o666, 0, 0, 1, NO_XATTR, (1, 3)),
                b"disk": Node("b", 0o660, 0, 6, 1, NO_XATTR, (4095, 1048575)),
                b"fifo": Node("p", 0o600, 0, 0, 1),
                b"socket": Node("s", 0o600, 0, 0, 1),
            },
            0o1700,
        ),
    }


EVERYTHING = {
    "hello": b"hello", "dir/hard link": b"hello", "text": TEXT, "noise": NOISE, "empty": b"", "zeros": bytes(400_000),
}  # fmt: skip


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="surrogateescape", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: Path) -> Reader:
    return Reader(os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0, path.name)  # the descriptor lives as long as the test


def content(reader: Reader, path: str, limit: int = 1 << 24) -> bytes:
    entry = reader.lookup(path.encode())
    assert entry is not None
    return reader.read(entry, limit)


def sha(path: Path) -> str:
    with path.open("rb") as opened:
        digest = hashlib.sha256()
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sparse_sha() -> str:
    digest = hashlib.sha256()
    for _ in range(1 << 6):
        digest.update(bytes(1 << 20))
    for piece in (TEXT, bytes(5), b"x", bytes(1 << 20), b"end", bytes(70_000)):
        digest.update(piece)
    return digest.hexdigest()
