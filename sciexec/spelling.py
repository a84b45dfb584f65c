"""How the values of options are written: binds, mounts, assignments, sizes.

Sources: `apptainer exec --help`; Apptainer's user guide, "Bind Paths and Mounts"; pflag's documentation for lists.
"""

from __future__ import annotations

import os

from sciexec import kernel
from sciexec.errors import HostError, UsageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Bind:
    """What --bind and --mount ask for.

    Arguments:
        source: absolute path on the host.  target: absolute path inside.
        image_src: a path in the file system of the image `source`, "" where the source itself is bound.
        number: the id of the SIF object of `source` to look in, 0 for the one that holds data.
    """

    __slots__ = ("image_src", "number", "read_only", "source", "target")

    def __init__(self, source: str, target: str, read_only: bool = False, image_src: str = "", number: int = 0) -> None:
        self.source, self.target, self.read_only, self.image_src, self.number = source, target, read_only, image_src, number

    def key(self) -> tuple[str, str, bool, str, int]:
        return self.source, self.target, self.read_only, self.image_src, self.number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bind) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        return f"Bind{self.key()}"


WRITTEN = "a colon or comma in a path is written \\: or \\,"


def binds(text: str) -> list[Bind]:
    """What SRC[:DEST[:OPTS]],... asks for; OPTS is one or several of ro, rw, image-src=PATH, id=N, with commas between them.

    An item may be empty.  A backslash takes the meaning from a comma or colon behind it.  A source is made absolute but not
    normalised: its .. may go through a symbolic link, which is the kernel's to follow.
    """
    found: list[Bind] = []
    items: list[tuple[str, list[str]]] = []  # each with its options
    for item in fields(text, ","):
        parts = fields(item, ":")
        if not parts[0] or len(parts) > 3:
            if item:
                raise UsageError(f"--bind {escaped(item)}: not SRC[:DEST[:OPTS]]", WRITTEN)
        elif len(parts) == 1 and items and items[-1][1] and is_bind_option(item):  # SRC:DEST:ro,id=2
            items[-1][1].append(item)
        else:
            items.append((item, parts[2:]))
    for item, given in items:
        source, *rest = map(plain, fields(item, ":")[:2])
        source = absolute(source)
        target = rest[0] if rest and rest[0] else source
        bind = Bind(source, inside("--bind", item, target))
        for option in filter(None, given):
            if not is_bind_option(option):
                raise UsageError(f"--bind {escaped(item)}: {escaped(option)} is neither ro, rw, image-src=PATH nor id=N", WRITTEN)
            change(bind, "--bind", item, *plain(option).partition("=")[::2])
        found.append(bind)
    return found


def is_bind_option(text: str) -> bool:
    return text in ("ro", "rw") or text.startswith(("image-src=", "id="))


def change(bind: Bind, name: str, item: str, key: str, value: str) -> None:
    """Put one option of a bind into it."""
    if key == "image-src":
        bind.image_src = normal(f"/{value}")
    elif key == "id":
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise UsageError(f"{name} {escaped(item)}: id={escaped(value)} is not the number of an object", "`sciexec sif list` shows them")
        bind.number = int(value)
        bind.image_src = bind.image_src or "/"  # a file that is bound as it is has no objects
    else:
        bind.read_only = key == "ro"


MOUNT_KEYS = {"src": "source", "source": "source", "dst": "target", "destination": "target", "target": "target", "type": "type"}


def mounts(text: str) -> list[Bind]:
    """What the lines of --mount ask for, each [type=bind,]source=PATH,destination=PATH[,ro][,image-src=PATH][,id=N] (RFC 4180)."""
    found = []
    for line in records(text):
        values = {"type": "bind", "source": "", "target": ""}
        bind = Bind("", "")
        for item in csv("--mount", line):
            key, _, value = item.partition("=")
            if key in MOUNT_KEYS:
                values[MOUNT_KEYS[key]] = value
            elif key in ("ro", "readonly", "rw"):
                bind.read_only = (key != "rw") == (value not in ("0", "false"))
            elif key in ("image-src", "id"):
                change(bind, "--mount", line, key, value)
            elif key == "bind-propagation" and value in ("", "rprivate", "rslave", "private", "slave"):
                pass  # a container's mounts never reach the host
            elif item:
                raise UsageError(f"--mount {escaped(line)}: {escaped(key)} is no key of a bind mount", "src, dst, ro, image-src and id are")
        if values["type"] != "bind":
            raise UsageError(f"--mount {escaped(line)}: its type must be bind", "--mount type=bind,src=PATH,dst=PATH")
        if not values["source"] or not values["target"].startswith("/"):
            raise UsageError(f"--mount {escaped(line)}: it needs src=PATH and dst=/PATH", "--mount type=bind,src=PATH,dst=PATH")
        bind.source, bind.target = absolute(values["source"]), inside("--mount", line, values["target"])
        found.append(bind)
    return found


def records(text: str) -> Iterator[str]:
    """The lines of comma-separated values; a line break in quotes belongs to a value."""
    record = ""
    for line in text.split("\n"):
        record = f"{record}\n{line}" if record else line
        if record.count('"') % 2 == 0:
            if record.strip():
                yield record.rstrip("\r")
            record = ""
    if record:  # its last quote is not closed, which whoever reads it will say
        yield record


def data(text: str) -> tuple[str, str]:
    """(file or name, destination or "") of FILE|NAME[:DEST]."""
    parts = [plain(part) for part in fields(text, ":")]
    if not parts[0] or len(parts) > 2 or (len(parts) == 2 and not parts[1].startswith("/")):
        raise UsageError(f"--data {escaped(text)}: not FILE or NAME, with :DEST behind it", "DEST is a path inside and begins with a slash")
    return parts[0], inside("--data", text, parts[1]) if parts[1:] else ""


NO_MOUNT = ("proc", "sys", "dev", "devpts", "home", "tmp", "hostfs", "cwd", "bind-paths")


def no_mount(text: str) -> str:
    """A name that --no-mount knows, or an absolute path."""
    if text.startswith("/"):
        return normal(text)
    if text not in NO_MOUNT:
        raise UsageError(f"--no-mount {escaped(text)}: no such mount", f"{', '.join(NO_MOUNT)}, or an absolute path")
    return text


def address(text: str) -> str:
    """An address of IPv4, or of IPv6, with %INTERFACE behind it or not."""
    import _socket  # here: few ask for it

    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            _socket.inet_pton(family, text.partition("%")[0] if family == _socket.AF_INET6 else text)
        except (OSError, ValueError):
            continue
        return text
    raise UsageError(f"--dns {escaped(text)}: not an address of IPv4 or IPv6")


def inside(name: str, text: str, path: str) -> str:
    """An absolute path inside, which something can be mounted on.  name, text: the option and its value, for an error."""
    if not path.startswith("/"):
        raise UsageError(f"{name} {escaped(text)}: the path inside must begin with a slash")
    if normal(path) == "/":
        raise UsageError(f"{name} {escaped(text)}: the root of the image cannot be covered", "a directory can be run as an image")
    return normal(path)


def overlay(text: str) -> tuple[str, bool]:
    """(absolute path, read-only) of PATH[:ro|:rw]."""
    parts = fields(text, ":")
    if not parts[0] or len(parts) > 2 or (len(parts) == 2 and parts[1] not in ("ro", "rw")):
        raise UsageError(f"--overlay {escaped(text)}: not PATH, PATH:ro or PATH:rw", WRITTEN)
    return absolute(plain(parts[0])), parts[1:] == ["ro"]


UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(name: str, text: str) -> int:
    """Bytes, of a number with k, m, g or t (powers of 1024; with or without b or ib) behind it."""
    lower = text.lower()
    digits = lower.rstrip("kmgtib")
    unit = lower[len(digits) :].removesuffix("b").removesuffix("i")
    if not digits.isascii() or not digits.isdigit() or unit not in UNITS:
        raise UsageError(f"{name} {escaped(text)}: not a size", "a number of bytes, or one with k, m, g or t behind it")
    return int(digits) * UNITS[unit]


def is_net(net: bool, network: str | None) -> bool:
    """Whether the payload gets a network of its own.  Raises UsageError for one that only root can make."""
    if network in (None, "none"):
        if net and network is None:
            raise UsageError("--net alone asks for a bridge, which root makes", "--net --network none gives the loopback and nothing else")
        return network is not None
    if network == "host" and not net:
        return False
    raise UsageError(
        f"--network {escaped(str(network))} cannot be had without privileges: CNI networks are set up by root",
        "--network none gives the loopback and nothing else",
    )


def hostname(text: str) -> str:
    """A host name: letters, digits, hyphens, dots and, as hosts have them, underscores; sethostname(2) takes 64 characters."""
    if len(text) > 64 or not text.isascii() or not text.translate({45: None, 46: None, 95: None}).isalnum():
        raise UsageError(f"--hostname {escaped(text)}: not a host name", "up to 64 letters, digits, hyphens, underscores and dots")
    return text


LABELS = {
    "selinux": "SELinux labels are the policy's to give",
    "apparmor": "an AppArmor profile is loaded by root",
    "seccomp": "profiles of seccomp are not read",
}


def security(given: list[str]) -> tuple[int | None, int | None]:
    """(uid, gid) of --security uid:N, gid:N.  Raises UsageError for what a user cannot have."""
    found: dict[str, int | None] = {"uid": None, "gid": None}
    for text in given:
        key, _, value = text.partition(":")
        if key in LABELS:
            raise UsageError(f"--security {escaped(text)} cannot be given: {LABELS[key]}")
        if key in found and ":" in value:
            raise UsageError(f"--security {escaped(text)}: one {key} can be had without privileges, not several")
        if key not in found or not value.isascii() or not value.isdigit() or int(value) >= 2**32 - 1:
            raise UsageError(f"--security {escaped(text)}: neither uid:NUMBER nor gid:NUMBER")
        found[key] = int(value)
    return found["uid"], found["gid"]


SHARE = ("auto", "off", "step", "job")


def share(text: str) -> str:
    """With whom a container is shared."""
    if text not in SHARE:
        raise UsageError(f"--share {escaped(text)}: not a way to share", f"one of {', '.join(SHARE)}")
    return text


def capability(text: str) -> str:
    """The name of a capability as capabilities(7) has it, in lower case and without "cap_"."""
    name = text.strip().lower().removeprefix("cap_")
    if name != "all" and name not in kernel.CAPABILITIES:
        raise UsageError(f"capability {escaped(text)}: the kernel has none of that name", "as CAP_SYS_PTRACE; all of them: all")
    return name


def fields(text: str, separator: str) -> list[str]:
    """`text` split at every separator that has no backslash in front; the backslashes stay."""
    found: list[str] = []
    for piece in text.split(separator):
        if found and found[-1].endswith("\\"):
            found[-1] += separator + piece
        else:
            found.append(piece)
    return found


def plain(text: str) -> str:
    return text.replace("\\,", ",").replace("\\:", ":")


def absolute(path: str) -> str:
    """`path` seen from where the caller stands.  Raises HostError where that directory is gone."""
    if path.startswith("/"):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError as error:
        raise HostError(f"finding {escaped(path)}: the current directory is gone ({error.strerror})", "give the whole path") from error


def normal(path: str) -> str:
    """A path inside, without //, /./ and /../ (links in it are resolved when it is mounted upon)."""
    return "/" + os.path.normpath(path).lstrip("/")


def home_pair(text: str) -> tuple[str, str]:
    """(source, destination) of SRC[:DEST]."""
    parts = text.split(":")
    source = absolute(parts[0])
    destination = normal(parts[1]) if parts[1:] and parts[1].startswith("/") else normal(source)
    if not parts[0] or len(parts) > 2 or (len(parts) == 2 and not parts[1].startswith("/")):
        raise UsageError(f"--home {escaped(text)}: not SRC or SRC:DEST", "DEST is a path inside and begins with a slash")
    return source, destination


def assignments(text: str) -> list[tuple[str, str]]:
    """(name, value) of NAME=VALUE[,NAME=VALUE...].

    Commas separate only where there is a second "=", and quotes around an item keep its commas: so one assignment needs no
    quoting (X=a,b) and several are a line of CSV ("X=a,b",Y=c).  Source: pflag, StringToString.
    """
    if text.count("=") == 1:
        items = [text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text]
    else:
        items = csv("--env", text)
    pairs = []
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals or "\0" in item:
            raise UsageError(f"--env {escaped(item)}: not NAME=VALUE", "commas separate; write --env '\"A=1,2\",B=3' to keep one")
        pairs.append((name, value))
    return pairs


def csv(name: str, text: str) -> list[str]:
    """The items of one line of comma-separated values (RFC 4180: an item in quotes may hold commas, and quotes twice)."""
    items = []
    rest: str | None = text
    while rest is not None:
        if rest.startswith('"'):
            item, end = "", 1
            while (close := rest.find('"', end)) >= 0:
                item += rest[end:close]
                end = close + 1
                if not rest.startswith('"', end):
                    break
                item, end = item + '"', end + 1
            if close < 0 or rest[end : end + 1] not in ("", ","):
                raise UsageError(f"{name} {escaped(text)}: a quote is not closed, or closed too early")
            rest = rest[end + 1 :] if end < len(rest) else None
        else:
            item, comma, behind = rest.partition(",")
            if '"' in item:
                raise UsageError(f"{name} {escaped(text)}: a quote inside an item", """put it around the whole item: '"A=1,2",B=3'""")
            rest = behind if comma else None
        items.append(item)
    return items
