"""Layers -> one tree, by the rules of the OCI image specification (layer.md "Applying Changesets"), its data in a SquashFS.

Two questions have to be answered, and they want opposite orders:

    what to keep     newest layer first, while the tars stream by: a file that a newer layer replaces or removes is never
                     compressed.  Judged by path alone, which is right unless a directory on the way was a symbolic link.
    what it means    oldest layer first, in memory, after the last tar has ended: members are applied one by one to a tree
                     of nodes, parents resolved through the tree's own links as chroot(2) would, exactly as written.

Where the quick answer was wrong (a file was passed by that the exact answer keeps: a hard link to a name that is removed
later, a directory that became a link in between) the layers concerned are read once more for just those files.  The other
error, data kept that the tree does not use, costs bytes and nothing else.  Nothing here touches a file system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Union

from convert import tar
from sciexec.errors import ImageError, escaped
from sciexec.pysquashfs import NO_XATTR, Node, Writer, is_read_at_start

if TYPE_CHECKING:
    from convert.metadata import File

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."  # AUFS's own bookkeeping; everything below that is not OPAQUE is ignored
DEEPEST = 2048  # directories in a path: Linux takes no more of them in PATH_MAX bytes
LINKS = 40  # symbolic links followed in one path, as the kernel's MAXSYMLINKS

# A member as it is kept until its layer is applied: a node, or the target's path for a hard link.
Record = Union[Node, bytes]
# Opens a layer's tar, 0 the oldest, from the start; the reader must be exhausted.
Opener = Callable[[int], "tar.Reader"]


class Layer:
    """What one layer says, without its data.

    `records` is directory, name, Record of one member after another: at half a million members tuples would cost more than
    what they hold, and so would whole paths.
    """

    __slots__ = ("opaques", "records", "whiteouts")

    def __init__(self) -> None:
        self.records: list[bytes | Record] = []
        self.whiteouts: list[tuple[bytes, bytes]] = []
        self.opaques: list[bytes] = []

    def members(self) -> Iterator[tuple[bytes, bytes, Record]]:
        flat = iter(self.records)
        return zip(flat, flat, flat)  # type: ignore[arg-type]  # in turn by construction


class Shade:
    """The paths that newer layers decide: a file of an older layer below one of them is not part of the image."""

    def __init__(self) -> None:
        # Directory -> names that a newer layer defines or removes there; the value: whether older files below it may still count.
        self.decided: dict[bytes, dict[bytes, bool]] = {}
        self.opaques: set[bytes] = set()
        self.wanted: set[bytes] = set()  # targets of newer hard links: their data is needed whatever hides the name
        self._memo: dict[bytes, bool] = {}

    def add(self, layer: Layer) -> None:
        self._memo.clear()
        self.opaques.update(layer.opaques)
        for directory, name, record in layer.members():
            names = self.decided.setdefault(directory, {})
            names[name] = names.get(name, True) and isinstance(record, Node) and record.kind == "d"
        for directory, name in layer.whiteouts:
            self.decided.setdefault(directory, {})[name] = False

    def hides(self, directory: bytes, name: bytes) -> bool:
        return name in self.decided.get(directory, ()) or self._is_closed(directory)

    def _is_closed(self, directory: bytes) -> bool:
        """Whether nothing that older layers have below `directory` is part of the image."""
        above = []
        while (known := self._memo.get(directory)) is None:
            above.append(directory)
            parent, _, name = directory.rpartition(b"/")
            if directory in self.opaques or not self.decided.get(parent, {}).get(name, True):
                known = True
                break
            if not directory:
                known = False
                break
            directory = parent
        for name in above:
            self._memo[name] = known
        return known


class Tree:
    """The merged tree.  Its root is a directory whatever the layers say."""

    def __init__(self, where: Callable[[int], str]) -> None:
        self.root = Node("d", 0o755, 0, 0, 0, NO_XATTR, {})
        self._where = where
        self._last: tuple[bytes, Node] | None = None  # members of a directory come one after another

    def apply(self, layer: Layer, number: int) -> None:
        """One layer on top of what is there.  Raises ImageError where the specification leaves no meaning."""
        removed: list[tuple[Node, bytes | None]] = []  # all found before any is removed: their order means nothing
        marks: list[tuple[bytes, bytes | None]] = [*layer.whiteouts, *((directory, None) for directory in layer.opaques)]
        made = (
            {_joined(above, name) for above, name, record in layer.members() if isinstance(record, Node) and record.kind == "d"}
            if marks
            else set()
        )
        for directory, gone in marks:
            parent = None if self._replaced(directory, made) else self.directory(directory)
            if parent is not None:
                removed.append((parent, gone))
        for parent, gone in removed:
            if gone is None:
                parent.payload.clear()
            else:
                parent.payload.pop(gone, None)
        self._last = None
        for directory, name, record in layer.members():
            try:
                self.put(directory, name, record)
            except ImageError as error:
                raise ImageError(f"merging {self._where(number)}: {escaped(_joined(directory, name))}: {error.message}") from None

    def _replaced(self, path: bytes, made: set[bytes]) -> bool:
        """Whether a layer that makes the directories `made` puts one of them on the way in the place of something else.

        What that was is gone, and a marker below the new directory says nothing about where an old link there led to.
        """
        above = b""
        for part in path.split(b"/") if path else ():
            above = above + b"/" + part if above else part
            if above in made and (old := self.lookup(above)) is not None and old.kind != "d":
                return True
        return False

    def put(self, directory: bytes, name: bytes, record: Record) -> None:
        """One member in the place of what is there; the root has no name.  Raises ImageError."""
        if isinstance(record, bytes):
            record = self._target(directory, name, record)
        if not name:
            if record.kind != "d":
                raise ImageError("the root of an image must be a directory")
            _update(self.root, record)
            return
        parent = self.directory(directory, record)
        assert parent is not None  # directory() makes what is missing when it is given a record
        children: dict[bytes, Node] = parent.payload
        old = children.get(name)
        if old is None:
            children[name] = record
        elif old.kind == "d" and record.kind == "d":
            _update(old, record)
        else:
            children[name] = record
            self._last = None  # the path of the last directory may have led through the old node

    def _target(self, directory: bytes, name: bytes, target: bytes) -> Node:
        if _joined(directory, name) == target:
            raise ImageError(f"hard link to {escaped(target)}, which is itself")
        node = self.lookup(target)
        if node is None:
            raise ImageError(f"hard link to {escaped(target)}, which is not in the image")
        if node.kind == "d":
            raise ImageError(f"hard link to {escaped(target)}, which is a directory")
        return node

    def lookup(self, path: bytes) -> Node | None:
        """The node at `path`, links followed on the way but not at its end; None where there is none."""
        directory, _, name = path.rpartition(b"/")
        parent = self.directory(directory)
        if parent is None or not name:
            return parent
        found: Node | None = parent.payload.get(name)
        return found

    def directory(self, path: bytes, maker: Node | None = None) -> Node | None:
        """The directory at `path`, links followed as chroot(2) would.

        Arguments:
            maker: with a node, missing directories are made (0755, root's, that node's time) and other files in the way
                replaced by directories; without, None is returned for both.

        More than LINKS symbolic links lead nowhere: None again, or with a maker ImageError.
        """
        if self._last is not None and self._last[0] == path:
            return self._last[1]
        trail = [self.root]
        todo = path.split(b"/")[::-1] if path else []
        links = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            children = trail[-1].payload
            child = children.get(name)
            if child is not None and child.kind == "l":
                links += 1
                if links > LINKS:
                    if maker is None:
                        return None
                    raise ImageError("too many symbolic links on the way")
                if child.payload.startswith(b"/"):
                    trail = [self.root]
                todo.extend(reversed(child.payload.split(b"/")))
                continue
            if child is None or child.kind != "d":
                if maker is None:
                    return None
                child = children[name] = Node("d", 0o755, 0, 0, maker.mtime, NO_XATTR, {})
            trail.append(child)
        self._last = (path, trail[-1])
        return trail[-1]

    def nodes(self) -> Iterator[Node]:
        """Every node that has a name, a hard-linked one once for each; directories before what they hold."""
        stack = [self.root]
        while stack:
            for child in stack.pop().payload.values():
                yield child
                if child.kind == "d":
                    stack.append(child)


def _joined(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name


def _update(directory: Node, other: Node) -> None:
    directory.mode, directory.uid, directory.gid = other.mode, other.uid, other.gid
    directory.mtime, directory.xattr = other.mtime, other.xattr


def merge(
    count: int, opener: Opener, writer: Writer, *, where: Callable[[int], str], extra: Mapping[bytes, File] | None = None, mtime: int = 0
) -> Node:
    """Stream `count` layers into `writer` and return the tree of the image they make.

    Arguments:
        opener: opens the tar of layer n, 0 the oldest; called newest first, rarely twice for one layer.
        where: what layer n is called in errors.
        extra: files laid on top of the layers (convert.metadata), written with time `mtime` (Unix s) and owned by root.

    Raises: ImageError; what opener and its reader raise.
    """
    layers: list[Layer] = [Layer() for _ in range(count)]
    shade = Shade()
    for number in reversed(range(count)):
        _read(opener(number), layers[number], shade, writer, where(number))
        if number:
            shade.add(layers[number])
    del shade
    tree = Tree(where)
    for number, layer in enumerate(layers):
        tree.apply(layer, number)
    missing = {id(node) for node in tree.nodes() if node.kind == "f" and node.payload is None}
    for number in reversed(range(count)):
        again = {n: node for n, (_, _, node) in enumerate(layers[number].members()) if isinstance(node, Node) and id(node) in missing}
        if again:
            _read_again(opener(number), again, writer)
        layers[number] = Layer()  # the tree holds what is still needed
    for path, file in (extra or {}).items():
        if file.only_if_missing and tree.lookup(path) is not None:
            continue
        payload = {} if file.kind == "d" else file.content if file.kind == "l" else _store(writer, path, len(file.content), [file.content])
        directory, _, name = path.rpartition(b"/")
        tree.put(directory, name, Node(file.kind, file.mode, 0, 0, mtime, NO_XATTR, payload))
    return tree.root


def _read(reader: tar.Reader, layer: Layer, shade: Shade, writer: Writer, where: str) -> None:
    """Record what a layer says, and store the data of the files that no newer layer decides about."""
    records = layer.records
    links: list[bytes] = []
    last = b""
    for member in reader:
        path = member.path
        if WHITEOUT in path and _whiteout(member, layer, where):
            continue
        directory, _, name = path.rpartition(b"/")
        if directory == last:
            directory = last  # one object for all members of a directory
        elif path.count(b"/") > DEEPEST:
            raise ImageError(f"reading {where}: {escaped(path[:200])}...: more than {DEEPEST} directories deep")
        last = directory
        kind = member.kind
        if kind == "h":
            records += (directory, name, member.link)
            if not shade.hides(directory, name):
                links.append(member.link)
            continue
        payload: object = None
        if kind == "f":
            # A target named by a link of this same layer came before the link, so only newer layers' wishes matter here.
            if member.size == 0 or path in shade.wanted or not shade.hides(directory, name):
                payload = _store(writer, member.path, member.size, reader.pieces())
        elif kind == "d":
            payload = {}
        elif kind == "l":
            payload = member.link
            member.mode = 0o777  # Linux knows no other, whatever the tar says
        elif kind in "cb":
            payload = member.rdev
        xattr = writer.xattrs(member.xattrs) if member.xattrs else NO_XATTR
        records += (directory, name, Node(kind, member.mode, member.uid, member.gid, member.mtime, xattr, payload))
    shade.wanted.update(links)


def _whiteout(member: tar.Member, layer: Layer, where: str) -> bool:
    """Take note of a whiteout; False for a member that merely has the marker's letters somewhere in its path."""
    parts = member.path.split(b"/")
    for part in parts:
        if part.startswith(RESERVED) and part != OPAQUE:
            return True
    directory, _, name = member.path.rpartition(b"/")
    if any(part.startswith(WHITEOUT) for part in parts[:-1]):
        raise ImageError(f"reading {where}: {escaped(member.path)}: a whiteout cannot be a directory")
    if not name.startswith(WHITEOUT):
        return False
    if member.kind == "d":
        raise ImageError(f"reading {where}: {escaped(member.path)}: a whiteout cannot be a directory")
    if name == OPAQUE:
        layer.opaques.append(directory)
        return True
    name = name[len(WHITEOUT) :]
    if name in (b"", b".", b".."):
        raise ImageError(f"reading {where}: {escaped(member.path)}: a whiteout that names no file")
    layer.whiteouts.append((directory, name))
    return True


def _store(writer: Writer, path: bytes, size: int, pieces: Iterable[memoryview | bytes | int]) -> object:
    writer.file(size, plain=is_read_at_start(path))
    for piece in pieces:
        if isinstance(piece, int):
            writer.hole(piece)
        else:
            writer.append(piece)
    return writer.end()


def _read_again(reader: tar.Reader, again: Mapping[int, Node], writer: Writer) -> None:
    """A layer once more, for the data of the files in `again`, by their number among the layer's records."""
    number = 0
    ignored = Layer()
    for member in reader:
        if WHITEOUT in member.path and _whiteout(member, ignored, "a layer"):
            continue
        node = again.get(number)
        if node is not None:
            node.payload = _store(writer, member.path, member.size, reader.pieces())
        number += 1
