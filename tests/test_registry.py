"""Pulling from real registries, and from servers that lie, drip and break off."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest
from registry_fixtures import LocalRegistry, certificate, internet, nobody, registry, secure_registry
from scripted_registry import (
    APP,
    BEARER,
    BLOB,
    FAST,
    HASTY,
    HOST,
    LOGIN,
    MANIFEST,
    STORAGE,
    TOKENS,
    TYPE,
    Answer,
    Certificate,
    Exchange,
    Script,
    Scripted,
    broken,
    chunked,
    digest,
    endless,
    guarded,
    open_registry,
    ranged,
    read_blob,
    redirect,
    refusal,
    stalled,
    whole,
)

from convert.credentials import Credentials
from convert.patience import Patience
from convert.registry import MAX_DOCUMENT, Registry
from sciexec.errors import LimitError, RegistryError, SciexecError, UsageError

__all__ = ["certificate", "internet", "nobody", "registry", "secure_registry"]  # fixtures


# --- the real thing -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout, tag "app", of one layer of random bytes."""
    directory = tmp_path_factory.mktemp("layout")
    (directory / "blobs/sha256").mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        (directory / "blobs/sha256" / digest(data)[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    tar = os.urandom(300_000)
    layer = blob(gzip.compress(tar, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [digest(tar)]}}
    described = blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    manifest = blob(json.dumps({"schemaVersion": 2, "mediaType": TYPE, "config": described, "layers": [layer]}).encode(), TYPE)
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "app"}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return directory


def check_whole_image(client: Registry, pushed: str) -> None:
    data, media_type, found = client.manifest()
    assert (media_type, found) == (TYPE, pushed) and digest(data) == pushed
    assert client.manifest(pushed)[0] == data
    manifest = json.loads(data)
    assert json.loads(client.document(manifest["config"]["digest"], manifest["config"]["size"]))["os"] == "linux"
    layer = manifest["layers"][0]
    with client.blob(layer["digest"], layer["size"]) as stream:
        content = b"".join(iter(stream.read, b""))
        assert stream.read() == b""
    assert digest(content) == layer["digest"]
    with client.blob(layer["digest"], layer["size"]) as stream:
        stream.offset = 1000  # as after a connection that broke there
        assert b"".join(iter(lambda: stream.read(7777), b"")) == content[1000:]


def test_a_real_registry(registry: LocalRegistry, layout: Path) -> None:
    pushed = registry.push(f"{layout}:app", "lab/app:1")
    with open_registry(f"{registry.host}/lab/app:1") as client:
        check_whole_image(client, pushed)
    with open_registry(f"{registry.host}/lab/app@{pushed}") as client:
        assert client.manifest()[2] == pushed
    for name in ("lab/app:2", "lab/none:1", f"lab/app@sha256:{'0' * 64}"):
        with open_registry(f"{registry.host}/{name}") as client, pytest.raises(RegistryError, match=f"{name}: manifest unknown"):
            client.manifest()
    with open_registry(f"{registry.host}/lab/app") as client, pytest.raises(RegistryError, match="blob unknown"):
        read_blob(client)


def test_a_real_registry_with_tls_and_password(secure_registry: LocalRegistry, layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = secure_registry.push(f"{layout}:app", "lab/app:1")
    name = f"{secure_registry.host}/lab/app:1"
    with open_registry(name) as client, pytest.raises(RegistryError, match=r"certificate .* is not trusted") as caught:
        client.manifest()
    assert "REQUESTS_CA_BUNDLE" in caught.value.hint
    assert secure_registry.secure
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(secure_registry.secure.certificate))
    with open_registry(name) as client, pytest.raises(RegistryError, match="unauthorized") as caught:
        client.manifest()
    assert "SCIEXEC_DOCKER_USERNAME" in caught.value.hint
    with open_registry(name, login=Credentials("ada", "wrong")) as client, pytest.raises(RegistryError, match="the password is wrong"):
        client.manifest()
    monkeypatch.setenv("APPTAINER_DOCKER_USERNAME", secure_registry.username)
    monkeypatch.setenv("APPTAINER_DOCKER_PASSWORD", secure_registry.password)
    with open_registry(name) as client:
        check_whole_image(client, pushed)


# --- manifests ----------------------------------------------------------------------------------------------------------------

BAD_MANIFESTS = [
    ("by digest, other bytes", digest(b"other"), whole(MANIFEST), RegistryError, "does not match its digest"),
    ("stated digest of other bytes", "1", whole(MANIFEST, Docker_Content_Digest=digest(b"other")), RegistryError, "does not match"),
    ("stated digest malformed", "1", whole(MANIFEST, Docker_Content_Digest="sha256:../../x"), RegistryError, "malformed digest"),
    ("encoded", "1", whole(gzip.compress(MANIFEST), Content_Encoding="gzip"), RegistryError, "Content-Encoding"),
    ("4 MiB and 1", "1", whole(b" " * (MAX_DOCUMENT + 1)), LimitError, "more than 4194304 bytes"),
    ("endless", "1", endless(), LimitError, "more than 4194304 bytes"),
    ("206 unasked", "1", whole(MANIFEST, 206), RegistryError, "status 206"),
    ("short", "1", broken(MANIFEST, 19), RegistryError, "failed|ended after"),
    ("two lengths", "1", whole(MANIFEST, Content_Length="20, 21"), RegistryError, "malformed|failed"),
    ("stalls", "1", stalled(MANIFEST, 5), RegistryError, "in time"),
    ("no HTTP", "1", lambda exchange: exchange.wfile.write(b"\x00\x1b]0;x\x07\r\n\r\n") and exchange.reset(), RegistryError, "failed"),
]


@pytest.mark.parametrize(("name", "wanted", "answer", "kind", "cause"), BAD_MANIFESTS, ids=[row[0] for row in BAD_MANIFESTS])
def test_bad_manifest(internet: Scripted, name: str, wanted: str, answer: Answer, kind: type[SciexecError], cause: str) -> None:
    internet.routes[f"{APP}/manifests/{wanted}"] = answer
    patience = HASTY if "stall" in name else FAST
    with open_registry(patience=patience) as client, pytest.raises(kind, match=cause) as caught:
        client.manifest(wanted)
    assert str(caught.value).isprintable()
    assert internet.sent < 3 * MAX_DOCUMENT


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_good_manifest(internet: Scripted, algorithm: str) -> None:
    named = digest(MANIFEST, algorithm)
    answer = whole(MANIFEST, Docker_Content_Digest=digest(MANIFEST), Content_Type=f"{TYPE}; charset=utf-8")
    internet.routes[f"{APP}/manifests/{named}"] = answer
    with open_registry(f"{HOST}/app@{named}") as client:
        assert client.manifest() == (MANIFEST, TYPE, named)
    asked = internet.asked[0]
    assert asked.headers["Accept-Encoding"] == "identity"
    assert all(kind in asked.headers["Accept"] for kind in (TYPE, "oci.image.index.v1", "manifest.list.v2", "distribution.manifest.v2"))


@pytest.mark.parametrize("wanted", ["sha256:../../x", "../../_catalog", "a?b", "a b", "sha256:" + "A" * 64])
def test_a_bad_name_reaches_no_registry(internet: Scripted, wanted: str) -> None:
    with open_registry() as client:
        with pytest.raises(RegistryError):
            client.manifest(wanted)
        with pytest.raises(RegistryError):
            client.blob(wanted, 1)
    assert not internet.asked


ERRORS = [
    (404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}', f"pulling docker://{HOST}/app:latest: no such thing"),
    (404, b'{"errors":[{"code":"NAME_UNKNOWN"}]}', "NAME_UNKNOWN"),
    (404, b"<html>", "manifest unknown"),
    (404, b"[" * 60_000, "manifest unknown"),
    (404, b'{"errors":[null]}', "manifest unknown"),
    (404, b'{"errors":{"a":1}}', "manifest unknown"),
    (403, b'{"errors":[{"message":"\\u001b[2Jpaid\\r\\nonly"}]}', r"denied: \x1b[2Jpaid\r\nonly"),
    (418, b'{"errors":[{"message":"' + b"x" * 5000 + b'"}]}', "status 418: xxx"),
    (418, b'{"errors":[{"message":"' + b"x" * (1 << 20) + b'"}]}', "status 418"),
    (401, b'{"errors":[{"message":"no"}]}', "unauthorized"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "text"), ERRORS, ids=[f"{row[0]} {row[1][:40]!r}" for row in ERRORS])
def test_error_bodies_are_quoted_cut_and_escaped(internet: Scripted, status: int, body: bytes, text: str) -> None:
    internet.routes[f"{APP}/manifests/latest"] = whole(body, status)
    with open_registry() as client, pytest.raises(RegistryError) as caught:
        client.manifest()
    assert text in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert len(internet.asked) == 1


# --- blobs --------------------------------------------------------------------------------------------------------------------

TENTH, MOST = len(BLOB) // 10, len(BLOB) * 9 // 10
GOOD_BLOBS: list[tuple[str, Script, int]] = [
    ("whole", ranged(BLOB), 1),
    ("reset at 10 %, then 206", [broken(BLOB, TENTH), ranged(BLOB)], 2),
    ("reset at 90 %, then 206", [broken(BLOB, MOST), ranged(BLOB)], 2),
    ("reset at 10 %, then 200", [broken(BLOB, TENTH), whole(BLOB)], 2),
    ("reset at 90 %, then 200", [broken(BLOB, MOST), whole(BLOB)], 2),
    ("reset before the first byte", [broken(BLOB, 0), ranged(BLOB)], 2),
    ("stall at 90 %, then 206", [stalled(BLOB, MOST), ranged(BLOB)], 2),
    ("500 twice", [refusal(500), refusal(503), ranged(BLOB)], 3),
    ("429 with Retry-After in the past", [refusal(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), ranged(BLOB)], 2),
    ("chunked, no length", chunked(BLOB), 1),
    ("no length, ends with the connection", whole(BLOB, Content_Length=""), 1),
    ("Content-Encoding that says what it is", whole(BLOB, Content_Encoding="gzip"), 1),
    ("by redirect, anew after a reset", redirect(STORAGE), 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "script", "requests"), GOOD_BLOBS, ids=[row[0] for row in GOOD_BLOBS])
def test_good_blob(internet: Scripted, name: str, script: Script, requests: int) -> None:
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = script
    internet.routes[STORAGE] = [broken(BLOB, TENTH), ranged(BLOB)]
    notes: list[str] = []
    with open_registry(note=notes.append, patience=HASTY if "stall" in name else FAST) as client:
        assert read_blob(client) == BLOB
    assert len(internet.asked) == requests
    assert len(notes) == len([url for url in internet.urls() if url.startswith(APP)]) - 1


def test_retry_after_is_waited_for(internet: Scripted) -> None:
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = [refusal(429, Retry_After="1"), ranged(BLOB)]
    notes: list[str] = []
    began = time.monotonic()
    with open_registry(note=notes.append) as client:
        assert read_blob(client) == BLOB
    assert time.monotonic() - began >= 1
    assert len(notes) == 1 and "status 429; trying again in 1.0 s" in notes[0]


def no_206(exchange: Exchange) -> None:
    exchange.reply(206, BLOB[5:], {"Content-Range": f"bytes 5-{len(BLOB) - 1}/{len(BLOB)}"})


BAD_BLOBS: list[tuple[str, Script, str, int]] = [
    ("announces more", whole(BLOB + b"x"), "announces 262145", 1),
    ("announces less", whole(BLOB[:-1]), "announces 262143", 1),
    ("goes on", endless(), "goes on after the 262144 bytes", 1),
    ("one byte more, no length", whole(BLOB + b"x", Content_Length=""), "goes on after", 1),
    ("one byte less, no length", whole(BLOB[:-1], Content_Length=""), "ended after 262143 of 262144", 3),
    ("another range", [broken(BLOB, TENTH), no_206], "another range", 2),
    ("206 unasked", no_206, "status 206", 1),
    ("Content-Range is no range", [broken(BLOB, TENTH), whole(BLOB, 206, Content_Range="bytes x")], "another range", 2),
    ("416", [broken(BLOB, TENTH), refusal(416)], "status 416", 2),
    ("unknown", refusal(404), "blob unknown", 1),
    ("resets for ever", broken(BLOB, 0), "failed|ended after 0", 3),
    ("stalls for ever", stalled(BLOB, 0), "in time", 3),
    ("500 for ever", refusal(500), "status 500", 3),
    ("Retry-After an hour", refusal(429, Retry_After="3600"), "come back in 3600 s", 1),
    ("loses what it had", [broken(BLOB, TENTH), whole(BLOB[:5], Content_Length="")], "ended before byte", 3),
]


@pytest.mark.parametrize(("name", "script", "cause", "requests"), BAD_BLOBS, ids=[row[0] for row in BAD_BLOBS])
def test_bad_blob(internet: Scripted, name: str, script: Script, cause: str, requests: int) -> None:
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = script
    received = 0
    client = open_registry(patience=HASTY if "stall" in name else FAST)
    with client, client.blob(digest(BLOB), len(BLOB)) as stream, pytest.raises(RegistryError, match=cause):
        while piece := stream.read():
            received += len(piece)
    assert received <= len(BLOB)
    assert len(internet.asked) == requests
    assert internet.sent < 8 << 20  # what the buffers of two sockets hold


def test_a_server_that_drips_counts_as_stalled(internet: Scripted) -> None:
    def drip(exchange: Exchange) -> None:
        exchange.reply(200, b"", {"Content-Length": str(len(BLOB))})
        for _ in range(100):  # 5 s and not for ever, for the day this fails
            exchange.wfile.write(b"x")
            exchange.wfile.flush()
            time.sleep(0.05)

    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = drip
    with open_registry(patience=HASTY) as client, pytest.raises(RegistryError, match="hardly anything"):
        read_blob(client)
    assert len(internet.asked) == FAST.attempts


def test_progress_renews_the_patience(internet: Scripted) -> None:
    """A connection that breaks every 2 MiB is a nuisance, not a failure."""
    data = os.urandom(1 << 20) * 10

    def two_mebibytes(exchange: Exchange) -> None:
        begin = int(exchange.asked.headers.get("Range", "bytes=0-")[6:-1])
        answer = {"Content-Length": str(len(data) - begin)}
        if begin:
            answer["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        exchange.reply(206 if begin else 200, data[begin : begin + (2 << 20)], answer)
        exchange.close_connection = True

    internet.routes[f"{APP}/blobs/{digest(data)}"] = two_mebibytes
    with open_registry() as client:
        assert read_blob(client, data) == data
    assert len(internet.asked) == 5 > FAST.attempts


def test_a_document_is_bounded_and_verified(internet: Scripted) -> None:
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = whole(BLOB[:-1] + b"x")
    with open_registry() as client:
        with pytest.raises(RegistryError, match="does not match its digest"):
            client.document(digest(BLOB), len(BLOB))
        with pytest.raises(LimitError):
            client.document(digest(BLOB), MAX_DOCUMENT + 1)


@pytest.mark.parametrize("script", [stalled(BLOB, TENTH), refusal(503, Retry_After="30")], ids=["while reading", "while waiting"])
@pytest.mark.parametrize("whom", ["stream", "registry"])
def test_close_from_another_thread_ends_a_read(internet: Scripted, script: Script, whom: str) -> None:
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = script
    client = open_registry(patience=Patience(idle=30, longest=60))
    stream = client.blob(digest(BLOB), len(BLOB))
    threading.Timer(0.3, (stream if whom == "stream" else client).close).start()
    began = time.monotonic()
    with pytest.raises(RegistryError, match="cancelled"):
        b"".join(iter(stream.read, b""))
    assert 0.2 < time.monotonic() - began < 3
    client.close()


def test_threads_share_one_token(internet: Scripted) -> None:
    internet.routes[TOKENS] = whole(b'{"token": "t"}')
    blobs = [os.urandom(100_000) for _ in range(8)]
    for data in blobs:
        internet.routes[f"{APP}/blobs/{digest(data)}"] = guarded(ranged(data), "Bearer t", BEARER)
    found: dict[int, bytes] = {}
    with open_registry() as client:

        def read(number: int) -> None:
            found[number] = read_blob(client, blobs[number])

        threads = [threading.Thread(target=read, args=(number,)) for number in range(len(blobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[n] for n in range(8)] == blobs
    assert internet.urls().count(TOKENS) == 1


# --- hosts ----------------------------------------------------------------------------------------------------------------------


def test_a_host_that_is_not_there() -> None:
    began = time.monotonic()
    with open_registry("127.0.0.1:1/app") as client, pytest.raises(RegistryError, match=r"connection to .* failed: Connection refused"):
        client.manifest()
    with open_registry("no-such-host.invalid/app", patience=Patience()) as client, pytest.raises(RegistryError, match="cannot be resolved"):
        client.manifest()
    assert time.monotonic() - began < 20


def test_loopback_speaks_http_or_tls_and_nobody_has_to_say(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
    for scheme in ("http", "https"):
        server = Scripted(certificate, scheme=scheme)
        server.routes[f"{server.url}/v2/app/manifests/latest"] = whole(MANIFEST)
        with open_registry(f"{server.host}/app") as client:
            assert client.manifest()[0] == MANIFEST
        server.stop()


def test_tls_that_is_none_and_names_that_are_others(internet: Scripted, certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCIEXEC_REGISTRY_MIRROR", f"{HOST}=https://{internet.host}")
    with open_registry() as client, pytest.raises(RegistryError, match="does not speak TLS") as caught:
        client.manifest()
    assert "--no-https" in caught.value.hint
    with open_registry("other.example.org/app") as client, pytest.raises(RegistryError, match=r"not trusted.*other\.example\.org"):
        client.manifest()
    assert not internet.urls()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent.pem")
    with pytest.raises(UsageError, match="no certificates"):
        open_registry()


def test_a_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:SECRET@127.0.0.1:1")
    with open_registry() as client, pytest.raises(RegistryError, match="proxy") as caught:
        client.manifest()
    assert "SECRET" not in str(caught.value) + caught.value.hint


MIRROR = "https://mirror.example.org"


@pytest.mark.parametrize(("path", "name"), [("", "library/app"), ("/", "library/app"), ("/hub/proxy", "hub/proxy/library/app")])
def test_a_mirror_is_asked_instead(internet: Scripted, monkeypatch: pytest.MonkeyPatch, path: str, name: str) -> None:
    monkeypatch.setenv("SCIEXEC_REGISTRY_MIRROR", f"other.org=http://127.0.0.1:1, docker.io={MIRROR}{path}")
    internet.routes[f"{MIRROR}/v2/{name}/manifests/latest"] = whole(MANIFEST)
    with open_registry("app") as client:
        assert client.manifest()[0] == MANIFEST
    assert internet.urls() == [f"{MIRROR}/v2/{name}/manifests/latest"]


@pytest.mark.parametrize("status", [404, 500, 401])
def test_a_mirror_that_fails_is_an_error(internet: Scripted, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """And nothing else is tried, and what the user has for docker.io is not for its mirror."""
    monkeypatch.setenv("SCIEXEC_REGISTRY_MIRROR", f"docker.io={MIRROR}")
    monkeypatch.setenv("SCIEXEC_DOCKER_USERNAME", "ada")
    monkeypatch.setenv("SCIEXEC_DOCKER_PASSWORD", "sesame")
    internet.routes[f"{MIRROR}/v2/library/app/manifests/latest"] = refusal(status, WWW_Authenticate='Basic realm="x"')
    with open_registry("app", login=LOGIN) as client, pytest.raises(RegistryError, match=r"docker://docker\.io/library/app:latest: "):
        client.manifest()
    assert set(internet.urls()) == {f"{MIRROR}/v2/library/app/manifests/latest"}
    assert not internet.secrets()


def test_a_mirror_gets_the_credentials_of_its_own_name(internet: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCIEXEC_REGISTRY_MIRROR", f"docker.io={MIRROR}")
    file = tmp_path / "auth.json"
    auths = {"docker.io": {"username": "ada", "password": "hub"}, "mirror.example.org": {"username": "ada", "password": "sesame"}}
    file.write_text(json.dumps({"auths": auths}))
    internet.routes[f"{MIRROR}/v2/library/app/manifests/latest"] = guarded(whole(MANIFEST), LOGIN.basic(), 'Basic realm="x"')
    with open_registry("app", authfile=str(file)) as client:
        assert client.manifest()[0] == MANIFEST
    assert len(internet.secrets()) == 1


MALFORMED = ["docker.io", "docker.io=", "docker.io=mirror", "=https://m", "docker.io=ftp://m", "docker.io=https://a:b@m", "a=https://m?x"]


@pytest.mark.parametrize("value", MALFORMED)
def test_a_malformed_mirror(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SCIEXEC_REGISTRY_MIRROR", value)
    with pytest.raises(UsageError, match="SCIEXEC_REGISTRY_MIRROR"):
        open_registry("app")
