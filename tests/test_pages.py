"""The pages of the documentation about the environment, images and names: every example on them works, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from namespace_fixtures import Make

from convert import metadata

pytest_plugins = ["run_fixtures"]
TREE = Path(__file__).resolve().parent.parent
PAGES = ("environment", "images", "switch")


@pytest.fixture(scope="module")
def place(rootfs: Path, make_image: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples speak of: image.sif and sandbox with an application "mesh", site.sh, settings.sh."""
    folder = tmp_path_factory.mktemp("pages")
    root = folder / "sandbox"
    shutil.copytree(rootfs, root, symlinks=True)
    files = {name: text for name, text in metadata.SCRIPTS.items() if name.startswith(metadata.ENV)}
    files |= {
        ".singularity.d/labels.json": json.dumps({"maintainer": "ann"}),
        ".singularity.d/runscript": "#!/bin/sh\nexec echo run\n",
        ".singularity.d/runscript.help": "Run it.\n",
        "scif/apps/mesh/scif/runscript": "#!/bin/sh\nexec echo mesh\n",
        "scif/apps/mesh/scif/runscript.help": "Mesh it.\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    shutil.copy(make_image(root, "sif"), folder / "image.sif")
    (folder / "site.sh").write_text("export SITE=1\n")
    for name in (".local/share/bash-completion/completions", ".zfunc", ".config/fish/completions"):
        (folder / name).mkdir(parents=True)
    return folder


def examples(page: str) -> list[str]:
    """The indented lines of a page that call something; others are the content of the file that their first line names."""
    text = (TREE / f"docs/{page}.md").read_text()
    return [line[4:] for line in text.splitlines() if re.match(r"    (\S+=\S+ )?(sciexec|singularity) ", line)]


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page(page: str, place: Path, sciexec_path: Path) -> None:
    text = (TREE / f"docs/{page}.md").read_text()
    for name, content in re.findall(r"^    # (\S+\.sh)\n((?:    .*\n)+)", text, re.M):
        (place / name).write_text("\n".join(line[4:] for line in content.splitlines()) + "\n")
    (place / "settings.sh").touch()
    lines = examples(page)
    assert len(lines) >= 5
    for line in lines:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            env={"HOME": str(place), "PATH": f"{sciexec_path.parent}:/usr/bin:/bin", "USER": "ann", "TERM": "dumb"},
            cwd=place, capture_output=True, text=True, errors="replace", timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), line
        assert done.stdout or ">" in line, line


def test_what_the_page_on_the_environment_says(place: Path, sciexec_path: Path) -> None:
    def inside(words: str) -> dict[str, str]:
        env = {"HOME": str(place), "PATH": f"{sciexec_path.parent}:/usr/bin:/bin", "USER": "ann", "PYTHONPATH": "x"}
        line = f"sciexec exec {words} env"
        done = subprocess.run(["/bin/sh", "-c", line], env=env, cwd=place, capture_output=True, text=True, check=True)
        return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)

    (place / "settings.sh").write_text("export SCRATCH=/scratch/$USER\nDATA=\"${DATA:-$SCRATCH/data}\" MODE='fast'\n")
    found = inside("--env-file settings.sh image.sif")
    assert (found["SCRATCH"], found["DATA"], found["MODE"]) == ("/scratch/ann", "/scratch/ann/data", "fast")
    assert found["PYTHONPATH"] == "x" and "PYTHONPATH" not in inside("--no-env PYTHONPATH,PERL5LIB image.sif")
    assert inside("--bind site.sh:/.singularity.d/env/99-site.sh image.sif")["SITE"] == "1"
    assert inside("--env 'WHERE=$(pwd)' sandbox")["WHERE"] == os.path.realpath(place)
    assert inside("--no-eval --env 'PRICE=$5' sandbox")["PRICE"] == "$5"
    assert inside("--app mesh image.sif")["SCIF_APPROOT"] == "/scif/apps/mesh"
    assert inside("--env 'PATH=$PATH:/opt/tools/bin' image.sif")["PATH"].endswith("/bin:/opt/tools/bin")
