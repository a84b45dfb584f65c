"""Which of an index's images runs on a machine: GOOS, GOARCH and variant, as the OCI image specification names them.

    linux/amd64    linux/amd64/v3    linux/arm64 (= v8)    linux/arm/v7 (= arm)    linux/arm/v6

A machine runs what is made for an older variant of its architecture, and never anything of another architecture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sciexec.errors import UsageError, escaped

# What uname(2) and some images say -> (GOARCH, variant)
ALIASES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "loongarch64": ("loong64", ""),
}

# Architectures whose variants are levels -> the level that is meant where none is named.
LEVELS = {"amd64": 1, "arm64": 8, "arm": 7}


@dataclass(frozen=True)
class Platform:
    """os, architecture (GOARCH) and variant ("" where none is named); str() as in linux/arm/v7."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os or "?", self.architecture or "?", self.variant) if part)

    @classmethod
    def normalised(cls, system: str, architecture: str, variant: str = "") -> Platform:
        """With the names of other traditions replaced."""
        architecture, implied = ALIASES.get(architecture.lower(), (architecture, ""))
        return cls(system, architecture, variant or implied)

    def level(self) -> int | None:
        """7 for v7; the usual one if none is named; None where the architecture or the variant knows no levels."""
        usual = LEVELS.get(self.architecture)
        if usual is None or not self.variant:
            return usual
        digits = self.variant[1:].partition(".")[0]
        return int(digits) if self.variant[:1] == "v" and digits.isdecimal() and len(digits) < 4 else None

    def rank(self, offered: Platform) -> int | None:
        """How well a machine of this platform is served by what is offered: 0 is exact, more is worse, None not at all."""
        if (offered.os, offered.architecture) != (self.os, self.architecture):
            return None
        mine, theirs = self.level(), offered.level()
        if mine is not None and theirs is not None:
            return mine - theirs if theirs <= mine else None
        if offered.variant == self.variant:
            return 0
        return 1 if not offered.variant else None


def wanted(arch: str | None = None) -> Platform:
    """The platform an --arch option names (amd64, arm64, arm/v7, armv7l ...); without one, this machine's.

    Raises UsageError.
    """
    text = arch or os.uname().machine
    architecture, _, variant = text.partition("/")
    if not architecture or not (architecture + variant).replace("_", "").replace("-", "").replace(".", "").isalnum():
        raise UsageError(f"choosing the architecture {escaped(text)}: not a name of Go's, such as amd64, arm64 or arm/v7")
    return Platform.normalised("linux", architecture, variant)
