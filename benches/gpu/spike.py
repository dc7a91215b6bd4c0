"""The first minutes on a GPU: what the memory layout of LoRA is decided by. One table, one JSON.

1. Copy bandwidth (bytes read + written) and the rate of a large product, on random data.
2. Y = X W^T + (X A^T) (sB)^T and dX = dY W + (dY sB) A on the linears of a shape, four ways:
   bare       X W^T alone: what the adapter is added to
   augmented  [X|S] [W|sB]^T with S written into spare columns of X's rows (K longer by r)
   beta       X W^T, then S (sB)^T added by the product (beta = 1)
   separate   X W^T, S (sB)^T into a buffer of its own, then an addition
Every time is the median of runs in turn over input sets that do not fit in the L2 cache together.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "peers"))

import measure  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402

# Linears of a layer, fused as the engine fuses them: {name: [out, in]}.
SHAPES = {
    "tiny": {"qkv": [128, 64], "o": [64, 64], "gate_up": [384, 64], "down": [64, 192]},
    "1B": {"qkv": [3072, 2048], "o": [2048, 2048], "gate_up": [16384, 2048], "down": [2048, 8192]},
    "8B": {"qkv": [6144, 4096], "o": [4096, 4096], "gate_up": [28672, 4096], "down": [4096, 14336]},
}
WAYS = ["bare", "augmented", "beta", "separate"]
SET_BYTES = 1 << 28


class Linear:
    """The operands of one linear, forward or backward, in every layout; dimensions are out and in alike.

    Forward: X [T, in], W [out, in], A [r, in], B [out, r]. Backward is the same with X = dY and the
    transposed W, A and B swapped: dX = dY W + (dY sB) A.
    """

    def __init__(self, rows, out_features, in_features, rank, backward, random):
        if backward:
            out_features, in_features = in_features, out_features
        wide_x = random(rows, in_features + rank)
        self.x, self.wide_x, self.spare = random(rows, in_features), wide_x, wide_x[:, in_features:]
        self.wide_x_body = wide_x[:, :in_features]
        # Backward reads W as it lies, [out, in] of the forward, so its transpose is a view there.
        wide_w = random(in_features + rank, out_features).t() if backward else random(out_features, in_features + rank)
        self.wide_w = wide_w
        self.w = random(in_features, out_features).t() if backward else random(out_features, in_features)
        self.low = random(rank, in_features)
        self.high = random(out_features, rank)
        self.y, self.update = random(rows, out_features), random(rows, out_features)
        self.s = random(rows, rank)

    def bare(self):
        torch.mm(self.x, self.w.t(), out=self.y)

    def augmented(self):
        torch.mm(self.wide_x_body, self.low.t(), out=self.spare)
        torch.mm(self.wide_x, self.wide_w.t(), out=self.y)

    def beta(self):
        torch.mm(self.x, self.w.t(), out=self.y)
        torch.mm(self.x, self.low.t(), out=self.s)
        self.y.addmm_(self.s, self.high.t())

    def separate(self):
        torch.mm(self.x, self.w.t(), out=self.y)
        torch.mm(self.x, self.low.t(), out=self.s)
        torch.mm(self.s, self.high.t(), out=self.update)
        self.y.add_(self.update)


def main():
    args = arguments()
    gauge = Gauge(args)
    ceilings = {"copy_bytes_per_second": gauge.copy(), "gemm_flops": gauge.gemm()}
    rows = [measured for shape in args.shapes for measured in linears(args, gauge, shape)]
    result = {
        "commit": record.commit(),
        "machine": record.machine() | record.gpu(),
        "torch": torch.__version__,
        **ceilings,
        "linears": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "spike.json").write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"copy {ceilings['copy_bytes_per_second'] / 1e12:.3f} TB/s, product {ceilings['gemm_flops'] / 1e12:.1f} TFLOP/s"
    )
    print(table(rows))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["8B", "1B"], help="of " + ", ".join(SHAPES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    parser.add_argument("--ranks", default="16,32,64")
    parser.add_argument("--rows", default="2048,4096,16384", help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "out")))
    args = parser.parse_args()
    unknown = [shape for shape in args.shapes if shape not in SHAPES]
    if unknown:
        parser.error(f"no shape `{unknown[0]}`; known: {', '.join(SHAPES)}")
    args.ranks, args.rows = ([int(n) for n in text.split(",")] for text in (args.ranks, args.rows))
    return args


class Gauge:
    """Timing on one device."""

    def __init__(self, args):
        self.device, self.repeats = args.device, args.repeats
        self.small = args.device == "cpu"
        torch.manual_seed(0)

    def random(self, *shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device=self.device).normal_(std=0.02)

    def seconds(self, runs, inner=10):
        """Median seconds of each of `runs`, {name: function of a set's number}, taken in turn.

        A sample is `inner` calls on end, each on another input set, so that launches overlap work.
        """
        inner = 1 if self.small else inner
        samples = {name: [] for name in runs}
        for repeat in range(self.repeats + 2):
            for name, run in runs.items():
                clock = measure.Clock(self.device)
                clock.start()
                for call in range(inner):
                    run(repeat * inner + call)
                taken = clock.seconds() / inner
                if repeat >= 2:
                    samples[name].append(taken)
        return {name: statistics.median(times) for name, times in samples.items()}

    def copy(self):
        count = 1 << (20 if self.small else 31)
        source, target = self.random(count), self.random(count)
        taken = self.seconds({"copy": lambda _: target.copy_(source)}, inner=3)["copy"]
        return 2 * source.nbytes / taken

    def gemm(self):
        side = 256 if self.small else 8192
        a, b, c = (self.random(side, side) for _ in range(3))
        taken = self.seconds({"gemm": lambda _: torch.mm(a, b.t(), out=c)})["gemm"]
        return 2 * side**3 / taken


def linears(args, gauge, shape):
    for rows in args.rows:
        for rank in args.ranks:
            for name, (out_features, in_features) in SHAPES[shape].items():
                for backward in (False, True):
                    one = 2 * (rows * (in_features + out_features) + out_features * in_features)
                    # No two sets in a row, and together more than any L2.
                    sets = 2 if gauge.small else max(2, min(8, SET_BYTES // one))
                    made = [Linear(rows, out_features, in_features, rank, backward, gauge.random) for _ in range(sets)]
                    runs = {way: (lambda i, way=way: getattr(made[i % len(made)], way)()) for way in WAYS}
                    taken = gauge.seconds(runs)
                    direction = "backward" if backward else "forward"
                    key = {"shape": shape, "rows": rows, "rank": rank, "linear": name, "direction": direction}
                    yield key | {"seconds": taken, "flops": 2 * rows * in_features * out_features}


def table(rows):
    """Per shape, rows and rank: a layer's linears together, and what each way adds to the bare products."""
    groups = {}
    for row in rows:
        groups.setdefault((row["shape"], row["rows"], row["rank"]), []).append(row)
    lines = [
        f"{'shape':>6}{'tokens':>8}{'rank':>6}{'bare ms':>10}{'TFLOP/s':>9}" + "".join(f"{w:>12}" for w in WAYS[1:])
    ]
    for (shape, tokens, rank), group in groups.items():
        total = {way: sum(row["seconds"][way] for row in group) for way in WAYS}
        rate = sum(row["flops"] for row in group) / total["bare"] / 1e12
        line = f"{shape:>6}{tokens:>8}{rank:>6}{1e3 * total['bare']:>10.3f}{rate:>9.1f}"
        added = [f"{100 * (total[way] / total['bare'] - 1):+.1f} %" for way in WAYS[1:]]
        best = min(WAYS[1:], key=total.get)
        lines.append(line + "".join(f"{text:>12}" for text in added) + f"  {best}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
