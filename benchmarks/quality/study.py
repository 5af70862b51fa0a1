"""What a conversion is worth: many ways to go on from one dense model, on the same tokens in the same order, at the same activated FLOPs.

    python benchmarks/quality/study.py --out runs/quality                  # all methods, two seeds
    python benchmarks/quality/study.py --out runs/quick --size quick       # one seed, small, about 20 minutes on two cores
    python benchmarks/quality/study.py --out runs/quality --methods 'top-k (LLaMA-MoE)' 'budget (ours)' --active 2

It trains a dense byte-level model on the source of Python's standard library. From that model each method goes on with the same samples: the dense
model itself, or its FFNs cut into `--experts` slices of which a token uses `--active` in the mean (held by a controller where the method has no
number of its own). A seed draws the samples and the routers. Results, a table and a plot of held-out perplexity against FLOPs per token are
written into the folder; an interrupted study goes on. Two runs go side by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, dict[str, Any]] = {
    "quick": dict(hidden_size=96, num_layers=3, heads=3, base_steps=200, steps=80, batch=16, seeds=[1]),
    "small": dict(hidden_size=128, num_layers=4, heads=4, base_steps=800, steps=160, batch=16, seeds=[1, 2]),
    "full": dict(hidden_size=256, num_layers=4, heads=4, base_steps=1000, steps=500, batch=32, seeds=[1, 2]),
}
SEQUENCE = 256


def methods(experts: int, k: int, calibration: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]] | None]:
    """Name -> (options of the conversion, options of the router); None: the dense model."""
    held = {"target_active": float(k)}
    slices = {"method": "slices"}
    return {
        "dense, continued": None,
        "top-k (LLaMA-MoE)": ({"method": "llama_moe"}, {"type": "topk", "top_k": k}),
        "top-k, no balance loss": ({"method": "llama_moe"}, {"type": "topk", "top_k": k, "balance_coef": 0.0}),
        "top-k, clustered slices": ({"method": "llama_moe", "split": "cluster"}, {"type": "topk", "top_k": k, "balance_coef": 0.0}),
        "top-k, softmax first": (slices, {"type": "topk", "top_k": k, "normalize": False, "output_scale": float(experts), "balance_coef": 0.0}),
        "noisy top-k, MLP gate": (
            {"method": "llama_moe"}, {"type": "topk", "top_k": k, "gate": "mlp", "noise": True, "balance_coef": 0.0, "cv_coef": 0.01},
        ),
        "sigmoid top-k, bias (DeepSeek-V3)": (
            {"method": "llama_moe"},
            {"type": "topk", "top_k": k, "score": "sigmoid", "selection_bias": True, "balance_coef": 1e-4, "balance_over": "sequence"},
        ),
        "1 shared + top-(k-1)": (
            {"method": "llama_moe", "num_experts": experts - 1, "shared_share": 1 / experts, "calibration": calibration},
            {"type": "topk", "top_k": max(1, k - 1), "balance_coef": 0.0},
        ),
        "1 shared + budget": (
            {"method": "slices", "num_experts": experts - 1, "shared_share": 1 / experts, "calibration": calibration},
            {"type": "budget", "target_active": max(1.0, k - 1.0)},
        ),
        "hash": (slices, {"type": "hash", "num_hashes": k}),
        "expert choice": (slices, {"type": "expert_choice", "capacity_factor": float(k)}),
        "DSMoE": ({"method": "dsmoe"}, {"type": "sigmoid_ste", "sparsity_coef": 0.3, **held}),
        "DSMoE, sampled": ({"method": "dsmoe"}, {"type": "sigmoid_ste", "ste": "sampled", "sparsity_coef": 0.3, **held}),
        "DSMoE, no STE": ({"method": "dsmoe"}, {"type": "sigmoid_ste", "ste": "off", "sparsity_coef": 0.3, **held}),
        "DSMoE, not trimmed": ({"method": "dsmoe"}, {"type": "sigmoid_ste", "sparsity_coef": 0.3, "trim": False, **held}),
        "DSMoE, coefficient 1": ({"method": "dsmoe"}, {"type": "sigmoid_ste"}),
        "ReMoE": (slices, {"type": "remoe", **held}),
        "XMoE": (slices, {"type": "xmoe", **held}),
        "DynMoE": (slices, {"type": "dynmoe"}),
        "budget, by logits": (slices, {"type": "budget", "rank_by": "logit", **held}),
        "budget, softmax kept": (slices, {"type": "budget", "normalize": False, **held}),
        "budget (ours)": (slices, {"type": "budget", **held}),
    }  # fmt: skip


def moetrain(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "moetrain", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"moetrain {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(json.dumps(tree, indent=2))  # JSON is YAML
    return str(path)


def train(out: Path, name: str, steps: int, size: dict[str, Any], dtype: str, lr: float, seed: int, **changes: Any) -> None:
    if (out / f"{name}.eval.json").exists():
        return
    tree = {
        "run_dir": str(out / name),
        "data": {
            "seq_len": SEQUENCE, "train": [{"name": "stdlib", "path": str(out / "data/stdlib_train")}],
            "eval": [{"name": "stdlib", "path": str(out / "data/stdlib_valid")}],
        },
        "train": {
            "steps": steps, "global_batch_size": size["batch"], "micro_batch_size": min(16, size["batch"]), "dtype": dtype, "lr": lr, "seed": seed,
            "schedule": {"warmup_steps": min(30, steps // 4), "min_lr_ratio": 0.1},
        },
        "checkpoint": {"every": 100},
        "eval": {"batch_size": 16, "sequences": 512},
        **changes,
    }  # fmt: skip
    config = write(out / f"{name}.json", tree)
    moetrain("train", "--config", config)
    moetrain("eval", "--run_dir", str(out / name), "--eval.output", str(out / f"{name}.eval.json.tmp"))
    (out / f"{name}.eval.json.tmp").replace(out / f"{name}.eval.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--experts", type=int, default=8, help="slices of each FFN")
    parser.add_argument("--active", type=int, default=3, help="experts that a token uses, in the mean")
    parser.add_argument("--steps", type=int, help="of each method; default: the size's")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the size's")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    names = list(methods(8, 3, ""))
    parser.add_argument("--methods", nargs="*", default=names, choices=names)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    size = SIZES[options.size]
    seeds, steps = options.seeds or size["seeds"], options.steps or size["steps"]
    if not (out / "data/stdlib_valid.json").exists():
        moetrain(
            "prepare", "--prepare.inputs", json.dumps([sysconfig.get_paths()["stdlib"]]), "--prepare.output", str(out / "data/stdlib"),
            "--prepare.extensions", '[".py"]', "--prepare.validation_fraction", "0.05",
            "--prepare.exclude", '["site-packages", "dist-packages", "test", "*/test", "*/tests", "config-*"]',
        )  # fmt: skip
    model = {
        "vocab_size": 259, "hidden_size": size["hidden_size"], "num_layers": size["num_layers"], "num_heads": size["heads"],
        "intermediate_size": 4 * size["hidden_size"], "max_position_embeddings": SEQUENCE,
    }  # fmt: skip
    train(out, "base", size["base_steps"], size, options.dtype, 3e-3, 0, model=model)
    if not (out / "base_hf").exists():
        moetrain("export", "--run_dir", str(out / "base"), "--export.output", str(out / "base_hf"))
    chosen = methods(options.experts, options.active, str(out / "data/stdlib_train"))

    def place(name: str, seed: int) -> str:
        slug = "".join(c if c.isalnum() else "_" for c in name)
        return f"{slug}-{options.active}of{options.experts}-seed{seed}"

    def method(job: tuple[int, str]) -> None:
        seed, name = job
        start, folder = out / "base_hf", place(name, seed)
        if chosen[name] is not None:
            conversion, router = chosen[name]
            conversion = {"num_experts": options.experts, **conversion}
            if "shared_share" in conversion:
                conversion["shared_dim"] = round(conversion.pop("shared_share") * model["intermediate_size"])
            start = out / f"{folder}_hf"
            if not start.exists():
                tree = {"dense": str(out / "base_hf"), "output": str(start), "seed": seed, "receipt": False, **conversion, "router": router}
                moetrain("upcycle", "--config", write(out / f"{folder}_upcycle.json", {"upcycle": tree}))
        train(out, folder, steps, size, options.dtype, 1.5e-3, seed, init_from=str(start))
        print(f"{name}, seed {seed}: {json.loads((out / f'{folder}.eval.json').read_text())['sets']['stdlib']['perplexity']:.3f}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(method, [(seed, name) for seed in seeds for name in options.methods]))

    base = json.loads((out / "base.eval.json").read_text())["sets"]["stdlib"]
    rows = [{"method": "dense, as it was", "perplexity": base["perplexity"], "spread": 0.0, **_means([base])}]
    for name in options.methods:
        measured = [json.loads((out / f"{place(name, seed)}.eval.json").read_text())["sets"]["stdlib"] for seed in seeds]
        perplexities = [m["perplexity"] for m in measured]
        row = {"method": name, "perplexity": statistics.mean(perplexities), "spread": max(perplexities) - min(perplexities), **_means(measured)}
        rows.append({**row, "by_seed": dict(zip(map(str, seeds), perplexities))})
    tokens = steps * size["batch"] * SEQUENCE
    facts = {"command": "python " + " ".join(sys.argv), "torch": torch.__version__, "dtype": options.dtype}
    facts |= {"tokens_per_method": tokens, "seeds": seeds}
    (out / "results.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    lines = [
        f"| method | held-out perplexity | between seeds | experts per token of {options.experts} | FLOPs per token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda r: r["perplexity"]):
        active = "-" if row["active"] is None else f"{row['active']:.2f}"
        lines.append(f"| {row['method']} | {row['perplexity']:.3f} | {row['spread']:.3f} | {active} | {row['flops_per_token'] / 1e6:.2f}M |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(out, rows)


def _means(measured: list[dict[str, Any]]) -> dict[str, Any]:
    found = {key: statistics.mean(m[key] for m in measured) for key in ("active_params", "flops_per_token")}
    return {**found, "active": statistics.mean(m["active"] for m in measured) if "active" in measured[0] else None}


def plot(out: Path, rows: list[dict[str, Any]]) -> None:
    """Held-out perplexity against FLOPs per token; a bar spans the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    for number, row in enumerate(rows):
        flops, values = row["flops_per_token"] / 1e6, list(row.get("by_seed", {"": row["perplexity"]}).values())
        axes.plot([flops] * 2, [min(values), max(values)], color=f"C{number % 10}", linewidth=2)
        axes.plot(flops, row["perplexity"], marker="osD^v"[number // 10 % 5], color=f"C{number % 10}", linestyle="none", label=row["method"])
    axes.set(xlabel="FLOPs per token, forward (millions)", ylabel="held-out perplexity", title="Same dense start, same tokens")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "quality.png", dpi=110)


if __name__ == "__main__":
    main()
