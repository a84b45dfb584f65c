"""The scripts of an image: the shell code that evaluates them inside, and how the user's values are written for it.

An image that was not made by sciexec says in /.singularity.d/env/*.sh how its environment is made.  Only the image's own shell
may evaluate that, inside, after the mounts, so that scripts which the user bound there count.  It gets everything in arguments:

    sh -c SCRIPT sciexec UID PATH_BEFORE PATH_AFTER LIBRARIES_BEFORE LIBRARIES_AFTER
       --user NAME=VALUE... --eval NAME=TEXT... --host NAME=VALUE... -- COMMAND ARGUMENT...

--user is what overrides the image, as it is; --eval the same as text between double quotes, in which $ and ` have a meaning;
--host fills the gaps that the image leaves.  The four pieces of search paths are such texts as well.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Shells set variables by themselves (bash: HOSTNAME, TERM=dumb); they are forgotten first, or the host's would seem to be set
# already.  A function sources the scripts because `set -- x` in one of them would replace our arguments; `command export`
# because a failing export (read-only in this shell) would end the shell.  Any POSIX shell will do: dash, bash, busybox, mksh.
# Errors of builtins go to a closed descriptor, as /dev/null may be left out or missing.
# A value that is no shell text ends most of them, past every test of ours: hence the trap.
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
    trap - EXIT
    printf 'FATAL: %s\n' "$1" >&2
    exit 255
}
sciexec_forget() {
    sciexec_part=
    for sciexec_word do
        case $sciexec_word in
        --) return ;;
        --*) sciexec_part=$sciexec_word ;;
        *) case $sciexec_part in --host) command unset -v "${sciexec_word%%=*}" 2>&- ;; esac ;;
        esac
    done
}
sciexec_evaluate() {
    sciexec_name=$1 sciexec_uid=${UID+known}
    trap 'sciexec_fatal "setting $sciexec_name: the shell of the image cannot evaluate the value"' EXIT
    case $sciexec_uid in '') UID=$sciexec_id ;; esac
    eval "sciexec_value=\"$2\"" || :
    case $sciexec_uid in '') unset UID ;; esac
    trap - EXIT
}
sciexec_forget "$@"
sciexec_source
set +aefu
PATH=${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-/.singularity.d/libs}
sciexec_id=$1 sciexec_count=0 sciexec_part=
for sciexec_word do
    sciexec_count=$((sciexec_count + 1))
    if [ "$sciexec_count" -le 5 ]; then continue; fi
    case $sciexec_word in
    --) break ;;
    --*) sciexec_part=$sciexec_word; continue ;;
    esac
    sciexec_name=${sciexec_word%%=*}
    case $sciexec_part in
    --user) command export "$sciexec_word" 2>&- ;;
    --eval)
        sciexec_evaluate "$sciexec_name" "${sciexec_word#*=}"
        command export "$sciexec_name=$sciexec_value" 2>&- ;;
    --host)
        eval "sciexec_is=\${$sciexec_name+set}\${$sciexec_name:+full}"
        case $sciexec_is in
        '') command export "$sciexec_word" 2>&- ;;
        set) unset "$sciexec_name" ;;
        esac ;;
    esac
done
case ":$LD_LIBRARY_PATH:" in
*:/.singularity.d/libs:*) ;;
*) LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/.singularity.d/libs ;;
esac
sciexec_evaluate PREPEND_PATH "$2"
PATH=${sciexec_value:+$sciexec_value:}$PATH
sciexec_evaluate APPEND_PATH "$3"
PATH=$PATH${sciexec_value:+:$sciexec_value}
sciexec_evaluate PREPEND_LD_LIBRARY_PATH "$4"
LD_LIBRARY_PATH=${sciexec_value:+$sciexec_value:}$LD_LIBRARY_PATH
sciexec_evaluate APPEND_LD_LIBRARY_PATH "$5"
LD_LIBRARY_PATH=$LD_LIBRARY_PATH${sciexec_value:+:$sciexec_value}
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

SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH")
PIECES = ("PREPEND_PATH", "APPEND_PATH", "PREPEND_LD_LIBRARY_PATH", "APPEND_LD_LIBRARY_PATH")


class Scripts:
    """The arguments of SCRIPT that are known before the container is.

    Arguments:
        own: the runtime's variables.  user: the user's, pieces of search paths too.  host: the host's.
        evaluate: whether $ and ` mean something in the user's values; `needed` says that one of them has such a thing.
    """

    __slots__ = ("host", "needed", "own", "pieces", "user", "words")

    def __init__(self, own: Mapping[str, str], user: Mapping[str, str], host: Mapping[str, str], *, evaluate: bool) -> None:
        texts = {}
        self.needed = False
        for name, value in user.items():
            if evaluate and any(character in value for character in "$`\\"):
                texts[name] = meant(value)
                self.needed = True
            elif name in PIECES:
                texts[name] = literal(value)
            elif name in SEARCH_PATHS and len(pieces := around(value, name)) > 1:
                texts[name] = f"${{{name}}}".join(map(literal, pieces))
        self.own, self.user, self.host = own, user, host
        self.pieces = [texts.pop(name, "") for name in PIECES]
        # an empty PATH is none, and the shell knows better than the host where it stands
        given = {name: value for name, value in user.items() if name not in (*texts, *PIECES) and (value or name != "PATH")}
        filled = {name: value for name, value in host.items() if name not in user and name not in ("PWD", "OLDPWD")}
        self.words = ["--user", *pairs({**own, **given}), "--eval", *pairs(texts), "--host", *pairs(filled), "--"]

    def command(self, uid: int, argv: list[str]) -> list[str]:
        """The image's shell with SCRIPT and what it needs, which in the end executes `argv`.  uid: the payload's, for $UID."""
        return ["/bin/sh", "-c", SCRIPT, "sciexec", str(uid), *self.pieces, *self.words, *argv]


def pairs(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


def literal(value: str) -> str:
    """`value` as text between double quotes, in which nothing has a meaning."""
    return "".join(f"\\{character}" if character in '\\"$`' else character for character in value)


def meant(value: str) -> str:
    """`value` as text between double quotes, in which $, ` and a backslash in front of them keep theirs; a quote is a quote."""
    text, escaped = "", False
    for character in value:
        text += f"\\{character}" if character == '"' and not escaped else character
        escaped = character == "\\" and not escaped
    return f"{text}\\" if escaped else text


def around(value: str, name: str) -> list[str]:
    """What stands before, between and behind every $NAME and ${NAME} in `value`."""
    pieces = []
    for part in value.split(f"${{{name}}}"):
        before, *others = part.split(f"${name}")
        for piece in others:
            if piece[:1] == "_" or piece[:1].isalnum():  # $PATHS is another variable
                before += f"${name}{piece}"
            else:
                pieces.append(before)
                before = piece
        pieces.append(before)
    return pieces
