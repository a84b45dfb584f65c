"""Completion, by the shells themselves."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Complete = Callable[[str], "set[str]"]

# What is typed, what is offered, what is not.
LINES = [
    ("sciexec ex", {"exec"}, {"run"}),
    ("sciexec -q ru", {"run", "run-help"}, {"exec"}),
    ("sciexec exec --no-h", {"--no-home", "--no-https"}, {"--no-eval"}),
    ("sciexec exec --bind /x --cle", {"--cleanenv"}, set()),
    ("sciexec exec image --cle", set(), {"--cleanenv"}),  # the payload's
    ("sciexec sif ", {"list", "header", "info", "dump"}, {"run"}),
    ("sciexec cache clean --ty", {"--type"}, set()),
    ("sciexec -s she", {"shell"}, set()),
    ("sciexec shell --shell she", set(), {"shell", "--shell"}),
]


def script(sciexec: Command, shell: str, tmp_path: Path) -> Path:
    done = sciexec("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--nv" not in done.stdout  # what this release lacks is not offered
    (tmp_path / "script").write_text(done.stdout)
    return tmp_path / "script"


@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES)
def test_bash(sciexec: Command, tmp_path: Path, need: Callable[..., str], line: str, offered: set[str], not_offered: set[str]) -> None:
    """As bash itself does it: the words and the index of the current one, then the function that was registered."""
    program = 'PATH=; . "$1"; shift; spec=$(complete -p sciexec); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
    program += 'set -- $spec; while [ "$1" != -F ]; do shift; done; "$2"; printf "%s\\n" "${COMPREPLY[@]}"'
    words = [*line.split(), *([""] if line.endswith(" ") else [])]
    command = [need("bash"), "--norc", "-c", program, "bash", script(sciexec, "bash", tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = set(done.stdout.split())
    assert offered <= found and not not_offered & found


@pytest.mark.parametrize(("line", "offered", "not_offered"), LINES)
def test_fish(sciexec: Command, tmp_path: Path, need: Callable[..., str], line: str, offered: set[str], not_offered: set[str]) -> None:
    command = f"source {script(sciexec, 'fish', tmp_path)}; complete -C'{line}'"
    done = subprocess.run(
        [need("fish"), "--no-config", "-c", command],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    found = {row.split("\t")[0] for row in done.stdout.splitlines()}
    assert offered <= found and not not_offered & found


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("sciexec exe\t", "sciexec exec "),
        ("sciexec sif he\t", "sciexec sif header "),
        ("sciexec exec --bind /x --cle\t", "sciexec exec --bind /x --cleanenv "),
    ],
)
def test_zsh(sciexec: Command, tmp_path: Path, need: Callable[..., str], keys: str, shown: str) -> None:
    """In a terminal: it has no other way to be asked."""
    zsh, path = need("zsh"), script(sciexec, "zsh", tmp_path)
    child, terminal = pty.fork()
    if child == 0:
        os.execve(zsh, ["zsh", "-f", "-i"], {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TERM": "dumb", "PS1": "> "})

    def until(text: str) -> str:
        seen, end = "", time.monotonic() + 60
        while text not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096).decode("utf-8", "replace")
        return seen

    os.write(terminal, f"autoload -U compinit; compinit -u -D; . {path}; echo rea''dy\n".encode())
    until("ready")
    os.write(terminal, keys.encode())
    assert shown in until(shown)
    os.close(terminal)
    os.waitpid(child, 0)
