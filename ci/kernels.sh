#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture with the pinned NVRTC, without a GPU, and holds
# what each takes of a multiprocessor against ci/kernel_resources.json; then tries the subcommand.
# kernels.sh --write: writes that table anew instead.
set -euo pipefail
cd "$(dirname "$0")/.."

table=ci/kernel_resources.json
FERROTUNE_CUDA_LIBRARIES=$(ci/install-nvrtc.sh)
# Of its own, so that a clean clone compiles everything and a second run only what changed.
FERROTUNE_KERNEL_CACHE=$PWD/target/kernel-cache
export FERROTUNE_CUDA_LIBRARIES FERROTUNE_KERNEL_CACHE
unset FERROTUNE_KERNELS
# The binary that the tests run: already built in .ci/run.
cargo test --quiet --workspace --locked --no-run
ferrotune=${CARGO_TARGET_DIR:-target}/debug/ferrotune

if [[ ${1:-} == --write ]]; then
    exec "$ferrotune" kernels --write "$table"
fi
"$ferrotune" kernels --check "$table"

# From here on everything is in the cache, and this takes seconds.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# expect CODE TEXT COMMAND...: COMMAND exits with CODE, and TEXT is in what it prints.
expect() {
    local code=$1 text=$2 got=0
    shift 2
    "$@" >"$work/output" 2>&1 || got=$?
    if [[ $got != "$code" ]] || ! grep -qF -- "$text" "$work/output"; then
        echo "kernels.sh: exit code $got, expected $code and \`$text\`: $*" >&2
        cat "$work/output" >&2
        failed=1
    fi
}

# A table that asks for less, lacks a kernel, or has one too many fails by that kernel's name.
name=$(grep -o 'gated_silu_forward_bf16' "$table" | head -1)
: "${name:?$table has no gated_silu_forward_bf16}"
sed -E "/\"$name\"/s/\"registers\":\[[0-9]+/\"registers\":[1/" "$table" >"$work/less.json"
expect 70 "activation/$name on sm_80: " "$ferrotune" kernels --check "$work/less.json"
sed "s/\"$name\"/\"renamed\"/" "$table" >"$work/renamed.json"
expect 70 "activation/$name on sm_80: not in the table" "$ferrotune" kernels --check "$work/renamed.json"
expect 70 "activation/renamed on sm_90a: in the table, but no such kernel" \
    "$ferrotune" kernels --check "$work/renamed.json"

# A table that is written again holds.
cp "$table" "$work/again.json"
expect 0 "wrote" "$ferrotune" kernels --write "$work/again.json"
"$ferrotune" kernels --check "$work/again.json" >/dev/null

# A folder of cubins is found by the name of its variable, and PTX goes there too.
modules=$("$ferrotune" kernels --list --arch sm_90a | grep -c '  sm_90a: cache$')
portable=$("$ferrotune" kernels --list --arch compute_90 | grep -c '  compute_90: ')
expect 0 "$((modules + portable)) files in $work/out" \
    "$ferrotune" kernels --arch sm_90a,compute_90 --out "$work/out"
export FERROTUNE_KERNELS=$work/out
expect 0 "folder: $work/out" "$ferrotune" kernels --list --arch sm_90a,compute_90
found=$("$ferrotune" kernels --list --arch sm_90a,compute_90 |
    grep -c '  sm_90a: folder  compute_90: folder$')
if [[ $found != "$portable" ]]; then
    echo "kernels.sh: $found of $portable modules are found in the folder" >&2
    failed=1
fi
expect 0 "  sm_80: none" "$ferrotune" kernels --list --arch sm_80
unset FERROTUNE_KERNELS

# A folder that cannot be written is found out before anything is compiled.
touch "$work/file"
expect 73 "$work/file" "$ferrotune" kernels --arch sm_80 --out "$work/file"

# Without a compiler there is a way to get one.
without=(env -u LD_LIBRARY_PATH -u VIRTUAL_ENV -u CONDA_PREFIX -u CUDA_HOME -u CUDA_PATH
    FERROTUNE_CUDA_LIBRARIES="$work")
if "${without[@]}" "$ferrotune" kernels --arch sm_80 --out "$work/system" >/dev/null 2>&1; then
    echo "kernels.sh: not tried: the message without NVRTC, because this system has one"
else
    expect 78 "FERROTUNE_CUDA_LIBRARIES" "${without[@]}" "$ferrotune" kernels
    expect 78 "pip install nvidia-cuda-nvrtc" "${without[@]}" "$ferrotune" kernels
    expect 0 "the cache was not looked at" "${without[@]}" "$ferrotune" kernels --list
fi

exit "$failed"
