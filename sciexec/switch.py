"""Switching from Apptainer or SingularityCE to sciexec and back: the commands `apptainer` and `singularity`, and `buildcfg`.

    DIR/apptainer, DIR/singularity     #!/absolute/python3 -IS
                                       four lines that call sciexec.__main__.main("singularity", ...)

-I makes the interpreter deaf to PYTHONPATH and its like, -S leaves out everybody's .pth files; the paths are absolute, so that an
empty environment will do.  `singularity --version`, which clients call most, costs an interpreter and three small modules.
"""

from __future__ import annotations

import os
import sys

from sciexec import called, version
from sciexec.errors import HostError, UsageError, escaped

NAMES = ("apptainer", "singularity")
MARK = b"# An alias of sciexec"
HEAD = 512  # bytes of a file in which the mark is
LONGEST = 127  # bytes of a #! line that every kernel takes

PROGRAM = """\
import sys
sys.path.append({library!a})
from sciexec.__main__ import main
sys.exit(main({name!a}, sys.argv[1:]))
"""


def install(directory: str, *, force: bool = False) -> list[str]:
    """Write the aliases into a directory, which is made where it is missing; returns their paths.

    Each appears whole or not at all.  Raises UsageError where one would replace something else, HostError for what the host
    does not allow.
    """
    paths = [os.path.join(os.path.abspath(directory), name) for name in NAMES]
    for path in paths:
        if os.path.isdir(path) and not os.path.islink(path):
            raise UsageError(f"writing {escaped(path)}: it is a directory")
        if os.path.lexists(path) and not force and not is_alias(path):
            raise UsageError(f"writing {escaped(path)}: there is another program of that name", "--force replaces it")
    try:
        os.makedirs(directory, exist_ok=True)
        for path in paths:
            write(path, alias(os.path.basename(path)))
    except OSError as error:
        raise HostError(f"writing the aliases into {escaped(directory)}: {error.strerror}") from error
    return paths


def remove(directory: str) -> list[str]:
    """Remove the aliases from a directory, and nothing else; returns the paths of those that were there.  Raises HostError."""
    found = [path for name in NAMES if is_alias(path := os.path.join(os.path.abspath(directory), name))]
    try:
        for path in found:
            os.unlink(path)
    except OSError as error:
        raise HostError(f"removing the aliases from {escaped(directory)}: {error.strerror}") from error
    if not found:
        raise HostError(f"removing the aliases from {escaped(directory)}: there are none")
    return found


def is_alias(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return MARK in file.read(HEAD)
    except OSError:
        return False


def alias(name: str) -> bytes:
    """The program that is sciexec under another name."""
    python = sys.executable
    library = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = PROGRAM.format(library=library, name=name)
    first = f"#!{python} -IS\n"
    note = f"{MARK.decode()}, made by `sciexec alias install`: answers as {name}.\n"
    if " " in python or len(os.fsencode(first)) > LONGEST:  # no #! line can name this interpreter, but a shell can
        quoted = ["'" + text.replace("'", "'\\''") + "'" for text in (python, program)]
        return os.fsencode(f'#!/bin/sh\n{note}exec {quoted[0]} -ISc {quoted[1]} "$@"\n')
    return os.fsencode(first + note + program)


def write(path: str, content: bytes) -> None:
    """A program, by renaming.  Raises OSError."""
    partial = f"{path}.{os.getpid()}.partial"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, 0o755)
        os.rename(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def buildcfg(program: str) -> dict[str, str]:
    """KEY -> value, as `apptainer buildcfg` prints them; the configuration file is there for programs that read it.

    Arguments:
        program: the name under which sciexec was called.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    name = "SINGULARITY" if called(program) == "singularity" else "APPTAINER"
    answer = version(program)
    return {
        "PACKAGE_NAME": answer.partition(" ")[0],
        "PACKAGE_VERSION": answer.rpartition(" ")[2],
        "PREFIX": sys.prefix,
        "EXECPREFIX": sys.exec_prefix,
        "BINDIR": os.path.dirname(sys.executable),
        "LIBEXECDIR": here,
        "SYSCONFDIR": here,
        f"{name}_CONFDIR": here,
        f"{name}_CONF_FILE": os.path.join(here, "sciexec.conf"),
        f"{name}_SUID_INSTALL": "0",
    }
