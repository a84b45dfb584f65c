"""Images cross over to Apptainer and back: run by hand where it is installed, `pytest -m peers`.

SCIEXEC_APPTAINER is the command that starts it ("apptainer" by default; may be a prefix that enters a chroot), SCIEXEC_SHARED a
directory that both sides see under one path and may write to (default: the test's own).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import Command, Need

pytestmark = pytest.mark.peers


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return Path(os.environ.get("SCIEXEC_SHARED", tmp_path))


def apptainer(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(os.environ.get("SCIEXEC_APPTAINER", "apptainer")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False)


@pytest.fixture
def ours(sciexec: Command, oci_layout: Path, shared: Path) -> Path:
    image = shared / "ours.sif"
    assert sciexec("pull", "--force", image, f"oci:{oci_layout}:app").returncode == 0
    image.chmod(0o755)
    return image


def test_apptainer_runs_ours(ours: Path) -> None:
    for words, said in (
        (("exec", ours, "cat", "/opt/app/data/table"), "1 2 3\n"),
        (("run", ours, "you", "$(id)"), "good day you $(id) from a layer in "),
    ):
        done = apptainer(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said)
    assert "org.opencontainers.image.title: app" in apptainer("inspect", ours).stdout
    assert apptainer("exec", ours, "sh", "-c", "exit 37").returncode == 37


def test_what_apptainer_makes_runs_here(sciexec: Command, ours: Path, shared: Path) -> None:
    """Rebuilt by Apptainer: gzip, everything root's, its own objects."""
    theirs = shared / "theirs.sif"
    done = apptainer("build", "--force", theirs, ours)
    assert done.returncode == 0, done.stderr
    assert sciexec("exec", theirs, "cat", "/opt/app/data/table").stdout == "1 2 3\n"
    done = sciexec("run", theirs, "you")
    assert done.stdout.startswith("good day you from a layer in "), done.stderr
    assert "org.opencontainers.image.title: app" in sciexec("inspect", theirs).stdout
    assert sciexec("exec", theirs, "sh", "-c", "exit 37").returncode == 37


@pytest.fixture
def bare(sciexec: Command, rootfs: Path, shared: Path, need: Need) -> Path:
    """An image that both sides may run as anybody."""
    image = shared / "bare.sqfs"
    image.unlink(missing_ok=True)
    subprocess.run([need("mksquashfs"), rootfs, image, "-quiet", "-all-root", "-comp", "gzip"], check=True, capture_output=True)
    return image


CHANGES = "echo changed > /srv/text && rm /bin/false && mkdir /opt/new"
SEEN = "cat /srv/text; ls /bin/false; ls /opt"


def test_apptainer_uses_our_overlay_and_leaves_it_to_us(sciexec: Command, bare: Path, shared: Path) -> None:
    """Owned by root in it, as the two sides may be two users."""
    path = shared / "ours.ext3"
    path.unlink(missing_ok=True)
    assert sciexec("overlay", "create", "--sparse", "--fakeroot", path).returncode == 0
    path.chmod(0o666)
    assert sciexec("exec", "-o", path, bare, "sh", "-c", CHANGES).returncode == 0
    done = apptainer("exec", "--fakeroot", "-o", path, bare, "sh", "-c", f"{SEEN}; echo theirs > /srv/text")
    assert done.stdout == "changed\nnew\n", done.stderr
    for words in (path, f"{path}:ro"):
        assert sciexec("exec", "-o", words, bare, "sh", "-c", SEEN).stdout == "theirs\nnew\n"


def test_we_use_apptainers_overlay_and_leave_it_to_it(sciexec: Command, bare: Path, shared: Path) -> None:
    path = shared / "theirs.ext3"
    path.unlink(missing_ok=True)
    assert apptainer("overlay", "create", "--sparse", path).returncode == 0
    assert apptainer("exec", "-o", path, bare, "sh", "-c", CHANGES).returncode == 0
    apptainer("exec", "-B", shared, bare, "chmod", "666", path)
    for words in (f"{path}:ro", path):
        assert sciexec("exec", "-o", words, bare, "sh", "-c", SEEN).stdout == "changed\nnew\n"
    assert sciexec("exec", "-o", path, bare, "sh", "-c", "echo ours > /srv/text").returncode == 0
    assert apptainer("exec", "-o", path, bare, "sh", "-c", SEEN).stdout == "ours\nnew\n"


def test_a_partition_that_we_added_is_theirs_as_well(sciexec: Command, ours: Path) -> None:
    assert sciexec("overlay", "create", "--sparse", "--fakeroot", ours).returncode == 0
    assert sciexec("exec", "--writable", ours, "sh", "-c", "echo text > /srv/text").returncode == 0
    done = apptainer("exec", ours, "cat", "/srv/text")
    assert done.stdout == "text\n", done.stderr
    assert "Ext3/Overlay" in apptainer("sif", "list", ours).stdout
