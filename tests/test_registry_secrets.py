"""Where credentials and tokens may go, and where a redirect or a token server may lead."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from registry_fixtures import certificate, internet, nobody
from scripted_registry import (
    APP,
    BEARER,
    BLOB,
    HOST,
    LOGIN,
    MANIFEST,
    STORAGE,
    TOKENS,
    Answer,
    Certificate,
    Scripted,
    broken,
    digest,
    endless,
    guarded,
    open_registry,
    ranged,
    read_blob,
    redirect,
    refusal,
    whole,
)

from convert.credentials import Credentials
from sciexec.errors import LimitError, RegistryError, SciexecError

__all__ = ["certificate", "internet", "nobody"]  # fixtures


def protect(server: Scripted, answer: Answer, token: str = "t") -> None:
    server.routes[TOKENS] = whole(json.dumps({"token": token}).encode())
    server.routes[f"{APP}/manifests/latest"] = guarded(answer, f"Bearer {token}", BEARER)


REDIRECTS = [
    ("other host", STORAGE, ""),
    ("other host that asks", "https://storage.example.org/asks", "asks for credentials: it gets none"),
    ("other port", f"https://{HOST}:8443/blob", ""),
    ("other port that asks", f"https://{HOST}:8443/asks", "asks for credentials"),
    ("back again", "https://storage.example.org/back", "unauthorized"),
    ("plain http", "http://storage.example.org/blob", "from https to plain http"),
    ("plain http, capitals", "HTTP://storage.example.org/blob", "from https to plain http"),
    ("plain http on the same host", f"http://{HOST}/blob", "from https to plain http"),
    ("file", "file:///etc/passwd", "unusable address"),
    ("user in it", "https://a:b@storage.example.org/blob", "unusable address"),
    ("backslash", "https://storage.example.org\\@auth.example.org/", "unusable address"),
    ("ESC", "https://storage.example.org/\x1b[2J", "unusable address"),
    ("port", "https://storage.example.org:99999/", "unusable address"),
    ("none", "", "more than 5 redirects"),  # to itself
    ("cloud metadata", "https://169.254.169.254/latest", "inside this machine"),
    ("loopback", "https://127.0.0.1/", "inside this machine"),
    ("loopback in disguise", "https://0x7f000001/", "inside this machine"),
    ("loopback, short", "https://127.1/", "inside this machine"),
    ("loopback, mapped", "https://[::ffff:127.0.0.1]/", "inside this machine"),
    ("loopback by name", "https://localhost/", "inside this machine"),
    ("loopback, dotted name", "https://localhost./", "inside this machine"),
    ("no address", "https://0.0.0.0/", "inside this machine"),
    ("IPv6 link-local", "https://[fe80::1]/", "inside this machine"),
]


@pytest.mark.parametrize(("location", "cause"), [row[1:] for row in REDIRECTS], ids=[row[0] for row in REDIRECTS])
def test_redirects_take_no_secret_along(internet: Scripted, location: str, cause: str) -> None:
    protect(internet, redirect(location))
    for base in ("https://storage.example.org", f"https://{HOST}:8443"):
        internet.routes[f"{base}/blob"] = whole(MANIFEST)
        internet.routes[f"{base}/asks"] = refusal(401, WWW_Authenticate=BEARER)
    internet.routes["https://storage.example.org/back"] = redirect(f"{APP}/manifests/latest")
    with open_registry(login=LOGIN) as client:
        if cause:
            with pytest.raises(RegistryError, match=cause) as caught:
                client.manifest()
            assert str(caught.value).isprintable()
        else:
            assert client.manifest()[0] == MANIFEST
    allowed = (f"{APP}/manifests/latest Bearer t", f"{TOKENS} {LOGIN.basic()}")
    assert [sent for sent in internet.secrets() if sent not in allowed] == []
    assert all(url.startswith((APP, TOKENS, "https://storage.example.org/", f"https://{HOST}:8443/")) for url in internet.urls())


def test_a_redirect_inside_the_origin_keeps_the_token(internet: Scripted) -> None:
    protect(internet, redirect("/elsewhere"))
    internet.routes[f"https://{HOST}/elsewhere"] = guarded(whole(MANIFEST), "Bearer t", BEARER)
    with open_registry() as client:
        assert client.manifest()[0] == MANIFEST


def test_the_second_loopback_host_is_another_origin(certificate: Certificate) -> None:
    first, second = Scripted(certificate), Scripted(certificate, "127.0.0.2")
    first.routes[f"{first.url}/v2/app/manifests/latest"] = guarded(redirect(f"{second.url}/asks"), LOGIN.basic(), 'Basic realm="x"')
    second.routes[f"{second.url}/asks"] = refusal(401, WWW_Authenticate='Basic realm="x"')
    with open_registry(f"{first.host}/app", login=LOGIN) as client, pytest.raises(RegistryError, match="it gets none"):
        client.manifest()
    assert len(first.secrets()) == 1 and len(second.asked) == 1 and not second.secrets()
    first.stop()
    second.stop()


@pytest.mark.parametrize("status", [302, 401, 404], ids=str)
def test_bodies_that_nobody_needs_are_not_read(internet: Scripted, status: int) -> None:
    """64 MiB, or 64 GiB if it were decompressed."""
    internet.routes[f"{APP}/manifests/latest"] = endless(status, Content_Encoding="gzip", Location=STORAGE, WWW_Authenticate=BEARER)
    internet.routes[TOKENS] = whole(b'{"token": "t"}')
    internet.routes[STORAGE] = whole(MANIFEST)
    with open_registry() as client:
        if status == 302:
            assert client.manifest()[0] == MANIFEST
        else:
            with pytest.raises(RegistryError):
                client.manifest()
    assert internet.sent < 16 << 20  # what the buffers of the sockets of two requests hold


REALMS = [
    ("http", "http://auth.example.org/token", "plain http"),
    ("http in capitals", "HTTP://auth.example.org/token", "plain http"),
    ("http on the registry's host", f"http://{HOST}/token", "plain http"),
    ("file", "file:///etc/passwd", "unusable address"),
    ("none", "", "unusable address"),
    ("relative", "/token", "unusable address"),
    ("user in it", "https://a:b@auth.example.org/token", "unusable address"),
    ("loopback", "https://127.0.0.1/token", "inside this machine"),
    ("loopback in decimal", "https://2130706433/token", "inside this machine"),
    ("IPv6 loopback", "https://[::1]/token", "inside this machine"),
    ("cloud metadata", "https://169.254.169.254/token", "inside this machine"),
    ("private", "https://10.1.2.3/token", "inside this machine"),
    ("private IPv6", "https://[fd00::1]/token", "inside this machine"),
    ("no address", "https://0.0.0.0/token", "inside this machine"),
    ("localhost", "https://localhost/token", "inside this machine"),
]


@pytest.mark.parametrize(("realm", "cause"), [row[1:] for row in REALMS], ids=[row[0] for row in REALMS])
def test_realms_that_are_refused(internet: Scripted, realm: str, cause: str) -> None:
    internet.routes[f"{APP}/manifests/latest"] = refusal(401, WWW_Authenticate=f'Bearer realm="{realm}",service="x"')
    with open_registry(login=LOGIN) as client, pytest.raises(RegistryError, match=cause):
        client.manifest()
    assert internet.urls() == [f"{APP}/manifests/latest"] and not internet.secrets()


@pytest.mark.parametrize(
    ("realm", "fate"),
    [
        (f"http://{HOST}/token", "with credentials"),
        (f"http://{HOST}:5001/token", "with credentials"),
        (TOKENS, "anonymous"),
        ("http://auth.example.org/token", "refused"),
    ],
    ids=["same origin", "same host", "https elsewhere", "http elsewhere"],
)
def test_over_plain_http_only_the_registrys_host_learns_a_password(internet: Scripted, realm: str, fate: str) -> None:
    manifest = f"http://{HOST}/v2/app/manifests/latest"
    internet.routes[manifest] = guarded(whole(MANIFEST), "Bearer t", f'Bearer realm="{realm}"')
    internet.routes[realm] = whole(b'{"token": "t"}')
    with open_registry(login=LOGIN, no_https=True) as client:
        if fate == "refused":
            with pytest.raises(RegistryError, match="plain http"):
                client.manifest()
        else:
            assert client.manifest()[0] == MANIFEST
    assert (f"{realm} {LOGIN.basic()}" in internet.secrets()) == (fate == "with credentials")


def test_only_the_scope_that_is_needed_is_asked_for(internet: Scripted) -> None:
    challenge = f'Bearer realm="{TOKENS}?a=b",service="s",scope="repository:other:pull,push registry:catalog:*"'
    internet.routes[f"{APP}/manifests/latest"] = guarded(whole(MANIFEST), "Bearer t", challenge)
    internet.routes[TOKENS] = whole(b'{"access_token": "t"}')
    with open_registry() as client:
        client.manifest()
    assert parse_qs(urlsplit(internet.asked[1].url).query) == {"a": ["b"], "service": ["s"], "scope": ["repository:app:pull"]}


def test_an_identity_token_is_exchanged(internet: Scripted) -> None:
    protect(internet, whole(MANIFEST))
    with open_registry(login=Credentials(identity_token="secret")) as client:
        assert client.manifest()[0] == MANIFEST
    asked = internet.asked[1]
    assert asked.method == "POST" and "?" not in asked.url and "Authorization" not in asked.headers
    form = {name: values[0] for name, values in parse_qs(asked.body.decode()).items()}
    assert form["grant_type"] == "refresh_token" and form["refresh_token"] == "secret" and form["scope"] == "repository:app:pull"


def test_an_expired_token_is_renewed(internet: Scripted) -> None:
    internet.routes[TOKENS] = [whole(b'{"token": "old"}'), whole(b'{"token": "new"}')]
    internet.routes[f"{APP}/manifests/latest"] = guarded(whole(MANIFEST), "Bearer old", BEARER)
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = guarded(ranged(BLOB), "Bearer new", BEARER)
    with open_registry() as client:
        assert client.manifest()[0] == MANIFEST
        assert read_blob(client) == BLOB
    assert internet.urls().count(TOKENS) == 2


BAD_TOKENS: list[tuple[str, Answer, type[SciexecError], str]] = [
    ("5 MiB", whole(json.dumps({"token": "t" * (5 << 20)}).encode()), LimitError, "more than 1048576"),
    ("endless", endless(), LimitError, "more than 1048576"),
    ("not JSON", whole(b"t"), RegistryError, "gave no token"),
    ("a list", whole(b'["t"]'), RegistryError, "gave no token"),
    ("deep", whole(b"[" * 100_000), RegistryError, "gave no token"),
    ("a number", whole(b'{"token": 1}'), RegistryError, "gave no token"),
    ("a header in it", whole(b'{"token": "t\\r\\nHost: x"}'), RegistryError, "gave no token"),
    ("nothing", whole(b"{}"), RegistryError, "gave no token"),
    ("redirected", redirect("https://storage.example.org/token"), RegistryError, "status 307"),
    ("refused", refusal(401), RegistryError, "unauthorized: .*refused the credentials"),
    ("not accepted", whole(b'{"token": "other"}'), RegistryError, "unauthorized"),
]


@pytest.mark.parametrize(("answer", "kind", "cause"), [row[1:] for row in BAD_TOKENS], ids=[row[0] for row in BAD_TOKENS])
def test_bad_tokens(internet: Scripted, answer: Answer, kind: type[SciexecError], cause: str) -> None:
    protect(internet, whole(MANIFEST))
    internet.routes[TOKENS] = answer
    with open_registry(login=LOGIN) as client, pytest.raises(kind, match=cause):
        client.manifest()
    assert len(internet.asked) <= 3 and internet.sent < 16 << 20


def test_a_netrc_and_cookies_are_not_used(internet: Scripted, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine {HOST} login ada password sesame\n")
    (tmp_path / ".netrc").chmod(0o600)
    internet.routes[f"{APP}/manifests/latest"] = whole(MANIFEST, Set_Cookie="a=b; Path=/")
    with open_registry() as client:
        client.manifest()
        client.manifest()
    assert not internet.secrets()


@pytest.mark.parametrize("end", [refusal(403), broken(BLOB, 10), redirect("http://storage.example.org/x?sig=SECRET"), whole(BLOB + b"x")])
def test_no_secret_is_in_any_message(internet: Scripted, end: Answer) -> None:
    protect(internet, whole(MANIFEST), "TOKENSECRET")
    internet.routes[f"{APP}/blobs/{digest(BLOB)}"] = guarded(redirect(f"{STORAGE}?sig=SECRET"), "Bearer TOKENSECRET", BEARER)
    internet.routes[STORAGE] = end
    notes: list[str] = []
    login = Credentials("ada", "PASSWORDSECRET", "")
    with open_registry(login=login, note=notes.append) as client, pytest.raises(RegistryError) as caught:
        client.manifest()
        read_blob(client)
    trace = traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__)
    assert "SECRET" not in "".join([*notes, *trace, caught.value.hint, repr(login)])
