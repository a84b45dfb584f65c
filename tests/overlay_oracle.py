"""The kernel's overlayfs as an oracle for merged layers; run as `unshare -Urm python3 overlay_oracle.py DIRECTORY`.

Reads JSON lines on stdin, each a list of layers as tests/layer_model.py has them (every parent a member of its own, no hard
links), lays each layer out as a directory with overlayfs's own whiteouts, mounts them, and answers what the kernel shows.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import sys

libc = ctypes.CDLL(None, use_errno=True)


def lay_out(top: str, layer: list[tuple[str, str, str]]) -> None:
    members = {path: (kind, value) for kind, path, value in layer if kind not in "wo"}
    whiteouts = {path for kind, path, _ in layer if kind == "w"}
    opaques = {path for kind, path, _ in layer if kind == "o"}
    os.makedirs(top)
    for path, (kind, value) in sorted(members.items()):
        full = os.path.join(top, path)
        if kind == "d":
            os.mkdir(full)
        elif kind == "l":
            os.symlink(value, full)
        else:
            with open(full, "w") as file:
                file.write(value)
    for path in sorted(whiteouts - set(members)):
        os.mknod(os.path.join(top, path), stat.S_IFCHR, os.makedev(0, 0))
    for path in opaques | {path for path in whiteouts if members.get(path, "x")[0] == "d"}:
        os.setxattr(os.path.join(top, path), "user.overlay.opaque", b"y")


def shown(top: str) -> dict[str, tuple[str, str]]:
    found = {}
    for directory, names, files in os.walk(top):
        for name in names + files:
            full = os.path.join(directory, name)
            try:
                mode = os.lstat(full).st_mode
            except FileNotFoundError:
                continue  # a whiteout that hides nothing: a directory of one layer lists it, but it cannot be looked up
            if stat.S_ISLNK(mode):
                entry = ("l", os.readlink(full))
            elif stat.S_ISDIR(mode):
                entry = ("d", "")
            else:
                with open(full) as file:
                    entry = ("f", file.read())
            found[os.path.relpath(full, top)] = entry
    return found


def main(work: str) -> None:
    for line in sys.stdin:
        layers = json.loads(line)
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work + "/merged")
        os.makedirs(work + "/empty")
        lowers = [f"{work}/{n}" for n in range(len(layers))]
        for top, layer in zip(lowers, layers):
            lay_out(top, layer)
        options = "userxattr,lowerdir=" + ":".join([*reversed(lowers), work + "/empty"])
        if libc.mount(b"overlay", f"{work}/merged".encode(), b"overlay", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"overlay: {os.strerror(ctypes.get_errno())}")
        print(json.dumps(shown(work + "/merged")), flush=True)
        libc.umount2(f"{work}/merged".encode(), 0)


if __name__ == "__main__":
    main(sys.argv[1])
