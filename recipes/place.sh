# Sourced by the other recipes: where things go, and who does them.
#
#                 called by an ordinary user      called by root
#   PLACE         build/ in the source tree       /var/lib/sciexec
#   TREE          the source tree                 a copy of it that the user "sciexec" can read and write
#   VENV          $PLACE/venv                     $PLACE/venv, written by root, readable by all
#   as_root       sudo                            as it is
#   as_user       as it is                        the user "sciexec", made once
#
# A container runtime for ordinary users is shown and tested as an ordinary user, whoever types make.

SOURCE=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-/usr/bin/python3} # the system's own: pyenv's and conda's are not to be read by other users
ORDINARY=sciexec

if [ "$(id -u)" = 0 ]; then
    PLACE=/var/lib/sciexec
    TREE=$PLACE/tree
else
    PLACE=$SOURCE/build
    TREE=$SOURCE
fi
VENV=$PLACE/venv

say() { echo "== $*"; }

die() { echo "$0: $*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif ! command -v sudo >/dev/null; then
        die "this needs root and there is no sudo: ask your administrator for: $*"
    elif [ -t 0 ]; then
        sudo "$@"
    else
        sudo -n "$@"
    fi
}

as_user() {
    if [ "$(id -u)" = 0 ]; then
        (
            unset XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_CONFIG_HOME TMPDIR SUDO_USER SUDO_UID SUDO_GID
            umask 022
            HOME=$PLACE/home USER=$ORDINARY LOGNAME=$ORDINARY PATH=$VENV/bin:$PATH \
                exec setpriv --reuid "$ORDINARY" --regid "$ORDINARY" --init-groups "$@"
        )
    else
        PATH=$VENV/bin:$PATH "$@"
    fi
}

# fresh_lists: Debian's package lists, not older than an hour.
fresh_lists() {
    [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -mmin -600 2>/dev/null | head -n 1)" ] &&
        [ -n "$(find /var/lib/apt/lists -maxdepth 0 -mmin -60)" ] && return
    as_root apt-get update -q >/dev/null || say "apt-get update did not get every list; going on"
}
