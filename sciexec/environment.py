"""Host, image and user variables -> the environment, and the command, with which the payload is executed.

One rule, from the weakest to the strongest:

    host < image < user                     user: SINGULARITYENV_X < APPTAINERENV_X < SCIEXECENV_X < --env X=...
    HOME, *_CONTAINER, *_NAME and their like are the runtime's own and nobody's to change.

An image of ours says how it wants to be started in a small object beside the file system, read before anything is mounted:

    "sciexec-start 1" NUL     then records, each a letter and its text, closed by NUL, in this order:
    "E" NAME "=" VALUE  NUL   ENV           0 or more, a later one replaces an earlier one
    "N" ARGUMENT        NUL   ENTRYPOINT    0 or more
    "C" ARGUMENT        NUL   CMD           0 or more

Its values are data: they reach execve(2) byte for byte, no shell reads them, and the image needs none.  Every other image says
it in scripts, /.singularity.d/env/*.sh, which only the image's own shell may evaluate, inside: see scripts.py.

Text is str with surrogateescape throughout, as os.environ has it: any bytes survive, and execve gives them back unchanged.
Source: Apptainer's user guide, "Environment and Metadata"; its behaviour where the guide is silent.
"""

from __future__ import annotations

import errno
import os

from sciexec.errors import HostError, ImageError, SciexecError, UsageError, escaped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import NoReturn

    from sciexec.scripts import Scripts

MAGIC = b"sciexec-start 1\0"
LARGEST_START = 4 << 20  # bytes; execve(2) takes a quarter of the stack's limit, 2 MiB where nobody changed it

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_BOUND = 120_000  # bytes of the variable that tells the binds, of which a run may have thousands; execve(2) takes 131072
LIBRARIES = "/.singularity.d/libs"  # where host libraries are bound
SCRIPTS = "/.singularity.d/env"
TEST = "/.singularity.d/test"
STARTSCRIPT = "/.singularity.d/startscript"
RUNSCRIPTS = ("/.singularity.d/runscript", "/singularity")  # the second: images of Singularity 2
APPS = "/scif/apps"  # each a directory; source: the Scientific Filesystem's specification

# What passes with --cleanenv; everything else of the host stays outside.
TERMINAL_AND_PROXIES = frozenset("TERM http_proxy https_proxy no_proxy all_proxy ftp_proxy".split()) | frozenset(
    "HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY FTP_PROXY".split()
)
# The host's own of these would be wrong inside: its paths, its prompt, the state of its shell.
STAYS_OUTSIDE = frozenset("HOME PATH LD_LIBRARY_PATH PS1 PS2 PS4 PROMPT_COMMAND IFS OPTIND SHELLOPTS BASHOPTS PPID _".split())
PREFIXES = ("SCIEXEC", "APPTAINER", "SINGULARITY")  # strongest first
USER_PREFIXES = tuple(f"{prefix}ENV_" for prefix in reversed(PREFIXES))
OUR_PREFIXES = (*USER_PREFIXES, *(f"{prefix}_" for prefix in PREFIXES))
RUNTIMES_OWN = frozenset(
    ["HOME", *(f"{p}_{key}" for p in PREFIXES for key in "CONTAINER NAME BIND ENVIRONMENT COMMAND SHELL APPNAME INSTANCE".split())]
)
PATH_PIECES = frozenset("PREPEND_PATH APPEND_PATH PREPEND_LD_LIBRARY_PATH APPEND_LD_LIBRARY_PATH".split())
PYTHONS_LOCALES = ("C.UTF-8", "C.utf8", "UTF-8")


# --- under which name ------------------------------------------------------------------------------------------------------


class Name:
    """What a container shows of the name under which sciexec was called: people look at the prompt, programs at the variables.

    Arguments:
        prompt: of an interactive shell.  prefixes: of the variables that are set inside.
    """

    __slots__ = ("prefixes", "prompt")

    def __init__(self, prompt: str, prefixes: tuple[str, ...]) -> None:
        self.prompt = prompt
        self.prefixes = prefixes


NAMES = {"apptainer": Name("Apptainer> ", PREFIXES), "singularity": Name("Singularity> ", ("SINGULARITY",))}
SCIEXEC = Name("sciexec> ", PREFIXES)


def name(program: str) -> Name:
    """The name under which `program` (argv[0] or its last part) appears."""
    return NAMES.get(program.rpartition("/")[2], SCIEXEC)


# --- the start object -------------------------------------------------------------------------------------------------------


class Start:
    """How an image wants to be started: ENV as (name, value) in order, ENTRYPOINT and CMD as lists of arguments."""

    __slots__ = ("command", "entrypoint", "environment")

    def __init__(self, environment: list[tuple[str, str]], entrypoint: list[str], command: list[str]) -> None:
        self.environment = environment
        self.entrypoint = entrypoint
        self.command = command


def dump(env: Iterable[str], entrypoint: Iterable[str], cmd: Iterable[str]) -> bytes:
    """The start object of an image.

    Arguments:
        env: "NAME=VALUE" as in an OCI image's config.Env; "NAME" alone is NAME with an empty value, as a name cannot come
            from a host; an entry without a name is left out.
        entrypoint, cmd: config.Entrypoint and config.Cmd.

    Raises ImageError for text that execve(2) cannot take (a NUL, a character that no UTF-8 has).
    """
    records = [("E", text if "=" in text else f"{text}=") for text in env if text.partition("=")[0]]
    records += [("N", text) for text in entrypoint]
    records += [("C", text) for text in cmd]
    parts = [MAGIC]
    for tag, text in records:
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise ImageError(f"writing the start of the image: {text[:60]!a} has no UTF-8 form") from error
        if b"\0" in raw:
            raise ImageError(f"writing the start of the image: {text[:60]!a} holds a NUL character")
        parts.append(tag.encode("ascii") + raw + b"\0")
    return b"".join(parts)


def load(data: bytes, name: str = "image") -> Start:
    """The start object in `data`; `name` is the image's, for messages.  Raises ImageError where it is not one."""
    if not data.startswith(MAGIC) or not data.endswith(b"\0") or len(data) > LARGEST_START:
        raise ImageError(f"reading {name}: its sciexec.start object is damaged or of a later version")
    start = Start([], [], [])
    before = "E"
    for raw in data[len(MAGIC) : -1].split(b"\0") if len(data) > len(MAGIC) else ():
        record = raw.decode("utf-8", "surrogateescape")
        tag, text = record[:1], record[1:]
        key, equals, value = text.partition("=")
        if not tag or tag not in "ENC" or "ENC".index(tag) < "ENC".index(before) or (tag == "E" and not (key and equals)):
            raise ImageError(f"reading {name}: its sciexec.start object has a malformed record {record[:60]!a}")
        before = tag
        if tag == "E":
            start.environment.append((key, value))
        else:
            (start.entrypoint if tag == "N" else start.command).append(text)
    return start


# --- the host's and the user's variables ------------------------------------------------------------------------------------


def host() -> dict[str, str]:
    """The environment that the caller gave us.

    os.environ has one variable too many: started in the C locale, Python sets LC_CTYPE for its children (PEP 538), and an
    isolated interpreter cannot be told not to.  The kernel still has the original.
    """
    given = dict(os.environ)
    if given.get("LC_CTYPE") in PYTHONS_LOCALES:
        try:
            with open("/proc/self/environ", "rb", buffering=0) as file:
                before = file.read()
                while more := file.read():
                    before += more
        except OSError:  # no /proc: one harmless variable more
            return given
        original = [entry[9:] for entry in before.split(b"\0") if entry.startswith(b"LC_CTYPE=")]
        if original:
            given["LC_CTYPE"] = os.fsdecode(original[0])
        else:
            del given["LC_CTYPE"]
    return given


def is_name(text: str) -> bool:
    """Whether a shell would take `text` as a variable's name, [A-Za-z_][A-Za-z0-9_]*; others, as BASH_FUNC_ml%%, stay outside."""
    return text.isascii() and text.isidentifier()


def inherited(host: Mapping[str, str], cleanenv: bool, no_env: Sequence[str] = ()) -> dict[str, str]:
    """What of the host's environment is seen inside where the image says nothing else."""
    if cleanenv:
        return {**{key: value for key, value in host.items() if key in TERMINAL_AND_PROXIES and key not in no_env}, "LANG": "C"}
    stays = STAYS_OUTSIDE.union(no_env)
    return {key: value for key, value in host.items() if key not in stays and is_name(key) and not key.startswith(OUR_PREFIXES)}


def wishes(host: Mapping[str, str], env: Sequence[tuple[str, str]]) -> dict[str, str]:
    """NAME -> VALUE of what the user wants set inside whatever host and image say, empty values too.

    Four names are no variables but pieces of search paths: PREPEND_PATH, APPEND_PATH, and the same of LD_LIBRARY_PATH.
    """
    given = [(key[len(prefix) :], value) for prefix in USER_PREFIXES for key, value in host.items() if key.startswith(prefix)]
    return {key: value for key, value in (*given, *env) if is_name(key) and key not in RUNTIMES_OWN}


def searched(name: str, images: str, user: Mapping[str, str]) -> str:
    """PATH or LD_LIBRARY_PATH: the image's, or the user's, in which $NAME stands for the image's; then what is put around it."""
    value = user.get(name) or images
    if value != images:
        from sciexec import scripts

        value = images.join(scripts.around(value, name))
    if name == "LD_LIBRARY_PATH" and LIBRARIES not in value.split(":"):
        value = joined(value, LIBRARIES)
    return joined(user.get(f"PREPEND_{name}", ""), value, user.get(f"APPEND_{name}", ""))


def joined(*paths: str) -> str:
    """Search paths put together; an empty one adds no colon, which would mean the current directory."""
    return ":".join(path for path in paths if path)


def with_defaults(path: str) -> str:
    """PATH with the directories that every image is expected to have in it, behind its own."""
    have = path.split(":")
    return joined(path, *(directory for directory in DEFAULT_PATH.split(":") if directory not in have))


# --- the payload ------------------------------------------------------------------------------------------------------------

class Payload:
    """What is executed inside, as far as the host can know: which scripts and shells the image has is seen at the end only.

    Arguments:
        verb: run, exec, shell or test.  argv: as the user gave it; for an image of ours already joined with ENTRYPOINT and CMD.
        given: its environment where no script has a say.
        scripts: how the image's scripts, if it has any, make the environment; None where they are not asked.
        shell: for `shell`, the one asked for.  app: the SCIF application, or "".
    """

    __slots__ = ("app", "argv", "given", "scripts", "shell", "verb")

    def __init__(
        self, verb: str, argv: Sequence[str], given: dict[str, str], *, scripts: Scripts | None, shell: str | None, app: str
    ) -> None:
        self.verb = verb
        self.argv = list(argv)
        self.given = given
        self.scripts = scripts
        self.shell = shell
        self.app = app

    def describe(self) -> str:
        """One line for --debug: what will be executed; the environment is left out, it may hold secrets."""
        how = "after the image's scripts" if self.scripts else "with ENV of the image"
        return f"{self.verb} {' '.join(map(ascii, self.argv)) or '(the image decides)'} {how}, {len(self.given)} variables"

    def command(self) -> list[str]:
        """argv, now that we stand inside: the runscript, the shell and their like are looked for in the root as it is.

        Raises ImageError for a `run` of an image of ours that names nothing to run, and for an application that is not there.
        """
        if self.app:
            self.check_app()
        if self.verb == "shell":
            if self.shell:
                return [self.shell, *self.argv]
            # without --norc the prompt of the user's ~/.bashrc would hide where one is
            return ["/bin/bash", "--norc", *self.argv] if is_program("/bin/bash") else ["/bin/sh", *self.argv]
        if self.verb == "run" and self.app:
            return [f"{APPS}/{self.app}/scif/runscript", *self.argv]
        if self.verb == "run":
            if not self.scripts and not self.argv:
                raise ImageError("the image has neither ENTRYPOINT nor CMD", "name a command behind it")
            for script in RUNSCRIPTS if self.scripts else ():
                if is_program(script):
                    return [script, *self.argv]
            return self.argv or ["/bin/sh"]
        if self.verb == "start":
            start = f"{APPS}/{self.app}/scif/startscript" if self.app else STARTSCRIPT
            return [start, *self.argv] if is_program(start) else []
        if self.verb == "test":
            test = f"{APPS}/{self.app}/scif/test" if self.app else TEST
            # an image without a test passes it: batch systems ask before every job
            return [test, *self.argv] if is_program(test) else []
        return self.argv

    def check_app(self) -> None:
        """Raises ImageError where the image does not have the application, or the application not what the verb starts."""
        if not os.path.isdir(f"{APPS}/{self.app}"):
            raise ImageError(f"the image has no application {escaped(self.app)}", "`sciexec inspect --list-apps IMAGE` lists those it has")
        file = {"run": "runscript", "test": "test"}.get(self.verb)
        if file and not is_program(f"{APPS}/{self.app}/scif/{file}"):
            raise ImageError(f"the application {escaped(self.app)} has no {file}")

    def execute(self) -> NoReturn:
        """Become the payload.  Call it inside the container, in the directory where the payload shall start, as the last step.

        Raises SciexecError where the program is not there or cannot be executed.
        """
        argv = self.command()
        if not argv:
            os.write(1, b"The image has no test.\n")
            os._exit(0)
        scripts = self.scripts
        if scripts and not is_program("/bin/sh"):
            argv = self.without_shell(argv, scripts)
        elif scripts and (os.path.isdir(SCRIPTS) or scripts.needed):
            execute(scripts.command(os.getuid(), argv), {**scripts.own, "PATH": DEFAULT_PATH})
        if "PWD" in self.given and not is_here(self.given["PWD"]):
            self.given["PWD"] = os.getcwd()
        execute(argv, self.given)

    def without_shell(self, argv: list[str], scripts: Scripts) -> list[str]:
        """argv in an image that has no shell for its scripts: what they say about an OCI image can be read without one."""
        from sciexec import assignments  # plan() has loaded it

        self.given = outcome(scripts.host, assignments.image(SCRIPTS, scripts.own), scripts.user, scripts.own)
        parts = assignments.oci(argv[0]) if argv[0] in RUNSCRIPTS else None
        return [*parts[0], *(self.argv or parts[1])] if parts else argv


def outcome(host: Mapping[str, str], image: Mapping[str, str], user: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment, where no script has a say: each of these overrides those in front of it."""
    values = {key: value for key, value in user.items() if key not in PATH_PIECES}
    given = {**host, **image, **values, **own}
    for key, value in image.items():
        if not value and key in host and key not in user and key not in own:
            del given[key]  # defined empty by the image: it shall not be there
    given["PATH"] = searched("PATH", with_defaults(image.get("PATH", "")), user)
    given["LD_LIBRARY_PATH"] = searched("LD_LIBRARY_PATH", joined(image.get("LD_LIBRARY_PATH", ""), LIBRARIES), user)
    return given


def plan(
    verb: str,
    argv: Sequence[str],
    *,
    host: Mapping[str, str],
    start: Start | None,
    image: str,
    home: str,
    program: str = "sciexec",
    cleanenv: bool = False,
    no_env: Sequence[str] = (),
    no_eval: bool = False,
    env: Sequence[tuple[str, str]] = (),
    binds: Sequence[str] = (),
    bound: Sequence[str] = (),
    shell: str | None = None,
    app: str = "",
    instance: str = "",
) -> Payload:
    """The payload, decided without looking at anything but the arguments.

    Arguments:
        verb: run, exec, shell or test.  argv: everything behind the image on the command line.
        host: the caller's environment, host().
        start: the image's start object; None for an image that has none.
        image: its absolute path.  home: the home directory's path inside.
        program: the name under which sciexec was called.
        no_env: names of the host's variables that stay outside.
        env: (name, value) of every --env-file and --env, in order.
        binds: destinations of the binds; one over /.singularity.d means that the user wants those scripts.
        bound: the destinations that the payload is told of.
        shell: the value of --shell.  app: that of --app; an application's environment is made by scripts.
        instance: the name of the instance that the payload runs in, or "".
    """
    if "/" in app or app in (".", ".."):
        raise UsageError(f"--app {escaped(app)}: not the name of an application", "`sciexec inspect --list-apps IMAGE` lists them")
    known = name(program)
    places = ",".join(bound)
    if len(os.fsencode(places)) > LONGEST_BOUND:
        places = ""
    user = wishes(host, env)
    own = {"HOME": home}
    for prefix in known.prefixes:
        own[f"{prefix}_CONTAINER"] = image
        own[f"{prefix}_NAME"] = image.rpartition("/")[2]
        if prefix != "SCIEXEC":
            own[f"{prefix}_BIND"] = places
            own[f"{prefix}_ENVIRONMENT"] = f"{SCRIPTS}/91-environment.sh"
            own[f"{prefix}_COMMAND"] = verb
            if instance:
                own[f"{prefix}_INSTANCE"] = instance
            if no_eval:
                own[f"{prefix}_NO_EVAL"] = "1"
            if app:
                own[f"{prefix}_APPNAME"] = app
    defaults = {
        "PS1": known.prompt,
        # an interactive bash takes PS1 from the user's ~/.bashrc; this puts ours back, once
        "PROMPT_COMMAND": f'PS1="{known.prompt}"; unset PROMPT_COMMAND',
    }
    hosts = {**inherited(host, cleanenv, no_env), **defaults}
    images: dict[str, str] = {}
    asked: Scripts | None = None
    if start is None or app or any(map(over_scripts, binds)):
        from sciexec import assignments, scripts  # noqa: F401  # here, as no module can be loaded inside

        asked = scripts.Scripts(own, user, hosts, evaluate=start is None and not no_eval)
    else:
        images = dict(start.environment)
        if verb == "run":
            argv = [*start.entrypoint, *(argv or start.command)]
    return Payload(verb, argv, outcome(hosts, images, user, own), scripts=asked, shell=shell, app=app)


def over_scripts(destination: str) -> bool:
    """Whether a bind there replaces scripts of the image, as environment modules of software catalogues do."""
    return (destination + "/").startswith("/.singularity.d/") and not (destination + "/").startswith(LIBRARIES + "/")


def is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)


def is_here(path: str) -> bool:
    """Whether `path` names the directory we are in, links and all, as $PWD should."""
    try:
        return path.startswith("/") and os.path.samestat(os.stat(path), os.stat("."))
    except OSError:
        return False


def execute(argv: list[str], environment: Mapping[str, str]) -> NoReturn:
    """execve(2) with a search along `environment`'s PATH, as execvpe; the messages are those that clients look for.

    Raises SciexecError (its text is Apptainer's: "executable file not found in $PATH"), ImageError, HostError.
    """
    program = argv[0]
    shown = program if program.isprintable() else ascii(program)[1:-1]  # no codec can be loaded in here
    candidates = [program]
    if not program:
        candidates = []
    elif "/" not in program:
        candidates = [f"{directory or '.'}/{program}" for directory in environment.get("PATH", DEFAULT_PATH).split(":")]
    refused: OSError | None = None
    for path in candidates:
        try:
            os.execve(path, argv, environment)
        except OSError as error:
            if error.errno == errno.ENOENT and os.path.isfile(path):
                raise ImageError(f'"{shown}": the interpreter that it names is not in the image') from error
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                raise unexecutable(shown, error) from error
            if error.errno == errno.EACCES:
                refused = error
        except ValueError as error:  # an embedded NUL
            raise SciexecError(f'"{shown}": {error}') from error
    if refused is not None and "/" in program:
        raise SciexecError(f'"{shown}": permission denied') from refused
    if "/" in program:
        raise SciexecError(f"stat {shown}: no such file or directory")
    raise SciexecError(f'"{shown}": executable file not found in $PATH')


def unexecutable(shown: str, error: OSError) -> SciexecError:
    if error.errno == errno.E2BIG:
        return HostError(
            f'"{shown}": arguments and environment are larger than the kernel takes',
            "one string may have 128 KiB, all together a quarter of the stack's limit: raise it with `ulimit -s`",
        )
    if error.errno == errno.ENOEXEC:
        return ImageError(f'"{shown}": exec format error', "a program for another machine, or a script without a #! line")
    return HostError(f'executing "{shown}": {error.strerror}')
