"""What the root of a container is made of: the image, and what makes it writable."""

from __future__ import annotations

import os

from sciexec import kernel
from sciexec.errors import HostError
from sciexec.mounts import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sciexec.options import Options
    from sciexec.sources import Source


class Layers:
    """The image and what lies over it.

    Arguments:
        source: what is mounted as the root.
        writable: whether the payload may write to the root; then all of it is an overlay, else only mount points are added.
    """

    __slots__ = ("source", "writable")

    def __init__(self, source: Source, *, writable: bool) -> None:
        self.source, self.writable = source, writable

    def describe(self) -> list[str]:
        """One line for each step."""
        return [self.source.describe(), "overlay, writable" if self.writable else "read-only"]

    def prepare(self) -> None:
        """What has to be done as the caller, before anything else."""
        self.source.prepare()

    def start(self) -> None:
        """What has to be done inside the user namespace that will mount, and in front of its mount namespace."""
        self.source.start()

    def mount(self) -> Root:
        """Mount it in the current directory, a tmpfs of ours.  Raises OSError, HostError."""
        os.mkdir("image")
        self.source.mount("image")
        if not self.writable:
            return Root("image", writable=False)
        for name in ("upper", "work", "root"):
            os.mkdir(name)
        try:
            kernel.mount("overlay", "root", "overlay", kernel.PRIVATE, "lowerdir=image,upperdir=upper,workdir=work,userxattr")
        except OSError as error:
            raise HostError(
                f"mounting an overlay for --writable-tmpfs: {error.strerror}", "Linux 5.11 was the first to allow it"
            ) from error
        return Root("root", writable=True)

    def finish(self) -> None:
        """What is left to do when everything is mounted."""
        self.source.finish()


def layers(options: Options, source: Source) -> Layers:
    """The layers that these options ask for."""
    return Layers(source, writable=options.writable_tmpfs)
