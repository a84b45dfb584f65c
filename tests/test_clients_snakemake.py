"""Snakemake: `container:` of a registry and of a file, a shadow directory, a script; with `apptainer` in PATH, or only `singularity`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clients import Call, Engine, processes

pytest_plugins = ["clients_fixtures"]

RULES = """
rule all:
    input: "a.txt", "b.txt", "c.txt", "d.txt"

rule a:
    output: "a.txt"
    threads: 2
    container: "A.sif"
    shell: "echo \\"it's $OMP_NUM_THREADS of {threads}, $(ls -d /.singularity.d)\\" > {output}"

rule b:
    input: "a.txt"
    output: "b.txt"
    container: "docker://alpine:3"
    shell: "tr a-z A-Z <{input} | tee {output} >/dev/null; cat /lent/ref >>{output}"

rule c:
    output: "c.txt"
    shadow: "minimal"
    container: "A.sif"
    shell: "pwd >{output}; touch left-over"

rule d:
    input: "a.txt"
    output: "d.txt"
    params: word="a b"
    container: "docker://python:3-slim"
    script: "d.py"
"""

SCRIPT = """
import os, sys
with open(snakemake.output[0], "w") as out:
    out.write(open(snakemake.input[0]).read())
    print(snakemake.params.word, os.environ["MADE_OF"], snakemake.threads, sys.executable, file=out)
"""

FAILING = """
rule one:
    output: "one.txt"
    container: "A.sif"
    shell: "echo made >{output}; (exit 3)"
"""

SLOW = """
rule one:
    output: "one.txt"
    container: "A.sif"
    shell: "echo started >started; sleep 62.25"
"""


@pytest.fixture
def snakemake(engine: Engine, pulled: Callable[[str], Path], call: Call, work: Path) -> Path:
    """The program; its directory holds A.sif."""
    shutil.copy(pulled("small"), work / "A.sif")
    return engine("snakemake") / "snakemake"


@pytest.mark.parametrize("name", ["apptainer", "singularity"])
def test_four_rules(name: str, snakemake: Path, names: Path, call: Call, work: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    (only / name).symlink_to(names / name)
    (work / "Snakefile").write_text(RULES)
    (work / "d.py").write_text(SCRIPT)
    (work / "lent").mkdir()
    (work / "lent/ref").write_text("lent\n")
    path = f"{only}:{snakemake.parent}:/usr/bin:/bin"
    arguments = ["-c2", "--sdm", "apptainer", "--apptainer-args", f"--bind {work}/lent:/lent:ro"]
    done = call(snakemake, *arguments, env={"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(100%) done" in done.stderr
    said = "it's 2 of 2, /.singularity.d\n"
    assert (work / "a.txt").read_text() == said
    assert (work / "b.txt").read_text() == said.upper() + "lent\n"
    assert (work / "c.txt").read_text().startswith(f"{work}/.snakemake/shadow/")
    assert not (work / "left-over").exists()
    assert (work / "d.txt").read_text() == said + "a b Debian's packages 1 /usr/bin/python\n"
    assert len(list((work / ".snakemake/singularity").glob("*.simg"))) == 2

    again = call(snakemake, *arguments, "--forcerun", "b", env={"PATH": path})
    assert again.returncode == 0, again.stderr
    assert "Pulling" not in again.stderr


def test_a_failing_rule_fails_and_its_output_is_removed(snakemake: Path, call: Call, work: Path) -> None:
    (work / "Snakefile").write_text(FAILING)
    done = call(snakemake, "-c1", "--sdm", "apptainer")
    assert done.returncode == 1
    assert "returned non-zero exit status 3" in done.stderr
    assert not (work / "one.txt").exists()


def test_an_image_that_is_not_there_is_said_with_the_registry_s_words(snakemake: Path, call: Call, work: Path) -> None:
    (work / "Snakefile").write_text(FAILING.replace("A.sif", "docker://alpine:4"))
    done = call(snakemake, "-c1", "--sdm", "apptainer")
    assert done.returncode == 1
    assert "Failed to pull singularity image from docker://alpine:4" in done.stderr
    assert "FATAL: " in done.stderr
    assert "manifest unknown" in done.stderr


def test_interrupted_it_leaves_no_job_behind(snakemake: Path, world: dict[str, str], work: Path, call: Call) -> None:
    (work / "Snakefile").write_text(SLOW)
    running = subprocess.Popen(
        [str(snakemake), "-c1", "--sdm", "apptainer"],
        env=world,
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (work / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (work / "started").exists()
    os.killpg(running.pid, signal.SIGINT)  # as Ctrl-C does
    running.communicate(timeout=60)
    assert running.returncode == 1
    assert processes("sleep 62.25") == []
    assert not (work / "one.txt").exists()
