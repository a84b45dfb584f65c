"""What an image says about itself, in the two places where Apptainer looks for it: objects of the SIF and /.singularity.d.

    SIF, in front of the partition             the tree
      1  definition file                         .singularity.d/Singularity
      2  inspect-metadata.json                   .singularity.d/labels.json, runscript, startscript, env/*.sh
      3  oci-config.json                         .singularity.d/actions/*            (what runtimes of 2018 to 2021 called)
      4  sciexec.start                           .run .exec .test .shell singularity environment -> .singularity.d/...
                                                 dev proc sys tmp ... for a runtime to mount upon

ENV, ENTRYPOINT, CMD and labels are written by strangers.  In a script they stand in single quotes, where the shell gives no
byte a meaning; in JSON they are strings; nothing on the host evaluates either.  sciexec itself takes them from sciexec.start
and hands them to execve(2), so that an image needs no shell.

No wall clock is read: the same image gives the same bytes.
Sources: OCI image specification, config.md; the images that Apptainer writes.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.reference import parse
from sciexec import __version__, environment, sif
from sciexec.errors import ImageError, escaped

if TYPE_CHECKING:
    from convert import oci

START = "sciexec.start"
ENV = ".singularity.d/env"
FROM_OCI = f"{ENV}/10-docker2singularity.sh"
FROM_DEFINITION = f"{ENV}/90-environment.sh"

NOTHING_TO_RUN = "This image has neither ENTRYPOINT nor CMD: name a command."

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell half of a pair, which has no bytes in UTF-8
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
YEAR_10000 = 253402300800  # seconds since 1970; ISO 8601 has four digits for a year


@dataclass(frozen=True)
class File:
    """A file to be laid on top of the layers.

    Arguments:
        kind: "d", "f" or "l".  mode: permission bits.  content: a file's bytes, or a link's target.
        only_if_missing: what the image has at that path stays, whatever it is.
    """

    kind: str
    mode: int
    content: bytes = b""
    only_if_missing: bool = False


def objects(image: oci.Image) -> list[tuple[int, str, bytes]]:
    """(data type, name, bytes) of the objects in front of the partition, in order.

    Raises ImageError where the image's settings are not what the OCI specification says.
    """
    start = _Start(image)
    definition = _definition(image.reference)
    attributes = {
        "deffile": definition.rstrip("\n"),
        "environment": {f"/{FROM_OCI}": start.script().rstrip("\n"), f"/{FROM_DEFINITION}": SCRIPTS[FROM_DEFINITION].rstrip("\n")},
        "labels": start.labels,
        "runscript": start.runscript().rstrip("\n"),
        "startscript": SCRIPTS[".singularity.d/startscript"].rstrip("\n"),
    }
    return [
        (sif.DEFFILE, "", definition.encode()),
        (sif.GENERIC_JSON, "inspect-metadata.json", _json({"data": {"attributes": attributes}, "type": "container"})),
        (sif.GENERIC_JSON, "oci-config.json", _json(image.settings)),
        (sif.GENERIC, START, environment.dump(start.env, start.entrypoint, start.cmd)),
    ]


def files(image: oci.Image) -> dict[bytes, File]:
    """Path (no leading slash) -> what Apptainer expects there; a directory comes before what it holds.

    Mount points, links in the root and scripts that a person may have edited are left alone where the image has them.
    Raises ImageError as objects() does.
    """
    start = _Start(image)
    tree = {path.encode(): File("d", 0o755) for path in (".singularity.d", ".singularity.d/actions", ENV, ".singularity.d/libs")}
    for path, mode in MOUNT_POINTS.items():
        tree[path.encode()] = File("d", mode, only_if_missing=True)
    for path in ("etc/hosts", "etc/resolv.conf"):
        tree[path.encode()] = File("f", 0o644, only_if_missing=True)
    for path, target in LINKS.items():
        tree[path.encode()] = File("l", 0o777, target.encode(), only_if_missing=True)
    for path, text in SCRIPTS.items():
        tree[path.encode()] = File("f", 0o755, text.encode(), only_if_missing=path in KEPT)
    tree[FROM_OCI.encode()] = File("f", 0o755, start.script().encode())
    tree[b".singularity.d/runscript"] = File("f", 0o755, start.runscript().encode())
    tree[b".singularity.d/labels.json"] = File("f", 0o644, _json(start.labels, indent="\t") + b"\n")
    tree[b".singularity.d/Singularity"] = File("f", 0o644, _definition(image.reference).encode())
    return tree


class _Start:
    """How the image wants to be started, checked: every value is text that execve(2) and a shell can take."""

    def __init__(self, image: oci.Image) -> None:
        self._settings: dict[str, Any] = image.settings
        self._name = image.reference
        self.env = self._strings("Env")
        self.entrypoint = self._strings("Entrypoint")
        self.cmd = self._strings("Cmd")
        self.labels = self._labels(image)

    def _strings(self, key: str) -> list[str]:
        value = self._settings.get(key)
        if value is None:
            return []
        if isinstance(value, str):  # Docker's API has taken a bare string for a list of one ever since
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ImageError(f"reading the settings of {escaped(self._name)}: {key} is not a list of strings")
        if any("\0" in item or SURROGATE.search(item) for item in value):
            raise ImageError(f"reading the settings of {escaped(self._name)}: {key} holds a NUL character or half a surrogate pair")
        return value

    def _labels(self, image: oci.Image) -> dict[str, str]:
        labels = self._settings.get("Labels") or {}
        if not isinstance(labels, dict) or not all(isinstance(text, str) for text in labels.values()):
            raise ImageError(f"reading the settings of {escaped(self._name)}: Labels is not a map of strings")
        transport, source = _source(image.reference)
        own = {
            "org.label-schema.build-arch": image.arch,
            "org.label-schema.build-date": _iso(image.created),
            "org.label-schema.schema-version": "1.0",
            "org.label-schema.usage.sciexec.version": __version__,
            "org.label-schema.usage.singularity.deffile.bootstrap": transport,
            "org.label-schema.usage.singularity.deffile.from": source,
            "org.opencontainers.image.base.digest": image.manifest_digest,
            "org.opencontainers.image.base.name": source if transport == "docker" else "",  # a path on this host names nothing elsewhere
        }
        return {**labels, **{name: text for name, text in own.items() if text}}

    def script(self) -> str:
        """env/10-docker2singularity.sh: ENV, each variable unless it is set already; PATH in any case.

        Names that a shell cannot assign to are left out; of a name given twice the last counts, as with execve's users.
        """
        variables: dict[str, str | None] = {}
        for item in self.env:
            name, equals, value = item.partition("=")
            if VARIABLE.fullmatch(name):
                variables[name] = value if equals else None
        lines = ["#!/bin/sh"]
        for name, text in variables.items():
            if text is not None:
                lines.append(f"{name}={quote(text)}" if name == "PATH" else f'[ -n "${{{name}:-}}" ] || {name}={quote(text)}')
            lines.append(f"export {name}")
        return "\n".join(lines) + "\n"

    def runscript(self) -> str:
        """ENTRYPOINT and CMD as a script; arguments take the place of CMD.

        Every word is literal, unlike in Apptainer's own runscript, which puts arguments through one more evaluation.  The
        last line is never reached: Apptainer interprets a script that has it in its built-in shell, and so runs images
        that have no /bin/sh.  Tried with Apptainer 1.4.
        """
        words = "".join(f"{quote(word)} " for word in self.entrypoint)
        lines = ["#!/bin/sh", "# ENTRYPOINT and CMD of the image, every word as it is; arguments take the place of CMD."]
        if self.cmd:
            lines += ["if [ $# -eq 0 ]; then", "    set -- " + " ".join(map(quote, self.cmd)), "fi"]
        elif not self.entrypoint:
            lines += ["if [ $# -eq 0 ]; then", f"    echo {quote(NOTHING_TO_RUN)} >&2", "    exit 1", "fi"]
        lines += [f'exec {words}"$@"', 'eval "set ${SINGULARITY_OCI_RUN}"']
        return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """`text` as one word of a POSIX shell: between single quotes nothing but the single quote has a meaning.

    That one stands between double quotes, for Apptainer's built-in shell keeps the backslash of \\' in an assignment.
    """
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _source(reference: str) -> tuple[str, str]:
    """A reference in the two words of a definition file: docker://debian:12 -> docker, debian:12.

    Of an archive or layout it keeps the last part of the path: the same image gives the same bytes wherever it lies.
    """
    ref = parse(reference)
    if ref.transport == "docker":
        return ref.transport, str(ref)[len("docker://") :]
    return ref.transport, escaped(os.path.basename(os.path.abspath(ref.path))) + (f":{ref.tag}" if ref.tag else "")


def _definition(reference: str) -> str:
    transport, source = _source(reference)
    return f"bootstrap: {transport}\nfrom: {source}\n"


def _iso(created: int | None) -> str:
    """SOURCE_DATE_EPOCH, else the image's own time, in ISO 8601; "" for none, or none that fits."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch.isdecimal():
        created = int(epoch)
    if created is None or not 0 <= created < YEAR_10000:
        return ""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))


def _json(value: object, indent: str | None = None) -> bytes:
    """JSON in ASCII, keys sorted: strings of every kind survive, half surrogates too."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=separators).encode()


# For a runtime to mount upon; /tmp and /var/tmp as a system has them.
MOUNT_POINTS = {
    "dev": 0o755,
    "proc": 0o755,
    "root": 0o755,
    "var": 0o755,
    "var/tmp": 0o1777,
    "tmp": 0o1777,
    "etc": 0o755,
    "sys": 0o755,
    "home": 0o755,
}

LINKS = {
    "singularity": ".singularity.d/runscript",
    ".run": ".singularity.d/actions/run",
    ".exec": ".singularity.d/actions/exec",
    ".test": ".singularity.d/actions/test",
    ".shell": ".singularity.d/actions/shell",
    "environment": FROM_DEFINITION,
}

# Written by hand or from a definition file when an image that was a SIF before comes back as an OCI image.
KEPT = {FROM_DEFINITION, f"{ENV}/94-appsbase.sh", ".singularity.d/startscript"}

# Sourced one after another in the order of their names, so a script must not leave variables of its own behind.
_ENTER = """\
#!/bin/sh
for script in /.singularity.d/env/*.sh; do
    if [ -f "$script" ]; then
        . "$script"
    fi
done
unset script
"""

SCRIPTS = {
    f"{ENV}/01-base.sh": """\
#!/bin/sh
# A search path for an image that sets none.
PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"
export PATH
""",
    FROM_DEFINITION: """\
#!/bin/sh
# Variables of the image's users: a definition file's %environment goes here.
""",
    f"{ENV}/94-appsbase.sh": "",
    f"{ENV}/95-apps.sh": """\
#!/bin/sh
# --app NAME: the application's directories by the Scientific Filesystem's names, then its own environment.
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    export SCIF_APPS=/scif/apps SCIF_DATA=/scif/data SCIF_APPNAME="$SINGULARITY_APPNAME"
    export SCIF_APPROOT="$SCIF_APPS/$SCIF_APPNAME" SCIF_APPDATA="$SCIF_DATA/$SCIF_APPNAME"
    export SCIF_APPMETA="$SCIF_APPROOT/scif" SCIF_APPINPUT="$SCIF_APPDATA/input" SCIF_APPOUTPUT="$SCIF_APPDATA/output"
    export SCIF_APPBIN="$SCIF_APPROOT/bin" SCIF_APPLIB="$SCIF_APPROOT/lib"
    export SCIF_APPENV="$SCIF_APPMETA/env/90-environment.sh" SCIF_APPLABELS="$SCIF_APPMETA/labels.json"
    export SCIF_APPRUN="$SCIF_APPMETA/runscript" SCIF_APPSTART="$SCIF_APPMETA/startscript"
    export SCIF_APPTEST="$SCIF_APPMETA/test" SCIF_APPHELP="$SCIF_APPMETA/runscript.help"
    export PATH="$SCIF_APPBIN:$SCIF_APPROOT:$PATH" LD_LIBRARY_PATH="$SCIF_APPLIB${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    if [ -f "$SCIF_APPMETA/env/01-base.sh" ]; then
        . "$SCIF_APPMETA/env/01-base.sh"
    fi
    if [ -f "$SCIF_APPENV" ]; then
        . "$SCIF_APPENV"
    fi
fi
""",
    f"{ENV}/99-base.sh": """\
#!/bin/sh
# Libraries that the runtime brings from the host come after the image's own.
case ":${LD_LIBRARY_PATH:-}:" in
    *:/.singularity.d/libs:*) ;;
    *) LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/.singularity.d/libs" ;;
esac
PS1="${PS1:-container> }"
export LD_LIBRARY_PATH PS1
""",
    f"{ENV}/99-runtimevars.sh": """\
#!/bin/sh
# What the caller asked of PATH: a new one, something in front, something behind.
PATH="${SING_USER_DEFINED_PATH:-$PATH}"
PATH="${SING_USER_DEFINED_PREPEND_PATH:+$SING_USER_DEFINED_PREPEND_PATH:}$PATH"
PATH="$PATH${SING_USER_DEFINED_APPEND_PATH:+:$SING_USER_DEFINED_APPEND_PATH}"
export PATH
unset SING_USER_DEFINED_PATH SING_USER_DEFINED_PREPEND_PATH SING_USER_DEFINED_APPEND_PATH
""",
    ".singularity.d/startscript": """\
#!/bin/sh
# What an instance does when it starts: nothing.
""",
    ".singularity.d/actions/exec": _ENTER + 'exec "$@"\n',
    ".singularity.d/actions/run": _ENTER
    + """\
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    exec "/scif/apps/$SINGULARITY_APPNAME/scif/runscript" "$@"
fi
exec /.singularity.d/runscript "$@"
""",
    ".singularity.d/actions/shell": _ENTER
    + """\
for shell in "${SINGULARITY_SHELL:-}" /bin/bash /bin/sh; do
    if [ -x "$shell" ]; then
        exec "$shell" "$@"
    fi
done
echo 'This image has no shell.' >&2
exit 1
""",
    ".singularity.d/actions/start": _ENTER
    + """\
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    exec "/scif/apps/$SINGULARITY_APPNAME/scif/startscript" "$@"
fi
exec /.singularity.d/startscript "$@"
""",
    ".singularity.d/actions/test": _ENTER
    + """\
for script in "${SINGULARITY_APPNAME:+/scif/apps/$SINGULARITY_APPNAME/scif/test}" /.singularity.d/test; do
    if [ -x "$script" ]; then
        exec "$script" "$@"
    fi
done
echo 'This image has no test.'
""",
}
