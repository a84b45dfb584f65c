"""The story of a run: options, image and host become a plan; the plan is carried out; the payload takes this process over.

    plan = run.plan(options, image, host)     pure: nothing is changed, and describe() prints all of it
    run.enter(plan)                           this process now lives in the container
    plan.payload.execute()                    execve: same process id, nothing of ours left in memory

Two user namespaces.  In the first the caller is 0: the image's directories, which belong to its root, can take mount points.
In the second, last, the caller is themselves again and owns no capability over the mounts.

    host ---unshare---> caller = 0 ---unshare---> mounts, pivot_root ---unshare---> caller = caller, no_new_privs, no capabilities
              |
              +--- squashfuse_ll: host's mount namespace, first user namespace
"""

from __future__ import annotations

import errno
import os
import struct
import sys

from sciexec import environment, kernel, mounts, sif
from sciexec import host as hosts
from sciexec.errors import HostError, SciexecError, escaped
from sciexec.image import SERVER, SERVERS, Directory, Squash, Unpacked, tell
from sciexec.mounts import Bind, Dev, Edit, Operation, Root, Tmpfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from sciexec.environment import Payload
    from sciexec.host import Host
    from sciexec.image import Image, Source
    from sciexec.options import Options

START = "sciexec.start"  # the SIF object that holds the image's environment and command


class Plan:
    """Everything that will be done.

    Arguments:
        source: what is mounted as the root.
        writable: whether the payload may write to the root; then all of it is an overlay, else only mount points are added.
        mounts: in the order in which they are made.
        cwd: directories to start in, the first that exists; with `strict` only the first will do.
    """

    __slots__ = ("cwd", "gid", "mounts", "payload", "quiet", "source", "strict", "uid", "writable")

    def __init__(
        self,
        source: Source,
        operations: list[Operation],
        payload: Payload,
        *,
        uid: int,
        gid: int,
        cwd: list[str],
        strict: bool,
        quiet: bool,
        writable: bool,
    ) -> None:
        self.source = source
        self.mounts = operations
        self.payload = payload
        self.uid, self.gid = uid, gid
        self.cwd = cwd
        self.strict = strict
        self.quiet = quiet
        self.writable = writable

    def describe(self) -> str:
        """The plan, one line for each step, in the order of its execution."""
        return "\n".join(
            [
                f"user namespace {self.uid}:{self.gid} -> 0:0",
                self.source.describe(),
                "overlay, writable" if self.writable else "read-only",
                *(operation.describe() for operation in self.mounts),
                f"user namespace 0:0 -> {self.uid}:{self.gid}",
                f"cwd {' or '.join(map(escaped, self.cwd))}",
                self.payload.describe(),
            ]
        )


# --- planning ---------------------------------------------------------------------------------------------------------------


def plan(options: Options, image: Image, host: Host) -> Plan:
    """What a run with these options will do.  Raises HostError where a bind's source is missing."""
    home_source, home = options.home or (host.home, host.home)
    operations = [*defaults(options, host, home or "/"), *homes(options, home_source, home)]
    for source, target, is_read_only in options.binds:
        if not os.path.exists(source):
            raise HostError(f"binding {escaped(source)}: no such file or directory on the host")
        operations.append(Bind(source, target, read_only=is_read_only))
    if not options.contain and hosts.comes_along(host.cwd) and not any(shows(operation, host.cwd) for operation in operations):
        operations.append(Bind(host.cwd, host.cwd, optional=True, unless_visible=True))
    return Plan(
        source_of(options, image, host),
        mounts.order(operations),
        payload(options, image, host, home or "/"),
        uid=host.uid,
        gid=host.gid,
        cwd=[options.cwd] if options.cwd else [*([] if options.contain else [host.cwd]), home or "/", "/"],
        strict=bool(options.cwd),
        quiet=options.quiet or options.contain,
        writable=options.writable_tmpfs,
    )


def payload(options: Options, image: Image, host: Host, home: str) -> Payload:
    descriptor = image.sif.find(START) if image.sif else None
    start = None
    if image.sif and descriptor:
        start = environment.load(sif.read_object(image.fd, image.sif, descriptor, environment.LARGEST_START), image.path)
    return environment.plan(
        options.verb,
        options.argv,
        host=host.environment,
        start=start,
        image=image.path,
        home=home,
        program=options.program,
        cleanenv=options.cleanenv,
        no_eval=options.no_eval,
        env=options.env,
        binds=[target for _, target, _ in options.binds],
        bound=options.bound,
        shell=options.shell,
    )


def source_of(options: Options, image: Image, host: Host) -> Source:
    """How the image is mounted on this host."""
    if image.kind == "directory":
        return Directory(image.path)
    program = next((program for program in SERVERS if os.access(program, os.X_OK)), None)
    if program and os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Squash(image.fd, image.offset, image.path, program)
    reason = "/dev/fuse is missing or closed to users" if program else f"{SERVER} is not installed"
    return Unpacked(image, f"{hosts.cache(host)}/unpacked/{image.key()}", reason, quiet=options.quiet)


def defaults(options: Options, host: Host, home: str) -> list[Operation]:
    """What every container has of its host."""
    listed: list[Operation] = [Bind("/proc", "/proc"), Bind("/sys", "/sys")]
    listed.append(Dev(console=console()) if options.contain else Bind("/dev", "/dev"))
    listed += [Bind(path, path, optional=True) for path in ("/etc/hosts", "/etc/localtime", "/etc/resolv.conf")]
    listed.append(Edit("/etc/passwd", lambda content: host.passwd(content, home), f"with uid {host.uid}"))
    listed.append(Edit("/etc/group", host.group, f"with gid {','.join(map(str, host.groups))}"))
    for path in ("/tmp", "/var/tmp"):
        listed.append(Tmpfs(path, mode=0o1777, optional=True) if options.contain else Bind(path, path, optional=True))
    return listed


def homes(options: Options, source: str, target: str) -> list[Operation]:
    if options.no_home or target in ("", "/"):
        return []
    if options.home:
        return [Bind(source, target)]
    return [Tmpfs(target, mode=0o700)] if options.contain else [Bind(source, target, optional=True)]


def console() -> str:
    """The terminal on standard input, or ""."""
    try:
        return os.ttyname(0)
    except OSError:
        return ""


def shows(operation: Operation, path: str) -> bool:
    """Whether a bind shows `path` of the host at the same path inside."""
    return (
        isinstance(operation, Bind)
        and operation.source == operation.target
        and (path + "/").startswith(operation.source.rstrip("/") + "/")
    )


# --- entering ---------------------------------------------------------------------------------------------------------------


def enter(plan: Plan) -> None:
    """Put this process into the container, in the directory where the payload starts.

    From the pivot_root on no module can be imported: the host's files are gone.
    Raises HostError or ImageError; the process is of no use then but to say so.
    """
    plan.source.prepare()
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    try:
        act = "making a user namespace"
        user_namespace(proc, f"0 {plan.uid} 1", f"0 {plan.gid} 1")
        act = "starting the server of the image"
        plan.source.start()
        act = "making a mount namespace"
        kernel.unshare(kernel.CLONE_NEWNS)
        # slave: what the host's automounter mounts later appears inside as well, and nothing ever goes the other way
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
        act = "mounting the image"
        root = mount_root(plan)
    except OSError as error:
        raise failed(act, error, "namespace" if "namespace" in act else "mount") from error
    for operation in mounts.outermost(plan.mounts):
        attempt(operation, operation.prepare, root)
    for operation in plan.mounts:
        attempt(operation, operation.execute, root)
    plan.source.finish()
    try:
        if not plan.writable:  # the image is so already; this is what was made around it
            kernel.mount("", ".", "", kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.PRIVATE)
        os.chdir(kernel.magic(root.fd))
        kernel.pivot_root(".", ".")  # the old root now lies on top of the new one, and our tmpfs on top of that
        kernel.umount2(".", kernel.MNT_DETACH)
        kernel.umount2(".", kernel.MNT_DETACH)
        os.chdir("/")
        user_namespace(proc, f"{plan.uid} 0 1", f"{plan.gid} 0 1")
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if has_terminal():
            kernel.seccomp(keystroke_filter())
        kernel.drop_bounding_set()
        kernel.capset_none()
    except OSError as error:
        raise failed("entering the container", error, "namespace") from error
    change_directory(plan)
    # Python ignores both from its start, and what is ignored stays ignored across execve
    kernel.signal_default(SIGPIPE)
    kernel.signal_default(SIGXFSZ)


SIGPIPE, SIGXFSZ = 13, 25


def user_namespace(proc: int, uid_map: str, gid_map: str) -> None:
    """A new user namespace with these maps (user_namespaces(7)); proc is a descriptor of /proc/self."""
    kernel.unshare(kernel.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
        fd = os.open(name, os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


def mount_root(plan: Plan) -> Root:
    """Mount the image and what makes it a root; the process then stands in a tmpfs that holds all of it.

    That tmpfs lies over "/": no directory of the host is hidden by it, because a path is looked up from this process's root,
    which is what lies below, and only ".." of the root leads up to it.
    """
    kernel.mount("tmpfs", "/", "tmpfs", kernel.PRIVATE, "mode=755")
    os.chdir("/..")
    os.mkdir("image")
    plan.source.mount("image")
    if not plan.writable:
        return Root("image", writable=False)
    for name in ("upper", "work", "root"):
        os.mkdir(name)
    try:
        kernel.mount("overlay", "root", "overlay", kernel.PRIVATE, "lowerdir=image,upperdir=upper,workdir=work,userxattr")
    except OSError as error:
        raise HostError(f"mounting an overlay for --writable-tmpfs: {error.strerror}", "Linux 5.11 was the first to allow it") from error
    return Root("root", writable=True)


def attempt(operation: Operation, step: Callable[[Root], None], root: Root) -> None:
    try:
        step(root)
    except OSError as error:
        if not operation.optional:
            raise failed(f"mounting ({operation.describe()})", error, "mount") from error
    except SciexecError:
        if not operation.optional:
            raise


def failed(act: str, error: OSError, call: str) -> HostError:
    cause, hint = kernel.why(error, call)
    return HostError(f"{act}: {cause}", hint)


def change_directory(plan: Plan) -> None:
    """Go where the payload starts."""
    for path in plan.cwd:
        try:
            os.chdir(path)
            os.getcwd()  # fails where a link of /proc led out of the root
        except OSError as error:
            if plan.strict:
                raise HostError(f"changing to {escaped(path)} inside the container: {error.strerror}") from error
            continue
        if path != plan.cwd[0] and not plan.quiet:
            left = escaped(plan.cwd[0]) or "the current directory"
            tell(f"WARNING: {left} is not in the container; starting in {escaped(path)}")
        return


# --- the terminal -----------------------------------------------------------------------------------------------------------


def has_terminal() -> bool:
    """Whether there is a terminal to type into; a batch job has none and goes without the filter."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def keystroke_filter() -> bytes:
    """A seccomp program: ioctl(fd, TIOCSTI or TIOCLINUX, ...) fails with EPERM, everything else passes.

    Both put text into the caller's terminal, which the shell reads when the payload has ended.  The numbers of ioctl in all of
    the machine's call tables are compared without looking at the table: by another's number nothing sensible has such an argument.

        0        load the call's number
        1..n     ioctl? -> n+2
        n+1      allow
        n+2      load the low half of the second argument
        n+3, 4   TIOCSTI or TIOCLINUX? -> n+6
        n+5      allow
        n+6      EPERM
    """
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    low_half = 24 if sys.byteorder == "little" else 28
    numbers = kernel.ioctl_numbers()
    program = [(load, 0, 0, 0)]
    program += [(equal, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(give, 0, 0, allow), (load, 0, 0, low_half), (equal, 2, 0, 0x5412), (equal, 1, 0, 0x541C)]
    program += [(give, 0, 0, allow), (give, 0, 0, deny)]
    return b"".join(struct.pack("@HBBI", *instruction) for instruction in program)


def run(options: Options, image: Image, host: Host) -> NoReturn:
    """Plan, enter, become the payload."""
    made = plan(options, image, host)
    if options.debug:
        tell(made.describe())
    enter(made)
    made.payload.execute()
