"""`sciexec check` on this host and on worse ones.

The worse ones are made by an ordinary user inside a user namespace: limits lowered, devices and programs covered, system
calls forbidden by seccomp as the default profiles of Docker and podman do.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sciexec import doctor
from sciexec.errors import HostError
from sciexec.sources import OURS

TREE = Path(__file__).resolve().parent.parent
Command = Callable[..., "subprocess.CompletedProcess[str]"]
Worse = Callable[..., "subprocess.CompletedProcess[str]"]


def report(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Step -> (ok, missing or -, what was said)."""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "missing ", "- "))]
    return {line[9:27].strip(): (line[:9].strip(), line[28:]) for line in lines}


@pytest.fixture
def worse(sciexec_path: Path, tmp_path: Path, need: Callable[..., str]) -> Worse:
    """worse("shell commands", image) -> `sciexec check` after these commands, run as root of a user namespace."""
    unshare = need("unshare")

    def run(commands: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        script = f'set -e\n{commands}\nexec "$@"'
        command = [unshare, "--user", "--map-root-user", "--mount", "/bin/sh", "-c", script, "sh", sciexec_path, "check", *words]
        env = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_a_host_that_can(sciexec: Command, rootfs: Path) -> None:
    done = sciexec("check", rootfs)
    steps = report(done)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert list(steps) == [*(step.name for step in doctor.STEPS), "cache", "image"]
    assert steps["image"] == ("ok", f"directory {rootfs}")
    assert "SIF and SquashFS images run here" in done.stdout
    assert "sciexec-fuse" in steps["server"][1]


def test_nothing_is_left_behind(sciexec: Command, tmp_path: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    sciexec("check", cwd=tmp_path)
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.parametrize(
    ("name", "commands", "step", "bits", "said"),
    [
        ("no user namespaces", "echo 0 >/proc/sys/user/max_user_namespaces", "user namespace", 2, "limit on user namespaces"),
        ("no mount namespaces", "echo 0 >/proc/sys/user/max_mnt_namespaces", "mounts", 4, ""),
        ("no device", "mount -t tmpfs none /dev", "/dev/fuse", 8, "/dev/fuse: No such file or directory"),
        ("a closed device", "mount --bind /dev/null /dev/fuse", "/dev/fuse", 8, ""),
        (
            "no program",
            f"for p in {OURS} /usr/bin/squashfuse_ll /usr/local/bin/squashfuse_ll; do [ ! -e $p ] || mount --bind $HOME/f $p; done",
            "server",
            16,
            "neither sciexec-fuse beside sciexec nor squashfuse_ll in ",
        ),
    ],
)
def test_each_defect_has_its_name_and_its_bit(
    worse: Worse, name: str, commands: str, step: str, bits: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "f").touch(0o600)
    done = worse(commands)
    steps = report(done)
    assert steps[step][0] == "missing", done.stdout
    assert said in steps[step][1]
    assert done.returncode == (bits if bits & doctor.UNPACKED else bits | doctor.CANNOT_RUN)
    needed = {needed.name for needed in doctor.STEPS if needed.bit}
    assert {other for other, (state, _) in steps.items() if state == "missing"} & needed == {step}, done.stdout
    assert ("each unpacked once into the cache" in done.stdout) == (bits >= 8)
    assert ("Nothing can run here" in done.stdout) == (bits < 8)


def test_steps_that_need_another_are_not_blamed(worse: Worse) -> None:
    steps = report(worse("echo 0 >/proc/sys/user/max_user_namespaces", TREE))
    for step in ("mounts", "/dev/fuse", "leaving privileges", "overlay", "image"):
        assert steps[step] == ("-", "not tried without: user namespace")


def test_a_second_user_namespace_may_be_what_is_missing(worse: Worse, need: Callable[..., str]) -> None:
    """One is allowed and no more.  The step alone: the kernel is late in counting the namespaces of the steps before it."""
    program = "from sciexec import doctor; print(doctor.in_child(doctor.leave_privileges))"
    script = 'echo 1 >/proc/sys/user/max_user_namespaces; exec "$@"'
    command = [need("unshare"), "--user", "--map-root-user", "/bin/sh", "-c", script, "sh", sys.executable, "-c", program]
    done = subprocess.run(command, env={"PYTHONPATH": str(TREE)}, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("(False, 'a user namespace inside a user namespace: the limit on user namespaces is reached'"), (
        done.stderr
    )


def test_what_a_run_can_do_without_changes_no_exit_code(sciexec: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = sciexec("check", env={"SCIEXEC_CACHEDIR": str(tmp_path / "file")})
    assert done.returncode == 0
    assert report(done)["cache"][0] == "missing"
    assert "SCIEXEC_CACHEDIR" in done.stdout


def test_an_image_that_does_not_run(sciexec: Command, tmp_path: Path) -> None:
    broken = tmp_path / "broken.sif"
    broken.write_bytes(b"no image")
    done = sciexec("check", broken)
    assert done.returncode == doctor.CANNOT_RUN | 64
    assert "neither SIF nor SquashFS" in report(done)["image"][1]


# struct sock_filter: load the call's number; equal -> fail with EPERM; allow.
SECCOMP = """
import os, struct, sys
sys.path.insert(0, {tree!r})
from sciexec import kernel
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
rules = ((0x20, 0, 0, 0), (0x15, 0, 1, {number}), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))
kernel.seccomp(b"".join(struct.pack("@HBBI", *rule) for rule in rules))
os.execv(sys.argv[1], sys.argv[1:])
"""
NUMBERS = {"x86_64": {"unshare": 272, "mount": 165}, "aarch64": {"unshare": 97, "mount": 40}}


@pytest.mark.parametrize(("call", "step", "bits"), [("unshare", "user namespace", 2), ("mount", "mounts", 4)])
def test_inside_another_container(sciexec_path: Path, tmp_path: Path, call: str, step: str, bits: int) -> None:
    machine = os.uname().machine
    if machine not in NUMBERS:
        pytest.skip(f"knows no system call numbers of {machine}")
    program = SECCOMP.format(tree=str(TREE), number=NUMBERS[machine][call])
    command = [sys.executable, "-c", program, str(sciexec_path), "check"]
    done = subprocess.run(command, env={"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == doctor.CANNOT_RUN | bits, done.stdout + done.stderr
    assert report(done)[step][0] == "missing"
    assert struct.calcsize("@HBBI") == 8


# --- the children -----------------------------------------------------------------------------------------------------------


def test_a_step_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    assert doctor.in_child(lambda: str(os.read(os.pipe()[0], 1))) == (False, "no answer within 0.2 s", "")


def test_a_step_that_dies_is_named() -> None:
    fine, said, _ = doctor.in_child(lambda: os._exit(7))  # type: ignore[arg-type]
    assert (fine, said) == (False, "the step died, exit status 7")


def test_what_a_step_says() -> None:
    def refuse() -> str:
        raise HostError("no", "ask")

    def fail() -> str:
        raise KeyError("defect")

    assert doctor.in_child(lambda: "x\udcff\n")[0]
    assert doctor.in_child(refuse) == (False, "no", "ask")
    assert doctor.in_child(fail) == (False, "KeyError: 'defect'", "")
    assert doctor.in_child(lambda: open("/no/such").name) == (False, "/no/such: No such file or directory", "")
