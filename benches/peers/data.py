#!/usr/bin/env python3
"""Rows of messages to token ids: ferrotune beside datasets + transformers, on the same rows.

    data.py --ferrotune target/release/ferrotune --tokenizer DIR [--rows N] [--repeats N]

Both render the tokenizer's chat template and tokenise; the totals of tokens must be equal. ferrotune's time is
that of the whole process; the other side's is that of `Dataset.map` alone, without imports and loading.
Prints one JSON document.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the capital of France is Paris hello world one two three weather sunny what how you a system prompt".split()


def write_rows(path, count):
    random.seed(1)
    say = lambda: " ".join(random.choices(WORDS, k=random.randint(5, 120)))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            roles = ["user", "assistant"] * random.randint(1, 3)
            messages = [{"role": role, "content": say()} for role in roles]
            file.write(json.dumps({"messages": messages}) + "\n")


def theirs(rows, tokenizer_dir, processes):
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = CHATML
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train")

    def tokenise(row):
        out = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)
        return {"input_ids": out["input_ids"][:1024]}

    begin = time.perf_counter()
    done = dataset.map(tokenise, remove_columns=dataset.column_names, num_proc=processes if processes > 1 else None)
    seconds = time.perf_counter() - begin
    return seconds, sum(len(ids) for ids in done["input_ids"])


def ours(ferrotune, rows, tokenizer_dir, template, threads):
    config = template.with_name("sft.yaml")
    config.write_text(
        f"model_name_or_path: {tokenizer_dir}\ntrain_file: [{rows}]\nchat_template_path: {template}\n"
        f"max_length: 1024\nnum_threads: {threads}\n"
    )
    begin = time.perf_counter()
    command = [ferrotune, "inspect", "data", "--rows", "0", str(config), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - begin, json.loads(done.stdout)["tokens"]


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ferrotune", required=True)
    arguments.add_argument("--tokenizer", required=True)
    arguments.add_argument("--rows", type=int, default=20_000)
    arguments.add_argument("--repeats", type=int, default=3)
    args = arguments.parse_args()
    tokenizer = Path(args.tokenizer).resolve()
    results = []
    with tempfile.TemporaryDirectory() as work:
        rows, template = Path(work, "rows.jsonl"), Path(work, "chat.jinja")
        write_rows(rows, args.rows)
        template.write_text(CHATML)
        for workers in sorted({1, os.cpu_count() or 1}):
            pairs = []
            for _ in range(args.repeats):
                pairs.append((theirs(rows, tokenizer, workers), ours(args.ferrotune, rows, tokenizer, template, workers)))
            counts = {count for pair in pairs for _, count in pair}
            if len(counts) != 1:
                raise SystemExit(f"different numbers of tokens: {counts}")
            them, us = (statistics.median(pair[side][0] for pair in pairs) for side in (0, 1))
            tokens = counts.pop()
            results.append(
                {
                    "workers": workers,
                    "tokens": tokens,
                    "datasets_seconds": round(them, 3),
                    "ferrotune_seconds": round(us, 3),
                    "ratio": round(them / us, 2),
                    "ferrotune_tokens_per_second_and_worker": round(tokens / us / workers),
                }
            )
    from importlib.metadata import version

    versions = {name: version(name) for name in ("datasets", "transformers", "tokenizers")}
    load = os.getloadavg()[0]
    print(json.dumps({"rows": args.rows, "machine": platform.machine(), "load": load, "versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
