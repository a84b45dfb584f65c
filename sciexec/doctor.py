"""`sciexec check`: the steps of a run, one after another, each fine or why not, what that means, and who can change it how.

Every step happens in a child of its own, which ends with it, so that nothing is changed and a step that hangs is named too.
The exit code is 0 where all is well, else the sum of the bits of the steps that failed, and 1 more where images cannot run:

    2 user namespace    4 mounts    8 /dev/fuse    16 server    32 leaving privileges behind    64 the image itself

Without FUSE (8, 16) images do run, unpacked.
A step that a run can do without (overlay, home, cache, library, cgroup) is reported, and changes nothing in the exit code.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable

from sciexec import enter, environment, host, image, isolation, kernel, options, pysquashfs, run, sources, version
from sciexec.errors import HostError, SciexecError, escaped

CANNOT_RUN = 1
UNPACKED = 8 | 16  # defects that the fallback makes up for
PATIENCE = 20  # seconds for a step; a home on a dead file server would hang for ever

Probe = Callable[[], str]  # what there is; raises OSError or SciexecError


class Step:
    """One step.

    Arguments:
        name: as printed.  bit: in the exit code; 0 for a step that a run can do without.  probe: tries it.
        means: what does not work without it.  remedy: who can change that and how, where the probe's error has no hint.
        needs: steps without which this one says nothing.
    """

    def __init__(self, name: str, bit: int, probe: Probe, means: str, remedy: str, needs: tuple[str, ...] = ()) -> None:
        self.name, self.bit, self.probe, self.means, self.remedy, self.needs = name, bit, probe, means, remedy, needs


def check(path: str | None, say: Callable[[str], object], cache: Probe) -> int:
    """Try every step and say how it went.

    Arguments:
        path: an image to try as well, or None.
        say: takes a line of the report.
        cache: a probe of the converter's cache, which this floor of the house does not know.

    Returns the exit code.
    """
    kernel_name = os.uname()
    say(f"{version('sciexec')}, {kernel_name.sysname} {kernel_name.release} {kernel_name.machine}, {distribution()}")
    failed: dict[str, int] = {}
    steps = [*STEPS, Step("cache", 0, cache, "every pull downloads everything", "SCIEXEC_CACHEDIR names another directory")]
    if path is not None:
        remedy = "sciexec exec --debug IMAGE true says every step of it"
        steps.append(Step("image", 64, lambda: attempt(path), f"{escaped(path)} does not run", remedy, NAMESPACES))
    for step in steps:
        missing = [name for name in step.needs if name in failed]
        if missing:
            say(f"{'-':8} {step.name:18} not tried without: {', '.join(missing)}")
            continue
        fine, detail, hint = in_child(step.probe)
        say(f"{'ok' if fine else 'missing':8} {step.name:18} {detail}")
        if not fine:
            failed[step.name] = step.bit
            say(f"{'':27} without it: {step.means}")
            say(f"{'':27} what to do: {hint or step.remedy}")
    for line in conclusion(set(failed)):
        say(line)
    bits = sum(failed.values())
    return bits | CANNOT_RUN if bits & ~UNPACKED else bits


def conclusion(failed: set[str]) -> Iterable[str]:
    """What runs here and by which means, fallbacks included."""
    if failed & {"user namespace", "mounts", "leaving privileges"}:
        yield "Nothing can run here: every container needs the steps above.  Images can still be pulled, built and inspected."
        return
    if failed & {"/dev/fuse", "server"}:
        yield "SIF and SquashFS images run here, each unpacked once into the cache; directories run as they are."
    else:
        yield "SIF and SquashFS images run here, mounted through FUSE; directories too."
    yield "A mount point that an image lacks is made on a tmpfs over its parent directory; no image is changed."
    if "overlay" in failed:
        yield "--writable-tmpfs does not work here."


def in_child(probe: Probe) -> tuple[bool, str, str]:
    """Run a probe in a child: (whether it succeeded, what it said, hint)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setpgid(0, 0)
            answer = "\0".join(outcome(probe))
            os.write(writer, answer.encode("utf-8", "backslashreplace")[:4096])  # less than a pipe holds: never waits
        finally:
            os._exit(0)
    os.close(writer)
    text = b""
    deadline = time.monotonic() + PATIENCE
    waiting = select.poll()  # select() itself knows no descriptor above 1023
    waiting.register(reader, select.POLLIN)
    while waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
        if not (more := os.read(reader, 4096)):
            break
        text += more
        if text.count(b"\0") == 2:
            break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    fine, _, rest = text.decode("utf-8", "replace").partition("\0")
    detail, _, hint = rest.partition("\0")
    if not fine:
        code = os.waitstatus_to_exitcode(status)
        return False, f"no answer within {PATIENCE} s" if code == -signal.SIGKILL else f"the step died, exit status {code}", ""
    return fine == "ok", detail, hint


def outcome(probe: Probe) -> tuple[str, str, str]:
    try:
        return "ok", probe(), ""
    except SciexecError as error:
        return "missing", error.message, error.hint
    except OSError as error:
        return "missing", f"{escaped(str(error.filename))}: {error.strerror}" if error.filename else str(error.strerror), ""
    except Exception as error:
        return "missing", f"{type(error).__name__}: {error}", ""


# --- the steps, in the order of a run ---------------------------------------------------------------------------------------


def become_root() -> int:
    """The first user namespace: the caller is 0 in it.  Returns a descriptor of /proc/self."""
    uid, gid = os.getuid(), os.getgid()
    proc = os.open("/proc/self", os.O_PATH)
    try:
        isolation.user_namespace(proc, f"0 {uid} 1", f"0 {gid} 1")
    except OSError as error:
        raise HostError(*kernel.why(error, "unshare")) from error
    return proc


def user_namespace() -> str:
    uid, limit = os.getuid(), sysctl("user/max_user_namespaces")  # inside it would read as unlimited
    become_root()
    return f"uid {uid} becomes 0; user.max_user_namespaces is {limit or 'not known'}"


def become_mounter() -> int:
    """The private mount namespace, and a tmpfs to work in.  Returns a descriptor of /proc/self."""
    proc = become_root()
    try:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
        kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.PRIVATE, "mode=755")
    except OSError as error:
        if sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
            # Ubuntu lets anybody make a user namespace, and then forbids everything in it
            raise HostError(
                f"AppArmor forbids it ({error.strerror}): kernel.apparmor_restrict_unprivileged_userns is 1",
                "the site sets it to 0, or installs an AppArmor profile that allows userns to sciexec",
            ) from error
        raise HostError(*kernel.why(error, "mount")) from error
    os.chdir("/tmp")
    return proc


def mount_and_pivot() -> str:
    become_mounter()
    os.mkdir("root")
    kernel.mount("/", "root", "", kernel.MS_BIND | kernel.MS_REC)
    os.chdir("root")
    kernel.pivot_root(".", ".")
    kernel.umount2(".", kernel.MNT_DETACH)
    return "private namespace, tmpfs, bind, pivot_root"


def fuse() -> str:
    """The device, opened and mounted as a run does, though nobody serves it."""
    become_mounter()
    device = os.open("/dev/fuse", os.O_RDWR)
    os.mkdir("fuse")
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    try:
        kernel.mount("sciexec", "fuse", "fuse", kernel.PRIVATE | kernel.MS_RDONLY, options)
    except OSError as error:
        raise HostError(f"it opens, but mounting is refused: {error.strerror}", "Linux 4.18 was the first to allow it") from error
    return "opened and mounted inside the user namespace"


def server() -> str:
    if os.access(sources.OURS, os.X_OK):
        return sources.OURS
    for program in sources.SERVERS:
        if os.access(program, os.X_OK):
            done = subprocess.run([program], env={}, input=b"", capture_output=True, check=False)
            first = (done.stderr or done.stdout).decode("utf-8", "replace").partition("\n")[0]
            return f"{program} ({escaped(first.partition(' (c)')[0]) or 'says nothing of its version'})"
    where = sorted({os.path.dirname(program) for program in sources.SERVERS})
    raise HostError(f"neither {os.path.basename(sources.OURS)} beside sciexec nor squashfuse_ll in {', '.join(where)}")


def overlay() -> str:
    become_mounter()
    for name in ("lower", "upper", "work", "root"):
        os.mkdir(name)
    kernel.mount("overlay", "root", "overlay", kernel.PRIVATE, "lowerdir=lower,upperdir=upper,workdir=work,userxattr")
    return "overlayfs in a user namespace"


def leave_privileges() -> str:
    uid, gid = os.getuid(), os.getgid()
    proc = become_mounter()
    try:
        isolation.user_namespace(proc, f"{uid} 0 1", f"{gid} 0 1")
    except OSError as error:
        raise HostError(f"a user namespace inside a user namespace: {kernel.why(error, 'unshare')[0]}") from error
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.drop_bounding_set(0)
    kernel.capset(0)
    return "second user namespace, no_new_privs, no capabilities"


def home() -> str:
    known = host.Host()
    if not known.home:
        raise HostError(f"the entry of uid {known.uid} in the user database names none")
    os.listdir(known.home)
    return f"{escaped(known.home)}, {'writable' if os.access(known.home, os.W_OK) else 'read-only'}"


def library() -> str:
    pysquashfs.available()
    return "libsquashfs, for pull and build"


def cgroup() -> str:
    """Where this process is counted; limits are the batch system's to set, a run changes nothing."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="replace") as file:
        entries = dict(line.strip().split(":", 2)[1:] for line in file)
    if "" not in entries or len(entries) > 1:
        return f"version 1, {escaped(next(iter(entries.values()), '/'))}"
    return f"version 2, {escaped(entries[''])}"


def attempt(path: str) -> str:
    """All of a run of the image but its last step, execve."""
    chosen = options.settle("sciexec", "exec", {}, path, ["true"], environment.host())
    opened = image.open_image(path)
    enter.enter(run.plan(chosen, opened, host.Host()))
    return opened.describe()


NAMESPACES = ("user namespace", "mounts")
NO_RUN = "no image can run"
NO_FUSE = "SIF and SquashFS images cannot be mounted"

STEPS = (
    Step("user namespace", 2, user_namespace, NO_RUN, "the site allows unprivileged user namespaces (kernel: CONFIG_USER_NS)"),
    Step("mounts", 4, mount_and_pivot, NO_RUN, "the site lets ordinary users mount in their user namespaces", NAMESPACES[:1]),
    Step("/dev/fuse", 8, fuse, NO_FUSE, "the site runs modprobe fuse and chmod 666 /dev/fuse", NAMESPACES),
    Step("server", 16, server, NO_FUSE, "pip builds it where there is a compiler; or the site installs squashfuse"),
    Step("leaving privileges", 32, leave_privileges, NO_RUN, "the site raises user.max_user_namespaces: a container takes two", NAMESPACES),
    Step("overlay", 0, overlay, "--writable-tmpfs does not work", "Linux 5.11 was the first to allow it", NAMESPACES),
    Step("home", 0, home, "a container has no home", "--home DIRECTORY brings another, --no-home none"),
    Step("library", 0, library, "pull and build do not work; images run all the same", "install the compiled part of sciexec"),
    Step("cgroup", 0, cgroup, "nothing: limits are the batch system's to set", "nothing"),
)


def sysctl(name: str) -> str:
    """A value below /proc/sys, or "" where the kernel has no such thing."""
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def distribution() -> str:
    """os-release(5), PRETTY_NAME."""
    try:
        with open("/etc/os-release", encoding="utf-8", errors="replace") as file:
            names = [line.partition("=")[2].strip().strip('"') for line in file if line.startswith("PRETTY_NAME=")]
    except OSError:
        names = []
    return escaped(names[0]) if names else "unknown distribution"
