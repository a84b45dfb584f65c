"""sciexec under the names of those that it replaces: the aliases, what programs ask them for, and the way back."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import sciexec as package
from sciexec import switch

Command = Callable[..., "subprocess.CompletedProcess[str]"]
VERSIONS = {
    "apptainer": f"apptainer version 1.4.5+sciexec.{package.__version__}\n",
    "singularity": f"singularity-ce version 4.3.1+sciexec.{package.__version__}\n",
}


def call(*words: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command with no environment but `env`."""
    return subprocess.run(list(map(str, words)), env=dict(env or {}), cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def aliases(sciexec: Command, tmp_path: Path) -> Path:
    directory = tmp_path / "a place" / "bin"
    done = sciexec("alias", "install", directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{directory}/apptainer\n{directory}/singularity\n"
    return directory


@pytest.mark.parametrize("name", VERSIONS)
def test_an_alias_needs_nothing_of_its_caller(aliases: Path, name: str, rootfs: Path, tmp_path: Path) -> None:
    """No variable, no PATH; and a PYTHONPATH, a home and a current directory full of traps."""
    for trap in ("sciexec", "os", "sitecustomize", "usercustomize", "errno"):
        (tmp_path / f"{trap}.py").write_text("raise SystemExit('trapped')\n")
    traps = {"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/nowhere", "PYTHONSTARTUP": str(tmp_path / "os.py"), "HOME": str(tmp_path)}
    for env in ({}, traps):
        done = call(aliases / name, "--version", env=env, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, VERSIONS[name], "")
        assert call(aliases / name, "version", env=env, cwd=tmp_path).stdout == VERSIONS[name].split()[-1] + "\n"
        assert call(aliases / name, "exec", rootfs, "echo", "a b", "*", env=env, cwd=tmp_path).stdout == "a b *\n"
        assert call(aliases / name, "--help", env=env, cwd=tmp_path).stdout.startswith(f"Usage: {name} ")
        assert call(aliases / name, "nosuch", env=env, cwd=tmp_path).stderr.startswith(f"FATAL: {name}: No such command")
    assert stat.S_IMODE((aliases / name).stat().st_mode) == 0o755


def test_through_path_and_links(aliases: Path, tmp_path: Path) -> None:
    (tmp_path / "singularity").symlink_to(aliases / "singularity")
    assert call("/bin/sh", "-c", "singularity --version", env={"PATH": str(tmp_path)}).stdout == VERSIONS["singularity"]
    assert call("/bin/sh", "-c", "apptainer --version", env={"PATH": f"{aliases}:/bin"}).stdout == VERSIONS["apptainer"]


def test_the_version_is_one_process(aliases: Path, need: Callable[..., str]) -> None:
    """Counted by the kernel: the interpreter, and nothing else, is executed."""
    done = call(need("strace"), "-f", "-qq", "-e", "trace=execve,fork,vfork,clone,clone3", aliases / "singularity", "--version")
    assert [line.split("(")[0] for line in done.stderr.splitlines() if " = 0" in line] == ["execve"], done.stderr


def test_the_way_there_and_back(sciexec: Command, tmp_path: Path) -> None:
    own = tmp_path / "bin/apptainer"
    own.parent.mkdir()
    own.write_text("#!/bin/sh\necho mine\n")
    done = sciexec("alias", "install", tmp_path / "bin")
    assert (done.returncode, done.stderr) == (
        1, f"FATAL: writing {own}: there is another program of that name\n       --force replaces it\n"
    )  # fmt: skip
    assert os.listdir(tmp_path / "bin") == ["apptainer"]
    assert sciexec("alias", "install", "--force", tmp_path / "bin").returncode == 0
    assert sciexec("alias", "install", "bin", cwd=tmp_path).returncode == 0  # our own, over and over
    assert sorted(os.listdir(tmp_path / "bin")) == ["apptainer", "singularity"]
    (tmp_path / "bin/singularity").unlink()
    (tmp_path / "bin/singularity").symlink_to("/usr/bin/singularity-of-the-site")
    assert "another program" in sciexec("alias", "install", tmp_path / "bin").stderr
    done = sciexec("alias", "remove", tmp_path / "bin")
    assert (done.returncode, done.stdout) == (0, f"{own}\n")
    assert os.listdir(tmp_path / "bin") == ["singularity"]
    done = sciexec("alias", "remove", tmp_path / "bin")
    assert (done.returncode, done.stderr) == (255, f"FATAL: removing the aliases from {tmp_path}/bin: there are none\n")


def test_a_directory_that_cannot_be_written(sciexec: Command, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir(mode=0o555)
    done = sciexec("alias", "install", tmp_path / "bin")
    assert (done.returncode, done.stderr) == (255, f"FATAL: writing the aliases into {tmp_path}/bin: Permission denied\n")
    (tmp_path / "other/apptainer").mkdir(parents=True)
    assert sciexec("alias", "install", "--force", tmp_path / "other").stderr.endswith("apptainer: it is a directory\n")
    (tmp_path / "file").touch()
    assert sciexec("alias", "install", tmp_path / "file").returncode == 255


def test_an_interpreter_that_no_first_line_can_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blank in its path, or a path that is too long: a shell starts it."""
    for folder in ("with blanks", "it's long" * 20):
        python = tmp_path / folder / "python3"
        python.parent.mkdir()
        python.symlink_to(os.path.realpath(sys.executable))
        monkeypatch.setattr(sys, "executable", str(python))
        for path in switch.install(str(tmp_path / folder / "bin")):
            assert Path(path).read_text().startswith("#!/bin/sh\n")
            done = call(path, "--version")
            assert (done.stdout, done.stderr) == (VERSIONS[os.path.basename(path)], "")
            assert switch.is_alias(path)


# --- buildcfg ---------------------------------------------------------------------------------------------------------------


def test_buildcfg(sciexec: Command, aliases: Path) -> None:
    done = sciexec("buildcfg")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(re.fullmatch(r"[A-Z_]+=.+", line) for line in done.stdout.splitlines())
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert (found["PACKAGE_NAME"], found["PACKAGE_VERSION"]) == ("sciexec", package.__version__)
    assert sciexec("buildcfg", "PREFIX").stdout == f"{found['PREFIX']}\n"
    done = sciexec("buildcfg", "NOSUCH")
    assert (done.returncode, done.stdout) == (1, "")
    singularity = call(aliases / "singularity", "buildcfg").stdout
    assert "PACKAGE_NAME=singularity-ce\n" in singularity and "SINGULARITY_SUID_INSTALL=0\n" in singularity


@pytest.mark.parametrize("name", VERSIONS)
def test_the_configuration_file_as_streamflow_reads_it(aliases: Path, name: str) -> None:
    line = f"{name} buildcfg | grep CONF_FILE | cut -d= -f2 | xargs cat | grep '^bind path'"
    done = call("/bin/sh", "-c", line, env={"PATH": f"{aliases}:/usr/bin:/bin"})
    assert done.stdout == "bind path = /etc/localtime\nbind path = /etc/hosts\n"


def test_the_configuration_file_tells_the_truth(sciexec: Command, rootfs: Path, aliases: Path) -> None:
    """What it says is mounted is in the plan of a run, and the other way round."""
    path = call(aliases / "apptainer", "buildcfg", "APPTAINER_CONF_FILE").stdout.strip()
    settings = [line.split(" = ") for line in Path(path).read_text().splitlines() if " = " in line]
    plan = sciexec("exec", "--debug", rootfs, "true").stderr
    bound = set(re.findall(r"^bind (/etc/\S+)", plan, re.M))
    assert bound == {value for key, value in settings if key == "bind path"} | {"/etc/resolv.conf"}
    for key, value in settings:
        if key in ("mount proc", "mount sys", "mount dev", "mount tmp"):
            assert value == "yes" and re.search(rf"^bind /{key.split()[1]}\b", plan, re.M), key
