"""A layer's blob -> the bytes of its tar, verified, decompressed in a thread beside the compressor.

    blob --read--> SHA-256 (digest, size) --gunzip | unzstd | nothing--> SHA-256 (diffID) --queue--> the tar reader

One thread a layer does all of it: igzip, zstd and SHA-256 release the interpreter's lock, so the thread costs the caller
nothing but the queue.  What has been handed out is not known to be right until the iterator ends: whoever uses the bytes
publishes nothing before that (OCI image specification, descriptor.md "Verification" and config.md "Layer DiffID").
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import zstandard
from isal import igzip_lib
from isal.igzip_lib import IsalError

from sciexec.errors import HostError, ImageError, LimitError

CHUNK = 1 << 18  # bytes read from the blob at a time
PIECE = 1 << 20  # bytes of tar handed on at a time, at most
AHEAD = 6  # pieces that may wait in the queue: bounds the memory of a layer that is faster than the compressor
ZSTD_WINDOW = 1 << 27  # bytes; a frame that asks for more is refused (zstd's own default limit)
RATIO_FROM = 1 << 30  # bytes of output below which the compression ratio is nobody's business

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)  # RFC 8878, section 3.1.2


class Damaged(ImageError):
    """The blob is not what its digest names, wherever it was read from; `digest` says which blob."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message, "the registry or archive holds damaged data; tell the image's publisher if it stays so")
        self.digest = digest


class Stream(Protocol):
    """Where the compressed bytes come from: a file of the cache, an archive's member, a download.

    One with a true `verified` compares size and digest itself, and does not end where they are wrong.
    """

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class _Source:
    """The blob, hashed and counted as it is read; one byte more than promised is an error, not a longer read."""

    def __init__(self, stream: Stream, digest: str, size: int, where: str) -> None:
        self.stream, self.digest, self.size, self.where = stream, digest, size, where
        self.count = 0
        self.hash = hashlib.new(digest.partition(":")[0]) if digest and not getattr(stream, "verified", False) else None
        self.ahead = b""  # what peek() took out of the stream

    def peek(self, length: int) -> bytes:
        while len(self.ahead) < length and (more := self._pull(length - len(self.ahead))):
            self.ahead += more
        return self.ahead[:length]

    def read(self, length: int = CHUNK) -> bytes:
        if self.ahead:
            data, self.ahead = self.ahead[:length], self.ahead[length:]
            return data
        return self._pull(length)

    def _pull(self, length: int) -> bytes:
        data = self.stream.read(length)
        self.count += len(data)
        if 0 <= self.size < self.count:
            raise Damaged(f"reading {self.where}: the blob is longer than the {self.size} bytes its manifest names", self.digest)
        if self.hash is not None:
            self.hash.update(data)
        return data

    def finish(self) -> None:
        """Read what the decompressor left, and compare size and digest.  Raises Damaged."""
        while self.read(CHUNK):
            pass
        if self.size >= 0 and self.count != self.size:
            raise Damaged(f"reading {self.where}: the blob ends after {self.count} of {self.size} bytes", self.digest)
        if self.hash is not None and self.hash.hexdigest() != self.digest.partition(":")[2]:
            raise Damaged(f"reading {self.where}: the blob's content does not have its digest", self.digest)


def _gunzip(source: _Source) -> Iterator[bytes]:
    """All members of a gzip file (RFC 1952, section 2.2), with the zero padding some writers leave behind."""
    rest = b""
    while True:
        member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        data = rest
        while not member.eof:
            if member.needs_input and not data:
                data = source.read()
                if not data:
                    raise ImageError(f"decompressing {source.where}: the gzip stream ends too early")
            piece = member.decompress(data, PIECE)
            data = b""
            if piece:
                yield piece
        rest = member.unused_data
        while len(rest) < 2 and (more := source.read()):
            rest += more
        if not rest.startswith(GZIP_MAGIC):
            while rest:
                if rest.strip(b"\0"):
                    raise ImageError(f"decompressing {source.where}: bytes that are not gzip follow the gzip stream")
                rest = source.read()
            return


def _unzstd(source: _Source) -> Iterator[bytes]:
    reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).stream_reader(
        source,  # type: ignore[arg-type]  # anything with read() will do
        read_size=CHUNK, read_across_frames=True, closefd=False,
    )  # fmt: skip
    while piece := reader.read(PIECE):
        yield piece


def _plain(source: _Source) -> Iterator[bytes]:
    while piece := source.read():
        yield piece


def _decompressor(source: _Source) -> Iterator[bytes]:
    """By the first bytes and never by the media type: registries are full of layers that say one and are the other."""
    magic = source.peek(4)
    if magic[:2] == GZIP_MAGIC:
        return _gunzip(source)
    if magic == ZSTD_MAGIC or (len(magic) == 4 and int.from_bytes(magic, "little") in ZSTD_SKIPPABLE):
        return _unzstd(source)
    if magic[:2] == b"BZ" or magic == b"\xfd7zX":
        raise ImageError(f"decompressing {source.where}: bzip2 and xz layers are not part of the OCI specification")
    return _plain(source)


class Inflate:
    """The pieces of one layer's uncompressed tar, as an iterator.

    Arguments:
        stream: the blob as stored; closed by close().
        digest, size: of the blob, as the manifest says ("" and -1 where nothing says it: docker-archive).
        diff_id: digest of the uncompressed tar, as the config says.
        max_bytes: uncompressed bytes allowed; max_ratio: uncompressed over compressed bytes allowed.
        where: names image and layer in errors.

    Raises (from next()): Damaged, ImageError, LimitError; HostError for the stream's OSError, and whatever else it raises.
    """

    def __init__(
        self, stream: Stream, *, digest: str, size: int, diff_id: str, where: str, max_bytes: int = 1 << 40, max_ratio: int = 500
    ) -> None:
        self._stream = stream
        self._source = _Source(stream, digest, size, where)
        self._diff_id, self._where = diff_id, where
        self._max_bytes, self._max_ratio = max_bytes, max_ratio
        # None ends the stream, an exception is raised on the other side
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._ended = False  # the last item was taken from the queue
        self._thread = threading.Thread(target=self._run, name=f"inflate {diff_id[7:19]}", daemon=True)
        self._thread.start()

    @property
    def consumed(self) -> int:
        """Compressed bytes read so far, for progress."""
        return self._source.count

    def _put(self, item: bytes | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _run(self) -> None:
        try:
            if self._decompress():
                self._put(None)
        except BaseException as error:  # a thread's exception belongs to whoever waits for its bytes
            self._put(error)

    def _decompress(self) -> bool:
        diff = hashlib.new(self._diff_id.partition(":")[0])
        total = 0
        try:
            for piece in _decompressor(self._source):
                diff.update(piece)
                total += len(piece)
                self._check_growth(total)
                if not self._put(piece):
                    return False
        except (zstandard.ZstdError, IsalError, ImageError) as error:  # type: ignore[misc]  # the stub of isal says it is any type
            if not isinstance(error, (Damaged, LimitError)):
                self._source.finish()  # bytes that are not the blob's explain everything else
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"decompressing {self._where}: {error}") from error
        self._source.finish()
        if diff.hexdigest() != self._diff_id.partition(":")[2]:
            raise ImageError(f"decompressing {self._where}: the layer's content does not have the diffID of the image's config")
        return True

    def _check_growth(self, total: int) -> None:
        if total > self._max_bytes:
            raise LimitError(
                f"decompressing {self._where}: more than {self._max_bytes} bytes", "raise the limit with --max-bytes if you trust the image"
            )
        if total > RATIO_FROM and total > self._max_ratio * self._source.count:
            raise LimitError(
                f"decompressing {self._where}: grows more than {self._max_ratio} times, as a decompression bomb does",
                "raise the limit with --max-ratio if you trust the image",
            )

    def __iter__(self) -> Iterator[bytes]:
        while not self._ended:
            item = self._queue.get()
            self._ended = not isinstance(item, bytes)
            if item is None:
                return
            if isinstance(item, OSError):
                raise HostError(f"reading {self._where}: {item}") from item
            if isinstance(item, MemoryError):
                raise HostError(f"decompressing {self._where}: out of memory") from item
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End the thread, whatever it is doing, and close the stream.  May be called twice."""
        self._closed.set()
        self._stream.close()
        self._thread.join(timeout=10)

    def __enter__(self) -> Inflate:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
