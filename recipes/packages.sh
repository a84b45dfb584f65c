#!/bin/sh
# The system packages that sciexec needs, in one place; installs those that are missing.
#
#   recipes/packages.sh [--list] run|build|demo|test ...
#
#   run    what a host needs to run images: FUSE's server for SquashFS
#   build  what `pip install` needs: a compiler, Python's headers, libsquashfs's headers (squashfs-tools-ng)
#   demo   what makes the demonstration's Docker image without Docker
#   test   other implementations of the same formats and protocols, to test against
set -eu
. "$(dirname "$0")/place.sh"

# group  Debian, Ubuntu         Fedora; RHEL, Rocky and Alma with EPEL and CRB (- where there is none)
TABLE='
run      squashfuse             squashfuse
build    gcc                    gcc
build    libc6-dev              glibc-devel
build    python3-dev            python3-devel
build    python3-venv           python3-pip
build    libsquashfs-dev        squashfs-tools-ng-devel
demo     umoci                  -
demo     skopeo                 skopeo
test     squashfs-tools         squashfs-tools
test     squashfs-tools-ng      squashfs-tools-ng
test     umoci                  -
test     skopeo                 skopeo
test     docker-registry        -
test     libarchive-tools       bsdtar
test     openssl                openssl
test     busybox-static         busybox
test     psmisc                 psmisc
test     strace                 strace
test     fuse2fs                fuse2fs
test     fuse-overlayfs         fuse-overlayfs
test     e2fsprogs              e2fsprogs
test     mpich                  mpich
test     procps                 procps-ng
test     zsh                    zsh
test     fish                   fish
test     -                      libasan
test     -                      libubsan
test     -                      libtsan
'

list=
[ "${1:-}" = --list ] && { list=1; shift; }

if command -v apt-get >/dev/null; then
    column=2
    has() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }
    install() {
        fresh_lists
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qy --no-install-recommends "$@"
    }
elif command -v dnf >/dev/null; then
    column=3
    has() { rpm -q "$1" >/dev/null 2>&1; }
    install() { as_root dnf install -qy "$@"; }
else
    die "neither apt-get nor dnf here: install by hand what this file lists"
fi

missing=
for group; do
    for package in $(echo "$TABLE" | awk -v group="$group" -v column="$column" '$1 == group && $column != "-" { print $column }'); do
        if [ "$list" ]; then
            echo "$package"
        elif ! has "$package"; then
            case "$missing " in *" $package "*) ;; *) missing="$missing $package" ;; esac
        fi
    done
done
[ -z "$missing" ] && exit 0
say "installing:$missing"
log=$(mktemp)
# shellcheck disable=SC2086  # a list of words
install $missing >"$log" 2>&1 || { cat "$log" >&2; die "the system packages could not be installed"; }
rm -f "$log"
