"""Workflow engines and other programs that call `apptainer` and `singularity`, as pip installs them, and a world in which they run.

    engine("cwltool")    bin/ of an environment that holds it, made of the system's Python, kept from one run of the tests to the next
    names                a directory with `apptainer` and `singularity`, which are sciexec
    call("cwltool", ...) runs a program in that world: the names first in PATH, images of docker.io from a registry on loopback

The images are made of Debian packages (recipes/clients-image.sh): small, python and node.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from clients import BARE, PINS, PYTHON, Call, Engine, kept, must
from conftest import TREE, Need, find
from registry_fixtures import serve

# docker.io/NAME:TAG and quay.io/NAME:TAG -> the image that stands for it
STAND_INS = {
    "library/alpine:3": "small",
    "library/alpine:latest": "small",
    "library/busybox:1.30.1": "small",
    "library/debian:stable-slim": "small",
    "library/node:alpine": "node",
    "library/python:3-slim": "python",
    "biocontainers/samtools:1.15--h11": "small",
}


# --- what is made once ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def engine() -> Engine:
    def installed(name: str) -> Path:
        def make(place: Path) -> None:
            must(PYTHON, "-m", "venv", place / "venv")
            pip = (place / "venv/bin/python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
            must(*pip, *PINS[name])
            if name in BARE:
                must(*pip, "--no-deps", *BARE[name])

        python = subprocess.run([PYTHON, "-VV"], capture_output=True, text=True, check=True).stdout
        return kept(name, f"{python}{PINS[name]}{BARE.get(name)}", make) / "venv/bin"

    return installed


@pytest.fixture(scope="session")
def debian_layout() -> Path:
    """An OCI layout with the images small, python and node."""
    find("apt-get", "dpkg-deb", "umoci", "skopeo")
    recipes = [TREE / "recipes" / name for name in ("clients-image.sh", "debian-layers.sh")]
    key = "".join(recipe.read_text() for recipe in recipes)
    return kept("images", key, lambda place: must(recipes[0], place / "layout")) / "layout"


@pytest.fixture(scope="session")
def mirrors(need: Need, debian_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The setting under which docker.io and quay.io are a registry of ours, with the images of STAND_INS."""
    for registry in serve(need, tmp_path_factory.mktemp("registry"), None):
        for name, image in STAND_INS.items():
            registry.push(f"{debian_layout}:{image}", name)
        yield ",".join(f"{host}=http://{registry.host}" for host in ("docker.io", "quay.io"))


@pytest.fixture(scope="session")
def pulled(sciexec_path: Path, debian_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """pulled("small") -> a SIF of that image; do not change it."""
    place = tmp_path_factory.mktemp("pulled")

    def pull(image: str) -> Path:
        path = place / f"{image}.sif"
        if not path.exists():
            must(sciexec_path, "pull", "--disable-cache", path, f"oci:{debian_layout}:{image}")
        return path

    return pull


# --- the world ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def names(sciexec_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `apptainer` and `singularity`, each answering under its own name."""
    place = tmp_path_factory.mktemp("names")
    must(sciexec_path, "alias", "install", place)
    return place


@pytest.fixture(scope="session")
def apptainers(names: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `names`, but `singularity` answers as apptainer, which is what a site has that installs Apptainer."""
    place = tmp_path_factory.mktemp("apptainers")
    (place / "apptainer").symlink_to(names / "apptainer")
    (place / "singularity").write_text(f'#!/bin/sh\nexec {names}/apptainer "$@"\n')
    (place / "singularity").chmod(0o755)
    return place


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def world(names: Path, mirrors: str, shared_cache: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a client."""
    home = tmp_path / "home"
    home.mkdir()
    return {
        "PATH": f"{names}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "USER": os.environ.get("USER", "user"),
        "LANG": "C.UTF-8",
        "XDG_CACHE_HOME": str(shared_cache),
        "XDG_STATE_HOME": str(tmp_path / "state"),  # instances are the user's, and others may have some
        "SCIEXEC_REGISTRY_MIRROR": mirrors,
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where call() stands."""
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def call(world: dict[str, str], work: Path) -> Call:
    """call("singularity", "exec", ...) -> what a program prints in that world; `env` is added to its environment."""

    def run(
        *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, input: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        whole = {**world, **(env or {})}
        found = shutil.which(str(command[0]), path=whole["PATH"])
        assert found, f"{command[0]} is not in {whole['PATH']}"
        return subprocess.run(
            [found, *map(str, command[1:])], env=whole, cwd=cwd or work, input=input, text=True, errors="backslashreplace",
            capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip

    return run
