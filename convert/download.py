"""Blobs on their way from a registry, through the cache, to a reader who does not wait until they have arrived.

    registry --thread--> Writer --> tmp/...  --verified--> blobs/sha256/<hex>
                             \\--> Reader, as far as the file has grown

A few blobs are under way at a time, in the order in which the converter wants them.  Where the cache fails in the middle,
readers go on from the registry itself: the bytes they have had are fetched again and skipped.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from convert.blobs import Cache, CacheLost, Temporary, split_digest
from sciexec.errors import HostError, ImageError, SciexecError

if TYPE_CHECKING:
    from convert.documents import Blob
    from convert.progress import Progress

STREAMS = 4
CHUNK = 1 << 18  # bytes


class Stream(Protocol):
    """Bytes of a blob: read() gives 1 to `size` of them, b"" at the end; close() ends a read() that waits in another thread."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class Writer:
    """One blob on its way into the cache: one thread writes, any number of readers follow the file as it grows.

    The temporary file appears with the first byte.  A reader sees the end of the file only after digest and size were found
    right, so that its end of file is a proof.  abort() may come from any thread; everything else is the writing thread's.
    """

    def __init__(self, cache: Cache, digest: str, size: int) -> None:
        self._cache, self._digest, self._size = cache, digest, size
        self._algorithm, self._encoded = split_digest(digest)
        self._hash = hashlib.new(self._algorithm)
        self._temporary: Temporary | None = None
        self._changed = threading.Condition()  # guards what follows
        self._written = 0
        self._verified = False
        self._error: SciexecError | None = None
        self._users = 1  # this writer and its readers: the last one closes the file

    def write(self, data: bytes) -> None:
        """Append.  Raises ImageError at the first byte too many, CacheLost if the cache fails, whatever abort() was given."""
        if 0 <= self._size < self._written + len(data):
            raise self._fail(ImageError(f"reading blob {self._digest[:19]}: it is longer than the {self._size} bytes promised"))
        self._hash.update(data)
        try:
            if self._temporary is None:
                self._temporary = self._cache.temporary()
            self._temporary.write(data)
        except CacheLost as error:
            raise self._fail(error) from error
        with self._changed:
            if self._error is not None:
                raise self._error
            self._written += len(data)
            self._changed.notify_all()

    def commit(self) -> None:
        """Verify digest and size and publish.  Raises ImageError if they are wrong, CacheLost if the cache fails.

        Readers have all they need once the digest was found right: they do not wait for the disk, nor mind its failure.
        """
        self.write(b"")  # an empty blob needs its file, too
        if 0 <= self._size != self._written:
            raise self._fail(ImageError(f"reading blob {self._digest[:19]}: it ends after {self._written} of {self._size} bytes"))
        if self._hash.hexdigest() != self._encoded:
            raise self._fail(ImageError(f"reading blob {self._digest[:19]}: its content does not have this digest"))
        with self._changed:
            if self._error is not None:
                raise self._error
            self._verified = True
            self._changed.notify_all()
        assert self._temporary is not None
        self._temporary.publish(f"blobs/{self._algorithm}", self._encoded)

    def abort(self, error: SciexecError) -> None:
        """Give up: the temporary name goes, writer and readers get `error`.  Without effect on a blob already verified."""
        self._fail(error)

    def close(self) -> None:
        """The writing thread is done with it; what was not committed is forgotten."""
        self._fail(CacheLost(f"reading blob {self._digest[:19]}: its download was given up"))
        if self._temporary is not None:
            self._temporary.forget()
        self._release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def verified(self) -> bool:
        return self._verified

    def follow(self) -> Reader | None:
        """A reader from the first byte on; None if the blob is complete and the file closed: it is in the cache then."""
        with self._changed:
            if self._users == 0 and self._error is None:
                return None
            self._users += 1
            return Reader(self)

    def _fail(self, error: SciexecError) -> SciexecError:
        """The first error counts, for the writer as for its readers; returns it."""
        with self._changed:
            if not self._verified and self._error is None:
                self._error = error
                self._changed.notify_all()
                if self._temporary is not None:
                    self._temporary.forget()
            return self._error or error

    def _release(self) -> None:
        with self._changed:
            self._users -= 1
            if self._users == 0 and self._temporary is not None:
                self._temporary.close()


class Reader:
    """Follows a blob that is being written; its end of file says that digest and size were right."""

    def __init__(self, writer: Writer) -> None:
        self._writer: Writer | None = writer
        self._offset = 0

    def read(self, size: int) -> bytes:
        """1 to `size` bytes as soon as there are any, b"" at the end.  Raises CacheLost, or what broke the download off."""
        writer = self._writer
        if writer is None:
            raise ValueError("read of a closed reader")
        with writer._changed:
            writer._changed.wait_for(lambda: writer._written > self._offset or writer._verified or writer._error is not None)
            if writer._error is not None:
                raise writer._error
            ready = min(size, writer._written - self._offset)
        if not ready:
            return b""
        assert writer._temporary is not None
        with writer._cache.losing("reading from"):
            data = os.pread(writer._temporary.fd, ready, self._offset)
            if not data:
                raise HostError("a file being written was cut short")
        self._offset += len(data)
        return data

    def close(self) -> None:
        """May be called twice."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer._release()


class Downloads:
    """The blobs of an image that the cache lacks, downloaded by threads once the first of them is opened.

    Arguments:
        fetch: opens a blob at its source, from the first byte; what it reads is not trusted.
        blobs: all that may be asked for, in the order in which they will be.
        progress: told what arrives.  None: nobody is.
    """

    def __init__(self, cache: Cache, fetch: Callable[[Blob], Stream], blobs: Sequence[Blob], progress: Progress | None) -> None:
        self._cache, self._fetch, self._blobs, self._progress = cache, fetch, blobs, progress
        self._lock = threading.Lock()  # guards what follows
        self._writers: dict[str, Writer] = {}
        self._waiting: deque[Blob] = deque()
        self._threads: list[threading.Thread] = []
        self._streams: set[Stream] = set()
        self._started = False
        self._stopped = False

    def open(self, blob: Blob) -> Stream:
        """The blob, from the cache or as it arrives.  To be read while the Downloads are open.

        read() raises RegistryError, ImageError and HostError as the source does.
        """
        self._start()
        return _Resilient(blob, lambda: self._open(blob), lambda: counted(self._fetch(blob), blob, self._progress))

    def _open(self, blob: Blob) -> Stream:
        writer = self._writers.get(blob.digest)
        stream = (writer and writer.follow()) or self._cache.open(blob.digest, blob.size)
        if stream is None:
            raise CacheLost(f"reading blob {blob.digest[:19]}: it is not in the cache")
        return stream

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            self._started = True
            for blob in self._blobs:
                cached = self._cache.open(blob.digest, blob.size)
                if cached is not None:
                    cached.close()
                elif blob.digest not in self._writers:
                    self._writers[blob.digest] = Writer(self._cache, blob.digest, blob.size)
                    self._waiting.append(blob)
            threads = [threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
                       for number in range(min(STREAMS, len(self._waiting)))]  # fmt: skip
        for thread in threads:
            try:
                thread.start()
            except RuntimeError:  # the process may have no more threads
                break
            self._threads.append(thread)
        if threads and not self._threads:
            self._stop(CacheLost("downloading: no thread can be started"))

    def _work(self) -> None:
        while (blob := self._next()) is not None:
            with self._writers[blob.digest] as writer:
                try:
                    self._download(blob, writer)
                except SciexecError as error:
                    # One blob that cannot be had is the end of them all; a lost cache is, too, but readers know what to do.
                    self._stop(error)
                except BaseException as error:
                    self._stop(HostError(f"downloading blob {blob.digest[:19]}: {type(error).__name__}: {error}"))
                    raise

    def _next(self) -> Blob | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _download(self, blob: Blob, writer: Writer) -> None:
        stream = counted(self._fetch(blob), blob, self._progress)
        with self._lock:
            if self._stopped:
                return
            self._streams.add(stream)
        try:
            while data := stream.read(CHUNK):
                writer.write(data)
            writer.commit()
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.close()

    def _stop(self, error: SciexecError) -> None:
        with self._lock:
            self._started = self._stopped = True
            self._waiting.clear()
            streams = list(self._streams)
        for writer in self._writers.values():  # first, so that the error of a closed stream comes too late to count
            writer.abort(error)
        for stream in streams:
            stream.close()

    def close(self) -> None:
        """Stop what is under way and leave no temporary file; what is complete is published.  May be called twice."""
        self._stop(CacheLost("downloading: it was given up"))
        for thread in self._threads:
            thread.join()


class _Resilient:
    """A stream out of the cache that goes on from the source where the cache fails.

    `verified` says whether it ends only where digest and size are right: a download has been hashed by its writer, and hashing
    half a gigabyte once more costs as much as a twentieth of a conversion.
    """

    def __init__(self, blob: Blob, first: Callable[[], Stream], source: Callable[[], Stream]) -> None:
        self._blob = blob
        self._source: Callable[[], Stream] | None = source
        self._offset = 0
        self.verified = False
        try:
            self._stream = first()
            self.verified = isinstance(self._stream, Reader)
        except CacheLost:
            self._turn_to_source()

    def read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except CacheLost:
            if self._source is None:
                raise
            self._stream.close()
            self._turn_to_source()
            data = self._stream.read(size)
        self._offset += len(data)
        return data

    def _turn_to_source(self) -> None:
        assert self._source is not None
        self._stream, self._source = self._source(), None
        if self.verified:
            self._stream = _Verifying(self._stream, self._blob)
        skip = self._offset
        while skip and (data := self._stream.read(min(skip, CHUNK))):
            skip -= len(data)

    def close(self) -> None:
        self._stream.close()


class _Verifying:
    """A stream of a blob from its first byte on, whose end is a proof of digest and size, as a Reader's is."""

    def __init__(self, stream: Stream, blob: Blob) -> None:
        self._stream, self._blob = stream, blob
        self._hash = hashlib.new(split_digest(blob.digest)[0])
        self._count = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        self._count += len(data)
        ends = not data and size > 0
        if (ends and self._hash.hexdigest() != split_digest(self._blob.digest)[1]) or 0 <= self._blob.size < self._count:
            raise ImageError(f"reading blob {self._blob.digest[:19]}: its content does not have this digest")
        return data

    def close(self) -> None:
        self._stream.close()


class _Counted:
    def __init__(self, stream: Stream, count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._count(len(data))
        return data

    def close(self) -> None:
        self._stream.close()


def counted(stream: Stream, blob: Blob, progress: Progress | None) -> Stream:
    """The stream, telling `progress` what comes through it."""
    if progress is None:
        return stream
    return _Counted(stream, progress.download(f"blob {blob.digest.partition(':')[2][:12]}", blob.size))
