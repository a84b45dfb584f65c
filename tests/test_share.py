"""One container for all ranks of a node: real processes, real namespaces, ranks that come late, end early and are killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespace_fixtures import Command, Need, servers

from sciexec import mpi

pytest_plugins = ["run_fixtures"]

RANKS = 6
WHERE = "readlink /proc/self/ns/mnt; readlink /proc/self/ns/user"


def keepers(image: Path) -> set[int]:
    """Process ids of the keepers of containers of an image."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            kept = entry.name.isdigit() and (entry / "comm").read_text() == "sciexec-keeper\n"
            if kept and f"\0{image}\0" in (entry / "cmdline").read_text() and " Z " not in (entry / "stat").read_text():
                found.add(int(entry.name))
        except OSError:
            pass
    return found


def serving(image: Path) -> set[int]:
    """Process ids of the servers of an image."""
    return {pid for pid in servers() if any(os.readlink(f"/proc/{pid}/fd/{fd}") == str(image) for fd in os.listdir(f"/proc/{pid}/fd"))}


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


pytestmark = pytest.mark.usefixtures("nothing_left")


class Step:
    """The ranks of one step, as a launcher starts them: `start(...)` one, `end()` all."""

    def __init__(self, program: Path, name: str) -> None:
        self.program = program
        self.environment = {**os.environ, "OMPI_COMM_WORLD_LOCAL_SIZE": str(RANKS), "PMIX_NAMESPACE": name}
        self.ranks: list[subprocess.Popen[str]] = []

    def start(self, *words: str | Path, **variables: str) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**self.environment, **variables}
        self.ranks.append(subprocess.Popen([self.program, *map(str, words)], env=environment, text=True, **pipes))  # type: ignore[call-overload]
        return self.ranks[-1]

    def waiting(self, image: Path, *options: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
        """A rank that has started and waits for a line on standard input; the namespaces that it is in."""
        rank = self.start("exec", *options, image, "sh", "-c", f"{WHERE}; echo ready; read line", **variables)
        assert rank.stdout
        lines = [rank.stdout.readline() for _ in range(3)]
        assert lines[2] == "ready\n", [*lines, rank.communicate()[1]]
        return rank, lines[0] + lines[1]

    def end(self) -> None:
        for rank in self.ranks:
            if rank.returncode is None:
                rank.communicate("\n", timeout=60)


@pytest.fixture
def step(sciexec_path: Path, tmp_path: Path) -> Iterator[Step]:
    made = Step(sciexec_path, str(tmp_path))
    yield made
    made.end()
    assert eventually(lambda: not keepers(tmp_path / "image"))


@pytest.fixture(params=["sif", "directory"])
def image(request: pytest.FixtureRequest, images: dict[str, Path], tmp_path: Path) -> Path:
    """An image that no other test runs at the same time, so that processes can be counted."""
    source = images[request.param]
    path = tmp_path / "image"
    path.symlink_to(source) if source.is_dir() else shutil.copy(source, path)
    return path


# --- who is with whom -----------------------------------------------------------------------------------------------------------


def test_all_ranks_have_one_container_one_server_and_one_keeper(step: Step, image: Path) -> None:
    ranks = [step.start("exec", image, "sh", "-c", f"{WHERE}; echo $RANK; read line; exit $RANK", RANK=str(rank)) for rank in range(RANKS)]
    seen = []
    for number, rank in enumerate(ranks):
        assert rank.stdout
        seen.append(rank.stdout.readline() + rank.stdout.readline())
        assert rank.stdout.readline() == f"{number}\n"  # its own environment
    assert len(set(seen)) == 1
    assert len(serving(image)) == (0 if image.is_dir() else 1)
    assert len(keepers(image)) == 1
    for number, rank in enumerate(ranks):
        assert rank.communicate("\n") == ("", "")
        assert rank.returncode == number


def test_each_has_its_own_directory_arguments_and_streams(step: Step, image: Path, tmp_path: Path) -> None:
    first, _ = step.waiting(image)
    for name in ("a", "b"):
        done = subprocess.run(
            [step.program, "exec", "--pwd", "/usr", image, "sh", "-c", 'pwd; cat; echo "$1" >&2', "sh", name],
            env=step.environment, input=name, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.stdout, done.stderr, done.returncode) == (f"/usr\n{name}", f"{name}\n", 0)
    assert first.poll() is None


def test_what_is_mounted_decides(step: Step, image: Path, tmp_path: Path) -> None:
    _, first = step.waiting(image)
    _, same = step.waiting(image, "--env", "A=1", "--cwd", "/")
    _, bound = step.waiting(image, "--bind", f"{tmp_path}:/mnt")
    _, contained = step.waiting(image, "--contain")
    _, other = step.waiting(image, PMIX_NAMESPACE="another step")
    assert same == first
    assert len({first, bound, contained, other}) == 4


@pytest.mark.parametrize(
    ("options", "variables", "shared"),
    [
        ([], {}, True),
        (["--share", "off"], {}, False),
        ([], {"SCIEXEC_SHARE": "off"}, False),
        ([], {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        (["--share=step"], {"OMPI_COMM_WORLD_LOCAL_SIZE": ""}, True),
        (["--sharens"], {"OMPI_COMM_WORLD_LOCAL_SIZE": ""}, True),
        (["--share", "job"], {"SLURM_JOB_ID": "7", "PMIX_NAMESPACE": ""}, True),
        (["--pid"], {}, False),
        (["--fakeroot", "--ipc", "--hostname", "box", "--network", "none"], {}, True),
    ],
)
def test_when_a_container_is_shared(
    step: Step, images: dict[str, Path], options: list[str], variables: dict[str, str], shared: bool
) -> None:
    _, first = step.waiting(images["directory"], *options, **variables)
    _, second = step.waiting(images["directory"], *options, **variables)
    assert (first == second) is shared


def test_job_spans_steps(step: Step, images: dict[str, Path]) -> None:
    def started(*options: str, number: str) -> str:
        return step.waiting(images["directory"], *options, PMIX_NAMESPACE="", SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_ID=number)[1]

    assert started(number="0") != started(number="1")
    assert started("--share", "job", number="0") == started("--share", "job", number="1")


def test_an_unknown_way_to_share(sciexec: Command, images: dict[str, Path]) -> None:
    done = sciexec("exec", "--share", "all", images["directory"], "true")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "FATAL: --share all: not a way to share")


# --- who comes and goes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
def test_the_first_may_end_first_and_others_come_late(step: Step, image: Path, killed: bool) -> None:
    first, one = step.waiting(image)
    _, two = step.waiting(image)
    first.kill() if killed else first.communicate("\n")
    first.wait()
    _, three = step.waiting(image)
    assert one == two == three


def test_when_all_have_gone_the_next_makes_a_new_one(step: Step, image: Path) -> None:
    for _ in range(3):
        rank, _ = step.waiting(image)
        rank.communicate("\n")
        assert rank.returncode == 0
    assert eventually(lambda: not keepers(image))
    assert step.waiting(image)[1]


def test_ranks_that_come_as_the_last_one_goes(step: Step, images: dict[str, Path]) -> None:
    """The keeper ends, and somebody is at its door: they shall neither fail nor wait."""
    for _ in range(30):
        done = [step.start("exec", images["directory"], "true") for _ in range(2)]
        assert [(rank.wait(60), rank.communicate()[1]) for rank in done] == [(0, ""), (0, "")]


def test_a_first_rank_killed_at_any_moment_holds_nobody_up(step: Step, images: dict[str, Path]) -> None:
    for delay in range(0, 60, 3):
        first = step.start("exec", images["sif"], "sleep", "60")
        time.sleep(delay / 1000)
        others = [step.start("exec", images["sif"], "sh", "-c", "echo in") for _ in range(2)]
        first.kill()
        first.wait()
        for rank in others:
            assert rank.communicate(timeout=60) == ("in\n", "")


def test_a_container_that_cannot_be_made_is_everybodys_error(step: Step, images: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = ["exec", "-B", f"{tmp_path}/data:/proc/nowhere/else", images["directory"], "true"]
    ranks = [step.start(*words) for _ in range(RANKS)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 255
        assert errors.startswith("FATAL: mounting") and errors.count("FATAL") == 1


def test_signals_reach_the_rank_that_they_are_for(step: Step, image: Path) -> None:
    _, one = step.waiting(image)
    second, two = step.waiting(image)
    assert one == two
    second.terminate()
    assert second.wait() == -signal.SIGTERM


def test_a_rank_stays_on_its_cpu_and_the_server_does_not(step: Step, image: Path, need: Need) -> None:
    taskset = need("taskset")
    cpu = str(min(os.sched_getaffinity(0)))
    command = [taskset, "-c", cpu, step.program, "exec", image, "sh", "-c", "grep Cpus_allowed_list /proc/self/status; read line"]
    rank = subprocess.Popen(command, env=step.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rank.stdout and rank.stdout.readline().split()[1] == cpu
    ours = serving(image) | keepers(image)
    assert len(ours) == (1 if image.is_dir() else 2)
    assert {frozenset(os.sched_getaffinity(pid)) for pid in ours} == {frozenset(os.sched_getaffinity(0))}
    rank.communicate("\n")


# --- what it is for --------------------------------------------------------------------------------------------------------------

READER = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
/* without arguments: print pid and the address of a text, wait for a line; with both: print the other's text */
static char text[64];
int main(int count, char **arguments)
{
	if (count == 1) {
		strcpy(text, "the other rank's memory");
		printf("%d %lx\n", (int)getpid(), (unsigned long)text);
		fflush(stdout);
		return getchar() == EOF;
	}
	struct iovec here = {text, sizeof text}, there = {(void *)strtoul(arguments[2], NULL, 16), sizeof text};
	if (process_vm_readv(atoi(arguments[1]), &here, 1, &there, 1, 0) < 0)
		return perror("process_vm_readv"), 1;
	return puts(text) < 0;
}
"""


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_read_each_others_memory(step: Step, image: Path, need: Need, tmp_path: Path, shared: bool) -> None:
    """Cross memory attach, as MPI libraries use it within a node; between two containers the kernel forbids it."""
    (tmp_path / "reader.c").write_text(READER)
    subprocess.run([need("gcc"), "-O1", "-static", "-o", tmp_path / "reader", tmp_path / "reader.c"], check=True)
    options = ["--share", "step" if shared else "off", "-B", f"{tmp_path}/reader:/reader"]
    one = step.start("exec", *options, image, "/reader")
    assert one.stdout
    two = step.start("exec", *options, image, "/reader", *one.stdout.readline().split())
    said, errors = two.communicate(timeout=60)
    assert (said, two.returncode) == (("the other rank's memory\n", 0) if shared else ("", 1)), errors


@pytest.mark.parametrize("behind", [[], ["sh", "-c", '"$@"; exit $?', "sh"]], ids=["directly", "behind a shell"])
def test_hydra_starts_ranks_that_share(sciexec_path: Path, image: Path, need: Need, tmp_path: Path, behind: list[str]) -> None:
    """MPICH's launcher names no step: its proxy on the node does."""
    together = f"touch {tmp_path}/rank.$PMI_RANK; until [ $(ls {tmp_path} | grep -c rank) = {RANKS} ]; do sleep 0.1; done"
    ranks = [sciexec_path, "exec", image, "sh", "-c", f"{together}; echo $({WHERE})"]
    command = [need("mpiexec.hydra"), "-n", str(RANKS), *behind, *ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), len(set(lines))) == (0, RANKS, 1), done.stderr


# --- what launchers say ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({}, 0),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "3", "PMI_SIZE": "9"}, 3),
        ({"MPI_LOCALNRANKS": "x"}, 0),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "0"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "3"}, 0),
        ({"SLURM_STEP_TASKS_PER_NODE": "48"}, 48),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_NODEID": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, 16),
        ({"SLURM_TASKS_PER_NODE": "16", "SLURM_JOB_ID": "1"}, 0),  # a batch script is no rank
    ],
)
def test_the_number_of_ranks_on_a_node(environ: dict[str, str], size: int) -> None:
    assert mpi.local_size(environ) == size


def test_names_of_steps_and_jobs() -> None:
    slurm = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3"}
    assert mpi.step(slurm) == "SLURM_JOB_ID=12 SLURM_STEP_ID=3"
    assert mpi.job(slurm) == mpi.job({"SLURM_JOB_ID": "12"}) == "SLURM_JOB_ID=12"
    assert mpi.step({"PMIX_NAMESPACE": "prte-1@1"}) == "PMIX_NAMESPACE=prte-1@1"
    parent = mpi.step({})
    assert parent.startswith("process ") and mpi.step({"SLURM_JOB_ID": "12"}) == f"SLURM_JOB_ID=12 {parent}"
