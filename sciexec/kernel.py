"""The kernel's calls that `os` does not have, one thin function each, under the kernel's own names.

Every function raises OSError with errno, text and, where there is one, the path.  An errno that lies gets another text and a
hint that names the sysctl to look at (`why`).

`_ctypes`, not `ctypes`: the package around it takes longer to import than all mounts of a run.  Called without declared
arguments, `_ctypes` passes an int as a C int (sign-extended in its register, so -1 is -1), bytes as a pointer to them and None
as NULL; more the kernel's calls do not ask for.
"""

from __future__ import annotations

import _ctypes
import errno
import os
import struct

# sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# sys/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_RELATIME = 1 << 21
PRIVATE = MS_NOSUID | MS_NODEV  # of every mount of our own
MNT_DETACH = 2
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

# fcntl.h
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

# linux/nsfs.h
NS_GET_USERNS = 0xB701
NS_GET_PARENT = 0xB702

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2

# linux/capability.h, in the order of their numbers
CAPABILITIES = (
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service net_broadcast "
    "net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin sys_boot sys_nice "
    "sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm "
    "block_suspend audit_read perfmon bpf checkpoint_restore"
).split()

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 4

# signal.h; the mask of all signals, in the size that C libraries expect
SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK = 0, 1, 2
SIG_IGN = 1
ALL_SIGNALS = b"\xff" * 128

# linux/if.h, linux/sockios.h
AF_INET = 2
SOCK_DGRAM = 2
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

# linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION = 1

# Calls that C libraries lack or learned late.  From 424 on a call has the same number on every architecture.
OPEN_TREE = 428
MOVE_MOUNT = 429
CLOSE_RANGE = 436
PIDFD_OPEN = 434
OPENAT2 = 437
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_RESTRICT_SELF = 446
# machine -> pivot_root, seccomp, and ioctl in each of the call tables that a process of this machine can reach
CALLS = {
    "x86_64": (155, 317, (16, 54, 0x40000000 | 514)),  # native, i386, x32
    "aarch64": (41, 277, (29, 54)),
    "riscv64": (41, 277, (29,)),
    "ppc64le": (203, 358, (54,)),
    "s390x": (217, 348, (54,)),
    "loongarch64": (41, 277, (29,)),
}


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None: what is loaded already
_functions: dict[str, _Function] = {}


def _call(name: str, *arguments: object, path: str | bytes | None = None) -> int:
    """Call a function of the C library.  Raises OSError when it answers -1."""
    function = _functions.get(name)
    if function is None:
        function = _functions[name] = _Function(_ctypes.dlsym(_libc, name))
    result: int = function(*arguments)
    if result == -1:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def _machine() -> tuple[int, int, tuple[int, ...]]:
    machine = os.uname().machine
    if machine not in CALLS:
        raise OSError(errno.ENOSYS, f"no system call numbers known for {machine}")
    return CALLS[machine]


def unshare(flags: int) -> None:
    _call("unshare", flags)


def setns(fd: int, flags: int) -> None:
    _call("setns", fd, flags)


def pidfd_open(pid: int) -> int:
    """A descriptor of a process, readable when it has ended; pidfd_open(2), Linux 5.3."""
    return _call("syscall", PIDFD_OPEN, pid, 0)


def has_pidfd() -> bool:
    """Whether pidfd_open(2) can be called here."""
    try:
        os.close(pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def owner(fd: int) -> int:
    """A descriptor of the user namespace that owns a namespace; ioctl_nsfs(2)."""
    return _call("ioctl", fd, NS_GET_USERNS)


def parent(fd: int) -> int:
    """A descriptor of the user namespace above one; ioctl_nsfs(2)."""
    return _call("ioctl", fd, NS_GET_PARENT)


def mount(source: str, target: str, fstype: str, flags: int, options: str = "") -> None:
    """mount(2); the path in an error is the target."""
    _call("mount", os.fsencode(source), os.fsencode(target), fstype.encode(), flags, os.fsencode(options), path=target)


def umount2(target: str, flags: int) -> None:
    _call("umount2", os.fsencode(target), flags, path=target)


def pivot_root(new_root: str, put_old: str) -> None:
    _call("syscall", _machine()[0], os.fsencode(new_root), os.fsencode(put_old), path=new_root)


def prctl(option: int, argument: int | bytes = 0) -> None:
    _call("prctl", option, argument, 0, 0, 0)


def signal_default(number: int) -> bool:
    """Give a signal its default action; signal(2).  Returns whether it was ignored.

    The module `signal` costs 6 ms: it builds enumerations.
    """
    return _call("signal", number, None) == SIG_IGN


def signal_ignore(number: int) -> None:
    _call("signal", number, SIG_IGN)


def sigprocmask(how: int, mask: bytes) -> bytes:
    """Change the mask of blocked signals (SIG_BLOCK ...) by a sigset_t; returns the one before."""
    before = (_Byte * len(ALL_SIGNALS))()
    _call("sigprocmask", how, mask, _ctypes.byref(before))
    return bytes(before)


def signalfd(mask: bytes) -> int:
    """A descriptor that gives signals of `mask` as struct signalfd_siginfo, 128 bytes each; reading it never waits."""
    return _call("signalfd", -1, mask, os.O_CLOEXEC | os.O_NONBLOCK)


def close_range(first: int, last: int) -> None:
    """close_range(2), Linux 5.9; before that by hand.  last: inclusive, -1 for the highest there can be."""
    try:
        _call("syscall", CLOSE_RANGE, first, last, 0)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):  # EPERM: a seccomp filter that does not know the call
            raise
        os.closerange(first, os.sysconf("SC_OPEN_MAX") if last == -1 else last + 1)


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2), Linux 5.6: a new descriptor.

    Raises OSError: ENOSYS on an older kernel, ELOOP, EXDEV or EAGAIN where `resolve` forbids what the path asks for.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return _call("syscall", OPENAT2, directory, os.fsencode(path), how, len(how), path=path)


def open_tree(path: str) -> int:
    """open_tree(2) with OPEN_TREE_CLONE, Linux 5.2: a copy of the mount at `path` that is attached nowhere, as a descriptor."""
    return _call("syscall", OPEN_TREE, AT_FDCWD, os.fsencode(path), OPEN_TREE_CLONE | os.O_CLOEXEC, path=path)


def move_mount(source: int, target: int) -> None:
    """move_mount(2), Linux 5.2: attach the mount `source`, a descriptor of open_tree, where the descriptor `target` stands."""
    _call("syscall", MOVE_MOUNT, source, b"", target, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def mount_setattr(fd: int, flags: int, attributes: int) -> None:
    """mount_setattr(2), Linux 5.12: set MOUNT_ATTR_* on the mount that fd stands on, with AT_RECURSIVE also on those below it.

    Attributes that are set already stay set, so that nothing the host locked is ever weakened.
    """
    attr = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, fd, b"", flags | AT_EMPTY_PATH, attr, len(attr))


def capset(mask: int) -> None:
    """Make the effective, permitted and inheritable sets of this thread those of `mask`, a bit for each; capset(2), version 3."""
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _call("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", low, low, low, high, high, high))


def capset_only(*names: str) -> None:
    """Keep these capabilities alone, in all sets, so that they survive an execve."""
    mask = sum(1 << CAPABILITIES.index(name) for name in names)
    capset(mask)
    raise_ambient(mask)


def raise_ambient(mask: int) -> None:
    """Let these capabilities, which must be permitted and inheritable, live on across execve; PR_CAP_AMBIENT, Linux 4.3."""
    for capability in range(len(CAPABILITIES)):
        if mask >> capability & 1:
            _call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def last_capability() -> int:
    """The highest that this kernel has and we have a name for."""
    with open("/proc/sys/kernel/cap_last_cap", "rb", buffering=0) as file:
        return min(int(file.read()), len(CAPABILITIES) - 1)


def drop_bounding_set(kept: int) -> None:
    """Take all but `kept` out of the capability bounding set: what it lacks, no execve can give."""
    capability = 0
    try:
        while True:
            if not kept >> capability & 1:
                prctl(PR_CAPBSET_DROP, capability)
            capability += 1
    except OSError as error:
        if error.errno != errno.EINVAL or capability == 0:  # EINVAL: one beyond the last that this kernel has
            raise


def sethostname(name: str) -> None:
    encoded = os.fsencode(name)
    _call("sethostname", encoded, len(encoded), path=name)


def bring_up_loopback() -> None:
    """Of a new network namespace; netdevice(7): struct ifreq, the name and then flags."""
    fd = _call("socket", AF_INET, SOCK_DGRAM | os.O_CLOEXEC, 0)
    try:
        _call("ioctl", fd, SIOCSIFFLAGS, struct.pack("@16sH22x", b"lo", IFF_UP))
    finally:
        os.close(fd)


def seccomp(program: bytes) -> None:
    """Install a classic BPF filter (struct sock_filter, 8 bytes each).

    SPEC_ALLOW because kernels before 5.16 otherwise turn on mitigations that slow the payload's own code down.
    """
    block = (_Byte * len(program)).from_buffer_copy(program)
    fprog = struct.pack("@HP", len(program) // 8, _ctypes.addressof(block))
    _call("syscall", _machine()[1], SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, fprog)


def ioctl_numbers() -> tuple[int, ...]:
    """The numbers of ioctl(2) in every call table that a process of this machine can reach."""
    return _machine()[2]


def landlock_restrict_writes() -> None:
    """Forbid this process and its children to write, create or remove anything in a file system; Landlock, Linux 5.13."""
    version = _call("syscall", LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    handled = 0b1_1111_1111_0010  # every right of version 1 but EXECUTE, READ_FILE and READ_DIR
    if version >= 3:
        handled |= 1 << 14  # TRUNCATE
    ruleset = _call("syscall", LANDLOCK_CREATE_RULESET, struct.pack("=Q", handled), 8, 0)
    _call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)


def map_ids(proc: int, uid_map: str, gid_map: str) -> None:
    """Write the maps of a user namespace (user_namespaces(7)); proc is a descriptor of /proc/self."""
    for name, text in (("setgroups", "deny"), ("uid_map", uid_map), ("gid_map", gid_map)):
        fd = os.open(name, os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


def mount_id(fd: int) -> int:
    """The id of the mount that a descriptor stands on; procfs(5), fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
        return int(file.read().partition(b"mnt_id:")[2].split(None, 1)[0])


def magic(fd: int) -> str:
    """The path of an open descriptor: what it stands on, not what now covers that."""
    return f"/proc/self/fd/{fd}"


def make_read_only(fd: int, *, below: bool) -> None:
    """Make the mount that fd stands on read-only, with `below` also every mount under it.  Flags that it has are kept."""
    try:
        mount_setattr(fd, AT_RECURSIVE if below else 0, MOUNT_ATTR_RDONLY)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):  # EPERM: a seccomp filter that does not know the call
            raise
        # ST_NOSUID and its neighbours of statvfs have the values of MS_NOSUID; dropping one that the host set would be refused
        kept = os.fstatvfs(fd).f_flag & (PRIVATE | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
        mount("", magic(fd), "", MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def why(error: OSError, call: str) -> tuple[str, str]:
    """Cause and hint for an error, where its errno does not say what is wrong; else the errno's own text.

    Arguments:
        call: "namespace" for unshare and all that is forbidden with it; "mount".
    """
    number = error.errno
    if call in ("namespace", "unshare"):
        if number in (errno.ENOSPC, errno.EUSERS):
            limit = _sysctl("user/max_user_namespaces")
            return "the limit on user namespaces is reached", f"user.max_user_namespaces is {limit}; the site raises it"
        if number in (errno.EINVAL, errno.ENOSYS):
            return "the kernel has no user namespaces", "it was built without CONFIG_USER_NS"
    if number in (errno.EPERM, errno.EACCES):
        for name, forbidding, remedy in FORBIDDING:
            if _sysctl(name) == forbidding:
                return "user namespaces are forbidden on this host", f"{name.replace('/', '.')} is {forbidding}: {remedy}"
        if call != "mount":
            return "user namespaces are forbidden here", "if this is a container, by its seccomp filter (Docker: seccomp=unconfined)"
    if number == errno.ENOSPC:  # mount(2) means the namespace
        return "too many mounts", f"fs.mount-max is {_sysctl('fs/mount-max')}"
    if number in (errno.ENOTCONN, errno.ECONNABORTED):
        return "the server of the image has ended", "the image is damaged, or the host lacks the library of its compression"
    return error.strerror or str(error), ""


# sysctl, its value that forbids what we do, and who changes that
FORBIDDING = (
    ("kernel/unprivileged_userns_clone", "0", "the site sets it to 1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "the site sets it to 0 or installs an AppArmor profile for sciexec"),
    ("user/max_user_namespaces", "0", "the site raises it"),
)


def _sysctl(name: str) -> str:
    try:
        with open(f"/proc/sys/{name}", "rb", buffering=0) as file:
            return file.read().decode().strip()
    except OSError:
        return ""
