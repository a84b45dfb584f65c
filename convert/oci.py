"""From the name of an image to its layers: index -> manifest -> config, every document verified before it is believed.

    docker://...      registry ---.
    oci:...           directory ---> entries of an index -> the one for this machine -> manifest -> config, layers
    oci-archive:...   tar --------'
    docker-archive:.. tar ---------> manifest.json ----------------------------------------------> config, layers

No layer is touched here.  Image.open() gives a layer's compressed bytes: out of the cache, out of a download that is still
under way, or from where the image lies.  Who reads them verifies digest, size and diffID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from convert import documents, layout, platforms
from convert.blobs import Cache
from convert.documents import Blob, Config, Descriptor, Manifest
from convert.download import Downloads, Stream, counted
from convert.platforms import Platform
from convert.registry import Registry
from sciexec.errors import ImageError

if TYPE_CHECKING:
    from convert.progress import Progress
    from convert.reference import Reference

INDEX_DEPTH = 3  # an index in an index in an index
INDEXES_MAX = 32  # read for one image
# What servers without an idea of OCI call any file: no statement about the document.
GENERIC_TYPES = ("", "application/json", "application/octet-stream", "text/plain", "binary/octet-stream")


@dataclass(frozen=True)
class Layer:
    """blob: the layer as stored.  diff_id: digest of its uncompressed tar."""

    blob: Blob
    diff_id: str


@dataclass
class Image:
    """An image whose documents are read and verified; a context manager that ends its downloads.

    Fields:
        reference: the name it was found by, canonical.
        manifest, manifest_digest: raw, and its digest; of a docker-archive manifest.json, and the digest of the config ("image id").
        config: raw.  settings: its part "config", types checked, without nulls: Env, Entrypoint, Cmd, WorkingDir, User, Labels ...
        arch: GOARCH.  created: Unix s, None if unknown.
        layers: the lowest first.
    """

    reference: str
    manifest: bytes
    manifest_digest: str
    config: bytes
    settings: dict[str, Any]
    arch: str
    created: int | None
    layers: list[Layer]
    _open: Callable[[int], Stream] = field(repr=False)
    _close: Callable[[], None] = field(default=lambda: None, repr=False)
    _cache: Cache | None = field(default=None, repr=False)

    def open(self, layer: Layer) -> Stream:
        """The compressed bytes of one of the layers, from the first; may be called again.  Raises RegistryError, ImageError, HostError."""
        return self._open(self.layers.index(layer))

    def discard(self, layer: Layer) -> bool:
        """Say that the bytes of a layer were not what its digest names; True if they may be right when opened in a new Image."""
        if self._cache is None or not layer.blob.digest:
            return False
        return self._cache.discard(layer.blob.digest)

    def close(self) -> None:
        """End downloads that are under way; what is complete stays in the cache.  May be called twice."""
        self._close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_image(
    ref: Reference,
    *,
    arch: str | None = None,
    cache: Cache | None = None,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> Image:
    """Find an image and read its manifest and config.

    Arguments:
        arch: as --arch, GOARCH with an optional variant (arm/v7); None for this machine's.
        cache: where blobs of a registry are kept; None: nowhere.
        registry: how to reach ref's registry, with credentials; closed by the Image.  None: anonymously or as configured.
        progress: told about downloads.  None: nobody is.

    Raises: UsageError for an unknown arch; ImageError for documents that are not an image's, or not for this machine; LimitError;
    RegistryError; HostError.
    """
    machine = platforms.wanted(arch)
    if ref.transport == "docker-archive":
        return _docker_archive(ref, machine)
    source: _Source
    if ref.transport == "docker":
        note = progress.warn if progress is not None else lambda text: None
        source = _Remote(ref, registry or Registry(ref, note=note), cache, progress)
    else:
        files = layout.Directory(ref.path) if ref.transport == "oci" else layout.Archive(ref.path)
        source = _Local(ref, files)
    try:
        return _image(ref, machine, source)
    except BaseException:
        source.close()
        raise


# --- where documents and layers come from ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Document:
    """An index or manifest as it came."""

    digest: str
    data: bytes
    media_type: str


class _Source(Protocol):
    cache: Cache | None

    def first(self) -> _Document | list[Descriptor]:
        """What the reference names."""

    def document(self, entry: Descriptor) -> _Document:
        """An index or manifest that an index lists; verified."""

    def config(self, entry: Descriptor) -> bytes:
        """Verified."""

    def opener(self, layers: Sequence[Blob]) -> Callable[[int], Stream]:
        """What opens a layer by its number."""

    def close(self) -> None: ...


class _Local:
    """An OCI layout."""

    cache: Cache | None = None

    def __init__(self, ref: Reference, files: layout.Directory | layout.Archive) -> None:
        self._name = ref.tag
        try:
            self._layout = layout.Layout(files)
        except BaseException:
            files.close()
            raise

    def first(self) -> list[Descriptor]:
        return self._layout.entries(self._name)

    def document(self, entry: Descriptor) -> _Document:
        return _Document(entry.digest, self.config(entry), entry.media_type)

    def config(self, entry: Descriptor) -> bytes:
        return self._layout.document(entry.digest, entry.size)

    def opener(self, layers: Sequence[Blob]) -> Callable[[int], Stream]:
        return lambda number: self._layout.open(layers[number])

    def close(self) -> None:
        self._layout.close()


class _Remote:
    """A registry.  A document that is named by its digest is asked for once and kept in the cache."""

    def __init__(self, ref: Reference, registry: Registry, cache: Cache | None, progress: Progress | None) -> None:
        self._ref, self._registry, self.cache, self._progress = ref, registry, cache, progress
        self._downloads: Downloads | None = None

    def first(self) -> _Document:
        if self._ref.digest:
            return self._manifest(self._ref.digest)
        return self._ask("")

    def document(self, entry: Descriptor) -> _Document:
        found = self._manifest(entry.digest)
        what = f"{self._ref}, manifest {entry.digest[:19]}"
        if found.media_type not in ("", entry.media_type):
            raise ImageError(f"reading {what}: it is ambiguous, listed as {entry.media_type} but sent as another type")
        return _Document(entry.digest, documents.verified(found.data, entry.digest, entry.size, what), entry.media_type)

    def _manifest(self, digest: str) -> _Document:
        cached = self.cache.read(digest, documents.DOCUMENT_MAX) if self.cache else None
        if cached is not None:
            return _Document(digest, cached, "")
        found = self._ask(digest)
        if self.cache:
            self.cache.store(digest, found.data)
        return found

    def _ask(self, digest: str) -> _Document:
        data, media_type, digest = self._registry.manifest(digest)
        return _Document(digest, data, "" if media_type in GENERIC_TYPES else media_type)

    def config(self, entry: Descriptor) -> bytes:
        data = self.cache.read(entry.digest, documents.DOCUMENT_MAX) if self.cache else None
        if data is None:
            data = self._registry.document(entry.digest, entry.size)
            if self.cache:
                self.cache.store(entry.digest, data)
        return documents.verified(data, entry.digest, entry.size, f"{self._ref}, config {entry.digest[:19]}")

    def opener(self, layers: Sequence[Blob]) -> Callable[[int], Stream]:
        if self.cache is None:
            return lambda number: counted(self._fetch(layers[number]), layers[number], self._progress)
        # The converter begins with the newest layer.
        downloads = self._downloads = Downloads(self.cache, self._fetch, layers[::-1], self._progress)
        return lambda number: downloads.open(layers[number])

    def _fetch(self, blob: Blob) -> Stream:
        return self._registry.blob(blob.digest, blob.size)

    def close(self) -> None:
        if self._downloads is not None:
            self._downloads.close()
        self._registry.close()


# --- the walk through the documents ---------------------------------------------------------------------------------------


def _image(ref: Reference, machine: Platform, source: _Source) -> Image:
    name = str(ref)
    found, manifest = _find(source, machine, name)
    raw = source.config(manifest.config)
    config = documents.parse_config(raw, f"{name}, config {manifest.config.digest[:19]}")
    layers = _paired(manifest.layers, config, machine, name)
    opener = source.opener(manifest.layers)
    return Image(
        name, found.data, found.digest, raw, config.settings, machine.architecture, config.created, layers,
        opener, source.close, source.cache,
    )  # fmt: skip


def _docker_archive(ref: Reference, machine: Platform) -> Image:
    archive = layout.DockerArchive(ref.path, ref.tag)
    try:
        digest = "sha256:" + hashlib.sha256(archive.config).hexdigest()
        config = documents.parse_config(archive.config, f"{ref}, config")
        layers = _paired(archive.layers, config, machine, str(ref))
    except BaseException:
        archive.close()
        raise
    return Image(
        str(ref), archive.manifest, digest, archive.config, config.settings, machine.architecture, config.created, layers,
        archive.open, archive.close,
    )  # fmt: skip


def _paired(blobs: Sequence[Blob], config: Config, machine: Platform, name: str) -> list[Layer]:
    """The layers with their diffIDs, if the config is for this machine and knows as many.  Raises ImageError."""
    offered = config.platform
    if offered.os not in ("", "linux") or offered.architecture not in ("", machine.architecture):
        raise _no_match(name, machine, [offered])
    if len(blobs) != len(config.diff_ids):
        raise ImageError(f"reading {name}: the manifest has {len(blobs)} layers, the config names {len(config.diff_ids)}")
    return [Layer(blob, diff_id) for blob, diff_id in zip(blobs, config.diff_ids)]


def _find(source: _Source, machine: Platform, name: str) -> tuple[_Document, Manifest]:
    """The manifest for the machine.  Raises ImageError, LimitError."""
    first = source.first()
    if isinstance(first, _Document):
        parsed = documents.parse_index_or_manifest(first.data, first.media_type, name)
        if isinstance(parsed, Manifest):
            return first, parsed
        entries, depth = parsed, 1
    else:
        entries, depth = first, 0
    entry = _best(list(_manifests(entries, source, machine, name, depth, [])), machine, name)
    document = source.document(entry)
    manifest = documents.parse_index_or_manifest(document.data, document.media_type, f"{name}, manifest {entry.digest[:19]}")
    assert isinstance(manifest, Manifest)  # its media type says so, and was compared
    return document, manifest


def _manifests(
    entries: Sequence[Descriptor], source: _Source, machine: Platform, name: str, depth: int, seen: list[str]
) -> Iterator[Descriptor]:
    """The manifests in an index and in the indexes it lists; attestations and artifacts are passed over."""
    for entry in entries:
        if entry.is_attestation:
            continue
        if entry.media_type in documents.MANIFEST_TYPES:
            yield entry
        elif entry.media_type in documents.INDEX_TYPES:
            if entry.platform is not None and machine.rank(entry.platform) is None:
                yield entry  # for the list of what there is
                continue
            if depth == INDEX_DEPTH:
                raise ImageError(f"reading {name}: indexes are nested more than {INDEX_DEPTH} deep")
            seen.append(entry.digest)
            if len(seen) > INDEXES_MAX:
                raise ImageError(f"reading {name}: it refers to more than {INDEXES_MAX} indexes")
            document = source.document(entry)
            nested = documents.parse_index_or_manifest(document.data, document.media_type, f"{name}, index {entry.digest[:19]}")
            assert not isinstance(nested, Manifest)  # its media type says so, and was compared
            yield from _manifests(nested, source, machine, name, depth + 1, seen)


def _best(candidates: Sequence[Descriptor], machine: Platform, name: str) -> Descriptor:
    """The first of those that fit best; where no platform is given, the only one.  Raises ImageError."""
    ranked = [(rank, entry) for entry in candidates if entry.platform and (rank := machine.rank(entry.platform)) is not None]
    if ranked:
        return min(ranked, key=lambda pair: pair[0])[1]
    unmarked = [entry for entry in candidates if entry.platform is None]
    if len(unmarked) == 1:
        return unmarked[0]
    if unmarked:
        raise ImageError(f"reading {name}: it lists {len(unmarked)} images and does not say for which platforms")
    raise _no_match(name, machine, [entry.platform for entry in candidates if entry.platform])


def _no_match(name: str, machine: Platform, offered: Sequence[Platform]) -> ImageError:
    there = ", ".join(sorted({str(platform) for platform in offered})) or "no image at all"
    return ImageError(f"choosing an image of {name}: there is none for {machine}; it has {there}", "--arch chooses another architecture")
