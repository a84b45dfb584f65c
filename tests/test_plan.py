"""The plan of a run: complete, readable, and made without changing anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from namespace_fixtures import Command

from sciexec import environment, host, options, run
from sciexec.image import open_image

pytest_plugins = ["run_fixtures"]


def test_the_plan_as_text(images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["exec", "-B", f"{tmp_path}:/data:ro", "--home", f"{tmp_path}:/home/me", "--pwd", "/data", str(images["sif"]), "prog", "a b"]
    chosen = options.parse("sciexec", words, {})
    assert chosen is not None
    image = open_image(chosen.image)
    caller = host.Host()
    caller.cwd, caller.uid, caller.gid, caller.groups = "/data/area", 7, 8, [8, 9]
    assert image.offset
    lines = run.plan(chosen, image, caller).describe().splitlines()
    os.close(image.fd)
    assert lines[1].startswith(f"squashfs {images['sif']} offset={image.offset} served by /")
    del lines[1]
    assert lines[:-1] == [
        "user namespace 7:8 -> 0:0",
        "read-only",
        "bind /proc /proc",
        "bind /sys /sys",
        "bind /dev /dev",
        "bind /tmp /tmp optional",
        f"bind {tmp_path} /data read_only",
        "bind /etc/hosts /etc/hosts optional",
        "bind /etc/localtime /etc/localtime optional",
        "bind /etc/resolv.conf /etc/resolv.conf optional",
        "edit /etc/passwd with uid 7",
        "edit /etc/group with gid 8,9",
        "bind /var/tmp /var/tmp optional",
        f"bind {tmp_path} /home/me",
        "bind /data/area /data/area optional unless_visible",
        "user namespace 0:0 -> 7:8",
        "cwd /data",
    ]
    assert lines[-1].startswith("exec 'prog' 'a b'")
    assert environment.DEFAULT_PATH


def test_planning_changes_nothing(images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = options.parse("sciexec", ["exec", "-c", "--writable-tmpfs", str(images["sif"]), "true"], {})
    assert chosen is not None
    image = open_image(chosen.image)
    before = (os.listdir("/proc/self/fd"), Path("/proc/self/mountinfo").read_text(), list(tmp_path.iterdir()), os.getcwd())
    text = run.plan(chosen, image, host.Host()).describe()
    assert (os.listdir("/proc/self/fd"), Path("/proc/self/mountinfo").read_text(), list(tmp_path.iterdir()), os.getcwd()) == before
    assert "overlay, writable" in text and "tmpfs /tmp mode=1777" in text and "dev /dev null" in text
    os.close(image.fd)


def test_debug_prints_the_plan(sciexec: Command, images: dict[str, Path]) -> None:
    done = sciexec("--debug", "exec", images["directory"], "true")
    assert done.returncode == 0
    assert "bind /proc /proc\n" in done.stderr


def test_a_passwd_entry_is_added_or_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = host.Host()
    caller.entry = b"me:x:77:88:Me:/home/me:/bin/zsh".split(b":")
    caller.gid, caller.groups = 88, [0, 88, 4000000]
    root, me = b"root:x:0:0:root:/root:/bin/sh\n", b"me:x:77:88:Me:/home/me:/bin/zsh\n"
    assert caller.passwd(root, "/home/me", 77) == root + me
    # root, or somebody else, in the caller's place
    assert caller.passwd(root, "/home/me", 0) == b"root:x:0:0:root:/home/me:/bin/sh\n"
    assert caller.passwd(b"", "/root", 0) == b"root:x:0:88:Me:/root:/bin/zsh\n"
    assert caller.passwd(b"", "/home/me", 99) == b"me:x:99:88:Me:/home/me:/bin/zsh\n"
    assert caller.passwd(b"app:x:77:77:App:/app:/bin/sh", "/other", 77) == b"me:x:77:88:Me:/other:/bin/sh\n"
    assert caller.passwd(b"", "/home/me", 77) == b"me:x:77:88:Me:/home/me:/bin/zsh\n"
    lines = caller.group(b"root:x:0:\n\nbroken\n", caller.groups).splitlines()
    assert lines[:3] == [b"root:x:0:", b"", b"broken"]
    assert lines[3].endswith(b":x:88:me") and lines[4] == b"group4000000:x:4000000:me"
