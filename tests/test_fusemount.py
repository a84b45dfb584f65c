"""--fusemount: a FUSE program of the host's or of the image's serves a directory of the container."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from namespace_fixtures import Command, Need, servers

pytest_plugins = ["run_fixtures"]

# A FUSE program has to be in the image for "container": the host's, with the libraries that it stands on.
HOSTS = "/usr:/usr,/lib64:/lib64"


@pytest.fixture
def served(tmp_path: Path, need: Need) -> Path:
    """A SquashFS with one file in it."""
    need("squashfuse_ll")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("served\n")
    command = [need("mksquashfs"), tmp_path / "tree", tmp_path / "served.sqfs", "-quiet"]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "served.sqfs"


@pytest.mark.parametrize("kind", ["host", "host-daemon", "container", "container-daemon"])
@pytest.mark.parametrize("place", ["/mnt", "/not/there"])
def test_a_program_serves_a_directory(sciexec: Command, image: Path, served: Path, kind: str, place: str, nothing_left: None) -> None:
    words = ["-B", HOSTS] if kind.startswith("container") else []
    done = sciexec("exec", *words, "--fusemount", f"{kind}:squashfuse_ll {served} {place}", image, "sh", "-c", f"cat {place}/file")
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")


def test_its_files_are_the_callers(sciexec: Command, image: Path, served: Path) -> None:
    done = sciexec("exec", "--fusemount", f"host:squashfuse_ll {served} /mnt", image, "stat", "-c", "%u %g", "/mnt/file")
    assert done.stdout == f"{os.getuid()} {os.getgid()}\n"


def test_it_ends_with_the_payload_and_not_before(sciexec: Command, images: dict[str, Path], served: Path, sciexec_path: Path) -> None:
    before = servers()
    words = [sciexec_path, "exec", "--fusemount", f"host:squashfuse_ll {served} /mnt", images["directory"]]
    with subprocess.Popen(
        [*words, "sh", "-c", "echo ready; read line; cat /mnt/file"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        running = {pid for pid in servers() - before if str(served).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()}
        assert len(running) == 1
        assert os.getsid(next(iter(running))) != os.getsid(process.pid)
        assert process.communicate("\n", timeout=20)[0] == "served\n"
    deadline = time.monotonic() + 10
    while running & servers():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_of_them(sciexec: Command, image: Path, served: Path) -> None:
    words = [word for place in ("/mnt", "/srv") for word in ("--fusemount", f"host:squashfuse_ll {served} {place}")]
    assert sciexec("exec", *words, image, "cat", "/mnt/file", "/srv/file").stdout == "served\n" * 2


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("host:no-such-program /mnt", 255, "--fusemount no-such-program: executable file not found in $PATH"),
        ("container:no-such-program /mnt", 255, "--fusemount no-such-program: executable file not found in $PATH"),
        ("host-daemon:false /mnt", 255, "--fusemount false: it ended with 1 before it served"),
        ("squashfuse_ll x /mnt", 1, "--fusemount squashfuse_ll x /mnt: it begins with none of container:"),
        ("host:squashfuse_ll", 1, "--fusemount host:squashfuse_ll: not host:COMMAND MOUNTPOINT"),
        ("host:squashfuse_ll x mnt", 1, "--fusemount host:squashfuse_ll x mnt: not host:COMMAND MOUNTPOINT"),
        ("host:/etc/passwd /mnt", 255, "--fusemount /etc/passwd: Permission denied"),
    ],
)
def test_what_cannot_be_served_is_said(
    sciexec: Command, images: dict[str, Path], spec: str, code: int, message: str, nothing_left: None
) -> None:
    done = sciexec("exec", "--fusemount", spec, images["directory"], "true")
    assert done.returncode == code
    assert done.stderr.startswith(f"FATAL: {message}")
    assert "Traceback" not in done.stderr
