"""Images cross over to Apptainer and back: run by hand where it is installed, `pytest -m peers`.

SCIEXEC_APPTAINER is the command that starts it ("apptainer" by default; may be a prefix that enters a chroot), SCIEXEC_SHARED a
directory that both sides see under one path and may write to (default: the test's own).
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import Command, Need

pytestmark = pytest.mark.peers


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return Path(os.environ.get("SCIEXEC_SHARED", tmp_path))


def apptainer(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*shlex.split(os.environ.get("SCIEXEC_APPTAINER", "apptainer")), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, check=False)


@pytest.fixture
def ours(sciexec: Command, oci_layout: Path, shared: Path) -> Path:
    image = shared / "ours.sif"
    assert sciexec("pull", "--force", image, f"oci:{oci_layout}:app").returncode == 0
    image.chmod(0o755)
    return image


def test_apptainer_runs_ours(ours: Path) -> None:
    for words, said in (
        (("exec", ours, "cat", "/opt/app/data/table"), "1 2 3\n"),
        (("run", ours, "you", "$(id)"), "good day you $(id) from a layer in "),
    ):
        done = apptainer(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said)
    assert "org.opencontainers.image.title: app" in apptainer("inspect", ours).stdout
    assert apptainer("exec", ours, "sh", "-c", "exit 37").returncode == 37


def test_what_apptainer_makes_runs_here(sciexec: Command, ours: Path, shared: Path) -> None:
    """Rebuilt by Apptainer: gzip, everything root's, its own objects."""
    theirs = shared / "theirs.sif"
    done = apptainer("build", "--force", theirs, ours)
    assert done.returncode == 0, done.stderr
    assert sciexec("exec", theirs, "cat", "/opt/app/data/table").stdout == "1 2 3\n"
    done = sciexec("run", theirs, "you")
    assert done.stdout.startswith("good day you from a layer in "), done.stderr
    assert "org.opencontainers.image.title: app" in sciexec("inspect", theirs).stdout
    assert sciexec("exec", theirs, "sh", "-c", "exit 37").returncode == 37


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_apptainer_shows_our_data(sciexec: Command, ours: Path, shared: Path, tmp_path: Path, compression: str) -> None:
    (tmp_path / "era5/sub").mkdir(parents=True)
    (tmp_path / "era5/sub/t2m").write_text("271.5\n")
    data = shared / "data.sif"
    assert sciexec("data", "package", "--force", "--compression", compression, tmp_path / "era5", data).returncode == 0
    assert sciexec("data", "add", ours, tmp_path / "era5").returncode == 0
    number = str(len(sciexec("sif", "list", ours).stdout.splitlines()) - 3)
    for image, part in ((data, ""), (ours, ""), (ours, f",id={number}")):
        binds = f"{image}:/data:image-src=/{part}", f"{image}:/t2m:image-src=/sub/t2m{part}"
        done = apptainer("exec", "-B", binds[0], "-B", binds[1], ours, "cat", "/t2m")
        assert (done.returncode, done.stdout) == (0, "271.5\n"), done.stderr
    done = apptainer("exec", "--mount", f"type=bind,src={data},dst=/d,image-src=/sub", ours, "ls", "/d")
    assert (done.returncode, done.stdout) == (0, "t2m\n"), done.stderr


def test_its_signature_survives_our_data(sciexec: Command, ours: Path, shared: Path, tmp_path: Path, need: Need) -> None:
    signed, private, public = (shared / name for name in ("signed.sif", "private.pem", "public.pem"))
    signed.unlink(missing_ok=True)
    openssl = need("openssl")
    subprocess.run([openssl, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True, capture_output=True)
    subprocess.run([openssl, "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    private.chmod(0o644)  # it signs this one file
    for words in (("build", signed, ours), ("sign", "--key", private, signed), ("verify", "--key", public, signed)):
        done = apptainer(*words)
        assert done.returncode == 0, done.stderr
    (tmp_path / "era5").mkdir()
    assert sciexec("data", "add", signed, tmp_path / "era5").returncode == 0
    signed.chmod(0o666)  # the other side may be another user
    words = "--key", public, signed
    done = apptainer("verify", *words)
    assert "signature not found for object group 2" in done.stderr  # the data are new, and say so
    assert apptainer("verify", "--group-id", "1", *words).returncode == 0
    assert apptainer("sign", "--group-id", "2", "--key", private, signed).returncode == 0
    assert apptainer("verify", *words).returncode == 0


@pytest.fixture
def bare(sciexec: Command, rootfs: Path, shared: Path, need: Need) -> Path:
    """An image that both sides may run as anybody."""
    image = shared / "bare.sqfs"
    image.unlink(missing_ok=True)
    subprocess.run([need("mksquashfs"), rootfs, image, "-quiet", "-all-root", "-comp", "gzip"], check=True, capture_output=True)
    return image


CHANGES = "echo changed > /srv/text && rm /bin/false && mkdir /opt/new"
SEEN = "cat /srv/text; ls /bin/false; ls /opt"


def test_apptainer_uses_our_overlay_and_leaves_it_to_us(sciexec: Command, bare: Path, shared: Path) -> None:
    """Owned by root in it, as the two sides may be two users."""
    path = shared / "ours.ext3"
    path.unlink(missing_ok=True)
    assert sciexec("overlay", "create", "--sparse", "--fakeroot", path).returncode == 0
    path.chmod(0o666)
    assert sciexec("exec", "-o", path, bare, "sh", "-c", CHANGES).returncode == 0
    done = apptainer("exec", "--fakeroot", "-o", path, bare, "sh", "-c", f"{SEEN}; echo theirs > /srv/text")
    assert done.stdout == "changed\nnew\n", done.stderr
    for words in (path, f"{path}:ro"):
        assert sciexec("exec", "-o", words, bare, "sh", "-c", SEEN).stdout == "theirs\nnew\n"


def test_we_use_apptainers_overlay_and_leave_it_to_it(sciexec: Command, bare: Path, shared: Path) -> None:
    path = shared / "theirs.ext3"
    path.unlink(missing_ok=True)
    assert apptainer("overlay", "create", "--sparse", path).returncode == 0
    assert apptainer("exec", "-o", path, bare, "sh", "-c", CHANGES).returncode == 0
    apptainer("exec", "-B", shared, bare, "chmod", "666", path)
    for words in (f"{path}:ro", path):
        assert sciexec("exec", "-o", words, bare, "sh", "-c", SEEN).stdout == "changed\nnew\n"
    assert sciexec("exec", "-o", path, bare, "sh", "-c", "echo ours > /srv/text").returncode == 0
    assert apptainer("exec", "-o", path, bare, "sh", "-c", SEEN).stdout == "ours\nnew\n"


def test_a_partition_that_we_added_is_theirs_as_well(sciexec: Command, ours: Path) -> None:
    assert sciexec("overlay", "create", "--sparse", "--fakeroot", ours).returncode == 0
    assert sciexec("exec", "--writable", ours, "sh", "-c", "echo text > /srv/text").returncode == 0
    done = apptainer("exec", ours, "cat", "/srv/text")
    assert done.stdout == "text\n", done.stderr
    assert "Ext3/Overlay" in apptainer("sif", "list", ours).stdout
