"""`inspect` and `sif`: the shapes that scripts parse, and images that lie or set traps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import Need

from sciexec import inspect, sif
from sciexec.errors import HostError, ImageError, LimitError, SciexecError, UsageError

CREATED = 1580608922  # 2020-02-02T02:02:02Z
ATTRIBUTES: dict[str, Any] = {
    "apps": {"foo": {"labels": {"F": "1"}, "runscript": "#!/bin/sh\n\n    echo foo", "helpfile": "    help of foo"}},
    "environment": {"/.singularity.d/env/90-environment.sh": "#!/bin/sh\nexport E=1"},
    "labels": {"b": "two", "a": "on\x1be"},
    "runscript": "#!/bin/sh\nexec true",
    "test": "#!/bin/sh\ntrue",
    "helpfile": "    Read this.",
    "deffile": "bootstrap: docker\nfrom: x",
    "startscript": "#!/bin/sh",
}
PLAIN = """\
bootstrap: docker
from: x
#!/bin/sh
exec true
#!/bin/sh
#!/bin/sh
true
    Read this.
=== /.singularity.d/env/90-environment.sh ===
#!/bin/sh
export E=1

a: on\x1be
b: two
"""


def make(path: Path, metadata: bytes | None, partition: bytes = b"hsqs" + bytes(4092), *, name: str = inspect.METADATA) -> str:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    builder = sif.Builder(fd, arch="amd64", created=CREATED)
    builder.add(sif.DEFFILE, "", b"bootstrap: docker\nfrom: x\n")
    if metadata is not None:
        builder.add(sif.GENERIC_JSON, name, metadata)
    os.pwrite(fd, partition, builder.partition_offset())
    builder.finish(-(-len(partition) // 4096) * 4096)
    os.close(fd)
    return str(path)


@pytest.fixture
def described(tmp_path: Path) -> str:
    """A SIF whose file system is rubbish: everything has to come from its metadata."""
    return make(tmp_path / "image.sif", json.dumps({"data": {"attributes": ATTRIBUTES}, "type": "container"}).encode())


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    root = tmp_path / "sandbox"
    files = {
        ".singularity.d/Singularity": ATTRIBUTES["deffile"],
        ".singularity.d/runscript": ATTRIBUTES["runscript"],
        ".singularity.d/startscript": ATTRIBUTES["startscript"],
        ".singularity.d/test": ATTRIBUTES["test"],
        ".singularity.d/runscript.help": ATTRIBUTES["helpfile"],
        ".singularity.d/labels.json": json.dumps(ATTRIBUTES["labels"]),
        ".singularity.d/env/90-environment.sh": ATTRIBUTES["environment"]["/.singularity.d/env/90-environment.sh"],
        ".singularity.d/env/01-base.sh": "not the maker's",
        "scif/apps/foo/scif/labels.json": '{"F": "1"}',
        "scif/apps/foo/scif/runscript": ATTRIBUTES["apps"]["foo"]["runscript"],
        "scif/apps/foo/scif/runscript.help": ATTRIBUTES["apps"]["foo"]["helpfile"],
        "scif/apps/foo/scif/env/01-base.sh": "not the maker's",
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


@pytest.fixture
def squashfs(sandbox: Path, tmp_path: Path, need: Need) -> bytes:
    path = tmp_path / "image.sqfs"
    subprocess.run([need("mksquashfs"), str(sandbox), str(path), "-noappend", "-quiet", "-no-progress"], check=True, capture_output=True)
    return path.read_bytes()


def document(text: str) -> dict[str, Any]:
    parsed = json.loads(text)
    assert parsed["type"] == "container"
    return cast("dict[str, Any]", parsed["data"]["attributes"])


def test_plain(described: str) -> None:
    assert inspect.inspect(described, inspect.ATTRIBUTES) == PLAIN
    assert inspect.inspect(described) == "a: on\x1be\nb: two\n"
    assert inspect.inspect(described, ["runscript"]) == "#!/bin/sh\nexec true\n"
    assert inspect.inspect(described, ["test", "helpfile"]) == "#!/bin/sh\ntrue\n    Read this.\n"


def test_a_terminal_is_not_sent_control_characters(described: str) -> None:
    assert inspect.inspect(described, terminal=True) == "a: on\\x1be\nb: two\n"
    assert "\x1b" not in inspect.inspect(described, as_json=True)


def test_json(described: str) -> None:
    everything = inspect.inspect(described, inspect.ATTRIBUTES, as_json=True)
    assert document(everything) == ATTRIBUTES
    assert list(document(everything)) == ["apps", *inspect.ATTRIBUTES]
    assert everything.startswith('{\n\t"data": {\n\t\t"attributes": {\n\t\t\t"apps": {\n')
    assert everything.endswith('\t"type": "container"\n}\n')
    assert document(inspect.inspect(described, as_json=True)) == {"labels": ATTRIBUTES["labels"]}
    assert document(inspect.inspect(described, ["test", "deffile"], as_json=True)) == {k: ATTRIBUTES[k] for k in ("test", "deffile")}


def test_applications(described: str) -> None:
    assert inspect.inspect(described, list_apps=True) == "foo\n"
    assert document(inspect.inspect(described, list_apps=True, as_json=True)) == {"apps": ATTRIBUTES["apps"]}
    assert inspect.inspect(described, app="foo") == "F: 1\n"
    assert inspect.inspect(described, ["runscript", "helpfile"], app="foo") == "#!/bin/sh\n\n    echo foo\n    help of foo\n"
    assert document(inspect.inspect(described, ["helpfile"], app="foo", as_json=True)) == {"apps": {"foo": {"helpfile": "    help of foo"}}}
    with pytest.raises(ImageError, match="no application bar"):
        inspect.inspect(described, app="bar")


def test_an_image_without_applications(sandbox: Path, tmp_path: Path) -> None:
    shutil.rmtree(sandbox / "scif")
    for path in (str(sandbox), make(tmp_path / "none.sif", b'{"data": {"attributes": {"apps": {}, "runscript": "x"}}}')):
        assert inspect.inspect(path, list_apps=True) == ""
        assert document(inspect.inspect(path, list_apps=True, as_json=True)) == {}
        assert "apps" not in document(inspect.inspect(path, inspect.ATTRIBUTES, as_json=True))


def test_a_directory_says_the_same(sandbox: Path) -> None:
    assert inspect.inspect(str(sandbox), inspect.ATTRIBUTES) == PLAIN
    assert document(inspect.inspect(str(sandbox), inspect.ATTRIBUTES, as_json=True)) == ATTRIBUTES


def test_a_squashfs_says_the_same(squashfs: bytes, tmp_path: Path) -> None:
    """Bare, behind the first line of images of Singularity 2, and in a SIF without metadata."""
    (tmp_path / "bare").write_bytes(squashfs)
    (tmp_path / "old.simg").write_bytes(sif.LAUNCH + squashfs)
    make(tmp_path / "foreign.sif", None, squashfs)
    for name in ("bare", "old.simg", "foreign.sif"):
        assert document(inspect.inspect(str(tmp_path / name), inspect.ATTRIBUTES, as_json=True)) == ATTRIBUTES, name


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="no such file"):
        inspect.inspect(str(tmp_path / "missing"))
    for name in ("text", "empty", "directory", "fifo"):
        with pytest.raises(ImageError):
            inspect.inspect(str(tmp_path / name))
    for command in (inspect.sif_list, inspect.sif_header):
        with pytest.raises(ImageError):
            command(str(tmp_path / "text"))
        with pytest.raises(SciexecError):
            command(str(tmp_path / "directory"))


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"[]",
        b"{}",
        b'{"data": 1}',
        b'{"data": {"attributes": []}}',
        b'{"data": {"attributes": {"labels": "x"}}}',
        b'{"data": {"attributes": {"environment": ["x"]}}}',
        b'{"data": {"attributes": {"apps": 1}}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:50]),
)
def test_metadata_that_is_none(tmp_path: Path, metadata: bytes) -> None:
    path = make(tmp_path / "image.sif", metadata)
    with pytest.raises(ImageError, match=r"inspect-metadata\.json is not what it should be"):
        inspect.inspect(path, inspect.ATTRIBUTES)


def test_metadata_with_values_of_other_types(tmp_path: Path) -> None:
    """Numbers and half a surrogate pair come out as text."""
    path = make(tmp_path / "image.sif", b'{"data": {"attributes": {"labels": {"n": 1, "s": "\\ud800"}, "runscript": 5}}}')
    assert inspect.inspect(path, ["labels", "runscript"]) == "5\nn: 1\ns: \\ud800\n"


def test_metadata_that_is_huge(tmp_path: Path) -> None:
    path = make(tmp_path / "image.sif", bytes(sif.MAX_OBJECT + 1))
    with pytest.raises(LimitError):
        inspect.inspect(path)


def test_a_directory_that_sets_traps(sandbox: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"secret": "1"}')
    labels = sandbox / ".singularity.d/labels.json"
    labels.unlink()
    labels.symlink_to(secret)
    with pytest.raises(ImageError, match="symbolic link"):
        inspect.inspect(str(sandbox))
    labels.unlink()
    os.mkfifo(labels)
    with pytest.raises(ImageError, match="not a regular file"):
        inspect.inspect(str(sandbox))
    labels.unlink()
    labels.mkdir()
    with pytest.raises(ImageError, match="not a regular file"):
        inspect.inspect(str(sandbox))
    labels.rmdir()
    with labels.open("wb") as file:
        file.truncate(inspect.MAX_FILE + 1)
    with pytest.raises(LimitError):
        inspect.inspect(str(sandbox))
    labels.write_text('["not a map"]')
    with pytest.raises(ImageError, match="not a map"):
        inspect.inspect(str(sandbox))
    labels.chmod(0)
    with pytest.raises(HostError, match="Permission denied"):
        inspect.inspect(str(sandbox))
    (sandbox / ".singularity.d").rename(tmp_path / "elsewhere")
    (sandbox / ".singularity.d").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="no image"):
        inspect.inspect(str(sandbox), ["runscript"])


def test_a_squashfs_that_sets_traps(sandbox: Path, tmp_path: Path, need: Need) -> None:
    labels = sandbox / ".singularity.d/labels.json"
    labels.unlink()
    labels.symlink_to("/etc/passwd")
    with (sandbox / ".singularity.d/runscript").open("wb") as file:
        file.truncate(inspect.MAX_FILE + 1)
    image = tmp_path / "image.sqfs"
    subprocess.run([need("mksquashfs"), str(sandbox), str(image), "-noappend", "-quiet", "-no-progress"], check=True, capture_output=True)
    for name in ("labels", "runscript"):
        with pytest.raises(ImageError):
            inspect.inspect(str(image), [name])
    assert inspect.inspect(str(image), ["test"]) == "#!/bin/sh\ntrue\n"


def test_sif_list(described: str) -> None:
    size = os.stat(described).st_size
    with open(described, "rb") as file:
        image = sif.read(file.fileno(), described)
    start, end = image.descriptors[1].offset, image.descriptors[1].offset + image.descriptors[1].size
    rule = "-" * 78
    assert inspect.sif_list(described).splitlines() == [
        rule,
        "ID   |GROUP   |LINK    |SIF POSITION (start-end)  |TYPE",
        rule,
        "1    |1       |NONE    |32176-32202               |Def.FILE",
        f"2    |1       |NONE    |{start}-{end}               |JSON.Generic",
        f"3    |1       |NONE    |{size - 4096}-{size}               |FS (Squashfs/*System/amd64)",
    ]


def test_sif_list_of_signatures_and_strange_objects(tmp_path: Path) -> None:
    path = tmp_path / "image.sif"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    builder = sif.Builder(fd, arch="riscv64", created=0)
    builder.add(sif.SIGNATURE, "", b"signature", extra=b"\1\0\0\0", group=0)
    builder.add(0x7FFFFFFF, "\x1b]0;", b"?")
    builder.finish(4096, fs=99, parttype=99)
    os.pwrite(fd, (sif.GROUP_MASK | 1).to_bytes(4, "little"), 4096 + 13)
    os.close(fd)
    lines = inspect.sif_list(str(path)).splitlines()[3:]
    assert lines[0] == "1    |NONE    |1   (G) |32176-32185               |Signature (SHA-256)"
    assert lines[1].endswith("|Unknown")
    assert lines[2].endswith("|FS (Unknown/Unknown/riscv64)")
    assert "\\x1b]0;" in inspect.sif_info(str(path), 2)


def test_sif_header(described: str) -> None:
    lines = dict(line.split(": ", 1) for line in inspect.sif_header(described).splitlines())
    assert {name: value.strip() for name, value in lines.items() if name not in ("ID", "Data Size")} == {
        "Launch Script": "#!/usr/bin/env run-singularity",
        "Version": "01",
        "Primary Architecture": "amd64",
        "Created At": "2020-02-02 02:02:02 +0000 UTC",
        "Modified At": "2020-02-02 02:02:02 +0000 UTC",
        "Descriptors Free": "45",
        "Descriptors Total": "48",
        "Descriptors Offset": "4096",
        "Descriptors Size": "27 KiB",
        "Data Offset": "32176",
    }
    with open(described, "r+b") as file:
        file.write(bytes(32))  # no launch script, and as siftool's deterministic images: no id, Go's zero time
        file.seek(48)
        file.write(bytes(16) + (-62135596800).to_bytes(8, "little", signed=True) + b"\xff" * 7 + b"\x7f")
    bare = inspect.sif_header(described)
    assert "Modified At:          9223372036854775807 s since 1970" in bare
    assert not any(name in bare for name in ("Launch", "ID:", "Created"))


def test_sif_info(described: str, tmp_path: Path) -> None:
    assert inspect.sif_info(described, 3).splitlines()[-3:] == [
        "  Filesystem Type:  Squashfs",
        "  Partition Type:   *System",
        "  Architecture:     amd64",
    ]
    assert "  Name:         inspect-metadata.json\n" in inspect.sif_info(described, 2)
    path = tmp_path / "other.sif"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    builder = sif.Builder(fd, arch="amd64", created=-62135596800)
    for datatype, extra in (
        (sif.SIGNATURE, b"\1\0\0\0" + bytes(range(20))),
        (sif.CRYPTO_MESSAGE, b"\2\0\0\0\0\2\0\0"),
        (sif.SBOM, b"\x08\0\0\0"),
        (sif.OCI_BLOB, b"sha256:\x1b"),
    ):
        builder.add(datatype, "", b"x", extra=extra)
    builder.finish(4096)
    os.close(fd)
    assert inspect.sif_info(str(path), 1).splitlines() == [
        "  Data Type:  Signature",
        "  ID:         1",
        "  Group ID:   1",
        "  Linked ID:  NONE",
        "  Offset:     32176",
        "  Size:       1",
        "  Hash Type:  SHA-256",
        "  Entity:     000102030405060708090A0B0C0D0E0F10111213",
    ]
    assert inspect.sif_info(str(path), 2).endswith("  Format Type:   PEM\n  Message Type:  RSA-OAEP\n")
    assert inspect.sif_info(str(path), 3).endswith("  Format:     syft-json\n")
    assert inspect.sif_info(str(path), 4).endswith("  Digest:     sha256:\\x1b\n")


def test_sif_dump(described: str, tmp_path: Path) -> None:
    for number, expected in ((1, b"bootstrap: docker\nfrom: x\n"), (3, b"hsqs" + bytes(4092))):
        out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        inspect.sif_dump(described, number, out)
        os.close(out)
        assert (tmp_path / "out").read_bytes() == expected
    with pytest.raises(UsageError, match="no SIF object 9"):
        inspect.sif_dump(described, 9, -1)
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(HostError, match="No space left"):
        inspect.sif_dump(described, 1, full)
    os.close(full)
