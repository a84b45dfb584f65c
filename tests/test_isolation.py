"""What a payload shares with its host, and what it has of its own; with --pid: who stands between it and the caller."""

from __future__ import annotations

import os
import resource
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


@pytest.mark.parametrize("options", EVERY_WAY)
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


@pytest.mark.parametrize("options", [[], ["--pid"]])
def test_a_core_is_left_once_and_by_the_payload(sciexec_path: Path, image: Path, tmp_path: Path, options: list[str]) -> None:
    """In the directory where it stands, if that is what the host does with cores."""
    line = f'ulimit -c "$(ulimit -H -c)"; "$0" exec {" ".join(options)} "$1" sh -c "kill -ABRT \\$\\$"; echo $?'
    done = subprocess.run(["bash", "-c", line, sciexec_path, image], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "134\n"
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    allowed = resource.getrlimit(resource.RLIMIT_CORE)[1] != 0
    assert len(list(tmp_path.iterdir())) == (1 if pattern[0] not in "|/" and allowed else 0)


# --- other namespaces -----------------------------------------------------------------------------------------------------------

NAMESPACES = {"pid": ["--pid"], "ipc": ["--ipc"], "uts": ["--uts"], "net": ["--net", "--network", "none"]}
ALL = [word for words in NAMESPACES.values() for word in words]


@pytest.mark.parametrize("words", [[], *NAMESPACES.values(), ["-C"], ["--compat"], ["-f"], ALL], ids=" ".join)
def test_what_is_shared_with_the_host(sciexec: Command, images: dict[str, Path], words: list[str], nothing_left: None) -> None:
    names = ["cgroup", *NAMESPACES, "mnt", "user"]
    script = f"for name in {' '.join(names)}; do readlink /proc/self/ns/$name; done"
    done = sciexec("exec", *words, images["sif"], "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    own = {name for name, link in zip(names, done.stdout.split()) if os.readlink(f"/proc/self/ns/{name}") != link}
    contained = {"pid", "ipc"} if words in (["-C"], ["--compat"]) else set()
    assert own - {"mnt", "user"} == {name for name, asked in NAMESPACES.items() if set(asked) <= set(words)} | contained
    assert {"mnt", "user"} <= own


def test_ipc_is_empty(sciexec: Command, image: Path) -> None:
    done = sciexec("exec", "--ipc", "--contain", image, "sh", "-c", "wc -l < /proc/sysvipc/shm; ls /dev/mqueue; stat -f -c %T /dev/mqueue")
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "1", "")
    assert not os.path.exists("/dev/mqueue") or sciexec("exec", "--contain", image, "ls", "/dev/mqueue").returncode == 1


@pytest.mark.parametrize("words", [["--hostname", "box.example"], ["--uts", "--hostname=box.example"], ["-f", "--hostname", "box.example"]])
def test_a_host_name_of_its_own(sciexec: Command, image: Path, rootfs: Path, words: list[str]) -> None:
    done = sciexec("exec", *words, image, "uname", "-n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "box.example\n", "")
    assert os.uname().nodename != "box.example"


def test_the_file_of_the_host_name(sciexec: Command, hostile: Path) -> None:
    (hostile / "etc/hostname").write_text("image\n")
    assert sciexec("exec", "--hostname", "box", hostile, "cat", "/etc/hostname").stdout == "box\n"
    assert sciexec("exec", "--uts", hostile, "uname", "-n").stdout == f"{os.uname().nodename}\n"


@pytest.mark.parametrize("name", ["", "a" * 65, "a b"])
def test_a_host_name_that_is_none(sciexec: Command, images: dict[str, Path], name: str) -> None:
    done = sciexec("exec", "--hostname", name, images["directory"], "uname", "-n")
    if not name:  # as if it had not been given, like every empty value
        assert done.stdout == f"{os.uname().nodename}\n"
        return
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"FATAL: --hostname {name}: ")


@pytest.mark.parametrize("words", ["--net --network none", "-n --network=none", "--network none", "-fn --network=none"])
def test_a_network_of_its_own_is_the_loopback(sciexec: Command, image: Path, words: str) -> None:
    script = "cut -d: -f1 /proc/net/dev | tail -n +3 | xargs; grep -c 127.0.0.1 /proc/net/fib_trie; cat /proc/net/if_inet6 | head -1"
    done = sciexec("exec", *words.split(), image, "sh", "-c", script)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[0], done.stderr) == (0, "lo", "")
    assert int(lines[1]) > 0  # an address appears when the interface is up


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--net"], "--net alone asks for a bridge, which root makes"),
        (["--net", "--network", "bridge"], "--network bridge cannot be had without privileges: CNI networks are set up by root"),
        (["--network", "ptp"], "--network ptp cannot be had without privileges: CNI networks are set up by root"),
        (["--net", "--network", "none", "--network-args", "x"], "--network-args cannot be had without privileges: CNI networks are"),
        (["--netns-path", "/run/netns/x"], "--netns-path cannot be had without privileges: joining a network namespace"),
        (["--allow-setuid"], "--allow-setuid cannot be had without privileges: setuid programs of an image need"),
        (["--keep-privs"], "--keep-privs cannot be had without privileges: root's capabilities over the host cannot be kept"),
        (["--boot"], "--boot cannot be had without privileges: booting an init system needs root"),
        (["--security", "selinux:label"], "--security selinux:label cannot be given: SELinux labels are the policy's to give"),
        (["--security", "apparmor:profile"], "--security apparmor:profile cannot be given: an AppArmor profile is loaded by root"),
        (["--security", "seccomp:/p.json"], "--security seccomp:/p.json cannot be given: profiles of seccomp are not read"),
        (["--security", "gid:1:2"], "--security gid:1:2: one gid can be had without privileges, not several"),
        (["--security", "uid:me"], "--security uid:me: neither uid:NUMBER nor gid:NUMBER"),
        (["--add-caps", "CAP_NOSUCH"], "capability CAP_NOSUCH: the kernel has none of that name"),
        (["--drop-caps", "chown,what"], "capability what: the kernel has none of that name"),
        (["--oom-kill-disable"], "--oom-kill-disable cannot be had without privileges: cgroup v2 has no such switch"),
        (["--blkio-weight-device", "/dev/sda:10"], "--blkio-weight-device cannot be had without privileges: cgroup v2 delegates"),
    ],
)
def test_what_needs_privileges_is_refused_by_its_name(sciexec: Command, images: dict[str, Path], words: list[str], message: str) -> None:
    done = sciexec("exec", *words, images["directory"], "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"FATAL: {message}")


def test_containall(sciexec: Command, image: Path, tmp_path: Path) -> None:
    script = 'echo $$; env | grep -c SECRET; pwd; ls -A "$HOME" /tmp; wc -l < /proc/sysvipc/shm; ls /dev/mqueue'
    done = sciexec("exec", "-C", image, "sh", "-c", script, env={"SECRET": "told"}, cwd=tmp_path)
    home = sciexec("exec", image, "sh", "-c", "echo ~").stdout.strip()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["2", "0", home, *sorted([f"{home}:", "/tmp:"]), "1"]


def test_compat(sciexec: Command, image: Path, tmp_path: Path) -> None:
    os.umask(before := os.umask(0o077))
    done = sciexec("exec", "--compat", "--env", "A=$HOME", image, "sh", "-c", 'echo $$ "$A"; umask; touch /made && echo made')
    assert os.umask(before) == before
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 $HOME\n0022\nmade\n", "")


@pytest.mark.parametrize(("options", "shown"), [([], "0027"), (["--no-umask"], "0022"), (["-p"], "0027"), (["-fp", "--no-umask"], "0022")])
def test_the_umask_is_the_callers(sciexec_path: Path, image: Path, options: list[str], shown: str) -> None:
    line = f'umask 0027; "$0" exec {" ".join(options)} "$1" sh -c umask'
    assert subprocess.run(["sh", "-c", line, sciexec_path, image], capture_output=True, text=True, check=True).stdout == f"{shown}\n"


# --- who one is ---------------------------------------------------------------------------------------------------------------


def test_fakeroot(sciexec: Command, image: Path, tmp_path: Path, nothing_left: None) -> None:
    """Root inside, the caller outside."""
    home = Path(sciexec("exec", image, "sh", "-c", "echo ~").stdout.strip())
    script = f"id -u; id -g; id -un; echo $HOME ~root; pwd; touch {tmp_path}/made; stat -c %u {tmp_path}/made; stat -c %d:%i /root"
    done = sciexec("exec", "--fakeroot", image, "sh", "-c", script, cwd=tmp_path)
    status = home.stat()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        *("0", "0", "root", "/root", "/root", str(tmp_path), "0"), f"{status.st_dev}:{status.st_ino}",
    ]  # fmt: skip
    assert (tmp_path / "made").stat().st_uid == os.getuid()


CAPS = "sed -n 's/^Cap[A-Z][a-z]*:.//p' /proc/self/status; sed -n 's/^NoNewPrivs:.//p' /proc/self/status"
NET_RAW, CHOWN = 1 << 13, 1
EVERYTHING = (1 << int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1) - 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0),
        (["--no-privs"], 0),
        (["--pid"], 0),
        (["--drop-caps", "all"], 0),
        (["--add-caps", "CAP_NET_RAW"], NET_RAW),
        (["--pid", "--add-caps", "net_raw,chown", "--drop-caps", "chown"], NET_RAW),
        (["--add-caps", "all"], EVERYTHING),
        (["--fakeroot"], EVERYTHING),
        (["--fakeroot", "--pid", "--no-init", "--net", "--network", "none"], EVERYTHING),
        (["--fakeroot", "--drop-caps", "CAP_NET_RAW,chown"], EVERYTHING & ~NET_RAW & ~CHOWN),
        (["--fakeroot", "--drop-caps", "all"], 0),
        (["--fakeroot", "--no-privs"], 0),
        (["--fakeroot", "--no-privs", "--add-caps", "chown"], CHOWN),
        (["--security", "uid:0"], 0),
        (["--security", "uid:5,gid:7", "--add-caps", "chown"], CHOWN),
    ],
)
def test_capabilities(sciexec: Command, image: Path, words: list[str], expected: int) -> None:
    """All five sets, and they outlive an execve; no_new_privs is always there."""
    done = sciexec("exec", *words, image, "sh", "-c", f"exec sh -c {CAPS!r}".replace("'\\''", ""))
    assert done.stderr == ""
    assert done.stdout.split() == [f"{expected:016x}"] * 5 + ["1"]


def test_root_inside_has_mounts_of_its_own_and_none_of_ours(sciexec: Command, image: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    script = f"""
        mount -t tmpfs none /mnt && touch /mnt/made && mount -o bind /mnt /opt && ls /opt
        mkdir /mnt/root && chown 0:0 /mnt/root
        umount /proc || umount {tmp_path} || mount -o remount,rw,bind {tmp_path} || touch {tmp_path}/no || echo kept
        """
    done = sciexec("exec", "-f", "-B", f"{tmp_path}:{tmp_path}:ro", image, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "made\nkept\n")
    assert [path.name for path in tmp_path.iterdir() if path.name == "no"] == []


def test_root_inside_cannot_look_into_the_server_of_the_image(sciexec: Command, images: dict[str, Path]) -> None:
    """It runs on the host, as the same user, in the namespace above."""
    script = "for p in /proc/[0-9]*; do case $(cat $p/comm 2>/dev/null) in *fuse*) ls $p/root/ 2>/dev/null && echo seen $p; done; echo end"
    script = script.replace("; done", ";; esac; done")
    assert sciexec("exec", "-f", images["sif"], "sh", "-c", script).stdout == "end\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--security", "uid:5"], f"5 {os.getgid()}"),
        (["--security", "uid:5,gid:7"], "5 7"),
        (["--security", "uid:5", "--security", "gid:7", "--pid"], "5 7"),
        (["--security", "gid:7"], f"{os.getuid()} 7"),
        (["--security", "uid:0"], f"0 {os.getgid()}"),
        (["--fakeroot", "--security", "gid:7"], "0 7"),
    ],
)
def test_another_user(sciexec: Command, image: Path, words: list[str], expected: str, tmp_path: Path) -> None:
    script = f'echo $(id -u) $(id -g); touch {tmp_path}/made; id -un; echo ~ "$HOME"'
    done = sciexec("exec", *words, image, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == expected
    home = lines[2].split()
    assert home[0] == home[1]
    assert (tmp_path / "made").stat().st_uid == os.getuid()


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
