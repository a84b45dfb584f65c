"""Archives with something odd about them: those that are accepted, with what they hold, and those that are refused, with the reason."""

from __future__ import annotations

from typing import Any

from tar_fixtures import END, GNU, V7, archive, base256, gnu_long, header, member, padded, pax

Cases = dict[str, tuple[bytes, list[dict[str, Any]]]]


def like(**attributes: Any) -> dict[str, Any]:
    """What a member is like; `content` stands for its data."""
    return attributes


# --- sparse files -----------------------------------------------------------------------------------------------------------

LONG = b"/".join([b"d" * 99] * 4)
EXTENTS = [(0, 3), (100, 2), (5000, 5)]
SPARSE = b"abcdefghij"
EXPANDED = b"abc" + bytes(97) + b"de" + bytes(4898) + b"fghij"


def extent_table(extents: list[tuple[int, int]]) -> bytes:
    return b"".join(b"%011o\0%011o\0" % extent for extent in extents)


def old_gnu(extents: list[tuple[int, int]], size: int, data: bytes, **fields: Any) -> bytes:
    """A sparse file of type "S": four extents in the header, 21 in every block after it."""
    rest = [extents[n : n + 21] for n in range(4, len(extents), 21)]
    patch = {386: extent_table(extents[:4]), 482: bytes([bool(rest)]), 483: b"%011o\0" % size, **fields.pop("patch", {})}
    blocks = b"".join(extent_table(part).ljust(504, b"\0") + bytes([n + 1 < len(rest)]) + bytes(7) for n, part in enumerate(rest))
    return header(b"s", b"S", len(data), magic=GNU, patch=patch, **fields) + blocks + padded(data)


def sparse_records(extents: list[tuple[int, int]], size: int) -> list[tuple[bytes, bytes]]:
    pairs = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(extents))]
    for offset, length in extents:
        pairs += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % length)]
    return pairs


def sparse_map(extents: list[tuple[int, int]]) -> bytes:
    return b",".join(b"%d,%d" % extent for extent in extents)


def version_1(size: bytes, text: bytes, data: bytes = SPARSE, **extra: bytes) -> bytes:
    keys = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.name": b"s", b"GNU.sparse.realsize": size}
    return pax({**keys, **{k.encode(): v for k, v in extra.items()}}) + member(b"GNUSparseFile.0/s", "f", padded(text) + data)


def lines(extents: list[tuple[int, int]]) -> bytes:
    return b"%d\n" % len(extents) + b"".join(b"%d\n%d\n" % extent for extent in extents)


# --- accepted -------------------------------------------------------------------------------------------------------------

ACCEPTED: Cases = {
    "nothing but the end": (END, []),
    "a file": (
        archive(member(b"a", "f", b"x\n", mode=0o4755, uid=1, gid=2, mtime=3)),
        [like(path=b"a", kind="f", mode=0o4755, uid=1, gid=2, mtime=3, size=2, content=b"x\n", offset=512)],
    ),
    "every kind": (
        archive(
            member(b"d", "d", mode=0o1777),
            member(b"l", "l", link=b"/../x"),
            member(b"d/c", "c", rdev=(1, 3)),
            member(b"b", "b", rdev=(4095, 1048575)),
            member(b"p", "p"),
            member(b"f"),
            member(b"h", "h", link=b"./f"),
            member(b"7", b"7", b"7"),
        ),
        [
            like(path=b"d", kind="d", mode=0o1777),
            like(kind="l", link=b"/../x"),
            like(path=b"d/c", kind="c", rdev=(1, 3)),
            like(kind="b", rdev=(4095, 1048575)),
            like(kind="p"),
            like(path=b"f"),
            like(kind="h", link=b"f", size=0),
            like(path=b"7", kind="f", content=b"7"),
        ],
    ),
    "v7": (
        archive(member(b"d/", b"\0", magic=V7), member(b"d/f", b"\0", b"12", magic=V7, patch={345: b"no prefix here"})),
        [like(path=b"d", kind="d"), like(path=b"d/f", kind="f", content=b"12")],
    ),
    "regular, empty, with a slash": (archive(member(b"d/")), [like(path=b"d", kind="d")]),
    "ustar prefix": (archive(member(b"f", prefix=b"a/b")), [like(path=b"a/b/f")]),
    "ustar, name and prefix full": (
        archive(member(b"f" * 100, prefix=b"/".join([b"p" * 77] * 2))),
        [like(path=b"/".join([b"p" * 77] * 2) + b"/" + b"f" * 100)],
    ),
    "star": (
        archive(member(b"f", prefix=b"a" * 130, patch={476: b"00000000001 00000000001 ", 508: b"tar\0"})),
        [like(path=b"a" * 130 + b"/f")],
    ),
    "GNU, no prefix": (archive(member(b"f", magic=GNU, patch={345: b"00000000001\00000000000001\0"})), [like(path=b"f")]),
    "GNU long name and link": (
        archive(gnu_long(LONG + b"/f"), gnu_long(LONG, b"K"), member(b"f", "l", link=b"x", magic=GNU)),
        [like(path=LONG + b"/f", kind="l", link=LONG)],
    ),
    "PAX names": (
        archive(pax({b"path": LONG, b"linkpath": LONG + b"/z"}), member(b"f", "h", link=b"x")),
        [like(path=LONG, link=LONG + b"/z")],
    ),
    "PAX and GNU agree": (archive(gnu_long(LONG), pax({b"path": LONG}), member(b"f")), [like(path=LONG)]),
    "x before L": (
        archive(pax({b"size": b"3", b"mtime": b"7"}), gnu_long(LONG), header(b"f"), padded(b"abc"), member(b"g")),
        [like(path=LONG, size=3, mtime=7, content=b"abc"), like(path=b"g", size=0, mtime=0)],
    ),
    "PAX size wins": (
        archive(pax({b"size": b"600"}), header(b"f", size=0), padded(b"y" * 600), member(b"g")),
        [like(path=b"f", content=b"y" * 600), like(path=b"g")],
    ),
    "PAX size wins over a larger one": (
        archive(pax({b"size": b"1"}), header(b"f", size=600), padded(b"y"), member(b"g")),
        [like(path=b"f", content=b"y"), like(path=b"g")],
    ),
    "PAX keys twice": (archive(pax([(b"path", b"a"), (b"path", b"b")]), member(b"f")), [like(path=b"b")]),
    "PAX numbers": (
        archive(pax({b"uid": b"4294967294", b"gid": b"65536", b"mtime": b"1234567890.999"}), member(b"f")),
        [like(uid=4294967294, gid=65536, mtime=1234567890)],
    ),
    "PAX unknown keys": (
        archive(pax({b"VENDOR.x": b"=\n\0=", b"atime": b"5.0", b"comment": b"", b"uname": b"root"}), member(b"f")),
        [like(path=b"f")],
    ),
    "PAX hdrcharset": (archive(pax({b"hdrcharset": b"BINARY", b"path": b"\xff\xfe"}), member(b"f")), [like(path=b"\xff\xfe")]),
    "global PAX": (
        archive(
            pax({b"comment": b"git", b"atime": b"1"}, b"g"), member(b"f"), pax({b"mtime": b"8"}), pax(b"", b"g"), member(b"g"), member(b"h")
        ),
        [like(path=b"f"), like(path=b"g", mtime=8), like(path=b"h", mtime=0)],
    ),
    "hard link with the size of its file": (
        archive(member(b"f", "f", b"abc"), member(b"h with size", "h", link=b"f", size=3), member(b"g")),
        [like(path=b"f"), like(path=b"h with size", kind="h", size=0, content=b""), like(path=b"g")],
    ),
    "base-256": (
        archive(
            member(b"f", uid=base256(4294967294, 8), gid=base256(3000000, 8), mtime=base256(1 << 31, 12), size=base256(1, 12), data=b"x")
        ),
        [like(uid=4294967294, gid=3000000, mtime=1 << 31, content=b"x")],
    ),
    "numbers with blanks": (
        archive(member(b"f", mode=b"   644 \0", uid=b"7 \0", gid=b"     10\0", size=b"          1 ", data=b"x")),
        [like(mode=0o644, uid=7, gid=8, content=b"x")],
    ),
    "file type in the mode": (archive(member(b"f", mode=0o100755)), [like(mode=0o755)]),
    "checksum of signed bytes": (
        archive(header(b"\xe4\xf6", checksum=sum(header(b"\xe4\xf6")) - sum(header(b"\xe4\xf6")[148:156]) + 256 - 512)),
        [like(path=b"\xe4\xf6")],
    ),
    "the root": (archive(member(b"./", "d"), member(b"/", "d"), member(b".", "d")), [like(path=b"", kind="d")] * 3),
    "names to normalise": (
        archive(member(b"/a"), member(b"./a//b/"), member(b"a/./b"), member(b"///", "d"), member(b"./.a"), member(b"..a/...")),
        [like(path=b"a"), like(path=b"a/b", kind="d"), like(path=b"a/b"), like(path=b""), like(path=b".a"), like(path=b"..a/...")],
    ),
    "strange names": (
        archive(member(b"\xff\x80"), member(b"a\nb"), member(b"\x1b[31m"), member(b"\\"), member(b"a b")),
        [like(path=b"\xff\x80"), like(path=b"a\nb"), like(path=b"\x1b[31m"), like(path=b"\\"), like(path=b"a b")],
    ),
    "a component of 255": (archive(member(b"x/" + b"n" * 255)), [like(path=b"x/" + b"n" * 255)]),
    "a path of 5000": (archive(member(b"dir/" * 1250 + b"f")), [like(path=b"dir/" * 1250 + b"f")]),
    "no end": (member(b"f", "f", b"x"), [like(path=b"f", content=b"x")]),
    "half an end": (member(b"f", "f", b"x") + bytes(512), [like(path=b"f", content=b"x")]),
    "something after the end": (archive(member(b"f")) + member(b"g") + b"junk", [like(path=b"f")]),
    "old GNU sparse": (
        archive(old_gnu(EXTENTS, 5005, SPARSE), member(b"g")),
        [like(path=b"s", kind="f", size=5005, content=EXPANDED), like(path=b"g")],
    ),
    "old GNU sparse, more blocks": (
        archive(old_gnu([(n * 1000, 1) for n in range(60)], 60000, b"z" * 60), member(b"g")),
        [like(size=60000, content=(b"z" + bytes(999)) * 60, sparse=[(n * 1000, 1) for n in range(60)]), like(path=b"g")],
    ),
    "old GNU sparse, ends in a hole": (archive(old_gnu([(0, 10), (1 << 20, 0)], 1 << 20, SPARSE)), [like(size=1 << 20, sparse=[(0, 10)])]),
    "PAX sparse 0.0": (archive(pax(sparse_records(EXTENTS, 5005)), member(b"s", "f", SPARSE)), [like(path=b"s", content=EXPANDED)]),
    "PAX sparse 0.1": (
        archive(
            pax(
                {
                    b"GNU.sparse.size": b"5005",
                    b"GNU.sparse.numblocks": b"3",
                    b"GNU.sparse.name": b"s",
                    b"GNU.sparse.map": sparse_map(EXTENTS),
                }
            ),
            member(b"GNUSparseFile.0/s", "f", SPARSE),
            member(b"g"),
        ),
        [like(path=b"s", content=EXPANDED), like(path=b"g")],
    ),
    "PAX sparse 1.0": (archive(version_1(b"5005", lines(EXTENTS)), member(b"g")), [like(path=b"s", content=EXPANDED), like(path=b"g")]),
    "PAX sparse 1.0, long map": (
        archive(version_1(b"60000", lines([(n * 1000, 1) for n in range(60)]), b"z" * 60), member(b"g")),
        [like(path=b"s", content=(b"z" + bytes(999)) * 60), like(path=b"g")],
    ),
    "PAX sparse, all hole": (
        archive(version_1(b"99999", lines([(99999, 0)]), b"")),
        [like(path=b"s", size=99999, sparse=[], content=bytes(99999))],
    ),
}

# What the listings of others do not show, or not all of them accept
ONLY_OURS: Cases = {
    "numbers left out": (archive(member(b"f", mode=b"", uid=b"", gid=b"        ", mtime=b"")), [like(mode=0, uid=0, gid=0, mtime=0)]),
    "junk behind a number": (archive(member(b"f", uid=b"7 \0junk")), [like(uid=7)]),
    "mtime before 1970": (
        archive(member(b"f", mtime=base256(-1, 12)), member(b"g", records={b"mtime": b"-1.5"})),
        [like(mtime=0), like(mtime=0)],
    ),
    "mtime after 2106": (
        archive(member(b"f", mtime=base256(1 << 32, 12)), member(b"g", records={b"mtime": b"9223372036854775808"})),
        [like(mtime=(1 << 32) - 1)] * 2,
    ),
    "nothing at all": (b"", []),
    "star's devices": (archive(member(b"f", "c", records={b"SCHILY.devmajor": b"10", b"SCHILY.devminor": b"229"})), [like(rdev=(10, 229))]),
    "star's xattrs": (
        archive(
            member(
                b"f",
                records={
                    b"SCHILY.xattr.user.a": b"=\n\0",
                    b"SCHILY.xattr.user.e": b"",
                    b"SCHILY.xattr.security.capability": b"\1",
                    b"SCHILY.xattr.security.selinux": b"x",
                    b"SCHILY.xattr.user.overlay.opaque": b"y",
                    b"SCHILY.xattr.user.": b"z",
                    b"SCHILY.xattr.trusted.overlay.opaque": b"y",
                    b"SCHILY.xattr.system.posix_acl_access": b"x",
                    b"SCHILY.xattr.": b"",
                },
            )
        ),
        [like(xattrs={b"user.a": b"=\n\0", b"user.e": b"", b"security.capability": b"\1"})],
    ),
    "libarchive's xattrs": (
        archive(
            member(
                b"f", records={b"LIBARCHIVE.xattr.user.%61%3D": b"AAEC/w", b"LIBARCHIVE.xattr.user.b": b"AQ", b"SCHILY.xattr.user.b": b"\1"}
            )
        ),
        [like(xattrs={b"user.a=": b"\0\1\2\xff", b"user.b": b"\1"})],
    ),
    "a value of 64 KiB": (archive(member(b"f", records={b"SCHILY.xattr.user.a": b"v" * 65536})), [like(xattrs={b"user.a": b"v" * 65536})]),
}


# --- refused --------------------------------------------------------------------------------------------------------------


def good_end(block: bytes) -> bytes:
    return archive(block, member(b"after"))


def with_pax(records: Any, **fields: Any) -> bytes:
    return good_end(pax(records) + member(b"f", **fields))


def sparse_0_1(text: bytes, size: int = 5005, data: bytes = SPARSE, **extra: bytes) -> bytes:
    more = {key.replace("_", ".").encode(): value for key, value in extra.items()}
    return with_pax({b"GNU.sparse.size": b"%d" % size, b"GNU.sparse.map": text, **more}, data=data)


REFUSED: dict[str, tuple[bytes, str]] = {
    # names: 1A-1, 1A-2, 1A-17
    "..": (good_end(member(b"..", "d")), '".."'),
    "../x": (good_end(member(b"../x")), '".."'),
    "/../x": (good_end(member(b"/../x")), '".."'),
    "a/../../x": (good_end(member(b"a/../../x")), '".."'),
    "a/..": (good_end(member(b"a/..", "d")), '".."'),
    ".. in a PAX path": (with_pax({b"path": b"a/../b"}), '".."'),
    ".. in a long name": (good_end(gnu_long(b"../" * 100 + b"x") + member(b"f")), '".."'),
    "no name": (good_end(member(b"")), "without a name"),
    "no name, a directory": (good_end(member(b"", "d")), "without a name"),
    "empty long name": (good_end(gnu_long(b"") + member(b"f")), "empty long name"),
    "the root as a link": (good_end(member(b".", "l", link=b"x")), "root"),
    "the root as a link, /": (good_end(member(b"/", "l", link=b"x")), "root"),
    "the root as a file": (good_end(member(b"./.")), "root"),
    "a file called .": (good_end(member(b"a/.")), 'called "."'),
    "a component of 256": (good_end(member(b"x/" + b"n" * 256)), "255"),
    "a name of 65537": (good_end(gnu_long(b"n/" * 32768 + b"n") + member(b"f")), "65536"),
    "NUL in a PAX path": (with_pax({b"path": b"a\0b"}), "NUL"),
    "NUL in a PAX link": (with_pax({b"linkpath": b"a\0b"}, kind="l"), "NUL"),
    "NUL in a long name": (good_end(gnu_long(b"a\0b") + member(b"f")), "NUL"),
    "empty PAX path": (with_pax({b"path": b""}), "empty"),
    "a file with a slash and data": (good_end(member(b"d/", "f", b"x")), 'ends in "/"'),
    "an old directory with data": (good_end(member(b"d/", b"\0", b"x")), 'ends in "/"'),
    # links: 1A-4
    "hard link to ..": (good_end(member(b"h", "h", link=b"../victim")), '".."'),
    "hard link to nothing": (good_end(member(b"h", "h")), "hard link to the root"),
    "hard link to the root": (good_end(member(b"h", "h", link=b"/./")), "hard link to the root"),
    "link to nothing": (good_end(member(b"l", "l")), "symbolic link to 0 bytes"),
    "link to 4096 bytes": (good_end(member(b"l", "l", link=b"x" * 4096)), "symbolic link to 4096 bytes"),
    # numbers: 1A-12, 1A-14, 1A-19
    "uid -1": (good_end(member(b"f", uid=base256(-1, 8))), "-1 is not"),
    "uid 2**32-1": (good_end(member(b"f", uid=base256((1 << 32) - 1, 8))), "4294967295 is not"),
    "gid 2**32": (good_end(member(b"f", gid=base256(1 << 32, 8))), "4294967296 is not"),
    "uid 2**55": (good_end(member(b"f", uid=base256(1 << 55, 8)[:8])), "is not"),
    "PAX uid 2**32": (with_pax({b"uid": b"4294967296"}), "4294967296 is not"),
    "PAX gid 2**63": (with_pax({b"gid": b"9223372036854775808"}), "is not"),
    "PAX uid -1": (with_pax({b"uid": b"-1"}), "'-1' is not"),
    "PAX uid empty": (with_pax({b"uid": b""}), "is not"),
    **{f"PAX uid {text}": (with_pax({b"uid": text.encode()}), "is not") for text in ("+1", " 1", "1 ", "0x1", "1_0", "1e3", "root")},
    "PAX uid of 5000 digits": (with_pax({b"uid": b"1" * 5000}), "is not"),
    **{
        f"octal {text!r}": (good_end(member(b"f", uid=text)), "is not a")
        for text in (b"8", b"0o7", b"1_1", b"-1", b"+1", b"7 7", b"0x1", b"\x81\0", b"\0\0007")
    },
    "size negative": (good_end(member(b"f", size=base256(-512, 12))), "a size of -512"),
    "size 2**63": (good_end(member(b"f", size=base256(1 << 63, 12))), "a size of"),
    "PAX size negative": (with_pax({b"size": b"-1"}), "is not"),
    "PAX size 2**64": (with_pax({b"size": b"18446744073709551616"}), "a size of"),
    "PAX time": (with_pax({b"mtime": b"1.5.5"}), "is not a time"),
    "PAX time, exponent": (with_pax({b"mtime": b"1e9"}), "is not"),
    "checksum": (good_end(header(b"f", checksum=1)), "checksum"),
    "major 4096": (good_end(member(b"f", "c", rdev=(4096, 0))), "device number"),
    "minor 2**32": (good_end(member(b"f", "b", rdev=(0, base256(1 << 32, 8)))), "device number"),
    "minor negative": (good_end(member(b"f", "b", rdev=(0, base256(-1, 8)))), "device number"),
    # what the headers say together: 1A-13
    "PAX size of a directory": (with_pax({b"size": b"512"}, kind="d"), "no regular file"),
    "PAX size of a link": (with_pax({b"size": b"512"}, kind="l", link=b"x"), "no regular file"),
    "PAX size of a hard link": (with_pax({b"size": b"512"}, kind="h", link=b"x"), "no regular file"),
    "directory with data": (good_end(member(b"d", "d", b"x")), "no regular file"),
    "FIFO with data": (good_end(member(b"p", "p", b"x")), "no regular file"),
    "PAX and GNU disagree": (good_end(pax({b"path": b"a"}) + gnu_long(b"b") + member(b"f")), "disagree on its path"),
    "GNU and PAX disagree": (
        good_end(gnu_long(b"b", b"K") + pax({b"linkpath": b"a"}) + member(b"f", "l", link=b"x")),
        "disagree on its linkpath",
    ),
    "two PAX headers": (good_end(pax({b"path": b"a"}) + pax({b"uid": b"1"}) + member(b"f")), "second PAX header"),
    "two long names": (good_end(gnu_long(b"a") + gnu_long(b"a") + member(b"f")), "second long name"),
    "a chain of global headers": (good_end(pax({b"comment": b""}, b"g") * 17 + member(b"f")), "more than 16"),
    **{f"global {key!r}": (good_end(pax({key: b"1"}, b"g")), "for all") for key in (b"mtime", b"uid", b"gid", b"linkpath")},
    "magic": (good_end(member(b"f", magic=b"ustar \0\0")), "magic"),
    "a file called /": (good_end(member(b"//")), 'ends in "/"'),
    "global path": (good_end(pax({b"path": b"x"}, b"g")), "sets path for all"),
    "global size": (good_end(pax({b"size": b"1"}, b"g")), "sets size for all"),
    "global xattr": (good_end(pax({b"SCHILY.xattr.user.a": b"1"}, b"g")), "for all"),
    "global sparse": (good_end(pax({b"GNU.sparse.map": b"1,1"}, b"g")), "for all"),
    "extended header of nothing": (archive(pax({b"path": b"x"})), "after an extended header"),
    **{
        f"type {flag!r}": (good_end(member(b"f", flag)), "is not known")
        for flag in (b"V", b"M", b"D", b"A", b"X", b"N", b"Z", b"8", b"\xff")
    },
    "lone block of zeros": (member(b"f") + bytes(512) + member(b"g") + END, "single block of zeros"),
    "no tar": (b"just some text ".ljust(1024, b"."), "checksum"),
    "gzip": (b"\x1f\x8b\x08".ljust(512, b"\1"), "checksum"),
    # PAX records
    **{
        f"record {text!r}": (with_pax(text), "PAX record")
        for text in (
            b"\n",
            b"5",
            b"0 a=b\n",
            b"6 a=b\n5",
            b"7 a=b\n",
            b"5 a=b\n",
            b"6 a=bc",
            b"+6 a=b\n",
            b"-6 a=b\n",
            b" 6 a=b\n",
            b"6  a=b\n"[:6],
            b"5 ab\n",
            b"4 =\n",
            b"6 a=b\n\0",
            b"a=b\n",
            b"99999999 a=b\n",
            b"1 ",
            b"2 \n",
            b"3 \n\n",
            b"6\0a=b\n",
            b"6 a=b\n 6 a=b\n",
        )
    },
    "xattr of 65537 bytes": (with_pax({b"SCHILY.xattr.user.a": b"x" * 65537}), "too long"),
    "xattr name of 256 bytes": (with_pax({b"SCHILY.xattr.user." + b"n" * 251: b"x"}), "too long"),
    "xattr name with NUL": (with_pax({b"SCHILY.xattr.user.\0": b"x"}), "extended attribute"),
    "xattr not base64": (with_pax({b"LIBARCHIVE.xattr.user.a": b"?"}), "base64"),
    # claims: 1A-14
    **{
        f"{name} of {size}": (archive(block), "are read")
        for size in ((1 << 20) + 1, 1 << 36, (1 << 63) - 1)
        for name, block in (
            ("L", gnu_long(b"n", size=size)),
            ("K", gnu_long(b"n", b"K", size=size)),
            ("x", pax(b"", size=size)),
            ("g", pax(b"", b"g", size=size)),
        )
    },
    "negative extended header": (archive(pax(b"", size=base256(-1, 12))), "a size of -1"),
    "an extended header that ends early": (pax(b"", size=1 << 20), "ends inside"),
    # sparse files: 1A-16
    "sparse overlap": (sparse_0_1(b"0,5,4,5"), "overlap"),
    "sparse unsorted": (sparse_0_1(b"10,5,0,5"), "unsorted"),
    "sparse outside": (sparse_0_1(b"5000,10"), "outside"),
    "sparse outside, far": (sparse_0_1(b"9223372036854775807,10"), "outside"),
    "sparse with too little data": (sparse_0_1(b"0,5"), "stored"),
    "sparse with too much data": (sparse_0_1(b"0,11"), "stored"),
    "sparse odd": (sparse_0_1(b"0,5,6"), "incomplete"),
    "sparse no number": (sparse_0_1(b"0,-5"), "is not"),
    "sparse empty number": (sparse_0_1(b"0,,5"), "is not"),
    "sparse numblocks": (sparse_0_1(b"0,10", GNU_sparse_numblocks=b"2"), "as many"),
    "sparse version": (sparse_0_1(b"0,10", GNU_sparse_major=b"2", GNU_sparse_minor=b"0"), "unknown format"),
    "sparse two sizes": (sparse_0_1(b"0,10", GNU_sparse_realsize=b"1"), "two"),
    "sparse two maps": (with_pax([*sparse_records([(0, 10)], 10), (b"GNU.sparse.map", b"0,10")], data=SPARSE), "two sparse maps"),
    "sparse no size": (with_pax({b"GNU.sparse.map": b"0,10"}, data=SPARSE), "missing"),
    "sparse out of order": (with_pax([(b"GNU.sparse.numbytes", b"1"), (b"GNU.sparse.offset", b"1")]), "out of order"),
    "sparse directory": (with_pax({b"GNU.sparse.size": b"0", b"GNU.sparse.map": b""}, kind="d"), "unknown format"),
    "sparse of 65537 extents": (sparse_0_1(b",".join(b"%d,0" % n for n in range(65537)), 1 << 20, b""), "more than 65536"),
    "sparse 1.0, 65537": (good_end(version_1(b"99999999", b"65537\n" + b"1\n0\n" * 65537, b"")), "more than 65536"),
    "sparse 1.0, no end": (good_end(version_1(b"5", b"3\n0\n1\n", b"")), "incomplete"),
    "sparse 1.0, no number": (good_end(version_1(b"5", b"1\n0\nx\n", b"")), "is not"),
    "sparse 1.0, a line without end": (good_end(version_1(b"5", b"1" * 600, b"")), "incomplete"),
    "old GNU sparse, overlap": (good_end(old_gnu([(0, 6), (5, 4)], 10, SPARSE)), "overlap"),
    "old GNU sparse, outside": (good_end(old_gnu([(0, 10)], 9, SPARSE)), "outside"),
    "old GNU sparse, size negative": (good_end(old_gnu([(0, 10)], 9, SPARSE, patch={483: base256(-1, 12)})), "a size of -1"),
    "old GNU sparse, ends and goes on": (good_end(old_gnu([(0, 10)], 10, SPARSE, patch={482: b"\1"})), "goes on"),
    "old GNU sparse, 65537": (old_gnu([(n, 0) for n in range(65560)], 65560, b""), "more than 65536"),
    "old GNU sparse in ustar": (good_end(member(b"s", b"S")), "unknown format"),
    "sparse twice": (good_end(pax(sparse_records([(0, 10)], 10)) + old_gnu([(0, 10)], 10, SPARSE)), "unknown format"),
}
