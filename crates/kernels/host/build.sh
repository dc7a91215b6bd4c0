#!/usr/bin/env bash
# build.sh OUT_DIR [asan]: builds the stand-ins of libcuda, libnvrtc, libcublasLt and libnccl into OUT_DIR.
# Does nothing when they are there, made of the same sources by the same compiler. asan: with the
# address and undefined-behaviour sanitizers; a program that opens these must be built or started
# with them too (LD_PRELOAD=$(c++ -print-file-name=libasan.so)).
# CXX names the compiler, c++ otherwise; it is also what compiles kernels later.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: build.sh OUT_DIR [asan]}
mode=${2:-plain}
include=$here/../src/cuda/include

compiler=$(command -v "${CXX:-c++}") || {
    echo "build.sh: no C++ compiler ${CXX:-c++}; install one (Debian: g++) or set CXX" >&2
    exit 1
}
case $mode in
plain) flags="-O2" ;;
asan) flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" ;;
*)
    echo "build.sh: unknown mode $mode" >&2
    exit 2
    ;;
esac

mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$out/lock"
flock 9

stamp=$(cat "$here"/*.h "$here"/*.cpp "$here/build.sh" "$include/types.cuh" "$include/ptx.cuh" \
    "$include/tma.cuh" <(echo "$compiler $flags $("$compiler" --version)") | cksum | cut -d' ' -f1)
if [[ -f $out/stamp && $(<"$out/stamp") == "$stamp" ]]; then
    exit 0
fi
rm -f "$out/stamp"
cp "$here/shim.h" "$here/wgmma.h" "$here/tma.h" "$out"

# library NAME SOURCES...: compiled aside and renamed, for processes that have the old one open.
library() {
    local name=$1
    shift
    # shellcheck disable=SC2086
    "$compiler" $flags -std=c++20 -Wall -Wextra -Wno-unknown-pragmas -fPIC -shared \
        -fvisibility=hidden -DFERROTUNE_HOST -DFERROTUNE_HOST_VERSION="$((stamp % 1000000000))" \
        -DFERROTUNE_HOST_COMPILER="\"'$compiler'\"" -DFERROTUNE_HOST_FLAGS="\"$flags\"" \
        -I "$here" -I "$include" "$@" -Wl,-soname,"$name" -Wl,-rpath,'$ORIGIN' -ldl -pthread \
        -o "$out/$name.new"
    mv "$out/$name.new" "$out/$name"
}
cd "$here"
library libcuda.so.1 cuda.cpp lanes.cpp cuda_memory.cpp cuda_module.cpp cuda_tensor_map.cpp \
    cuda_error.cpp memory.cpp runtime.cpp worker.cpp wgmma.cpp tma.cpp
library libcublasLt.so.13 -O3 cublaslt.cpp gemm.cpp "$out/libcuda.so.1"
library libnvrtc.so.13 nvrtc.cpp
# Before glibc 2.34 shared memory is in librt.
library libnccl.so.2 nccl.cpp "$out/libcuda.so.1" -lrt
library libnccl-incomplete.so.2 -DFERROTUNE_HOST_NCCL_WITHOUT_FINALIZE nccl.cpp "$out/libcuda.so.1" -lrt
echo "$stamp" >"$out/stamp"
