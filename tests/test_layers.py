"""Layers merged: the specification's cases as a table, random stacks against a plain model, and against the kernel's overlayfs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_model import Entry, Meaningless, merged
from tar_fixtures import archive, member

from convert import layers, tar
from sciexec.errors import ImageError
from sciexec.pysquashfs import Node, Writer
from sciexec.unsquashfs import Reader

KINDS = {"d": "d", "f": "f", "l": "l", "h": "h"}


def to_tar(layer: list[Entry]) -> bytes:
    members = []
    for kind, path, value in layer:
        above, _, name = path.rpartition("/")
        prefix = above + "/" if above else ""
        if kind == "w":
            members.append(member(f"{prefix}.wh.{name}".encode(), "f"))
        elif kind == "o":
            members.append(member((path + "/" if path else "").encode() + b".wh..wh..opq", "f"))
        elif kind == "f":
            members.append(member(path.encode(), "f", value.encode()))
        else:
            members.append(member(path.encode(), kind, link=value.encode()))
    return archive(*members)


class Merge:
    """A merge into a real SquashFS, and what it cost."""

    def __init__(self, tars: list[bytes], **arguments: Any) -> None:
        self.opened: list[int] = []

        def opener(number: int) -> tar.Reader:
            self.opened.append(number)
            return tar.Reader(iter([tars[number]]), tar.Limits(), f"layer {number}")

        self.fd = os.memfd_create("merge")
        with Writer(self.fd, 0) as writer:
            self.root = layers.merge(len(tars), opener, writer, where=lambda n: f"layer {n}", **arguments)
            self.size = writer.finish(self.root)

    def __enter__(self) -> Merge:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def node(self, path: str) -> Node:
        node = self.root
        for part in path.split("/"):
            node = node.payload[part.encode()]
        return node

    def listing(self) -> dict[str, tuple[str, str]]:
        """What a reader of the SquashFS sees; (kind, content or target)."""
        found = {}
        reader = Reader(self.fd, 0, "merge")
        for path, entry in reader.walk():
            if path:
                data = reader.read(entry, 1 << 20) if entry.kind == "f" else entry.target if entry.kind == "l" else b""
                found[path.decode()] = (entry.kind, data.decode())
        return found


def result(*stack: list[Entry]) -> dict[str, tuple[str, str]]:
    with Merge([to_tar(layer) for layer in stack]) as merge:
        return merge.listing()


def d(path: str) -> Entry:
    return ("d", path, "")


def f(path: str, data: str = "") -> Entry:
    return ("f", path, data or f"data of {path}")


def ln(path: str, target: str) -> Entry:
    return ("l", path, target)


def hard(path: str, target: str) -> Entry:
    return ("h", path, target)


def wh(path: str) -> Entry:
    return ("w", path, "")


def opq(path: str) -> Entry:
    return ("o", path, "")


USRMERGE = [d("usr"), d("usr/lib"), f("usr/lib/a"), ln("lib", "usr/lib"), d("var"), ln("var/run", "/run"), d("run")]

# name: layers oldest first, and (some of) what the image must hold: path -> content, "->target", "/" or None for absent
CASES: dict[str, tuple[list[list[Entry]], dict[str, str | None]]] = {
    "newer file wins": ([[f("a", "old")], [f("a", "new")]], {"a": "new"}),
    "whiteout": ([[d("x"), f("x/a"), f("x/b")], [wh("x/a")]], {"x/a": None, "x/b": "data of x/b"}),
    "whiteout of a directory": ([[d("x"), d("x/y"), f("x/y/a")], [wh("x/y")]], {"x": "/", "x/y": None, "x/y/a": None}),
    "whiteout then the same name again": ([[d("x"), f("x/a")], [wh("x"), d("x"), f("x/b")]], {"x/a": None, "x/b": "data of x/b"}),
    "whiteout of what is not there": ([[d("x")], [wh("x/none"), wh("no/where")]], {"x": "/", "no": None}),
    "whiteout and file of one layer": ([[f("a", "old")], [wh("a"), f("a", "new")]], {"a": "new"}),
    "file and whiteout of one layer": ([[f("a", "old")], [f("a", "new"), wh("a")]], {"a": "new"}),
    "whiteout through a link": ([USRMERGE, [wh("lib/a")]], {"lib": "->usr/lib", "usr/lib/a": None, "usr/lib": "/"}),
    "opaque first": ([[d("x"), f("x/a"), d("x/y")], [opq("x"), f("x/b")]], {"x/a": None, "x/y": None, "x/b": "data of x/b"}),
    "opaque last": ([[d("x"), f("x/a")], [d("x"), f("x/b"), opq("x")]], {"x/a": None, "x/b": "data of x/b"}),
    "opaque and whiteout": ([[d("x"), f("x/a")], [wh("x/a"), opq("x"), f("x/b")]], {"x/a": None, "x/b": "data of x/b"}),
    "opaque root": ([[f("a"), d("b")], [opq(""), f("c")]], {"a": None, "b": None, "c": "data of c"}),
    "opaque through a link": ([USRMERGE, [opq("lib"), f("lib/b")]], {"usr/lib/a": None, "usr/lib/b": "data of lib/b", "lib": "->usr/lib"}),
    "opaque directory in the place of a link": ([[d("b"), f("b/x"), ln("a", "b")], [d("a"), opq("a")]], {"a": "/", "b/x": "data of b/x"}),
    "whiteout below a directory in the place of a link": ([[d("b"), f("b/x"), ln("a", "b")], [d("a"), wh("a/x")]], {"b/x": "data of b/x"}),
    "markers below a loop of links": ([[ln("a", "a")], [wh("a/x"), opq("a")]], {"a": "->a"}),
    "opaque on a file": ([[f("a")], [opq("a")]], {"a": "data of a"}),
    "opaque twice over": ([[d("x"), f("x/a")], [opq("x")], [f("x/b")]], {"x/a": None, "x/b": "data of x/b"}),
    "file to directory": ([[f("a")], [d("a"), f("a/b")]], {"a": "/", "a/b": "data of a/b"}),
    "directory to file": ([[d("a"), f("a/b")], [f("a")]], {"a": "data of a", "a/b": None}),
    "directory to link": ([[d("a"), f("a/b")], [ln("a", "c"), d("c")]], {"a": "->c", "a/b": None}),
    "link to directory": ([[d("c"), ln("a", "c")], [d("a"), f("a/b")]], {"a": "/", "a/b": "data of a/b", "c/b": None}),
    "link to link": ([[ln("a", "b")], [ln("a", "c")]], {"a": "->c"}),
    "directory to file to directory": ([[d("a"), f("a/old")], [f("a")], [d("a"), f("a/new")]], {"a/old": None, "a/new": "data of a/new"}),
    "parent that is a file": ([[f("nondir")], [f("nondir/a/b")]], {"nondir": "/", "nondir/a/b": "data of nondir/a/b"}),
    "parents nobody made": ([[f("a/b/c")]], {"a": "/", "a/b": "/", "a/b/c": "data of a/b/c"}),
    "write through lib -> usr/lib": ([USRMERGE, [f("lib/x")]],
        {"lib": "->usr/lib", "usr/lib/x": "data of lib/x", "usr/lib/a": "data of usr/lib/a"}),
    "write through an absolute link": ([USRMERGE, [f("var/run/a/b")]], {"var/run": "->/run", "run/a/b": "data of var/run/a/b"}),
    "write through a link to nowhere": ([[ln("lib", "usr/lib")], [f("lib/x")]], {"lib": "->usr/lib", "usr/lib/x": "data of lib/x"}),
    "replace through a link": ([USRMERGE, [f("lib/a", "new")]], {"usr/lib/a": "new"}),
    "links climb no higher than the root": ([[d("in"), ln("in/up", "../../.."), ln("esc", "in/up/../victim")], [f("esc/x")]],
        {"victim/x": "data of esc/x"}),
    "two hops up": ([[d("inner"), ln("inner/go_up", ".."), ln("inner/escape", "go_up/../victim")], [f("inner/escape/f")]],
        {"victim/f": "data of inner/escape/f"}),
    "last member of a name wins": ([[f("a", "1"), f("a", "2")]], {"a": "2"}),
    "file, then link, then a file below it": ([[d("t"), f("a"), ln("a", "t"), f("a/x")]], {"a": "->t", "t/x": "data of a/x"}),
    "hard link": ([[f("a", "A"), hard("b", "a")]], {"a": "A", "b": "A"}),
    "hard link, target removed later": ([[f("a", "A"), hard("b", "a")], [wh("a")]], {"a": None, "b": "A"}),
    "hard link, target replaced later": ([[f("a", "A"), hard("b", "a")], [f("a", "new")]], {"a": "new", "b": "A"}),
    "hard link into an older layer": ([[f("a", "A")], [hard("b", "a")]], {"a": "A", "b": "A"}),
    "hard link into an older layer, target removed": ([[f("a", "A")], [hard("b", "a")], [wh("a")]], {"a": None, "b": "A"}),
    "hard link into an older layer, target replaced": ([[f("a", "A")], [hard("b", "a")], [f("a", "new")]], {"a": "new", "b": "A"}),
    "hard link to a link": ([[ln("a", "x"), hard("b", "a")]], {"a": "->x", "b": "->x"}),
    "hard link through a link": ([USRMERGE, [hard("b", "lib/a")]], {"b": "data of usr/lib/a"}),
    "a link that becomes a directory": (  # layer 1 wrote through the link, before layer 2 made a directory of it
        [USRMERGE, [f("lib/x", "through")], [wh("lib"), d("lib"), f("lib/x", "own")]], {"usr/lib/x": "through", "lib/x": "own"}),
    "AUFS's own files": ([[d("x"), f(".wh..wh.aufs"), d(".wh..wh.plnk"), f(".wh..wh.plnk/1.2"), f("a")]],
        {"a": "data of a", ".wh..wh.plnk": None}),
    "names that only look like whiteouts": ([[f("a.wh.b"), f("x.wh.")]], {"a.wh.b": "data of a.wh.b", "x.wh.": "data of x.wh."}),
    "one layer twice": ([[d("x"), f("x/a")], [d("x"), f("x/a")]], {"x/a": "data of x/a"}),
    "an empty layer": ([[f("a")], [], [f("b")]], {"a": "data of a", "b": "data of b"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    stack, expected = CASES[name]
    found = result(*stack)
    shown = {path: "/" if kind == "d" else "->" + value if kind == "l" else value for path, (kind, value) in found.items()}
    assert {path: shown.get(path) for path in expected} == expected
    assert not [path for path in found if ".wh..wh" in path]
    assert found == merged(stack) or "AUFS" in name  # the model, which knows nothing of AUFS, agrees


REFUSED: dict[str, tuple[list[list[Entry]], str]] = {
    "hard link to nothing": ([[hard("b", "a")]], "not in the image"),
    "hard link to a later member": ([[hard("b", "a"), f("a")]], "not in the image"),
    "hard link to a directory": ([[d("a"), hard("b", "a")]], "which is a directory"),
    "hard link to itself": ([[f("a"), hard("a", "a")]], "which is itself"),
    "whiteout of nothing": ([[f(".wh.")]], "names no file"),
    "whiteout of nothing, below": ([[f("etc/.wh.")]], "names no file"),
    "whiteout of .": ([[f("x/.wh..")]], "names no file"),
    "whiteout of ..": ([[f(".wh...")]], "names no file"),
    "whiteout as a parent": ([[f(".wh.x/y")]], "cannot be a directory"),
    "whiteout as a directory": ([[d(".wh.x")]], "cannot be a directory"),
    "a loop of links": ([[ln("a", "b"), ln("b", "a")], [f("a/x")]], "too many symbolic links"),
    "a link to itself": ([[ln("a", "a/b"), f("a/x")]], "too many symbolic links"),
    "root as a link": ([[ln(".", "usr")]], "root"),
    "root as a file": ([[f(".")]], "root"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    stack, message = REFUSED[name]
    with pytest.raises(ImageError, match=message) as error:
        result(*stack)
    assert "layer" in error.value.message


def test_hidden_files_are_not_stored() -> None:
    """What a newer layer removes or replaces must cost nothing in the image."""
    noise = [os.urandom(300_000) for _ in range(4)]
    older = archive(
        member(b"x", "d"), member(b"x/a", "f", noise[0]), member(b"b", "f", noise[1]), member(b"o", "d"), member(b"o/c", "f", noise[2])
    )
    newer = archive(member(b"x/.wh.a", "f"), member(b"b", "f", noise[3]), member(b"o/.wh..wh..opq", "f"))
    with Merge([older, newer]) as merge:
        assert merge.size < 320_000
        assert merge.opened == [1, 0]  # each layer once, newest first


def test_a_hidden_target_is_fetched_by_reading_its_layer_again() -> None:
    stack = [[f("a", "A"), hard("b", "a")], [wh("a")]]
    with Merge([to_tar(layer) for layer in stack]) as merge:
        assert merge.opened == [1, 0, 0]
        assert merge.listing()["b"] == ("f", "A")


def test_metadata_of_directories() -> None:
    """A newer directory member changes an older directory, and keeps what is in it; one that is only implied changes nothing."""
    older = archive(member(b"x", "d", mode=0o1777, uid=5, gid=6, mtime=100), member(b"x/a", "f", b"1"))
    newer = archive(member(b"x", "d", mode=0o700, uid=7, gid=8, mtime=200))
    other = archive(member(b"x/b", "f", b"2", mtime=300))
    with Merge([older, newer, other]) as merge:
        x = merge.node("x")
        assert (x.mode, x.uid, x.gid, x.mtime, sorted(x.payload)) == (0o700, 7, 8, 200, [b"a", b"b"])


def test_five_hundred_layers() -> None:
    stack = [[f("same", str(n)), f(f"own{n}")] for n in range(500)]
    found = result(*stack)
    assert len(found) == 501
    assert found["same"] == ("f", "499")


# ------------------------------------------------------------------------------------------------- random stacks of layers

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
TARGETS = st.one_of(PATHS, PATHS.map("/".__add__), PATHS.map("../".__add__), st.just(".."))


def entries(through_links: bool) -> st.SearchStrategy[Entry]:
    plain = [
        st.tuples(st.just("d"), PATHS, st.just("")),
        st.tuples(st.just("f"), PATHS, st.text("xyz", min_size=1, max_size=3)),
        st.tuples(st.just("l"), PATHS, TARGETS),
        st.tuples(st.just("w"), PATHS, st.just("")),
        st.tuples(st.just("o"), PATHS, st.just("")),
    ]
    return st.one_of(*plain, st.tuples(st.just("h"), PATHS, PATHS)) if through_links else st.one_of(*plain)


def stacks(through_links: bool) -> st.SearchStrategy[list[list[Entry]]]:
    return st.lists(st.lists(entries(through_links), max_size=40), min_size=1, max_size=5)


@settings(max_examples=int(os.environ.get("SCIEXEC_EXAMPLES", "400")), deadline=None)
@given(stacks(through_links=True))
def test_random_stacks_against_the_model(stack: list[list[Entry]]) -> None:
    try:
        expected = merged(stack)
    except Meaningless:
        with pytest.raises(ImageError):
            result(*stack)
    else:
        assert result(*stack) == expected


def presentable(layer: list[Entry]) -> list[Entry]:
    """The layer as a snapshot of overlayfs writes it: every parent a member, one member a name, no marker below a non-directory."""
    members: dict[str, Entry] = {}
    for kind, path, value in layer:
        above = path.rpartition("/")[0]
        while above:
            if above not in members or members[above][0] != "d":
                members[above] = d(above)
            above = above.rpartition("/")[0]
        if kind in "wo":
            continue
        if kind != "d":
            for name in [name for name in members if name.startswith(path + "/")]:
                del members[name]
        members[path] = (kind, path, value)
    ordered = sorted(members.values(), key=lambda entry: entry[1])
    marks = [(kind, path, "") for kind, path, _ in layer if kind in "wo"]
    directories = {"", *(path for path, entry in members.items() if entry[0] == "d")}
    ordered += [
        mark
        for mark in marks
        if (mark[0] == "o" and mark[1] in directories) or (mark[0] == "w" and mark[1].rpartition("/")[0] in directories)
    ]
    return ordered


@pytest.fixture(scope="module")
def overlayfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    work = tmp_path_factory.mktemp("overlay") / "work"
    oracle = Path(__file__).with_name("overlay_oracle.py")
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, str(oracle), str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@settings(
    max_examples=int(os.environ.get("SCIEXEC_EXAMPLES", "150")), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stacks(through_links=False))
def test_random_stacks_against_overlayfs(overlayfs: subprocess.Popen[str], stack: list[list[Entry]]) -> None:
    stack = [presentable(layer) for layer in stack]
    assert overlayfs.stdin is not None
    assert overlayfs.stdout is not None
    overlayfs.stdin.write(json.dumps(stack) + "\n")
    overlayfs.stdin.flush()
    answer = overlayfs.stdout.readline()
    assert answer, "the kernel's overlayfs refused; see stderr"
    expected = {path: tuple(entry) for path, entry in json.loads(answer).items()}
    assert result(*stack) == expected
