"""What of the host comes along into a container: who calls, their home, where they stand, the line that makes them known.

Nothing here asks the name service where /etc/passwd and /etc/group can answer: on a cluster that may mean a directory server,
and a server that hangs would hang every rank of a job.
"""

from __future__ import annotations

import os

from sciexec import environment
from sciexec.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# Directories that a system's own files live in: standing in one of them does not bring it along.
SYSTEM = frozenset("/ /bin /boot /etc /lib /lib32 /lib64 /libx32 /mnt /opt /root /sbin /srv /usr /var".split())
SYSTEM_TREES = ("/dev", "/proc", "/sys")


class Host:
    """The caller and their surroundings, as they were before the first namespace changed the answers.

    The entry of the user is that of passwd(5), split at the colons, as bytes.
    """

    __slots__ = ("cwd", "entry", "environment", "gid", "groups", "home", "uid")
    uid: int
    gid: int
    groups: list[int]  # supplementary ones too
    entry: list[bytes]
    home: str  # "" where the entry names no directory
    cwd: str  # "" where it was deleted or cannot be named
    environment: dict[str, str]

    def __init__(self) -> None:
        self.uid, self.gid = os.getuid(), os.getgid()
        self.groups = sorted({self.gid, *os.getgroups()})
        self.environment = environment.host()
        self.entry = self._entry()
        home = os.fsdecode(self.entry[5])
        self.home = home if home.startswith("/") else ""
        self.cwd = self._cwd()

    def _entry(self) -> list[bytes]:
        for fields in records("/etc/passwd"):
            if len(fields) >= 7 and fields[2] == b"%d" % self.uid:
                return fields[:7]
        import pwd  # asks the name service; here because /etc/passwd alone is enough for most

        try:
            known = pwd.getpwuid(self.uid)
        except KeyError:
            variable = self.environment.get
            name = variable("USER") or variable("LOGNAME") or f"user{self.uid}"
            return [os.fsencode(t) for t in (name, "x", str(self.uid), str(self.gid), "", variable("HOME", "/"), variable("SHELL", ""))]
        return [os.fsencode(str(field)) for field in known]

    def _cwd(self) -> str:
        """$PWD where it is true, as the shell's idea of the path may go through links that the user knows it by."""
        named = self.environment.get("PWD", "")
        try:
            if named.startswith("/") and os.path.samestat(os.stat(named), os.stat(".")):
                return os.path.normpath(named) if "/." in named else named
        except OSError:
            pass
        try:
            return os.getcwd()
        except OSError:
            return ""

    def passwd(self, content: bytes, home: str, uid: int) -> bytes:
        """The image's /etc/passwd with the payload's user in it, whose home is `home`.

        It is the caller: name and gecos, and the image's shell where it knows the uid.  Another `uid` is the image's business
        but for the home, and has the caller's name where it has no other.
        """
        lines = content.splitlines()
        number = b"%d" % uid
        entry = [*self.entry[:5], os.fsencode(home), self.entry[6]]
        if number != self.entry[2]:
            entry[:3] = b"root" if uid == 0 else entry[0], b"x", number
        for index, line in enumerate(lines):
            fields = line.split(b":")
            if len(fields) == 7 and fields[2] == number:
                known = entry[:5] if number == self.entry[2] else fields[:5]
                lines[index] = b":".join((*known, entry[5], fields[6]))
                break
        else:
            lines.append(b":".join(entry))
        return b"\n".join(lines) + b"\n"

    def group(self, content: bytes, gids: list[int]) -> bytes:
        """The image's /etc/group with these groups of the caller in it."""
        lines = content.splitlines()
        known = {fields[2] for line in lines if len(fields := line.split(b":")) >= 3}
        missing = [gid for gid in gids if b"%d" % gid not in known]
        lines += (b"%s:x:%d:%s" % (name, gid, self.entry[0]) for gid, name in names_of_groups(missing))
        return b"\n".join(lines) + b"\n"


def cache(host: Host) -> str:
    """The directory of what can be made again, by the rule of convert.blobs.  Raises HostError where there is no place for it."""
    variable = host.environment.get
    if variable("SCIEXEC_CACHEDIR"):
        return os.path.abspath(host.environment["SCIEXEC_CACHEDIR"])
    home = variable("HOME") or host.home
    for base in (variable("APPTAINER_CACHEDIR"), variable("SINGULARITY_CACHEDIR"), variable("XDG_CACHE_HOME"), home and f"{home}/.cache"):
        if base and os.path.isabs(base):
            return f"{base}/sciexec"
    raise HostError("finding the cache: no home directory is known", "SCIEXEC_CACHEDIR names a directory for it")


def records(path: str) -> Iterable[list[bytes]]:
    """The lines of a file as passwd(5) and group(5), split at the colons; none where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.readall()
    except OSError:
        return []
    return (line.split(b":") for line in content.splitlines())


def names_of_groups(gids: list[int]) -> list[tuple[int, bytes]]:
    """(gid, name) for every gid; one that nobody knows gets a name made of its number."""
    wanted = {b"%d" % gid: gid for gid in gids}
    names = {}
    if wanted:
        names = {wanted[fields[2]]: fields[0] for fields in records("/etc/group") if len(fields) >= 3 and fields[2] in wanted}
    for gid in gids:
        if gid not in names:
            import grp  # asks the name service

            try:
                names[gid] = os.fsencode(grp.getgrgid(gid).gr_name)
            except KeyError:
                names[gid] = b"group%d" % gid
    return sorted(names.items())


def comes_along(cwd: str) -> bool:
    """Whether a working directory is bound where nothing else brings it: yes, but for the system's own."""
    return bool(cwd) and cwd not in SYSTEM and not any(cwd == tree or cwd.startswith(tree + "/") for tree in SYSTEM_TREES)
