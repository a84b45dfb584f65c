"""The story of a run: options, image and host become a plan; the plan is carried out; the payload takes this process over.

plan = run.plan(options, image, host)     pure: nothing is changed, and describe() prints all of it
enter.enter(plan)                         this process now lives in the container
plan.payload.execute()                    execve: same process id, nothing of ours left in memory
"""

from __future__ import annotations

import os

from sciexec import enter, environment, isolation, mounts, mpi, sif, sources
from sciexec import host as hosts
from sciexec.enter import Plan
from sciexec.errors import HostError, escaped
from sciexec.mounts import Bind, Dev, Edit, Operation, Proc, Tmpfs
from sciexec.overlay import Layers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.environment import Payload
    from sciexec.host import Host
    from sciexec.image import Image
    from sciexec.options import Options

START = "sciexec.start"  # the SIF object that holds the image's environment and command

# What a name of --no-mount leaves out; cwd, devpts and home are no fixed places, and hostfs is not mounted anyway.
NO_MOUNT = {
    "proc": ("/proc",), "sys": ("/sys",), "dev": ("/dev",), "tmp": ("/tmp", "/var/tmp"), "bind-paths": ("/etc/hosts", "/etc/localtime"),
}  # fmt: skip


def plan(options: Options, image: Image, host: Host) -> Plan:
    """What a run with these options will do; data images that it shows are open then.

    Raises HostError where what a bind names is missing, ImageError for a data image that is none.
    """
    home_source, home = home_of(options, host)
    if options.workdir and options.contain and not os.path.isdir(options.workdir):
        raise HostError(f"--workdir {escaped(options.workdir)}: no such directory on the host", "make it first")
    left_out = {path for name in options.no_mount for path in NO_MOUNT.get(name, (name,))}
    operations = [*defaults(options, host, home or "/"), *homes(options, home_source, home)]
    operations = [operation for operation in operations if operation.target not in left_out]
    operations += [private(options, path, f"scratch{path}", 0o750) for path in options.scratch]
    operations += binds(options, image, host)
    if comes_along(options, host, left_out) and not any(decides(operation, host.cwd) for operation in operations):
        operations.append(Bind(host.cwd, host.cwd, optional=True, unless_visible=True))
    return Plan(
        layers(options, image, host),
        [*mounts.order(operations), *served(options, host, home or "/")],
        payload(options, image.path, start_object(image), host, home or "/"),
        isolation=isolation.isolation(options, host),
        cwd=[options.cwd] if options.cwd else [*([] if options.contain else [host.cwd]), home or "/", "/"],
        strict=bool(options.cwd),
        quiet=options.quiet or options.contain or "cwd" in options.no_mount,
    )


def served(options: Options, host: Host, home: str) -> list[Operation]:
    """What --fusemount asks for; last, so that its programs see all other mounts."""
    if not options.fusemounts:
        return []
    from sciexec import fusemount

    return [*fusemount.fusemounts(options.fusemounts, host, home)]


def layers(options: Options, image: Image, host: Host) -> Layers:
    """What the root is made of."""
    partitions = image.sif.descriptors if image.sif else []
    if options.overlays or options.writable or any(descriptor.parttype == sif.PART_OVERLAY for descriptor in partitions):
        from sciexec import stack

        return stack.layers(options, image, host)
    source = sources.source(image, host, quiet=options.quiet, unsquash=options.unsquash)
    return Layers(source, writable=options.writable_tmpfs, size=options.tmpfs_size)


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
        host={**host.environment, "PWD": options.cwd} if options.cwd else host.environment,
        start=environment.load(start, image) if start else None,
        image=image,
        home=home,
        program=options.program,
        cleanenv=options.cleanenv,
        no_env=options.no_env,
        no_eval=options.no_eval,
        env=env,
        bound=options.bound,
        binds=[bind.target for bind in options.binds],  # a path of the image's own scripts in it makes them count
        shell=options.shell,
        app=options.app or "",
        instance=options.name,
    )


def defaults(options: Options, host: Host, home: str) -> list[Operation]:
    """What every container has of its host."""
    listed: list[Operation] = [Proc("/proc") if options.pid else Bind("/proc", "/proc"), Bind("/sys", "/sys")]
    if options.contain:
        listed.append(Dev(console=console(), terminals="devpts" not in options.no_mount, ipc=options.ipc))
    else:
        listed.append(Bind("/dev", "/dev"))
    listed += [Bind(path, path, optional=True) for path in ("/etc/hosts", "/etc/localtime")]
    if options.dns:
        from sciexec.own import File

        servers = "".join(f"nameserver {address}\n" for address in options.dns)
        listed.append(File("/etc/resolv.conf", servers.encode(), f"nameserver {' '.join(options.dns)}"))
    else:
        listed.append(Bind("/etc/resolv.conf", "/etc/resolv.conf", optional=True))
    uid, gid = isolation.identity(options, host)
    groups = host.groups if gid == host.gid else [gid]
    if not (options.writable and options.fakeroot):  # where useradd and its like shall work, on the image's own files
        listed.append(Edit("/etc/passwd", lambda content: host.passwd(content, home, uid), f"with uid {uid}"))
        listed.append(Edit("/etc/group", lambda content: host.group(content, groups), f"with gid {','.join(map(str, groups))}"))
    if options.hostname:
        named = os.fsencode(f"{options.hostname}\n")
        listed.append(Edit("/etc/hostname", lambda content: named, "with the host name"))
    for path, name in (("/tmp", "tmp"), ("/var/tmp", "var_tmp")):
        listed.append(private(options, path, name, 0o1777, optional=True) if options.contain else Bind(path, path, optional=True))
    return listed


def home_of(options: Options, host: Host) -> tuple[str, str]:
    """(source, path inside) of the home directory; either may be ""."""
    return options.home or (host.home, "/root" if options.fakeroot else host.home)


def homes(options: Options, source: str, target: str) -> list[Operation]:
    if options.no_home or "home" in options.no_mount or target in ("", "/"):
        return []
    if options.home:
        exists("home", source)
        return [Bind(source, target, asked=True)]
    return [private(options, target, "home", 0o700)] if options.contain else [Bind(source, target, optional=True)]


def private(options: Options, target: str, name: str, mode: int, *, optional: bool = False) -> Operation:
    """A directory of the container's own: kept as `name` in --workdir, or in memory and gone at the end."""
    if options.workdir:
        from sciexec.own import Made

        return Made(f"{options.workdir.rstrip('/')}/{name}", target, mode=mode, optional=optional)
    return Tmpfs(target, mode=mode, optional=optional)


def binds(options: Options, image: Image, host: Host) -> list[Operation]:
    """What the user wants to see.  Of several at one place the first counts: the command line stands in front of the variables."""
    found: dict[str, Operation] = {}
    images = None
    if options.data or any(bind.image_src for bind in options.binds):
        from sciexec import data  # here: few ask for it

        images = data.Images(image, host, quiet=options.quiet)
    for bind in options.binds:
        exists("binding", bind.source)
        if images and bind.image_src:
            found.setdefault(bind.target, images.bind(bind))
        else:
            found.setdefault(bind.target, Bind(bind.source, bind.target, read_only=bind.read_only, asked=True))
    if images:
        for name, target in options.data:
            operation = images.named(name, target)
            found.setdefault(operation.target, operation)
    return list(found.values())


def exists(act: str, source: str) -> None:
    try:
        os.stat(source)
    except OSError as error:
        raise HostError(f"{act} {escaped(source)}: {error.strerror} on the host") from error


def comes_along(options: Options, host: Host, left_out: set[str]) -> bool:
    """Whether the working directory is bound where nothing else shows it."""
    return not options.contain and "cwd" not in options.no_mount and host.cwd not in left_out and hosts.comes_along(host.cwd)


def console() -> str:
    """The terminal on standard input, or ""."""
    try:
        return os.ttyname(0)
    except OSError:
        return ""


def decides(operation: Operation, path: str) -> bool:
    """Whether what is seen at `path` is something that was asked for, or `path` of the host, which a bind brings along."""
    if isinstance(operation, Bind) and operation.source == operation.target:
        return f"{path}/".startswith(operation.source.rstrip("/") + "/")
    return operation.target == path


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
    """Whether the ranks of this node shall have one container.

    One with process ids of its own ends with one process, and is not shared; nor is one with limits, which are each rank's own.
    """
    if options.pid or options.limits or options.apply_cgroups:
        return False
    return options.share in ("step", "job") or (options.share == "auto" and mpi.local_size(host.environment) > 1)
