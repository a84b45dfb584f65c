"""The tar reader: what it accepts, what it refuses and how, and that it is bounded whatever the archive claims."""

from __future__ import annotations

import os
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tar_cases import ACCEPTED, EXTENTS, ONLY_OURS, REFUSED, SPARSE, lines, old_gnu, version_1
from tar_fixtures import END, archive, base256, header, member, pax

from convert.tar import Limits, Member, Reader, index
from sciexec.errors import ImageError, LimitError

MIXED = archive(*(data[: -len(END)] for data, _ in ACCEPTED.values() if data.endswith(END)))


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def read(data: bytes, size: int = 1 << 20, limits: Limits | None = None) -> list[tuple[Member, bytes]]:
    """All members with their content, holes filled."""
    reader = Reader(chunked(data, size), limits, "layer 3")
    return [(m, b"".join(bytes(piece) for piece in reader.pieces())) for m in reader]  # bytes(N) is a hole of N zeros


def attributes(m: Member) -> tuple[Any, ...]:
    return tuple(getattr(m, name) for name in Member.__slots__)


# --- accepted and refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ACCEPTED, *ONLY_OURS])
def test_accepted(name: str) -> None:
    data, expected = {**ACCEPTED, **ONLY_OURS}[name]
    found = read(data)
    assert [
        {key: content if key == "content" else getattr(m, key) for key in want} for (m, content), want in zip(found, expected)
    ] == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    data, cause = REFUSED[name]
    tracemalloc.start()
    with pytest.raises(ImageError) as caught:
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cause in caught.value.message
    assert caught.value.message.startswith("reading layer 3: ")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 800
    assert peak < 32 << 20


def test_the_error_names_the_member_or_the_place() -> None:
    with pytest.raises(ImageError, match=re.escape("reading layer 3: a/\\x1b/../b: the name contains")):
        read(archive(member(b"first"), member(b"a/\x1b/../b")))
    with pytest.raises(ImageError, match="reading layer 3: header at byte 512: the header's checksum"):
        read(member(b"first") + b"?" * 512)
    with pytest.raises(ImageError, match="reading layer 3: second: the archive ends inside its data"):
        read(member(b"first") + member(b"second", "f", b"x" * 600)[:-1])


# --- limits ---------------------------------------------------------------------------------------------------------------


def test_limits_are_shared_by_the_layers_of_an_image() -> None:
    limits = Limits(max_entries=3)
    read(archive(member(b"a"), member(b"b")), limits=limits)
    with pytest.raises(LimitError, match="reading layer 3: more than 3 members") as caught:
        read(archive(member(b"a"), member(b"b")), limits=limits)
    assert "--max-entries" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        archive(member(b"f", "f", bytes(1001))),
        archive(member(b"f", "f", bytes(500)), member(b"g", "f", bytes(501))),
        archive(member(b"f", size=1001)),
        archive(version_1(b"%d" % ((1 << 63) - 1), lines([(0, 10)]))),
        archive(old_gnu([(0, 10)], 1001, SPARSE)),
        archive(end=bytes(2048)),
    ],
    ids=["a file", "two files", "a claim", "a hole of 8 EiB", "a hole", "padding"],
)
def test_bytes_are_limited(data: bytes) -> None:
    with pytest.raises(LimitError) as caught:
        read(data, size=512, limits=Limits(max_bytes=1000))
    assert "--max-bytes" in caught.value.hint


def test_endless_headers_are_read_in_linear_time_and_little_memory() -> None:
    one = pax([(b"path", b"p" * 200)] * 400) + member(b"f")

    def endless() -> Iterator[bytes]:
        while True:
            yield one

    tracemalloc.start()
    with pytest.raises(LimitError):
        for _ in Reader(endless(), Limits(max_entries=100)):
            pass
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


# --- the stream -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 10240])
def test_chunks_may_end_anywhere(size: int) -> None:
    whole = read(MIXED)
    assert len(whole) > 60
    assert [(attributes(m), content) for m, content in read(MIXED, size)] == [(attributes(m), content) for m, content in whole]


@pytest.mark.parametrize("size", [100, 512, 1 << 20])
def test_data_not_read_is_passed_over(size: int) -> None:
    whole = read(MIXED)
    reader = Reader(chunked(MIXED, size))
    for n, (m, (_, content)) in enumerate(zip(reader, whole)):
        if n % 3 == 1:
            next(reader.data(), None)  # and leave the rest
        elif n % 3 == 2 and m.sparse is None:
            assert b"".join(reader.data()) == content
        assert attributes(m) == attributes(whole[n][0])


def test_data_are_views_of_the_chunks() -> None:
    chunk = member(b"f", "f", b"x" * 5000)
    reader = Reader([chunk])
    views = [view for _ in reader for view in reader.data()]
    assert [view.obj is chunk for view in views] == [True]


def test_the_chunks_are_read_to_their_end() -> None:
    """Whoever makes them compares digests there."""
    seen = []

    def chunks() -> Iterator[bytes]:
        yield archive(member(b"f"))
        yield b"padding"
        seen.append("end")

    assert len(list(Reader(chunks()))) == 1
    assert seen == ["end"]


def test_what_was_left_out_is_counted() -> None:
    reader = Reader([ONLY_OURS["star's xattrs"][0]])
    assert len(list(reader)) == 1
    assert reader.dropped_xattrs == 6


def test_truncated_anywhere_but_between_members() -> None:
    members = [
        member(b"a", "f", b"x" * 700),
        pax({b"path": b"b", b"size": b"3"}) + member(b"f", "f", b"abc"),
        old_gnu([(n * 1000, 1) for n in range(6)], 6000, b"z" * 6),
        version_1(b"5005", lines(EXTENTS)),
        member(b"d", "d"),
    ]
    data = archive(*members)
    boundaries = {len(b"".join(members[:n])): n for n in range(len(members) + 1)}  # offset -> members before it
    boundaries[len(data) - 512] = len(members)
    for n, stored in ((1, 700), (2, 3), (3, 6)):  # without the padding of a member's data; umoci insert leaves it out
        boundaries[len(b"".join(members[:n])) - -stored % 512] = n
    whole = [attributes(m) for m, _ in read(data)]
    cuts = {*range(0, len(data), 61), *(edge + n for edge in range(512, len(data), 512) for n in (-1, 0, 1))}
    for cut in sorted({*cuts, *boundaries}):
        if cut in boundaries:
            assert [attributes(m) for m, _ in read(data[:cut])] == whole[: boundaries[cut]]
        else:
            with pytest.raises(ImageError, match=r"ends inside|ends after"):
                read(data[:cut])


# --- archives on disk -----------------------------------------------------------------------------------------------------


def test_index_finds_the_data(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(MIXED)
    with path.open("rb") as file:
        members = index(file.fileno())
        assert [attributes(m) for m in members] == [attributes(m) for m, _ in read(MIXED)]
        for m, (_, content) in zip(members, read(MIXED)):
            if m.sparse is None:
                assert os.pread(file.fileno(), m.size, m.offset) == content


def test_index_passes_over_data_and_sees_where_they_end(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    huge = 1 << 40
    first = header(b"huge", "f", base256(huge, 12))
    with path.open("w+b") as file:
        file.write(first)
        file.seek(512 + huge)
        file.write(archive(member(b"after", "f", b"x")))
        file.flush()
        found = index(file.fileno(), limits=Limits(max_bytes=2 * huge))
        assert [(m.path, m.offset) for m in found] == [(b"huge", 512), (b"after", 1024 + huge)]
        file.truncate(512 + huge - 1)
        with pytest.raises(ImageError, match="reading the archive: huge: the archive ends inside its data"):
            index(file.fileno(), "the archive", Limits(max_bytes=2 * huge))
