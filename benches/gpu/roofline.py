"""The products and the attention of a LoRA step, bare: cuBLAS and SDPA in one CUDA graph. Prints JSON.

Per layer: q/k/v, o, gate/up, down and causal attention, forward; the gradient of each one's input; the head
forward and backward by chunks of rows. No norm, no rotation, no activation function, no adapter, no loss,
no optimizer: no step with these products is faster, unless its products are. Weights of every layer are
there, random like the activations; the fastest of SDPA's backends is chosen first.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "peers"))

import measure  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

HEAD_ROWS = 4096
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=pathlib.Path, help="config.json of the model")
    parser.add_argument("--batch", type=int, required=True, help="sequences of a step")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    return parser.parse_args()


class Step:
    """One step over buffers made once."""

    def __init__(self, args, config):
        self.kind = {"dtype": getattr(torch, args.dtype), "device": args.device}
        self.rows = args.batch * args.seq
        hidden, mlp = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        shapes = [(heads + 2 * kv_heads) * size, hidden], [hidden, heads * size], [2 * mlp, hidden], [hidden, mlp]
        layers = config["num_hidden_layers"]
        self.weights = [self.random(*shape) for _ in range(layers) for shape in shapes]
        self.head = self.random(config["vocab_size"], hidden)
        widths = {width for shape in shapes for width in shape}
        self.inputs = {width: self.random(self.rows, width) for width in widths}
        self.outputs = {width: torch.empty_like(self.inputs[width]) for width in widths}
        self.q = self.random(args.batch, heads, args.seq, size).requires_grad_()
        self.k, self.v = (self.random(args.batch, kv_heads, args.seq, size).requires_grad_() for _ in range(2))
        self.d_attention = self.random(args.batch, heads, args.seq, size)
        chunk = min(HEAD_ROWS, self.rows)
        self.logits = self.random(chunk, config["vocab_size"])
        self.layers, self.backend = layers, None

    def random(self, *shape):
        # Of the size of trained weights and normed activations alike, never zero.
        return torch.empty(*shape, **self.kind).normal_(std=0.02 if shape[0] != self.rows else 1.0)

    def attention(self):
        out = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, (self.q, self.k, self.v), self.d_attention)

    def products(self):
        for weight in self.weights:
            out_features, in_features = weight.shape
            torch.mm(self.inputs[in_features], weight.t(), out=self.outputs[out_features])
            torch.mm(self.inputs[out_features], weight, out=self.outputs[in_features])
        for begin in range(0, self.rows, len(self.logits)):
            rows = self.inputs[self.head.shape[1]][begin : begin + len(self.logits)]
            logits = self.logits[: len(rows)]
            torch.mm(rows, self.head.t(), out=logits)
            torch.mm(logits, self.head, out=self.outputs[self.head.shape[1]][begin : begin + len(rows)])

    def __call__(self):
        self.products()
        with sdpa_kernel(self.backend):
            for _ in range(self.layers):
                self.attention()


def seconds(device, run, repeats):
    times = []
    for _ in range(repeats):
        clock = measure.Clock(device)
        clock.start()
        run()
        times.append(clock.seconds())
    return times


def fastest_backend(device, step):
    best = {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                seconds(device, step.attention, 2)
                best[backend] = min(seconds(device, step.attention, 5))
        except RuntimeError:  # this backend does not take the shape
            continue
        if backend is SDPBackend.EFFICIENT_ATTENTION and best:
            break  # MATH writes the whole square
    return min(best, key=best.get), {backend.name: value for backend, value in best.items()}


def captured(step):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def flops(step, config, args):
    linear = sum(weight.numel() for weight in step.weights) + step.head.numel()
    attention = 7 * args.seq * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    return (4 * linear + attention) * step.rows


if __name__ == "__main__":
    args = arguments()
    config = json.loads(args.config.read_text())
    try:
        memory = measure.Memory(args.device)
        step = Step(args, config)
        memory.loaded()
        step.backend, attention = fastest_backend(args.device, step)
        run = captured(step) if args.device == "cuda" else step
        seconds(args.device, run, args.warmup)
        times = seconds(args.device, run, args.steps)
        sizes = memory.report()
    except torch.OutOfMemoryError as error:
        print(f"out of memory: {error}", file=sys.stderr)
        sys.exit(71)
    report = {
        "version": f"torch {torch.__version__}",
        "variant": "bare products and attention" + (" in a CUDA graph" if args.device == "cuda" else ""),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "attention_backend": step.backend.name,
        "attention_seconds": attention,
        "flops": flops(step, config, args),
        "step_times": times,
        **sizes,
    }
    print(json.dumps(report))
