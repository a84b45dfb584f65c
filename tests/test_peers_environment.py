"""The same values for the same words: what Apptainer makes of --env and --env-file, beside what sciexec does (`pytest -m peers`).

How Apptainer is started is told in test_peers.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Command
from environment_fixtures import EVALUATED, FILE_VALUES, TRAPS
from test_peers import apptainer

from convert import metadata

pytestmark = pytest.mark.peers

# In these it is alone: its embedded shell keeps a backslash outside of quotes, and one in front of a brace.
FILES_OF_ITS_OWN = {"a\\ b", "a\\$b", '"${NOPE:-a\\}b}"'}


@pytest.fixture(scope="module")
def image(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a script, where both can see it."""
    root = Path(os.environ.get("SCIEXEC_SHARED", tmp_path_factory.mktemp("peers"))) / "environment"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(rootfs, root, symlinks=True)
    scripts = {name: text for name, text in metadata.SCRIPTS.items() if name.startswith(metadata.ENV)}
    scripts[metadata.FROM_DEFINITION] = 'export IMAGE="from script"\nexport PATH="/opt/bin:/usr/bin:/bin"\n'
    (root / metadata.ENV).mkdir(parents=True)
    for name, text in scripts.items():
        (root / name).write_text(text)
    return root


def variables(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {name: found[name] for name in ("X", "IMAGE", "PATH", "LD_LIBRARY_PATH") if name in found}


def both(sciexec: Command, image: Path, *words: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    line = ["exec", *words, image, "/usr/bin/env", "-0"]
    return variables(sciexec(*line)), variables(apptainer(*line))


# Its --env strips quotes at both ends; and whoever starts it may be another than we are.
@pytest.mark.parametrize("value", [value for value in EVALUATED if '"' not in value[:1] + value[-1:] and "HOME" not in value])
def test_a_value(sciexec: Command, image: Path, value: str) -> None:
    ours, theirs = both(sciexec, image, "--env", f"X={value}")
    assert "UID" in value or ours == theirs
    assert ours["X"] == EVALUATED[value]


@pytest.mark.parametrize("value", [value for value in TRAPS if '"' not in value[:1] + value[-1:] and value.isascii()])
def test_a_value_that_is_not_evaluated(sciexec: Command, image: Path, value: str) -> None:
    ours, theirs = both(sciexec, image, "--no-eval", "--env", f"X={value}")
    assert ours == theirs and ours["X"] == value


@pytest.mark.parametrize(
    "words",
    [
        ["PATH=$PATH:/foo"], ["PATH=/foo:${PATH}"], ["PATH=/usr/bin"], ["PREPEND_PATH=/a"], ["APPEND_PATH=/z"], ["LD_LIBRARY_PATH=/foo"],
        ["PREPEND_PATH=/a", "APPEND_PATH=/z", "X=1"], ["X="], ["IMAGE="], ["IMAGE=mine"], ["X=a,b"], ['"X=a,b",Y=c'],
    ],
    ids=",".join,
)  # fmt: skip
def test_search_paths_and_lists(sciexec: Command, image: Path, words: list[str]) -> None:
    ours, theirs = both(sciexec, image, *(part for word in words for part in ("--env", word)))
    assert ours == theirs


@pytest.mark.parametrize("text", [text for text in FILE_VALUES if not {"HOST", "~"} & {text[1:5], text[:1]} and text.isascii()])
def test_a_file(sciexec: Command, image: Path, text: str) -> None:
    """But for those that name the host's variables or home."""
    path = image.parent / "file"
    path.write_text(f"X={text}\n")
    path.chmod(0o644)
    ours, theirs = both(sciexec, image, "--no-eval", "--env-file", path)
    if text in FILES_OF_ITS_OWN:
        assert ours != theirs
    else:
        assert ours == theirs
