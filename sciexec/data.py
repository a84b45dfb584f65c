"""Data images: a directory tree as one file, shown at a place of the container.

    --bind data.sif:/data:image-src=/               SIF, its first data partition
    --bind data.sif:/data:image-src=/sub,id=3       SIF, its object 3; a directory or file below the root of the data
    --mount type=bind,src=data.sqfs,dst=/data,image-src=/     SquashFS
    --data data.sif:/data, --data NAME:/data        the same in short; a data partition of the image that runs, by its name

A million small files are one file to a parallel file system, and squashfuse_ll, which serves the image itself, serves them too.
Each is mounted once, however many places show it, in our own tmpfs and bound from there; it ends with the last bind.

Source: Apptainer's user guide, "Bind Paths and Mounts", image mounts.
"""

from __future__ import annotations

import os
import stat

from sciexec import image as images
from sciexec import kernel, sif, sources
from sciexec.errors import ImageError, UsageError, escaped
from sciexec.mounts import Operation, Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.host import Host
    from sciexec.image import Image
    from sciexec.sif import Descriptor, Sif
    from sciexec.sources import Source
    from sciexec.spelling import Bind

DIRECTORY = "/data"  # below it is what --data shows without saying where


class Served:
    """A data image, mounted when the first of its binds needs it.

    Arguments:
        number: of this among all of a run.
    """

    __slots__ = ("_root", "_started", "name", "number", "source")

    def __init__(self, source: Source, name: str, number: int) -> None:
        self.source, self.name, self.number = source, name, number
        self._started = False
        self._root: Root | None = None

    def start(self) -> None:
        if not self._started:
            self._started = True
            self.source.prepare()
            self.source.start()

    def find(self, path: str) -> int:
        """A descriptor (O_PATH) of what is at `path` in the data.  Raises OSError, ImageError."""
        if self._root is None:
            directory = f"data{self.number}"
            os.mkdir(directory)
            self.source.mount(directory)
            self.source.finish()
            self._root = Root(directory, writable=False)
        try:
            return self._root.find(path)
        except FileNotFoundError:
            raise ImageError(f"binding {escaped(self.name)}: there is no {escaped(path)} in it") from None


class Data(Operation):
    """A directory or file of a data image, read-only.

    Arguments:
        path: absolute, in the data.
    """

    __slots__ = ("path", "served")

    def __init__(self, served: Served, path: str, target: str) -> None:
        super().__init__(target)
        self.served, self.path = served, path

    def describe(self) -> str:
        return f"data {escaped(self.target)} is {escaped(self.path)} of {self.served.source.describe()}"

    def start(self) -> None:
        self.served.start()

    def prepare(self, root: Root) -> None:
        source = self.served.find(self.path)
        os.close(root.make(self.target, directory=stat.S_ISDIR(os.fstat(source).st_mode)))
        os.close(source)

    def execute(self, root: Root) -> None:
        source = self.served.find(self.path)
        directory = stat.S_ISDIR(os.fstat(source).st_mode)
        target = root.make_fitting(self.target, directory=directory)
        stage = root.stage(directory=directory)
        kernel.mount(kernel.magic(source), stage, "", kernel.MS_BIND)
        shown = os.open(stage, os.O_PATH)
        root.show(shown)
        root.use(os.fstat(shown))
        kernel.mount(stage, kernel.magic(target), "", kernel.MS_MOVE)
        for fd in (source, target, shown):
            os.close(fd)


class Images:
    """The data images of a run.

    Arguments:
        image: what runs; its own data partitions are found by their names.
    """

    def __init__(self, image: Image, host: Host, *, quiet: bool) -> None:
        self._image, self._host, self._quiet = image, host, quiet
        self._served: dict[tuple[int, int, int], Served] = {}  # by device, inode and offset

    def bind(self, bind: Bind) -> Data:
        """What --bind or --mount with image-src asks for.  Raises ImageError, HostError."""
        return Data(self._serve(opened(bind.source, bind.number)), bind.image_src, bind.target)

    def named(self, name: str, target: str) -> Data:
        """What --data asks for: a file, or a data partition of the image; a name without a slash is looked for there first.

        Raises UsageError where there is neither, ImageError, HostError.
        """
        parsed = self._image.sif
        if parsed and "/" not in name:
            for descriptor in partitions(parsed):
                if descriptor.name == name:
                    found = images.partition(self._image.path, self._image.fd, parsed, descriptor)
                    return Data(self._serve(found), "/", target or f"{DIRECTORY}/{name}")
        if not os.path.exists(name):
            known = [descriptor.name for descriptor in partitions(parsed) if descriptor.name] if parsed else []
            hint = f"the data in it: {', '.join(map(escaped, known))}" if known else "the image holds no data that has a name"
            raise UsageError(f"--data {escaped(name)}: neither a file nor data in {escaped(self._image.path)}", hint)
        return Data(self._serve(opened(name, 0)), "/", target or f"{DIRECTORY}/{stem(name)}")

    def _serve(self, image: Image) -> Served:
        status = os.fstat(image.fd)
        key = (status.st_dev, status.st_ino, image.offset)
        if key not in self._served:
            source = sources.source(image, self._host, quiet=self._quiet)
            self._served[key] = Served(source, image.path, len(self._served))
        elif image.fd != self._image.fd:
            os.close(image.fd)
        return self._served[key]


def stem(path: str) -> str:
    """The name of a file without directory and suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def partitions(parsed: Sif) -> list[Descriptor]:
    """The data partitions of a SIF."""
    return [descriptor for descriptor in parsed.descriptors if descriptor.parttype == sif.PART_DATA]


def opened(path: str, number: int) -> Image:
    """The data in a SIF or SquashFS file.

    Arguments:
        number: the id of a SIF object, 0 for the first data partition.
    Raises ImageError for a file that holds no such data, HostError where it cannot be read.
    """

    def choose(parsed: Sif) -> Descriptor:
        for descriptor in parsed.descriptors if number else partitions(parsed):
            if number in (0, descriptor.id):
                return descriptor
        if number:
            raise ImageError(f"binding {escaped(path)}: it has no object {number}", f"`sciexec sif list {path}` shows those that it has")
        raise ImageError(f"binding {escaped(path)}: it holds no data partition", "image-src=/,id=N names a partition of another kind")

    found = images.open_image(path, choose)
    if found.kind == "directory":
        raise ImageError(f"binding {escaped(path)}: it is a directory and no data image", "without image-src it is bound as it is")
    return found
