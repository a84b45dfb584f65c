"""What keeps a payload apart from its host: user namespaces, capabilities, the filter of the terminal."""

from __future__ import annotations

import errno
import os
import struct
import sys

from sciexec import kernel
from sciexec.errors import escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from sciexec.host import Host
    from sciexec.limits import Limits
    from sciexec.options import Options
    from sciexec.sinit import Link

    class Supervisor(Protocol):
        """Who stays outside, and how process 1 begins: the room sinit, or whoever starts an instance."""

        def leave(self, *, init: bool) -> Link | None: ...

        def start(self, link: Link | None, *, init: bool) -> None: ...


# The kernel's names, in the order in which they are joined: the mount namespace last, it takes /proc out of sight.
NAMESPACES = (
    ("ipc", kernel.CLONE_NEWIPC), ("uts", kernel.CLONE_NEWUTS), ("net", kernel.CLONE_NEWNET), ("cgroup", kernel.CLONE_NEWCGROUP),
    ("mnt", kernel.CLONE_NEWNS),
)  # fmt: skip


class Isolation:
    """Who the payload is inside, and what it shares with the host.

    Arguments:
        uid, gid: the caller's.  inside: the payload's uid and gid.
        capabilities: what it keeps, as a mask; they count in its own user namespace only, over mounts of its own.
        supervisor: the room sinit, where the payload gets process ids of its own; else None.
        init: whether process 1 is then sinit, or the payload itself.
        ipc, net: whether it gets System V IPC and a network of its own.
        hostname: its own host name; None for the host's.
        umask: to set; None for the caller's.
        limits: of resources; None for the caller's.
    """

    __slots__ = (
        "_link", "capabilities", "gid", "hostname", "init", "inside", "ipc", "limits", "net", "proc", "supervisor", "uid", "umask"
    )  # fmt: skip

    def __init__(
        self,
        uid: int,
        gid: int,
        inside: tuple[int, int],
        *,
        capabilities: int = 0,
        supervisor: Supervisor | None = None,
        init: bool = True,
        ipc: bool = False,
        net: bool = False,
        hostname: str | None = None,
        umask: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.uid, self.gid, self.inside = uid, gid, inside
        self.capabilities = capabilities
        self.supervisor, self.init = supervisor, init
        self.ipc, self.net, self.hostname, self.umask = ipc, net, hostname, umask
        self.limits = limits
        self.proc = -1  # a descriptor of /proc/self
        self._link: Link | None = None

    def describe_outer(self) -> list[str]:
        """What enter_outer() and separate() do, one line for each step."""
        own = [f"own process ids, {'sinit' if self.init else 'the payload'} is 1"] if self.supervisor else []
        limited = self.limits.describe() if self.limits else []
        return [*limited, f"user namespace {self.uid}:{self.gid} -> 0:0", *own, *(["own ipc"] if self.ipc else [])]

    def describe_inner(self) -> list[str]:
        """What enter_inner() does, one line for each step."""
        lines = ["user namespace 0:0 -> {}:{}".format(*self.inside)]
        if self.capabilities:
            lines.append(f"own mounts, capabilities {self.capabilities:x}")
        if self.hostname is not None:
            lines.append(f"host name {escaped(self.hostname)}")
        if self.net:
            lines.append("own network, loopback")
        if self.umask is not None:
            lines.append(f"umask {self.umask:04o}")
        return lines

    def enter_outer(self) -> None:
        """Become root of a user namespace, in which everything will be mounted.  Raises OSError, HostError."""
        if self.limits:
            self.limits.prepare()
        self.proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        user_namespace(self.proc, f"0 {self.uid} 1", f"0 {self.gid} 1")

    def separate(self) -> None:
        """Leave the host's mounts behind, and whatever else is not shared.  Raises OSError.

        With process ids of its own the caller's process stays outside, and another one returns.
        """
        if self.supervisor:
            kernel.unshare(kernel.CLONE_NEWPID)
            self._link = self.supervisor.leave(init=self.init)
            self.proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        if self.limits:
            self.limits.join()
        kernel.unshare(kernel.CLONE_NEWNS | (kernel.CLONE_NEWIPC if self.ipc else 0))

    def enter_inner(self) -> None:
        """Become who the payload is, for good.  Raises OSError."""
        own = kernel.CLONE_NEWNS if self.capabilities else 0  # a copy of our mounts, of which the payload cannot undo any
        own |= kernel.CLONE_NEWUTS if self.hostname is not None else 0
        own |= kernel.CLONE_NEWNET if self.net else 0
        uid, gid = self.inside
        user_namespace(self.proc, f"{uid} 0 1", f"{gid} 0 1", own)
        if self.hostname is not None:
            kernel.sethostname(self.hostname)
        if self.net:
            kernel.bring_up_loopback()
        self.confine()

    def confine(self) -> None:
        """Give up, in the payload's user namespace, what the payload shall not have.  Raises OSError."""
        if self.umask is not None:
            os.umask(self.umask)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if has_terminal():
            kernel.seccomp(keystroke_filter())
        kernel.drop_bounding_set(self.capabilities)
        kernel.capset(self.capabilities)
        kernel.raise_ambient(self.capabilities)

    def finish(self) -> None:
        """The last step: what returns from it is the payload's process."""
        if self.supervisor:
            self.supervisor.start(self._link, init=self.init)


def isolation(options: Options, host: Host) -> Isolation:
    """The isolation that these options ask for."""
    supervisor: Supervisor | None = None
    if options.pid:
        from sciexec import sinit

        supervisor = sinit
    limited: Limits | None = None
    if options.limits or options.apply_cgroups:
        from sciexec import limits

        limited = limits.limits(options)
    return Isolation(
        host.uid,
        host.gid,
        identity(options, host),
        capabilities=capabilities(options),
        supervisor=supervisor,
        init=not options.no_init,
        ipc=options.ipc,
        net=options.net,
        hostname=(options.hostname or os.uname().nodename) if options.uts else None,
        umask=0o022 if options.no_umask else None,
        limits=limited,
    )


def identity(options: Options, host: Host) -> tuple[int, int]:
    """The payload's uid and gid inside."""
    uid, gid = (0, 0) if options.fakeroot else (host.uid, host.gid)
    return uid if options.uid is None else options.uid, gid if options.gid is None else options.gid


def capabilities(options: Options) -> int:
    """The mask of what the payload keeps: nothing, or as root of its own namespace everything."""
    if not (options.fakeroot or options.add_caps):
        return 0
    everything = (1 << kernel.last_capability() + 1) - 1
    added, dropped = (mask(names) & everything for names in (options.add_caps, options.drop_caps))
    return ((everything if options.fakeroot and not options.no_privs else 0) | added) & ~dropped


def mask(names: list[str]) -> int:
    """A bit for each capability; "all" is every one."""
    return -1 if "all" in names else sum(1 << kernel.CAPABILITIES.index(name) for name in set(names))


def user_namespace(proc: int, uid_map: str, gid_map: str, own: int = 0) -> None:
    """A new user namespace with these maps (user_namespaces(7)), and of others (CLONE_NEW...) that belong to it.

    proc: a descriptor of /proc/self.
    """
    kernel.unshare(kernel.CLONE_NEWUSER | own)
    kernel.map_ids(proc, uid_map, gid_map)


def has_terminal() -> bool:
    """Whether there is a terminal to type into; a batch job has none and goes without the filter."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def keystroke_filter() -> bytes:
    """A seccomp program: ioctl(fd, TIOCSTI or TIOCLINUX, ...) fails with EPERM, everything else passes.

    Both put text into the caller's terminal, which the shell reads when the payload has ended.  The numbers of ioctl in all of
    the machine's call tables are compared without looking at the table: by another's number nothing sensible has such an argument.

        0        load the call's number
        1..n     ioctl? -> n+2
        n+1      allow
        n+2      load the low half of the second argument
        n+3, 4   TIOCSTI or TIOCLINUX? -> n+6
        n+5      allow
        n+6      EPERM
    """
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    low_half = 24 if sys.byteorder == "little" else 28
    numbers = kernel.ioctl_numbers()
    program = [(load, 0, 0, 0)]
    program += [(equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(give, 0, 0, allow), (load, 0, 0, low_half), (equal, 2, 0, 0x5412), (equal, 1, 0, 0x541C)]
    program += [(give, 0, 0, allow), (give, 0, 0, deny)]
    return b"".join(struct.pack("@HBBI", *instruction) for instruction in program)
