"""HTTP headers of a registry, read strictly, in one pass over the text (RFC 9110).  No I/O.

    WWW-Authenticate: Bearer realm="https://auth.example.org/token",service="registry.example.org", Basic realm="x"
    Content-Range:    bytes 10-99/100
    Retry-After:      120                  or a date
"""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_SCHEME = re.compile(rf"({_TOKEN})(?: +|(?=,)|$)")
_PARAMETER = re.compile(rf'({_TOKEN})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))')
_COMMAS = re.compile(r"[ \t]*(?:,[ \t]*)*")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)")


def challenges(header: str) -> list[tuple[str, dict[str, str]]]:
    """The challenges of a WWW-Authenticate header (11.6.1): [(scheme, {parameter: value})], names in lower case.

    Raises ValueError for anything that is not such a list; token68 and a parameter given twice are not.
    """
    found: list[tuple[str, dict[str, str]]] = []
    at = _skip(header, 0)
    while at < len(header):
        parameter = _PARAMETER.match(header, at)
        if not parameter:
            scheme = _SCHEME.match(header, at)
            if not scheme:
                raise ValueError(f"neither a scheme nor a parameter at character {at}")
            found.append((scheme.group(1).lower(), {}))
            at = _skip(header, scheme.end())
            continue
        name, quoted, plain = parameter.groups()
        name = name.lower()
        if not found:
            raise ValueError("a parameter comes before any scheme")
        if name in found[-1][1]:
            raise ValueError(f"{name} is given twice")
        found[-1][1][name] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        at = _skip(header, parameter.end())
        if at < len(header) and "," not in header[parameter.end() : at]:
            raise ValueError(f"no comma after {name}")
    return found


def _skip(text: str, at: int) -> int:
    """Past white space and commas; a list may have empty elements (5.6.1)."""
    matched = _COMMAS.match(text, at)
    return matched.end() if matched else at


def content_length(length: str, transfer_encoding: str) -> int | None:
    """Bytes of a body, by Content-Length; None where that is not given, is no number, or does not count (chunked, 8.6)."""
    if transfer_encoding or not (length.isascii() and length.isdigit()):
        return None
    return int(length[:20])


def content_range(header: str) -> tuple[int, int]:
    """First byte and total (14.4); -1 for what is not given."""
    matched = _CONTENT_RANGE.fullmatch(header)
    if not matched:
        return -1, -1
    return int(matched.group(1)), -1 if matched.group(2) == "*" else int(matched.group(2))


def retry_after(header: str) -> float | None:
    """Seconds to wait (10.2.3); None where the header says neither a number nor a date."""
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
