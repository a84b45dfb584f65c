"""`sciexec inspect` and `sciexec sif`: what an image says about itself, read out of it; nothing of it is run or followed.

    SIF          the object inspect-metadata.json, where there is one: no file system is opened
    SIF, SquashFS, directory
                 files below /.singularity.d and /scif/apps: regular ones of at most a MiB, symbolic links not followed

Commands return text and leave printing to their caller.  Source of the shapes: what Apptainer 1.4 prints.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import stat
import time
from collections.abc import Collection, Iterator
from typing import Any, Protocol
from uuid import UUID

from sciexec import image, sif, unsquashfs
from sciexec.errors import HostError, ImageError, LimitError, UsageError, escaped

METADATA = "inspect-metadata.json"
MAX_FILE = 1 << 20  # bytes; the scripts and labels of a real image are a few KiB
MAX_APPS = 1000

# In the order of the document's keys, which scripts have come to rely on.
ATTRIBUTES = ("environment", "labels", "runscript", "test", "helpfile", "deffile", "startscript")
PRINTED = ("deffile", "runscript", "startscript", "test", "helpfile", "environment", "labels")  # without --json
FILES = {
    "deffile": ".singularity.d/Singularity",
    "runscript": ".singularity.d/runscript",
    "startscript": ".singularity.d/startscript",
    "test": ".singularity.d/test",
    "helpfile": ".singularity.d/runscript.help",
    "labels": ".singularity.d/labels.json",
    "environment": ".singularity.d/env",
}
APP_FILES = {
    "runscript": "scif/runscript",
    "startscript": "scif/startscript",
    "test": "scif/test",
    "helpfile": "scif/runscript.help",
    "labels": "scif/labels.json",
    "environment": "scif/env",
}
ENVIRONMENT_SCRIPTS = ("10-docker*.sh", "9[0-3]-*.sh")  # what came from the image's maker; the others are a runtime's
APP_ENVIRONMENT_SCRIPTS = ("90-environment.sh",)

Attributes = dict[str, Any]


class Tree(Protocol):
    """The root file system of an image, as far as it is read here.  Paths are relative to its root."""

    def read(self, path: str) -> bytes | None:
        """A regular file of at most MAX_FILE bytes; None where there is nothing."""

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; nothing where it is none."""


def inspect(
    path: str, wanted: Collection[str] = (), *, as_json: bool = False, app: str = "", list_apps: bool = False, terminal: bool = False
) -> str:
    """The text that `sciexec inspect` prints, newline included.

    Arguments:
        path: a SIF, a SquashFS or a directory.
        wanted: names out of ATTRIBUTES; none means labels.
        as_json: one document instead of plain text.
        app: of this application (SCIF) instead of the image.
        list_apps: the names of the applications, as_json: with their attributes.
        terminal: control characters are escaped, for text that a person's terminal will interpret.

    Raises ImageError for what is missing, no image or no such application, HostError for what cannot be read.
    """
    chosen = [name for name in ATTRIBUTES if name in wanted] if wanted or list_apps else ["labels"]
    found = attributes(path, chosen, apps=bool(app or list_apps or len(chosen) == len(ATTRIBUTES)))
    apps = found.get("apps", {})
    if app and app not in apps:
        raise ImageError(f"inspecting {path}: there is no application {escaped(app)}", f"`sciexec apps {escaped(path)}` lists them")
    if app:
        found = {name: value for name, value in apps[app].items() if name in chosen}
        found = {"apps": {app: found}} if as_json else found
    if as_json:
        return json.dumps({"data": {"attributes": found}, "type": "container"}, indent="\t") + "\n"
    text = "".join(f"{name}\n" for name in apps) if list_apps else _plain(found)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed
    return "".join(c if c in "\n\t" else escaped(c) for c in text) if terminal else text


def _plain(found: Attributes) -> str:
    parts = []
    for name in PRINTED:
        value = found.get(name)
        if name == "labels" and value:
            parts += [f"{label}: {text}\n" for label, text in sorted(value.items())]
        elif name == "environment" and value:
            parts += [f"=== {script} ===\n{text}\n\n" for script, text in sorted(value.items())]
        elif value:
            parts.append(f"{value}\n")
    return "".join(parts)


def attributes(path: str, wanted: Collection[str] = ATTRIBUTES, *, apps: bool = False) -> Attributes:
    """Name -> value of those that the image has: text, or a map of text for labels and environment (path -> script).

    With apps, also "apps": name -> all of them of each application.  Raises as inspect() does.
    """
    with _opened(path) as fd:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            tree: Tree = _Directory(fd, path)
            if not tree.names(".singularity.d"):
                raise ImageError(f"inspecting {path}: the directory is no image (it holds no .singularity.d)")
            return _gathered(tree, wanted, apps)
        if sif.is_sif(os.pread(fd, sif.HEADER.size, 0)):
            file = sif.read(fd, path)
            described = file.find(METADATA)
            if described is not None:
                return _parsed(sif.read_object(fd, file, described), path, wanted, apps)
    opened = image.open_image(path)
    try:
        return _gathered(_SquashFS(opened.fd, opened.offset, path), wanted, apps)
    finally:
        os.close(opened.fd)


def _parsed(document: bytes, path: str, wanted: Collection[str], apps: bool) -> Attributes:
    """The attributes out of inspect-metadata.json, with every value of the type that it should have."""
    try:
        everything = json.loads(document)["data"]["attributes"]
        found = _selected(everything, wanted)
        if apps and everything.get("apps"):
            found = {"apps": {str(name): _selected(app, ATTRIBUTES) for name, app in everything["apps"].items()}, **found}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"inspecting {path}: the object {METADATA} is not what it should be") from error
    return found


def _selected(everything: Attributes, wanted: Collection[str]) -> Attributes:
    found: Attributes = {}
    for name in ATTRIBUTES:
        value = everything.get(name)
        if name in wanted and value:
            found[name] = {str(key): str(text) for key, text in value.items()} if name in ("labels", "environment") else str(value)
    return found


def _gathered(tree: Tree, wanted: Collection[str], apps: bool) -> Attributes:
    """The attributes out of the image's own files."""
    found: Attributes = {}
    names = tree.names("scif/apps")[:MAX_APPS] if apps else []
    if names:
        found["apps"] = {name: dict(_read(tree, f"scif/apps/{name}/", APP_FILES, APP_ENVIRONMENT_SCRIPTS, ATTRIBUTES)) for name in names}
    return {**found, **dict(_read(tree, "", FILES, ENVIRONMENT_SCRIPTS, wanted))}


def _read(
    tree: Tree, top: str, files: dict[str, str], scripts: tuple[str, ...], wanted: Collection[str]
) -> Iterator[tuple[str, str | dict[str, str]]]:
    for name in ATTRIBUTES:
        path = top + files.get(name, "")
        value: str | dict[str, str] = ""
        if name not in wanted or name not in files:
            continue
        if name == "environment":
            paths = [f"{path}/{script}" for script in tree.names(path) if any(fnmatch.fnmatchcase(script, known) for known in scripts)]
            value = {f"/{script}": _text(tree.read(script)) for script in paths}
        elif name == "labels":
            value = _labels(tree.read(path), path)
        else:
            value = _text(tree.read(path))
        if value:
            yield name, value


def _labels(document: bytes | None, path: str) -> dict[str, str]:
    if document is None:
        return {}
    try:
        return {str(label): str(text) for label, text in json.loads(document).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ImageError(f"inspecting an image: /{path} is not a map in JSON") from error


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace").rstrip("\n")


# --- where files are read from --------------------------------------------------------------------------------------------


class _Directory:
    """An unpacked image; whoever made it may have put links or devices anywhere."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    def read(self, path: str) -> bytes | None:
        fd = self._open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not hold us up
        if fd is None:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"inspecting {self._name}: /{escaped(path)} is not a regular file")
            if status.st_size > MAX_FILE:
                raise LimitError(f"inspecting {self._name}: /{escaped(path)} has {status.st_size} bytes, more than {MAX_FILE}")
            return os.read(fd, MAX_FILE)
        finally:
            os.close(fd)

    def names(self, path: str) -> list[str]:
        fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        if fd is None:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def _open(self, path: str, flags: int) -> int | None:
        """Open one component after another, none of which may be a symbolic link; None where one is missing."""
        *above, last = path.split("/")
        fd = os.dup(self._fd)
        try:
            for name, how in (*((name, os.O_PATH | os.O_DIRECTORY) for name in above), (last, flags)):
                below = os.open(name, how | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = below
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOENT, errno.ENOTDIR):  # a link where a directory is wanted counts as ENOTDIR
                return None
            if error.errno == errno.ELOOP:
                raise ImageError(f"inspecting {self._name}: /{escaped(path)} is a symbolic link") from error
            raise HostError(f"inspecting {self._name}: /{escaped(path)}: {error.strerror}") from error
        return fd


class _SquashFS:
    """The file system that begins at `offset` of an open file."""

    def __init__(self, fd: int, offset: int, name: str) -> None:
        self._reader = unsquashfs.Reader(fd, offset, name)
        self._name = name

    def read(self, path: str) -> bytes | None:
        entry = self._reader.lookup(os.fsencode(path))
        if entry is None:
            return None
        if entry.kind != "f":
            raise ImageError(f"inspecting {self._name}: /{escaped(path)} is not a regular file")
        return self._reader.read(entry, MAX_FILE)

    def names(self, path: str) -> list[str]:
        entry = self._reader.lookup(os.fsencode(path))
        return sorted(map(os.fsdecode, self._reader.listdir(entry))) if entry is not None and entry.kind == "d" else []


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """A file descriptor of an image, which is a regular file or a directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"opening {path}: no such file or directory") from None
    except OSError as error:
        raise HostError(f"opening {path}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode) and not stat.S_ISDIR(mode):
            raise ImageError(f"opening {path}: neither a file nor a directory")
        yield fd
    except BrokenPipeError:  # of the output
        raise
    except OSError as error:
        raise HostError(f"reading {path}: {error.strerror}") from error
    finally:
        os.close(fd)


# --- sciexec sif ----------------------------------------------------------------------------------------------------------

TYPES = {
    sif.DEFFILE: "Def.FILE",
    sif.ENVVAR: "Env.Vars",
    sif.LABELS: "JSON.Labels",
    sif.PARTITION: "FS",
    sif.SIGNATURE: "Signature",
    sif.GENERIC_JSON: "JSON.Generic",
    sif.GENERIC: "Generic/Raw",
    sif.CRYPTO_MESSAGE: "Cryptographic Message",
    sif.SBOM: "SBOM",
    sif.OCI_ROOT_INDEX: "OCI.RootIndex",
    sif.OCI_BLOB: "OCI.Blob",
}
UNKNOWN = "Unknown"
FILE_SYSTEMS = {
    sif.FS_SQUASHFS: "Squashfs",
    sif.FS_EXT3: "Ext3",
    sif.FS_ARCHIVE: "Archive",
    sif.FS_RAW: "Raw",
    sif.FS_ENCRYPTED_SQUASHFS: "Encrypted squashfs",
    sif.FS_GOCRYPTFS_SQUASHFS: "Gocryptfs squashfs",
}
PARTITIONS = {sif.PART_SYSTEM: "System", sif.PART_PRIMARY: "*System", sif.PART_DATA: "Data", sif.PART_OVERLAY: "Overlay"}
ENCODINGS = {1: "OpenPGP", 2: "PEM"}
MESSAGES = {0x100: "Clear Signature", 0x200: "RSA-OAEP"}
BILLS = dict(enumerate("cyclonedx-json cyclonedx-xml github-json spdx-json spdx-rdf spdx-tag-value spdx-yaml syft-json".split(), 1))
HASHES = {1: "SHA-256", 2: "SHA-384", 3: "SHA-512", 4: "BLAKE2s-256", 5: "BLAKE2b-256"}
LISTED = {"Filesystem Type", "Partition Type", "Architecture", "Hash Type", "Format Type", "Message Type", "Format"}
YEAR_1 = -62135596800  # Go's zero time, which stands for none
PIECE = 1 << 20  # bytes read and written at a time


def sif_list(path: str) -> str:
    """`sif list`: one line for each object.  Raises ImageError, HostError."""
    with _opened(path) as fd:
        file = sif.read(fd, path)
    rule = "-" * 78
    lines = [rule, "ID   |GROUP   |LINK    |SIF POSITION (start-end)  |TYPE", rule]
    for d in file.descriptors:
        position = f"{d.offset}-{d.offset + d.size}"
        lines.append(f"{d.id:<4} |{_number(d.group):<7} |{_link(d.link, 3):<7} |{position:<25} |{_kind(d)}")
    return "\n".join(lines) + "\n"


def sif_header(path: str) -> str:
    """`sif header`: the global header.  Raises ImageError, HostError."""
    with _opened(path) as fd:
        file = sif.read(fd, path)
    return _table(
        {
            "Launch Script": escaped(file.launch.rstrip("\n")),
            "Version": escaped(file.version),
            "Primary Architecture": "" if file.arch == "unknown" else file.arch,
            "ID": str(UUID(bytes=file.uuid)) if any(file.uuid) else "",
            "Created At": _time(file.created),
            "Modified At": _time(file.modified),
            "Descriptors Free": str(file.free),
            "Descriptors Total": str(file.total),
            "Descriptors Offset": str(file.table_offset),
            "Descriptors Size": _size(file.table_size),
            "Data Offset": str(file.data_offset),
            "Data Size": _size(file.data_size),
        },
        gap=1,
    )


def sif_info(path: str, number: int) -> str:
    """`sif info ID`: one descriptor.  Raises UsageError for an id that is not there, ImageError, HostError."""
    with _opened(path) as fd:
        d = _object(sif.read(fd, path), number)
    rows = {
        "Data Type": TYPES.get(d.type, UNKNOWN),
        "ID": str(d.id),
        "Group ID": _number(d.group),
        "Linked ID": _link(d.link),
        "Offset": str(d.offset),
        "Size": str(d.size),
        "Created At": _time(d.created),
        "Modified At": _time(d.modified),
        "Name": escaped(d.name),
        **_details(d),
    }
    return "".join(f"  {line}\n" for line in _table(rows, gap=2).splitlines())


def sif_dump(path: str, number: int, out: int) -> None:
    """`sif dump ID`: the bytes of one object to the file descriptor `out`.

    Raises UsageError for an id that is not there, ImageError, HostError; BrokenPipeError where the reader has gone.
    """
    with _opened(path) as fd:
        d = _object(sif.read(fd, path), number)
        position, end = d.offset, d.offset + d.size
        while position < end:
            piece = os.pread(fd, min(PIECE, end - position), position)
            if not piece:
                raise ImageError(f"reading {path}: SIF object {number} ends early (the file was truncated)")
            position += len(piece)
            while piece:
                piece = piece[_written(out, piece) :]


def _written(out: int, piece: bytes) -> int:
    try:
        return os.write(out, piece)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostError(f"writing to standard output: {error.strerror}") from error


def _object(file: sif.Sif, number: int) -> sif.Descriptor:
    for descriptor in file.descriptors:
        if descriptor.id == number:
            return descriptor
    raise UsageError(f"reading {file.name}: there is no SIF object {number}", f"`sciexec sif list {file.name}` lists them")


def _table(rows: dict[str, str], gap: int) -> str:
    """Lines "Name: value" with the values below each other, `gap` blanks from the longest name; rows without a value are left out."""
    rows = {name: value for name, value in rows.items() if value}
    width = max(map(len, rows)) + 1 + gap
    return "".join(f"{name + ':':<{width}}{value}\n" for name, value in rows.items())


def _number(group: int) -> str:
    return str(group) if group else "NONE"


def _link(link: int, width: int = 0) -> str:
    return f"{link & ~sif.GROUP_MASK:<{width}} (G)" if link & sif.GROUP_MASK else _number(link)


def _kind(d: sif.Descriptor) -> str:
    details = "/".join(value for name, value in _details(d).items() if name in LISTED)
    return TYPES.get(d.type, UNKNOWN) + (f" ({details})" if details else "")


def _details(d: sif.Descriptor) -> dict[str, str]:
    """What the extra bytes of a descriptor say."""
    first, second = (int.from_bytes(d.extra[start : start + 4], "little") for start in (0, 4))
    if d.type == sif.PARTITION:
        kind = {"Filesystem Type": FILE_SYSTEMS.get(d.fs, UNKNOWN), "Partition Type": PARTITIONS.get(d.parttype, UNKNOWN)}
        return {**kind, "Architecture": d.arch}
    if d.type == sif.SIGNATURE:
        return {"Hash Type": HASHES.get(first, UNKNOWN), "Entity": d.extra[4:24].hex().upper() if any(d.extra[4:24]) else ""}
    if d.type == sif.CRYPTO_MESSAGE:
        return {"Format Type": ENCODINGS.get(first, UNKNOWN), "Message Type": MESSAGES.get(second, UNKNOWN)}
    if d.type == sif.SBOM:
        return {"Format": BILLS.get(first, UNKNOWN)}
    if d.type in (sif.OCI_ROOT_INDEX, sif.OCI_BLOB):
        return {"Digest": escaped(d.extra.partition(b"\0")[0])}
    return {}


def _time(seconds: int) -> str:
    if seconds == YEAR_1:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s since 1970"


def _size(size: float) -> str:
    """Whole units, rounded: 28080 -> "27 KiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}"
