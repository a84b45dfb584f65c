"""What an instance uses: CPU, memory, input and output, processes; from /proc, as most hosts give a user no cgroup.

The JSON has the names of the cgroup library that Apptainer prints (github.com/opencontainers/cgroups, stats.go), as far as
/proc can answer.
"""

from __future__ import annotations

import os
import sys
import time

from sciexec.instance import columns, stat_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sciexec.instance import Instance

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
CLEAR = "\033[H\033[2J"  # the cursor to the corner, and nothing behind it


class Usage:
    """What the processes of an instance use, those that have ended included where one of its processes has waited for them.

    Arguments:
        user, system: nanoseconds of CPU.  memory: bytes, pages that several share counted in shares.  limit: bytes.
        read, written: bytes, to and from storage.  tasks: processes and threads.
    """

    __slots__ = ("limit", "memory", "read", "system", "tasks", "user", "written")

    def __init__(self, pids: list[int]) -> None:
        self.user = self.system = self.memory = self.read = self.written = self.tasks = 0
        self.limit = field("/proc/meminfo", b"MemTotal:") * 1024
        tick = 10**9 // os.sysconf("SC_CLK_TCK")
        for pid in pids:
            try:
                fields = stat_of(pid)
            except OSError:  # it has just ended
                continue
            user, system, childrens_user, childrens_system = map(int, fields[11:15])
            self.user += (user + childrens_user) * tick
            self.system += (system + childrens_system) * tick
            self.tasks += int(fields[17])
            self.memory += field(f"/proc/{pid}/smaps_rollup", b"Pss:") * 1024
            self.read += field(f"/proc/{pid}/io", b"read_bytes:")
            self.written += field(f"/proc/{pid}/io", b"write_bytes:")

    def as_json(self) -> str:
        import json

        operations = (("Read", self.read), ("Write", self.written))
        return json.dumps(
            {
                "cpu_stats": {
                    "cpu_usage": {
                        "total_usage": self.user + self.system,
                        "usage_in_kernelmode": self.system,
                        "usage_in_usermode": self.user,
                    }
                },
                "memory_stats": {"usage": {"usage": self.memory, "limit": self.limit}},
                "pids_stats": {"current": self.tasks},
                "blkio_stats": {"io_service_bytes_recursive": [{"op": name, "value": value} for name, value in operations]},
            },
            indent="\t",
        )


def field(path: str, name: bytes) -> int:
    """The number behind `name` in a file of /proc; 0 where it is not there, or not for us."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = b"\n" + file.readall()
    except OSError:
        return 0
    number = content.partition(b"\n" + name)[2].split(None, 1)
    return int(number[0]) if number else 0


def processes(instance: Instance) -> list[int]:
    """The process ids of everything that runs in an instance."""

    def namespace(pid: int | str) -> str:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid")
        except OSError:  # another user's, or gone
            return ""

    own = namespace(instance.pid)
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and own and namespace(pid) == own]


def size(count: float) -> str:
    """Bytes as Docker's tools write them: 7.395MiB."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.4g}{UNITS[unit]}"


def stats(instance: Instance, show: Callable[[str], object], *, as_json: bool, stream: bool) -> None:
    """Show what an instance uses: once as JSON, once as a table, or as a table every second until it ends."""
    before, then = Usage(processes(instance)), time.monotonic()
    if as_json:
        show(before.as_json())
        return
    while True:
        time.sleep(1)
        if stream and not instance.is_alive():
            return
        usage, now = Usage(processes(instance)), time.monotonic()
        cpu = (usage.user + usage.system - before.user - before.system) / (now - then) / 1e7
        before, then = usage, now
        memory, limit = size(usage.memory), size(usage.limit)
        share = usage.memory / usage.limit * 100 if usage.limit else 0.0
        head = ["INSTANCE NAME", "CPU USAGE", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS"]
        row = [instance.name, f"{cpu:.2f}%", f"{memory} / {limit}", f"{share:.2f}%", f"{size(usage.read)} / {size(usage.written)}"]
        table = columns([head, [*row, str(usage.tasks)]]).rstrip("\n")
        show((CLEAR if stream and sys.stdout.isatty() else "") + table)
        if not stream:
            return
