"""The tar reader against GNU tar and libarchive, on their archives, on ours, and on what chance makes of both."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_cases import ACCEPTED, REFUSED
from tar_fixtures import GNU, POSIX, V7, archive, gnu_long, header, member, padded, pax
from test_tar import MIXED, read

from convert.tar import Limits, Member
from sciexec.errors import ImageError

LETTERS = {"f": "-", "d": "d", "l": "l", "h": "h", "c": "c", "b": "b", "p": "p"}

# --- the listings of others -------------------------------------------------------------------------------------------------


def unescaped(name: bytes) -> bytes:
    """GNU tar's --quoting-style=escape, and what bsdtar does by itself."""
    letters = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"a": b"\a", b"f": b"\f", b"v": b"\v"}

    def one(match: re.Match[bytes]) -> bytes:
        code = match.group(1)
        return bytes([int(code, 8)]) if len(code) == 3 else letters.get(code, code)

    return re.sub(rb"\\([0-7]{3}|.)", one, name)


def plain(path: bytes) -> bytes:
    return b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))


def gnu_tar(data: bytes) -> list[tuple[Any, ...]] | None:
    """(letter and mode, owner, size or device, time, path, link) as GNU tar lists them; None if it complains."""
    command = ["tar", "--list", "--verbose", "--numeric-owner", "--quoting-style=escape", "--full-time", "--file=-"]
    done = subprocess.run(
        command, input=data, env={"LC_ALL": "C", "TZ": "UTC0", "PATH": os.environ["PATH"]}, capture_output=True, check=False
    )
    if done.returncode:
        return None
    listed = []
    for line in done.stdout.splitlines():
        match = re.fullmatch(rb"(\S{10}) (\d+/\d+) +(\S+) (\S+ [\d:]+)\S* +(.*)", line)
        assert match, line
        mode, owner, size, date, name = match.groups()
        path, _, link = name.partition(b" link to " if mode.startswith(b"h") else b" -> ")
        link = unescaped(link)
        listed.append((mode, owner, size, date, plain(unescaped(path)), plain(link) if mode.startswith(b"h") else link))
    return listed


def bsdtar(data: bytes) -> list[tuple[Any, ...]] | None:
    """(letter and mode, owner, path) as libarchive lists them; None if it complains."""
    environment = {"LC_ALL": "C", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bsdtar", "--numeric-owner", "-tvf", "-"], input=data, env=environment, capture_output=True, check=False)
    if done.returncode:
        return None
    listed = []
    for line in done.stdout.splitlines():
        match = re.fullmatch(rb"(\S{10}) +\d+ (\d+) +(\d+) +(?:\d+|\d+,\d+) +(?:\w+ +\d+ +[\d:]+) (.*)", line)
        assert match, line
        mode, uid, gid, name = match.groups()
        listed.append((mode, uid + b"/" + gid, plain(unescaped(re.split(b" -> | link to ", name)[0]))))
    return listed


def as_gnu_tar(m: Member, flag_7: bool = False) -> tuple[Any, ...]:
    letter = "C" if flag_7 else LETTERS[m.kind]
    size = f"{m.rdev[0]},{m.rdev[1]}" if m.kind in "cb" else str(m.size)
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(m.mtime))
    return ((letter + stat.filemode(m.mode)[1:]).encode(), b"%d/%d" % (m.uid, m.gid), size.encode(), date.encode(), m.path, m.link)


def as_bsdtar(m: Member) -> tuple[Any, ...]:
    letter = "-" if m.path == b"h with size" else LETTERS[m.kind]  # libarchive takes such a hard link for a file that may have data
    return ((letter + stat.filemode(m.mode)[1:]).encode(), b"%d/%d" % (m.uid, m.gid), m.path)


@pytest.mark.parametrize("name", ACCEPTED)
def test_gnu_tar_lists_the_same(name: str) -> None:
    data = ACCEPTED[name][0]
    listed = gnu_tar(data)
    assert listed is not None
    assert [as_gnu_tar(m, flag_7=m.path == b"7") for m, _ in read(data)] == listed


@pytest.mark.parametrize("name", ACCEPTED)
def test_bsdtar_lists_the_same(name: str, need: Callable[..., str]) -> None:
    need("bsdtar")
    data = ACCEPTED[name][0]
    listed = bsdtar(data)
    assert listed is not None
    assert [as_bsdtar(m) for m, _ in read(data)] == listed


# --- archives of others -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    (root / "sub/deeper").mkdir(parents=True)
    for size in (0, 1, 511, 512, 513, 100_000):
        (root / f"sub/size{size}").write_bytes(os.urandom(size))
    (root / "sub/size1").chmod(0o4711)
    (root / "link").symlink_to("sub/../sub/size1")
    os.link(root / "sub/size513", root / "sub/deeper/hard")
    os.mkfifo(root / "fifo", 0o600)
    os.utime(root / "sub/size0", ns=(10**18 + 5, 10**18 + 5))
    with (root / "holes").open("wb") as file:
        for n in range(40):
            file.seek(n << 16)
            file.write(b"%d" % n)
        file.truncate(3 << 20)
    return root


@pytest.fixture(scope="module")
def tree_with_long_names(tree: Path) -> Path:
    copy = tree.with_name("long")
    subprocess.run(["cp", "-a", tree, copy], check=True)
    (copy / ("n" * 200)).mkdir()
    (copy / ("n" * 200) / ("m" * 200)).write_text("long\n")
    (copy / "longlink").symlink_to("t/" * 150)
    os.link(copy / ("n" * 200) / ("m" * 200), copy / "hard")
    (copy / os.fsdecode(b"\xff\xc3\xa4\n")).write_text("strange\n")
    return copy


def same_as_tree(data: bytes, root: Path, without: frozenset[bytes] = frozenset()) -> None:
    """Every file of the tree, with its content, as the archive has it; hard links as one of the names with a file."""
    found = {m.path: (m, content) for m, content in read(data, 10240)}
    names = {b""} | {os.fsencode(path.relative_to(root)) for path in root.rglob("*")}
    assert found.keys() == names - without
    for name, (m, content) in found.items():
        status = os.lstat(os.path.join(os.fsencode(root), name))
        assert (m.uid, m.gid, m.mtime) == (status.st_uid, status.st_gid, int(status.st_mtime_ns // 10**9)), name
        if m.kind == "h":
            assert os.path.samefile(os.path.join(os.fsencode(root), m.link), os.path.join(os.fsencode(root), name))
            continue
        assert stat.filemode(status.st_mode) == as_gnu_tar(m)[0].decode()
        if m.kind == "f":
            assert content == Path(os.fsdecode(os.path.join(os.fsencode(root), name))).read_bytes()
        elif m.kind == "l":
            assert m.link == os.fsencode(os.readlink(os.path.join(os.fsencode(root), name)))


FORMATS = ["v7", "ustar", "oldgnu", "gnu", "posix"]


def gnu_tar_of(root: Path, *options: str) -> bytes:
    return subprocess.run(["tar", "-C", root, *options, "-c", "."], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("format", FORMATS)
def test_gnu_tar_wrote_it(format: str, tree: Path) -> None:
    if format == "v7":  # knows no FIFO
        same_as_tree(gnu_tar_of(tree, "--format=v7", "--exclude=./fifo"), tree, frozenset([b"fifo"]))
    else:
        same_as_tree(gnu_tar_of(tree, f"--format={format}"), tree)


@pytest.mark.parametrize("format", FORMATS[2:])
def test_gnu_tar_wrote_long_names(format: str, tree_with_long_names: Path) -> None:
    same_as_tree(gnu_tar_of(tree_with_long_names, f"--format={format}"), tree_with_long_names)


SPARSE_FORMATS = [["--format=oldgnu"], ["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]


@pytest.mark.parametrize("options", SPARSE_FORMATS, ids=" ".join)
def test_gnu_tar_wrote_sparse_files(options: list[str], tree: Path) -> None:
    """`holes` has data in 40 places: more than an old GNU header and one block after it can hold."""
    data = gnu_tar_of(tree, *options, "--sparse")
    same_as_tree(data, tree)
    sparse = [m.sparse for m, _ in read(data) if m.path == b"holes"]
    assert sparse[0] and len(sparse[0]) == 40
    assert len(data) < 1 << 20


@pytest.mark.parametrize("format", ["pax", "ustar", "gnutar"])
def test_bsdtar_wrote_it(format: str, tree: Path, need: Callable[..., str]) -> None:
    need("bsdtar")
    data = subprocess.run(["bsdtar", "-C", tree, f"--format={format}", "-cf", "-", "."], stdout=subprocess.PIPE, check=True).stdout
    same_as_tree(data, tree)


# --- chance -----------------------------------------------------------------------------------------------------------------

COMPONENTS = st.binary(min_size=1, max_size=255).filter(lambda name: name not in (b".", b"..") and not {0, ord("/")} & set(name))
NAMES = st.lists(COMPONENTS, min_size=1, max_size=4).map(b"/".join)
IDS = st.integers(0, (1 << 32) - 2)
FIELDS = st.fixed_dictionaries({"mode": st.integers(0, 0o7777), "uid": IDS, "gid": IDS, "mtime": st.integers(0, (1 << 32) - 1)})


Wanted = tuple[bytes, str, bytes, bytes, dict[str, Any], bool]


def written(name: bytes, kind: str, content: bytes, target: bytes, fields: dict[str, Any], with_pax: bool) -> bytes:
    content = content if kind == "f" else b""
    link = target if kind in "lh" else b""
    if with_pax:
        records = {key.encode(): b"%d" % fields[key] for key in ("uid", "gid", "mtime")}
        return member(name, kind, content, link=link, mode=fields["mode"], records=records)
    long = (gnu_long(name) if len(name) > 100 else b"") + (gnu_long(link, b"K") if len(link) > 100 else b"")
    return long + header(name[:100], kind, len(content), link=link[:100], magic=GNU, **fields) + padded(content)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from("fdlhp"), st.binary(max_size=1500), NAMES, FIELDS, st.booleans()), max_size=6),
    st.integers(1, 2000),
)
def test_what_is_written_is_read(wanted: list[Wanted], size: int) -> None:
    found = read(archive(*(written(*one) for one in wanted)), size)
    assert len(found) == len(wanted)
    for (m, content), (name, kind, data, target, fields, _) in zip(found, wanted):
        assert (m.path, m.kind, content, m.link) == (name, kind, data if kind == "f" else b"", target if kind in "lh" else b"")
        assert {key: getattr(m, key) for key in fields} == fields


def mended(data: bytes) -> bytes:
    """Every block that looks like a header gets the right checksum, so that changes to it are seen by more than the checksum."""
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    for n, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            blocks[n] = block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256) + block[156:]
    return b"".join(blocks)


TELLING = [
    *(b"\0" * 12, b"\xff" * 12, b"\x80" + b"\0" * 11, b"77777777777\0", b"../", b"/", b"\n", b" ", b"="),
    *(b"g", b"x", b"L", b"K", b"S", b"0", b"1", b"2", b"3", b"5", b"99", b"GNU.sparse.major=1"),
]
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from(TELLING))),
    min_size=1,
    max_size=6,
)


VICTIMS = [*(data for data, _ in ACCEPTED.values()), *(data for data, _ in REFUSED.values() if len(data) < 20000), MIXED[:30000]]


@settings(max_examples=400, deadline=2000)
@given(st.sampled_from(VICTIMS), CHANGES, st.booleans())
def test_damage_is_an_error_or_another_archive(data: bytes, changes: list[tuple[float, bytes]], mend: bool) -> None:
    damaged = bytearray(data or bytes(512))
    for place, text in changes:
        start = int(place * len(damaged))
        damaged[start : start + len(text)] = text
    result = mended(bytes(damaged)) if mend else bytes(damaged)
    try:
        found = read(result, limits=Limits(max_entries=1000, max_bytes=1 << 24))
    except ImageError as error:
        assert error.message.isprintable()
        return
    for m, content in found:
        assert len(content) == m.size
        assert not {b"", b".", b".."} & set(m.path.split(b"/")) or (m.path == b"" and m.kind == "d")
        assert 0 <= m.mtime < 1 << 32 and 0 <= m.uid < (1 << 32) - 1 and 0 <= m.gid < (1 << 32) - 1 and 0 <= m.mode < 1 << 12


EXTENSIONS = [
    *(pax({b"path": b"p"}), pax({b"path": b"p/"}), pax({b"linkpath": b"l"}), pax({b"mtime": b"1.5", b"uid": b"7"})),
    *(pax({b"size": b"512"}), pax({b"size": b"0"}), gnu_long(b"p"), gnu_long(b"q"), gnu_long(b"l", b"K")),
    *(pax({b"comment": b"c"}, b"g"), pax({b"gid": b"5"}, b"g"), pax({b"size": b"512"}, b"g")),
]
INSIDE = [padded(b"data"), bytes(512), header(b"inner", "f", 0)]
MEMBERS = st.builds(
    lambda kind, name, size, magic, prefix: header(name, kind, size, link=b"t", magic=magic, prefix=prefix),
    st.sampled_from([*"fdlhcbp", b"\0", b"7", b"5", b"x", b"L"]),
    st.sampled_from([b"f", b"d/", b"./e"]),
    st.sampled_from([0, 0, 512]),
    st.sampled_from([POSIX, GNU, V7]),
    st.sampled_from([b"", b"pre"]),
)
BLOCKS = st.one_of(st.sampled_from(EXTENSIONS + INSIDE), MEMBERS)


@settings(max_examples=250, deadline=None)
@given(st.lists(BLOCKS, max_size=7))
def test_gnu_tar_agrees_on_whatever_is_accepted(blocks: list[bytes]) -> None:
    data = archive(*blocks)
    try:
        found = read(data)
    except ImageError:
        return
    listed = gnu_tar(data)
    if listed is not None:
        contiguous = [row[0].startswith(b"C") for row in listed] + [False] * len(found)
        assert [as_gnu_tar(m, flag_7) for (m, _), flag_7 in zip(found, contiguous)] == listed
