"""The house: which rooms there are, and that an import goes only downward.

A new room is named here, on its floor, before it is built.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
LINES = 600  # a room with more is split or questioned
NO_ROOM = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "core", "lib", "tools"}
TOP = {"sciexec", "convert", "tests", "docs", "recipes", "benchmarks", "bin"}
LEFTOVERS = {"build", "dist", "sciexec.egg-info", "__pycache__"}

# Ground floor first.
SCIEXEC = """
    __init__ errors kernel squashfs sif _pysquashfs_build unsquashfs pysquashfs elf image spelling options scripts assignments environment
    host sources mounts overlay sinit limits isolation gpu mpi enter share relay data run instance stats launch join inspect doctor
    switch completion help cli __main__
""".split()
CONVERT = """
    __init__ progress headers platforms reference origins patience credentials registry blobs documents download tarheader tar layout oci
    inflate metadata layers output sandbox pull definition dockerfile fakeroot build signing push
""".split()
FLOORS = [f"sciexec.{room}" for room in SCIEXEC if room not in ("cli", "__main__")]
FLOORS += [f"convert.{room}" for room in CONVERT]
FLOORS += ["sciexec.cli", "sciexec.__main__"]

# What a run may load: its start is the product's first budget (bare interpreter 9 ms; re, json or typing would add as much again).
HOT = """
    __init__ __main__ errors kernel squashfs sif image sources spelling options scripts assignments environment host mounts overlay
    isolation mpi enter run
""".split()
HOT_LIBRARY = {"__future__", "gc", "sys", "os", "posixpath", "struct", "_struct", "errno", "stat", "_stat", "_ctypes", "time", "signal",
               "socket", "_socket", "_sha2", "_sha256", "posix", "fcntl", "pwd", "grp", "resource", "select"}


def rooms(package: str) -> list[Path]:
    return sorted((TREE / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(TREE).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, module, only when needed?) of every import: inside a function, or for type checkers only, which never happens."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[int, str, bool]]:
        inside |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        inside |= isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = name_of(path).split(".")[: -child.level] if child.level else []
                module = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    room = f"{module}.{alias.name}"
                    yield child.lineno, room if room in FLOORS else module, inside
            else:
                yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text(), str(path)), False)


def ours(module: str) -> str | None:
    """The room that a dotted name means, or None for somebody else's module."""
    if module in ("sciexec", "convert"):
        return f"{module}.__init__"
    return module if module.split(".")[0] in ("sciexec", "convert") else None


@pytest.mark.parametrize("path", [*rooms("sciexec"), *rooms("convert")], ids=name_of)
def test_room_is_on_a_floor_and_imports_only_downward(path: Path) -> None:
    here = name_of(path)
    assert here in FLOORS, f"{here} is a new room: say in tests/test_house.py on which floor it stands"
    for line, module, _ in imports(path):
        room = ours(module)
        if room is None or room == "sciexec._pysquashfs":  # the compiled half of pysquashfs
            continue
        assert room in FLOORS, f"{path}:{line} imports {module}, which is no room of this house"
        assert FLOORS.index(room) < FLOORS.index(here), f"{path}:{line}: {here} imports {room}, which stands above it"


@pytest.mark.parametrize("path", rooms("sciexec"), ids=name_of)
def test_only_the_command_line_knows_the_converter_and_only_inside_functions(path: Path) -> None:
    for line, module, inside in imports(path):
        if module.split(".")[0] == "convert":
            assert path.name == "cli.py", f"{path}:{line}: only cli.py may import {module}"
            assert inside, f"{path}:{line}: import {module} inside the command that needs it"


@pytest.mark.parametrize("room", HOT)
def test_the_hot_path_is_made_of_a_fixed_set_of_modules(room: str) -> None:
    path = TREE / "sciexec" / f"{room}.py"
    for line, module, inside in imports(path):
        if not inside and ours(module) is None:
            assert module.split(".")[0] in HOT_LIBRARY, f"{path}:{line}: {module} costs every start of a container"


@pytest.mark.parametrize("path", [p for top in sorted(TOP) for p in rooms(top)], ids=name_of)
def test_rooms_are_small_and_named_after_things(path: Path) -> None:
    count = len(path.read_text().splitlines())
    assert count <= LINES, f"{path} has {count} lines"
    assert not NO_ROOM & {path.stem, *path.stem.split("_"), path.parent.name}, f"{path}: call it by what it holds"


def test_the_top_of_the_tree() -> None:
    found = {path.name for path in TREE.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert TOP <= found <= TOP | LEFTOVERS
