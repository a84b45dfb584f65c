"""`sciexec build`: an image out of whatever is given.

SPEC                     OUT.sif                                  OUT as a sandbox directory
URI                      streamed (convert.pull)                  streamed into a nameless image, then unpacked
SIF, SquashFS            its SquashFS as it is, or packed anew    unpacked
directory                packed                                   refused: copy it
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace

from convert import pull, reference, sandbox
from convert.output import Output
from convert.progress import Progress
from convert.pull import Settings
from sciexec import elf, image, pysquashfs, sif
from sciexec.errors import HostError, ImageError, UsageError, escaped
from sciexec.pysquashfs import Reader

PIECE = 1 << 28  # bytes copied at a time
LOOKED_AT = 4096  # files of an image that are looked at for one that says what machine it is for
COPIED = (sif.DEFFILE, sif.ENVVAR, sif.LABELS, sif.GENERIC_JSON, sif.GENERIC, sif.SBOM)  # not signatures: they sign another file


def build(out: str, spec: str, settings: Settings, progress: Progress, *, as_sandbox: bool = False, force: bool = False) -> str:
    """Make the image file (or directory) `out` from `spec`; returns `out`.

    Arguments:
        spec: a URI, or the path of a SIF, a SquashFS or a directory; a path that exists comes first.
        as_sandbox: make a directory.  force: replace what is there.

    Raises: UsageError, ImageError, LimitError, RegistryError, HostError; nothing appears under the name then.
    """
    pysquashfs.available()
    local = os.path.lexists(spec)
    if not local and not reference.is_uri(spec):
        raise UsageError(
            f"building {out}: there is no file {escaped(spec)}, and it is no URI",
            "for instance docker://python:3.12 or docker-archive:file.tar",
        )
    if as_sandbox:
        return _sandbox(out, spec, settings, progress, force=force)
    if not local:
        return pull.pull(spec, out, settings, progress, force=force)
    if _is_definition(spec):
        raise UsageError(
            f"building {out}: {spec} is a definition file", "this release builds from images; Apptainer builds definition files"
        )
    with contextlib.closing(_Source(spec)) as source, Output(out, force=force) as output:
        progress.step(f"building {out} from the {source.image.kind} {spec}")
        try:
            _write(source, output.fd, settings)
        except OSError as error:
            raise HostError(f"writing {out}: {error.strerror}") from error
        output.publish()
    return out


def _is_definition(path: str) -> bool:
    """Whether a file begins as a definition file does: with its bootstrap agent."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return any(line.strip().lower().startswith(b"bootstrap:") for line in file.read(4096).splitlines())
    return False


class _Source:
    """An image on disk, open."""

    def __init__(self, path: str) -> None:
        self.image = image.open_image(path)
        self.path = path

    def reader(self) -> Reader:
        return Reader(self.image.fd, self.image.offset, self.path)

    def close(self) -> None:
        os.close(self.image.fd)


def _write(source: _Source, fd: int, settings: Settings) -> None:
    found = source.image
    if found.kind == "directory":
        created = pull.timestamp(int(os.stat(found.path).st_mtime))
        arch = _machine(_files_below(found.path))
    else:
        created = pull.timestamp(found.sif.created if found.sif is not None else source.reader().superblock().mtime)
        arch = found.sif.arch if found.sif is not None else _machine(_files_in(source.reader()))
    builder = sif.Builder(fd, arch=arch, created=created)
    if found.sif is None:
        builder.add(sif.DEFFILE, "", f"bootstrap: localimage\nfrom: {os.path.basename(source.path)}\n".encode("utf-8", "surrogateescape"))
    else:
        for descriptor in found.sif.descriptors:
            if descriptor.type in COPIED:
                builder.add(descriptor.type, descriptor.name, sif.read_object(found.fd, found.sif, descriptor), descriptor.extra)
    offset = builder.partition_offset()
    if found.kind != "directory" and not settings.repack:
        copy(found.fd, found.offset, found.size, fd, offset, source.path)
        builder.finish(found.size)
        return
    with pull.new_writer(fd, offset, created, settings) as writer:
        root = sandbox.pack(source.path, writer) if found.kind == "directory" else source.reader().copy(writer)
        builder.finish(writer.finish(root))


def copy(source: int, start: int, size: int, target: int, position: int, path: str) -> None:
    """Bytes from one file into another, copied by the kernel.  Raises ImageError if there are fewer, OSError."""
    end = start + size
    os.lseek(target, position, os.SEEK_SET)
    while start < end:
        count = os.sendfile(target, source, start, min(PIECE, end - start))
        if count == 0:
            raise ImageError(f"copying {path}: the file ends before its SquashFS does")
        start += count


def _sandbox(out: str, spec: str, settings: Settings, progress: Progress, *, force: bool) -> str:
    """Unpack into a hidden directory beside `out`, which then takes its name."""
    if os.path.isdir(spec):
        raise UsageError(f"building {out}: {spec} is a directory already", "cp -a copies it")
    if os.path.lexists(out) and not force:
        raise UsageError(f"building {out}: it exists already", "--force replaces it")
    out = out.rstrip("/") or out
    parent, name = os.path.split(out)
    hidden = os.path.join(parent, f".{name[:200]}.{secrets.token_hex(6)}")
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(_remove, f"{hidden}.part")
            os.mkdir(f"{hidden}.part", 0o755)  # first: where this fails nothing has been downloaded yet
            if os.path.lexists(spec):
                source = stack.enter_context(contextlib.closing(_Source(spec)))
                reader = source.reader()
            else:
                # Whiteouts, links and owners are settled in the converter alone; lz4 because the image lives for seconds.
                file = stack.enter_context(tempfile.TemporaryFile(dir=parent or "."))
                settings = replace(settings, compression="lz4", level=None)
                pull.write(reference.parse(spec), file.fileno(), settings, progress)
                reader = Reader(file.fileno(), sif.read(file.fileno(), spec).primary.offset, spec)
            target = os.open(f"{hidden}.part", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, target)
            progress.step(f"unpacking into {out}")
            left_out = sum(reader.unpack(target))
            if left_out:
                progress.warn(f"{out}: {left_out} devices and sockets were left out, which an ordinary user cannot make")
            if os.path.lexists(
                out
            ):  # a directory cannot be replaced by a rename: the old one steps aside, whole, until the new one is there
                os.rename(out, f"{hidden}.old")
            os.rename(f"{hidden}.part", out)
            _remove(f"{hidden}.old")
        except OSError as error:
            raise HostError(f"building {out}: {error.strerror}") from error
    return out


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _machine(heads: Iterator[bytes]) -> str:
    """The architecture of the first ELF file found, as Apptainer decides it; "unknown" where there is none."""
    for number, head in enumerate(heads):
        found = elf.machine(head)
        if found is not None:
            return found
        if number > LOOKED_AT:
            break
    return "unknown"


def _files_below(path: str) -> Iterator[bytes]:
    for directory, names, files in os.walk(path):
        names.sort()
        for name in sorted(files):
            with contextlib.suppress(OSError):
                fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    yield os.read(fd, elf.HEADER)
                finally:
                    os.close(fd)


def _files_in(reader: Reader) -> Iterator[bytes]:
    for _, entry in reader.walk():
        if entry.kind == "f":
            for position, piece in reader.pieces(entry):
                yield bytes(piece[: elf.HEADER]) if position == 0 else b""
                break
