"""Dense -> mixture: with every gate open the mixture is the dense model, in our code and in transformers; reports, refusals, killed
runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers as hf

from moetrain.config import BudgetRouter, FinedeepConfig, LayerRange, ModelConfig, SigmoidSteRouter, TopKRouter, UpcycleConfig
from moetrain.convert.huggingface import parameter_shapes, read_config, read_tensors, write_model
from moetrain.convert.upcycle import upcycle
from moetrain.model import Transformer, initial_tensor
from tests.convert.test_huggingface import FAMILIES, load_ours, logits, random_tokens, save_stock

OPEN = SigmoidSteRouter(rescale="none", bias=True, bias_init=40.0)


@pytest.mark.parametrize(
    "name", [n for n, (c, _) in FAMILIES.items() if n not in ("llama_biases",) and "moe" not in n and "mixtral" not in n]
)
def test_open_gates_are_the_dense_model(name, tmp_path):
    """sigmoid(40) rounds to 1 in float32, so nothing but the order of sums differs."""
    stock = save_stock(name, tmp_path / "dense")
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=8, router=OPEN, max_shard_bytes=30_000))
    expected = logits(stock, random_tokens())
    assert (logits(load_ours(tmp_path / "moe"), random_tokens()) - expected).abs().max() <= 1e-5
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", trust_remote_code=True).eval()
    assert (logits(exported, random_tokens()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("layers", "sparse"), [([2, 0], [0, 2]), (LayerRange(first=1, every=2), [1, 3]), (LayerRange(first=-1), [3])])
def test_only_some_layers_are_converted(layers, sparse, tmp_path):
    """The others keep their FFN bit for bit; with open gates the whole is the dense model, and `to_dense` gives it back."""
    FAMILIES["llama_4"] = (hf.LlamaConfig, dict(num_hidden_layers=4))
    try:
        stock = save_stock("llama_4", tmp_path / "dense")
    finally:
        del FAMILIES["llama_4"]
    report = upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=8, router=OPEN, layers=layers))
    assert report.config.moe_layers == sparse and [bool("active" in layer) for layer in report.receipt.layers] == [i in sparse for i in range(4)]
    before, after = (dict(read_tensors(tmp_path / name, read_config(tmp_path / name))) for name in ("dense", "moe"))
    for i in range(4):
        assert (f"layers.{i}.ffn.experts.down" in after) == (i in sparse)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items() if name in before)
    expected = logits(stock, random_tokens())
    assert (logits(load_ours(tmp_path / "moe"), random_tokens()) - expected).abs().max() <= 1e-5
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", trust_remote_code=True).eval()
    assert (logits(exported, random_tokens()) - expected).abs().max() <= 1e-5
    upcycle(UpcycleConfig(dense=str(tmp_path / "moe"), output=str(tmp_path / "again"), method="to_dense"))
    again = dict(read_tensors(tmp_path / "again", read_config(tmp_path / "again")))
    assert again.keys() == before.keys() and all(torch.equal(before[name], again[name]) for name in before)


def test_llama_moe_with_every_expert_is_the_dense_model(tmp_path):
    """k = E and equal gates: weights 1/E times E / k ... times E is what output_scale E gives."""
    stock = save_stock("llama", tmp_path / "dense")
    router = TopKRouter(top_k=4, output_scale=4.0, init_std=1e-12)
    report = upcycle(
        UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method="llama_moe", num_experts=4, router=router)
    )
    assert report.model_type == "mixtral"
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert (logits(exported, random_tokens()) - logits(stock, random_tokens())).abs().max() <= 1e-5


def test_defaults_and_report(tmp_path):
    save_stock("qwen2_tied", tmp_path / "dense", torch.bfloat16)
    (tmp_path / "dense" / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "dense" / "evil.py").write_text("raise SystemExit")
    raw = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**raw, "eos_token_id": [3, 4], "bos_token_id": 5}))
    steps = []
    config = UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method="dsmoe", seed=7)
    report = upcycle(config, progress=lambda done, total: steps.append((done, total)))
    dense = read_config(tmp_path / "dense")
    assert steps == [(i + 1, len(parameter_shapes(dense))) for i in range(len(steps))] and len(steps) == len(parameter_shapes(dense))
    mixture = read_config(tmp_path / "moe")
    assert (
        mixture == report.config
        and mixture.moe.num_experts == 8
        and mixture.moe.expert_dim == 6
        and mixture.moe.router == SigmoidSteRouter()
    )
    model = Transformer(mixture)
    assert report.parameters == sum(p.numel() for p in model.parameters()) == report.dense_parameters + 2 * 8 * 32
    assert report.activated[8] == report.parameters and report.activated[1] == report.parameters - 2 * 7 * 3 * 32 * 6
    assert (
        sorted(report.files) == sorted(os.listdir(tmp_path / "moe")) and "tokenizer.json" in report.files and "evil.py" not in report.files
    )
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["eos_token_id"] == [3, 4]
    tensors = dict(read_tensors(tmp_path / "moe", mixture))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    name = "layers.1.ffn.router.weight"
    assert torch.equal(tensors[name], initial_tensor(name, (8, 32), mixture, 7).bfloat16())


def test_llama_moe_defaults(tmp_path):
    save_stock("llama", tmp_path / "dense")
    for experts, k in ((8, 3), (16, 6), (2, 1)):
        report = upcycle(
            UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / f"moe{experts}"), method="llama_moe", num_experts=experts)
        )
        router = report.config.moe.router
        assert (router.top_k, router.output_scale) == (k, experts / k) and list(report.activated) == [k]
    given = UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "c"), method="llama_moe", router=TopKRouter(top_k=2))
    assert upcycle(given).config.moe.router.output_scale == 4.0


def test_slices_by_default_with_a_budget_and_with_any_router(tmp_path):
    save_stock("llama", tmp_path / "dense")
    dense = str(tmp_path / "dense")
    report = upcycle(UpcycleConfig(dense=dense, output=str(tmp_path / "own"), receipt=False))
    assert report.config.moe.router == BudgetRouter(target_active=3.0, output_scale=3.0) and list(report.activated) == [3.0]
    router = BudgetRouter(target_active=2.0, normalize=False)
    report = upcycle(UpcycleConfig(dense=dense, output=str(tmp_path / "sum"), router=router, receipt=False))
    assert report.config.moe.router.output_scale == 8.0
    report = upcycle(UpcycleConfig(dense=dense, output=str(tmp_path / "topk"), router=TopKRouter(top_k=2, output_scale=3.0), receipt=False))
    assert report.config.moe.router == TopKRouter(top_k=2, output_scale=3.0)


def test_slices_weigh_one_where_the_router_has_no_scale(tmp_path):
    """The factor is in up and down alike; with it, active slices add up to what they add up to in the dense FFN."""
    save_stock("llama", tmp_path / "dense")
    tensors = {}
    for scaled in (True, False):
        router = SigmoidSteRouter(rescale="none", init_std=0.2)
        options = dict(dense=str(tmp_path / "dense"), router=router, weight_scaling=None if scaled else False, receipt=False)
        folder = tmp_path / f"scaled{scaled}"
        upcycle(UpcycleConfig(output=str(folder), **options))
        tensors[scaled] = dict(read_tensors(folder, read_config(folder)))
    name = "layers.1.ffn.experts"
    factor = (tensors[True][f"{name}.down"] / tensors[False][f"{name}.down"]).median().item() ** 2
    up = (tensors[True][f"{name}.gate_up"] / tensors[False][f"{name}.gate_up"])[:, -6:].median().item() ** 2
    # The mean of sigmoid(z) above 0.5, z normal with standard deviation 0.2 |norm weight|.
    z = 0.2 * tensors[True]["layers.1.ffn_norm.weight"].double().norm() * torch.randn(200_000, dtype=torch.float64)
    assert factor == pytest.approx(1 / torch.sigmoid(z[z > 0]).mean().item(), rel=0.03) and up == pytest.approx(factor, rel=1e-3)


def test_a_budget_of_all_slices_starts_as_the_dense_model(tmp_path):
    """With a router of about zero every slice weighs 1."""
    stock = save_stock("llama", tmp_path / "dense")
    router = BudgetRouter(target_active=8.0, init_std=1e-13)
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), router=router, receipt=False))
    assert (logits(load_ours(tmp_path / "moe"), random_tokens()) - logits(stock, random_tokens())).abs().max() <= 1e-5


def test_refusals_write_nothing(tmp_path):
    save_stock("llama_biases", tmp_path / "bias")
    save_stock("llama", tmp_path / "dense")
    save_stock("mixtral", tmp_path / "moe")
    deep = ModelConfig(
        vocab_size=61, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48, finedeep=FinedeepConfig(sublayers=2, experts=2),
    )  # fmt: skip
    write_model(tmp_path / "deep", deep, ((n, torch.zeros(s)) for n, s in parameter_shapes(deep).items()))
    out = str(tmp_path / "out")
    for options, message in (
        (dict(dense="bias"), "mlp_bias: true"),
        (dict(dense="moe"), "mixture of 4 experts already"),
        (dict(dense="dense", num_experts=7), r"upcycle.num_experts \(7\) does not divide intermediate_size \(48\).*nearest that does: 6"),
        (dict(dense="nowhere"), "nowhere"),
        (dict(dense="deep"), "has model.finedeep; a stack of gated sub-layers"),
        (dict(dense="dense", layers=[2]), r"upcycle.layers: \[2\] outside 0..1, the layers of"),
    ):
        options["dense"] = str(tmp_path / options["dense"])
        with pytest.raises(ValueError, match=message):
            upcycle(UpcycleConfig(output=out, **options))
    with pytest.raises(ValueError, match="exists and is not empty"):
        upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe")))
    assert sorted(os.listdir(tmp_path)) == ["bias", "deep", "dense", "moe"]


def test_killed_run_leaves_no_folder_of_that_name(tmp_path):
    """SIGKILL between two shards; then the same command works."""
    save_stock("llama", tmp_path / "dense")
    program = f"""
import time
from moetrain.config import UpcycleConfig
from moetrain.convert.upcycle import upcycle
def progress(done, total):
    if done == 12:
        print("here", flush=True)
        time.sleep(60)
upcycle(UpcycleConfig(dense={str(tmp_path / "dense")!r}, output={str(tmp_path / "moe")!r}, max_shard_bytes=5000), progress)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    partial = [p for p in tmp_path.iterdir() if p.name != "dense"]
    assert (
        len(partial) == 1
        and partial[0].name.startswith(".moe.")
        and partial[0].name.endswith(".partial")
        and list(partial[0].glob("shard-*"))
    )
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe")))
    assert read_config(tmp_path / "moe").moe is not None
