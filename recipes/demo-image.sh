#!/bin/sh
# Makes a real Docker image, as `docker save` writes it, out of Debian's packages: no Docker, no root.
#
#   recipes/demo-image.sh ARCHIVE
#
# layer 1   a small Debian: C library, bash, coreutils
# layer 2   Python, NumPy, BLAS and LAPACK
# layer 3   the climate model
# layer 4.. whiteouts: documentation removed, as the last line of many a Dockerfile does
set -eu
archive=$1
here=$(cd "$(dirname "$0")" && pwd)
. "$here/debian-layers.sh"

echo "== fetching Debian packages"
fetch base base-files base-passwd bash coreutils dash libc-bin
fetch numpy python3-numpy

echo "== making the image"
unpack base
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
unpack numpy
for library in blas lapack; do # what update-alternatives would do
    (cd "$root"/usr/lib/*/"$library" && ln -s "$library/lib$library.so.3" ..)
done
mkdir -p "$work/model.root/opt/climate"
install -m 755 "$here/climate.py" "$work/model.root/opt/climate/climate.py"

image=$work/oci:climate
oci init --layout "$work/oci"
oci new --image "$image"
for layer in base numpy model; do oci insert --rootless --image "$image" "$work/$layer.root" /; done
for gone in /usr/share/doc /usr/share/man /usr/share/info; do oci insert --rootless --image "$image" --whiteout "$gone"; done
oci config --image "$image" --config.entrypoint python3 --config.entrypoint /opt/climate/climate.py --config.workingdir /opt/climate \
    --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --config.env PYTHONDONTWRITEBYTECODE=1 \
    --config.label org.opencontainers.image.title=climate \
    --config.label org.opencontainers.image.description="one-dimensional energy balance climate model"
rm -f "$archive"
skopeo copy -q "oci:$image" "docker-archive:$archive:climate:1.0" # without -q it speaks of each blob
ls -lh "$archive" | awk '{ print "== " $NF ": " $5 "B" }'
