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

from sciexec import spelling
from sciexec.errors import UsageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Union

    from sciexec.spelling import Bind

    Value = Union[bool, str, list[str]]

FLAG, VALUE, LIST = "flag", "value", "list"  # a LIST may be given several times
# ALWAYS: what it asks for is so anyway.  LATER: this release lacks it.  NEVER: it needs privileges, or a daemon that has them.
READY, ALWAYS, LATER, NEVER = "ready", "always", "later", "never"

ACTIONS = ("run", "exec", "shell", "test")
STARTS = ("start", "instance run")  # what `instance start` and `instance run` are called here
RUNS = (*ACTIONS, *STARTS)
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
    """Rows without a slot of their own: one a line, names, keys behind a bar, and behind another why it is refused."""
    lines = [[part.strip() for part in f"{line}||".split("|")] for line in rows.strip().splitlines()]
    return tuple(Option(names.split()[0], names, kind, why, keys, state=state) for names, keys, why, *_ in lines)


def _limits(rows: str) -> tuple[Option, ...]:
    """Rows of cgroup limits: name, metavar, help."""
    lines = [[part.strip() for part in line.split("|")] for line in rows.strip().splitlines()]
    return tuple(
        Option(name[2:].replace("-", "_"), name, VALUE, help, name[2:].replace("-", "_").upper(), metavar=metavar)
        for name, metavar, help in lines
    )


LIMITS = _limits("""
    --memory | BYTES | limit of memory, with k, m, g or t behind the number
    --memory-swap | BYTES | limit of memory and swap together; -1 for no limit of swap
    --memory-reservation | BYTES | memory that is kept when others need some
    --cpus | N | limit of CPUs, as 1.5
    --cpu-shares | N | weight against others, 1024 being everybody's
    --cpuset-cpus | LIST | CPUs to use, as 0-3,8
    --cpuset-mems | LIST | memory nodes to use
    --pids-limit | N | limit of processes and threads
    --blkio-weight | N | weight of input and output, 10 to 1000
""")

OPTIONS = (
    Option("bind", "--bind -B", LIST, "show a path of the host inside; OPTS: ro, rw, image-src=PATH, id=N", "BIND BINDPATH",
           metavar="SRC[:DEST[:OPTS]],..."),
    Option("mount", "--mount", LIST, "the same as comma-separated values: type=bind,src=PATH,dst=PATH[,ro][,image-src=PATH]", "MOUNT",
           metavar="CSV"),
    Option("data", "--data", LIST, "show a data image, or a data partition of IMAGE by its name [/data/NAME]", "DATA",
           metavar="FILE|NAME[:DEST]"),
    Option("home", "--home -H", VALUE, "home directory, and where it appears inside", "HOME", metavar="SRC[:DEST]"),
    Option("no_home", "--no-home", FLAG, "leave the home directory outside", "NO_HOME"),
    Option("no_mount", "--no-mount", LIST, "leave out: proc, sys, dev, devpts, home, tmp, hostfs, cwd, bind-paths or a path", "NO_MOUNT",
           metavar="NAME,..."),
    Option("cwd", "--pwd --cwd", VALUE, "directory inside to start in", "PWD TARGET_PWD CWD TARGET_CWD", metavar="PATH"),
    Option("workdir", "--workdir -W", VALUE, "keep scratch directories there, and with --contain /tmp, /var/tmp and home", "WORKDIR",
           metavar="PATH"),
    Option("scratch", "--scratch -S", LIST, "an empty directory inside, gone at the end unless --workdir keeps it", "SCRATCH SCRATCHDIR",
           metavar="PATH,..."),
    Option("cleanenv", "--cleanenv -e", FLAG, "leave the host's environment outside", "CLEANENV"),
    Option("env", "--env", LIST, "set variables inside", metavar="NAME=VALUE,..."),
    Option("env_file", "--env-file", LIST, "set the variables that files assign, as a shell script would", "ENV_FILE", metavar="PATH,..."),
    Option("no_env", "--no-env", LIST, "leave variables of the host outside", "NOENV NO_ENV", metavar="NAME,..."),
    Option("no_eval", "--no-eval", FLAG, "no shell reads arguments and variables (images made by sciexec: always)", "NO_EVAL"),
    Option("contain", "--contain -c", FLAG, "own /tmp, /var/tmp, home and a minimal /dev", "CONTAIN"),
    Option("containall", "--containall -C", FLAG, "--contain --cleanenv --pid --ipc", "CONTAINALL"),
    Option("compat", "--compat", FLAG, "as Docker would: --containall --no-init --no-umask --no-eval --writable-tmpfs", "COMPAT"),
    Option("writable", "--writable -w", FLAG, "write into the image, an unpacked directory or one with an overlay inside", "WRITABLE"),
    Option("writable_tmpfs", "--writable-tmpfs", FLAG, "make the root writable; what is written is lost at the end", "WRITABLE_TMPFS"),
    Option("tmpfs_size", "--tmpfs-size", VALUE, "limit of what --writable-tmpfs takes [half of the memory]", "TMPFS_SIZE", metavar="BYTES"),
    Option("overlay", "--overlay -o", LIST, "a directory, ext3 image, SquashFS or SIF over the image", "OVERLAY OVERLAYIMAGE",
           metavar="PATH[:ro],..."),
    Option("fakeroot", "--fakeroot -f", FLAG, "be root inside, with the rights of the caller outside", "FAKEROOT"),
    Option("pid", "--pid -p", FLAG, "own process ids", "PID UNSHARE_PID"),
    Option("no_pid", "--no-pid", FLAG, "the host's process ids, in spite of --containall", "NO_PID"),
    Option("no_init", "--no-init", FLAG, "with --pid: the command itself is process 1", "NOSHIMINIT NO_INIT"),
    Option("ipc", "--ipc -i", FLAG, "own System V IPC and POSIX message queues", "IPC UNSHARE_IPC"),
    Option("share", "--share", VALUE, "one container for all ranks of a node: auto, off, step or job [auto]", "SHARE", metavar="WHOM"),
    Option("sharens", "--sharens", FLAG, "the same as --share step", "SHARENS"),
    Option("uts", "--uts", FLAG, "own host name", "UTS UNSHARE_UTS"),
    Option("hostname", "--hostname", VALUE, "own host name, this one", "HOSTNAME", metavar="NAME"),
    Option("net", "--net -n", FLAG, "own network: with --network none, the loopback alone", "NET UNSHARE_NET"),
    Option("network", "--network", VALUE, "which: none is the one that needs no privileges", "NETWORK", metavar="NAME"),
    Option("dns", "--dns", VALUE, "name servers for /etc/resolv.conf", "DNS", metavar="ADDRESS,..."),
    Option("app", "--app", VALUE, "the SCIF application of the image to run, or to run in", "APP APPNAME", metavar="NAME"),
    Option("security", "--security", LIST, "be another user or group inside", "SECURITY", metavar="uid:N|gid:N"),
    Option("add_caps", "--add-caps", VALUE, "keep capabilities; they count inside only", "ADD_CAPS", metavar="CAP_NAME,...|all"),
    Option("drop_caps", "--drop-caps", VALUE, "drop capabilities, with --fakeroot or --add-caps", "DROP_CAPS", metavar="CAP_NAME,...|all"),
    Option("no_privs", "--no-privs", FLAG, "no capabilities, in spite of --fakeroot", "NO_PRIVS"),
    Option("no_umask", "--no-umask", FLAG, "umask 0022 instead of the caller's", "NO_UMASK"),
    Option("fusemount", "--fusemount", LIST, "mount what a FUSE program of the image or the host serves", "FUSESPEC",
           metavar="container|host[-daemon]:COMMAND PATH"),
    *LIMITS,
    Option("apply_cgroups", "--apply-cgroups", VALUE, "limits from a TOML file", "APPLY_CGROUPS", metavar="PATH"),
    Option("unsquash", "--unsquash --tmp-sandbox", FLAG, "unpack the image into the cache and run it from there", "UNSQUASH TMP_SANDBOX"),
    Option("shell", "--shell -s", VALUE, "the shell to start", "SHELL", metavar="PATH", verbs=("shell",)),
    Option("pid_file", "--pid-file", VALUE, "write the process id of the instance there", "PID_FILE", metavar="PATH", verbs=STARTS),
    Option("arch", "--arch", VALUE, "architecture to choose where IMAGE is in a registry", "ARCH", metavar="NAME"),
    Option("no_https", "--no-https --nohttps", FLAG, "speak http to the registry", "NOHTTPS NO_HTTPS"),
    Option("disable_cache", "--disable-cache", FLAG, "keep nothing of what a registry sends", "DISABLE_CACHE"),
    Option("authfile", "--authfile", VALUE, "credentials for the registry, as docker's config.json", "AUTH_FILE", metavar="PATH"),
    Option("debug", "--debug -d", FLAG, "say every step, and where an error was raised", "DEBUG", verbs=GLOBAL),
    Option("quiet", "--quiet -q", FLAG, "say errors only", "QUIET", verbs=GLOBAL),
    Option("quiet", "--silent", FLAG, "the same", "SILENT", verbs=GLOBAL),
    Option("quiet", "-s", FLAG, "the same", verbs=("global", "run", "exec", "test")),
    Option("verbose", "--verbose -v", FLAG, "say more", "VERBOSE", verbs=GLOBAL),
    Option("nocolor", "--nocolor", FLAG, "no colours (a run has none)", "NOCOLOR", verbs=GLOBAL),
    *_others(ALWAYS, FLAG, """
        --userns -u | USERNS UNSHARE_USERNS
        --no-nv | NO_NV NV_OFF
        --no-rocm | NO_ROCM ROCM_OFF
        --underlay | UNDERLAY
        --no-tmp-sandbox | NO_TMP_SANDBOX
        --no-oci | NO_OCI
        --no-setgroups | NO_SETGROUPS
        --ignore-subuid
        --ignore-fakeroot-command
        --ignore-userns
        --sif-fuse | SIF_FUSE
    """),
    *_others(ALWAYS, VALUE, """
        --runscript-timeout | RUNSCRIPT_TIMEOUT
    """),
    *_others(LATER, FLAG, """
        --nv | NV
        --nvccli | NVCCLI
        --rocm | ROCM
        --compat32 | COMPAT32
        --intel-hpu | INTEL_HPU
        --docker-login | DOCKER_LOGIN
    """),
    *_others(LATER, VALUE, """
        --device
        --cdi-dirs
        --platform | PLATFORM
        --tmpdir
        --containlibs | CONTAINLIBS
    """),
    *_others(NEVER, FLAG, """
        --keep-privs | KEEP_PRIVS | root's capabilities over the host cannot be kept, as sciexec never has them
        --allow-setuid | ALLOW_SETUID | setuid programs of an image need a runtime that is setuid itself
        --boot | BOOT | booting an init system needs root
        --passphrase | | an encrypted root file system needs the device mapper, which is root's
        --oom-kill-disable | OOM_KILL_DISABLE | cgroup v2 has no such switch
        --oci | OCI | sciexec runs SIF files itself, without an OCI runtime
        --no-compat | NO_COMPAT | it belongs to --oci
        --keep-layers | KEEP_LAYERS | it belongs to --oci
    """),
    *_others(NEVER, VALUE, """
        --network-args | NETWORK_ARGS | CNI networks are set up by root
        --netns-path | NETNS_PATH | joining a network namespace of the host needs privileges in it
        --blkio-weight-device | BLKIO_WEIGHT_DEVICE | cgroup v2 delegates no weights of devices to users
        --pem-path | ENCRYPTION_PEM_PATH | an encrypted root file system needs the device mapper, which is root's
        --dmtcp-launch | DMTCP_LAUNCH | checkpoints by DMTCP are not supported
        --dmtcp-restart | DMTCP_RESTART | checkpoints by DMTCP are not supported
    """),
    Option("--config", "--config -c", VALUE, "the configuration file of a setuid installation means nothing here", verbs=("global",),
           state=NEVER),
)  # fmt: skip

# As Go's strconv.ParseBool has it, which reads the same flags and variables for the peers.
BOOLEANS = {**dict.fromkeys("1 t T TRUE true True".split(), True), **dict.fromkeys("0 f F FALSE false False".split(), False)}


def rows(verb: str) -> list[Option]:
    """The options that may stand behind `verb`; "global": in front of it."""
    return [option for option in OPTIONS if verb in option.verbs]


class Options:
    """What the user asked for, environment and defaults included.

    Arguments:
        program: the name under which sciexec was called.  verb: run, exec, shell, test, or one of STARTS.
        image: as given.  argv: everything behind it.
        binds: of --bind and --mount, in that order.  bound: the places that the payload is told of.
        data: (file or name, destination or "").
        home: (source, destination) or None for the caller's own.
        cwd: where to start inside, or None for where the caller stands.
        env: (name, value) in the order given.  env_files: absolute paths.  no_env: names.
        no_mount: names and absolute paths.  scratch: absolute paths inside.  workdir: absolute or None.
        overlays: (absolute path, read-only), the lowest first.
        share: auto, off, step or job.
        tmpfs_size: in bytes, 0 for the kernel's default.
        net: whether the payload gets a network of its own, which is its loopback.
        uid, gid: who to be inside, None for the caller's own.
        add_caps, drop_caps: names in lower case without "cap_", or "all".
        dns: addresses.  fusemounts: as written.  limits: value by slot, as written.
        name: of the instance that is started, or joined.
        shell, arch, authfile, app, hostname, apply_cgroups, pid_file: their value or None.
        All others: whether the flag was given, or is part of one that was.
    """

    __slots__ = (
        "add_caps", "app", "apply_cgroups", "arch", "argv", "authfile", "binds", "bound", "cleanenv", "compat", "contain", "containall",
        "cwd", "data", "debug", "disable_cache", "dns", "drop_caps", "env", "env_files", "fakeroot", "fusemounts", "gid", "home",
        "hostname", "image", "ipc", "limits", "name", "net", "no_env", "no_eval", "no_home", "no_https", "no_init", "no_mount", "no_pid",
        "no_privs", "no_umask", "nocolor", "overlays", "pid", "pid_file", "program", "quiet", "scratch", "share", "sharens", "shell",
        "tmpfs_size", "uid", "unsquash", "uts", "verb", "verbose", "workdir", "writable", "writable_tmpfs",
    )  # fmt: skip

    program: str
    verb: str
    image: str
    argv: list[str]
    name: str
    binds: list[Bind]
    bound: list[str]
    data: list[tuple[str, str]]
    home: tuple[str, str] | None
    no_home: bool
    no_mount: list[str]
    cwd: str | None
    workdir: str | None
    scratch: list[str]
    share: str
    sharens: bool
    cleanenv: bool
    env: list[tuple[str, str]]
    env_files: list[str]
    no_env: list[str]
    no_eval: bool
    contain: bool
    containall: bool
    compat: bool
    writable: bool
    writable_tmpfs: bool
    tmpfs_size: int
    overlays: list[tuple[str, bool]]
    fakeroot: bool
    pid: bool
    no_pid: bool
    no_init: bool
    ipc: bool
    uts: bool
    hostname: str | None
    net: bool
    dns: list[str]
    app: str | None
    uid: int | None
    gid: int | None
    add_caps: list[str]
    drop_caps: list[str]
    no_privs: bool
    no_umask: bool
    fusemounts: list[str]
    limits: dict[str, str]
    apply_cgroups: str | None
    unsquash: bool
    shell: str | None
    pid_file: str | None
    arch: str | None
    authfile: str | None
    no_https: bool
    disable_cache: bool
    debug: bool
    quiet: bool
    verbose: bool
    nocolor: bool

    def is_remote(self) -> bool:
        """Whether the image is named by a URI (docker://..., oci:...) and has to be fetched; a file of that name comes first."""
        transport, colon, _ = self.image.partition(":")
        if not colon or self.is_instance():
            return False
        return transport.replace("-", "").isalpha() and transport.islower() and not os.path.lexists(self.image)

    def is_instance(self) -> bool:
        """Whether the image is a running instance, instance://NAME."""
        return self.image.startswith(INSTANCE)

    def describe(self) -> str:
        """One line for --debug; values of --env are left out, they may be secrets."""
        shown = {slot: getattr(self, slot) for slot in self.__slots__ if slot not in ("env", "verb", "image", "argv")}
        given = [f"{slot}={value!a}" for slot, value in shown.items() if value]
        return " ".join([self.verb, ascii(self.image), *map(ascii, self.argv), *given, *(f"env:{key}" for key, _ in self.env)])


INSTANCE = "instance://"


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
                if option is None or option.state in (LATER, NEVER):
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
            if word == "instance" and words:
                word = {"start": "start", "run": "instance run"}.get(words.pop(), "")
            if word not in RUNS:
                return None
            verb, known = word, names(word)
            continue
        return None if not word or (verb in ("exec", *STARTS) and not words) else (verb, values, word, words[::-1])
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

    def words(*given: str | None) -> list[str]:
        return [word for value in given if value for word in value.split(",") if word]

    options = Options()
    options.program, options.verb, options.image, options.argv, options.name = program, verb, image, argv, ""
    if verb in STARTS:
        options.name, *options.argv = argv
    for option in OPTIONS:
        if option.kind == FLAG and option.slot in Options.__slots__:
            setattr(options, option.slot, values.get(option.slot) is True)
    if options.compat:
        options.containall = options.no_init = options.no_umask = options.no_eval = options.writable_tmpfs = True
    if options.containall:
        options.contain = options.cleanenv = options.pid = options.ipc = True
    options.pid = options.pid and not options.no_pid
    found = [bind for given in texts("bind") for bind in spelling.binds(given)]
    mounted = [bind for given in texts("mount") for bind in spelling.mounts(given)]
    told = found if program.rpartition("/")[2] == "singularity" else found + mounted  # SingularityCE keeps --mount to itself
    options.bound = list(dict.fromkeys(bind.target for bind in told))
    found += mounted
    options.binds = list(dict.fromkeys(found))  # said twice is said once
    options.data = [spelling.data(word) for given in texts("data") for word in spelling.fields(given, ",") if word]
    home = text("home")
    options.home = spelling.home_pair(home) if home else None
    options.cwd = text("cwd")
    options.no_mount = [spelling.no_mount(word) for word in words(*texts("no_mount"))]
    workdir = text("workdir")
    options.workdir = spelling.absolute(workdir) if workdir else None
    options.scratch = [spelling.inside("--scratch", word, word) for word in words(*texts("scratch"))]
    options.env = [pair for given in texts("env") for pair in spelling.assignments(given)]
    options.env_files = [spelling.absolute(path) for path in words(*texts("env_file"))]
    options.no_env = words(*texts("no_env"))
    options.overlays = [spelling.overlay(word) for word in words(*texts("overlay"))]
    size = text("tmpfs_size")
    options.tmpfs_size = spelling.size("--tmpfs-size", size) if size else 0
    options.share = spelling.share(text("share") or ("step" if options.sharens else "auto"))
    hostname = text("hostname")
    options.hostname = spelling.hostname(hostname) if hostname else None
    options.uts = options.uts or bool(options.hostname)
    options.net = spelling.is_net(options.net, text("network"))
    options.dns = [spelling.address(word) for word in words(text("dns"))]
    options.uid, options.gid = spelling.security(words(*texts("security")))
    options.add_caps = [spelling.capability(word) for word in words(text("add_caps"))]
    options.drop_caps = [spelling.capability(word) for word in words(text("drop_caps"))]
    options.fusemounts = texts("fusemount")
    options.limits = {option.slot: value for option in LIMITS if (value := text(option.slot))}
    cgroups = text("apply_cgroups")
    options.apply_cgroups = spelling.absolute(cgroups) if cgroups else None
    options.shell, options.arch, options.authfile = text("shell"), text("arch"), text("authfile")
    options.app, options.pid_file = text("app"), text("pid_file")
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
            if option.state in (LATER, NEVER):
                if BOOLEANS.get(ours[name], True):
                    raise refused(option, name)
                continue
            if option.kind == FLAG:
                settled[option.slot] = BOOLEANS[ours[name]]
            else:
                put(settled, option, ours[name])
    return settled


def refused(option: Option, given: str) -> UsageError:
    """The refusal of an option that the peers have; `given` is how the user wrote it."""
    what = given if given in option.names else f"{given} (which means {option.names[0]})"
    if option.state == NEVER:
        return UsageError(f"{what} cannot be had without privileges: {option.help}")
    return UsageError(f"{what} is an option of Apptainer that this release of sciexec lacks", "`sciexec run --help` lists what it has")
