"""The image of the tables and of the documentation: a small Debian tree with all that a definition file can put into an image.

demo.sif   runscript, startscript, test, help, labels, environment, the SCIF applications count and mesh
made       of `rootfs` (conftest), with its scripts written here; Apptainer runs the same file
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from sciexec import sif

CREATED = 1580608922  # 2020-02-02T02:02:02Z

DEFINITION = """\
Bootstrap: localimage
From: debian.sif

%help
    The demonstration: it prints its arguments, one a line.
"""

RUNSCRIPT = """\
#!/bin/sh
case $1 in
--code) exit "$2" ;;
--env) eval "echo \\"\\$$2\\""; exit ;;
esac
echo "demo with $# arguments"
for argument do printf '<%s>\\n' "$argument"; done
"""

STARTSCRIPT = """\
#!/bin/sh
echo "demo started with $*"
echo "and an error" >&2
exec sleep 3600
"""

TEST = """\
#!/bin/sh
echo "test of demo with $# arguments"
[ "$1" != fail ] || exit 3
"""

HELP = """\
    The demonstration: it prints its arguments, one a line.
"""

LABELS = {"Author": "Ann", "Version": "1.2", "org.example.a b": 'with "quotes" and $dollar'}

ENVIRONMENT = """\
export DEMO="from the image"
export DEMO_DEFAULT="${DEMO_DEFAULT:-default of the image}"
export DEMO_QUOTED='a "b" $c `d`'
export DEMO_NAME="$APPTAINER_NAME"
export PATH="/opt/demo/bin:$PATH"
"""

# What `build` lays down in every image: the variables of all applications, and, for --app, those of one.
ALL_APPS = """\
export SCIF_APPDATA_mesh="/scif/data/mesh" SCIF_APPROOT_mesh="/scif/apps/mesh" SCIF_APPBIN_mesh="/scif/apps/mesh/bin"
export SCIF_APPDATA_count="/scif/data/count" SCIF_APPROOT_count="/scif/apps/count" SCIF_APPBIN_count="/scif/apps/count/bin"
"""

ONE_APP = """\
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    SCIF_APPNAME="$SINGULARITY_APPNAME"
    SCIF_APPROOT="/scif/apps/$SCIF_APPNAME"
    SCIF_APPDATA="/scif/data/$SCIF_APPNAME"
    export SCIF_APPNAME SCIF_APPROOT SCIF_APPDATA
    [ ! -d "$SCIF_APPROOT/bin" ] || PATH="$SCIF_APPROOT/bin:$PATH"
    export PATH
    for script in 01-base 90-environment; do
        [ ! -f "$SCIF_APPROOT/scif/env/$script.sh" ] || . "$SCIF_APPROOT/scif/env/$script.sh"
    done
fi
"""

BASE = """\
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/.singularity.d/libs"
"""

FILES = {
    ".singularity.d/Singularity": DEFINITION,
    ".singularity.d/runscript": RUNSCRIPT,
    ".singularity.d/startscript": STARTSCRIPT,
    ".singularity.d/test": TEST,
    ".singularity.d/runscript.help": HELP,
    ".singularity.d/labels.json": json.dumps(LABELS, indent="\t") + "\n",
    ".singularity.d/env/01-base.sh": "",
    ".singularity.d/env/90-environment.sh": ENVIRONMENT,
    ".singularity.d/env/94-appsbase.sh": ALL_APPS,
    ".singularity.d/env/95-apps.sh": ONE_APP,
    ".singularity.d/env/99-base.sh": BASE,
    "opt/demo/bin/demo-tool": '#!/bin/sh\necho "the tool of demo"\n',
    "opt/demo/text": "text of demo\n",
    "scif/apps/mesh/scif/runscript": '#!/bin/sh\necho "mesh $* from $SCIF_APPNAME, $HELLO"\n',
    "scif/apps/mesh/scif/runscript.help": "    It makes a mesh.\n",
    "scif/apps/mesh/scif/labels.json": '{\n\t"Tongue": "English"\n}\n',
    "scif/apps/mesh/scif/test": '#!/bin/sh\necho "test of mesh"\n',
    "scif/apps/mesh/scif/env/90-environment.sh": 'export HELLO="variable of mesh"\n',
    "scif/apps/mesh/bin/mesh-tool": '#!/bin/sh\necho "the tool of mesh"\n',
    "scif/apps/count/scif/runscript": '#!/bin/sh\necho "$#"\n',
}
PROGRAMS = (".singularity.d/runscript", ".singularity.d/startscript", ".singularity.d/test", "/bin/", "/scif/runscript", "/scif/test")
DIRECTORIES = (".singularity.d/libs", ".singularity.d/actions", "scif/data/mesh", "scif/data/count")


def make_tree(rootfs: Path, target: Path) -> Path:
    """A copy of `rootfs` at `target`, with the demonstration in it."""
    shutil.copytree(rootfs, target, symlinks=True)
    for directory in DIRECTORIES:
        (target / directory).mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if any(part in name for part in PROGRAMS) else 0o644)
    (target / "singularity").symlink_to(".singularity.d/runscript")
    return target


def metadata() -> bytes:
    """inspect-metadata.json of demo.sif, as `build` writes it."""

    def text(name: str) -> str:
        return FILES[name].rstrip("\n")

    mesh = "scif/apps/mesh/scif/"
    attributes = {
        "apps": {
            "count": {"runscript": text("scif/apps/count/scif/runscript")},
            "mesh": {
                "environment": {"/" + mesh + "env/90-environment.sh": text(mesh + "env/90-environment.sh")},
                "labels": json.loads(FILES[mesh + "labels.json"]),
                "runscript": text(mesh + "runscript"),
                "test": text(mesh + "test"),
                "helpfile": text(mesh + "runscript.help"),
            },
        },
        "environment": {"/.singularity.d/env/90-environment.sh": ENVIRONMENT.rstrip("\n")},
        "labels": LABELS,
        "runscript": RUNSCRIPT.rstrip("\n"),
        "startscript": STARTSCRIPT.rstrip("\n"),
        "test": TEST.rstrip("\n"),
        "helpfile": HELP.rstrip("\n"),
        "deffile": DEFINITION.rstrip("\n"),
    }
    return json.dumps({"data": {"attributes": attributes}, "type": "container"}).encode()


def make_sif(mksquashfs: str, tree: Path, path: Path, machine: str) -> Path:
    """The tree as a SIF file: definition file, metadata, gzip SquashFS in which everything is root's."""
    squashfs = path.with_suffix(".squashfs")
    command = [mksquashfs, str(tree), str(squashfs), "-noappend", "-quiet", "-no-progress", "-all-root", "-comp", "gzip"]
    subprocess.run(command, check=True, capture_output=True)
    content = squashfs.read_bytes()
    squashfs.unlink()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    builder = sif.Builder(fd, arch=machine, created=CREATED)
    builder.add(sif.DEFFILE, "", DEFINITION.encode())
    builder.add(sif.GENERIC_JSON, "inspect-metadata.json", metadata())
    os.pwrite(fd, content, builder.partition_offset())
    builder.finish(len(content))
    os.close(fd)
    return path


# --- the image out of an OCI image ------------------------------------------------------------------------------------------

# What shells make something of, and what a start out of data must leave alone.
VARIABLES = {
    "PATH": "/opt/demo/bin:/usr/local/bin:/usr/bin:/bin",
    "PLAIN": "of the image",
    "QUOTED": "a \"b\" 'c' \\d",
    "DOLLAR": "$HOME ${HOME} $(id) `id`",
    "EMPTY": "",
}
ENTRYPOINT = ("busybox", "printf", "<%s>\\n", 'an "entry" $HOME')
COMMAND = ("default", "two  words", "$PLAIN", "it's")


def make_layout(umoci: str, rootfs: Path, work: Path) -> Path:
    """An OCI layout, tag "app": one layer, ENV, ENTRYPOINT and CMD as above; made by umoci."""
    layout = work / "layout"
    image = f"{layout}:app"

    def make(*arguments: str | Path) -> None:
        subprocess.run([umoci, *map(str, arguments)], check=True, capture_output=True, text=True)

    make("init", "--layout", layout)
    make("new", "--image", image)
    make("insert", "--rootless", "--image", image, rootfs, "/")
    words = ["config", "--image", image, "--created", "2020-02-02T02:02:02Z"]
    words += [word for name, value in VARIABLES.items() for word in ("--config.env", f"{name}={value}")]
    words += [word for argument in ENTRYPOINT for word in ("--config.entrypoint", argument)]
    words += [word for argument in COMMAND for word in ("--config.cmd", argument)]
    make(*words, "--config.label", "org.opencontainers.image.title=app")
    return layout


def make_oci_sif(umoci: str, rootfs: Path, work: Path, sciexec: Path) -> Path:
    """oci.sif in `work`: what `sciexec pull` makes of that layout."""
    layout = make_layout(umoci, rootfs, work)
    command = [sciexec, "pull", "--quiet", work / "oci.sif", f"oci:{layout}:app"]
    subprocess.run(command, env={**os.environ, "SCIEXEC_CACHEDIR": str(work / "cache")}, check=True, capture_output=True)
    return work / "oci.sif"
