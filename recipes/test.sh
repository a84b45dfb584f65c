#!/bin/sh
# Runs the test-suite as an ordinary user; where root calls, what needs root is run by root before it.
#
#   recipes/test.sh [PYTEST ARGUMENT]...
set -eu
. "$(dirname "$0")/place.sh"
cd "$TREE"
if command -v apt-get >/dev/null; then (fresh_lists) 2>/dev/null || true; fi # tests/test_demo.py makes an image out of packages

status=0
if [ "$(id -u)" = 0 ]; then
    rm -rf "/tmp/pytest-of-$ORDINARY" # of an earlier user of that name, it would be refused
    result=0
    PATH=$VENV/bin:$PATH PYTHONDONTWRITEBYTECODE=1 pytest -q -m root -p no:cacheprovider --timeout 600 "$@" </dev/null || result=$?
    [ "$result" = 5 ] || status=$result # 5: none of them was asked for
fi
as_user pytest -n 2 --dist loadfile --timeout 600 "$@" </dev/null || status=$?
exit "$status"
