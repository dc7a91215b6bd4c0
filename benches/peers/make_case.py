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
parser.add_argument("--model", type=pathlib.Path, help="where the model is, or will be [default: OUT/model]")
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--seq", type=int, required=True)
parser.add_argument("--mixed-lengths", action="store_true", help="rows of log-normal lengths, median 380, up to SEQ")
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--dropout", type=float, default=0.0)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where random weights are drawn")
args = parser.parse_args()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

STEPS = 4
MEDIAN_LENGTH, SPREAD = 380, 0.8


def write_model(folder, config):
    if (folder / "complete").exists():
        return
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    model.save_pretrained(folder)
    (folder / "complete").touch()


def write_adapter(folder, config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    for name, parameter in list(model.named_parameters()):
        if parameter.requires_grad:
            module = model.get_submodule(name.rpartition(".")[0])
            # As wide as peft's own random A and B: uniform in 1 / sqrt(fan in).
            bound = parameter.shape[1] ** -0.5
            values = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound)
            module.weight = torch.nn.Parameter(values)
    model.save_pretrained(folder)


def lengths(rows):
    if not args.mixed_lengths:
        return [args.seq] * rows
    drawn = torch.empty(rows).log_normal_(torch.tensor(MEDIAN_LENGTH).log().item(), SPREAD)
    return drawn.round().long().clamp(2, args.seq).tolist()


torch.manual_seed(0)
args.out.mkdir(parents=True, exist_ok=True)
config = AutoConfig.for_model(**json.loads(pathlib.Path(args.config).read_text()))
write_model(args.model or args.out / "model", config)
write_adapter(args.out / "adapter", config)
rows = [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths(STEPS * args.batch)]
with open(args.out / "rows.jsonl", "w") as file:
    file.writelines(json.dumps({"input_ids": row}) + "\n" for row in rows)
(args.out / "complete").touch()
