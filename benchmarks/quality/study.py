"""What a conversion is worth: several ways to go on from one dense model, on the same tokens in the same order.

    python benchmarks/quality/study.py --out runs/quality

trains a dense byte-level model on the source of Python's standard library, then from that model, with the same samples: the dense model
itself, DSMoE with the exact, the sampled and no straight-through estimator (the paper's sparsity coefficient 1), DSMoE held at 3 experts per
token, and top-3 of 8. It writes results.json, table.md and quality.png into the folder. Two runs go side by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

MODEL = {
    "vocab_size": 259, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 1024,
    "max_position_embeddings": 1024,
}  # fmt: skip
METHODS = {
    "dense, continued": (None, {}),
    "DSMoE, exact": ("dsmoe", {"ste": "exact"}),
    "DSMoE, sampled 0.25": ("dsmoe", {"ste": "sampled", "probe_rate": 0.25}),
    "DSMoE, no STE": ("dsmoe", {"ste": "off"}),
    "DSMoE, exact, held at 3": ("dsmoe", {"ste": "exact", "target_active": 3.0, "sparsity_coef": 0.3}),
    "top-3 of 8": ("llama_moe", {}),
}


def moetrain(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "moetrain", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"moetrain {' '.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def train(out: Path, name: str, steps: int, options: argparse.Namespace, changes: dict) -> None:
    tree = {
        "run_dir": str(out / name),
        "data": {
            "seq_len": 256, "train": [{"name": "stdlib", "path": str(out / "data/stdlib_train")}],
            "eval": [{"name": "stdlib", "path": str(out / "data/stdlib_valid")}],
        },
        "train": {
            "steps": steps, "global_batch_size": 32, "micro_batch_size": 16, "dtype": options.dtype, "eval_every": max(1, steps // 5),
            "schedule": {"warmup_steps": min(30, steps), "min_lr_ratio": 0.1}, **changes.pop("train"),
        },
        **changes,
    }  # fmt: skip
    path = out / f"{name}.json"
    path.write_text(json.dumps(tree, indent=2))  # JSON is YAML
    moetrain("train", "--config", str(path))
    moetrain("eval", "--run_dir", str(out / name), "--eval.output", str(out / f"{name}.eval.json"))


def records(run: Path) -> Iterator[dict]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results; an interrupted study goes on")
    parser.add_argument("--base-steps", type=int, default=400, help="steps of the dense model")
    parser.add_argument("--steps", type=int, default=250, help="steps of each method, 8192 tokens each")
    parser.add_argument("--seed", type=int, default=1, help="of the methods' samples and routers")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data/stdlib_valid.json").exists():
        moetrain(
            "prepare", "--prepare.inputs", json.dumps([sysconfig.get_paths()["stdlib"]]), "--prepare.output", str(out / "data/stdlib"),
            "--prepare.extensions", '[".py"]', "--prepare.validation_fraction", "0.05",
            "--prepare.exclude", '["site-packages", "dist-packages", "test", "*/test", "*/tests", "config-*"]',
        )  # fmt: skip
    train(out, "base", options.base_steps, options, {"model": MODEL, "train": {"lr": 3e-3, "seed": 0}})
    if not (out / "base_hf").exists():
        moetrain("export", "--run_dir", str(out / "base"), "--export.output", str(out / "base_hf"))

    def method(name: str) -> None:
        how, router = METHODS[name]
        slug = name.replace(",", "").replace(" ", "_")
        start = out / "base_hf"
        changes: dict = {"train": {"lr": 1.5e-3, "seed": options.seed}}
        if how is not None:
            start = out / f"{slug}_hf"
            if not start.exists():
                moetrain(
                    "upcycle", "--upcycle.dense", str(out / "base_hf"), "--upcycle.output", str(start), "--upcycle.method", how,
                    "--upcycle.seed", str(options.seed),
                )  # fmt: skip
            if router:
                changes["model"] = {"moe": {"router": router}}
        train(out, slug, options.steps, options, {"init_from": str(start), **changes})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(method, options.methods))

    base = json.loads((out / "base.eval.json").read_text())["sets"]["stdlib"]
    rows = [{"method": "dense, as it was", **base}]
    for name in options.methods:
        slug = name.replace(",", "").replace(" ", "_")
        measured = json.loads((out / f"{slug}.eval.json").read_text())["sets"]["stdlib"]
        rows.append({"method": name, **measured, "tokens_trained": options.steps * 8192})
    results = {"command": "python " + " ".join(sys.argv), "torch": torch.__version__, "dtype": options.dtype, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = ["| method | held-out perplexity | experts per token of 8 | activated parameters | FLOPs per token |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        active = f"{row['active']:.2f}" if "active" in row else "-"
        size, flops = row["active_params"] / 1e6, row["flops_per_token"] / 1e6
        lines.append(f"| {row['method']} | {row['perplexity']:.3f} | {active} | {size:.2f}M | {flops:.2f}M |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(out, options.methods)


def plot(out: Path, methods: list[str]) -> None:
    """Evaluation perplexity and experts per token over the steps of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, name in enumerate(methods):
        slug = name.replace(",", "").replace(" ", "_")
        found = list(records(out / slug))
        evaluated = [(r["step"], r["eval"]["stdlib"]["perplexity"]) for r in found if "eval" in r]
        left.plot(*zip(*evaluated), marker="o", label=name, color=f"C{number}")
        active = [(r["step"], sum(r["moe"]["active"]) / len(r["moe"]["active"])) for r in found if "moe" in r]
        if active:
            right.plot(*zip(*active), label=name, color=f"C{number}")
    left.set(xlabel="step after conversion", ylabel="perplexity, first 64 held-out sequences", title="Same dense start, same tokens")
    right.set(xlabel="step after conversion", ylabel="experts per token (of 8)", title="Mean over layers and tokens", ylim=(0, None))
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(out / "quality.png", dpi=110)


if __name__ == "__main__":
    main()
