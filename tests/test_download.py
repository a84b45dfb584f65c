"""Blobs on their way: readers that follow, sources that lie, break and hang, a cache that is taken away meanwhile."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blobs_fixtures import WAIT, cache, digest_of, eventually, noise, path_of, read_all, rot, stored, temporaries, warnings

from convert.blobs import Cache
from convert.documents import Blob
from convert.download import STREAMS, Downloads, Stream, Writer
from sciexec.errors import ImageError, RegistryError

__all__ = ["cache", "warnings"]  # fixtures

TREE = Path(__file__).resolve().parent.parent


# --- following ------------------------------------------------------------------------------------------------------------


def test_readers_follow_the_file_as_it_grows(cache: Cache) -> None:
    data = noise(1 << 20)
    writer = Writer(cache, digest_of(data), len(data))
    early, late = writer.follow(), writer.follow()
    assert early and late
    seen = [b""]

    def follow() -> None:
        while piece := early.read(1 << 16):
            seen[0] += piece
        seen.append(b"end")

    thread = threading.Thread(target=follow)
    thread.start()
    for start in range(0, len(data), 1 << 18):
        assert len(seen) == 1
        writer.write(data[start : start + (1 << 18)])
        assert eventually(functools.partial(lambda end: len(seen[0]) == end, start + (1 << 18)))
    time.sleep(0.05)
    assert len(seen) == 1, "the end was seen before the digest was found right"
    writer.commit()
    thread.join(WAIT)
    assert seen == [data, b"end"]
    early.close()
    assert len(late.read(10)) == 10
    writer.close()
    assert writer.follow() is not None  # the file is still open for `late`
    assert read_all(late) == data[10:]
    assert stored(cache, digest_of(data), len(data)) == data


@pytest.mark.parametrize(
    ("promised", "sent", "words"),
    [
        (b"right", b"wrong", "digest"),
        (b"right", b"righ", "ends after 4 of 5"),
        (b"right", b"right!", "longer than the 5"),
        (b"", b"x", "longer than the 0"),
    ],
)
def test_what_is_not_as_promised_is_an_error_for_writer_and_readers_and_is_not_kept(
    cache: Cache, promised: bytes, sent: bytes, words: str
) -> None:
    with Writer(cache, digest_of(promised), len(promised)) as writer:
        reader = writer.follow()
        with pytest.raises(ImageError, match=words):
            writer.write(sent)
            writer.commit()
        assert reader
        with pytest.raises(ImageError, match=words):
            read_all(reader)
    late = writer.follow()
    assert late
    with pytest.raises(ImageError, match=words):
        late.read(1)
    assert cache.list() == [] and temporaries(cache) == []


def test_a_writer_that_gives_up_wakes_its_readers(cache: Cache) -> None:
    writer = Writer(cache, digest_of(b"x"), 1)
    reader = writer.follow()
    assert reader
    threading.Timer(0.05, lambda: writer.abort(RegistryError("the network is gone"))).start()
    with pytest.raises(RegistryError, match="the network is gone"):
        reader.read(1)
    with pytest.raises(RegistryError):
        writer.write(b"x")
    writer.close()
    assert temporaries(cache) == []


def test_no_descriptor_stays_open(cache: Cache) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for number in range(5):
        data = noise(1000, number)
        with Writer(cache, digest_of(data), 1000) as writer:
            reader = writer.follow()
            writer.write(data)
            writer.commit()
        assert reader and read_all(reader) == data
        assert stored(cache, digest_of(data)) == data and writer.follow() is None
        cache.new_image("0" * 16).__exit__(None, None, None)
    cache.clean()
    assert descriptors() == before


# --- downloads ------------------------------------------------------------------------------------------------------------


class Source:
    """A registry in memory that can be slow, wrong, and stuck."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = {digest_of(data): data for data in contents}
        self.blobs = [Blob(digest, len(data), "") for digest, data in self.contents.items()]
        self.asked: list[str] = []
        self.open = self.most = 0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.gate_at = 0  # bytes of each blob that come through a closed gate
        self.broken: dict[str, Exception] = {}

    def __call__(self, blob: Blob) -> Stream:
        with self.lock:
            self.asked.append(blob.digest)
            self.open += 1
            self.most = max(self.most, self.open)
        return _Slow(self, blob.digest)


class _Slow:
    def __init__(self, source: Source, digest: str) -> None:
        self.source, self.digest, self.offset = source, digest, 0
        self.closed = threading.Event()
        self.once = threading.Lock()

    def read(self, size: int) -> bytes:
        while self.offset >= self.source.gate_at and not self.source.gate.wait(0.01):
            if self.closed.is_set():
                raise RegistryError("cancelled")
        if self.digest in self.source.broken and self.offset:
            raise self.source.broken[self.digest]
        data = self.source.contents[self.digest][self.offset : self.offset + min(size, 1000)]
        self.offset += len(data)
        return data

    def close(self) -> None:
        if self.once.acquire(blocking=False):
            self.closed.set()
            with self.source.lock:
                self.source.open -= 1


@pytest.fixture
def downloading(cache: Cache) -> Iterator[Callable[[Source], Downloads]]:
    made: list[Downloads] = []

    def make(source: Source) -> Downloads:
        made.append(Downloads(cache, source, source.blobs, None))
        return made[-1]

    yield make
    for downloads in made:
        downloads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("download-")]
    assert temporaries(cache) == []


def test_a_few_downloads_at_a_time_in_the_order_of_need(cache: Cache, downloading: Callable[[Source], Downloads]) -> None:
    source = Source(*(noise(5000, number) for number in range(10)))
    source.gate.clear()
    downloads = downloading(source)
    assert source.asked == [], "nothing is fetched before something is asked for"
    last = downloads.open(source.blobs[-1])
    assert eventually(lambda: len(source.asked) == STREAMS)
    time.sleep(0.05)
    assert sorted(source.asked) == sorted(blob.digest for blob in source.blobs[:STREAMS])
    source.gate.set()
    assert read_all(last) == source.contents[source.blobs[-1].digest]
    for blob in source.blobs:
        assert read_all(downloads.open(blob)) == source.contents[blob.digest]
    downloads.close()
    assert source.most == STREAMS and sorted(source.asked) == sorted(source.contents)
    assert {entry.name for entry in cache.list()} == set(source.contents)


def test_what_the_cache_has_is_not_fetched_and_a_truncated_entry_is(cache: Cache, downloading: Callable[[Source], Downloads]) -> None:
    source = Source(noise(5000, 1), noise(5000, 2), noise(5000, 3))
    whole, truncated, missing = source.blobs
    for blob in (whole, truncated):
        cache.store(blob.digest, source.contents[blob.digest])
    rot(path_of(cache, truncated.digest), lambda data: data[:-1])
    downloads = downloading(source)
    for blob in source.blobs * 2:
        assert read_all(downloads.open(blob)) == source.contents[blob.digest]
    assert sorted(source.asked) == sorted([truncated.digest, missing.digest])


def test_one_failed_download_ends_them_all(cache: Cache, downloading: Callable[[Source], Downloads]) -> None:
    source = Source(*(noise(5000, number) for number in range(8)))
    source.broken[source.blobs[1].digest] = RegistryError("it is gone")
    downloads = downloading(source)
    source.gate.clear()
    streams = [downloads.open(blob) for blob in source.blobs]
    source.gate.set()
    with pytest.raises(RegistryError, match="it is gone"):
        for stream in (streams[1], streams[7]):
            read_all(stream)
    downloads.close()
    assert source.blobs[1].digest not in {entry.name for entry in cache.list()}


def test_closing_does_not_wait_for_the_network(downloading: Callable[[Source], Downloads]) -> None:
    source = Source(*(noise(5000, number) for number in range(8)))
    source.gate.clear()
    downloads = downloading(source)
    downloads.open(source.blobs[0])
    assert eventually(lambda: len(source.asked) == STREAMS)
    begin = time.monotonic()
    downloads.close()
    assert time.monotonic() - begin < WAIT / 4
    assert source.open == 0 and len(source.asked) == STREAMS


STUCK = """
    import sys, time
    from convert.blobs import Cache
    from convert.documents import Blob
    from convert.download import Downloads

    class Stream:
        sent = closed = False
        def read(self, size):
            while self.sent and not self.closed:
                time.sleep(0.01)
            self.sent = True
            return b"x" * 1000
        def close(self):
            self.closed = True

    blob = Blob("sha256:" + "a" * 64, 5000, "")
    downloads = Downloads(Cache(sys.argv[1]), lambda blob: Stream(), [blob], None)
    try:
        stream = downloads.open(blob)
        while data := stream.read(1000):
            print("reading", flush=True)
    finally:
        downloads.close()
"""


def test_control_c_ends_a_stuck_download_at_once_and_leaves_nothing(cache: Cache) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STUCK), cache.path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(TREE)},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "reading\n"
    assert len(temporaries(cache)) == 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT)
    assert "KeyboardInterrupt" in errors and process.returncode == -signal.SIGINT
    assert temporaries(cache) == [] and cache.list() == []


def test_a_reader_goes_on_from_the_source_when_a_clean_takes_the_blob(cache: Cache, downloading: Callable[[Source], Downloads]) -> None:
    source = Source(noise(50_000))
    (blob,) = source.blobs
    downloads = downloading(source)
    assert read_all(downloads.open(blob)) == source.contents[blob.digest]
    assert eventually(cache.list)
    cache.clean()
    assert read_all(downloads.open(blob)) == source.contents[blob.digest]


def test_a_reader_goes_on_from_the_source_when_the_file_is_cut_under_it(
    cache: Cache, downloading: Callable[[Source], Downloads], warnings: list[str]
) -> None:
    source = Source(noise(50_000))
    (blob,) = source.blobs
    source.gate.clear()
    source.gate_at = 1000
    stream = downloading(source).open(blob)
    begin = stream.read(500)
    (name,) = temporaries(cache)
    os.truncate(f"{cache.path}/tmp/{name}", 0)
    source.gate.set()
    assert begin + read_all(stream) == source.contents[blob.digest]
    assert eventually(lambda: not temporaries(cache))
    assert cache.read(blob.digest, blob.size) in (None, source.contents[blob.digest])


def test_who_need_not_hash_what_the_stream_gives(cache: Cache, downloading: Callable[[Source], Downloads]) -> None:
    """A download is hashed as it arrives; what was in the cache before is not."""
    source = Source(noise(5000, 1), noise(5000, 2))
    fetched, kept = source.blobs
    cache.store(kept.digest, source.contents[kept.digest])
    source.gate.clear()
    downloads = downloading(source)
    verified = [getattr(downloads.open(blob), "verified", False) for blob in (fetched, kept)]
    source.gate.set()
    assert verified == [True, False]


def test_a_stream_that_promised_to_verify_does_so_at_the_source(cache: Cache, downloading: Callable[[Source], Downloads]) -> None:
    source = Source(noise(50_000))
    (blob,) = source.blobs
    source.gate.clear()
    source.gate_at = 1000
    stream = downloading(source).open(blob)
    stream.read(500)
    (name,) = temporaries(cache)
    os.truncate(f"{cache.path}/tmp/{name}", 0)
    source.contents[blob.digest] = noise(50_000, 2)
    source.gate.set()
    with pytest.raises(ImageError, match="does not have this digest"):
        read_all(stream)


def test_without_a_thread_the_source_is_read_directly(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # what Python says under RLIMIT_NPROC

    monkeypatch.setattr(threading.Thread, "start", refuse)
    source = Source(noise(5000))
    downloads = Downloads(cache, source, source.blobs, None)
    assert read_all(downloads.open(source.blobs[0])) == source.contents[source.blobs[0].digest]
    downloads.close()
