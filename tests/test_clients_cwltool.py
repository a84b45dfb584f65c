"""cwltool: its own tests of Singularity, as they are shipped, and workflows of ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients import Call, Engine, judge, processes, shipped
from conftest import Need

pytest_plugins = ["clients_fixtures"]

# --- the shipped tests ------------------------------------------------------------------------------------------------------

TESTS = ("test_singularity", "test_singularity_versions", "test_environment", "test_iwdr", "test_tmpdir", "test_docker", "test_secrets",
         "test_js_sandbox", "test_cuda")  # fmt: skip
CHOSEN = "singularity or crt_params2"
DEFINITION = "it builds from a definition file"
CANNOT = {
    "test_singularity::test_singularity_pullfolder": "for Singularity 2.6",
    "test_singularity::test_singularity2_docker_image_id_in_tool": "for Singularity 2.6",
    "test_singularity::test_singularity_dockerfile_no_name_no_cache": DEFINITION,
    "test_singularity::test_singularity_dockerfile_no_name_with_cache": DEFINITION,
    "test_singularity::test_singularity_dockerfile_with_name_no_cache": DEFINITION,
    "test_singularity::test_singularity_dockerfile_with_name_with_cache": DEFINITION,
    "test_tmpdir::test_dockerfile_singularity_build": DEFINITION,
}
AS_APPTAINER = {
    f"test_environment::{name}[crt_params2]": "for SingularityCE"
    for name in ("test_basic", "test_preserve_single", "test_preserve_single_missing", "test_preserve_all")
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("flavour", ["singularity-ce", "apptainer"])
def test_its_own_tests(
    flavour: str, engine: Engine, names: Path, apptainers: Path, call: Call, work: Path, record_property: Callable[[str, object], None]
) -> None:
    bin = engine("cwltool")
    (tests,) = bin.parent.glob("lib/python3*/site-packages/cwltool/tests")
    place = {"singularity-ce": names, "apptainer": apptainers}[flavour]
    chosen = (f"--rootdir={tests}", "-k", CHOSEN, *(tests / f"{name}.py" for name in TESTS))
    results = shipped(call, bin / "python3", work, f"{place}:{bin}:/usr/bin:/bin", *chosen)
    gpu = {} if shutil.which("nvidia-smi") else {"test_cuda::test_cuda_singularity": "needs a GPU"}
    others = AS_APPTAINER if flavour == "apptainer" else {}
    judge(f"cwltool's own tests, as {flavour}", results, {**CANNOT, **gpu, **others}, record_property)


# --- workflows of ours --------------------------------------------------------------------------------------------------------

Cwltool = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def cwltool(engine: Engine, world: dict[str, str], call: Call, work: Path) -> Cwltool:
    """cwltool(tool, job, *options) -> exit code, what cwltool says of the outputs (parsed), stderr.  Outputs are in out/."""
    bin = engine("cwltool")
    names, _, rest = world["PATH"].partition(":")

    def run(tool: dict[str, Any], job: dict[str, Any], *options: str, timeout: float = 120) -> tuple[int, Any, str]:
        (work / "tool.cwl").write_text(json.dumps({"cwlVersion": "v1.2", **tool}))
        (work / "job.json").write_text(json.dumps(job))
        arguments = ["--singularity", "--disable-color", "--outdir", "out", *options, "tool.cwl", "job.json"]
        done = call(bin / "cwltool", *arguments, env={"PATH": f"{names}:{bin}:{rest}"}, timeout=timeout)
        return done.returncode, json.loads(done.stdout or "null"), done.stderr

    return run


def tool(*command: str, image: str = "docker.io/alpine:3", **given: Any) -> dict[str, Any]:
    requirements = {"DockerRequirement": {"dockerPull": image}, **given.pop("requirements", {})}
    return {"class": "CommandLineTool", "baseCommand": list(command), "inputs": {}, "outputs": {}, "requirements": requirements, **given}


OUTPUT = {"outputs": {"out": {"type": "stdout"}}, "stdout": "out.txt"}

SCRIPT = """\
cat -
cat "$1" "$2/x y"
echo "$WORD"
cat made.txt
echo changed >>made.txt
pwd | grep -c "^$HOME$"
echo "$TMPDIR"
echo 'on stderr' >&2
"""


def test_files_with_blanks_and_commas_directories_stdin_and_variables(cwltool: Cwltool, work: Path) -> None:
    (work / "in, put.txt").write_text("a file\n")
    (work / "std in").write_text("standard input\n")
    (work / "a dir").mkdir()
    (work / "a dir/x y").write_text("a directory\n")
    described = tool(
        *("bash", "script.sh"),
        inputs={
            "file": {"type": "File", "inputBinding": {"position": 1}},
            "directory": {"type": "Directory", "inputBinding": {"position": 2}},
            "given": "File",
        },
        stdin="$(inputs.given.path)",
        stdout="out.txt",
        stderr="err.txt",
        outputs={"out": {"type": "stdout"}, "err": {"type": "stderr"}, "made": {"type": "File", "outputBinding": {"glob": "made.txt"}}},
        requirements={
            "EnvVarRequirement": {"envDef": {"WORD": "a b;$HOME `id`"}},
            "InitialWorkDirRequirement": {
                "listing": [{"entryname": "script.sh", "entry": SCRIPT}, {"entryname": "made.txt", "entry": "made\n", "writable": True}]
            },
        },
    )
    job = {
        "file": {"class": "File", "path": "in, put.txt"},
        "directory": {"class": "Directory", "path": "a dir"},
        "given": {"class": "File", "path": "std in"},
    }
    code, outputs, stderr = cwltool(described, job, "--relax-path-checks")
    assert code == 0, stderr
    assert (work / "out/out.txt").read_text() == "standard input\na file\na directory\na b;$HOME `id`\nmade\n1\n/tmp\n"
    assert (work / "out/err.txt").read_text() == "on stderr\n"
    assert (work / "out/made.txt").read_text() == "made\nchanged\n"
    assert set(outputs) == {"out", "err", "made"}
    assert (work / "in, put.txt").read_text() == "a file\n"


@pytest.mark.parametrize(("code", "given", "ends"), [(42, {"successCodes": [42]}, 0), (3, {}, 1), (7, {"temporaryFailCodes": [7]}, 1)])
def test_exit_codes(cwltool: Cwltool, code: int, given: dict[str, Any], ends: int) -> None:
    ended, _, stderr = cwltool(tool("bash", "-c", f"exit {code}", **given), {})
    assert ended == ends, stderr
    assert code == 42 or f"exited with status: {code}" in stderr


def test_a_time_limit_ends_the_tool(cwltool: Cwltool) -> None:
    limited = tool("sleep", "61.25", requirements={"ToolTimeLimit": {"timelimit": 3}}, **OUTPUT)
    begun = time.monotonic()
    code, _, stderr = cwltool(limited, {})
    assert code == 1, stderr
    assert time.monotonic() - begun < 30
    assert processes("sleep 61.25") == []


def test_a_network_only_where_it_is_asked_for(cwltool: Cwltool, work: Path) -> None:
    host = interfaces(Path("/proc/net/dev").read_text())
    for access, seen in ((False, {"lo"}), (True, host)):
        code, _, stderr = cwltool(tool("cat", "/proc/net/dev", requirements={"NetworkAccess": {"networkAccess": access}}, **OUTPUT), {})
        assert code == 0, stderr
        assert interfaces((work / "out/out.txt").read_text()) == seen


def interfaces(text: str) -> set[str]:
    return {line.partition(":")[0].strip() for line in text.splitlines()[2:]}


def test_an_image_in_the_working_directory(cwltool: Cwltool, pulled: Callable[[str], Path], work: Path) -> None:
    shutil.copy(pulled("small"), work / "local_s_base:1.sif")
    code, _, stderr = cwltool(tool("cat", "/etc/debian_version", image="local/base:1", **OUTPUT), {}, "--disable-pull")
    assert code == 0, stderr
    assert (work / "out/out.txt").read_text().strip()


def test_an_archive_of_docker_save(cwltool: Cwltool, debian_layout: Path, need: Need, work: Path) -> None:
    subprocess.run([need("skopeo"), "copy", "-q", f"oci:{debian_layout}:small", f"docker-archive:{work}/small.tar:small:1"], check=True)
    loading = tool("cat", "/etc/debian_version", **OUTPUT)
    loading["requirements"] = {"DockerRequirement": {"dockerLoad": "small.tar", "dockerImageId": "small"}}
    code, _, stderr = cwltool(loading, {})
    assert code == 0, stderr
    assert (work / "out/out.txt").read_text().strip()


def test_steps_scattered_in_parallel(cwltool: Cwltool, work: Path) -> None:
    double = tool("bash", "-c", "echo $(($0 * 2))", inputs={"n": {"type": "int", "inputBinding": {}}}, **OUTPUT)
    total = tool("cat", inputs={"files": {"type": "File[]", "inputBinding": {}}}, **OUTPUT)
    workflow = {
        "class": "Workflow",
        "requirements": {"ScatterFeatureRequirement": {}},
        "inputs": {"numbers": "int[]"},
        "steps": {
            "double": {"run": double, "scatter": "n", "in": {"n": "numbers"}, "out": ["out"]},
            "total": {"run": total, "in": {"files": "double/out"}, "out": ["out"]},
        },
        "outputs": {"out": {"type": "File", "outputSource": "total/out"}},
    }
    code, _, stderr = cwltool(workflow, {"numbers": [1, 2, 3, 4]}, "--parallel")
    assert code == 0, stderr
    assert (work / "out/out.txt").read_text() == "2\n4\n6\n8\n"
