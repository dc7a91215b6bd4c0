"""Cells as one JSON and one Markdown table."""

import json
import statistics

import cells as plan

# Relative: of the first loss, and of the first five, between ferrotune and peft.
FIRST_LOSS = {"float32": 1e-5, "bfloat16": 2e-3}
LOSSES = {"float32": 1e-4, "bfloat16": 2e-2}
CHECKED_STEPS = 5
GIB = 1 << 30


def write(path, head, results):
    """Writes PATH.json and PATH.md; returns the table and whether anything failed."""
    sides = combine(results)
    compare(sides)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(head | {"workloads": sides, "cells": results}, indent=1) + "\n")
    text = table(head, sides)
    path.with_suffix(".md").write_text(text)
    failed = any(side.get("failed") for workload in sides.values() for side in workload.values())
    return text, failed


def combine(results):
    """{workload: {side: figures}} with all repeats of a side pooled."""
    sides = {}
    for name, result in results.items():
        workload, side, _ = name.split("/")
        sides.setdefault(workload, {}).setdefault(side, []).append(result)
    return {w: {side: pool(runs) for side, runs in by_side.items()} for w, by_side in sides.items()}


def pool(runs):
    done = [run for run in runs if run["status"] == "done"]
    if not done:
        status = runs[0]["status"]
        return {"status": status, "failed": status.startswith("failed")}
    times = sorted(sum((run["step_times"] for run in done), []))
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    median = statistics.median(times)
    figures = {
        "status": "done",
        "failed": len(done) < len(runs),
        "repeats": len(done),
        "tokens_per_second": done[0]["tokens_per_step"] / median,
        "ms_per_step": {"median": 1e3 * median, "p10": 1e3 * deciles[0], "p90": 1e3 * deciles[8]},
        "losses": done[0].get("losses"),
    }
    seen = [run["seen"]["gpu_memory"] for run in done if run.get("seen")]
    told = [run["gpu_memory_above_start"] for run in done if run.get("gpu_memory_above_start") is not None]
    # From outside where it is to be had: the same measure for every side.
    figures["peak_bytes"] = max(seen or told or [run["memory_above_start"] for run in done])
    for key in ["launches_per_step", "share_of_gemm_peak", "flops_per_token", "version"]:
        if done[0].get(key) is not None:
            figures[key] = done[0][key]
    return figures


def compare(sides):
    """Adds ratios to every peer, and to ferrotune whether its losses are those of the peers."""
    for workload, by_side in sides.items():
        ours = by_side.get(plan.OURS, {})
        if ours.get("status") != "done":
            continue
        for side, theirs in by_side.items():
            if side == plan.OURS or theirs["status"] != "done":
                continue
            problem = losses_differ(workload, ours["losses"], theirs["losses"])
            if problem:
                # A wrong engine has no speed.
                theirs["failed"] = theirs["status"] = f"no ratio: {problem}"
                continue
            theirs["ratios"] = {
                "tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"],
                "peak_bytes": ours["peak_bytes"] / theirs["peak_bytes"],
            }


def losses_differ(workload, ours, theirs):
    found = next(w for w in plan.WORKLOADS if w.name == workload)
    if theirs is None or found.dropout:
        return None  # nothing is trained there; other masks are drawn here
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs)][:CHECKED_STEPS]
    if not apart[0] <= FIRST_LOSS[found.dtype]:
        return f"first losses differ by {apart[0]:.1e}"
    if not max(apart) <= LOSSES[found.dtype]:
        return f"losses differ by {max(apart):.1e}"
    return None


def one_line(result):
    if result["status"] != "done":
        return result["status"]
    median = statistics.median(result["step_times"])
    return f"{1e3 * median:.2f} ms/step, {result['tokens_per_step'] / median:.0f} tokens/s"


def table(head, sides):
    machine = head["machine"]
    warmup, steps = head["steps"]
    lines = [
        f"# {machine.get('gpu', machine['cpu'])}, {head['date'][:10]}",
        "",
        f"Commit {head['commit']}, driver {machine.get('driver', 'none')}, {warmup} + {steps} steps per process. "
        "Ratios are ferrotune over the other side, in brackets the goal: tokens/s at least, memory at most.",
        "",
        "| workload | side | tokens/s | ms/step (p10, p90) | peak GiB | tokens/s ratio | memory ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload, by_side in sides.items():
        for side, figures in by_side.items():
            lines.append(row(workload, side, figures))
    lines.append("")
    for workload, by_side in sides.items():
        ours = by_side.get(plan.OURS, {})
        if "share_of_gemm_peak" in ours:
            goal = plan.PEAK_GOALS.get(workload)
            text = f"{workload}: {100 * ours['share_of_gemm_peak']:.1f} % of the rate of a large product"
            lines.append(f"- {text}{f' (goal {100 * goal:.0f} %)' if goal else ''}")
    for (workload, other), goal in plan.STEP_GOALS.items():
        steps = [sides.get(name, {}).get(plan.OURS, {}).get("ms_per_step") for name in (workload, other)]
        if all(steps):
            value = steps[0]["median"] / steps[1]["median"]
            lines.append(f"- {workload}: {value:.3f} of a step of {other} (goal at most {goal:.2f})")
    return "\n".join(lines) + "\n"


def row(workload, side, figures):
    if "ms_per_step" not in figures:
        return f"| {workload} | {plan.SIDES[side]} | {figures['status']} | | | | |"
    ms = figures["ms_per_step"]
    words = [workload, plan.SIDES[side], f"{figures['tokens_per_second']:.0f}"]
    words += [f"{ms['median']:.2f} ({ms['p10']:.2f}, {ms['p90']:.2f})", f"{figures['peak_bytes'] / GIB:.2f}"]
    if "ratios" in figures:
        words.append(ratio(figures["ratios"]["tokens_per_second"], plan.GOALS.get((workload, side))))
        words.append(ratio(figures["ratios"]["peak_bytes"], plan.MEMORY_GOALS.get((workload, side))))
    else:
        words += ["" if figures["status"] == "done" else figures["status"], ""]
    return "| " + " | ".join(words) + " |"


def ratio(value, goal):
    return f"{value:.2f}x" + (f" [{goal:.2f}x]" if goal else "")
