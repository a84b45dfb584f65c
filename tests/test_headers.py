"""Headers and addresses as servers write them: read strictly, in linear time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from convert import headers, origins
from sciexec.errors import UsageError

CHALLENGES = [
    ("", []),
    (", ,", []),
    ('Basic realm="x"', [("basic", {"realm": "x"})]),
    ("BEARER Realm=x,SERVICE=y", [("bearer", {"realm": "x", "service": "y"})]),
    (
        'Bearer realm="https://a/?b=c,d",service="x\\"y" , Basic realm="z"',
        [("bearer", {"realm": "https://a/?b=c,d", "service": 'x"y'}), ("basic", {"realm": "z"})],
    ),
    ("Negotiate, Basic realm=x", [("negotiate", {}), ("basic", {"realm": "x"})]),
    ("Bearer", [("bearer", {})]),
]

MALFORMED = [
    'realm="x"', 'Bearer realm="x', 'Bearer realm="x" service="y"', "Bearer realm=x,Realm=y",
    "Negotiate abc==", "Bearer realm=\x1b", '"', "Be@rer x=y",
]  # fmt: skip
LONG = ['Bearer a="' + "\\" * 65000, "a " * 32000, "Bearer " + "," * 65000 + "@", 'Bearer a="' + "x" * 65000, "Bearer " + " " * 65000 + "@"]


@pytest.mark.parametrize(("header", "expected"), CHALLENGES)
def test_challenges(header: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert headers.challenges(header) == expected


@pytest.mark.parametrize("header", MALFORMED)
def test_malformed_challenges(header: str) -> None:
    with pytest.raises(ValueError):
        headers.challenges(header)


@pytest.mark.parametrize("header", LONG, ids=range(len(LONG)))
def test_challenges_take_one_pass(header: str) -> None:
    began = time.monotonic()
    try:
        headers.challenges(header)
    except ValueError:
        pass
    assert time.monotonic() - began < 1


def test_retry_after() -> None:
    assert headers.retry_after("5") == 5
    assert headers.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [headers.retry_after(text) for text in ("", "x", "-5", "5.5", "Wed, 99 Oct 2015")] == [None] * 5


LOOPBACK = ["127.0.0.1", "127.1", "0177.0.0.1", "2130706433", "::1", "::ffff:127.0.0.1", "localhost", "a.localhost"]
ELSEWHERE = ["8.8.8.8", "example.org", "127.example.org", "", "::2", "localhost.example.org"]


@pytest.mark.parametrize("host", LOOPBACK + ELSEWHERE)
def test_loopback_in_any_spelling(host: str) -> None:
    assert origins.is_loopback(host) == (host in LOOPBACK)


@pytest.mark.parametrize("url", ["https://h", "HTTPS://H:5000/a?b#c", "http://[::1]:5000/", "https://a_b.example.org./x"])
def test_checked_urls_keep_their_meaning(url: str) -> None:
    checked = origins.checked(url)
    assert checked.startswith(("http://", "https://")) and "#" not in checked
    assert origins.checked(checked) == checked and origins.hostname(checked) == origins.hostname(url)


BAD_URLS = [
    "", "h", "//h/x", "ftp://h", "https://", "https:///x", "https://a@h", "https://h:x/", "https://h:99999/", "https://h\\@x/",
    "https://h/ x",
    "https://h/\r\nx", "https://h/\N{LATIN SMALL LETTER E WITH ACUTE}", "https://[::1/", "https://[x]/", "https://%31/",
]  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_urls_that_could_be_read_in_two_ways_are_refused(url: str) -> None:
    with pytest.raises(ValueError):
        origins.checked(url)


def test_a_shown_url_has_no_secret_and_no_control_byte() -> None:
    assert origins.shown("https://user:SECRET@h:1/a/b\x1b?sig=SECRET#SECRET") == "https://h:1/a/b\\x1b"
    assert len(origins.shown("https://h/" + "x" * 10_000)) == origins.MAX_SHOWN


def test_the_users_certificates_come_first_and_the_systems_next(tmp_path: Path) -> None:
    own = tmp_path / "ca.pem"
    own.touch()
    assert origins.trusted_certificates({"REQUESTS_CA_BUNDLE": str(own), "SSL_CERT_FILE": "/nonexistent"}) == str(own)
    assert origins.trusted_certificates({"SSL_CERT_FILE": str(own)}) == str(own)
    system = origins.trusted_certificates({})
    assert system is True or Path(str(system)).exists()
    with pytest.raises(UsageError, match="SSL_CERT_DIR=/nonexistent"):
        origins.trusted_certificates({"SSL_CERT_DIR": "/nonexistent"})
