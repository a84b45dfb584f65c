"""Whom a URL leads to, and whether a server may send us there; addresses, mirrors and certificate authorities.  No I/O.

A URL that came from a server is taken apart twice, by us and by the library that connects; `checked` lets through only what both
read alike.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
from collections.abc import Mapping
from typing import Union
from urllib.parse import urlsplit

from convert.reference import DOCKER_HUB
from sciexec.errors import UsageError, escaped

MAX_SHOWN = 300  # characters of a URL in a message

Origin = tuple[str, str, int]
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

_AUTHORITY = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


def checked(url: str) -> str:
    """An http or https URL in a spelling that every parser reads alike, its scheme in lower case and without a fragment.

    Raises ValueError for any other: another scheme, no host, a user, a bad port, a character that is not printable ASCII.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not _AUTHORITY.fullmatch(parts.netloc):
        raise ValueError("no http or https URL of a plain host")
    if not url.isascii() or not url.isprintable() or set(url) & set(' \\"<>'):
        raise ValueError("a character that has no place in a URL")
    origin(url)
    return parts._replace(fragment="").geturl()


def origin(url: str) -> Origin:
    """Scheme, host and port, which together decide who may see a secret (RFC 6454).  Raises ValueError for a bad port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def hostname(where: str) -> str:
    """Of a URL, or of a host with a port: lower case, no port, no brackets, no dot at the end."""
    return (urlsplit(where if "://" in where else f"//{where}").hostname or "").rstrip(".")


def shown(url: str) -> str:
    """A URL as a message may show it: without query, fragment and user, where secrets live; escaped and cut."""
    head = url.partition("?")[0].partition("#")[0]
    scheme, separator, rest = head.partition("://")
    authority, slash, path = rest.partition("/")
    return escaped(f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"[:MAX_SHOWN])


def address(host: str) -> Address | None:
    """The address that a literal stands for, in any spelling the C library takes (127.1, 0x7f000001); None for a name."""
    found: Address
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            found = ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(host: str) -> bool:
    literal = address(host)
    return literal.is_loopback if literal else host == "localhost" or host.endswith(".localhost")


def is_inward(host: str, *, private: bool) -> bool:
    """Whether a server elsewhere has no business to send us there: loopback, link-local (cloud metadata), no real address.

    private: the addresses of private networks (RFC 1918, RFC 4193) count as well.
    """
    literal = address(host)
    if literal is None:
        return is_loopback(host)
    inward = literal.is_loopback or literal.is_link_local or literal.is_unspecified or literal.is_multicast
    return inward or (private and literal.is_private)


def mirrors(environ: Mapping[str, str]) -> dict[str, str]:
    """SCIEXEC_REGISTRY_MIRROR="host=url[,host=url...]": host -> URL that is asked in its place, without a slash at its end.

    A path in the URL is put before the repository's name (a proxy project of Harbor, a virtual repository of Artifactory).
    Raises UsageError for anything else.
    """
    found: dict[str, str] = {}
    for item in filter(None, (item.strip() for item in environ.get("SCIEXEC_REGISTRY_MIRROR", "").split(","))):
        host, _, url = item.partition("=")
        try:
            found[host] = checked(url).rstrip("/")
            good = bool(host) and not urlsplit(url).query
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"SCIEXEC_REGISTRY_MIRROR: {escaped(item)} is not HOST=URL", f"for instance {DOCKER_HUB}=https://mirror.example.org")
    return found


def trusted_certificates(environ: Mapping[str, str]) -> str | bool:
    """A file or directory of certificate authorities: the user's, else the system's (which knows the site's own), else True.

    True means those of the certifi package.  Raises UsageError for a variable that names nothing.
    """
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        if path := environ.get(name):
            if not os.path.exists(path):
                raise UsageError(f"{name}={escaped(path)}: there are no certificates")
            return path
    system = ssl.get_default_verify_paths()
    if system.cafile:
        return system.cafile
    try:
        # OpenSSL finds a certificate in a directory by the hash of its subject: <hash>.0.
        hashed = any(name.endswith(".0") for name in os.listdir(system.capath or ""))
    except OSError:
        hashed = False
    return system.capath if hashed and system.capath else True
