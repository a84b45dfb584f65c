#!/usr/bin/env python3
"""What it costs to start a command in a container: `exec IMAGE true`, beside a bare interpreter and beside other runtimes.

    start.py IMAGE [--runs N] [--peer NAME=COMMAND]...

COMMAND is a whole shell command that runs `true` its own way; every command is run once to warm up, then they take turns, so that
a busy moment of the machine hits all of them alike.  Printed are the median, the fastest and the slowest wall time, and CPU time.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--option", action="append", default=[], help="an option of sciexec exec, such as --option=--nv")
    arguments = parser.parse_args()

    beside = Path(sys.executable).parent / "sciexec"
    sciexec = str(beside) if beside.exists() else shutil.which("sciexec")
    if sciexec is None:
        raise SystemExit("sciexec is not installed beside this Python")
    commands = {
        "true": ["true"],
        "python3 -IS -c pass": [sys.executable, "-IS", "-c", "pass"],
        "sciexec exec": [sciexec, "exec", *arguments.option, arguments.image, "true"],
    }
    for peer in arguments.peer:
        name, _, command = peer.partition("=")
        commands[name] = ["sh", "-c", command]
    warm = {name: subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode for name, command in commands.items()}
    failed = [name for name, code in warm.items() if code]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    costs: dict[str, list[measure.Cost]] = {name: [] for name in commands}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            costs[name].append(measure.run(command))

    print(f"{measure.machine()}; {arguments.runs} runs")
    rows = []
    for name, series in costs.items():
        middle, walls = measure.median(series), [cost.wall for cost in series]
        times = [f"{seconds * 1000:.1f} ms" for seconds in (middle.wall, min(walls), max(walls), middle.cpu)]
        rows.append([name, *times])
    measure.table(["", "median", "fastest", "slowest", "CPU"], rows)


if __name__ == "__main__":
    main()
