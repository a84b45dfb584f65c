"""The content-addressed cache: files only, right under any number of writers on any number of hosts, without one lock.

    $SCIEXEC_CACHEDIR/                   0700, ours; may be deleted at any time
        blobs/sha256/<hex>               0444, named by the digest of its bytes, verified before it got that name
        images/<key>.sif                 0444, a converted image; the key says manifest and options
        images/<key>.json                where it came from: {"sources": ["docker://..."]}
        tmp/<host>.<boot>.<pid namespace>.<pid>.<random>       0600, being written

A file is written in tmp/, verified, flushed, and linked to its final name: two writers of one name write the same bytes, so
it does not matter who comes first, and an entry that others may be reading is never replaced.  A killed writer leaves its
temporary file, whose name tells the next one that its owner is dead.

The cache is never the reason that a command fails: where it cannot be used there is one warning and work goes on without.
Who reads an entry verifies it again (a disk may rot, a user may meddle) and says discard() if it is not what it is called.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import pwd
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from sciexec.errors import HostError, ImageError, escaped

DIGEST_LENGTHS = {"sha256": 64, "sha512": 128}  # OCI image specification, descriptor.md, "Registered algorithms"
ABANDONED = 86400  # s: a temporary file of another host that nobody wrote to for so long has lost its writer
SIDECAR_MAX = 1 << 20  # bytes
STALE_HANDLE_TRIES = 3  # NFS: a name looked up just before another client replaced it

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: opening a FIFO must not hang
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_TEMPORARY = re.compile(r"(?P<place>[^.]+\.[^.]+\.[0-9]+)\.(?P<pid>[0-9]+)\.[0-9a-f]+")
_KEY = re.compile(r"[0-9a-z][0-9a-z-]{7,199}")

Own = TypeVar("Own", bound="Temporary")  # typing.Self came with Python 3.11


class CacheLost(HostError):
    """The cache cannot hold or give back this file; the bytes have to come from their source."""


def split_digest(digest: str) -> tuple[str, str]:
    """("sha256", hex) of a digest.  Raises ImageError for anything else than the grammar allows, before it becomes a path."""
    algorithm, _, encoded = digest.partition(":")
    if algorithm not in DIGEST_LENGTHS:
        raise ImageError(f"digest {escaped(digest)[:80]}: not one of the algorithms {', '.join(DIGEST_LENGTHS)}")
    if not re.fullmatch(f"[0-9a-f]{{{DIGEST_LENGTHS[algorithm]}}}", encoded):
        raise ImageError(f"digest {escaped(digest)[:80]}: not {DIGEST_LENGTHS[algorithm]} lower-case hexadecimal digits")
    return algorithm, encoded


def directory(environ: Mapping[str, str] = os.environ) -> str:
    """Where the cache lives.

    $SCIEXEC_CACHEDIR itself; else our own directory below the one the peers use ($APPTAINER_CACHEDIR, $SINGULARITY_CACHEDIR),
    below $XDG_CACHE_HOME, or below ~/.cache (XDG base directory specification; a relative value counts as unset).

    Raises HostError if the caller has no home directory.
    """
    own = environ.get("SCIEXEC_CACHEDIR")
    if own:
        return os.path.abspath(own)
    for name in ("APPTAINER_CACHEDIR", "SINGULARITY_CACHEDIR"):
        if environ.get(name):
            return os.path.join(os.path.abspath(environ[name]), "sciexec")
    if os.path.isabs(environ.get("XDG_CACHE_HOME", "")):
        return os.path.join(environ["XDG_CACHE_HOME"], "sciexec")
    home = environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            raise HostError("finding the cache: no home directory is known", "SCIEXEC_CACHEDIR names a directory for it") from None
    return os.path.join(home, ".cache", "sciexec")


def open_cache(path: str | None = None, warn: Callable[[str], None] | None = None) -> Cache | None:
    """The cache at `path` (default: directory()), or None with one warning where it cannot be used."""
    try:
        return Cache(path or directory(), warn)
    except HostError as error:
        if warn is not None:
            warn(f"{error}; working without a cache")
        return None


@dataclass(frozen=True)
class Entry:
    """One file of the cache.  kind: blob, image or temporary; size: bytes; created: Unix s; sources: references (images)."""

    name: str
    kind: str
    size: int
    created: int
    sources: tuple[str, ...] = ()


class Cache:
    """The cache below one directory; threads may share it.

    Arguments:
        path: its directory, made if missing.  warn: told once, when the cache stops being of use.

    Raises HostError if `path` cannot be used: not a directory, not ours, writable by others, read-only.
    """

    def __init__(self, path: str, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._warn = warn
        self._swept = False
        try:
            for room in ("tmp", "images", "blobs/sha256"):
                with self.room(room, make=True):
                    pass
        except OSError as error:
            raise HostError(f"using the cache {escaped(path)}: {error.strerror}") from error

    # --- directories ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def room(self, room: str, make: bool = False) -> Iterator[int]:
        """A directory of the cache, open; opened (and made) anew each time, since the cache may be deleted at any time."""
        fd = self._root(make)
        try:
            for name in room.split("/"):
                below = _own_directory(fd, name, make)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _root(self, make: bool) -> int:
        if make and not os.path.lexists(self.path):
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.mkdir(self.path, 0o700)
        # A link of the user's own to a larger disk is welcome; one that somebody else put there is not.
        link = os.lstat(self.path)
        if stat.S_ISLNK(link.st_mode) and link.st_uid != os.geteuid():
            raise HostError(f"using the cache {escaped(self.path)}: it is a link made by another user (uid {link.st_uid})")
        fd = os.open(self.path, _DIRECTORY)
        try:
            _check_owner(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @contextlib.contextmanager
    def losing(self, act: str) -> Iterator[None]:
        """What the host refuses inside becomes CacheLost, and one warning."""
        try:
            yield
        except (OSError, HostError) as error:
            cause = error.strerror if isinstance(error, OSError) else str(error)
            if self._warn is not None:
                warn, self._warn = self._warn, None
                warn(f"{act} the cache {escaped(self.path)}: {cause}; working without it")
            raise CacheLost(f"{act} the cache {escaped(self.path)}: {cause}") from error

    # --- blobs ----------------------------------------------------------------------------------------------------------

    def open(self, digest: str, size: int = -1) -> CachedFile | None:
        """The blob, to be verified by its reader; None if it is not there.  A file of another size is dropped as a miss.

        Raises ImageError for a malformed digest.
        """
        algorithm, encoded = split_digest(digest)
        for _ in range(STALE_HANDLE_TRIES):
            try:
                with self.room(f"blobs/{algorithm}") as room:
                    fd = os.open(encoded, _FILE, dir_fd=room)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    continue
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link or a socket stands there
                    self.discard(digest)
                return None
            except HostError:
                return None
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and size in (-1, found.st_size):
                return CachedFile(fd, found.st_size, self.path)
            os.close(fd)
            self.discard(digest)
            return None
        return None

    def read(self, digest: str, limit: int) -> bytes | None:
        """The bytes of a small blob, verified; None if it is not there, larger than `limit` bytes, or damaged (and dropped)."""
        file = self.open(digest)
        if file is None:
            return None
        algorithm, encoded = split_digest(digest)
        with file:
            if file.size > limit:
                return None
            with contextlib.suppress(CacheLost):
                data = file.read(limit)
                if hashlib.new(algorithm, data).hexdigest() == encoded:
                    return data
        self.discard(digest)
        return None

    def store(self, digest: str, data: bytes) -> None:
        """Keep a small blob; where that cannot be done, that is all.  Raises ImageError if `data` does not have the digest."""
        algorithm, encoded = split_digest(digest)
        if hashlib.new(algorithm, data).hexdigest() != encoded:
            raise ImageError(f"storing blob {digest[:19]}: its content does not have this digest")
        try:
            with self.temporary() as temporary:
                temporary.write(data)
                temporary.publish(f"blobs/{algorithm}", encoded)
        except CacheLost:
            pass

    def temporary(self) -> Temporary:
        """A file that may become a blob.  Raises CacheLost."""
        return Temporary(self)

    def discard(self, digest: str) -> bool:
        """Forget a blob that turned out to be damaged; whether it was there.  Raises ImageError for a malformed digest."""
        algorithm, encoded = split_digest(digest)
        with contextlib.suppress(OSError, HostError), self.room(f"blobs/{algorithm}") as room:
            os.unlink(encoded, dir_fd=room)
            return True
        return False

    # --- converted images -----------------------------------------------------------------------------------------------

    def image(self, key: str) -> str | None:
        """The path of the converted image of that key (see image_key), or None."""
        with contextlib.suppress(OSError, HostError), self.room("images") as room:
            found = os.stat(_image_name(key), dir_fd=room, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and found.st_size and found.st_uid == os.geteuid():
                return os.path.join(self.path, "images", _image_name(key))
        return None

    def new_image(self, key: str) -> NewImage:
        """A file to convert an image into.  Raises CacheLost."""
        return NewImage(self, key)

    def remember(self, key: str, source: str) -> None:
        """Note that `source` led to the image of that key, for list().  A note lost to another writer is no harm."""
        with contextlib.suppress(OSError, HostError):
            with self.room("images") as room:
                os.stat(_image_name(key), dir_fd=room)
                sources = set(_sources(room, key))
            if source in sources:
                return
            text = json.dumps({"sources": sorted({*sources, source})}).encode()
            with self.temporary() as temporary:
                temporary.write(text)
                temporary.publish("images", f"{key}.json", replace=True)

    # --- housekeeping ---------------------------------------------------------------------------------------------------

    def list(self) -> Sequence[Entry]:
        """Everything in the cache, sorted by kind and name; what vanishes meanwhile is left out."""
        found: list[Entry] = []
        for algorithm in DIGEST_LENGTHS:
            found += [Entry(f"{algorithm}:{name}", "blob", size, created) for name, size, created in self._files(f"blobs/{algorithm}")]
        for name, size, created in self._files("images"):
            if name.endswith(".sif"):
                with contextlib.suppress(OSError, HostError), self.room("images") as room:
                    found.append(Entry(name, "image", size, created, tuple(_sources(room, name[:-4]))))
        found += [Entry(name, "temporary", size, created) for name, size, created in self._files("tmp")]
        return sorted(found, key=lambda entry: (entry.kind, entry.name))

    def clean(self, days: float | None = None, dry_run: bool = False, kinds: Collection[str] | None = None) -> Sequence[Entry]:
        """Delete what is older than `days` (None: everything) and is of one of the `kinds`; temporary files only if stale.

        Returns what was deleted, or with `dry_run` what would be.  Raises HostError where it cannot be deleted.
        """
        before = time.time() - (days or 0) * 86400
        gone: list[Entry] = []
        for entry in self.list():
            if kinds is not None and entry.kind not in kinds:
                continue
            if entry.kind == "temporary":
                if not _stale(entry.name, entry.created, time.time()):
                    continue
            elif days is not None and entry.created > before:
                continue
            if not dry_run:
                self._remove(entry)
            gone.append(entry)
        return gone

    def _remove(self, entry: Entry) -> None:
        algorithm, _, encoded = entry.name.rpartition(":")
        room, names = {
            "blob": (f"blobs/{algorithm}", [encoded]),
            "image": ("images", [entry.name, entry.name[:-4] + ".json"]),
            "temporary": ("tmp", [entry.name]),
        }[entry.kind]
        try:
            with self.room(room) as fd:
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=fd)
        except OSError as error:
            raise HostError(f"cleaning the cache {escaped(self.path)}: {escaped(entry.name)}: {error.strerror}") from error

    def _files(self, room: str) -> Sequence[tuple[str, int, int]]:
        """(name, size, modification time) of the regular files in a room."""
        found: list[tuple[str, int, int]] = []
        with contextlib.suppress(OSError, HostError), self.room(room) as fd:
            for name in os.listdir(fd):
                with contextlib.suppress(OSError):
                    file = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    if stat.S_ISREG(file.st_mode):
                        found.append((name, file.st_size, int(file.st_mtime)))
        return found

    def sweep(self, now: float) -> None:
        """Remove the temporary files of dead writers, once for each Cache.  now: the file system's own clock, Unix s."""
        if self._swept:
            return
        self._swept = True
        for name, _, modified in self._files("tmp"):
            if _stale(name, modified, now):
                with contextlib.suppress(OSError, HostError), self.room("tmp") as room:
                    os.unlink(name, dir_fd=room)


def image_key(manifest_digest: str, *options: str) -> str:
    """The key of a converted image: what it is made of and how.  Raises ImageError for a malformed digest."""
    _, encoded = split_digest(manifest_digest)
    how = hashlib.sha256("\0".join(options).encode()).hexdigest()
    return f"{encoded}-{how[:16]}"


# --- files on their way ---------------------------------------------------------------------------------------------------


class Temporary:
    """A file in tmp/ until publish() gives it its name; a context manager that forgets it otherwise.  Raises CacheLost.

    fd: open for reading and writing.  The file stays usable through it when the name has gone.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.name = f"{_place()}.{os.getpid()}.{secrets.token_hex(8)}"
        with cache.losing("writing to"), cache.room("tmp", make=True) as room:
            self.fd = os.open(self.name, _NEW, 0o600, dir_fd=room)
        cache.sweep(os.fstat(self.fd).st_mtime)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._cache.losing("writing to"):
            while view:
                view = view[os.write(self.fd, view) :]

    def publish(self, room: str, name: str, *, replace: bool = False) -> None:
        """Flush the file and give it its final name, in which it is read-only.

        An entry of that name and size stays, because others may have it open: on NFS they would lose it.  One of another
        size is damaged and replaced; so is any with `replace`.
        """
        with self._cache.losing("writing to"):
            os.fchmod(self.fd, 0o444)
            os.fsync(self.fd)
            with self._cache.room("tmp") as source, self._cache.room(room, make=True) as target:
                if replace or not self._linked(source, target, name):
                    os.rename(self.name, name, src_dir_fd=source, dst_dir_fd=target)
                os.fsync(target)
        self.forget()

    def _linked(self, source: int, target: int, name: str) -> bool:
        try:
            os.link(self.name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except FileNotFoundError:
            raise
        except FileExistsError:
            there = os.stat(name, dir_fd=target, follow_symlinks=False)
            return stat.S_ISREG(there.st_mode) and there.st_size == os.fstat(self.fd).st_size
        except OSError:  # a file system without hard links
            return False
        return True

    def forget(self) -> None:
        """Take the temporary name away.  May be called twice, and by any thread."""
        with contextlib.suppress(OSError, HostError), self._cache.room("tmp") as room:
            os.unlink(self.name, dir_fd=room)

    def close(self) -> None:
        """May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.forget()
        self.close()


class NewImage(Temporary):
    """A converted image on its way: write to `fd`, then commit(); forgotten otherwise."""

    def __init__(self, cache: Cache, key: str) -> None:
        self._final = _image_name(key)
        super().__init__(cache)

    def commit(self) -> str:
        """Publish the image and return its path; if another process was faster, that one's.  Raises CacheLost."""
        self.publish("images", self._final)
        return os.path.join(self._cache.path, "images", self._final)


class CachedFile:
    """A file of the cache, open for reading; size: bytes.  Raises CacheLost when it cannot be read."""

    def __init__(self, fd: int, size: int, where: str) -> None:
        self.fd, self.size, self._where = fd, size, where

    def read(self, size: int) -> bytes:
        try:
            return os.read(self.fd, size)
        except OSError as error:
            raise CacheLost(f"reading from the cache {escaped(self._where)}: {error.strerror}") from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# --- small parts ----------------------------------------------------------------------------------------------------------


def _own_directory(parent: int, name: str, make: bool) -> int:
    """Open a directory of the cache's own, private to us.  Raises OSError, HostError."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        if os.fstat(fd).st_mode & 0o777 != 0o700:
            with contextlib.suppress(OSError):  # not ours, or a file system without modes: the check says which
                os.fchmod(fd, 0o700)
        _check_owner(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_owner(fd: int, path: str) -> None:
    """Others must not be able to put anything there.  Raises HostError."""
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise HostError(f"using the cache {escaped(path)}: the directory belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o022:
        raise HostError(f"using the cache {escaped(path)}: others may write to the directory", f"chmod go-w {escaped(path)}")


@functools.lru_cache(maxsize=1)
def _place() -> str:
    """Where a process id means something: host, boot and PID namespace, as a part of a file name."""
    host = re.sub(r"[^0-9A-Za-z-]", "-", os.uname().nodename)[:64] or "-"
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read(8)
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no /proc: no two processes can be told to share a place
        return f"{host}.{secrets.token_hex(4)}.0"
    return f"{host}.{boot}.{namespace}"


def _stale(name: str, modified: float, now: float) -> bool:
    """Whether the writer of a temporary file is dead: known by its process id here, guessed by the file's age elsewhere."""
    match = _TEMPORARY.fullmatch(name)
    if match and match["place"] == _place():
        try:
            os.kill(int(match["pid"]), 0)
        except (OSError, OverflowError):  # EPERM, too: another user has the process id by now
            return True
    return now - modified > ABANDONED


def _image_name(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"not a key of the cache: {key!r}")
    return f"{key}.sif"


def _sources(room: int, key: str) -> list[str]:
    """The references noted for an image; none if the note is missing or damaged."""
    try:
        with open(os.open(f"{key}.json", _FILE, dir_fd=room), "rb") as file:
            note = json.loads(file.read(SIDECAR_MAX))
        return sorted({str(source) for source in note["sources"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
