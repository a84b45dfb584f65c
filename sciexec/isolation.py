"""What keeps a payload apart from its host: user namespaces, capabilities, the filter of the terminal."""

from __future__ import annotations

import errno
import os
import struct
import sys

from sciexec import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from sciexec.host import Host
    from sciexec.options import Options
    from sciexec.sinit import Link

    class Supervisor(Protocol):
        """Who stays outside, and how process 1 begins: the room sinit, or whoever starts an instance."""

        def leave(self, *, init: bool) -> Link | None: ...

        def start(self, link: Link | None, *, init: bool) -> None: ...


class Isolation:
    """Who the payload is inside, and what it shares with the host.

    Arguments:
        uid, gid: the caller's.
        supervisor: the room sinit, where the payload gets process ids of its own; else None.
        init: whether process 1 is then sinit, or the payload itself.
    """

    __slots__ = ("_link", "_proc", "gid", "init", "supervisor", "uid")

    def __init__(self, uid: int, gid: int, *, supervisor: Supervisor | None = None, init: bool = True) -> None:
        self.uid, self.gid = uid, gid
        self.supervisor, self.init = supervisor, init
        self._proc = -1  # a descriptor of /proc/self
        self._link: Link | None = None

    def describe_outer(self) -> list[str]:
        """What enter_outer() and separate() do, one line for each step."""
        own = [f"own process ids, {'sinit' if self.init else 'the payload'} is 1"] if self.supervisor else []
        return [f"user namespace {self.uid}:{self.gid} -> 0:0", *own]

    def describe_inner(self) -> list[str]:
        """What enter_inner() does, one line for each step."""
        return [f"user namespace 0:0 -> {self.uid}:{self.gid}"]

    def enter_outer(self) -> None:
        """Become root of a user namespace, in which everything will be mounted.  Raises OSError."""
        self._proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
        user_namespace(self._proc, f"0 {self.uid} 1", f"0 {self.gid} 1")

    def separate(self) -> None:
        """Leave the host's mounts behind, and whatever else is not shared.  Raises OSError.

        With process ids of its own the caller's process stays outside, and another one returns.
        """
        kernel.unshare(kernel.CLONE_NEWNS | (kernel.CLONE_NEWPID if self.supervisor else 0))
        if self.supervisor:
            self._link = self.supervisor.leave(init=self.init)
            self._proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)

    def enter_inner(self) -> None:
        """Become who the payload is, for good.  Raises OSError."""
        user_namespace(self._proc, f"{self.uid} 0 1", f"{self.gid} 0 1")
        self.confine()

    def confine(self) -> None:
        """Give up, in the payload's user namespace, what the payload shall not have.  Raises OSError."""
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if has_terminal():
            kernel.seccomp(keystroke_filter())
        kernel.drop_bounding_set()
        kernel.capset_none()

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
    return Isolation(host.uid, host.gid, supervisor=supervisor, init=not options.no_init)


def user_namespace(proc: int, uid_map: str, gid_map: str) -> None:
    """A new user namespace with these maps (user_namespaces(7)); proc is a descriptor of /proc/self."""
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
        fd = os.open(name, os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


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
