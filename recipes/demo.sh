#!/bin/sh
# Imports a Docker image without Docker and runs it as an ordinary user.
#
#   recipes/demo.sh [IMAGE [COMMAND...]]
#
# IMAGE is anything that `sciexec pull` takes, such as docker://debian:12.  Without it a real Docker image with Python and NumPy
# is made on the spot out of Debian's packages, and the climate model in it is run.
set -eu
. "$(dirname "$0")/place.sh"
image=${1:-}
[ $# -eq 0 ] || shift

show() { echo "\$ $*"; as_user "$@"; }

demo=$PLACE/demo
mkdir -p "$demo"
[ "$(id -u)" != 0 ] || chown "$ORDINARY:" "$demo"
if [ -z "$image" ]; then
    command -v apt-get >/dev/null || die "the demonstration's image is made of Debian packages; name another: make demo IMAGE=docker://..."
    recipe=$(cat "$TREE/recipes/demo-image.sh" "$TREE/recipes/climate.py" | sha256sum)
    if [ "$(cat "$demo/recipe" 2>/dev/null)" != "$recipe" ]; then
        fresh_lists
        as_user "$TREE/recipes/demo-image.sh" "$demo/climate.docker.tar"
        echo "$recipe" | as_user tee "$demo/recipe" >/dev/null
    fi
    image=docker-archive:climate.docker.tar
fi
cd "$demo"
say "as $(as_user id -un), uid $(as_user id -u), in $demo"
show sciexec pull --force demo.sif "$image"
show sciexec inspect demo.sif
if [ $# -eq 0 ]; then show sciexec run demo.sif; else show sciexec exec demo.sif "$@"; fi
