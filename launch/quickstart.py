"""What launch/quickstart.sh wants beside the moetrain commands: the faster dtype, a sample by transformers alone, the table with its plots."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path


def dtype() -> None:
    """Print bfloat16 if this processor multiplies it at least 1.5 times as fast as float32, else float32."""
    import torch

    torch.set_num_threads(1)
    seconds = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(1024, 512).to(getattr(torch, name))
        b = torch.randn(512, 512).to(getattr(torch, name))
        a @ b
        times = []
        for _ in range(10):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        seconds[name] = min(times)
    print("bfloat16" if seconds["bfloat16"] * 1.5 < seconds["float32"] else "float32")


def sample(folder: str, prompt: str) -> None:
    """Load an export as any user of transformers would, and continue a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(tokens, max_new_tokens=160, do_sample=True, temperature=0.6, top_p=0.95)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


def table(out: str) -> None:
    """Print dense and DSMoE side by side; write the table and the plots into the folder."""
    from moetrain.metrics import plots, read_records

    folder = Path(out)
    rows = []
    for name, run in (("dense", "dense"), ("DSMoE", "moe")):
        result = json.loads((folder / f"{run}.json").read_text())
        measured = result["sets"]["stdlib"]
        speed = statistics.median(r["tokens_per_s"] for r in read_records(folder / run))
        experts = "-"
        if "active" in measured:
            experts = f"{measured['active']:.2f} of {result['num_experts']} ({measured['active'] / result['num_experts']:.0%})"
        rows.append([
            name, f"{measured['perplexity']:.3f}", experts, f"{measured['active_params'] / 1e6:.2f}M of {measured['params'] / 1e6:.2f}M",
            f"{measured['flops_per_token'] / 1e6:.2f}M", f"{speed:,.0f}",
        ])  # fmt: skip
    head = ["model", "held-out perplexity", "experts per token", "activated parameters", "FLOPs per token", "training tokens/s"]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    print("\n".join(lines))
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    for path in [*plots(folder / "dense", folder / "plots_dense"), *plots(folder / "moe", folder / "plots_moe")]:
        print(path)


if __name__ == "__main__":
    {"dtype": dtype, "sample": sample, "table": table}[sys.argv[1]](*sys.argv[2:])
