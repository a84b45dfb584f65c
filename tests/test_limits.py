"""Limits of resources: how options and files are translated, and the control groups that are made of them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespace_fixtures import Command, Need

from sciexec import host, limits, options, run
from sciexec.errors import HostError, UsageError

pytest_plugins = ["run_fixtures"]


# --- translation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ({}, {}),
        ({"memory": "1g"}, {"memory.max": "1073741824"}),
        ({"memory": "512M", "memory_reservation": "1000"}, {"memory.max": "536870912", "memory.low": "1000"}),
        ({"memory": "1g", "memory_swap": "1536m"}, {"memory.max": "1073741824", "memory.swap.max": "536870912"}),
        ({"memory": "1g", "memory_swap": "1g"}, {"memory.max": "1073741824", "memory.swap.max": "0"}),
        ({"memory": "1g", "memory_swap": "-1"}, {"memory.max": "1073741824", "memory.swap.max": "max"}),
        ({"memory_swap": "-1"}, {"memory.swap.max": "max"}),
        ({"memory": "-1"}, {"memory.max": "max"}),
        ({"cpus": "1.5"}, {"cpu.max": "150000 100000"}),
        ({"cpus": "0.01"}, {"cpu.max": "1000 100000"}),
        ({"cpus": "4"}, {"cpu.max": "400000 100000"}),
        ({"cpu_shares": "1024"}, {"cpu.weight": "100"}),
        ({"cpu_shares": "2"}, {"cpu.weight": "1"}),
        ({"cpu_shares": "262144"}, {"cpu.weight": "10000"}),
        ({"cpuset_cpus": "0-3,8", "cpuset_mems": "0"}, {"cpuset.cpus": "0-3,8", "cpuset.mems": "0"}),
        ({"pids_limit": "100"}, {"pids.max": "100"}),
        ({"pids_limit": "-1"}, {"pids.max": "max"}),
        ({"blkio_weight": "10"}, {"io.weight": "1"}),
        ({"blkio_weight": "1000"}, {"io.weight": "10000"}),
    ],
)
def test_options_become_files(given: dict[str, str], files: dict[str, str]) -> None:
    assert limits.translate(limits.requests(given, 4)) == files


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": "much"}, "--memory much: not a size"),
        ({"memory": "0"}, "memory.limit = 0: not a number from 1"),
        ({"memory_swap": "1g"}, "--memory-swap: swap cannot be limited without a limit of memory"),
        ({"memory": "2g", "memory_swap": "1g"}, "--memory-swap 1073741824: it is of memory and swap together"),
        ({"cpus": "0"}, "--cpus 0: not a number of CPUs"),
        ({"cpus": "4.5"}, "--cpus 4.5: not a number of CPUs"),
        ({"cpus": "-1"}, "--cpus -1: not a number of CPUs"),
        ({"cpus": "1e0"}, "--cpus 1e0: not a number of CPUs"),
        ({"cpus": "nan"}, "--cpus nan: not a number of CPUs"),
        ({"cpu_shares": "1"}, "cpu.shares = 1: not a number from 2 to 262144"),
        ({"cpuset_cpus": "3-1"}, "cpu.cpus = '3-1': not a list of numbers"),
        ({"cpuset_cpus": "all"}, "cpu.cpus = 'all': not a list of numbers"),
        ({"cpuset_mems": "0,"}, "cpu.mems = '0,': not a list of numbers"),
        ({"pids_limit": "0"}, "pids.limit = 0: not a number from 1"),
        ({"pids_limit": "some"}, "--pids-limit some: not a number"),
        ({"blkio_weight": "9"}, "blockIO.weight = 9: not a number from 10 to 1000"),
    ],
)
def test_values_that_make_no_sense_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=f"{message}"):
        limits.translate(limits.requests(given, 4))


FILE = """
# what a job may take
[memory]
limit = 1_073_741_824   # 1 GiB
reservation = 0
"swap" = -1

[cpu]
shares = 512
period = 50000
quota = 25000
cpus = "0-1"
mems = '0'
[pids]
limit = 1024

[blockIO]
weight = 500
[[blockIO.throttleReadBpsDevice]]
major = 8
minor = 0
rate = 1000
[[blockIO.throttleWriteIOPSDevice]]
major = 8
minor = 0
rate = 7
[[blockIO.throttleReadBpsDevice]]
major = 9
minor = 1
rate = 5
[unified]
"memory.high" = "900M"
"""


def test_a_file_of_limits() -> None:
    assert limits.translate(limits.toml(FILE)) == {
        "memory.max": "1073741824",
        "memory.low": "0",
        "memory.swap.max": "max",
        "cpu.max": "25000 50000",
        "cpu.weight": str(limits.cpu_weight(512)),
        "cpuset.cpus": "0-1",
        "cpuset.mems": "0",
        "pids.max": "1024",
        "io.weight": "4950",
        "io.max": "8:0 rbps=1000 wiops=7\n9:1 rbps=5",
        "memory.high": "900M",
    }
    assert limits.toml("memory.limit = 5\n") == {"memory.limit": 5}
    assert limits.toml("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[devices]]\nallow = true", "line 1: devices: rules for devices are loaded by root"),
        ("[memory]\nkernel = 5", "line 2: memory.kernel: this release of sciexec takes no limit of that name"),
        ("[memory]\nlimit = 5\nlimit = 6", "line 3: memory.limit is there twice"),
        ("[memory]\nlimit = 1.5", "line 2: 1.5 is neither a whole number"),
        ("[memory]\nlimit = { a = 1 }", "line 2: { a = 1 } is neither a whole number"),
        ('[cpu]\ncpus = "0\\n"', "line 2: .* is neither a whole number"),
        ("[memory\nlimit = 5", "line 1: .memory is no table"),
        ("limit", "line 1: limit is neither a table nor KEY = VALUE"),
        ("[memory]\nlim it = 5", "line 2: lim it is no key"),
        ("[memory]\nlimit = true", "memory.limit = True: not a number"),
        ('[memory]\nlimit = "1g"', "memory.limit = '1g': not a number"),
        ("[[blockIO.throttleReadBpsDevice]]\nmajor = 8", "each needs the numbers major, minor and rate"),
        ("blockIO.throttleReadBpsDevice = 5", "each needs the numbers major, minor and rate"),
        ("[hugepageLimits]\nlimit = 1", "line 2: hugepageLimits.limit: this release"),
    ],
)
def test_a_file_that_is_not_plain_is_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        limits.translate(limits.toml(text))


def test_a_file_that_is_missing(sciexec: Command, images: dict[str, Path], tmp_path: Path) -> None:
    done = sciexec("exec", "--apply-cgroups", tmp_path / "none.toml", images["directory"], "true")
    assert (done.returncode, done.stderr) == (255, f"FATAL: reading {tmp_path}/none.toml: No such file or directory\n")


# --- hosts that leave no control groups to their users ---------------------------------------------------------------------------

LIMIT = ["--pids-limit", "50"]


def test_the_plan_says_the_limits(sciexec: Command, images: dict[str, Path]) -> None:
    done = sciexec("exec", "-d", "--memory", "1g", "--cpus", "0.5", images["directory"], "true")
    assert "limit memory.max 1073741824\nlimit cpu.max 50000 100000\n" in done.stderr


def test_ranks_with_limits_do_not_share_a_container() -> None:
    """Each would have to be in the first one's group."""
    for limit, shared in ([], True), (LIMIT, False), (["--apply-cgroups", "/x.toml"], False):
        chosen = options.parse("sciexec", ["exec", "--share", "step", *limit, "image", "true"], {})
        assert chosen is not None and run.is_shared(chosen, host.Host()) is shared


def test_without_control_groups_a_limit_is_fatal(sciexec_path: Path, images: dict[str, Path], need: Need) -> None:
    script = 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
    command = [need("unshare"), "-rm", "sh", "-c", script, "sh", str(sciexec_path), "exec", *LIMIT, str(images["directory"]), "echo", "ran"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (255, "")
    assert done.stderr == (
        "FATAL: limiting resources: this host has no control groups of version 2\n"
        "       the site turns them on with systemd.unified_cgroup_hierarchy=1 on the kernel's command line\n"
    )


def test_a_limit_holds_or_is_fatal(sciexec: Command, images: dict[str, Path]) -> None:
    """Whatever this host has: never a payload without the limit."""
    done = sciexec("exec", *LIMIT, images["directory"], "sh", "-c", "cat /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/pids.max")
    if done.returncode == 0:
        assert done.stdout == "50\n"
    else:
        assert (done.returncode, done.stdout) == (255, "")
        assert done.stderr.startswith("FATAL: limiting resources: ") and len(done.stderr.splitlines()) == 2


# --- hosts that do -----------------------------------------------------------------------------------------------------------------

USER = 54321


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A control group that belongs to USER, with the controllers that version 1 has left over; it must be empty in the end."""
    root = next(line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if " - cgroup2 " in line)
    group = Path(root, f"sciexec-test-{os.getpid()}")
    group.mkdir()
    for path in (group, group / "cgroup.procs", group / "cgroup.subtree_control", group / "cgroup.threads"):
        os.chown(path, USER, USER)
    yield group
    deadline = time.monotonic() + 10
    while "populated 1" in (group / "cgroup.events").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [path for path in group.iterdir() if path.is_dir()]
    for path in (*left, group):
        path.rmdir()
    assert {path.name for path in left} <= {"sciexec-outside"}


def within(group: Path, need: Need, *command: str | Path) -> list[str]:
    """A command line that runs another as USER in a control group."""
    script = f'echo $$ > {group}/cgroup.procs && exec {need("setpriv")} --reuid {USER} --regid {USER} --clear-groups "$@"'
    return ["sh", "-c", script, "sh", *map(str, command)]


@pytest.fixture
def limited(tmp_path_factory: pytest.TempPathFactory, images: dict[str, Path]) -> list[str]:
    """A file of limits that every kernel knows, whichever controllers there are, and an image that USER can read."""
    place = Path("/tmp", f"sciexec-limits-{os.getpid()}")
    place.mkdir(mode=0o755, exist_ok=True)
    (place / "limits.toml").write_text('[unified]\n"cgroup.max.depth" = "7"\n"cgroup.max.descendants" = 5\n')
    (place / "image.sif").write_bytes(images["sif"].read_bytes())
    return ["exec", "--apply-cgroups", f"{place}/limits.toml", f"{place}/image.sif"]


SHOW = """
    group=$(sed -n 's/^0:://p' /proc/self/cgroup); echo $group
    for root in /sys/fs/cgroup /sys/fs/cgroup/unified; do
        cat $root$group/cgroup.max.depth $root$group/cgroup.max.descendants $root$group/$1 2>/dev/null
    done; true"""


@pytest.mark.root
@pytest.mark.parametrize("words", [[], ["--pid"], ["--pid", "--no-init"]])
def test_the_payload_is_in_a_group_with_its_limits(
    sciexec_path: Path, delegated: Path, limited: list[str], need: Need, words: list[str]
) -> None:
    command = within(delegated, need, sciexec_path, *limited[:1], *words, *limited[1:], "sh", "-c", SHOW)
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
        assert (done.returncode, done.stderr) == (0, "")
        group, *values = done.stdout.split()
        assert group.startswith(f"/{delegated.name}/sciexec-")
        assert values == ["7", "5"]


CONTROLLERS = {"pids": ("pids.max", "50"), "hugetlb": ("hugetlb.2MB.max", "0"), "misc": ("misc.max", "")}


@pytest.mark.root
@pytest.mark.parametrize("words", [[], ["--pid"]])
def test_a_controller_is_turned_on(sciexec_path: Path, delegated: Path, limited: list[str], need: Need, words: list[str]) -> None:
    """Which the kernel allows only in a group without processes: we step aside, into one of our own."""
    root = delegated.parent
    name = next(name for name in CONTROLLERS if name in (root / "cgroup.controllers").read_text().split())
    (root / "cgroup.subtree_control").write_text(f"+{name}")
    file, value = CONTROLLERS[name]
    Path(limited[2]).write_text(f'[unified]\n"{file}" = "{value}"\n')
    command = within(delegated, need, sciexec_path, *limited[:1], *words, *limited[1:], "sh", "-c", SHOW, "sh", file)
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == value
    assert (delegated / "cgroup.subtree_control").read_text() == f"{name}\n"


@pytest.mark.root
def test_the_group_stays_as_long_as_one_of_its_processes(sciexec_path: Path, delegated: Path, limited: list[str], need: Need) -> None:
    command = within(delegated, need, sciexec_path, *limited, "sh", "-c", "sleep 3 >/dev/null 2>&1 & echo ready")
    assert subprocess.run(command, capture_output=True, cwd="/", check=False).returncode == 0
    (group,) = delegated.glob("sciexec-*")
    assert "populated 1" in (group / "cgroup.events").read_text()


@pytest.mark.root
def test_who_joins_an_instance_is_in_its_group(sciexec_path: Path, delegated: Path, limited: list[str], need: Need) -> None:
    """From the group in which it was started; from another, which is not USER's, nobody joins without the limits."""
    _, *options, image = limited
    env = {**os.environ, "SCIEXEC_CONFIGDIR": f"/tmp/sciexec-limits-config-{os.getpid()}"}
    os.makedirs(env["SCIEXEC_CONFIGDIR"])
    os.chown(env["SCIEXEC_CONFIGDIR"], USER, USER)

    def run(group: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = within(group, need, sciexec_path, "-q", *words)
        return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/", check=False)

    try:
        done = run(delegated, "instance", "start", *options, image, "web")
        assert (done.returncode, done.stderr) == (0, "")
        done = run(delegated, "exec", "instance://web", "sh", "-c", SHOW)
        group, *values = done.stdout.split()
        assert (group.startswith(f"/{delegated.name}/sciexec-"), values, done.stderr) == (True, ["7", "5"], "")
        done = run(delegated.parent, "exec", "instance://web", "true")
        assert done.returncode == 255
        assert done.stderr.startswith("FATAL: joining instance web: its limits cannot be had here: Permission denied\n")
    finally:
        assert run(delegated, "instance", "stop", "-F", "web").returncode == 0


@pytest.mark.root
def test_a_limit_that_the_kernel_refuses_leaves_nothing(sciexec_path: Path, delegated: Path, limited: list[str], need: Need) -> None:
    file = Path(limited[2])
    file.write_text('[unified]\n"cgroup.max.depth" = "few"\n')
    done = subprocess.run(within(delegated, need, sciexec_path, *limited, "true"), capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (255, "FATAL: limiting resources: cgroup.max.depth = few: Invalid argument\n")
    file.write_text('[unified]\n"cgroup.nosuch" = 1\n')
    done = subprocess.run(within(delegated, need, sciexec_path, *limited, "true"), capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (255, "FATAL: limiting resources: cgroup.nosuch = 1: the kernel has no such limit\n")


@pytest.mark.root
def test_a_group_that_was_left_behind_is_removed(sciexec_path: Path, delegated: Path, limited: list[str], need: Need) -> None:
    left = delegated / "sciexec-999999999"
    left.mkdir()
    os.chown(left, USER, USER)
    assert subprocess.run(within(delegated, need, sciexec_path, *limited, "true"), cwd="/", check=False).returncode == 0
    assert not left.exists()


@pytest.mark.root
def test_a_group_of_somebody_elses_is_not_divided(sciexec_path: Path, delegated: Path, limited: list[str], need: Need) -> None:
    os.chown(delegated, 0, 0)
    done = subprocess.run(within(delegated, need, sciexec_path, *limited, "true"), capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 255
    message, hint = done.stderr.splitlines()
    assert message == f"FATAL: limiting resources: the control group /{delegated.name} is not ours to divide"
    assert hint.startswith("       `systemd-run")
    os.chown(delegated, USER, USER)


def test_an_unknown_controller_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    for name, text in (("cgroup.procs", "1\n2\n"), ("cgroup.controllers", "memory pids\n"), ("cgroup.subtree_control", "memory\n")):
        (tmp_path / "job" / name).write_text(text)
    monkeypatch.setattr(limits, "here", lambda: (f"{tmp_path}/job", str(tmp_path)))
    with pytest.raises(HostError, match="the control group /job lacks dsa, rdma$") as error:
        limits.place({"rdma", "dsa"})
    assert "Delegate=" in error.value.hint
