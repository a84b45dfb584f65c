"""One container for all ranks of a step on a node: the first makes it, the others join, whoever is last ends it.

    rank 1 --bind--> "\\0sciexec <digest>" --makes the container--> keeper: listens, holds its namespaces
    rank n --connect-------------------------------------------------> sends them; watches rank n until it ends

The name is that of an abstract Unix socket and stands for the user, the step, the image and everything that would be mounted:
ranks that ask for the same meet, others do not.  To bind it is the lock: the kernel lets one process do it, and takes the name
back when that process dies.  Who comes while the container is being made waits in the socket's queue; if it cannot be made,
or the keeper has just ended, the queue is reset and everybody tries again.  So there is no file, no time-out, no number of
ranks to be known, and no parent that they must share; a rank may end first, be killed, or come late.

The keeper watches each rank by a pidfd (Linux 5.3) and ends with the last one.  Then the kernel drops the mounts, and the
server of the image ends as it always does.

Why: ranks in one user namespace may read each other's memory (process_vm_readv(2), which MPI libraries use within a node), there is
one page cache and one server for all of them, and a rank's start costs an interpreter and a few system calls.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import struct
import time

from sciexec import enter, isolation, kernel, mpi
from sciexec.sinit import keep_only

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.enter import Plan
    from sciexec.host import Host
    from sciexec.image import Image
    from sciexec.options import Options

QUEUE = 4096  # ranks that may wait while the first one makes the container
AGAIN = 0.0005  # seconds between two tries while somebody has the name and does not listen yet
CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
NAMESPACES = (*isolation.NAMESPACES, ("user", kernel.CLONE_NEWUSER))  # the payload's user namespace takes the right to join others away
LAYOUT = struct.Struct(f"={len(NAMESPACES)}i")


def address(options: Options, plan: Plan, image: Image, host: Host) -> bytes | None:
    """The name under which the ranks meet that want this container; None on a kernel where nobody could keep it."""
    if not kernel.has_pidfd():
        return None
    scope = mpi.job(host.environment) if options.share == "job" else mpi.step(host.environment)
    status = os.fstat(image.fd)
    what = (host.uid, scope, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, plan.describe_container())
    return b"\0sciexec " + digest(repr(what).encode("utf-8", "surrogateescape")).encode()


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal, by the interpreter's own: hashlib around it loads OpenSSL."""
    try:
        from _sha2 import sha256
    except ImportError:  # before Python 3.12
        from _sha256 import sha256
    return str(sha256(data).hexdigest())


def enter_shared(plan: Plan, name: bytes | None) -> None:
    """enter.enter(plan), in the container of that name if there is one, or as its first rank; without a name, alone.

    Raises what enter.enter() does.
    """
    if name is None:
        return enter.enter(plan)
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    own = [os.stat(f"ns/{kind}", dir_fd=proc).st_ino for kind, _ in NAMESPACES]
    while True:
        meeting = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            meeting.bind(name)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise enter.failed("meeting the other ranks of this node", error, "") from error
        else:
            return first(plan, meeting)
        try:
            meeting.connect(name)
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ECONNRESET):
                raise enter.failed("meeting the other ranks of this node", error, "") from error
            time.sleep(AGAIN)
            continue
        if peer(meeting)[1] != os.getuid():  # somebody squats our name; they shall not have us as well
            return enter.enter(plan)
        namespaces = received(meeting)
        if namespaces:
            return join(plan, namespaces, own)


def first(plan: Plan, meeting: _socket.socket) -> None:
    """Make the container, and leave a keeper in it."""
    meeting.listen(QUEUE)
    # the image's server and the keeper are everybody's: not bound to the CPU that the launcher has given to this rank
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    enter.enter(plan)
    try:
        kept = [os.open(f"ns/{kind}", os.O_RDONLY, dir_fd=plan.isolation.proc) for kind, _ in NAMESPACES]
        rank = kernel.pidfd_open(os.getpid())
        child = os.fork()
        if child == 0:
            keep(meeting, kept, rank)
        meeting.close()
        reap(child)
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise enter.failed("keeping the container for the other ranks", error, "namespace") from error


def reap(child: int) -> None:
    try:
        os.waitpid(child, 0)
    except ChildProcessError:  # our caller ignores SIGCHLD, and so do we
        pass


def join(plan: Plan, namespaces: list[int], own: list[int]) -> None:
    """Enter the container whose namespaces these are.  own: inode numbers of this process's, which need no entering."""
    try:
        # not the owner of its mounts: with --fakeroot that is the payload's own
        kernel.setns(kernel.parent(namespaces[-1]), kernel.CLONE_NEWUSER)  # where this process may do all that follows
        for fd, (_, flag), mine in zip(namespaces, NAMESPACES, own):
            if os.fstat(fd).st_ino != mine:
                kernel.setns(fd, flag)
        plan.isolation.confine()
    except OSError as error:
        raise enter.failed("joining the container of this node", error, "namespace") from error
    enter.change_directory(plan.cwd, strict=plan.strict, quiet=plan.quiet)
    enter.reset_signals()


def peer(meeting: _socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of who listens, or has connected; unix(7), SO_PEERCRED."""
    found = CREDENTIALS.unpack(meeting.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, CREDENTIALS.size))
    return found[0], found[1], found[2]


def received(meeting: _socket.socket) -> list[int]:
    """The descriptors that the keeper sends; none where it has ended."""
    try:
        _, ancillary, _, _ = meeting.recvmsg(1, _socket.CMSG_SPACE(LAYOUT.size), _socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return []
    for level, kind, data in ancillary:
        if (level, kind, len(data)) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, LAYOUT.size):
            return list(LAYOUT.unpack(data))
    return []


# --- the keeper -------------------------------------------------------------------------------------------------------------


def keep(meeting: _socket.socket, namespaces: list[int], rank: int) -> NoReturn:
    """Become the keeper: nobody's child, in no session of the caller's, with no other descriptor of theirs."""
    try:
        os.setsid()
        if os.fork() == 0:
            os.chdir("/")
            keep_only(meeting.fileno(), rank, *namespaces)
            kernel.prctl(kernel.PR_SET_NAME, b"sciexec-keeper")
            serve(meeting, namespaces, rank)
    finally:
        os._exit(0)


def serve(meeting: _socket.socket, namespaces: list[int], rank: int) -> None:
    """Let ranks in until the last of them has ended.

    Who connects at that very moment finds the queue closed, and makes the next container.
    """
    poll = select.poll()
    poll.register(meeting.fileno(), select.POLLIN)
    poll.register(rank, select.POLLIN)
    ranks = {rank}
    while ranks:
        for fd, _ in poll.poll():
            if fd in ranks:
                poll.unregister(fd)
                os.close(fd)
                ranks.remove(fd)
            else:
                new = admit(meeting, namespaces)
                if new >= 0:
                    poll.register(new, select.POLLIN)
                    ranks.add(new)


def admit(meeting: _socket.socket, namespaces: list[int]) -> int:
    """Let one rank in; returns its pidfd, or -1 where it is no rank of ours, or has ended already."""
    fd, _ = meeting._accept()  # type: ignore[attr-defined]
    connection = _socket.socket(fileno=fd)
    try:
        pid, uid, _ = peer(connection)
        if uid != os.getuid():
            return -1
        rank = kernel.pidfd_open(pid)
        connection.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, LAYOUT.pack(*namespaces))])
    except OSError:
        return -1
    finally:
        connection.close()
    return rank

