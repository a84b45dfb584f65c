"""From a name to an image's documents and layers: every form, a real registry, the choice in an index, and lies about bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from oci_fixtures import (
    CONFIG,
    MANIFEST,
    Images,
    Json,
    changed,
    content,
    docker_archive,
    dumped,
    open_image,
    platform,
    refused,
    sha256,
    tars,
)
from registry_fixtures import LocalRegistry, Need, certificate, internet, nobody, registry
from scripted_registry import Scripted
from tar_fixtures import archive, member

from convert.blobs import Cache
from convert.platforms import wanted
from sciexec.errors import ImageError, LimitError, RegistryError

__all__ = ["certificate", "internet", "nobody", "registry"]  # fixtures

MACHINE = wanted()


# --- real images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(oci_layout: Path, need: Need, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The image of `oci_layout` in every form that lies on a disk: form -> reference."""
    skopeo = need("skopeo")
    path = tmp_path_factory.mktemp("saved")
    forms = {
        "oci": f"oci:{oci_layout}:app",
        "oci-archive": f"oci-archive:{path}/oci.tar:app",
        "docker-archive": f"docker-archive:{path}/docker.tar:team/app:1.0",
        "zstd": f"oci:{path}/zstd:app",
    }
    for form, target in list(forms.items())[1:]:
        extra = ["--dest-compress-format", "zstd", "--dest-compress"] if form == "zstd" else []
        command = [skopeo, "--insecure-policy", "copy", "--quiet", *extra, forms["oci"], target]
        subprocess.run(command, check=True, capture_output=True)
    return forms


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive", "zstd"])
def test_the_same_image_in_every_form(saved: dict[str, str], form: str) -> None:
    with open_image(saved["oci"], None) as plain, open_image(saved[form], None) as image:
        assert len(image.layers) == 5 and tars(image) == tars(plain)
        assert [layer.diff_id for layer in image.layers] == [layer.diff_id for layer in plain.layers]
        assert image.reference == saved[form] and image.arch == MACHINE.architecture
        assert image.created == plain.created == 1580608922
        assert image.settings == plain.settings and image.settings["Env"][1] == "GREETER=a layer"
        assert image.settings["Entrypoint"] == ["/opt/app/hello"] and image.settings["WorkingDir"] == "/opt/app"
        config = json.loads(image.config)["config"]
        assert {name: value for name, value in config.items() if value is not None} == image.settings
        compression = {layer.blob.compression for layer in image.layers}
        assert compression == {"docker-archive": {"none"}, "zstd": {"zstd"}}.get(form, {"gzip"})
        if form == "docker-archive":
            assert image.manifest_digest == sha256(image.config) and {layer.blob.digest for layer in image.layers} == {""}
        else:
            assert image.manifest_digest == sha256(image.manifest)
        if form == "oci-archive":
            assert image.manifest_digest == plain.manifest_digest


def test_a_name_is_needed_only_where_there_are_several(oci_layout: Path, saved: dict[str, str], need: Need, tmp_path: Path) -> None:
    for form in ("oci", "oci-archive"):
        with open_image(saved[form].removesuffix(":app"), None) as image:
            assert len(image.layers) == 5
    with open_image(saved["docker-archive"].removesuffix(":team/app:1.0"), None) as image:
        assert len(image.layers) == 5
    with open_image(saved["docker-archive"].replace("team/app", "docker.io/team/app"), None) as image:
        assert len(image.layers) == 5
    shutil.copytree(oci_layout, tmp_path / "two")
    umoci = [need("umoci"), "tag", "--image", f"{tmp_path}/two:app"]
    subprocess.run([*umoci, "same"], check=True, capture_output=True)
    with open_image(f"oci:{tmp_path}/two", None) as image:
        digest = image.manifest_digest
    umoci[1:2] = ["config", "--config.user", "7"]
    subprocess.run([*umoci, "--tag", "other"], check=True, capture_output=True)
    error = refused(f"oci:{tmp_path}/two", "several images", "app, other, same", arch=None)
    assert ":NAME" in error.hint
    refused(f"oci:{tmp_path}/two:missing", "no image of the name missing; it holds app, other, same", arch=None)
    refused(saved["docker-archive"].replace("1.0", "2.0"), "no image of the name team/app:2.0; it holds", "team/app:1.0", arch=None)
    with open_image(f"oci:{tmp_path}/two:other", None) as image:
        assert image.settings["User"] == "7" and image.manifest_digest != digest
    with open_image(f"oci:{tmp_path}/two:{digest}", None) as image:
        assert "User" not in image.settings and tars(image)


def test_one_name_for_two_images_is_a_choice_only_by_platform(tmp_path: Path) -> None:
    images = Images()
    names = {"annotations": {"org.opencontainers.image.ref.name": "x"}}
    one, two = ({**images.manifest(images.layer(text)), "platform": platform("amd64"), **names} for text in "12")
    other = {**images.manifest(images.layer("3"), says={"architecture": "arm64"}), "platform": platform("arm64"), **names}
    with open_image(images.lay(tmp_path / "a", one, other) + ":x") as image:
        assert image.manifest_digest == one["digest"]
    refused(images.lay(tmp_path / "b", one, two, other) + ":x", "several images have that name")
    refused(images.lay(tmp_path / "c", one, changed(two, {"annotations": None})), "several images are in it")
    unmarked = [changed(entry, {"platform": None}) for entry in (one, two)]
    refused(images.lay(tmp_path / "d", *unmarked), "several images are in it")
    refused(images.lay(tmp_path / "e"), "no image is in it")


def test_two_images_saved_in_one_docker_archive(tmp_path: Path) -> None:
    layers, images = [], []
    for name in ("one", "two"):
        tar = archive(member(b"file", data=name.encode()))
        config = dumped({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(tar)]}})
        layers += [member(f"{name}.tar".encode(), data=tar), member(f"{name}.json".encode(), data=config)]
        images.append({"Config": f"{name}.json", "RepoTags": [f"{name}:1", f"x/{name}:2"], "Layers": [f"{name}.tar"]})
    ref = docker_archive(tmp_path / "a.tar", *layers, manifest=images)
    refused(ref, "several images", "one:1", "x/two:2")
    for name, text in (("one:1", b"one"), ("x/two:2", b"two"), ("docker.io/library/two:1", b"two")):
        with open_image(f"{ref}:{name}") as image:
            assert text in tars(image)[0]


def test_a_pull_from_a_registry_with_and_without_a_cache(registry: LocalRegistry, oci_layout: Path, tmp_path: Path) -> None:
    pushed = registry.push(f"{oci_layout}:app", "oci/app:1")
    ref = f"docker://{registry.host}/oci/app:1"
    with open_image(f"oci:{oci_layout}:app", None) as local:
        expected = tars(local)
    with open_image(ref, None) as image:
        assert image.reference == ref and image.manifest_digest == pushed
        assert tars(image) == expected and tars(image) == expected
    cache = Cache(str(tmp_path / "cache"))
    for _ in range(2):
        with open_image(ref, None, cache) as image:
            assert [content(image, layer) for layer in reversed(image.layers)] and tars(image) == expected
        names = {entry.name for entry in cache.list()}
        assert names == {layer.blob.digest for layer in image.layers} | {sha256(image.config)}
    assert not os.listdir(f"{cache.path}/tmp")
    refused(f"docker://{registry.host}/oci/app:2", "manifest unknown", arch=None, kind=RegistryError)


def test_what_is_named_by_digest_and_in_the_cache_needs_no_network(internet: Scripted, tmp_path: Path) -> None:
    images = Images()
    root = images.index(images.manifest(platform=None))
    manifest = images.manifest()
    root = images.index({**manifest, "platform": platform("amd64")})
    images.serve(internet, root)
    ref = f"docker://registry.example.org/made/it@{root['digest']}"
    cache = Cache(str(tmp_path / "cache"))
    for count in (4, 4):
        with open_image(ref, cache=cache) as image:
            assert image.manifest_digest == manifest["digest"] and tars(image)
        assert len(internet.urls()) == count
    image = open_image(ref, cache=cache)
    path = Path(cache.path, "blobs", *image.layers[0].blob.digest.split(":"))
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(AssertionError):
        tars(image)
    assert image.discard(image.layers[0]) and not image.discard(image.layers[0])
    image.close()
    with open_image(ref, cache=cache) as image:
        assert tars(image)
    assert len(internet.urls()) == 5


# --- the choice in an index -----------------------------------------------------------------------------------------------


def one_of(images: Images, *platforms: Any) -> tuple[list[Json], list[str]]:
    """A manifest for each platform (None: none said), told apart by their layers: (descriptors, digests)."""
    entries = []
    for number, said in enumerate(platforms):
        config = {"architecture": said["architecture"], "os": said["os"]} if said else {}
        entries.append(changed(images.manifest(images.layer(str(number)), says=config), {"platform": said}))
    return entries, [entry["digest"] for entry in entries]


ATTESTATION = {"platform": platform("unknown", os="unknown"), "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}

CHOICES: list[tuple[str, list[Any], str, int]] = [
    ("the right one", [platform("arm64"), platform("amd64"), platform("386")], "amd64", 1),
    ("another by --arch", [platform("arm64"), platform("amd64")], "arm64", 0),
    ("the first of two that match", [platform("amd64"), platform("amd64")], "amd64", 0),
    ("the exact before the older", [platform("arm", "v6"), platform("arm", "v5"), platform("arm", "v7")], "arm/v7", 2),
    ("the best of the older", [platform("arm", "v5"), platform("arm", "v6")], "arm/v7", 1),
    ("windows passed over", [platform("amd64", os="windows"), platform("amd64")], "amd64", 1),
    ("the only one unmarked", [None], "amd64", 0),
    ("a match before the unmarked", [None, platform("amd64")], "amd64", 1),
]


@pytest.mark.parametrize(("platforms", "arch", "expected"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
@pytest.mark.parametrize("nested", [False, True])
def test_the_choice_in_an_index(tmp_path: Path, platforms: list[Any], arch: str, expected: int, nested: bool) -> None:
    images = Images()
    entries, digests = one_of(images, *platforms)
    attestation = {**images.manifest(images.layer("attestation")), **ATTESTATION}
    foreign = images.blob(b"{}", "application/vnd.example+json")
    root = images.index(attestation, foreign, *entries)
    if nested:
        root = images.index(images.index(root))
    with open_image(images.lay(tmp_path, root), arch) as image:
        assert image.manifest_digest == digests[expected] and image.arch == arch.partition("/")[0]


def test_no_match_lists_what_there_is(tmp_path: Path) -> None:
    images = Images()
    entries, _ = one_of(images, platform("arm64", "v8"), platform("s390x"))
    nested = {**images.index(*entries[:1]), "platform": platform("ppc64le")}
    ref = images.lay(tmp_path, images.index(*entries, nested, {**entries[0], **ATTESTATION}))
    error = refused(ref, "none for linux/amd64; it has linux/arm64/v8, linux/ppc64le, linux/s390x")
    assert "--arch" in error.hint


@pytest.mark.parametrize("said", [{"architecture": "arm64"}, {"os": "windows"}])
def test_a_config_for_another_machine_is_refused_though_nothing_else_says_so(tmp_path: Path, said: Json) -> None:
    images = Images()
    refused(images.lay(tmp_path, images.manifest(says=said)), "none for linux/amd64", next(iter(said.values())))
    images = Images()
    lying = {**images.manifest(says=said), "platform": platform("amd64")}
    refused(images.lay(tmp_path, images.index(lying)), "none for linux/amd64")


def test_a_config_that_does_not_say_is_believed(tmp_path: Path) -> None:
    images = Images()
    with open_image(images.lay(tmp_path, images.manifest(says={"architecture": "", "os": ""}))) as image:
        assert image.arch == "amd64"


def nest(images: Images, depth: int) -> Json:
    entry = {**images.manifest(), "platform": platform("amd64")}
    for _ in range(depth):
        entry = images.index(entry)
    return entry


@pytest.mark.parametrize(("depth", "fits"), [(3, True), (4, False), (100, False)])
def test_indexes_are_nested_three_deep_at_most(tmp_path: Path, internet: Scripted, depth: int, fits: bool) -> None:
    images = Images()
    root = nest(images, depth)
    for ref in (images.lay(tmp_path, root), images.serve(internet, root)):
        if fits:
            open_image(ref).close()
        else:
            refused(ref, "nested more than 3 deep")
    assert len(internet.asked) < 8


def test_an_index_of_a_thousand_indexes_is_left(internet: Scripted) -> None:
    images = Images()
    nested = [images.index(annotations={"number": str(number)}) for number in range(1000)]
    refused(images.serve(internet, images.index(*nested)), "more than 32 indexes")
    assert len(internet.asked) < 40


# --- lies about bytes -----------------------------------------------------------------------------------------------------


def lie(images: Images, descriptor: Json, data: bytes) -> None:
    images.blobs[descriptor["digest"]] = data


@pytest.mark.parametrize("victim", ["index", "manifest", "config"])
@pytest.mark.parametrize("how", ["other bytes", "one byte more", "one byte less", "size field"])
def test_a_document_with_the_wrong_bytes_is_refused_and_not_kept(tmp_path: Path, internet: Scripted, victim: str, how: str) -> None:
    images = Images()
    manifest = images.manifest()
    config = json.loads(images.blobs[manifest["digest"]])["config"]
    if (victim, how) == ("config", "size field"):
        manifest = images.manifest(config={**config, "size": config["size"] + 1})
    entry = {**manifest, "platform": platform("amd64")}
    if (victim, how) == ("manifest", "size field"):
        entry["size"] += 1
    index = images.index(entry)
    root = {**index, "size": index["size"] + 1} if (victim, how) == ("index", "size field") else index
    top = images.index(root)
    target = {"index": index, "manifest": manifest, "config": config}[victim]
    data = images.blobs[target["digest"]]
    if how != "size field":
        lie(images, target, {"other bytes": data[:-2] + b" }", "one byte more": data + b" ", "one byte less": data[:-1]}[how])
    refused(images.lay(tmp_path / "layout", top), "")
    cache = Cache(str(tmp_path / "cache"))
    with pytest.raises((ImageError, RegistryError)):
        open_image(images.serve(internet, top), cache=cache)
    kept = {entry.name: cache.read(entry.name, 1 << 20) for entry in cache.list()}
    assert all(data is not None and sha256(data) == name for name, data in kept.items())


@pytest.mark.parametrize("how", ["other bytes", "one byte more", "one byte less", "missing"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_layer_with_the_wrong_bytes_is_never_cached(tmp_path: Path, internet: Scripted, how: str, cached: bool) -> None:
    images = Images()
    good, bad = images.layer("good"), images.layer("bad")
    manifest = images.manifest(good, bad)
    data = images.blobs[bad[0]["digest"]]
    lie(images, bad[0], {"other bytes": bytes(len(data)), "one byte more": data + b"\0", "one byte less": data[:-1], "missing": b""}[how])
    ref = images.serve(internet, manifest)
    if how == "missing":
        del internet.routes[f"https://registry.example.org/v2/made/it/blobs/{bad[0]['digest']}"]
    cache = Cache(str(tmp_path / "cache")) if cached else None
    with open_image(ref, cache=cache) as image, pytest.raises((ImageError, RegistryError, AssertionError)):
        content(image, image.layers[1])
    if cache:
        assert bad[0]["digest"] not in {entry.name for entry in cache.list()} and os.listdir(f"{cache.path}/tmp") == []


def test_a_document_of_more_than_4_mib_is_refused_unread(tmp_path: Path, internet: Scripted) -> None:
    images = Images()
    huge = b" " * ((4 << 20) + 1)
    manifest = images.manifest(config=images.blob(huge, CONFIG))
    refused(images.lay(tmp_path / "config", manifest), "allowed", kind=LimitError)
    refused(images.serve(internet, manifest), "may have", kind=LimitError)
    assert not [url for url in internet.urls() if "/blobs/" in url]
    refused(images.lay(tmp_path / "index", index=huge), "allowed", kind=LimitError)
    refused(images.lay(tmp_path / "manifest", images.blob(huge, MANIFEST)), "allowed", kind=LimitError)
