#!/usr/bin/env bash
# Trains the demo's model on two ranks that a real launcher starts, and compares the adapter, byte for byte,
# with one rank's. Without names, every launcher.
#
#   tests/launchers/run.sh [--require NAMES] [NAME...]
#
# A launcher that is not installed here is said to be, and fails only where NAMES (with commas between)
# require it. FERROTUNE names the binary, target/debug/ferrotune otherwise; PYTHON the interpreter that has
# torch, ray and torchx, python3 otherwise. Exit code 0 if nothing failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

all=(launch mpirun torchrun ray torchx slurm netns) # and, by name: mpi_backend, which builds a binary
required=
if [[ ${1:-} == --require ]]; then
    required=$2
    shift 2
fi
names=("$@")
((${#names[@]})) || names=("${all[@]}")

export FERROTUNE=${FERROTUNE:-$PWD/target/debug/ferrotune} PYTHON=${PYTHON:-python3}
export WORK
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
# What a launcher said to the shell that runs this is not for the launchers that it starts.
for name in $(compgen -e); do
    case $name in
    RANK | WORLD_SIZE | LOCAL_RANK | MASTER_* | PET_* | OMPI_* | PMI_* | PMIX_* | SLURM_* | TORCHELASTIC_* | VC_* | \
        FERROTUNE_RANK | FERROTUNE_WORLD_SIZE | FERROTUNE_LOCAL_*) unset "$name" ;;
    esac
done

# The same micro-batches a step on one rank and on two, summed in the same order.
export CONFIG=(train examples/demo/demo.yaml --device cpu --num_threads 1 --max_steps 12 --save_strategy no
    --per_device_train_batch_size 4 --deterministic_reduction true)
train_args() { # train_args RANKS OUTPUT
    printf '%s\n' "${CONFIG[@]}" --gradient_accumulation_steps $((2 / $1)) --output_dir "$2"
}
mapfile -t single < <(train_args 1 "$WORK/one")
if ! "$FERROTUNE" "${single[@]}" >"$WORK/one.log" 2>&1; then
    cat "$WORK/one.log"
    echo "launchers: the run on one rank failed"
    exit 1
fi

passed=0 failed=0 not_run=0
for name in "${names[@]}"; do
    script=tests/launchers/$name.sh
    if [[ ! -f $script ]]; then
        echo "launchers: no $name; there are: ${all[*]} mpi_backend"
        exit 2
    fi
    mapfile -t TRAIN < <(train_args 2 "$WORK/$name")
    # 77: what the launcher needs is not here; the last line says what.
    timeout 300 bash "$script" "${TRAIN[@]}" >"$WORK/$name.log" 2>&1
    code=$?
    if ((code == 77)); then
        echo "$name: not run: $(tail -1 "$WORK/$name.log")"
        not_run=$((not_run + 1))
        [[ ,$required, == *,$name,* ]] && failed=$((failed + 1)) && echo "$name: required here"
        continue
    fi
    adapter=adapter_model.safetensors
    if ((code == 0)) && cmp "$WORK/one/$adapter" "$WORK/$name/$adapter" &&
        grep -q '"world_size": 2' "$WORK/$name/run.json"; then
        echo "$name: passed"
        passed=$((passed + 1))
    else
        echo "$name: FAILED (exit code $code)"
        tail -30 "$WORK/$name.log" | sed 's/^/    /'
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed, $not_run skipped"
exit $((failed > 0))
