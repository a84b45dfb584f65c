"""Opening an image: the content decides what it is, and nothing that is no image gets further."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sciexec import sif
from sciexec.errors import HostError, ImageError, SciexecError
from sciexec.image import Image, open_image

Need = Callable[..., str]


@pytest.fixture(scope="module")
def squashfs(tmp_path_factory: pytest.TempPathFactory, need: Need) -> bytes:
    """A SquashFS that holds /bin/hello and /etc/motd -> ../bin/hello."""
    work = tmp_path_factory.mktemp("squashfs")
    (work / "root/bin").mkdir(parents=True)
    (work / "root/etc").mkdir()
    (work / "root/bin/hello").write_text("hello\n" * 1000)
    (work / "root/etc/motd").symlink_to("../bin/hello")
    subprocess.run(
        [need("mksquashfs"), work / "root", work / "fs", "-quiet", "-no-progress", "-comp", "gzip"], check=True, capture_output=True
    )
    return (work / "fs").read_bytes()


def opened(path: Path) -> Image:
    image = open_image(str(path))
    os.close(image.fd)
    return image


def a_sif(path: Path, content: bytes, fs: int = sif.FS_SQUASHFS, parttype: int = sif.PART_PRIMARY) -> Path:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    builder = sif.Builder(fd, arch="amd64", created=0)
    os.pwrite(fd, content, builder.partition_offset())
    builder.finish(len(content), fs=fs, parttype=parttype)
    os.close(fd)
    return path


@pytest.mark.parametrize("name", ["image.sif", "image.img", "alpine:3.20", "no suffix", "dir.d"])
def test_the_name_says_nothing(tmp_path: Path, squashfs: bytes, name: str) -> None:
    path = a_sif(tmp_path / name, squashfs)
    assert (opened(path).kind, opened(path).offset % 4096, opened(path).size) == ("sif", 0, len(squashfs))
    path.write_bytes(squashfs)
    assert (opened(path).kind, opened(path).offset, opened(path).size) == ("squashfs", 0, len(squashfs))
    assert opened(path).describe() == f"squashfs {path} offset=0 size={len(squashfs)}"
    link = tmp_path / "link"
    link.symlink_to(name)
    assert opened(link).path == str(link)


def test_old_images_begin_with_a_line(tmp_path: Path, squashfs: bytes) -> None:
    path = tmp_path / "hello.simg"
    for line in (b"#!/usr/bin/env run-singularity\n", b"#!/x\n"):
        path.write_bytes(line + squashfs)
        assert (opened(path).kind, opened(path).offset, opened(path).size) == ("squashfs", len(line), len(squashfs))
    path.write_bytes(b"#!" + b"x" * 5000 + b"\n" + squashfs)
    with pytest.raises(ImageError, match="neither SIF nor SquashFS"):
        open_image(str(path))


def test_a_directory_is_an_image(tmp_path: Path) -> None:
    assert opened(tmp_path).kind == "directory"
    assert opened(tmp_path).describe() == f"directory {tmp_path}"


def test_the_descriptor_does_not_leak(tmp_path: Path, squashfs: bytes) -> None:
    image = open_image(str(a_sif(tmp_path / "x", squashfs)))
    assert not os.get_inheritable(image.fd)
    os.close(image.fd)


@pytest.mark.parametrize("content", [b"", b"x", b"hsqs", b"#!/bin/sh\necho no\n", bytes(8192), b"\x7fELF" + bytes(9000), b"#!\n", b"#!"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=str(path)):
        open_image(str(path))


def test_a_truncated_image_is_refused(tmp_path: Path, squashfs: bytes) -> None:
    whole = a_sif(tmp_path / "x", squashfs).read_bytes()
    for length in (31, 42, 127, 128, 4096, 5000, 32176, len(whole) - len(squashfs) + 50, len(whole) - 4096):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ImageError):
            open_image(str(tmp_path / "x"))


def test_other_roots_are_named(tmp_path: Path, squashfs: bytes) -> None:
    with pytest.raises(ImageError, match="its root is ext3"):
        open_image(str(a_sif(tmp_path / "1", squashfs, fs=sif.FS_EXT3)))
    with pytest.raises(ImageError, match="encrypted"):
        open_image(str(a_sif(tmp_path / "2", squashfs, fs=sif.FS_ENCRYPTED_SQUASHFS)))
    with pytest.raises(ImageError, match="no primary system partition"):
        open_image(str(a_sif(tmp_path / "3", squashfs, parttype=sif.PART_DATA)))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "closed").touch(0)
    for name, cause in (("none", "no such file"), ("fifo", "neither a file nor a directory"), ("closed", "Permission denied")):
        with pytest.raises(SciexecError, match=cause):
            open_image(str(tmp_path / name))


def test_the_key_names_the_content(tmp_path: Path, squashfs: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(squashfs)

    def key() -> str:
        image = open_image(str(path))
        try:
            return image.key()
        finally:
            os.close(image.fd)

    first = key()
    assert first == key()
    os.utime(path, ns=(1, 1))
    assert key() != first


def test_unpacking_shows_all_or_nothing(tmp_path: Path, squashfs: bytes) -> None:
    path, target = a_sif(tmp_path / "x", squashfs), tmp_path / "cache/unpacked/key"
    image = open_image(str(path))
    image.unpack(str(target))
    assert (target / "etc/motd").read_text() == "hello\n" * 1000
    image.unpack(str(target))  # as a second process does that was not the first to finish
    assert os.listdir(target.parent) == ["key"]
    os.close(image.fd)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - len(squashfs) + 96)
        file.write(b"\xff" * 32)  # the first block of /bin/hello
    image = open_image(str(path))
    with pytest.raises(ImageError):
        image.unpack(str(tmp_path / "cache/unpacked/other"))
    assert os.listdir(target.parent) == ["key"]
    target.parent.chmod(0o500)
    with pytest.raises(HostError, match="Permission denied"):
        image.unpack(str(tmp_path / "cache/unpacked/other"))
    os.close(image.fd)
