"""Full optimizer steps of LoRA with transformers + peft, timed. Prints one JSON object.

zero_grad, forward with labels, backward, clip_grad_norm_(1.0), AdamW(fused): eager, sdpa attention, no
gradient checkpointing. peft keeps its adapters in f32 whatever the base is, as it does by default.
"""

import argparse
import json
import os
import time

import procfs

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--rows", required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--warmup", type=int, required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--learning-rate", type=float, default=1e-4)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(args.threads)
transformers.utils.logging.disable_progress_bar()
start_rss = procfs.status_bytes("VmRSS")

base = AutoModelForCausalLM.from_pretrained(
    args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa", use_safetensors=True
)
base.config.use_cache = False
model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, fused=True)
with open(args.rows) as file:
    rows = torch.tensor([json.loads(line)["input_ids"] for line in file])
batches = rows.split(args.batch)

loaded_rss, load_peak = procfs.status_bytes("VmRSS"), procfs.status_bytes("VmHWM")
exec_to_loaded = procfs.seconds_since_exec()
procfs.reset_peak()
losses, grad_norms, times = [], [], []
exec_to_first_step = None
for step in range(args.warmup + args.steps):
    if step == args.warmup:
        cpu_before = procfs.cpu_seconds()
    ids = batches[step % len(batches)]
    begin = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    losses.append(loss.item())
    grad_norms.append(norm.item())
    seconds = time.perf_counter() - begin
    if step == 0:
        exec_to_first_step = procfs.seconds_since_exec()
    if step >= args.warmup:
        times.append(seconds)
step_peak = procfs.status_bytes("VmHWM")

print(
    json.dumps(
        {
            "version": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
            "threads": torch.get_num_threads(),
            "losses": losses,
            "grad_norms": grad_norms,
            "step_times": times,
            "cpu_seconds_per_step": (procfs.cpu_seconds() - cpu_before) / args.steps,
            "trainable_parameters": sum(p.numel() for p in trained),
            "start_rss": start_rss,
            "loaded_rss": loaded_rss,
            "step_peak_rss": step_peak,
            "peak_rss": max(load_peak, step_peak),
            "memory_above_start": step_peak - start_rss,
            "memory_above_loaded": step_peak - loaded_rss,
            "seconds_exec_to_loaded": exec_to_loaded,
            "seconds_exec_to_first_step": exec_to_first_step,
        }
    )
)
