"""Overlays of the user's own over an image, and images that are themselves written to.

    root     overlay                                    the kernel's, with userxattr; fuse-overlayfs over an ext3 image
      upper    the one overlay that is written to       --overlay PATH, --writable, or memory (--writable-tmpfs)
      lower    the other overlays, the last given first
               the overlay partitions of the image
               the image
               mount points that all of them lack       in memory, so that they are not left behind in upper

An overlay is a directory, an ext2, ext3 or ext4 file system in a file, a SquashFS, or a SIF with an overlay partition.  Of the
first two, what lies over the image is in the directory "upper" at its top, and "work" beside it is the kernel's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import time

from sciexec import ext3, fuse, image, kernel, overlay, sif, sinit, sources
from sciexec.errors import HostError, ImageError, SciexecError, escaped
from sciexec.mounts import Root
from sciexec.options import STARTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.host import Host
    from sciexec.image import Image
    from sciexec.mounts import Operation
    from sciexec.options import Options
    from sciexec.sinit import Link
    from sciexec.sources import Source

PATIENCE, PAUSE = 50, 0.02  # how often a lock is tried again, and after how many seconds
NOTICE = 3000  # milliseconds that the end of a server is waited for in silence


class Over:
    """One overlay, in the order of its calls.

    Arguments:
        path: of its file or directory.  writable: whether what the payload writes lands in it.
    """

    __slots__ = ("path", "writable")

    def __init__(self, path: str, *, writable: bool) -> None:
        self.path, self.writable = path, writable

    def describe(self) -> str:
        """One line."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What has to be done as the caller, before anything else.  Raises HostError."""

    def start(self, alive: int) -> None:
        """What has to be done inside the user namespace that will mount; alive: a descriptor for the server of what is written to."""

    def mount(self, target: str) -> str:
        """Mount it, and say which directory of it lies over the image.  Raises OSError, SciexecError."""
        raise NotImplementedError

    def finish(self) -> None:
        """What is left to do when everything is mounted."""


class Tree(Over):
    """A directory."""

    __slots__ = ()

    def describe(self) -> str:
        return f"overlay directory {escaped(self.path)} {'writable' if self.writable else 'read-only'}"

    def prepare(self) -> None:
        for name in ("upper", "work") if self.writable else ():
            try:
                os.makedirs(f"{self.path}/{name}", 0o755, exist_ok=True)
            except OSError as error:
                raise HostError(f"making {escaped(self.path)}/{name} for --overlay: {error.strerror}") from error

    def mount(self, target: str) -> str:
        kernel.mount(self.path, target, "", kernel.MS_BIND)
        if not self.writable:
            fd = os.open(target, os.O_PATH)
            kernel.make_read_only(fd, below=False)
            os.close(fd)
        return upper_of(target)


class Squashed(Over):
    """A SquashFS, in a file of its own or in a SIF.  Arguments: source: how it is mounted."""

    __slots__ = ("_source",)

    def __init__(self, path: str, source: Source) -> None:
        super().__init__(path, writable=False)
        self._source = source

    def describe(self) -> str:
        return f"overlay {self._source.describe()}"

    def prepare(self) -> None:
        self._source.prepare()

    def start(self, alive: int) -> None:
        self._source.start()

    def mount(self, target: str) -> str:
        self._source.mount(target)
        return target

    def finish(self) -> None:
        self._source.finish()


class Ext3(Over):
    """An ext2, ext3 or ext4 file system, in a file of its own or in a SIF, served by fuse2fs.

    Arguments: fd, offset: where it is.
    """

    __slots__ = ("_fd", "_server", "has_whiteouts", "offset")

    def __init__(self, path: str, fd: int, offset: int, *, writable: bool) -> None:
        super().__init__(path, writable=writable)
        self._fd, self.offset = fd, offset
        system = ext3.Ext3(fd, offset, path)
        program = sources.installed(fuse.FUSE2FS)
        if not program or not sources.has_fuse():
            reason = sources.CLOSED if program else f"{fuse.FUSE2FS} is not installed"
            raise HostError(f"mounting the overlay {escaped(path)}: {reason}", "a directory can be an overlay without it")
        mends = "" if offset else f"`e2fsck -f {escaped(path)}` mends it"
        if system.state & ext3.ERRORS:
            raise ImageError(f"opening the overlay {escaped(path)}: errors were found in its file system", mends)
        if system.needs_replay and not writable:
            raise ImageError(f"opening the overlay {escaped(path)}: its journal has to be replayed first", "a run without :ro does so")
        self.has_whiteouts = not writable and system.has_whiteouts()
        self._server = fuse.Ext3Server(fd, offset, path, program, system.owner("upper") or system.root_owner(), read_only=not writable)

    def describe(self) -> str:
        place = f" offset={self.offset}" if self.offset else ""
        return f"overlay ext3 {escaped(self.path)}{place} {'writable' if self.writable else 'read-only'}"

    def prepare(self) -> None:
        for attempt in range(PATIENCE, -1, -1):
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_EX if self.writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if attempt:  # the server of a run that has just ended
                    time.sleep(PAUSE)
            except OSError:  # a file system without locks
                return
        act = "writing to" if self.writable else "reading"
        raise HostError(
            f"{act} the overlay {escaped(self.path)}: another run {'uses' if self.writable else 'writes to'} it",
            "one may write, or several may read (:ro)",
        )

    def start(self, alive: int) -> None:
        self._server.start(alive if self.writable else -1)

    def mount(self, target: str) -> str:
        self._server.mount(target)
        if self.writable:
            for name in ("upper", "work"):
                os.makedirs(f"{target}/{name}", 0o755, exist_ok=True)
        return upper_of(target)

    def finish(self) -> None:
        self._server.finish()


def upper_of(target: str) -> str:
    """The directory of a mounted overlay that lies over the image: "upper", or all of it where there is none."""
    upper = f"{target}/upper"
    try:
        return upper if stat.S_ISDIR(os.lstat(upper).st_mode) else target
    except FileNotFoundError:
        return target


class Stack(overlay.Layers):
    """An image with overlays.

    Arguments:
        overs: the lowest first.  The others: as for Layers, writable meaning that memory lies over all of them.
        attended: whether the end of the run is the end of the command, which then waits for the server of an image file.
    """

    __slots__ = ("_alive", "_link", "attended", "overs")

    def __init__(self, source: Source, overs: list[Over], *, writable: bool, size: int, attended: bool) -> None:
        super().__init__(source, writable=writable, size=size)
        self.overs, self.attended = overs, attended
        self._alive = -1
        self._link: Link | None = None

    def describe(self) -> list[str]:
        first, last = super().describe()
        return [first, *(over.describe() for over in self.overs), *([] if self.upper else [last])]

    @property
    def upper(self) -> Over | None:
        """The overlay that is written to."""
        return self.overs[-1] if self.overs and self.overs[-1].writable else None

    def prepare(self) -> None:
        super().prepare()
        for over in self.overs:
            over.prepare()
        if isinstance(self.upper, Ext3) and self.attended:
            path = self.upper.path
            ended, self._alive = sinit.pipe()
            self._link = sinit.leave(init=False, supervisor=lambda *ids: Attendant(*ids, ended=ended, path=path))
            os.close(ended)

    def start(self) -> None:
        super().start()
        for over in self.overs:
            over.start(self._alive)
        if self._alive >= 0:
            os.close(self._alive)

    def mount(self, operations: list[Operation]) -> Root:
        os.mkdir("image")
        self.source.mount("image")
        lower = ["image"]
        for number, over in enumerate(self.overs):
            os.mkdir(f"over{number}")
            try:
                lower.insert(0, over.mount(f"over{number}"))
                os.stat(lower[0])  # until it is asked for, the root of a FUSE file system has no mode, and the overlay would keep that
            except OSError as error:
                raise HostError(f"mounting the overlay {escaped(over.path)}: {error.strerror}") from error
        if self.upper:
            return self._write_to(self.upper, lower, operations)
        union = any(isinstance(over, Ext3) and over.has_whiteouts for over in self.overs)
        try:
            place = overlay.memory(self.size) if self.writable else ""
            (fuse.union if union else overlay.overlay)("root", lower, place and f"{place}/upper", place and f"{place}/work")
        except OSError as error:
            raise HostError(f"mounting {self._named()} over the image: {error.strerror}", overlay.OLD) from error
        return Root("root", writable=self.writable)

    def _write_to(self, upper: Over, lower: list[str], operations: list[Operation]) -> Root:
        """The root, with `upper`, the first of `lower`, to be written to.

        Mount points are made in a stack of which memory is the uppermost, and then laid below the image.
        """
        try:
            place = overlay.memory(0)
            overlay.overlay("probe", lower, f"{place}/upper", f"{place}/work")
            probe = Root("probe", writable=True)
            for operation in operations:
                try:
                    operation.prepare(probe)
                except (OSError, SciexecError):  # said once, when it is done in earnest
                    pass
            os.close(probe.fd)
            kernel.umount2("probe", 0)
        except OSError as error:
            raise HostError(f"mounting {self._named()} over the image: {error.strerror}", overlay.OLD) from error
        first, *others = lower
        work = f"{first.rpartition('/')[0]}/work"
        layers = [*others, f"{place}/upper"]
        try:
            union = isinstance(upper, Ext3) or any(isinstance(over, Ext3) and over.has_whiteouts for over in self.overs)
            (fuse.union if union else overlay.overlay)("root", layers, first, work)
        except OSError as error:
            cause = "its file system cannot be the upper one of an overlay" if error.errno == errno.EINVAL else error.strerror
            hint = "an ext3 image can: `sciexec overlay create`"
            raise HostError(f"writing to the overlay {escaped(upper.path)}: {cause}", hint) from error
        return Root("root", writable=True, fixed=True)

    def _named(self) -> str:
        return ", ".join(escaped(over.path) for over in self.overs)

    def finish(self) -> None:
        super().finish()
        for over in self.overs:
            over.finish()
        if self._link:
            sinit.start(self._link, init=False)


class Written(overlay.Layers):
    """A directory that is itself written to (--writable): nothing is made in it but by the payload."""

    __slots__ = ()

    def describe(self) -> list[str]:
        return [self.source.describe()]

    def mount(self, operations: list[Operation]) -> Root:
        os.mkdir("image")
        self.source.mount("image")
        return Root("image", writable=True, fixed=True)


def layers(options: Options, run: Image, host: Host) -> overlay.Layers:
    """The layers that these options ask for.  Raises ImageError, HostError."""
    memory = options.writable_tmpfs
    if options.writable:
        if options.overlays:
            raise ImageError("--writable and --overlay: one of them can be written to, not both", "--overlay alone is enough")
        if memory and not options.quiet:
            sources.tell("WARNING: --writable-tmpfs is left out, as --writable writes to the image itself")
        memory = False
        if run.kind == "directory":
            return Written(sources.Directory(run.path, writable=True))
    overs = partitions(run, host, writable=options.writable, quiet=options.quiet)
    if options.writable and not (overs and overs[-1].writable):
        raise ImageError(
            f"--writable: {escaped(run.path)} cannot be written to: it has no ext3 overlay partition inside",
            f"`sciexec overlay create {escaped(run.path)}` adds one to a SIF; --writable-tmpfs forgets what is written",
        )
    for path, read_only in options.overlays:
        overs += opened(path, host, read_only=read_only, quiet=options.quiet)
    writable = [over for over in overs if over.writable]
    if len(writable) > 1:
        first, second = (escaped(over.path) for over in writable[:2])
        raise ImageError(f"--overlay: {first} and {second}: only one can be written to", f"the other as {second}:ro")
    if writable and memory:
        raise ImageError(
            f"--writable-tmpfs and --overlay {escaped(writable[0].path)}: only one can be written to",
            f"the other as {escaped(writable[0].path)}:ro",
        )
    overs = [over for over in overs if not over.writable] + writable
    source = sources.source(run, host, quiet=options.quiet, unsquash=options.unsquash)
    return Stack(source, overs, writable=memory, size=options.tmpfs_size, attended=options.verb not in STARTS)


def partitions(run: Image, host: Host, *, writable: bool, quiet: bool) -> list[Over]:
    """The overlay partitions of a SIF, the lowest first; with `writable` the last of ext3 is written to."""
    found = [descriptor for descriptor in run.sif.descriptors if descriptor.parttype == sif.PART_OVERLAY] if run.sif else []
    last = max((descriptor.id for descriptor in found if descriptor.fs == sif.FS_EXT3), default=0) if writable else 0
    # opened once more: the image's own server, which ends a moment later, must not hold the lock
    fd = os.open(kernel.magic(run.fd), os.O_RDONLY) if found else -1
    overs: list[Over] = []
    for descriptor in found:
        if descriptor.fs == sif.FS_EXT3:
            overs.append(Ext3(run.path, fd, descriptor.offset, writable=descriptor.id == last))
        elif descriptor.fs == sif.FS_SQUASHFS:
            found_image = image.Image(run.path, "sif", fd, descriptor.offset, descriptor.size, run.sif)
            overs.append(Squashed(run.path, sources.source(found_image, host, quiet=quiet)))
        else:
            raise ImageError(f"opening {escaped(run.path)}: its overlay partition {descriptor.id} is neither ext3 nor SquashFS")
    return [over for over in overs if not over.writable] + [over for over in overs if over.writable]


def opened(path: str, host: Host, *, read_only: bool, quiet: bool) -> list[Over]:
    """The overlays in a file or directory, by its content: one, or as many as a SIF has partitions for it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(fd)
        head = os.pread(fd, image.HEAD, 0) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise HostError(f"opening the overlay {escaped(path)}: {error.strerror}") from error
    writable = not read_only and os.access(path, os.W_OK)
    is_ext3 = head[ext3.MAGIC_OFFSET : ext3.MAGIC_OFFSET + 2] == ext3.MAGIC
    if not read_only and not writable and (is_ext3 or stat.S_ISDIR(status.st_mode)) and not quiet:
        sources.tell(f"WARNING: the overlay {escaped(path)} cannot be written to and is read only")
    if stat.S_ISDIR(status.st_mode):
        os.close(fd)
        return [Tree(path, writable=writable)]
    if sif.is_sif(head):
        found = partitions(image.Image(path, "sif", fd, parsed=sif.read(fd, path)), host, writable=writable, quiet=quiet)
        if not found:
            raise ImageError(f"opening the overlay {escaped(path)}: the SIF has no overlay partition", "`sciexec overlay create` adds one")
        return found
    if is_ext3:
        return [Ext3(path, fd, 0, writable=writable)]
    if head.startswith(image.SQUASHFS_MAGIC):
        return [Squashed(path, sources.source(image.open_image(path), host, quiet=quiet))]
    raise ImageError(f"opening the overlay {escaped(path)}: neither a directory nor ext3, SquashFS or SIF")


class Attendant(sinit.Supervisor):
    """Stays behind where a run writes to an image file: waits for the payload, then for the file's server, and ends as the payload did.

    So what a run wrote is there when the next one starts.

    Arguments: ended: read end of a pipe whose other end the server keeps open.  path: of the file.
    """

    __slots__ = ("ended", "path")

    def __init__(self, child: int, tell: int, reported: int, *, ended: int, path: str) -> None:
        super().__init__(child, tell, reported, init=False)
        self.ended, self.path = ended, path

    def kept(self) -> list[int]:
        return [*super().kept(), *range(3), self.ended]

    def end(self, status: int) -> NoReturn:
        kernel.signal_default(sinit.SIGINT)
        kernel.sigprocmask(kernel.SIG_SETMASK, bytes(len(kernel.ALL_SIGNALS)))  # who does not want to wait may end us
        poll = select.poll()
        poll.register(self.ended, select.POLLIN)
        if not poll.poll(NOTICE):
            sources.tell(f"INFO: waiting for the last process that uses {escaped(self.path)}")
            poll.poll()
        super().end(status)
