"""The story of a run: options, image and host become a plan; the plan is carried out; the payload takes this process over.

plan = run.plan(options, image, host)     pure: nothing is changed, and describe() prints all of it
enter.enter(plan)                         this process now lives in the container
plan.payload.execute()                    execve: same process id, nothing of ours left in memory
"""

from __future__ import annotations

import os

from sciexec import enter, environment, isolation, mounts, mpi, overlay, sif, sources
from sciexec import host as hosts
from sciexec.enter import Plan
from sciexec.errors import HostError, escaped
from sciexec.mounts import Bind, Dev, Edit, Operation, Proc, Tmpfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.environment import Payload
    from sciexec.host import Host
    from sciexec.image import Image
    from sciexec.options import Options

START = "sciexec.start"  # the SIF object that holds the image's environment and command


def plan(options: Options, image: Image, host: Host) -> Plan:
    """What a run with these options will do.  Raises HostError where a bind's source is missing."""
    home_source, home = home_of(options, host)
    operations = [*defaults(options, host, home or "/"), *homes(options, home_source, home)]
    for bind in options.binds:
        if not os.path.exists(bind.source):
            raise HostError(f"binding {escaped(bind.source)}: no such file or directory on the host")
        operations.append(Bind(bind.source, bind.target, read_only=bind.read_only))
    if not options.contain and hosts.comes_along(host.cwd) and not any(shows(operation, host.cwd) for operation in operations):
        operations.append(Bind(host.cwd, host.cwd, optional=True, unless_visible=True))
    return Plan(
        overlay.layers(options, sources.source(image, host, quiet=options.quiet)),
        mounts.order(operations),
        payload(options, image.path, start_object(image), host, home or "/"),
        isolation=isolation.isolation(options, host),
        cwd=[options.cwd] if options.cwd else [*([] if options.contain else [host.cwd]), home or "/", "/"],
        strict=bool(options.cwd),
        quiet=options.quiet or options.contain,
    )


def start_object(image: Image) -> bytes:
    """The SIF object that says how the image wants to be started; b"" where it has none."""
    descriptor = image.sif.find(START) if image.sif else None
    return sif.read_object(image.fd, image.sif, descriptor, environment.LARGEST_START) if image.sif and descriptor else b""


def payload(options: Options, image: str, start: bytes, host: Host, home: str) -> Payload:
    """The payload of these options.  image: its absolute path.  start: its start object.  home: the directory inside."""
    env = options.env
    if options.env_files:
        from sciexec import assignments

        env = [*assignments.read(options.env_files, host.environment), *env]
    return environment.plan(
        options.verb.rpartition(" ")[2],
        options.argv,
        host=host.environment,
        start=environment.load(start, image) if start else None,
        image=image,
        home=home,
        program=options.program,
        cleanenv=options.cleanenv,
        no_env=options.no_env,
        no_eval=options.no_eval,
        env=env,
        binds=[bind.target for bind in options.binds],
        shell=options.shell,
        app=options.app or "",
        instance=options.name,
    )


def defaults(options: Options, host: Host, home: str) -> list[Operation]:
    """What every container has of its host."""
    listed: list[Operation] = [Proc("/proc") if options.pid else Bind("/proc", "/proc"), Bind("/sys", "/sys")]
    listed.append(Dev(console=console(), ipc=options.ipc) if options.contain else Bind("/dev", "/dev"))
    listed += [Bind(path, path, optional=True) for path in ("/etc/hosts", "/etc/localtime", "/etc/resolv.conf")]
    uid, gid = isolation.identity(options, host)
    groups = host.groups if gid == host.gid else [gid]
    listed.append(Edit("/etc/passwd", lambda content: host.passwd(content, home, uid), f"with uid {uid}"))
    listed.append(Edit("/etc/group", lambda content: host.group(content, groups), f"with gid {','.join(map(str, groups))}"))
    if options.hostname:
        named = os.fsencode(f"{options.hostname}\n")
        listed.append(Edit("/etc/hostname", lambda content: named, "with the host name"))
    for path in ("/tmp", "/var/tmp"):
        listed.append(Tmpfs(path, mode=0o1777, optional=True) if options.contain else Bind(path, path, optional=True))
    return listed


def home_of(options: Options, host: Host) -> tuple[str, str]:
    """(source, path inside) of the home directory; either may be ""."""
    return options.home or (host.home, "/root" if options.fakeroot else host.home)


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
        isinstance(operation, Bind) and operation.source == operation.target and (path + "/").startswith(operation.source.rstrip("/") + "/")
    )


def run(options: Options, image: Image, host: Host) -> NoReturn:
    """Plan, enter, become the payload."""
    made = plan(options, image, host)
    if options.debug:
        sources.tell(made.describe())
    if is_shared(options, host):
        from sciexec import share

        share.enter_shared(made, share.address(options, made, image, host))
    else:
        enter.enter(made)
    made.payload.execute()


def is_shared(options: Options, host: Host) -> bool:
    """Whether the ranks of this node shall have one container; one with process ids of its own ends with one process, and is not shared."""
    return not options.pid and (options.share in ("step", "job") or (options.share == "auto" and mpi.local_size(host.environment) > 1))
