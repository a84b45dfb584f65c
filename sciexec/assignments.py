"""The assignments of a shell script, read without a shell, so that nothing of it is ever executed.

    # a comment
    NAME=value OTHER=value; export NAME=value          several in a line, if need be
    NAME='as it is' OTHER="with $NAME, ${NAME}, ${NAME:-default} and \\" in it" THIRD=~/below/home
    NAME+=:more
    export NAME; unset NAME; set -a                    without effect but for unset: every assignment counts

$NAME is what was assigned above, else a variable that the caller names.  Words are neither split nor globbed.  Everything else of
a shell (commands, $(...), tests, loops) is refused with the number of its line.

Files of --env-file are such scripts: `apptainer exec --env-file` has the same values for the same text, and forbids commands too.
So are those in which Apptainer writes down ENV, ENTRYPOINT and CMD of an OCI image, and where an image has no shell there is
nobody else to read them.  Source: POSIX.1-2017, Shell Command Language.
"""

from __future__ import annotations

import os

from sciexec.errors import HostError, SciexecError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import NoReturn

LARGEST = 4 << 20  # bytes; more than an environment may have
NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
BLANK = " \t"
END = "\n;"  # of a command
HINT = "assignments are read, and $NAME in them; no command is executed"


def read(paths: Iterable[str], host: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, value) of everything that the files assign, a later file over an earlier one.

    Arguments:
        paths: absolute.  host: the caller's environment, for $NAME.

    Raises HostError for a file that cannot be read, SciexecError for one that holds more than assignments.
    """
    found: dict[str, str] = {}
    for path in paths:
        File(path, content(path), host, found).read()
    return list(found.items())


def image(folder: str, own: Mapping[str, str]) -> dict[str, str]:
    """What the scripts of an image without a shell assign, as far as they only assign; the others are left out.

    Arguments:
        folder: /.singularity.d/env, seen from inside.  own: the runtime's variables.
    """
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        now = dict(found)
        try:
            File(name, content(f"{folder}/{name}"), own, now).read()
        except SciexecError:
            continue
        found = now
    return found


OCI = 'eval "set ${SINGULARITY_OCI_RUN}"'  # by which Apptainer knows such a script


def oci(path: str) -> tuple[list[str], list[str]] | None:
    """ENTRYPOINT and CMD, which a runscript of Apptainer assigns at its beginning; None for another kind of script."""
    found: dict[str, str] = {}
    try:
        text = content(path)
        if OCI not in text:
            return None
        File(path, text, {}, found).read()
    except SciexecError:  # at the first line behind
        pass
    if "OCI_ENTRYPOINT" not in found or "OCI_CMD" not in found:
        return None
    return words(path, found["OCI_ENTRYPOINT"]), words(path, found["OCI_CMD"])


def words(path: str, text: str) -> list[str]:
    """The words of a command, without quotes.  path: where it is from, for messages."""
    file = File(path, text, {}, {})
    found = []
    file.blanks()
    while file.peek():
        found.append(file.pieces(BLANK))
        file.blanks()
    return found


def content(path: str) -> str:
    data = b""
    try:
        with open(path, "rb", buffering=0) as file:
            while len(data) <= LARGEST and (piece := file.read(1 << 16)):
                data += piece
    except OSError as error:
        raise HostError(f"reading {escaped(path)}: {error.strerror}") from error
    if len(data) > LARGEST or b"\0" in data:
        raise SciexecError(f"reading {escaped(path)}: more than 4 MiB, or a NUL character in it")
    return data.replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")


class File:
    """One file, read from front to end.  Arguments: found: what files before this one assigned; what this one does is added."""

    def __init__(self, path: str, text: str, host: Mapping[str, str], found: dict[str, str]) -> None:
        self.path, self.text, self.found = path, text, found
        self.known = {**host, **found}
        self.position = 0

    def read(self) -> None:
        text = self.text
        while self.position < len(text):
            character = text[self.position]
            if character in BLANK or character in END:
                self.position += 1
            elif text.startswith("\\\n", self.position):
                self.position += 2
            elif character == "#":
                end = text.find("\n", self.position)
                self.position = end if end >= 0 else len(text)
            else:
                self.word()

    def word(self) -> None:
        """An assignment, or one of the few commands that change nothing but variables."""
        name = self.name()
        plus = self.text.startswith("+=", self.position)
        if name and not name[0].isdigit() and (plus or self.text.startswith("=", self.position)):
            self.position += 2 if plus else 1
            value = self.value()
            self.known[name] = self.found[name] = self.known.get(name, "") + value if plus else value
        elif name in ("export", "unset") and (self.peek() in BLANK or self.peek() in END):
            self.names(name)
        elif name == "set" and self.peek() in BLANK:
            self.flags()
        else:
            start = self.position - len(name)
            words = self.text[start:].split("\n", 1)[0].split()
            self.refuse(f"{escaped(words[0][:40] if words else name)} is a command")

    def names(self, command: str) -> None:
        """Behind `export` assignments may follow as well, which are words of their own."""
        while True:
            self.blanks()
            start = self.position
            name = self.name()
            if name and self.peek() in "+=" and command == "export" and self.peek():
                self.position = start
                self.word()
            elif name and (self.peek() in BLANK or self.peek() in END):
                if command == "unset":
                    self.known.pop(name, None)
                    self.found.pop(name, None)
            elif not name and (self.peek() in END or self.peek() == "#"):
                return
            else:
                self.refuse(f"{command} takes names")

    def flags(self) -> None:
        end = self.text.find("\n", self.position)
        end = end if end >= 0 else len(self.text)
        words = self.text[self.position : end].split("#")[0].split()
        if not all(word[0] in "+-" for word in words):
            self.refuse("set takes flags")
        self.position = end

    def value(self) -> str:
        """A word: up to a blank or the end of the command."""
        home = self.known.get("HOME", "")
        found = ""
        if self.peek() == "~" and (self.peek(1) in ("/", "") or self.peek(1) in BLANK or self.peek(1) in END):
            self.position += 1
            found = home
        return found + self.pieces(BLANK + END)

    def pieces(self, stop: str, quoted: bool = False) -> str:
        """Text up to one of the characters in `stop`, which is left unread.  quoted: within double quotes."""
        found = ""
        while (character := self.peek()) and character not in stop:
            self.position += 1
            if character == "\\":
                following = self.peek()
                self.position += 1
                bare = not quoted or following in '$`"\\' or following == stop
                found += "" if following == "\n" else following if bare else f"\\{following}"
            elif character == "$":
                found += self.dollar(quoted)
            elif character == "`":
                self.refuse("`...` is a command")
            elif character == '"':
                found += "" if quoted else self.double()
            elif character == "'" and not quoted:
                found += self.single()
            elif character in "&|<>()" and not quoted:
                self.refuse(f"{character} outside of quotes")
            else:
                found += character
        return found

    def single(self) -> str:
        end = self.text.find("'", self.position)
        if end < 0:
            self.refuse("a ' is not closed")
        found, self.position = self.text[self.position : end], end + 1
        return found

    def double(self) -> str:
        start = self.position
        found = self.pieces('"', quoted=True)
        if not self.peek():
            self.position = start
            self.refuse('a " is not closed')
        self.position += 1
        return found

    def dollar(self, quoted: bool) -> str:
        """What stands behind a $."""
        start = self.position
        if self.peek() == "{":
            self.position += 1
            name = self.name()
            colon = self.peek() == ":"
            self.position += colon
            operator = self.peek()
            if not name or name[0].isdigit() or not operator or operator not in ("}" if not colon else "") + "-+=":
                self.position = start
                self.refuse("of ${...}, only a name and a default with :- - := = :+ or + can stand there")
            value = self.known.get(name)
            if operator != "}":
                self.position += 1
                word = self.pieces("}", quoted)
                there = bool(value) if colon else value is not None
                if operator == "+":
                    value = word if there else ""
                elif not there:
                    value = word
                    if operator == "=":
                        self.known[name] = self.found[name] = word
            if self.peek() != "}":
                self.position = start
                self.refuse("a ${ is not closed")
            self.position += 1
            return value or ""
        name = self.name()
        if name and not name[0].isdigit():
            return self.known.get(name, "")
        if name or (self.peek() and self.peek() in "($'@*#?!-"):
            self.position = start
            self.refuse("$(...) is a command" if self.peek() == "(" else "of $..., only $NAME can stand there")
        return "$"

    # --- the next characters ---

    def peek(self, ahead: int = 0) -> str:
        """A character that is not read yet, "" behind the end."""
        return self.text[self.position + ahead : self.position + ahead + 1]

    def name(self) -> str:
        start = self.position
        while self.peek() and self.peek() in NAME:
            self.position += 1
        return self.text[start : self.position]

    def blanks(self) -> None:
        while (self.peek() and self.peek() in BLANK) or self.text.startswith("\\\n", self.position):
            self.position += 1 if self.peek() in BLANK else 2

    def refuse(self, what: str) -> NoReturn:
        line = self.text.count("\n", 0, self.position) + 1
        raise SciexecError(f"reading {escaped(self.path)}, line {line}: {what}", HINT)
