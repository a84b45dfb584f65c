"""The headers of tar archives, bytes -> values: v7, ustar, GNU (old and new), star and PAX.  The archive around them: convert.tar.

Sources: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Interchange Format"; GNU tar manual, "Basic Tar Format" and "Storing
Sparse Files".  Where a function finds its bytes wrong it raises Malformed, and the reader adds which archive and member it was.
"""

from __future__ import annotations

import base64
import struct
from functools import lru_cache
from urllib.parse import unquote_to_bytes
from zlib import adler32

from sciexec.errors import escaped

BLOCK = 512
ZEROS = bytes(BLOCK)

#   0     100      124    136    148     156   157    257     265                    345     500
#   +------+--------+------+------+-------+-----+------+-------+-----------------------+-------+----+
#   | name | mode   | size | mtime| check | type| link | magic | uname gname           | prefix|    |
#   |      | uid gid|      |      | sum   |     |      |       | devmajor devminor     |       |    |
#   +------+--------+------+------+-------+-----+------+-------+-----------------------+-------+----+
HEADER = struct.Struct("100s 24s 12s 12s 8s c 100s 8s 80x 155s 12x")
POSIX = b"ustar\0"  # the magic of ustar, PAX and star, followed by a version nobody checks
GNU = b"ustar  \0"  # what GNU tar writes instead; the prefix then holds times and the sparse map

MAX_NAME = 1 << 16  # bytes of a name or link target
MAX_COMPONENT = 255  # bytes between two slashes: NAME_MAX, and all that a SquashFS directory entry can hold
MAX_EXTENTS = 1 << 16  # data extents of a sparse file
MAX_ID = (1 << 32) - 2  # the largest uid or gid; -1 means "no change" to chown
MAX_SIZE = (1 << 63) - 1  # bytes: off_t


class Malformed(Exception):
    """What is wrong with the bytes; the Reader adds where."""


def keeps_xattr(name: bytes) -> bool:
    """Whether an extended attribute goes into an image: the users' own and file capabilities.

    The others (ACLs, SELinux labels, overlayfs's marks) speak about the machine on which the layer was made.
    """
    return name == b"security.capability" or (name.startswith(b"user.") and len(name) > 5 and not name.startswith(b"user.overlay."))


def normalised(name: bytes) -> bytes:
    """A member's name as a path below the root: b"./usr//lib/" -> b"usr/lib".  Raises Malformed."""
    path = name[2:] if name.startswith(b"./") else name
    path = path.rstrip(b"/")
    if len(path) <= MAX_COMPONENT and b"//" not in path and b"/." not in path and not path.startswith((b".", b"/")):
        return path
    if len(path) > MAX_NAME:
        raise Malformed(f"the name is longer than {MAX_NAME} bytes")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise Malformed('the name contains ".."')
    if parts and max(map(len, parts)) > MAX_COMPONENT:
        raise Malformed(f"the name has a component of more than {MAX_COMPONENT} bytes")
    return b"/".join(parts)


# --- numbers --------------------------------------------------------------------------------------------------------------


def number(field: bytes) -> int:
    """A number of a header: octal text, ended by blanks or NUL, or GNU's base-256 (two's complement behind a marker bit)."""
    digits = field.rstrip(b" \0")
    if not digits.isdigit():
        if not digits:
            return 0
        if field[0] in (0x80, 0xFF):
            return int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
        digits = digits.lstrip(b" ").partition(b"\0")[0].rstrip(b" ")
        if not digits.isdigit():
            raise Malformed(f"{field!r} is not a number")
    try:
        return int(digits, 8)
    except ValueError:
        raise Malformed(f"{field!r} is not an octal number") from None


@lru_cache(maxsize=4096)
def permissions(field: bytes) -> tuple[int, int, int]:
    """mode, uid and gid of a header; a layer holds few different ones."""
    return number(field[:8]) & 0o7777, owner_id(number(field[8:16])), owner_id(number(field[16:]))


def owner_id(number: int) -> int:
    if not 0 <= number <= MAX_ID:
        raise Malformed(f"{number} is not a user or group id")
    return number


def byte_count(number: int) -> int:
    if not 0 <= number <= MAX_SIZE:
        raise Malformed(f"a size of {number} bytes")
    return number


def decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise Malformed(f"{escaped(text[:32])!r} is not a decimal number")
    return int(text)


def pax_time(text: bytes) -> int:
    """PAX time: decimal seconds, perhaps negative, perhaps with a fraction; rounded down."""
    whole, _, fraction = text[text.startswith(b"-") :].partition(b".")
    seconds = decimal(whole)
    if fraction and not fraction.isdigit():
        raise Malformed(f"{escaped(text[:32])!r} is not a time")
    return seconds if not text.startswith(b"-") else -seconds - (fraction.strip(b"0") != b"")


def _unsigned_sum(block: bytes) -> int:
    """The sum of a header's bytes, its checksum field taken as blanks.

    The low half of Adler-32 is 1 + the sum of the bytes modulo 65521, which 256 bytes cannot reach: three times as fast as sum().
    """
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2 - sum(block[148:156]) + 8 * 0x20


def verify_checksum(block: bytes, checksum: bytes) -> None:
    """Raises Malformed.  Some old writers summed signed chars, so either sum will do."""
    total = _unsigned_sum(block)
    try:
        stored = number(checksum)
    except Malformed:
        stored = -1
    if stored != total and stored != total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise Malformed("the header's checksum is wrong: damaged, or no tar archive")


# --- PAX records ------------------------------------------------------------------------------------------------------------

SPARSE = b"GNU.sparse."
EXTENT_KEYS = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")  # PAX 0.0 repeats this pair, once for each extent
SCHILY = b"SCHILY.xattr."
LIBARCHIVE = b"LIBARCHIVE.xattr."
MEANINGFUL = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"SCHILY.devmajor", b"SCHILY.devminor")  # to an image
MEANINGFUL_PREFIXES = (SPARSE, SCHILY, LIBARCHIVE)


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """Records of the form b"LENGTH KEY=VALUE\\n", where LENGTH counts the whole record; of two with one key the later counts."""
    records: dict[bytes, bytes] = {}
    extents: list[bytes] = []
    start = 0
    while start < len(data):
        blank = data.find(b" ", start, start + 8)
        digits = data[start : max(start, blank)]
        end = start + (int(digits) if digits.isdigit() else 0)
        if not start < blank < end <= len(data) or data[end - 1] != 0x0A:
            raise Malformed("a PAX record has a wrong length")
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not key or not equals:
            raise Malformed("a PAX record has no key")
        if key in EXTENT_KEYS:
            if key != EXTENT_KEYS[len(extents) & 1]:
                raise Malformed("the sparse map's records are out of order")
            extents.append(value)
        else:
            records[key] = value
        start = end
    if extents:
        if b"GNU.sparse.map" in records:
            raise Malformed("there are two sparse maps")
        records[b"GNU.sparse.map"] = b",".join(extents)
    return records


def pax_text(value: bytes) -> bytes:
    """A path of a PAX record, which unlike those of headers could hold a NUL."""
    if not value or b"\0" in value:
        raise Malformed("a PAX header gives it a name or link that is empty or contains a NUL byte")
    return value


def libarchive_xattr(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    """An extended attribute as libarchive writes it: the name in %XX, the value in base64 without padding."""
    try:
        return unquote_to_bytes(key[len(LIBARCHIVE) :]), base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except ValueError:
        raise Malformed("an extended attribute is not base64") from None


# --- sparse files -----------------------------------------------------------------------------------------------------------


def sparse_extents(numbers: list[int], size: int, stored: int) -> list[tuple[int, int]]:
    """offset, length, offset, length ... -> the extents that hold data, checked against the file's size and the bytes stored."""
    if len(numbers) % 2 or len(numbers) > 2 * MAX_EXTENTS:
        raise Malformed(f"the sparse map is incomplete, or has more than {MAX_EXTENTS} extents")
    extents = []
    end = total = 0
    for offset, length in zip(numbers[::2], numbers[1::2]):
        if length < 0 or offset < end or offset + length > size:
            raise Malformed("the sparse map has extents that overlap, are unsorted or lie outside the file")
        end = offset + length
        total += length
        if length:
            extents.append((offset, length))
    if total != stored:
        raise Malformed(f"the sparse map speaks of {total} bytes, but {stored} are stored")
    return extents
