# PyTorch's torchrun, whose own store holds MASTER_PORT.
"$PYTHON" -c 'import torch.distributed.run' 2>/dev/null || { echo "$PYTHON has no torch.distributed"; exit 77; }
port=$((20000 + RANDOM % 10000))
exec "$PYTHON" -m torch.distributed.run --no-python --nproc-per-node 2 --master-addr 127.0.0.1 --master-port $port \
    "$FERROTUNE" "$@"
