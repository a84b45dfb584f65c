"""The cache under everything that happens to caches: many writers, dead writers, full disks, other users, and being deleted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blobs_fixtures import WAIT, Need, cache, digest_of, noise, path_of, read_all, rot, stored, temporaries, warnings

from convert import blobs
from convert.blobs import Cache, CacheLost, Entry, Temporary, image_key
from convert.download import Writer
from sciexec.errors import HostError, ImageError

__all__ = ["cache", "warnings"]  # fixtures

TREE = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")
BAD_DIGESTS = [
    *("", "sha256", "sha256:", "sha256:../../x", "sha256:" + "a" * 63, "sha256:" + "A" * 64, "sha256:" + "a" * 65, "md5:" + "a" * 32),
    *("sha256:" + "a" * 64 + "\n", "sha512:" + "a" * 64, "sha256:" + "/" * 64, "../sha256:" + "a" * 64, "sha256:" + "\u0663" * 64),
]


# --- where it is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SCIEXEC_CACHEDIR": "/c", "APPTAINER_CACHEDIR": "/a", "HOME": "/h"}, "/c"),
        ({"SCIEXEC_CACHEDIR": "", "APPTAINER_CACHEDIR": "/a", "SINGULARITY_CACHEDIR": "/s"}, "/a/sciexec"),
        ({"SINGULARITY_CACHEDIR": "/s", "XDG_CACHE_HOME": "/x"}, "/s/sciexec"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/sciexec"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/sciexec"),
        ({"HOME": "/h"}, "/h/.cache/sciexec"),
        ({}, pwd.getpwuid(os.geteuid()).pw_dir + "/.cache/sciexec"),
    ],
)
def test_the_directory_follows_the_environment(environ: dict[str, str], expected: str) -> None:
    assert blobs.directory(environ) == expected


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_everything_is_private_and_read_only_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        cache = Cache(str(tmp_path / "cache"))
        cache.store(digest_of(b"x"), b"x")
        with cache.new_image("0" * 16) as image:
            image.write(b"sif")
            path = image.commit()
    finally:
        os.umask(before)
    modes = {str(found.relative_to(tmp_path)): found.stat().st_mode & 0o777 for found in tmp_path.rglob("*")}
    assert {modes.pop(str(file.relative_to(tmp_path))) for file in (path_of(cache, digest_of(b"x")), Path(path))} == {0o444}
    assert set(modes.values()) == {0o700}
    assert temporaries(cache) == []


# --- what cannot be used --------------------------------------------------------------------------------------------------


def read_only(path: Path) -> None:
    path.mkdir()
    path.chmod(0o555)


def a_file(path: Path) -> None:
    path.write_text("mine")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def foreign(path: Path) -> None:
    path.symlink_to("/usr")


def writable_by_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


def a_link_inside(path: Path) -> None:
    path.mkdir()
    (path.parent / "elsewhere").mkdir()
    (path / "blobs").symlink_to(path.parent / "elsewhere")


UNUSABLE = [read_only, a_file, dangling, foreign, writable_by_others, below_a_file, a_link_inside]


@pytest.mark.parametrize("make", UNUSABLE, ids=lambda make: make.__name__)
def test_an_unusable_cache_is_one_warning_and_no_cache(tmp_path: Path, make: Callable[[Path], None], warnings: list[str]) -> None:
    (tmp_path / "parent").mkdir()
    path = tmp_path / "parent" / "cache"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    assert blobs.open_cache(str(path), warnings.append) is None
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert ("belongs to another user" in warnings[0]) == (make is foreign)
    assert sorted(tmp_path.rglob("*")) == before or make is a_link_inside
    assert not list(tmp_path.glob("elsewhere/*"))
    path.parent.chmod(0o755)


def test_a_link_of_ones_own_to_a_larger_disk_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir(0o700)
    (tmp_path / "cache").symlink_to("large")
    Cache(str(tmp_path / "cache")).store(digest_of(b"x"), b"x")
    assert (tmp_path / "large" / "blobs").is_dir()


@pytest.mark.root
def test_a_link_or_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(0o700)
    (tmp_path / "link").symlink_to("mine")
    os.lchown(tmp_path / "link", 12345, 12345)
    (tmp_path / "theirs").mkdir(0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    for name in ("link", "theirs"):
        with pytest.raises(HostError, match="12345"):
            Cache(str(tmp_path / name))
    assert not list((tmp_path / "mine").iterdir())


def test_a_cache_that_became_read_only_is_read_and_warned_about_once(cache: Cache, warnings: list[str]) -> None:
    cache.store(digest_of(b"old"), b"old")
    Path(cache.path, "tmp").chmod(0o500)  # mended on the next use: it is ours
    cache.store(digest_of(b"new"), b"new")
    assert stored(cache, digest_of(b"new")) == b"new" and warnings == []
    shutil.rmtree(f"{cache.path}/tmp")
    Path(cache.path, "tmp").write_text("in the way")
    for data in (b"a", b"b"):
        cache.store(digest_of(data), data)
        assert stored(cache, digest_of(data)) is None
    assert stored(cache, digest_of(b"old")) == b"old"
    assert len(warnings) == 1 and "working without it" in warnings[0]


def test_a_cache_may_be_deleted_at_any_time(cache: Cache, warnings: list[str]) -> None:
    data = noise(1000)
    with Writer(cache, digest_of(data), 1000) as writer:
        writer.write(data[:500])
        reader = writer.follow()
        shutil.rmtree(cache.path)
        assert cache.list() == [] and cache.clean() == [] and stored(cache, digest_of(data)) is None
        writer.write(data[500:])
        with pytest.raises(CacheLost):
            writer.commit()
        assert reader is not None and read_all(reader) == data  # it was verified all the same
    cache.store(digest_of(data), data)
    assert stored(cache, digest_of(data)) == data and len(warnings) == 1


ON_A_SMALL_DISK = """
    import sys
    from convert.blobs import Cache
    from convert.documents import Blob
    from convert.download import Downloads
    import hashlib, io, os, random, resource
    path, limit = sys.argv[1], int(sys.argv[2])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    warnings = []
    cache = Cache(path, warnings.append)
    data = random.Random(0).randbytes(3_000_000)
    blob = Blob("sha256:" + hashlib.sha256(data).hexdigest(), len(data), "")
    downloads = Downloads(cache, lambda blob: io.BytesIO(data), [blob], None)
    stream = downloads.open(blob)
    got = b"".join(iter(lambda: stream.read(65536), b""))
    stream.close()
    downloads.close()
    assert got == data
    assert len(warnings) == 1, warnings
    assert os.listdir(path + "/tmp") == [] and os.listdir(path + "/blobs/sha256") == []
    print(warnings[0])
"""


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EFBIG], ids=os.strerror)
def test_a_full_disk_is_no_failure(tmp_path: Path, fault: int) -> None:
    """A real tmpfs of 1 MB in a user namespace, and a real limit on the size of files."""
    small = tmp_path / "small"
    small.mkdir(0o700)
    limit = 1_000_000 if fault == errno.EFBIG else 0
    command = [sys.executable, "-c", textwrap.dedent(ON_A_SMALL_DISK), str(small / "cache"), str(limit)]
    if fault == errno.ENOSPC:
        mounting = 'mount -t tmpfs -o size=1m,mode=0700 tmpfs "$0" && exec "$@"'
        probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
        if probe.returncode:
            pytest.skip(f"needs user namespaces: {probe.stderr.decode().strip()}")
        command = ["unshare", "-Urm", "sh", "-c", mounting, str(small), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PYTHONPATH": str(TREE)})
    assert done.returncode == 0, done.stderr
    assert os.strerror(fault) in done.stdout


FAULTS = [
    ("mkdirat", "error=ENOSPC", 1),
    ("fchmod", "error=EPERM:when=1", 1),
    ("fsync", "error=EIO:when=1", 1),
    ("fsync", "error=EIO:when=2", 1),
    ("linkat", "error=EPERM", 0),
    ("linkat,renameat", "error=ENOSPC", 1),
    ("unlinkat", "error=EIO", 0),
]

STORING = """
    import hashlib, io, random, sys
    from convert import blobs
    from convert.documents import Blob
    from convert.download import Downloads
    warnings = []
    cache = blobs.open_cache(sys.argv[1], warnings.append)
    data = random.Random(0).randbytes(600_000)
    blob = Blob("sha256:" + hashlib.sha256(data).hexdigest(), len(data), "")
    if cache is not None:
        downloads = Downloads(cache, lambda blob: io.BytesIO(data), [blob], None)
        stream = downloads.open(blob)
        assert b"".join(iter(lambda: stream.read(65536), b"")) == data
        stream.close()
        downloads.close()
    print(len(warnings))
"""
STORED = noise(600_000)


def storing(need: Need, path: Path, injected: str) -> subprocess.CompletedProcess[str]:
    """A download into the cache at `path`, with faults injected into its system calls; prints the number of warnings."""
    command = [need("strace"), "-f", "-qq", "-o", "/dev/null", "-e", f"inject={injected}", sys.executable, "-c", textwrap.dedent(STORING)]
    env = {**os.environ, "PYTHONPATH": str(TREE), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([*command, str(path)], capture_output=True, text=True, check=False, timeout=120, env=env)


@pytest.mark.parametrize(("calls", "fault", "expected"), FAULTS)
def test_what_the_kernel_refuses_is_one_warning_at_most(tmp_path: Path, need: Need, calls: str, fault: str, expected: int) -> None:
    done = storing(need, tmp_path / "cache", f"{calls}:{fault}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected}\n"
    for file in (tmp_path / "cache").glob("blobs/*/*"):
        assert file.read_bytes() == STORED


@pytest.mark.parametrize("call", ["write", "fchmod", "fsync", "linkat", "unlinkat"])
def test_killed_at_any_call_the_blob_is_there_whole_or_not_at_all(tmp_path: Path, need: Need, call: str) -> None:
    cache = Cache(str(tmp_path / "cache"))
    for number in range(1, 20):
        done = storing(need, tmp_path / "cache", f"{call}:signal=KILL:when={number}")
        assert stored(cache, digest_of(STORED), len(STORED)) in (STORED, None)
        if done.returncode == 0:
            break
        assert len(temporaries(cache)) == 1 or call in ("fsync", "unlinkat")  # of the directory; of what is gone already
        cache.clean()
        assert temporaries(cache) == []
    assert done.returncode == 0 and number > 1
    assert stored(cache, digest_of(STORED)) == STORED and temporaries(cache) == []


# --- entries --------------------------------------------------------------------------------------------------------------


def test_what_is_stored_comes_back(cache: Cache) -> None:
    for data in (b"", b"x", noise(100_000)):
        cache.store(digest_of(data), data)
        assert stored(cache, digest_of(data), len(data)) == stored(cache, digest_of(data)) == cache.read(digest_of(data), 1 << 20) == data
    large = "sha512:" + hashlib.sha512(b"x").hexdigest()
    cache.store(large, b"x")
    assert cache.read(large, 10) == b"x"


def test_storing_under_a_wrong_digest_is_refused(cache: Cache) -> None:
    with pytest.raises(ImageError, match="digest"):
        cache.store(digest_of(b"x"), b"y")
    assert stored(cache, digest_of(b"x")) is None and temporaries(cache) == []


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_a_malformed_digest_never_becomes_a_path(cache: Cache, digest: str) -> None:
    before = sorted(Path(cache.path).parent.rglob("*"))
    acts: list[Callable[[], object]] = [
        lambda: cache.open(digest, 1),
        lambda: cache.read(digest, 1),
        lambda: cache.store(digest, b"x"),
        lambda: cache.discard(digest),
        lambda: Writer(cache, digest, 1),
        lambda: image_key(digest),
    ]
    for act in acts:
        with pytest.raises(ImageError):
            act()
    assert sorted(Path(cache.path).parent.rglob("*")) == before


def test_a_truncated_entry_is_a_miss_and_makes_room(cache: Cache) -> None:
    data = noise(1000)
    cache.store(digest_of(data), data)
    rot(path_of(cache, digest_of(data)), lambda data: data[:999])
    assert cache.open(digest_of(data), 1000) is None
    assert not path_of(cache, digest_of(data)).exists()


def test_a_writer_replaces_a_truncated_entry_and_leaves_a_whole_one_alone(cache: Cache) -> None:
    data = noise(1000)
    path = path_of(cache, digest_of(data))
    cache.store(digest_of(data), data)
    inode = path.stat().st_ino
    cache.store(digest_of(data), data)
    assert path.stat().st_ino == inode
    rot(path, lambda data: data[:999])
    cache.store(digest_of(data), data)
    assert path.read_bytes() == data and path.stat().st_ino != inode and temporaries(cache) == []


def test_a_flipped_bit_is_found_by_read_and_forgotten_by_discard(cache: Cache) -> None:
    data = noise(1000)
    for forget in (lambda: cache.read(digest_of(data), 1 << 20), lambda: cache.discard(digest_of(data)) or None):
        cache.store(digest_of(data), data)
        rot(path_of(cache, digest_of(data)), lambda data: bytes([data[0] ^ 1]) + data[1:])
        assert stored(cache, digest_of(data), 1000) != data
        forget()
        assert stored(cache, digest_of(data)) is None
    assert cache.discard(digest_of(data)) is False


@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "directory"])
def test_what_is_no_file_is_neither_opened_nor_waited_for(cache: Cache, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"canary"
    (tmp_path / "canary").write_bytes(data)
    path = path_of(cache, digest_of(data))
    monkeypatch.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "link":
            path.symlink_to(tmp_path / "canary")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind(path.name)
        else:
            path.mkdir()
        assert stored(cache, digest_of(data)) is None
        cache.store(digest_of(data), data)
        assert stored(cache, digest_of(data)) == (None if kind == "directory" else data)


# --- many writers ---------------------------------------------------------------------------------------------------------

SHARED = [noise(200_000, seed) for seed in range(4)]


def store_shared(path: str, seed: int) -> None:
    cache = Cache(path)
    order = SHARED * 3
    random.Random(seed).shuffle(order)
    for data in order:
        with Writer(cache, digest_of(data), len(data)) as writer, contextlib.suppress(CacheLost):
            for start in range(0, len(data), 50_000):
                writer.write(data[start : start + 50_000])
            writer.commit()
        found = stored(cache, digest_of(data), len(data))
        if found not in (data, None):  # None: another process was cleaning
            os._exit(9)


def test_sixteen_processes_write_the_same_blobs_while_others_delete_them(tmp_path: Path) -> None:
    path = str(tmp_path / "cache")
    cache = Cache(path)
    writers = [FORK.Process(target=store_shared, args=(path, seed)) for seed in range(16)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        cache.clean(kinds={"blob"})
        time.sleep(0.05)
    assert [writer.exitcode for writer in writers] == [0] * 16
    assert temporaries(cache) == []
    store_shared(path, 0)
    assert {entry.name for entry in cache.list()} == {digest_of(data) for data in SHARED}


def write_half_and_wait(path: str, ready: object) -> None:
    with Writer(Cache(path), digest_of(SHARED[0]), len(SHARED[0])) as writer:
        writer.write(SHARED[0][:1000])
        ready.set()  # type: ignore[attr-defined]
        time.sleep(600)


def test_what_a_killed_writer_left_is_swept_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "cache")
    processes = []
    for _ in range(2):
        ready = FORK.Event()
        process = FORK.Process(target=write_half_and_wait, args=(path, ready))
        process.start()
        assert ready.wait(WAIT)
        processes.append(process)
    dead, living = processes
    assert len(os.listdir(f"{path}/tmp")) == 2
    os.kill(dead.pid or 0, signal.SIGKILL)
    dead.join()
    cache = Cache(path)
    assert len(temporaries(cache)) == 2 and stored(cache, digest_of(SHARED[0])) is None
    cache.store(digest_of(b"x"), b"x")
    (left,) = temporaries(cache)
    assert f".{living.pid}." in left
    living.kill()
    living.join()
    assert [entry.kind for entry in cache.clean()] == ["blob", "temporary"]
    assert temporaries(cache) == []


@pytest.mark.parametrize(("age", "stays"), [(3600, True), (2 * 86400, False)])
@pytest.mark.parametrize("name", ["other-node.01234567.4026531836.1.00ff", "not one of ours"])
def test_the_files_of_other_hosts_are_known_dead_by_their_age(cache: Cache, name: str, age: int, stays: bool) -> None:
    path = Path(cache.path, "tmp", name)
    path.write_bytes(b"half")
    os.utime(path, (0, time.time() - age))
    cache.store(digest_of(b"x"), b"x")
    assert path.exists() == stays


# --- images and housekeeping ----------------------------------------------------------------------------------------------


def put_image(cache: Cache, key: str, data: bytes) -> str:
    with cache.new_image(key) as image:
        os.write(image.fd, data)
        return image.commit()


def test_a_converted_image_appears_when_it_is_whole_and_is_not_replaced(cache: Cache) -> None:
    key = image_key(digest_of(b"manifest"), "zstd:3", "amd64")
    assert key != image_key(digest_of(b"manifest"), "zstd:9", "amd64") and key.startswith(digest_of(b"manifest")[7:])
    with cache.new_image(key) as image:
        os.write(image.fd, b"half")
        assert cache.image(key) is None
    assert cache.image(key) is None and temporaries(cache) == []
    path = put_image(cache, key, b"first")
    inode = os.stat(path).st_ino
    assert put_image(cache, key, b"again") == cache.image(key) == path
    assert Path(path).read_bytes() == b"first" and os.stat(path).st_ino == inode
    for bad in ("", "../../../etc/passwd", "a/b", "x.sif", "A" * 20):
        with pytest.raises(ValueError, match="key"):
            cache.new_image(bad)


def test_the_list_knows_where_images_came_from(cache: Cache) -> None:
    key = image_key(digest_of(b"manifest"))
    cache.remember(key, "docker://too/early:1")
    path = put_image(cache, key, b"image")
    for source in ("docker://b/c:1", "docker://a/b:1", "docker://b/c:1"):
        cache.remember(key, source)
    cache.store(digest_of(b"x"), b"x")
    blob_time, image_time = (int(os.stat(file).st_mtime) for file in (path_of(cache, digest_of(b"x")), path))
    assert cache.list() == [
        Entry(digest_of(b"x"), "blob", 1, blob_time),
        Entry(f"{key}.sif", "image", 5, image_time, ("docker://a/b:1", "docker://b/c:1")),
    ]
    Path(f"{path[:-4]}.json").unlink()
    Path(f"{path[:-4]}.json").write_text("{")
    assert cache.list()[1].sources == ()
    cache.clean()
    assert sorted(os.listdir(f"{cache.path}/images")) == []


def test_clean_takes_what_is_old_of_the_kinds_named(cache: Cache) -> None:
    old, new = noise(10, 1), noise(10, 2)
    for data in (old, new):
        cache.store(digest_of(data), data)
    key = image_key(digest_of(b"manifest"))
    path = put_image(cache, key, b"image")
    for file in (path_of(cache, digest_of(old)), Path(path)):
        os.utime(file, (0, time.time() - 10 * 86400))
    with Temporary(cache) as temporary:
        dry = cache.clean(days=5, dry_run=True)
        assert [entry.name for entry in dry] == [digest_of(old), f"{key}.sif"] and len(cache.list()) == 4
        assert [entry.name for entry in cache.clean(days=5, kinds={"blob"})] == [digest_of(old)]
        assert [entry.name for entry in cache.clean(kinds={"image", "temporary"})] == [f"{key}.sif"]
        assert [entry.name for entry in cache.list()] == [digest_of(new), temporary.name]
        cache.clean()
        temporary.write(b"x")
        temporary.publish("blobs/sha256", digest_of(b"x")[7:])
    assert [entry.name for entry in cache.list()] == [digest_of(b"x")]
