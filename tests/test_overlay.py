"""What lies over an image: overlays of the user's, memory, or the image itself; and what a run leaves in them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from namespace_fixtures import Command, Make, Need

from sciexec import ext3, sif

pytest_plugins = ["run_fixtures"]

# changes a file, makes one, removes one, replaces a directory
CHANGES = "echo changed > /srv/text && echo new > /opt/new && rm /bin/false && rm -r /srv/old && mkdir /srv/old && echo b > /srv/old/b"
SEEN = "cat /srv/text /opt/new; ls /bin/false 2>/dev/null; ls /srv/old"
CHANGED = "changed\nnew\nb\n"


@pytest.fixture(scope="module")
def tree(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tree, with a directory to replace in it."""
    path = Path(shutil.copytree(rootfs, tmp_path_factory.mktemp("tree") / "root", symlinks=True))
    (path / "srv/old").mkdir()
    (path / "srv/old/a").write_text("a\n")
    (path / "srv/text").write_text("image's\n")
    return path


@pytest.fixture(scope="module")
def base(tree: Path, make_image: Make) -> Path:
    return make_image(tree, "sif")


@pytest.fixture
def served(need: Need) -> None:
    need("fuse2fs", "fuse-overlayfs", "mke2fs")


@pytest.fixture
def ext(sciexec: Command, tmp_path: Path, served: None) -> Path:
    """An empty overlay image."""
    path = tmp_path / "changes.ext3"
    done = sciexec("overlay", "create", "--sparse", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


def said(sciexec: Command, *words: str | Path) -> str:
    done = sciexec("exec", *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# --- memory -----------------------------------------------------------------------------------------------------------------


def test_memory_has_no_limit_of_64_mib(sciexec: Command, base: Path, nothing_left: None) -> None:
    script = "head -c 100000000 /dev/zero > /opt/big; stat -c %s /opt/big"
    assert said(sciexec, "--writable-tmpfs", base, "sh", "-c", script) == "100000000\n"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_memory_has_the_size_that_is_given(sciexec: Command, base: Path, way: str) -> None:
    words = ["--tmpfs-size", "1M"] if way == "option" else []
    environ = {} if way == "option" else {"APPTAINER_TMPFS_SIZE": "1M"}
    script = "head -c 900000 /dev/zero > /opt/fits && busybox dd if=/dev/zero of=/opt/too-much bs=900000 count=1"
    done = sciexec("exec", "--writable-tmpfs", *words, base, "sh", "-c", script, env=environ)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_mount_points_that_are_missing_are_made_in_memory(sciexec: Command, base: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("text\n")
    script = "cat /not/there/file && touch /not/beside && ls /not"
    assert said(sciexec, "--writable-tmpfs", "-B", f"{tmp_path}/data:/not/there", base, "sh", "-c", script) == "text\nbeside\nthere\n"


# --- directories ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def over(tmp_path: Path) -> Path:
    path = tmp_path / "over"
    path.mkdir()
    return path


def test_a_directory_keeps_what_was_written(sciexec: Command, base: Path, over: Path, tree: Path, nothing_left: None) -> None:
    before = names(tree)
    said(sciexec, "-o", over, base, "sh", "-c", CHANGES)
    assert (over / "upper/srv/text").read_text() == "changed\n"
    assert (over / "upper/opt/new").stat().st_uid == os.getuid()
    for words in (["-o", over], ["--overlay", f"{over}:ro"]):
        assert said(sciexec, *words, base, "sh", "-c", SEEN) == CHANGED
    assert "Read-only file system" in sciexec("exec", "-o", f"{over}:ro", base, "touch", "/opt/x").stderr
    assert said(sciexec, base, "ls", "/srv/old") == "a\n"
    assert names(tree) == before


def test_an_unpacked_image_can_be_below(sciexec: Command, tree: Path, over: Path) -> None:
    before = names(tree)
    said(sciexec, "-o", over, tree, "sh", "-c", CHANGES)
    assert said(sciexec, "-o", f"{over}:ro", tree, "sh", "-c", SEEN) == CHANGED
    assert names(tree) == before


def test_no_mount_point_is_left_behind(sciexec: Command, base: Path, over: Path, tmp_path: Path) -> None:
    """Neither directories nor files, nor those of the default mounts; and what the payload writes beside them stays."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("text\n")
    binds = f"{tmp_path}/data:/not/there/at/all,{tmp_path}/data/file:/etc/not-there,{tmp_path}/data:/opt/a/b"
    script = "cat /not/there/at/all/file /etc/not-there /opt/a/b/file && echo beside > /opt/a/beside"
    assert said(sciexec, "-o", over, "-B", binds, base, "sh", "-c", script) == "text\n" * 3
    assert names(over / "upper") == {"opt", "opt/a", "opt/a/beside"}
    assert said(sciexec, "-o", over, "-B", binds, base, "cat", "/opt/a/beside") == "beside\n"
    said(sciexec, "-o", f"{over}:ro", "-B", binds, base, "cat", "/opt/a/b/file")


def test_a_mount_point_that_the_overlay_hides_is_an_error(sciexec: Command, base: Path, over: Path) -> None:
    """Its directory was replaced as a whole, and what lies below it cannot show through."""
    said(sciexec, "-o", over, base, "sh", "-c", "rm -r /srv && mkdir /srv")
    done = sciexec("exec", "-o", over, "-B", "/usr:/srv/usr", base, "true")
    assert (done.returncode, names(over / "upper")) == (255, {"srv"})
    assert "mounting on /srv/usr: the image has no such place" in done.stderr


def test_the_last_overlay_is_on_top(sciexec: Command, base: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"{number}/upper/opt").mkdir(parents=True)
        (tmp_path / f"{number}/upper/opt/number").write_text(f"{number}\n")
        (tmp_path / f"{number}/upper/opt/of{number}").touch()
    first, second, third = (f"{tmp_path}/{number}:ro" for number in (1, 2, 3))
    shown = "cat /opt/number; ls /opt"
    assert said(sciexec, "-o", first, "-o", second, base, "sh", "-c", shown) == "2\nnumber\nof1\nof2\n"
    assert said(sciexec, "-o", f"{second},{first}", base, "sh", "-c", shown) == "1\nnumber\nof1\nof2\n"
    # what can be written to is always the uppermost
    assert said(sciexec, "-o", third[:-3], "-o", first, base, "sh", "-c", shown).startswith("3\n")
    assert said(sciexec, "-o", first, "--writable-tmpfs", base, "sh", "-c", "echo m > /opt/number; cat /opt/number") == "m\n"
    assert (tmp_path / "1/upper/opt/number").read_text() == "1\n"


def test_a_directory_without_upper_lies_over_the_image_itself(sciexec: Command, base: Path, over: Path) -> None:
    (over / "opt").mkdir()
    (over / "opt/plain").write_text("plain\n")
    assert said(sciexec, "-o", f"{over}:ro", base, "cat", "/opt/plain") == "plain\n"


def test_a_directory_that_cannot_be_written_to_is_read(sciexec: Command, base: Path, over: Path) -> None:
    (over / "upper").mkdir()
    (over / "upper/made").write_text("made\n")
    over.chmod(0o555)
    done = sciexec("exec", "-o", over, base, "cat", "/made")
    over.chmod(0o755)
    assert (done.returncode, done.stdout) == (0, "made\n")
    assert done.stderr == f"WARNING: the overlay {over} cannot be written to and is read only\n"


def test_a_link_in_the_overlay_leads_nowhere_on_the_host(sciexec: Command, base: Path, over: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (over / "upper").symlink_to(tmp_path / "outside")
    sciexec("exec", "-o", f"{over}:ro", base, "true")
    assert names(tmp_path / "outside") == set()


# --- files ------------------------------------------------------------------------------------------------------------------


def test_a_squashfs_is_an_overlay(sciexec: Command, base: Path, tmp_path: Path, need: Need, nothing_left: None) -> None:
    (tmp_path / "layer/opt").mkdir(parents=True)
    (tmp_path / "layer/opt/layered").write_text("layered\n")
    words = [need("mksquashfs"), tmp_path / "layer", tmp_path / "layer.sqfs", "-quiet", "-all-root"]
    subprocess.run(words, check=True, capture_output=True)
    assert said(sciexec, "-o", tmp_path / "layer.sqfs", base, "cat", "/opt/layered") == "layered\n"
    script = "echo memory > /opt/layered; cat /opt/layered"
    assert said(sciexec, "-o", tmp_path / "layer.sqfs", "--writable-tmpfs", base, "sh", "-c", script) == "memory\n"


def test_one_run_sees_what_the_one_before_wrote(sciexec: Command, base: Path, ext: Path, need: Need, nothing_left: None) -> None:
    said(sciexec, "-o", ext, base, "sh", "-c", CHANGES)
    for number in range(5):
        assert said(sciexec, "-o", ext, base, "sh", "-c", f"echo {number} >> /opt/log; {SEEN}") == CHANGED
    assert said(sciexec, "-o", f"{ext}:ro", base, "cat", "/opt/log") == "0\n1\n2\n3\n4\n"
    assert "Read-only file system" in sciexec("exec", "-o", f"{ext}:ro", base, "touch", "/opt/x").stderr
    assert said(sciexec, base, "ls", "/srv/old") == "a\n"
    checked = subprocess.run([need("e2fsck"), "-fn", ext], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_what_was_removed_stays_removed(sciexec: Command, base: Path, ext: Path) -> None:
    """Also where another server than the one that wrote it reads it."""
    said(sciexec, "-o", ext, base, "sh", "-c", CHANGES)
    for words in ([f"{ext}:ro"], [f"{ext}:ro", "--writable-tmpfs"], [ext]):
        assert said(sciexec, "-o", *words, base, "sh", "-c", f"{SEEN}; ls -A /bin | grep '^.wh' || true") == CHANGED


def test_mount_points_are_not_left_in_an_image_either(sciexec: Command, base: Path, ext: Path) -> None:
    said(sciexec, "-o", ext, "-B", "/usr:/not/there", base, "sh", "-c", "ls /not/there > /dev/null; touch /opt/made")
    assert said(sciexec, "-o", f"{ext}:ro", base, "sh", "-c", "ls -d /not /opt/made 2>/dev/null || true") == "/opt/made\n"


@pytest.mark.parametrize("code", [0, 7, 255])
def test_the_exit_code_is_the_payloads(sciexec: Command, base: Path, ext: Path, code: int) -> None:
    done = sciexec("exec", "-o", ext, base, "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "QUIT"])
def test_a_signal_reaches_the_payload_and_its_end_is_ours(sciexec_path: Path, base: Path, ext: Path, name: str, sciexec: Command) -> None:
    number = int(signal.Signals[f"SIG{name}"])
    script = f"trap 'echo got > /opt/got; trap - {name}; kill -{name} $$' {name}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([sciexec_path, "exec", "-o", ext, base, "sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == -number
    assert said(sciexec, "-o", f"{ext}:ro", base, "cat", "/opt/got") == "got\n"


def test_who_kills_the_command_kills_the_payload(sciexec_path: Path, base: Path, ext: Path, sciexec: Command, nothing_left: None) -> None:
    with subprocess.Popen(
        [sciexec_path, "exec", "-o", ext, base, "sh", "-c", "echo kept > /opt/kept; echo $$; exec sleep 60"],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        payload = int(process.stdout.readline())
        process.kill()
        process.wait(10)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{payload}/stat").exists() and " Z " not in Path(f"/proc/{payload}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert said(sciexec, "-o", ext, base, "cat", "/opt/kept") == "kept\n"


def test_one_may_write_or_several_may_read(sciexec_path: Path, base: Path, ext: Path, sciexec: Command) -> None:
    def holding(path: str | Path) -> subprocess.Popen[str]:
        words = [sciexec_path, "exec", "-o", path, base, "sh", "-c", "echo ready; read line"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    with holding(ext) as process:
        for path, act in ((ext, "writing to"), (f"{ext}:ro", "reading")):
            done = sciexec("exec", "-o", path, base, "true")
            assert done.returncode == 255
            assert done.stderr.startswith(f"FATAL: {act} the overlay {ext}: another run ")
        process.communicate("\n", timeout=20)
    with holding(f"{ext}:ro") as process:
        said(sciexec, "-o", f"{ext}:ro", base, "true")
        assert sciexec("exec", "-o", ext, base, "true").returncode == 255
        process.communicate("\n", timeout=20)
    said(sciexec, "-o", ext, base, "true")


def test_an_image_that_is_full_says_so(sciexec: Command, base: Path, ext: Path) -> None:
    done = sciexec("exec", "-o", ext, base, "sh", "-c", "busybox dd if=/dev/zero of=/opt/big bs=1000000 count=100")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    said(sciexec, "-o", ext, base, "sh", "-c", "rm /opt/big; echo room > /opt/big")
    assert said(sciexec, "-o", f"{ext}:ro", base, "cat", "/opt/big") == "room\n"


@pytest.mark.parametrize(("field", "value", "message"), [
    (58, 2, "errors were found in its file system"), (96, 4 | 2, "its journal has to be replayed first"), (58, 0, ""),
])  # fmt: skip
def test_an_image_that_was_not_closed(sciexec: Command, base: Path, ext: Path, field: int, value: int, message: str) -> None:
    with ext.open("r+b") as file:
        file.seek(1024 + field)
        file.write(value.to_bytes(2, "little"))
    done = sciexec("exec", "-o", f"{ext}:ro", base, "true")
    assert (done.returncode, message in done.stderr) == (255 if message else 0, True)


@pytest.mark.parametrize("damage", ["short", "zeros", "noise"])
def test_a_damaged_image_is_refused_in_a_line(sciexec: Command, base: Path, ext: Path, damage: str) -> None:
    content = bytearray(ext.read_bytes())
    if damage == "short":
        content = content[:3000]
    else:
        content[4096 : 4096 + 200_000] = bytes(200_000) if damage == "zeros" else os.urandom(200_000)
    ext.write_bytes(content)
    done = sciexec("exec", "-o", ext, base, "true", timeout=60)
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL: ")
    assert str(ext) in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_cannot_read_the_root_leaves_nothing_running(sciexec: Command, base: Path, tmp_path: Path, need: Need) -> None:
    """It mounts, and then every access fails: of the root's inode, the second of the table, the checksum is wrong."""
    path = tmp_path / "damaged.ext4"
    with path.open("w+b") as file:
        file.truncate(64 << 20)
        subprocess.run([need("mke2fs"), "-q", "-t", "ext4", "-b", "4096", "-I", "256", path], check=True, capture_output=True)
        file.seek(4096 + 8)
        file.seek(int.from_bytes(file.read(4), "little") * 4096 + 256 + 8)
        file.write(b"damaged")
    done = sciexec("exec", "-o", path, base, "true", timeout=30)
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL: mounting {path}: fuse2fs ended: ")
    deadline = time.monotonic() + 10
    while subprocess.run(["fuser", path], capture_output=True, check=False).returncode == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "one", "-o", "two"], "--overlay: {here}/one and {here}/two: only one can be written to"),
        (["-o", "one", "--writable-tmpfs"], "--writable-tmpfs and --overlay {here}/one: only one can be written to"),
        (["-o", "one", "--writable"], "--writable and --overlay: one of them can be written to, not both"),
        (["-o", "missing"], "opening the overlay {here}/missing: No such file or directory"),
        (["-o", "text"], "opening the overlay {here}/text: neither a directory nor ext3, SquashFS or SIF"),
        (["-w"], "--writable: {base} cannot be written to: it has no ext3 overlay partition inside"),
        (["-o", "base.sif"], "opening the overlay {here}/base.sif: the SIF has no overlay partition"),
    ],
)
def test_what_cannot_be_had_is_refused(sciexec: Command, base: Path, tmp_path: Path, words: list[str], message: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "text").write_text("text\n")
    (tmp_path / "base.sif").symlink_to(base)
    done = sciexec("exec", *words, base, "true", cwd=tmp_path)
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL: {message.format(here=tmp_path, base=base)}\n")
    assert names(tmp_path / "one") == set()


def test_a_host_whose_fuse2fs_is_missing_says_so(sciexec: Command, base: Path, ext: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sciexec import sources, stack
    from sciexec.errors import HostError

    monkeypatch.setattr(sources, "PLACES", ("/nowhere",))
    with pytest.raises(HostError, match=f"mounting the overlay {ext}: fuse2fs is not installed"):
        stack.Ext3(str(ext), os.open(ext, os.O_RDONLY), 0, writable=False)


# --- the image itself -------------------------------------------------------------------------------------------------------


def test_a_directory_is_written_to(sciexec: Command, hostile: Path, nothing_left: None) -> None:
    for place in ("etc/hosts", "etc/resolv.conf", "etc/localtime", "etc/mine"):
        (hostile / place).touch()
    home = Path(os.path.expanduser("~"))
    (hostile / str(home).lstrip("/")).mkdir(parents=True, exist_ok=True)
    done = sciexec("exec", "-w", hostile, "sh", "-c", "echo kept > /opt/kept; rm /bin/false; cat /opt/kept", cwd=Path("/tmp"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "")
    assert (hostile / "opt/kept").read_text() == "kept\n"
    assert not (hostile / "bin/false").exists()
    assert sciexec("exec", hostile, "touch", "/opt/x").returncode == 1


def test_nothing_is_made_in_it_but_by_the_payload(sciexec: Command, hostile: Path, tmp_path: Path) -> None:
    before = names(hostile)
    done = sciexec("exec", "--writable", hostile, "true", cwd=Path("/tmp"))
    assert done.returncode == 0
    assert "WARNING: /etc/hosts is left out: the image has no such place, and none is made where writes last\n" in done.stderr
    assert sciexec("-q", "exec", "--writable", hostile, "true", cwd=Path("/tmp")).stderr == ""
    done = sciexec("exec", "--writable", "-B", f"{tmp_path}:/not/there", hostile, "true", cwd=Path("/tmp"))
    assert done.returncode == 255
    assert "FATAL: mounting on /not/there: the image has no such place" in done.stderr
    assert names(hostile) == before


def test_memory_beside_writable_is_left_out_with_a_word(sciexec: Command, hostile: Path) -> None:
    done = sciexec("exec", "-w", "--writable-tmpfs", hostile, "touch", "/opt/kept", cwd=Path("/tmp"))
    assert done.returncode == 0
    assert "WARNING: --writable-tmpfs is left out" in done.stderr
    assert (hostile / "opt/kept").exists()


def test_unsquash_unpacks_once(sciexec: Command, base: Path, tmp_path: Path) -> None:
    assert said(sciexec, "--unsquash", base, "cat", "/srv/old/a") == "a\n"
    (unpacked,) = (tmp_path / "cache/sciexec/unpacked").iterdir()
    (unpacked / "srv/old/a").write_text("from there\n")
    assert said(sciexec, "--tmp-sandbox", base, "cat", "/srv/old/a") == "from there\n"
    assert "Read-only file system" in sciexec("exec", "--unsquash", base, "touch", "/opt/x").stderr


# --- overlay create ---------------------------------------------------------------------------------------------------------


def sha(path: Path, length: int = -1) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(length)).hexdigest()


def test_a_new_overlay_is_the_callers(sciexec: Command, base: Path, tmp_path: Path, served: None) -> None:
    path = tmp_path / "new.ext3"
    done = sciexec("overlay", "create", "--size", "65", "--create-dir", "/opt/mine", "--create-dir", "../../up", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    status = path.stat()
    assert (status.st_size, status.st_blocks * 512 >= 65 << 20, status.st_mode & 0o777) == (65 << 20, True, 0o600)
    with path.open("rb") as file:
        system = ext3.Ext3(file.fileno(), 0, "new")
        assert system.owner("upper") == system.owner("work") == system.root_owner() == (os.getuid(), os.getgid())
        assert system.owner("nothing") is None
        assert not system.needs_replay and system.state == ext3.CLEAN
    assert said(sciexec, "-o", path, base, "sh", "-c", "touch /opt/mine/file; ls /opt/mine /up") == "/opt/mine:\nfile\n\n/up:\n"
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name or "overlay-" in entry.name] == []


def test_a_new_overlay_can_be_sparse_and_roots(sciexec: Command, base: Path, tmp_path: Path, served: None) -> None:
    path = tmp_path / "new.ext3"
    assert sciexec("overlay", "create", "-S", "-f", "-s", "512", path).returncode == 0
    assert (path.stat().st_size, path.stat().st_blocks * 512 < 100 << 20) == (512 << 20, True)
    with path.open("rb") as file:
        assert ext3.Ext3(file.fileno(), 0, "new").owner("upper") == (0, 0)
    said(sciexec, "-o", path, base, "sh", "-c", CHANGES)
    assert said(sciexec, "-o", path, base, "sh", "-c", SEEN) == CHANGED


def test_an_overlay_of_somebody_elses_belongs_to_whoever_may_write_it(
    sciexec: Command, base: Path, tmp_path: Path, need: Need, served: None
) -> None:
    """The owner in the file system is another user id; what is written is theirs."""
    path = tmp_path / "theirs.ext3"
    assert sciexec("overlay", "create", "-S", path).returncode == 0
    for place in ("/", "/upper", "/work"):
        for field in ("uid", "gid"):
            subprocess.run([need("debugfs"), "-w", "-R", f"sif {place} {field} 70000", path], check=True, capture_output=True)
    said(sciexec, "-o", path, base, "sh", "-c", CHANGES)
    assert said(sciexec, "-o", f"{path}:ro", base, "sh", "-c", "cat /opt/new; stat -c %u /opt/new") == f"new\n{os.getuid()}\n"
    listing = subprocess.run([need("debugfs"), "-R", "stat /upper/opt/new", path], check=True, capture_output=True, text=True).stdout
    assert "User: 70000   Group: 70000" in " ".join(listing.replace("  ", " ").split("\n")).replace("User: ", "User: ").replace("  ", "   ")


@pytest.mark.parametrize(("words", "message"), [
    (["-s", "63", "new"], "making an overlay: 63 MiB are too few"), (["text"], "making the overlay text: the file exists and is no SIF"),
    (["missing/new"], "making the overlay missing/new: No such file or directory"),
    (["-s", "99999999999", "-S", "new"], "making the overlay new: "),
])  # fmt: skip
def test_no_overlay_is_made(sciexec: Command, tmp_path: Path, words: list[str], message: str, served: None) -> None:
    (tmp_path / "text").write_text("text\n")
    before = names(tmp_path) - {"home"}
    done = sciexec("overlay", "create", *words, cwd=tmp_path)
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL: {message}")
    assert names(tmp_path) - {"home"} == before


@pytest.fixture
def own(base: Path, sciexec: Command, tmp_path: Path, served: None) -> Path:
    """A SIF with an overlay partition."""
    path = Path(shutil.copy(base, tmp_path / "own.sif"))
    assert sciexec("overlay", "create", "-S", path).returncode == 0
    return path


def test_a_sif_with_an_overlay_inside(sciexec: Command, base: Path, own: Path, nothing_left: None) -> None:
    said(sciexec, "--writable", own, "sh", "-c", CHANGES)
    assert said(sciexec, own, "sh", "-c", SEEN) == CHANGED  # without --writable it is there as well
    assert said(sciexec, "-w", own, "sh", "-c", SEEN) == CHANGED
    assert said(sciexec, "-o", f"{own}:ro", base, "sh", "-c", SEEN) == CHANGED
    assert said(sciexec, "--writable-tmpfs", own, "sh", "-c", "echo m > /opt/new; cat /opt/new") == "m\n"
    assert "Read-only file system" in sciexec("exec", own, "touch", "/opt/x").stderr
    said(sciexec, "-o", own, base, "sh", "-c", "echo more > /opt/more")
    assert said(sciexec, own, "cat", "/opt/more") == "more\n"


def test_a_partition_is_added_behind_what_is_there(sciexec: Command, base: Path, own: Path) -> None:
    size = base.stat().st_size
    with own.open("rb") as file, base.open("rb") as before:
        after, was = (sif.read(opened.fileno(), "sif") for opened in (file, before))
        assert file.seek(sif.DATA_OFFSET) and before.seek(sif.DATA_OFFSET)
        assert file.read(size - sif.DATA_OFFSET) == before.read(size - sif.DATA_OFFSET)
    added = after.descriptors[-1]
    assert [descriptor.raw for descriptor in after.descriptors[:-1]] == [descriptor.raw for descriptor in was.descriptors]
    assert (added.type, added.fs, added.parttype, added.arch) == (sif.PARTITION, sif.FS_EXT3, sif.PART_OVERLAY, was.primary.arch)
    assert (added.id, added.group, added.size, added.offset % 4096) == (was.primary.id + 1, 1, 64 << 20, 0)
    assert (after.free, after.total, after.uuid) == (was.free - 1, was.total, was.uuid)
    assert after.data_offset + after.data_size == own.stat().st_size == added.offset + added.size
    done = sciexec("overlay", "create", own)
    assert done.returncode == 255
    assert done.stderr == f"FATAL: adding an overlay to {own}: it has one already, object {added.id}\n"


def test_a_crash_leaves_the_sif_as_it_was_or_whole(base: Path, own: Path, sciexec: Command, tmp_path: Path) -> None:
    """Data first, then the descriptor, then the header: at each of these moments the file is sound."""
    whole, half = own.read_bytes(), tmp_path / "half.sif"
    for front in (0, sif.HEADER.size):  # how much of the old file's front is there still
        content = bytearray(whole)
        old = base.read_bytes()
        if front == 0:
            content[: sif.DATA_OFFSET] = old[: sif.DATA_OFFSET]
        else:
            content[:front] = old[:front]
        half.write_bytes(content)
        assert said(sciexec, half, "cat", "/srv/old/a") == "a\n"
    half.write_bytes(whole[: base.stat().st_size] + bytes(100))
    half.write_bytes(base.read_bytes() + whole[base.stat().st_size : base.stat().st_size + 5000])
    assert said(sciexec, half, "cat", "/srv/old/a") == "a\n"


def test_a_signed_sif_stays_as_it_is(base: Path, sciexec: Command, tmp_path: Path, served: None) -> None:
    signed = Path(shutil.copy(base, tmp_path / "signed.sif"))
    fd = os.open(signed, os.O_RDWR)
    parsed = sif.read(fd, "sif")
    head = (sif.SIGNATURE, 1, parsed.primary.id + 1, 0, sif.GROUP_MASK | 1, sif.DATA_OFFSET, 0, 0, 0, 0, 0, 0, b"", b"")
    os.pwrite(fd, sif.DESCRIPTOR.pack(*head), sif.TABLE_OFFSET + parsed.primary.id * sif.DESCRIPTOR.size)
    os.close(fd)
    before = sha(signed)
    done = sciexec("overlay", "create", signed)
    assert done.returncode == 255
    assert done.stderr.startswith(f"FATAL: adding an overlay to {signed}: it is signed")
    assert sha(signed) == before


# --- beside other options ---------------------------------------------------------------------------------------------------


def test_root_inside_changes_an_unpacked_image(sciexec: Command, hostile: Path) -> None:
    """As a client does that keeps a sandbox for a task: users are the image's own there, files can be given to root."""
    script = "echo me:x:5:5::/:/bin/sh > /etc/new && mv /etc/new /etc/passwd && busybox chown 0:0 /etc/passwd && id -u"
    words = ["--quiet", "exec", "--contain", "--cleanenv", "--fakeroot", "--writable", hostile, "sh", "-c", script]
    done = sciexec(*words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    assert (hostile / "etc/passwd").read_text() == "me:x:5:5::/:/bin/sh\n"


@pytest.mark.parametrize("words", [["--fakeroot"], ["--pid"], ["--containall"], ["--fakeroot", "--pid"], ["--ipc", "--uts"]], ids=" ".join)
def test_an_image_file_beside_other_namespaces(sciexec: Command, base: Path, ext: Path, words: list[str], nothing_left: None) -> None:
    assert said(sciexec, *words, "-o", ext, base, "sh", "-c", CHANGES) == ""
    assert said(sciexec, *words, "-o", f"{ext}:ro", base, "sh", "-c", SEEN) == CHANGED
    assert said(sciexec, "-o", ext, base, "sh", "-c", SEEN) == CHANGED
    done = sciexec("exec", *words, "-o", ext, base, "sh", "-c", "exit 9")
    assert (done.returncode, done.stderr) == (9, "")


def test_the_ranks_of_a_node_write_to_one_image(sciexec_path: Path, base: Path, ext: Path, sciexec: Command, nothing_left: None) -> None:
    script = f"'{sciexec_path}' exec --share step -o '{ext}' '{base}' sh -c 'echo $0 > /opt/rank$0; sleep 0.3' $1"
    ranks = [
        subprocess.Popen(["sh", "-c", script, "sh", str(number)], env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"})
        for number in range(4)
    ]
    assert [rank.wait(60) for rank in ranks] == [0] * 4
    assert said(sciexec, "-o", f"{ext}:ro", base, "sh", "-c", "cat /opt/rank*") == "0\n1\n2\n3\n"


def test_a_file_system_that_cannot_be_written_over_is_named(sciexec_path: Path, base: Path, tmp_path: Path, need: Need) -> None:
    """An overlay on an overlay is one."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    script = """cd "$1" && mount -t overlay overlay merged -o lowerdir=lower,upperdir=upper,workdir=work,userxattr && mkdir merged/over &&
        exec "$2" exec -o merged/over "$3" true"""
    words = [need("unshare"), "-Urm", "sh", "-c", script, "sh", tmp_path, sciexec_path, base]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 255
    assert done.stderr.startswith(
        f"FATAL: writing to the overlay {tmp_path}/merged/over: its file system cannot be the upper one of an overlay\n"
    )


def test_the_page_on_overlays(base: Path, sciexec: Command, sciexec_path: Path, tmp_path: Path, need: Need, served: None) -> None:
    """Every command of docs/overlays.md works, in the order of the page; that of sshfs needs another host."""
    shutil.copy(base, tmp_path / "model.sif")
    (tmp_path / "layer/opt/layered").mkdir(parents=True)
    subprocess.run([need("mksquashfs"), tmp_path / "layer", tmp_path / "base.sqfs", "-quiet", "-all-root"], check=True, capture_output=True)
    page = (Path(__file__).resolve().parent.parent / "docs/overlays.md").read_text()
    lines = [line[4:] for line in page.splitlines() if line.startswith("    ") and "sshfs" not in line]
    assert len(lines) >= 15
    environ = {"PATH": f"{sciexec_path.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for line in lines:
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if "cat /opt/file" in line:
            assert done.stdout == "text\n", line
