"""Data images: packed, added to an image, shown in a container; nothing of them is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from namespace_fixtures import OLD_KERNEL, Command, Make, Need, servers

from sciexec import sif
from sciexec.sources import OURS

pytest_plugins = ["run_fixtures"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/name, /sub/{deep,0 ... 299}, /private (0600), links: /in -> sub, /out -> /etc/passwd, /up -> ../../etc, /loop."""
    tree = tmp_path_factory.mktemp("dataset") / "era5"
    (tree / "sub").mkdir(parents=True)
    (tree / "name").write_text("era5\n")
    (tree / "sub/deep").write_text("deep\n")
    for number in range(300):
        (tree / "sub" / str(number)).write_text(f"{number}\n")
    (tree / "private").write_text("private\n")
    (tree / "private").chmod(0o600)
    for name, target in (("in", "sub"), ("out", "/etc/passwd"), ("up", "../../etc"), ("loop", "loop")):
        (tree / name).symlink_to(target)
    return tree


@pytest.fixture(scope="session")
def packed(dataset: Path, make_image: Make, sciexec_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data set as a SIF of ours, and as a SquashFS of mksquashfs."""
    made = tmp_path_factory.mktemp("packed") / "era5.sif"
    subprocess.run([sciexec_path, "data", "package", "-q", dataset, made], check=True, capture_output=True)
    return {"sif": made, "squashfs": make_image(dataset, "squashfs")}


@pytest.fixture(params=["sif", "squashfs"])
def data_image(request: pytest.FixtureRequest, packed: dict[str, Path]) -> Path:
    return packed[request.param]


@pytest.fixture
def workflow(images: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(images["sif"], tmp_path / "workflow.sif"))


def objects(path: Path) -> sif.Sif:
    fd = os.open(path, os.O_RDONLY)
    try:
        return sif.read(fd, str(path))
    finally:
        os.close(fd)


# --- shown ------------------------------------------------------------------------------------------------------------------

SHOWN = [
    (["-B", "{f}:/d:image-src=/"], "/d/name", "era5"),
    (["-B", "{f}:/d:image-src=/sub"], "/d/deep", "deep"),
    (["-B", "{f}:/d:ro,image-src=sub/"], "/d/deep", "deep"),
    (["-B", "{f}:/new/place/file:image-src=/sub/deep"], "/new/place/file", "deep"),
    (["-B", "{f}:/etc/passwd:image-src=/name"], "/etc/passwd", "era5"),
    (["-B", "{f}:/d:image-src=/in"], "/d/deep", "deep"),
    (["-B", "{f}:/d:image-src=/in/../name"], "/d", "era5"),
    (["-B", "{f}:/d:image-src="], "/d/name", "era5"),
    (["--mount", "type=bind,src={f},dst=/d,image-src=/sub"], "/d/deep", "deep"),
    (["--mount=type=bind,source={f},destination=/d,image-src=/"], "/d/private", "private"),
    (["--data", "{f}:/d"], "/d/name", "era5"),
    (["--data={f}:/d,{f}:/e"], "/e/name", "era5"),
    (["-B", "{f}:/d:image-src=/", "-B", "{f}:/d/sub:image-src=/in"], "/d/sub/deep", "deep"),
    (["-B", "{f}:/d:image-src=/", "-B", "{f}:/d/new/file:image-src=/sub/7"], "/d/new/file", "7"),
]


@pytest.mark.parametrize(("words", "path", "text"), SHOWN)
def test_data_are_shown_read_only(
    sciexec: Command, images: dict[str, Path], data_image: Path, words: list[str], path: str, text: str, nothing_left: None
) -> None:
    script = f"cat {path}; if [ -w {path} ]; then echo writable; fi; stat -c %u {path}"
    done = sciexec("exec", *(word.format(f=data_image) for word in words), images["directory"], "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{text}\n{os.getuid()}\n", "")


def test_where_data_appear_if_nobody_says_where(sciexec: Command, image: Path, packed: dict[str, Path]) -> None:
    assert sciexec("exec", "--data", packed["sif"], image, "cat", "/data/era5/name").stdout == "era5\n"
    done = sciexec("exec", image, "cat", "/data/era5/name", env={"APPTAINER_DATA": str(packed["sif"])})
    assert (done.stdout, done.stderr) == ("era5\n", "")


def test_the_whole_data_set_comes_through(sciexec: Command, images: dict[str, Path], dataset: Path, data_image: Path) -> None:
    script = 'cd /d; for f in $(find . -type f | sort); do echo "$f $(cat $f)"; done; for f in in out up loop; do readlink $f; done'
    inside = sciexec("exec", "--data", f"{data_image}:/d", images["directory"], "sh", "-c", script).stdout
    assert inside == sciexec("exec", "-B", f"{dataset}:/d", images["directory"], "sh", "-c", script).stdout
    assert inside.count("\n") == 307


def test_an_image_that_several_binds_use_is_served_once(
    sciexec_path: Path, images: dict[str, Path], packed: dict[str, Path], tmp_path: Path, nothing_left: None
) -> None:
    """And another one by a server of its own; all of them end with the payload."""
    other = shutil.copy(packed["sif"], tmp_path / "other.sif")
    (tmp_path / "link.sif").symlink_to(packed["sif"])
    words = ["-B", f"{packed['sif']}:/a:image-src=/", "-B", f"{packed['sif']}:/b:image-src=/sub", "--data", f"{tmp_path}/link.sif:/c"]
    before = servers()
    command = [sciexec_path, "exec", *words, "--data", f"{other}:/d", images["directory"], "sh", "-c", "echo ready; read line; cat /?/deep"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert sorted(path for pid in servers() - before for path in images_of(pid)) == sorted([str(packed["sif"]), str(other)])
        assert process.communicate("\n")[0] == "deep\n"


def images_of(pid: int) -> set[str]:
    """The files that a server has open, of these tests; others beside this one have servers of their own."""
    try:
        links = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    except OSError:
        return set()
    return {link for link in links if link.endswith(("/era5.sif", "/other.sif"))}


def test_links_in_data_lead_nowhere_but_into_the_data(sciexec: Command, images: dict[str, Path], data_image: Path) -> None:
    for path, cause in (("/out", "there is no /out in it"), ("/up/passwd", "there is no /up/passwd in it"), ("/loop", "Too many levels")):
        done = sciexec("exec", "-B", f"{data_image}:/d:image-src={path}", images["directory"], "true")
        assert done.returncode == 255
        assert cause in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_on_an_old_kernel(sciexec_path: Path, images: dict[str, Path], data_image: Path) -> None:
    words = ["-B", f"{data_image}:/d:image-src=/sub", "-B", f"{data_image}:/d/new:image-src=/name"]
    command = [*OLD_KERNEL, str(sciexec_path), "exec", *words, str(images["directory"]), "cat", "/d/deep", "/d/new"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "deep\nera5\n"


def test_without_fuse_data_are_unpacked_once(
    sciexec_path: Path, images: dict[str, Path], packed: dict[str, Path], tmp_path: Path, need: Need
) -> None:
    programs = " ".join(map(str, (OURS, "/usr/bin/squashfuse_ll", "/usr/local/bin/squashfuse_ll")))
    hide = f"for path in {programs}; do [ ! -e $path ] || mount --bind /dev/null $path; done"
    words = [str(sciexec_path), "exec", "--data", str(packed["sif"]), str(images["directory"]), "cat", "/data/era5/name"]
    command = [need("unshare"), "-rm", "sh", "-c", f'{hide}; exec "$@"', "sh", *words]
    environment = {**os.environ, "SCIEXEC_CACHEDIR": str(tmp_path / "cache")}
    for told in (True, False):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.stdout == "era5\n", done.stderr
        assert ("INFO: neither sciexec-fuse nor squashfuse_ll is installed: unpacking" in done.stderr) is told
    assert len(list((tmp_path / "cache/unpacked").iterdir())) == 1


def test_a_damaged_data_image_is_an_error_and_no_hang(
    sciexec: Command, images: dict[str, Path], packed: dict[str, Path], tmp_path: Path, nothing_left: None
) -> None:
    content = packed["squashfs"].read_bytes()
    for name, damaged in (("short", content[: len(content) // 2]), ("empty", b""), ("text", b"hello\n")):
        (tmp_path / name).write_bytes(damaged)
        done = sciexec("exec", "--data", f"{tmp_path / name}:/d", images["directory"], "true")
        assert done.returncode == 255 and str(tmp_path / name) in done.stderr
    (tmp_path / "noise").write_bytes(content[:96] + os.urandom(len(content) - 96))
    done = sciexec("exec", "--data", f"{tmp_path / 'noise'}:/d", images["directory"], "sh", "-c", "cat /d/*", timeout=60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and "itself failed" not in done.stderr


ERRORS = [
    (["-B", "{t}/none:/d:image-src=/"], 255, "binding {t}/none: No such file or directory on the host"),
    (["-B", "{t}:/d:image-src=/"], 255, "binding {t}: it is a directory and no data image"),
    (["-B", "{s}:/d:image-src=/none"], 255, "binding {s}: there is no /none in it"),
    (["-B", "{w}:/d:image-src=/"], 255, "binding {w}: it holds no data partition"),
    (["-B", "{s}:/d:image-src=/,id=9"], 255, "binding {s}: it has no object 9"),
    (["-B", "{w}:/d:id=1"], 255, "opening {w}: its object 1 is "),
    (["-B", "/etc/passwd:/d:image-src=/"], 255, "opening /etc/passwd: neither SIF nor SquashFS"),
    (["--data", "none:/d"], 1, "--data none: neither a file nor data in {w}"),
    (["--data", "{t}:/d"], 255, "binding {t}: it is a directory and no data image"),
    (["--data", "{s}:d"], 1, "--data {s}:d: not FILE or NAME"),
]


@pytest.mark.parametrize(("words", "code", "message"), ERRORS)
def test_errors_are_one_line_and_a_hint(
    sciexec: Command, packed: dict[str, Path], tmp_path: Path, workflow: Path, words: list[str], code: int, message: str, nothing_left: None
) -> None:
    with open(workflow, "rb+") as file:  # an object more, in front of which the partition has the id 2
        raw = file.read()
        file.seek(sif.TABLE_OFFSET)
        file.write(sif.DESCRIPTOR.pack(sif.GENERIC, 1, 1, sif.GROUP_MASK, 0, 32176, 3, 3, 0, 0, 0, 0, b"note", b""))
        file.write(raw[sif.TABLE_OFFSET : sif.TABLE_OFFSET + 5] + b"\2" + raw[sif.TABLE_OFFSET + 6 : sif.TABLE_OFFSET + 585])
    places = {"t": tmp_path, "s": packed["sif"], "w": workflow}
    done = sciexec("exec", *(word.format(**places) for word in words), workflow, "true")
    assert done.returncode == code
    assert done.stderr.startswith(f"FATAL: {message.format(**places)}"), done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_partition_of_another_kind_is_shown_by_its_id(sciexec: Command, images: dict[str, Path], workflow: Path) -> None:
    assert sciexec("exec", "-B", f"{workflow}:/d:id=1", images["directory"], "head", "-n1", "/d/etc/passwd").stdout.startswith("root:")


def test_data_cannot_be_run(sciexec: Command, packed: dict[str, Path]) -> None:
    done = sciexec("run", packed["sif"])
    assert done.returncode == 255
    assert "holds no primary system partition\n       it holds data: --data shows them" in done.stderr


# --- packed -----------------------------------------------------------------------------------------------------------------


def test_package_and_build_give_the_same_bytes_whoever_and_whenever(sciexec: Command, dataset: Path, tmp_path: Path) -> None:
    done = sciexec("data", "package", dataset, tmp_path / "a.sif")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/a.sif\n"), done.stderr
    done = sciexec("build", "--data", "-q", tmp_path / "b.sif", dataset)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/b.sif\n", "")
    assert (tmp_path / "a.sif").read_bytes() == (tmp_path / "b.sif").read_bytes()
    (found,) = objects(tmp_path / "a.sif").descriptors
    assert (found.type, found.fs, found.parttype, found.name) == (sif.PARTITION, sif.FS_SQUASHFS, sif.PART_DATA, "era5")
    assert objects(tmp_path / "a.sif").arch == "unknown"


def test_its_squashfs_is_as_asked_for(sciexec: Command, dataset: Path, tmp_path: Path, need: Need) -> None:
    words = ["--compression", "gzip:1", "--block-size", "16384", "--name", "données"]
    done = sciexec("data", "package", *words, dataset, tmp_path / "a.sif", env={"SOURCE_DATE_EPOCH": "12345"})
    assert done.returncode == 0, done.stderr
    found = objects(tmp_path / "a.sif").descriptors[0]
    assert (found.name, found.created) == ("données", 12345)
    command = [need("unsquashfs"), "-o", str(found.offset)]
    shown = subprocess.run([*command, "-s", tmp_path / "a.sif"], capture_output=True, text=True, check=True).stdout
    assert "Compression gzip" in shown and "Block size 16384" in shown
    listed = subprocess.run([*command, "-lln", tmp_path / "a.sif"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listed.splitlines() if line.startswith(("-", "d", "l"))} == {"0/0"}


@pytest.mark.parametrize("verb", ["package", "add"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{t}/none"], 1, "packing {t}/none: there is no such directory"),
        (["/etc/passwd"], 1, "packing /etc/passwd: it is no directory"),
        (["/", "--name", ""], 1, "packing /: data cannot be called ''"),
        (["{d}", "--name", "a/b"], 1, "packing {d}: data cannot be called 'a/b'"),
        (["{d}", "--name", "a\nb"], 1, "packing {d}: data cannot be called "),
        (["{d}", "--name", "x" * 128], 1, "packing {d}: data cannot be called "),
        (["{d}", "--compression", "none"], 1, ""),
        (["{closed}"], 255, "reading {closed}/file: Permission denied"),
    ],
)
def test_what_cannot_be_packed(
    sciexec: Command, dataset: Path, workflow: Path, tmp_path: Path, verb: str, words: list[str], code: int, message: str
) -> None:
    before = workflow.read_bytes()
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "file").write_text("")
    (closed / "file").chmod(0)
    places = {"t": tmp_path, "d": dataset, "closed": closed}
    directory, *options = (word.format(**places) for word in words)
    operands = [directory, tmp_path / "new.sif"] if verb == "package" else [workflow, directory]
    done = sciexec("data", verb, "-q", *options, *operands)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"FATAL: {message.format(**places)}"), done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert workflow.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"workflow.sif", "closed", "home"}


def test_package_replaces_nothing_unless_told(sciexec: Command, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "a.sif").write_text("mine")
    done = sciexec("data", "package", dataset, tmp_path / "a.sif")
    assert (done.returncode, (tmp_path / "a.sif").read_text()) == (1, "mine")
    assert sciexec("data", "package", "--force", dataset, tmp_path / "a.sif").returncode == 0
    assert objects(tmp_path / "a.sif").descriptors


# --- added to an image ----------------------------------------------------------------------------------------------------------


def test_data_travel_in_the_image_that_uses_them(
    sciexec: Command, workflow: Path, dataset: Path, tmp_path: Path, nothing_left: None
) -> None:
    before, mode = workflow.read_bytes(), workflow.stat().st_mode
    (tmp_path / "second").mkdir()
    (tmp_path / "second/name").write_text("second\n")
    done = sciexec("data", "add", "-q", workflow, dataset)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{workflow}\n", "")
    assert sciexec("data", "add", "-q", workflow, tmp_path / "second", "--name", "more").returncode == 0
    script = "cat /data/era5/name /data/more/name /m/name"
    done = sciexec("exec", "--data", "era5,more", "--data", "more:/m", workflow, "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "era5\nsecond\nsecond\n", "")
    assert sciexec("exec", "-B", f"{workflow}:/d:image-src=/", workflow, "cat", "/d/name").stdout == "era5\n"
    assert sciexec("exec", "-B", f"{workflow}:/d:image-src=/,id=3", workflow, "cat", "/d/name").stdout == "second\n"
    done = sciexec("exec", "--data", "none", workflow, "true")
    assert done.stderr == f"FATAL: --data none: neither a file nor data in {workflow}\n       the data in it: era5, more\n"

    after, parsed = workflow.read_bytes(), objects(workflow)
    assert after[:72] == before[:72] and after[sif.DATA_OFFSET : len(before)] == before[sif.DATA_OFFSET :]
    assert after[sif.TABLE_OFFSET : sif.TABLE_OFFSET + 585] == before[sif.TABLE_OFFSET : sif.TABLE_OFFSET + 585]
    assert workflow.stat().st_mode == mode
    assert [(found.id, found.group, found.parttype, found.name) for found in parsed.descriptors] == [
        (1, 1, sif.PART_PRIMARY, ""), (2, 2, sif.PART_DATA, "era5"), (3, 3, sif.PART_DATA, "more"),
    ]  # fmt: skip
    assert parsed.free == sif.SLOTS - 3 and parsed.data_offset + parsed.data_size == len(after)
    end = parsed.data_offset
    for found in parsed.descriptors:
        assert found.offset % 4096 == 0
        end += found.padded_size
        assert end == found.offset + found.size


def test_a_name_with_a_slash_is_a_file(sciexec: Command, workflow: Path, dataset: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    """One without is looked for in the image first."""
    (tmp_path / "here").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/name").write_text("in the image\n")
    shutil.copy(packed["sif"], tmp_path / "here/era5")
    assert sciexec("data", "add", workflow, tmp_path / "other", "--name", "era5").returncode == 0
    for name, text in (("era5", "in the image\n"), ("./era5", "era5\n")):
        assert sciexec("exec", "--data", f"{name}:/d", workflow, "cat", "/d/name", cwd=tmp_path / "here").stdout == text


def test_a_name_is_given_once(sciexec: Command, workflow: Path, dataset: Path) -> None:
    assert sciexec("data", "add", workflow, dataset).returncode == 0
    done = sciexec("data", "add", workflow, dataset)
    assert (done.returncode, done.stderr) == (
        1,
        f"FATAL: adding to {workflow}: it holds an object called era5 already\n       --name gives another name\n",
    )


def test_what_is_no_sif_takes_no_data(sciexec: Command, dataset: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none", 255), (packed["squashfs"], 255), (dataset, 255)):
        done = sciexec("data", "add", path, dataset)
        assert done.returncode == code and str(path) in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) <= 2 and "itself failed" not in done.stderr


def test_a_full_table_takes_no_more(sciexec: Command, workflow: Path, dataset: Path) -> None:
    with open(workflow, "rb+") as file:
        for slot in range(1, sif.SLOTS):
            file.seek(sif.TABLE_OFFSET + slot * sif.DESCRIPTOR.size)
            file.write(sif.DESCRIPTOR.pack(sif.GENERIC, 1, slot + 1, sif.GROUP_MASK | 1, 0, 32176, 0, 0, 0, 0, 0, 0, b"", b""))
    before = workflow.read_bytes()
    done = sciexec("data", "add", "-q", workflow, dataset)
    assert (done.returncode, done.stderr) == (255, f"FATAL: adding to {workflow}: all of its 48 descriptors are in use\n")
    assert workflow.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "linkat", "rename,renameat,renameat2"])
def test_a_kill_at_any_moment_leaves_the_image_whole(
    sciexec: Command, sciexec_path: Path, workflow: Path, dataset: Path, need: Need, tmp_path: Path, call: str
) -> None:
    before = workflow.read_bytes()
    command = [need("strace"), "-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL", str(sciexec_path)]
    done = subprocess.run([*command, "data", "add", workflow, dataset], capture_output=True, text=True, timeout=60, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("ptrace is forbidden here")
    assert done.returncode in (-9, 137), done.stderr
    if workflow.read_bytes() != before:  # the signal comes when the call has been made
        assert len(objects(workflow).descriptors) == 2
    assert sciexec("exec", workflow, "true").returncode == 0
    assert sciexec("data", "add", workflow, dataset, "--name", "again").returncode == 0
    assert sciexec("exec", "--data", "again:/d", workflow, "cat", "/d/name").stdout == "era5\n"


def test_a_full_disk_leaves_the_image_whole(sciexec_path: Path, workflow: Path, dataset: Path, tmp_path: Path) -> None:
    before = workflow.read_bytes()
    limit = len(before) // 1024 + 2
    command = ["bash", "-c", f'trap "" XFSZ; ulimit -f {limit}; exec "$@"', "bash", sciexec_path, "data", "add", workflow, dataset]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 255 and "FATAL: " in done.stderr and "File too large" in done.stderr, done.stderr
    assert workflow.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"workflow.sif"}


def test_a_container_keeps_the_image_that_it_runs_from(sciexec_path: Path, sciexec: Command, workflow: Path, dataset: Path) -> None:
    command = [sciexec_path, "exec", workflow, "sh", "-c", "echo ready; read line; ls /usr/bin | wc -l; head -n1 /etc/passwd"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert sciexec("data", "add", workflow, dataset).returncode == 0
        assert "root:x:0:0" in process.communicate("\n")[0]
