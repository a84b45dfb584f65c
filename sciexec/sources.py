"""From an image to a mounted file system: what has to be done outside, in the user namespace, and in the mount namespace.

A SquashFS is mounted through FUSE, or unpacked once where the host has none; a directory is bound.
"""

from __future__ import annotations

import errno
import os
import sys

from sciexec import host as hosts
from sciexec import kernel, squashfs
from sciexec.errors import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.host import Host
    from sciexec.image import Image

OURS = os.path.join(os.path.dirname(__file__), "sciexec-fuse")  # native/fuse.c, where there was a compiler
MAX_READ = 1 << 20  # bytes that the kernel asks for at once; READ_MAX there
# Where distributions, sites and Apptainer's own packages put it; the caller's PATH may lead anywhere.
SERVER = "squashfuse_ll"
PLACES = (
    os.path.dirname(sys.executable), "/usr/bin", "/usr/local/bin", "/usr/sbin", "/usr/libexec/apptainer/bin",
    "/usr/local/libexec/apptainer/bin",
)  # fmt: skip
SERVERS = tuple(f"{place}/{SERVER}" for place in PLACES)
CLOSED = "/dev/fuse is missing or closed to users"


def installed(program: str) -> str:
    """The absolute path of a program that serves a file system; "" where there is none."""
    return next((path for path in (f"{place}/{program}" for place in PLACES) if os.access(path, os.X_OK)), "")


def has_fuse() -> bool:
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


class Source:
    """What the root of a container is mounted from, in the order of its calls."""

    __slots__ = ()

    def describe(self) -> str:
        """One line."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What has to be done as the caller, before anything else."""

    def start(self) -> None:
        """What has to be done inside the user namespace that will mount, and in front of its mount namespace."""

    def mount(self, target: str) -> None:
        """Mount it, read-only.  Raises OSError."""
        raise NotImplementedError

    def finish(self) -> None:
        """What is left to do when everything is mounted."""


class Squash(Source):
    """A SquashFS, mounted through FUSE and served by our sciexec-fuse, a process that nobody waits for.

    The server belongs to our first user namespace, so that the payload, which lives in one below, cannot trace it, but to the
    host's mount namespace, so that it does not keep ours alive: when the payload's last process ends, the kernel drops the
    mount and the server reads ENODEV and ends.  It keeps no descriptor, no variable and no capability of ours, and cannot write
    to any file system where the kernel has Landlock.

    Arguments:
        fd, offset: the SquashFS.  name: what to call it.  program: absolute path of the server.
    """

    __slots__ = ("_device", "_go", "_parent", "fd", "name", "offset", "program")

    def __init__(self, fd: int, offset: int, name: str, program: str) -> None:
        self.fd, self.offset, self.name, self.program = above_standard(fd), offset, name, program
        self._device = self._go = self._parent = -1

    def describe(self) -> str:
        return f"squashfs {escaped(self.name)} offset={self.offset} served by {self.program}"

    def start(self) -> None:
        # the kernel wants the device opened in the user namespace that mounts it
        self._device = above_standard(os.open("/dev/fuse", os.O_RDWR))
        ready, self._go = map(above_standard, os.pipe())
        self._parent = self.launch(ready)
        os.close(ready)

    def launch(self, ready: int) -> int:
        """Start the server; it may read the device once it has read a byte from `ready`.

        Returns the process to wait for, whose child the server is: not the payload's, but init's.
        """
        # spawned, not forked: the fork of an interpreter, and what both sides then copy of it, take a millisecond
        for fd in (self.fd, self._device, ready):
            os.set_inheritable(fd, True)
        process = os.posix_spawn(self.program, ["sciexec-fuse", *map(str, (self.fd, self._device, ready, self.offset))], {})
        os.set_inheritable(self.fd, False)
        return process

    def mount(self, target: str) -> None:
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_READ}"
        kernel.mount("squashfuse", target, "fuse", kernel.PRIVATE | kernel.MS_RDONLY, options)
        try:
            os.write(self._go, b".")
        except BrokenPipeError as error:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN)) from error
        os.close(self._go)
        # the server's must be the last: then its death is an error here and not a wait without end
        os.close(self._device)

    def finish(self) -> None:
        try:
            os.waitpid(self._parent, 0)
        except ChildProcessError:  # our caller ignores SIGCHLD, and so do we
            pass


class Squashfuse(Squash):
    """The same, served by squashfuse_ll: where ours could not be compiled, or lacks the compression (lzma, lzo)."""

    __slots__ = ()

    def launch(self, ready: int) -> int:
        parent = os.fork()
        if parent == 0:
            try:
                os.setsid()
                if os.fork() == 0:
                    self._serve(ready)
            finally:
                os._exit(127)
        return parent

    def _serve(self, ready: int) -> None:
        bare(self.fd, self._device, ready)
        os.set_inheritable(self.fd, True)
        os.set_inheritable(self._device, True)
        confine()
        arguments = [SERVER, "-f", "-o", f"ro,offset={self.offset}", kernel.magic(self.fd), f"/dev/fd/{self._device}"]
        # read by the server before the mount exists, the device answers EPERM; by now it mostly does exist
        if os.read(ready, 1):
            os.execve(self.program, arguments, {})


class Directory(Source):
    """An unpacked image.  Arguments: path: absolute, on the host.  writable: what is written lands in it."""

    __slots__ = ("path", "writable")

    def __init__(self, path: str, *, writable: bool = False) -> None:
        self.path, self.writable = path, writable

    def describe(self) -> str:
        return f"directory {escaped(self.path)}" + (" writable" if self.writable else "")

    def mount(self, target: str) -> None:
        kernel.mount(self.path, target, "", kernel.MS_BIND | kernel.MS_REC)
        if not self.writable:
            fd = os.open(target, os.O_PATH)
            kernel.make_read_only(fd, below=True)
            os.close(fd)


class Unpacked(Directory):
    """A SquashFS that is unpacked once into the cache, and then mounted like any directory: on a host without FUSE, or on demand.

    Arguments:
        reason: why it is not mounted, for the message that says so.
    """

    __slots__ = ("_image", "_quiet", "_reason")

    def __init__(self, image: Image, directory: str, reason: str, *, quiet: bool) -> None:
        super().__init__(directory)
        self._image = image
        self._reason = reason
        self._quiet = quiet

    def describe(self) -> str:
        return f"unpack {self._image.describe()} into {escaped(self.path)} ({self._reason})"

    def prepare(self) -> None:
        if not os.path.isdir(self.path):
            if not self._quiet:
                tell(f"INFO: {self._reason}: unpacking {escaped(self._image.path)}, once, into {escaped(self.path)}")
            self._image.unpack(self.path)


def above_standard(fd: int) -> int:
    """The same file on a descriptor above 2: who is started with a standard stream closed gets its number for the next file."""
    while fd <= 2:
        fd = os.dup(fd)
    return fd


def bare(*kept: int) -> list[int]:
    """Leave everything of the caller's behind but these descriptors, whose numbers may change; standard streams lead nowhere."""
    os.chdir("/")
    fds = [above_standard(fd) for fd in kept if fd >= 0]
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in fds:
            try:
                os.close(number)
            except OSError:  # the listing's own
                pass
    return fds


def tell(text: str) -> None:
    """A line for the user; where standard error is closed, nobody wants to know."""
    try:
        os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        pass


def confine() -> None:
    """Give up what a process that reads hostile images should not have; the kernel's age decides how much that is."""
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)  # also keeps execve from giving capabilities back to our namespace's root
    try:
        kernel.landlock_restrict_writes()
    except OSError:  # before Linux 5.13, or turned off
        pass
    kernel.capset(0)


def source(image: Image, host: Host, *, quiet: bool, unsquash: bool = False) -> Source:
    """How an image is mounted on this host; with `unsquash` unpacked in any case."""
    if image.kind == "directory":
        return Directory(image.path)
    if unsquash:  # asked for, so there is nothing to say
        return Unpacked(image, f"{hosts.cache(host)}/unpacked/{image.key()}", "--unsquash", quiet=True)
    ours = [OURS] if squashfs.check_superblock(image.fd, image.offset, image.size).compression_name not in ("lzma", "lzo") else []
    program = next((program for program in (*ours, *SERVERS) if os.access(program, os.X_OK)), None)
    if program and has_fuse():
        return (Squash if program == OURS else Squashfuse)(image.fd, image.offset, image.path, program)
    reason = CLOSED if program else f"neither {os.path.basename(OURS)} nor {SERVER} is installed"
    return Unpacked(image, f"{hosts.cache(host)}/unpacked/{image.key()}", reason, quiet=quiet)
