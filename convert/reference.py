"""What a user may write to name an image that has to be converted, and the canonical form of it.

    docker://[host[:port]/]name[:tag][@digest]     a registry (OCI distribution protocol)
    docker-archive:file[:name[:tag]]               what `docker save` wrote
    oci:directory[:ref]                            an OCI image layout
    oci-archive:file[:ref]                         the same inside a tar

The grammar of names, tags and digests is that of the OCI distribution specification (Pulling manifests) and of Docker's reference
package.  It is checked here, before any part of a name can reach a URL or a path.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from sciexec.errors import UsageError, escaped

DOCKER_HUB = "docker.io"
SUPPORTED = ("docker", "docker-archive", "oci", "oci-archive")
# Known from Apptainer's documentation, refused by name instead of being taken for the name of a file.
FOREIGN = ("docker-daemon", "http", "https", "ipfs", "library", "oras", "shub")

MAX_REPOSITORY = 255  # characters, the limit of Docker's reference grammar
MAX_PORT = 65535

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[([0-9A-Fa-f:.]+)\])(?::([0-9]{{1,5}}))?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
# A layout's org.opencontainers.image.ref.name (OCI image-spec, annotations) or a docker-archive's RepoTags entry.
_REF_NAME = re.compile(r"[A-Za-z0-9]+(?:[-._:@+/]+[A-Za-z0-9]+)*")

_SUPPORTED_HINT = "supported are docker://NAME, docker-archive:FILE, oci:DIRECTORY and oci-archive:FILE"


@dataclass(frozen=True)
class Reference:
    """One image, named without ambiguity; `str()` gives the canonical text, which `parse` reads back to an equal Reference.

    transport: one of SUPPORTED.
    host: of the registry, with its port if one was given ("docker.io", "localhost:5000"); empty for archives and layouts.
    repository: the name inside that registry ("library/alpine"); empty for archives and layouts.
    tag: of the registry image ("" if only a digest is given); for archives and layouts the name inside, "" if none is given.
    digest: "sha256:<64 hex>" or "sha512:<128 hex>", else "".
    path: of the archive or layout, as written; empty for docker.
    """

    transport: str
    host: str = ""
    repository: str = ""
    tag: str = ""
    digest: str = ""
    path: str = ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        if self.transport != "docker":
            return f"{self.transport}:{self.path}{tag}"
        digest = f"@{self.digest}" if self.digest else ""
        return f"docker://{self.host}/{self.repository}{tag}{digest}"

    def default_output(self) -> str:
        """The file name `pull` writes where none is given: last part of the name, "_", tag (or "latest"), ".sif", as Apptainer's.

        Apptainer cuts at the first two colons only, so that a digest gives name@sha256_<hex>.sif; scripts rely on such names.
        """
        last = str(self).rstrip("/").rpartition("/")[2]
        if self.transport != "docker":
            last = last[len(self.transport) + 1 :] if last.startswith(f"{self.transport}:") else last
        name, tag = ([*last.split(":"), "latest"])[:2]
        return f"{name}_{tag}.sif"


def is_uri(text: str) -> bool:
    """Whether `text` names an image by a transport (also by one that is not supported) and not by a file name."""
    transport, colon, rest = text.partition(":")
    return bool(colon) and (transport in SUPPORTED or (transport in FOREIGN and (rest.startswith("//") or transport == "docker-daemon")))


def is_digest(text: str) -> bool:
    """Whether `text` is a whole, lower-case sha256 or sha512 digest: safe as a part of a path or URL (image-spec, Digests)."""
    return _DIGEST.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    """Whether `text` is a tag (distribution-spec, Pulling manifests)."""
    return _TAG.fullmatch(text) is not None


def parse(text: str) -> Reference:
    """Read what a user wrote; raises UsageError that names the part which is wrong."""
    transport, colon, rest = text.partition(":")
    if not colon or transport not in SUPPORTED:
        raise UsageError(f"reading the image name {escaped(text)}: {_unknown_transport(transport, colon)}", _SUPPORTED_HINT)
    if transport == "docker":
        return _registry_image(text, rest)
    return _local_image(text, transport, rest)


def _unknown_transport(transport: str, colon: str) -> str:
    if not colon:
        return "it has no transport in front"
    return f"the transport {escaped(transport)} is not supported"


def _registry_image(text: str, rest: str) -> Reference:
    if not rest.startswith("//"):
        raise _wrong(text, "docker: must be followed by //", f"write docker://{escaped(rest)}")
    name, at, digest = rest[2:].partition("@")
    if at and not is_digest(digest):
        raise _wrong(text, "the digest is not sha256: and 64 lower-case hexadecimal digits")
    host, name = _split_host(name)
    # Whatever follows the last colon is a tag, as the host with its port is already gone.
    name, colon, tag = name.partition(":")
    if colon and not is_tag(tag):
        raise _wrong(text, "the tag is not 1 to 128 letters, digits, '_', '.' and '-'")
    if not _is_host(host):
        raise _wrong(text, f"{escaped(host)} is not a host name with an optional port")
    if host in (DOCKER_HUB, f"index.{DOCKER_HUB}"):
        host = DOCKER_HUB
        name = name if "/" in name else f"library/{name}"
    if name != name.lower():
        raise _wrong(text, "the name of a repository is lower case", f"did you mean {escaped(name.lower())} ?")
    if not _REPOSITORY.fullmatch(name) or len(name) > MAX_REPOSITORY:
        raise _wrong(text, "the repository is not made of lower-case letters and digits, separated by '.', '_', '-' and '/'")
    return Reference("docker", host=host, repository=name, tag=tag or ("" if digest else "latest"), digest=digest)


def _split_host(name: str) -> tuple[str, str]:
    """Docker's rule: the first component is a host only if it cannot be the beginning of a repository's name."""
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first, rest
    return DOCKER_HUB, name


def _is_host(text: str) -> bool:
    matched = _HOST.fullmatch(text)
    if not matched or not 0 < int(matched.group(2) or 443) <= MAX_PORT:
        return False
    try:
        return not matched.group(1) or bool(ipaddress.IPv6Address(matched.group(1)))
    except ValueError:
        return False


def _local_image(text: str, transport: str, rest: str) -> Reference:
    # `docker-archive:///abs/file` and `docker-archive://file` are what people write; the two slashes belong to neither path.
    path, colon, name = rest[2 * rest.startswith("//") :].partition(":")
    if not path or "\0" in path:
        raise _wrong(text, "it names no file or directory")
    if colon and not _REF_NAME.fullmatch(name):
        raise _wrong(text, "what follows the second colon is not the name of an image", "a path with a colon in it cannot be named here")
    # More slashes would be taken for those two when the canonical text is read again.
    return Reference(transport, tag=name, path="/" + path.lstrip("/") if path.startswith("//") else path)


def _wrong(text: str, cause: str, hint: str = "") -> UsageError:
    return UsageError(f"reading the image name {escaped(text)}: {cause}", hint)
