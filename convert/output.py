"""An output file appears whole or not at all.

While the file grows a thread pushes it to the disk piece by piece, so that little is left to wait for at the end.

The file is written without a name (O_TMPFILE) in the directory it will live in, so that a process killed at any moment leaves
nothing behind; where the file system cannot do that it has a hidden temporary name.  publish() flushes it, gives it its name
by rename(2), and flushes the directory: after that it survives a power cut, and before that the old file is untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from types import TracebackType

from sciexec.errors import HostError, UsageError

FLUSHED = 0.5  # seconds between two pushes
PIECE = 1 << 20  # bytes


class Output:
    """A file being made; a context manager that discards it unless publish() was called.

    Arguments:
        path: the final name.  force: replace an existing file.  mode: permission bits before the umask.

    Raises: UsageError if `path` exists and force is not given; HostError where nothing can be written there.
    """

    def __init__(self, path: str, *, force: bool = False, mode: int = 0o755) -> None:
        self.path, self._force = path, force
        self._directory = os.path.dirname(path) or "."
        self._temporary: str | None = None
        if not force and os.path.lexists(path):
            raise UsageError(f"writing {path}: the file already exists", "--force replaces it")
        if os.path.isdir(path):
            raise UsageError(f"writing {path}: it is a directory")
        try:
            self.fd = self._open(mode)
        except OSError as error:
            raise HostError(f"writing {path}: {error.strerror}") from error
        self._failure: OSError | None = None
        self._done = threading.Event()
        self._flusher = threading.Thread(target=self._flush, name="flush", daemon=True)
        self._flusher.start()

    def _flush(self) -> None:
        try:
            while not self._done.wait(FLUSHED):
                os.fdatasync(self.fd)
        except OSError as error:  # the kernel tells it once: publish() has to hear of it from here
            self._failure = error

    def _open(self, mode: int) -> int:
        try:
            return os.open(self._directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
        except OSError as error:
            # EISDIR and ENOENT: kernels and file systems that take O_TMPFILE for a plain open of the directory
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
        self._temporary = self._name()
        return os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def _name(self) -> str:
        return os.path.join(self._directory, f".{os.path.basename(self.path)[:200]}.{secrets.token_hex(6)}.part")

    def publish(self) -> None:
        """Flush the file and give it its name; where others were quicker, but made the same, theirs is as good.

        Raises HostError, UsageError.
        """
        self._done.set()
        self._flusher.join()
        try:
            if self._failure is not None:
                raise self._failure
            os.fsync(self.fd)
            if self._temporary is None:
                name = self._name()
                # /proc is how an unprivileged process links a nameless file: open(2), O_TMPFILE
                os.link(f"/proc/self/fd/{self.fd}", name, src_dir_fd=self.fd, follow_symlinks=True)
                self._temporary = name
            if self._force or not self._linked(self._temporary):
                os.rename(self._temporary, self.path)
            self._temporary = None
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except FileExistsError:
            if not self._is_made():
                raise UsageError(f"writing {self.path}: another file of that name was made meanwhile", "--force replaces it") from None
        except OSError as error:
            raise HostError(f"writing {self.path}: {error.strerror}") from error

    def _is_made(self) -> bool:
        """Whether a file of this name holds the same bytes: jobs that start together fetch the same image at the same time."""
        try:
            with open(self.path, "rb") as theirs, open(self.fd, "rb", closefd=False) as ours:
                ours.seek(0)
                while True:
                    piece = ours.read(PIECE)
                    if theirs.read(PIECE) != piece:
                        return False
                    if not piece:
                        return True
        except OSError:
            return False

    def _linked(self, temporary: str) -> bool:
        """Give the file its name by link(2), which unlike rename(2) fails if the name was taken meanwhile."""
        try:
            os.link(temporary, self.path, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: the check in __init__ has to do
            return False
        os.unlink(temporary)
        return True

    def close(self) -> None:
        """Forget the file unless it was published.  May be called twice."""
        self._done.set()
        self._flusher.join()
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
