"""Images of ours, started: ENV, ENTRYPOINT and CMD go from the start object to execve and past every shell."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sciexec import environment, sif

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TRAPS = ["$(touch /tmp/gone)", "`id`", 'a"b', "it's", "back\\slash", "new\nline", "$HOME", "*", "", "ünï"]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, need: Callable[..., str]) -> Callable[..., Path]:
    """make(env, entrypoint, cmd, scripts={name: text}) -> a SIF with no file but a static busybox and its /.singularity.d."""
    busybox, mksquashfs = need("busybox"), need("mksquashfs")
    numbers = iter(range(1000))

    def make(env: list[str], entrypoint: list[str], cmd: list[str], scripts: dict[str, str] | None = None) -> Path:
        work = tmp_path_factory.mktemp(f"image{next(numbers)}")
        root = work / "root"
        for name in ("bin", "proc", "sys", "dev", "tmp", "var/tmp", "etc", "home"):
            (root / name).mkdir(parents=True)
        for applet in ("printf", "env", "true", *(("sh",) if scripts else ())):
            (root / "bin" / applet).symlink_to("busybox")
        for name, text in (scripts or {}).items():
            path = root / ".singularity.d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (root / "bin/busybox").write_bytes(Path(busybox).read_bytes())
        (root / "bin/busybox").chmod(0o755)
        subprocess.run(
            [mksquashfs, root, work / "fs", "-quiet", "-no-progress", "-comp", "gzip", "-all-root"], check=True, capture_output=True
        )
        system = (work / "fs").read_bytes()
        path = work / "ours.sif"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o755)
        builder = sif.Builder(fd, arch="amd64", created=0)
        builder.add(sif.GENERIC, "sciexec.start", environment.dump(env, entrypoint, cmd))
        os.pwrite(fd, system, builder.partition_offset())
        builder.finish(-(-len(system) // 4096) * 4096)
        os.close(fd)
        return path

    return make


def test_arguments_reach_the_entrypoint_as_they_are(sciexec: Command, make: Callable[..., Path]) -> None:
    image = make([], ["/bin/printf", "%s|", *TRAPS], ["cmd", *TRAPS])
    shown = "".join(f"{trap}|" for trap in TRAPS)
    done = sciexec("run", image)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{shown}cmd|{shown}"
    assert sciexec("run", image, *TRAPS).stdout == shown + shown
    assert sciexec("exec", image, "printf", "%s|", *TRAPS).stdout == shown


def test_the_environment_is_the_images_byte_for_byte(sciexec: Command, make: Callable[..., Path]) -> None:
    env = [f"V{number}={trap}" for number, trap in enumerate(TRAPS)]
    image = make(
        [*env, "PATH=/opt/bin:/bin", "1BAD=x", "x y=z", "LD_PRELOAD=", "SAME=a", "SAME=b", "HOME=/evil", "SCIEXEC_NAME=evil"],
        [],
        ["env", "-0"],
    )
    done = sciexec("run", image, env={"V0": "host", "OTHER": "host"})
    assert (done.returncode, done.stderr) == (0, "")
    inside = done.stdout.split("\0")
    assert {*env, "1BAD=x", "x y=z", "LD_PRELOAD=", "SAME=b", "OTHER=host", "SCIEXEC_NAME=ours.sif"} <= set(inside)
    assert "PATH=/opt/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin" in inside
    assert not any(entry.startswith("HOME=/evil") for entry in inside)


def test_the_images_own_scripts_are_not_needed(sciexec: Command, make: Callable[..., Path]) -> None:
    scripts = {"env/10-docker2singularity.sh": "export FROM=script\n", "runscript": "#!/bin/sh\necho script\n"}
    image = make(["FROM=object"], ["env"], [], scripts)
    assert "FROM=object\n" in sciexec("run", image).stdout
    assert "FROM=object\n" in sciexec("exec", image, "env").stdout


def test_a_bind_over_them_means_them(sciexec: Command, make: Callable[..., Path], tmp_path: Path) -> None:
    """Environment modules of software catalogues bind a script of the site into the image."""
    scripts = {
        "env/10-docker2singularity.sh": "export FROM=script\n",
        "env/99-site.sh": "",
        "runscript": '#!/bin/sh\necho "script $SITE $*"\n',
    }
    image = make(["FROM=object"], ["env"], [], scripts)
    site = tmp_path / "site.sh"
    site.write_text("export SITE=yes\n")
    bind = f"{site}:/.singularity.d/env/99-site.sh"
    done = sciexec("exec", "-B", bind, image, "env")
    assert "FROM=script\n" in done.stdout and "SITE=yes\n" in done.stdout, done.stderr
    assert sciexec("run", image, "x", env={"SINGULARITY_BIND": bind}).stdout == "script yes x\n"


def test_nothing_to_run(sciexec: Command, make: Callable[..., Path]) -> None:
    image = make([], [], [])
    assert sciexec("run", image, "printf", "x").stdout == "x"
    done = sciexec("run", image)
    assert (done.returncode, done.stderr) == (255, "FATAL: the image has neither ENTRYPOINT nor CMD\n       name a command behind it\n")
    assert sciexec("run", make([], ["nosuch"], [])).stderr == 'FATAL: "nosuch": executable file not found in $PATH\n'


@pytest.mark.parametrize("damage", [b"sciexec-start 9\0", b"sciexec-start 1\0Exx\0"])
def test_a_damaged_start_object_is_refused(sciexec: Command, make: Callable[..., Path], damage: bytes, tmp_path: Path) -> None:
    image = tmp_path / "damaged.sif"
    image.write_bytes(make(["X=1234567890"], [], []).read_bytes().replace(b"sciexec-start 1\0EX=1234567890\0", damage.ljust(30, b"\0")))
    done = sciexec("exec", image, "true")
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL: reading {image}: its sciexec.start object")
