"""What a run loads: every module is paid by every start of every rank, so the set is written down here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sciexec

# Ours, and what they bring with them beyond a bare `python3 -IS`.
OURS = {
    "sciexec", "sciexec.__main__", "sciexec.assignments", "sciexec.enter", "sciexec.environment", "sciexec.errors", "sciexec.host",
    "sciexec.image", "sciexec.isolation", "sciexec.kernel", "sciexec.mounts", "sciexec.mpi", "sciexec.options", "sciexec.overlay",
    "sciexec.run", "sciexec.sif", "sciexec.scripts", "sciexec.sources", "sciexec.spelling", "sciexec.squashfs",
}  # fmt: skip
LIBRARY = {"__future__", "_ctypes", "_struct", "errno", "gc", "struct"}
BARE = {
    "_collections_abc",
    "_stat",
    "genericpath",
    "os",
    "os.path",
    "posixpath",
    "stat",
}  # `site`, which an isolated start skips, loads them too
NEVER = "click ctypes cffi collections contextlib dataclasses enum functools json logging pathlib re shutil site subprocess typing"

# Runs a command line up to the execve of the payload, then tells which modules are there.
PROGRAM = """
import sys
before = set(sys.modules)
sys.path.append(sys.argv.pop(1))
import posix
def execve(path, argv, environment):
    posix.write(9, repr(sorted(set(sys.modules) - before)).replace("'", '"').encode())
    posix._exit(0)
from sciexec.__main__ import main
import os
os.execve = execve
sys.exit(main("sciexec", sys.argv[1:]))
"""


def loaded(*words: str | Path, program: str = PROGRAM) -> set[str]:
    command = [sys.executable, "-ISc", program, str(Path(sciexec.__file__).parent.parent), *map(str, words)]
    with subprocess.Popen(["/bin/sh", "-c", 'exec 9>&1 >/dev/null "$@"', "sh", *command], stdout=subprocess.PIPE, env={}) as process:
        assert process.stdout is not None
        text = process.stdout.read()
    assert process.returncode == 0
    return set(json.loads(text))


@pytest.mark.parametrize("verb", ["exec", "run", "shell"])
def test_a_run_loads_this_and_nothing_else(verb: str, rootfs: Path, tmp_path: Path) -> None:
    words = [verb, "-B", f"{tmp_path}:/mnt:ro", "--env", "A=1,B=2", "--pwd", "/", rootfs, "true"]
    modules = loaded(*words)
    assert modules >= OURS
    assert modules <= OURS | LIBRARY | BARE
    assert not modules & set(NEVER.split())


def test_process_ids_of_its_own_load_little_more(rootfs: Path) -> None:
    """As workflow engines always ask for them."""
    modules = loaded("exec", "--no-home", "--pid", rootfs, "true")
    assert "sciexec.sinit" in modules
    assert modules <= OURS | LIBRARY | BARE | {"sciexec.sinit", "select", "time", "fcntl"}


def test_the_version_costs_an_interpreter() -> None:
    program = PROGRAM.replace("sys.exit(main(", "code = main(").replace("sys.argv[1:]))", 'sys.argv[1:]); execve("", [], {})')
    assert loaded("--version", program=program) <= {"sciexec", "sciexec.__main__", "sciexec.errors", "__future__", "gc", *BARE}


def test_the_launcher_starts_one_shell_and_one_python(rootfs: Path, sciexec_path: Path, need: object) -> None:
    """Counted by the kernel: no program is executed on the way but the shell, the interpreter and the payload, and no child is made."""
    assert callable(need)
    strace = need("strace")
    done = subprocess.run(
        [strace, "-f", "-qq", "-e", "trace=execve,fork,vfork,clone,clone3", "-e", "signal=none", sciexec_path, "exec", rootfs, "/bin/true"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if " = " in line and "ENOENT" not in line]
    if done.returncode and "Operation not permitted" in done.stderr:
        pytest.skip("ptrace is forbidden here")
    assert [line.split("(")[0] for line in lines] == ["execve"] * 3, done.stderr
    assert done.returncode == 0
