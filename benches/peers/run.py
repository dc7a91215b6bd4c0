#!/usr/bin/env python3
"""ferrotune beside transformers + peft: same model file, adapter and rows, interleaved, one command.

    benches/peers/run.py --python PYTHON_WITH_PEFT [SHAPE ...]

Each repeat of each side is a process of its own, in turn (A B A B). The losses of the two must agree
before any ratio is printed. See ../README.md for what is compared.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys

import record

HERE = pathlib.Path(__file__).resolve().parent
ROOT = record.ROOT
BATCHES = {"1B": (1, 512), "8B": (1, 512), "tiny": (4, 64)}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
CHECKED_STEPS = 5
MIB = 1 << 20


def main():
    args = arguments()
    require_peft(args.python)
    binary = args.ferrotune or build()
    for shape in args.shapes:
        result = compare(args, binary, shape)
        path = write(args, result)
        print(table(result))
        print(f"  {path}\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["256x4", "768x12"], help="shapes of `ferrotune bench`")
    parser.add_argument("--python", default="python3", help="interpreter that has torch, transformers and peft")
    parser.add_argument("--ferrotune", help="binary [default: build --release and use that]")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target" / "peers", help="models are kept here")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benches" / "results")
    parser.add_argument("--batch", type=int, help="rows per step")
    parser.add_argument("--seq", type=int, help="tokens per row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=list(LOSS_TOLERANCE), default="float32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def require_peft(python):
    probe = "import torch, transformers, peft"
    try:
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"error: cannot run `{python}`: {error}; name an interpreter with --python")
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(
            f"error: `{python}` lacks torch, transformers or peft ({reason}).\n"
            "Install them (pip install torch transformers peft) and name that interpreter with --python PATH."
        )


def build():
    subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=ROOT, check=True)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return str(target / "release" / "ferrotune")


def compare(args, binary, shape):
    batch, seq = BATCHES.get(shape, (4, 256))
    batch, seq = args.batch or batch, args.seq or seq
    case = make_case(args, binary, shape, batch, seq)
    common = ["--model", case / "model", "--adapter", case / "adapter", "--rows", case / "rows.jsonl"]
    common += ["--batch", batch, "--steps", args.steps, "--warmup", args.warmup, "--threads", args.threads]
    common += ["--dtype", args.dtype]
    sides = {
        "ferrotune": [binary, "bench", "--json", *common],
        "peft": [args.python, HERE / "peft_step.py", *common],
    }
    runs = {name: [] for name in sides}
    load = []
    for _ in range(args.repeats):
        for name, command in sides.items():
            load.append(os.getloadavg()[0])
            runs[name].append(run_json(command))
    losses = check_losses(runs, LOSS_TOLERANCE[args.dtype])
    return {
        "shape": shape,
        "dtype": args.dtype,
        "batch": [batch, seq],
        "rank": args.rank,
        "threads": args.threads,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": record.commit(),
        "machine": record.machine(),
        "load_before_each_run": load,
        "loss_difference": losses,
        "ratios": ratios(runs),
        "runs": runs,
    }


def make_case(args, binary, shape, batch, seq):
    case = args.work / f"{shape}-{args.dtype}-{batch}x{seq}-r{args.rank}"
    if (case / "complete").exists():
        return case
    case.mkdir(parents=True, exist_ok=True)
    config = subprocess.run([binary, "bench", "--shape", shape, "--config"], capture_output=True, text=True, check=True)
    (case / "config.json").write_text(config.stdout)
    command = [args.python, HERE / "make_case.py", "--config", case / "config.json", "--out", case]
    command += ["--batch", batch, "--seq", seq, "--rank", args.rank, "--dtype", args.dtype]
    print(f"writing {case}", file=sys.stderr)
    subprocess.run([str(word) for word in command], check=True)
    return case


def run_json(command):
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return record.first_json(done.stdout)


def check_losses(runs, tolerance):
    """Largest relative difference over the first steps; a wrong engine has no speed."""
    ours, theirs = (runs[name][0]["losses"][:CHECKED_STEPS] for name in ("ferrotune", "peft"))
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    if not worst <= tolerance:
        sys.exit(f"error: losses differ by {worst:.1e}, more than {tolerance:.0e}\n  ferrotune {ours}\n  peft      {theirs}")
    return worst


def ratios(runs):
    def median(name, key):
        values = [run[key] for run in runs[name]]
        return statistics.median(sum(values, []) if isinstance(values[0], list) else values)

    def quotient(numerator, denominator, key):
        return median(numerator, key) / median(denominator, key)

    return {
        "speed": quotient("peft", "ferrotune", "step_times"),
        "speed_per_cpu_second": quotient("peft", "ferrotune", "cpu_seconds_per_step"),
        "memory_above_start": quotient("ferrotune", "peft", "memory_above_start"),
        "memory_above_loaded": quotient("ferrotune", "peft", "memory_above_loaded"),
        "peak_rss": quotient("ferrotune", "peft", "peak_rss"),
        "exec_to_first_step": quotient("ferrotune", "peft", "seconds_exec_to_first_step"),
    }


def write(args, result):
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"peft-cpu-{result['shape']}-{result['dtype']}-{result['threads']}threads-{result['date'][:10]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def table(result):
    def column(name):
        runs = result["runs"][name]
        times = sorted(sum((run["step_times"] for run in runs), []))
        median = statistics.median(times)
        tokens = result["batch"][0] * result["batch"][1]
        memory = statistics.median(run["memory_above_start"] for run in runs) / MIB
        first = statistics.median(run["seconds_exec_to_first_step"] for run in runs)
        cpu = statistics.median(run["cpu_seconds_per_step"] for run in runs)
        return [f"{median:.4f}", f"{times[0]:.4f}", f"{tokens / median:.1f}", f"{cpu:.3f}", f"{memory:.0f}", f"{first:.2f}"]

    names = ["step s (median)", "best s", "tokens/s", "cpu s/step", "MiB above start", "exec to 1st step s"]
    r = result["ratios"]
    quotients = [f"{r['speed']:.2f}x", "", f"{r['speed']:.2f}x", f"{r['speed_per_cpu_second']:.2f}x"]
    quotients += [f"{r['memory_above_start']:.2f}x", f"{r['exec_to_first_step']:.3f}x"]
    lines = [f"{result['shape']} {result['dtype']}, losses differ by {result['loss_difference']:.1e}"]
    lines.append(f"  {'':20}{'ferrotune':>12}{'peft':>12}{'ratio':>10}")
    for row in zip(names, column("ferrotune"), column("peft"), quotients):
        lines.append(f"  {row[0]:20}{row[1]:>12}{row[2]:>12}{row[3]:>10}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
