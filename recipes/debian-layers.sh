# Sourced by the recipes that make images out of Debian's packages: no Docker, no root.
#
# The packages are this host's release's, fetched and verified by apt; umoci writes the layers.  $work is a directory of ours,
# gone at the end.

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
umask 022

# fetch NAME PACKAGE...: the packages and all they depend on, but for those of earlier calls, into $work/NAME
: >"$work/status" # apt takes the image to be empty
fetch() {
    name=$1; shift
    mkdir -p "$work/$name/partial"
    apt-get -qq -y --no-install-recommends --download-only -o Debug::NoLocking=1 -o Dir::State::status="$work/status" \
        -o Dir::Cache="$work/cache" -o Dir::Cache::archives="$work/$name" install "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    for package in "$work/$name"/*.deb; do
        { dpkg-deb --field "$package"; echo "Status: install ok installed"; echo; } >>"$work/status"
    done
}

# unpack NAME: the files of its packages into $work/NAME.root, without their scripts; /bin, /lib ... lead into /usr, as in every Debian
unpack() {
    root=$work/$1.root
    mkdir -p "$root/usr"
    for directory in bin sbin lib lib64; do mkdir -p "$root/usr/$directory"; ln -s "usr/$directory" "$root/$directory"; done
    for package in "$work/$1"/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -C "$root" --keep-directory-symlink --no-same-owner -xpf -
    done
}

oci() { umoci "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }; }
