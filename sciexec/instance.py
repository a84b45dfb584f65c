"""Named containers in the background: what is on record of them, and how they are listed, found and stopped.

    BASE/app/HOST/NAME/PID.START.json    the record of an instance; 0600, in directories of 0700
    BASE/logs/HOST/USER/NAME.out, .err   what its processes write; kept when it ends
    BASE/new/                            records in the making

BASE is a directory of the user's, which the hosts of a cluster may share: $SCIEXEC_CONFIGDIR/instances, else
$XDG_STATE_HOME/sciexec/instances, else ~/.local/state/sciexec/instances.

No lock guards a name, as not every shared file system has them.  A name is taken by renaming a directory with the record in
it over NAME: the kernel replaces an empty directory and refuses any other, so of two who try one succeeds.

A record counts as long as its owner's process PID lives that began at START: the starting command at first, then process 1 of the
instance, for which a second record is added before the first is removed.  Whoever meets a record that does not count removes it;
as no other can have its name, that never is another one.
"""

from __future__ import annotations

import errno
import os

from sciexec.errors import HostError, SciexecError, UsageError, escaped
from sciexec.sources import tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from sciexec.host import Host

LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
LONGEST = 200  # of a name; a file's name has 255 bytes, and some of them are ours
# The options of a start that decide who those are that join later, and what they can ask for.
RECORDED = """
    contain ipc net uts hostname no_home no_mount drop_caps add_caps uid gid limits apply_cgroups fakeroot no_privs binds data workdir
    scratch writable writable_tmpfs overlays fusemounts dns
""".split()
CONFIG = ("SCIEXEC_CONFIGDIR", "APPTAINER_CONFIGDIR", "SINGULARITY_CONFIGDIR")
PF_EXITING = 4  # linux/sched.h; of the flags in /proc/PID/stat
PATIENCE = 2  # seconds, for the kernel to end what was killed
TRIES = 100  # to take a name that others take and leave all the time


class Instance:
    """The record of an instance.

    Arguments:
        name: of the instance.  image: absolute path.
        pid, started: process 1, by the id that it has on the host, and its start time in clock ticks since boot.
        running: False while it is being started; then pid is the starting command's.
        home: the home directory inside.
        start: the image's start object in hexadecimal, or None.
        options: of the start, by slot; those of RECORDED.
        boot, namespace: of the host, and of the process ids on it, where pid means something.
        out, err: absolute paths of the logs.
        path: of the record; "" where it has none yet.  owner: of the record, a uid.
    """

    FIELDS = ("name", "image", "pid", "started", "running", "home", "start", "options", "boot", "namespace", "out", "err")
    __slots__ = (*FIELDS, "owner", "path")

    name: str
    image: str
    pid: int
    started: int
    running: bool
    home: str
    start: str | None
    options: dict[str, Any]
    boot: str
    namespace: int
    out: str
    err: str
    path: str
    owner: int

    def __init__(self, *, path: str = "", owner: int | None = None, **fields: Any) -> None:
        for name in self.FIELDS:
            setattr(self, name, fields[name])
        self.path, self.owner = path, os.getuid() if owner is None else owner

    def dump(self) -> bytes:
        import json

        return json.dumps({name: getattr(self, name) for name in self.FIELDS}, indent=1).encode() + b"\n"

    def listed(self) -> dict[str, str | int]:
        """As clients expect it of `instance list --json`."""
        return {"instance": self.name, "pid": self.pid, "img": self.image, "ip": "", "logErrPath": self.err, "logOutPath": self.out}

    def is_alive(self) -> bool:
        """Whether there is the process, and is the record owner's: root, who may stop anything, believes no user's record."""
        if self.boot != boot() or start_time(self.pid) != self.started:
            return False
        try:
            return os.stat(f"/proc/{self.pid}").st_uid == self.owner
        except OSError:
            return False

    def has_ended(self) -> bool:
        """Whether its processes are all gone: the kernel lets process 1 wait for the others."""
        try:
            fields = stat_of(self.pid)
        except OSError:
            return True
        return fields[0] in (b"Z", b"X") or int(fields[19]) != self.started

    def is_elsewhere(self) -> bool:
        """Whether its process ids mean nothing here, as it was started in another PID namespace of this host."""
        return self.boot == boot() and self.namespace != namespace()

    def take_name(self, base: str) -> None:
        """Put the record in its place.  Raises HostError where there is a record of that name already."""
        directory = named(base, self.name)
        private(os.path.dirname(directory))
        new = private(f"{base}/new/{os.uname().nodename}.{self.pid}.{self.started}")
        try:
            write(f"{new}/{self.file()}", self.dump())
            for _ in range(TRIES):
                try:
                    os.rename(new, directory)
                    self.path = f"{directory}/{self.file()}"
                    return
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                other = next(records(directory), None)
                if other is not None:
                    raise HostError(
                        f"instance {self.name} exists already" + ("" if other.running else ": it is being started"),
                        f"`sciexec instance stop {self.name}` stops it" if other.running else "",
                    )
            raise HostError(f"starting instance {self.name}: others take and leave this name all the time")
        finally:
            if not self.path:
                remove(f"{new}/{self.file()}")

    def hand_over(self, base: str, pid: int) -> None:
        """Let the record be that of process 1, which is there."""
        before = self.path
        self.pid, self.started, self.running = pid, start_time(pid), True
        new = f"{base}/new/{os.uname().nodename}.{self.file()}"
        write(new, self.dump())
        path = f"{os.path.dirname(before)}/{self.file()}"
        os.rename(new, path)
        self.path = path
        os.unlink(before)

    def file(self) -> str:
        return f"{self.pid}.{self.started}.json"

    def remove(self) -> None:
        remove(self.path)


def noted(value: object) -> object:
    """A value of the options as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [noted(item) for item in value]
    key = getattr(value, "key", None)
    return noted(key()) if key else value


# --- files ------------------------------------------------------------------------------------------------------------------


def base(host: Host) -> str:
    """The directory of all records and logs.

    Not $HOME, which a job may change, says where a home directory is: an instance must be found again.
    """
    for name in CONFIG:
        given = host.environment.get(name)
        if given:
            return os.path.join(os.path.abspath(given), "instances" if name == CONFIG[0] else "sciexec/instances")
    state = host.environment.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):
        return f"{state}/sciexec/instances"
    home = host.home or host.environment.get("HOME", "")
    if not os.path.isabs(home):
        raise HostError("finding the instances: no home directory is known", "SCIEXEC_CONFIGDIR names a directory for them")
    return f"{home}/.local/state/sciexec/instances"


def named(base: str, name: str) -> str:
    """The directory of the record of that name on this host."""
    return f"{base}/app/{os.uname().nodename}/{name}"


def logs(base: str, host: Host, name: str) -> tuple[str, str]:
    """Absolute paths of the logs, standard output's first."""
    user = os.fsdecode(host.entry[0]).replace("/", "_")
    directory = f"{base}/logs/{os.uname().nodename}/{user}"
    return f"{directory}/{name}.out", f"{directory}/{name}.err"


def private(directory: str) -> str:
    """Make a directory for the user alone, and the missing ones above it; returns it."""
    if not os.path.isdir(directory):
        private(os.path.dirname(directory))
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise HostError(f"making {escaped(directory)}: {error.strerror}", "SCIEXEC_CONFIGDIR names another directory") from error
    return directory


def write(path: str, data: bytes) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
    except OSError as error:
        raise HostError(f"writing {escaped(path)}: {error.strerror}", "SCIEXEC_CONFIGDIR names another directory") from error


def remove(path: str) -> None:
    """Remove a record, and its directory where nobody else has put one there meanwhile."""
    for act, what in ((os.unlink, path), (os.rmdir, os.path.dirname(path))):
        try:
            act(what)
        except OSError:
            pass


def records(directory: str) -> Iterator[Instance]:
    """Those in the directory of one name that count: one, or none, or for a moment two.  The others are removed."""
    import json

    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        path = f"{directory}/{name}"
        try:
            with open(path, "rb") as file:
                found = Instance(path=path, owner=os.fstat(file.fileno()).st_uid, **json.load(file))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HostError(f"reading {escaped(path)}: not the record of an instance ({error})", "remove it") from error
        if os.getuid() not in (found.owner, 0):  # where somebody else can write, nobody is safe
            raise HostError(f"reading {escaped(path)}: the record belongs to somebody else", "SCIEXEC_CONFIGDIR names another directory")
        if found.is_elsewhere() or found.is_alive():
            yield found
        else:
            found.remove()


# --- processes --------------------------------------------------------------------------------------------------------------


def boot() -> str:
    """A name for the time since this host was started, in which a process id and a start time mean one process."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def namespace() -> int:
    """The PID namespace that we are in."""
    return os.stat("/proc/self/ns/pid").st_ino


def stat_of(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat behind the name, so that the number of a field in proc(5) is its index here plus 3.

    Raises OSError where there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        return file.read().rpartition(b")")[2].split()


def start_time(pid: int) -> int:
    """When a process was started, in clock ticks since boot; -1 for none, or one that is ending or waits to be waited for."""
    try:
        fields = stat_of(pid)
    except OSError:
        return -1
    return -1 if int(fields[6]) & PF_EXITING else int(fields[19])


def children(pid: int) -> bool:
    """Whether a process has any; the kernel tells it where it was built with CONFIG_PROC_CHILDREN, else we say yes."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return bool(file.read().strip())
    except OSError:
        return True


# --- commands ---------------------------------------------------------------------------------------------------------------


def check_name(name: str) -> str:
    """`name`, if an instance can be called so.  Raises SciexecError (the exit code is Apptainer's)."""
    if not name or not LETTERS.issuperset(name) or name in (".", "..") or len(name) > LONGEST:
        raise SciexecError(
            f"instance name {escaped(name) or '(empty)'}: not a valid one", f"letters, digits, '.', '_' and '-', at most {LONGEST}"
        )
    return name


def find(host: Host, name: str) -> Instance:
    """The running instance of that name.  Raises HostError where there is none here."""
    place = named(base(host), name) if name and LETTERS.issuperset(name) and name not in (".", "..") else ""
    known = list(records(place)) if place else []
    for found in known:
        if found.is_elsewhere():
            raise HostError(f"instance {name} belongs to another PID namespace of this host", "it can be reached from there only")
        if found.running:
            return found
    if known:
        raise HostError(f"instance {name} is being started")
    raise HostError(f"no instance found with name {escaped(name)}", "`sciexec instance list` shows those of this host")


def find_all(host: Host, pattern: str = "*") -> list[Instance]:
    """The running instances of this host whose names match, by name."""
    import fnmatch

    place = os.path.dirname(named(base(host), "x"))
    try:
        names = sorted(name for name in os.listdir(place) if fnmatch.fnmatchcase(name, pattern))
    except OSError:
        return []
    found = [instance for name in names for instance in records(f"{place}/{name}")]
    return [instance for instance in found if instance.running and not instance.is_elsewhere()]


def chosen(host: Host, pattern: str) -> list[Instance]:
    """find_all(), which shall find one at least.  Raises UsageError (the exit code is Apptainer's)."""
    found = find_all(host, pattern)
    if not found:
        raise UsageError("no instance found", "`sciexec instance list` shows those of this host")
    return found


def listing(instances: list[Instance], *, as_json: bool, logs: bool) -> str:
    """What `instance list` prints."""
    if as_json:
        import json

        return json.dumps({"instances": [instance.listed() for instance in instances]}, indent="\t") + "\n"
    if logs:
        rows = [["INSTANCE NAME", "PID", "LOGS"]]
        for instance in instances:
            rows += [[instance.name, str(instance.pid), instance.err], ["", "", instance.out]]
    else:
        rows = [["INSTANCE NAME", "PID", "IP", "IMAGE"], *([i.name, str(i.pid), "", escaped(i.image)] for i in instances)]
    return columns(rows)


def columns(rows: list[list[str]]) -> str:
    """A table as Apptainer prints it: four blanks between columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "".join("    ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() + "\n" for row in rows)


def whose(host: Host, user: str) -> Host:
    """The host as `user` sees it; "" for the caller.  Raises HostError where the caller may not."""
    if not user or os.fsencode(user) == host.entry[0]:
        return host
    if host.uid:
        raise HostError(f"looking for instances of {escaped(user)}: only root may see another user's")
    import pwd

    try:
        known = pwd.getpwnam(user)
    except KeyError:
        raise HostError(f"looking for instances of {escaped(user)}: there is no such user") from None
    host.entry = [os.fsencode(str(field)) for field in known]
    host.home, host.environment = known.pw_dir, {}
    return host


def signal_number(text: str) -> int:
    """The number of a signal: 15, TERM or SIGTERM.  Raises SciexecError (the exit code is Apptainer's)."""
    import signal

    name = text.upper()
    found = signal.Signals.__members__.get(name if name.startswith("SIG") else f"SIG{name}")
    number = int(text) if text.isascii() and text.isdigit() else found.value if found else 0
    if number not in signal.valid_signals():
        raise SciexecError(f"signal {escaped(text)}: there is no such signal", "as SIGTERM, TERM or 15")
    return number


def stop(instances: list[Instance], signal: int, timeout: float, *, quiet: bool) -> None:
    """Send a signal and wait until they have ended; those that have not after `timeout` seconds are killed.

    An instance has ended with its processes: when process 1 has no child left, it is killed.
    """
    import time

    def say(text: str) -> None:
        if not quiet:
            tell(f"INFO:    {text}")

    left = list(instances)
    for instance in left:
        say(f"Stopping {instance.name} instance of {escaped(instance.image)} (PID={instance.pid})")
        send(instance, signal)
    deadline = time.monotonic() + timeout
    pause = 0.001
    while left := [instance for instance in left if instance.is_alive()]:
        if time.monotonic() >= deadline:
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        for instance in left:
            if not children(instance.pid):
                send(instance, 9)
    for instance in left:
        say(f"Killing {instance.name} instance of {escaped(instance.image)} (PID={instance.pid}) (Timeout)")
        send(instance, 9)
    deadline = time.monotonic() + PATIENCE
    for instance in instances:
        while not instance.has_ended() and time.monotonic() < deadline:
            time.sleep(0.001)
        instance.remove()


def send(instance: Instance, signal: int) -> None:
    try:
        if instance.is_alive():
            os.kill(instance.pid, signal)
    except ProcessLookupError:
        pass
