#!/bin/sh
# Trains an adapter on a tiny random Llama, and checks that PEFT gets the same logits from it.
#
#     tests/peft_roundtrip.sh [PYTHON]
#
# PYTHON (default: python3) must have torch, transformers and peft; the script exits with 3 if it
# has not. Every variant is one line with its error; the exit status is 0 if all are within 1e-4.
set -eu
cd "$(dirname "$0")/.."
python="${1:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

FERROTUNE_ROUNDTRIP_DIR="$work" cargo test --quiet --test peft_roundtrip -- --exact \
    adapters_are_written_with_their_logits >/dev/null

status=0
for variant in "$work"/*/; do
    printf '%s: ' "$(basename "$variant")"
    "$python" tests/peft_roundtrip.py "$variant/base" "$variant/adapter" \
        "$variant/logits.safetensors" || status=$?
done
exit "$status"
