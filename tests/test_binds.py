"""Binds, and images whose links lead astray: every mount lands inside, and nothing of the host is touched."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from namespace_fixtures import OLD_KERNEL, Command, Make, Need

from sciexec import host, options, run
from sciexec.image import open_image

pytest_plugins = ["run_fixtures"]


# --- as they are written ------------------------------------------------------------------------------------------------------

ODD = 'a,b: "c"'  # the name of a file with "odd" in it
# command line, variables, a path inside and what it has to be; {d} is the directory, below the current one, that is bound
FORMS: list[tuple[list[str], dict[str, str], str, str]] = [
    (["-B{d}"], {}, "{d}/file", "rw host's"),
    (["-B={d}:/x"], {}, "/x/file", "rw host's"),
    (["-eB{d}:/x"], {}, "/x/file", "rw host's"),
    (["-B", "{d}:/x:rw"], {}, "/x/file", "rw host's"),
    (["--bind={d}:/x:ro"], {}, "/x/file", "ro host's"),
    (["--bind", "{d}:/x:ro,"], {}, "/x/file", "ro host's"),
    (["--bind", "{d}::ro"], {}, "{d}/file", "ro host's"),
    (["--bind", "{d}:"], {}, "{d}/file", "rw host's"),
    (["--bind", ",{d}:/x,,{d}/below:/y,"], {}, "/x/file", "rw host's"),
    (["--bind", "{d}/below:/y:ro,{d}:/x"], {}, "/x/file", "rw host's"),
    (["--bind", "{d}/below:/y,{d}:/x:ro"], {}, "/x/file", "ro host's"),
    (["--bind", ","], {}, "/etc/hostname", "none"),
    (["--bind", "data:/x"], {}, "/x/file", "rw host's"),
    (["--bind", "data/file:/x/y/z"], {}, "/x/y/z", "rw host's"),
    (["--bind", "./data/below/../file:/x"], {}, "/x", "rw host's"),
    (["--bind", "data/link/../file:/x"], {}, "/x", "rw host's"),  # the kernel's "..", behind the link, which leads to data/below
    (["--bind", "{d}/climb:/x"], {}, "/x", "rw host's"),  # a link up to the host's root and down again
    (["--bind", "{d}:/x/../y"], {}, "/y/file", "rw host's"),
    (["--bind", "{d}://x//z/"], {}, "/x/z/file", "rw host's"),
    (["--bind", "{d}:/x", "--bind", "{d}:/x"], {}, "/x/file", "rw host's"),
    (["--bind", r"{d}/a\,b\: %c%:/x y"], {}, "/x y", "rw odd"),
    (["--bind", r"{d}/file:/x\:y\,z"], {}, "/x:y,z", "rw host's"),
    (["--mount", "type=bind,src={d},dst=/x"], {}, "/x/file", "rw host's"),
    (["--mount=type=bind,source={d},destination=/x,readonly"], {}, "/x/file", "ro host's"),
    (["--mount=source={d},target=/x,ro=true"], {}, "/x/file", "ro host's"),
    (["--mount=source={d},target=/x,ro=false"], {}, "/x/file", "rw host's"),
    (["--mount", "type=bind,src=data/file,dst=/x,"], {}, "/x", "rw host's"),
    (["--mount", 'type=bind,"src={d}/a,b: %%c%%","dst=/lib/in, put.txt",readonly'], {}, "/lib/in, put.txt", "ro odd"),
    (["--mount", "src={d},dst=/x\nsrc={d},dst=/y,ro\n"], {}, "/y/file", "ro host's"),
    ([], {"SINGULARITY_BIND": "{d}:/x:ro"}, "/x/file", "ro host's"),
    ([], {"APPTAINER_BINDPATH": "{d}:/x,{d}/below"}, "/x/file", "rw host's"),
    ([], {"SCIEXEC_MOUNT": "src={d},dst=/x\r\n\nsrc={d},dst=/y,ro"}, "/y/file", "ro host's"),
    ([], {"APPTAINER_MOUNT": 'src={d},"dst=/two\nlines"'}, "/two\nlines/file", "rw host's"),
    (["-B", "{d}:/x"], {"APPTAINER_BIND": "{d}/below:/x/below:ro"}, "/x/file", "rw host's"),
    # of several at one place the first counts, --bind before --mount, the command line before a variable
    (["-B", "{d}:/x", "-B", "{d}/below:/x"], {}, "/x/file", "rw host's"),
    (["-B", "{d}/below:/x", "-B", "{d}:/x"], {}, "/x/file", "none"),
    (["--mount", "src={d}/below,dst=/x", "-B", "{d}:/x"], {}, "/x/file", "rw host's"),
    (["-B", "{d}:/x"], {"APPTAINER_BIND": "{d}/below:/x"}, "/x/file", "rw host's"),
]


@pytest.mark.parametrize(("words", "variables", "path", "expected"), FORMS)
def test_forms(
    sciexec: Command, images: dict[str, Path], data: Path, words: list[str], variables: dict[str, str], path: str, expected: str
) -> None:
    (data / ODD).write_text("odd\n")
    (data / "link").symlink_to("below")
    (data / "climb").symlink_to("../" * 40 + f"{data}/file"[1:])

    def filled(text: str) -> str:
        return text.replace("{d}", str(data)).replace("%%", '""').replace("%", '"')

    environ = {name: filled(value) for name, value in variables.items()}
    script = 'if [ ! -e "$1" ]; then echo none; else if [ -w "$1" ]; then echo -n "rw "; else echo -n "ro "; fi; cat "$1"; fi'
    done = sciexec(
        "exec", *map(filled, words), images["directory"], "sh", "-c", script, "sh", filled(path), env=environ, cwd=data.parent
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{expected}\n")


SENSELESS = [
    (["--mount", "type=tmpfs,dst=/x"], "its type must be bind"),
    (["--mount", "type=bind,src=/etc"], "it needs src=PATH and dst=/PATH"),
    (["--mount", "type=bind,src=/etc,dst=x"], "it needs src=PATH and dst=/PATH"),
    (["--mount", "src=/etc,dst=/x,size=3"], "size is no key of a bind mount"),
    (["--mount", 'src=/etc,"dst=/x'], "a quote is not closed"),
    (["--bind", "/etc:x"], "the path inside must begin with a slash"),
    (["--bind", "/etc:/x:no"], "no is neither ro, rw"),
    (["--bind", "/etc:/x/.."], "the root of the image cannot be covered"),
    (["--mount", "src=/etc,dst=/"], "the root of the image cannot be covered"),
    (["--scratch", "//"], "the root of the image cannot be covered"),
    (["--data", "/etc:/"], "the root of the image cannot be covered"),
]


@pytest.mark.parametrize(("words", "message"), SENSELESS)
def test_what_makes_no_sense_is_a_usage_error(sciexec: Command, images: dict[str, Path], words: list[str], message: str) -> None:
    done = sciexec("exec", *words, images["directory"], "true")
    assert done.returncode == 1
    assert done.stderr.startswith(f"FATAL: {words[0]} ") and message in done.stderr


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


def test_binds_three_deep_in_any_order(sciexec: Command, image: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{name}\n")
    binds = [f"{tmp_path}/a:/x:ro", f"{tmp_path}/b:/x/y", f"{tmp_path}/c:/x/y/z:ro", f"{tmp_path}/c/name:/x/y/z/one"]
    for order in itertools.permutations(binds):
        script = "cat /x/name /x/y/name /x/y/z/name /x/y/z/one; touch /x/y/made; touch /x/made /x/y/z/made 2>/dev/null; ls /x"
        done = sciexec("exec", "-B", ",".join(order), image, "sh", "-c", script)
        assert (done.stdout, done.stderr) == ("a\nb\nc\nc\nname\ny\n", "")
    assert sorted(path.name for path in tmp_path.glob("a/*")) == ["name"]
    assert sorted(path.name for path in tmp_path.glob("b/*")) == ["made", "name", "z"]  # z: where c appears
    assert sorted(path.name for path in tmp_path.glob("c/*")) == ["name"]


def test_a_bind_into_a_bind_gets_its_place_as_apptainer_makes_it(sciexec: Command, image: Path, data: Path) -> None:
    """In the directory of the host, which the caller may write to; engines count on it for files below the directory of a job."""
    done = sciexec("exec", "-B", f"{data}:/a,{data}/file:/a/new/file,{data}/below:/a/dir", image, "cat", "/a/new/file")
    assert (done.returncode, done.stdout, done.stderr) == (0, "host's\n", "")
    assert (data / "new/file").read_bytes() == b"" and (data / "dir").is_dir()


def test_a_bind_into_home_gets_its_place(sciexec: Command, image: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    words = ["--home", f"{tmp_path}/me:/h", "-B", f"{data}/file:/h/in/file", "-B", f"{data}:/tmp/sciexec-{os.getpid()}/d"]
    try:
        done = sciexec("exec", *words, image, "sh", "-c", f"cat ~/in/file; ls /tmp/sciexec-{os.getpid()}/d")
    finally:
        shutil.rmtree(f"/tmp/sciexec-{os.getpid()}", ignore_errors=True)
    assert (done.stdout, done.stderr) == ("host's\nbelow\nfile\n", "")


def test_a_place_that_the_caller_may_not_make_is_an_error(sciexec: Command, image: Path, data: Path) -> None:
    for target, cause in (("/sys/sciexec/x", "sciexec"), ("/h/none/x", "Permission denied")):
        done = sciexec("exec", "-B", f"/usr:/h,{data}:{target}", image, "true")
        assert done.returncode == 255
        assert done.stderr.startswith("FATAL: mounting ") and target in done.stderr and cause in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    "words", [["-B", "{data}:/etc/passwd"], ["-B", "{data}/file:/usr"], ["-S", "/etc/passwd"], ["-B", "{data}:/etc/passwd:ro"]]
)
def test_a_file_covers_no_directory_and_no_directory_a_file(sciexec: Command, image: Path, data: Path, words: list[str]) -> None:
    done = sciexec("exec", *(word.format(data=data) for word in words), image, "true")
    there, comes, target = ("directory", "file", "/usr") if "file" in words[1] else ("file", "directory", "/etc/passwd")
    message = f"FATAL: mounting on {target}: the container has a {there} there, and a {comes} cannot cover it\n"
    assert (done.returncode, done.stderr) == (255, message)


def test_the_hosts_own_directories(sciexec: Command, images: dict[str, Path]) -> None:
    """All of it at a place of its own; and over those of the image, as Open OnDemand binds them."""
    done = sciexec("exec", "-B", "/:/host:ro", images["directory"], "sh", "-c", "ls /host/proc/self/status && cat /host/etc/os-release")
    assert (done.returncode, done.stderr) == (0, "") and "ID=" in done.stdout
    paths = ",".join(path for path in "/etc /media /mnt /opt /run /srv /usr /var".split() if os.path.isdir(path))
    done = sciexec("exec", images["sif"], "id", "-u", env={"SINGULARITY_BINDPATH": paths})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{os.getuid()}\n", "")


def test_writable_tmpfs_does_not_open_what_is_read_only(sciexec: Command, image: Path, data: Path) -> None:
    script = "touch /made && touch /a/made; cat /a/new"
    done = sciexec("exec", "--writable-tmpfs", "-B", f"{data}:/a:ro,{data}/file:/a/new", image, "sh", "-c", script)
    assert done.stdout == "host's\n"
    assert "/a/made: Read-only file system" in done.stderr.replace("'", "")
    assert sorted(os.listdir(data)) == ["below", "file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-B", "/no/such/source:/x"], "FATAL: binding /no/such/source: No such file or directory on the host\n"),
        (["-B", "{data}:/x,{data}/file/x:/y"], "FATAL: binding {data}/file/x: Not a directory on the host\n"),
        (["-B", "{data}:/x,/no/such:/x"], "FATAL: binding /no/such: No such file or directory on the host\n"),
        (["--mount", "src=/no/such,dst=/x"], "FATAL: binding /no/such: No such file or directory on the host\n"),
        (["--home", "/no/such:/x"], "FATAL: home /no/such: No such file or directory on the host\n"),
        (["-B", "/proc/1/root/x:/x"], "FATAL: binding /proc/1/root/x: Permission denied on the host\n"),
    ],
)
def test_a_missing_source_is_fatal_and_named(sciexec: Command, images: dict[str, Path], data: Path, words: list[str], message: str) -> None:
    done = sciexec("exec", *(word.format(data=data) for word in words), images["directory"], "true")
    assert (done.returncode, done.stderr) == (255, message.format(data=data))


def test_what_cannot_be_read_outside_cannot_be_read_inside(sciexec: Command, image: Path, tmp_path: Path) -> None:
    """Being root of a namespace on the way in gives no right over the host's files."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "file").write_text("secret\n")
    hidden.chmod(0)
    script = "ls /r; cat /s /h/file; ls /h; chmod 700 /h && cat /h/file"
    done = sciexec("exec", "-B", f"/root:/r,/etc/shadow:/s,{hidden}:/h", image, "sh", "-c", script)
    hidden.chmod(0o700)
    assert done.stdout == "secret\n"  # the caller's own directory, after they opened it
    assert done.stderr.count("Permission denied") == 4, done.stderr


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


def many(data: Path, count: int) -> list[str]:
    """Binds of every kind: new directories with a file each, files side by side in one, read-only ones, one in another."""
    kinds = "{file}:/many/{n}/file {file}:/flat/{n}:ro {data}:/in/{n} {file}:/in/{n}/file".split()
    return [word for n in range(count // 4) for kind in kinds for word in ("-B", kind.format(n=n, data=data, file=data / "file"))]


def test_a_thousand_binds(sciexec: Command, image: Path, data: Path) -> None:
    done = sciexec("exec", *many(data, 1000), image, "sh", "-c", "cat /many/*/file /flat/* /in/*/file | wc -l; echo $APPTAINER_BIND")
    assert (done.returncode, done.stderr) == (0, "")
    lines, places = done.stdout.split()
    assert (lines, len(places.split(","))) == ("750", 1000)


def grows_linearly(cost: Callable[[int], int]) -> bool:
    """Whether twice as many binds cost twice as much at most, a start aside."""
    small, middle, large = cost(100), cost(200), cost(400)
    return large - middle <= 2.05 * (middle - small) + 20


def test_the_plan_of_many_binds_takes_calls_in_proportion(images: dict[str, Path], data: Path) -> None:
    """Counted by the interpreter: calls of functions, from the words of the command line to the text of the plan."""
    image = open_image(str(images["directory"]))
    caller = host.Host()

    def cost(count: int) -> int:
        words = ["exec", *many(data, count), "--scratch", "/s", str(images["directory"]), "true"]
        calls = 0

        def counted(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            chosen = options.parse("sciexec", words, {})
            assert chosen is not None
            run.plan(chosen, image, caller).describe()
        finally:
            sys.setprofile(None)
        return calls

    assert grows_linearly(cost)
    os.close(image.fd)


def test_many_binds_take_system_calls_in_proportion(
    sciexec_path: Path, images: dict[str, Path], data: Path, need: Need, tmp_path: Path
) -> None:
    strace = need("strace")

    def cost(count: int) -> int:
        log = tmp_path / f"{count}.log"
        command = [strace, "-f", "-qq", "-e", "signal=none", "-o", str(log), str(sciexec_path), "exec", *many(data, count)]
        done = subprocess.run([*command, str(images["directory"]), "true"], capture_output=True, text=True, check=False)
        if done.returncode and "Operation not permitted" in done.stderr:
            pytest.skip("ptrace is forbidden here")
        assert done.returncode == 0, done.stderr
        return len(log.read_text().splitlines())

    assert grows_linearly(cost)


# --- somebody else ------------------------------------------------------------------------------------------------------------


def test_mounts_of_the_payload_stay_inside(sciexec_path: Path, images: dict[str, Path], data: Path, need: Need) -> None:
    """The host's mounts are shared, and the payload has a namespace in which it may mount: the host's table stays as it is."""
    script = f"""
        mount --make-rshared / && cat /proc/self/mountinfo > {data}/before
        {sciexec_path} exec -B {data}:/data -B /usr -B /lib64 -B /bin {images["directory"]} {need("unshare")} -Urm --propagation unchanged \
            sh -c 'mount -t tmpfs tmpfs /data/below && touch /data/below/made && grep -c /data/below /proc/self/mountinfo'
        cat /proc/self/mountinfo > {data}/after; ls {data}/below"""
    # not as root of the namespace: who is that and has no capabilities cannot make another
    command = [need("unshare"), "-cm", "--keep-caps", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert (data / "before").read_text() == (data / "after").read_text()


def test_mounts_of_the_host_that_come_later_appear_inside(sciexec_path: Path, images: dict[str, Path], data: Path, need: Need) -> None:
    """As an automounter makes them."""
    script = f"""
        mount --make-rshared /
        {sciexec_path} exec -B {data}:/data {images["directory"]} sh -c \\
            'echo; until [ -e /data/below/made ]; do sleep 0.01; done; echo seen' | {{
            read line; mount -t tmpfs tmpfs {data}/below; touch {data}/below/made; cat; }}"""
    done = subprocess.run([need("unshare"), "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("seen\n", "")


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_racer_who_swaps_directories_for_links(
    sciexec_path: Path, images: dict[str, Path], data: Path, tmp_path: Path, old_kernel: bool, read_only: bool
) -> None:
    """Somebody else can write to /a, which is bound; where /a/b is a link, it leads to the canary, by the host's path and the image's."""
    shared, canary = tmp_path / "shared", tmp_path / "canary"
    (shared / "b").mkdir(parents=True)
    canary.mkdir()
    (shared / "link").symlink_to(canary)
    ended = threading.Event()
    exchange, library = 2, ctypes.CDLL(None, use_errno=True)

    def race() -> None:
        while not ended.is_set():
            assert library.renameat2(-100, bytes(shared / "b"), -100, bytes(shared / "link"), exchange) == 0

    words = ["-B", f"{shared}:/a", "-B", f"{data}:/a/b{':ro' if read_only else ''}", "-B", f"{data}:/a/b/c/d"]
    command = [*(OLD_KERNEL if old_kernel else ()), str(sciexec_path), "exec", *words]
    command += [str(images["directory"]), "cat", "/proc/self/mountinfo"]
    racer = threading.Thread(target=race)
    racer.start()
    deadline, codes = time.monotonic() + 3, []
    try:
        while time.monotonic() < deadline and len(codes) < 50:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            codes.append(done.returncode)
            assert done.returncode in (0, 255) and "Traceback" not in done.stderr and "itself failed" not in done.stderr, done.stderr
            for fields in map(str.split, done.stdout.splitlines()):
                if read_only and fields[3] == str(data) and not fields[4].endswith("/d"):
                    assert "ro" in fields[5].split(","), done.stdout
    finally:
        ended.set()
        racer.join()
    assert list(canary.iterdir()) == []
    assert not read_only or sorted(os.listdir(data)) == ["below", "file"]
    assert codes.count(0) > 0


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


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("directory", ""),
        ("sif", ""),
        ("directory", "--contain --dns 192.0.2.1 -S /home/x/y,/var/z -W {work}"),
        ("directory", "--writable-tmpfs -S /etc/localtime/x"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_links_of_the_image_touch_nothing_of_the_host(
    sciexec: Command, hostile: Path, make_image: Make, data: Path, tmp_path: Path, kind: str, target: str, words: str, nothing_left: None
) -> None:
    (tmp_path / "work").mkdir()
    canary = tmp_path / "canary"
    canary.mkdir()
    for place in PLACES:
        path = hostile / place
        if path.parent.is_symlink():
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.symlink_to(TARGETS[target].format(canary=canary, own=path.name))
    image = make_image(hostile, kind)
    options = words.format(work=tmp_path / "work").split()
    done = sciexec("exec", *options, "-B", f"{data}:/etc/deep/er", "-B", f"{data}/file:{tmp_path}/new/file", image, "/bin/busybox", "true")
    assert done.returncode in (0, 255), done.stderr
    assert sorted(os.listdir(data)) == ["below", "file"]
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
