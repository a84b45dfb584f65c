"""`sciexec build`: SIF, SquashFS, directory and URI in, SIF or directory out, each as the command does it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import Command, Need

from sciexec import elf, sif


@pytest.fixture
def app(sciexec: Command, oci_layout: Path, tmp_path: Path) -> Path:
    done = sciexec("pull", "-q", tmp_path / "app.sif", f"oci:{oci_layout}:app")
    assert done.returncode == 0, done.stderr
    return tmp_path / "app.sif"


def partition(path: Path) -> tuple[sif.Sif, bytes]:
    fd = os.open(path, os.O_RDONLY)
    try:
        parsed = sif.read(fd, str(path))
        return parsed, os.pread(fd, parsed.primary.size, parsed.primary.offset)
    finally:
        os.close(fd)


def says(sciexec: Command, image: Path) -> str:
    done = sciexec("run", image, "you")
    assert done.returncode == 0, done.stderr
    return done.stdout


GREETING = "good day you from a layer in "


def test_of_a_sif(sciexec: Command, app: Path, tmp_path: Path) -> None:
    """The SquashFS is taken as it is, with all that the file says about itself."""
    done = sciexec("build", "-q", tmp_path / "copy.sif", app)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/copy.sif\n"), done.stderr
    assert partition(tmp_path / "copy.sif")[1] == partition(app)[1]
    assert [d.name for d in partition(tmp_path / "copy.sif")[0].descriptors] == [d.name for d in partition(app)[0].descriptors]
    assert says(sciexec, tmp_path / "copy.sif").startswith(GREETING)


def test_of_a_sif_with_another_compression(sciexec: Command, app: Path, tmp_path: Path) -> None:
    done = sciexec("build", "--compression", "gzip", tmp_path / "gzip.sif", app)
    assert done.returncode == 0, done.stderr
    offset = partition(tmp_path / "gzip.sif")[0].primary.offset
    shown = subprocess.run(
        ["unsquashfs", "-o", str(offset), "-s", tmp_path / "gzip.sif"], capture_output=True, text=True, check=True
    ).stdout
    assert "Compression gzip" in shown
    assert says(sciexec, tmp_path / "gzip.sif").startswith(GREETING)
    listed = [
        subprocess.run(
            ["unsquashfs", "-o", str(partition(path)[0].primary.offset), "-lln", path], capture_output=True, text=True, check=True
        ).stdout
        for path in (app, tmp_path / "gzip.sif")
    ]
    assert listed[0] == listed[1]


def test_of_a_squashfs(sciexec: Command, need: Need, rootfs: Path, tmp_path: Path) -> None:
    """Made by mksquashfs; wrapped, and what machine it is for read out of its programs."""
    command = [need("mksquashfs"), rootfs, tmp_path / "root.sqfs", "-comp", "zstd", "-all-root", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, capture_output=True)
    done = sciexec("build", tmp_path / "root.sif", tmp_path / "root.sqfs")
    assert done.returncode == 0, done.stderr
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    assert partition(tmp_path / "root.sif")[0].arch == machine
    assert sciexec("exec", tmp_path / "root.sif", "echo", "hello").stdout == "hello\n"


def test_of_a_directory_and_back(sciexec: Command, rootfs: Path, tmp_path: Path) -> None:
    """Hard links, holes, links and modes survive; what the caller owns becomes root's."""
    box = tmp_path / "box"
    shutil.copytree(rootfs, box, symlinks=True)
    (box / "opt/one").write_text("one")
    os.link(box / "opt/one", box / "opt/two")
    with open(box / "opt/sparse", "wb") as file:
        file.truncate(50 << 20)
        file.seek(30 << 20)
        file.write(b"middle")
    (box / "opt/private").mkdir(mode=0o700)
    done = sciexec("build", tmp_path / "box.sif", f"{box}/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "box.sif").stat().st_size < 20 << 20
    shown = sciexec("exec", tmp_path / "box.sif", "stat", "-c", "%n %u %h %a %s", "/opt/one", "/opt/private", "/opt/sparse")
    caller = os.getuid()
    assert shown.stdout.splitlines()[0] == f"/opt/one {caller} 2 644 3"
    assert shown.stdout.splitlines()[2].endswith(f" {50 << 20}")
    done = sciexec("build", "--sandbox", tmp_path / "back", tmp_path / "box.sif")
    assert done.returncode == 0, done.stderr
    back = tmp_path / "back/opt"
    assert (back / "one").stat().st_ino == (back / "two").stat().st_ino
    assert (back / "sparse").read_bytes() == (box / "opt/sparse").read_bytes()
    assert (back / "sparse").stat().st_blocks * 512 < 1 << 20
    assert stat.S_IMODE((back / "private").stat().st_mode) == 0o700
    assert os.readlink(tmp_path / "back/bin") == "usr/bin"
    assert sciexec("exec", tmp_path / "back", "cat", "/opt/two").stdout == "one"


def test_twice_the_same_bytes(sciexec: Command, rootfs: Path, tmp_path: Path) -> None:
    for name in ("a.sif", "b.sif"):
        done = sciexec("build", tmp_path / name, rootfs, env={"SOURCE_DATE_EPOCH": "1000000000"})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.sif").read_bytes() == (tmp_path / "b.sif").read_bytes()


def test_sandbox_of_a_uri(sciexec: Command, oci_layout: Path, tmp_path: Path) -> None:
    """The caller can run, change and remove it."""
    done = sciexec("build", "--sandbox", tmp_path / "box", f"oci:{oci_layout}:app")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/box\n"), done.stderr
    assert says(sciexec, tmp_path / "box").startswith(GREETING)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".box")] == []
    again = sciexec("build", "--sandbox", tmp_path / "box", f"oci:{oci_layout}:app")
    assert (again.returncode, again.stderr.count("FATAL")) == (1, 1)
    assert sciexec("build", "--sandbox", "--force", tmp_path / "box", f"oci:{oci_layout}:app").returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".box")] == []
    shutil.rmtree(tmp_path / "box")


WRONG = {
    "nothing there": (lambda tmp: [tmp / "out.sif", "missing.sif"], "there is no file missing.sif"),
    "not an image": (lambda tmp: [tmp / "out.sif", "/etc/passwd"], "neither SIF nor SquashFS"),
    "a definition file": (lambda tmp: [tmp / "out.sif", tmp / "recipe.def"], "definition file"),
    "a directory of a directory": (lambda tmp: ["--sandbox", tmp / "out", tmp], "is a directory already"),
    "a sandbox nowhere": (lambda tmp: ["--sandbox", tmp / "nodir/out", "oci:/nonexistent:x"], "nodir/out: No such file or directory"),
    "unknown transport": (lambda tmp: [tmp / "out.sif", "library://alpine"], "library"),
    "an unreadable file": (lambda tmp: [tmp / "out.sif", tmp / "closed"], "closed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(sciexec: Command, tmp_path: Path, name: str) -> None:
    arguments, message = WRONG[name]
    (tmp_path / "recipe.def").write_text("Bootstrap: docker\nFrom: debian:12\n\n%post\n    true\n")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/file").write_text("x")
    (tmp_path / "closed/file").chmod(0)
    done = sciexec("build", *arguments(tmp_path))
    assert done.returncode in (1, 255)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "itself failed" not in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_machines() -> None:
    """Headers as they are in the files of Debian's ports."""

    def head(width: int, order: str, machine: int) -> bytes:
        return (
            b"\x7fELF" + bytes([width, 1 if order == "little" else 2, 1]) + bytes(9) + (2).to_bytes(2, order) + machine.to_bytes(2, order)
        )  # type: ignore[arg-type]

    assert elf.machine(head(2, "little", 62)) == "amd64"
    assert elf.machine(head(1, "little", 62)) is None  # x32
    assert elf.machine(head(2, "big", 22)) == "s390x"
    assert elf.machine(head(2, "little", 21)) == "ppc64le"
    assert elf.machine(b"#!/bin/sh\necho hello, world\n") is None
    assert elf.machine(b"\x7fELF") is None
    with open("/proc/self/exe", "rb") as file:
        assert elf.machine(file.read(elf.HEADER)) is not None
