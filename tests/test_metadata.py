"""What /.singularity.d and the SIF's objects say about an image, and that a stranger's text in it stays text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import Need, find
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert import metadata, oci
from sciexec import __version__, environment, sif
from sciexec.errors import ImageError

SHELLS = (("dash",), ("bash", "--posix"), ("busybox", "sh"))
NAME = "10-docker2singularity.sh"


@dataclass
class Source:
    """As much of an oci.Image as metadata reads."""

    settings: dict[str, Any]
    reference: str = "docker://docker.io/library/debian:12"
    manifest_digest: str = "sha256:" + "ab" * 32
    arch: str = "amd64"
    created: int | None = 1580608922
    layers: list[Any] = field(default_factory=list)


def image(**values: Any) -> oci.Image:
    return cast(oci.Image, Source(values.pop("settings", {}), **values))


def text(source: oci.Image, path: str) -> str:
    return metadata.files(source)[path.encode()].content.decode()


@pytest.fixture(params=SHELLS, ids=[shell[0] for shell in SHELLS])
def shell(request: pytest.FixtureRequest, need: Need) -> list[str]:
    program, *options = request.param
    return [need(program), *options]


# Prints every argument and the variables whose names begin with V, each ended by a NUL.
PROBE = """import os, sys
words = sys.argv[1:] + sorted(f"{k}={v}" for k, v in os.environb.items() for k, v in [(os.fsdecode(k), os.fsdecode(v))] if k[0] == "V")
sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\\0" for word in words))
"""

# hostile.md's strings for a configuration, and what else has a meaning to one shell or another
STRINGS = [
    "$(touch p)",
    "`touch p`",
    '"',
    "'",
    "'; touch p; '",
    "\\",
    "a\\",
    "\n",
    "two\nlines\n",
    "!",
    "!!",
    "~",
    "*",
    "?[a]",
    "${HOME}",
    "$HOME $$ $# $@",
    "}",
    "a b  c\t",
    " ",
    "",
    "-n",
    "--",
    "#x",
    "|&;<>()",
    "\x1b[31m",
    "\x7f\x01",
    "ü€𝄞",
    "x=y",
    "\r\n",
    "%s",
    "EOF",
]


def run(shell: list[str], script: str, *words: str, env: dict[str, str] | None = None, cwd: Path) -> list[str]:
    path = cwd / "script.sh"
    path.write_bytes(script.encode())
    done = subprocess.run([*shell, str(path), *words], env=env or {}, cwd=cwd, stdout=subprocess.PIPE, timeout=30, check=True)
    assert not (cwd / "p").exists(), "a command in the text was run"
    return done.stdout.decode().split("\0")[:-1]


@pytest.fixture
def probe(tmp_path: Path) -> list[str]:
    (tmp_path / "probe.py").write_text(PROBE)
    return [sys.executable, "-IS", str(tmp_path / "probe.py")]


@pytest.mark.parametrize(
    ("entrypoint", "cmd", "words", "expected"),
    [
        (["e"], [], [], ["e"]),
        (["e"], [], ["x"], ["e", "x"]),
        (["e"], ["c"], [], ["e", "c"]),
        (["e"], ["c"], ["x", "y"], ["e", "x", "y"]),
        (["e"], ["c"], [""], ["e", ""]),
        ([], ["c", "d"], [], ["c", "d"]),
        (STRINGS, STRINGS, [], STRINGS + STRINGS),
        (STRINGS, ["c"], STRINGS, STRINGS + STRINGS),
    ],
)
def test_runscript(
    shell: list[str], probe: list[str], tmp_path: Path, entrypoint: list[str], cmd: list[str], words: list[str], expected: list[str]
) -> None:
    entrypoint, cmd = (probe + entrypoint, cmd) if entrypoint else (entrypoint, probe + cmd)
    source = image(settings={"Entrypoint": entrypoint, "Cmd": cmd})
    assert run(shell, text(source, ".singularity.d/runscript"), *words, cwd=tmp_path) == expected


def test_runscript_without_entrypoint(shell: list[str], probe: list[str], tmp_path: Path) -> None:
    """Arguments replace CMD; where there is neither, that is said."""
    with_cmd = text(image(settings={"Entrypoint": None, "Cmd": ["/nonexistent"]}), ".singularity.d/runscript")
    assert run(shell, with_cmd, *probe, "x y", "$HOME", cwd=tmp_path) == ["x y", "$HOME"]
    neither = text(image(), ".singularity.d/runscript")
    assert run(shell, neither, *probe, "`id`", cwd=tmp_path) == ["`id`"]
    done = subprocess.run([*shell, "-c", neither], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "neither ENTRYPOINT nor CMD" in done.stderr


def test_environment_script(shell: list[str], probe: list[str], tmp_path: Path) -> None:
    env = [f"V{number:02}={value}" for number, value in enumerate(STRINGS)]
    script = text(image(settings={"Env": env}), f"{metadata.ENV}/{NAME}") + "exec " + " ".join(map(metadata.quote, probe)) + "\n"
    assert run(shell, script, cwd=tmp_path) == sorted(env)


def test_environment_script_rules(shell: list[str], probe: list[str], tmp_path: Path) -> None:
    """What is set already stays, but not PATH; the last of two counts; no name that is none; a bare name is exported."""
    env = ["VA=image", "VB=image", "VC=1", "VC=2", "V D=x", "V-E=x", "1V=x", "V$(touch p)=x", "=x", "VF", "VG=", "PATH=/image"]
    script = text(image(settings={"Env": env}), f"{metadata.ENV}/{NAME}")
    script += "VPATH=$PATH; export VPATH; exec " + " ".join(map(metadata.quote, probe)) + "\n"
    seen = run(shell, script, env={"VA": "caller", "VB": "", "PATH": "/caller"}, cwd=tmp_path)
    assert seen == ["VA=caller", "VB=image", "VC=2", "VG=", "VPATH=/image"]


anything = st.text(max_size=60).map(lambda text: text.replace("\0", ""))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(anything, max_size=4), st.lists(anything, max_size=4), anything)
def test_any_text(shell: list[str], probe: list[str], tmp_path: Path, entrypoint: list[str], cmd: list[str], value: str) -> None:
    source = image(settings={"Entrypoint": probe + entrypoint, "Cmd": cmd, "Env": [f"V={value}"]})
    script = text(source, f"{metadata.ENV}/{NAME}") + text(source, ".singularity.d/runscript")
    assert run(shell, script, cwd=tmp_path) == [*entrypoint, *cmd, f"V={value}"]


@pytest.mark.parametrize("path", sorted(metadata.SCRIPTS))
def test_every_script_parses(shell: list[str], path: str) -> None:
    subprocess.run([*shell, "-n"], input=metadata.SCRIPTS[path], text=True, check=True, timeout=30)


def source_all(shell: list[str], tmp_path: Path, show: str, **env: str) -> str:
    """Source the environment scripts one after another, as a runtime does, and print `show`."""
    directory = tmp_path / "env"
    directory.mkdir(exist_ok=True)
    for path, file in metadata.files(image(settings={"Env": ["PATH=/image/bin"]})).items():
        if path.startswith(b".singularity.d/env/"):
            (directory / os.fsdecode(path).rpartition("/")[2]).write_bytes(file.content)
    script = f'set -eu; for file in {directory}/*.sh; do . "$file"; done; printf %s "{show}"'
    return subprocess.run([*shell, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=30).stdout


def test_path_and_libraries(shell: list[str], tmp_path: Path) -> None:
    assert source_all(shell, tmp_path, "$PATH $LD_LIBRARY_PATH", PATH="/bin") == "/image/bin /.singularity.d/libs"
    user = {"SING_USER_DEFINED_PREPEND_PATH": "/first", "SING_USER_DEFINED_APPEND_PATH": "/last"}
    assert source_all(shell, tmp_path, "$PATH ${SING_USER_DEFINED_APPEND_PATH:-gone}", **user) == "/first:/image/bin:/last gone"
    assert source_all(shell, tmp_path, "$PATH", SING_USER_DEFINED_PATH="/mine") == "/mine"
    assert source_all(shell, tmp_path, "$LD_LIBRARY_PATH", LD_LIBRARY_PATH="/a") == "/a:/.singularity.d/libs"
    twice = "/.singularity.d/libs:/a"
    assert source_all(shell, tmp_path, "$LD_LIBRARY_PATH", LD_LIBRARY_PATH=twice) == twice


def test_application(shell: list[str], tmp_path: Path) -> None:
    shown = source_all(shell, tmp_path, "$PATH|$LD_LIBRARY_PATH|$SCIF_APPDATA|$SCIF_APPOUTPUT", SINGULARITY_APPNAME="foo")
    path, libraries, *data = shown.split("|")
    assert path == "/scif/apps/foo/bin:/scif/apps/foo:/image/bin"
    assert libraries == "/scif/apps/foo/lib:/.singularity.d/libs"
    assert data == ["/scif/data/foo", "/scif/data/foo/output"]


def test_actions(need: Need, rootfs: Path, tmp_path: Path) -> None:
    """The scripts of /.singularity.d/actions do what their names say, in a root directory of their own."""
    unshare = need("unshare")
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", str(rootfs), str(root)], check=True)
    source = image(settings={"Entrypoint": ["/bin/echo"], "Cmd": ["from", "$CMD"], "Env": ["VA=it's", "PATH=/usr/bin"]})
    lay(metadata.files(source), root)

    def action(name: str, *words: str, status: int = 0) -> str:
        command = [unshare, "--user", "--map-root-user", "--root", str(root), f"/{name}", *words]
        done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == status, done.stderr
        return done.stdout

    assert action(".run") == "from $CMD\n"
    assert action(".run", "a b", "`id`") == "a b `id`\n"
    assert action("singularity", "x") == "x\n"
    assert action(".exec", "/bin/sh", "-c", 'echo "$VA $PATH $LD_LIBRARY_PATH"') == "it's /usr/bin /.singularity.d/libs\n"
    assert action(".shell", "-c", "echo $VA") == "it's\n"
    assert action(".test") == "This image has no test.\n"
    assert action(".singularity.d/actions/start") == ""
    (root / ".singularity.d/test").write_text("#!/bin/sh\necho tested $VA\nexit 3\n")
    (root / ".singularity.d/test").chmod(0o755)
    assert action(".test", status=3) == "tested it's\n"


def lay(files: dict[bytes, metadata.File], root: Path) -> None:
    for path, file in files.items():
        target = root / os.fsdecode(path)
        if file.only_if_missing and os.path.lexists(target):
            continue
        if file.kind == "d":
            target.mkdir(exist_ok=True)
        elif file.kind == "l":
            target.symlink_to(os.fsdecode(file.content))
        else:
            target.write_bytes(file.content)
            target.chmod(file.mode)


def test_tree() -> None:
    files = metadata.files(image())
    seen = {b""}
    for path, file in files.items():
        assert path.rpartition(b"/")[0] in seen, f"{path!r} comes before its directory"
        if file.kind == "d":
            seen.add(path)
        if file.kind == "l":
            assert file.content in files
        assert not path.startswith(b"/")
    kept = {path for path, file in files.items() if file.only_if_missing}
    assert {b"tmp", b"etc", b"etc/hosts", b"singularity", b".run", b".singularity.d/env/90-environment.sh"} <= kept
    assert not {b".singularity.d", b".singularity.d/runscript", b".singularity.d/env/10-docker2singularity.sh"} & kept
    assert files[b"tmp"].mode == files[b"var/tmp"].mode == 0o1777
    assert files[b".singularity.d/runscript"].mode == 0o755
    assert files[b".singularity.d/labels.json"].mode == 0o644


def test_objects() -> None:
    config = {"Env": ["A=b"], "Cmd": ["sh"], "Labels": {"z": "1", "a": 'quo"te\n'}, "WorkingDir": "/w", "ArgsEscaped": True}
    source = image(settings=config)
    objects = metadata.objects(source)
    assert [(datatype, name) for datatype, name, _ in objects] == [
        (sif.DEFFILE, ""),
        (sif.GENERIC_JSON, "inspect-metadata.json"),
        (sif.GENERIC_JSON, "oci-config.json"),
        (sif.GENERIC, "sciexec.start"),
    ]
    definition, inspected, oci_config, start = (data for _, _, data in objects)
    assert definition == b"bootstrap: docker\nfrom: docker.io/library/debian:12\n"
    assert json.loads(oci_config) == config
    read = environment.load(start)
    assert (read.environment, read.entrypoint, read.command) == ([("A", "b")], [], ["sh"])
    document = json.loads(inspected)
    assert document["type"] == "container"
    attributes = document["data"]["attributes"]
    assert attributes["labels"] == json.loads(text(source, ".singularity.d/labels.json"))
    assert attributes["runscript"] + "\n" == text(source, ".singularity.d/runscript")
    assert attributes["environment"][f"/{metadata.ENV}/{NAME}"] + "\n" == text(source, f"{metadata.ENV}/{NAME}")
    assert attributes["deffile"] + "\n" == definition.decode() == text(source, ".singularity.d/Singularity")


def test_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)

    def labels(source: oci.Image) -> dict[str, str]:
        return cast("dict[str, str]", json.loads(text(source, ".singularity.d/labels.json")))

    given_labels = {"mine": "kept", "org.label-schema.build-arch": "a lie"}
    assert labels(image(settings={"Labels": given_labels})) == {
        "mine": "kept",
        "org.label-schema.build-arch": "amd64",
        "org.label-schema.build-date": "2020-02-02T02:02:02Z",
        "org.label-schema.schema-version": "1.0",
        "org.label-schema.usage.sciexec.version": __version__,
        "org.label-schema.usage.singularity.deffile.bootstrap": "docker",
        "org.label-schema.usage.singularity.deffile.from": "docker.io/library/debian:12",
        "org.opencontainers.image.base.digest": "sha256:" + "ab" * 32,
        "org.opencontainers.image.base.name": "docker.io/library/debian:12",
    }
    assert "org.label-schema.build-date" not in labels(image(created=None))
    assert "org.label-schema.build-date" not in labels(image(created=2**62))
    layout = labels(image(reference="oci:/data/layout:tag"))
    assert layout["org.label-schema.usage.singularity.deffile.from"] == "layout:tag"
    assert "org.opencontainers.image.base.name" not in layout, "a path here is no name elsewhere"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert labels(image())["org.label-schema.build-date"] == "1970-01-01T00:00:01Z"


def test_the_same_bytes_again() -> None:
    forward = {"Labels": {"a": "1", "b": "2"}, "Env": ["A=1"], "Cmd": ["x"]}
    backward = {"Cmd": ["x"], "Env": ["A=1"], "Labels": {"b": "2", "a": "1"}}
    assert metadata.objects(image(settings=forward)) == metadata.objects(image(settings=backward))
    assert metadata.files(image(settings=forward)) == metadata.files(image(settings=backward))


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"Env": "A=b\0c"}, "NUL"),
        ({"Entrypoint": ["a\0b"]}, "NUL"),
        ({"Cmd": ["a", "\0"]}, "NUL"),
        ({"Cmd": ["\ud800"]}, "half a surrogate"),
        ({"Env": ["A=\udcff"]}, "half a surrogate"),
        ({"Env": {"A": "b"}}, "not a list"),
        ({"Cmd": [1]}, "not a list"),
        ({"Labels": ["a"]}, "not a map"),
        ({"Labels": {"a": 1}}, "not a map"),
    ],
)
def test_settings_that_are_none(config: dict[str, Any], cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        metadata.objects(image(settings=config))
    with pytest.raises(ImageError, match=cause):
        metadata.files(image(settings=config))


def test_half_a_surrogate_pair_in_a_label() -> None:
    """JSON can spell it, UTF-8 cannot; labels stay JSON."""
    config = {"Labels": {"l": "\ud800"}}
    assert json.loads(metadata.objects(image(settings=config))[2][2]) == config
    assert json.loads(text(image(settings=config), ".singularity.d/labels.json"))["l"] == "\ud800"


def test_a_reference_cannot_add_lines() -> None:
    source = image(reference="oci:/data/a\nfrom")
    assert text(source, ".singularity.d/Singularity").count("\n") == 2


def test_shells_are_there() -> None:
    """Under CI none of the shells may be left out."""
    for program, *_ in SHELLS:
        find(program)
