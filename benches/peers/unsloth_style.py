"""A substitute where Unsloth is not installed: its ideas in plain PyTorch, on a PEFT model.

LoRA linears as one autograd function without casts, fused norm and SwiGLU (torch.compile), loss over
chunks of the head's rows, checkpointing of every layer with its input kept in host memory. It is not
Unsloth, and no claim about Unsloth follows from it.
"""

import types

import torch
from peft.tuners.lora import Linear
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

HEAD_ROWS = 2048


class LoraLinear(torch.autograd.Function):
    """x W^T + s (x A^T) B^T, with no gradient of W and no tensor kept but x."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ weight.t()
        out.addmm_(rows @ a.t(), b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, d_out):
        x, weight, a, b = ctx.saved_tensors
        rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
        d_low = (d_rows @ b).mul_(ctx.scale)
        d_b = (d_rows.t() @ (rows @ a.t())).mul_(ctx.scale)
        d_a = d_low.t() @ rows
        d_x = d_rows @ weight
        d_x.addmm_(d_low, a)
        return d_x.view_as(x), None, d_a, d_b, None


class OffloadedInput(torch.autograd.Function):
    """Runs a layer without keeping anything but its input, copied to pinned host memory meanwhile."""

    stream = None

    @staticmethod
    def forward(ctx, x, layer, keywords):
        ctx.layer, ctx.keywords, ctx.device = layer, keywords, x.device
        if OffloadedInput.stream is None:
            OffloadedInput.stream = torch.cuda.Stream()
        stream = OffloadedInput.stream
        ctx.kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ctx.kept.copy_(x, non_blocking=True)
        x.record_stream(stream)
        with torch.no_grad():
            return layer(x, **keywords)

    @staticmethod
    def backward(ctx, d_out):
        torch.cuda.current_stream().wait_stream(OffloadedInput.stream)
        x = ctx.kept.to(ctx.device, non_blocking=True).requires_grad_()
        with torch.enable_grad():
            out = ctx.layer(x, **ctx.keywords)
        torch.autograd.backward(out, d_out)
        return x.grad, None, None


def lora_forward(self, x, *_, **__):
    name = self.active_adapters[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return LoraLinear.apply(x, self.base_layer.weight, a, b, self.scaling[name])


@torch.compile(dynamic=False)
def fused_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@torch.compile(dynamic=False)
def fused_swiglu(gate, up):
    return functional.silu(gate) * up


def norm_forward(self, x):
    return fused_norm(x, self.weight, self.variance_epsilon)


def mlp_forward(self, x):
    return self.down_proj(fused_swiglu(self.gate_proj(x), self.up_proj(x)))


def chunk_loss(hidden, weight, labels):
    return functional.cross_entropy((hidden @ weight.t()).float(), labels, ignore_index=-100, reduction="sum")


def chunked_loss(hidden, weight, labels):
    """Mean cross-entropy of the next token; the logits of one chunk at a time."""
    labels = functional.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    rows = hidden.reshape(-1, hidden.shape[-1])
    total = rows.new_zeros((), dtype=torch.float32)
    for begin in range(0, len(rows), HEAD_ROWS):
        part = slice(begin, begin + HEAD_ROWS)
        total = total + checkpoint(chunk_loss, rows[part], weight, labels[part], use_reentrant=False)
    return total / (labels != -100).sum()


def model_forward(self, input_ids, labels, **keywords):
    hidden = self.model(input_ids=input_ids, use_cache=False, **keywords).last_hidden_state
    return types.SimpleNamespace(loss=chunked_loss(hidden, self.lm_head.weight, labels))


def layer_forward(self, hidden_states, **keywords):
    if hidden_states.is_cuda and hidden_states.requires_grad:
        return OffloadedInput.apply(hidden_states, self.plain_forward, keywords)
    return checkpoint(self.plain_forward, hidden_states, use_reentrant=False, **keywords)


def apply(model):
    """Changes a PEFT Llama with dropout 0 in place."""
    causal = model.get_base_model()
    causal.enable_input_require_grads()
    for module in causal.modules():
        kind = type(module).__name__
        if isinstance(module, Linear):
            module.forward = types.MethodType(lora_forward, module)
        elif kind == "LlamaRMSNorm":
            module.forward = types.MethodType(norm_forward, module)
        elif kind == "LlamaMLP":
            module.forward = types.MethodType(mlp_forward, module)
        elif kind == "LlamaDecoderLayer":
            module.plain_forward = module.forward
            module.forward = types.MethodType(layer_forward, module)
    causal.forward = types.MethodType(model_forward, causal)
