"""Full optimizer steps of LoRA with transformers + peft, timed. Prints one JSON object.

zero_grad, forward with labels, backward, clip_grad_norm_(1.0), AdamW(fused), sdpa attention. As it stands:
eager, no gradient checkpointing, adapters in f32 whatever the base is, as peft does by default; --variant
names other ways (variants.py). Ends with 3 where a package is missing, with 71 where memory runs out.
"""

import argparse
import json
import os
import sys

import procfs

VARIANTS = ["eager", "bf16_adapters", "trl_defaults", "compiled", "liger", "unsloth", "unsloth_style"]
NOT_INSTALLED, OUT_OF_MEMORY = 3, 71


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--variant", choices=VARIANTS, default="eager")
    return parser.parse_args()


args = arguments()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import measure  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import variants  # noqa: E402


def main():
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    batches = read_batches()
    args.seq = max(batch["input_ids"].shape[1] for batch in batches)
    memory = measure.Memory(args.device)
    model, context = variants.load(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, fused=True)
    memory.loaded()
    exec_to_loaded = procfs.seconds_since_exec()

    def step(batch):
        optimizer.zero_grad(set_to_none=True)
        with context:
            loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss, norm

    clock = measure.Clock(args.device)
    losses, grad_norms, times = [], [], []
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            cpu_before = procfs.cpu_seconds()
        batch = batches[number % len(batches)]
        clock.start()
        loss, norm = step(batch)
        losses.append(loss.item())
        grad_norms.append(norm.item())
        seconds = clock.seconds()
        if number == 0:
            exec_to_first_step = procfs.seconds_since_exec()
        if number >= args.warmup:
            times.append(seconds)
    cpu_seconds = (procfs.cpu_seconds() - cpu_before) / args.steps
    sizes = memory.report()
    return {
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "variant": args.variant,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "losses": losses,
        "grad_norms": grad_norms,
        "step_times": times,
        "cpu_seconds_per_step": cpu_seconds,
        "launches_per_step": measure.count_launches(lambda: step(batches[0])) if args.device == "cuda" else None,
        "trainable_parameters": sum(p.numel() for p in trained),
        **sizes,
        "seconds_exec_to_loaded": exec_to_loaded,
        "seconds_exec_to_first_step": exec_to_first_step,
    }


def read_batches():
    """Steps of --batch rows; rows of different lengths are padded to the longest, with a mask."""
    with open(args.rows) as file:
        rows = [json.loads(line)["input_ids"] for line in file]
    return [make_batch(rows[i : i + args.batch]) for i in range(0, len(rows), args.batch)]


def make_batch(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=args.device)
    lengths = torch.tensor([len(row) for row in rows], device=args.device)
    if bool((lengths == longest).all()):
        return {"input_ids": ids, "labels": ids}
    mask = torch.arange(longest, device=args.device) < lengths[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), "attention_mask": mask.long()}


if __name__ == "__main__":
    try:
        print(json.dumps(main()))
    except variants.NotInstalled as missing:
        print(f"not installed: {missing}", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    except (torch.OutOfMemoryError, MemoryError) as error:
        print(f"out of memory: {error}", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
