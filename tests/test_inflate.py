"""Blobs as registries hold them, whole and broken: what comes out is the tar, verified, or one error that says why."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import threading
import time

import pytest
import zstandard
from isal import igzip

from convert.inflate import Inflate
from sciexec.errors import ImageError, LimitError, SciexecError

TAR = os.urandom(700_000) + bytes(3_000_000) + b"the end"  # any bytes will do: nothing here reads the tar itself


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def skippable(data: bytes) -> bytes:
    return (0x184D2A53).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data


def inflate(blob: bytes, *, of: bytes = TAR, **changes: object) -> bytes:
    arguments: dict[str, object] = {"digest": digest(blob), "size": len(blob), "diff_id": digest(of), "where": "image x, layer 1"}
    with Inflate(io.BytesIO(blob), **{**arguments, **changes}) as pieces:  # type: ignore[arg-type]
        return b"".join(pieces)


GZIP = gzip.compress(TAR, 1)
ZSTD = zstandard.compress(TAR)
HALVES = TAR[:1_000_000], TAR[1_000_000:]

GOOD = {
    "plain": TAR,
    "gzip": GZIP,
    "gzip of igzip": igzip.compress(TAR),
    "two gzip members": gzip.compress(HALVES[0]) + gzip.compress(HALVES[1]),
    "gzip with an empty member": GZIP + gzip.compress(b""),
    "gzip with zero padding": GZIP + bytes(1024),
    "zstd": ZSTD,
    "two zstd frames": zstandard.compress(HALVES[0]) + zstandard.compress(HALVES[1]),
    "zstd behind a skippable frame": skippable(b"hello") + ZSTD,
    "zstd:chunked, skippable frames at the end": ZSTD + skippable(bytes(64)),
}


@pytest.mark.parametrize("name", GOOD)
def test_good(name: str) -> None:
    assert inflate(GOOD[name]) == TAR


def test_empty_tar() -> None:
    assert inflate(gzip.compress(b""), of=b"") == b""


def test_unknown_digest_is_verified_by_diff_id_alone() -> None:
    assert inflate(TAR, digest="", size=-1) == TAR
    with pytest.raises(ImageError, match="diffID"):
        inflate(TAR[:-1], digest="", size=-1)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BAD = {
    "digest of other bytes": (GZIP, {"digest": digest(b"x")}, "does not have its digest"),
    "diffID of other bytes": (GZIP, {"diff_id": digest(b"x")}, "diffID"),
    "one byte too long": (GZIP, {"size": len(GZIP) - 1}, "longer than"),
    "one byte too short": (GZIP, {"size": len(GZIP) + 1}, "ends after"),
    "gzip cut": (GZIP[: len(GZIP) // 2], {}, "ends too early|diffID"),
    "gzip without its trailer": (GZIP[:-4], {}, "ends too early"),
    "gzip checksum": (flipped(GZIP, len(GZIP) - 6), {}, "decompressing image x, layer 1"),
    "gzip damaged inside": (flipped(GZIP, 400_000), {}, "image x, layer 1"),
    "gzip then junk": (GZIP + b"junk", {}, "not gzip follow"),
    "zstd cut": (ZSTD[: len(ZSTD) // 2], {}, "image x, layer 1"),
    "zstd damaged": (flipped(ZSTD, 30), {}, "image x, layer 1"),
    "zstd then junk": (ZSTD + b"junk", {}, "image x, layer 1"),
    "xz": (b"\xfd7zXZ\0" + bytes(50), {}, "bzip2 and xz"),
    "bzip2": (b"BZh91AY&SY", {}, "bzip2 and xz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad(name: str) -> None:
    blob, changes, message = BAD[name]
    with pytest.raises(ImageError, match=message):
        inflate(blob, **changes)


def test_every_truncation_is_an_error() -> None:
    for blob in (GZIP, ZSTD):
        for n in range(32):
            cut = blob[: len(blob) * n // 32]
            with pytest.raises(ImageError):
                inflate(cut, digest=digest(cut), size=len(cut))


def test_bomb() -> None:
    """2 GiB of zeros in 2 MB of gzip: refused soon after the first GiB, without ever holding much of it."""
    block = bytes(1 << 20)
    packer = zstandard.ZstdCompressor().compressobj()
    blob = b"".join([*(packer.compress(block) for _ in range(2048)), packer.flush()])
    with pytest.raises(LimitError) as error:
        inflate(blob)
    assert "--max-ratio" in error.value.hint


def test_limit_of_bytes() -> None:
    with pytest.raises(LimitError) as error:
        inflate(GZIP, max_bytes=len(TAR) - 1)
    assert "--max-bytes" in error.value.hint
    assert inflate(GZIP, max_bytes=len(TAR)) == TAR


def test_zstd_window_is_bounded() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = packer.compress(TAR) + packer.flush()
    with pytest.raises(ImageError):
        inflate(blob)


class Stuck(io.BytesIO):
    """A download that stalls until it is closed."""

    def __init__(self) -> None:
        super().__init__(GZIP)
        self.ended = threading.Event()

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > len(GZIP) // 4:
            self.ended.wait(60)
            raise OSError("closed")
        return super().read(1 << 16)

    def close(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("pieces", [0, 1])
def test_close_ends_the_thread(pieces: int) -> None:
    """Also when nobody reads any more, and when the stream is stuck."""
    before = threading.active_count()
    started = time.monotonic()
    inflate = Inflate(Stuck(), digest=digest(GZIP), size=len(GZIP), diff_id=digest(TAR), where="x")
    for _ in zip(range(pieces), inflate):
        pass
    inflate.close()
    inflate.close()
    assert time.monotonic() - started < 5
    assert threading.active_count() == before


def test_a_stream_that_fails_is_our_error() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with (
        Inflate(Broken(), digest="", size=-1, diff_id=digest(TAR), where="image x, layer 1") as pieces,
        pytest.raises(SciexecError, match="image x"),
    ):
        list(pieces)
