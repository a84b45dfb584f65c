"""Running a command and weighing it: wall time, CPU time and memory of it and all its children, and what it leaves on disk."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """wall and cpu in seconds; memory, the largest resident set of any one process (at least this one's own, which was its parent),
    and disk, the most seen at once, in bytes."""

    wall: float
    cpu: float
    memory: int
    disk: int


def run(command: Sequence[str], *, watch: Sequence[Path] = (), quiet: bool = True) -> Cost:
    """Run `command` once and wait for it.  `watch`: directories whose growth is the disk it takes; looked at every 0.2 s.

    The command is stopped by SystemExit if it fails: a benchmark of a failure is worth nothing.
    Source: wait4(2); ru_maxrss is in KiB and is the largest process's, not the sum.
    """
    before = sum(map(size, watch))
    largest = before
    done = threading.Event()

    def look() -> None:
        nonlocal largest
        while not done.wait(0.2):
            largest = max(largest, sum(map(size, watch)))

    watcher = threading.Thread(target=look, daemon=True)
    if watch:
        watcher.start()
    output = subprocess.DEVNULL if quiet else None
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE)
    assert process.stderr
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    if process.returncode:
        name = signal.Signals(-process.returncode).name if process.returncode < 0 else f"exit code {process.returncode}"
        sys.stderr.write(errors.decode(errors="replace"))
        raise SystemExit(f"{' '.join(command)}: {name}")
    largest = max(largest, sum(map(size, watch)))
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, largest - before)


def size(directory: Path) -> int:
    """Bytes allocated below a directory; what vanishes meanwhile counts as nothing."""
    total = 0
    for place, _, names in os.walk(directory, onerror=lambda error: None):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue
    return total


def median(costs: Sequence[Cost]) -> Cost:
    """Each figure's own median."""
    return Cost(
        statistics.median(cost.wall for cost in costs),
        statistics.median(cost.cpu for cost in costs),
        round(statistics.median(cost.memory for cost in costs)),
        round(statistics.median(cost.disk for cost in costs)),
    )


def own_cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all its threads, spent in `work`."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip(), flush=True)


def mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def machine() -> str:
    """One line that says where the figures come from."""
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in facts if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores {model}, Linux {os.uname().release}, Python {sys.version.split()[0]}, uid {os.geteuid()}"
