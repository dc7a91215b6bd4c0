#!/usr/bin/env bash
# Two ranks in two network namespaces, whose virtual cable is cut while they train: both end with 175, each naming
# the other, within peer_timeout + 1 s.
#
#   tests/launchers/link_down.sh [TIMES]
#
# FERROTUNE names the binary, target/debug/ferrotune otherwise. Needs root and ip (Debian: iproute2); exit code 77
# where namespaces cannot be made. The last line is how often it held, and the longest time.
set -uo pipefail
cd "$(dirname "$0")/../.."
FERROTUNE=${FERROTUNE:-$PWD/target/debug/ferrotune}
times=${1:-1}
peer_timeout=2
work=$(mktemp -d)
a=ferrotune-a-$$ b=ferrotune-b-$$
clean() {
    ip netns del $a 2>/dev/null
    ip netns del $b 2>/dev/null
    rm -rf "$work"
}
trap clean EXIT
command -v ip >/dev/null || { echo "ip is not installed"; exit 77; }
ip netns add $a 2>/dev/null && ip netns add $b || { echo "network namespaces cannot be made here"; exit 77; }
ip link add fa$$ netns $a type veth peer name fb$$ netns $b || { echo "no virtual Ethernet here"; exit 77; }
ip -n $a addr add 10.77.0.1/24 dev fa$$ && ip -n $a link set lo up
ip -n $b addr add 10.77.0.2/24 dev fb$$ && ip -n $b link set lo up

node() { # node NAMESPACE RANK OUTPUT
    exec ip netns exec "$1" env PET_NNODES=2 PET_NODE_RANK="$2" PET_NPROC_PER_NODE=1 PET_MASTER_ADDR=10.77.0.1 \
        PET_MASTER_PORT=29500 "$FERROTUNE" train examples/demo/demo.yaml --device cpu --num_threads 1 \
        --max_steps 1000000 --save_strategy steps --save_steps 5 --save_total_limit 1 --peer_timeout $peer_timeout \
        --output_dir "$3"
}

held=0 longest=0
for ((i = 1; i <= times; i++)); do
    output=$work/run-$i
    ip -n $a link set fa$$ up
    ip -n $b link set fb$$ up
    (node $a 0 "$output") >"$work/0.log" 2>&1 &
    first=$!
    (node $b 1 "$output") >"$work/1.log" 2>&1 &
    second=$!
    for _ in {1..1200}; do
        compgen -G "$output/checkpoint-*" >/dev/null && break
        kill -0 $first 2>/dev/null || break
        sleep 0.05
    done
    begin=$(date +%s%N)
    ip -n $b link set fb$$ down
    wait $first
    codes=$?
    wait $second
    codes="$codes $?"
    took=$((($(date +%s%N) - begin) / 1000000))
    ((took > longest)) && longest=$took
    if [[ $codes == "175 175" ]] && ((took <= peer_timeout * 1000 + 1000)) && grep -q 'rank 1' "$work/0.log" &&
        grep -q 'rank 0' "$work/1.log"; then
        held=$((held + 1))
    else
        echo "number $i: exit codes $codes after $took ms"
        tail -n 3 "$work"/[01].log
    fi
    rm -rf "$output"
done
echo "link down: $held of $times, longest $longest ms (peer_timeout $peer_timeout s)"
((held == times))
