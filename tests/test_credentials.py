"""Where credentials are looked for, in which order, and what a helper program may do."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from registry_fixtures import nobody

from convert import credentials
from convert.credentials import HUB_KEY, Credentials, find
from sciexec.errors import HostError, SciexecError, UsageError

__all__ = ["nobody"]  # fixtures

ADA, BOB = Credentials("ada", "sesame"), Credentials("bob", "p:w\N{LATIN SMALL LETTER E WITH ACUTE}")


def entry(login: Credentials) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{login.username}:{login.password}".encode()).decode()}


def write(path: Path, content: Any, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


KEYS = [
    ("host.org", "a/b", {"host.org": entry(ADA)}, ADA),
    ("host.org:5000", "a/b", {"host.org": entry(ADA), "host.org:5000": entry(BOB)}, BOB),
    ("host.org", "a/b", {"https://host.org": entry(ADA)}, ADA),
    ("host.org", "a/b", {"https://host.org/v2/": entry(ADA)}, ADA),
    ("host.org", "a/b", {"host.org": entry(BOB), "host.org/a": entry(ADA)}, ADA),
    ("host.org", "a/b", {"host.org/a/b": entry(ADA), "host.org/a": entry(BOB)}, ADA),
    ("host.org", "ab", {"host.org/a": entry(ADA)}, None),
    ("host.org", "a/b", {"other.org": entry(ADA), "xhost.org": entry(ADA), "host.org.evil.org": entry(ADA)}, None),
    ("docker.io", "library/a", {HUB_KEY: entry(ADA)}, ADA),
    ("docker.io", "library/a", {"docker.io": entry(ADA)}, ADA),
    ("docker.io", "library/a", {"registry-1.docker.io": entry(ADA)}, ADA),
    ("host.org", "a", {"host.org": {"username": "ada", "password": "sesame"}}, ADA),
    ("host.org", "a", {"host.org": {**entry(Credentials("ada", "")), "identitytoken": "t"}}, Credentials("ada", "", "t")),
    ("host.org", "a", {"host.org": {}}, None),
    ("host.org", "a", {"host.org": None}, None),
    ("host.org", "a", {}, None),
]


@pytest.mark.parametrize(("host", "repository", "auths", "expected"), KEYS)
def test_keys_of_auths(tmp_path: Path, host: str, repository: str, auths: dict[str, Any], expected: Credentials | None) -> None:
    warnings: list[str] = []
    write(tmp_path / ".docker/config.json", {"auths": auths})
    assert find(host, repository, warn=warnings.append) == expected
    assert not warnings


def test_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last resort to the first choice: each new one wins."""

    def found() -> str:
        login = find("host.org", "a", authfile=authfile)
        return login.username if login else ""

    def auths(name: str) -> dict[str, Any]:
        return {"auths": {"host.org": entry(Credentials(name, "x"))}}

    authfile = ""
    assert found() == ""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    write(tmp_path / "run/containers/auth.json", auths("podman"))
    assert found() == "podman"
    write(tmp_path / ".docker/config.json", auths("docker"))
    assert found() == "docker"
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "d"))
    write(tmp_path / "d/config.json", auths("moved"))
    assert found() == "moved"
    write(tmp_path / ".singularity/docker-config.json", auths("singularity"))
    assert found() == "singularity"
    write(tmp_path / ".apptainer/docker-config.json", auths("apptainer"))
    assert found() == "apptainer"
    authfile = str(write(tmp_path / "empty", {}))
    assert found() == ""  # --authfile replaces them all
    for prefix in ("DOCKER", "SINGULARITY_DOCKER", "APPTAINER_DOCKER", "SCIEXEC_DOCKER"):
        monkeypatch.setenv(f"{prefix}_USERNAME", prefix)
        before = found()
        monkeypatch.setenv(f"{prefix}_PASSWORD", "x")
        assert before != prefix and found() == prefix
    assert find("mirror.org", "a", named=False) is None
    authfile = str(write(tmp_path / "full", auths("authfile")))
    assert found() == "authfile"


BROKEN: list[tuple[str, Any, str]] = [
    ("not JSON", "{", "not JSON"),
    ("deep", "[" * 100_000, "not JSON"),
    ("not base64", {"auths": {"host.org": {"auth": "%%%"}}}, "not base64"),
    ("not text", {"auths": {"host.org": {"username": 1, "password": "x"}}}, "not text"),
    ("auth is a number", {"auths": {"host.org": {"auth": 5}}}, "not base64"),
    ("large", " " * (credentials.MAX_FILE + 1), "at most 1048576 bytes"),
]


@pytest.mark.parametrize(("content", "cause"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_file_is_an_error_if_named_and_a_warning_if_found(tmp_path: Path, content: Any, cause: str) -> None:
    path = write(tmp_path / ".docker/config.json", content)
    with pytest.raises(UsageError, match=cause) as caught:
        find("host.org", "a", authfile=str(path))
    assert str(path) in str(caught.value)
    warnings: list[str] = []
    assert find("host.org", "a", warn=warnings.append) is None
    assert len(warnings) == 1 and cause in warnings[0]


def test_a_fifo_or_directory_does_not_hold_us_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", ".", "missing"):
        with pytest.raises(UsageError):
            find("host.org", "a", authfile=str(tmp_path / name))


@pytest.mark.parametrize(("mode", "warned"), [(0o600, 0), (0o400, 0), (0o640, 1), (0o644, 1)])
def test_a_file_that_others_can_read_is_told_of(tmp_path: Path, mode: int, warned: int) -> None:
    write(tmp_path / ".docker/config.json", {"auths": {"host.org": entry(ADA)}}, mode)
    warnings: list[str] = []
    assert find("other.org", "a", warn=warnings.append) is None and not warnings
    assert find("host.org", "a", warn=warnings.append) == ADA
    assert len(warnings) == warned and all("chmod 600" in text and "sesame" not in text for text in warnings)


HELPER = """#!/bin/sh
read -r server
echo "$1 $server" >> "$HOME/asked"
case $server in
host.org) echo '{"ServerURL": "host.org", "Username": "ada", "Secret": "sesame"}' ;;
https://index.docker.io/v1/) echo '{"Username": "<token>", "Secret": "t"}' ;;
junk.org) echo 'junk' ;;
locked.org) echo 'the store is locked' ; exit 1 ;;
slow.org) exec sleep 5 ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    write(tmp_path / "bin/docker-credential-lab", HELPER, 0o755)
    return tmp_path


def test_a_helper_is_asked(helper: Path) -> None:
    file = write(helper / "config.json", {"credsStore": "lab", "auths": {"host.org": {}, "plain.org": entry(BOB)}})
    assert find("host.org", "a", authfile=str(file)) == ADA
    assert find("docker.io", "a", authfile=str(file)) == Credentials(identity_token="t")
    assert find("plain.org", "a", authfile=str(file)) == BOB  # the store has nothing, the file does
    assert find("none.org", "a", authfile=str(file)) is None
    asked = (helper / "asked").read_text().splitlines()
    assert asked == ["get host.org", f"get {HUB_KEY}", "get plain.org", "get none.org"]
    file = write(helper / "config.json", {"credHelpers": {"host.org": "lab"}, "auths": {"host.org": entry(BOB), "plain.org": entry(BOB)}})
    assert find("host.org", "a", authfile=str(file)) == ADA
    assert find("plain.org", "a", authfile=str(file)) == BOB
    assert len((helper / "asked").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("name", "host", "cause"),
    [
        ("../../bin/x", "host.org", "not the name of a helper"),
        ("-x", "host.org", "not the name of a helper"),
        ("x y\x1b", "host.org", "not the name of a helper"),
        ("lab", "junk.org", "not JSON"),
        ("lab", "locked.org", "the store is locked"),
        ("lab", "slow.org", "no answer in"),
    ],
)
def test_a_helper_that_fails(helper: Path, monkeypatch: pytest.MonkeyPatch, name: str, host: str, cause: str) -> None:
    monkeypatch.setattr(credentials, "HELPER_SECONDS", 0.5)
    file = write(helper / "config.json", {"credsStore": name})
    began = time.monotonic()
    with pytest.raises(HostError, match=cause) as caught:
        find(host, "a", authfile=str(file))
    assert str(caught.value).isprintable() and time.monotonic() - began < 4


def test_a_helper_is_not_taken_from_the_working_directory(helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(helper / "bin")
    warnings: list[str] = []
    file = write(helper / "config.json", {"credsStore": "lab"})
    for path in (":/usr/bin", ".:/usr/bin", "../bin:/usr/bin"):
        monkeypatch.setenv("PATH", path)
        assert find("host.org", "a", authfile=str(file), warn=warnings.append) is None
    assert not (helper / "asked").exists() and len(warnings) == 3


def test_a_password_is_in_no_repr_and_no_error(tmp_path: Path) -> None:
    assert "sesame" not in repr(ADA) + repr(Credentials(identity_token="sesame"))
    file = write(tmp_path / "config.json", {"auths": {"host.org": {"auth": "sesame sesame"}}})
    with pytest.raises(SciexecError) as caught:
        find("host.org", "a", authfile=str(file))
    assert "sesame" not in str(caught.value)


def test_basic() -> None:
    assert base64.b64decode(BOB.basic().removeprefix("Basic ")).decode() == "bob:p:w\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert Credentials("ada").basic() == ""
