# Two network namespaces as two hosts with addresses of their own, joined by a virtual cable (Debian: iproute2).
command -v ip >/dev/null || { echo "ip is not installed"; exit 77; }
a=ferrotune-a-$$ b=ferrotune-b-$$ # a network each
clean() {
    ip netns del $a 2>/dev/null
    ip netns del $b 2>/dev/null
}
trap clean EXIT
ip netns add $a 2>/dev/null && ip netns add $b || { echo "network namespaces cannot be made here"; exit 77; }
ip link add fa$$ netns $a type veth peer name fb$$ netns $b || { echo "no virtual Ethernet here"; exit 77; }
ip -n $a addr add 10.77.0.1/24 dev fa$$ && ip -n $a link set fa$$ up && ip -n $a link set lo up
ip -n $b addr add 10.77.0.2/24 dev fb$$ && ip -n $b link set fb$$ up && ip -n $b link set lo up
# As a pod of two, one process each, says who it is.
node() { # node NAMESPACE RANK ARGUMENTS...
    local space=$1 rank=$2
    shift 2
    ip netns exec "$space" env PET_NNODES=2 PET_NODE_RANK="$rank" PET_NPROC_PER_NODE=1 PET_MASTER_ADDR=10.77.0.1 \
        PET_MASTER_PORT=29500 "$FERROTUNE" "$@"
}
node $b 1 "$@" &
second=$!
node $a 0 "$@"
code=$?
wait $second
other=$?
echo "exit codes: $code and $other"
exit $((code ? code : other))
