"""Registries to pull from: Debian's docker-registry, and a scripted server that plays any registry on the internet.

`registry` and `secure_registry` are the real thing on a free loopback port, `internet` is the scripted one.  A test file imports
by name the fixtures it wants and those which they want: certificate, and nobody (which applies by itself) in any case.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from scripted_registry import NAMES, Certificate, Scripted

START_SECONDS = 15.0
USERNAME, PASSWORD = "ada", "sesame"
# bcrypt of PASSWORD at the lowest cost; the registry accepts no other kind of hash.
HTPASSWD = f"{USERNAME}:$2y$04$abcdefghijklmnopqrstuuinwY/tkBVrn3xrxQI/TgnMHhkvl85RW\n"


class Need(Protocol):
    def __call__(self, *programs: str) -> str: ...


@pytest.fixture(scope="session")
def certificate(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    openssl = need("openssl")
    directory = tmp_path_factory.mktemp("tls")
    made = Certificate(directory / "certificate.pem", directory / "key.pem")
    names = ",".join(["IP:127.0.0.1", "IP:127.0.0.2", *(f"DNS:{name}" for name in NAMES)])
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test",
         "-addext", f"subjectAltName={names}", "-keyout", str(made.key), "-out", str(made.certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


# --- the real one -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalRegistry:
    """A running docker-registry.  host: "127.0.0.1:port", to be used as docker://{host}/name:tag."""

    host: str
    skopeo: str
    secure: Certificate | None = None
    username: str = ""
    password: str = ""

    def push(self, image: str | Path, name: str) -> str:
        """Copy "layout:tag" (an OCI layout, blobs unchanged) to `name` ("repository:tag"); returns the manifest's digest."""
        login = ["--dest-creds", f"{self.username}:{self.password}"] if self.username else []
        digest = Path(tempfile.mkdtemp()) / "digest"
        command = [self.skopeo, "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--all", "--digestfile", str(digest)]
        command += [*login, f"oci:{image}", f"docker://{self.host}/{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        pushed = digest.read_text()
        shutil.rmtree(digest.parent)
        return pushed


@pytest.fixture(scope="session")
def registry(need: Need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    """Plain http, anonymous; empty when the session begins, shared by all its tests: use names of your own."""
    yield from serve(need, tmp_path_factory.mktemp("registry"), None)


@pytest.fixture(scope="session")
def secure_registry(
    need: Need, tmp_path_factory: pytest.TempPathFactory, certificate: Certificate
) -> Iterator[LocalRegistry]:  # fmt: skip
    """TLS and a password: trust it with REQUESTS_CA_BUNDLE={secure.certificate}, log in as username and password."""
    yield from serve(need, tmp_path_factory.mktemp("secure-registry"), certificate)


def serve(need: Need, directory: Path, secure: Certificate | None) -> Iterator[LocalRegistry]:
    """A docker-registry whose files are in `directory`, until the iterator goes on."""
    program, skopeo = need("docker-registry", "skopeo"), need("skopeo")
    for _ in range(3):  # another process may take the port between our look and the server's bind
        host = f"127.0.0.1:{_free_port()}"
        config = directory / "config.json"  # JSON is YAML
        settings: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}, "delete": {"enabled": True}},
            "http": {"addr": host, "secret": "x"},
        }
        if secure:
            (directory / "htpasswd").write_text(HTPASSWD)
            settings["http"]["tls"] = {"certificate": str(secure.certificate), "key": str(secure.key)}
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
        config.write_text(json.dumps(settings))
        with open(directory / "log", "wb") as log:
            server = subprocess.Popen([program, "serve", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            if _listens(server, host):
                yield LocalRegistry(host, skopeo, secure, *((USERNAME, PASSWORD) if secure else ()))
                return
        finally:
            server.kill()
            server.wait()
            shutil.rmtree(directory / "storage", ignore_errors=True)
    pytest.fail(f"docker-registry does not start:\n{(directory / 'log').read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(server: subprocess.Popen[bytes], host: str) -> bool:
    address, _, port = host.partition(":")
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((address, int(port)), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.02)
    return False


# --- the scripted one ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def internet(certificate: Certificate, nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """A Scripted server that the proxy settings of this process lead to: https://registry.example.org is whatever its routes say."""
    server = Scripted(certificate)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, mirror, proxy or certificates of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if "DOCKER" in name or "CONFIGDIR" in name or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("SCIEXEC_REGISTRY_MIRROR", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR",
                 "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
