"""Binds, and images whose links lead astray: every mount lands inside, and nothing of the host is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from namespace_fixtures import Command, Make, Need

pytest_plugins = ["run_fixtures"]


# --- binds ------------------------------------------------------------------------------------------------------------------


def test_binds_onto_paths_that_the_image_lacks(sciexec: Command, image: Path, data: Path) -> None:
    binds = [
        f"{data}:/rfm_workdir",
        f"{data}/file:/mnt/miniwdl/stdout.txt",
        f"{data}/file:/etc/new",
        f"{data}:/usr/lib/x/y",
        f"{data}/file:/usr/bin/new",
    ]
    words = [word for bind in binds for word in ("-B", bind)]
    script = "cat /rfm_workdir/file /mnt/miniwdl/stdout.txt /etc/new /usr/lib/x/y/file /bin/new; ls -d /usr/lib64 /var/tmp /etc/passwd"
    done = sciexec("exec", *words, image, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "host's\n" * 5 + "/etc/passwd\n/usr/lib64\n/var/tmp\n"


def test_binds_within_binds_in_any_order(sciexec: Command, image: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other\n")
    inner, outer = f"{tmp_path}/other:/a/b/file:ro", f"{data}:/a/b"
    for binds in ((inner, outer), (outer, inner)):
        done = sciexec("exec", "-B", ",".join(binds), image, "sh", "-c", "cat /a/b/file; touch /a/b/made; echo > /a/b/file")
        assert done.stdout == "other\n"
        assert "Read-only" in done.stderr
    assert (data / "made").exists()
    assert (data / "file").read_text() == "host's\n"


def test_a_bind_into_a_bind_needs_its_place(sciexec: Command, image: Path, data: Path) -> None:
    done = sciexec("exec", "-B", f"{data}:/a,{data}/file:/a/none/file", image, "true")
    assert done.returncode == 255
    assert "/a is a directory of the host and has no none" in done.stderr
    assert sorted(os.listdir(data)) == ["below", "file"]


def test_a_missing_source_is_fatal_and_named(sciexec: Command, image: Path) -> None:
    done = sciexec("exec", "-B", "/no/such/source:/x", image, "true")
    assert done.returncode == 255
    assert "/no/such/source" in done.stderr


def test_a_bind_may_replace_what_every_container_has(sciexec: Command, image: Path, data: Path) -> None:
    done = sciexec(
        "exec", "-B", f"{data}:/tmp,{data}/file:/etc/passwd,{data}/file:/etc/hosts", image, "cat", "/tmp/file", "/etc/passwd", "/etc/hosts"
    )
    assert done.stdout == "host's\n" * 3


def test_host_flags_are_kept(sciexec_path: Path, image: Path, data: Path, need: Need) -> None:
    script = (
        f"mount -t tmpfs -o nosuid,nodev,noexec tmpfs {data}/below && mount -o bind,ro {data}/file {data}/file && "
        f"exec {sciexec_path} exec -B {data}/below:/r:ro -B {data}/below:/w -B {data}/file:/f:rw {image} cat /proc/self/mountinfo"
    )
    done = subprocess.run([need("unshare"), "-rm", "sh", "-c", script], capture_output=True, text=True, check=True)
    flags = {line.split()[4]: set(line.split()[5].split(",")) for line in done.stdout.splitlines()}
    assert flags["/r"] >= {"ro", "nosuid", "nodev", "noexec"}
    assert flags["/w"] >= {"rw", "nosuid", "nodev", "noexec"}
    assert "ro" in flags["/f"]


def test_many_binds(sciexec: Command, image: Path, data: Path) -> None:
    words = [word for number in range(300) for word in ("-B", f"{data}/file:/many/{number}/file")]
    assert sciexec("exec", *words, image, "sh", "-c", "cat /many/*/file | wc -l").stdout.split() == ["300"]


# --- hostile images -----------------------------------------------------------------------------------------------------------

PLACES = [
    "proc",
    "sys",
    "dev",
    "tmp",
    "etc",
    "etc/resolv.conf",
    "etc/hosts",
    "etc/passwd",
    "etc/group",
    "var",
    "home",
    "var/tmp",
    "etc/localtime",
]
TARGETS = {"host": "{canary}", "up": "../../../../../../../../../..{canary}", "dangling": "/no/where/at/all", "loop": "{own}", "root": "/"}


@pytest.mark.parametrize("kind", ["directory", "sif"])
@pytest.mark.parametrize("target", TARGETS)
def test_links_of_the_image_touch_nothing_of_the_host(
    sciexec: Command, hostile: Path, make_image: Make, tmp_path: Path, kind: str, target: str, nothing_left: None
) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    for place in PLACES:
        path = hostile / place
        if path.parent.is_symlink():
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.symlink_to(TARGETS[target].format(canary=canary, own=path.name))
    image = make_image(hostile, kind)
    done = sciexec("exec", "-B", f"{tmp_path}:/etc/deep/er", image, "/bin/busybox", "true")
    assert done.returncode in (0, 255), done.stderr
    assert "Traceback" not in done.stderr and "itself failed" not in done.stderr
    assert list(canary.iterdir()) == []


@pytest.mark.parametrize("place", ["dev/null", "dev/tty", "dev/pts", "dev/shm"])
def test_the_images_dev_is_not_looked_at(sciexec: Command, hostile: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "canary").write_text("")
    (hostile / place).parent.mkdir(exist_ok=True)
    (hostile / place).symlink_to(tmp_path / "canary")
    assert sciexec("exec", "--contain", hostile, "sh", "-c", "echo text > /dev/null").returncode == 0
    assert (tmp_path / "canary").read_text() == ""


def test_a_fifo_for_passwd_does_not_hang(sciexec: Command, hostile: Path) -> None:
    (hostile / "etc/passwd").unlink()
    os.mkfifo(hostile / "etc/passwd")
    assert sciexec("exec", hostile, "true", timeout=20).returncode == 0


def test_an_image_without_anything_runs_its_one_program(sciexec: Command, tmp_path: Path, make_image: Make, need: Need) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(need("busybox"), bare / "busybox")
    for kind in ("directory", "squashfs"):
        done = sciexec("exec", make_image(bare, kind), "/busybox", "sh", "-c", "/busybox ls /; /busybox id -u; exit 37")
        assert (done.returncode, done.stderr) == (37, "")
        assert done.stdout.split()[-1] == str(os.getuid())
        assert {"busybox", "dev", "proc", "sys", "tmp", "var"} <= set(done.stdout.split())
    assert sorted(os.listdir(bare)) == ["busybox"]


def test_a_damaged_image_is_an_error_and_no_hang(sciexec: Command, images: dict[str, Path], tmp_path: Path, nothing_left: None) -> None:
    content = bytearray(images["squashfs"].read_bytes())
    for start in (len(content) // 2, 96):
        damaged = bytearray(content)
        damaged[start : start + 30000] = os.urandom(30000)
        (tmp_path / "damaged").write_bytes(damaged)
        done = sciexec("exec", tmp_path / "damaged", "sh", "-c", "cat /bin/* /usr/bin/* /usr/lib/*/* > /dev/null", timeout=60)
        assert "Traceback" not in done.stderr and "itself failed" not in done.stderr
