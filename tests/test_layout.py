"""Layouts and archives on disk that lead elsewhere, hang, or are not what they are called."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from oci_fixtures import Images, changed, docker_archive, dumped, open_image, refused, sha256, tars
from tar_fixtures import archive, member

from sciexec.errors import ImageError

# --- layouts and archives that lead elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["oci-layout", "index.json", "manifest", "config", "layer"])
@pytest.mark.parametrize("how", ["link", "fifo", "directory", "missing"])
def test_nothing_in_a_layout_is_followed_or_waited_for(tmp_path: Path, victim: str, how: str) -> None:
    images = Images()
    layer = images.layer()
    manifest = images.manifest(layer)
    ref = images.lay(tmp_path / "layout", manifest)
    config = json.loads(images.blobs[manifest["digest"]])["config"]
    digests = {"manifest": manifest["digest"], "config": config["digest"], "layer": layer[0]["digest"]}
    path = tmp_path / "layout" / (Path("blobs", *digests[victim].split(":")) if victim in digests else victim)
    path.rename(tmp_path / "canary")
    if how == "link":
        path.symlink_to(tmp_path / "canary")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "directory":
        path.mkdir()
    with pytest.raises(ImageError, match="regular file"), open_image(ref) as image:
        image.open(image.layers[0])


def test_a_link_in_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    images = Images()
    ref = images.lay(tmp_path / "layout", images.manifest())
    (tmp_path / "layout/blobs").rename(tmp_path / "blobs")
    (tmp_path / "layout/blobs").symlink_to("../blobs")
    refused(ref, "regular file")


@pytest.mark.parametrize(
    ("marker", "words"),
    [({"imageLayoutVersion": "2.0.0"}, "2.0.0"), ([1], "None"), (b"{", "Expecting"), (b" " * (1 << 21), "more than"), ({"x": 1}, "None")],
)
def test_a_layout_of_another_version_is_refused(tmp_path: Path, marker: Any, words: str) -> None:
    images = Images()
    refused(images.lay(tmp_path, images.manifest(), marker=marker), words)


def test_what_is_no_layout_or_archive_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no tar")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    tar = archive(member(b"x", data=b"x"))
    (tmp_path / "a.tar").write_bytes(tar)
    refused(f"oci:{tmp_path}/missing", "No such file")
    refused(f"oci:{tmp_path}/file", "Not a directory")
    refused(f"oci:{tmp_path}/empty", "oci-layout: there is no such regular file")
    refused(f"oci-archive:{tmp_path}/missing", "No such file")
    refused(f"oci-archive:{tmp_path}/empty", "regular file")
    assert "through a pipe" in refused(f"docker-archive:{tmp_path}/fifo", "regular file").hint
    refused(f"docker-archive:{tmp_path}/file", "file")
    refused(f"docker-archive:{tmp_path}/a.tar", "no docker-archive")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar))
    assert refused(f"docker-archive:{tmp_path}/a.tar.gz", "compressed").hint == f"decompress it first: gunzip {tmp_path}/a.tar.gz"


def pack(tmp_path: Path, layer: bytes = b"", extra: bytes = b"", config: Any = None, **fields: Any) -> str:
    """A docker-archive of one image; `layer` are the members that make l/layer.tar, `fields` replace those of manifest.json."""
    tar = archive(member(b"file"))
    raw = dumped(config or {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(tar)]}})
    entry = changed({"Config": "c.json", "RepoTags": None, "Layers": ["l/layer.tar"]}, fields)
    members = layer or member(b"l/layer.tar", data=tar)
    return docker_archive(tmp_path / "docker.tar", members, member(b"c.json", data=raw), extra, manifest=[entry])


def chain(length: int, kind: str = "l") -> bytes:
    """l/layer.tar -> 1 -> 2 ... -> the layer, by so many links."""
    tar = archive(member(b"file"))
    names = [b"l/layer.tar", *(b"l/%d" % number for number in range(1, length)), b"l/end"]
    links = [member(name, kind, link=target if kind == "h" else target[2:]) for name, target in zip(names, names[1:])]
    return b"".join(links) + member(b"l/end", data=tar)


@pytest.mark.parametrize(
    "layer",
    [
        member(b"l/layer.tar", "l", link=b"../m/layer.tar") + member(b"m/layer.tar", data=archive(member(b"file"))),
        member(b"m/layer.tar", data=archive(member(b"file"))) + member(b"l/layer.tar", "h", link=b"m/layer.tar"),
        chain(8),
        b"".join(reversed([chain(3, "h")])),
        member(b"l/layer.tar", data=b"old") + member(b"./l//layer.tar", data=archive(member(b"file"))),
    ],
    ids=["as Docker writes it", "hard link", "8 links", "3 hard links", "the last of two"],
)
def test_links_inside_an_archive_are_followed(tmp_path: Path, layer: bytes) -> None:
    with open_image(pack(tmp_path, layer)) as image:
        assert tars(image) == [archive(member(b"file"))]


CANARY = b"root:x:0:0"
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "9 links": ({"layer": chain(9)}, "more than 8 links"),
    "circle": ({"layer": member(b"l/layer.tar", "l", link=b"x") + member(b"l/x", "l", link=b"layer.tar")}, "circle"),
    "link to itself": ({"layer": member(b"l/layer.tar", "l", link=b"layer.tar")}, "circle"),
    "link to the host": ({"layer": member(b"l/layer.tar", "l", link=b"/etc/passwd")}, "no such file in the archive"),
    "link upwards": ({"layer": member(b"l/layer.tar", "l", link=b"../../../../../etc/passwd")}, "no such file in the archive"),
    "device": ({"layer": member(b"l/layer.tar", "c")}, "not a regular file"),
    "directory": ({"layer": member(b"l/layer.tar/", "d")}, "not a regular file"),
    "Config of the host": ({"Config": "../../../../../../etc/passwd"}, "no such file in the archive"),
    "Config absolute": ({"Config": "/etc/passwd"}, "no such file in the archive"),
    "Layers of the host": ({"Layers": ["../../../../../../etc/passwd"]}, "no such file in the archive"),
    "Layers with NUL": ({"Layers": ["l/layer.tar\0"]}, "no such file in the archive"),
    "Layers half a character": ({"Layers": ["l/\ud83d"]}, "a name is expected"),
    "no layers": ({"Layers": []}, "no layers"),
    "Layers missing": ({"Layers": None}, "a list is expected"),
    "Layers of numbers": ({"Layers": [1]}, "a name is expected"),
    "Config missing": ({"Config": None}, "a name is expected"),
    "Config a list": ({"Config": ["c.json"]}, "a name is expected"),
    "RepoTags of numbers": ({"RepoTags": [1]}, "a name is expected"),
    "RepoTags text": ({"RepoTags": "x"}, "a list is expected"),
    "501 layers": ({"Layers": ["l/layer.tar"] * 501}, "501 layers"),
    "two layers, one diff_id": ({"Layers": ["l/layer.tar"] * 2}, "2 layers, the config names 1"),
    "config of another name": ({"Config": "a" * 64 + ".json", "extra": member(b"a" * 64 + b".json", data=b"{}")}, "digest"),
    "other architecture": ({"config": {"architecture": "s390x", "rootfs": {"type": "layers", "diff_ids": []}}}, "it has ?/s390x"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_docker_archive_is_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    refused(pack(tmp_path, **fields), words)


def test_manifest_json_that_is_huge_missing_or_no_list(tmp_path: Path) -> None:
    for manifest, words in ((b" " * ((1 << 20) + 1), "more than"), ({}, "a list is expected"), ([], "no image is in it"), ([1], "Layers"),
                            (b"[" * 10_000, "nested too deeply"), (b'[{"Config": "a", "Config": "b"}]', "twice")):  # fmt: skip
        refused(docker_archive(tmp_path / "d.tar", manifest=manifest), words)
    assert "save it again" in refused(docker_archive(tmp_path / "d.tar", member(b"repositories", data=b"{}")), "1.10").hint
    assert "oci-archive:" in refused(docker_archive(tmp_path / "d.tar", member(b"oci-layout", data=b"{}")), "manifest.json").hint


def test_what_docker_25_saves_is_a_docker_archive_and_an_oci_layout(tmp_path: Path) -> None:
    images = Images()
    tar = archive(member(b"file", data=b"x"))
    layer = images.blob(tar, "application/vnd.oci.image.layer.v1.tar")
    manifest = images.manifest((layer, sha256(tar)))
    config = json.loads(images.blobs[manifest["digest"]])["config"]["digest"]
    blobs = [member(f"blobs/sha256/{digest[7:]}".encode(), data=data) for digest, data in images.blobs.items()]
    named = {**manifest, "annotations": {"io.containerd.image.name": "docker.io/team/app:1", "org.opencontainers.image.ref.name": "1"}}
    entry = {"Config": f"blobs/sha256/{config[7:]}", "RepoTags": ["team/app:1"], "Layers": [f"blobs/sha256/{layer['digest'][7:]}"]}
    docker_archive(
        tmp_path / "saved.tar", *blobs, member(b"oci-layout", data=b'{"imageLayoutVersion": "1.0.0"}'),
        member(b"index.json", data=dumped({"schemaVersion": 2, "manifests": [named]})), manifest=[entry],
    )  # fmt: skip
    names = ["docker-archive:{}", "docker-archive:{}:team/app:1"]
    names += ["oci-archive:{}", "oci-archive:{}:1", "oci-archive:{}:docker.io/team/app:1"]
    for name in names:
        with open_image(name.format(tmp_path / "saved.tar")) as image:
            assert tars(image) == [tar] and hashlib.sha256(image.config).hexdigest() == config[7:]
