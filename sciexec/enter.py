"""From a plan to a process inside the container.

Two user namespaces.  In the first the caller is 0: the image's directories, which belong to its root, can take mount points.
In the second, last, the caller is themselves again and owns no capability over the mounts.

    host ---unshare---> caller = 0 ---unshare---> mounts, pivot_root ---unshare---> caller = caller, no_new_privs, no capabilities
              |
              +--- sciexec-fuse: host's mount namespace, first user namespace

The process stands in a tmpfs of ours meanwhile.  It lies over "/": no directory of the host is hidden by it, because a path is
looked up from this process's root, which is what lies below, and only ".." of the root leads up to it.
"""

from __future__ import annotations

import os

from sciexec import kernel, mounts
from sciexec.errors import HostError, SciexecError, escaped
from sciexec.sources import tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sciexec.environment import Payload
    from sciexec.isolation import Isolation
    from sciexec.mounts import Operation, Root
    from sciexec.overlay import Layers


class Plan:
    """Everything that will be done.

    Arguments:
        layers: what the root is made of.
        mounts: in the order in which they are made.
        isolation: who the payload is inside, and what it shares with the host.
        cwd: directories to start in, the first that exists; with `strict` only the first will do.
    """

    __slots__ = ("cwd", "isolation", "layers", "mounts", "payload", "quiet", "strict")

    def __init__(
        self,
        layers: Layers,
        operations: list[Operation],
        payload: Payload,
        *,
        isolation: Isolation,
        cwd: list[str],
        strict: bool,
        quiet: bool,
    ) -> None:
        self.layers = layers
        self.mounts = operations
        self.payload = payload
        self.isolation = isolation
        self.cwd = cwd
        self.strict = strict
        self.quiet = quiet

    def describe(self) -> str:
        """The plan, one line for each step, in the order of its execution."""
        return "\n".join([self.describe_container(), f"cwd {' or '.join(map(escaped, self.cwd))}", self.payload.describe()])

    def describe_container(self) -> str:
        """What of it makes the container; the rest is the payload's own."""
        mounts = (operation.describe() for operation in self.mounts)
        return "\n".join([*self.isolation.describe_outer(), *self.layers.describe(), *mounts, *self.isolation.describe_inner()])


SIGPIPE, SIGXFSZ = 13, 25


def enter(plan: Plan) -> None:
    """Put this process into the container, in the directory where the payload starts.

    From the pivot_root on no module can be imported: the host's files are gone.
    Raises HostError or ImageError; the process is of no use then but to say so.
    """
    plan.layers.prepare()
    try:
        act = "making a user namespace"
        plan.isolation.enter_outer()
        act = "starting the server of the image"
        plan.layers.start()
        for operation in plan.mounts:
            operation.start()
        act = "making a mount namespace"
        plan.isolation.separate()
        # slave: what the host's automounter mounts later appears inside as well, and nothing ever goes the other way
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
        act = "mounting the image"
        kernel.mount("tmpfs", "/", "tmpfs", kernel.PRIVATE, "mode=755")
        os.chdir("/..")
        root = plan.layers.mount()
    except OSError as error:
        raise failed(act, error, "namespace" if "namespace" in act else "mount") from error
    for operation in mounts.outermost(plan.mounts):
        attempt(operation, operation.prepare, root)
    for operation in plan.mounts:
        attempt(operation, operation.execute, root)
    plan.layers.finish()
    try:
        if not root.writable:  # the image is so already; this is what was made around it
            kernel.mount("", ".", "", kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.PRIVATE)
        os.chdir(kernel.magic(root.fd))
        kernel.pivot_root(".", ".")  # the old root now lies on top of the new one, and our tmpfs on top of that
        kernel.umount2(".", kernel.MNT_DETACH)
        kernel.umount2(".", kernel.MNT_DETACH)
        os.chdir("/")
        plan.isolation.enter_inner()
    except OSError as error:
        raise failed("entering the container", error, "namespace") from error
    change_directory(plan.cwd, strict=plan.strict, quiet=plan.quiet)
    reset_signals()
    plan.isolation.finish()


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


def reset_signals() -> None:
    """Python ignores both from its start, and what is ignored stays ignored across execve."""
    kernel.signal_default(SIGPIPE)
    kernel.signal_default(SIGXFSZ)


def change_directory(cwd: list[str], *, strict: bool, quiet: bool) -> None:
    """Go where the payload starts; the arguments are those of Plan."""
    for path in cwd:
        try:
            os.chdir(path)
            os.getcwd()  # fails where a link of /proc led out of the root
        except OSError as error:
            if strict:
                raise HostError(f"changing to {escaped(path)} inside the container: {error.strerror}") from error
            continue
        if path != cwd[0] and not quiet:
            left = escaped(cwd[0]) or "the current directory"
            tell(f"WARNING: {left} is not in the container; starting in {escaped(path)}")
        return
