"""Tar archives written by hand, byte by byte: right ones, and those that no sane program writes.

    archive(member(b"etc", "d"), member(b"etc/motd", "f", b"hello\\n"), pax({b"path": b"x"}) + header(b"short", "f"))

`kind` is a letter of convert.tar.Member ("f", "d", "l", "h", "c", "b", "p"), or the type flag itself as bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Union

POSIX = b"ustar\00000"
GNU = b"ustar  \0"
V7 = bytes(8)
FLAGS = {"f": b"0", "d": b"5", "l": b"2", "h": b"1", "c": b"3", "b": b"4", "p": b"6"}
END = bytes(1024)

Records = Union[Mapping[bytes, bytes], Iterable[tuple[bytes, bytes]]]
Number = Union[int, bytes]  # bytes go into the field as they are


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def number(value: Number, width: int) -> bytes:
    """A numeric field: octal where it fits, else GNU's base-256."""
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return base256(value, width)


def base256(value: int, width: int) -> bytes:
    field = (value % (1 << 8 * width)).to_bytes(width, "big")
    return field if value < 0 else bytes([field[0] | 0x80]) + field[1:]


def header(
    path: bytes,
    kind: str | bytes = "f",
    size: Number = 0,
    mode: Number = 0o644,
    uid: Number = 0,
    gid: Number = 0,
    mtime: Number = 0,
    link: bytes = b"",
    *,
    magic: bytes = POSIX,
    rdev: tuple[Number, Number] = (0, 0),
    prefix: bytes = b"",
    patch: Mapping[int, bytes] | None = None,
    checksum: Number | None = None,
) -> bytes:
    """One header of 512 bytes; `patch` puts bytes at offsets of it before the checksum is taken."""
    assert len(path) <= 100 and len(link) <= 100 and len(prefix) <= 155, "does not fit: use pax() or gnu_long()"
    flag = FLAGS[kind] if isinstance(kind, str) else kind
    block = bytearray(512)
    for offset, field in {
        0: path, 100: number(mode, 8), 108: number(uid, 8), 116: number(gid, 8), 124: number(size, 12), 136: number(mtime, 12),
        148: b" " * 8, 156: flag, 157: link, 257: magic, 329: number(rdev[0], 8), 337: number(rdev[1], 8), 345: prefix, **(patch or {}),
    }.items():  # fmt: skip
        block[offset : offset + len(field)] = field
    assert len(block) == 512
    block[148:156] = number(sum(block), 7) + b" " if checksum is None else number(checksum, 8)
    return bytes(block)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record: b"LENGTH KEY=VALUE\\n", where LENGTH counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def pax(records: Records | bytes, kind: bytes = b"x", *, size: Number | None = None) -> bytes:
    """An extended header (kind b"g": a global one); records as bytes go in as they are."""
    if not isinstance(records, bytes):
        records = b"".join(record(key, value) for key, value in (records.items() if isinstance(records, Mapping) else records))
    return header(b"PaxHeaders/x", kind, len(records) if size is None else size) + padded(records)


def gnu_long(text: bytes, kind: bytes = b"L", *, size: Number | None = None) -> bytes:
    """GNU's long name (kind b"L") or long link (b"K")."""
    return header(b"././@LongLink", kind, len(text) + 1 if size is None else size, magic=GNU) + padded(text + b"\0")


def member(
    path: bytes, kind: str | bytes = "f", data: bytes = b"", *, records: Records | None = None, link: bytes = b"", **fields: Any
) -> bytes:
    """Header and data; whatever does not fit a header goes into PAX records, where `records` is added."""
    extended = dict(records or {})
    if len(path) > 100:
        extended.setdefault(b"path", path)
    if len(link) > 100:
        extended.setdefault(b"linkpath", link)
    fields.setdefault("mode", 0o755 if kind == "d" else 0o644)
    block = header(path[:100], kind, fields.pop("size", len(data)), link=link[:100], **fields)
    return (pax(extended) if extended else b"") + block + padded(data)


def archive(*members: bytes, end: bytes = END) -> bytes:
    return b"".join(members) + end
