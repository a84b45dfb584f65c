"""The pulling half of the OCI distribution protocol, over requests: tokens, redirects, retries, resumption.

    GET /v2/<name>/manifests/<tag or digest>   -> 200 manifest
                                               -> 401 WWW-Authenticate: Bearer realm="https://..",service="..",scope=".."
    GET realm?service=..&scope=repository:<name>:pull  [Authorization: Basic ..]  -> {"token": ".."}
    GET /v2/<name>/blobs/<digest>  [Range: bytes=N-]   -> 200 | 206 blob
                                                       -> 307 Location: <storage, signed URL>  -> 200 | 206 blob

The rules that keep a hostile registry, or a hostile network, harmless:

- Bytes are the digest's or they are an error; documents are bounded; a blob never grows past the size its manifest gives.
- Authorization goes to the registry's own origin (scheme, host, port) and, as user and password, to the token server which the
  registry named over TLS.  A redirect that leaves the origin takes nothing along, and a 401 from there is an error.
- https never turns into http.  Plain http is for --no-https, for loopback hosts, and for a mirror written with http://.
- No redirect and no token server leads inward: loopback, link-local and, for token servers, private addresses.
- Where a mirror is set for a host, the mirror is all that is asked: what it does not have does not exist.
- No URL in a message carries its query, where signatures and tokens live.

Source: OCI distribution-spec 1.1 (Pulling); distribution/distribution, docs/spec/auth (token, oauth); RFC 9110 (11.6, 14, 15.4).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import TracebackType
from typing import TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import requests
import requests.adapters
import urllib3.exceptions
from requests.utils import get_environ_proxies

from convert import credentials, headers, origins
from convert.origins import Origin, hostname, shown
from convert.patience import Again, Attempts, Pace, Patience
from convert.reference import DOCKER_HUB, Reference, is_digest, is_tag
from sciexec.errors import LimitError, RegistryError, SciexecError, escaped

HUB_ENDPOINT = f"registry-1.{DOCKER_HUB}"
MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)

MAX_DOCUMENT = 4 << 20  # bytes of a manifest, index or config; the limit distribution-spec asks registries to accept
MAX_ANSWER = 1 << 20  # bytes of a token server's answer
MAX_REFUSAL = 1 << 16  # bytes read of a body that only explains an error
MAX_MESSAGE = 300  # characters shown of one
MAX_HOPS = 5
READ = 1 << 18  # bytes asked of a connection at once
PROGRESS = 1 << 20  # bytes after which a broken connection counts as the first one again

REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"})

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


class Registry:
    """One repository of one registry; one token and one pool of connections, for any number of threads.

    Arguments:
        ref: a docker Reference; its host and repository are what is asked.
        login: these credentials (--docker-login); None looks them up when, and only if, the registry asks.
        authfile: of --authfile, "" for the default files (convert.credentials.find).
        no_https: plain http for this host, as --no-https.
        note: is told one line about each retry and each doubtful credentials file.

    The environment sets SCIEXEC_REGISTRY_MIRROR, the certificate authorities (origins.trusted_certificates) and the proxies.
    Raises UsageError for a malformed one of these, and from its methods RegistryError and LimitError.
    """

    def __init__(
        self,
        ref: Reference,
        *,
        login: credentials.Credentials | None = None,
        authfile: str = "",
        no_https: bool = False,
        patience: Patience | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._ref, self._login, self._authfile, self._note = ref, login, authfile, note
        self._patience = patience or Patience()
        mirror = origins.mirrors(os.environ).get(ref.host, "")
        self._mirrored = bool(mirror)
        if mirror:
            base = urlsplit(mirror)
            self._scheme, self._host = base.scheme, base.netloc
            self._name = f"{base.path.strip('/')}/{ref.repository}".lstrip("/")
        else:
            self._host = HUB_ENDPOINT if ref.host == DOCKER_HUB else ref.host
            self._scheme = "http" if no_https or origins.is_loopback(hostname(self._host)) else "https"
            self._name = ref.repository
        # Loopback is tried with http first: a server of TLS says so at once, and no secret is sent before it has answered.
        self._scheme_is_a_guess = self._scheme == "http" and not (mirror or no_https)
        self._answered = False
        self._verify = origins.trusted_certificates(os.environ)
        # The adapter of requests without its Session: a Session reads the body of every redirect whole and decompressed, takes
        # passwords from ~/.netrc for any host in place of ours, and keeps cookies.
        self._adapter = requests.adapters.HTTPAdapter(pool_connections=8, pool_maxsize=8)
        self._lock = threading.Lock()
        self._authorization = ""
        self._stopped = threading.Event()
        self._streams: set[BlobStream] = set()

    def manifest(self, reference: str = "") -> tuple[bytes, str, str]:
        """A manifest or index: its bytes, its Content-Type without parameters, its digest.

        Arguments:
            reference: a digest or a tag; "" for what the Reference names (its digest, if it has one, else its tag).

        The bytes match that digest, and the registry's Docker-Content-Digest where it sends one; they are at most MAX_DOCUMENT.
        """
        wanted = reference or self._ref.digest or self._ref.tag
        if not (is_digest(wanted) or is_tag(wanted)):
            raise self.error(f"{escaped(wanted[:MAX_MESSAGE])} is neither a digest nor a tag")

        def attempt() -> tuple[bytes, str, str]:
            response = self.answer(f"manifests/{wanted}", {"Accept": ", ".join(MANIFEST_TYPES)})
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                response.close()
                raise self.error("the manifest comes with a Content-Encoding, though none was accepted")
            data = self._body(response, MAX_DOCUMENT, "the manifest")
            stated = response.headers.get("Docker-Content-Digest", "")
            if stated and not is_digest(stated):
                raise self.error(f"the registry states the malformed digest {escaped(stated[:MAX_MESSAGE])}")
            self._verified(data, stated, "the manifest")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
            if is_tag(wanted):
                return data, media_type, "sha256:" + hashlib.sha256(data).hexdigest()
            return self._verified(data, wanted, "the manifest"), media_type, wanted

        return self._patiently(attempt)

    def blob(self, digest: str, size: int) -> BlobStream:
        """The stream of one blob of `size` bytes; it connects when it is first read.  Its digest is the reader's to verify."""
        if not is_digest(digest) or size < 0:
            raise self.error(f"the manifest names a blob of malformed digest {escaped(digest[:MAX_MESSAGE])} or of negative size")
        stream = BlobStream(self, digest, size)
        with self._lock:
            self._streams.add(stream)
        return stream

    def document(self, digest: str, size: int) -> bytes:
        """A small blob whole, a config say: at most MAX_DOCUMENT, its digest verified."""
        if size > MAX_DOCUMENT:
            raise LimitError(f"pulling {self._ref}: {escaped(digest)} has {size} bytes, a document may have {MAX_DOCUMENT}")
        with self.blob(digest, size) as stream:
            return self._verified(b"".join(iter(stream.read, b"")), digest, f"blob {digest[:19]}")

    def close(self) -> None:
        """Ends every stream, from any thread, and gives the connections back.  Idempotent."""
        self._stopped.set()
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        self._adapter.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- for BlobStream -------------------------------------------------------------------------------------------------------

    def error(self, cause: str, hint: str = "") -> RegistryError:
        return RegistryError(f"pulling {self._ref}: {cause}", hint)

    def attempts(self, stopped: threading.Event) -> Attempts:
        return Attempts(self._patience, stopped, self._note)

    def pace(self) -> Pace:
        return Pace(self._patience.idle)

    def forget(self, stream: BlobStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def answer(self, path: str, fields: dict[str, str]) -> requests.Response:
        """One try at GET /v2/<name>/<path>: authorised, redirects followed, the body unread.  Status 200, or 206 if asked for.

        Raises Again where another try may do better.
        """
        used = self._authorization
        response = self._follow(path, {**fields, "Authorization": used} if used else fields)
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            response = self._follow(path, {**fields, "Authorization": self._authorize(response, used)})
        if response.status_code == HTTPStatus.OK or (response.status_code == HTTPStatus.PARTIAL_CONTENT and "Range" in fields):
            return response
        raise self._refusal(response)

    def read(self, response: requests.Response, count: int, pace: Pace) -> bytes:
        """At most `count` bytes of a body as they come, never decompressed; b"" at its end.  Raises Again."""
        # read1 returns what one recv brings, so that a server which drips cannot hold a large read for hours.
        read: Callable[..., bytes] = getattr(response.raw, "read1", None) or response.raw.read
        began = time.monotonic()
        try:
            piece = read(count, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:
            # ValueError and AttributeError: a close() from another thread took the file away.
            raise self._failure(error, str(response.url)) from None
        if pace.stalled(len(piece), time.monotonic() - began):
            raise Again(self.error(f"{shown(str(response.url))} sends hardly anything any more"))
        return piece

    # --- one exchange ---------------------------------------------------------------------------------------------------------

    def _patiently(self, attempt: Callable[[], T]) -> T:
        attempts = self.attempts(self._stopped)
        while not self._stopped.is_set():
            try:
                return attempt()
            except Again as again:
                attempts.failed(again)
        raise self.error("cancelled")

    def _follow(self, path: str, fields: dict[str, str]) -> requests.Response:
        """The answer after at most MAX_HOPS redirects; Authorization is left behind for good by the first that leaves the origin."""
        response = self._send("GET", f"{self._settled_scheme()}://{self._host}/v2/{self._name}/{path}", fields)
        for _ in range(MAX_HOPS):
            here = str(response.url)
            if response.status_code == HTTPStatus.UNAUTHORIZED and origins.origin(here) != self._origin():
                response.close()
                raise self.error(f"redirected to {shown(here)}, which asks for credentials: it gets none")
            if response.status_code not in REDIRECTS:
                return response
            target = self._checked(urljoin(here, response.headers.get("Location", "")), "a redirect")
            self._discard(response)
            if origins.origin(target) != self._origin():
                fields = {name: value for name, value in fields.items() if name != "Authorization"}
                self._may_redirect(here, target)
            response = self._send("GET", target, fields)
        response.close()
        raise self.error(f"more than {MAX_HOPS} redirects")

    def _may_redirect(self, here: str, target: str) -> None:
        if urlsplit(here).scheme == "https" and urlsplit(target).scheme != "https":
            raise self.error(f"redirected from https to plain http ({shown(target)}), which is refused")
        all_here = origins.is_loopback(hostname(target)) and origins.is_loopback(hostname(self._host))
        if origins.is_inward(hostname(target), private=False) and not all_here:
            raise self.error(f"redirected to {shown(target)}, an address inside this machine or network, which is refused")

    def _settled_scheme(self) -> str:
        """http or https.  A server of TLS answers plain http with 400 (Go, nginx), with an alert, or not at all."""
        with self._lock:
            if self._scheme_is_a_guess:
                try:
                    response = self._send("GET", f"http://{self._host}/v2/", {})
                    self._discard(response)
                    spoken = response.status_code != HTTPStatus.BAD_REQUEST
                except Again:
                    spoken = False
                self._scheme = "http" if spoken else "https"
                self._scheme_is_a_guess = False
            return self._scheme

    def _send(self, method: str, url: str, fields: dict[str, str], form: dict[str, str] | None = None) -> requests.Response:
        """One request and the head of its answer.  Raises RegistryError, or Again where it may pass."""
        # Accept-Encoding: what a digest is taken of is what travels.
        fields = {"User-Agent": "sciexec", "Accept-Encoding": "identity", "Accept": "*/*", **fields}
        try:
            response = self._adapter.send(
                requests.Request(method, url, fields, data=form or {}).prepare(),
                stream=True,
                timeout=(self._patience.connect, self._patience.idle),
                verify=self._verify,
                proxies={} if origins.is_loopback(hostname(url)) else dict(get_environ_proxies(url)),
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # the exceptions of requests are OSErrors
            raise self._failure(error, url) from None
        self._answered = True
        return response

    def _origin(self) -> Origin:
        return origins.origin(f"{self._scheme}://{self._host}")

    def _checked(self, url: str, what: str) -> str:
        try:
            return origins.checked(url)
        except ValueError:
            raise self.error(f"{what} leads to the unusable address {shown(url)}") from None

    def _body(self, response: requests.Response, limit: int, what: str) -> bytes:
        """A body of at most `limit` bytes, whole."""
        data, pace = bytearray(), self.pace()
        with response:
            while len(data) <= limit and (piece := self.read(response, min(READ, limit + 1 - len(data)), pace)):
                data += piece
        if len(data) > limit:
            raise LimitError(f"pulling {self._ref}: {what} has more than {limit} bytes")
        announced = _content_length(response)
        if announced is not None and announced != len(data):
            raise Again(self.error(f"{what} ended after {len(data)} of {announced} bytes"))
        return bytes(data)

    def _discard(self, response: requests.Response) -> None:
        """Read a short body to its end, so that the connection can serve again; a long one is not worth it."""
        length, pace = _content_length(response), self.pace()
        try:
            while length is not None and length <= MAX_REFUSAL and self.read(response, MAX_REFUSAL, pace):
                pass
        except Again:
            pass
        response.close()

    def _verified(self, data: bytes, digest: str, what: str) -> bytes:
        algorithm, _, expected = digest.partition(":")
        if expected and hashlib.new(algorithm, data).hexdigest() != expected:
            raise self.error(f"{what} does not match its digest {digest}", "the registry or the network between is at fault")
        return data

    # --- authorisation --------------------------------------------------------------------------------------------------------

    def _authorize(self, response: requests.Response, used: str) -> str:
        """The Authorization that answers a 401 from the registry's own origin; `used` is the one it did not accept."""
        try:
            schemes = dict(reversed(headers.challenges(response.headers.get("WWW-Authenticate", ""))))
        except ValueError as error:
            raise self.error(f"the registry's WWW-Authenticate header is malformed: {escaped(str(error))}") from None
        finally:
            self._discard(response)
        with self._lock:
            if self._authorization == used:  # else another thread was faster
                self._authorization = f"Bearer {self._token(schemes['bearer'])}" if "bearer" in schemes else self._basic(schemes)
            return self._authorization

    def _basic(self, schemes: dict[str, dict[str, str]]) -> str:
        if "basic" not in schemes:
            raise self._unauthorized("the registry names no way to log in that sciexec knows (Basic, Bearer)")
        found = self._credentials()
        if not found or not found.basic():
            raise self._unauthorized("the registry asks for a user name and a password")
        return found.basic()

    def _credentials(self) -> credentials.Credentials | None:
        """Those given or set without a host's name are for the host the user named, and not for its mirror."""
        if self._login is not None and not self._mirrored:
            return self._login
        host = self._host if self._mirrored else self._ref.host
        return credentials.find(host, self._name, named=not self._mirrored, authfile=self._authfile, warn=self._note)

    def _token(self, challenge: dict[str, str]) -> str:
        """A token for pulling from this repository and nothing else, whatever scope the challenge asks for."""
        realm = self._realm(challenge.get("realm", ""))
        form = {"scope": f"repository:{self._name}:pull"}
        if "service" in challenge:
            form["service"] = challenge["service"]
        # Over plain http anybody on the way may have written the realm: then only the registry's own host learns a password.
        believed = self._scheme == "https" or hostname(realm) == hostname(self._host)
        found = self._credentials() if believed else None
        if found and found.identity_token:
            form |= {"grant_type": "refresh_token", "refresh_token": found.identity_token, "client_id": "sciexec"}
            response = self._send("POST", realm, {}, form)
        else:
            query = ("&" if urlsplit(realm).query else "?") + urlencode(form)
            response = self._send("GET", realm + query, {"Authorization": found.basic()} if found else {})
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            response.close()
            raise self._unauthorized(f"{shown(realm)} " + ("refused the credentials" if found else "gives no token without credentials"))
        if response.status_code != HTTPStatus.OK:
            raise self._refusal(response)
        try:
            answer = json.loads(self._body(response, MAX_ANSWER, "the answer of the token server"))
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, RecursionError, AttributeError):
            token = None
        if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
            raise self.error(f"{shown(realm)} gave no token")
        return token

    def _realm(self, realm: str) -> str:
        """The token server's address, if it is one that a registry may send us to."""
        realm = self._checked(realm, "the registry's token server (realm)")
        if origins.origin(realm) == self._origin():
            return realm
        same_host = hostname(realm) == hostname(self._host)
        if urlsplit(realm).scheme != "https" and not (self._scheme == "http" and same_host):
            raise self.error(f"the registry's token server {shown(realm)} is plain http, which is refused")
        if origins.is_inward(hostname(realm), private=True) and not same_host:
            raise self.error(f"the registry's token server {shown(realm)} is an address inside this machine or network, which is refused")
        return realm

    # --- what went wrong ------------------------------------------------------------------------------------------------------

    def _unauthorized(self, cause: str) -> RegistryError:
        host = self._host if self._mirrored else self._ref.host
        login = "docker login" if host == DOCKER_HUB else f"docker login {host}"
        return self.error(
            f"unauthorized: {cause}",
            f"check the name; for a private image set SCIEXEC_DOCKER_USERNAME and SCIEXEC_DOCKER_PASSWORD, or use '{login}' or --authfile",
        )

    def _refusal(self, response: requests.Response) -> Again | RegistryError:
        """The error of an answer that is no success, in the registry's own words where it has some (distribution-spec, Error codes)."""
        status, here = response.status_code, str(response.url)
        words = self._words(response)
        if status == HTTPStatus.UNAUTHORIZED:
            wrong = "the user name or the password is wrong" if self._authorization.startswith("Basic") else ""
            return self._unauthorized(wrong or words or "the registry refuses the token")
        if status == HTTPStatus.FORBIDDEN:
            return self.error(f"denied: {words or 'the registry refuses access'}", self._unauthorized("").hint)
        if status == HTTPStatus.NOT_FOUND:
            return self.error(words or ("blob unknown" if "/blobs/" in here else "manifest unknown"), "check the name and the tag")
        error = self.error(f"{shown(here)} answered with status {status}" + (f": {words}" if words else ""))
        if status in TRANSIENT:
            return Again(error, headers.retry_after(response.headers.get("Retry-After", "")))
        return error

    def _words(self, response: requests.Response) -> str:
        """The messages of an error body, escaped and cut; "" where there are none to be had."""
        try:
            errors = json.loads(self._body(response, MAX_REFUSAL, "the error"))["errors"]
            said = "; ".join(str(error.get("message") or error["code"]) for error in errors[:3])
        except (Again, SciexecError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return ""
        return escaped(said[:MAX_MESSAGE])

    def _failure(self, error: BaseException, url: str) -> Again | RegistryError:
        """A failed exchange as an error for the user, or as Again where it may pass.

        The text of the exceptions of requests and urllib3 holds whole URLs: only what they wrap is used.
        """
        host = urlsplit(shown(url)).netloc
        if untrusted := _cause(error, ssl.SSLCertVerificationError):
            hint = "for a site's own certificate authority set REQUESTS_CA_BUNDLE or SSL_CERT_FILE to its PEM file"
            return self.error(f"the TLS certificate of {host} is not trusted: {escaped(str(untrusted.verify_message))}", hint)
        tls = _cause(error, ssl.SSLError)
        if tls and tls.reason in NOT_TLS:
            return self.error(f"{host} does not speak TLS", "for a registry of plain http give --no-https")
        if tls and not isinstance(tls, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) and tls.reason:
            return self.error(f"TLS with {host} failed: {escaped(tls.reason)}")
        proxied = _cause(error, urllib3.exceptions.ProxyError)
        unresolved = _cause(error, socket.gaierror)
        if unresolved and not proxied:
            failed = self.error(f"the name {host} cannot be resolved: {unresolved.strerror}", "check the name and this node's network")
            return Again(failed) if self._answered and unresolved.errno == socket.EAI_AGAIN else failed
        causes = [cause for cause in _causes(error) if isinstance(cause, OSError)]
        # http.client has the refusal of a proxy only as text: "Tunnel connection failed: 403 Forbidden".
        tunnel = next((str(cause) for cause in causes if str(cause).startswith("Tunnel connection failed")), "")
        why = tunnel or next((cause.strerror for cause in causes if cause.strerror), "")
        if not why and (_cause(error, urllib3.exceptions.TimeoutError) or _cause(error, socket.timeout)):
            hint = "without network on this node pull on a login node, or set https_proxy"
            return Again(self.error(f"{host} does not answer in time", hint))
        if isinstance(error, (ValueError, urllib3.exceptions.InvalidHeader)) and not self._stopped.is_set():
            why = "its answer is malformed"
        via, hint = "", "check the host and its port"
        if proxied:
            via, hint = " through the proxy", "check http_proxy, https_proxy and no_proxy"
        failed = self.error(f"the connection to {host}{via} failed" + (f": {escaped(why[:MAX_MESSAGE])}" if why else ""), hint)
        # A wrong name, port or proxy stays wrong; once the host has answered it is a host that is coming back.
        lasting = tunnel.startswith("Tunnel connection failed: 4") or unresolved or _cause(error, ConnectionRefusedError)
        return failed if lasting and not self._answered else Again(failed)


class BlobStream:
    """The compressed bytes of one blob, in order, whatever the connections do; read by one thread, closed by any.

    A connection that breaks, stalls or ends early is replaced by one that begins where it ended (Range; a server that answers with
    the whole blob is read up to there).  Not one byte more than `size` is ever returned.
    """

    def __init__(self, registry: Registry, digest: str, size: int) -> None:
        self.digest, self.size, self.offset = digest, size, 0
        self._registry = registry
        self._closed = threading.Event()
        self._attempts = registry.attempts(self._closed)
        self._response: requests.Response | None = None
        self._pace = registry.pace()
        self._steady = 0  # bytes since the last failure

    def read(self, count: int = READ) -> bytes:
        """1 to `count` bytes as they arrive, b"" at the end.  Raises RegistryError, also after a close()."""
        if self.size == 0 or count == 0:
            return b""
        while not self._closed.is_set():
            try:
                return self._next(self._response or self._connect(), count)
            except Again as again:
                self._hang_up()
                if not self._closed.is_set():
                    self._attempts.failed(again)
        self._hang_up()
        raise self._error("cancelled")

    def close(self) -> None:
        """Ends a read() that waits in another thread, within moments.  Idempotent."""
        self._closed.set()
        self._registry.forget(self)
        self._hang_up()

    def __enter__(self) -> BlobStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _error(self, cause: str) -> RegistryError:
        return self._registry.error(f"blob {self.digest[:19]}: {cause}")

    def _connect(self) -> requests.Response:
        """A connection that stands at `offset`."""
        response = self._registry.answer(f"blobs/{self.digest}", {"Range": f"bytes={self.offset}-"} if self.offset else {})
        self._response, self._pace, self._steady = response, self._registry.pace(), 0
        if self._closed.is_set():  # while it was being made, and nobody else will close it
            raise Again(self._error("cancelled"))
        if response.status_code == HTTPStatus.PARTIAL_CONTENT:
            begin, total = headers.content_range(response.headers.get("Content-Range", ""))
            if begin != self.offset or total not in (self.size, -1):
                raise self._refused("the registry answered with another range than the one asked for")
            return response
        announced = _content_length(response)
        if announced is not None and announced != self.size:
            raise self._refused(f"it has {self.size} bytes by its manifest, the registry announces {announced}")
        skip = self.offset
        while skip:
            piece = self._registry.read(response, min(skip, READ), self._pace)
            if not piece:
                raise Again(self._error(f"the connection ended before byte {self.offset} of {self.size}"))
            skip -= len(piece)
        return response

    def _next(self, response: requests.Response, count: int) -> bytes:
        left = self.size - self.offset
        piece = self._registry.read(response, min(count, left) or 1, self._pace)
        if piece and not left:
            raise self._refused(f"it goes on after the {self.size} bytes its manifest gives it")
        if left and not piece:
            raise Again(self._error(f"the connection ended after {self.offset} of {self.size} bytes"))
        self.offset += len(piece)
        self._steady += len(piece)
        if self._steady >= PROGRESS:
            self._attempts.progress()
            self._steady = 0
        return piece

    def _refused(self, cause: str) -> RegistryError:
        self._hang_up()
        return self._error(cause)

    def _hang_up(self) -> None:
        response, self._response = self._response, None
        if response is None:
            return
        # close() would wait for the thread that reads: end its wait first.
        try:
            with socket.socket(fileno=os.dup(response.raw.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError, AttributeError):
            pass  # it is closed, or back in the pool
        response.close()


def _content_length(response: requests.Response) -> int | None:
    return headers.content_length(response.headers.get("Content-Length", ""), response.headers.get("Transfer-Encoding", ""))


def _cause(error: BaseException, kind: type[E]) -> E | None:
    return next((cause for cause in _causes(error) if isinstance(cause, kind)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and whatever it wraps: requests and urllib3 keep the cause in args, in .reason or in the chain."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        this = waiting.pop(0)
        if isinstance(this, BaseException) and id(this) not in seen:
            seen.add(id(this))
            yield this
            waiting += [getattr(this, "reason", None), *this.args, this.__cause__, this.__context__]
