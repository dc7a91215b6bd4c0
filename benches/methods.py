#!/usr/bin/env python3
"""What a method or a quantised base costs: steps of DoRA and of LoRA over 4 bits beside those of LoRA.

    benches/methods.py --ferrotune target/release/ferrotune [--shape 1B] [--steps 5] [--repeats 3] [--dtype float32] [--nf4-dtype bfloat16] [--seq 128] [--batch 1]

Each side is a `ferrotune bench` in a process of its own, on the same random base and tokens, in turns. Times are
medians over the steps of all repeats' medians; processor time of a step is that of the whole process, the median over
repeats, and says more on a machine that does other work. Memory is the largest resident memory of any repeat, less what was
resident before anything was loaded. Prints one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"lora": [], "dora": ["--use-dora"], "nf4": ["--load-in-4bit", "--bnb-4bit-use-double-quant"]}


def run(options, side, flags):
    dtype = options.nf4_dtype if side == "nf4" and options.nf4_dtype else options.dtype
    command = [options.ferrotune, "bench", "--json", "--shape", options.shape, "--dtype", dtype]
    command += ["--steps", str(options.steps), "--warmup", "1", *flags]
    if options.seq:
        command += ["--seq", str(options.seq)]
    if options.batch:
        command += ["--batch", str(options.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ferrotune", required=True)
    parser.add_argument("--shape", default="1B")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nf4-dtype", help="what a 4-bit base holds its other weights in, --dtype otherwise")
    parser.add_argument("--batch", type=int, help="rows of a step, as is usual for the shape otherwise")
    parser.add_argument("--seq", type=int, help="tokens of a row, as is usual for the shape otherwise")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    reports = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        order = list(SIDES.items())
        # Every side comes first once, so that a machine that slows down favours none.
        for side, flags in order[repeat % len(order) :] + order[: repeat % len(order)]:
            reports[side].append(run(options, side, flags))

    def seconds(side):
        return statistics.median(r["step_seconds"]["median"] for r in reports[side])

    def processor(side):
        return statistics.median(r["cpu_seconds_per_step"] for r in reports[side])

    def memory(side):
        return max(r["memory_above_start"] for r in reports[side])

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shape": options.shape,
        "dtype": options.dtype,
        "nf4_dtype": options.nf4_dtype or options.dtype,
        "tokens_per_step": reports["lora"][0]["tokens_per_step"],
        "steps": options.steps,
        "repeats": options.repeats,
        "load_average_at_end": os.getloadavg()[0],
        "sides": {
            side: {"step_seconds": seconds(side), "of_each_repeat": [r["step_seconds"]["median"] for r in of],
                   "processor_seconds": processor(side), "processor_of_each": [r["cpu_seconds_per_step"] for r in of],
                   "memory_above_start": memory(side), "memory_above_loaded": max(r["memory_above_loaded"] for r in of)}
            for side, of in reports.items()
        },
        "weights_in_f32": 4 * reports["lora"][0]["parameters"],
        "dora_step_over_lora": seconds("dora") / seconds("lora"),
        "dora_processor_over_lora": processor("dora") / processor("lora"),
        "dora_memory_more": memory("dora") - memory("lora"),
        "nf4_step_over_lora": seconds("nf4") / seconds("lora"),
        "nf4_memory_over_f32_weights": memory("nf4") / (4 * reports["lora"][0]["parameters"]),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
