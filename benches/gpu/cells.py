"""What is measured, in order of worth, and what it should reach."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows of a step on a model; `shape` is one of `ferrotune bench --shape`."""

    name: str
    shape: str
    batch: int
    seq: int
    rank: int = 16
    dropout: float = 0.0
    mixed: bool = False
    dtype: str = "bfloat16"
    # Options that `ferrotune bench` must have.
    options: tuple = ()


WORKLOADS = [
    Workload("8B-4k", "8B", 2, 2048),
    Workload("8B-16k", "8B", 8, 2048),
    Workload("8B-8k", "8B", 4, 2048),
    Workload("1B-4k", "1B", 2, 2048),
    Workload("1B-2k", "1B", 1, 2048),
    Workload("1B-16k", "1B", 8, 2048),
    Workload("8B-16k-long", "8B", 2, 8192),
    Workload("8B-16k-nf4", "8B", 8, 2048, options=("--load-in-4bit",)),
    Workload("8B-4k-nf4", "8B", 2, 2048, options=("--load-in-4bit",)),
    Workload("8B-mixed", "8B", 32, 2048, mixed=True),
    Workload("8B-16k-r64", "8B", 8, 2048, rank=64),
    Workload("8B-16k-dropout", "8B", 8, 2048, dropout=0.1),
    Workload("70Bx8-4k-nf4", "70Bx8", 2, 2048, options=("--load-in-4bit",)),
    # For trying the scripts where there is no GPU; not among the defaults.
    Workload("tiny", "tiny", 4, 64, dtype="float32"),
    Workload("tiny-mixed", "tiny", 4, 128, dropout=0.1, mixed=True, dtype="float32"),
]
TRIALS = ("tiny", "tiny-mixed")

OURS = "ferrotune"


@dataclasses.dataclass(frozen=True)
class With:
    """ferrotune with variables set, or other options of `ferrotune bench`."""

    label: str
    options: tuple = ()
    variables: dict = dataclasses.field(default_factory=dict)


# Beside the first: what is not the default, and may become it.
OURS_WITH = {
    "ferrotune_wgmma": With("attention by wgmma", variables={"FERROTUNE_ATTENTION": "wgmma"}),
    "ferrotune_tma": With("attention by wgmma and TMA", variables={"FERROTUNE_ATTENTION": "tma"}),
    "ferrotune_issued": With("no recorded steps", ("--no-cuda-graph",)),
    "ferrotune_measured": With("products by measured algorithms", ("--gemm-tuning", "measure")),
    "ferrotune_drop_gate_up": With("gate and up computed again", ("--keep", "drop-gate-up")),
    "ferrotune_recomputing": With("layers computed again", ("--keep", "input")),
    "ferrotune_offloading": With("activations in host memory", ("--activation-offloading",)),
}
ROOFLINE = "roofline"
# Label of every side in the tables; peers are variants of ../peers/peft_step.py.
SIDES = {
    OURS: "ferrotune",
    **{side: f"ferrotune, {other.label}" for side, other in OURS_WITH.items()},
    "bf16_adapters": "peft, adapters in bf16, no checkpointing",
    "compiled": "the same under torch.compile",
    ROOFLINE: "bare products and SDPA in a CUDA graph",
    "eager": "peft, adapters in f32 (its default), no checkpointing",
    "trl_defaults": "peft with TRL's defaults: checkpointing, autocast",
    "liger": "peft, adapters in bf16, Liger kernels",
    "unsloth": "Unsloth, its defaults",
    "unsloth_style": "a substitute in Unsloth's style; says nothing of Unsloth",
}
FIRST = (OURS, "ferrotune_wgmma", "bf16_adapters", "compiled", ROOFLINE)
THEN = ("eager", "trl_defaults", "liger", "unsloth", "unsloth_style")
# Those without which no table is made; the rest where they are asked for.
DEFAULT_SIDES = FIRST + THEN
FIRST_WORKLOADS = 3

# (workload, side): tokens/s of ferrotune over those of the side, at least.
GOALS = {
    ("8B-16k", "trl_defaults"): 2.2,
    ("8B-8k", "eager"): 1.6,
    ("8B-8k", "bf16_adapters"): 1.35,
    ("8B-4k", "bf16_adapters"): 1.35,
    ("8B-8k", "compiled"): 1.2,
    ("8B-4k", "compiled"): 1.2,
    ("8B-8k", "liger"): 1.2,
    ("8B-16k", "unsloth"): 1.4,
    ("8B-16k", ROOFLINE): 0.9,
    ("1B-4k", "eager"): 2.5,
    ("1B-4k", "compiled"): 1.4,
}
# GPU memory of ferrotune over that of the side, at most.
MEMORY_GOALS = {
    ("8B-8k", "eager"): 0.5,
    ("8B-4k", "eager"): 0.5,
    ("8B-8k", "bf16_adapters"): 0.55,
    ("8B-8k", "compiled"): 0.7,
    ("8B-8k", "liger"): 0.7,
    ("1B-4k", "eager"): 0.6,
}
# (workload, another): ms/step of ferrotune on the one over those on the other, at most.
STEP_GOALS = {("8B-16k-nf4", "8B-16k"): 1.04, ("8B-4k-nf4", "8B-4k"): 1.04}
# Model FLOP/s of ferrotune over the rate of a large product in the same process, at least.
PEAK_GOALS = {"1B-16k": 0.6, "8B-16k": 0.75}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One process: a side on a workload."""

    workload: Workload
    side: str
    repeat: int

    @property
    def name(self):
        return f"{self.workload.name}/{self.side}/{self.repeat}"


def find(names):
    """Workloads by name, in order of worth; all but the trials without names."""
    known = [workload.name for workload in WORKLOADS]
    for name in names:
        if name not in known:
            raise SystemExit(f"error: no workload `{name}`; known: {', '.join(known)}")
    return [w for w in WORKLOADS if (w.name in names if names else w.name not in TRIALS)]


def ordered(workloads, sides, repeats):
    """Cells in order of worth; the sides of a group take turns."""
    more = tuple(side for side in SIDES if side not in DEFAULT_SIDES)
    groups = [(w, FIRST + more) for w in workloads[:FIRST_WORKLOADS]]
    groups += [(w, (OURS, *THEN)) for w in workloads[:FIRST_WORKLOADS]]
    groups += [(w, FIRST + more + THEN) for w in workloads[FIRST_WORKLOADS:]]
    cells = {}
    for workload, group in groups:
        for repeat in range(repeats):
            for side in group:
                if side in sides and measurable(workload, side):
                    # A dictionary keeps the first place of a cell that two groups share.
                    cells.setdefault((workload.name, side, repeat), Cell(workload, side, repeat))
    return list(cells.values())


def measurable(workload, side):
    """Whether the side can run the workload and means the same by it."""
    if side == ROOFLINE:
        return not workload.mixed
    # Quantised peers need bitsandbytes, which peft_step.py does not load: QLoRA is held against our LoRA.
    if workload.options:
        return side == OURS or side in OURS_WITH
    return not (workload.dropout and side == "unsloth_style")
