"""Back to dense: slices join to the dense model that they were cut from, copies to one of them, and nothing else is claimed."""

from __future__ import annotations

import json

import pytest
import torch

from moetrain.config import ModelConfig, MoEConfig, SharedConfig, SigmoidSteRouter, StrataConfig, TopKRouter, UpcycleConfig
from moetrain.convert.collapse import collapse, dense_config
from moetrain.convert.huggingface import read_config, read_tensors
from moetrain.convert.upcycle import target_config, upcycle
from tests.convert.test_huggingface import load_ours, logits, random_tokens, save_stock


def back(folder, output, **options):
    return upcycle(UpcycleConfig(dense=str(folder), output=str(output), method="to_dense", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [1, 8, 48])
def test_contiguous_slices_come_back_bit_by_bit(num_experts, dtype, tmp_path):
    save_stock("qwen2_tied", tmp_path / "dense", dtype)
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=num_experts, receipt=False))
    report = back(tmp_path / "moe", tmp_path / "back")
    config = read_config(tmp_path / "dense")
    assert read_config(tmp_path / "back") == config.model_copy(update={"init_std": read_config(tmp_path / "back").init_std})
    old, new = dict(read_tensors(tmp_path / "dense", config)), dict(read_tensors(tmp_path / "back", config))
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert report.model_type == "qwen2" and report.activated == {} and json.loads((tmp_path / "back/receipt.json").read_text())


@pytest.mark.parametrize("method,split", [("dsmoe", "random"), ("dsmoe", "cluster"), ("llama_moe", "random")])
def test_permuted_slices_come_back_as_a_function(method, split, tmp_path):
    """The neurons stand in another order; llama_moe's E / k is divided out again."""
    stock = save_stock("llama", tmp_path / "dense")
    options = dict(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=8)
    upcycle(UpcycleConfig(method=method, split=split, receipt=False, **options))
    back(tmp_path / "moe", tmp_path / "back")
    assert (logits(load_ours(tmp_path / "back"), random_tokens()) - logits(stock, random_tokens())).abs().max() <= 1e-5


@pytest.mark.parametrize("router", [TopKRouter(top_k=2), TopKRouter(top_k=3, output_scale=0.7), TopKRouter(top_k=4, normalize=False)])
def test_copies_come_back(router, tmp_path):
    """Equal experts and weights of a fixed sum: the mixture is one dense FFN wherever the router sends a token."""
    save_stock("llama", tmp_path / "dense")
    options = dict(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=4, weight_scaling=False)
    upcycle(UpcycleConfig(method="copy", router=router.model_copy(update={"init_std": 0.5}), **options))
    report = back(tmp_path / "moe", tmp_path / "back", join="copies")
    difference = logits(load_ours(tmp_path / "back"), random_tokens()) - logits(load_ours(tmp_path / "moe"), random_tokens())
    assert difference.abs().max() <= 1e-5 and report.receipt.logits <= 1e-5
    # What the mixture uses, not what it has.
    assert report.receipt.activated[0] == read_config(tmp_path / "moe").num_active_params(router.top_k)


def test_refusals(tmp_path):
    save_stock("llama", tmp_path / "dense")
    options = dict(dense=str(tmp_path / "dense"), num_experts=4, receipt=False)
    upcycle(UpcycleConfig(output=str(tmp_path / "noisy"), method="copy", noise=0.01, **options))
    upcycle(UpcycleConfig(output=str(tmp_path / "loose"), method="copy", router=TopKRouter(top_k=2, normalize=False), **options))
    upcycle(UpcycleConfig(output=str(tmp_path / "sigmoid"), method="copy", router=SigmoidSteRouter(), **options))
    for name, join, message in (
        ("dense", "slices", "is dense already"),
        ("noisy", "copies", r"layers.0: expert 1 differs from expert 0"),
        ("loose", "copies", "weights have no fixed sum"),
        ("sigmoid", "copies", "weights have no fixed sum"),
    ):
        with pytest.raises(ValueError, match=message):
            back(tmp_path / name, tmp_path / "out", join=join)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["gate_up", "down"])
def test_one_number_that_differs_is_seen(other):
    model = ModelConfig(
        vocab_size=4, hidden_size=3, num_layers=1, num_heads=1, intermediate_size=5,
        moe=MoEConfig(num_experts=2, expert_dim=5, router=TopKRouter(top_k=1)),
    )  # fmt: skip
    parts = {"gate_up": torch.ones(2, 10, 3), "down": torch.ones(2, 3, 5)}
    assert collapse(*parts.values(), model, "copies", "here")[2].shape == (3, 5)
    parts[other][1, -1, -1] = 2
    with pytest.raises(ValueError, match="here: expert 1 differs"):
        collapse(*parts.values(), model, "copies", "here")


def test_sparse_layers_that_join_to_another_size_than_the_dense_ones_are_refused(tmp_path):
    """Whole copies in one layer of two: as slices they would be a wider FFN than the other layer has; as copies they are that FFN."""
    save_stock("llama", tmp_path / "dense")
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method="copy", num_experts=4, layers=[1]))
    with pytest.raises(ValueError, match="join to FFNs of 192 neurons, but its dense layers have 48"):
        upcycle(UpcycleConfig(dense=str(tmp_path / "moe"), output=str(tmp_path / "x"), method="to_dense"))


def test_a_weighted_shared_ffn_is_refused(tmp_path):
    moe = MoEConfig(num_experts=2, expert_dim=8, router=TopKRouter(top_k=1), shared=SharedConfig(dim=4, combine="gate"))
    config = ModelConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=16, moe=moe)
    with pytest.raises(ValueError, match=r"weighted token by token \(combine: gate\)"):
        dense_config(config, "slices", "here")
    summed = config.model_copy(update={"moe": moe.model_copy(update={"shared": SharedConfig(dim=4)})})
    assert dense_config(summed, "slices", "here").intermediate_size == 20
    assert dense_config(summed, "copies", "here").intermediate_size == 12


def test_experts_that_are_not_equal_and_side_by_side_are_refused():
    for options in (dict(expert_dim=[4, 8]), dict(expert_dim=4, strata=StrataConfig(sizes=[1, 1]))):
        moe = MoEConfig(num_experts=2, router=TopKRouter(top_k=1), **options)
        config = ModelConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=16, moe=moe)
        with pytest.raises(ValueError, match="differ in size or lie in strata"):
            dense_config(config, "slices", "here")
        with pytest.raises(ValueError, match="differ in size or lie in strata"):
            target_config(config, UpcycleConfig(dense="a", output="b", method="aggregate", models=["c"]))
