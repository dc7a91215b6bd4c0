#!/usr/bin/env python3
"""Several adapters over one base: in one run, beside the same runs one after another.

    benches/several.py --ferrotune target/release/ferrotune [--adapters 4] [--tokens 64] [--rows 1] [--steps 20] [--repeats 3]

A random base (768 x 12 unless --shape says otherwise), LoRA r = 16 on every linear of the layers, rows of random tokens, every
adapter with its own rows and seed. Both sides train the same micro-batches, and the final losses must agree. Time is that of
the steps (`train_runtime`), without reading the base, which one run does once and the others once each. Prints one
JSON document.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples/demo/base"
SHAPES = {  # hidden, layers, mlp, heads, kv heads, vocabulary
    "256x4": (256, 4, 688, 4, 2, 8192),
    "768x12": (768, 12, 2048, 12, 4, 32000),
    "1B": (2048, 16, 8192, 32, 8, 32000),
}


def write_base(folder, shape):
    hidden, layers, mlp, heads, kv_heads, vocabulary = SHAPES[shape]
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_rows(path, seed, count, tokens):
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            ids = [draw.randrange(3, 100) for _ in range(tokens)]
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def finished(command):
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [event for event in events if event["event"] == "run_finished"]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ferrotune", required=True)
    arguments.add_argument("--shape", choices=sorted(SHAPES), default="768x12")
    arguments.add_argument("--adapters", type=int, default=4)
    arguments.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    arguments.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--repeats", type=int, default=3)
    args = arguments.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        write_base(work / "base", args.shape)
        shared = {
            "model_name_or_path": str(work / "base"),
            "random_init": True,
            "use_peft": True,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target_modules": "all-linear",
            "max_length": args.tokens,
            "per_device_train_batch_size": args.rows,
            "max_steps": args.steps,
            "learning_rate": 1e-3,
            "logging_steps": args.steps,
            "save_strategy": "no",
            "report_to": "none",
            "overwrite_output_dir": True,
        }
        own = []
        for number in range(args.adapters):
            rows = work / f"rows{number}.jsonl"
            write_rows(rows, number, args.rows * args.steps, args.tokens)
            own.append({"name": f"adapter{number}", "train_file": [str(rows)], "lora_r": 16})

        def run(name, keys):
            path = work / f"{name}.yaml"
            path.write_text(json.dumps(shared | {"output_dir": str(work / name)} | keys))
            return finished([args.ferrotune, "train", str(path)])

        for _ in range(args.repeats):
            alone = [run(f"alone{n}", {"train_file": keys["train_file"]})[0] for n, keys in enumerate(own)]
            together = sorted(run("together", {"adapters": own}), key=lambda event: event["adapter"])
            for one, other in zip(alone, together):
                if abs(one["train_loss"] - other["train_loss"]) > 1e-4:
                    raise SystemExit(f"different losses: {one} {other}")
            pairs.append((sum(e["train_runtime"] for e in alone), max(e["train_runtime"] for e in together)))
    apart, joined = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    tokens = args.adapters * args.steps * args.rows * args.tokens
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    document = {
        "what": "several adapters in one run beside the same runs one after another",
        "date": date.today().isoformat(),
        "commit": commit,
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "workload": {k: getattr(args, k) for k in ("shape", "adapters", "rows", "tokens", "steps", "repeats")},
        "seconds_one_after_another": round(apart, 3),
        "seconds_in_one_run": round(joined, 3),
        "tokens_per_second_one_after_another": round(tokens / apart),
        "tokens_per_second_in_one_run": round(tokens / joined),
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "ratios": [round(a / b, 2) for a, b in pairs],
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
