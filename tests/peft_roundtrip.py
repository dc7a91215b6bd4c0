#!/usr/bin/env python3
"""Checks that an adapter written by ferrotune is the same model in PEFT.

    peft_roundtrip.py BASE_DIR ADAPTER_DIR LOGITS_FILE [--tolerance 1e-4]

LOGITS_FILE is a safetensors file written by ferrotune for this base and adapter:
`input_ids` [B, T] int64, `logits` [B, T, V] float32, and, optional, `attention_mask` [B, T]
int64. Logits are compared where the mask is 1; of a classifier, those of the last token.

The base and the adapter are loaded by transformers and peft in float32. The error is
max|a - b| / max|b|, b being PEFT's. PEFT only warns about tensors it did not find or could not
place, so that is checked here.

Exit status: 0 same, 1 different, 2 usage or unreadable input, 3 peft is not installed.
"""

import argparse
import os
import sys

SAME, DIFFERENT, BAD_INPUT, NOT_INSTALLED = 0, 1, 2, 3


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="directory of the base model")
    parser.add_argument("adapter", help="directory of the adapter")
    parser.add_argument("logits", help="safetensors file with input_ids and logits")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    return parser.parse_args()


def read_logits(path):
    from safetensors.torch import load_file

    tensors = load_file(path)
    missing = {"input_ids", "logits"} - tensors.keys()
    if missing:
        fail(BAD_INPUT, f"{path}: missing {sorted(missing)}, found {sorted(tensors)}")
    ids, logits = tensors["input_ids"], tensors["logits"]
    if ids.dim() != 2 or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        fail(BAD_INPUT, f"{path}: input_ids {list(ids.shape)} and logits {list(logits.shape)}, "
                        "expected [B, T] and [B, T, V]")
    return ids, logits.float(), tensors.get("attention_mask")


def fail(status, message):
    print(f"peft_roundtrip: {message}", file=sys.stderr)
    sys.exit(status)


def load_with_peft(base_directory, adapter_directory):
    """The adapted model, after checking that every tensor of the file found its place."""
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    saved = load_file(os.path.join(adapter_directory, "adapter_model.safetensors"))
    auto, keys = AutoModelForCausalLM, {}
    if PeftConfig.from_pretrained(adapter_directory).task_type == "SEQ_CLS":
        auto, keys = AutoModelForSequenceClassification, {"num_labels": len(saved["base_model.model.score.weight"])}
    base = auto.from_pretrained(
        base_directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **keys
    )
    model = PeftModel.from_pretrained(base, adapter_directory).eval()
    # Without the whole embedding matrices that PEFT adds where it finds the hub's config.
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    # What head and embedding share where they stay tied is in PEFT under both.
    if model.peft_config["default"].to_dict().get("ensure_weight_tying"):
        for name in [name for name in loaded if ".lm_head." in name and name not in saved]:
            del loaded[name]
    # So are rows of the embedding, which a tied head has in common with it.
    deltas = [name for name in loaded.keys() - saved.keys() if name.endswith("lm_head.trainable_tokens_delta")]
    for name in deltas:
        if any(torch.equal(loaded[name], loaded[other]) for other in saved.keys() & loaded.keys()
               if other.endswith("embed_tokens.trainable_tokens_delta")):
            del loaded[name]
    # RandLoRA's projections are in PEFT once more under each module that uses them.
    shared = tuple("." + name.removeprefix("base_model.") for name in saved if ".model." not in name)
    for name in loaded.keys() - saved.keys():
        if name.endswith(shared):
            del loaded[name]
    if saved.keys() != loaded.keys():
        fail(DIFFERENT, f"tensors differ: only in the file {sorted(saved.keys() - loaded.keys())}, "
                        f"only in PEFT {sorted(loaded.keys() - saved.keys())}")
    for name, tensor in saved.items():
        if not torch.equal(tensor.float(), loaded[name].float()):
            fail(DIFFERENT, f"`{name}` has other values in PEFT than in the file")
    return model


def main():
    arguments = parse_arguments()
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        fail(NOT_INSTALLED, f"{error}; install peft and transformers to run this check: "
                            "pip install peft transformers")
    for path in (arguments.base, arguments.adapter, arguments.logits):
        if not os.path.exists(path):
            fail(BAD_INPUT, f"{path} does not exist")
    ids, ours, mask = read_logits(arguments.logits)
    model = load_with_peft(arguments.base, arguments.adapter)
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=mask).logits.float()
    if model.active_peft_config.is_prompt_learning:
        theirs = theirs[:, -ids.shape[1]:]  # without those of virtual tokens
    if theirs.dim() == 2:
        ours, mask = ours[:, -1], None
    if ours.shape != theirs.shape:
        fail(DIFFERENT, f"logits are {list(ours.shape)} here and {list(theirs.shape)} in PEFT")
    if mask is not None:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    same = error <= arguments.tolerance  # False for NaN
    print(f"{'same' if same else 'DIFFERENT'}: max|a-b|/max|b| = {error:.3e}, tolerance "
          f"{arguments.tolerance:g}, {len(ids)} sequences, peft {peft.__version__}, "
          f"transformers {transformers.__version__}, torch {torch.__version__}")
    sys.exit(SAME if same else DIFFERENT)


if __name__ == "__main__":
    main()
