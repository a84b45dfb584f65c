"""--fusemount: a FUSE program of the host's or of the image's serves a directory of the container.

The file system is mounted by us, in whose ids the caller is the caller; the program gets the device, and its name /dev/fd/3
where it expects a mount point, so that it needs no privilege and no fusermount (libfuse 3.3 and later know such names).

    host       forked before the first namespace: the caller, in the host's tree, with the caller's environment
    container  forked when all else is mounted, into a mount namespace that lacks the new mount alone; the caller inside

So the program does not hold what it serves: the mount goes with the payload's last process, and the device says so.
"""

from __future__ import annotations

import _socket
import os

from sciexec import environment, fuse, kernel, sinit
from sciexec.errors import HostError, UsageError, escaped
from sciexec.mounts import Operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.host import Host
    from sciexec.mounts import Root

KINDS = ("container", "container-daemon", "host", "host-daemon")
DEVICE, REPORT = 3, 4  # descriptors of a program: the device, and until it is executed a pipe that says why it is not


class FuseMount(Operation):
    """A directory that a program serves.

    Arguments:
        kind: of KINDS; a daemon goes into the background itself, when it serves.
        words: the program and its arguments.
        environment: of a program of the image's; one of the host's gets the caller's.
    """

    __slots__ = ("_device", "_failed", "_host", "_socket", "_starter", "_tree", "environment", "kind", "words")

    def __init__(self, target: str, kind: str, words: list[str], host: Host, environment: dict[str, str]) -> None:
        super().__init__(target, asked=True)
        self.kind, self.words, self.environment, self._host = kind, words, environment, host
        self._device = self._tree = self._starter = self._failed = -1
        self._socket: _socket.socket | None = None

    def describe(self) -> str:
        return f"fuse {escaped(self.target)} served by {self.kind}: {' '.join(map(ascii, self.words))}"

    @property
    def is_daemon(self) -> bool:
        return self.kind.endswith("-daemon")

    def begin(self) -> None:
        if not self.kind.startswith("host"):
            return
        self._socket, theirs = _socket.socketpair()
        self._failed, report = sinit.pipe()
        self._starter = os.fork()
        if self._starter == 0:
            try:
                self._socket.close()
                self._separate()
                for device in fuse.receive(theirs, 1):
                    self._execute(device, report, dict(os.environ))
            finally:
                os._exit(127)
        theirs.close()
        os.close(report)

    def start(self) -> None:
        self._tree, self._device = fuse.mounted(self._host.uid, self._host.gid)
        if self._socket:
            fuse.send(self._socket, self._device)
            self._socket.close()
            os.close(self._device)

    def prepare(self, root: Root) -> None:
        os.close(root.make(self.target, directory=True))

    def execute(self, root: Root) -> None:
        target = root.make(self.target, directory=True)
        if not self._socket:
            self._start_inside(root)
        kernel.move_mount(self._tree, target)
        os.close(self._tree)
        os.close(target)
        said = os.read(self._failed, 4096)  # ends when the program is executed
        os.close(self._failed)
        if said:
            raise HostError(f"--fusemount {escaped(self.words[0])}: {escaped(said)}")
        status = fuse.reap(self._starter)
        if status:
            raise HostError(f"--fusemount {escaped(self.words[0])}: it ended with {os.waitstatus_to_exitcode(status)} before it served")

    def _start_inside(self, root: Root) -> None:
        ready, set_ready = sinit.pipe()
        self._failed, report = sinit.pipe()
        self._starter = os.fork()
        if self._starter == 0:
            try:
                self._separate()
                kernel.unshare(kernel.CLONE_NEWNS)
                os.write(set_ready, b".")
                os.close(self._tree)
                proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
                root.become()
                kernel.unshare(kernel.CLONE_NEWUSER)
                kernel.map_ids(proc, f"{self._host.uid} 0 1", f"{self._host.gid} 0 1")
                kernel.drop_bounding_set(0)
                kernel.capset(0)
                self._execute(self._device, report, self.environment)
            except OSError as error:
                os.write(report, (error.strerror or str(error)).encode())
            finally:
                os._exit(127)
        for fd in (set_ready, report, self._device):
            os.close(fd)
        os.read(ready, 1)
        os.close(ready)

    def _separate(self) -> None:
        """Leave the caller's session; what goes on in the foreground becomes init's child, not the payload's."""
        os.setsid()
        if not self.is_daemon and os.fork():
            os._exit(0)

    def _execute(self, device: int, report: int, environ: dict[str, str]) -> NoReturn:
        """Become the program."""
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        high = [os.dup2(fd, 100 + number) for number, fd in enumerate((device, report))]  # out of each other's way
        os.dup2(high[0], DEVICE)
        os.dup2(high[1], REPORT, inheritable=False)
        kernel.close_range(REPORT + 1, -1)
        argv = [*self.words, f"/dev/fd/{DEVICE}", *([] if self.is_daemon else ["-f"])]
        program = self.words[0]
        failure: OSError = FileNotFoundError(2, "executable file not found in $PATH")
        for path in [program] if "/" in program else [f"{place}/{program}" for place in environ.get("PATH", "").split(":") if place]:
            try:
                os.execve(path, argv, environ)
            except OSError as error:
                if "/" in program or os.path.lexists(path):  # not where the directory cannot be searched
                    failure = error
        os.write(REPORT, (failure.strerror or str(failure)).encode())
        os._exit(127)


def fusemounts(given: list[str], host: Host, home: str) -> list[FuseMount]:
    """The operations of --fusemount KIND:COMMAND MOUNTPOINT, each as written.  Raises UsageError."""
    found = []
    for text in given:
        kind, _, rest = text.partition(":")
        *words, target = rest.split() or [""]
        if kind not in KINDS:
            raise UsageError(f"--fusemount {escaped(text)}: it begins with none of {', '.join(f'{kind}:' for kind in KINDS)}")
        if not words or not target.startswith("/"):
            hint = "MOUNTPOINT is a path inside and begins with a slash"
            raise UsageError(f"--fusemount {escaped(text)}: not {kind}:COMMAND MOUNTPOINT", hint)
        variables = {"PATH": environment.DEFAULT_PATH, "HOME": home}
        found.append(FuseMount(os.path.normpath(target), kind, words, host, variables))
    return found
