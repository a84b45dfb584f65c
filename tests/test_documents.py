"""Index, manifest and config: what two readers could understand differently, or is no image, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oci_fixtures import (
    CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    INDEX,
    LAYER,
    MANIFEST,
    Images,
    Json,
    answering,
    changed,
    content,
    dumped,
    open_image,
    platform,
    refused,
    tars,
)
from registry_fixtures import certificate, internet, nobody
from scripted_registry import Scripted

from convert import documents
from convert.platforms import Platform, wanted
from sciexec.errors import LimitError, RegistryError, UsageError

__all__ = ["certificate", "internet", "nobody"]  # fixtures


# --- platforms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "offered", "rank"),
    [
        ("amd64", "amd64", 0),
        ("amd64", "amd64/v1", 0),
        ("amd64", "amd64/v2", None),
        ("amd64/v3", "amd64", 2),
        ("amd64/v3", "amd64/v3", 0),
        ("x86_64", "amd64", 0),
        ("amd64", "x86_64", 0),
        ("arm64", "arm64/v8", 0),
        ("arm64/v8", "arm64", 0),
        ("arm64", "arm64/v9", None),
        ("aarch64", "arm64", 0),
        ("arm", "arm/v7", 0),
        ("arm", "arm/v6", 1),
        ("arm/v6", "arm/v7", None),
        ("arm/v6", "arm/v5", 1),
        ("armv7l", "arm/v7", 0),
        ("arm", "arm64", None),
        ("arm64", "arm", None),
        ("ppc64le", "ppc64le", 0),
        ("ppc64le/power9", "ppc64le", 1),
        ("ppc64le", "ppc64le/power9", None),
        ("amd64", "amd64/vX", None),
        ("amd64", "386", None),
    ],
)
def test_which_platform_serves_which_machine(mine: str, offered: str, rank: int | None) -> None:
    architecture, _, variant = offered.partition("/")
    assert wanted(mine).rank(Platform.normalised("linux", architecture, variant)) == rank
    assert wanted(mine).rank(Platform.normalised("windows", architecture, variant)) is None


def test_the_machine_is_the_default_and_a_bad_name_is_a_usage_error() -> None:
    assert wanted().architecture not in ("x86_64", "aarch64") and wanted(None) == wanted("")
    for bad in ("a b", "\x1b", "/v7", "amd64/../x"):
        with pytest.raises(UsageError):
            wanted(bad)


# --- documents ------------------------------------------------------------------------------------------------------------

A_MANIFEST: Json = {"schemaVersion": 2, "config": {"mediaType": CONFIG, "digest": "sha256:" + "0" * 64, "size": 2}, "layers": []}
AN_ENTRY: Json = {"mediaType": MANIFEST, "digest": "sha256:" + "a" * 64, "size": 2}
DEEP = b'{"schemaVersion": 2, "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"

BROKEN: dict[str, tuple[Any, str]] = {
    "index and manifest": ({**A_MANIFEST, "manifests": []}, "ambiguous"),
    "index with a config": ({"schemaVersion": 2, "manifests": [], "config": {}}, "ambiguous"),
    "mediaType of the other": ({**A_MANIFEST, "mediaType": INDEX}, "is not the media type of a manifest"),
    "index called a manifest": ({"schemaVersion": 2, "mediaType": MANIFEST, "manifests": []}, "is not the media type of an index"),
    "duplicate name": (b'{"schemaVersion": 2, "manifests": [], "manifests": [1]}', "twice"),
    "duplicate name inside": (b'{"schemaVersion": 2, "manifests": [{"digest": "a", "digest": "b"}]}', "twice"),
    "other case": ({"schemaVersion": 2, "manifests": [], "Layers": []}, "Layers is ambiguous"),
    "other case inside": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "Digest": "sha256:x"}]}, "Digest is ambiguous"),
    "kelvin sign": ({"schemaVersion": 2, "manifests": [], "layer\u017f": []}, "ambiguous"),
    "deep": (DEEP, "nested too deeply"),
    "huge number": (b'{"schemaVersion": ' + b"2" * 100_000 + b"}", "number is too large"),
    "NaN": (b'{"schemaVersion": NaN}', "NaN"),
    "true as a number": ({"schemaVersion": True, "manifests": []}, "schemaVersion"),
    "2.0": (b'{"schemaVersion": 2.0, "manifests": []}', "schemaVersion"),
    "no schemaVersion": ({"manifests": []}, "schemaVersion"),
    "schema 1": ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
    "not an object": ([], "an object is expected"),
    "null": (b"null", "an object is expected"),
    "no JSON": (b"<html>", "Expecting value"),
    "byte order mark": (b"\xef\xbb\xbf" + dumped(A_MANIFEST), "BOM"),
    "bad UTF-8": (b'{"schemaVersion": 2, "\xff": 1}', "utf-8"),
    "escape sequences": (b'{"\x1b[31m": 1', "Invalid control character"),
    "trailing data": (dumped(A_MANIFEST) + b"{}", "Extra data"),
    "manifests is no list": ({"schemaVersion": 2, "manifests": {}}, "a list is expected"),
    "null entry": ({"schemaVersion": 2, "manifests": [None]}, "an object is expected"),
    "no layers": (A_MANIFEST, "no layers"),
    "layers missing": ({"schemaVersion": 2, "config": A_MANIFEST["config"]}, "it has no layers"),
    "config missing": ({"schemaVersion": 2, "layers": []}, "it has no config"),
    "neither": ({"schemaVersion": 2}, "it has no config"),
    "negative size": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "size": -1}]}, "not a number of bytes"),
    "size is text": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "size": "2"}]}, "not a number of bytes"),
    "size is true": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "size": True}]}, "not a number of bytes"),
    "size missing": ({"schemaVersion": 2, "manifests": [changed(AN_ENTRY, {"size": None})]}, "not a number of bytes"),
    "mediaType is a list": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "mediaType": []}]}, "mediaType is not a string"),
    "half a character": (b'{"schemaVersion": 2, "mediaType": "\\ud800", "manifests": []}', "not a string"),
    "annotations are a list": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "annotations": [1]}]}, "annotations"),
    "platform is text": ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "platform": "linux/amd64"}]}, "an object is expected"),
}  # fmt: skip
for number, digest in enumerate(["sha256:../../x", "sha256:" + "a" * 63, "sha256:" + "A" * 64, "md5:" + "a" * 32, "", "../../x", 7]):
    BROKEN[f"digest {number}"] = ({"schemaVersion": 2, "manifests": [{**AN_ENTRY, "digest": digest}]}, "digest")


@pytest.mark.parametrize(("document", "words"), BROKEN.values(), ids=BROKEN)
def test_a_document_that_two_readers_could_understand_differently_is_refused(
    tmp_path: Path, internet: Scripted, document: Any, words: str
) -> None:
    images = Images()
    data = dumped(document)
    refused(images.lay(tmp_path, index=data), words)
    internet.routes["https://registry.example.org/v2/made/it/manifests/1"] = answering(data, "application/json")
    refused("docker://registry.example.org/made/it:1", words)
    assert len(internet.asked) == 1


def test_the_type_a_server_sends_and_the_one_inside_must_agree(internet: Scripted) -> None:
    images = Images()
    manifest = images.manifest()
    url = "https://registry.example.org/v2/made/it/manifests/1"
    ref = images.serve(internet, manifest)
    for sent, words in ((INDEX, "manifest"), (DOCKER_MANIFEST, "ambiguous"), ("text/html", "text/html"),
                        ("application/vnd.docker.distribution.manifest.v1+prettyjws", "schema 1")):  # fmt: skip
        internet.routes[url] = answering(images.blobs[manifest["digest"]], sent)
        refused(ref, words)
    for sent in (MANIFEST, f"{MANIFEST}; charset=utf-8", "application/json", ""):
        internet.routes[url] = answering(images.blobs[manifest["digest"]], sent)
        open_image(ref).close()


def test_the_type_in_an_index_must_be_what_the_server_sends(internet: Scripted) -> None:
    images = Images()
    manifest = images.manifest(mediaType=None)
    ref = images.serve(internet, images.index({**manifest, "platform": platform("amd64")}))
    url = f"https://registry.example.org/v2/made/it/manifests/{manifest['digest']}"
    internet.routes[url] = answering(images.blobs[manifest["digest"]], MANIFEST)
    open_image(ref).close()
    internet.routes[url] = answering(images.blobs[manifest["digest"]], DOCKER_MANIFEST)
    refused(ref, "ambiguous")


ARTIFACTS: dict[str, tuple[Json, str]] = {
    "helm": ({"config": {**A_MANIFEST["config"], "mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "a Helm chart"),
    "sif": ({"config": {**A_MANIFEST["config"], "mediaType": "application/vnd.sylabs.sif.config.v1+json"}}, "a SIF file"),
    "artifact": (
        {"config": {**A_MANIFEST["config"], "mediaType": "application/vnd.oci.empty.v1+json"}, "artifactType": "application/vnd.x+json"},
        "application/vnd.x+json",
    ),
    "empty": ({"config": {**A_MANIFEST["config"], "mediaType": ""}}, "an empty media type"),
    "cosign": ({"layers": [{**AN_ENTRY, "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json"}]}, "a cosign signature"),
    "encrypted": ({"layers": [{**AN_ENTRY, "mediaType": LAYER + "+encrypted"}]}, "encrypted"),
    "octet-stream": ({"layers": [{**AN_ENTRY, "mediaType": "application/octet-stream"}]}, "application/octet-stream"),
    "xz": ({"layers": [{**AN_ENTRY, "mediaType": "application/vnd.oci.image.layer.v1.tar+xz"}]}, "tar+xz"),
    "escape": ({"layers": [{**AN_ENTRY, "mediaType": "\x1b[2J\r\n"}]}, "\\x1b[2J"),
}


@pytest.mark.parametrize(("fields", "words"), ARTIFACTS.values(), ids=ARTIFACTS)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, fields: Json, words: str) -> None:
    images = Images()
    refused(images.lay(tmp_path, images.manifest(**fields)), words)


def test_docker_types_nondistributable_layers_and_unknown_fields_are_taken(tmp_path: Path) -> None:
    types = list(documents.LAYER_TYPES)
    images = Images()
    layers = [images.layer(name, mediaType=name, urls=["https://192.0.2.1/x"], data="Zm9v") for name in types]
    manifest = images.manifest(*layers, subject={"mediaType": "x"}, mediaType=DOCKER_MANIFEST, annotations={"a": "b"}, future=[1])
    root = images.index({**manifest, "mediaType": DOCKER_MANIFEST, "platform": platform("amd64")}, mediaType=DOCKER_LIST)
    with open_image(images.lay(tmp_path, {**root, "mediaType": DOCKER_LIST})) as image:
        assert [layer.blob.compression for layer in image.layers] == list(documents.LAYER_TYPES.values())
        assert len(tars(image)) == len(types)


def test_foreign_urls_are_never_asked(internet: Scripted) -> None:
    images = Images()
    missing, diff_id = images.layer(urls=["https://storage.example.org/layer"])
    del images.blobs[missing["digest"]]
    internet.routes["https://storage.example.org/layer"] = answering(b"bait", "")
    with open_image(images.serve(internet, images.manifest((missing, diff_id)))) as image, pytest.raises(RegistryError):
        image.open(image.layers[0]).read(1)
    assert not [url for url in internet.urls() if "storage" in url]


@pytest.mark.parametrize("count", [1, 127, 500])
def test_many_layers(tmp_path: Path, count: int) -> None:
    images = Images()
    same = images.layer("same")
    layers = [same if number % 2 else images.layer(str(number)) for number in range(count)]
    with open_image(images.lay(tmp_path, images.manifest(*layers))) as image:
        assert [layer.diff_id for layer in image.layers] == [diff_id for _, diff_id in layers]
        assert content(image, image.layers[-1])


def test_too_many_layers_and_the_wrong_number_of_diff_ids(tmp_path: Path) -> None:
    images = Images()
    layer = images.layer()
    refused(images.lay(tmp_path / "501", images.manifest(*[layer] * 501)), "501 layers", kind=LimitError)
    for count in (0, 1, 3):
        diff_ids = {"rootfs": {"type": "layers", "diff_ids": [layer[1]] * count}}
        refused(images.lay(tmp_path / str(count), images.manifest(layer, layer, says=diff_ids)), f"2 layers, the config names {count}")


# --- config ---------------------------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[Json, str]] = {
    "no rootfs": ({"rootfs": None}, "rootfs"),
    "rootfs of another type": ({"rootfs": {"type": "base", "diff_ids": []}}, "type layers"),
    "diff_ids null": ({"rootfs": {"type": "layers"}}, "a list is expected"),
    "diff_id malformed": ({"rootfs": {"type": "layers", "diff_ids": ["sha256:../x"]}}, "digest"),
    "diff_id a number": ({"rootfs": {"type": "layers", "diff_ids": [7]}}, "digest"),
    "config a list": ({"config": []}, "an object is expected"),
    "Env text": ({"config": {"Env": "A=1"}}, "Env: a list is expected"),
    "Env numbers": ({"config": {"Env": [1]}}, "Env: a string is expected"),
    "Env null": ({"config": {"Env": [None]}}, "where there is null"),
    "Env with NUL": ({"config": {"Env": ["A=\0"]}}, "NUL"),
    "Env half a character": ({"config": {"Env": ["A=\ud800"]}}, "broken text"),
    "Cmd object": ({"config": {"Cmd": {"0": "x"}}}, "Cmd: a list is expected"),
    "Entrypoint nested": ({"config": {"Entrypoint": [["x"]]}}, "where there is a list"),
    "User number": ({"config": {"User": 0}}, "User"),
    "WorkingDir list": ({"config": {"WorkingDir": ["/"]}}, "WorkingDir"),
    "WorkingDir with NUL": ({"config": {"WorkingDir": "/\0"}}, "NUL"),
    "Labels list": ({"config": {"Labels": ["a=b"]}}, "Labels"),
    "Labels numbers": ({"config": {"Labels": {"a": 1}}}, "Labels"),
    "other case": ({"config": {"env": ["A=1"], "Env": []}}, "env is ambiguous"),
    "architecture number": ({"architecture": 64}, "architecture"),
    "created number": ({"created": 1580608922}, "created"),
}


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_of_the_wrong_types_is_refused(tmp_path: Path, config: Json, words: str) -> None:
    images = Images()
    refused(images.lay(tmp_path, images.manifest(says=config)), words)


def test_settings_without_a_value_are_left_out_and_one_word_is_a_list(tmp_path: Path) -> None:
    said: Json = {"Env": None, "Cmd": "bash", "Entrypoint": [], "Labels": {"a": "\x1b", "Env": "env"}, "Healthcheck": {"Test": ["NONE"]}}
    kept = {"Cmd": ["bash"], "Entrypoint": [], "Labels": said["Labels"], "Healthcheck": {"Test": ["NONE"]}}
    for config, expected in ((None, {}), (said, kept)):
        images = Images()
        with open_image(images.lay(tmp_path / str(bool(config)), images.manifest(says={"config": config}))) as image:
            assert image.settings == expected


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2020-02-02T02:02:02Z", 1580608922),
        ("2020-02-02T02:02:02.999999999Z", 1580608922),
        ("2020-02-02t04:02:02.5+02:00", 1580608922),
        ("2020-02-01T18:32:02-07:30", 1580608922),
        ("2016-12-31T23:59:60Z", 1483228799),
        ("9999-12-31T23:59:59Z", 253402300799),
        ("0001-01-01T00:00:00Z", None),
        ("1969-12-31T23:59:59Z", None),
        ("2020-02-30T00:00:00Z", None),
        ("2020-02-02T02:02:02", None),
        ("2020-02-02", None),
        ("yesterday", None),
        ("", None),
        ("٢٠٢٠-02-02T02:02:02Z", None),
    ],
)
def test_timestamps(text: str, seconds: int | None) -> None:
    assert documents.timestamp(text) == seconds
