"""The JSON documents of an image, read strictly: what two readers could understand differently is refused.

    index     {"schemaVersion": 2, "mediaType": ..., "manifests": [descriptor with "platform", ...]}
    manifest  {"schemaVersion": 2, "mediaType": ..., "config": descriptor, "layers": [descriptor, ...]}
    config    {"architecture", "os", "created", "config": {"Env", ...}, "rootfs": {"type": "layers", "diff_ids": [...]}}

    descriptor  {"mediaType": ..., "digest": "sha256:...", "size": bytes, "annotations": {...}}

Sources: OCI image specification 1.1 (image-index.md, manifest.md, config.md, descriptor.md) and Docker's image manifest
version 2, schema 2.  Ambiguity: CVE-2021-41190.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from convert.blobs import split_digest
from convert.platforms import Platform
from sciexec.errors import ImageError, LimitError, escaped

DOCUMENT_MAX = 4 << 20  # bytes of an index, manifest or config; registries must take manifests of that size
LAYERS_MAX = 500
INTEGER_DIGITS_MAX = 19  # of a number in a document: 2**63 has that many

INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
SCHEMA1_TYPES = ("application/vnd.docker.distribution.manifest.v1+json", "application/vnd.docker.distribution.manifest.v1+prettyjws")
CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")

# Media type of a layer -> how it is said to be compressed; its first bytes decide.
LAYER_TYPES = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}

# Kinds of artifact that people try to run, by a part of their media types.
ARTIFACTS = {
    "vnd.cncf.helm.": "a Helm chart",
    "vnd.sylabs.sif.": "a SIF file pushed by ORAS",
    "vnd.dev.cosign.": "a cosign signature",
    "vnd.in-toto": "an attestation",
    "vnd.wasm.": "a WebAssembly module",
    "vnd.docker.plugin.": "a Docker plugin",
}

# Names whose case must be right: other readers ignore it, and would see another document than this one.
_EXACT = {
    name.casefold(): name
    for name in (
        *("schemaVersion", "mediaType", "artifactType", "manifests", "config", "layers", "subject", "digest", "size", "urls"),
        *("platform", "annotations", "architecture", "os", "variant", "rootfs", "diff_ids", "created"),
        *("Env", "Entrypoint", "Cmd", "WorkingDir", "User", "Labels"),
    )
}


@dataclass(frozen=True)
class Blob:
    """Bytes that an image refers to.

    Arguments:
        digest: "sha256:..." or "sha512:..."; "" where nothing names it (a layer of a docker-archive).
        size: bytes, -1 if unknown.  media_type: as the descriptor says, which need not be true.
    """

    digest: str
    size: int
    media_type: str

    @property
    def compression(self) -> str:
        """gzip, zstd or none, by the media type; "" if that is no layer's."""
        return LAYER_TYPES.get(self.media_type, "")


@dataclass(frozen=True)
class Descriptor(Blob):
    """A Blob as an index lists it.  platform: None where nothing is said."""

    platform: Platform | None = None
    annotations: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_attestation(self) -> bool:
        """A document about an image instead of an image (BuildKit's attestation storage)."""
        unknown = self.platform is not None and self.platform.os == self.platform.architecture == "unknown"
        return unknown or "vnd.docker.reference.type" in self.annotations


@dataclass(frozen=True)
class Manifest:
    """config, and the layers, the lowest first."""

    config: Descriptor
    layers: tuple[Blob, ...]


@dataclass(frozen=True)
class Config:
    """What the config of an image says.

    Arguments:
        platform: of the machine it runs on; empty strings where it says nothing.
        created: Unix s, None if unknown.  diff_ids: digests of the uncompressed layers, the lowest first.
        settings: the object "config" with the types checked; names without a value are left out.
    """

    platform: Platform
    created: int | None
    diff_ids: tuple[str, ...]
    settings: dict[str, Any]


# --- JSON -----------------------------------------------------------------------------------------------------------------


def verified(data: bytes, digest: str, size: int, what: str) -> bytes:
    """`data`, if it has that digest and size (-1: any).  Raises ImageError."""
    algorithm, encoded = split_digest(digest)
    if size not in (-1, len(data)):
        raise ImageError(f"reading {what}: it has {len(data)} bytes where {size} are promised")
    if hashlib.new(algorithm, data).hexdigest() != encoded:
        raise ImageError(f"reading {what}: its content does not have the digest {digest[:19]}...")
    return data


def load(data: bytes, what: str) -> Any:
    """JSON in which every object has each name once, numbers are sane and text is text.  Raises ImageError, LimitError."""
    if len(data) > DOCUMENT_MAX:
        raise LimitError(f"reading {what}: it is larger than {DOCUMENT_MAX >> 20} MiB")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
    except RecursionError:
        raise ImageError(f"reading {what}: it is nested too deeply") from None
    except ValueError as error:
        raise ImageError(f"reading {what}: {escaped(str(error))[:200]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)[:80]!r} occurs twice in an object")
    return found


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > INTEGER_DIGITS_MAX:
        raise ValueError("a number is too large")
    return int(text)


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object whose names are in the right case.  Raises ImageError."""
    if not isinstance(value, dict):
        raise ImageError(f"reading {what}: an object is expected where there is {_kind(value)}")
    for name in value:
        if _EXACT.get(name.casefold(), name) != name:
            raise ImageError(f"reading {what}: {escaped(name)} is ambiguous: the name is {_EXACT[name.casefold()]}")
    return value


def _sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ImageError(f"reading {what}: a list is expected where there is {_kind(value)}")
    return value


def _text(mapping: dict[str, Any], name: str, what: str) -> str:
    """The string of that name, "" if it is missing or null.  Raises ImageError."""
    value = mapping.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or not is_text(value):
        raise ImageError(f"reading {what}: {name} is not a string but {_kind(value)}")
    return value


def is_text(value: str) -> bool:
    """Whether it can be encoded: JSON's \\ud800 is half a character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "broken text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


# --- index and manifest ---------------------------------------------------------------------------------------------------


def parse_index_or_manifest(data: bytes, media_type: str, what: str) -> list[Descriptor] | Manifest:
    """The entries of an index, or a manifest, whichever it is.

    Arguments:
        media_type: what the server or the descriptor calls it; "" if nobody does.  It must agree with the document.
        what: names the document in errors.

    Raises: ImageError for what is neither, or both, or an artifact that is no image; LimitError.
    """
    document = _mapping(load(data, what), what)
    own_type = _text(document, "mediaType", what)
    version = document.get("schemaVersion")
    if media_type in SCHEMA1_TYPES or (version == 1 and version is not True):
        raise ImageError(f"reading {what}: it is in Docker's schema 1, which is obsolete", "push the image again with a current Docker")
    if type(version) is not int or version != 2:
        raise ImageError(f"reading {what}: its schemaVersion is not 2")
    is_index = "manifests" in document
    if is_index and ("layers" in document or "config" in document):
        raise ImageError(f"reading {what}: it is ambiguous, an index and a manifest at once")
    for said in (own_type, media_type):
        if said and said not in (INDEX_TYPES if is_index else MANIFEST_TYPES):
            raise _not_an_image(said, what, "an index" if is_index else "a manifest")
    if own_type and media_type and own_type != media_type:
        raise ImageError(f"reading {what}: it is ambiguous, sent as {escaped(media_type)} but says it is {escaped(own_type)}")
    if is_index:
        return [_descriptor(entry, what) for entry in _sequence(document["manifests"], what)]
    return _manifest(document, what)


def _manifest(document: dict[str, Any], what: str) -> Manifest:
    if "config" not in document or "layers" not in document:
        raise ImageError(f"reading {what}: it has no {'layers' if 'config' in document else 'config'}")
    config = _descriptor(document["config"], what)
    artifact = _text(document, "artifactType", what)
    if config.media_type not in CONFIG_TYPES:
        raise _not_an_image(artifact or config.media_type, what, "the config of an image")
    entries = _sequence(document["layers"], what)
    if not entries:
        raise ImageError(f"reading {what}: the image has no layers")
    if len(entries) > LAYERS_MAX:
        raise LimitError(f"reading {what}: {len(entries)} layers are more than the {LAYERS_MAX} allowed")
    layers = [_descriptor(entry, what) for entry in entries]
    for layer in layers:
        _check_layer(layer, what)
    return Manifest(config, tuple(Blob(layer.digest, layer.size, layer.media_type) for layer in layers))


def _check_layer(layer: Descriptor, what: str) -> None:
    """What a layer's media type must be.  Its "urls" are never looked at: nobody is asked but the registry the user named."""
    if layer.media_type.endswith("+encrypted"):
        raise ImageError(f"reading {what}: layer {layer.digest[:19]} is encrypted", "decrypt it first: skopeo copy --decryption-key")
    if layer.media_type not in LAYER_TYPES:
        raise _not_an_image(layer.media_type, what, "a layer")


def _not_an_image(media_type: str, what: str, expected: str) -> ImageError:
    for part, name in ARTIFACTS.items():
        if part in media_type:
            return ImageError(f"reading {what}: it is {name}, not a container image")
    return ImageError(f"reading {what}: {escaped(media_type)[:120] or 'an empty media type'} is not the media type of {expected}")


def _descriptor(value: Any, what: str) -> Descriptor:
    entry = _mapping(value, what)
    digest = _text(entry, "digest", what)
    split_digest(digest)
    size = entry.get("size")
    if type(size) is not int or size < 0:
        raise ImageError(f"reading {what}: the size of {digest[:19]} is not a number of bytes")
    platform = None
    if entry.get("platform") is not None:
        said = _mapping(entry["platform"], what)
        if said.get("os") or said.get("architecture"):
            platform = Platform.normalised(*(_text(said, name, what) for name in ("os", "architecture", "variant")))
    return Descriptor(digest, size, _text(entry, "mediaType", what), platform, _annotations(entry, what))


def _annotations(entry: dict[str, Any], what: str) -> dict[str, str]:
    return _string_map(entry.get("annotations"), "annotations", what)


def _string_map(value: Any, name: str, what: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) and is_text(item) for pair in value.items() for item in pair):
        raise ImageError(f"reading {what}: {name} is not a map of strings")
    return value


# --- config ---------------------------------------------------------------------------------------------------------------


def parse_config(data: bytes, what: str) -> Config:
    """Raises ImageError for a config that is not an image's, or has the wrong types; LimitError."""
    document = _mapping(load(data, what), what)
    rootfs = _mapping(document.get("rootfs"), f"{what}, rootfs")
    if rootfs.get("type") != "layers":
        raise ImageError(f"reading {what}: its rootfs is not of the type layers")
    diff_ids = _sequence(rootfs.get("diff_ids"), f"{what}, diff_ids")
    for diff_id in diff_ids:
        split_digest(diff_id if isinstance(diff_id, str) else "")
    platform = Platform.normalised(*(_text(document, name, what) for name in ("os", "architecture", "variant")))
    return Config(platform, timestamp(_text(document, "created", what)), tuple(diff_ids), _settings(document.get("config"), what))


def _settings(value: Any, what: str) -> dict[str, Any]:
    """The settings an image is run with: null is as good as nothing, of the others the types are as config.md says."""
    if value is None:
        return {}
    what = f"{what}, settings"
    settings = {name: item for name, item in _mapping(value, what).items() if item is not None}
    for name in ("Entrypoint", "Cmd"):
        if isinstance(settings.get(name), str):  # Docker's API takes one word for a list of one, and old images have it
            settings[name] = [settings[name]]
    for name in ("Env", "Entrypoint", "Cmd"):
        if name in settings:
            _check_words(_sequence(settings[name], f"{what}, {name}"), f"{what}, {name}")
    for name in ("User", "WorkingDir", "StopSignal"):
        if name in settings:
            _check_words([settings[name]], f"{what}, {name}")
    _string_map(settings.get("Labels"), "Labels", what)
    return settings


def _check_words(words: Iterable[Any], what: str) -> None:
    """What goes to execve(2) is text without NUL.  Raises ImageError."""
    for word in words:
        if not isinstance(word, str) or not is_text(word):
            raise ImageError(f"reading {what}: a string is expected where there is {_kind(word)}")
        if "\0" in word:
            raise ImageError(f"reading {what}: it holds a NUL character")


_RFC3339 = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.\d+)?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII)


def timestamp(text: str) -> int | None:
    """RFC 3339 (section 5.6) as Unix s, the fraction cut off; None for anything else, and for what lies before 1970.

    Go writes the year 1 where a program did not set a time; reproducible builds write 1970-01-01.
    """
    match = _RFC3339.fullmatch(text)
    if not match:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    sign, hours, minutes = match.groups()[6:]
    offset = (1 if sign != "-" else -1) * (int(hours or 0) * 60 + int(minutes or 0)) * 60
    try:
        local = datetime.datetime(year, month, day, hour, minute, min(second, 59), tzinfo=datetime.timezone.utc)
    except ValueError:
        return None
    seconds = (local - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)) // datetime.timedelta(seconds=1) - offset
    return seconds if seconds >= 0 else None
