"""sciexec-fuse: real images of all makers, mounted as a run mounts them, against what is in them."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import mmap
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from namespace_fixtures import Need, inside, servers
from squashfs_fixtures import EMPTY, Node, Writer, directory, everything, file, run, store, symlink, write

from sciexec import squashfs
from sciexec.sources import OURS, Squash
from sciexec.unsquashfs import Reader

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_left")

Contents = dict[bytes, tuple[object, ...]]
KINDS = dict(zip((stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFBLK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK), "dflbcps"))


class Server(Squash):
    """Our server of an image, with the process that serves it; its environment, where a test gives it one."""

    def __init__(self, image: Path, offset: int = 0, environment: dict[str, str] | None = None) -> None:
        self._file = os.open(image, os.O_RDONLY)
        self._environment = environment
        super().__init__(self._file, offset, image.name, OURS)

    def launch(self, ready: int) -> int:
        if self._environment is None:
            return super().launch(ready)
        fds = (self.fd, self._device, ready)
        for fd in fds:
            os.set_inheritable(fd, True)
        return os.posix_spawn(self.program, ["sciexec-fuse", *map(str, (*fds, self.offset))], self._environment)

    def pid(self) -> int:
        image = os.fstat(self.fd)
        for pid in servers():
            try:
                if any(os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), image) for fd in os.listdir(f"/proc/{pid}/fd")):
                    return pid
            except OSError:
                pass
        raise AssertionError("no server")

    def proc(self, name: str) -> dict[str, str]:
        with open(f"/proc/{self.pid()}/{name}") as opened:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in opened)}

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid()}/task"))


def mounted(
    image: Path, act: Callable[[Server], None], offset: int = 0, environment: dict[str, str] | None = None, limit: int | None = None
) -> None:
    """Call act() standing in the mounted image, as root of a user namespace.  limit: of processes, for the server."""
    server = Server(image, offset, environment)

    def enter() -> None:
        os.mkdir("m")
        server.finish()
        if limit is not None:
            resource.prlimit(server.pid(), resource.RLIMIT_NPROC, (limit, limit))
        server.mount("m")
        os.chdir("m")
        act(server)

    try:
        inside(enter, before=server.start)
    finally:
        os.close(server.fd)


# --- everything there is to see ---------------------------------------------------------------------------------------------


def expected(image: Path, offset: int = 0) -> Contents:
    """What our other reader, written in another language, finds in an image."""
    found: Contents = {}
    with image.open("rb") as opened:
        reader = Reader(opened.fileno(), offset, image.name)
        for path, entry in reader.walk():
            seen = (entry.kind, entry.mode, 0, 0, entry.mtime, entry.links)
            digest = hashlib.sha256()
            size = 0
            if entry.kind == "f":
                for position, piece in reader.pieces(entry):
                    zeros(digest, position - size)
                    digest.update(piece)
                    size = position + len(piece)
                zeros(digest, entry.size - size)
            device = entry.rdev if entry.kind in "bc" else (0, 0)
            size = entry.size if entry.kind == "f" else len(entry.target)
            found[path] = (*seen, size, device, entry.target, digest.hexdigest(), reader.xattrs(entry))
    return found


def zeros(digest: hashlib._Hash, length: int) -> None:
    while length > 0:
        digest.update(bytes(min(length, 1 << 20)))
        length -= 1 << 20


def found() -> Contents:
    """The same, of the directory that we stand in."""
    seen: Contents = {}

    def look(path: bytes) -> None:
        status = os.lstat(path or b".")
        kind = KINDS[stat.S_IFMT(status.st_mode)]
        digest = hashlib.sha256()
        if kind == "f":
            with open(path, "rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
        target = os.readlink(path) if kind == "l" else b""
        device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        try:
            names = os.listxattr(path or b".", follow_symlinks=False)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP  # an image without any
            names = []
        xattrs = {name.encode(): os.getxattr(path or b".", name, follow_symlinks=False) for name in names}
        seen[path] = (kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, int(status.st_mtime), status.st_nlink,
                      status.st_size if kind in "fl" else 0, device, target, digest.hexdigest(), xattrs)  # fmt: skip
        if kind == "d":
            for name in os.listdir(path or b"."):
                look(path + b"/" + name if path else name)

    look(b"")
    return seen


def compare(image: Path, offset: int = 0) -> Contents:
    wanted = expected(image, offset)

    def act(server: Server) -> None:
        seen = found()
        assert list(seen) != [] and set(seen) == set(wanted)
        for path, what in wanted.items():
            assert seen[path] == what, path

    mounted(image, act, offset)
    return wanted


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an ordinary user can have in a directory; files as long as blocks of 4 KiB, 128 KiB and 1 MiB, and a byte more or less."""
    top = tmp_path_factory.mktemp("fuse") / "tree"
    (top / "sizes").mkdir(parents=True)
    noise = random.Random(7).randbytes(1 << 20) * 4
    text = b"".join(b"line %d\n" % number for number in range(400_000))
    for block in (1, 4096, 8192, 131072, 1 << 20):
        for size in (block - 1, block, block + 1, 2 * block + 7):
            (top / f"sizes/noise{size}").write_bytes(noise[:size])
            (top / f"sizes/text{size}").write_bytes(text[: size if block < 1 << 20 else 0])
            (top / f"sizes/zeros{size}").write_bytes(bytes(size))
    with (top / "sparse").open("wb") as opened:
        for place in (0, 5 << 20, (9 << 20) - 3, 40 << 20):
            os.pwrite(opened.fileno(), b"data", place)
        opened.truncate((48 << 20) + 1)
    (top / "none").mkdir()
    (top / "one").mkdir()
    (top / "one/file").write_text("alone")
    (top / "three hundred").mkdir()
    for number in range(300):
        (top / "three hundred" / str(number)).write_text(f"a small file, number {number}")
    (top / ("n" * 255)).write_text("long")
    (top / os.fsdecode(b"\xff\xfe\x80")).write_text("no UTF-8")
    (top / "\n\t '\"\\").write_text("odd")
    deep = top / "deep"
    for _ in range(100):
        deep /= "down"
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("deep")
    for length in (1, 59, 255, 4095):
        (top / f"link{length}").symlink_to("t" * length)
    for number in range(3):
        os.link(top / "one/file", top / f"hard{number}")
    os.mkfifo(top / "fifo")
    for number, mode in enumerate((0o400, 0o4755, 0o2750, 0o1644, 0o777, 0o111)):
        (top / f"mode{mode:o}").write_text("x")
        os.utime(top / f"mode{mode:o}", (0, (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1_600_000_000)[number]))
        (top / f"mode{mode:o}").chmod(mode | 0o400)
    for name in ("one", "one/file", "sparse"):
        os.setxattr(top / name, "user.shared", b"v" * 100)  # stored once, then elsewhere
        os.setxattr(top / name, f"user.{'n' * 200}", name.encode())
    os.setxattr(top / "sparse", "user.long", random.Random(8).randbytes(3000))
    os.setxattr(top / "sparse", "user.empty", b"")
    (top / "none").chmod(0o1777)
    return top


@pytest.mark.parametrize("options", [
    "gzip -b 128K", "xz -b 4K", "lz4 -b 1M", "zstd -b 4K -no-fragments", "gzip -b 1M -always-use-fragments", "zstd -b 128K -noI -noD",
    "gzip -b 4K -no-sparse -no-duplicates -no-xattrs", "xz -b 64K -Xbcj x86",
])  # fmt: skip
def test_mksquashfs(tree: Path, tmp_path: Path, options: str) -> None:
    run("mksquashfs", tree, tmp_path / "image", "-quiet", "-no-progress", "-all-root", "-comp", *options.split())
    wanted = compare(tmp_path / "image")
    top = os.fsencode(tree)
    names = {b""}
    for here, below, files in os.walk(top):
        for name in below + files:
            path = os.path.join(here, name)
            names.add(path[len(top) + 1 :])
            if os.path.isfile(path) and os.path.getsize(path) < 1 << 22:
                with open(path, "rb") as opened:
                    assert wanted[path[len(top) + 1 :]][9] == hashlib.sha256(opened.read()).hexdigest()
    assert set(wanted) == names


def test_an_image_behind_an_offset(tree: Path, tmp_path: Path) -> None:
    run("mksquashfs", tree / "sizes", tmp_path / "image", "-quiet", "-no-progress", "-comp", "zstd", "-offset", "8192")
    compare(tmp_path / "image", 8192)


def test_gensquashfs(tree: Path, tmp_path: Path, need: Need) -> None:
    listing = tmp_path / "listing"
    (tmp_path / "data").write_bytes(random.Random(3).randbytes(300_000))
    listing.write_text(
        "dir /dev 0755 0 0\nnod /dev/null 0666 0 0 c 1 3\nnod /dev/disk 0660 0 6 b 259 1048575\n"
        "pipe /fifo 0600 7 8\nsock /socket 0600 0 0\n"
        "slink /link 0777 0 0 dev/null\nfile /data 0640 1000 70000 data\nlink /hard 0 0 0 /data\n"
    )
    run(need("gensquashfs"), "-q", "-F", listing, "-D", tmp_path, "-c", "xz", "-b", "65536", tmp_path / "image")
    wanted = compare(tmp_path / "image")
    assert wanted[b"dev/disk"][7] == (259, 1048575) and wanted[b"data"][2:4] == (0, 0)


def test_tar2sqfs(tmp_path: Path, need: Need) -> None:
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    with tarfile.open(tmp_path / "tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(600):  # owners enough for a second block of them, were they more; modes of every kind
            member = tarfile.TarInfo(f"d/{number:03}")
            member.mode, member.uid, member.gid, member.mtime = number * 7 % 0o10000, number, 100_000 + number, number << 20
            member.size = number
            if number % 100 == 0:
                text = capability.decode("latin1") if max(capability) < 128 else ""
                member.pax_headers = {"SCHILY.xattr.security.capability": text, "SCHILY.xattr.user.n": "v" * number}
            tar.addfile(member, io.BytesIO(b"x" * number))
        for name, kind in (("null", tarfile.CHRTYPE), ("loop", tarfile.BLKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.devmajor, member.devminor = kind, 7, 200
            tar.addfile(member)
    with (tmp_path / "tar").open("rb") as opened:
        subprocess.run([need("tar2sqfs"), "-q", "-c", "zstd", tmp_path / "image"], stdin=opened, check=True)
    wanted = compare(tmp_path / "image")
    assert wanted[b"d/100"][10] == {b"security.capability": capability, b"user.n": b"v" * 100}
    assert wanted[b"null"][7] == (7, 200)


@pytest.mark.parametrize("compression", ["gzip", "xz", "lz4", "zstd"])
def test_our_own_writer(tmp_path: Path, compression: str) -> None:
    image = write(tmp_path / "image", everything, 4096, compression=compression)
    wanted = compare(image, 4096)
    assert {what[0] for what in wanted.values()} == set("dflbcps")


# --- long directories -------------------------------------------------------------------------------------------------------


def names_of(count: int) -> list[bytes]:
    return sorted(b"%05d-\xc3\xa9-%s" % (number, b"n" * (number % 40)) for number in range(count))


@pytest.fixture(scope="module", params=["ours", "mksquashfs"])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A directory of so many files, with another one in front of it, so that its listing does not begin with a block."""
    work = tmp_path_factory.mktemp("long")
    if request.param == "ours":
        return write(work / "image", lambda writer: {
            b"a": directory({b"x": symlink(b"y")}), b"many": directory({name: file(EMPTY) for name in names_of(70_000)}),
        }), 70_000  # fmt: skip
    (work / "tree/a").mkdir(parents=True)
    (work / "tree/many").mkdir()
    (work / "tree/a/x").symlink_to("y")
    for name in names_of(5000):
        os.close(os.open(os.fsencode(work / "tree/many") + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o644))
    run("mksquashfs", work / "tree", work / "image", "-quiet", "-no-progress", "-comp", "zstd")
    return work / "image", 5000


class Dirent(ctypes.Structure):
    """struct dirent of 64-bit systems."""

    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    )


def test_a_long_directory(long: tuple[Path, int]) -> None:
    image, count = long
    names = names_of(count)

    def act(server: Server) -> None:
        for wanted in random.Random(1).sample(names, 1000):  # before it is listed: the kernel knows none of them
            assert stat.S_ISREG(os.lstat(b"many/" + wanted).st_mode)
            with pytest.raises(FileNotFoundError):
                os.lstat(b"many/" + wanted + b"!")
        for wanted in (names[0], names[-1]):
            os.lstat(b"many/" + wanted)
        for missing in (b"!", b"\xff", b"n" * 255):
            with pytest.raises(FileNotFoundError):
                os.lstat(b"many/" + missing)
        assert os.listdir(b"many") == names
        assert [entry.name for entry in os.scandir(b"many") if entry.is_file(follow_symlinks=False)] == names
        for wanted in names[::70]:
            os.lstat(b"many/" + wanted)

        libc = ctypes.CDLL(None)
        libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
        libc.telldir.restype = ctypes.c_long
        stream = ctypes.c_void_p(libc.opendir(b"many"))
        read = lambda: Dirent.from_address(libc.readdir(stream)).d_name  # noqa: E731
        places, seen = [], []
        for _ in range(count + 2):
            places.append(libc.telldir(stream))
            seen.append(read())
        assert seen[:2] == [b".", b".."] and seen[2:] == names
        assert libc.readdir(stream) is None
        assert places == sorted(set(places)) and places[-1] < 1 << 31  # also a 32-bit program can hold them
        for index in [*random.Random(2).sample(range(count + 2), 100), 0, 1, 2, count + 1]:
            libc.seekdir(stream, ctypes.c_long(places[index]))
            assert read() == seen[index]
        for nonsense in (places[5] + 1, 1 << 40, (1 << 63) - 1):  # no place that was ever given: some entry, or the end
            libc.seekdir(stream, ctypes.c_long(nonsense))
            libc.readdir(stream)

    mounted(image, act)


# --- semantics --------------------------------------------------------------------------------------------------------------


def private(writer: Writer) -> dict[bytes, Node]:
    return {
        b"program": file(store(writer, b"#!/bin/sh\n"), 0o700, 1000, 1000),
        b"secret": file(store(writer, b"of another user"), 0o600, 1000, 1000),
        b"nobody": file(store(writer, b"no bits"), 0, 1000, 1000),
        b"closed": Node("d", 0, 1000, 1000, 1, payload={b"inner": file(store(writer, b"x" * 5000, 200_000, b"end"))}),
    }


def test_access_statfs_and_ends(tmp_path: Path) -> None:
    image = write(tmp_path / "image", private)

    def act(server: Server) -> None:
        assert os.access("program", os.X_OK) and os.access("closed", os.R_OK | os.X_OK)
        assert os.access("secret", os.R_OK) and not os.access("secret", os.X_OK) and not os.access("nobody", os.X_OK)
        assert not os.access("program", os.W_OK) and not os.access("closed", os.W_OK) and not os.access("missing", os.F_OK)
        with open("nobody", "rb") as opened:
            assert opened.read() == b"no bits"
        for forbidden in (lambda: os.truncate("secret", 0), lambda: os.mkdir("new"), lambda: os.unlink("secret")):
            with pytest.raises(OSError) as error:
                forbidden()
            assert error.value.errno == errno.EROFS
        numbers = os.statvfs(".")
        with open(server.fd, "rb", closefd=False) as opened:
            block = squashfs.check_superblock(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
        assert numbers.f_blocks * numbers.f_frsize >= block.bytes_used and numbers.f_bfree == numbers.f_bavail == 0
        assert (numbers.f_bsize, numbers.f_files, numbers.f_namemax) == (131072, 6, 256)
        size = 205_003
        with open("closed/inner", "rb") as opened:
            assert os.fstat(opened.fileno()).st_size == size
            for place, length in ((size - 3, 100), (size, 10), (size + 1, 10), (1 << 40, 1)):
                assert os.pread(opened.fileno(), length, place) == (b"end" if place < size else b"")
            assert os.pread(opened.fileno(), 10, 4995) == b"xxxxx" + bytes(5)
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:5] == b"xxxxx" and mapped[-3:] == b"end" and mapped[5000:10000] == bytes(5000)
        with pytest.raises(OSError) as error:
            os.getxattr("secret", "user.none")
        assert error.value.errno in (errno.ENODATA, errno.EOPNOTSUPP)

    mounted(image, act)


def test_attributes_larger_than_the_room_for_them(tree: Path, tmp_path: Path) -> None:
    run("mksquashfs", tree / "one", tmp_path / "image", "-quiet", "-no-progress")
    libc = ctypes.CDLL(None, use_errno=True)

    def act(server: Server) -> None:
        room = ctypes.create_string_buffer(200)
        assert libc.getxattr(b"file", b"user.shared", None, 0) == libc.getxattr(b"file", b"user.shared", room, 200) == 100
        assert libc.getxattr(b"file", b"user.shared", room, 99) == -1 and ctypes.get_errno() == errno.ERANGE
        assert libc.listxattr(b"file", room, 5) == -1 and ctypes.get_errno() == errno.ERANGE
        assert libc.getxattr(b"file", b"user.none", room, 200) == -1 and ctypes.get_errno() == errno.ENODATA

    mounted(tmp_path / "image", act)


def test_the_kernel_keeps_what_it_was_told(tree: Path, tmp_path: Path) -> None:
    run("mksquashfs", tree, tmp_path / "image", "-quiet", "-no-progress", "-comp", "zstd")

    def use() -> None:
        for path in ("one/file", "sizes/noise131073", "link255"):
            os.lstat(path)
        for path in ("one/missing", "missing/x", "sizes/noise"):
            with pytest.raises(FileNotFoundError):
                os.stat(path)
        for path in ("one/file", "sizes/noise131073"):
            fd = os.open(path, os.O_RDONLY)  # open() would ask with an ioctl whether it is a terminal
            while os.read(fd, 50_000):
                pass
            os.close(fd)
        os.readlink("link255")

    def act(server: Server) -> None:
        use()
        asked = server.proc("io")["syscr"]
        for _ in range(3):
            use()
        assert server.proc("io")["syscr"] == asked
        os.lstat("one")  # and yet the number does count
        os.listdir("three hundred")
        assert server.proc("io")["syscr"] != asked

    mounted(tmp_path / "image", act)


# --- processes --------------------------------------------------------------------------------------------------------------


def read_at_once(processes: int) -> None:
    """Many read the same files, each from another one on, and other ones; each says whether the contents were right."""
    names = sorted(os.listdir("sizes"))
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for name in names[number:] + names[:number]:
                    with open(f"sizes/{name}", "rb") as opened:
                        data = opened.read()
                    assert hashlib.sha256(data).digest() == DIGESTS[name]
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes


DIGESTS: dict[str, bytes] = {}


@pytest.mark.parametrize("block", ["4K", "128K", "1M"])
def test_many_processes_at_once(tree: Path, tmp_path: Path, block: str) -> None:
    run("mksquashfs", tree, tmp_path / "image", "-quiet", "-no-progress", "-comp", "lz4", "-b", block)
    DIGESTS.update({path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tree / "sizes").iterdir()})

    def act(server: Server) -> None:
        read_at_once(12)
        assert server.threads() >= min(2, len(os.sched_getaffinity(0)))
        assert server.threads() <= min(15, len(os.sched_getaffinity(0)))

    mounted(tmp_path / "image", act)


def test_a_limit_of_processes_costs_threads_only(tree: Path, tmp_path: Path) -> None:
    run("mksquashfs", tree, tmp_path / "image", "-quiet", "-no-progress", "-comp", "lz4")
    DIGESTS.update({path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tree / "sizes").iterdir()})

    def act(server: Server) -> None:
        read_at_once(8)
        assert server.threads() == 1

    mounted(tmp_path / "image", act, limit=0)


def test_a_killed_server_is_an_error_and_no_hang(tree: Path, tmp_path: Path) -> None:
    run("mksquashfs", tree, tmp_path / "image", "-quiet", "-no-progress")

    def act(server: Server) -> None:
        fd = os.open("sparse", os.O_RDONLY)
        os.kill(server.pid(), signal.SIGKILL)
        time.sleep(0.1)
        signal.alarm(10)
        for use in (lambda: os.stat("one/file"), lambda: os.listdir("sizes"), lambda: os.read(fd, 1)):
            with pytest.raises(OSError) as error:
                use()
            assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)

    mounted(tmp_path / "image", act)


def test_what_is_no_image_ends_the_server(tmp_path: Path) -> None:
    image = write(tmp_path / "image", private)
    spoiled = bytearray(image.read_bytes())
    spoiled[48:56] = struct.pack("<Q", len(spoiled))  # the owners
    image.write_bytes(spoiled)
    server = Server(image)

    def act() -> None:
        os.mkdir("m")
        signal.alarm(10)
        with pytest.raises(OSError) as error:
            server.mount("m")
            os.stat("m/program")
        assert error.value.errno == errno.ENOTCONN

    inside(act, before=server.start)
    os.close(server.fd)


# --- confinement ------------------------------------------------------------------------------------------------------------

# A decompressor that has been taken over: at its first block it tries what it wants to do, and then says how that went in the place
# of each file that it should decompress.  Metadata it decompresses, with zlib, or nothing would come so far.
TAKEN_OVER = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <unistd.h>

int uncompress(unsigned char *, unsigned long *, const unsigned char *, unsigned long);
static char said[4000];
#define TRY(what) do { errno = 0; long got = (long)(what); \
	snprintf(said + strlen(said), sizeof said - strlen(said), "%s: %s\n", #what, got < 0 ? strerror(errno) : "done"); } while (0)

void *libdeflate_alloc_decompressor(void) { return said; }

int libdeflate_zlib_decompress(void *unused, const void *from, size_t length, void *into, size_t room, size_t *got)
{
	if (!*said) {
		TRY(open("/etc/passwd", O_RDONLY));
		TRY(open("TARGET", O_WRONLY | O_CREAT, 0600));
		TRY(rename("TARGET", "TARGET2"));
		TRY(unlink("TARGET"));
		TRY(socket(AF_UNIX, SOCK_STREAM, 0));
		TRY(execl("/bin/true", "true", NULL));
		TRY(kill(getppid(), 0));
		TRY(ptrace(PTRACE_ATTACH, getppid(), 0, 0));
		TRY(mount("none", "/tmp", "tmpfs", 0, ""));
		TRY(write(0, "x", 1));
	}
	unsigned long out = room;
	int failed = uncompress(into, &out, from, length);
	*got = out;
	if (!failed && out > sizeof said && !memcmp(into, "PROBE", 5))
		memcpy(into, said, sizeof said);
	return failed;
}
"""


def test_a_decompressor_that_was_taken_over_can_do_nothing(tmp_path: Path, need: Need) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "taken.c").write_text(TAKEN_OVER.replace("TARGET", str(target)))
    run(need("gcc"), "-shared", "-fPIC", "-o", tmp_path / "libdeflate.so.0", tmp_path / "taken.c", "-l:libz.so.1")

    def make(writer: Writer) -> dict[bytes, Node]:
        owners = {b"%d" % number: file(EMPTY, 0o644, number) for number in range(500)}  # so many that their table is compressed
        return {**owners, b"probe": file(store(writer, b"PROBE" * 2000))}

    image = write(tmp_path / "image", make, compression="gzip")
    said: list[str] = []

    def act(server: Server) -> None:
        with open("probe", "rb") as opened:
            said[:] = opened.read(4000).rstrip(b"\0").decode().splitlines()
        assert len(said) == 10 and all(line.endswith(": Operation not permitted") for line in said), said
        status = server.proc("status")
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Amb")} == {"0" * 16}

    mounted(image, act, environment={"LD_LIBRARY_PATH": str(tmp_path)})
    assert target.read_text() == "precious"
