"""Images of every kind made of the small tree, and what a run must not leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespace_fixtures import Make, Need, servers

from sciexec import sif


@pytest.fixture(scope="session")
def make_image(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Make:
    """make_image(tree, kind) -> the tree as an image: "directory", "squashfs" (gzip), "line" (the same behind #!), "sif" (zstd)."""
    mksquashfs = need("mksquashfs")

    def make(tree: Path, kind: str) -> Path:
        if kind == "directory":
            return tree
        work = tmp_path_factory.mktemp("image")
        command = [
            mksquashfs,
            str(tree),
            str(work / "fs"),
            "-quiet",
            "-no-progress",
            "-all-root",
            "-comp",
            "zstd" if kind == "sif" else "gzip",
        ]
        subprocess.run(command, check=True, capture_output=True)
        if kind == "squashfs":
            return work / "fs"
        content, path = (work / "fs").read_bytes(), work / f"image.{kind}"
        if kind == "line":
            path.write_bytes(b"#!/usr/bin/env run-singularity\n" + content)
            return path
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
        builder = sif.Builder(fd, arch="amd64", created=0)
        os.pwrite(fd, content, builder.partition_offset())
        builder.finish(len(content))
        os.close(fd)
        return path

    return make


@pytest.fixture(scope="session")
def images(rootfs: Path, make_image: Make) -> dict[str, Path]:
    return {kind: make_image(rootfs, kind) for kind in ("sif", "squashfs", "line", "directory")}


@pytest.fixture(params=["sif", "directory"])
def image(request: pytest.FixtureRequest, images: dict[str, Path]) -> Path:
    return images[request.param]


@pytest.fixture
def hostile(rootfs: Path, tmp_path: Path) -> Path:
    """A copy of the tree that a test may spoil."""
    return Path(shutil.copytree(rootfs, tmp_path / "hostile", symlinks=True))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails if the test leaves a mount or an image server behind."""
    mounts, before = Path("/proc/self/mountinfo").read_text(), servers()
    yield
    deadline = time.monotonic() + 10
    while (left := servers() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = {pid for pid in left if "NSpid" in Path(f"/proc/{pid}/status").read_text() and is_ours(pid)}
    assert not left
    assert Path("/proc/self/mountinfo").read_text() == mounts


def is_ours(pid: int) -> bool:
    """Whether a server serves an image of this run of the tests; others beside this one have servers of their own."""
    try:
        return os.environ.get("PYTEST_CURRENT_TEST", "") != "" and "pytest" in " ".join(
            os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
        )
    except OSError:
        return False


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    (path / "below").mkdir(parents=True)
    (path / "file").write_text("host's\n")
    return path
