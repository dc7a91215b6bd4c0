"""Runs `ferrotune ARGUMENTS` as a TorchX role with two replicas on this machine."""

import os
import random
import sys

from torchx import specs
from torchx.runner import get_runner

role = specs.Role(
    name="trainer",
    image=os.getcwd(),
    entrypoint=sys.argv[1],
    args=sys.argv[2:],
    num_replicas=2,
    env={
        "FERROTUNE_NNODES": "2",
        "FERROTUNE_NODE_RANK": specs.macros.replica_id,
        "FERROTUNE_MASTER_ADDR": "127.0.0.1",
        "FERROTUNE_MASTER_PORT": str(random.randrange(20000, 30000)),
    },
)
with get_runner() as runner:
    cfg = {"log_dir": os.path.join(os.environ["WORK"], "torchx_logs")}
    handle = runner.run(specs.AppDef(name="ferrotune", roles=[role]), "local_cwd", cfg)
    status = runner.wait(handle, wait_interval=0.5)
    for replica in range(2):
        for line in runner.log_lines(handle, "trainer", replica):
            print(f"[{replica}] {line}", end="")
    print(status)
    sys.exit(0 if status.state == specs.AppState.SUCCEEDED else 1)
