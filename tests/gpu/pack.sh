#!/usr/bin/env bash
# Everything that a machine with a GPU needs for tests/gpu/run.sh and benches/gpu/run.sh, in one folder:
# no Rust, no compiler and no network there.
#
#     tests/gpu/pack.sh [--profile NAME] [--archs LIST] [OUT]
#
# OUT: target/gpu-pack. --profile: of cargo, release if not said. --archs sm_90a,...: cubins made ahead, for a
# machine without libnvrtc; needs libnvrtc here. Needs cargo, cc and strip.
set -euo pipefail
cd "$(dirname "$0")/../.."

profile=release archs='' out=target/gpu-pack
while (($#)); do
    case $1 in
    --profile) profile=${2:?--profile needs a name} && shift 2 ;;
    --archs) archs=${2:?--archs needs a list} && shift 2 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
    -*) echo "pack.sh: unknown option $1" >&2 && exit 2 ;;
    *) out=$1 && shift ;;
    esac
done
max_mib=128

# executable KIND NAME: of cargo's messages on standard input, the last executable of that target.
executable() {
    python3 -c '
import json, sys
found = None
for line in sys.stdin:
    if line.startswith("{"):
        message = json.loads(line)
        target, test = message.get("target", {}), message.get("profile", {}).get("test")
        kind = "test" if test else (target.get("kind") or [""])[0]
        if message.get("executable") and [kind, target["name"]] == sys.argv[1:]:
            found = message["executable"]
print(found or sys.exit("pack.sh: cargo built no " + " ".join(sys.argv[1:])))' "$@"
}

# In one call, so that dependencies are built once: the tests of the kernels, and of the engine, which need the binary.
messages=$(cargo test --locked --no-run --workspace --lib --test on_gpu --profile "$profile" --message-format=json-render-diagnostics)
binary=$(executable bin ferrotune <<<"$messages")
kernel_tests=$(executable test ferrotune_kernels <<<"$messages")
engine_tests=$(executable test on_gpu <<<"$messages")

rm -rf "$out"
mkdir -p "$out/bin" "$out/lib" "$out/tests/fixtures" "$out/examples" "$out/benches/results"
strip -o "$out/bin/ferrotune" "$binary"
strip -o "$out/bin/kernel-tests" "$kernel_tests"
strip -o "$out/bin/engine-tests" "$engine_tests"
cc -shared -fPIC -O1 -o "$out/lib/libhide.so" tests/gpu/hide_library.c
cp -r tests/fixtures/{golden,method_dropout,quantised} "$out/tests/fixtures/"
# They are in the tests of the kernels.
rm -r "$out/tests/fixtures/golden/ops"
cp -r examples/demo "$out/examples/demo"
cp -r tests/gpu "$out/tests/gpu"
cp -r benches/gpu benches/peers "$out/benches/"
find "$out" -name __pycache__ -prune -exec rm -rf {} +
if [[ -n $archs ]]; then
    "$out/bin/ferrotune" kernels --arch "$archs" --out "$out/kernels"
fi

# The newest symbol version of the C library that the programs ask for.
glibc=$(for file in "$out"/bin/* "$out"/lib/*; do
    grep -aoE 'GLIBC_[0-9]+(\.[0-9]+)+' "$file" || true
done | sort -uV | tail -1)
commit=$(git rev-parse HEAD)
[[ -z $(git status --porcelain --untracked-files=no) ]] || commit+=-dirty
cat >"$out/manifest.json" <<END
{"commit": "$commit", "profile": "$profile", "machine": "$(uname -m)", "glibc": "${glibc#GLIBC_}", "cubins": "$archs"}
END

mib=$(du -sm "$out" | cut -f1)
du -ah "$out/bin" "$out/lib" "$out/tests/fixtures" --max-depth=1 | sort -k2
echo "$out: $mib MiB, needs glibc ${glibc#GLIBC_}"
if ((mib >= max_mib)); then
    echo "pack.sh: $mib MiB is too much, at most $max_mib" >&2
    exit 1
fi
