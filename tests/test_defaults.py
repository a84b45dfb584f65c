"""What every container has of its host, and what takes it away or replaces it."""

from __future__ import annotations

import os
import pty
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from namespace_fixtures import Command, Need, inside

from sciexec import host, kernel, options, run
from sciexec.image import open_image
from sciexec.mounts import Bind, Dev, Root
from sciexec.sources import Directory

pytest_plugins = ["run_fixtures"]

Plan = Callable[..., "list[str]"]


@pytest.fixture
def plan(images: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """plan("-c", "-W", ...) -> the mounts and the working directory of such a run, one line each, of a caller in /here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "console", lambda: "")

    def made(*words: str, environ: dict[str, str] | None = None) -> list[str]:
        chosen = options.parse("sciexec", ["exec", *words, str(images["directory"]), "true"], environ or {})
        assert chosen is not None
        image = open_image(chosen.image)
        caller = host.Host()
        caller.home, caller.cwd, caller.uid, caller.groups = "/home/me", "/here", 7, [8]
        lines = run.plan(chosen, image, caller).describe().splitlines()
        os.close(image.fd)
        first = lines.index("read-only") + 1
        (last,) = (number for number, line in enumerate(lines) if line.startswith("cwd "))
        return [line for line in lines[first : last + 1] if not line.startswith("user namespace")]

    return made


# --- as a plan ----------------------------------------------------------------------------------------------------------------

DEFAULT = """
bind /proc /proc
bind /sys /sys
bind /dev /dev
bind /tmp /tmp optional
bind /here /here optional unless_visible
bind /etc/hosts /etc/hosts optional
bind /etc/localtime /etc/localtime optional
bind /etc/resolv.conf /etc/resolv.conf optional
edit /etc/passwd with uid 7
edit /etc/group with gid 8
bind /var/tmp /var/tmp optional
bind /home/me /home/me optional
cwd /here or /home/me or /
""".strip().splitlines()

CONTAINED = """
bind /proc /proc
bind /sys /sys
dev /dev null zero full random urandom tty pts shm
tmpfs /tmp mode=1777
bind /etc/hosts /etc/hosts optional
bind /etc/localtime /etc/localtime optional
bind /etc/resolv.conf /etc/resolv.conf optional
edit /etc/passwd with uid 7
edit /etc/group with gid 8
tmpfs /var/tmp mode=1777
tmpfs /home/me mode=700
cwd /home/me or /
""".strip().splitlines()

# the words of a command line; what of the lines above is not in the plan; what is in it beyond them
LESS = [
    (["--no-mount", "proc"], ["bind /proc /proc"], []),
    (["--no-mount", "sys,dev"], ["bind /sys /sys", "bind /dev /dev"], []),
    (["--no-mount", "devpts"], [], []),
    (["--no-mount", "hostfs"], [], []),
    (["--no-mount", "tmp"], ["bind /tmp /tmp optional", "bind /var/tmp /var/tmp optional"], []),
    (["--no-mount", "home"], ["bind /home/me /home/me optional"], []),
    (["--no-home"], ["bind /home/me /home/me optional"], []),
    (["--no-mount", "cwd"], ["bind /here /here optional unless_visible"], []),
    (["--no-mount", "bind-paths"], ["bind /etc/hosts /etc/hosts optional", "bind /etc/localtime /etc/localtime optional"], []),
    (["--no-mount", "/etc/hosts", "--no-mount=/etc/resolv.conf/"],
     ["bind /etc/hosts /etc/hosts optional", "bind /etc/resolv.conf /etc/resolv.conf optional"], []),
    (["--no-mount", "/here,/etc/passwd"], ["bind /here /here optional unless_visible", "edit /etc/passwd with uid 7"], []),
    (["--no-mount", "tmp", "-B", "/usr:/tmp"], ["bind /tmp /tmp optional", "bind /var/tmp /var/tmp optional"], ["bind /usr /tmp"]),
    (["-B", "/usr:/tmp"], ["bind /tmp /tmp optional"], ["bind /usr /tmp"]),
    (["--dns", "10.0.0.1,::1"], ["bind /etc/resolv.conf /etc/resolv.conf optional"], ["file /etc/resolv.conf nameserver 10.0.0.1 ::1"]),
    (["-S", "/a/b,/c"], [], ["tmpfs /a/b mode=750", "tmpfs /c mode=750"]),
    (["-S", "/tmp"], ["bind /tmp /tmp optional"], ["tmpfs /tmp mode=750"]),
    (["-W", "."], [], []),
    (["-W", "/none"], [], []),  # nothing is kept there
    (["-W", "/w/", "-S", "/a/b"], [], ["bind /w/scratch/a/b /a/b made=750"]),
    (["--home", "/usr"], ["bind /home/me /home/me optional", "cwd /here or /home/me or /"], ["bind /usr /usr", "cwd /here or /usr or /"]),
    (["--home", "/usr:/h"], ["bind /home/me /home/me optional", "cwd /here or /home/me or /"], ["bind /usr /h", "cwd /here or /h or /"]),
    (["--home", "/usr:/h", "--no-home"], ["bind /home/me /home/me optional", "cwd /here or /home/me or /"], ["cwd /here or /h or /"]),
    (["--home", "/usr:/here"],
     ["bind /home/me /home/me optional", "bind /here /here optional unless_visible", "cwd /here or /home/me or /"],
     ["bind /usr /here", "cwd /here or /here or /"]),
    (["-B", "/usr:/here"], ["bind /here /here optional unless_visible"], ["bind /usr /here"]),
    (["--pwd", "/x"], ["cwd /here or /home/me or /"], ["cwd /x"]),
    (["--cwd", "x"], ["cwd /here or /home/me or /"], ["cwd x"]),
]  # fmt: skip

CONTAINED_LESS = [
    (["--no-mount", "tmp"], ["tmpfs /tmp mode=1777", "tmpfs /var/tmp mode=1777"], []),
    (["--no-mount", "home"], ["tmpfs /home/me mode=700"], []),
    (["--no-home"], ["tmpfs /home/me mode=700"], []),
    (["--no-mount", "cwd"], [], []),
    (["--no-mount", "dev"], ["dev /dev null zero full random urandom tty pts shm"], []),
    (["--no-mount", "devpts"], ["dev /dev null zero full random urandom tty pts shm"], ["dev /dev null zero full random urandom tty shm"]),
    (["--no-mount", "tmp", "-B", "/usr:/tmp"], ["tmpfs /tmp mode=1777", "tmpfs /var/tmp mode=1777"], ["bind /usr /tmp"]),
    (["-W", "/usr"], ["tmpfs /tmp mode=1777", "tmpfs /var/tmp mode=1777", "tmpfs /home/me mode=700"],
     ["bind /usr/tmp /tmp optional made=1777", "bind /usr/var_tmp /var/tmp optional made=1777", "bind /usr/home /home/me made=700"]),
    (["-W", "/usr", "--no-mount", "tmp,home", "-S", "/tmp"],
     ["tmpfs /tmp mode=1777", "tmpfs /var/tmp mode=1777", "tmpfs /home/me mode=700"],
     ["bind /usr/scratch/tmp /tmp made=750"]),
    (["-W", "/usr", "--home", "/usr:/h"],
     ["tmpfs /tmp mode=1777", "tmpfs /var/tmp mode=1777", "tmpfs /home/me mode=700", "cwd /home/me or /"],
     ["bind /usr/tmp /tmp optional made=1777", "bind /usr/var_tmp /var/tmp optional made=1777", "bind /usr /h", "cwd /h or /"]),
    (["-S", "/tmp,/x"], ["tmpfs /tmp mode=1777"], ["tmpfs /tmp mode=750", "tmpfs /x mode=750"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "absent", "present"), LESS)
def test_what_options_change(plan: Plan, words: list[str], absent: list[str], present: list[str]) -> None:
    assert sorted(plan(*words)) == sorted([*(line for line in DEFAULT if line not in absent), *present])
    assert set(absent) <= set(DEFAULT)


@pytest.mark.parametrize(("words", "absent", "present"), CONTAINED_LESS)
def test_what_options_change_with_contain(plan: Plan, words: list[str], absent: list[str], present: list[str]) -> None:
    assert sorted(plan("-c", *words)) == sorted([*(line for line in CONTAINED if line not in absent), *present])
    assert set(absent) <= set(CONTAINED)


def test_the_defaults(plan: Plan) -> None:
    assert plan() == DEFAULT
    assert plan("--contain") == CONTAINED
    environ = {"APPTAINER_NO_MOUNT": "tmp,cwd", "SINGULARITY_WORKDIR": "/usr", "SINGULARITY_SCRATCH": "/s", "APPTAINER_CONTAIN": "1"}
    assert plan(environ=environ) == plan("-c", "--no-mount", "tmp", "--no-mount", "cwd", "-W", "/usr", "-S", "/s")


# --- for real ---------------------------------------------------------------------------------------------------------------


def targets(text: str) -> set[str]:
    return {line.split()[4] for line in text.splitlines()}


def test_no_mount_leaves_the_images_own(sciexec: Command, image: Path, tmp_path: Path) -> None:
    """The line of Galaxy; and one that takes away all there is."""
    (tmp_path / "t").mkdir()
    words = ["--contain", "--cleanenv", "--no-mount", "tmp", "-B", f"{tmp_path}/t:/tmp", "--home", f"{tmp_path}:{tmp_path}"]
    done = sciexec("-s", "exec", *words, image, "sh", "-c", "touch /tmp/made; ls -A /var/tmp; touch /var/tmp/made")
    assert done.stdout == "" and "/var/tmp/made: Read-only file system" in done.stderr.replace("'", "")
    assert (tmp_path / "t/made").exists()

    everything = "proc,sys,dev,devpts,home,tmp,hostfs,cwd,bind-paths,/etc/resolv.conf,/etc/passwd,/etc/group"
    done = sciexec("exec", "--no-mount", everything, "-B", "/proc:/srv", image, "sh", "-c", "cat /srv/self/mountinfo; pwd >&2")
    assert (done.returncode, done.stderr) == (0, "/\n")
    assert {"/" + target.split("/")[1] for target in targets(done.stdout)} == {"/", "/srv"}


def test_the_names_of_no_mount(sciexec: Command, images: dict[str, Path]) -> None:
    done = sciexec("exec", "--no-mount", "temp", images["directory"], "true")
    assert done.returncode == 1
    assert done.stderr.startswith("FATAL: --no-mount temp: no such mount\n       proc, sys, dev, ")


def test_workdir_keeps_what_contain_forgets(sciexec: Command, image: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    words = ["--contain", "--workdir", "work", "--scratch", "/s,/deep/er", image, "sh", "-c"]
    script = "for d in /tmp /var/tmp ~ /s /deep/er; do echo $d > $d/made; done; pwd"
    done = sciexec("exec", *words, script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{host.Host().home}\n", "")
    found = {str(path.relative_to(work)): stat.S_IMODE(path.stat().st_mode) for path in work.rglob("*") if path.is_dir()}
    scratch = dict.fromkeys(("scratch", "scratch/s", "scratch/deep", "scratch/deep/er"), 0o750)
    assert found == {"tmp": 0o1777, "var_tmp": 0o1777, "home": 0o700, **scratch}
    assert (work / "scratch/deep/er/made").read_text() == "/deep/er\n"
    done = sciexec("exec", *words, "cat /tmp/made /var/tmp/made ~/made /s/made", cwd=tmp_path)
    assert done.stdout == f"/tmp\n/var/tmp\n{host.Host().home}\n/s\n"


@pytest.mark.parametrize(("made", "words", "cause"), [
    (None, ["-c"], "--workdir {w}: no such directory on the host"),
    ("file", ["-c"], "--workdir {w}: no such directory on the host"),
    ("link", ["-c"], "making {w}/tmp: Permission denied"),
    ("link", ["-S", "/s"], "making {w}/scratch/s: Permission denied"),
])  # fmt: skip
def test_a_workdir_in_which_nothing_can_be_kept(
    sciexec: Command, images: dict[str, Path], tmp_path: Path, made: str | None, words: list[str], cause: str
) -> None:
    work = tmp_path / "work"
    if made == "file":
        work.write_text("")
    elif made:
        work.symlink_to("/usr")
    done = sciexec("exec", *words, "-W", work, images["directory"], "true")
    assert done.returncode == 255
    assert done.stderr.splitlines()[0] == "FATAL: " + cause.format(w=work)


def test_a_workdir_without_contain_changes_nothing(sciexec: Command, image: Path, tmp_path: Path) -> None:
    """As Boutiques calls it."""
    (tmp_path / "here").mkdir()
    done = sciexec("exec", "--cleanenv", "-B", f"{tmp_path}:{tmp_path}", "-W", f"{tmp_path}/here", image, "pwd", cwd=tmp_path / "here")
    assert (done.stdout, done.stderr) == (f"{tmp_path}/here\n", "")
    assert list((tmp_path / "here").iterdir()) == []


def test_scratch_is_empty_writable_and_forgotten(sciexec: Command, image: Path, tmp_path: Path) -> None:
    """As HTCondor calls it, and without a workdir."""
    (tmp_path / "job").mkdir()
    (tmp_path / "work").mkdir()
    words = ["-S", "/tmp", "-S", "/var/tmp", "-W", tmp_path / "work", "--pwd", tmp_path / "job", "-B", tmp_path / "job", "--no-home"]
    done = sciexec("-s", "exec", *words, "--contain", "--cleanenv", image, "sh", "-c", "pwd; ls -A /var/tmp; touch /tmp/made made")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/job\n")
    assert (tmp_path / "work/scratch/tmp/made").exists() and (tmp_path / "job/made").exists()
    for _ in range(2):
        done = sciexec("exec", "-S", "/new/place", image, "sh", "-c", "ls -A /new/place; touch /new/place/made && stat -f -c %T /new/place")
        assert (done.returncode, done.stdout, done.stderr) == (0, "tmpfs\n", "")


def test_dns(sciexec: Command, image: Path, hostile: Path) -> None:
    text = "nameserver 192.0.2.1\nnameserver 2001:db8::1\nnameserver fe80::1%eth0\n"
    words = ["exec", "--dns", "192.0.2.1,2001:db8::1", "--dns=192.0.2.1,2001:db8::1,fe80::1%eth0"]
    assert sciexec(*words, image, "cat", "/etc/resolv.conf").stdout == text
    (hostile / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    assert sciexec(*words, hostile, "cat", "/etc/resolv.conf").stdout == text
    assert not (hostile / "run/systemd").exists()
    for wrong in ("localhost", "192.0.2", "192.0.2.1;reboot", "1.2.3.4%eth0", "::g"):
        done = sciexec("exec", "--dns", wrong, image, "true")
        assert (done.returncode, done.stderr) == (1, f"FATAL: --dns {wrong}: not an address of IPv4 or IPv6\n")


HOMES = [
    (["--home", "{t}/h"], "{cwd} {t}/h {t}/h"),
    (["-H{t}/h:/x/y"], "{cwd} /x/y /x/y"),
    (["--home=h:/x"], "{cwd} /x /x"),
    (["-c", "--home", "{t}/h"], "{t}/h {t}/h {t}/h"),
    (["-c", "-H", "{t}/h:/x/y"], "/x/y /x/y /x/y"),
    (["--no-home", "-H", "{t}/h:/x/y"], "{cwd} /x/y none"),
    (["--no-mount", "home", "-H", "{t}/h:/x/y"], "{cwd} /x/y none"),
    (["--no-mount", "cwd,tmp", "-H", "{t}/h:/x/y"], "/x/y /x/y /x/y"),
    (["--no-mount", "cwd,tmp,home", "-H", "{t}/h:/x/y"], "/ /x/y none"),
    (["--pwd", "/usr", "-H", "{t}/h:/x/y"], "/usr /x/y /x/y"),
    (["-c", "--pwd", "usr/lib", "-H", "{t}/h:/x/y"], "/usr/lib /x/y /x/y"),
    (["-c", "--cwd", "/x/y/sub", "-H", "{t}/h:/x/y"], "/x/y/sub /x/y /x/y"),
]


@pytest.mark.parametrize(("words", "expected"), HOMES)
def test_homes(sciexec: Command, image: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    """Where the payload starts, its HOME, and where the home directory is, by the caller's entry in /etc/passwd too."""
    (tmp_path / "h/sub").mkdir(parents=True)
    (tmp_path / "h/mine").write_text("")
    script = 'echo $(pwd) $HOME $(if [ -e ~/mine ]; then echo ~; else echo none; fi); grep -c ":$HOME:" /etc/passwd'
    done = sciexec("exec", *(word.format(t=tmp_path) for word in words), image, "sh", "-c", script, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected.format(t=tmp_path, cwd=tmp_path)}\n1\n", "")


def test_a_home_that_the_host_lacks(sciexec_path: Path, images: dict[str, Path], need: Need, tmp_path: Path) -> None:
    """Its variable is set all the same, and the payload starts where the caller stands, or in /."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "passwd").write_text("root:x:0:0::/nowhere/me:/bin/sh\n")  # who we are behind `unshare -r`
    script = f'mount --bind {tmp_path}/passwd /etc/passwd; "$@"; cd /var; rmdir {here}; exec "$@"'
    command = [need("unshare"), "-rm", "sh", "-c", script, "sh", sciexec_path, "exec", "--no-mount", "cwd", images["squashfs"]]
    done = subprocess.run([*map(str, command), "sh", "-c", "pwd; echo $HOME"], cwd=here, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] in (str(here), "/"), done.stderr
    assert (done.stdout.splitlines()[-1], done.returncode) == ("/nowhere/me", 0)


def test_passwd_and_group_only_where_the_image_has_them(sciexec: Command, hostile: Path) -> None:
    (hostile / "etc/group").unlink()
    assert sciexec("exec", hostile, "sh", "-c", f"ls /etc/group; grep -c :{os.getuid()}: /etc/passwd").stdout == "1\n"
    (hostile / "etc/passwd").unlink()
    assert sciexec("exec", hostile, "ls", "/etc/passwd").returncode != 0


@pytest.mark.parametrize("target", ["/run/resolver/resolv.conf", "../run/resolver/resolv.conf", "/run/none"])
def test_a_resolv_conf_that_is_a_link_into_run(
    sciexec_path: Path, images: dict[str, Path], hostile: Path, need: Need, target: str
) -> None:
    """On the host, with its link absolute, relative or dangling; and in the image too."""
    (hostile / "etc/resolv.conf").symlink_to("../run/resolver/resolv.conf")
    script = f"""
        mount -t tmpfs tmpfs /run && mkdir /run/resolver /run/etc && echo nameserver 192.0.2.9 > /run/resolver/resolv.conf
        cp /etc/passwd /etc/group /run/etc && ln -s {target} /run/etc/resolv.conf && mount --bind /run/etc /etc
        for image in {images["squashfs"]} {hostile}; do {sciexec_path} exec $image cat /etc/resolv.conf; done"""
    done = subprocess.run([need("unshare"), "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if target == "/run/none":
        assert "192.0.2.9" not in done.stdout and "FATAL" not in done.stderr
    else:
        assert (done.stdout, done.stderr) == ("nameserver 192.0.2.9\n" * 2, "")


# --- /dev -------------------------------------------------------------------------------------------------------------------

DEVICES = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero".split()


def test_the_small_dev(sciexec: Command, image: Path) -> None:
    assert sciexec("exec", "-c", image, "ls", "/dev").stdout.split() == DEVICES
    without = sciexec("exec", "-c", "--no-mount", "devpts", image, "ls", "/dev").stdout.split()
    assert without == [name for name in DEVICES if name not in ("pts", "ptmx")]
    script = "echo text > /dev/null; head -c3 /dev/zero | od -An -tx1; touch /dev/shm/made; stat -c %a /dev/shm; ls /dev/fd/ > /dev/stderr"
    done = sciexec("exec", "-c", image, "sh", "-c", script)
    assert done.stdout == " 00 00 00\n1777\n"
    assert done.stderr.split() == ["0", "1", "2", "3"]


def test_the_small_dev_has_the_callers_terminal(sciexec_path: Path, image: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sciexec_path, [str(sciexec_path), "exec", "-c", str(image), "sh", "-c", "tty; ls -A /dev/pts; echo yes > /dev/tty"])
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:
            break
        shown += piece
    os.waitpid(pid, 0)
    os.close(terminal)
    assert shown.split() == [b"/dev/console", b"ptmx", b"yes"]


def test_message_queues_where_they_are_our_own(rootfs: Path) -> None:
    def act() -> None:
        kernel.unshare(kernel.CLONE_NEWIPC)
        os.mkdir("image")
        Directory(str(rootfs)).mount("image")
        root = Root("image", writable=False)
        device = Dev(ipc=True)
        assert device.describe() == "dev /dev null zero full random urandom tty pts shm mqueue"
        Bind("/proc", "/proc").execute(root)
        device.execute(root)
        queues = os.stat("mqueue", dir_fd=root.find("/dev"))
        assert stat.S_IMODE(queues.st_mode) == 0o1777
        assert queues.st_dev != os.fstat(root.find("/dev")).st_dev

    inside(act)


def test_what_is_mounted_by_default(sciexec: Command, image: Path, tmp_path: Path) -> None:
    done = sciexec("exec", image, "cat", "/proc/self/mountinfo", cwd=tmp_path)
    expected = {"/", "/proc", "/sys", "/dev", "/etc/hosts", "/etc/passwd", "/etc/group", "/tmp", "/var/tmp", host.Host().home}
    assert expected <= targets(done.stdout) | ({"/etc/hosts"} - {path for path in ("/etc/hosts",) if os.path.exists(path)})
    allowed = ("/proc/", "/sys/", "/dev/", "/etc", "/var", "/home", "/tmp/", "/.singularity.d", "/run", os.path.dirname(host.Host().home))
    assert all(target in expected or target.startswith(allowed) for target in targets(done.stdout))
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
