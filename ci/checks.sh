#!/usr/bin/env bash
# The rules that no compiler holds: who imports whom, where `unsafe` may be, how long a file may be.
# Run from anywhere; prints every violation and exits 1 if there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

# Lines of a Rust source, tests included. A longer file is split by idea, or listed with a reason.
max_lines=600
long_files=(
)
# Folders that may hold `unsafe`, each block with its argument.
unsafe_allowed='^crates/(kernels|dist/src/nccl)/'

failed=0
fail() {
    echo "check: $1" >&2
    failed=1
}

# files GLOB...: tracked and new files, not ignored ones.
files() {
    git ls-files --cached --others --exclude-standard -- "$@" | sort -u | while read -r file; do
        [[ -f $file ]] && echo "$file"
    done
}

# imports CRATE ALLOWED...: the crates of this workspace that CRATE may depend on.
imports() {
    local crate=$1 dependency
    shift
    for dependency in $(sed -nE 's/^(ferrotune-[a-z]+)[ .=].*/\1/p' "crates/$crate/Cargo.toml"); do
        if [[ " $* " != *" ${dependency#ferrotune-} "* ]]; then
            fail "crates/$crate/Cargo.toml: $dependency; $crate may import: ${*:-nothing}"
        fi
    done
}

imports kernels
imports core kernels
imports lora kernels core
imports dist kernels core

mapfile -t sources < <(files '*.rs')

outside=$(printf '%s\n' "${sources[@]}" | grep -vE "$unsafe_allowed")
# A comment may say the word, and `forbid(unsafe_code)` is the opposite.
if lines=$(grep -nE '(^|[^_[:alnum:]])unsafe([^_[:alnum:]]|$)' $outside | grep -vE ':[0-9]+: *//'); then
    fail "unsafe outside of $unsafe_allowed"$'\n'"$lines"
fi

# Features only add: a negative cfg makes two programs of one source.
if lines=$(grep -nE 'cfg(_attr)?\(.*not\(.*feature' "${sources[@]}"); then
    fail "negative feature cfg"$'\n'"$lines"
fi

for file in "${sources[@]}"; do
    lines=$(wc -l <"$file")
    if ((lines > max_lines)) && [[ " ${long_files[*]} " != *" $file "* ]]; then
        fail "$file: $lines lines, at most $max_lines; split it by idea"
    fi
done
for file in "${long_files[@]}"; do
    if [[ ! -f $file ]] || (($(wc -l <"$file") <= max_lines)); then
        fail "ci/checks.sh: $file needs no exception any more"
    fi
done

# A clone is small: what is large is made or fetched.
max_bytes=2000000
while read -r bytes file; do
    fail "$file: $bytes bytes, at most $max_bytes"
done < <(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c '%s %n' 2>/dev/null |
    awk -v max=$max_bytes '$1 > max')

# Paths of one machine mean nothing on another.
mapfile -t texts < <(files '*.rs' '*.toml' '*.md' '*.yaml' '*.sh' '*.py' '.ci/run')
if lines=$(grep -nE '(^|[^.[:alnum:]])/(home|root|work|Users|mnt)/[[:alnum:]]' "${texts[@]}" | grep -v '^ci/checks.sh:'); then
    fail "a path of one machine"$'\n'"$lines"
fi

if ((failed)); then
    exit 1
fi
echo "checks: ${#sources[@]} sources, all rules hold"
