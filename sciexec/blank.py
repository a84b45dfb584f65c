"""A new overlay to write to: an ext3 file system in a file, with the directories upper and work in it, or that as a partition of a SIF.

    file       made beside its name and renamed, whole or not at all
    SIF        behind the last object; then its descriptor, then the header: a reader never finds half of it

mke2fs fills the file system from a directory (-d) and takes the owners along.  For --fakeroot they must be root in it: then it
runs in a user namespace in which the caller is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time

from sciexec import kernel, sif
from sciexec.errors import HostError, ImageError, escaped
from sciexec.sif import Sif

MKE2FS = "mke2fs"
SMALLEST = 64  # MiB


def create(path: str, *, size: int, sparse: bool, directories: list[str], fakeroot: bool) -> None:
    """Make an overlay.

    Arguments:
        path: of a file that is not there yet, or of a SIF.
        size: of the file system, in MiB.  sparse: blocks that are not used yet take no room.
        directories: to make in it, as absolute paths of the container.
        fakeroot: owned by root in it, for runs with --fakeroot by runtimes that map no other owner.
    Raises ImageError, HostError.
    """
    if size < SMALLEST:
        raise ImageError(f"making an overlay: {size} MiB are too few", f"--size {SMALLEST} is the least")
    tree = tempfile.mkdtemp(prefix="sciexec-overlay-")
    try:
        fill(tree, directories)
        if os.path.lexists(path):
            append(path, tree, size << 20, sparse=sparse, fakeroot=fakeroot)
        else:
            new_file(path, tree, size << 20, sparse=sparse, fakeroot=fakeroot)
    except OSError as error:
        raise HostError(f"making the overlay {escaped(path)}: {error.strerror}") from error
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def fill(tree: str, directories: list[str]) -> None:
    """What is in a new overlay."""
    for name in ("upper", "work"):
        os.mkdir(f"{tree}/{name}")
        os.chmod(f"{tree}/{name}", 0o755)
    for directory in directories:
        below = os.path.normpath("/" + directory)  # .. does not lead above the root
        os.makedirs(f"{tree}/upper{below}", 0o755, exist_ok=True)


def new_file(path: str, tree: str, size: int, *, sparse: bool, fakeroot: bool) -> None:
    partial = f"{path}.{os.getpid()}.partial"
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        reserve(fd, 0, size, sparse=sparse)
        mke2fs(partial, tree, 0, size, fakeroot=fakeroot)
        os.fsync(fd)
        os.rename(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    finally:
        os.close(fd)


def append(path: str, tree: str, size: int, *, sparse: bool, fakeroot: bool) -> None:
    """Add an overlay partition to a SIF."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not sif.is_sif(os.pread(fd, sif.HEADER.size, 0)):
            raise ImageError(f"making the overlay {escaped(path)}: the file exists and is no SIF", "remove it, or choose another name")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HostError(f"adding an overlay to {escaped(path)}: a run uses it", "when that has ended, it can be done") from None
        parsed = sif.read(fd, path)
        check(parsed, path)
        end = os.fstat(fd).st_size
        offset = -(-end // sif.PARTITION_ALIGNMENT) * sif.PARTITION_ALIGNMENT
        try:
            reserve(fd, offset, size, sparse=sparse)
            mke2fs(path, tree, offset, size, fakeroot=fakeroot)
            os.fsync(fd)
        except BaseException:
            os.ftruncate(fd, end)
            raise
        now = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
        sif.add_partition(fd, parsed, (offset, size), fs=sif.FS_EXT3, parttype=sif.PART_OVERLAY, created=now)
    finally:
        os.close(fd)


def check(parsed: Sif, path: str) -> None:
    """Refuse a SIF to which no overlay can be added."""
    what = f"adding an overlay to {escaped(path)}"
    if parsed.primary.fs != sif.FS_SQUASHFS:
        raise ImageError(f"{what}: its root file system is not a SquashFS")
    if parsed.by_type(sif.SIGNATURE):
        raise ImageError(f"{what}: it is signed, and would be another one then", "an overlay in a file of its own leaves it as it is")
    for descriptor in parsed.descriptors:
        if descriptor.parttype == sif.PART_OVERLAY and descriptor.fs == sif.FS_EXT3:
            raise ImageError(f"{what}: it has one already, object {descriptor.id}")
    if len(parsed.descriptors) == parsed.total:
        raise ImageError(f"{what}: its table of {parsed.total} objects is full")


def reserve(fd: int, offset: int, size: int, *, sparse: bool) -> None:
    """Make room for a file system at the end of a file."""
    if sparse:
        os.ftruncate(fd, offset + size)
    else:
        os.posix_fallocate(fd, offset, size)


def mke2fs(path: str, tree: str, offset: int, size: int, *, fakeroot: bool) -> None:
    """Make the file system, with what is in `tree` in it."""
    program = shutil.which(MKE2FS, path="/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin")
    if program is None:
        raise HostError(f"making an overlay: {MKE2FS} is not installed", "it is in the package e2fsprogs")
    uid, gid = (0, 0) if fakeroot else (os.getuid(), os.getgid())
    extended = f"nodiscard,offset={offset},root_owner={uid}:{gid}"  # discarding would punch holes into a file that is to have none
    command = [program, "-q", "-F", "-t", "ext3", "-b", "4096", "-m", "0", "-d", tree, "-E", extended, path, f"{size >> 10}k"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, preexec_fn=become_root if fakeroot else None
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(f"making the overlay {escaped(path)}: {escaped(said[-1]) if said else f'{MKE2FS} failed'}")


def become_root() -> None:
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    kernel.map_ids(proc, f"0 {uid} 1", f"0 {gid} 1")
    os.close(proc)
