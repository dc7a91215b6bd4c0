#!/usr/bin/env bash
# Installs one pinned version of NVRTC, CUDA's run-time compiler, from its wheel, and prints the folder
# of the library; no root, no GPU, no CUDA toolkit. Does nothing if it is there.
# install-nvrtc.sh [FOLDER]: into FOLDER, target/nvrtc otherwise. Needs python3 with pip.
set -euo pipefail
cd "$(dirname "$0")/.."

version=13.0.88
# One per machine type: x86_64, aarch64.
hashes=(
    sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575
    sha256:d27f20a0ca67a4bb34268a5e951033496c5b74870b868bacd046b1b8e0c3267b
)
folder=${1:-target/nvrtc}/$version
library=$folder/nvidia/cu13/lib

fail() {
    echo "install-nvrtc.sh: $1" >&2
    exit 1
}

if [[ ! -e $library/libnvrtc.so.13 ]]; then
    command -v python3 >/dev/null || fail "no python3, which unpacks the wheel; install it"
    python3 -m pip --version >/dev/null 2>&1 ||
        fail "python3 has no pip; install it (Debian: python3-pip) or run python3 -m ensurepip"
    mkdir -p "$(dirname "$folder")"
    work=$(mktemp -d "$folder.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    printf 'nvidia-cuda-nvrtc==%s' "$version" >"$work/requirements.txt"
    printf ' --hash=%s' "${hashes[@]}" >>"$work/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --require-hashes --dest "$work" --requirement "$work/requirements.txt" >&2 ||
        fail "pip cannot download nvidia-cuda-nvrtc $version (its reason is above): check the network, or \
put the wheel's content into $folder by hand"
    python3 -m zipfile -e "$work"/*.whl "$work/unpacked"
    rm -rf "$folder"
    mv "$work/unpacked" "$folder"
    [[ -e $library/libnvrtc.so.13 ]] || fail "the wheel has no $library/libnvrtc.so.13"
fi
(cd "$library" && pwd)
