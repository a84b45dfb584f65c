"""What an ELF file says about itself, read and never executed.

    0   "\\x7fELF"   4  class (1: 32 bit, 2: 64)   5  data (1: little endian, 2: big)   16  type u16   18  machine u16

Source: System V ABI, "ELF Header"; machine numbers as in the kernel's include/uapi/linux/elf-em.h.
"""

from __future__ import annotations

HEADER = 20  # bytes that machine() wants to see

# (machine, class, data) -> Go's name of the architecture, which OCI and SIF use
_MACHINES = {
    (3, 1, 1): "386",
    (62, 2, 1): "amd64",
    (40, 1, 1): "arm",
    (183, 2, 1): "arm64",
    (21, 2, 2): "ppc64",
    (21, 2, 1): "ppc64le",
    (8, 1, 2): "mips",
    (8, 1, 1): "mipsle",
    (8, 2, 2): "mips64",
    (8, 2, 1): "mips64le",
    (22, 2, 2): "s390x",
    (243, 2, 1): "riscv64",
    (258, 2, 1): "loong64",
}


def machine(head: bytes) -> str | None:
    """The architecture an ELF file is for, by its first HEADER bytes; None if it is no ELF file or of another machine."""
    if len(head) < HEADER or not head.startswith(b"\x7fELF"):
        return None
    number = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
    return _MACHINES.get((number, head[4], head[5]))
