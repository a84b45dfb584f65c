"""Who the user is to a registry: environment, Docker's and Apptainer's configuration files, credential helpers.

    { "auths":       { "registry.example.org": { "auth": base64("user:password"), "identitytoken": "..." }, ... },
      "credHelpers": { "registry.example.org": "NAME" },        docker-credential-NAME get < host > {"Username": .., "Secret": ..}
      "credsStore":  "NAME" }

Source: docker/cli, docs for `docker login` (Credential stores, Credential helpers); containers-auth.json(5) for keys that name a
namespace.  Nothing here is read and no helper runs before a registry has answered 401.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from convert.reference import DOCKER_HUB
from sciexec.errors import HostError, UsageError, escaped

# Docker has kept the address of its first registry as the name under which it files the credentials of the present one.
HUB_KEY = "https://index.docker.io/v1/"
HUB_NAMES = (DOCKER_HUB, f"index.{DOCKER_HUB}", f"registry-1.{DOCKER_HUB}")
PREFIXES = ("SCIEXEC_DOCKER", "APPTAINER_DOCKER", "SINGULARITY_DOCKER", "DOCKER")

MAX_FILE = 1 << 20  # bytes
HELPER_SECONDS = 30.0

_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Credentials:
    """A user name with its password, or an identity token (OAuth2 refresh token); never part of a repr."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617, UTF-8); empty where there is no password to give."""
        if not self.password:
            return ""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode("ascii")


def from_environment() -> Credentials | None:
    """SCIEXEC_DOCKER_USERNAME and _PASSWORD, or the pair under one of the other prefixes; half a pair is none."""
    for prefix in PREFIXES:
        username, password = os.environ.get(f"{prefix}_USERNAME", ""), os.environ.get(f"{prefix}_PASSWORD", "")
        if username and password:
            return Credentials(username, password)
    return None


def find(
    host: str,
    repository: str,
    *,
    named: bool = True,
    authfile: str = "",
    warn: Callable[[str], None] = lambda text: None,
) -> Credentials | None:
    """The credentials for `host`/`repository`: --authfile, then the environment, then the default files; None if there are none.

    Arguments:
        host: the host (with port) that is really asked, a mirror's own where one is set.
        named: whether that is the host the user named; those of the environment carry no host's name and are for no other.
        authfile: this file instead of the default ones; "" for those.
        warn: is told of a default file that cannot be read and of one that others may read.

    Raises UsageError for an unusable --authfile, HostError for a credential helper that fails.
    """
    asked = _File(authfile, warn) if authfile else None
    if asked and (found := asked.find(host, repository)):
        return found
    if named and (found := from_environment()):
        return found
    if asked:
        return None
    for path in default_files():
        try:
            found = _File(path, warn).find(host, repository)
        except UsageError as error:
            warn(f"{error}; going on without it")
            continue
        if found:
            return found
    return None


def default_files() -> list[str]:
    """The files that exist, first come first served: Apptainer's, SingularityCE's, Docker's, Podman's."""
    environ = os.environ
    home = environ.get("HOME") or os.path.expanduser("~")
    apptainer = environ.get("APPTAINER_CONFIGDIR") or f"{home}/.apptainer"
    singularity = environ.get("SINGULARITY_CONFIGDIR") or f"{home}/.singularity"
    docker = environ.get("DOCKER_CONFIG") or f"{home}/.docker"
    podman = environ.get("REGISTRY_AUTH_FILE") or f"{environ.get('XDG_RUNTIME_DIR', '/nonexistent')}/containers/auth.json"
    files = (f"{apptainer}/docker-config.json", f"{singularity}/docker-config.json", f"{docker}/config.json", podman)
    return [path for path in files if os.path.lexists(path)]


class _File:
    """One configuration file, read when it is made."""

    def __init__(self, path: str, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        try:
            # A FIFO must not hold the pull up, nor a device be read.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                status = os.fstat(fd)
                data = file.read(MAX_FILE + 1) if stat.S_ISREG(status.st_mode) else None
        except OSError as error:
            raise self._unusable(error.strerror or "unreadable") from None
        if data is None or len(data) > MAX_FILE:
            raise self._unusable(f"not a regular file of at most {MAX_FILE} bytes")
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            raise self._unusable("not JSON") from None
        self._content: dict[str, Any] = content if isinstance(content, dict) else {}
        self._open_to_others = bool(status.st_mode & 0o077)

    def find(self, host: str, repository: str) -> Credentials | None:
        """A helper named for the host comes first, then the store for all hosts, then what the file itself holds (docker/cli)."""
        helpers, store = self._table("credHelpers"), self._content.get("credsStore")
        keys = list(_keys(host, repository))
        helper = next((helpers[key] for key in helpers if _canonical(key) in keys), store)
        if isinstance(helper, str) and helper and (found := self._ask(helper, host)):
            return found
        entries = {_canonical(key): entry for key, entry in self._table("auths").items()}
        for key in keys:
            entry = entries.get(key)
            if isinstance(entry, dict) and (found := self._decode(entry)):
                if self._open_to_others:
                    self._warn(f"{escaped(self._path)} holds credentials and can be read by others: chmod 600 it")
                return found
        return None

    def _table(self, name: str) -> dict[str, Any]:
        table = self._content.get(name)
        return table if isinstance(table, dict) else {}

    def _decode(self, entry: dict[str, Any]) -> Credentials | None:
        username, password, token = (entry.get(name) or "" for name in ("username", "password", "identitytoken"))
        if auth := entry.get("auth"):
            try:
                decoded = base64.b64decode(auth, validate=True).decode()
            except (TypeError, ValueError, binascii.Error):
                raise self._unusable("an entry under auths is not base64") from None
            username, _, password = decoded.rstrip("\0").partition(":")
        if not all(isinstance(value, str) for value in (username, password, token)):
            raise self._unusable("an entry under auths is not text")
        return Credentials(username, password, token) if token or (username and password) else None

    def _ask(self, name: str, host: str) -> Credentials | None:
        """The protocol of docker-credential-helpers: `get`, the server's name on stdin, JSON on stdout."""
        act = f"asking the credential helper {escaped(name)} (of {escaped(self._path)}) about {escaped(host)}"
        if not _HELPER_NAME.fullmatch(name):
            raise HostError(f"{act}: not the name of a helper")
        program = shutil.which(f"docker-credential-{name}", path=os.environ.get("PATH", os.defpath))
        # An empty or relative entry of PATH would run a program out of whatever directory the user happens to stand in.
        if program is None or not os.path.isabs(program):
            self._warn(f"{act}: docker-credential-{name} is not in PATH; going on without it")
            return None
        server = HUB_KEY if host in HUB_NAMES else host
        try:
            done = subprocess.run([program, "get"], input=server.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise HostError(f"{act}: no answer in {HELPER_SECONDS:g} s") from None
        except OSError as error:
            raise HostError(f"{act}: {error.strerror}") from None
        if done.returncode != 0:
            # By the protocol "credentials not found in native keychain" comes on stdout with status 1.
            if b"not found" in done.stdout:
                return None
            raise HostError(f"{act}: {escaped(done.stdout[:200] + done.stderr[:200]).strip() or 'it failed'}")
        try:
            answer = json.loads(done.stdout)
            username, secret = answer["Username"], answer["Secret"]
        except (ValueError, RecursionError, KeyError, TypeError):
            raise HostError(f"{act}: its answer is not JSON with Username and Secret") from None
        if not isinstance(username, str) or not isinstance(secret, str) or not secret:
            return None
        return Credentials(identity_token=secret) if username == "<token>" else Credentials(username, secret)

    def _unusable(self, cause: str) -> UsageError:
        return UsageError(f"reading credentials from {escaped(self._path)}: {cause}")


def _canonical(key: str) -> str:
    """A key of auths or credHelpers as host[:port][/namespace...]: `https://h/v1/` and `h` mean the same registry."""
    name = key.partition("://")[2] or key
    name = name.rstrip("/")
    for version in ("/v1", "/v2"):
        name = name[: -len(version)] if name.endswith(version) else name
    return name


def _keys(host: str, repository: str) -> Iterator[str]:
    """The canonical keys that may hold the credentials, the most specific first."""
    for name in HUB_NAMES if host in HUB_NAMES else (host,):
        full = f"{name}/{repository}"
        while full != name:
            yield full
            full = full.rpartition("/")[0]
        yield name
