"""ferrotune on a GPU beside peers: same model file, adapter and rows, each side in its own process, in turn.

Results are kept cell by cell: the same command goes on where it stopped. Exit code: 0 all cells are done,
4 the budget ran out first (run it again), 1 a cell failed or losses disagree.
"""

import argparse
import datetime
import os
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "peers"))

import cells as plan  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
from ledger import Budget, Ledger, end_children_on_sigterm, run_limited  # noqa: E402
from sampler import Sampler  # noqa: E402

PEERS = HERE.parent / "peers"
# What the exit code of a side means; anything else is a failure.
NO_RESULT = {3: "not installed", 71: "out of memory", 124: "timed out"}
# Seconds after which a model is given up, and what one takes as a rule.
MADE_IN = 600
MAKING = 200
# What ferrotune says of a variable that this GPU cannot follow.
OTHER_GPU = "which only compute capability"


def main():
    args = arguments()
    cells = plan.ordered(plan.find(args.workloads), args.sides, args.repeats)
    if args.dry_run:
        return dry_run(args, cells)
    end_children_on_sigterm()
    args.work.mkdir(parents=True, exist_ok=True)
    subject = {"commit": record.commit(), "gpu": record.gpu() or args.device, "steps": [args.warmup, args.steps]}
    ledger = Ledger(args.state or args.work / "cells.json", subject)
    budget = Budget(args.budget)
    left = 0
    for cell in cells:
        if cell.name in ledger.results:
            continue
        if not budget.allows(args.limit + (0 if case_folder(args, cell.workload).exists() else MAKING)):
            left += 1
            continue
        print(f"{cell.name} ...", flush=True)
        ledger.put(cell.name, run(args, cell))
        print(f"{cell.name}: {report.one_line(ledger.results[cell.name])}", flush=True)
        write(args, ledger)
    text, failed = write(args, ledger)
    print(text)
    if left:
        print(f"{left} of {len(cells)} cells are left: run the same command again")
        return 4
    return 1 if failed else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=pathlib.Path, help="folder that tests/gpu/pack.sh made")
    parser.add_argument("workloads", nargs="*", help="names of cells.py [default: all, in order of worth]")
    parser.add_argument("--dry-run", action="store_true", help="list the cells in order, and stop")
    parser.add_argument("--budget", type=float, help="begin no cell that may end after this many seconds")
    parser.add_argument("--limit", type=float, default=280, help="seconds of one cell")
    sides, usual = ", ".join(plan.SIDES), ",".join(plan.DEFAULT_SIDES)
    parser.add_argument("--sides", default=usual, help=f"of {sides} [default: those of the goals]")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument(
        "--work", type=pathlib.Path, help="models, logs, kept results [default: in the temporary folder]"
    )
    parser.add_argument("--state", type=pathlib.Path, help="kept results [default: WORK/cells.json]")
    parser.add_argument("--out", type=pathlib.Path, help="JSON and table go here [default: $OUT, else benches/results]")
    args = parser.parse_intermixed_args()
    args.work = args.work or pathlib.Path(tempfile.gettempdir()) / "ferrotune-bench"
    args.out = args.out or pathlib.Path(os.environ.get("OUT") or record.ROOT / "benches" / "results")
    args.sides = args.sides.split(",")
    unknown = [side for side in args.sides if side not in plan.SIDES]
    if unknown:
        parser.error(f"--sides: no side `{unknown[0]}`; known: {', '.join(plan.SIDES)}")
    args.binary = args.pack / "bin" / "ferrotune"
    if not args.dry_run and not args.binary.exists():
        parser.error(f"{args.binary} is not there; make a pack with tests/gpu/pack.sh")
    return args


def dry_run(args, cells):
    for number, cell in enumerate(cells, 1):
        w = cell.workload
        print(f"{number:4}  {cell.name:32} {w.shape} {w.batch} x {w.seq}, r={w.rank}, {plan.SIDES[cell.side]}")
    print(f"{len(cells)} cells of at most {args.limit:.0f} s; {args.warmup} + {args.steps} steps each")
    return 0


def run(args, cell):
    """One process; its report with what was seen of the GPU meanwhile, or why there is none."""
    lacking = [option for option in cell.workload.options if option not in bench_help(args)]
    if is_ours(cell) and lacking:
        return {"status": f"`ferrotune bench` has no {lacking[0]}"}
    log = args.work / "log.txt"
    try:
        case = make_case(args, cell.workload, log)
    except RuntimeError as error:
        return {"status": f"failed: {error}"}
    variant = plan.OURS_WITH.get(cell.side)
    environment = record.with_cuda_libraries(os.environ) | (variant.variables if variant else {})
    before = len(log.read_text(errors="replace")) if log.exists() else 0
    with Sampler() as sampler:
        code, output, seconds = run_limited(command(args, cell, case), args.limit, log, env=environment)
    if code != 0 and is_ours(cell) and OTHER_GPU in log.read_text(errors="replace")[before:]:
        return {"status": "for another GPU", "seconds": seconds}
    if code != 0:
        return {"status": NO_RESULT.get(code, f"failed: exit code {code}"), "seconds": seconds}
    result = {"status": "done", "seconds": seconds, "seen": sampler.summary(), **record.first_json(output)}
    return result | {"tokens_per_step": real_tokens(case, cell.workload.batch)}


def is_ours(cell):
    return cell.side == plan.OURS or cell.side in plan.OURS_WITH


def bench_help(args):
    return subprocess.run([args.binary, "bench", "--help"], capture_output=True, text=True).stdout


def command(args, cell, case):
    w = cell.workload
    steps = ["--warmup", args.warmup, "--steps", args.steps, "--device", args.device, "--dtype", w.dtype]
    if cell.side == plan.ROOFLINE:
        shape = ["--config", case / "config.json", "--batch", w.batch, "--seq", w.seq]
        return [sys.executable, HERE / "roofline.py", *shape, *steps]
    files = ["--model", model_folder(args, w), "--adapter", case / "adapter", "--rows", case / "rows.jsonl"]
    common = [*files, "--batch", w.batch, *steps]
    if is_ours(cell):
        variant = plan.OURS_WITH.get(cell.side, plan.With(""))
        return [args.binary, "bench", "--json", *common, *w.options, *variant.options]
    return [sys.executable, PEERS / "peft_step.py", *common, "--variant", cell.side]


def case_folder(args, w):
    mixed = "-mixed" if w.mixed else ""
    return args.work / f"{w.shape}-{w.dtype}-{w.batch}x{w.seq}-r{w.rank}-p{w.dropout}{mixed}"


def model_folder(args, w):
    """Workloads of one shape share the model file."""
    return args.work / f"{w.shape}-{w.dtype}"


def make_case(args, w, log):
    case = case_folder(args, w)
    if (case / "complete").exists():
        return case
    case.mkdir(parents=True, exist_ok=True)
    config = subprocess.run([args.binary, "bench", "--shape", w.shape, "--config"], capture_output=True, text=True)
    (case / "config.json").write_text(config.stdout)
    command = [sys.executable, PEERS / "make_case.py", "--config", case / "config.json", "--out", case]
    command += ["--model", model_folder(args, w), "--batch", w.batch, "--seq", w.seq, "--rank", w.rank]
    command += ["--dropout", w.dropout, "--dtype", w.dtype, "--device", args.device]
    command += ["--mixed-lengths"] if w.mixed else []
    code, _, _ = run_limited(command, MADE_IN, log)
    if code != 0:
        raise RuntimeError(f"writing the model ended with {code}; see {log.name}")
    return case


def real_tokens(case, batch):
    """Tokens of a step without padding, the mean over the file."""
    rows = [len(line.split(",")) for line in (case / "rows.jsonl").read_text().splitlines()]
    return sum(rows) * batch / len(rows)


def write(args, ledger):
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    gpu = record.gpu()
    head = {
        "date": now,
        "commit": ledger.subject["commit"],
        "machine": record.machine() | gpu,
        "steps": ledger.subject["steps"],
    }
    name = gpu.get("gpu", "cpu-trial").replace(" ", "-").lower()
    return report.write(args.out / f"{name}-{now[:10]}", head, ledger.results)


if __name__ == "__main__":
    sys.exit(main())
