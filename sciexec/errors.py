"""The errors that reach a user: one line that says act, object and cause, and a hint on a line of its own.

They are raised anywhere and shown once, at the door (`sciexec.__main__`).  The exit code belongs to the class.
"""

from __future__ import annotations


class SciexecError(Exception):
    """Something failed that the user can understand; never shown with a traceback unless --debug is given.

    Arguments:
        message: one line, "act object: cause", e.g. "pulling docker://x/y: manifest unknown".
        hint: what to do about it, one line; empty where nothing useful can be said.
    """

    exit_code = 255

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(SciexecError):
    """The command line itself is wrong (Apptainer's exit code for that is 1)."""

    exit_code = 1


class HostError(SciexecError):
    """The host lacks something: a kernel feature, a device, a program, a library, room on a disk."""


class ImageError(SciexecError):
    """The image, archive, layer or SIF is not what its format demands."""


class LimitError(ImageError):
    """Input larger than the limit set against hostile images; the hint names the flag that raises it."""


class RegistryError(SciexecError):
    """The registry or the network between did not give what was asked for."""


def escaped(text: str | bytes) -> str:
    """Text from an image or a server as it may be shown on a terminal: control bytes and bad UTF-8 escaped."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    # ascii() and not a codec: codecs are modules, and inside a container the host's modules are out of reach
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
