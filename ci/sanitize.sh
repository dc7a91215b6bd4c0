#!/usr/bin/env bash
# sanitize.sh [FILTER]: the tests of the kernels on the host stand-in, kernels and stand-in built under the
# address and undefined-behaviour sanitizers. FILTER picks tests by a part of their name; default: all that
# name cuda. What passes reads and writes nothing outside of its buffers on the shapes of the tests.
# Minutes; more when its kernels are not in the cache beside the test programs yet.
set -euo pipefail
cd "$(dirname "$0")/.."

runtime=$("${CXX:-c++}" -print-file-name=libasan.so)
[[ -f $runtime ]] || {
    echo "sanitize.sh: ${CXX:-c++} has no libasan.so; install the sanitizers of the compiler" >&2
    exit 1
}
triple=$(rustc -vV | sed -n 's/^host: //p')
triple=${triple^^}
# Of the test programs alone: cargo and the compiler run without.
export "CARGO_TARGET_${triple//-/_}_RUNNER=env LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 FERROTUNE_HOST_MODE=asan"
cargo test --workspace --lib -- "${1:-cuda}"
