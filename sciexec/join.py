"""A process joins an instance: instance://NAME in the place of an image.

    caller's process --- user namespace that mounts, PID namespace --fork--> all others, user namespace of the payload, execve
                         supervisor (sinit.py)

Namespaces come from process 1 of the instance; the one in which it mounted is the owner of its process ids.  All are
opened while the process is known to be the one on record: what is open cannot become another's.
"""

from __future__ import annotations

import os

from sciexec import enter, instance, isolation, kernel, run, sinit
from sciexec.errors import HostError, UsageError
from sciexec.options import INSTANCE
from sciexec.sources import tell
from sciexec.spelling import Bind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sciexec.host import Host
    from sciexec.instance import Instance
    from sciexec.options import Options

# What an instance has or has not: restrictions, without which nothing may run that was started with them asked for; and
# additions, which are left out, as Apptainer does, with a word about it.
RESTRICTIONS = {
    "contain": "--contain", "ipc": "--ipc", "net": "--net", "uts": "--uts", "no_home": "--no-home", "no_mount": "--no-mount",
    "drop_caps": "--drop-caps", "uid": "--security uid", "gid": "--security gid", "limits": "a limit of resources",
    "apply_cgroups": "--apply-cgroups",
}  # fmt: skip
ADDITIONS = {
    "binds": "--bind", "data": "--data", "home": "--home", "hostname": "--hostname", "workdir": "--workdir", "scratch": "--scratch",
    "writable": "--writable", "writable_tmpfs": "--writable-tmpfs", "overlays": "--overlay", "fakeroot": "--fakeroot",
    "add_caps": "--add-caps", "fusemounts": "--fusemount", "dns": "--dns",
}  # fmt: skip
DECIDED = "contain fakeroot uid gid add_caps drop_caps".split()


def join(options: Options, host: Host) -> NoReturn:
    """Become a process of an instance that runs.  Raises SciexecError."""
    found = instance.find(host, options.image[len(INSTANCE) :])
    settle(options, found)
    payload = run.payload(options, found.image, bytes.fromhex(found.start or ""), host, found.home)
    who = isolation.isolation(options, host)
    cwd = [options.cwd] if options.cwd else [*([] if options.contain else [host.cwd]), found.home, "/"]
    group = -1
    if found.options["limits"] or found.options["apply_cgroups"]:
        from sciexec import limits

        group = limits.enter(found.pid)
    if options.debug:
        tell(f"join {found.name}, process {found.pid}\n{payload.describe()}")
    try:
        process = os.open(f"/proc/{found.pid}", os.O_RDONLY | os.O_DIRECTORY)
        own = {name: os.stat(f"/proc/self/ns/{name}").st_ino for name, _ in isolation.NAMESPACES}
        others = [(os.open(f"ns/{name}", os.O_RDONLY, dir_fd=process), flag, own[name]) for name, flag in isolation.NAMESPACES]
        pids, inner = (os.open(f"ns/{name}", os.O_RDONLY, dir_fd=process) for name in ("pid", "user"))
        outer = kernel.owner(pids)
        if instance.start_time(found.pid) != found.started:
            raise ProcessLookupError
        kernel.setns(outer, kernel.CLONE_NEWUSER)
        kernel.setns(pids, kernel.CLONE_NEWPID)
        link = sinit.leave(init=False)
        if group >= 0:
            enter_group(group, found)
        for fd, flag, mine in others:
            if os.fstat(fd).st_ino != mine:
                kernel.setns(fd, flag)
        kernel.setns(inner, kernel.CLONE_NEWUSER)
        who.confine()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise HostError(f"joining instance {found.name}: it has just ended") from error
    except OSError as error:
        cause, hint = kernel.why(error, "namespace")
        raise HostError(f"joining instance {found.name}: {cause}", hint) from error
    enter.change_directory(cwd, strict=bool(options.cwd), quiet=options.quiet or options.contain)
    enter.reset_signals()
    sinit.start(link, init=False)
    payload.execute()


def settle(options: Options, found: Instance) -> None:
    """Make the options those of the instance where it has decided.  Raises UsageError for a restriction that it does not have."""
    if set(instance.RECORDED) != set(found.options):
        raise HostError(f"joining instance {found.name}: another version of sciexec has started it", "stop it and start it again")
    for slot, name in {**RESTRICTIONS, **ADDITIONS}.items():
        asked, has = instance.noted(getattr(options, slot)), found.options.get(slot)
        if slot == "home":
            has = asked if options.home and options.home[1] == found.home else None
        if not has_all(has, asked):
            if slot in RESTRICTIONS:
                raise UsageError(
                    f"{name} cannot be given to a process that joins instance {found.name}: it was started without",
                    "start an instance with it",
                )
            if not options.quiet:
                tell(f"INFO:    {name} is ignored: instance {found.name} was started without")
    options.name, options.limits, options.apply_cgroups = found.name, {}, None
    options.pid = False  # not of its own
    for slot in DECIDED:
        setattr(options, slot, found.options[slot])
    options.no_privs = options.no_privs or found.options["no_privs"]
    options.binds = [Bind(*key) for key in found.options["binds"]]
    options.bound = [bind.target for bind in options.binds]


def enter_group(group: int, found: Instance) -> None:
    """Let the limits of the instance hold for us.  Raises HostError."""
    try:
        os.write(group, b"0")
    except OSError as error:
        raise HostError(
            f"joining instance {found.name}: its limits cannot be had here: {error.strerror}",
            "the kernel lets processes enter from the control group only in which the instance was started, or from below it",
        ) from error
    os.close(group)


def has_all(has: object, asked: object) -> bool:
    if isinstance(asked, list) and isinstance(has, list):
        return all(item in has for item in asked)
    return not asked or asked == has
