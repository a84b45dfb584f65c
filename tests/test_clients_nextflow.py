"""Nextflow: the way its task wrapper starts a container, with an environment that is empty but for PATH, and the way it ends one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clients import processes

pytest_plugins = ["clients_fixtures"]

# What its wrapper does, in the same order and with the same commands: the task in the background, its output through pipes into files,
# on TERM every descendant of that background process killed by `ps`, the task's code in .exitcode.
WRAPPER = r"""
set -e
set -u
NXF_TASK_WORKDIR=$PWD
nxf_kill() {
    declare -a children
    while read P PP; do
        children[$PP]+=" $P"
    done < <(ps -e -o pid= -o ppid=)
    kill_all() {
        [[ $1 != $$ ]] && kill $1 2>/dev/null || true
        for i in ${children[$1]:=}; do kill_all $i; done
    }
    kill_all $1
}
on_exit() {
    exit_status=${nxf_main_ret:=$?}
    printf -- "$exit_status" > "$NXF_TASK_WORKDIR/.exitcode"
    set +u
    exit $exit_status
}
on_term() {
    set +e
    [[ "$pid" ]] && nxf_kill $pid
}
nxf_launch() {
    set +u
    env - PATH="$PATH" ${TMP:+@PREFIX@ENV_TMP="$TMP"} ${TMPDIR:+@PREFIX@ENV_TMPDIR="$TMPDIR"} \
        ${NXF_TASK_WORKDIR:+@PREFIX@ENV_NXF_TASK_WORKDIR="$NXF_TASK_WORKDIR"} @PREFIX@ENV_NXF_DEBUG="${NXF_DEBUG:=0}" \
        @PREFIX@ENV_WORD='a  b;$HOME' @NAME@ exec --no-home --pid -B "$NXF_TASK_WORKDIR" @OPTIONS@ @IMAGE@ \
        /bin/bash -c "cd \"$NXF_TASK_WORKDIR\"; eval true; /bin/bash -ue $NXF_TASK_WORKDIR/.command.sh"
}
trap on_exit EXIT
trap on_term TERM INT USR2
trap '' USR1
set +e
(set -o pipefail; (nxf_launch | tee .command.out) 3>&1 1>&2 2>&3 | tee .command.err) 3>&1 1>&2 2>&3 &
pid=$!
wait $pid || nxf_main_ret=$?
wait || true
"""

Task = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def task(world: dict[str, str], work: Path, pulled: Callable[[str], Path]) -> Task:
    """task(script, name, options) -> the wrapper, running."""

    def start(script: str, name: str = "singularity", options: str = "") -> subprocess.Popen[str]:
        wrapper = WRAPPER.replace("@NAME@", name).replace("@PREFIX@", name.upper()).replace("@OPTIONS@", options)
        (work / ".command.run").write_text(wrapper.replace("@IMAGE@", str(pulled("small"))))
        (work / ".command.sh").write_text(script)
        return subprocess.Popen(
            ["/bin/bash", ".command.run"], cwd=work, env={**world, "TMPDIR": "/tmp"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.mark.parametrize("name", ["singularity", "apptainer"])
def test_a_task(task: Task, work: Path, name: str) -> None:
    said = 'echo "$WORD"; echo "${TMPDIR-none} ${USER-none} $(pwd)"; ps -e -o comm= | head -n 1'
    running = task(f"{said}; echo result >result.txt; echo oh >&2; exit 7", name)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 7
    assert (work / ".exitcode").read_text() == "7"
    assert out == f"a  b;$HOME\n/tmp none {work}\nsinit\n"
    assert err == "oh\n"
    assert (work / ".command.out").read_text() == out
    assert (work / ".command.err").read_text() == err
    assert (work / "result.txt").read_text() == "result\n"


def test_the_number_of_processes_is_what_a_trace_needs(task: Task) -> None:
    """Traces follow /proc and ps inside: process ids there begin anew, and the task's own files of /proc are readable."""
    script = "ps -e -o pid= | wc -l; cat /proc/$$/io >/dev/null; [ $$ = $(awk '{ print $1 }' /proc/$$/stat) ] && echo same"
    running = task(script)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    count, same = out.split()
    assert int(count) < 8
    assert same == "same"


@pytest.mark.parametrize("stubborn", [False, True], ids=["", "with a background process"])
def test_term_ends_the_whole_tree_with_143(task: Task, work: Path, stubborn: bool) -> None:
    running = task(f"{'(trap : TERM; sleep 63.25; sleep 63.25) & ' if stubborn else ''}echo up >up; sleep 63.25; echo late >late")
    deadline = time.monotonic() + 60
    while not (work / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    begun = time.monotonic()
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert running.returncode == 143
    assert (work / ".exitcode").read_text() == "143"
    assert processes("sleep 63.25") == []
    assert not (work / "late").exists()


def test_killed_for_good_it_leaves_nothing(task: Task, work: Path) -> None:
    """A batch system's KILL reaches the process that we are, and the processes inside go with it."""
    running = task("echo up >up; sleep 64.25 & sleep 64.25")
    deadline = time.monotonic() + 60
    while not (work / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    started = f" exec --no-home --pid -B {work} "
    os.kill(min(int(line.split()[0]) for line in ps() if started in line and "python" in line.split()[1]), signal.SIGKILL)
    running.communicate(timeout=60)
    assert (work / ".exitcode").read_text() == "137"
    assert processes("sleep 64.25") == []


def ps() -> list[str]:
    return subprocess.run(["ps", "-e", "-o", "pid=,args=", "-ww"], capture_output=True, text=True, check=True).stdout.splitlines()
