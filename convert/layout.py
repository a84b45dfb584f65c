"""Images that lie on a disk of this host, as a directory or inside one tar.

    OCI layout, a directory or a tar (oci-archive)        docker-archive, always a tar (`docker save`)
        oci-layout      {"imageLayoutVersion": "1.0.0"}       manifest.json   [{"Config", "RepoTags", "Layers"}, ...]
        index.json      an index, see convert.documents       <config>.json
        blobs/sha256/<hex>                                    <layer>/layer.tar   a file, or a link to another layer's

A name inside is looked up and never resolved by the kernel: in a directory no link is followed, in a tar a few are, inside it.
Only regular files are read.  What a digest names is verified; a layer without one is verified by its diffID.

Sources: OCI image specification, image-layout.md; moby, image/tarexport (docker-archive).
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from typing import Any

from convert import documents, reference, tar
from convert.blobs import split_digest
from convert.documents import Blob, Descriptor
from sciexec.errors import HostError, ImageError, LimitError, SciexecError, UsageError, escaped

LINKS_MAX = 8
MANIFEST_MAX = 1 << 20  # bytes of oci-layout and manifest.json

LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar"

# The annotations of an index entry that name it: org.opencontainers.image.ref.name is the tag, BuildKit and containerd add the whole.
NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")

# First bytes of a compressed archive -> how to undo it
COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz"}

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # O_NONBLOCK: opening a FIFO must not hang


class Section:
    """`size` bytes of an open file from `offset` on, as a stream; closes the descriptor it was given."""

    def __init__(self, fd: int, offset: int, size: int, what: str) -> None:
        self._fd, self._offset, self._left, self._what = fd, offset, size, what
        self.size = size

    def read(self, size: int) -> bytes:
        try:
            data = os.pread(self._fd, min(size, self._left), self._offset)
        except OSError as error:
            raise HostError(f"reading {self._what}: {error.strerror}") from error
        self._offset += len(data)
        self._left -= len(data)
        return data

    def whole(self, limit: int) -> bytes:
        """All of it, and the end.  Raises LimitError above `limit` bytes."""
        with self:
            if self.size > limit:
                raise LimitError(f"reading {self._what}: {self.size} bytes are more than the {limit} allowed")
            return b"".join(iter(lambda: self.read(limit), b""))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Section:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Directory:
    """The files below a directory; no link is followed and nothing but a regular file opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error

    def open(self, name: str) -> Section:
        """Raises ImageError if there is no regular file of that name, HostError if it cannot be read."""
        what = f"{self.path}/{name}"
        *directories, last = name.split("/")
        fd = os.dup(self._fd)
        try:
            for part in directories:
                below = os.open(part, _FILE | os.O_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            below = os.open(last, _FILE, dir_fd=fd)
            os.close(fd)
            fd = below
            found = os.fstat(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                hint = "links in an OCI layout are not followed"
                raise ImageError(f"reading {escaped(what)}: there is no such regular file", hint) from None
            raise _unreadable(what, error) from error
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise ImageError(f"reading {escaped(what)}: it is not a regular file")
        return Section(fd, 0, found.st_size, escaped(what))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Archive:
    """The files inside a tar on disk, in which names are looked up; links lead to other names inside it."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            self._members = self._index()
        except BaseException:
            self.close()
            raise

    def _index(self) -> dict[bytes, tar.Member]:
        what = escaped(self.path)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise ImageError(f"reading {what}: an archive has to be a regular file", "save what comes through a pipe to a file first")
        magic = Section(os.dup(self._fd), 0, 6, what).whole(6)
        for begin, program in COMPRESSED.items():
            if magic.startswith(begin):
                raise ImageError(f"reading {what}: the archive is compressed", f"decompress it first: {program} {what}")
        return {member.path: member for member in tar.index(self._fd, what)}

    def has(self, name: str) -> bool:
        return name.encode() in self._members

    def open(self, name: str) -> Section:
        """The file of that name, or what it links to.  Raises ImageError."""
        member = self._follow(name)
        return Section(os.dup(self._fd), member.offset, member.size, f"{escaped(self.path)}, {escaped(name)}")

    def _follow(self, name: str) -> tar.Member:
        what = f"{escaped(self.path)}, {escaped(name)}"
        path = os.fsencode(posixpath.normpath(name)) if name else b""
        for _ in range(LINKS_MAX + 1):
            member = self._members.get(path)
            if member is None:
                raise ImageError(f"reading {what}: there is no such file in the archive")
            if member.kind == "f":
                if member.sparse is not None:
                    raise ImageError(f"reading {what}: it is stored as a sparse file")
                return member
            if member.kind == "h":
                path = member.link
            elif member.kind == "l":
                # A link that leaves the archive keeps its "..", which no member has in its name.
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.link)).lstrip(b"/")
            else:
                raise ImageError(f"reading {what}: it is not a regular file")
        raise ImageError(f"reading {what}: more than {LINKS_MAX} links lead to it, or they go round in a circle")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# --- OCI layout -----------------------------------------------------------------------------------------------------------


class Layout:
    """An OCI image layout in a Directory or an Archive, which it closes.

    Raises: ImageError if it is none; HostError.
    """

    def __init__(self, files: Directory | Archive) -> None:
        self._files = files
        self.name = escaped(files.path)
        marker = documents.load(files.open("oci-layout").whole(MANIFEST_MAX), f"{self.name}/oci-layout")
        version = marker.get("imageLayoutVersion") if isinstance(marker, dict) else None
        if version != "1.0.0":
            raise ImageError(f"reading {self.name}: its layout version is not 1.0.0 but {escaped(str(version))[:40]}")

    def entries(self, name: str) -> list[Descriptor]:
        """What index.json lists under a name or digest; without one, what there is, if that is one image.

        Raises ImageError that lists the names to choose from.
        """
        what = f"{self.name}/index.json"
        listed = documents.parse_index_or_manifest(self._files.open("index.json").whole(documents.DOCUMENT_MAX), "", what)
        if isinstance(listed, documents.Manifest):
            raise ImageError(f"reading {what}: it is not an index")
        images = [entry for entry in listed if not entry.is_attestation]
        found = [entry for entry in images if not name or name == entry.digest or name in names_of(entry)]
        chosen = list({entry.digest: entry for entry in reversed(found)}.values())  # several names of one image are no choice
        platforms = {entry.platform for entry in chosen}
        one_image = len({names_of(entry) for entry in chosen}) == 1 and len(platforms) == len(chosen)
        if one_image and (len(chosen) == 1 or None not in platforms):
            return chosen
        choice = sorted({(names_of(entry) or (entry.digest,))[0] for entry in images})
        raise _not_one(self.name, name, len(chosen), choice)

    def document(self, digest: str, size: int) -> bytes:
        """A small blob, verified.  Raises ImageError, LimitError."""
        blob = self._open(digest)
        return documents.verified(blob.whole(documents.DOCUMENT_MAX), digest, size, f"{self.name}, blob {digest[:19]}")

    def open(self, blob: Blob) -> Section:
        """A blob; its digest is the reader's to verify.  Raises ImageError if it is missing or has another size."""
        found = self._open(blob.digest)
        if blob.size not in (-1, found.size):
            found.close()
            raise ImageError(f"reading {self.name}, blob {blob.digest[:19]}: it has {found.size} bytes where {blob.size} are promised")
        return found

    def _open(self, digest: str) -> Section:
        algorithm, encoded = split_digest(digest)
        return self._files.open(f"blobs/{algorithm}/{encoded}")

    def close(self) -> None:
        self._files.close()


def names_of(entry: Descriptor) -> tuple[str, ...]:
    """What an index calls an entry; nothing for most."""
    return tuple(entry.annotations[name] for name in NAMES if entry.annotations.get(name))


# --- docker-archive -------------------------------------------------------------------------------------------------------


class DockerArchive:
    """One image of what `docker save` wrote.

    Arguments:
        name: which one, by its repository and tag; "" if there is only one.

    Fields: manifest: manifest.json whole.  config: raw.  layers: the lowest first, known by their place in that list.
    Raises: ImageError if it is none, or `name` does not choose one; LimitError; HostError.
    """

    def __init__(self, path: str, name: str = "") -> None:
        self.name = escaped(path)
        self._files = Archive(path)
        try:
            self.manifest = self._read_manifest()
            entry = self._choose(documents.load(self.manifest, f"{self.name}, manifest.json"), name)
            self._paths = [_string(layer, f"{self.name}, Layers") for layer in _list(entry.get("Layers"), f"{self.name}, Layers")]
            if not self._paths:
                raise ImageError(f"reading {self.name}: the image has no layers")
            if len(self._paths) > documents.LAYERS_MAX:
                raise LimitError(f"reading {self.name}: {len(self._paths)} layers are more than the {documents.LAYERS_MAX} allowed")
            config = _string(entry.get("Config"), f"{self.name}, Config")
            self.config = self._read_config(config)
            self.layers = [Blob("", self._size(path), LAYER_TYPE) for path in self._paths]
        except BaseException:
            self.close()
            raise

    def _read_manifest(self) -> bytes:
        if self._files.has("manifest.json"):
            return self._files.open("manifest.json").whole(MANIFEST_MAX)
        if self._files.has("repositories"):
            hint = "load it into a current Docker and save it again"
            raise ImageError(f"reading {self.name}: it was saved by a Docker older than 1.10", hint)
        hint = "it looks like an OCI layout: name it oci-archive:" if self._files.has("oci-layout") else ""
        raise ImageError(f"reading {self.name}: it is no docker-archive: there is no manifest.json", hint)

    def _choose(self, manifest: Any, name: str) -> dict[str, Any]:
        entries = [entry if isinstance(entry, dict) else {} for entry in _list(manifest, f"{self.name}, manifest.json")]
        what = f"{self.name}, RepoTags"
        tags = [[_string(tag, what) for tag in _list(entry.get("RepoTags") or [], what)] for entry in entries]
        chosen = [entry for entry, own in zip(entries, tags) if not name or _canonical(name) in map(_canonical, own)]
        if len(chosen) == 1:
            return chosen[0]
        raise _not_one(self.name, name, len(chosen), sorted(tag for own in tags for tag in own))

    def _read_config(self, path: str) -> bytes:
        """The config, which is what an image is known by; where its file is named by a digest, that has to be right."""
        data = self._files.open(path).whole(documents.DOCUMENT_MAX)
        encoded = posixpath.basename(path)[:64]
        if posixpath.basename(path) in (encoded, f"{encoded}.json") and len(encoded) == 64 and not encoded.strip("0123456789abcdef"):
            documents.verified(data, f"sha256:{encoded}", -1, f"{self.name}, {escaped(path)}")
        return data

    def _size(self, path: str) -> int:
        with self._files.open(path) as found:
            return found.size

    def open(self, number: int) -> Section:
        """The layer of that number, the lowest is 0.  Raises ImageError."""
        return self._files.open(self._paths[number])

    def close(self) -> None:
        self._files.close()


# --- small parts ----------------------------------------------------------------------------------------------------------


def _canonical(name: str) -> str:
    """Docker writes alpine:3, podman docker.io/library/alpine:3: the same image."""
    try:
        return str(reference.parse(f"docker://{name}"))
    except UsageError:
        return name


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImageError(f"reading {what}: a list is expected")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value or not documents.is_text(value):
        raise ImageError(f"reading {what}: a name is expected")
    return value


def _not_one(where: str, name: str, found: int, choice: list[str]) -> ImageError:
    """An archive or layout holds none, or several, of the images that are meant; choice: the names to choose from."""
    there = "it holds " + (escaped(", ".join(choice))[:1000] or "no image with a name")
    if name and not found:
        return ImageError(f"reading {where}: no image of the name {escaped(name)}; {there}")
    wrong = "several images have that name" if name else "several images are in it" if found else "no image is in it"
    return ImageError(f"reading {where}: {wrong}; {there}", "add :NAME to the path" if choice else "")


def _unreadable(path: str, error: OSError) -> SciexecError:
    kind = ImageError if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR) else HostError
    return kind(f"reading {escaped(path)}: {error.strerror}")
