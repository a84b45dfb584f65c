#!/usr/bin/env python3
"""What an instance costs: to start and stop one, and `exec instance://NAME true`, beside the same of another runtime.

    instance.py IMAGE [--runs N] [--peer NAME=COMMAND]...

COMMAND is what a peer's command line begins with, e.g. "apptainer", or a shell command that enters where it lives and ends in
it; `instance start IMAGE NAME`, `exec instance://NAME true` and `instance stop NAME` are put behind it.  The runtimes take turns, so
that a busy moment of the machine hits all alike.  Printed are the median, the fastest and the slowest wall time, and CPU time
(of the command; what stays in the background has none of it).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    arguments = parser.parse_args()

    beside = Path(sys.executable).parent / "sciexec"
    sciexec = str(beside) if beside.exists() else shutil.which("sciexec")
    if sciexec is None:
        raise SystemExit("sciexec is not installed beside this Python")
    runtimes = {"sciexec": shlex.quote(sciexec)}
    for peer in arguments.peer:
        name, _, command = peer.partition("=")
        runtimes[name] = command
    instance = f"benchmark-{os.getpid()}"
    acts = {
        "start": f"instance start {shlex.quote(os.path.abspath(arguments.image))} {instance}",
        "exec true": f"exec instance://{instance} true",
        "stop": f"instance stop {instance}",
    }
    costs: dict[tuple[str, str], list[measure.Cost]] = {(act, name): [] for act in acts for name in runtimes}
    for turn in range(arguments.runs + 1):  # the first is to warm up
        for name, command in runtimes.items():
            for act, words in acts.items():
                cost = measure.run(["sh", "-c", f"exec {command} {words}"])
                if turn:
                    costs[act, name].append(cost)

    print(f"{measure.machine()}; {arguments.runs} runs")
    rows = []
    for (act, name), series in costs.items():
        middle, walls = measure.median(series), [cost.wall for cost in series]
        times = [f"{seconds * 1000:.1f} ms" for seconds in (middle.wall, min(walls), max(walls), middle.cpu)]
        rows.append([f"{name} {act}", *times])
    measure.table(["", "median", "fastest", "slowest", "CPU"], rows)


if __name__ == "__main__":
    main()
