"""What the OCI image specification says about layers, written down as plainly as possible: the model the merge is held against.

A layer is a list of (kind, path, value): "d" directory, "f" file (content), "l" symbolic link (target), "h" hard link (target's
path), "w" whiteout, "o" opaque directory.  A tree is a dict of names; a file is a list of one item, so that two names of a hard
link are one object.
"""

from __future__ import annotations

from typing import Any, Optional, Union

Entry = tuple[str, str, str]
Tree = dict[str, Any]
Found = Optional[Union[Tree, list[Any]]]


class Meaningless(Exception):
    """The specification gives these layers no meaning: the converter must refuse them."""


def find(root: Tree, path: str, make: bool, hops: int = 0) -> Found:
    """The directory at `path` inside `root`, links followed, `..` stopping at the root."""
    trail = [root]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    for n, part in enumerate(parts):
        if part == "..":
            trail = trail[:-1] or [root]
            continue
        child = trail[-1].get(part)
        if isinstance(child, list) and child[0] == "l":
            if hops >= 40:
                if make:
                    raise Meaningless("links")
                return None
            start = "" if child[1].startswith("/") else "/".join(parts_of(root, trail))
            return find(root, "/".join([start, child[1], *parts[n + 1 :]]), make, hops + 1)
        if not isinstance(child, dict):
            if not make:
                return None
            child = trail[-1][part] = {}
        trail.append(child)
    return trail[-1]


def parts_of(root: Tree, trail: list[Tree]) -> list[str]:
    return [next(name for name, child in above.items() if child is below) for above, below in zip(trail, trail[1:])]


def replaced(root: Tree, path: str, made: set[str]) -> bool:
    """Whether one of the directories that a layer makes on the way replaces something that was none."""
    parts = path.split("/")
    for n in range(1, len(parts) + 1):
        above = find(root, "/".join(parts[: n - 1]), False)
        old = above.get(parts[n - 1]) if isinstance(above, dict) else None
        if "/".join(parts[:n]) in made and isinstance(old, list):
            return True
    return False


def apply(root: Tree, layer: list[Entry]) -> None:
    gone = []
    made = {path for kind, path, _ in layer if kind == "d"}
    for kind, path, _ in layer:
        above, _, name = path.rpartition("/")
        if replaced(root, path if kind == "o" else above, made):
            continue
        if kind == "w" and (parent := find(root, above, False)) is not None:
            gone.append((parent, name))
        if kind == "o" and (parent := find(root, path, False)) is not None:
            gone.append((parent, None))
    for parent, name in gone:
        if name is None:
            parent.clear()  # type: ignore[union-attr]
        else:
            parent.pop(name, None)  # type: ignore[arg-type, union-attr]
    for kind, path, value in layer:
        above, _, name = path.rpartition("/")
        if kind in "wo":
            continue
        new: Found = {} if kind == "d" else [kind, value]
        if kind == "h":
            above_target, _, base = value.rpartition("/")
            holder = find(root, above_target, False)
            new = holder.get(base) if isinstance(holder, dict) else None
            if path == value or not isinstance(new, list):
                raise Meaningless("hard link")
        parent = find(root, above, True)
        assert isinstance(parent, dict)
        if not (isinstance(parent.get(name), dict) and isinstance(new, dict)):
            parent[name] = new


def merged(layers: list[list[Entry]]) -> dict[str, tuple[str, str]]:
    """Path -> (kind, value) of every name in the image; a hard link shows as what it is linked to."""
    root: Tree = {}
    for layer in layers:
        apply(root, layer)
    found: dict[str, tuple[str, str]] = {}

    def walk(tree: Tree, prefix: str) -> None:
        for name, node in tree.items():
            found[prefix + name] = ("d", "") if isinstance(node, dict) else (node[0], node[1])
            if isinstance(node, dict):
                walk(node, prefix + name + "/")

    walk(root, "")
    return found
