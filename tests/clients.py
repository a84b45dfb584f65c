"""Clients of `apptainer` and `singularity`: which releases pip installs, how their own tests are run, what they leave behind.

The fixtures are in clients_fixtures.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import pytest

PYTHON = "/usr/bin/python3"
KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sciexec-tests"

# What pip installs, by the name of the environment.  A newer release is tried by changing its number here.
PINS = {
    "cwltool": ["cwltool==3.3.20260925135507", "mock==5.2.0", "pytest==9.2.0"],
    "snakemake": [
        'snakemake==9.27.1; python_version >= "3.11"',
        'snakemake==7.32.4; python_version < "3.11"',
        'pulp<2.8; python_version < "3.11"',
    ],
    "spython": ["spython==0.3.14", "pytest==9.2.0"],
    "engines": [
        *("boutiques==0.5.33", "miniwdl==1.16.0", "reframe-hpc==4.10.4", "styxsingularity==0.9.0"),
        *(
            "platformdirs==4.14.8",
            "pydantic==2.14.4",
            "python-dotenv==1.2.4",
            "rich==15.0.0",
        ),  # of mini-swe-agent's, those that it needs here
    ],
}
BARE = {"engines": ["mini-swe-agent==2.4.6"]}  # without what they depend on: clients of language models, 700 MB


class Engine(Protocol):
    def __call__(self, name: str) -> Path: ...


class Call(Protocol):
    def __call__(
        self, *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, input: str = "", timeout: float = 120
    ) -> subprocess.CompletedProcess[str]: ...


def kept(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """A directory that make() fills once for this key, whoever else of these tests wants it at the same time."""
    place = KEPT / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "complete").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            make(place)
            (place / "complete").touch()
    return place


def must(*command: str | Path) -> None:
    """Run what makes a fixture; where it fails, the tests that want it do not run (a failure under CI)."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=250, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def processes(text: str) -> list[str]:
    """The command lines of running processes with this in them, none within a second being as good as none."""
    deadline = time.monotonic() + 1
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue
                if text in line:
                    found.append(line)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def shipped(call: Call, python: Path, work: Path, path: str, *selection: str | Path) -> dict[str, str]:
    """Run tests that a package ships, with its own pytest; "FILE::NAME" -> "passed", or the reason why not.

    Arguments:
        path: PATH.  selection: what pytest shall run.
    """
    report = work / "report.xml"
    done = call(
        *(python, "-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider", "-q", "--tb=short", f"--junitxml={report}"),
        *(f"--basetemp={work / 'shipped'}", *selection),
        env={"PATH": path},
        timeout=800,
    )
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        reasons = [child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")]
        texts = [child.text or "" for child in case if child.tag in ("failure", "error")]
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = "\n".join([*reasons, *texts]) if reasons else "passed"
    return found


def judge(what: str, results: dict[str, str], cannot: dict[str, str], note: Callable[[str, object], None]) -> None:
    """Whether all tests passed but those that cannot, each with its reason, and these did not; the count is printed in the end.

    Arguments:
        results: of shipped().  note: pytest's record_property.
    """
    passed = {name for name, result in results.items() if result == "passed"}
    note("counted", f"{what}: {len(passed)} of {len(results)} pass")
    for name, reason in cannot.items():
        note("counted", f"{what}: not {name}: {reason}")
    unexpected = {name: result for name, result in results.items() if name not in passed and name not in cannot}
    assert not unexpected, "\n\n".join(f"{name}:\n{result}" for name, result in unexpected.items())
    assert not set(cannot) - set(results), "some of those that cannot pass were not run"
    assert not set(cannot) & passed, "some of those that cannot pass do"
