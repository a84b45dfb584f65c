#!/bin/sh
# Makes the images in which the test-suite's workflow engines run their jobs, out of Debian's packages.
#
#   recipes/clients-image.sh LAYOUT
#
# LAYOUT becomes an OCI layout with three images, each the one before with a layer more:
#
# small    C library, bash, coreutils, and what the engines' wrappers call: awk, find, grep, ps, sed, tar ...
# python   Python with its standard library
# node     Node.js
set -eu
layout=$1
. "$(dirname "$0")/debian-layers.sh"

fetch small base-files base-passwd bash coreutils dash debianutils findutils grep gzip hostname libc-bin mawk procps sed tar
fetch python python3
fetch node nodejs
unpack small
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
ln -s mawk "$root/usr/bin/awk" # what update-alternatives would do
unpack python
ln -s python3 "$root/usr/bin/python" # as the images of docker.io have it
unpack node

oci init --layout "$layout"
oci new --image "$layout:small"
before=small
for image in small python node; do
    [ "$image" = small ] || oci tag --image "$layout:$before" "$image"
    rm -rf "$work/$image.root/usr/share/doc" "$work/$image.root/usr/share/man" "$work/$image.root/usr/share/info"
    oci insert --rootless --image "$layout:$image" "$work/$image.root" /
    oci config --image "$layout:$image" --config.cmd bash --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    before=$image
done
oci config --image "$layout:python" --config.env "MADE_OF=Debian's packages"
