#!/usr/bin/env bash
# Checks the kernels in a program that also uses candle with its `cuda` feature: both then share one cudarc, with the
# features of both. No CUDA toolkit is needed, because a check reads nothing of what candle's nvcc would write.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=target/beside-candle
mkdir -p $folder/src $folder/toolkit/bin $folder/toolkit/include

# What candle's build looks for: a compiler that says its version, and writes the files it is asked for.
cat >$folder/toolkit/bin/nvcc <<'NVCC'
#!/usr/bin/env bash
set -euo pipefail
output= folder=. sources=()
while (($#)); do
    case $1 in
    --version) echo 'Cuda compilation tools, release 13.0, V13.0.0' && exit ;;
    -o) output=$2 && shift ;;
    --output-directory) folder=$2 && shift ;;
    *.cu) sources+=("$1") ;;
    esac
    shift
done
[[ -z $output ]] || { : >"$output" && exit; }
for source in "${sources[@]}"; do
    name=${source##*/}
    : >"$folder/${name%.cu}.ptx"
done
NVCC
chmod +x $folder/toolkit/bin/nvcc
: >$folder/toolkit/include/cuda.h

candle=$(sed -n 's/^candle-core = "\(.*\)"$/\1/p' Cargo.toml)
cat >$folder/Cargo.toml <<TOML
[package]
name = "beside-candle"
version = "0.0.0"
edition = "2024"

[dependencies]
candle-core = { version = "$candle", features = ["cuda"] }
ferrotune-kernels = { path = "../../crates/kernels" }

[workspace]
TOML
echo 'use {candle_core as _, ferrotune_kernels as _};' >$folder/src/lib.rs
# What both sides have in common is of the versions that everything else is built with.
cp Cargo.lock $folder/

toolkit=$PWD/$folder/toolkit
export CUDA_HOME=$toolkit CUDA_PATH=$toolkit PATH=$toolkit/bin:$PATH CUDA_COMPUTE_CAP=80
cargo check --manifest-path $folder/Cargo.toml --target-dir target/bindings
cargo tree --manifest-path $folder/Cargo.toml --depth 1 --invert cudarc --edges normal
