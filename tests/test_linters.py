"""ruff and mypy are ordinary tests: one command tells whether the tree is good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((TREE / "recipes").glob("*.sh")), TREE / "bin/sciexec", TREE / ".ci/run"]


@pytest.mark.parametrize("command", [("ruff", "check", "--no-cache"), ("mypy", "--cache-dir")], ids=lambda command: command[0])
def test_linter(command: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [*command, str(tmp_path)] if command[-1] == "--cache-dir" else [*command, "."]
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=TREE, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command[:2])}:\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_script_parses(script: Path) -> None:
    done = subprocess.run(["/bin/sh", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
