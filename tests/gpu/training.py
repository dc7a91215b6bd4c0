"""Steps that train the demo: GPU beside CPU, one run beside the same again, stopped and resumed."""

import json
import shutil
import signal
import subprocess
import time

from outcome import Failed, Skipped, fail_unless

STEPS = 50
# Relative, of every step's loss on the GPU to the CPU's. In bf16 a CPU itself is up to 0.02 from its curve in f32.
CURVE_TOLERANCES = {"f32": 0.01, "bf16": 0.05}
# A rate at which losses stay far above zero: rows that are known by heart differ by multiples of next to nothing.
CURVE = ["--learning_rate", 5e-4]
STOPPED_AT, STOPPED_SAVED = 20, 143


def curves_agree(pack, limit):
    return curves(pack, limit, "f32", "--dtype", "float32")


def bf16_curves_agree(pack, limit):
    return curves(pack, limit, "bf16", "--bf16", "true")


def wgmma_curves_agree(pack, limit):
    return hopper_curves_agree(pack, limit, "wgmma")


def tma_curves_agree(pack, limit):
    return hopper_curves_agree(pack, limit, "tma")


def hopper_curves_agree(pack, limit, attention):
    """As in bf16, with attention kernels that only compute capability 9.0 runs."""
    before = len(pack.log.read_text()) if pack.log.exists() else 0
    try:
        return curves(pack, limit, "bf16", "--bf16", "true", FERROTUNE_ATTENTION=attention)
    except Failed:
        if "only compute capability 9.0 has" in pack.log.read_text()[before:]:
            raise Skipped("another compute capability than 9.0") from None
        raise


def curves(pack, limit, name, *options, **environment):
    cpu = losses(train(pack, limit, f"{name}-cpu", "cpu", *CURVE, *options))
    gpu = losses(train(pack, limit, f"{name}-{pack.device}", pack.device, *CURVE, *options, **environment))
    apart = [abs(a - b) / abs(a) for a, b in zip(cpu, gpu)]
    worst, limit = max(apart), CURVE_TOLERANCES[name]
    fail_unless(len(cpu) == len(gpu) == STEPS, f"{len(cpu)} and {len(gpu)} losses, {STEPS} expected")
    fail_unless(cpu[-1] < cpu[0], f"the loss did not fall: {cpu[0]:.4f} to {cpu[-1]:.4f}")
    # Not `worst > ...`: a NaN must fail.
    fail_unless(worst <= limit, f"losses differ by {worst:.2e} at step {apart.index(worst) + 1}")
    return f"{STEPS} losses differ by at most {worst:.1e} (limit {limit})"


def two_runs_are_bitwise_equal(pack, limit):
    one, two = (train(pack, limit, f"twin-{number}", pack.device) for number in (1, 2))
    return same_adapter(one, two)


def stopped_run_resumes_bitwise(pack, limit):
    """SIGTERM in mid-run leaves a checkpoint from which the rest gives the bytes of the whole run."""
    whole = train(pack, limit, "whole", pack.device)
    folder = fresh(pack, "stopped")
    with open(pack.log, "a") as log:
        process = subprocess.Popen(
            [str(word) for word in command(pack, folder, pack.device)],
            stdout=log, stderr=log, cwd=pack.folder, env=pack.environment,
        )  # fmt: skip
        end = time.monotonic() + limit
        try:
            while len(losses(folder)) < STOPPED_AT and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=limit)
        finally:
            process.kill()
    fail_unless(code == STOPPED_SAVED, f"stopped with exit code {code}, {STOPPED_SAVED} expected")
    pack.checked(command(pack, folder, pack.device, "--resume_from_checkpoint", "true"), limit)
    return same_adapter(whole, folder)


CHECKS = {
    "training/curve f32": curves_agree,
    "training/curve bf16": bf16_curves_agree,
    "training/curve bf16, wgmma": wgmma_curves_agree,
    "training/curve bf16, tma": tma_curves_agree,
    "training/two runs": two_runs_are_bitwise_equal,
    "training/stop and resume": stopped_run_resumes_bitwise,
}


def train(pack, limit, name, device, *options, **environment):
    folder = fresh(pack, name)
    pack.checked(command(pack, folder, device, *options), limit, **environment)
    return folder


def command(pack, folder, device, *options):
    keys = {"output_dir": folder, "device": device, "max_steps": STEPS, "logging_steps": 1, "save_steps": STEPS}
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    return [pack.binary, "train", "examples/demo/demo.yaml", *words, *options]


def fresh(pack, name):
    folder = pack.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def losses(folder):
    log = folder / "trainer_log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["loss"] for row in rows if "loss" in row]


def same_adapter(one, two):
    a, b = ((folder / "adapter_model.safetensors").read_bytes() for folder in (one, two))
    fail_unless(a == b, "the adapters differ")
    return f"adapters of {len(a)} bytes are equal"
