#!/usr/bin/env python3
"""What it costs to import an image: `sciexec pull`, beside other runtimes and beside the limit that the hardware sets.

    convert.py REFERENCE [--runs N] [--peer NAME=COMMAND]... [--limit LAYOUT:TAG]

REFERENCE is what `sciexec pull` takes: docker://127.0.0.1:5000/name:tag, oci:DIR:TAG, docker-archive:FILE.  COMMAND is a whole shell
command; $OUT in it is the file to write and $TMPDIR an empty directory.  Every run begins without any cache.

--limit reads the same image from an OCI layout and does, in memory, nothing but the work that cannot be avoided: igzip of each
layer, SHA-256 of its blob and of its tar, zstd level 3 of the files that survive in blocks of 128 KiB.  Its CPU seconds over the
cores are the wall time of a converter that loses nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import measure

BLOCK = 1 << 17  # bytes, SquashFS's usual block
PIECE = 1 << 18  # bytes read at a time


def layers_of(layout: Path, tag: str) -> list[Path]:
    """The gzip blobs of one image in an OCI layout, lowest first."""

    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    index = json.loads((layout / "index.json").read_text())
    (entry,) = (m for m in index["manifests"] if m.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag)
    layers = json.loads(blob(entry["digest"]).read_text())["layers"]
    if not all(layer["mediaType"].endswith("gzip") for layer in layers):
        raise SystemExit("--limit: not every layer is gzip")
    return [blob(layer["digest"]) for layer in layers]


def surviving(layers: list[Path]) -> list[list[tuple[int, int]]]:
    """(offset, size) in each layer's tar of the regular files that no layer above removes or replaces."""
    gone: set[str] = set()  # with all that lies below them
    emptied: set[str] = set()  # directories of which only what is inside is gone
    kept: list[list[tuple[int, int]]] = []
    for layer in reversed(layers):
        ranges, taken, opaque = [], set(), set()
        with tarfile.open(layer, "r|gz") as archive:
            for member in archive:
                directory, _, name = member.name.strip("/").rpartition("/")
                path = f"{directory}/{name}".lstrip("/")
                above = [str(parent) for parent in PurePosixPath(path).parents]
                if name == ".wh..wh..opq":
                    opaque.add(directory)
                elif name.startswith(".wh."):
                    taken.add(f"{directory}/{name[4:]}".lstrip("/"))
                elif path not in gone and gone.isdisjoint(above) and emptied.isdisjoint(above):
                    if member.isreg():
                        ranges.append((member.offset_data, member.size))
                    if not member.isdir():
                        taken.add(path)
        gone |= taken
        emptied |= opaque
        kept.append(ranges)
    return kept[::-1]


def limit(layout: Path, tag: str) -> float:
    """CPU seconds of inflating, hashing and compressing one image, on one core."""
    import zstandard
    from isal import igzip_lib

    layers = layers_of(layout, tag)
    files = surviving(layers)
    squeeze = zstandard.ZstdCompressor(level=3)

    def tar(path: Path) -> Iterator[bytes]:
        blob, content = hashlib.sha256(), hashlib.sha256()
        inflate = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        with path.open("rb") as file:
            while data := file.read(PIECE):
                blob.update(data)
                piece = inflate.decompress(data)
                content.update(piece)
                yield piece

    def work() -> None:
        tails = bytearray()  # what SquashFS calls fragments
        for path, ranges in zip(layers, files):
            pieces, start, buffer = tar(path), 0, bytearray()
            for offset, size in ranges:
                left = size
                while left:
                    while start + len(buffer) < offset + min(BLOCK, left):
                        skipped = max(0, min(len(buffer), offset - start))
                        del buffer[:skipped]
                        start += skipped
                        buffer += next(pieces)
                    del buffer[: offset - start]
                    block = bytes(buffer[: min(BLOCK, left)])
                    start, offset, left = offset, offset + len(block), left - len(block)
                    if len(block) == BLOCK:
                        squeeze.compress(block)
                        continue
                    tails += block
                    if len(tails) >= BLOCK:
                        squeeze.compress(bytes(tails[:BLOCK]))
                        del tails[:BLOCK]
            for _ in pieces:
                pass
        squeeze.compress(bytes(tails))

    return measure.own_cpu(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--limit", metavar="LAYOUT:TAG")
    parser.add_argument("--option", action="append", default=[], help="an option of sciexec pull, such as --option=--compression=gzip")
    parser.add_argument("--work", type=Path, help="where images and temporary files go (default: the current directory)")
    arguments = parser.parse_args()

    beside = Path(sys.executable).parent / "sciexec"
    sciexec = str(beside) if beside.exists() else shutil.which("sciexec")
    if sciexec is None:
        raise SystemExit("sciexec is not installed beside this Python")
    options = " ".join(arguments.option)
    commands = {"sciexec pull": f'exec {sciexec} pull --force {options} "$OUT" {arguments.reference}'}
    for peer in arguments.peer:
        name, _, command = peer.partition("=")
        commands[name] = command
    costs: dict[str, list[measure.Cost]] = {name: [] for name in commands}
    sizes: dict[str, int] = {}
    for _ in range(arguments.runs):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory(dir=arguments.work or Path.cwd(), prefix="benchmark.") as place:
                work = Path(place)
                work.chmod(0o777)  # a peer may run as another user
                temporary = work / "tmp"
                temporary.mkdir()
                temporary.chmod(0o777)
                output = work / "image.sif"
                settings = {"OUT": output, "TMPDIR": temporary, "SCIEXEC_CACHEDIR": work / "cache", "APPTAINER_CACHEDIR": work / "cache"}
                os.environ.update({key: str(value) for key, value in settings.items()})
                cost = measure.run(["sh", "-c", command], watch=[work])
                sizes[name] = measure.size(output) if output.is_dir() else output.stat().st_size
                costs[name].append(cost)

    cores = len(os.sched_getaffinity(0))
    print(f"{measure.machine()}; {arguments.runs} runs, medians; {arguments.reference}")
    first = measure.median(costs["sciexec pull"]).wall
    rows = []
    for name, series in costs.items():
        middle = measure.median(series)
        rest = max(0, middle.disk - sizes[name])
        figures = [f"{middle.wall:.1f} s", f"{middle.wall / first:.2f}", f"{middle.cpu:.1f} s"]
        rows.append([name, *figures, measure.mib(middle.memory), measure.mib(sizes[name]), measure.mib(rest)])
    if arguments.limit:
        layout, _, tag = arguments.limit.rpartition(":")
        seconds = limit(Path(layout), tag)
        wall = seconds / cores
        rows.append([f"limit on {cores} cores", f"{wall:.1f} s", f"{wall / first:.2f}", f"{seconds:.1f} s", "", "", ""])
    measure.table(["", "wall", "ratio", "CPU", "memory", "output", "cache, tmp"], rows)


if __name__ == "__main__":
    main()
