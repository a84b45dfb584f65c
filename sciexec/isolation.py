"""What keeps a payload apart from its host: user namespaces, capabilities, the filter of the terminal."""

from __future__ import annotations

import errno
import os
import struct
import sys

from sciexec import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.host import Host
    from sciexec.options import Options


class Isolation:
    """Who the payload is inside, and what it shares with the host.

    Arguments:
        uid, gid: the caller's.
    """

    __slots__ = ("gid", "uid")

    def __init__(self, uid: int, gid: int) -> None:
        self.uid, self.gid = uid, gid

    def describe_outer(self) -> list[str]:
        """What enter_outer() does, one line for each step."""
        return [f"user namespace {self.uid}:{self.gid} -> 0:0"]

    def describe_inner(self) -> list[str]:
        """What enter_inner() does, one line for each step."""
        return [f"user namespace 0:0 -> {self.uid}:{self.gid}"]

    def enter_outer(self, proc: int) -> None:
        """Become root of a user namespace, in which everything will be mounted.  proc: a descriptor of /proc/self.  Raises OSError."""
        user_namespace(proc, f"0 {self.uid} 1", f"0 {self.gid} 1")

    def enter_inner(self, proc: int) -> None:
        """Become who the payload is, for good.  Raises OSError."""
        user_namespace(proc, f"{self.uid} 0 1", f"{self.gid} 0 1")
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if has_terminal():
            kernel.seccomp(keystroke_filter())
        kernel.drop_bounding_set()
        kernel.capset_none()


def isolation(options: Options, host: Host) -> Isolation:
    """The isolation that these options ask for."""
    return Isolation(host.uid, host.gid)


def user_namespace(proc: int, uid_map: str, gid_map: str) -> None:
    """A new user namespace with these maps (user_namespaces(7)); proc is a descriptor of /proc/self."""
    kernel.unshare(kernel.CLONE_NEWUSER)
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
