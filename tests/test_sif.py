"""The SIF format: what the builder writes, byte for byte; what the reader believes, which is nothing."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sciexec import sif
from sciexec.errors import ImageError, LimitError

CREATED = 1580608922  # 2020-02-02T02:02:02Z
SQUASHFS = bytearray(8192)
SQUASHFS[:4] = b"hsqs"
struct.pack_into("<Q", SQUASHFS, 40, 6000)  # bytes used
struct.pack_into("<Q", SQUASHFS, 64, 4000)  # start of the inode table

Objects = list[tuple[int, str, bytes]]
Make = Callable[..., int]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make([(type, name, data)...], partition) -> fd of a SIF."""

    def build(
        objects: Objects, partition: bytes = bytes(SQUASHFS), *, arch: str = "amd64", created: int = CREATED, parttype: int = 2
    ) -> int:
        fd = os.open(tmp_path / "image.sif", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o755)
        builder = sif.Builder(fd, arch=arch, created=created)
        for datatype, name, data in objects:
            builder.add(datatype, name, data)
        os.pwrite(fd, partition, builder.partition_offset())
        builder.finish(len(partition), parttype=parttype)
        return fd

    return build


def contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


OBJECTS: Objects = [(sif.DEFFILE, "", b"bootstrap: docker\nfrom: x\n"), (sif.GENERIC_JSON, "oci-config.json", b"{}")]


def test_golden_header_and_descriptors(make: Make) -> None:
    """The bytes that Apptainer's library writes for the same three objects at the same time, the UUID apart."""
    data = contents(make(OBJECTS))
    assert data[:48] == bytes.fromhex("23212f7573722f62696e2f656e762072756e2d73696e67756c61726974790a005349465f4d4147494300303100303200")
    assert data[64:128] == bytes.fromhex(
        "9a2d365e00000000 9a2d365e00000000"  # created, modified
        "2d00000000000000 3000000000000000"  # 45 of 48 free
        "0010000000000000 b06d000000000000"  # table: offset 4096, size 28080
        "b07d000000000000 5022000000000000"  # data: offset 32176, size 8784
    )
    assert data[128:4096] == bytes(4096 - 128)
    first, second, third, fourth = (data[start : start + 585] for start in range(4096, 4096 + 4 * 585, 585))
    assert first == bytes.fromhex(
        "01400000 01 01000000 010000f0 00000000"
        "b07d000000000000 1a00000000000000 1a00000000000000"
        "9a2d365e00000000 9a2d365e00000000 0000000000000000 0000000000000000"
    ) + bytes(512)
    assert second == bytes.fromhex(
        "06400000 01 02000000 010000f0 00000000"
        "ca7d000000000000 0200000000000000 0200000000000000"
        "9a2d365e00000000 9a2d365e00000000 0000000000000000 0000000000000000"
    ) + b"oci-config.json".ljust(512, b"\0")
    assert third == bytes.fromhex(
        "04400000 01 03000000 010000f0 00000000"
        "0080000000000000 0020000000000000 3422000000000000"  # at 32768; padded size: 8192 and the gap of 564
        "9a2d365e00000000 9a2d365e00000000 0000000000000000 0000000000000000"
    ) + bytes(128) + bytes.fromhex("01000000 02000000 303200") + bytes(384 - 11)
    assert fourth == bytes(585)
    assert data[32176 : 32176 + 28] == OBJECTS[0][2] + OBJECTS[1][2]
    assert len(data) == 32768 + 8192


def test_uuid_comes_from_the_content(make: Make) -> None:
    once = uuid.UUID(bytes=contents(make(OBJECTS))[48:64])
    assert once.variant == uuid.RFC_4122
    assert once.version == 8
    again = contents(make(OBJECTS))[48:64]
    assert once.bytes == again

    def other(change: int) -> bytes:
        partition = bytearray(SQUASHFS)
        partition[change] ^= 1
        return contents(make(OBJECTS, bytes(partition)))[48:64]

    assert other(4001) != again, "a byte of the inode table counts"
    assert other(8) != again, "a byte of the superblock counts"
    assert other(200) == again, "file data does not: it is not read again"
    assert contents(make(OBJECTS[:1]))[48:64] != again
    assert contents(make([OBJECTS[0], (sif.GENERIC_JSON, "oci-config.json", b"[]")]))[48:64] != again
    assert contents(make(OBJECTS, created=CREATED + 1))[48:64] != again


def test_file_ends_with_the_partition(tmp_path: Path) -> None:
    """A writer may leave more behind the file system than counts, or less than its last page."""
    for written in (bytes(SQUASHFS) * 4, bytes(SQUASHFS[:5000])):
        fd = os.open(tmp_path / "image.sif", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        builder = sif.Builder(fd, arch="arm64", created=0)
        builder.add(sif.DEFFILE, "", b"x")
        os.pwrite(fd, written, builder.partition_offset())
        builder.finish(8192)
        image = sif.read(fd, "image.sif")
        assert os.fstat(fd).st_size == image.primary.offset + 8192
        assert image.arch == image.primary.arch == "arm64"


def test_reading_what_was_built(make: Make) -> None:
    fd = make(OBJECTS)
    image = sif.read(fd, "image.sif")
    assert (image.version, image.arch, image.created, image.modified, image.total, image.free) == ("01", "amd64", CREATED, CREATED, 48, 45)
    assert [(d.id, d.type, d.name, d.group, d.link) for d in image.descriptors] == [
        (1, sif.DEFFILE, "", 1, 0),
        (2, sif.GENERIC_JSON, "oci-config.json", 1, 0),
        (3, sif.PARTITION, "", 1, 0),
    ]
    config = image.find("oci-config.json")
    assert config is not None
    assert sif.read_object(fd, image, config) == b"{}"
    assert (config.fs, config.parttype, config.arch) == (0, 0, "")
    assert (image.primary.fs, image.primary.parttype, image.primary.arch) == (sif.FS_SQUASHFS, sif.PART_PRIMARY, "amd64")
    assert image.by_type(sif.SIGNATURE) is None
    assert image.find("nothing") is None
    with pytest.raises(LimitError):
        sif.read_object(fd, image, image.primary, limit=100)


def test_no_primary_partition(make: Make) -> None:
    image = sif.read(make([], parttype=sif.PART_DATA), "image.sif")
    assert image.arch == "unknown"
    with pytest.raises(ImageError, match="no primary"):
        _ = image.primary


def test_the_builder_refuses_what_does_not_fit(make: Make) -> None:
    with pytest.raises(ValueError):
        make([(sif.GENERIC, "n" * 128, b"")])
    with pytest.raises(ValueError):
        make([(sif.GENERIC, "", b"")] * 48)


names = st.text(max_size=31).map(lambda text: text.replace("\0", ""))
objects = st.lists(st.tuples(st.sampled_from([sif.DEFFILE, sif.GENERIC, sif.GENERIC_JSON]), names, st.binary(max_size=5000)), max_size=8)
fixture_is_fresh = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fixture_is_fresh
@given(objects, st.binary(min_size=1, max_size=9000), st.sampled_from(sorted(sif.ARCHITECTURES)), st.integers(-(2**63), 2**63 - 1))
def test_round_trip(make: Make, written: Objects, partition: bytes, arch: str, created: int) -> None:
    fd = make(written, partition, arch=arch, created=created)
    try:
        image = sif.read(fd, "image.sif")
        *before, last = image.descriptors
        assert [(d.type, d.name, sif.read_object(fd, image, d)) for d in before] == written
        assert image.primary is last
        assert last.offset % 4096 == 0
        assert sif.read_object(fd, image, last) == partition
        assert (image.arch, image.created) == (arch, created)
        assert sum(d.padded_size for d in image.descriptors) == image.data_size
    finally:
        os.close(fd)


def field(slot: int, offset: int) -> int:
    return 4096 + slot * 585 + offset


@pytest.mark.parametrize(
    ("position", "code", "value", "cause"),
    [
        (32, "4s", b"ELF\0", "no magic"),
        (42, "3s", b"02\0", "version"),
        (88, "q", -1, "descriptors"),
        (88, "q", 2**40, "descriptors"),
        (88, "q", 1025, "descriptors"),
        (88, "q", 1024, "outside the file"),
        (96, "q", -1, "outside the file"),
        (96, "q", 0, "outside the file"),
        (96, "q", 2**63 - 1, "outside the file"),
        (field(0, 5), "I", 0, "zero or used twice"),
        (field(0, 5), "I", 2, "zero or used twice"),
        (field(0, 17), "q", -1, "outside the file"),
        (field(0, 17), "q", 2**63 - 1, "outside the file"),
        (field(0, 25), "q", -1, "outside the file"),
        (field(0, 25), "q", 2**63 - 1, "outside the file"),
        (field(2, 25), "q", 0, "outside the file"),
        (field(0, 17), "q", 32177, "overlap"),
        (field(0, 17), "q", 100, "overlap"),
        (field(0, 17), "q", 4096, "overlap"),
        (field(1, 17), "q", 32176, "overlap"),
        (field(1, 25), "q", 5000, "overlap"),
        (field(1, 0), "i", sif.PARTITION, None),
    ],
)
def test_hostile_headers(make: Make, position: int, code: str, value: object, cause: str | None) -> None:
    fd = make(OBJECTS)
    os.pwrite(fd, struct.pack("<" + code, value), position)
    if cause is None:
        assert sif.read(fd, "bad.sif").primary.id == 3
        return
    with pytest.raises(ImageError, match=f"(?s)bad.sif.*{cause}"):
        sif.read(fd, "bad.sif")


def test_two_primary_partitions(make: Make) -> None:
    fd = make(OBJECTS)
    os.pwrite(fd, struct.pack("<i", sif.PARTITION), field(1, 0))
    os.pwrite(fd, struct.pack("<ii3s", 1, 2, b"02\0"), field(1, 201))
    with pytest.raises(ImageError, match="2 primary"):
        sif.read(fd, "bad.sif")


@pytest.mark.parametrize("length", [0, 31, 41, 42, 127, 128, 4096, 32175, 32176, 36864, 36865])
def test_truncated(make: Make, length: int) -> None:
    fd = make(OBJECTS)
    os.ftruncate(fd, length)
    with pytest.raises(ImageError):
        sif.read(fd, "bad.sif")


def test_shrinks_after_it_was_opened(make: Make) -> None:
    fd = make(OBJECTS)
    image = sif.read(fd, "image.sif")
    os.ftruncate(fd, 40000)
    with pytest.raises(ImageError, match="ends early"):
        sif.read_object(fd, image, image.primary)


interesting = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x01" + b"\0" * 7, b"\0\x10" + b"\0" * 6])
places = st.one_of(st.integers(32, 128), st.integers(4096, 4096 + 4 * 585))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(places, st.one_of(interesting, st.binary(min_size=1, max_size=8))), min_size=1, max_size=4))
def test_damage_is_an_image_error_or_harmless(make: Make, damage: list[tuple[int, bytes]]) -> None:
    """Whatever is in the header: an ImageError, or objects that lie inside the file and apart from each other."""
    fd = make(OBJECTS)
    try:
        for position, data in damage:
            os.pwrite(fd, data, position)
        end = os.fstat(fd).st_size
        try:
            image = sif.read(fd, "bad.sif")
        except ImageError:
            return
        extents = sorted((d.offset, d.offset + d.size) for d in image.descriptors if d.size)
        assert all(0 <= start < stop <= end for start, stop in extents)
        assert all(stop <= start for (_, stop), (start, _) in zip(extents, extents[1:]))
        for descriptor in image.descriptors:
            assert isinstance(descriptor.arch + descriptor.name, str)
            sif.read_object(fd, image, descriptor)
    finally:
        os.close(fd)
