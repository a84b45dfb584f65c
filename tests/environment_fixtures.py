"""Text that sets traps for shells, and a payload planned with what a test does not care about filled in."""

from __future__ import annotations

from sciexec import environment
from sciexec.environment import Start

# Text that would do something if any shell read it.
TRAPS = [
    "$(touch gone)",
    "`touch gone`",
    'a"b',
    "it's",
    "back\\slash",
    "new\nline",
    "!!",
    "a;b",
    "$HOME",
    "*",
    "~",
    "ünï",
    "\udce4",
    " ",
    "a  b",
    "x=y",
]


def plan(verb: str = "exec", argv: tuple[str, ...] = ("env",), /, **given: object) -> environment.Payload:
    defaults: dict[str, object] = {"host": {}, "start": Start([], [], []), "image": "/data/app.sif", "home": "/home/ann"}
    return environment.plan(verb, argv, **{**defaults, **given})  # type: ignore[arg-type]
