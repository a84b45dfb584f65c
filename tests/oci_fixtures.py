"""Hand-made images: every byte of every document as a test wants it, laid down as an OCI layout or served by a scripted registry.

Real ones come from umoci and skopeo (conftest.py); these are for what no tool would write.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard
from scripted_registry import Answer, Scripted, whole
from tar_fixtures import archive, member

from convert import oci, reference
from convert.blobs import Cache
from sciexec.errors import ImageError, SciexecError

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

Json = dict[str, Any]


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def dumped(document: Any) -> bytes:
    """A document as it is stored; bytes are taken as they are, so that a test can write what json would not."""
    return document if isinstance(document, bytes) else json.dumps(document).encode()


class Images:
    """Blobs and documents in memory; the methods return descriptors.  Extra keywords replace fields, None removes them."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def blob(self, data: bytes, media_type: str, /, **fields: Any) -> Json:
        digest = sha256(data)
        self.blobs[digest] = data
        return changed({"mediaType": media_type, "digest": digest, "size": len(data)}, fields)

    def document(self, document: Any, media_type: str, /, **fields: Any) -> Json:
        return self.blob(dumped(document), media_type, **fields)

    def layer(self, text: str = "data", /, **fields: Any) -> tuple[Json, str]:
        """(descriptor, diffID) of a gzip layer with one file."""
        tar = archive(member(b"file", data=text.encode()))
        return self.blob(gzip.compress(tar, mtime=0), LAYER, **fields), sha256(tar)

    def manifest(self, *layers: tuple[Json, str], says: Json | None = None, **fields: Any) -> Json:
        """An image; `says` replaces fields of the config's document, `fields` those of the manifest's."""
        layers = layers or (self.layer(),)
        settings = changed(
            {"architecture": "amd64", "os": "linux", "created": "2020-02-02T02:02:02Z", "config": {"Cmd": ["true"]},
             "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]}},
            says or {},
        )  # fmt: skip
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": self.document(settings, CONFIG), "layers": [d for d, _ in layers]}
        return self.document(changed(document, fields), MANIFEST)

    def index(self, *entries: Any, **fields: Any) -> Json:
        return self.document(changed({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)}, fields), INDEX)

    def lay(self, path: Path, *entries: Any, index: Any = None, marker: Any = None) -> str:
        """Write an OCI layout whose index.json lists the entries; returns its reference."""
        for digest, data in self.blobs.items():
            algorithm, _, encoded = digest.partition(":")
            (path / "blobs" / algorithm).mkdir(parents=True, exist_ok=True)
            (path / "blobs" / algorithm / encoded).write_bytes(data)
        (path / "oci-layout").write_bytes(dumped(marker or {"imageLayoutVersion": "1.0.0"}))
        (path / "index.json").write_bytes(dumped(index or {"schemaVersion": 2, "manifests": list(entries)}))
        return f"oci:{path}"

    def serve(self, server: Scripted, root: Json, host: str = "registry.example.org", name: str = "made/it", tag: str = "1") -> str:
        """Let a scripted registry have it all, `root` under the tag; returns its reference."""
        base = f"https://{host}/v2/{name}"
        for digest, data in self.blobs.items():
            server.routes[f"{base}/blobs/{digest}"] = answering(data, "application/octet-stream")
            server.routes[f"{base}/manifests/{digest}"] = answering(data, said_type(data))
        data = self.blobs[root["digest"]]
        server.routes[f"{base}/manifests/{tag}"] = answering(data, root["mediaType"])
        return f"docker://{host}/{name}:{tag}"


def said_type(data: bytes) -> str:
    try:
        return str(json.loads(data)["mediaType"])
    except (ValueError, KeyError, TypeError):
        return "application/octet-stream"


def answering(body: bytes, media_type: str) -> Answer:
    return whole(body, Content_Type=media_type)


def changed(document: Json, fields: Json) -> Json:
    return {name: value for name, value in {**document, **fields}.items() if value is not None}


def platform(architecture: str, variant: str = "", os: str = "linux") -> Json:
    return {"os": os, "architecture": architecture, **({"variant": variant} if variant else {})}


def docker_archive(path: Path, *members: bytes, manifest: Any = None) -> str:
    """Write a docker-archive of these members and manifest.json; returns its reference."""
    listed = [] if manifest is None else [member(b"manifest.json", data=dumped(manifest))]
    path.write_bytes(archive(*members, *listed))
    return f"docker-archive:{path}"


# --- what the tests look at ------------------------------------------------------------------------------------------------


def open_image(text: str, arch: str | None = "amd64", cache: Cache | None = None, **options: Any) -> oci.Image:
    return oci.open_image(reference.parse(text), arch=arch, cache=cache, **options)


def content(image: oci.Image, layer: oci.Layer) -> bytes:
    """The blob of a layer, compared with its digest and size."""
    with contextlib.closing(image.open(layer)) as stream:
        data = b"".join(iter(lambda: stream.read(1 << 16), b""))
    assert layer.blob.digest in ("", sha256(data)) and layer.blob.size == len(data)
    return data


def tars(image: oci.Image) -> list[bytes]:
    """The layers uncompressed, compared with their diffIDs."""
    found = []
    for layer in image.layers:
        data = content(image, layer)
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif data[:4] == b"\x28\xb5\x2f\xfd":
            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
        assert sha256(data) == layer.diff_id
        found.append(data)
    return found


def refused(text: str, *words: str, kind: type[SciexecError] = ImageError, **options: Any) -> SciexecError:
    """Opening is one clean error that has these words, and nothing a terminal would obey."""
    with pytest.raises(kind) as caught, open_image(text, **options):
        pass
    message = caught.value.message
    for word in words:
        assert word in message
    assert message.isprintable() and len(message) < 1500
    return caught.value
