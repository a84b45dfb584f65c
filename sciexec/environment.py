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
it in scripts, /.singularity.d/env/*.sh, which only the image's own shell may evaluate, inside: see SCRIPT.

Text is str with surrogateescape throughout, as os.environ has it: any bytes survive, and execve gives them back unchanged.
Source: Apptainer's user guide, "Environment and Metadata"; its behaviour where the guide is silent.
"""

from __future__ import annotations

import errno
import os

from sciexec.errors import HostError, ImageError, SciexecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import NoReturn

MAGIC = b"sciexec-start 1\0"
LARGEST_START = 4 << 20  # bytes; execve(2) takes a quarter of the stack's limit, 2 MiB where nobody changed it

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LIBRARIES = "/.singularity.d/libs"  # where host libraries are bound
SCRIPTS = "/.singularity.d/env"
TEST = "/.singularity.d/test"
STARTSCRIPT = "/.singularity.d/startscript"
RUNSCRIPTS = ("/.singularity.d/runscript", "/singularity")  # the second: images of Singularity 2

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


def inherited(host: Mapping[str, str], cleanenv: bool) -> dict[str, str]:
    """What of the host's environment is seen inside where the image says nothing else."""
    if cleanenv:
        return {**{key: value for key, value in host.items() if key in TERMINAL_AND_PROXIES}, "LANG": "C"}
    return {key: value for key, value in host.items() if key not in STAYS_OUTSIDE and is_name(key) and not key.startswith(OUR_PREFIXES)}


class Wishes:
    """What the user wants set inside, with the six variables that change a path instead of a value taken out.

    `values` holds NAME -> VALUE, set whatever host and image say, empty values too.  A value is literal: no $, no backquote
    means anything in it, but for $PATH in PATH itself, which people write to say "in front of" or "behind".
    """

    __slots__ = ("libraries_after", "libraries_before", "path_after", "path_before", "values")

    def __init__(self, host: Mapping[str, str], env: Sequence[tuple[str, str]]) -> None:
        wishes = [(key[len(prefix) :], value) for prefix in USER_PREFIXES for key, value in host.items() if key.startswith(prefix)]
        values = {key: value for key, value in (*wishes, *env) if is_name(key) and key not in RUNTIMES_OWN}
        self.path_before = values.pop("PREPEND_PATH", "")
        self.path_after = values.pop("APPEND_PATH", "")
        self.libraries_before = values.pop("PREPEND_LD_LIBRARY_PATH", "")
        self.libraries_after = values.pop("APPEND_LD_LIBRARY_PATH", "")
        path = values.get("PATH")
        if path is not None:
            marked = path.replace("${PATH}", "$PATH")
            if "$PATH" in marked:
                del values["PATH"]
                before, _, after = marked.partition("$PATH")
                self.path_before = joined(self.path_before, before.strip(":"))
                self.path_after = joined(after.strip(":"), self.path_after)
            elif not path:
                del values["PATH"]
        self.values = values


def joined(*paths: str) -> str:
    """Search paths put together; an empty one adds no colon, which would mean the current directory."""
    return ":".join(path for path in paths if path)


def with_defaults(path: str) -> str:
    """PATH with the directories that every image is expected to have in it, behind its own."""
    have = path.split(":")
    return joined(path, *(directory for directory in DEFAULT_PATH.split(":") if directory not in have))


# --- the payload ------------------------------------------------------------------------------------------------------------

# Evaluates the image's scripts in the image's shell.  They must not see the host's variables, so these come as arguments:
#
#     sh -c SCRIPT sciexec PATH_BEFORE PATH_AFTER LIBS_BEFORE LIBS_AFTER HOST=VALUE... --user USER=VALUE... -- COMMAND ARGUMENT...
#
# Shells set variables by themselves (bash: HOSTNAME, TERM=dumb); they are forgotten first, or the host's would seem to be set
# already.  A function sources the scripts because `set -- x` in one of them would replace our arguments; `command export`
# because a failing export (read-only in this shell) would end the shell.  Any POSIX shell will do: dash, bash, busybox, mksh.
SCRIPT = r"""
sciexec_source() {
    for sciexec_file in /.singularity.d/env/*.sh; do
        if [ ! -f "$sciexec_file" ] || [ ! -r "$sciexec_file" ]; then continue; fi
        . "$sciexec_file"
        case $sciexec_file in */10-docker*.sh) sciexec_default_path ;; esac
    done
}
sciexec_default_path() {
    for sciexec_dir in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
        case ":$PATH:" in *":$sciexec_dir:"*) ;; *) PATH=${PATH:+$PATH:}$sciexec_dir ;; esac
    done
}
sciexec_fatal() {
    printf 'FATAL: %s\n' "$1" >&2
    exit 255
}
sciexec_forget() {
    shift 4
    for sciexec_word do
        case $sciexec_word in --user) return ;; esac
        command unset -v "${sciexec_word%%=*}" 2>/dev/null
    done
}
sciexec_forget "$@"
sciexec_source
set +aefu
PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-/.singularity.d/libs}
sciexec_count=0 sciexec_user=
for sciexec_word do
    sciexec_count=$((sciexec_count + 1))
    if [ "$sciexec_count" -le 4 ]; then continue; fi
    case $sciexec_word in
    --) break ;;
    --user) sciexec_user=yes; continue ;;
    esac
    if [ -n "$sciexec_user" ]; then command export "$sciexec_word" 2>/dev/null; continue; fi
    sciexec_name=${sciexec_word%%=*}
    eval "sciexec_is=\${$sciexec_name+set}\${$sciexec_name:+full}"
    case $sciexec_is in
    '') command export "$sciexec_word" 2>/dev/null ;;
    set) unset "$sciexec_name" ;;
    esac
done
PATH=${1:+$1:}$PATH${2:+:$2}
LD_LIBRARY_PATH=${3:+$3:}$LD_LIBRARY_PATH${4:+:$4}
export PATH LD_LIBRARY_PATH
shift "$sciexec_count"
case $1 in
*/*)
    if [ ! -e "$1" ]; then sciexec_fatal "stat $1: no such file or directory"; fi
    if [ -d "$1" ] || [ ! -x "$1" ]; then sciexec_fatal "\"$1\": permission denied"; fi ;;
*)
    sciexec_rest=$PATH: sciexec_found=
    while [ -n "$sciexec_rest" ] && [ -z "$sciexec_found" ]; do
        sciexec_file=${sciexec_rest%%:*}
        sciexec_file=${sciexec_file:-.}/$1
        sciexec_rest=${sciexec_rest#*:}
        if [ -f "$sciexec_file" ] && [ -x "$sciexec_file" ]; then sciexec_found=yes; fi
    done
    if [ -z "$sciexec_found" ]; then sciexec_fatal "\"$1\": executable file not found in \$PATH"; fi ;;
esac
exec "$@"
"""


class Payload:
    """What is executed inside, as far as the host can know: which scripts and shells the image has is seen at the end only.

    Arguments:
        verb: run, exec or shell.  argv: as the user gave it; for an image of ours already joined with ENTRYPOINT and CMD.
        given: its environment where no script has a say.
        scripts: whether the image's scripts, if it has any, make the environment (and `run` its runscript).
        own, host, wishes: what such a script sees, what fills its gaps, what overrides it.
        shell: for `shell`, the one asked for.
    """

    __slots__ = ("argv", "given", "host", "own", "scripts", "shell", "verb", "wishes")

    def __init__(
        self,
        verb: str,
        argv: Sequence[str],
        given: dict[str, str],
        *,
        scripts: bool,
        own: dict[str, str],
        host: dict[str, str],
        wishes: Wishes,
        shell: str | None,
    ) -> None:
        self.verb = verb
        self.argv = list(argv)
        self.given = given
        self.scripts = scripts
        self.own = own
        self.host = host
        self.wishes = wishes
        self.shell = shell

    def describe(self) -> str:
        """One line for --debug: what will be executed; the environment is left out, it may hold secrets."""
        how = "after the image's scripts" if self.scripts else "with ENV of the image"
        return f"{self.verb} {' '.join(map(ascii, self.argv)) or '(the image decides)'} {how}, {len(self.given)} variables"

    def command(self) -> list[str]:
        """argv, now that we stand inside: the runscript, the shell and their like are looked for in the root as it is.

        Raises ImageError for a `run` of an image of ours that names nothing to run.
        """
        if self.verb == "shell":
            if self.shell:
                return [self.shell, *self.argv]
            # without --norc the prompt of the user's ~/.bashrc would hide where one is
            return ["/bin/bash", "--norc", *self.argv] if is_program("/bin/bash") else ["/bin/sh", *self.argv]
        if self.verb == "run":
            if not self.scripts and not self.argv:
                raise ImageError("the image has neither ENTRYPOINT nor CMD", "name a command behind it")
            for script in RUNSCRIPTS if self.scripts else ():
                if is_program(script):
                    return [script, *self.argv]
            return self.argv or ["/bin/sh"]
        if self.verb == "start":
            return [STARTSCRIPT, *self.argv] if is_program(STARTSCRIPT) else []
        if self.verb == "test":
            if not is_program(TEST):
                raise ImageError("the image has no test", "a %test section of its definition file makes one")
            return [TEST, *self.argv]
        return self.argv

    def script(self, argv: Sequence[str]) -> list[str]:
        """The image's shell with SCRIPT and what it needs, which in the end executes `argv`."""
        wishes = self.wishes
        words = [wishes.path_before, wishes.path_after, wishes.libraries_before, wishes.libraries_after]
        # the shell knows better than the host where it stands
        words += [f"{key}={value}" for key, value in self.host.items() if key not in ("PWD", "OLDPWD")]
        words += ["--user", *(f"{key}={value}" for key, value in {**wishes.values, **self.own}.items()), "--"]
        return ["/bin/sh", "-c", SCRIPT, "sciexec", *words, *argv]

    def execute(self) -> NoReturn:
        """Become the payload.  Call it inside the container, in the directory where the payload shall start, as the last step.

        Raises SciexecError where the program is not there or cannot be executed.
        """
        argv = self.command()
        if self.scripts and os.path.isdir(SCRIPTS) and is_program("/bin/sh"):
            execute(self.script(argv), {**self.own, "PATH": DEFAULT_PATH})
        if "PWD" in self.given and not is_here(self.given["PWD"]):
            self.given["PWD"] = os.getcwd()
        execute(argv, self.given)


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
    no_eval: bool = False,
    env: Sequence[tuple[str, str]] = (),
    binds: Sequence[str] = (),
    bound: str = "",
    shell: str | None = None,
    instance: str = "",
) -> Payload:
    """The payload, decided without looking at anything but the arguments.

    Arguments:
        verb: run, exec or shell.  argv: everything behind the image on the command line.
        host: the caller's environment, host().
        start: the image's start object; None for an image that has none.
        image: its absolute path.  home: the home directory's path inside.
        program: the name under which sciexec was called.
        env: (name, value) of every --env, in order.
        binds: destinations of the binds: one over /.singularity.d means that the user wants those scripts.
        bound: the binds as the user wrote them, told to the payload.
        shell: the value of --shell.  instance: the name of the instance that the payload runs in, or "".
    """
    known = name(program)
    wishes = Wishes(host, env)
    own = {"HOME": home}
    for prefix in known.prefixes:
        own[f"{prefix}_CONTAINER"] = image
        own[f"{prefix}_NAME"] = image.rpartition("/")[2]
        if prefix != "SCIEXEC":
            own[f"{prefix}_BIND"] = bound
            own[f"{prefix}_ENVIRONMENT"] = f"{SCRIPTS}/91-environment.sh"
            own[f"{prefix}_COMMAND"] = verb
            if instance:
                own[f"{prefix}_INSTANCE"] = instance
            if no_eval:
                own[f"{prefix}_NO_EVAL"] = "1"
    defaults = {
        "PS1": known.prompt,
        # an interactive bash takes PS1 from the user's ~/.bashrc; this puts ours back, once
        "PROMPT_COMMAND": f'PS1="{known.prompt}"; unset PROMPT_COMMAND',
    }
    hosts = inherited(host, cleanenv)
    scripts = start is None or any(map(over_scripts, binds))
    images = dict(start.environment) if start is not None and not scripts else {}
    if start is not None and not scripts and verb == "run":
        argv = [*start.entrypoint, *(argv or start.command)]
    emptied = [key for key, value in images.items() if not value and key in hosts]
    given = {**hosts, **defaults, **images, **wishes.values, **own}
    for key in emptied:
        if key not in wishes.values:
            del given[key]
    path = wishes.values.get("PATH") or with_defaults(images.get("PATH", ""))
    given["PATH"] = joined(wishes.path_before, path, wishes.path_after)
    libraries = wishes.values.get("LD_LIBRARY_PATH", joined(images.get("LD_LIBRARY_PATH", ""), LIBRARIES))
    given["LD_LIBRARY_PATH"] = joined(wishes.libraries_before, libraries, wishes.libraries_after)
    return Payload(verb, argv, given, scripts=scripts, own=own, host={**hosts, **defaults}, wishes=wishes, shell=shell)


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
