#!/bin/sh
# Speed and memory on a GPU beside peers: one command, which goes on where it stopped.
#
#     benches/gpu/run.sh PACK [WORKLOAD ...] [--dry-run] [--budget SECONDS] [--help]
#
# PACK is the folder that tests/gpu/pack.sh made, on a machine that has python3 with torch,
# transformers and peft. See ../README.md.
exec "${PYTHON:-python3}" -u "$(dirname "$0")/run.py" "$@"
