#!/usr/bin/env bash
# selftest.sh [OUT_DIR]: tests the stand-ins, plain and under the sanitizers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$(mktemp -d)}
include=$here/../src/cuda/include
files=("$here/selftest/kernels.cu" "$include"/*.cuh)

for mode in plain asan; do
    "$here/build.sh" "$out/$mode" "$mode"
    flags="-O1"
    if [[ $mode == asan ]]; then
        flags="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    fi
    # shellcheck disable=SC2086
    "${CXX:-c++}" $flags -std=c++20 -Wall -Wextra -Wno-unknown-pragmas -DFERROTUNE_HOST -I "$here" \
        -I "$include" "$here/selftest/main.cpp" "$out/$mode"/lib{cuda.so.1,nvrtc.so.13,cublasLt.so.13} \
        -Wl,-rpath,"$out/$mode" -o "$out/$mode/selftest"
    echo "== $mode"
    ASAN_OPTIONS=detect_leaks=0 "$out/$mode/selftest" "${files[@]}" 2>"$out/$mode/log" || {
        cat "$out/$mode/log" >&2
        exit 1
    }
    for order in late early; do
        ASAN_OPTIONS=detect_leaks=0 FERROTUNE_HOST_STREAMS=$order "$out/$mode/selftest" "${files[@]}"
    done
done

for kernel in out_of_bounds_1 shared_out_of_bounds_1; do
    if ASAN_OPTIONS=detect_leaks=0 "$out/asan/selftest" --crash "$kernel" "${files[@]}" \
        >"$out/asan/log" 2>&1; then
        echo "selftest: $kernel was not caught" >&2
        exit 1
    fi
    grep -q "heap-buffer-overflow" "$out/asan/log" && grep -q "kernels.cu" "$out/asan/log" || {
        cat "$out/asan/log" >&2
        exit 1
    }
    echo "caught: $kernel"
done
