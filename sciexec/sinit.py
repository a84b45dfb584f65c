"""A container with process ids of its own: who stays outside, and who is process 1 inside.

    caller --- supervisor, with the caller's process id --fork--> sinit, process 1 --fork--> payload
               forwards, ends as the payload did                  reaps, forwards

All three stay in the caller's process group and session, so that terminals, pipelines and job control work as they do without
us: what the terminal or a shell sends to the group reaches the payload from there.  What is sent to the supervisor alone has
to be forwarded, and the supervisor cannot tell the one from the other; but sinit can, as it gets the group's too:

    supervisor --- link.told: one byte for each signal --------> sinit     has it come to me as well?  the payload has it then
    supervisor <-- link.report: wait status of the payload ----- sinit     stopped: so does the supervisor; ended: so does it

The kernel gives a signal to a group's youngest process first: what the supervisor tells, sinit has seen.

With --no-init there is nobody to ask: the supervisor forwards whatever a process, and not the terminal, has sent.

The supervisor's death is the container's: the kernel kills process 1 then (PR_SET_PDEATHSIG), and with it all others.

The messages of the link: READY from inside when the payload can be started, START as the answer, then the above.
"""

from __future__ import annotations

import os
import select
import struct
import time

from sciexec import kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

NAME = b"sinit"
READY = b"\0\0\0\0"
START = b"\0"
GRACE = 0.1  # seconds; a signal that reached sinit and, so long after, not the supervisor, was meant for sinit alone
SIGINT, SIGKILL, SIGCHLD, SIGCONT, SIGSTOP = 2, 9, 17, 18, 19
STOPPING = (20, 21, 22)  # TSTP, TTIN, TTOU
STATUS = struct.Struct("=i")  # as waitpid(2) has it
SIGINFO = struct.Struct("=Iii116x")  # struct signalfd_siginfo: signal, errno, code; a code above 0 is the kernel's own


class Link:
    """Between the supervisor and process 1, as descriptors: `told` to read from, `report` to write to."""

    __slots__ = ("report", "reticent", "told")

    def __init__(self, told: int, report: int, *, reticent: bool) -> None:
        self.told, self.report = told, report
        self.reticent = reticent  # the caller ignores SIGCHLD, and so shall the payload


def leave(*, init: bool, supervisor: Callable[[int, int, int], Supervisor] | None = None) -> Link:
    """Fork.  This process stays outside as the supervisor and never returns; process 1 does.

    Call it when the next child is the first of a new PID namespace.  init: whether process 1 will be sinit, not the payload.
    supervisor: makes one of the first three arguments of Supervisor, where more is to be done than it does.
    """
    told, tell = pipe()
    reported, report = pipe()
    reticent = kernel.signal_default(SIGCHLD)  # ignored, it would take the exit code away
    child = os.fork()
    if child == 0:
        os.close(tell)
        os.close(reported)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, SIGKILL)
        return Link(told, report, reticent=reticent)
    try:
        stays = supervisor(child, tell, reported) if supervisor else Supervisor(child, tell, reported, init=init)
        stays.supervise()
    finally:
        os._exit(255)


def pipe() -> tuple[int, int]:
    """A pipe, none of whose ends becomes the payload's standard stream where the caller has closed one."""
    import fcntl

    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


def keep_only(*descriptors: int) -> None:
    """Close all others: a reader at the other end of the payload's output must not wait for us."""
    first = 0
    for descriptor in sorted(descriptors):
        if descriptor > first:
            kernel.close_range(first, descriptor - 1)
        first = descriptor + 1
    kernel.close_range(first, -1)


def signals(fd: int) -> list[tuple[int, int]]:
    """(number, code) of what waits at a signalfd."""
    found = []
    try:
        while data := os.read(fd, 64 * SIGINFO.size):
            found += [(number, code) for number, _, code in SIGINFO.iter_unpack(data)]
    except BlockingIOError:
        pass
    return found


# --- outside ----------------------------------------------------------------------------------------------------------------


class Supervisor:
    """The process that the caller started.

    Arguments:
        child: process 1, by the id that it has out here.  tell, reported: our ends of the link.
        init: whether it will be sinit.
    """

    __slots__ = ("arriving", "child", "init", "reported", "status", "tell")

    def __init__(self, child: int, tell: int, reported: int, *, init: bool) -> None:
        self.child, self.tell, self.reported, self.init = child, tell, reported, init
        self.status = 0  # the payload's last, as sinit told it

    def kept(self) -> list[int]:
        """The descriptors that we need."""
        return [self.tell, self.reported]

    def supervise(self) -> NoReturn:
        """Until the payload can be started a signal kills, as it would kill us without a container; from then on it is forwarded."""
        keep_only(*self.kept())
        if kernel.signal_default(SIGINT):  # Python's handler
            kernel.signal_ignore(SIGINT)
        if os.read(self.reported, len(READY)):  # nothing where process 1 has failed, and has said so
            kernel.prctl(kernel.PR_SET_NAME, b"sciexec")
            kernel.sigprocmask(kernel.SIG_BLOCK, kernel.ALL_SIGNALS)
            arriving = self.arriving = kernel.signalfd(kernel.ALL_SIGNALS)
            self.forward(START)
            self.reap()  # who has ended by now sends no signal any more
            poll = select.poll()
            poll.register(arriving, select.POLLIN)
            poll.register(self.reported, select.POLLIN)
            while True:
                for fd, _ in poll.poll():
                    if fd == arriving:
                        self.signalled(signals(arriving))
                    elif data := os.read(self.reported, STATUS.size):
                        self.changed(STATUS.unpack(data)[0])
                    else:
                        poll.unregister(self.reported)
        self.end(os.waitpid(self.child, 0)[1])

    def signalled(self, arrived: list[tuple[int, int]]) -> None:
        for number, code in arrived:
            if number == SIGCHLD:
                self.reap()
            elif self.init:
                self.forward(bytes([number]))
            elif code <= 0:
                os.kill(self.child, number)

    def forward(self, message: bytes) -> None:
        try:
            os.write(self.tell, message)
        except BrokenPipeError:  # it has ended
            pass

    def reap(self) -> None:
        """Process 1, and whoever else we started on the way."""
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if pid == 0:
                return
            if pid != self.child:
                continue
            if os.WIFSTOPPED(status):
                if not self.init:
                    self.changed(status)
                continue
            while data := os.read(self.reported, STATUS.size):
                self.status = STATUS.unpack(data)[0]
            self.end(self.status or status)

    def changed(self, status: int) -> None:
        """The payload has stopped, and so do we, for the shell to see; or it has ended, and we wait for the namespace to be empty."""
        if not os.WIFSTOPPED(status):
            self.status = status
            return
        raise_signal(os.WSTOPSIG(status))
        kernel.sigprocmask(kernel.SIG_BLOCK, kernel.ALL_SIGNALS)
        # SIGCONT let us go on, and the payload shall; where another stop came right behind it, the kernel has forgotten it
        arrived = signals(self.arriving)
        known = any(number == SIGCONT for number, _ in arrived)
        self.signalled(arrived if known else [(SIGCONT, 0), *arrived])

    def end(self, status: int) -> NoReturn:
        """End as the payload did."""
        if os.WIFSIGNALED(status):
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # the payload has left its core, ours would replace it
            raise_signal(os.WTERMSIG(status))
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def raise_signal(number: int) -> None:
    """Send ourselves a signal, with its default action; one of that number that waits already is the same."""
    if number not in (SIGKILL, SIGSTOP):
        kernel.signal_default(number)
    os.kill(os.getpid(), number)
    kernel.sigprocmask(kernel.SIG_UNBLOCK, (1 << number - 1).to_bytes(len(kernel.ALL_SIGNALS), "little"))


# --- inside -----------------------------------------------------------------------------------------------------------------


def start(link: Link | None, *, init: bool) -> None:
    """In process 1, when all is ready: become sinit and return in its child, or, without init, just return, to be the payload.

    Arguments:
        link: of leave(); None where nobody waits outside.
    """
    before = kernel.sigprocmask(kernel.SIG_BLOCK, kernel.ALL_SIGNALS if init else bytes(len(kernel.ALL_SIGNALS)))
    if link:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, SIGKILL)  # again: a change of user or capabilities clears it
        os.write(link.report, READY)
        if not os.read(link.told, len(START)):
            os._exit(255)
    if init:
        kernel.prctl(kernel.PR_SET_NAME, NAME)
        if link:
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # /proc/1/environ is the caller's, whatever --cleanenv keeps from the payload
        arriving = kernel.signalfd(kernel.ALL_SIGNALS)
        signals(arriving)  # of the time before there was a payload
        child = os.fork()
        if child:
            try:
                Init(child, arriving, link).work()
            finally:
                os._exit(255)
        kernel.sigprocmask(kernel.SIG_SETMASK, before)
    if link and link.reticent:
        kernel.signal_ignore(SIGCHLD)


class Init:
    """Process 1.

    Arguments:
        child: the payload.  arriving: a signalfd for all signals.  link: to the supervisor, or None.
    """

    __slots__ = ("arriving", "child", "link", "seen", "stopped")

    def __init__(self, child: int, arriving: int, link: Link | None) -> None:
        self.child, self.arriving, self.link = child, arriving, link
        self.seen: dict[int, float] = {}  # signals that reached us, and when: the supervisor's word on them is due
        self.stopped = False  # the payload, and by that the supervisor

    def work(self) -> NoReturn:
        """Reap and forward until the payload ends; the kernel kills whoever is left then."""
        os.chdir("/")
        kept = [self.arriving, *([self.link.told, self.link.report] if self.link else [])]
        keep_only(*kept)
        poll = select.poll()
        for fd in kept[:2]:
            poll.register(fd, select.POLLIN)
        while True:
            waiting = bool(self.seen) and not self.stopped
            ready = [fd for fd, _ in poll.poll(int(GRACE * 1000) if waiting else None)]
            told: list[int] = []
            if self.link and self.link.told in ready:  # before the signals: those that it is about have arrived
                told = list(os.read(self.link.told, 64))
                if not told:
                    os._exit(255)
            arrived = [number for number, _ in signals(self.arriving)]
            if SIGCHLD in arrived:
                self.reap()
            if SIGCONT in (*arrived, *told):  # it has taken back, here or there, what should stop us
                arrived, told = [[n for n in numbers if n not in STOPPING] for numbers in (arrived, told)]
                for number in STOPPING:
                    self.seen.pop(number, None)
            now = time.monotonic()
            self.seen.update((number, now) for number in arrived if number != SIGCHLD)
            for number in told:
                if self.seen.pop(number, None) is None:
                    os.kill(self.child, number)
            self.forward_own()

    def forward_own(self) -> None:
        """What reached us alone is the payload's."""
        if self.seen and not self.stopped:
            last = time.monotonic() - GRACE if self.link else float("inf")
            for number in [number for number, when in self.seen.items() if when <= last]:
                del self.seen[number]
                os.kill(self.child, number)

    def reap(self) -> None:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                return
            if pid != self.child:
                continue
            self.stopped = os.WIFSTOPPED(status)
            if self.link and not os.WIFCONTINUED(status):
                os.write(self.link.report, STATUS.pack(status))
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
