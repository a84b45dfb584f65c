"""Servers of FUSE file systems in which the user's own ids count, and the one that stands in for the kernel's overlay.

A FUSE file system belongs to a user namespace, in whose ids its server speaks.  squashfuse_ll serves an image whose owner is
root, in the namespace where the caller is root (sources.py).  An ext3 image belongs to whoever made it, mostly to the caller as
themselves; so it is mounted in a user namespace of its own, where that owner is the caller, and the mount is handed over:

    ours                              starter                                      server
     |  socket pair, fork ----------->  new user and mount namespace
     |                                  tmpfs over /sys, fork ------------------>  fuse2fs -f ... /sys
     |                                  until /sys is another file system          mounts it, and serves
     |  <--- descriptor, SCM_RIGHTS --  open_tree(/sys); umount /sys; exit
     |  move_mount to its place

/sys is a directory that every host has; it is covered in the starter's mount namespace alone.  Once the starter is gone the
only mount is ours: when the payload's last process ends, the kernel drops it, and the server writes what is left and ends.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct
import time

from sciexec import kernel, sources
from sciexec.errors import HostError, ImageError, escaped

FUSE2FS = "fuse2fs"
UNION = "fuse-overlayfs"
PLACE = "/sys"
SIGKILL = 9
TICK = 0.001  # seconds between two looks at whether it is mounted


class Ext3Server:
    """fuse2fs on an image file.

    Arguments:
        fd, offset: the file system.  name: what to call it.  program: absolute path of fuse2fs.
        owner: uid and gid in the file system that the caller is.
        read_only: nothing is written, not even the state of the file system.
    """

    __slots__ = ("_fd", "_log", "_name", "_offset", "_options", "_owner", "_program", "_socket", "_starter")

    def __init__(self, fd: int, offset: int, name: str, program: str, owner: tuple[int, int], *, read_only: bool) -> None:
        self._fd, self._offset, self._name, self._program, self._owner = fd, offset, name, program, owner
        # fakeroot: rights are the kernel's to check (default_permissions), which lets the overlay into directories of its own
        self._options = f"fakeroot,default_permissions,no_default_opts,use_ino,offset={offset}" + (",ro" if read_only else "")
        self._log = self._starter = -1

    def start(self, alive: int) -> None:
        """Start it, from the user namespace in which the caller is 0.  alive: a descriptor that it keeps open while it lives, or -1."""
        self._log = os.memfd_create(FUSE2FS)
        self._socket, theirs = _socket.socketpair()
        self._starter = os.fork()
        if self._starter == 0:
            try:
                self._socket.close()
                self._start(theirs, alive)
            except OSError as error:
                os.write(self._log, str(error).encode("utf-8", "backslashreplace"))
            finally:
                os._exit(1)
        theirs.close()

    def _start(self, theirs: _socket.socket, alive: int) -> None:
        os.setsid()
        own_namespaces(*(f"{number} 0 1" for number in self._owner))
        kernel.capset_only("sys_admin")  # to mount, and nothing else
        before = os.stat(PLACE).st_dev
        server = os.fork()
        if server == 0:
            try:
                self._serve(alive)
            finally:
                os._exit(127)
        try:
            while os.stat(PLACE).st_dev == before:
                if has_ended(server):
                    return
                time.sleep(TICK)
            tree = kernel.open_tree(PLACE)
            kernel.umount2(PLACE, kernel.MNT_DETACH)  # else the server would keep it alive itself
        except OSError:  # the root directory cannot be read, say
            os.kill(server, SIGKILL)
            raise
        send(theirs, tree)
        os._exit(0)

    def _serve(self, alive: int) -> None:
        kept = sources.bare(self._fd, self._log, alive)
        for number in (1, 2):
            os.dup2(kept[1], number)
        for fd in (kept[0], *kept[2:]):
            os.set_inheritable(fd, True)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        options = self._options + (",big_writes" if is_old(self._program) else "")
        # -s: one thread; it has one lock for everything anyway
        os.execve(self._program, [FUSE2FS, "-f", "-s", kernel.magic(kept[0]), PLACE, "-o", options], {})

    def mount(self, target: str) -> None:
        """Wait until it serves, and mount it.  Raises OSError, ImageError."""
        (tree,) = receive(self._socket, 1) or (-1,)
        if tree < 0:
            said = os.pread(self._log, 4096, 0).decode("utf-8", "replace").replace(kernel.magic(self._fd), self._name).strip()
            raise ImageError(
                f"mounting {escaped(self._name)}: {FUSE2FS} ended: {escaped(said.splitlines()[-1] if said else 'it said nothing')}",
                f"`e2fsck -f {escaped(self._name)}` looks for damage and mends it",
            )
        place = os.open(target, os.O_PATH | os.O_DIRECTORY)
        kernel.move_mount(tree, place)
        os.close(place)
        os.close(tree)

    def finish(self) -> None:
        reap(self._starter)


def union(target: str, lower: list[str], upper: str = "", work: str = "") -> None:
    """Mount fuse-overlayfs, where the kernel's overlay will not write.  Of a FUSE file system as the upper one it demands that it
    tells the kinds of directory entries and renames with RENAME_WHITEOUT, and fuse2fs does neither or one of them.  So what is
    removed leaves a file .wh.NAME behind, and where there are such files, the same server has to read them.

    The server sees our layers in a mount namespace of its own, under PLACE, but not what it serves: so it ends when the payload
    does, and the servers of its layers after it.

    Arguments: as those of overlay.overlay.  Raises OSError, HostError.
    """
    program = sources.installed(UNION)
    if not program:
        raise HostError(f"writing to an ext3 overlay: {UNION} is not installed", "a directory can be written to without it")
    os.mkdir(target)
    device = os.open("/dev/fuse", os.O_RDWR)
    ready, set_ready = os.pipe()
    wait, go = os.pipe()
    starter = os.fork()
    if starter == 0:
        try:
            os.setsid()
            if os.fork() == 0:  # its parent ends, so it is init's child, not the payload's
                kernel.unshare(kernel.CLONE_NEWNS)
                kernel.mount(".", PLACE, "", kernel.MS_BIND | kernel.MS_REC)
                device, set_ready, wait = sources.bare(device, set_ready, wait)
                os.set_inheritable(device, True)
                kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
                kernel.capset_only("dac_override", "fowner")  # in directories that their owner has closed
                os.write(set_ready, b".")
                layers = ":".join(f"{PLACE}/{path}" for path in lower)
                options = f"lowerdir={layers},noacl,writeback=0"  # a full image is an error of write(2), and not of close(2)
                options += f",upperdir={PLACE}/{upper},workdir={PLACE}/{work}" if upper else ""
                if os.read(wait, 1):
                    os.execve(program, [UNION, "-f", "-o", options, f"/dev/fd/{device}"], {})
        finally:
            os._exit(127)
    os.close(set_ready)
    os.close(wait)
    if not os.read(ready, 1):
        raise HostError(f"mounting a writable overlay: {UNION} could not be started")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    kernel.mount(UNION, target, "fuse", kernel.PRIVATE | (0 if upper else kernel.MS_RDONLY), options)
    os.write(go, b".")
    for fd in (device, ready, go):
        os.close(fd)
    reap(starter)


def mounted(uid: int, gid: int) -> tuple[int, int]:
    """A FUSE file system in which the caller, who is 0 here, is uid and gid: (its mount, attached nowhere; its device).  Raises OSError."""
    ours, theirs = _socket.socketpair()
    maker = os.fork()
    if maker == 0:
        try:
            own_namespaces(f"{uid} 0 1", f"{gid} 0 1")
            device = os.open("/dev/fuse", os.O_RDWR)
            kernel.mount("fuse", PLACE, "fuse", kernel.PRIVATE, f"fd={device},rootmode=40000,user_id={uid},group_id={gid}")
            tree = kernel.open_tree(PLACE)
            kernel.umount2(PLACE, kernel.MNT_DETACH)
            send(theirs, tree, device)
        finally:
            os._exit(0)
    theirs.close()
    fds = receive(ours, 2)
    ours.close()
    reap(maker)
    if not fds:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), "/dev/fuse")
    return fds[0], fds[1]


def own_namespaces(uid_map: str, gid_map: str) -> None:
    """A user namespace with these maps, and a mount namespace where PLACE is an empty directory.  Raises OSError."""
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
    kernel.map_ids(proc, uid_map, gid_map)
    os.close(proc)
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
    kernel.mount("tmpfs", PLACE, "tmpfs", kernel.PRIVATE)


def send(socket: _socket.socket, *fds: int) -> None:
    socket.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))])


def receive(socket: _socket.socket, count: int) -> tuple[int, ...]:
    """Descriptors that the other side sent, in number `count`; none where it ended without a word."""
    _, ancillary, _, _ = socket.recvmsg(1, _socket.CMSG_SPACE(4 * count), _socket.MSG_CMSG_CLOEXEC)
    return struct.unpack(f"{count}i", ancillary[0][2]) if ancillary else ()


def has_ended(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG)[0] != 0
    except ChildProcessError:  # our caller ignores SIGCHLD, and so do we
        return True


def reap(child: int) -> int:
    """Wait for a child; its status, 0 where our caller ignores SIGCHLD."""
    try:
        return os.waitpid(child, 0)[1]
    except ChildProcessError:
        return 0


def is_old(program: str) -> bool:
    """Whether a program stands on libfuse 2, which writes pages one by one unless it is told to do better."""
    with open(program, "rb") as file:
        return b"libfuse.so.2" in file.read()
