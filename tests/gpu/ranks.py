"""Steps of several ranks: NCCL with one rank, and with two processes on one GPU. Correctness, no speed."""

import json
import re
import socket
import subprocess

import training
from outcome import Skipped, fail_unless

STEPS = 12
# What lets two ranks share a GPU: as if on two machines that reach each other over loopback. The last one is
# needed from NCCL 2.30 on, and unknown to older ones.
SHARED = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "=lo", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
NO_LIBRARY = re.compile(r"error: .*libnccl.*not found")


def one_rank(pack, limit):
    group = backend(pack, "nccl", "local")
    options = ["--collective", group, "--ranks", 1, "--steps", 10, "--device", pack.device, "--json"]
    command = [str(word) for word in (pack.binary, "bench", *options)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit, cwd=pack.folder, env=pack.environment
    )
    log(pack, command, done.stderr)
    skip_without_nccl(done.stderr)
    fail_unless(done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-200:]}")
    report = json.loads(done.stdout)
    return f"sums of {report['bytes']} bytes are right on {report['device']}"


def two_ranks(pack, limit):
    """Two processes train what one does, byte for byte, with gradients summed in the order of micro-batches."""
    one = training.fresh(pack, "one-rank")
    pack.checked(command(pack, one, 2), limit)
    two = training.fresh(pack, "two-ranks")
    options = ["--ddp_backend", backend(pack, "nccl", "gloo"), "--ddp_timeout", 60, "--rendezvous_timeout", 60]
    words = [str(word) for word in command(pack, two, 1) + options]
    common = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": pack.folder}
    ranks = [subprocess.Popen(words, env=place, **common) for place in places(pack)]
    errors = []
    for rank in ranks:
        try:
            _, error = rank.communicate(timeout=limit)
        finally:
            rank.kill()
        log(pack, words, error)
        errors.append((rank.returncode, error))
    for code, error in errors:
        skip_without_nccl(error)
        fail_unless(code == 0, f"exit code {code}: {error[-200:]}")
    return training.same_adapter(one, two)


CHECKS = {"ranks/nccl alone": one_rank, "ranks/two processes on one GPU": two_ranks}


def backend(pack, on_gpu, on_cpu):
    return on_gpu if pack.device == "cuda" else on_cpu


def command(pack, folder, accumulation):
    keys = {
        "output_dir": folder,
        "device": pack.device,
        "max_steps": STEPS,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "deterministic_reduction": "true",
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    return [str(word) for word in (pack.binary, "train", "examples/demo/demo.yaml", *words)]


def places(pack):
    """The environments of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(2):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        named = {f"FERROTUNE_{name}": str(value) for name, value in own.items()}
        # The only GPU is everyone's, whatever the local rank.
        yield pack.environment | SHARED | named | {"NCCL_HOSTID": f"host-{rank}", "CUDA_VISIBLE_DEVICES": "0"}


def skip_without_nccl(error):
    if NO_LIBRARY.search(error):
        raise Skipped("no libnccl on this machine")


def log(pack, command, error):
    with open(pack.log, "a") as out:
        out.write(f"$ {' '.join(command)}\n{error}\n")
