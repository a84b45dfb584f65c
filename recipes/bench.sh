#!/bin/sh
# What a start and a pull of the demonstration's image cost on this machine.
#
#   recipes/bench.sh [RUNS]
set -eu
. "$(dirname "$0")/place.sh"
cd "$PLACE/demo"
as_user "$VENV/bin/python3" "$TREE/benchmarks/start.py" --runs "${1:-30}" demo.sif
as_user "$VENV/bin/python3" "$TREE/benchmarks/convert.py" docker-archive:climate.docker.tar
