"""Wrong input ends with a status that is not 0 and one line that names the field or file and says what to do; never with a traceback, and never
with something lost or changed on disk."""

# ruff: noqa: E501  (tables: one case per line)

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moetrain.cli import main
from moetrain.config import ModelConfig, to_dict, to_yaml
from moetrain.convert.huggingface import write_model
from moetrain.data.indexed import IndexedWriter
from moetrain.data.tokenizer import load_tokenizer, save_tokenizer
from moetrain.model import Transformer, init_weights
from tests.test_train import make_config, write_data

ROOT = Path(__file__).resolve().parents[1]
DENSE = dict(vocab_size=50, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=16, max_position_embeddings=64)
TOPK = {"num_experts": 4, "expert_dim": 4, "router": {"type": "topk", "top_k": 2}}


def write_folder(folder: Path, **changes: Any) -> None:
    config = ModelConfig.model_validate({**DENSE, **changes})
    model = Transformer(config)
    init_weights(model, 0)
    write_model(folder, config, model.named_parameters())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data sets a and b, the Hugging Face folders dense and moe, c.yaml, and a run of it with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    write_data(folder / "a", seed=1)
    write_data(folder / "b", documents=20, seed=2)
    write_folder(folder / "dense")
    write_folder(folder / "moe", moe=TOPK)
    (folder / "text.txt").write_text("some text\n")
    config = make_config(folder, "exact", run_dir="run", train__steps=4, train__dtype="float32", checkpoint={"every": 2})
    text = to_yaml(config).replace(f"{folder}/", "")
    (folder / "c.yaml").write_text(text)
    (folder / "small.yaml").write_text("model: {vocab_size: 50, hidden_size: 8, num_layers: 2, num_heads: 2, intermediate_size: 16}\n")
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", "--config", "c.yaml"]) == 0
    finally:
        os.chdir(here)
    assert sorted(p.name for p in (folder / "run" / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was made, as the working folder: a test damages what it likes, and paths in messages are short."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


# ------------------------------------------------------------------------------------------------- ways to spoil what is there


def rewrite(path: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / path).write_text(text) and None


def remove(path: str) -> Callable[[Path], None]:
    return lambda place: (place / path).unlink()


def cut(path: str, keep: int) -> Callable[[Path], None]:
    def do(place: Path) -> None:
        content = (place / path).read_bytes()
        assert len(content) > keep
        (place / path).write_bytes(content[:keep])

    return do


def header(**changes: Any) -> Callable[[Path], None]:
    """Change keys of dense/config.json; None takes one out."""

    def do(place: Path) -> None:
        path = place / "dense" / "config.json"
        raw = json.loads(path.read_text()) | changes
        raw = {k: v for k, v in raw.items() if v is not None and k != "moetrain"}
        path.write_text(json.dumps(raw))

    return do


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def do(place: Path) -> None:
        path = place / "dense" / "model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})

    return do


def escape(place: Path) -> None:
    shutil.move(place / "dense" / "model.safetensors", place / "secret.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../secret.safetensors"}}
    (place / "dense" / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(place: Path) -> None:
    (place / "dense" / "model.safetensors").rename(place / "dense" / "pytorch_model.bin")


def empty_data(place: Path) -> None:
    with IndexedWriter(place / "a", np.uint16):
        pass


def big_token(place: Path) -> None:
    with IndexedWriter(place / "a", np.uint16) as writer:
        for _ in range(20):
            writer.add_document(np.full(30, 50, np.uint16))


def big_token_in_json(place: Path) -> None:
    rewrite("a.json", '{"max_token_id": 77}')(place)


def wrong_magic(place: Path) -> None:
    content = bytearray((place / "a.idx").read_bytes())
    content[:9] = b"NOTINDEX\0"
    (place / "a.idx").write_bytes(content)


def wrong_dtype(place: Path) -> None:
    content = bytearray((place / "a.idx").read_bytes())
    content[17:18] = struct.pack("<B", 6)
    (place / "a.idx").write_bytes(content)


def damage(*steps: int) -> Callable[[Path], None]:
    """Flip a bit in the largest file of checkpoints."""

    def do(place: Path) -> None:
        for step in steps:
            path = max((place / "run" / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"), key=lambda p: p.stat().st_size)
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(content)

    return do


def forget_checkpoint_meta(place: Path) -> None:
    for step in (2, 4):
        (place / "run" / "checkpoints" / f"step-{step:08d}" / "meta.json").unlink()


def link(path: str, target: str) -> Callable[[Path], None]:
    def do(place: Path) -> None:
        (place / path).unlink(missing_ok=True)
        (place / path).symlink_to(target)

    return do


def pipe(path: str) -> Callable[[Path], None]:
    def do(place: Path) -> None:
        (place / path).unlink()
        os.mkfifo(place / path)

    return do


def meta(**changes: Any) -> Callable[[Path], None]:
    """Change what both checkpoints hold beside tensors, with a manifest that fits: a stranger can write one too. None takes a key out."""

    def do(place: Path) -> None:
        for step in (2, 4):
            folder = place / "run" / "checkpoints" / f"step-{step:08d}"
            raw = json.loads((folder / "meta.json").read_text()) | changes
            content = json.dumps({k: v for k, v in raw.items() if v is not None}).encode()
            (folder / "meta.json").write_bytes(content)
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"]["meta.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(manifest))

    return do


def tokenizer_with(**config: Any) -> Callable[[Path], None]:
    def do(place: Path) -> None:
        save_tokenizer(load_tokenizer("byte"), place / "dense")
        path = place / "dense" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return do


def letter_out(place: Path) -> None:
    """A file that an upcycling copies leads to one of this machine."""
    (place / "dense" / "chat_template.jinja").symlink_to(place / "text.txt")


_DEEP = "[" * 100_000 + "]" * 100_000
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


def none(place: Path) -> None:
    pass


TRAIN = "train --config c.yaml"
UPCYCLE = "upcycle --upcycle.dense dense --upcycle.output out"
SMALL = "train --config small.yaml --train.steps 4 --train.global_batch_size 4 --train.micro_batch_size 2"
FRESH = TRAIN + " --run_dir other"

# command line, how its input is spoiled, what the line must hold
CASES: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
    # the command line
    ("trian --config c.yaml", none, ("unknown command 'trian'; did you mean train?",)),
    ("zzz", none, ("unknown command 'zzz'; one of prepare,",)),
    ("train c.yaml", none, ("unexpected argument 'c.yaml'", "--section.key VALUE")),
    (TRAIN + " --train.lr", none, ("--train.lr: a value is missing",)),
    (TRAIN + " --config c.yaml", none, ("--config is given twice",)),
    ("train --config", none, ("--config: name a YAML file",)),
    ("doctor --jsno", none, ("unexpected argument '--jsno'; known: --json",)),
    ("config --schema x", none, ("unexpected argument 'x'",)),
    # the file
    ("train --config no.yaml", none, ("config no.yaml", "No such file")),
    ("train --config dense", none, ("config dense", "Is a directory")),
    (TRAIN, lambda p: (p / "c.yaml").write_bytes(b"\x80\x81\xff\x00") and None, ("config c.yaml", "not UTF-8 text")),
    (TRAIN, rewrite("c.yaml", "train: {steps: 4\nmodel: 3"), ("config c.yaml line 2", "not valid YAML")),
    (TRAIN, rewrite("c.yaml", "train: 1\ntrain: 2"), ("config c.yaml line 2", "key 'train' is given twice")),
    (TRAIN, rewrite("c.yaml", "- a\n- b\n"), ("config c.yaml", "must be a mapping of sections, found list")),
    (TRAIN, rewrite("c.yaml", ""), ("missing sections: model, train", "init_from")),
    (TRAIN, link("c.yaml", "/dev/zero"), ("config c.yaml: has more than 1,048,576 bytes",)),
    (TRAIN, rewrite("c.yaml", "x" * 2_000_000), ("config c.yaml: has more than 1,048,576 bytes",)),
    (TRAIN, rewrite("c.yaml", "run_dir: !!map x"), ("config c.yaml line 1", "tags are not read, found 'tag:yaml.org,2002:map'")),
    (TRAIN, rewrite("c.yaml", _BOMB + "model: *a8"), ("config c.yaml line", "more than 100,000 values")),
    (TRAIN, rewrite("c.yaml", "model: " + "[" * 5000), ("config c.yaml", "not valid YAML: nested too deeply")),
    (TRAIN, rewrite("c.yaml", '? "x\\ny"\n: 1'), ("'x\\ny': unknown key",)),
    # single fields
    (TRAIN + " --model.num_layers 1000000000000", none, ("model.num_layers", "less than or equal to 4096")),
    (TRAIN + " --model.moe.num_experts 1000000000000000000", none, ("model.moe.num_experts", "less than or equal to 65536")),
    (TRAIN + " --model.moe.num_experts 65536 --model.num_layers 4000", none, ("num_experts (65536) in 4000 sparse layers", "1,048,576")),
    (TRAIN + " --train.steps 9223372036854775808", none, ("train.steps", "less than 9223372036854775808")),
    (TRAIN + " --data.prefetch 1000000", none, ("data.prefetch", "less than or equal to 1024")),
    (TRAIN + " --train.stpes 3", none, ("train.stpes: unknown key; did you mean train.steps?",)),
    (TRAIN + " --model.moe.router.treshold 0.5", none, ("model.moe.router.treshold", "did you mean model.moe.router.threshold?")),
    (TRAIN + " --train.lr fast", none, ("train.lr", "valid number", "'fast'")),
    (TRAIN + " --train.steps -4", none, ("train.steps", "greater than 0, found -4")),
    (TRAIN + " --train.steps 2.5", none, ("train.steps", "valid integer", "2.5")),
    (TRAIN + " --train.lr .inf", none, ("train.lr", "finite", "inf")),
    (TRAIN + " --train.dtype float8", none, ("train.dtype", "'float32', 'bfloat16' or 'float64'")),
    (TRAIN + " --model 3", none, ("model: must be a section", "found 3")),
    (TRAIN + " --model 3 --init_from dense", none, ("model: must be a section", "found 3")),
    (TRAIN + " --run_dir=", none, ("run_dir", "at least 1 character")),
    ("train --config small.yaml --data.train [a]", none, ("data.train.0: must be a section", "found 'a'")),
    (TRAIN + " --train.seed 9223372036854775808", none, ("train.seed", "less than 9223372036854775808")),
    # combinations
    (SMALL, none, ("data.train: no source to train on",)),
    (TRAIN + " --train.global_batch_size 15", none, ("train.global_batch_size (15)", "multiple of train.micro_batch_size (8)")),
    (TRAIN + " --parallel.ep 3", none, ("model.moe.num_experts (8) must be a multiple of parallel.ep (3); nearest: 2",)),
    (TRAIN + " --model.moe.router {type: topk, top_k: 9}", none, ("model.moe.router.top_k (9) is more than num_experts (8)",)),
    (TRAIN + " --data.seq_len 65", none, ("data.seq_len (65) is more than model.max_position_embeddings (64)",)),
    (TRAIN + " --train.schedule.warmup_steps 5", none, ("train.schedule.warmup_steps (5) is more than train.steps (4)",)),
    (TRAIN + " --train.eval_every 2", none, ("train.eval_every (2) needs at least one set in data.eval",)),
    (TRAIN + " --model.moe.router.probe_rate 0.5", none, ("model.moe.router.probe_rate (0.5) has an effect only with ste: sampled",)),
    # layouts
    (TRAIN + " --parallel.dp_shard -1 --parallel.ep 2", none, ("ep (2) = 2 does not divide the number of ranks (1); start 2 ranks",)),
    (TRAIN + " --parallel.dp_shard 2", none, ("dp_shard (2)", "but 1 ranks were started; start 2, or set dp_shard: -1")),
    (TRAIN + " --parallel.dp_replicate 2", none, ("dp_replicate (2)", "but 1 ranks were started")),
    (TRAIN + " --parallel.dp_shard 0", none, ("parallel.dp_shard: 0 ranks; use -1",)),
    # data
    (FRESH, remove("a.bin"), ("a.bin: no such file", "prefix")),
    (FRESH, remove("a.idx"), ("a.idx: no such file", "prefix")),
    (FRESH, cut("a.bin", 101), ("a.bin: cut short", "found 101")),
    (FRESH, cut("a.idx", 20), ("a.idx: cut short", "found 20")),
    (FRESH, cut("a.idx", 200), ("a.idx: cut short or corrupt", "found 200")),
    (FRESH, wrong_magic, ("a.idx: not a Megatron index",)),
    (FRESH, wrong_dtype, ("a.idx: dtype code 6",)),
    (FRESH, empty_data, ("data set 'a'", "holds no tokens")),
    (FRESH, big_token, ("data set 'a'", "token id 50", "vocab_size is 50")),
    (FRESH, big_token_in_json, ("data set 'a'", "token id 77", "vocab_size is 50")),
    (FRESH, rewrite("a.json", "{"), ("a.json: is not valid JSON", "prepare the data again")),
    (FRESH, rewrite("a.json", '{"max_token_id": "x"}'), ("a.json: max_token_id must be a number of tokens, found \"x\"",)),
    (FRESH, rewrite("a.json", '{"tokenizer": {"spec": 3}}'), ("a.json: tokenizer must be an object", "prepare the data again")),
    (FRESH, rewrite("a.json", "null"), ("a.json: must be a JSON object, found null",)),
    (FRESH, rewrite("a.json", _DEEP), ("a.json", "nested too deeply")),
    (FRESH, link("a.json", "/dev/zero"), ("a.json: is no regular file",)),
    # prepare
    ("prepare", none, ("missing section: prepare",)),
    ("prepare --prepare.inputs [] --prepare.output p", none, ("prepare.inputs", "at least 1 item")),
    ("prepare --prepare.inputs [text.txt] --prepare.output p --prepare.extensions []", none, ("prepare.extensions", "at least 1 item")),
    ("prepare --prepare.inputs [no.txt] --prepare.output p", none, ("input no.txt: no such file or folder",)),
    ("prepare --prepare.inputs [/dev/zero] --prepare.output p", none, ("input /dev/zero: neither a folder nor a regular file",)),
    ("prepare --prepare.inputs text.txt --prepare.output p", none, ("prepare.inputs", "valid list", "'text.txt'")),
    ("prepare --prepare.inputs [l.jsonl] --prepare.output p --prepare.strict true", rewrite("l.jsonl", '{"text": "a"}\n{"text": \n'), ("l.jsonl:2", "bad JSON", "(strict)")),
    ("prepare --prepare.inputs [l.jsonl] --prepare.output p --prepare.text_key body", rewrite("l.jsonl", '{"text": "a"}\n'), ("no document found", "text_key")),
    ("prepare --prepare.inputs [dense] --prepare.output p", none, ("no document found", "extensions")),
    ("prepare --prepare.inputs [text.txt] --prepare.output p/", none, ("output p/", "not a folder")),
    ("prepare --prepare.inputs [text.txt] --prepare.output p --prepare.tokenizer no", none, ("tokenizer: no", "does not exist", "'byte'")),
    ("prepare --prepare.inputs [text.txt] --prepare.output p --prepare.tokenizer t.json", rewrite("t.json", '{"a": 1}'), ("tokenizer: t.json can't be read",)),
    ("prepare --prepare.inputs [text.txt] --prepare.output text.txt/p", none, ("text.txt", "Not a directory")),
    # Hugging Face folders
    ("upcycle", none, ("missing section: upcycle",)),
    (UPCYCLE, remove("dense/config.json"), ("dense/config.json", "No such file")),
    (UPCYCLE.replace("dense dense", "dense nowhere"), none, ("nowhere/config.json", "No such file")),
    (UPCYCLE, rewrite("dense/config.json", "{"), ("dense/config.json: is not valid JSON",)),
    (UPCYCLE, rewrite("dense/config.json", "[]"), ("dense/config.json: must be a JSON object",)),
    (UPCYCLE, header(model_type="gpt2"), ("dense/config.json: model_type is 'gpt2'; supported: llama",)),
    (UPCYCLE, header(model_type=None), ("dense/config.json: model_type is None",)),
    (UPCYCLE, header(hidden_act="gelu"), ("dense/config.json: hidden_act is 'gelu'; supported: 'silu'",)),
    (UPCYCLE, header(hidden_size=None), ("dense/config.json: hidden_size is missing",)),
    (UPCYCLE, header(hidden_size="8"), ("dense/config.json", "hidden_size", "'8'")),
    (UPCYCLE, header(num_attention_heads=3, head_dim=None), ("dense/config.json", "hidden_size (8) is no multiple of model.num_heads (3)")),
    (UPCYCLE, tensors(lambda t: t.pop("model.norm.weight")), ("dense", "missing 1: model.norm.weight")),
    (UPCYCLE, tensors(lambda t: t.update(surprise=torch.zeros(2))), ("dense", "not used 1: surprise")),
    (UPCYCLE, tensors(lambda t: t.update({"model.norm.weight": torch.ones(9)})), ("model.norm.weight has shape [9]", "[8]")),
    (UPCYCLE, tensors(lambda t: t.update({"model.norm.weight": torch.ones(8, dtype=torch.int32)})), ("model.norm.weight has dtype I32", "F32")),
    (UPCYCLE, cut("dense/model.safetensors", 300), ("dense/model.safetensors", "can't be read as safetensors")),
    (UPCYCLE, cut("dense/model.safetensors", 4000), ("dense/model.safetensors", "can't be read as safetensors")),
    (UPCYCLE, remove("dense/model.safetensors"), ("dense", "has neither model.safetensors nor")),
    (UPCYCLE, pickled, ("dense: has only pytorch_model.bin", "never read", "save_pretrained")),
    (UPCYCLE, escape, ("'../secret.safetensors' is no plain name",)),
    (UPCYCLE.replace("dense dense", "dense moe"), none, ("upcycle.dense (moe) is a mixture of 4 experts already",)),
    (UPCYCLE + " --upcycle.num_experts 7", none, ("upcycle.num_experts (7) does not divide intermediate_size (16)", "nearest that does: 8")),
    (UPCYCLE + " --upcycle.method llama", none, ("upcycle.method", "'dsmoe', 'llama_moe', 'copy'")),
    (UPCYCLE.replace("output out", "output moe"), none, ("moe: exists and is not empty; choose another output",)),
    (UPCYCLE.replace("output out", "output text.txt"), none, ("text.txt: exists and is not empty",)),
    (FRESH.replace("c.yaml", "small.yaml") + " --init_from nowhere", none, ("nowhere/config.json",)),
    (UPCYCLE, link("dense/config.json", "/dev/zero"), ("dense/config.json: is no regular file",)),
    (UPCYCLE, pipe("dense/config.json"), ("dense/config.json: is no regular file",)),
    (UPCYCLE, rewrite("dense/config.json", _DEEP), ("dense/config.json", "nested too deeply")),
    (UPCYCLE, header(model_type=["llama"]), ("dense/config.json: model_type is ['llama']; supported: llama",)),
    (UPCYCLE, header(num_hidden_layers=2**40), ("dense/config.json: num_hidden_layers must be at most 4096",)),
    (UPCYCLE, header(rope_theta=[1]), ("dense/config.json: rope_theta must be a number, found [1]",)),
    (UPCYCLE, header(rope_theta=10**400), ("dense/config.json: rope_theta must be a number",)),
    (UPCYCLE, header(rope_scaling={"rope_type": ["x"]}), ("dense/config.json: rope_scaling.rope_type must be a name, found ['x']",)),
    (UPCYCLE, header(decoder_sparse_step=0), ("dense/config.json: decoder_sparse_step must be a whole number, found 0",)),
    (UPCYCLE, header(layer_types=[["x"]]), ("dense/config.json: layer_types must be a list of names",)),
    (UPCYCLE, tensors(lambda t: t.update({"x" * 5000: torch.zeros(2)})), ("dense: the tensors don't fit config.json: not used 1: xxx", " ... x")),
    (UPCYCLE, tensors(lambda t: t.update({"\x1b[31m\nx": torch.zeros(2)})), ("not used 1: \\x1b[31m\\nx",)),
    (UPCYCLE, letter_out, ("dense/chat_template.jinja: is a link out of its folder", "replace it by the file")),
    ("prepare --prepare.inputs [text.txt] --prepare.output p --prepare.tokenizer dense", tokenizer_with(eos_token=["</s>"]), ("eos_token ['</s>'] of dense/tokenizer_config.json is not in",)),
    # checkpoints
    (TRAIN + " --train.steps 6", pipe("run/metrics.jsonl"), ("run/metrics.jsonl: is a link or no regular file, so it is not written",)),
    (TRAIN + " --train.steps 6", link("run/metrics.jsonl", "../text.txt"), ("run/metrics.jsonl: is a link",)),
    (TRAIN + " --train.steps 6", link("run/config.yaml.tmp", "../text.txt"), ("run/config.yaml.tmp: is a link",)),
    ("report run", link("run/report.html.tmp", "../text.txt"), ("run/report.html.tmp: is a link",)),
    (TRAIN + " --train.steps 6", meta(updates=None), ("meta.json: updates: missing",)),
    (TRAIN + " --train.steps 6", meta(consumed_samples="x"), ("meta.json: consumed_samples", "valid integer, found 'x'")),
    (TRAIN + " --train.steps 6", meta(step=2**70), ("meta.json: step", "less than 9223372036854775808")),
    ("export --run_dir run --export.output out", meta(config=None), ("step-00000004: meta.json: config: missing",)),
    ("export --run_dir run --export.output out", meta(config={}), ("step-00000004: its config has no model section",)),
    ("export --run_dir run --export.output out", meta(config={"model": {**DENSE, "x": 1}}), ("config of checkpoint run/checkpoints/step-00000004: model.x: unknown key",)),
    (TRAIN + " --train.steps 6", damage(2, 4), ("no whole checkpoint in run/checkpoints", "step 4", "step 2", "checksum")),
    (TRAIN + " --train.steps 6", forget_checkpoint_meta, ("no whole checkpoint in run/checkpoints", "meta.json is missing")),
    (TRAIN + " --train.steps 6 --model.intermediate_size 24", none, ("run_dir run", "another model", "model.intermediate_size: 16 there, 24 here", "another run_dir")),
    (TRAIN + " --train.steps 6 --model.hidden_size 16", none, ("run_dir run", "another model", "model.hidden_size: 8 there, 16 here")),
    (TRAIN + " --train.steps 6 --model.num_layers 3", none, ("run_dir run", "another model", "model.num_layers: 2 there, 3 here")),
    (TRAIN + " --train.steps 6 --train.dtype float64", none, ("run/checkpoints", "float32", "float64")),
    (TRAIN + " --train.steps 6 --data.train.1.path a", none, ("run_dir run", "other data", "init_from")),
    (TRAIN + " --train.steps 6 --train.seed 4", none, ("run_dir run", "other data", "seed")),
    (TRAIN + " --train.steps 6 --resume false", none, ("run_dir run has a checkpoint of step 4", "resume: true")),
    (TRAIN + " --run_dir text.txt", none, ("run_dir text.txt: can't be made a folder: File exists",)),
    (TRAIN + " --run_dir text.txt/run", none, ("run_dir text.txt/run: can't be made a folder: Not a directory",)),
    # eval, generate, export
    ("eval --run_dir run", none, ("data.eval: no set to evaluate",)),
    ("eval --run_dir nowhere --data.eval [{name: a, path: a}]", none, ("run_dir nowhere: no checkpoint there", "init_from")),
    ("eval --run_dir run --data.eval [{name: a, path: no}]", none, ("no.idx: no such file",)),
    ("eval --init_from dense --data.seq_len 65 --data.eval [{name: a, path: a}]", none, ("data.seq_len (65) is more than model.max_position_embeddings (64)",)),
    ("generate --run_dir run --generate.prompt x", none, ("run/checkpoints/step-00000004", "no tokenizer")),
    ("generate --run_dir nowhere", none, ("run_dir nowhere: no checkpoint there",)),
    ("export --run_dir run", none, ("missing section: export",)),
    ("export --run_dir run --export.output dense", none, ("dense: exists and is not empty",)),
    ("export --run_dir nowhere --export.output out", none, ("run_dir nowhere: no checkpoint there",)),
    ("export --run_dir run --export.output out --export.dtype int8", none, ("export.dtype", "'float32', 'bfloat16' or 'float16'")),
]  # fmt: skip


def words_of(line: str) -> list[str]:
    """Words of a command line; what is in brackets stays together."""
    words: list[str] = []
    for word in line.split(" "):
        if words and (words[-1].count("[") > words[-1].count("]") or words[-1].count("{") > words[-1].count("}")):
            words[-1] += " " + word
        else:
            words.append(word)
    return words


@pytest.mark.filterwarnings("ignore:.*checkpoint .* is damaged")
@pytest.mark.parametrize(("line", "spoil", "parts"), CASES, ids=[f"{i:02d}-{line[:60]}" for i, (line, _, _) in enumerate(CASES)])
def test_one_clear_line(line: str, spoil: Callable[[Path], None], parts: tuple[str, ...], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil(place)
    before = snapshot(place)
    status = main(words_of(line))
    output = capfd.readouterr()
    assert status == 2, output
    assert_clear(output.err, parts)
    after = snapshot(place)
    # A run says in its status how its last start went.
    assert {n: after.get(n) for n in before if n != "run/status.json"} == {n: v for n, v in before.items() if n != "run/status.json"}
    # A prepare that fails keeps finished parts for the next try; a run that fails after its start has its folder.
    assert {name.split("/")[0] for name in after.keys() - before.keys()} <= {"p.parts", "other", "runs"}


def assert_clear(text: str, parts: tuple[str, ...]) -> None:
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("moetrain: error: "), text
    for part in parts:
        assert part in text, (part, text)
    # Pydantic's and Python's own words for things no user has heard of.
    for jargon in ("Traceback", "NoneType", "instance of", "KeyError", "[Errno", "errors.pydantic.dev"):
        assert jargon not in text, text


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40


@pytest.fixture
def byte_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run on prepared bytes, whose tokenizer is known."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words and words\n" * 20)
    assert main(["prepare", "--prepare.inputs", "[text.txt]", "--prepare.output", "d"]) == 0
    text = "model: {vocab_size: 259, hidden_size: 8, num_layers: 1, num_heads: 2, intermediate_size: 8, max_position_embeddings: 16}\n"
    text += "data: {seq_len: 8, train: [{name: d, path: d}]}\ntrain: {steps: 1, global_batch_size: 2, micro_batch_size: 2}\nrun_dir: run\n"
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", "c.yaml"]) == 0
    yield tmp_path


def test_generate(byte_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A prompt that is too long, one that is no text, one beyond the vocabulary; a prompt that looks like YAML is just text."""
    capfd.readouterr()
    assert main(["generate", "--run_dir", "run", "--generate.prompt", "def f(): # x", "--generate.max_new_tokens", "2"]) == 0
    assert capfd.readouterr().out.startswith("def f(): # x")
    for words, parts in (
        (
            ["--generate.prompt", "x" * 15, "--generate.max_new_tokens", "2"],
            ("generate.max_new_tokens (2)", "15 tokens", "max_position_embeddings (16)", "at most 1"),
        ),
        (["--generate.prompt", "x" * 99], ("99 tokens", "at most 0")),
        (["--generate.prompt", "a\ud800b"], ("generate.prompt", "not valid UTF-8")),
        (["--generate.temperature", "-1"], ("generate.temperature", "greater than or equal to 0")),
    ):
        assert main(["generate", "--run_dir", "run", *words]) == 2
        assert_clear(capfd.readouterr().err, parts)


def test_generate_with_another_vocabulary(byte_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Smaller than the tokenizer's: one line. Larger, as vocabularies are that were rounded up: ids that no text belongs to say nothing."""
    for size in (50, 400):
        write_folder(byte_run / f"hf{size}", vocab_size=size)
        save_tokenizer(load_tokenizer("byte"), byte_run / f"hf{size}")
    capfd.readouterr()
    words = ["generate", "--run_dir", "none", "--generate.prompt", "xyz", "--generate.temperature", "5", "--generate.max_new_tokens", "20"]
    assert main([*words, "--init_from", "hf50"]) == 2
    assert_clear(capfd.readouterr().err, ("generate.prompt: its token 122 is beyond the model's vocab_size (50)", "tokenizer (hf50)"))
    assert main([*words, "--init_from", "hf400"]) == 0
    assert capfd.readouterr().out.startswith("xyz")


def test_damaged_newest_checkpoint_falls_back(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Training goes on from the one before, and says so; the damaged one is replaced when its step comes again."""
    damage(4)(place)
    with pytest.warns(UserWarning, match="step-00000004 is damaged: .*checksum.*trying the one before it"):
        assert main(words_of(TRAIN + " --train.steps 6")) == 0
    events = [json.loads(line) for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "fallback"] == [4] and [e["step"] for e in events if e["event"] == "resume"] == [2]
    steps = [json.loads(line)["step"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_export_of_a_damaged_run(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The newest whole checkpoint is taken, and that it is not the newest is said; without a whole one nothing is written."""
    damage(4)(place)
    with pytest.warns(UserWarning, match="step-00000004 is damaged: .*checksum"):
        assert main(words_of("export --run_dir run --export.output out")) == 0
    assert "step-00000002 -> out" in capfd.readouterr().out
    damage(2)(place)
    before = snapshot(place)
    assert main(words_of("export --run_dir run --export.output out2")) == 2
    assert_clear(capfd.readouterr().err.splitlines()[-1], ("run", "no whole checkpoint"))
    # Nor are the weights that the run started from handed out as its result.
    assert main(words_of("export --run_dir run --init_from dense --export.output out2")) == 2
    assert_clear(capfd.readouterr().err.splitlines()[-1], ("run", "no whole checkpoint"))
    assert snapshot(place) == before


def test_a_run_that_diverges(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Status 1, one line that says which step and what to do, checkpoints untouched."""
    before = snapshot(place / "run" / "checkpoints")
    capfd.readouterr()
    # The embedding of one token overflows, so every step's loss is NaN.
    words = words_of(
        TRAIN
        + " --train.steps 40 --train.max_bad_steps 3 --train.lr 1e38 --train.grad_clip null --train.schedule.warmup_steps 0 --checkpoint.every 1000"
    )
    assert main(words) == 1
    assert_clear(capfd.readouterr().err, ("not finite in 3 steps in a row", "lower train.lr"))
    assert snapshot(place / "run" / "checkpoints") == before


def test_out_of_memory(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An embedding of 320 TB, more than any process can address."""
    assert main(words_of(FRESH + " --model.vocab_size 10_000_000_000_000")) == 1
    assert_clear(capfd.readouterr().err, ("out of memory", "micro_batch_size", "activation_checkpointing: block"))


def test_a_run_knows_its_model_when_its_start_weights_are_gone(place: Path) -> None:
    """Training goes on, and eval and export read the run's own config; the folder that it started from is of no account then."""
    words = FRESH.replace("c.yaml", "start.yaml")
    (place / "start.yaml").write_text(
        "data: {seq_len: 12, train: [{name: a, path: a}], eval: [{name: a, path: a}]}\ntrain: {steps: 1, global_batch_size: 2, micro_batch_size: 2}\n"
    )
    assert main([*words_of(words), "--init_from", "dense"]) == 0
    shutil.rmtree(place / "dense")
    assert main([*words_of(words), "--init_from", "dense", "--train.steps", "2"]) == 0
    assert main(["eval", "--run_dir", "other"]) == 0
    assert main(["export", "--run_dir", "other", "--export.output", "out"]) == 0
    assert to_dict(ModelConfig.model_validate(json.loads((place / "out" / "config.json").read_text())["moetrain"]))["hidden_size"] == 8


@pytest.mark.parametrize(
    ("line", "spoil", "parts"),
    [
        (TRAIN + " --train.stpes 3", none, ("train.stpes: unknown key; did you mean train.steps?",)),
        (FRESH, remove("a.idx"), ("a.idx: no such file",)),
        ("export --run_dir run --export.output dense", none, ("dense: exists and is not empty",)),
        (TRAIN + " --train.steps 6", damage(2, 4), ("no whole checkpoint in run/checkpoints",)),
    ],
)
def test_as_a_program(line: str, spoil: Callable[[Path], None], parts: tuple[str, ...], place: Path) -> None:
    """The same through a real process: its status, and nothing on stderr but the line and, before it, our warnings, one line each."""
    spoil(place)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "moetrain", *words_of(line)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2
    *warned, last = done.stderr.splitlines()
    assert_clear(last, parts)
    assert all(text.startswith("moetrain: warning: checkpoint run/checkpoints/step-") and "damaged" in text for text in warned), done.stderr
    assert len(warned) == (2 if "no whole checkpoint" in last else 0)
