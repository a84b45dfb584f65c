"""From the name of an image to a SIF file, with the command as the user types it: real registries, archives, signals and disks."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import resource
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Command, Need
from oci_fixtures import LAYER, Images, sha256
from registry_fixtures import LocalRegistry, certificate, nobody, registry  # noqa: F401
from tar_fixtures import archive, member

from sciexec import sif


def layer(images: Images, *members: bytes) -> tuple[dict[str, object], str]:
    tar = archive(*members)
    return images.blob(gzip.compress(tar, mtime=0), LAYER), sha256(tar)


def lay_out(path: Path, *layers: tuple[bytes, ...], tag: str = "made", **says: object) -> str:
    """An OCI layout of one image; returns its reference."""
    images = Images()
    manifest = images.manifest(*(layer(images, *members) for members in layers), **({"says": says} if says else {}))
    manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
    images.lay(path, manifest)
    return f"oci:{path}:{tag}"


def listing(image: Path) -> dict[str, tuple[str, str, str]]:
    """What unsquashfs says: path -> (mode, numeric owner, size or device, and the target of a link)."""
    fd = os.open(image, os.O_RDONLY)
    try:
        offset = sif.read(fd, str(image)).primary.offset
    finally:
        os.close(fd)
    text = subprocess.run(["unsquashfs", "-o", str(offset), "-lln", "-d", "", str(image)], capture_output=True, check=True).stdout
    found = {}
    for line in text.decode("utf-8", "surrogateescape").splitlines():
        match = re.fullmatch(r"(\S{10}) (\d+/\d+)\s+(\d+(?:, *\d+)?) \d{4}-\d\d-\d\d \d\d:\d\d /?(.*)", line)
        assert match, line
        found[match[4].partition(" -> ")[0]] = (
            match[1],
            match[2],
            match[3] if not match[4].partition(" -> ")[2] else match[4].partition(" -> ")[2],
        )
    return found


EVERYTHING = (
    member(b"bin", "d", mode=0o755),
    member(b"bin/su", "f", b"su", mode=0o4755),
    member(b"home", "d", mode=0o2755, uid=0, gid=50),
    member(b"home/x", "f", b"x", uid=1234, gid=54321, mode=0o600),
    member(b"tmp", "d", mode=0o1777),
    member(b"dev", "d"),
    member(b"dev/null", "c", mode=0o666, rdev=(1, 3)),
    member(b"dev/sda", "b", mode=0o660, gid=6, rdev=(8, 0)),
    member(b"dev/high", "c", rdev=(204, 64)),
    member(b"fifo", "p", mode=0o644),
    member(b"link", "l", link=b"bin/su"),
    member(b"dangling", "l", link=b"/nowhere"),
    member(b"n\xe4me", "f", b"latin 1"),
    member(b"big uid", "f", b"1", uid=2**32 - 2, gid=2**32 - 2),
    member(b"a" * 255, "f", b"long"),
    member(b"hard", "h", link=b"bin/su"),
)


GOLDEN = "f662c62aa0d327095baf62702d8082943db4f0ad1d72bfec367209d13056bfea"


@pytest.fixture
def everything(tmp_path: Path) -> str:
    return lay_out(tmp_path / "layout", EVERYTHING)


def test_faithful(sciexec: Command, everything: str, tmp_path: Path) -> None:
    """Owners, set-id bits, devices, FIFOs and odd names are there, though nobody was root."""
    done = sciexec("pull", tmp_path / "out.sif", everything)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out.sif\n"), done.stderr
    found = listing(tmp_path / "out.sif")
    expected = {
        "bin/su": ("-rwsr-xr-x", "0/0", "2"),
        "hard": ("-rwsr-xr-x", "0/0", "2"),
        "home": ("drwxr-sr-x", "0/50", found["home"][2]),
        "home/x": ("-rw-------", "1234/54321", "1"),
        "tmp": ("drwxrwxrwt", "0/0", found["tmp"][2]),
        "dev/null": ("crw-rw-rw-", "0/0", "1,  3"),
        "dev/sda": ("brw-rw----", "0/6", "8,  0"),
        "fifo": ("prw-r--r--", "0/0", "0"),
        "link": ("lrwxrwxrwx", "0/0", "bin/su"),
        "dangling": ("lrwxrwxrwx", "0/0", "/nowhere"),
        "n\udce4me": ("-rw-r--r--", "0/0", "7"),
        "big uid": ("-rw-r--r--", f"{2**32 - 2}/{2**32 - 2}", "1"),
        "a" * 255: ("-rw-r--r--", "0/0", "4"),
    }
    shown = {path: found[path] for path in expected}
    expected["dev/null"] = ("crw-rw-rw-", "0/0", shown["dev/null"][2])
    expected["dev/sda"] = ("brw-rw----", "0/6", shown["dev/sda"][2])
    assert shown == expected
    assert [re.split(", *", found[path][2]) for path in ("dev/null", "dev/sda", "dev/high")] == [["1", "3"], ["8", "0"], ["204", "64"]]


def test_as_umoci_unpacks(sciexec: Command, need: Need, oci_layout: Path, tmp_path: Path) -> None:
    """A real image of five layers: the same names, kinds, modes, times, targets, contents and hard links as umoci makes of it."""
    subprocess.run(
        [need("umoci"), "unpack", "--rootless", "--image", f"{oci_layout}:app", tmp_path / "bundle"], check=True, capture_output=True
    )
    done = sciexec("build", "--sandbox", tmp_path / "sandbox", f"oci:{oci_layout}:app")
    assert done.returncode == 0, done.stderr
    added = re.compile(r"\.singularity\.d|singularity$|environment$|\.(run|exec|test|shell)$|etc/(hosts|resolv\.conf)$")
    ours = {path: entry for path, entry in tree(tmp_path / "sandbox").items() if not added.match(path)}
    theirs = {path: entry for path, entry in tree(tmp_path / "bundle/rootfs").items() if not added.match(path)}
    # A directory that metadata is added to has got a new time from the one who unpacked it, not from the image.
    assert ours == theirs


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for directory, names, files in os.walk(root):
        for name in sorted(names + files):
            path = Path(directory, name)
            status = path.lstat()
            relative = str(path.relative_to(root))
            if path.is_symlink():
                found[relative] = ("l", os.readlink(path), int(status.st_mtime))
            elif path.is_dir():
                found[relative] = ("d", stat.S_IMODE(status.st_mode) & 0o777 | 0o700)
            else:
                first = inodes.setdefault(status.st_ino, relative)
                data = hashlib.sha256(path.read_bytes()).hexdigest()
                found[relative] = ("f", stat.S_IMODE(status.st_mode) & 0o777, int(status.st_mtime), data, first)
    return found


def test_same_bytes_everywhere(sciexec: Command, everything: str, tmp_path: Path) -> None:
    """Whatever the umask, locale, time zone, directory, processors and moment."""
    (tmp_path / "elsewhere").mkdir()
    circumstances: list[tuple[dict[str, str], Path, int, set[int]]] = [
        ({}, tmp_path, 0o022, os.sched_getaffinity(0)),
        ({"TZ": "Asia/Kathmandu", "LC_ALL": "C"}, tmp_path / "elsewhere", 0o077, {min(os.sched_getaffinity(0))}),
    ]
    digests = set()
    for number, (env, cwd, umask, cpus) in enumerate(circumstances):
        out = tmp_path / f"{number}.sif"
        before, affinity = os.umask(umask), os.sched_getaffinity(0)
        os.sched_setaffinity(0, cpus)
        try:
            done = sciexec("pull", "--disable-cache", out, everything, env=env, cwd=cwd)
        finally:
            os.umask(before)
            os.sched_setaffinity(0, affinity)
        assert done.returncode == 0, done.stderr
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        time.sleep(1.1)  # a clock in the file would show
    assert len(digests) == 1


def test_golden_bytes(sciexec: Command, everything: str, tmp_path: Path) -> None:
    """This image has these bytes, here and everywhere, until sciexec's version (a label) or what it writes changes."""
    done = sciexec("pull", "--arch", "amd64", "--compression", "gzip", tmp_path / "out.sif", everything)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((tmp_path / "out.sif").read_bytes()).hexdigest() == GOLDEN


def test_source_date_epoch(sciexec: Command, everything: str, tmp_path: Path) -> None:
    assert sciexec("pull", tmp_path / "a.sif", everything, env={"SOURCE_DATE_EPOCH": "86400"}).returncode == 0
    assert "1970-01-02" in sciexec("sif", "header", tmp_path / "a.sif").stdout
    done = sciexec("pull", tmp_path / "b.sif", everything, env={"SOURCE_DATE_EPOCH": "today"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


# ------------------------------------------------------------------------------------------------------- registry and cache


@pytest.fixture(scope="module")
def pushed(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    layout = tmp_path_factory.mktemp("pushed") / "layout"
    noise = [os.urandom(3_000_000) for _ in range(3)]
    lay_out(layout, *((member(f"file{n}".encode(), "f", data), member(b"etc", "d")) for n, data in enumerate(noise)))
    registry.push(f"{layout}:made", "pull/noise:1")
    return f"docker://{registry.host}/pull/noise:1"


def cached_blobs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/sciexec/blobs/sha256").iterdir())


def test_a_registry_and_its_cache(sciexec: Command, pushed: str, tmp_path: Path) -> None:
    done = sciexec("pull", pushed)
    assert (done.returncode, done.stdout) == (0, "noise_1.sif\n"), done.stderr
    first = (tmp_path / "home/noise_1.sif").read_bytes()
    blobs = cached_blobs(tmp_path)
    assert sum(blob.stat().st_size > 1_000_000 for blob in blobs) == 3
    for blob in blobs:
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    assert sciexec("pull", "--disable-cache", "again.sif", pushed).returncode == 0
    assert (tmp_path / "home/again.sif").read_bytes() == first
    assert "3000" in (listed := sciexec("cache", "list", "-v").stdout) or "3.00 MB" in listed
    assert sciexec("cache", "clean").returncode == 0
    assert not cached_blobs(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("damage", [flip, truncate, replace_by_link])
def test_damage_in_the_cache_is_found_and_mended(sciexec: Command, pushed: str, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    assert sciexec("pull", "a.sif", pushed).returncode == 0
    for blob in cached_blobs(tmp_path):
        damage(blob)
    done = sciexec("pull", "b.sif", pushed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home/b.sif").read_bytes() == (tmp_path / "home/a.sif").read_bytes()
    for blob in cached_blobs(tmp_path):
        assert not blob.is_symlink()
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_an_unusable_cache_is_no_failure(sciexec: Command, pushed: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    done = sciexec("pull", pushed)
    assert done.returncode == 0
    assert done.stderr.count("WARNING") == 1


def test_many_pulls_at_once(sciexec: Command, pushed: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: sciexec("pull", f"{n}.sif", pushed), range(8)))
    assert [one.returncode for one in done] == [0] * 8, done[0].stderr
    assert len({hashlib.sha256((tmp_path / f"home/{n}.sif").read_bytes()).hexdigest() for n in range(8)}) == 1
    assert not list((tmp_path / "cache/sciexec/tmp").iterdir())


# ------------------------------------------------------------------------------------------------------- nothing half-written


def test_an_existing_file_stays(sciexec: Command, everything: str, tmp_path: Path) -> None:
    out = tmp_path / "out.sif"
    out.write_text("mine")
    done = sciexec("pull", out, everything)
    assert (done.returncode, done.stderr) == (1, f"FATAL: writing {out}: the file already exists\n       --force replaces it\n")
    assert out.read_text() == "mine"
    assert sciexec("pull", "--force", out, everything).returncode == 0
    assert out.read_bytes().startswith(b"#!/usr/bin/env run-singularity")


def broken(images: Images, what: str) -> None:
    """Spoil a blob of an image in memory, under the digest that it had."""
    for digest, data in images.blobs.items():
        kind = "layer" if data.startswith(b"\x1f\x8b") else "manifest" if b"schemaVersion" in data else "config"
        if kind == what:
            images.blobs[digest] = data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("what", ["layer", "manifest", "config", "diff_id", "size"])
def test_wrong_bytes_are_refused(sciexec: Command, tmp_path: Path, what: str) -> None:
    images = Images()
    descriptor, diff_id = layer(images, member(b"a", "f", b"hello"))
    if what == "size":
        descriptor["size"] = int(str(descriptor["size"])) + 1
    manifest = images.manifest((descriptor, sha256(b"other") if what == "diff_id" else diff_id))
    broken(images, what)
    done = sciexec("pull", tmp_path / "out.sif", images.lay(tmp_path / "layout", manifest))
    assert done.returncode == 255
    assert not done.stdout
    fatal = [line for line in done.stderr.splitlines() if line.startswith("FATAL: ")]
    assert len(fatal) == 1
    assert str(tmp_path / "layout") in fatal[0]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def test_a_malformed_layer_names_image_layer_and_member(sciexec: Command, tmp_path: Path) -> None:
    uri = lay_out(tmp_path / "layout", (member(b"ok", "f"),), (member(b"../../etc/passwd", "f", b"x"),))
    done = sciexec("pull", tmp_path / "out.sif", uri)
    assert done.returncode == 255
    assert re.search(r"FATAL: reading oci:\S+:made, layer 2 of 2 \(sha256:\w+\): \.\./\.\./etc/passwd: ", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_killed_at_any_moment(sciexec_path: Path, everything: str, tmp_path: Path) -> None:
    """kill -9 leaves the old file, or the new one, and nothing else beside it."""
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out.sif"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    outcomes = set()
    for step in range(24):
        out.write_text("old")
        process = subprocess.Popen([sciexec_path, "pull", "-q", "--force", out, everything], env=environment, stdout=subprocess.DEVNULL)
        time.sleep(0.03 * step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = out.read_bytes()
        assert content == b"old" or sif_is_whole(out)
        outcomes.add(content == b"old")
        assert list(place.iterdir()) == [out]
    assert True in outcomes  # some were killed in time


def sif_is_whole(path: Path) -> bool:
    return "bin/su" in listing(path)


def test_interrupted(sciexec_path: Path, pushed: str, tmp_path: Path) -> None:
    """Ctrl-C ends it at once, without a traceback."""
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sciexec_path, "pull", "--compression", "xz", tmp_path / "out.sif", pushed]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert "Traceback" not in stderr
    assert process.returncode in (0, 130)
    assert (process.returncode == 0) == (tmp_path / "out.sif").exists()


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_a_file_that_cannot_grow(sciexec_path: Path, pushed: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sciexec_path, "pull", "--disable-cache", tmp_path / "out.sif", pushed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limit_file_size, check=False)
    assert done.returncode == 255
    assert "FATAL: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.sif").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[list[str]]:
    """A prefix that runs a command in a user namespace where tmp_path/full is a file system of 4 MiB."""
    (tmp_path / "full").mkdir()
    script = f'mount -t tmpfs -o size=4m none {tmp_path}/full && exec "$@"'
    yield ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "_"]


@pytest.mark.parametrize("which", ["output", "cache"])
def test_a_full_disk(sciexec_path: Path, pushed: str, tmp_path: Path, tiny_disk: list[str], which: str) -> None:
    """Of the output: an error that says so.  Of the cache: one warning, and the work is done without."""
    cache = tmp_path / ("full" if which == "cache" else "cache")
    out = tmp_path / ("full" if which == "output" else "home") / "out.sif"
    out.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(tmp_path), "SCIEXEC_CACHEDIR": str(cache / "sciexec")}
    done = subprocess.run([*tiny_disk, sciexec_path, "pull", out, pushed], env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    if which == "output":
        assert done.returncode == 255
        assert "No space left on device" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("WARNING") == 1
        assert out.exists()


# ------------------------------------------------------------------------------------------------------- flags and limits


@pytest.mark.parametrize("compression", ["gzip", "zstd:9", "lz4", "xz"])
def test_compressions(sciexec: Command, everything: str, tmp_path: Path, compression: str) -> None:
    done = sciexec("pull", "--compression", compression, "--block-size", "65536", tmp_path / "out.sif", everything)
    assert done.returncode == 0, done.stderr
    assert "home/x" in listing(tmp_path / "out.sif")


REFUSED = {
    "--compression brotli": "--compression brotli: no compression of SquashFS",
    "--compression zstd:fast": "--compression zstd:fast: the level is no number",
    "--compression zstd:99": "zstd has no level 99",
    "--block-size 1000": "block size",
    "--max-entries 3": "--max-entries",
    "--max-bytes 3": "--max-bytes",
    "--arch z80": "z80",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(sciexec: Command, everything: str, tmp_path: Path, flags: str) -> None:
    done = sciexec("pull", *flags.split(), tmp_path / "out.sif", everything)
    assert done.returncode in (1, 255)
    assert done.stderr.splitlines()[-1 if "max" in flags else 0].strip()
    assert REFUSED[flags] in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.sif").exists()


def test_only_the_path_on_stdout_and_nothing_with_quiet(sciexec: Command, everything: str, tmp_path: Path) -> None:
    for flags in (["pull", "-q"], ["--quiet", "pull"]):
        done = sciexec(*flags, "--force", tmp_path / "out.sif", everything)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/out.sif\n", "")


def test_objects_in_the_sif(sciexec: Command, oci_layout: Path, tmp_path: Path) -> None:
    assert sciexec("pull", tmp_path / "app.sif", f"oci:{oci_layout}:app").returncode == 0
    config = json.loads(sciexec("sif", "dump", "3", tmp_path / "app.sif").stdout)
    assert config["Entrypoint"] == ["/opt/app/hello"]
    attributes = json.loads(sciexec("inspect", "--json", tmp_path / "app.sif").stdout)["data"]["attributes"]
    assert attributes["labels"]["org.opencontainers.image.title"] == "app"


# ------------------------------------------------------------------------------------------------------- a run of a URI


def test_a_uri_is_converted_once_and_run(sciexec: Command, registry: LocalRegistry, oci_layout: Path, tmp_path: Path) -> None:  # noqa: F811
    registry.push(f"{oci_layout}:app", "run/app:1")
    uri = f"docker://{registry.host}/run/app:1"
    for _ in range(2):
        done = sciexec("run", uri, "you")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("good day you from a layer in ")
    (image,) = (tmp_path / "cache/sciexec/images").glob("*.sif")
    made = image.stat().st_mtime_ns
    assert sciexec("exec", uri, "cat", "/opt/app/data/table").stdout == "1 2 3\n"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache/sciexec/images").glob("*.sif")] == [made]
    assert "1 converted image," in sciexec("cache", "list").stdout
    assert uri in sciexec("cache", "list", "-v").stdout


def test_a_uri_without_a_cache_to_put_it_in(sciexec: Command, oci_layout: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    done = sciexec("run", f"oci:{oci_layout}:app")
    assert done.returncode == 255
    assert "SCIEXEC_CACHEDIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_at_once(sciexec_path: Path, everything: str, tmp_path: Path) -> None:
    """Also what stands in front of the SquashFS may not fit: the error is ours, and of one line."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sciexec_path, "pull", "-q", tmp_path / "out.sif", everything]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 255
    assert done.stderr.startswith("FATAL: writing the image")
    assert "File too large" in done.stderr.splitlines()[0]
    assert not (tmp_path / "out.sif").exists()
