"""What a payload shares with its host, and what it has of its own; with --pid: who stands between it and the caller."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from namespace_fixtures import Command, Need

pytest_plugins = ["run_fixtures"]

PID = [["--pid"], ["--pid", "--no-init"]]
EVERY_WAY = [[], *PID]


# --- process ids of its own ---------------------------------------------------------------------------------------------------


def test_sinit_is_process_1(sciexec: Command, image: Path, nothing_left: None) -> None:
    done = sciexec("exec", "--pid", image, "sh", "-c", "cat /proc/1/comm; echo $$ $PPID; cd /proc; echo [0-9]*; readlink /proc/self")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[:3] == ["sinit", "2 1", "1 2"]


def test_without_init_the_payload_is_process_1(sciexec: Command, image: Path, nothing_left: None) -> None:
    done = sciexec("exec", "-p", "--no-init", image, "sh", "-c", "echo $$ $PPID; cd /proc; echo [0-9]*")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 0\n1\n", "")


def test_no_pid_wins(sciexec: Command, images: dict[str, Path]) -> None:
    done = sciexec("exec", "--pid", "--no-pid", images["directory"], "sh", "-c", "[ $$ -gt 2 ] && cat /proc/self/comm")
    assert (done.returncode, done.stdout) == (0, "cat\n")


def test_the_callers_process_stays_and_is_small(sciexec_path: Path, image: Path, need: Need) -> None:
    """Its child is sinit, as pstree and Open OnDemand see it; neither holds a file of the payload's, nor uses time."""
    with started([sciexec_path, "exec", "--pid", image, "sh", "-c", "echo ready; read line"]) as process:
        (init,) = children(process.pid)
        (payload,) = children(init)
        assert [comm(pid) for pid in (process.pid, init, payload)] == ["sciexec", "sinit", "sh"]
        shown = subprocess.run([need("pstree"), "-p", str(process.pid)], capture_output=True, text=True, check=True).stdout
        assert f"sinit({init})" in shown
        links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
        assert len(links) == 3 and all(link.startswith(("pipe:", "anon_inode:")) for link in links)
        before = spent(process.pid) + spent(init)
        time.sleep(0.5)
        assert spent(process.pid) + spent(init) == before
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        assert sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) < 6000  # KiB
        process.communicate(b"\n", timeout=10)
    assert process.returncode == 0


def test_the_callers_environment_is_not_process_1s_to_show(sciexec: Command, images: dict[str, Path]) -> None:
    done = sciexec("exec", "--pid", "--cleanenv", images["directory"], "cat", "/proc/1/environ", env={"SECRET": "told"})
    assert done.returncode == 1 and "told" not in done.stdout
    assert "Permission denied" in done.stderr


def test_orphans_are_reaped(sciexec: Command, image: Path) -> None:
    script = """
        i=0; while [ $i -lt 200 ]; do (true & exec true); i=$((i + 1)); done
        (sleep 0.1 & exec true); sleep 0.5
        grep -l '^State:.Z' /proc/[0-9]*/status; cd /proc; echo [0-9]*"""
    assert sciexec("exec", "--pid", image, "sh", "-c", script).stdout == "1 2\n"


@pytest.mark.parametrize("options", PID)
def test_what_the_payload_leaves_behind_ends_with_it(sciexec_path: Path, image: Path, options: list[str], nothing_left: None) -> None:
    command = [sciexec_path, "exec", *options, image, "sh", "-c", "sleep 61.5 & setsid sleep 61.5 & echo ready; exit 3"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 3
    assert not running("61.5")


@pytest.mark.parametrize("options", PID)
@pytest.mark.parametrize("victim", ["supervisor", "init"])
def test_kill_leaves_nothing(sciexec_path: Path, image: Path, options: list[str], victim: str, nothing_left: None) -> None:
    command = [sciexec_path, "exec", *options, image, "sh", "-c", "(trap '' TERM HUP INT; sleep 62.5; sleep 62.5) & echo ready; wait"]
    with started(command) as process:
        os.kill(process.pid if victim == "supervisor" else children(process.pid)[0], signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while running("62.5") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running("62.5")


# --- ends ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", PID)
def test_every_exit_code_and_every_death_is_the_payloads(sciexec_path: Path, rootfs: Path, options: list[str]) -> None:
    """The first 32 codes and all that end a process by a signal; the rest of the codes by fours, as each is a container."""
    command = [str(sciexec_path), "exec", *options, str(rootfs), "sh", "-c"]
    for code in [*range(32), *range(32, 256, 9), 126, 127, 128, 129, 137, 143, 254, 255]:
        assert subprocess.run([*command, f"exit {code}"], check=False).returncode == code
    if "--no-init" in options:
        return  # process 1 cannot kill itself
    for number in [n for n in range(1, 32) if n not in (17, 18, 19, 20, 21, 22, 23, 28)]:  # CHLD CONT STOP TSTP TTIN TTOU URG WINCH
        assert subprocess.run([*command, f"kill -{number} $$"], check=False).returncode == -number
    done = subprocess.run(["sh", "-c", f"{' '.join(command)} 'kill -9 $$'; echo $?"], capture_output=True, text=True, check=True)
    assert done.stdout == "137\n"


# --- the tests' own tools -------------------------------------------------------------------------------------------------------


def started(command: list[str | Path], **more: int | bool) -> subprocess.Popen[bytes]:
    """A process that has said "ready"."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more)  # type: ignore[call-overload]
    assert isinstance(process, subprocess.Popen)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def spent(pid: int) -> int:
    """Ticks of user and system time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def running(word: str) -> list[str]:
    """Command lines of processes that have `word` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in (words := path.read_text(errors="replace").split("\0")):
                found.append(" ".join(words))
        except OSError:
            pass
    return found
