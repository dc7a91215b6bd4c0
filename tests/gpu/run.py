"""Tests on a GPU from a folder that tests/gpu/pack.sh made.

Each step has a time limit and keeps its result: the same command goes on where it stopped, and tries
again what failed. Exit code: 0 nothing failed, 1 something did, 4 the budget ran out first (run it again).
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "benches" / "peers"))

import record  # noqa: E402
import steps  # noqa: E402
from ledger import Budget, Ledger, end_children_on_sigterm  # noqa: E402


def main():
    args = arguments()
    end_children_on_sigterm()
    pack = steps.Pack(args.pack, args.work, args.device)
    args.work.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(pack)
    print("\n".join(f"{name:>14}  {value}" for name, value in facts.items()), flush=True)
    all_steps = steps.steps(pack)
    if args.list:
        print("\n".join(f"{step.name:40} at most {step.limit} s" for step in all_steps))
        return 0
    wanted = [step for step in all_steps if not args.steps or any(step.name.startswith(s) for s in args.steps)]
    ledger = Ledger(args.state or args.work / "results.json", {name: facts[name] for name in ("commit", "device", "gpu")})
    budget = Budget(args.budget)
    left = 0
    for step in wanted:
        if ledger.results.get(step.name, {}).get("status") == "passed":
            continue
        if not budget.allows(step.limit):
            left += 1
            continue
        ledger.put(step.name, result := steps.run(step, pack))
        print(f"{result['status']:>8}  {step.name}  {result['seconds']:.1f} s  {result['note']}", flush=True)
        write(args, facts, ledger)
    return summary(args, facts, ledger, left)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=pathlib.Path, help="folder that pack.sh made")
    parser.add_argument("steps", nargs="*", help="names of steps, or how they begin [default: all]")
    parser.add_argument("--list", action="store_true", help="name the steps, and stop")
    parser.add_argument("--budget", type=float, help="begin no step that may end after this many seconds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--work", type=pathlib.Path, help="runs, logs, kept results [default: in the temporary folder]")
    parser.add_argument("--state", type=pathlib.Path, help="kept results [default: WORK/results.json]")
    parser.add_argument("--out", type=pathlib.Path, help="JSON, table and log go here [default: $OUT, else WORK]")
    args = parser.parse_intermixed_args()
    args.work = (args.work or pathlib.Path(tempfile.gettempdir()) / "ferrotune-gpu").absolute()
    args.out = args.out or pathlib.Path(os.environ.get("OUT") or args.work)
    args.pack = args.pack.absolute()
    if not (args.pack / "manifest.json").exists():
        parser.error(f"{args.pack} is no pack; make one with tests/gpu/pack.sh")
    return args


def machine_facts(pack):
    manifest = json.loads((pack.folder / "manifest.json").read_text())
    here = platform.libc_ver()[1]
    if tuple(map(int, here.split("."))) < tuple(map(int, manifest["glibc"].split("."))):
        sys.exit(
            f"error: the pack needs glibc {manifest['glibc']}, this machine has {here}; build it on an older system"
        )
    gpu = record.gpu()
    return {
        "commit": manifest["commit"],
        "device": pack.device,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, glibc {here}",
        "cpu": f"{record.machine()['cpu']}, {os.cpu_count()} cores",
        "gpu": f"{gpu['gpu']}, {gpu['gpu_mib']} MiB" if gpu else "none that nvidia-smi shows",
        "driver": gpu.get("driver", "none"),
        "libraries": pack.environment.get("FERROTUNE_CUDA_LIBRARIES", "those of the system"),
        "torch": torch_version(),
        "sanitizer": shutil.which("compute-sanitizer") or "none",
    }


def torch_version():
    code = "import torch; print(torch.__version__, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def write(args, facts, ledger):
    args.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": facts, "steps": ledger.results}
    (args.out / "gpu-tests.json").write_text(json.dumps(document, indent=1) + "\n")
    log = args.work / "log.txt"
    if log.exists() and args.out != args.work:
        shutil.copy(log, args.out / "gpu-tests.log")


def summary(args, facts, ledger, left):
    write(args, facts, ledger)
    counts = dict.fromkeys(["passed", "failed", "skipped"], 0)
    print(f"\n{'step':40}{'status':>8}{'seconds':>9}  note")
    for name, result in ledger.results.items():
        counts[result["status"]] += 1
        print(f"{name:40}{result['status']:>8}{result['seconds']:>9.1f}  {result['note']}")
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + (f", {left} not begun" if left else ""))
    if counts["failed"]:
        return 1
    return 4 if left else 0


if __name__ == "__main__":
    sys.exit(main())
