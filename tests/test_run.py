"""A run, end to end and as an ordinary user: the payload, who it is, and where it stands."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from namespace_fixtures import Command, Need

from sciexec import host

pytest_plugins = ["run_fixtures"]

EVERY_WAY = [[], ["--pid"], ["--pid", "--no-init"]]


# --- the payload ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sif", "squashfs", "line", "directory"])
def test_every_kind_of_image_runs(sciexec: Command, images: dict[str, Path], kind: str, nothing_left: None) -> None:
    done = sciexec("exec", images[kind], "echo", "a  b", "$HOME", "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a  b $HOME \n", "")


@pytest.mark.parametrize("code", [0, 1, 2, 37, 125, 126, 127, 128, 129, 137, 254, 255])
def test_the_exit_code_is_the_payloads(sciexec: Command, images: dict[str, Path], code: int) -> None:
    done = sciexec("exec", images["directory"], "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "KILL", "PIPE", "XFSZ"])
def test_the_payload_is_the_process_that_was_started(sciexec_path: Path, image: Path, name: str, nothing_left: None) -> None:
    number = int(signal.Signals[f"SIG{name}"])
    with subprocess.Popen(
        [sciexec_path, "exec", image, "sh", "-c", "echo $$; exec sleep 60"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(number)
        assert process.wait(10) == -number


@pytest.mark.parametrize("options", EVERY_WAY)
def test_standard_streams_are_the_callers(sciexec: Command, image: Path, options: list[str]) -> None:
    text = "".join(f"line {number}\n" for number in range(20000))
    done = sciexec("exec", *options, image, "sh", "-c", "cat; echo error >&2", input=text)
    assert (done.stdout, done.stderr) == (text, "error\n")


# Types into its terminal in three ways; the second number is the same to the kernel, which looks at its low half only.
TYPING = r"""
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
int main(void) {
    struct winsize size;
    unsigned long requests[] = {TIOCSTI, 0xffffffff00000000 | TIOCSTI, TIOCLINUX};
    printf("tty %d ", isatty(0));
    for (int i = 0; i < 3; i++) {
        char c = i == 2 ? 3 : 'x';
        errno = 0;
        ioctl(0, requests[i], &c);
        printf("%s, ", strerror(errno));
    }
    printf("%d", ioctl(0, TIOCGWINSZ, &size));
    return 7;
}
"""


@pytest.mark.parametrize("options", [*EVERY_WAY, ["--fakeroot"]])
def test_a_terminal_is_a_terminal_and_nothing_can_be_typed_into_it(
    sciexec_path: Path, hostile: Path, tmp_path: Path, need: Need, options: list[str]
) -> None:
    compiler = need("cc")
    source = tmp_path / "type.c"
    source.write_text(TYPING)
    subprocess.run([compiler, "-static", source, "-o", hostile / "usr/bin/type"], check=True)
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sciexec_path, ["sciexec", "exec", *options, str(hostile), "type"])
    shown = b""
    try:
        while more := os.read(terminal, 1000):
            shown += more
    except OSError:  # EIO: the other side is closed
        pass
    assert shown.decode() == "tty 1 " + "Operation not permitted, " * 3 + "0"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("options", EVERY_WAY)
def test_inherited_descriptors_arrive_and_ours_do_not(sciexec_path: Path, image: Path, tmp_path: Path, options: list[str]) -> None:
    reading, writing = os.pipe()
    script = f"echo through > /proc/self/fd/{writing}; ls /proc/self/fd"
    command = [str(sciexec_path), "exec", *options, str(image), "sh", "-c", script]
    done = subprocess.run(command, pass_fds=[writing], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, check=True)
    os.close(writing)
    with open(reading) as file:
        assert file.read() == "through\n"  # and ends: no server holds the pipe open
    assert set(map(int, done.stdout.split())) - {3} == {0, 1, 2, writing} - {3}  # 3: the listing's own


@pytest.mark.parametrize("options", EVERY_WAY)
def test_a_full_disk_is_the_payloads_to_notice(sciexec_path: Path, image: Path, options: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sciexec_path, "exec", *options, image, "sh", "-c", "echo text || exit 42"]
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, check=False).returncode == 42


@pytest.mark.parametrize("options", EVERY_WAY)
def test_a_reader_sees_the_end_when_the_payload_closes_its_output(sciexec_path: Path, image: Path, options: list[str]) -> None:
    """Nobody of ours holds the pipe open."""
    command = [sciexec_path, "exec", *options, image, "sh", "-c", "echo last; exec >&-; read line"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "last\n"
        assert process.poll() is None
        process.communicate("\n", timeout=10)


@pytest.mark.parametrize("options", EVERY_WAY)
@pytest.mark.parametrize("limit", ["-n 64", "-p 400", "-s 256", "-v 400000", "-f 0"])
def test_small_limits_are_enough(sciexec_path: Path, image: Path, limit: str, options: list[str]) -> None:
    """Of descriptors, processes, stack, memory, file size; the last forbids even a file of one byte."""
    line = f'ulimit {limit.replace("-p", "-u")}; exec "$0" exec {" ".join(options)} "$1" sh -c "ulimit {limit.split()[0]}"'
    done = subprocess.run(["bash", "-c", line, sciexec_path, image], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{limit.split()[1]}\n", "")


@pytest.mark.parametrize("options", EVERY_WAY)
@pytest.mark.parametrize("closed", ["0", "1", "2", "0 1 2"])
def test_closed_streams_stay_closed(sciexec_path: Path, image: Path, tmp_path: Path, closed: str, options: list[str]) -> None:
    """And no file of ours takes their place, neither in the payload nor in the server."""
    script = f"for fd in 0 1 2; do [ -e /proc/$$/fd/$fd ] && echo $fd >&3; done 3> {tmp_path}/open"
    line = f'exec {sciexec_path} exec {" ".join(options)} {image} sh -c "$1" ' + " ".join(f"{number}<&-" for number in closed.split())
    done = subprocess.run(["sh", "-c", line, "sh", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "open").read_text().split() == [number for number in "012" if number not in closed]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-command"], '"no-such-command": executable file not found in $PATH'),
        (["/etc/passwd"], '"/etc/passwd": permission denied'),
    ],
)
def test_what_cannot_be_executed_is_named(sciexec: Command, image: Path, words: list[str], message: str, nothing_left: None) -> None:
    done = sciexec("exec", image, *words)
    assert (done.returncode, done.stdout) == (255, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- who and what the payload is ----------------------------------------------------------------------------------------------


def test_the_payload_is_the_caller_and_nobody_more(sciexec: Command, image: Path) -> None:
    done = sciexec(
        "exec", image, "sh", "-c", "id -u; id -g; id -un; grep -E '^(Cap|NoNewPrivs)' /proc/self/status; cat /proc/self/setgroups"
    )
    lines = done.stdout.split("\n")
    assert lines[:3] == [str(os.getuid()), str(os.getgid()), host.Host().entry[0].decode()]
    fields = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert fields == {"NoNewPrivs": "1", **dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)}
    assert "deny" in lines


def test_a_file_made_inside_belongs_to_the_caller(sciexec: Command, image: Path, tmp_path: Path) -> None:
    assert sciexec("exec", image, "sh", "-c", f"umask; touch {tmp_path}/made; stat -c '%u %g' {tmp_path}/made").stdout.split()[1:] == [
        str(os.getuid()),
        str(os.getgid()),
    ]
    assert (tmp_path / "made").stat().st_uid == os.getuid()


def test_the_image_cannot_be_written(sciexec: Command, image: Path, rootfs: Path) -> None:
    script = (
        "for path in /made /etc/made /etc/passwd /home/made /usr/made; do if touch $path 2>/dev/null; then echo $path; fi; done; rm /bin/sh"
    )
    done = sciexec("exec", "-B", "/etc/hosts:/new/hosts", image, "sh", "-c", script)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Read-only file system" in done.stderr
    assert not (rootfs / "made").exists()


def test_writable_tmpfs_can_be_written_and_forgets(sciexec: Command, image: Path, rootfs: Path, nothing_left: None) -> None:
    script = "echo 1 > /made && echo 2 > /etc/made && rm /bin/false && mkdir -p /opt/a/b && cat /made /etc/made"
    done = sciexec("exec", "--writable-tmpfs", image, "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n2\n", "")
    assert sciexec("exec", image, "ls", "/made", "/bin/false").stdout == "/bin/false\n"
    assert not (rootfs / "made").exists()


def test_the_hosts_root_is_out_of_reach(sciexec: Command, image: Path) -> None:
    """Neither above the root, nor through a mount below it, nor through a directory of ours."""
    done = sciexec("exec", image, "sh", "-c", "stat -c %i / /..; cat /proc/self/mountinfo; readlink /proc/self/root")
    first, second, *rest = done.stdout.split("\n")
    assert first == second
    assert rest[-2] == "/"
    mounted = [line.split() for line in rest if " - " in line]
    assert [fields[4] for fields in mounted].count("/") == 1
    assert mounted[0][4] == "/"


def test_mounts_of_the_payload_cannot_be_undone(sciexec: Command, image: Path) -> None:
    """A user namespace of the payload's own gets copies of our mounts that are locked together: nothing below comes to light."""
    busybox = shutil.which("unshare")
    done = sciexec(
        "exec",
        "-B",
        "/usr:/usr",
        "-B",
        "/lib64:/lib64",
        image,
        busybox or "unshare",
        "-Urm",
        "sh",
        "-c",
        "umount /etc/hosts; umount /proc; umount /tmp",
    )
    assert done.returncode != 0
    assert "umount" in done.stderr or "unshare" in done.stderr


# --- directories ------------------------------------------------------------------------------------------------------------


def test_home_tmp_and_the_working_directory_come_along(sciexec: Command, image: Path, tmp_path: Path) -> None:
    home = host.Host().home
    (tmp_path / "here").mkdir()
    done = sciexec(
        "exec",
        image,
        "sh",
        "-c",
        'pwd; echo "$HOME"; touch "$HOME"/.sciexec-test && rm "$HOME"/.sciexec-test; touch made',
        cwd=tmp_path / "here",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/here\n{home}\n", "")
    assert (tmp_path / "here/made").exists()


def test_a_working_directory_outside_of_everything_is_bound(sciexec: Command, image: Path) -> None:
    place = Path("/dev/shm/sciexec test \u00e9")
    place.mkdir(exist_ok=True)
    try:
        assert sciexec("exec", image, "pwd", cwd=place).stdout == f"{place}\n"
    finally:
        place.rmdir()


def test_the_systems_own_directories_are_not_bound(sciexec: Command, image: Path) -> None:
    done = sciexec("exec", image, "sh", "-c", "pwd; ls /etc/shadow-", cwd=Path("/etc"))
    assert done.stdout == "/etc\n"
    assert sciexec("exec", image, "pwd", cwd=Path("/")).stdout == "/\n"


@pytest.mark.parametrize("words", [["exec"], ["-q", "exec"]])
def test_a_deleted_working_directory_is_a_warning(sciexec_path: Path, image: Path, tmp_path: Path, words: list[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f'cd {gone}; rmdir {gone}; exec {sciexec_path} "$@"'
    done = subprocess.run(["sh", "-c", line, "sh", *words, image, "pwd"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{host.Host().home}\n"
    ours = [line for line in done.stderr.splitlines() if "getcwd() failed" not in line]  # some shells say so before us
    warning = "WARNING: the current directory is not in the container; starting in " + host.Host().home
    assert ours == ([] if "-q" in words else [warning])


@pytest.mark.parametrize("directory", ["/no/such", "/etc/passwd", "/proc/self/fd/{left}", "relative/no"])
def test_a_directory_that_was_asked_for_must_be_there(sciexec_path: Path, image: Path, directory: str) -> None:
    """`left` is a directory of the host that the caller left open."""
    left = os.open("/", os.O_RDONLY)
    command = [str(sciexec_path), "exec", "--pwd", directory.format(left=left), str(image), "pwd"]
    done = subprocess.run(command, pass_fds=[left], capture_output=True, text=True, check=False)
    os.close(left)
    assert done.returncode == 255, done.stdout
    assert done.stderr.startswith("FATAL: changing to ")


def test_pwd_goes_there(sciexec: Command, image: Path) -> None:
    assert sciexec("exec", "--pwd", "/usr/lib", image, "sh", "-c", 'pwd; echo "$PWD"').stdout == "/usr/lib\n/usr/lib\n"


def test_pwd_has_the_name_that_was_asked_for(sciexec: Command, image: Path, tmp_path: Path) -> None:
    """Also where the caller's directory is the same one under another name."""
    words = ["--bind", f"{tmp_path}:/mnt", "--pwd", "/mnt", image, "sh", "-c", "pwd"]
    done = sciexec("exec", *words, cwd=tmp_path, env={"PWD": str(tmp_path)})
    assert done.stdout == "/mnt\n"


def test_contain_keeps_the_host_outside(sciexec: Command, image: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    home = host.Host().home
    script = f"""
        pwd; ls -A "$HOME" /tmp /var/tmp; ls {tmp_path} 2>/dev/null; ls /dev
        touch "$HOME"/made /tmp/made /var/tmp/made /dev/shm/made && echo text > /dev/null && echo done"""
    done = sciexec("exec", "--contain", image, "sh", "-c", script, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    devices = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert set(done.stdout.split()) == {home, f"{home}:", "/tmp:", "/var/tmp:", *devices.split(), "done"}
    assert done.stdout.startswith(f"{home}\n")
    assert not (Path(home) / "made").exists()


def test_no_home(sciexec: Command, image: Path) -> None:
    home = host.Host().home
    assert sciexec("exec", "--no-home", image, "ls", home, cwd=Path("/tmp")).returncode != 0


def test_another_home(sciexec: Command, image: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    script = 'echo "$HOME"; touch ~/made; grep /elsewhere/home: /etc/passwd | cut -d: -f3'
    done = sciexec("exec", "--home", f"{tmp_path}/mine:/elsewhere/home", image, "sh", "-c", script)
    assert done.stdout == f"/elsewhere/home\n{os.getuid()}\n"
    assert (tmp_path / "mine/made").exists()
