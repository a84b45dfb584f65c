"""Engines of which one small job is run each: miniwdl, Boutiques, ReFrame, mini-swe-agent, Styx."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from clients import Call, Engine

pytest_plugins = ["clients_fixtures"]


@pytest.fixture
def program(engine: Engine, world: dict[str, str], call: Call) -> Callable[..., subprocess.CompletedProcess[str]]:
    """program(NAME, argument ...) -> what it prints; it ends with 0."""
    bin = engine("engines")
    names, _, rest = world["PATH"].partition(":")

    def run(name: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        done = call(bin / name, *arguments, env={"PATH": f"{names}:{bin}:{rest}", **(env or {})})
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


WDL = """
version 1.1
task shout {
    input {
        File text
        String word
    }
    command <<<
        tr a-z A-Z <"~{text}" >shouted
        echo "~{word} ${UNSEEN-unseen}"
        echo "to stderr" >&2
    >>>
    output {
        String said = read_string(stdout())
        String err = read_string(stderr())
        File shouted = "shouted"
    }
    runtime { docker: "~{if word == 'python' then 'python:3-slim' else 'alpine:3'}" }
}
workflow twice {
    input { Array[String] words  File text }
    scatter (word in words) { call shout { input: text, word } }
    output { Array[String] said = shout.said  Array[String] err = shout.err  Array[File] shouted = shout.shouted }
}
"""


def test_miniwdl(program: Callable[..., subprocess.CompletedProcess[str]], work: Path) -> None:
    (work / "twice.wdl").write_text(WDL)
    (work / "a text").write_text("in a file\n")
    settings = {
        "MINIWDL__SCHEDULER__CONTAINER_BACKEND": "singularity",
        "MINIWDL__SINGULARITY__IMAGE_CACHE": str(work / "images"),
        "UNSEEN": "seen",
    }
    done = program("miniwdl", "run", "--dir", "run", "twice.wdl", "words=it's", "words=python", "text=a text", env=settings)
    outputs = json.loads(done.stdout)["outputs"]
    assert outputs["twice.said"] == ["it's unseen", "python unseen"]
    assert outputs["twice.err"] == ["to stderr"] * 2
    assert [Path(path).read_text() for path in outputs["twice.shouted"]] == ["IN A FILE\n"] * 2
    assert len(list((work / "images").glob("*.sif"))) == 2
    (log,) = {path.read_text() for path in work.glob("run/*/call-*/singularity.log.txt")}
    assert log == ""


BOUTIQUES = {
    "name": "copy",
    "description": "copies a file",
    "tool-version": "1",
    "schema-version": "0.5",
    "command-line": 'sh -c \'cat "$0"; echo "$K"; pwd; cp "$0" made\' [FILE]',
    "container-image": {"type": "singularity", "image": "alpine:3", "index": "docker://"},
    "environment-variables": [{"name": "K", "value": "a b"}],
    "inputs": [{"id": "file", "name": "file", "type": "File", "value-key": "[FILE]"}],
    "output-files": [{"id": "made", "name": "made", "path-template": "made"}],
}


def test_boutiques(program: Callable[..., subprocess.CompletedProcess[str]], work: Path) -> None:
    (work / "copy.json").write_text(json.dumps(BOUTIQUES))
    (work / "job.json").write_text('{"file": "text"}')
    (work / "text").write_text("a text\n")
    done = program("bosh", "exec", "launch", "-s", "copy.json", "job.json")
    assert f"a text\na b\n{work}\n" in done.stdout
    assert (work / "made").read_text() == "a text\n"


REFRAME = """
import reframe as rfm
import reframe.utility.sanity as sn

site_configuration = {
    "systems": [{
        "name": "here", "hostnames": [".*"],
        "partitions": [{"name": "all", "scheduler": "local", "launcher": "local", "environs": ["builtin"],
                        "container_platforms": [{"type": "Singularity"}, {"type": "Apptainer"}]}],
    }],
    "environments": [{"name": "builtin"}],
}

@rfm.simple_test
class Check(rfm.RunOnlyRegressionTest):
    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    platform = parameter(["Singularity", "Apptainer"])

    @run_before("run")
    def contained(self):
        self.container_platform = self.platform
        self.container_platform.image = "docker://alpine:3"
        self.container_platform.command = "bash -c 'pwd; cat input /mnt/lent/text; echo made >out'"
        self.container_platform.mount_points = [("@WORK@", "/mnt/lent")]
        self.prerun_cmds = ["echo input >input"]

    @sanity_function
    def said(self):
        return sn.all([sn.assert_found(r"^/rfm_workdir\\ninput\\na text$", self.stdout), sn.assert_found(r"^made$", "out")])
"""


def test_reframe(program: Callable[..., subprocess.CompletedProcess[str]], work: Path) -> None:
    (work / "check.py").write_text(REFRAME.replace("@WORK@", str(work)))
    (work / "text").write_text("a text\n")
    done = program(
        "reframe", "--nocolor", "-C", "check.py", "-c", "check.py", "-r", f"--prefix={work}/runs", "--report-file", f"{work}/report.json"
    )
    assert "Ran 2/2 test case(s) from 2 check(s) (0 failure(s)" in done.stdout


SWE = """
import json, os
from minisweagent.environments.singularity import SingularityEnvironment

here = SingularityEnvironment(image="docker://alpine:3", env={"A": "a b", "B": "1,2"}, timeout=20)
said = [here.execute({"command": command}) for command in (
    "pwd; id -u; echo $A; echo $B",
    "echo kept >/var/lib/kept; mkdir -p /usr/local/new; chown 0:0 /var/lib/kept",
    "cat /var/lib/kept; ls -d /usr/local/new; ls missing",
)]
said.append(here.execute({"command": "sleep 66.25"}, timeout=1))
said.append(here.execute({"command": "pwd"}, cwd="/usr/local/new"))
sandbox = str(here.sandbox_dir)
here.cleanup()
print(json.dumps([[one["output"], one["returncode"]] for one in said] + [os.path.exists(sandbox)]))
"""


def test_mini_swe_agent(program: Callable[..., subprocess.CompletedProcess[str]], work: Path) -> None:
    (work / "script.py").write_text(SWE)
    done = program("python3", "script.py", env={"MSWEA_SILENT_STARTUP": "1", "TMPDIR": str(work)})
    assert json.loads(done.stdout) == [
        ["/root\n0\na b\n1,2\n", 0],
        ["", 0],
        ["kept\n/usr/local/new\nls: cannot access 'missing': No such file or directory\n", 2],
        ["", -1],
        ["/usr/local/new\n", 0],
        False,
    ]


STYX = """
from styxdefs import Metadata
from styxsingularity import SingularityRunner

runner = SingularityRunner(data_dir="data", environ={"A": "1", "B": "two"})
here = runner.start_execution(Metadata(id="1", name="copy", package="copy", container_image_tag="alpine:3"))
given, made = here.input_file("text"), here.output_file("made")
said = []
here.run(["bash", "-c", f"cat {given}; echo $A $B; cp {given} made"], handle_stdout=said.append)
print(*said, open(made).read(), sep="|")
"""


def test_styx(program: Callable[..., subprocess.CompletedProcess[str]], work: Path) -> None:
    (work / "script.py").write_text(STYX)
    (work / "text").write_text("a text\n")
    assert program("python3", "script.py").stdout == "a text|1 two|a text\n\n"
