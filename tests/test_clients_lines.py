"""Each command line of client_lines.txt, run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from clients import Call, processes
from conftest import Need
from namespace_fixtures import Make

pytest_plugins = ["clients_fixtures", "run_fixtures"]


@dataclass
class Line:
    """A command line with what it must print, as client_lines.txt writes it."""

    client: str
    command: str
    stdout: str = ""
    pattern: str | None = None
    stderr: list[str] = field(default_factory=list)
    code: int = 0


def read(text: str) -> list[Line]:
    found: list[Line] = []
    client = ""
    for row in text[text.index("\n==") :].splitlines():
        mark, rest = row[:2], row[2:]
        if mark == "==":
            client = rest.strip()
        elif mark == "$ ":
            found.append(Line(client, rest))
        elif mark == "  ":
            found[-1].command += f"\n{rest}"
        elif row.startswith("|"):
            found[-1].stdout += f"{rest}\n"
        elif mark == "~ ":
            found[-1].pattern = rest
        elif mark == "! ":
            found[-1].stderr.append(rest)
        elif mark == "= ":
            found[-1].code = int(rest)
        else:
            assert not row, f"client_lines.txt: {row}"
    return found


LINES = read(Path(__file__).with_name("client_lines.txt").read_text())


@pytest.fixture(scope="session")
def exit_37(make_image: Make, need: Need, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image of one static program: "line", "directory"."""
    tree = tmp_path_factory.mktemp("exit-37") / "tree"
    tree.mkdir()
    compiler = need("gcc")
    subprocess.run(
        [compiler, "-static", "-x", "c", "-", "-o", tree / "exit_37"], input="int main(void) { return 37; }", text=True, check=True
    )
    return {kind: make_image(tree, kind) for kind in ("line", "directory")}


@pytest.fixture(scope="session")
def archive(need: Need, debian_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "small.tar"
    subprocess.run([need("skopeo"), "copy", "-q", f"oci:{debian_layout}:small", f"docker-archive:{path}:small:1"], check=True)
    return path


@pytest.fixture
def bench(work: Path, pulled: Callable[[str], Path], exit_37: dict[str, Path], archive: Path) -> Path:
    os.link(pulled("small"), work / "small.sif")
    (work / "small.tar").symlink_to(archive)
    shutil.copy(exit_37["line"], work / "exit_37.sif")
    shutil.copytree(exit_37["directory"], work / "exit_37")
    for directory in ("t", "h", "out", "d"):
        (work / directory).mkdir()
    for name, text in (("f", "text\n"), ("in, put.txt", "a file\n"), ("d/g", "in d\n")):
        (work / name).write_text(text)
    (work / "script.sh").write_text('#!/bin/sh\necho "$* in $(pwd)"\n')
    (work / "script.sh").chmod(0o755)
    return work


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.client}-{LINES.index(line)}")
def test_line(line: Line, bench: Path, call: Call) -> None:
    done = call("bash", "-c", line.command, timeout=60)
    seen = f"{line.command}\n{done.stdout}{done.stderr}"
    if line.pattern is not None:
        assert re.fullmatch(line.pattern, done.stdout), seen
    else:
        assert done.stdout == line.stdout.replace("{work}", str(bench)), seen
    assert line.stderr == ["..."] or done.stderr.splitlines() == line.stderr, seen
    assert done.returncode == line.code, seen
    assert processes("sleep 65.") == []
