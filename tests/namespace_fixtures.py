"""Runs a function in namespaces of its own, as a run of ours makes them: a child process, real system calls, no trace left.

And what the tests of a run say of their fixtures (run_fixtures).
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from sciexec import enter, isolation, kernel

ENOSYS = 38

Need = Callable[..., str]


class Command(Protocol):
    def __call__(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, input: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]: ...


Make = Callable[[Path, str], Path]


def inside(act: Callable[[], None], *, before: Callable[[], None] | None = None, missing: tuple[int, ...] = ()) -> None:
    """Call act() as root of a user namespace, in a mount namespace, standing in an empty tmpfs; fails as act() does.

    Arguments:
        before: called in the user namespace, but in front of the mount namespace.
        missing: numbers of system calls that this kernel shall not have.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            uid, gid = os.getuid(), os.getgid()
            proc = os.open("/proc/self", os.O_PATH)
            isolation.user_namespace(proc, f"0 {uid} 1", f"0 {gid} 1")
            if before:
                before()
            kernel.unshare(kernel.CLONE_NEWNS)
            kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
            enter.stand_aside()
            if missing:
                kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
                kernel.seccomp(without(missing))
            act()
            code = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-60000:])
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if status:
        pytest.fail(f"in the namespace (status {status}):\n{text}", pytrace=False)


def without(calls: tuple[int, ...], answer: int = ENOSYS) -> bytes:
    """A seccomp program under which these system calls answer ENOSYS, as on a kernel that lacks them, or another error."""
    program = [(0x20, 0, 0, 0)]
    program += [(0x15, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    program += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | answer)]
    return b"".join(struct.pack("@HBBI", *instruction) for instruction in program)


# Executes its arguments on a kernel that lacks openat2 and mount_setattr, as those before Linux 5.6 and 5.12.
OLD_KERNEL = (
    sys.executable,
    "-c",
    f"import os, sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}\n"
    "from namespace_fixtures import without; from sciexec import kernel\n"
    "kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)\n"
    "kernel.seccomp(without((kernel.OPENAT2, kernel.MOUNT_SETATTR)))\n"
    "os.execv(sys.argv[1], sys.argv[1:])",
)


def servers() -> set[int]:
    """Process ids of this user's image servers that have not ended."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "cmdline").read_bytes().partition(b"\0")[0]
                ours = entry.stat().st_uid == os.getuid() and name in (b"squashfuse_ll", b"sciexec-fuse")
                if ours and " Z " not in (entry / "stat").read_text():
                    found.add(int(entry.name))
            except OSError:
                pass
    return found
