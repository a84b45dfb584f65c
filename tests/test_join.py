"""A process joins an instance: what it shares with it, what is its own, and what it cannot have."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from pathlib import Path

import pytest
from instances import Begin, Run, eventually, inside, log, pid_of

from sciexec import host

pytest_plugins = ["run_fixtures", "instance_fixtures"]


# --- join -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 37, 127, 255])
def test_the_exit_code_is_the_payloads(run: Run, service: Path, code: int) -> None:
    run("instance", "start", service, "idle")
    done = run("exec", "instance://idle", "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stderr) == (code, "")


def test_who_joins_lives_in_the_same_namespaces_without_any_rights(run: Run, service: Path) -> None:
    run("instance", "start", service, "web")
    pid = pid_of(run, "web")
    names = ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup")
    script = "; ".join(f"readlink /proc/self/ns/{name}" for name in names)
    assert inside(run, "web", script).split() == [os.readlink(f"/proc/{pid}/ns/{name}") for name in names]
    text = inside(run, "web", "id -u; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; ls /proc/self/fd; echo > /tmp/x && rm /tmp/x")
    lines = text.split("\n")
    assert lines[0] == str(os.getuid())
    fields = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert fields == {"NoNewPrivs": "1", **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)}


@pytest.mark.parametrize(
    "words",
    [["-f"], ["-C"], ["--ipc", "--hostname", "box", "--net", "--network", "none"], ["-f", "--no-privs", "--uts"], ["--security", "uid:7"],
     ["--add-caps", "CAP_NET_RAW,CAP_SYS_ADMIN"], ["-f", "--drop-caps", "CAP_CHOWN", "--net", "--network", "none", "--uts"]],
    ids=" ".join,
)  # fmt: skip
def test_who_joins_is_who_started(run: Run, hostile: Path, config: Path, words: list[str]) -> None:
    """The script tells of itself, and so does a process that joins, without asking for any of it."""
    told = """
        grep -E '^(Uid|Gid|Cap|NoNewPrivs|Seccomp)' /proc/self/status
        for name in user mnt pid ipc uts net cgroup; do readlink /proc/self/ns/$name; done
        id; uname -n; echo $HOME; cat /proc/net/dev | wc -l; echo end"""
    script = hostile / ".singularity.d/startscript"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n{told}\n")
    script.chmod(0o755)
    assert run("instance", "start", *words, hostile, "web").returncode == 0
    assert eventually(lambda: log(config, "web").endswith("end\n"))
    assert inside(run, "web", told).splitlines() == log(config, "web").splitlines()


def test_processes_see_each_other_and_the_same_files(run: Run, service: Path) -> None:
    run("instance", "start", "--contain", "--writable-tmpfs", service, "web")
    inside(run, "web", "echo 1 > /tmp/one; echo 2 > /opt/two")
    assert inside(run, "web", "cat /tmp/one /opt/two") == "1\n2\n"
    assert "/.singularity.d/startscript" in inside(run, "web", "tr '\\0' ' ' < /proc/2/cmdline")


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "KILL"])
def test_a_signal_to_the_command_is_the_payloads(
    run: Run, begin: Begin, service: Path, name: str
) -> None:
    run("instance", "start", service, "idle")
    number = int(signal.Signals[f"SIG{name}"])
    process = begin("exec", "instance://idle", "sh", "-c", "echo $$; exec sleep 1000")
    assert process.stdout
    inner = process.stdout.readline().strip()
    process.send_signal(number)
    assert process.wait(10) == -number
    assert eventually(lambda: run("exec", "instance://idle", "kill", "-0", inner).returncode == 1)


def test_a_payload_killed_by_a_signal_looks_so(run: Run, service: Path) -> None:
    run("instance", "start", service, "idle")
    assert run("exec", "instance://idle", "sh", "-c", "kill -ABRT $$").returncode == -signal.SIGABRT


def test_streams_pass_through(run: Run, service: Path) -> None:
    run("instance", "start", service, "idle")
    text = "".join(f"line {number}\n" for number in range(20000))
    done = run("exec", "instance://idle", "sh", "-c", "cat; echo error >&2", input=text)
    assert (done.stdout, done.stderr) == (text, "error\n")


def test_a_shell_on_pipes_lasts(run: Run, begin: Begin, service: Path) -> None:
    """As workflow engines keep one for all their commands."""
    run("instance", "start", service, "idle")
    shell = begin("exec", "instance://idle", "sh")
    assert shell.stdin and shell.stdout
    for number in range(5):
        shell.stdin.write(f"echo answer {number}; cut -d ' ' -f 5 /proc/1/mountinfo | head -n 1\n")
        shell.stdin.flush()
        assert [shell.stdout.readline() for _ in range(2)] == [f"answer {number}\n", "/\n"]
    shell.stdin.write("exit 7\n")
    shell.stdin.flush()
    assert shell.wait(10) == 7


def test_nothing_can_be_typed_into_the_terminal(sciexec_path: Path, run: Run, service: Path, config: Path) -> None:
    run("instance", "start", service, "idle")
    child, terminal = pty.fork()
    if child == 0:
        os.environ["SCIEXEC_CONFIGDIR"] = str(config)
        os.execv(sciexec_path, ["sciexec", "exec", "instance://idle", "sh", "-c", "test -t 0 && grep ^Seccomp: /proc/self/status; exit 7"])
    shown = b""
    try:
        while more := os.read(terminal, 1000):
            shown += more
    except OSError:  # EIO: the other side is closed
        pass
    assert shown.split() == [b"Seccomp:", b"2"]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_environment_is_that_of_a_run(run: Run, service: Path) -> None:
    run("instance", "start", "--env", "OF=start", service, "web", env={"HOST": "start"})
    env = {"HOST": "join", "SINGULARITYENV_X": "x"}
    lines = inside(run, "web", "env", "--env", "A=1", env=env).splitlines()
    assert {"HOST=join", "X=x", "A=1", "FROM_IMAGE=image", "SINGULARITY_INSTANCE=web", "SINGULARITY_COMMAND=exec"} <= set(lines)
    assert not any(line.startswith("OF=") for line in lines)
    assert "HOST=join" not in inside(run, "web", "env", "--cleanenv", env=env).splitlines()
    assert "SINGULARITY_INSTANCE=" not in run("exec", service, "env").stdout


def test_home_and_working_directory(run: Run, service: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run("instance", "start", "--home", f"{tmp_path}/mine:/elsewhere/home", "--contain", service, "web")
    assert inside(run, "web", 'echo "$HOME"; pwd') == "/elsewhere/home\n/elsewhere/home\n"
    assert inside(run, "web", "pwd", "--pwd", "/usr/lib") == "/usr/lib\n"
    done = run("exec", "--pwd", "/no/such", "instance://web", "pwd")
    assert (done.returncode, done.stderr) == (255, "FATAL: changing to /no/such inside the container: No such file or directory\n")
    run("instance", "start", service, "open")
    assert inside(run, "open", "pwd", cwd=tmp_path / "mine") == f"{tmp_path}/mine\n"
    place = Path(f"/dev/shm/sciexec-{os.getpid()}")  # made later than the instance, and not in the image
    run("instance", "start", "--contain", "--home", str(tmp_path), service, "closed")
    place.mkdir()
    try:
        done = run("exec", "instance://closed", "pwd", cwd=place)
        assert (done.stdout, done.stderr) == (f"{tmp_path}\n", "")
    finally:
        place.rmdir()
    done = run("exec", "instance://open", "pwd", cwd=Path("/opt"))
    assert (done.stdout, done.stderr) == ("/opt\n", "")


def test_a_working_directory_that_the_instance_lacks(run: Run, hostile: Path) -> None:
    (hostile / "opt").rmdir()
    run("instance", "start", hostile, "web")
    done = run("exec", "instance://web", "pwd", cwd=Path("/opt"))
    home = host.Host().home
    assert (done.stdout, done.stderr) == (f"{home}\n", f"WARNING: /opt is not in the container; starting in {home}\n")


def test_run_and_shell_and_test_join_too(run: Run, services: dict[str, Path]) -> None:
    run("instance", "start", services["sif"], "web")
    done = run("shell", "instance://web", input="echo in $SINGULARITY_NAME\n")
    assert done.stdout == f"in {services['sif'].name}\n"
    assert run("run", "instance://web", "x", env={"SINGULARITYENV_PATH": "/none"}).stdout == "runs x by run\n"  # and finds no sleep
    assert run("test", "instance://web").returncode == run("test", services["sif"]).returncode


def test_the_image_may_be_gone_by_then(run: Run, services: dict[str, Path], tmp_path: Path) -> None:
    image = tmp_path / "copy.sif"
    image.write_bytes(services["sif"].read_bytes())
    run("instance", "start", image, "web")
    image.unlink()
    assert inside(run, "web", "echo $FROM_IMAGE") == "image\n"


@pytest.mark.parametrize(
    "words", [["--contain"], ["--no-home"], ["--ipc"], ["--uts"], ["--net", "--network", "none"], ["--security", "uid:7"], ["-C"]]
)
def test_a_restriction_that_the_instance_lacks_is_fatal(run: Run, service: Path, words: list[str]) -> None:
    run("instance", "start", service, "free")
    done = run("exec", *words, "instance://free", "true")
    assert done.returncode == 1
    name = {"-C": "--contain", "--security": "--security uid"}.get(words[0], words[0])
    assert done.stderr.startswith(f"FATAL: {name} cannot be given to a process that joins instance free: it was started without\n")
    run("instance", "start", *words, service, "bound")
    done = run("exec", *words, "instance://bound", "true")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_addition_that_the_instance_lacks_is_left_out_with_a_word(run: Run, service: Path, data: Path) -> None:
    run("instance", "start", "-B", f"{data}:/mnt", service, "idle")
    done = run("exec", "-B", f"{data}:/mnt", "--pid", "--userns", "instance://idle", "cat", "/mnt/file")
    assert (done.stdout, done.stderr) == ("host's\n", "")
    done = run("exec", "-B", f"{data}:/opt", "--writable-tmpfs", "instance://idle", "ls", "/opt")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "".join(
        f"INFO:    {name} is ignored: instance idle was started without\n" for name in ("--bind", "--writable-tmpfs")
    )
    assert run("-q", "exec", "-B", f"{data}:/opt", "instance://idle", "true").stderr == ""


def test_an_instance_that_is_not_there(run: Run) -> None:
    for name in ("nosuch", "../x", "a b", ""):
        done = run("exec", f"instance://{name}", "true")
        assert (done.returncode, done.stderr.splitlines()[0]) == (255, f"FATAL: no instance found with name {name}")


def test_a_command_that_is_not_there(run: Run, service: Path) -> None:
    run("instance", "start", service, "idle")
    done = run("exec", "instance://idle", "no-such-command")
    assert (done.returncode, done.stderr) == (255, 'FATAL: "no-such-command": executable file not found in $PATH\n')


# --- stats ------------------------------------------------------------------------------------------------------------------


def test_stats(run: Run, service: Path) -> None:
    run("instance", "start", service, "web")
    inside(run, "web", "(i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done) & wait; (exec sleep 1000) >/dev/null 2>&1 </dev/null &")
    found = json.loads(run("instance", "stats", "--json", "web").stdout)
    usage = found["cpu_stats"]["cpu_usage"]
    assert usage["total_usage"] == usage["usage_in_usermode"] + usage["usage_in_kernelmode"]
    memory = found["memory_stats"]["usage"]
    assert 100_000 < memory["usage"] < memory["limit"]
    assert found["pids_stats"]["current"] >= 3
    assert [entry["op"] for entry in found["blkio_stats"]["io_service_bytes_recursive"]] == ["Read", "Write"]
    head, row = run("instance", "stats", "--no-stream", "web").stdout.splitlines()
    assert re.split(" {2,}", head) == ["INSTANCE NAME", "CPU USAGE", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS"]
    assert re.fullmatch(r"web +\d+\.\d\d% +\S+B / \S+B +\d+\.\d\d% +\S+B / \S+B +\d+", row)
    assert run("instance", "stats", "nosuch").returncode == 1
