#!/usr/bin/env python3
"""What it costs to write into a container: many small files (an archive that is unpacked), and one large one.

    overlay.py IMAGE [--option=--writable-tmpfs] [--runs N] [--place DIR] [--peer NAME=COMMAND]...

COMMAND is what a peer's command line begins with, e.g. "apptainer", or a shell command that enters where it lives and ends in
it; `exec OPTION... IMAGE sh -c SCRIPT` is put behind it.  IMAGE needs a shell, GNU date, tar and dd; it and DIR, which holds the
archive, are seen by all under the same path.  The runtimes take turns, so that a busy moment of the machine hits all alike.
Times are taken inside, around the writing alone: the start of a container is start.py's to measure.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import measure

FILES, SIZE = 5000, 2000  # of the archive: how many files, bytes of each
LARGE = 40  # MiB; the peers' default limit is 64
ACTS = {
    f"unpack {FILES} files of {SIZE} bytes": "tar -C /opt -xf {archive}",
    f"write {LARGE} MiB": f"dd if=/dev/zero of=/opt/large bs=64k count={LARGE * 16}",
    f"remove {FILES} files": "tar -C /opt -xf {archive}; BEGIN; rm -r /opt/many",
}
CLOCK = "begun=$(date +%s%N)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--option", action="append", default=[], help="of exec [--writable-tmpfs]")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--place", default=tempfile.gettempdir())
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
    archive = f"{arguments.place}/many.{os.getpid()}.tar"
    make(archive)
    image = shlex.quote(os.path.abspath(arguments.image))
    options = " ".join(map(shlex.quote, ["-B", arguments.place, *(arguments.option or ["--writable-tmpfs"])]))
    seconds: dict[tuple[str, str], list[float]] = {(act, name): [] for act in ACTS for name in runtimes}
    try:
        for turn in range(arguments.runs + 1):  # the first is to warm up
            for act, body in ACTS.items():
                before, _, after = body.format(archive=shlex.quote(archive)).rpartition("BEGIN;")
                script = f"set -e; mkdir -p /opt; {before} {CLOCK}; {after} >/dev/null 2>&1; echo $(($(date +%s%N) - begun))"
                for name, command in runtimes.items():
                    line = f"exec {command} exec {options} {image} sh -c {shlex.quote(script)}"
                    done = subprocess.run(["sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(f"{line}\n{done.stderr}")
                    if turn:
                        seconds[act, name].append(int(done.stdout) / 1e9)
    finally:
        os.unlink(archive)

    print(f"{measure.machine()}; {arguments.runs} runs")
    rows = []
    for (act, name), series in seconds.items():
        times = [f"{number * 1000:.0f} ms" for number in (statistics.median(series), min(series), max(series))]
        rows.append([f"{name}: {act}", *times])
    measure.table(["", "median", "fastest", "slowest"], rows)


def make(path: str) -> None:
    """The archive: FILES files in a hundred directories."""
    with tarfile.open(path, "w") as archive:
        for number in range(FILES):
            entry = tarfile.TarInfo(f"many/{number % 100}/file{number}")
            entry.size = SIZE
            archive.addfile(entry, io.BytesIO(b"x" * SIZE))
    os.chmod(path, 0o644)


if __name__ == "__main__":
    main()
