"""What the root of a container is made of: the image, and what makes it writable.

Overlays of the user's own (--overlay), and images that are themselves written to, are told in stack.py.
"""

from __future__ import annotations

import os

from sciexec import kernel
from sciexec.errors import HostError
from sciexec.mounts import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.mounts import Operation
    from sciexec.sources import Source


class Layers:
    """The image and what lies over it.

    Arguments:
        source: what is mounted as the root.
        writable: whether the payload may write to the root; then all of it is an overlay, else only mount points are added.
        size: of what can be written, in bytes; 0 for the kernel's default, half of the memory.
    """

    __slots__ = ("size", "source", "writable")

    def __init__(self, source: Source, *, writable: bool = False, size: int = 0) -> None:
        self.source, self.writable, self.size = source, writable, size

    def describe(self) -> list[str]:
        """One line for each step."""
        size = f" size={self.size}" if self.size else ""
        return [self.source.describe(), f"overlay, writable{size}" if self.writable else "read-only"]

    def prepare(self) -> None:
        """What has to be done as the caller, before anything else."""
        self.source.prepare()

    def start(self) -> None:
        """What has to be done inside the user namespace that will mount, and in front of its mount namespace."""
        self.source.start()

    def mount(self, operations: list[Operation]) -> Root:
        """Mount it in the current directory, a tmpfs of ours.  Raises OSError, HostError.

        Arguments:
            operations: those whose mount points shall be there, where they cannot be made later on.
        """
        os.mkdir("image")
        self.source.mount("image")
        if not self.writable:
            return Root("image", writable=False)
        place = memory(self.size)
        try:
            overlay("root", ["image"], f"{place}/upper", f"{place}/work")
        except OSError as error:
            raise HostError(f"mounting an overlay for --writable-tmpfs: {error.strerror}", OLD) from error
        return Root("root", writable=True)

    def finish(self) -> None:
        """What is left to do when everything is mounted."""
        self.source.finish()


OLD = "Linux 5.11 was the first to allow it"


def memory(size: int) -> str:
    """A directory in memory, with upper and work in it for an overlay.  size: its limit in bytes, 0 for half of the memory."""
    place = "."
    if size:
        place = "memory"
        os.mkdir(place)
        kernel.mount("tmpfs", place, "tmpfs", kernel.PRIVATE, f"mode=755,size={size}")
    for name in ("upper", "work"):
        os.mkdir(f"{place}/{name}")
    return place


def overlay(target: str, lower: list[str], upper: str = "", work: str = "") -> None:
    """Mount the kernel's overlay on a new directory; lower: topmost first.  Raises OSError."""
    os.mkdir(target)
    options = f"lowerdir={':'.join(lower)},userxattr" + (f",upperdir={upper},workdir={work}" if upper else "")
    kernel.mount("overlay", target, "overlay", kernel.PRIVATE, options)
