"""What every comparison notes: the commit, the machine, the JSON that a program prints."""

import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GPU_FIELDS = {"name": "gpu", "memory.total": "gpu_mib", "driver_version": "driver", "power.limit": "power_limit_w"}


def commit():
    """Of the repository, or of the pack that this folder came from."""
    manifest = ROOT / "manifest.json"
    if manifest.exists():
        return json.loads(manifest.read_text())["commit"]

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def machine():
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {"cpu": model, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}


def gpu():
    """The first GPU as nvidia-smi describes it; empty without one."""
    rows = query_gpu(*GPU_FIELDS)
    return dict(zip(GPU_FIELDS.values(), rows[0])) if rows else {}


def query_gpu(*fields):
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        return []
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]


def with_cuda_libraries(environment):
    """`environment` and where pip put the CUDA libraries of this Python, for a program that is no part of it."""
    found = (path for path in map(pathlib.Path, sys.path) if list(path.glob("nvidia/*/lib/libcublasLt.so.*")))
    folder = next(found, None)
    return ({"FERROTUNE_CUDA_LIBRARIES": str(folder)} if folder else {}) | dict(environment)


def first_json(text):
    """The object that a program printed, after whatever its libraries said."""
    return json.JSONDecoder().raw_decode(text[text.index("{") :])[0]
