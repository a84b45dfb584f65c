"""What a container's file tree is made of: a list of small operations, each of which can say what it is and do it.

    operations = order([Bind("/proc", "/proc"), Tmpfs("/tmp"), ...])
    print(*(operation.describe() for operation in operations), sep="\\n")
    for operation in operations:
        operation.execute(root)

No path of a container is ever handed to the kernel as text: an image may hold any symbolic link at any place of it.  `Root`
resolves it as chroot would, and the mount goes to the descriptor that comes out.  A mount point that the image lacks is made
on a tmpfs or in an overlay of ours, never in the image and never on the host.

Nothing is remounted nosuid or nodev: the payload has no_new_privs, and device files work for it as they do outside.
"""

from __future__ import annotations

import errno
import os
import stat

from sciexec import kernel
from sciexec.errors import HostError, ImageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LINKS = 40  # symbolic links followed in one path, as the kernel does
FEW = 32  # entries of a directory that are bound one by one, about 30 us each, to save the cost of an overlay later on
PRIVATE = kernel.PRIVATE
LARGEST_FILE = 1 << 20  # bytes of an image's file that is read whole


# --- the root ---------------------------------------------------------------------------------------------------------------


class Root:
    """The root directory of a container that is being put together.

    Where the image is mounted as it is, a missing mount point is made by growing its parent directory: something writable of
    ours is mounted over that one directory and shows the same entries.  A few are bound back into a tmpfs one by one, more are
    left to an overlay.  So it costs nothing where nothing is missing, and files stay as fast as the image's own: a tree that
    is an overlay altogether is slower by a third when its files are opened for the first time.

    The process stands in a tmpfs of ours while there is a Root.

    Arguments:
        path: where the root is mounted, relative to that tmpfs.
        writable: whether mount points can be made in it directly, because it is an overlay.
    """

    def __init__(self, path: str, *, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
        self._grown = 0  # directories
        self._ours: set[int] = set()  # ids of mounts in which mount points can be made
        self._image: set[int] = set()  # ids of mounts that show the image
        self._used: set[tuple[int, int]] = set()  # device and inode of what operations have mounted
        (self._ours if writable else self._image).add(kernel.mount_id(self.fd))

    def find(self, path: str) -> int:
        """A descriptor (O_PATH) of what is at `path`, links followed inside the root only.  Raises OSError."""
        try:
            return kernel.openat2(self.fd, path, os.O_PATH, kernel.RESOLVE_IN_ROOT | kernel.RESOLVE_NO_MAGICLINKS)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EPERM):  # before Linux 5.6; a seccomp filter that does not know the call
                raise
        return self._walk(path, None)

    def make(self, path: str, *, directory: bool) -> int:
        """As `find`; what is missing is made first, where that is possible.

        Raises HostError where the missing part would have to be made in a directory of the host, OSError for the rest.
        """
        try:
            return self.find(path)
        except FileNotFoundError:
            return self._walk(path, directory)

    def own(self, fd: int) -> None:
        """Let missing mount points be made in the mount that fd stands on."""
        self._ours.add(kernel.mount_id(fd))

    def use(self, status: os.stat_result) -> None:
        """Remember what has been mounted, for `is_used`."""
        self._used.add((status.st_dev, status.st_ino))

    def is_used(self, fd: int) -> bool:
        """Whether fd stands on something that an operation has mounted; the image's links may lead two of them to one place."""
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) in self._used

    def _walk(self, path: str, directory: bool | None) -> int:
        """Resolve by hand: as openat2 with RESOLVE_IN_ROOT, with `directory` not None making what is missing."""
        names = path.split("/")[::-1]
        trail = [("", os.dup(self.fd))]  # from the root down to where we are
        links = 0
        try:
            while names:
                name = names.pop()
                if name in ("", "."):
                    continue
                if name == "..":
                    if len(trail) > 1:
                        os.close(trail.pop()[1])
                    continue
                try:
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=trail[-1][1])
                except FileNotFoundError:
                    if directory is None:
                        raise
                    self._create(trail, name, path, directory or any(names))
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=trail[-1][1])
                if not stat.S_ISLNK(os.fstat(fd).st_mode):
                    trail.append((name, fd))
                    continue
                target = os.readlink("", dir_fd=fd)
                os.close(fd)
                links += 1
                if links > LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                names += target.split("/")[::-1]
                if target.startswith("/"):
                    while len(trail) > 1:
                        os.close(trail.pop()[1])
            return trail.pop()[1]
        finally:
            for _, fd in trail:
                os.close(fd)

    def _create(self, trail: list[tuple[str, int]], name: str, path: str, directory: bool) -> None:
        """Make `name` where the trail ends, growing that directory first if it is the image's."""
        mount = kernel.mount_id(trail[-1][1])
        if mount in self._image:
            self._grow(trail)
        elif mount not in self._ours:
            inside = escaped("/".join(part for part, _ in trail))
            raise HostError(f"mounting on {escaped(path)}: {inside} is a directory of the host and has no {escaped(name)}", "make it first")
        here = trail[-1][1]
        if directory:
            os.mkdir(name, 0o755, dir_fd=here)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=here))

    def _grow(self, trail: list[tuple[str, int]]) -> None:
        """Cover the directory at the end of the trail by one of ours with the same entries; the trail then ends in that."""
        name, old = trail[-1]
        children = entries(old)
        self._grown += 1
        ours = f"grown{self._grown}"
        os.mkdir(ours)
        os.chmod(ours, stat.S_IMODE(os.fstat(old).st_mode))
        # an overlay does not show what is mounted below the directory already, and not every kernel gives it to a user
        bound = len(children) <= FEW or bool(self._used) or not self._overlay(old, ours)
        if bound:
            kernel.mount(ours, kernel.magic(old), "", kernel.MS_BIND)
        new = os.open(name, os.O_PATH, dir_fd=trail[-2][1]) if name else os.open(self.path, os.O_PATH)
        trail[-1] = name, new
        self.own(new)
        if not name:
            os.close(self.fd)
            self.fd = os.dup(new)
        if bound:
            for child, mode in children:
                self._bind_back(old, new, child, mode)
        os.close(old)

    def _overlay(self, old: int, upper: str) -> bool:
        work = f"work{self._grown}"
        os.mkdir(work)
        try:
            options = f"lowerdir={kernel.magic(old)},upperdir={upper},workdir={work},userxattr"
            kernel.mount("overlay", kernel.magic(old), "overlay", PRIVATE, options)
        except OSError:
            return False
        return True

    def _bind_back(self, old: int, new: int, child: str, mode: int) -> None:
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(child, dir_fd=old), child, dir_fd=new)
            return
        if stat.S_ISDIR(mode):
            os.mkdir(child, dir_fd=new)
        else:
            os.close(os.open(child, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=new))
        source = os.open(child, os.O_PATH, dir_fd=old)
        kernel.mount(kernel.magic(source), f"{kernel.magic(new)}/{child}", "", kernel.MS_BIND | kernel.MS_REC)
        target = os.open(child, os.O_PATH, dir_fd=new)
        for known in (self._image, self._ours):
            if kernel.mount_id(source) in known:
                known.add(kernel.mount_id(target))
        os.close(source)
        os.close(target)


def entries(directory: int) -> list[tuple[str, int]]:
    """Name and kind (S_IFMT) of everything in a directory, given by a descriptor of any kind."""
    listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(listing) as found:
            return [
                (entry.name, stat.S_IFLNK if entry.is_symlink() else stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG)
                for entry in found
            ]
    finally:
        os.close(listing)


# --- operations -------------------------------------------------------------------------------------------------------------


class Operation:
    """One step, done in two: all mount points are made before the first mount.

    Arguments:
        target: absolute path inside the container.
        optional: leave it out where it cannot be done, and where another operation has mounted something already.
    """

    __slots__ = ("optional", "target")

    def __init__(self, target: str, *, optional: bool = False) -> None:
        self.target = target
        self.optional = optional

    def describe(self) -> str:
        """One line: what, from where, to where."""
        raise NotImplementedError

    def start(self) -> None:
        """What has to be done inside the user namespace that mounts, and in front of its mount namespace.  Raises OSError."""

    def prepare(self, root: Root) -> None:
        """Make the mount point.  Raises OSError, HostError."""

    def execute(self, root: Root) -> None:
        """Mount.  Raises OSError, HostError, ImageError."""
        raise NotImplementedError


class Bind(Operation):
    """A file or directory of the host, with everything that is mounted below it.

    Arguments:
        source: absolute path on the host.
        unless_visible: leave it out where the target shows the source already.
    """

    __slots__ = ("read_only", "source", "unless_visible")

    def __init__(self, source: str, target: str, *, read_only: bool = False, optional: bool = False, unless_visible: bool = False) -> None:
        super().__init__(target, optional=optional)
        self.source = source
        self.read_only = read_only
        self.unless_visible = unless_visible

    def describe(self) -> str:
        notes = [note for note in ("read_only", "optional", "unless_visible") if getattr(self, note)]
        return " ".join(("bind", escaped(self.source), escaped(self.target), *notes))

    def prepare(self, root: Root) -> None:
        os.close(root.make(self.target, directory=stat.S_ISDIR(os.stat(self.source).st_mode)))

    def execute(self, root: Root) -> None:
        status = os.stat(self.source)
        target = root.make(self.target, directory=stat.S_ISDIR(status.st_mode))
        try:
            if self.unless_visible and os.path.samestat(os.fstat(target), status):
                return
            if self.optional and not self.unless_visible and root.is_used(target):
                return
            kernel.mount(self.source, kernel.magic(target), "", kernel.MS_BIND | kernel.MS_REC)
            root.use(status)
        finally:
            os.close(target)
        if self.read_only:
            covering = root.find(self.target)
            kernel.make_read_only(covering, below=True)
            os.close(covering)


class Tmpfs(Operation):
    """An empty directory in memory.

    Arguments:
        mode: of the directory.  size: in bytes; 0 for the kernel's default, half of the memory.
    """

    __slots__ = ("mode", "size")

    def __init__(self, target: str, *, mode: int = 0o755, size: int = 0, optional: bool = False) -> None:
        super().__init__(target, optional=optional)
        self.mode = mode
        self.size = size

    def describe(self) -> str:
        return f"tmpfs {escaped(self.target)} mode={self.mode:o}" + (f" size={self.size}" if self.size else "")

    def prepare(self, root: Root) -> None:
        os.close(root.make(self.target, directory=True))

    def execute(self, root: Root) -> None:
        self.cover(root)

    def cover(self, root: Root) -> int:
        """Mount it and give back a descriptor of it, which stays open until execve; -1 where it was left out."""
        target = root.make(self.target, directory=True)
        try:
            if self.optional and root.is_used(target):
                return -1
            options = f"mode={self.mode:o}" + (f",size={self.size}" if self.size else "")
            kernel.mount("tmpfs", kernel.magic(target), "tmpfs", PRIVATE, options)
        finally:
            os.close(target)
        covering = root.find(self.target)
        root.own(covering)
        root.use(os.fstat(covering))
        return covering


class Dev(Tmpfs):
    """A /dev with nothing in it but what every program expects, and terminals of its own.

    Arguments:
        console: the caller's terminal, which is not among those; "" for none.
        ipc: whether message queues are the container's own; then it shows them.
    """

    DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
    LINKS = (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx"))
    DIRECTORIES = (("pts", "devpts", "newinstance,ptmxmode=0666,mode=620"), ("shm", "tmpfs", "mode=1777"))

    MQUEUE = ("mqueue", "mqueue", "")

    __slots__ = ("console", "ipc")

    def __init__(self, target: str = "/dev", *, console: str = "", ipc: bool = False) -> None:
        super().__init__(target)
        self.console = console
        self.ipc = ipc

    def describe(self) -> str:
        return f"dev {self.target} {' '.join(self.DEVICES)}" + (f" console={self.console}" if self.console else "")

    def execute(self, root: Root) -> None:
        here = self.cover(root)
        binds = [(f"/dev/{name}", name) for name in self.DEVICES]
        if self.console:
            binds.append((self.console, "console"))
        for source, name in binds:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=here))
            kernel.mount(source, f"{kernel.magic(here)}/{name}", "", kernel.MS_BIND)
        for name, target in self.LINKS:
            os.symlink(target, name, dir_fd=here)
        for name, fstype, options in (*self.DIRECTORIES, *((self.MQUEUE,) if self.ipc else ())):
            os.mkdir(name, dir_fd=here)
            kernel.mount(fstype, f"{kernel.magic(here)}/{name}", fstype, kernel.MS_NOSUID | kernel.MS_NOEXEC, options)


class Proc(Operation):
    """A new /proc, which shows the process ids of our own namespace."""

    def describe(self) -> str:
        return f"proc {escaped(self.target)}"

    def prepare(self, root: Root) -> None:
        os.close(root.make(self.target, directory=True))

    def execute(self, root: Root) -> None:
        target = root.make(self.target, directory=True)
        try:
            kernel.mount("proc", kernel.magic(target), "proc", PRIVATE | kernel.MS_NOEXEC)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            raise HostError(
                "mounting a /proc for --pid: the kernel refuses, as parts of the host's own are hidden from us",
                "if this is a container, it was started with a masked /proc (Docker: --security-opt systempaths=unconfined)",
            ) from error
        finally:
            os.close(target)


class Edit(Operation):
    """A file of the image with a change, e.g. /etc/passwd with the caller in it; only where the image has the file.

    Arguments:
        change: from the file's content to what is seen instead of it.
        summary: what the change is, in a few words.
    """

    __slots__ = ("change", "summary")

    def __init__(self, target: str, change: Callable[[bytes], bytes], summary: str) -> None:
        super().__init__(target, optional=True)
        self.change = change
        self.summary = summary

    def describe(self) -> str:
        return f"edit {self.target} {self.summary}"

    def execute(self, root: Root) -> None:
        target = root.find(self.target)
        try:
            if root.is_used(target) or not stat.S_ISREG(os.fstat(target).st_mode):
                return
            file = os.open(kernel.magic(target), os.O_RDONLY)
            content = os.read(file, LARGEST_FILE)
            os.close(file)
            if len(content) == LARGEST_FILE:
                raise ImageError(f"reading the image's {self.target}: not smaller than {LARGEST_FILE} bytes")
            edited = self.target.replace("/", "_")
            file = os.open(edited, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.write(file, self.change(content))
            finally:
                os.close(file)
            kernel.mount(edited, kernel.magic(target), "", kernel.MS_BIND)
        finally:
            os.close(target)


def order(operations: Iterable[Operation]) -> list[Operation]:
    """The operations in an order in which none hides another: parents before children, else as given.

    Of several with the same target the last one counts.
    """
    last = {operation.target: operation for operation in operations}
    return sorted(last.values(), key=lambda operation: operation.target.rstrip("/").count("/"))


def outermost(operations: Iterable[Operation]) -> list[Operation]:
    """Those whose target does not lie below another's, of operations in order."""
    found: dict[str, Operation] = {}
    for operation in operations:
        parent = operation.target
        while parent and parent not in found:
            parent = parent.rpartition("/")[0]
        if not parent:
            found[operation.target] = operation
    return list(found.values())
