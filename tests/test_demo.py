"""The demonstration, end to end: a Docker image made of Debian packages is imported and computes something."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from conftest import Command, Need

TREE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def archive(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("apt-get", "dpkg-deb", "umoci", "skopeo")
    path = tmp_path_factory.mktemp("demo") / "climate.docker.tar"
    done = subprocess.run([TREE / "recipes/demo-image.sh", path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_a_docker_image_becomes_a_sif_and_its_model_conserves_energy(sciexec: Command, archive: Path, tmp_path: Path) -> None:
    image = tmp_path / "climate.sif"
    pulled = sciexec("pull", image, f"docker-archive:{archive}")
    assert pulled.returncode == 0, pulled.stderr
    assert image.read_bytes()[:31] == b"#!/usr/bin/env run-singularity\n"

    ran = sciexec("run", image)
    assert ran.returncode == 0, ran.stderr  # the model returns 1 where more than 1e-6 W m^-2 is lost
    (warming,) = re.findall(r"climate sensitivity: ([0-9.]+) K", ran.stdout)
    assert 1.85 < float(warming) < 4  # the melting of ice adds to the forcing's own 1.85 K

    removed = sciexec("exec", image, "ls", "/usr/share/doc")
    assert removed.returncode != 0  # by a whiteout in a layer above
    assert sciexec("exec", image, "sh", "-c", "exit 42").returncode == 42


def test_the_same_archive_gives_the_same_bytes(sciexec: Command, archive: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        done = sciexec("pull", "--force", tmp_path / name, f"docker-archive:{archive}")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
