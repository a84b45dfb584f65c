"""Instances, end to end: started in the background, joined, listed, stopped; and nothing of them left behind."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespace_fixtures import Make

from sciexec import host, instance, options
from sciexec.errors import HostError, UsageError

pytest_plugins = ["run_fixtures"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]
HERE = os.uname().nodename
STARTSCRIPT = """#!/bin/sh
trap 'echo stopped by INT; exit 0' INT
trap 'echo stopped by TERM; exit 0' TERM
echo "started $* as $$ of $PPID in $SINGULARITY_INSTANCE by $SINGULARITY_COMMAND"
echo problem >&2
cat
while :; do sleep 0.05; done
"""
RUNSCRIPT = """#!/bin/sh
echo "runs $* by $SINGULARITY_COMMAND"
exec sleep 1000
"""


@pytest.fixture(scope="module")
def services(rootfs: Path, make_image: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tree with a startscript and a runscript, as "sif" and "directory"."""
    tree = tmp_path_factory.mktemp("service") / "tree"
    subprocess.run(["cp", "-a", rootfs, tree], check=True)
    scripts = tree / ".singularity.d"
    (scripts / "env").mkdir(parents=True)
    (scripts / "env/90-environment.sh").write_text("export FROM_IMAGE=image\n")
    for name, text in (("startscript", STARTSCRIPT), ("runscript", RUNSCRIPT)):
        (scripts / name).write_text(text)
        (scripts / name).chmod(0o755)
    return {kind: make_image(tree, kind) for kind in ("sif", "directory")}


@pytest.fixture
def service(services: dict[str, Path]) -> Path:
    return services["directory"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


@pytest.fixture
def run(sciexec: Run, config: Path, nothing_left: None) -> Iterator[Run]:
    """sciexec with the instances of this test, which are stopped at its end."""

    def run(*words: str | Path, env: dict[str, str] | None = None, **given: Any) -> subprocess.CompletedProcess[str]:
        return sciexec(*words, env={"SCIEXEC_CONFIGDIR": str(config), **(env or {})}, **given)

    yield run
    run("instance", "stop", "--all", "--force")


@pytest.fixture
def begin(sciexec_path: Path, config: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """begin("exec", ...) -> the running process, with pipes."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str | Path) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sciexec_path, *words],
                env={**os.environ, "SCIEXEC_CONFIGDIR": str(config)},
                cwd=tmp_path,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        with process:
            process.kill()


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


# --- start ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sif", "directory"])
def test_start_runs_the_startscript_and_returns(run: Run, services: dict[str, Path], kind: str, config: Path) -> None:
    done = run("instance", "start", services[kind], "web", "a  b", "c")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "INFO:    instance started successfully\n")
    assert eventually(lambda: log(config, "web", "err"))
    assert log(config, "web") == "started a  b c as 2 of 1 in web by start\n"
    assert log(config, "web", "err") == "problem\n"


def test_run_runs_the_runscript(run: Run, service: Path, config: Path) -> None:
    assert run("-q", "instance", "run", service, "job", "x").stderr == ""
    assert eventually(lambda: log(config, "job") == "runs x by run\n")


def test_logs_grow(run: Run, service: Path, config: Path) -> None:
    for word in ("first", "second"):
        run("instance", "run", service, "job", word)
        assert eventually(lambda word=word: f"runs {word}" in log(config, "job"))  # type: ignore[misc]
        run("instance", "stop", "job")
    assert log(config, "job").startswith("runs first")


def test_an_image_without_startscript_is_an_instance_all_the_same(run: Run, image: Path) -> None:
    assert run("instance", "start", image, "idle").returncode == 0
    assert inside(run, "idle", "cat /proc/1/comm; echo /proc/[0-9]*; echo $$") == "sinit\n/proc/1 /proc/2\n2\n"
    begun = time.monotonic()
    assert run("instance", "stop", "idle").returncode == 0
    assert time.monotonic() - begun < 5


def test_process_1_is_called_sinit_and_belongs_to_the_host(run: Run, service: Path) -> None:
    run("instance", "start", service, "web")
    pid = pid_of(run, "web")
    status = Path(f"/proc/{pid}/status").read_text()
    assert status.startswith("Name:\tsinit\n")
    assert "NSpid:\t" + f"{pid}\t1\n" in status
    assert "CapPrm:\t0000000000000000\n" in status
    assert os.getsid(pid) != os.getsid(0)
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")] == ["anon_inode:[signalfd]"]


def test_descriptors_of_the_caller_are_not_kept(sciexec_path: Path, run: Run, service: Path, config: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    subprocess.run(
        [sciexec_path, "-q", "instance", "start", service, "web"],
        env={**os.environ, "SCIEXEC_CONFIGDIR": str(config)}, cwd=tmp_path, pass_fds=[writing], check=True,
    )  # fmt: skip
    os.close(writing)
    with open(reading) as file:
        assert file.read() == ""  # it ends


def test_the_environment_of_the_caller_stays_outside(run: Run, service: Path) -> None:
    run("instance", "start", "--cleanenv", service, "web", env={"SECRET": "secret"})
    assert "secret" not in inside(run, "web", "cat /proc/[12]/environ")


def test_pid_file(run: Run, service: Path, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("a longer text that was there before\n")
    assert run("instance", "start", "--pid-file", tmp_path / "pid", service, "web").returncode == 0
    assert (tmp_path / "pid").read_text() == f"{pid_of(run, 'web')}\n"
    done = run("instance", "start", "--pid-file", "/no/such/place", service, "other")
    assert (done.returncode, done.stderr) == (255, "FATAL: writing the process id to /no/such/place: No such file or directory\n")
    assert [found["instance"] for found in listed(run)] == ["web"]


@pytest.mark.parametrize("name", ["a/b", "../x", "..", ".", "a b", "", "\u00e9", "x" * 300, "a\nb"])
def test_a_bad_name_is_refused(run: Run, service: Path, name: str) -> None:
    done = run("instance", "start", service, name)
    assert done.returncode == 1
    assert re.match(r"FATAL: instance name .*: not a valid one\n", done.stderr)
    assert listed(run) == []


@pytest.mark.parametrize("name", ["A-z.0_9", ".hidden", "-dash", "x" * 200])
def test_a_good_name_is_taken(run: Run, service: Path, name: str) -> None:
    assert run("instance", "start", service, name).returncode == 0
    assert [found["instance"] for found in listed(run)] == [name]
    assert inside(run, name, "echo in") == "in\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-B", "/no/such"], "FATAL: binding /no/such: no such file or directory on the host"),
        (["--pwd", "/no/such"], "FATAL: changing to /no/such inside the container: No such file or directory"),
    ],
)
def test_what_fails_on_the_way_is_the_commands_to_tell(run: Run, service: Path, words: list[str], message: str) -> None:
    done = run("instance", "start", *words, service, "web")
    assert (done.returncode, done.stderr) == (255, message + "\n")
    assert listed(run) == []


def test_a_script_that_cannot_be_executed_is_an_error(run: Run, hostile: Path, config: Path) -> None:
    script = hostile / ".singularity.d/startscript"
    script.parent.mkdir()
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o755)
    done = run("instance", "start", hostile, "web")
    assert done.returncode == 255
    assert done.stderr == 'FATAL: "/.singularity.d/startscript": the interpreter that it names is not in the image\n'
    assert listed(run) == []
    assert list((config / "instances/app" / HERE).iterdir()) == list((config / "instances/new").iterdir()) == []


def test_an_image_that_is_not_there(run: Run) -> None:
    done = run("instance", "start", "/no/such.sif", "web")
    assert (done.returncode, done.stderr) == (255, "FATAL: opening /no/such.sif: no such file or directory\n")
    assert run("instance", "start", "/no/such.sif").returncode == 1


# --- names and records --------------------------------------------------------------------------------------------------------


def test_a_name_is_taken_once(run: Run, service: Path) -> None:
    run("instance", "start", service, "web")
    pid = pid_of(run, "web")
    done = run("instance", "start", service, "web")
    assert done.returncode == 255
    assert done.stderr == "FATAL: instance web exists already\n       `sciexec instance stop web` stops it\n"
    assert pid_of(run, "web") == pid


def test_of_many_who_start_one_name_one_succeeds(run: Run, begin: Callable[..., subprocess.Popen[str]], service: Path) -> None:
    processes = [begin("instance", "start", service, "web") for _ in range(8)]
    texts = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0] + [255] * 7, texts
    assert sum("instance web exists already" in text for text in texts) == 7
    assert len(listed(run)) == 1


def test_a_record_without_its_process_does_not_count(run: Run, service: Path, config: Path) -> None:
    """The process id lives, but it is somebody else's by now."""
    run("instance", "start", service, "web")
    directory = config / "instances/app" / HERE / "web"
    (path,) = directory.iterdir()
    record = path.read_text()
    run("instance", "stop", "web")
    fields = json.loads(record)
    stale = {**fields, "pid": os.getpid(), "started": instance.start_time(os.getpid()) - 1}
    before = {**fields, "pid": os.getpid(), "started": instance.start_time(os.getpid()), "boot": "another"}
    for text in (json.dumps(stale), json.dumps(before)):
        directory.mkdir()
        path.write_text(text)
        assert listed(run) == []
        assert not directory.exists()
        directory.mkdir()
        path.write_text(text)
        assert run("instance", "start", service, "web").returncode == 0
        assert [path.name] != os.listdir(directory)
        run("instance", "stop", "web")


def test_who_removes_a_record_that_was_handed_over_removes_only_that(tmp_path: Path, begin: Callable[..., subprocess.Popen[str]]) -> None:
    """The reader is late: it looks at the starting command's record when that has ended and process 1 has one."""
    fields = dict.fromkeys(instance.Instance.FIELDS, "")
    pid, base = os.getpid(), str(tmp_path)
    own = {"pid": pid, "started": instance.start_time(pid), "boot": instance.boot(), "namespace": instance.namespace(), "running": False}
    record = instance.Instance(**{**fields, **own, "name": "web"})
    record.take_name(base)
    (seen,) = instance.records(instance.named(base, "web"))
    record.hand_over(base, os.getppid())
    seen.remove()
    (left,) = instance.records(instance.named(base, "web"))
    assert (left.pid, left.running) == (os.getppid(), True)


def test_a_host_that_shares_the_home_has_names_of_its_own(run: Run, service: Path, config: Path) -> None:
    run("instance", "start", service, "web")
    elsewhere = config / "instances/app/elsewhere"
    os.rename(config / "instances/app" / HERE, elsewhere)
    (record,) = (elsewhere / "web").iterdir()
    assert listed(run) == []
    assert run("instance", "start", service, "web").returncode == 0
    assert run("instance", "stop", "--all").returncode == 0
    assert record.exists()
    (config / "instances/app" / HERE).rmdir()
    os.rename(elsewhere, config / "instances/app" / HERE)
    assert len(listed(run)) == 1


def test_an_instance_of_another_pid_namespace_is_left_alone(run: Run, service: Path, config: Path) -> None:
    run("instance", "start", service, "web")
    (path,) = (config / "instances/app" / HERE / "web").iterdir()
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "namespace": 1, "pid": 1}))
    assert listed(run) == []
    assert "exists already" in run("instance", "start", service, "web").stderr
    assert "another PID namespace" in run("exec", "instance://web", "true").stderr
    path.write_text(json.dumps(record))
    assert len(listed(run)) == 1


def test_records_are_nobody_elses_to_read(run: Run, service: Path, config: Path) -> None:
    before = os.umask(0)
    run("instance", "start", service, "web")
    os.umask(before)
    (path,) = (config / "instances/app" / HERE / "web").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    for directory in (path.parent, *list(path.parent.parents)[:3], config / "instances/logs"):
        assert directory.stat().st_mode & 0o777 == 0o700, directory


def test_a_damaged_record_is_named(run: Run, service: Path, config: Path) -> None:
    run("instance", "start", service, "web")
    bad = config / "instances/app" / HERE / "bad/1.1.json"
    bad.parent.mkdir()
    bad.write_text("{")
    done = run("instance", "list")
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL: reading {bad}: not the record of an instance")
    bad.unlink()
    assert len(listed(run)) == 1


def test_where_records_are() -> None:
    here = host.Host()
    here.home, here.environment = "/home/me", {"HOME": "/elsewhere"}
    assert instance.base(here) == "/home/me/.local/state/sciexec/instances"
    here.environment["XDG_STATE_HOME"] = "/state"
    assert instance.base(here) == "/state/sciexec/instances"
    here.environment["SINGULARITY_CONFIGDIR"] = "/singularity"
    assert instance.base(here) == "/singularity/sciexec/instances"
    here.environment["SCIEXEC_CONFIGDIR"] = "/config"
    assert instance.base(here) == "/config/instances"
    here.home, here.environment = "", {}
    with pytest.raises(HostError, match="no home directory"):
        instance.base(here)


def test_clients_find_the_logs_where_they_look(sciexec_path: Path, run: Run, service: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "singularity").symlink_to(sciexec_path)
    name = f"sciexec-test-{os.getpid()}"
    subprocess.run(
        [tmp_path / "singularity", "-q", "instance", "start", service, name],
        env={**os.environ, "SINGULARITY_CONFIGDIR": "", "SCIEXEC_CONFIGDIR": str(config)}, cwd=tmp_path, check=True,
    )  # fmt: skip
    user = host.Host().entry[0].decode()
    links = [Path(host.Host().home, ".singularity/instances/logs", HERE, user, f"{name}.{suffix}") for suffix in ("out", "err")]
    try:
        assert eventually(lambda: links[1].read_text() == "problem\n")
        assert links[0].read_text() == log(config, name) != ""
    finally:
        for link in links:
            link.unlink()


# --- list and stop ----------------------------------------------------------------------------------------------------------


def test_list_is_what_clients_expect(run: Run, service: Path, config: Path) -> None:
    assert run("instance", "list").stdout == "INSTANCE NAME    PID    IP    IMAGE\n"
    assert run("instance", "list", "--json").stdout == '{\n\t"instances": []\n}\n'
    run("instance", "start", service, "web")
    run("instance", "start", service, "database")
    pids = [pid_of(run, name) for name in ("database", "web")]
    logs = config / "instances/logs" / HERE / host.Host().entry[0].decode()
    assert listed(run, "web") == [
        {"instance": "web", "pid": pids[1], "img": str(service), "ip": "", "logErrPath": f"{logs}/web.err", "logOutPath": f"{logs}/web.out"}
    ]
    width = max(len(str(pid)) for pid in pids)
    table = run("instance", "list").stdout.splitlines()
    assert table[1:] == [
        f"{name:<13}    {pid:<{width}}          {service}" for name, pid in zip(("database", "web"), pids)
    ]
    assert run("instance", "list", "d*").stdout.splitlines()[1:] == table[1:2]
    assert run("instance", "list", "--logs", "web").stdout.split()[-4:] == ["web", str(pids[1]), f"{logs}/web.err", f"{logs}/web.out"]
    assert listed(run, "no*") == []


def test_another_users_are_roots_to_see(run: Run) -> None:
    assert run("instance", "list", "-u", host.Host().entry[0].decode()).returncode == 0
    for verb in ("list", "stop"):
        done = run("instance", verb, "-u", "root", "x")
        assert (done.returncode, done.stderr) == (255, "FATAL: looking for instances of root: only root may see another user's\n")


@pytest.mark.parametrize(("words", "trace"), [([], "INT"), (["-s", "TERM"], "TERM"), (["-s", "sigterm"], "TERM"), (["-s", "15"], "TERM")])
def test_stop_sends_a_signal_and_waits(run: Run, service: Path, config: Path, words: list[str], trace: str) -> None:
    run("instance", "start", service, "web")
    assert eventually(lambda: log(config, "web"))
    pid = pid_of(run, "web")
    done = run("instance", "stop", *words, "web")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"INFO:    Stopping web instance of {service} (PID={pid})\n"
    assert log(config, "web").endswith(f"stopped by {trace}\n")
    assert instance.start_time(pid) == -1
    assert listed(run) == []


def test_what_does_not_stop_is_killed(run: Run, service: Path, config: Path) -> None:
    run("instance", "start", service, "deaf")
    inside(run, "deaf", "(trap '' INT; exec sleep 1000) >/dev/null 2>&1 </dev/null &")
    pid = pid_of(run, "deaf")
    begun = time.monotonic()
    done = run("instance", "stop", "-t", "1", "deaf")
    assert done.returncode == 0
    assert done.stderr.splitlines()[1] == f"INFO:    Killing deaf instance of {service} (PID={pid}) (Timeout)"
    assert 1 <= time.monotonic() - begun < 8


def test_stop_by_glob_force_and_all(run: Run, service: Path, config: Path) -> None:
    for name in ("web1", "web2", "db", "mail"):
        run("instance", "start", service, name)
    assert "stop: either" in run("instance", "stop").stderr
    assert run("-q", "instance", "stop", "web*").stderr == ""
    assert [found["instance"] for found in listed(run)] == ["db", "mail"]
    assert run("instance", "stop", "-F", "db").returncode == 0
    assert "stopped" not in log(config, "db")
    assert run("instance.stop", "--all").returncode == 0
    for words in (["web"], ["no*"], ["--all"]):
        done = run("instance", "stop", *words)
        assert (done.returncode, done.stderr.splitlines()[0]) == (1, "FATAL: no instance found")
    assert run("instance", "stop", "-s", "NOSUCH", "x").stderr.startswith("FATAL: signal NOSUCH: there is no such signal")


def test_an_instance_ends_with_its_processes_whatever_the_signal(run: Run, service: Path) -> None:
    run("instance", "start", service, "web")
    begun = time.monotonic()
    done = run("instance", "stop", "-s", "USR1", "-t", "60", "web")
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert time.monotonic() - begun < 30


def test_kill_leaves_nothing(run: Run, begin: Callable[..., subprocess.Popen[str]], services: dict[str, Path]) -> None:
    """`nothing_left` looks for the server of the image."""
    run("instance", "start", services["sif"], "web")
    pid = pid_of(run, "web")
    joined = begin("exec", "instance://web", "sh", "-c", "echo up; exec sleep 1000")
    assert joined.stdout and joined.stdout.readline() == "up\n"
    os.kill(pid, signal.SIGKILL)
    assert joined.wait(10) == -signal.SIGKILL
    assert listed(run) == []


def test_a_termination_from_outside_ends_an_instance(run: Run, service: Path, config: Path) -> None:
    """As a batch system's, which goes to every process, and process 1 is one."""
    run("instance", "start", service, "web")
    assert eventually(lambda: log(config, "web"))
    os.kill(pid_of(run, "web"), signal.SIGTERM)
    assert eventually(lambda: listed(run) == [])
    assert log(config, "web").endswith("stopped by TERM\n")


def test_other_signals_reach_the_script_alone(run: Run, hostile: Path, config: Path) -> None:
    script = hostile / ".singularity.d/startscript"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\ntrap 'echo reloaded' HUP\necho up\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    run("instance", "start", hostile, "web")
    assert eventually(lambda: log(config, "web"))
    os.kill(pid_of(run, "web"), signal.SIGHUP)
    assert eventually(lambda: log(config, "web") == "up\nreloaded\n")
    assert len(listed(run)) == 1


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


def test_processes_see_each_other_and_the_same_files(run: Run, service: Path) -> None:
    run("instance", "start", "--contain", "--writable-tmpfs", service, "web")
    inside(run, "web", "echo 1 > /tmp/one; echo 2 > /opt/two")
    assert inside(run, "web", "cat /tmp/one /opt/two") == "1\n2\n"
    assert "/.singularity.d/startscript" in inside(run, "web", "tr '\\0' ' ' < /proc/2/cmdline")


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "KILL"])
def test_a_signal_to_the_command_is_the_payloads(
    run: Run, begin: Callable[..., subprocess.Popen[str]], service: Path, name: str
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


def test_a_shell_on_pipes_lasts(run: Run, begin: Callable[..., subprocess.Popen[str]], service: Path) -> None:
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


@pytest.mark.parametrize("words", [["--contain"], ["--no-home"]])
def test_a_restriction_that_the_instance_lacks_is_fatal(run: Run, service: Path, words: list[str]) -> None:
    run("instance", "start", service, "free")
    done = run("exec", *words, "instance://free", "true")
    assert done.returncode == 1
    assert done.stderr.startswith(f"FATAL: {words[0]} cannot be given to a process that joins instance free: it was started without\n")
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
    assert run("instance", "stats", "nosuch").returncode == 255


# --- the command line -------------------------------------------------------------------------------------------------------


def test_the_fast_reader_knows_instances() -> None:
    chosen = options.parse("sciexec", ["-q", "instance", "start", "-B/a:/b", "--pid-file=/p", "image", "name", "-x"], {})
    assert chosen is not None
    assert (chosen.verb, chosen.image, chosen.name, chosen.argv, chosen.pid_file) == ("start", "image", "name", ["-x"], "/p")
    chosen = options.parse("sciexec", ["instance", "run", "image", "name"], {})
    assert chosen is not None and (chosen.verb, chosen.name, chosen.argv) == ("instance run", "name", [])
    for words in (["instance"], ["instance", "list"], ["instance", "start", "image"], ["instance", "start", "--no-such", "i", "n"]):
        assert options.parse("sciexec", words, {}) is None


def test_names_are_checked_as_they_are() -> None:
    assert instance.check_name("a.B-_9") == "a.B-_9"
    with pytest.raises(UsageError):
        instance.check_name("a\n")
