"""Writes what both sides read: a model of random weights, an adapter of random A and B, token rows.

B is random too (peft's `init_lora_weights=False`), so that the adapter shows in the first loss and every
trained tensor has a gradient from the first step on.
"""

import argparse
import json
import pathlib

parser = argparse.ArgumentParser()
parser.add_argument("--config", required=True, help="config.json of the shape")
parser.add_argument("--out", required=True, type=pathlib.Path)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--seq", type=int, required=True)
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
args = parser.parse_args()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

STEPS = 4

torch.manual_seed(0)
args.out.mkdir(parents=True, exist_ok=True)
config = AutoConfig.for_model(**json.loads(pathlib.Path(args.config).read_text()))
dtype = getattr(torch, args.dtype)
model = AutoModelForCausalLM.from_config(config, dtype=dtype)
model.save_pretrained(args.out / "model", safe_serialization=True)
lora = LoraConfig(
    r=args.rank,
    lora_alpha=2 * args.rank,
    lora_dropout=0.0,
    target_modules="all-linear",
    init_lora_weights=False,
    task_type="CAUSAL_LM",
)
get_peft_model(model, lora).save_pretrained(args.out / "adapter", safe_serialization=True)
rows = torch.randint(config.vocab_size, (STEPS * args.batch, args.seq))
with open(args.out / "rows.jsonl", "w") as file:
    file.writelines(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows)
(args.out / "complete").touch()
