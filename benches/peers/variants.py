"""The ways in which others train the same adapter. Each makes a model from the same files."""

import contextlib
import json
import pathlib

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

import unsloth_style


class NotInstalled(Exception):
    """A variant needs a package that is not there."""


def load(args):
    """The trainable model, and the context its forward runs in."""
    if args.variant == "unsloth":
        return _unsloth(args), contextlib.nullcontext()
    if args.variant == "liger":
        _apply_liger(args.model)
    base = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=getattr(torch, args.dtype),
        attn_implementation="sdpa",
        use_safetensors=True,
        device_map={"": args.device} if args.device == "cuda" else None,
    )
    base.config.use_cache = False
    bf16_adapters = args.variant in ("bf16_adapters", "compiled", "liger", "unsloth_style")
    model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True, autocast_adapter_dtype=not bf16_adapters)
    if bf16_adapters:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, args.dtype))
    model.train()
    context = contextlib.nullcontext()
    if args.variant == "trl_defaults":
        # SFTConfig: gradient_checkpointing=True, bf16=True.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
        context = torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")
    elif args.variant == "compiled":
        model = torch.compile(model, dynamic=False)
    elif args.variant == "unsloth_style":
        unsloth_style.apply(model)
    return model, context


def _apply_liger(model):
    try:
        from liger_kernel.transformers import _apply_liger_kernel
    except ImportError as error:
        raise NotInstalled(f"liger_kernel: {error}") from error
    _apply_liger_kernel(transformers.AutoConfig.from_pretrained(model).model_type)


def _unsloth(args):
    try:
        from unsloth import FastLanguageModel
    except ImportError as error:
        raise NotInstalled(f"unsloth: {error}") from error
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = pathlib.Path(args.adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    base, _ = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=args.seq, dtype=getattr(torch, args.dtype), load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["target_modules"],
        use_gradient_checkpointing="unsloth",
    )
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    return model
