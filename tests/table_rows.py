"""Tables of behaviour: tests/tables/*.txt, read and run.  The same rows are run with sciexec and with Apptainer.

A row, as a user would see it in a terminal:

    == NAME                      begins a row; lines that begin with # are comments, empty ones separate
    env NAME=VALUE               one variable of the caller
    input TEXT                   a line of standard input
    $ COMMAND                    what is typed; several lines are one shell script
    > TEXT                       a line of standard output; no such line: there must be none
    ~ REGEX                      the same, as a regular expression; "~ ..." stands for any lines
    ! TEXT                       standard error holds TEXT; no such line and code 0: it must be empty
    code N                       the exit code, 0 where nothing is said; "code N M": one of them
    needs WORD ...               options or commands that the row is about and does not show, as it sets variables for them
    differs REASON               Apptainer does something else on purpose of ours
    alone REASON                 cannot be run with Apptainer

Placeholders, in all of it: {demo} demo.sif; {dir} the same as a directory; {oci} a SIF converted from an OCI image; {work} an
empty directory, where the row starts, but for what PREPARATION makes; {home} {user} {uid} {gid} the caller's.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from sciexec import cli, options

TABLES = Path(__file__).resolve().parent / "tables"
TIME = 60  # seconds for a row

PREPARATION = r"""
mkdir -p data/sub empty
echo 'text of data' > data/file
echo 'deep text' > data/sub/deep
echo 'text of file' > file
printf 'A=1\nB="two words"\n# no variable\nexport C="$A and $B"\n' > vars.env
printf 'A=later\nD=4\n' > more.env
printf '#!/bin/sh\necho "script with $# arguments"\n' > script
chmod +x script
"""

# What the rows are read for: words that begin a line, and what Row keeps of it.
WORDS = ("env", "input", "$", ">", "~", "!", "code", "needs", "differs", "alone")


class Row:
    """One row; the attributes are the words of the format, as lists of the texts behind them."""

    def __init__(self, table: str, number: int, name: str) -> None:
        self.table, self.number, self.name = table, number, name
        self.given: dict[str, list[str]] = {word: [] for word in WORDS}
        self.output: list[tuple[str, str]] = []  # (">" or "~", text) in order

    def text(self, word: str) -> str:
        return " ".join(self.given[word])

    def codes(self) -> set[int]:
        return {int(code) for code in self.text("code").split()} or {0}

    def missing(self) -> list[str]:
        """Options and commands of the row that this release lacks; while there are any, the row is not run."""
        words = [word for line in self.given["$"] for word in typed(line)] + self.text("needs").split()
        return [word for word in words if not is_there(word)]


class Result:
    """What a row gave."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr


def read(paths: Iterable[Path] | None = None) -> list[Row]:
    """All rows of all tables, in order.  Raises ValueError for a line that is none of the format's."""
    found: list[Row] = []
    for path in sorted(paths or TABLES.glob("*.txt")):
        for number, line in enumerate(path.read_text().split("\n"), 1):
            word, _, text = line.partition(" ")
            if not line or word.startswith("#"):
                continue
            if word == "==":
                found.append(Row(path.stem, number, text))
            elif word not in WORDS or not found or found[-1].table != path.stem:
                raise ValueError(f"{path}:{number}: {line}")
            elif word in (">", "~"):
                found[-1].output.append((word, text))
            else:
                found[-1].given[word].append(text)
    names = [(row.table, row.name) for row in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two rows of one name: {twice}")
    return found


# --- which rows can be run --------------------------------------------------------------------------------------------------


def typed(line: str) -> list[str]:
    """The verbs and options on a command line behind every "sciexec" in it: "exec --pid" for an option of exec, "cache list"."""
    found: list[str] = []
    try:
        words = shlex.split(line.replace(";", " ; ").replace("|", " | ").replace("&", " & "), posix=False)
    except ValueError:  # a quote that ends on another line
        words = line.split()
    verb = ""
    inside = False
    for word in words:
        if word.rstrip("'\"").endswith("sciexec") and not inside:
            inside, verb = True, ""
        elif inside and word.startswith("-") and len(word) > 1:
            known = options.names(verb or "global")
            for name, _ in options.flags(word, known):
                if verb in options.RUNS or not verb:
                    found.append(f"{verb or 'global'} {name}")
        elif inside and not verb:
            verb = word
            found.append(word)
        elif inside and verb in ("instance", "overlay", "cache", "sif", "alias", "data") and word.isalpha():
            verb = {"start": "start", "run": "instance run"}.get(word, f"{verb} {word}") if verb == "instance" else f"{verb} {word}"
            found.append({"start": "instance start"}.get(verb, verb))
        elif word.startswith(("{demo}", "{dir}", "{oci}", ";", "|", "&")):
            inside = False
    return found


def is_there(word: str) -> bool:
    """Whether "exec --pid" or "--pid" is an option that is ready, and "instance start" a command."""
    *verb, last = word.split(" ")
    if last.startswith("-"):
        known = options.names(" ".join(verb) or "exec")
        return last not in known or known[last].state != options.LATER
    command: object = cli.commands
    for name in word.split(" "):
        command = getattr(command, "commands", {}).get(name)
    return command is not None


# --- running ----------------------------------------------------------------------------------------------------------------


def filled(text: str, places: Mapping[str, str]) -> str:
    """`text` with the placeholders in it replaced."""
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def script(row: Row, places: Mapping[str, str], path: str) -> str:
    """A shell script that makes a fresh directory, and does there what the row says; results go beside it.

    Arguments:
        places: of the placeholders; "work" is the directory.  path: of the program's directory, which comes first in PATH.
    """
    variables = {
        "HOME": places["home"],
        "USER": places["user"],
        "LOGNAME": places["user"],
        "PATH": f"{path}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "APPTAINER_CONFIGDIR": f"{places['work']}/.config",  # where instances are remembered
    }
    for line in row.given["env"]:
        name, _, value = filled(line, places).partition("=")
        variables[name] = value.encode().decode("unicode_escape") if "\\n" in value else value
    given = "".join(f"{filled(line, places)}\n" for line in row.given["input"])
    work = shlex.quote(places["work"])
    command = ["timeout", str(TIME), "env", "-i", *(f"{name}={value}" for name, value in variables.items()), "sh", "-c"]
    command.append(filled("\n".join(row.given["$"]), places))
    return f"""rm -rf {work} {work}.*; mkdir -p {work} && cd {work} || exit
({PREPARATION})
printf %s {shlex.quote(given)} | {shlex.join(command)} >{work}.out 2>{work}.err
echo $? >{work}.code
"""


def run(row: Row, places: Mapping[str, str], path: str) -> Result:
    """Run a row here."""
    subprocess.run(["sh", "-c", script(row, places, path)], check=True, timeout=2 * TIME, cwd="/")
    return result(Path(places["work"]))


def result(work: Path) -> Result:
    """The result that script() left beside `work`."""

    def read_text(suffix: str) -> str:
        return Path(f"{work}.{suffix}").read_text(errors="backslashreplace")

    return Result(int(read_text("code")), read_text("out"), read_text("err"))


def wrong(row: Row, got: Result, places: Mapping[str, str], *, stderr: bool = True) -> str:
    """What is not as the row says, in words, "" for nothing.  stderr: whether to look at standard error."""
    said = []
    if got.code not in row.codes():
        said.append(f"code {got.code}, not {' or '.join(map(str, sorted(row.codes())))}")
    if not re.fullmatch(pattern(row, places), got.stdout, re.S):
        expected = "".join(f"    {kind} {filled(text, places)}\n" for kind, text in row.output)
        said.append(f"stdout is not\n{expected}but\n" + "".join(f"    > {line}\n" for line in got.stdout.splitlines()))
    if stderr:
        said += [f"stderr lacks: {text}" for text in row.given["!"] if filled(text, places) not in got.stderr]
        if not row.given["!"] and row.codes() == {0} and got.stderr:
            said.append("stderr is not empty")
        if "Traceback" in got.stderr or "itself failed" in got.stderr:
            said.append("sciexec failed by itself")
    if said and got.stderr:
        said.append("stderr:\n" + "".join(f"    {line}\n" for line in got.stderr.splitlines()))
    return "\n".join(said)


def pattern(row: Row, places: Mapping[str, str]) -> str:
    lines = []
    for kind, text in row.output:
        if kind == "~" and text == "...":
            lines.append(r"(?:[^\n]*\n)*?")
        elif kind == "~":
            escaped = {name: re.escape(value) for name, value in places.items()}
            lines.append(f"(?-s:{filled(text, escaped)})\\n")
        else:
            lines.append(re.escape(filled(text, places)) + r"\n")
    whole = "".join(lines)
    return whole.removesuffix(r"\n") + r"\n?" if whole.endswith(r"\n") else whole


def caller() -> dict[str, str]:
    """The placeholders of who calls."""
    import pwd

    entry = pwd.getpwuid(os.getuid())
    return {"home": entry.pw_dir, "user": entry.pw_name, "uid": str(entry.pw_uid), "gid": str(os.getgid())}
