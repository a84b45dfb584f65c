"""What a container has of its own in place of what is the host's or the image's: directories that are kept, files that are written.

Only a run that asks for it (--workdir, --dns) loads this room.
"""

from __future__ import annotations

import os

from sciexec.errors import HostError, escaped
from sciexec.mounts import Bind, Operation, Root, write_over


class Made(Bind):
    """A directory of the host that is made if it is missing.

    Arguments:
        mode: of what is made; the directories above it get 0750.
    """

    __slots__ = ("mode",)

    def __init__(self, source: str, target: str, *, mode: int, optional: bool = False) -> None:
        super().__init__(source, target, optional=optional)
        self.mode = mode

    def describe(self) -> str:
        return f"{super().describe()} made={self.mode:o}"

    def start(self) -> None:
        if os.path.isdir(self.source):
            return
        try:
            os.makedirs(os.path.dirname(self.source), 0o750, exist_ok=True)
            os.mkdir(self.source)
            os.chmod(self.source, self.mode)  # whatever the umask
        except FileExistsError:  # another container was faster
            pass
        except OSError as error:
            raise HostError(f"making {escaped(self.source)}: {error.strerror}") from error


class File(Operation):
    """A file of ours.

    Arguments:
        content: what is seen.  summary: what that is, in a few words.
    """

    __slots__ = ("content", "summary")

    def __init__(self, target: str, content: bytes, summary: str) -> None:
        super().__init__(target)
        self.content = content
        self.summary = summary

    def describe(self) -> str:
        return f"file {self.target} {self.summary}"

    def prepare(self, root: Root) -> None:
        os.close(root.make(self.target, directory=False))

    def execute(self, root: Root) -> None:
        target = root.make_fitting(self.target, directory=False)
        try:
            write_over(target, self.target, self.content)
        finally:
            os.close(target)
