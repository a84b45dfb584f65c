"""The process that serves an image, and hosts that lack what it needs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from namespace_fixtures import OLD_KERNEL, Command, Need, servers

from sciexec import host
from sciexec.sources import OURS

pytest_plugins = ["run_fixtures"]


# --- the server -------------------------------------------------------------------------------------------------------------


def started(sciexec_path: Path, image: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    """A running container with its server's process id."""
    before = servers()
    process = subprocess.Popen([sciexec_path, "exec", image, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    new = [pid for pid in servers() - before if str(image) in os.readlink(f"/proc/{pid}/fd/3") or is_serving(pid, image)]
    assert len(new) == 1
    return process, new[0]


def is_serving(pid: int, image: Path) -> bool:
    return any(os.readlink(f"/proc/{pid}/fd/{fd}") == str(image) for fd in os.listdir(f"/proc/{pid}/fd"))


def test_the_server_has_nothing_of_the_caller(sciexec_path: Path, images: dict[str, Path], tmp_path: Path) -> None:
    process, server = started(sciexec_path, images["sif"], "sh", "-c", "echo ready; read line")
    here = Path(f"/proc/{server}")
    assert (here / "environ").read_bytes() == b""
    assert os.readlink(here / "cwd") == "/"
    fields = dict(line.split(":\t", 1) for line in (here / "status").read_text().splitlines() if ":\t" in line)
    assert [fields[f"Cap{name}"] for name in ("Prm", "Eff", "Inh", "Amb")] == ["0" * 16] * 4
    assert fields["NoNewPrivs"] == "1"
    assert int(fields["PPid"]) != process.pid
    assert fields["NSsid"] != str(os.getsid(0)) and os.getsid(server) != os.getsid(process.pid)
    links = {int(name): os.readlink(here / "fd" / name) for name in os.listdir(here / "fd")}
    assert [links[number] for number in range(3)] == ["/dev/null"] * 3
    assert {"/dev/null", "/dev/fuse", str(images["sif"])} >= {
        link for link in links.values() if not link.startswith(("pipe:", "anon_inode:"))
    }
    assert os.readlink(here / "ns/mnt") == os.readlink("/proc/self/ns/mnt")
    process.communicate("\n")


@pytest.mark.parametrize("killed", [False, True])
def test_the_server_ends_with_the_last_process(sciexec_path: Path, images: dict[str, Path], killed: bool, nothing_left: None) -> None:
    process, server = started(sciexec_path, images["sif"], "sh", "-c", "echo ready; sleep 1 & exec sleep 60")
    process.kill() if killed else process.terminate()
    process.wait()
    assert Path(f"/proc/{server}").exists()  # the one in the background still runs
    deadline = time.monotonic() + 10
    while server in servers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server not in servers()


def test_a_server_that_dies_is_an_error_and_no_hang(sciexec_path: Path, images: dict[str, Path], nothing_left: None) -> None:
    process, server = started(sciexec_path, images["sif"], "sh", "-c", "echo ready; read line; ls /usr/lib; exec /bin/wc")
    os.kill(server, signal.SIGKILL)
    process.communicate("\n", timeout=10)
    assert process.returncode not in (0, None)


def test_the_image_may_be_replaced_while_it_runs(sciexec_path: Path, images: dict[str, Path], tmp_path: Path) -> None:
    image = Path(shutil.copy(images["sif"], tmp_path / "image.sif"))
    process, _ = started(sciexec_path, image, "sh", "-c", "echo ready; read line; cat /etc/passwd; ls /usr/bin")
    (tmp_path / "new").write_text("")
    (tmp_path / "new").replace(image)
    assert "root:x:0:0" in process.communicate("\n")[0]


# --- other hosts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sif", "directory"])
def test_an_old_kernel(sciexec_path: Path, images: dict[str, Path], data: Path, kind: str) -> None:
    words = [
        str(sciexec_path),
        "exec",
        "-B",
        f"{data}:/new/data:ro",
        str(images[kind]),
        "sh",
        "-c",
        "cat /new/data/file; touch /new/data/x",
    ]
    done = subprocess.run([*OLD_KERNEL, *words], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("host's\n", 1)
    assert "Read-only file system" in done.stderr


def test_without_our_server_squashfuse_serves(sciexec_path: Path, images: dict[str, Path], need: Need, nothing_left: None) -> None:
    script = f'mount --bind /dev/null {OURS}; exec "$@"'
    run = [sciexec_path, "--debug", "exec", images["sif"], "sh", "-c", "cat /etc/passwd; touch /x"]
    command = [need("unshare"), "-rm", "sh", "-c", script, "sh", *map(str, run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"served by {need('squashfuse_ll')}\n" in done.stderr
    assert "root:x:0:0:" in done.stdout and "Read-only file system" in done.stderr


def test_what_our_server_cannot_decompress_squashfuse_serves(
    sciexec: Command, rootfs: Path, tmp_path: Path, need: Need, nothing_left: None
) -> None:
    image = tmp_path / "lzo.sqfs"
    subprocess.run([need("mksquashfs"), rootfs, image, "-comp", "lzo", "-quiet", "-no-progress"], check=True, capture_output=True)
    done = sciexec("--debug", "exec", image, "cat", "/etc/passwd")
    assert (done.returncode, "root:x:0:0:" in done.stdout) == (0, True), done.stderr
    assert f"served by {need('squashfuse_ll')}\n" in done.stderr


def test_without_fuse_the_image_is_unpacked_once(sciexec_path: Path, images: dict[str, Path], tmp_path: Path, need: Need) -> None:
    programs = " ".join(map(str, (OURS, "/usr/bin/squashfuse_ll", "/usr/local/bin/squashfuse_ll")))
    hide = f"for path in {programs}; do [ ! -e $path ] || mount --bind /dev/null $path; done"
    environment = {**os.environ, "SCIEXEC_CACHEDIR": str(tmp_path / "cache")}
    command = [
        need("unshare"),
        "-rm",
        "sh",
        "-c",
        f'{hide}; exec "$@"',
        "sh",
        str(sciexec_path),
        "exec",
        str(images["squashfs"]),
        "sh",
        "-c",
        "cat /etc/passwd; touch /x",
    ]
    for told in (True, False):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert "root:x:0:0:" in done.stdout, done.stderr
        assert "Read-only file system" in done.stderr
        assert ("INFO: neither sciexec-fuse nor squashfuse_ll is installed: unpacking" in done.stderr) is told
    assert len(list((tmp_path / "cache/unpacked").iterdir())) == 1


def test_user_namespaces_that_are_forbidden_are_explained(sciexec_path: Path, images: dict[str, Path], need: Need) -> None:
    script = f"echo 0 > /proc/sys/user/max_user_namespaces; exec {sciexec_path} exec {images['sif']} true"
    done = subprocess.run([need("unshare"), "-r", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert "user namespaces" in done.stderr and "user.max_user_namespaces is 0" in done.stderr


def test_an_empty_environment_is_enough(sciexec_path: Path, image: Path) -> None:
    done = subprocess.run([sciexec_path, "exec", image, "sh", "-c", "echo $HOME"], env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{host.Host().home}\n", "")


@pytest.mark.root
def test_a_uid_that_nobody_knows(sciexec_path: Path, images: dict[str, Path], need: Need) -> None:
    """Nor does anybody know its home; started where it has no name for the directory it stands in."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        image = shutil.copy(images["sif"], directory)
        known = [need("setpriv"), "--reuid", "54321", "--regid", "54322", "--clear-groups", str(sciexec_path), "exec", image, "id"]
        done = subprocess.run(known, capture_output=True, text=True, cwd="/", env={"PATH": "/usr/bin:/bin"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["uid=54321(user54321)", "gid=54322(group54322)"]
