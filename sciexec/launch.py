"""An instance is started: from a command that the user waits for to a process 1 that nobody waits for.

    command --fork--> starter --fork--> sinit, process 1 --fork--> the image's startscript or runscript
       |              own session,      reaps, forwards
       |              ends here
       |
       +--- go: one byte, when the instance is on record ------->  sinit
       +<-- report: b"1" and sinit's process id, when all is mounted; or b"0", a message, NUL, a hint.  Its end means that the
            script is being executed: the kernel closes it then.

Nothing waits for a time to pass.  Whichever side dies, the other reads the end of its pipe: either the command reports an
instance that is on record and runs, or there is none.
"""

from __future__ import annotations

import fcntl
import os
import select

from sciexec import enter, instance, kernel, run, sinit
from sciexec.errors import HostError, SciexecError, escaped
from sciexec.instance import Instance
from sciexec.sources import tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.enter import Plan
    from sciexec.environment import Payload
    from sciexec.host import Host
    from sciexec.image import Image
    from sciexec.options import Options
    from sciexec.sinit import Link

UP, FAILED = b"1", b"0"
LONGEST_REPORT = 4000  # bytes, of 4096 that a pipe takes in one piece
SIGINT, SIGQUIT, SIGKILL, SIGTERM, SIGCHLD = 2, 3, 9, 15, 17
ENDING = (SIGINT, SIGQUIT, SIGTERM)  # behind one of these an instance ends as soon as nothing runs in it

# Where clients look for the logs, below the home directory, by the name under which they call us.
CLIENTS = {"singularity": ".singularity/instances/logs", "apptainer": ".apptainer/instances/logs"}


def start(options: Options, image: Image, host: Host) -> None:
    """Start an instance; it runs when this returns.  Raises SciexecError where it does not."""
    base = instance.base(host)
    name = instance.check_name(options.name)
    options.pid, options.no_init = True, False
    made = run.plan(options, image, host)
    if options.debug:
        tell(made.describe())
    out, err = instance.logs(base, host, name)
    record = Instance(
        name=name,
        image=image.path,
        pid=os.getpid(),
        started=instance.start_time(os.getpid()),
        running=False,
        home=run.home_of(options, host)[1] or "/",
        start=run.start_object(image).hex() or None,
        options={slot: instance.noted(getattr(options, slot)) for slot in instance.RECORDED},
        boot=instance.boot(),
        namespace=instance.namespace(),
        out=out,
        err=err,
    )
    pid_file = open_pid_file(options.pid_file) if options.pid_file else -1
    record.take_name(base)
    try:
        begin(record, made, base, [open_log(out), open_log(err)])
    except BaseException:
        if record.running:
            instance.send(record, SIGKILL)
        record.remove()
        raise
    if pid_file >= 0:
        os.ftruncate(pid_file, 0)
        os.write(pid_file, b"%d\n" % record.pid)
    link_logs(record, options.program, base, host)
    if not options.quiet:
        tell("INFO:    instance started successfully")


def open_pid_file(path: str) -> int:
    try:
        return open_above(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise HostError(f"writing the process id to {escaped(path)}: {error.strerror}") from error


def open_log(path: str) -> int:
    instance.private(os.path.dirname(path))
    try:
        return open_above(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    except OSError as error:
        raise HostError(f"opening the log {escaped(path)}: {error.strerror}", "SCIEXEC_CONFIGDIR names another directory") from error


def open_above(path: str, flags: int) -> int:
    """Open a file that does not become a standard stream where the caller has closed one."""
    fd = os.open(path, flags, 0o644)
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


def link_logs(record: Instance, program: str, base: str, host: Host) -> None:
    """Let a client that knows where another runtime keeps its logs find ours there; a file that is there is somebody's own."""
    directory = CLIENTS.get(program.rpartition("/")[2])
    for path in (record.out, record.err) if directory and host.home else ():
        link = f"{host.home}/{directory}/{os.path.relpath(path, f'{base}/logs')}"
        try:
            if os.path.islink(link):
                os.unlink(link)
            instance.private(os.path.dirname(link))
            os.symlink(path, link)
        except (OSError, HostError):  # the instance does not need it
            pass


# --- outside ----------------------------------------------------------------------------------------------------------------


def begin(record: Instance, plan: Plan, base: str, logs: list[int]) -> None:
    """Start the processes, and bring the record up to date in between."""
    wait, go = sinit.pipe()
    reported, report = sinit.pipe()
    starter = os.fork()
    if starter == 0:
        os.close(go)
        os.close(reported)
        become(plan, logs, wait, report)
    for fd in (wait, report, *logs):
        os.close(fd)
    try:
        first = os.read(reported, LONGEST_REPORT)
        if first[:1] == UP:
            record.hand_over(base, int(first[1:]))
            os.write(go, b".")
            first = os.read(reported, LONGEST_REPORT)
            if not first:
                return
        if first[:1] == FAILED:
            message, _, hint = first[1:].decode("utf-8", "replace").partition("\0")
            raise SciexecError(message, hint)
        raise HostError(f"starting instance {record.name}: its first process was killed")
    finally:
        os.close(go)
        os.close(reported)
        try:
            os.waitpid(starter, 0)
        except ChildProcessError:  # our caller ignores SIGCHLD, and so do we
            pass


# --- inside -----------------------------------------------------------------------------------------------------------------


def become(plan: Plan, logs: list[int], wait: int, report: int) -> NoReturn:
    """In the starter: leave the caller's session and streams, enter the container, become the script.  Errors are reported."""
    try:
        kernel.signal_default(SIGINT)  # Python's handler
        os.setsid()
        forget_environment()
        close_inherited()
        for number, fd in enumerate((open_above(os.devnull, os.O_RDONLY), *logs)):
            os.dup2(fd, number)
        plan.isolation.supervisor = Launch(plan.payload, wait, report)
        enter.enter(plan)
        plan.payload.execute()
    except SciexecError as error:
        text = f"{error.message}\0{error.hint}"
    except BaseException as error:
        text = f"sciexec itself failed: {type(error).__name__}: {error}\0"
    try:
        os.write(report, FAILED + text.encode("ascii", "backslashreplace")[: LONGEST_REPORT - 1])
    finally:
        os._exit(255)


def forget_environment() -> None:
    """Overwrite /proc/self/environ: it will be that of process 1, for everybody inside to read, whatever --cleanenv keeps back."""
    first, behind = map(int, instance.stat_of(os.getpid())[47:49])  # env_start, env_end
    try:
        memory = os.open("/proc/self/mem", os.O_WRONLY)
        os.pwrite(memory, bytes(behind - first), first)
        os.close(memory)
    except OSError:  # a kernel that does not let a process write its own memory so
        pass


def close_inherited() -> None:
    """A pipe of the caller's must not be held open by an instance.  Ours are not inheritable, as Python opens them."""
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if number > 2 and os.get_inheritable(number):
                os.close(number)
        except OSError:  # the listing's own
            pass


class Launch:
    """What stands in for a supervisor (sinit.py): somebody who does not stay.

    Arguments:
        payload: what will be executed.  wait, report: our ends of the pipes to the command.
    """

    __slots__ = ("_pid", "payload", "report", "wait")

    def __init__(self, payload: Payload, wait: int, report: int) -> None:
        self.payload, self.wait, self.report = payload, wait, report
        self._pid = ""

    def leave(self, *, init: bool) -> None:
        """Fork.  The starter ends, and process 1 is the host's to reap."""
        if os.fork():
            os._exit(0)
        self._pid = os.readlink("/proc/self")  # out there, whose /proc this still is

    def start(self, link: Link | None, *, init: bool) -> None:
        """Report, wait until we are on record, and return in the child that will be the script."""
        command = self.payload.command()
        os.write(self.report, UP + self._pid.encode())
        if not os.read(self.wait, 1):
            os._exit(255)
        kernel.prctl(kernel.PR_SET_NAME, sinit.NAME)
        before = kernel.sigprocmask(kernel.SIG_BLOCK, kernel.ALL_SIGNALS)
        arriving = kernel.signalfd(kernel.ALL_SIGNALS)
        kernel.signal_default(SIGCHLD)  # ignored, it would reap for us and say nothing
        child = os.fork() if command else 0
        if child or not command:
            try:
                Keeper(child, arriving).work()
            finally:
                os._exit(255)
        kernel.sigprocmask(kernel.SIG_SETMASK, before)
        lead_group(0)


def lead_group(pid: int) -> None:
    try:
        os.setpgid(pid, pid)
    except OSError:  # done already, by the other side, or too late
        pass


class Keeper:
    """Process 1 of an instance: it stays when the script has ended, for those who will join.

    Arguments:
        child: the script, which leads a process group; 0 for none.  arriving: a signalfd for all signals.
    """

    __slots__ = ("arriving", "child", "ending")

    def __init__(self, child: int, arriving: int) -> None:
        self.child, self.arriving = child, arriving
        self.ending = False  # whether we end when the last child has

    def work(self) -> NoReturn:
        if self.child:
            lead_group(self.child)
        os.chdir("/")
        sinit.keep_only(self.arriving)
        poll = select.poll()
        poll.register(self.arriving, select.POLLIN)
        while True:
            poll.poll()
            for number, _ in sinit.signals(self.arriving):
                if number != SIGCHLD:
                    self.forward(number)
            if not self.reap() and self.ending:
                os._exit(0)

    def forward(self, number: int) -> None:
        """To the script and its process group; where they have ended, what ends an instance is for everybody in it."""
        self.ending |= number in ENDING
        try:
            os.kill(-self.child if self.child else -1, number) if self.child or self.ending else None
        except ProcessLookupError:
            if self.child and number in ENDING:
                os.kill(-1, number)

    def reap(self) -> bool:
        """Whether there is a child left."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True
