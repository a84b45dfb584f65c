"""spython, the Python client: its own tests, as they are shipped, and a script of ours that calls everything it has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients import Call, Engine, judge, processes, shipped

pytest_plugins = ["clients_fixtures"]

CANNOT = {"test_client::test_oras_pull": "it pulls from the internet, by oras://"}

# What each call gives is noted under its name; a call's own output would be noise.
SCRIPT = """
import io, json, os, subprocess, sys
from spython.main import Client
from spython.utils import check_install, get_singularity_version

said = {}
Client.quiet = True
said["installed"] = check_install()
said["version"] = [Client.version(), get_singularity_version()]
said["pulled"] = Client.pull("docker://alpine:3", name="named.sif")
said["pulled again"] = Client.pull("docker://alpine:3", name="named.sif", force=True)
said["pulled into"] = Client.pull("docker://alpine:3", pull_folder="folder")
image, lines = Client.pull("docker://alpine:3", name="streamed.sif", stream=True)
said["streamed"] = [image, len(list(lines)) >= 0]
said["built"] = Client.build("docker://alpine:3", "built.sif", sudo=False)
said["sandbox"] = Client.build("built.sif", "box", sandbox=True, sudo=False, options=["--fakeroot"])
said["clean"] = Client.execute("named.sif", ["sh", "-c", "echo one; echo two"])
said["noisy"] = Client.execute("named.sif", ["sh", "-c", "echo out; echo err >&2"])
said["failing"] = Client.execute("named.sif", ["sh", "-c", "echo out; exit 5"])
said["result"] = Client.execute("named.sif", ["true"], return_result=True)
said["bound"] = Client.execute("named.sif", ["cat", "/mnt/lent"], bind=[os.path.abspath("lent") + ":/mnt/lent"])
said["options"] = Client.execute("named.sif", ["sh", "-c", "echo $A$UNSEEN"], options=["--cleanenv", "--env", "A=set"])
said["lines"] = list(Client.execute("named.sif", ["sh", "-c", "echo one; echo two"], stream=True))
said["ran"] = Client.run("named.sif", ["sh", "-c", "echo ran"])
said["in the box"] = Client.execute("box", ["cat", "/etc/hostname-of-none"], return_result=True)["return_code"]
said["inspected"] = Client.inspect("named.sif")
Client.load("named.sif")
said["loaded"] = Client.execute(["echo", "loaded"])
with open("said.json", "w") as file:
    json.dump(said, file)
"""

INSTANCES = """
import json, os
from spython.main import Client

said = {}
Client.quiet = True
said["none"] = Client.instances(return_json=True)
one = Client.instance("named.sif", name="one-of-ours", options=["--bind", "lent:/mnt/lent"])
said["uri"] = one.get_uri()
said["logs"] = [os.path.exists(path) for entry in Client.instances() for path in (entry.log_out_path, entry.log_err_path)]
listed = Client.instances(return_json=True)
said["listed"] = [[entry["instance"], entry["img"], entry["pid"] > 1, entry["ip"] is not None] for entry in listed]
said["executed"] = Client.execute(one, ["cat", "/mnt/lent"])
said["code"] = Client.execute(one, ["sh", "-c", "exit 9"], return_result=True)["return_code"]
two = Client.instance("named.sif", name="two-of-ours")
said["names"] = sorted(entry.name for entry in Client.instances())
said["stopped"] = one.stop(timeout=5)
said["left"] = [entry.name for entry in Client.instances()]
said["stopped all"] = Client.instance_stopall()
said["nothing"] = Client.instances(return_json=True)
with open("said.json", "w") as file:
    json.dump(said, file)
"""


@pytest.fixture
def script(engine: Engine, world: dict[str, str], call: Call, work: Path) -> Callable[[str], Any]:
    """script(TEXT) -> what it noted; it has said nothing on stderr."""
    bin = engine("spython")

    def run(text: str) -> Any:
        (work / "script.py").write_text(text)
        done = call(bin / "python3", "script.py")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return json.loads((work / "said.json").read_text())

    return run


@pytest.mark.parametrize("flavour", ["singularity-ce", "apptainer"])
def test_its_own_tests(
    flavour: str, engine: Engine, names: Path, apptainers: Path, call: Call, work: Path, record_property: Callable[[str, object], None]
) -> None:
    bin = engine("spython")
    (tests,) = bin.parent.glob("lib/python3*/site-packages/spython/tests")
    place = {"singularity-ce": names, "apptainer": apptainers}[flavour]
    results = shipped(call, bin / "python3", work, f"{place}:{bin}:/usr/bin:/bin", f"--rootdir={tests}", tests)
    judge(f"spython's own tests, as {flavour}", results, CANNOT, record_property)


def test_a_script(script: Callable[[str], Any], work: Path) -> None:
    (work / "lent").write_text("lent\n")
    (work / "folder").mkdir()
    said = script(SCRIPT)
    inspected = said.pop("inspected")
    assert inspected["attributes"]["labels"]["org.label-schema.usage.singularity.deffile.bootstrap"] == "docker"
    assert set(inspected["attributes"]) >= {"labels", "runscript", "environment", "deffile"}
    versions = said.pop("version")
    assert versions == [versions[0]] * 2
    assert versions[0].startswith("singularity-ce version 4.")
    assert said == {
        "installed": True,
        "pulled": "named.sif",
        "pulled again": "named.sif",
        "pulled into": "folder/alpine:3.sif",
        "streamed": ["streamed.sif", True],
        "built": "built.sif",
        "sandbox": "box",
        "clean": "one\ntwo\n",
        "noisy": ["out\n", "err\n"],
        "failing": {"message": "out\n", "return_code": 5},
        "result": {"message": [], "return_code": 0},
        "bound": "lent\n",
        "options": "set\n",
        "lines": ["one\n", "two\n"],
        "ran": "ran",
        "in the box": 1,
        "loaded": "loaded\n",
    }
    assert os.access(work / "folder/alpine:3.sif", os.X_OK)


def test_instances(script: Callable[[str], Any], pulled: Callable[[str], Path], work: Path) -> None:
    (work / "named.sif").symlink_to(pulled("small"))
    (work / "lent").write_text("lent\n")
    assert script(INSTANCES) == {
        "none": [],
        "uri": "instance://one-of-ours",
        "logs": [True, True],
        "listed": [["one-of-ours", str(work / "named.sif"), True, True]],
        "executed": "lent\n",
        "code": 9,
        "names": ["one-of-ours", "two-of-ours"],
        "stopped": 0,
        "left": ["two-of-ours"],
        "stopped all": 0,
        "nothing": [],
    }
    assert processes(f"{work}/named.sif") == []


def test_a_shell(engine: Engine, call: Call, pulled: Callable[[str], Path]) -> None:
    text = f"from spython.main import Client; Client.shell({str(pulled('small'))!r}, options=['--env', 'A=set'])"
    done = call(engine("spython") / "python3", "-c", text, input="echo $A; exit 4\n")
    assert (done.stdout, done.returncode) == ("set\n", 4), done.stderr
