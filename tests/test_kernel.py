"""The system calls: arguments arrive, results come back, errors keep errno and path."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from namespace_fixtures import inside

from sciexec import kernel


def status(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise AssertionError(name)


def test_an_error_keeps_errno_text_and_path() -> None:
    with pytest.raises(OSError) as caught:
        kernel.umount2("/no/such/place", 0)
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
    assert caught.value.filename == "/no/such/place"
    with pytest.raises(FileNotFoundError):
        kernel.openat2(kernel.AT_FDCWD, "/no/such/place", os.O_RDONLY, 0)


def test_minus_one_of_an_int_function_is_an_error() -> None:
    """prctl returns a C int: read as a long, its -1 would be 4294967295, and a success."""
    with pytest.raises(OSError) as caught:
        kernel.prctl(kernel.PR_CAPBSET_DROP, 1000)
    assert caught.value.errno in (errno.EINVAL, errno.EPERM)


def test_openat2_stays_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hosts").write_text("inside")
    (tmp_path / "up").symlink_to("../../../../etc/hosts")
    (tmp_path / "absolute").symlink_to("/etc/hosts")
    root = os.open(tmp_path, os.O_PATH)
    for name in ("up", "absolute", "/etc/hosts", "etc/../../../etc/hosts"):
        fd = kernel.openat2(root, name, os.O_RDONLY, kernel.RESOLVE_IN_ROOT)
        assert not os.get_inheritable(fd)
        assert os.read(fd, 100) == b"inside"
        os.close(fd)
    os.close(root)


def test_mount_id_tells_mounts_apart(tmp_path: Path) -> None:
    def act() -> None:
        os.mkdir("a")
        before = kernel.mount_id(os.open("a", os.O_PATH))
        kernel.mount("tmpfs", "a", "tmpfs", kernel.MS_NOSUID, "size=4096")
        after = os.open("a", os.O_PATH)
        assert kernel.mount_id(after) != before
        assert os.fstatvfs(after).f_flag & os.ST_NOSUID
        assert kernel.mount_id(os.open("a/..", os.O_PATH)) == before
        kernel.mount_setattr(after, 0, kernel.MOUNT_ATTR_RDONLY)
        with pytest.raises(OSError) as caught:
            os.mkdir("a/b")
        assert caught.value.errno == errno.EROFS
        assert os.fstatvfs(after).f_flag & os.ST_NOSUID
        kernel.umount2("a", kernel.MNT_DETACH)
        os.mkdir("a/b")

    inside(act)


def test_capabilities_are_gone() -> None:
    def act() -> None:
        assert int(status("CapBnd"), 16) and int(status("CapEff"), 16)
        kernel.drop_bounding_set(0)
        kernel.capset(0)
        assert [int(status(f"Cap{name}"), 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [0] * 5

    inside(act)


def test_landlock_forbids_writing(tmp_path: Path) -> None:
    def act() -> None:
        (tmp_path / "before").write_text("")
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        try:
            kernel.landlock_restrict_writes()
        except OSError as error:
            assert error.errno in (errno.ENOSYS, errno.EOPNOTSUPP)
            os._exit(0)
        assert (tmp_path / "before").read_text() == ""
        for attempt in (lambda: (tmp_path / "before").write_text("x"), (tmp_path / "new").mkdir, (tmp_path / "before").unlink):
            with pytest.raises(PermissionError):
                attempt()

    inside(act)


def test_signal_default() -> None:
    def act() -> None:
        assert int(status("SigIgn"), 16) & 1 << 12  # SIGPIPE, ignored by every Python
        kernel.signal_default(13)
        assert not int(status("SigIgn"), 16) & 1 << 12

    inside(act)


@pytest.mark.parametrize("call", ["namespace", "mount"])
def test_an_errno_that_says_nothing_gets_a_cause(call: str) -> None:
    cause, hint = kernel.why(OSError(errno.ENOSPC, "No space left on device"), call)
    assert "limit" in cause or "too many mounts" in cause
    assert "max" in hint
    assert kernel.why(OSError(errno.ELOOP, "Too many levels"), call) == ("Too many levels", "")
    assert "server" in kernel.why(OSError(errno.ENOTCONN, "Transport endpoint is not connected"), call)[0]


def test_the_limit_on_user_namespaces_is_named() -> None:
    def act() -> None:
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        with pytest.raises(OSError) as caught:
            kernel.unshare(kernel.CLONE_NEWUSER)
        cause, hint = kernel.why(caught.value, "namespace")
        assert "user namespaces" in cause
        assert "user.max_user_namespaces is 0" in hint

    inside(act)
