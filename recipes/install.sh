#!/bin/sh
# Installs sciexec from this tree into a virtual environment of the system's Python; a second call does nothing.
#
#   recipes/install.sh [EXTRA]     EXTRA: an extra of pyproject.toml, such as test
set -eu
. "$(dirname "$0")/place.sh"
extra=${1:-}

if [ "$(id -u)" = 0 ]; then
    if ! id "$ORDINARY" >/dev/null 2>&1; then
        say "called by root: making the ordinary user \"$ORDINARY\" (home $PLACE/home)"
        useradd --user-group --home-dir "$PLACE/home" --shell /bin/sh "$ORDINARY"
    fi
    mkdir -p "$PLACE"
    install -d -m 700 -o "$ORDINARY" -g "$ORDINARY" "$PLACE/home" # also where the user outlived its home
    if [ ! -e /dev/fuse ]; then modprobe fuse || mknod -m 666 /dev/fuse c 10 229; fi
    chmod 666 /dev/fuse # as udev does on every desktop and cluster
    mkdir -p "$TREE"
    find "$TREE" -mindepth 1 -delete
    tar -C "$SOURCE" --exclude=./.git --exclude=./build --exclude=__pycache__ --exclude='./.*_cache' -cf - . |
        tar -C "$TREE" --no-same-owner -xf -
    chmod -R a+rX "$TREE"
fi

cd "$TREE"
stamp=$VENV/sciexec.stamp
sum=$({ "$PYTHON" -VV; echo "$PYTHON $TREE"; cat pyproject.toml setup.py bin/* sciexec/native/* sciexec/*.py sciexec/*.conf convert/*.py; } | sha256sum)
case "$(cat "$stamp" 2>/dev/null) " in
"$sum $extra "* | "$sum ${extra:-test} "*) ;; # with more than was asked for is good as well
*)
    say "installing sciexec${extra:+ with the extra \"$extra\"} into $VENV"
    umask 022
    [ "$("$VENV/bin/python3" -VV 2>/dev/null)" = "$("$PYTHON" -VV)" ] || "$PYTHON" -m venv --clear "$VENV"
    rm -rf build/lib* build/bdist* build/temp* # setuptools would pack modules that are long gone
    "$VENV/bin/python3" -m pip install --quiet --disable-pip-version-check "$TREE${extra:+[$extra]}"
    echo "$sum $extra" >"$stamp"
    ;;
esac
[ "$(id -u)" != 0 ] || chown -R "$ORDINARY:" "$TREE"
