"""An HTTP server, and a proxy for http and https, that answers as a test tells it to and remembers what it was asked.

Real sockets and real TLS: the proxy settings of the client lead every name of the internet to it.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Union, cast

from convert.credentials import Credentials
from convert.patience import Patience
from convert.reference import parse
from convert.registry import Registry

NAMES = ("registry.example.org", "auth.example.org", "storage.example.org", "mirror.example.org", "localhost")

HOST = "registry.example.org"
APP = f"https://{HOST}/v2/app"
TOKENS = "https://auth.example.org/token"
STORAGE = "https://storage.example.org/blob"
BEARER = f'Bearer realm="{TOKENS}",service="{HOST}",scope="repository:app:pull"'
MANIFEST = b'{"schemaVersion": 2}'
TYPE = "application/vnd.oci.image.manifest.v1+json"
BLOB = bytes(range(256)) * 1024
LOGIN = Credentials("ada", "sesame")

FAST = Patience(attempts=3, pause=0.01, longest=2.0, connect=5.0, idle=5.0)
HASTY = replace(FAST, idle=0.3)  # for servers that stall


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def open_registry(name: str = f"{HOST}/app", **settings: Any) -> Registry:
    return Registry(parse(f"docker://{name}"), **{"patience": FAST, **settings})


def read_blob(client: Registry, data: bytes = BLOB) -> bytes:
    with client.blob(digest(data), len(data)) as stream:
        return b"".join(iter(stream.read, b""))


# --- the server -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate for loopback and for NAMES, which is its own authority; PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Asked:
    """One request as it came in.  url: with the scheme and the host that the client meant to talk to."""

    method: str
    url: str
    headers: dict[str, str] = field(repr=False)
    body: bytes = b""


class Exchange(BaseHTTPRequestHandler):
    """One connection; an answer is a function of this."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    base = ""
    asked: Asked

    def reply(self, status: int = 200, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """A whole answer; Content-Length is the body's unless `headers` says otherwise (None leaves it out by "")."""
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in fields.items():
            if value:
                self.send_header(name, value)
        if not fields["Content-Length"] and fields.get("Transfer-Encoding") != "chunked":
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def reset(self) -> None:
        """End the connection the hard way, after what was written so far."""
        self.wfile.flush()
        time.sleep(0.05)  # what the client has not read by then is lost to it
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def do_GET(self) -> None:
        direct = f"{cast(Scripted, self.server).scheme}://{self.headers['Host']}"
        # The proxy of plain http is asked for whole URLs.
        base = "" if self.path.startswith("http://") else self.base or direct
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked = Asked(self.command, base + self.path, dict(self.headers), body)
        cast(Scripted, self.server).play(self)

    do_POST = do_GET

    def do_CONNECT(self) -> None:
        """As a proxy for https we are the far end as well."""
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection = cast(Scripted, self.server).context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", self.wbufsize)
        self.base = "https://" + self.path.removesuffix(":443")
        self.close_connection = False

    def setup(self) -> None:
        if cast(Scripted, self.server).scheme == "https":
            self.request = cast(Scripted, self.server).context.wrap_socket(self.request, server_side=True)
        super().setup()

    def log_message(self, format: str, *arguments: Any) -> None: ...


Answer = Callable[[Exchange], None]
Script = Union[Answer, "list[Answer]"]


class Scripted(ThreadingHTTPServer):
    """routes: URL without query -> an answer, or a list of answers of which each serves once and the last for ever.

    A URL is "https://registry.example.org/v2/..." for those who come by the proxy settings in `environment`, and
    f"{server.url}/v2/..." for those who come directly; whatever has no route gets 404.
    """

    daemon_threads = True

    def __init__(self, certificate: Certificate, address: str = "127.0.0.1", scheme: str = "http") -> None:
        super().__init__((address, 0), Exchange)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate.certificate, certificate.key)
        self.scheme = scheme
        self.host = f"{address}:{self.server_address[1]}"
        self.url = f"{scheme}://{self.host}"
        self.environment = {
            **dict.fromkeys(("http_proxy", "https_proxy"), f"http://{self.host}"),
            "REQUESTS_CA_BUNDLE": str(certificate.certificate),
        }
        self.routes: dict[str, Script] = {}
        self.asked: list[Asked] = []
        self.sent = 0  # bytes of endless()
        self.released = threading.Event()  # set at the end: answers that stall wait for it
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def play(self, exchange: Exchange) -> None:
        url = exchange.asked.url.partition("?")[0]
        with self._lock:
            self.asked.append(exchange.asked)
            script = self.routes.get(url)
            if isinstance(script, list):
                script = script.pop(0) if len(script) > 1 else script[0]
        if script is None:
            exchange.reply(404, b"{}")
        else:
            script(exchange)

    def urls(self) -> list[str]:
        """What was asked, without queries; the look for plain http at a loopback host left out."""
        return [asked.url.partition("?")[0] for asked in self.asked if not asked.url.endswith("/v2/")]

    def secrets(self) -> list[str]:
        """Every Authorization and Cookie that was sent to us, and whom it was meant for."""
        return [f"{asked.url.partition('?')[0]} {asked.headers[name]}" for asked in self.asked for name in asked.headers
                if name.lower() in ("authorization", "cookie")]

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # clients hang up on purpose

    def stop(self) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()


# --- answers to put into routes -----------------------------------------------------------------------------------------------


def whole(body: bytes, status: int = 200, **headers: str) -> Answer:
    """Header names in Python's spelling: Content_Type="..."."""
    return lambda exchange: exchange.reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def refusal(status: int, **headers: str) -> Answer:
    return whole(b"", status, **headers)


def redirect(location: str, status: int = 307) -> Answer:
    return whole(b"", status, Location=location)


def ranged(body: bytes) -> Answer:
    """As a good registry: 206 from where Range says, else the whole."""

    def answer(exchange: Exchange) -> None:
        begin = int(exchange.asked.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            exchange.reply(206, body[begin:], {"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"})
        else:
            exchange.reply(200, body)

    return answer


def chunked(body: bytes) -> Answer:
    return whole(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), Content_Length="", Transfer_Encoding="chunked")


def broken(body: bytes, at: int) -> Answer:
    """Announces the whole, sends `at` bytes, resets the connection."""

    def answer(exchange: Exchange) -> None:
        exchange.reply(200, body[:at], {"Content-Length": str(len(body))})
        exchange.reset()

    return answer


def stalled(body: bytes, at: int) -> Answer:
    """Announces the whole, sends `at` bytes, then nothing for ever."""

    def answer(exchange: Exchange) -> None:
        exchange.reply(200, body[:at], {"Content-Length": str(len(body))})
        exchange.wfile.flush()
        cast(Scripted, exchange.server).released.wait(60)

    return answer


def endless(status: int = 200, most: int = 64 << 20, **headers: str) -> Answer:
    """A chunked body that ends after `most` bytes, if the client lets it; what was sent is counted in the server's `sent`."""

    def answer(exchange: Exchange) -> None:
        server = cast(Scripted, exchange.server)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        exchange.reply(status, b"", {"Content-Length": "", "Transfer-Encoding": "chunked", **fields})
        piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        while server.sent < most:
            exchange.wfile.write(piece)
            server.sent += 0x10000
        exchange.wfile.write(b"0\r\n\r\n")

    return answer


def guarded(answer: Answer, authorization: str, challenge: str) -> Answer:
    """`answer` for those who send this Authorization, 401 and the challenge for all others."""

    def check(exchange: Exchange) -> None:
        if exchange.asked.headers.get("Authorization") == authorization:
            answer(exchange)
        else:
            exchange.reply(401, b"{}", {"WWW-Authenticate": challenge})

    return check
