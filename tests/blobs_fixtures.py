"""A cache of the test's own, and what the tests of the cache and of the downloads both look at.  Import the fixtures by name."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from convert.blobs import Cache
from convert.download import Stream

WAIT = 20.0  # s after which something that should happen is said not to


class Need(Protocol):
    def __call__(self, *programs: str) -> str: ...


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def read_all(stream: Stream, size: int = 1 << 16) -> bytes:
    try:
        return b"".join(iter(lambda: stream.read(size), b""))
    finally:
        stream.close()


def stored(cache: Cache, digest: str, size: int = -1) -> bytes | None:
    file = cache.open(digest, size)
    return None if file is None else read_all(file)


def temporaries(cache: Cache) -> list[str]:
    return os.listdir(f"{cache.path}/tmp")


def path_of(cache: Cache, digest: str) -> Path:
    return Path(cache.path, "blobs", *digest.split(":"))


def eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def rot(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(change(data))


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, warnings: list[str]) -> Cache:
    return Cache(str(tmp_path / "cache"), warnings.append)
