"""Images with a startscript, and sciexec with instances of the test's own, none of which is left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from instances import Begin, Run
from namespace_fixtures import Make

STARTSCRIPT = """#!/bin/sh
trap 'echo stopped by INT; exit 0' INT
trap 'echo stopped by TERM; exit 0' TERM
echo "started $* as $$ of $PPID in $SINGULARITY_INSTANCE by $SINGULARITY_COMMAND"
echo problem >&2
cat
while :; do sleep 0.05; done
"""
RUNSCRIPT = """#!/bin/sh
echo "runs $* by $SINGULARITY_COMMAND"
exec sleep 1000
"""


@pytest.fixture(scope="module")
def services(rootfs: Path, make_image: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tree with a startscript and a runscript, as "sif" and "directory"."""
    tree = tmp_path_factory.mktemp("service") / "tree"
    subprocess.run(["cp", "-a", rootfs, tree], check=True)
    scripts = tree / ".singularity.d"
    (scripts / "env").mkdir(parents=True)
    (scripts / "env/90-environment.sh").write_text("export FROM_IMAGE=image\n")
    for name, text in (("startscript", STARTSCRIPT), ("runscript", RUNSCRIPT)):
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)
    return {kind: make_image(tree, kind) for kind in ("sif", "directory")}


@pytest.fixture
def service(services: dict[str, Path]) -> Path:
    return services["directory"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.fixture
def run(sciexec: Run, config: Path, nothing_left: None) -> Iterator[Run]:
    """sciexec with the instances of this test, which are stopped at its end."""

    def run(*words: str | Path, env: dict[str, str] | None = None, **given: Any) -> subprocess.CompletedProcess[str]:
        return sciexec(*words, env={"SCIEXEC_CONFIGDIR": str(config), **(env or {})}, **given)

    yield run
    run("instance", "stop", "--all", "--force")


@pytest.fixture
def begin(sciexec_path: Path, config: Path, tmp_path: Path) -> Iterator[Begin]:
    """begin("exec", ...) -> the running process, with pipes."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str | Path) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sciexec_path, *words],
                env={**os.environ, "SCIEXEC_CONFIGDIR": str(config)},
                cwd=tmp_path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        with process:
            process.kill()
