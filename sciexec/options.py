"""The options of run, exec and shell: one table, a fast reader for the command line, and what is made of the values.

    command line --parse()--> verb, values, image, argv --settle()--> Options
                 \\--click (sciexec.cli, its options are made of the same table)--/

The reader is written by hand because argparse costs 10 ms and click 30.  It gives None for whatever is not plainly right, and
click, reading the same line again, says what is wrong with it.

The spelling is Apptainer's: flags end at the first word that is no flag, the image; all behind it belongs to the payload.
Sources: `apptainer exec --help`; pflag's documentation for the forms a flag may have.
"""

from __future__ import annotations

import os

from sciexec.errors import HostError, UsageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Union

    Value = Union[bool, str, list[str]]
    Bind = tuple[str, str, bool]  # source, destination, read-only

FLAG, VALUE, LIST = "flag", "value", "list"  # a LIST may be given several times
READY, ALWAYS, LATER = "ready", "always", "later"  # ALWAYS: what it asks for is so anyway.  LATER: refused by name

RUNS = ("run", "exec", "shell")
GLOBAL = ("global", *RUNS)  # in front of the verb, or behind it

PREFIXES = ("SCIEXEC_", "APPTAINER_", "SINGULARITY_")  # strongest first


class Option:
    """A row of the table.

    Arguments:
        slot: where its value goes in Options (for options that are not READY: a key only).
        names: with their dashes, long ones first.
        kind: FLAG, VALUE or LIST.  help: one line.  metavar: how help calls the value.
        keys: variables without prefix: SCIEXEC_KEY, then APPTAINER_KEY, then SINGULARITY_KEY.
        verbs: where it may stand.  state: READY, ALWAYS or LATER.
    """

    __slots__ = ("help", "keys", "kind", "metavar", "names", "slot", "state", "verbs")

    def __init__(
        self,
        slot: str,
        names: str,
        kind: str,
        help: str = "",
        keys: str = "",
        *,
        metavar: str = "",
        verbs: tuple[str, ...] = RUNS,
        state: str = READY,
    ) -> None:
        self.slot = slot
        self.names = names.split()
        self.kind = kind
        self.help = help
        self.keys = keys.split()
        self.metavar = metavar
        self.verbs = verbs
        self.state = state


def _others(state: str, kind: str, rows: str) -> tuple[Option, ...]:
    """Rows without a slot of their own: one a line, names, then keys behind a bar."""
    lines = [line.partition("|") for line in rows.strip().splitlines()]
    return tuple(Option(names.split()[0], names, kind, keys=keys, state=state) for names, _, keys in lines)


OPTIONS = (
    Option("bind", "--bind -B", LIST, "show a path of the host inside; OPTS: ro, rw", "BIND BINDPATH", metavar="SRC[:DEST[:OPTS]],..."),
    Option("home", "--home -H", VALUE, "home directory, and where it appears inside", "HOME", metavar="SRC[:DEST]"),
    Option("no_home", "--no-home", FLAG, "leave the home directory outside", "NO_HOME"),
    Option("cwd", "--pwd --cwd", VALUE, "directory inside to start in", "PWD TARGET_PWD CWD TARGET_CWD", metavar="PATH"),
    Option("cleanenv", "--cleanenv -e", FLAG, "leave the host's environment outside", "CLEANENV"),
    Option("env", "--env", LIST, "set variables inside", metavar="NAME=VALUE,..."),
    Option("contain", "--contain -c", FLAG, "own /tmp, /var/tmp, home and a minimal /dev", "CONTAIN"),
    Option("writable_tmpfs", "--writable-tmpfs", FLAG, "make the root writable; what is written is lost at the end", "WRITABLE_TMPFS"),
    Option("no_eval", "--no-eval", FLAG, "no shell reads arguments and variables (images made by sciexec: always)", "NO_EVAL"),
    Option("shell", "--shell -s", VALUE, "the shell to start", "SHELL", metavar="PATH", verbs=("shell",)),
    Option("arch", "--arch", VALUE, "architecture to choose where IMAGE is in a registry", "ARCH", metavar="NAME"),
    Option("no_https", "--no-https", FLAG, "speak http to the registry", "NOHTTPS NO_HTTPS"),
    Option("disable_cache", "--disable-cache", FLAG, "keep nothing of what a registry sends", "DISABLE_CACHE"),
    Option("authfile", "--authfile", VALUE, "credentials for the registry, as docker's config.json", "AUTH_FILE", metavar="PATH"),
    Option("debug", "--debug -d", FLAG, "say every step, and where an error was raised", "DEBUG", verbs=GLOBAL),
    Option("quiet", "--quiet -q", FLAG, "say errors only", "QUIET", verbs=GLOBAL),
    Option("quiet", "--silent", FLAG, "the same", "SILENT", verbs=GLOBAL),
    Option("quiet", "-s", FLAG, "the same", verbs=("global", "run", "exec")),
    Option("verbose", "--verbose -v", FLAG, "say more", "VERBOSE", verbs=GLOBAL),
    Option("nocolor", "--nocolor", FLAG, "no colours (a run has none)", "NOCOLOR", verbs=GLOBAL),
    *_others(ALWAYS, FLAG, """
        --userns -u | USERNS UNSHARE_USERNS
        --no-init | NOSHIMINIT
        --no-pid | NO_PID
        --no-nv | NO_NV NV_OFF
        --no-rocm | NO_ROCM ROCM_OFF
        --no-privs | NO_PRIVS
    """),
    *_others(LATER, FLAG, """
        --containall -C | CONTAINALL
        --nv | NV
        --nvccli | NVCCLI
        --rocm | ROCM
        --compat32 | COMPAT32
        --intel-hpu | INTEL_HPU
        --compat | COMPAT
        --fakeroot -f | FAKEROOT
        --writable -w | WRITABLE
        --pid -p | PID UNSHARE_PID
        --ipc -i | IPC UNSHARE_IPC
        --uts | UTS UNSHARE_UTS
        --net -n | NET UNSHARE_NET
        --no-umask | NO_UMASK
        --no-mark
        --sharens | SHARENS
        --unsquash | UNSQUASH
        --underlay | UNDERLAY
        --tmp-sandbox | TMP_SANDBOX
        --no-tmp-sandbox | NO_TMP_SANDBOX
        --keep-privs | KEEP_PRIVS
        --allow-setuid | ALLOW_SETUID
        --boot | BOOT
        --docker-login | DOCKER_LOGIN
        --passphrase
        --oom-kill-disable | OOM_KILL_DISABLE
        --oci | OCI
        --no-oci | NO_OCI
        --no-compat | NO_COMPAT
        --keep-layers | KEEP_LAYERS
        --no-setgroups | NO_SETGROUPS
        --ignore-subuid
        --ignore-fakeroot-command
        --ignore-userns
    """),
    *_others(LATER, VALUE, """
        --mount | MOUNT
        --env-file | ENV_FILE
        --no-env | NOENV
        --no-mount | NO_MOUNT
        --workdir -W | WORKDIR
        --scratch -S | SCRATCH SCRATCHDIR
        --overlay -o | OVERLAY OVERLAYIMAGE
        --app | APP
        --hostname | HOSTNAME
        --network | NETWORK
        --network-args | NETWORK_ARGS
        --netns-path | NETNS_PATH
        --dns | DNS
        --device
        --cdi-dirs
        --security | SECURITY
        --add-caps | ADD_CAPS
        --drop-caps | DROP_CAPS
        --memory | MEMORY
        --memory-swap | MEMORY_SWAP
        --memory-reservation | MEMORY_RESERVATION
        --cpus | CPUS
        --cpu-shares | CPU_SHARES
        --cpuset-cpus | CPUSET_CPUS
        --cpuset-mems | CPUSET_MEMS
        --pids-limit | PIDS_LIMIT
        --blkio-weight | BLKIO_WEIGHT
        --blkio-weight-device | BLKIO_WEIGHT_DEVICE
        --apply-cgroups | APPLY_CGROUPS
        --fusemount | FUSESPEC
        --pem-path | ENCRYPTION_PEM_PATH
        --data | DATA
        --platform | PLATFORM
        --runscript-timeout | RUNSCRIPT_TIMEOUT
        --tmpdir
        --containlibs | CONTAINLIBS
        --dmtcp-launch | DMTCP_LAUNCH
        --dmtcp-restart | DMTCP_RESTART
    """),
    Option("--config", "--config -c", VALUE, verbs=("global",), state=LATER),
)  # fmt: skip

# As Go's strconv.ParseBool has it, which reads the same flags and variables for the peers.
BOOLEANS = {**dict.fromkeys("1 t T TRUE true True".split(), True), **dict.fromkeys("0 f F FALSE false False".split(), False)}


def rows(verb: str) -> list[Option]:
    """The options that may stand behind `verb`; "global": in front of it."""
    return [option for option in OPTIONS if verb in option.verbs]


class Options:
    """What the user asked for, environment and defaults included.

    Arguments:
        program: the name under which sciexec was called.  verb: run, exec or shell.
        image: as given.  argv: everything behind it.
        binds: (source, destination, read-only), both absolute.  bound: the same as it was written.
        home: (source, destination) or None for the caller's own.
        cwd: where to start inside, or None for where the caller stands.
        env: (name, value) in the order given.
        shell, arch, authfile: their value or None.  All others: whether the flag was given.
    """

    __slots__ = (
        "arch", "argv", "authfile", "binds", "bound", "cleanenv", "contain", "cwd", "debug", "disable_cache", "env", "home", "image",
        "no_eval", "no_home", "no_https", "nocolor", "program", "quiet", "shell", "verb", "verbose", "writable_tmpfs",
    )  # fmt: skip

    program: str
    verb: str
    image: str
    argv: list[str]
    binds: list[Bind]
    bound: str
    home: tuple[str, str] | None
    cwd: str | None
    env: list[tuple[str, str]]
    shell: str | None
    arch: str | None
    authfile: str | None
    cleanenv: bool
    contain: bool
    debug: bool
    disable_cache: bool
    no_eval: bool
    no_home: bool
    no_https: bool
    nocolor: bool
    quiet: bool
    verbose: bool
    writable_tmpfs: bool

    def is_remote(self) -> bool:
        """Whether the image is named by a URI (docker://..., oci:...) and has to be fetched; a file of that name comes first."""
        transport, colon, _ = self.image.partition(":")
        return bool(colon) and transport.replace("-", "").isalpha() and transport.islower() and not os.path.lexists(self.image)

    def describe(self) -> str:
        """One line for --debug; values of --env are left out, they may be secrets."""
        shown = {slot: getattr(self, slot) for slot in self.__slots__ if slot not in ("env", "verb", "image", "argv")}
        given = [f"{slot}={value!a}" for slot, value in shown.items() if value]
        return " ".join([self.verb, ascii(self.image), *map(ascii, self.argv), *given, *(f"env:{key}" for key, _ in self.env)])


# --- the command line -------------------------------------------------------------------------------------------------------


def parse(program: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Options | None:
    """The options on a command line that is plainly a run, or None: then it is click's to read, to answer or to refuse.

    Arguments:
        program: argv[0].  arguments: the rest of argv.  environ: the caller's environment.

    Raises UsageError for a value that makes no sense; HostError where a relative path leads nowhere.
    """
    line = read(arguments)
    return None if line is None else settle(program, *line, environ)


def read(arguments: Sequence[str]) -> tuple[str, dict[str, Value], str, list[str]] | None:
    """(verb, values by slot, image, argv); None for anything unusual.

    The forms of a flag: --name, --name=true, --name VALUE, --name=VALUE, -n, -nm (two of them), -n VALUE, -nVALUE, -n=VALUE.
    """
    words = list(reversed(arguments))  # a stack: the next word is on top
    verb, known = "", names("global")
    values: dict[str, Value] = {}
    while words:
        word = words.pop()
        if word == "--" and verb and words:
            word = words.pop()
        elif word.startswith("-") and word != "-":
            for name, value in flags(word, known):
                option = known.get(name)
                if option is None or option.state == LATER:
                    return None
                if option.kind == FLAG:
                    if value is not None and value not in BOOLEANS:
                        return None
                    values[option.slot] = value is None or BOOLEANS[value]
                    continue
                if value is None:
                    if not words:
                        return None
                    value = words.pop()
                put(values, option, value)
            continue
        elif not verb:
            if word not in RUNS:
                return None
            verb, known = word, names(word)
            continue
        return None if not word or (verb == "exec" and not words) else (verb, values, word, words[::-1])
    return None


def names(verb: str) -> dict[str, Option]:
    return {name: option for option in rows(verb) for name in option.names}


def flags(word: str, known: Mapping[str, Option]) -> list[tuple[str, str | None]]:
    """The flags in one word, each with the value that stands in the same word, or None."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        return [(name, value if equals else None)]
    found: list[tuple[str, str | None]] = []
    rest = word[1:]
    while rest:
        name, rest = f"-{rest[0]}", rest[1:]
        takes_rest = name not in known or known[name].kind != FLAG
        if rest and (takes_rest or rest[0] == "="):
            return [*found, (name, rest[1:] if rest[0] == "=" else rest)]
        found.append((name, None))
    return found


def put(values: dict[str, Value], option: Option, value: str) -> None:
    """A value of an option that is no flag: the last one counts, or, for a LIST, all."""
    before = values.get(option.slot)
    if option.kind == LIST:
        values[option.slot] = [*before, value] if isinstance(before, list) else [value]
    else:
        values[option.slot] = value


# --- what is made of it -----------------------------------------------------------------------------------------------------


def settle(program: str, verb: str, values: dict[str, Value], image: str, argv: list[str], environ: Mapping[str, str]) -> Options:
    """Options from the values of a command line and, where it is silent, from the environment.

    Raises UsageError for values that make no sense, HostError where the directory we are in is gone and a path needs it.
    """
    values = with_variables(values, verb, environ)

    def text(slot: str) -> str | None:
        value = values.get(slot)
        return value if isinstance(value, str) and value else None

    def texts(slot: str) -> list[str]:
        value = values.get(slot)
        return value if isinstance(value, list) else []

    options = Options()
    options.program, options.verb, options.image, options.argv = program, verb, image, argv
    for option in OPTIONS:
        if option.kind == FLAG and option.state == READY:
            setattr(options, option.slot, values.get(option.slot) is True)
    options.binds = list(dict.fromkeys(bind for given in texts("bind") for bind in binds(given)))  # said twice is said once
    options.bound = ",".join(texts("bind"))
    home = text("home")
    options.home = home_pair(home) if home else None
    options.cwd = text("cwd")
    options.env = [pair for given in texts("env") for pair in assignments(given)]
    options.shell, options.arch, options.authfile = text("shell"), text("arch"), text("authfile")
    return options


def with_variables(values: dict[str, Value], verb: str, environ: Mapping[str, str]) -> dict[str, Value]:
    """`values` and, behind them, SCIEXEC_KEY, else APPTAINER_KEY, else SINGULARITY_KEY; an empty one is as good as none.

    The command line beats a variable; lists, of which only the binds have variables, are put together.
    """
    ours = {name: value for name, value in environ.items() if value and name.startswith(PREFIXES)}
    if not ours:
        return values
    settled = dict(values)
    for option in rows(verb):
        for key in option.keys:
            name = next((prefix + key for prefix in PREFIXES if prefix + key in ours), None)
            if name is None or (option.kind != LIST and option.slot in settled):
                continue
            if option.kind == FLAG and ours[name] not in BOOLEANS:
                raise UsageError(f"{name}={escaped(ours[name])}: neither true nor false", f"unset {name}, or make it 1 or 0")
            if option.state == LATER and BOOLEANS.get(ours[name], True):
                raise later(option, name)
            if option.kind == FLAG:
                settled[option.slot] = BOOLEANS[ours[name]]
            else:
                put(settled, option, ours[name])
    return settled


def later(option: Option, given: str) -> UsageError:
    """The refusal of an option that the peers have and this release has not; `given` is how the user wrote it."""
    what = given if given in option.names else f"{given} (which means {option.names[0]})"
    return UsageError(f"{what} is an option of Apptainer that this release of sciexec lacks", "`sciexec run --help` lists what it has")


WRITTEN = "a colon or comma in a path is written \\: or \\,"


def binds(text: str) -> list[Bind]:
    """(source, destination, read-only) of SRC[:DEST[:OPTS]],...

    An item may be empty.  A backslash takes the meaning from a comma or colon behind it.  A source is made absolute but not
    normalised: its .. may go through a symbolic link, which is the kernel's to follow.
    """
    found: list[Bind] = []
    items = fields(text, ",")
    for number, item in enumerate(items):
        parts = fields(item, ":")
        if not item or (number and item in ("ro", "rw") and len(fields(items[number - 1], ":")) == 3):
            continue  # the second: SRC:DEST:ro,rw, seen together with its item
        following = items[number + 1 : number + 2] if len(parts) == 3 else []
        modes = [*parts[2:], *(mode for mode in following if mode in ("ro", "rw"))]
        if not parts[0] or len(parts) > 3:
            raise UsageError(f"--bind {escaped(item)}: not SRC[:DEST[:OPTS]]", WRITTEN)
        for mode in modes:
            if mode not in ("ro", "rw", ""):
                raise UsageError(f"--bind {escaped(item)}: {escaped(mode)} is neither ro nor rw", WRITTEN)
        source, *rest = map(plain, parts[:2])
        source = absolute(source)
        destination = rest[0] if rest and rest[0] else source
        if not destination.startswith("/"):
            raise UsageError(f"--bind {escaped(item)}: the path inside must begin with a slash")
        found.append((source, normal(destination), "ro" in modes))
    return found


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
        items = csv(text)
    pairs = []
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals or "\0" in item:
            raise UsageError(f"--env {escaped(item)}: not NAME=VALUE", "commas separate; write --env '\"A=1,2\",B=3' to keep one")
        pairs.append((name, value))
    return pairs


def csv(text: str) -> list[str]:
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
                raise UsageError(f"--env {escaped(text)}: a quote is not closed, or closed too early")
            rest = rest[end + 1 :] if end < len(rest) else None
        else:
            item, comma, behind = rest.partition(",")
            if '"' in item:
                raise UsageError(f"--env {escaped(text)}: a quote inside an item", """put it around the whole item: --env '"A=1,2",B=3'""")
            rest = behind if comma else None
        items.append(item)
    return items
