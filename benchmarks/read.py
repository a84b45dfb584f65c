#!/usr/bin/env python3
"""What it costs to read an image that the kernel knows nothing of yet: each run is a mount of its own, with empty caches.

    read.py IMAGE [--runs N] [--command NAME=COMMAND]... [--peer NAME=COMMAND]...

COMMAND of --command is what is done inside, a shell command in place of the usual ones (list, read all); {} in the COMMAND of --peer
stands for it, quoted, as in --peer 'apptainer=apptainer exec image.sif sh -c {}'.  All take turns.  The file of the image itself is in
the page cache.  Each has to print the same before it is measured: who fails early, or sees a smaller tree, would seem quick.  Printed
are medians of wall time, and sciexec's in relation to each.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import measure

INSIDE = {  # of /usr: the root itself may be another file system, of mount points alone
    "list": "find /usr -xdev -ls | wc -l",
    "read": "tar -cf - --one-file-system /usr 2>/dev/null | wc -c",  # to a pipe: GNU tar does not read what goes to /dev/null
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--command", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    arguments = parser.parse_args()

    beside = Path(sys.executable).parent / "sciexec"
    sciexec = str(beside) if beside.exists() else shutil.which("sciexec")
    if sciexec is None:
        raise SystemExit("sciexec is not installed beside this Python")
    runtimes = {"sciexec": f"{shlex.quote(sciexec)} exec {shlex.quote(arguments.image)} sh -c {{}}"}
    runtimes.update(peer.split("=", 1) for peer in arguments.peer)
    inside = dict(command.split("=", 1) for command in arguments.command) or INSIDE

    print(f"{measure.machine()}; {arguments.runs} runs")
    rows = []
    for what, command in inside.items():
        commands = {name: ["sh", "-c", runtime.replace("{}", shlex.quote(command))] for name, runtime in runtimes.items()}
        printed = {}
        for name, words in commands.items():
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed: {what}")
            printed[name] = done.stdout
        if len(set(printed.values())) != 1:
            raise SystemExit(f"not the same work: {what}: {printed}")
        costs: dict[str, list[measure.Cost]] = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, words in commands.items():
                costs[name].append(measure.run(words))
        ours = measure.median(costs["sciexec"]).wall
        for name, series in costs.items():
            wall, walls = measure.median(series).wall, [cost.wall for cost in series]
            rows.append([what, name, *(f"{seconds:.2f} s" for seconds in (wall, min(walls), max(walls))), f"{ours / wall:.2f}"])
    measure.table(["", "", "median", "fastest", "slowest", "sciexec / it"], rows)


if __name__ == "__main__":
    main()
