#!/bin/sh
# Every test that needs a GPU: one command, which goes on where it stopped.
#
#     tests/gpu/run.sh PACK [STEP ...] [--budget SECONDS] [--list] [--help]
#
# PACK is the folder that tests/gpu/pack.sh made. Needs python3 and a driver; no Rust, no compiler.
exec "${PYTHON:-python3}" -u "$(dirname "$0")/run.py" "$@"
