"""Mutated configs, checkpoints, Hugging Face folders and data sets through the real entry point, by the thousand.

    python -m tests.fuzz --configs 1000 --checkpoints 1000 --seed 0
    python -m tests.fuzz --case configs:17 --keep /tmp/case          # one again, with its files and what it printed

What a stranger's file may lead to: a run that works, or status 2 (1 where memory is not enough or a loss is not finite) with one line that begins
`moetrain: error: ` (a list of config errors has one indented line for each). Anything else is a finding: a traceback, a signal, more than
SECONDS of CPU time or MEMORY bytes, an executed payload, a file changed outside the case's folder.

Each case is a process of its own, forked from one in which torch is imported, with limits on its time, memory and file sizes. A case is a pure
function of (seed, kind, number).
"""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import moetrain.train  # noqa: F401  (what the commands import, once and not in every case)
from moetrain import evaluate, report, submit  # noqa: F401
from moetrain.cli import main
from moetrain.convert import upcycle  # noqa: F401
from moetrain.data import prepare  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MEMORY, FILE_SIZE = 30, 3 << 30, 256 << 20
WORK = Path("case/deep/work")  # so that ../../x is still inside what is watched
CANARY = "CANARY"

VOCAB = 259
SMALL: dict[str, Any] = {
    "run_dir": "out",
    "model": {
        "vocab_size": VOCAB, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 16, "rope_theta": 1e4,
        "max_position_embeddings": 32, "norm_eps": 1e-5, "tie_embeddings": False, "sliding_window": None,
    },
    "data": {"seq_len": 12, "train": [{"name": "a", "path": "a"}, {"name": "b", "path": "b"}], "eval": [{"name": "a", "path": "a"}]},
    "parallel": {"dp_replicate": 1, "dp_shard": -1, "ep": 1},
    "train": {
        "steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "grad_clip": 1.0, "dtype": "float32", "seed": 3,
        "schedule": {"type": "cosine", "warmup_steps": 1, "min_lr_ratio": 0.1}, "eval_sequences": 2, "max_bad_steps": 2,
    },
    "checkpoint": {"every": 1, "keep_last": 2, "asynchronous": False},
    "log": {"every": 1},
    "prepare": {"inputs": ["text.txt"], "output": "p", "tokenizer": "byte", "validation_fraction": 0.1, "workers": 1},
    "upcycle": {"dense": "dense", "output": "up", "method": "slices", "num_experts": 4},
    "eval": {"sequences": 2, "batch_size": 2},
    "generate": {"prompt": "def", "max_new_tokens": 2, "temperature": 0.5},
    "export": {"output": "exported"},
}  # fmt: skip
ROUTERS: list[dict[str, Any]] = [
    {"type": "sigmoid_ste", "target_active": 2.0}, {"type": "topk", "top_k": 2}, {"type": "remoe", "target_active": 2.0}, {"type": "xmoe"},
    {"type": "dynmoe"}, {"type": "moepp", "top_k": 2, "num_zero": 1, "num_copy": 1, "num_constant": 1, "tau": 0.75}, {"type": "expert_choice"},
    {"type": "hash"}, {"type": "base_layers"},
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ what is there


def materials(folder: Path) -> None:
    """Good inputs of every kind, tiny: text.txt, data a and b, the Hugging Face folders dense, mixtral and ours, runs dense_run and run."""
    from moetrain.config import ModelConfig
    from moetrain.convert.huggingface import write_model
    from moetrain.data.tokenizer import load_tokenizer
    from moetrain.model import Transformer, init_weights

    os.chdir(folder)
    Path("text.txt").write_text("def mean(values):\n    return sum(values) / len(values)\n" * 30, encoding="utf-8")
    for name in ("a", "b"):
        assert main(["prepare", "--prepare.inputs", "[text.txt]", "--prepare.output", name, "--prepare.counts", "true"]) == 0
    moe = {"num_experts": 4, "expert_dim": 4}
    kinds = {
        "dense": {},
        "mixtral": {"moe": {**moe, "router": ROUTERS[1]}},
        "ours": {"moe": {**moe, "router": ROUTERS[0]}},
    }
    for name, changes in kinds.items():
        config = ModelConfig.model_validate({**SMALL["model"], **changes})
        model = Transformer(config)
        init_weights(model, 0)
        size = 4000 if name == "ours" else 10**9  # one folder with an index
        write_model(name, config, model.named_parameters(), tokenizer=load_tokenizer("byte"), max_shard_bytes=size)
    Path("c.yaml").write_text(yaml.safe_dump(_with_router(SMALL, ROUTERS[0]) | {"run_dir": "run"}), encoding="utf-8")
    assert main(["train", "--config", "c.yaml"]) == 0
    Path("secret.txt").write_text("a secret outside the folder\n")


def _with_router(tree: dict[str, Any], router: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["model"]["moe"] = {"num_experts": 4, "expert_dim": 4, "router": dict(router)}
    return tree


# ----------------------------------------------------------------------------------------------------------------------- mutations


class Payload:
    """Touches the canary when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['FUZZ_CANARY']}",)


def _command() -> str:
    return f"touch {os.environ['FUZZ_CANARY']}"


def hostile_value(rng: random.Random) -> Any:
    """A value of a wrong type, a size nobody has, or text that somebody may run. No number between: 10,000 layers are slow and legal."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63), -(10**30)])
    if kind == 1:
        return rng.choice([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.5, 1e-320, 1e308, 0.5, 1.0 + 2**-52])
    if kind == 2:
        return rng.choice([None, True, False, "", [], {}, [[]], [None], {"": None}, {"a": 1}, [1, "2", None], {1: 2}, [{}], [2**63]])
    if kind == 3:
        words = ["null", "NaN", "1", "true", "float64", "~", "-", "*", "&a", "!!python/name:os.system", "\x00", "a\nb", "\r", "\u2028", "\x1b[31m"]
        return rng.choice(words)
    if kind == 4:
        # Nothing absolute that could be written to: the fuzzer may run as root.
        bad = ["../../x", "..", ".", "a/../../../y", "/dev/null/x", "/proc/self/mem", "/dev/zero", "/dev/full", "~/x", "a" * 300, "a/" * 2000 + "b"]
        return rng.choice([*bad, "run", "dense", "ours", "mixtral", "a", "text.txt", "c.yaml", "a.idx", "loop", "-rf", "con:", "a\tb"])
    if kind == 5:
        run = _command()
        return rng.choice([f"$({run})", f"`{run}`", f"; {run} #", f"'; {run}; '", f'"; {run}; "', f"\n{run}\n", f"| {run}", "${IFS}" + run,
                           f"__import__('os').system('{run}')", "{{ cycler.__init__.__globals__.os.popen('" + run + "').read() }}"])  # fmt: skip
    if kind == 6:
        return rng.choice(["x" * 10**5, "9" * 5000, ["x"] * 2000, list(range(3000)), {f"k{i}": i for i in range(500)}])
    deep: Any = 1
    for _ in range(rng.choice([5, 80])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def _places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for k, v in inner for p in ((*at, k), *_places(v, (*at, k)))]


def _place(rng: random.Random, tree: Any) -> tuple[Any, ...]:
    """One of the tree's places, near its root as often as deep in its largest part."""
    at: list[Any] = []
    while tree and isinstance(tree, (dict, list)):
        at.append(rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree)))
        tree = tree[at[-1]]
        if rng.random() < 0.4:
            break
    return tuple(at)


def mutate_tree(rng: random.Random, tree: Any, times: int | None = None) -> Any:
    """Replace, remove, add or exchange some of a tree's values."""
    tree = copy.deepcopy(tree)
    for _ in range(times or rng.choice([1, 1, 1, 2, 3])):
        places = _places(tree)
        if not places:
            return hostile_value(rng)
        *path, last = _place(rng, tree) if rng.random() < 0.5 else rng.choice(places)
        node = tree
        for part in path:
            node = node[part]
        kind = rng.randrange(10)
        if kind < 6:
            node[last] = hostile_value(rng)
        elif kind == 6:
            del node[last]
        elif kind == 7:
            more = hostile_value(rng)
            if isinstance(node, dict):
                node[rng.choice(["zzz", "__class__", "type", "stpes", "model", "0", str(last) + "s"])] = more
            else:
                node.append(more)
        elif kind == 8 and isinstance(node[last], (int, float)) and not isinstance(node[last], bool):
            node[last] = rng.choice([-node[last], node[last] + 1, node[last] * 2, float(node[last]), str(node[last]), node[last] / 3])
        else:
            *other, key = rng.choice(places)
            source = tree
            for part in (*other, key):
                source = source[part] if isinstance(source, (dict, list)) and _has(source, part) else source
            node[last] = copy.deepcopy(source)
    return tree


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else isinstance(key, int) and key < len(node)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
        elif kind == 3:
            data[at : at + rng.choice([1, 8, 100])] = b""
        elif kind == 4:
            data += data[: rng.choice([8, 1000])]
        else:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 2**62), b"\x80\x81\xfe\xff", b"\x7f" * 8])
    return bytes(data)


def mutate_yaml(rng: random.Random, text: str) -> bytes:
    """Spoil a file of YAML as text."""
    run = _command()
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines) + 1)
    line = rng.choice(lines) if lines else "a: 1\n"
    key = line.split(":")[0]

    def put(*more: str) -> bytes:
        return "".join([*lines[:at], *more, *lines[at:]]).encode()

    def tagged(tag: str) -> bytes:
        return "".join(li.replace(":", f": {tag}", 1) if i == min(at, len(lines) - 1) else li for i, li in enumerate(lines)).encode()

    bomb = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, rng.choice([4, 12])))
    new = "!!python/object/new:type {args: [z, !!python/tuple [], {extend: !!python/name:exec }], "
    new += f"listitems: \"__import__('os').system('{run}')\"}}"
    plain = ["!!bool x", "!!int abc", "!!int ''", "!!float x", "!!timestamp x", "!!map [1]", "!!set {1}", "!number x", "!number [1]", "!!binary '*'"]
    plain += ["!!omap [1]", "!!pairs {a: 1}", "!!null x", "!!str {a: 1}", "!local x", "!!seq {}", "! x"]
    choices: list[Callable[[], bytes]] = [
        lambda: put(f"zz: !!python/object/apply:os.system ['{run}']\n"),
        lambda: tagged(f"!!python/object/apply:subprocess.check_output [['{run}']] #"),
        lambda: tagged(new + " #"),
        lambda: tagged(rng.choice(plain) + " #"),
        lambda: bomb.encode() + text.encode(),
        lambda: (text + bomb + f"run_dir: *b3\n{key}: *b3\n").encode(),
        lambda: (bomb + f"data: *b3\nmodel: {{moe: *b3, layers: *b2}}\ntrain: *b{rng.choice([1, 3])}\n").encode(),
        lambda: b"x: &x [*x]\nmodel: &m {moe: *m, a: *m}\ndata: {train: &t [*t]}\n",
        lambda: put(line, line),
        lambda: put("? [a, b]\n: 1\n"),
        lambda: put("<<: {a: 1}\n", "? {a: 1}\n: 2\n"),
        lambda: put("\x00"),
        lambda: put("\t", "a"),
        lambda: put("--- \n") if rng.random() < 0.5 else b"%YAML 9.9\n---\n" + text.encode(),
        lambda: put(f"{key}: " + "[" * rng.choice([50, 5000]) + "\n"),
        lambda: put(f"{key}: " + "{a: " * rng.choice([50, 3000]) + "1" + "}" * rng.choice([0, 3000]) + "\n"),
        lambda: put(f"zz: {'9' * rng.choice([400, 5000, 100000])}\n", f"yy: 1e{'9' * rng.choice([3, 50])}\n"),
        lambda: put("zz: '" + "x" * 300_000 + "'\n"),
        lambda: put("a: 1\n" * 1, *[f"k{i}: {i}\n" for i in range(2000)]),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.encode("utf-16"),
        lambda: text.replace("\n", "\r\n").encode(),
        lambda: b"",
        lambda: b"x" * (3 << 20),
        lambda: ("- a\n" * 30_000).encode(),
        lambda: mutate_bytes(rng, text.encode()),
        lambda: mutate_bytes(rng, text.encode()),
        lambda: text.encode()[: rng.randrange(len(text) + 1)],
    ]  # fmt: skip
    return rng.choice(choices)()


# ------------------------------------------------------------------------------------------------------------------ a config's case

# Overrides come last, so a mutated number of steps is not a legal run without an end.
BOUNDS = ["--train.steps", "3", "--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--log.wandb", "false"]


def config_case(rng: random.Random) -> list[str]:
    """Writes fuzz.yaml into the working folder; returns the command line."""
    pick = rng.random()
    if pick < 0.12:
        return _cluster_case(rng)
    if pick < 0.45:
        path = rng.choice(sorted((ROOT / "configs").rglob("*.yaml")))
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        command = ["config"]
    else:
        tree = _with_router(SMALL, rng.choice(ROUTERS)) if rng.random() < 0.7 else copy.deepcopy(SMALL)
        command = [rng.choice(["config", "train", "train", "train", "upcycle", "prepare", "eval", "generate", "export", "report"])]
    if command[0] in ("eval", "generate", "export", "report", "upcycle"):
        tree["run_dir"] = "run"
    if rng.random() < 0.2:
        tree["init_from"] = rng.choice(["dense", "ours", "mixtral"])
        tree.pop("model", None)
    if command == ["upcycle"] and rng.random() < 0.7:
        tree["upcycle"]["method"] = rng.choice(["slices", "dsmoe", "llama_moe", "copy", "drop", "virtual_groups", "btx", "aggregate", "to_dense"])
    if rng.random() < 0.7:
        tree = mutate_tree(rng, tree)
        text = _yaml(tree)
        content = mutate_yaml(rng, text) if rng.random() < 0.1 else text.encode("utf-8", "surrogatepass")
    else:
        content = mutate_yaml(rng, _yaml(tree))
    file = Path("fuzz.yaml")
    if rng.random() < 0.02:
        file.symlink_to(rng.choice(["fuzz.yaml", "/dev/zero", "dense", "nowhere", "/proc/self/environ", "dense/model.safetensors"]))
    else:
        file.write_bytes(content)
    if command[0] == "train":
        command += BOUNDS
    if command[0] in ("prepare", "eval") and rng.random() < 0.5:
        command += ["--log.wandb", "false"]
    return [*command, "--config", "fuzz.yaml"]


def _yaml(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Copies, sort_keys=False, allow_unicode=True)


class _Copies(yaml.SafeDumper):
    """Copies where the tree has one value twice; files with anchors are a mutation of their own."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _cluster_case(rng: random.Random) -> list[str]:
    path = rng.choice(sorted((ROOT / "launch" / "clusters").glob("*.yaml")))
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    Path("cluster.yaml").write_bytes(_yaml(mutate_tree(rng, tree)).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        Path("cluster.yaml").write_bytes(mutate_yaml(rng, path.read_text(encoding="utf-8")))
    config = _with_router(SMALL, ROUTERS[1])
    if rng.random() < 0.3:
        config = mutate_tree(rng, config)
    Path("fuzz.yaml").write_text(_yaml(config), encoding="utf-8", errors="surrogatepass")
    return ["submit", "fuzz.yaml", "--cluster", "cluster.yaml", "--dry-run"]


# ------------------------------------------------------------------------------------------------------------- a checkpoint's case


def checkpoint_case(rng: random.Random) -> list[str]:
    """Spoils files in the working folder; returns the command line."""
    kind = rng.choice(["run", "run", "hf", "hf", "data"])
    if kind == "run":
        target = Path("run")
        step = rng.choice(sorted((target / "checkpoints").iterdir()))
        files = [p for p in step.iterdir()] * 3 + [p for p in target.iterdir() if p.is_file()]
    elif kind == "hf":
        target = Path(rng.choice(["dense", "mixtral", "ours"]))
        files = list(target.iterdir())
    else:
        target, files = Path("."), [Path(f"{n}{s}") for n in ("a", "b") for s in (".bin", ".idx", ".json", ".counts.json")]
    for _ in range(rng.choice([1, 1, 1, 2])):
        spoil(rng, rng.choice(sorted(files)), kind)
    if kind == "hf" and rng.random() < 0.2:
        remote_code(target)
    if kind == "run" and rng.random() < 0.75:
        resign(step)
        if rng.random() < 0.7:
            for other in (target / "checkpoints").iterdir():
                if other != step:
                    shutil.rmtree(other)
    config = ["--config", "c.yaml"]
    if kind == "run":
        return rng.choice([
            ["train", *config, *BOUNDS], ["train", *config, *BOUNDS], ["eval", "--run_dir", "run"], ["eval", *config],
            ["generate", "--run_dir", "run", "--generate.prompt", "def", "--generate.max_new_tokens", "2"],
            ["export", "--run_dir", "run", "--export.output", "e"], ["report", "run"], ["status", "--run_dir", "run"],
        ])  # fmt: skip
    if kind == "hf":
        name, other = str(target), "ours" if str(target) == "dense" else "dense"
        init = ["--init_from", name]
        base = yaml.safe_load(Path("c.yaml").read_text()) | {"run_dir": "out"}
        base.pop("model")
        Path("d.yaml").write_text(_yaml(base))
        up = ["upcycle", "--upcycle.dense", name, "--upcycle.output", "u", "--upcycle.num_experts", "4"]
        return rng.choice([
            ["config", *init], ["train", "--config", "d.yaml", *init, *BOUNDS], ["train", "--config", "d.yaml", *init, *BOUNDS],
            ["eval", "--config", "d.yaml", *init], ["generate", "--run_dir", "no", *init, "--generate.prompt", "d", "--generate.max_new_tokens", "2"],
            ["export", "--run_dir", "no", *init, "--export.output", "e"], up, up,
            ["upcycle", "--upcycle.dense", other, "--upcycle.output", "u", "--upcycle.method", "btx", "--upcycle.models", f"[{name}, dense]"],
            ["upcycle", "--upcycle.dense", name, "--upcycle.output", "u", "--upcycle.method", "to_dense"],
            ["prepare", "--prepare.inputs", "[text.txt]", "--prepare.output", "p", "--prepare.tokenizer", name],
        ])  # fmt: skip
    fresh = [*config, "--run_dir", "out"]
    return rng.choice([
        ["train", *fresh, *BOUNDS], ["train", *fresh, *BOUNDS], ["train", *fresh, *BOUNDS], ["eval", "--config", "c.yaml"],
        ["upcycle", "--upcycle.dense", "dense", "--upcycle.output", "u", "--upcycle.num_experts", "4", "--upcycle.split", "coactivation",
         "--upcycle.calibration", "a", "--upcycle.calibration_seq_len", "12", "--upcycle.calibration_sequences", "4"],
        ["train", *fresh, *BOUNDS, "--model.moe.router", "{type: hash, frequencies: a.counts.json}"],
    ])  # fmt: skip


def spoil(rng: random.Random, path: Path, kind: str) -> None:
    """One file: as bytes, by its own format, or by what stands in its place."""
    content, pick = (path.read_bytes(), rng.random()) if _plain(path) else (b"{}", 1.0)
    if pick < 0.5 and path.suffix in (".json", ".jsonl", ".yaml", ".safetensors", ".idx", ".bin"):
        path.write_bytes(_by_format(rng, path.suffix, content))
        return
    if pick < 0.7:
        path.write_bytes(mutate_bytes(rng, content))
        return
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(pickle.dumps(Payload())),
        lambda: torch.save({"model": Payload()}, path),
        lambda: (torch.save({"w": Payload()}, path.with_name("pytorch_model.bin")), path.write_bytes(content))[0],
        lambda: torch.save(Payload(), path.with_name("pytorch_model.bin")),
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/nowhere"),
        lambda: path.symlink_to(Path("secret.txt").resolve()),
        lambda: path.symlink_to(Path("../../../outside.txt").resolve()),
        lambda: path.symlink_to(Path("mixtral/model.safetensors").resolve()),
        lambda: path.write_bytes(Path("text.txt").read_bytes()),
        lambda: path.write_bytes(rng.choice(sorted(p for p in Path(".").rglob("*") if p.is_file() and not p.is_symlink())).read_bytes()),
        lambda: path.write_bytes(rng.randbytes(rng.choice([1, 8, 100, 5000]))),
        lambda: path.write_bytes(b"[" * 100_000) if path.suffix == ".json" else path.write_bytes(content * 2),
    ]  # fmt: skip
    rng.choice(choices)()


def _plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _by_format(rng: random.Random, suffix: str, content: bytes) -> bytes:
    try:
        if suffix == ".json":
            if rng.random() < 0.1:
                deep = [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000]
                return rng.choice([*deep, b"1" * 10_000, b"NaN", b"null", b'"x"', b"[]"])
            raw = json.loads(content)
            if "model_type" in raw and rng.random() < 0.6:
                raw.pop("moetrain", None)  # as other people's folders are; what both say is compared first
            return json.dumps(mutate_tree(rng, raw)).encode("utf-8", "replace")
        if suffix == ".jsonl":
            lines = content.splitlines()
            lines[rng.randrange(len(lines))] = json.dumps(mutate_tree(rng, json.loads(rng.choice(lines)))).encode()
            return b"\n".join(lines) + b"\n"
        if suffix == ".yaml":
            if rng.random() < 0.4:
                return mutate_yaml(rng, content.decode())
            return _yaml(mutate_tree(rng, yaml.safe_load(content))).encode("utf-8", "surrogatepass")
        if suffix == ".safetensors":
            return _safetensors(rng, content)
        if suffix == ".idx":
            return _index(rng, content)
    except (ValueError, struct.error, IndexError, TypeError, AttributeError, RecursionError, yaml.YAMLError):  # spoilt by an earlier mutation
        pass
    if suffix == ".bin":
        at = rng.randrange(max(1, len(content)))
        return content[:at] + rng.choice([b"\xff\xff", b"\x03\x01", b"\xff" * 50, b"\x00" * 50]) + content[at + 2 :]
    return mutate_bytes(rng, content)


def _safetensors(rng: random.Random, content: bytes) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    pick = rng.randrange(8)
    if pick == 0:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1])) + content[8:]
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    if pick == 1:
        shape = header[name]["shape"]
        header[name]["shape"] = rng.choice([[], [0], [-1], [2**40, 2**40], [2**63], shape[::-1], [*shape, 1], ["8"], None])
    elif pick == 2:
        header[name]["dtype"] = rng.choice(["I32", "F16", "BF16", "F64", "BOOL", "F8_E4M3", "U8", "X", 3, None])
    elif pick == 3:
        header[name]["data_offsets"] = rng.choice([[0, 2**62], [-4, 0], [4, 0], [0, 0], [0, len(data)], [0], None, ["0", "4"]])
    elif pick == 4:
        header[rng.choice(["../x", "a" * 10_000, "\x00", "model.norm.weight", "lm_head.weight"])] = header.pop(name)
    elif pick == 5:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif pick == 6 and "__metadata__" in header:
        meta = header["__metadata__"]
        if "DCP_SHARDING_INFO" in meta:
            tree = json.loads(meta["DCP_SHARDING_INFO"])
            meta["DCP_SHARDING_INFO"] = rng.choice([json.dumps(mutate_tree(rng, tree)), "{", "[]", "[" * 50_000, ""])
        else:
            header["__metadata__"] = mutate_tree(rng, meta)
    else:
        header = mutate_tree(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.3:  # the same bytes behind another header
        data = rng.choice([data, data[:-4], data + b"\0" * 4, b""])
    return struct.pack("<Q", len(text)) + text + data


def _index(rng: random.Random, content: bytes) -> bytes:
    magic, version, code, sequences, bounds = struct.unpack("<9sQBQQ", content[:34])
    huge = rng.choice([0, 1, 2**31, 2**40, 2**61, 2**63, 2**64 - 1])
    pick = rng.randrange(6)
    if pick == 0:
        version = huge
    elif pick == 1:
        code = rng.randrange(256)
    elif pick == 2:
        sequences = huge
    elif pick == 3:
        bounds = huge
    elif pick == 4:
        sequences, bounds = rng.choice([(2**63, 2**64 - 1), (0, 1), (bounds, sequences), (2**62, 2**62 // 3)])
    rest = bytearray(content[34:])
    if pick == 5 and rest:
        at = rng.randrange(len(rest))
        rest[at : at + 8] = struct.pack("<q", rng.choice([-1, 2**62, 2**31, -(2**62)]))[: len(rest) - at]
    return struct.pack("<9sQBQQ", magic, version, code, sequences, bounds) + bytes(rest)


def remote_code(folder: Path) -> None:
    """What a folder does that wants its own code to run."""
    code = f"import os\nos.system({_command()!r})\nclass Config: pass\nclass Model: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    for name, auto in (
        ("config.json", {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Model", None]}),
    ):
        if not _plain(folder / name):
            continue
        try:
            raw = json.loads((folder / name).read_text())
            raw |= {"auto_map": auto, "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "modeling_evil.Model"}}}
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(raw))
        except (OSError, ValueError, TypeError, RecursionError):
            pass


def resign(step: Path) -> None:
    """A manifest that fits the files again: a stranger can write one too."""
    path = step / "manifest.json"
    if not _plain(path):
        return
    try:
        manifest = json.loads(path.read_text())
        for name in list(manifest["files"]):
            file = step / name
            if file.is_file():
                content = file.read_bytes()
                manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, TypeError, KeyError, RecursionError, AttributeError):
        pass  # the manifest itself is what is spoilt


# ------------------------------------------------------------------------------------------------------------------- run and judge


@dataclass
class Outcome:
    kind: str
    number: int
    words: list[str]
    status: int
    finding: str | None
    output: str
    seconds: float


KINDS = {"configs": config_case, "checkpoints": checkpoint_case}
_NO_WORDS_FOR_USERS = ("Traceback", "NoneType", "[Errno", "errors.pydantic.dev", "KeyError", "object at 0x")


def start(kind: str, number: int, seed: int, good: Path, place: Path) -> int:
    """Fork one case into `place`; returns its process id."""
    shutil.copytree(good, place / WORK)
    (place / "outside.txt").write_text("untouched")
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()  # so that what it starts can be ended with it
        os.environ["FUZZ_CANARY"] = str(place / CANARY)
        os.environ["HOME"] = str(place / WORK)
        os.environ.pop("MOETRAIN_TRACEBACK", None)
        os.chdir(place / WORK)
        for number_, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number_)
        words = KINDS[kind](random.Random(f"{seed}/{kind}/{number}"))
        (place / "words.json").write_text(json.dumps(words))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        for what, limit in (
            (resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, FILE_SIZE),
            (resource.RLIMIT_CORE, 0),
        ):  # fmt: skip
            resource.setrlimit(what, (limit, limit))
        status = main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 71
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def judge(status: int, place: Path) -> tuple[str | None, str]:
    """(what is wrong or None, stderr)."""
    error = (place / "stderr").read_bytes().decode("utf-8", "replace") if (place / "stderr").exists() else ""
    if (place / CANARY).exists():
        return "a payload was executed", error
    strange = {p.name for p in place.iterdir()} - {"case", "outside.txt", "words.json", "stdout", "stderr"}
    if strange or (place / "outside.txt").read_text() != "untouched":
        return f"wrote outside of its folder: {sorted(strange)}", error
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return ("hang" if name in ("SIGKILL", "SIGXCPU") else f"ended by {name}"), error
    code = os.WEXITSTATUS(status)
    if code in (70, 71) or "Traceback (most recent" in error:
        last = error.strip().splitlines()[-1:] or ["?"]
        return f"traceback: {last[0][:200]}", error
    lines = [li for li in error.splitlines() if not li.startswith("moetrain: warning: ")]
    if code == 0:
        return (f"noise: {lines[0][:200]}" if lines else None), error
    if code == 1 and len(lines) == 1 and re.match(r"moetrain: error: (out of memory|step \d+: .*not finite)", lines[0]):
        return None, error
    if code != 2:
        return f"status {code}", error
    if not lines or not lines[0].startswith("moetrain: error: ") or any(not li.startswith("  ") for li in lines[1:]):
        return "not one clear line", error
    many = re.search(r": (\d+) errors$", lines[0])
    if len(lines) > 1 and (many is None or min(int(many[1]), 21) != len(lines) - 1):
        return "not one clear line", error
    if any(len(li) > 1500 for li in lines) or len(lines) > 60:
        return "a line that nobody can read", error
    found = next((w for w in _NO_WORDS_FOR_USERS if w in error), None)
    return (f"jargon: {found}" if found else None), error


def run(counts: dict[str, int], seed: int, jobs: int, only: tuple[str, int] | None = None, keep: Path | None = None) -> list[Outcome]:
    """All cases, `jobs` at a time; their outcomes in order."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    good = folder / "good"
    good.mkdir()
    process = os.fork()
    if process == 0:  # so that this process has no threads when it forks
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            materials(good)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError("the good inputs could not be made")
    todo = [only] if only else [(kind, i) for kind in counts for i in range(counts[kind])]
    running: dict[int, tuple[str, int, Path, float]] = {}
    done: list[Outcome] = []
    try:
        while todo or running:
            while todo and len(running) < jobs:
                kind, number = todo.pop(0)
                place = folder / f"{kind}-{number}" if keep is None else keep
                running[start(kind, number, seed, good, place)] = (kind, number, place, time.monotonic())
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                for late, (_, _, _, began) in running.items():
                    if time.monotonic() - began > 4 * SECONDS:  # sleeps: CPU time has a limit of its own
                        os.killpg(late, signal.SIGKILL)
                time.sleep(0.005)
                continue
            kind, number, place, began = running.pop(process)
            finding, error = judge(status, place)
            words = json.loads((place / "words.json").read_text()) if (place / "words.json").exists() else []
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
            done.append(Outcome(kind, number, words, code, finding, error, time.monotonic() - began))
            if keep is None:
                shutil.rmtree(place, ignore_errors=True)
    finally:
        for left in running:
            os.killpg(left, signal.SIGKILL)
            os.waitpid(left, 0)
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(done, key=lambda o: (o.kind, o.number))


def program() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=int, default=60)
    parser.add_argument("--checkpoints", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--case", help="one alone, such as configs:17")
    parser.add_argument("--keep", type=Path, help="with --case: the folder for its files (new)")
    options = parser.parse_args()
    only = None
    if options.case:
        kind, _, number = options.case.partition(":")
        only = (kind, int(number))
    began = time.monotonic()
    outcomes = run({"configs": options.configs, "checkpoints": options.checkpoints}, options.seed, options.jobs, only, options.keep)
    for kind in KINDS:
        mine = [o for o in outcomes if o.kind == kind]
        by = collections.Counter(o.status for o in mine)
        slow = max((o.seconds for o in mine), default=0.0)
        print(f"{kind}: {len(mine)} cases; " + ", ".join(f"status {s}: {n}" for s, n in sorted(by.items())) + f"; slowest {slow:.1f} s")
    findings = [o for o in outcomes if o.finding]
    for o in findings:
        print(f"\n{o.kind}:{o.number} {o.finding}\n  moetrain {' '.join(o.words)[:300]}")
        print("\n".join(f"  | {line[:300]}" for line in o.output.splitlines()[-12:]))
    if only:
        print(outcomes[0].output)
    print(f"\n{len(findings)} findings in {len(outcomes)} cases, seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(program())
