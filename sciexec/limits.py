"""Limits of resources: a control group of the container's own, where the host leaves one to its users; cgroups(7), version 2.

    options, TOML file --requests()--> OCI names and numbers --translate()--> files of the group and what they get

    the caller's group, or one above it, that we may write to
        +--- sciexec-PID     the payload, and nobody of ours; removed when its last process has ended
        +--- sciexec-outside we ourselves, only where the caller's group must be empty of processes to have children with limits

Nobody of ours stays to remove the group where the payload takes our process over.  So a process does that waits for it, started
only where there are limits: it sleeps until the kernel says that the group is empty.  Where it was killed an empty group stays,
which the next run removes.

Sources: the kernel's admin-guide/cgroup-v2.rst; the OCI runtime specification, config-linux.md, for the names; opencontainers/cgroups
for swap, shares and weights.
"""

from __future__ import annotations

import errno
import math
import os
import select

from sciexec import kernel, spelling
from sciexec.errors import HostError, UsageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, Union

    from sciexec.options import Options

    Value = Union[bool, int, str]
    Entry = dict[str, Value]  # of an array of tables
    Requests = dict[str, Union[Value, list[Entry]]]

PERIOD = 100_000  # of cpu.max, in microseconds
OURS = "sciexec-"
ON = "the site turns them on with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
SCOPE = "`systemd-run --user --scope -p Delegate=yes sciexec ...` gives you one of your own; under a batch system the site does"
DELEGATE = "the site leaves them to users by a line Delegate=cpu cpuset io memory pids in systemd's user@.service"

# Keys of a TOML file that this release takes: the OCI specification's names, as Apptainer has them.
KNOWN = """
    memory.limit memory.reservation memory.swap cpu.shares cpu.quota cpu.period cpu.cpus cpu.mems pids.limit blockIO.weight
    blockIO.throttleReadBpsDevice blockIO.throttleWriteBpsDevice blockIO.throttleReadIOPSDevice blockIO.throttleWriteIOPSDevice
""".split()
THROTTLES = {"ReadBps": "rbps", "WriteBps": "wbps", "ReadIOPS": "riops", "WriteIOPS": "wiops"}
# and how the options are called in these
SLOTS = {
    "memory": "memory.limit", "memory_swap": "memory.swap", "memory_reservation": "memory.reservation", "cpu_shares": "cpu.shares",
    "cpuset_cpus": "cpu.cpus", "cpuset_mems": "cpu.mems", "pids_limit": "pids.limit", "blkio_weight": "blockIO.weight",
}  # fmt: skip


# --- what is asked for --------------------------------------------------------------------------------------------------------


def requests(given: dict[str, str], cpus: int) -> Requests:
    """What the options ask for.

    Arguments:
        given: value by slot (options.LIMITS), as written.  cpus: how many the host has.

    Raises UsageError for values that make no sense.
    """
    found: Requests = {}
    for slot, text in given.items():
        name = "--" + slot.replace("_", "-")
        if slot == "cpus":
            found["cpu.quota"], found["cpu.period"] = quota(name, text, cpus), PERIOD
        elif slot in ("cpuset_cpus", "cpuset_mems"):
            found[SLOTS[slot]] = text
        elif slot.startswith("memory"):
            found[SLOTS[slot]] = -1 if text == "-1" else spelling.size(name, text)
        else:
            found[SLOTS[slot]] = number(name, text)
    return found


def number(name: str, text: str) -> int:
    if not text.removeprefix("-").isdigit() or not text.isascii():
        raise UsageError(f"{name} {escaped(text)}: not a number")
    return int(text)


def quota(name: str, text: str, cpus: int) -> int:
    """Microseconds of each PERIOD."""
    whole, _, part = text.partition(".")
    if not (whole + part).isdigit() or not text.isascii() or not 0.01 <= float(text) <= cpus:
        raise UsageError(f"{name} {escaped(text)}: not a number of CPUs", f"from 0.01 to {cpus}, which this host has")
    return round(float(text) * PERIOD)


def translate(asked: Requests) -> dict[str, str]:
    """The files of a control group, and what has to be written into them.  Raises UsageError for values that make no sense."""
    files: dict[str, str] = {}

    def integer(key: str, lowest: int, highest: int = 2**63 - 1) -> int:
        value = asked[key]
        if isinstance(value, bool) or not isinstance(value, int) or not (lowest <= value <= highest or value == -1):
            raise UsageError(f"limits: {key} = {value!a}: not a number from {lowest} to {highest}")
        return value

    def limit(key: str, file: str, lowest: int) -> None:
        if key in asked:
            value = integer(key, lowest)
            files[file] = "max" if value == -1 else str(value)

    limit("memory.limit", "memory.max", 1)
    limit("memory.reservation", "memory.low", 0)
    limit("pids.limit", "pids.max", 1)
    if "memory.swap" in asked:
        files["memory.swap.max"] = swap(integer("memory.swap", 0), integer("memory.limit", 1) if "memory.limit" in asked else -1)
    if "cpu.quota" in asked or "cpu.period" in asked:
        share = integer("cpu.quota", 1000) if "cpu.quota" in asked else -1
        period = integer("cpu.period", 1000, 1_000_000) if "cpu.period" in asked else PERIOD
        files["cpu.max"] = f"{'max' if share == -1 else share} {period}"
    if "cpu.shares" in asked:
        files["cpu.weight"] = str(cpu_weight(integer("cpu.shares", 2, 262144)))
    for key, file in (("cpu.cpus", "cpuset.cpus"), ("cpu.mems", "cpuset.mems")):
        if key in asked:
            files[file] = numbers(key, asked[key])
    if "blockIO.weight" in asked:
        files["io.weight"] = str(io_weight(integer("blockIO.weight", 10, 1000)))
    lines: dict[str, list[str]] = {}
    for name, word in THROTTLES.items():
        for entry in entries(asked, f"blockIO.throttle{name}Device"):
            lines.setdefault(f"{entry['major']}:{entry['minor']}", []).append(f"{word}={entry['rate']}")
    if lines:
        files["io.max"] = "\n".join(f"{device} {' '.join(words)}" for device, words in lines.items())
    for key, value in asked.items():
        if key.startswith("unified."):
            files[key[len("unified.") :]] = str(value)
    return files


def swap(total: int, memory: int) -> str:
    """memory.swap.max, of a limit for memory and swap together."""
    if total == -1:
        return "max"
    if memory == -1:
        raise UsageError("--memory-swap: swap cannot be limited without a limit of memory", "--memory sets it")
    if total < memory:
        raise UsageError(f"--memory-swap {total}: it is of memory and swap together, and memory alone has {memory}")
    return str(total - memory)


def cpu_weight(shares: int) -> int:
    """2 to 262144, everybody's being 1024, to 1 to 10000, everybody's being 100: a parabola in the logarithms through the three."""
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))


def io_weight(weight: int) -> int:
    """10 to 1000, to 1 to 10000."""
    return 1 + (weight - 10) * 9999 // 990


def numbers(key: str, value: object) -> str:
    """A list as 0-3,8."""
    for item in value.split(",") if isinstance(value, str) else [""]:
        first, dash, last = item.partition("-")
        if not (item.isascii() and first.isdigit() and (not dash or (last.isdigit() and int(first) <= int(last)))):
            raise UsageError(f"limits: {key} = {value!a}: not a list of numbers", "as 0-3,8")
    return str(value)


def entries(asked: Requests, key: str) -> list[Entry]:
    """The tables of an array, each with major, minor and rate."""
    found = asked.get(key, [])
    for entry in found if isinstance(found, list) else [{}]:
        if set(entry) != {"major", "minor", "rate"} or not all(type(value) is int and value >= 0 for value in entry.values()):
            raise UsageError(f"limits: {key}: each needs the numbers major, minor and rate")
    return found if isinstance(found, list) else []


# --- the file -----------------------------------------------------------------------------------------------------------------


def read(path: str) -> Requests:
    """What a TOML file asks for.  Raises HostError where it cannot be read, UsageError for what it may not hold."""
    try:
        with open(path, "rb", buffering=0) as file:
            text = file.readall().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--apply-cgroups {escaped(path)}: not UTF-8") from error
    except OSError as error:
        raise HostError(f"reading {escaped(path)}: {error.strerror}") from error
    return toml(text, path)


def toml(text: str, path: str = "limits") -> Requests:
    """The part of TOML 1.0 that files of limits are written in: tables, arrays of tables, whole numbers, strings, booleans.

    Raises UsageError, with the line, for anything else and for keys that are not KNOWN.
    """
    found: Requests = {}
    table = ""
    entry: Entry | None = None
    for count, line in enumerate(text.splitlines(), 1):
        where = f"{escaped(path)} line {count}"
        head = bare(line).strip()
        if not head:
            continue
        if head.startswith("["):
            array = head.startswith("[[") and head.endswith("]]")
            if not array and not (head.endswith("]") and "[" not in head[1:]):
                raise UsageError(f"{where}: {escaped(head)} is no table")
            table, entry = ".".join(keys(head.strip("[]"), where)), None
            if array:
                if table not in KNOWN or not table.endswith("Device"):
                    raise unknown(where, table)
                entry = {}
                before = found.setdefault(table, [])
                assert isinstance(before, list)
                before.append(entry)
            continue
        name, equals, value = partition(head)
        if not equals:
            raise UsageError(f"{where}: {escaped(head)} is neither a table nor KEY = VALUE")
        if entry is not None:
            entry[".".join(keys(name, where))] = scalar(value.strip(), where)
            continue
        key = ".".join([*([table] if table else []), *keys(name, where)])
        if key not in KNOWN and not key.startswith("unified."):
            raise unknown(where, key)
        if key in found:
            raise UsageError(f"{where}: {escaped(key)} is there twice")
        found[key] = scalar(value.strip(), where)
    return found


def unknown(where: str, key: str) -> UsageError:
    reason = "rules for devices are loaded by root" if key.startswith("devices") else "this release of sciexec takes no limit of that name"
    return UsageError(f"{where}: {escaped(key)}: {reason}", f"it takes {', '.join(KNOWN)}, and files of the group under [unified]")


def bare(line: str) -> str:
    """A line without its comment."""
    quote = ""
    for index, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == "#":
            return line[:index]
    return line


def partition(text: str) -> tuple[str, str, str]:
    """At the first "=" outside of quotes, as str.partition."""
    hidden = ""
    quote = ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
            hidden += "_"
        else:
            quote = letter if letter in "\"'" else ""
            hidden += letter
    at = hidden.find("=")
    return (text[:at], "=", text[at + 1 :]) if at >= 0 else (text, "", "")


def keys(text: str, where: str) -> list[str]:
    """The parts of a dotted key."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        return [text[1:-1]]
    found = [part.strip() for part in text.split(".")]
    if not all(part and part.isascii() and part.replace("-", "").replace("_", "").isalnum() for part in found):
        raise UsageError(f"{where}: {escaped(text)} is no key")
    return found


def scalar(text: str, where: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1] and "\\" not in text:
        return text[1:-1]
    digits = text.lstrip("+-")
    plain = digits.replace("_", "")
    if plain.isascii() and plain.isdigit() and len(text) - len(digits) <= 1 and not digits.startswith("_"):
        return int(text.replace("_", ""))
    raise UsageError(f"{where}: {escaped(text)} is neither a whole number, a string nor a boolean")


# --- the group ----------------------------------------------------------------------------------------------------------------


class Limits:
    """A control group for the payload.  Arguments: files: what it gets, by name."""

    __slots__ = ("_begun", "_procs", "files")

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self._procs = self._begun = -1

    def describe(self) -> list[str]:
        """One line for each limit."""
        return [f"limit {escaped(name)} {escaped(value)}" for name, value in self.files.items()]

    def prepare(self) -> None:
        """Make the group, and start who will remove it; as the caller.  Raises HostError where the host does not leave us one."""
        parent = place(controllers(self.files))
        sweep(parent)
        name = f"{OURS}{os.getpid()}"
        group = f"{parent}/{name}"
        os.mkdir(group)
        try:
            for file, value in self.files.items():
                write(group, file, value)
            self._procs = os.open(f"{group}/cgroup.procs", os.O_WRONLY)
            begun, self._begun = os.pipe()
            remover(parent, name, begun)
            os.close(begun)
        except BaseException:
            os.rmdir(group)
            raise

    def join(self) -> None:
        """Enter the group; whoever we start from now on is in it too.  Raises OSError."""
        os.write(self._procs, b"0")
        os.close(self._procs)


def limits(options: Options) -> Limits | None:
    """The limits that these options ask for; the command line beats the file."""
    asked = read(options.apply_cgroups) if options.apply_cgroups else {}
    asked.update(requests(options.limits, os.cpu_count() or 1))
    files = translate(asked)
    return Limits(files) if files else None


def controllers(files: dict[str, str]) -> set[str]:
    return {file.partition(".")[0] for file in files} - {"cgroup"}


def here(process: int | str = "self") -> tuple[str, str]:
    """(our, or a process's, control group's directory, the root of what we see of the hierarchy).  Raises HostError where there is none."""
    path = next((line[3:] for line in lines(f"/proc/{process}/cgroup") if line.startswith("0::/")), "")
    for line in lines("/proc/self/mountinfo") if path else ():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            root, point = (unescaped(field).rstrip("/") for field in fields.split(" ")[3:5])
            if f"{path}/".startswith(f"{root}/") and os.path.exists(f"{point}{path[len(root) :]}/cgroup.procs"):
                return f"{point}{path[len(root) :]}".rstrip("/"), point
    raise HostError("limiting resources: this host has no control groups of version 2", ON)


def enter(process: int) -> int:
    """A descriptor through which a process enters the group of another one, by writing b"0".  Raises HostError."""
    group, top = here(process)
    try:
        return os.open(f"{group}/cgroup.procs", os.O_WRONLY)
    except OSError as error:
        raise HostError(f"limiting resources: entering the control group {escaped(group[len(top) :])}: {error.strerror}") from error


def place(needed: set[str]) -> str:
    """A directory in which a group with these controllers can be made.  Raises HostError where there is none."""
    group, top = here()
    older = {name for line in lines("/proc/self/cgroup") for name in line.split(":")[1].replace("blkio", "io").split(",")}
    if needed & older:
        raise HostError("limiting resources: this host has its controllers in control groups of version 1", ON)
    lacking: set[str] = set()
    above = group
    # whoever moves a process must be allowed to write there, and in the group that both have in common
    while f"{above}/".startswith(f"{top}/") and all(os.access(path, os.W_OK) for path in (above, f"{above}/cgroup.procs")):
        lacking = needed - words(f"{above}/cgroup.controllers")
        if not lacking and enable(above, needed, ours=above == group):
            return above
        above = os.path.dirname(above)
    shown = escaped(group[len(top) :] or "/")
    if lacking:
        raise HostError(f"limiting resources: the control group {shown} lacks {', '.join(sorted(lacking))}", DELEGATE)
    raise HostError(f"limiting resources: the control group {shown} is not ours to divide", SCOPE)


def enable(group: str, needed: set[str], *, ours: bool) -> bool:
    """Let the children of a group have these controllers, which the kernel allows only in one without processes of its own."""
    missing = needed - words(f"{group}/cgroup.subtree_control")
    if not missing:
        return True
    change = " ".join(f"+{name}" for name in sorted(missing))
    try:
        write(group, "cgroup.subtree_control", change)
        return True
    except HostError:
        if not ours or lines(f"{group}/cgroup.procs") != [str(os.getpid())]:
            return False
    outside = f"{group}/{OURS}outside"
    os.makedirs(outside, exist_ok=True)
    write(outside, "cgroup.procs", "0")
    write(group, "cgroup.subtree_control", change)
    return True


def write(group: str, file: str, value: str) -> None:
    """Each line by itself, as the kernel wants it.  Raises HostError."""
    if file == "io.weight" and os.path.exists(f"{group}/io.bfq.weight"):
        file, value = "io.bfq.weight", str(max(1, min(1000, round(10 + (int(value) - 1) * 990 / 9999))))
    try:
        fd = os.open(f"{group}/{file}", os.O_WRONLY)
        try:
            for line in value.split("\n"):
                os.write(fd, line.encode())
        finally:
            os.close(fd)
    except OSError as error:
        cause = "the kernel has no such limit" if error.errno == errno.ENOENT else error.strerror
        raise HostError(f"limiting resources: {escaped(file)} = {escaped(value)}: {cause}") from error


def sweep(parent: str) -> None:
    """Remove empty groups that a run left behind whose remover was killed."""
    for name in os.listdir(parent):
        if name.startswith(OURS) and name[len(OURS) :].isdigit() and not os.path.exists(f"/proc/{name[len(OURS) :]}"):
            try:
                os.rmdir(f"{parent}/{name}")
            except OSError:  # not empty: its first process has ended, others have not
                pass


def remover(parent: str, name: str, begun: int) -> None:
    """Start a process, nobody's child, that removes the group when its last process has ended.

    begun: a pipe, which has come to its end when the payload has been started.
    """
    child = os.fork()
    if child:
        try:
            os.waitpid(child, 0)
        except ChildProcessError:  # our caller ignores SIGCHLD, and so do we
            pass
        return
    try:
        os.setsid()
        if os.fork() == 0:
            wait_and_remove(parent, name, begun)
    finally:
        os._exit(0)


def wait_and_remove(parent: str, name: str, begun: int) -> NoReturn:
    directory = os.open(parent, os.O_PATH | os.O_DIRECTORY)
    events = os.open(f"{parent}/{name}/cgroup.events", os.O_RDONLY)
    os.chdir("/")
    kernel.prctl(kernel.PR_SET_NAME, b"sciexec-limits")
    first = 0
    for fd in sorted((directory, events, begun)):
        if fd > first:
            kernel.close_range(first, fd - 1)
        first = fd + 1
    kernel.close_range(first, -1)
    os.read(begun, 1)
    poll = select.poll()
    poll.register(events, select.POLLPRI)
    while b"populated 0" not in os.pread(events, 4096, 0):
        poll.poll()
    os.rmdir(name, dir_fd=directory)
    os._exit(0)


def lines(path: str) -> list[str]:
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fsdecode(file.readall()).splitlines()
    except OSError:
        return []


def words(path: str) -> set[str]:
    return {word for line in lines(path) for word in line.split()}


def unescaped(field: str) -> str:
    r"""A path of mountinfo, where \040 stands for a blank; procfs(5)."""
    first, *rest = field.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
