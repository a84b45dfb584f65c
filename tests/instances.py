"""What the tests of instances ask of them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sciexec import host

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Begin = Callable[..., "subprocess.Popen[str]"]
HERE = os.uname().nodename


def pid_of(run: Run, name: str) -> int:
    return int(listed(run, name)[0]["pid"])


def listed(run: Run, *words: str) -> list[dict[str, Any]]:
    done = run("instance", "list", "--json", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return list(json.loads(done.stdout)["instances"])


def log(config: Path, name: str, suffix: str = "out") -> str:
    return (config / "instances/logs" / HERE / host.Host().entry[0].decode() / f"{name}.{suffix}").read_text()


def eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def inside(run: Run, name: str, script: str, *words: str, **given: Any) -> str:
    done = run("exec", *words, f"instance://{name}", "sh", "-c", script, **given)
    assert (done.returncode, done.stderr) == (0, "")
    return str(done.stdout)
