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
from conftest import Command

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
