"""Starts `ferrotune ARGUMENTS` in every worker of a Ray TorchTrainer with two workers."""

import os
import subprocess
import sys

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

directory = os.getcwd()


def work(config):
    # Ray Train has set RANK, WORLD_SIZE, LOCAL_RANK, NODE_RANK, MASTER_ADDR and MASTER_PORT.
    done = subprocess.run(config["command"], cwd=directory)
    if done.returncode != 0:
        raise RuntimeError(f"ferrotune ended with {done.returncode}")


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
TorchTrainer(
    work,
    train_loop_config={"command": sys.argv[1:]},
    scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
    run_config=RunConfig(storage_path=os.path.join(os.environ["WORK"], "ray_results")),
).fit()
