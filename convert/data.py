"""Data sets as one file: a directory becomes a data partition, in a SIF of its own or in that of the workflow that uses it.

sciexec data package DIR OUT.sif    (also: sciexec build --data OUT.sif DIR)
sciexec data add IMAGE.sif DIR      the image is written anew, with the partition behind it, and replaced as a whole

The name of a partition's descriptor is the name of the data.  How data are shown in a container is told in sciexec.data.
"""

from __future__ import annotations

import contextlib
import os

from convert import build, pull, sandbox
from convert.output import Output
from convert.progress import Progress
from convert.pull import Settings
from sciexec import pysquashfs, sif
from sciexec.errors import HostError, UsageError, escaped


def package(directory: str, out: str, settings: Settings, progress: Progress, *, name: str = "", force: bool = False) -> str:
    """Make the SIF file `out` of a directory; returns `out`.  The same tree gives the same bytes.

    Arguments:
        name: of the data; the directory's if empty.  force: replace what is there.
    Raises: UsageError, ImageError, HostError; nothing appears under the name then.
    """
    name, created = _checked(directory, name)
    with Output(out, force=force) as output:
        progress.step(f"packing {directory} into {out}")
        builder = sif.Builder(output.fd, arch="unknown", created=created)
        try:
            builder.finish(_pack(directory, output.fd, builder.partition_offset(), created, settings), parttype=sif.PART_DATA, name=name)
        except OSError as error:
            raise HostError(f"writing {out}: {error.strerror}") from error
        output.publish()
    return out


def add(path: str, directory: str, settings: Settings, progress: Progress, *, name: str = "", force: bool = False) -> str:
    """Put a directory into the SIF at `path` as one more data partition; returns `path`.

    What is in the file stays as it is, signatures included: the partition has a group of its own.  A container that runs from
    the file keeps the old one.

    Arguments:
        name: of the data; the directory's if empty.  force: add it although the name is taken; the first of a name is found.
    Raises: UsageError, ImageError, HostError; the file is untouched then.
    """
    name, created = _checked(directory, name)
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"opening {path}: {error.strerror}") from error
        stack.callback(os.close, fd)
        parsed, status = sif.read(fd, path), os.fstat(fd)
        if any(descriptor.name == name for descriptor in parsed.descriptors) and not force:
            raise UsageError(f"adding to {path}: it holds an object called {escaped(name)} already", "--name gives another name")
        output = stack.enter_context(Output(path, force=True, mode=status.st_mode & 0o777))
        progress.step(f"packing {directory} into {path}")
        try:
            build.copy(fd, 0, status.st_size, output.fd, 0, path)
            offset = -(-status.st_size // sif.PARTITION_ALIGNMENT) * sif.PARTITION_ALIGNMENT
            size = _pack(directory, output.fd, offset, created, settings)
            sif.add_partition(
                output.fd, parsed, (offset, size), fs=sif.FS_SQUASHFS, parttype=sif.PART_DATA, created=created, name=name, apart=True
            )
            os.fchmod(output.fd, status.st_mode & 0o777)
        except OSError as error:
            raise HostError(f"writing {path}: {error.strerror}") from error
        output.publish()
    return path


def _checked(directory: str, name: str) -> tuple[str, int]:
    """The name of the data and the time they carry, Unix s."""
    pysquashfs.available()
    if not os.path.isdir(directory):
        there = "it is no directory" if os.path.lexists(directory) else "there is no such directory"
        raise UsageError(f"packing {escaped(directory)}: {there}", "data are packed from a directory")
    name = name or os.path.basename(os.path.realpath(directory))
    if not name.isprintable() or len(os.fsencode(name)) >= sif.NAME_SIZE or set(name) & set("/:,\\") or not name.strip("."):
        raise UsageError(
            f"packing {escaped(directory)}: data cannot be called {escaped(name)!r}",
            "--name takes up to 127 bytes, without slash, colon, comma and backslash",
        )
    return name, pull.timestamp(int(os.stat(directory).st_mtime))


def _pack(directory: str, fd: int, offset: int, created: int, settings: Settings) -> int:
    """Write the directory as a SquashFS that begins at `offset`; returns its size, in bytes."""
    with pull.new_writer(fd, offset, created, settings) as writer:
        return writer.finish(sandbox.pack(directory, writer))
