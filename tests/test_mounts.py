"""Mount operations: what they say, their order, and that a path of a hostile image never leaves its root."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from namespace_fixtures import inside, without

from sciexec import kernel
from sciexec.errors import HostError
from sciexec.mounts import FEW, Bind, Dev, Edit, Operation, Root, Tmpfs, order, outermost
from sciexec.sources import Directory, Squash

OLD = (kernel.OPENAT2, kernel.MOUNT_SETATTR)
EVERY_KERNEL = pytest.mark.parametrize("missing", [(), OLD], ids=["this kernel", "without openat2"])


def contents(text: str) -> Callable[[bytes], bytes]:
    return lambda content: content + text.encode()


# --- as text ----------------------------------------------------------------------------------------------------------------


def test_every_operation_says_what_it_is() -> None:
    operations = [
        Bind("/proc", "/proc"),
        Bind("/data", "/mnt/d", read_only=True),
        Bind("/w", "/w", optional=True, unless_visible=True),
        Bind("/a\n", "/b\x1b"),
        Tmpfs("/tmp", mode=0o1777),
        Tmpfs("/s", size=4096),
        Dev(console="/dev/pts/3"),
        Edit("/etc/passwd", contents(""), "with uid 7"),
    ]
    assert [operation.describe() for operation in operations] == [
        "bind /proc /proc",
        "bind /data /mnt/d read_only",
        "bind /w /w optional unless_visible",
        "bind /a\\n /b\\x1b",
        "tmpfs /tmp mode=1777",
        "tmpfs /s mode=755 size=4096",
        "dev /dev null zero full random urandom tty pts shm console=/dev/pts/3",
        "edit /etc/passwd with uid 7",
    ]
    assert Squash(3, 4096, "a.sif", "/usr/bin/squashfuse_ll").describe() == "squashfs a.sif offset=4096 served by /usr/bin/squashfuse_ll"
    assert Directory("/images/a").describe() == "directory /images/a"


def test_order_puts_parents_first_and_lets_the_last_of_equals_win() -> None:
    operations: list[Operation] = [
        Bind("/1", "/a/b/c"),
        Bind("/2", "/z"),
        Bind("/3", "/a"),
        Bind("/4", "/a/b"),
        Tmpfs("/z"),
    ]
    assert [operation.describe() for operation in order(operations)] == [
        "tmpfs /z mode=755",
        "bind /3 /a",
        "bind /4 /a/b",
        "bind /1 /a/b/c",
    ]


def test_outermost_are_those_below_no_other() -> None:
    operations: list[Operation] = [Bind("/1", target) for target in ("/a", "/ab", "/a/b", "/c/d", "/c/d/e/f", "/c/e")]
    assert [operation.target for operation in outermost(operations)] == ["/a", "/ab", "/c/d", "/c/e"]


# --- for real ---------------------------------------------------------------------------------------------------------------


def mounted(tree: Path) -> Root:
    """A root as a run makes it from an unpacked image."""
    os.mkdir("image")
    Directory(str(tree)).mount("image")
    return Root("image", writable=False)


def carried_out(root: Root, *operations: Operation) -> None:
    planned = order(operations)
    for operation in outermost(planned):
        operation.prepare(root)
    for operation in planned:
        operation.execute(root)


def text(root: Root, path: str) -> str:
    fd = root.find(path)
    content = Path(f"/proc/self/fd/{fd}").read_text()
    os.close(fd)
    return content


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """/etc/{hosts,passwd}, /many/{0..99}, /usr/lib, lib -> usr/lib, and nothing else."""
    root = tmp_path / "tree"
    for name in ("etc", "many", "usr/lib"):
        (root / name).mkdir(parents=True)
    (root / "etc/hosts").write_text("image's")
    (root / "etc/passwd").write_text("root\n")
    (root / "lib").symlink_to("usr/lib")
    for number in range(100):
        (root / "many" / str(number)).write_text(str(number))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    (path / "file").write_text("host's")
    return path


@EVERY_KERNEL
def test_missing_mount_points_appear_and_everything_else_stays(tree: Path, data: Path, missing: tuple[int, ...]) -> None:
    before = sorted(str(path) for path in tree.rglob("*"))

    def act() -> None:
        root = mounted(tree)
        carried_out(
            root,
            Bind(str(data), "/new/deep/down"),
            Bind(str(data / "file"), "/many/file"),  # more than a few entries: an overlay
            Bind(str(data / "file"), "/etc/motd"),  # a few: bound back one by one
            Bind(str(data / "file"), "/etc/hosts"),
            Bind(str(data), "/lib/data"),  # through a link
        )
        for path in ("/new/deep/down/file", "/many/file", "/etc/motd", "/etc/hosts", "/usr/lib/data/file"):
            assert text(root, path) == "host's", path
        assert text(root, "/etc/passwd") == "root\n"
        assert [text(root, f"/many/{number}") for number in range(100)] == [str(number) for number in range(100)]
        assert sorted(os.listdir(f"/proc/self/fd/{root.fd}")) == [
            "etc", "lib", "many", "new", "usr",
        ]  # fmt: skip
        assert os.readlink("lib", dir_fd=root.fd) == "usr/lib"

    inside(act, missing=missing)
    assert sorted(str(path) for path in tree.rglob("*")) == before
    assert FEW < 100


def test_a_directory_can_grow_after_something_is_mounted_below_it(tree: Path, data: Path) -> None:
    def act() -> None:
        root = mounted(tree)
        for target in ("/many/7", "/etc/hosts", "/many/new", "/new", "/etc/new"):
            Bind(str(data / "file"), target).execute(root)
        for target in ("/many/7", "/etc/hosts", "/many/new", "/new", "/etc/new"):
            assert text(root, target) == "host's", target
        assert text(root, "/many/8") == "8"

    inside(act)


@EVERY_KERNEL
def test_nothing_is_made_in_a_directory_of_the_host_to_which_a_link_of_the_image_leads(
    tree: Path, data: Path, missing: tuple[int, ...]
) -> None:
    """It is made there only where the path itself says so, in a bind that can be written to."""
    (tree / "link").symlink_to("data")
    (tree / "data").mkdir()

    def act() -> None:
        root = mounted(tree)
        with pytest.raises(HostError, match="directory of the host and has no sub"):
            carried_out(root, Bind(str(data), "/data"), Bind(str(data / "file"), "/link/sub/file"))

    inside(act, missing=missing)
    assert os.listdir(data) == ["file"]


@EVERY_KERNEL
def test_what_is_bound_into_a_bind_gets_its_place_there(tree: Path, data: Path, missing: tuple[int, ...]) -> None:
    def act() -> None:
        root = mounted(tree)
        carried_out(root, Bind(str(data), "/data"), Bind(str(data / "file"), "/data/sub/file"))
        assert text(root, "/data/sub/file") == "host's"

    inside(act, missing=missing)
    assert (data / "sub/file").read_bytes() == b""


@EVERY_KERNEL
def test_what_is_bound_into_a_read_only_bind_gets_its_place_around_it(tree: Path, data: Path, missing: tuple[int, ...]) -> None:
    def act() -> None:
        root = mounted(tree)
        carried_out(root, Bind(str(data), "/data", read_only=True), Bind(str(data / "file"), "/data/sub/deep/file"))
        assert text(root, "/data/sub/deep/file") == text(root, "/data/file") == "host's"
        with pytest.raises(OSError, match="Read-only"):
            os.open("file", os.O_RDWR, dir_fd=root.find("/data"))

    inside(act, missing=missing)
    assert os.listdir(data) == ["file"]


LINKS = {
    "absolute": "/outside/target",
    "relative": "../../../../../../../outside/target",
    "root": "/",
    "dangling": "/no/where",
    "chain": "absolute",
}


@EVERY_KERNEL
@pytest.mark.parametrize("name", LINKS)
def test_links_of_the_image_lead_nowhere_but_into_the_image(tmp_path: Path, data: Path, name: str, missing: tuple[int, ...]) -> None:
    """The image's link names a directory that exists on the host; what is mounted there has to appear in the image."""
    outside = tmp_path / "host"
    outside.mkdir()
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    for link, target in LINKS.items():
        (tree / "etc" / link).symlink_to(target.replace("/outside", str(outside)))

    def act() -> None:
        root = mounted(tree)
        carried_out(root, Bind(str(data), f"/etc/{name}/here"))
        assert text(root, f"/etc/{name}/here/file") == "host's"
        assert os.listdir(outside) == []

    inside(act, missing=missing)
    assert os.listdir(outside) == []


def test_a_path_is_found_while_the_host_is_busy(tree: Path, data: Path) -> None:
    """The kernel gives up on ".." when anything was renamed or mounted meanwhile, and leaves it to the caller to try again."""

    def act() -> None:
        root = mounted(tree)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.seccomp(without((kernel.OPENAT2,), errno.EAGAIN))
        carried_out(root, Bind(str(data), "/usr/lib/../share"))
        assert text(root, "/usr/share/file") == "host's"

    inside(act)


@EVERY_KERNEL
def test_a_loop_of_links_is_an_error(tmp_path: Path, data: Path, missing: tuple[int, ...]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").symlink_to("b")
    (tree / "b").symlink_to("a")

    def act() -> None:
        root = mounted(tree)
        with pytest.raises(OSError, match="Too many levels"):
            Bind(str(data), "/a/x").execute(root)

    inside(act, missing=missing)


@EVERY_KERNEL
def test_a_read_only_bind_is_so_to_its_depth(tree: Path, data: Path, missing: tuple[int, ...]) -> None:
    (data / "below").mkdir()

    def act() -> None:
        kernel.mount("tmpfs", str(data / "below"), "tmpfs", kernel.MS_NOSUID | kernel.MS_NOEXEC)
        root = mounted(tree)
        carried_out(root, Bind(str(data), "/ro", read_only=True), Bind(str(data), "/rw"))
        rw, ro = root.find("/rw/below"), root.find("/ro/below")
        os.mkdir("made", dir_fd=rw)
        if not missing:  # before mount_setattr there was no way to reach the mounts below
            with pytest.raises(OSError, match="Read-only"):
                os.mkdir("x", dir_fd=ro)
        assert os.fstatvfs(ro).f_flag & os.ST_NOSUID and os.fstatvfs(ro).f_flag & os.ST_NOEXEC
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir("x", dir_fd=root.find("/ro"))

    inside(act, missing=missing)


def test_two_optional_binds_that_the_image_leads_to_one_place_do_not_hide_each_other(tmp_path: Path, data: Path) -> None:
    """Images in which /var/tmp is a link to /tmp."""
    tree, other = tmp_path / "tree", tmp_path / "other"
    other.mkdir()
    (tree / "tmp").mkdir(parents=True)
    (tree / "var").mkdir()
    (tree / "var/tmp").symlink_to("../tmp")

    def act() -> None:
        root = mounted(tree)
        carried_out(root, Bind(str(data), "/tmp", optional=True), Bind(str(other), "/var/tmp", optional=True))
        assert text(root, "/tmp/file") == "host's"

    inside(act)


def test_edit_changes_what_is_seen_and_not_the_image(tree: Path) -> None:
    def act() -> None:
        root = mounted(tree)
        carried_out(root, Edit("/etc/passwd", contents("me\n"), "with me"), Bind("/proc/self/status", "/etc/motd"))
        assert text(root, "/etc/passwd") == "root\nme\n"

    inside(act)
    assert (tree / "etc/passwd").read_text() == "root\n"


@pytest.mark.parametrize("kind", ["fifo", "directory", "link to a FIFO"])
def test_edit_reads_regular_files_only(tree: Path, kind: str) -> None:
    passwd = tree / "etc/passwd"
    passwd.unlink()
    if kind == "directory":
        passwd.mkdir()
    else:
        os.mkfifo(tree / "etc/fifo")
        passwd.symlink_to("fifo") if "link" in kind else os.mkfifo(passwd)

    def act() -> None:
        carried_out(mounted(tree), Edit("/etc/passwd", contents("x"), ""))

    inside(act)


def test_tmpfs_takes_mount_points(tree: Path, data: Path) -> None:
    def act() -> None:
        root = mounted(tree)
        carried_out(root, Tmpfs("/home/me", mode=0o700), Bind(str(data), "/home/me/in/here"))
        assert text(root, "/home/me/in/here/file") == "host's"
        assert stat.S_IMODE(os.fstat(root.find("/home/me")).st_mode) == 0o700

    inside(act)


def test_dev_holds_what_programs_expect_and_no_more(tree: Path) -> None:
    def act() -> None:
        root = mounted(tree)
        carried_out(root, Bind("/proc", "/proc"), Dev())
        here = f"/proc/self/fd/{root.find('/dev')}"
        names = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero".split()
        assert sorted(os.listdir(here)) == names
        assert Path(f"{here}/zero").open("rb").read(3) == bytes(3)
        assert Path(f"{here}/null").write_text("gone") == 4
        for name in ("null", "zero", "full", "random", "urandom", "tty"):
            assert os.stat(f"{here}/{name}").st_rdev == os.stat(f"/dev/{name}").st_rdev
        assert stat.S_IMODE(os.stat(f"{here}/shm").st_mode) == 0o1777
        os.close(os.open(f"{here}/pts/ptmx", os.O_RDWR | os.O_NOCTTY))

    inside(act)
