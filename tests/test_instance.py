"""Instances, end to end: started in the background, listed, stopped; and nothing of them left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from instances import HERE, Begin, Run, eventually, inside, listed, log, pid_of

from sciexec import host, instance, options
from sciexec.errors import HostError, SciexecError

pytest_plugins = ["run_fixtures", "instance_fixtures"]


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


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_do_no_harm(sciexec_path: Path, run: Run, service: Path, config: Path, tmp_path: Path, closed: str) -> None:
    line = f"exec {sciexec_path} instance start --pid-file {tmp_path}/pid {service} web {closed}"
    subprocess.run(["sh", "-c", line], env={**os.environ, "SCIEXEC_CONFIGDIR": str(config)}, cwd=tmp_path, check=True)
    assert eventually(lambda: log(config, "web", "err"))
    assert log(config, "web").startswith("started") and log(config, "web", "err") == "problem\n"
    assert (tmp_path / "pid").read_text() == f"{pid_of(run, 'web')}\n"


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
    assert done.returncode == 255
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
        (["-B", "/no/such"], "FATAL: binding /no/such: No such file or directory on the host"),
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


def test_of_many_who_start_one_name_one_succeeds(run: Run, begin: Begin, service: Path) -> None:
    processes = [begin("instance", "start", service, "web") for _ in range(8)]
    texts = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0] + [255] * 7, texts
    assert sum("instance web exists already" in text for text in texts) == 7
    assert len(listed(run)) == 1


def test_a_record_without_its_process_does_not_count(run: Run, service: Path, config: Path) -> None:
    """The process id lives, but it is another process, of another boot, or another user's."""
    run("instance", "start", service, "web")
    directory = config / "instances/app" / HERE / "web"
    (path,) = directory.iterdir()
    record = path.read_text()
    run("instance", "stop", "web")
    fields = json.loads(record)
    stale = {**fields, "pid": os.getpid(), "started": instance.start_time(os.getpid()) - 1}
    before = {**fields, "pid": os.getpid(), "started": instance.start_time(os.getpid()), "boot": "another"}
    roots = {**fields, "pid": 1, "started": instance.start_time(1)}
    for text in map(json.dumps, (stale, before, roots)):
        directory.mkdir()
        path.write_text(text)
        assert listed(run) == []
        assert not directory.exists()
        directory.mkdir()
        path.write_text(text)
        assert run("instance", "start", service, "web").returncode == 0
        assert [path.name] != os.listdir(directory)
        run("instance", "stop", "web")


def test_who_removes_a_record_that_was_handed_over_removes_only_that(tmp_path: Path, begin: Begin) -> None:
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
    assert run("instance", "list", "d*").stdout.split()[-3:] == ["database", str(pids[0]), str(service)]
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
    done = run("instance", "stop")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "FATAL: instance stop: neither a name nor --all is given")
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


def test_kill_leaves_nothing(run: Run, begin: Begin, services: dict[str, Path]) -> None:
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
    with pytest.raises(SciexecError):
        instance.check_name("a\n")
