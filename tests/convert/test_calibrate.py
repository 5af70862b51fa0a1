"""Splits by data: what is collected equals a loop over tokens and finite differences, and the cut model is still the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetrain.config import ModelConfig, SigmoidSteRouter, UpcycleConfig
from moetrain.convert import calibrate
from moetrain.convert.huggingface import read_config, read_tensors
from moetrain.convert.upcycle import upcycle
from moetrain.data.indexed import IndexedWriter
from moetrain.model import Transformer, init_weights
from tests.convert.test_huggingface import logits, random_tokens, save_stock

CONFIG = ModelConfig(vocab_size=30, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=20, init_std=0.4)


def write_data(prefix, documents=12, vocab=30, length=15):
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(rng.integers(0, vocab, length).astype(np.uint16))
    return str(prefix)


@pytest.fixture
def model():
    model = Transformer(CONFIG).double().eval()
    init_weights(model, 0)
    return model.requires_grad_(False)


def sequences(count=3, length=9):
    torch.manual_seed(2)
    found = []
    for _ in range(count):
        tokens = torch.randint(0, 30, (1, length))
        labels = torch.cat((tokens[:, 1:], torch.full((1, 1), -100)), 1)
        labels[0, 4] = -100  # the end of a document
        ids = (torch.arange(length)[None] > 4).int()
        positions = torch.where(ids > 0, torch.arange(length) - 5, torch.arange(length))
        found.append({"tokens": tokens, "labels": labels, "positions": positions, "document_ids": ids})
    return found


def test_importance_is_h_times_its_gradient(model):
    """|h dL/dh| from a difference quotient: the loss when one neuron's output at one token is scaled by 1 + e."""
    data = sequences()
    clusters = torch.tensor([0, 2, 0])
    found = calibrate.importance(model, data, clusters, 3)
    assert found[0].shape == (3, 20) and (found[0][1] == 0).all()
    layer, neuron, step = 1, 7, 1e-6
    slope = torch.zeros(3, dtype=torch.float64)
    for sequence, cluster in zip(data, clusters.tolist()):
        for token in (sequence["labels"][0] >= 0).nonzero()[:, 0].tolist():
            ends = []
            for sign in (1, -1):

                def scale(_, inputs, token=token, sign=sign):
                    h = inputs[0].clone()
                    h[token, neuron] *= 1 + sign * step
                    return (h,)

                hook = model.layers[layer].ffn.down_proj.register_forward_pre_hook(scale)
                ends.append(model(**sequence).loss_sum.item())
                hook.remove()
            slope[cluster] += abs(ends[0] - ends[1]) / (2 * step)
    counts = torch.tensor([14.0, 1.0, 7.0], dtype=torch.float64)
    assert torch.allclose(found[layer][:, neuron], slope / counts, rtol=1e-6, atol=1e-9)


def test_firing_is_the_largest_tenth(model):
    data = sequences(2)
    seen = []
    hooks = [b.ffn.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for b in model.layers]
    for sequence in data:
        model(sequence["tokens"], positions=sequence["positions"], document_ids=sequence["document_ids"])
    for hook in hooks:
        hook.remove()
    found = calibrate.firing(model, data)
    for layer in range(2):
        column = 0
        for s, sequence in enumerate(data):
            for token in (sequence["labels"][0] >= 0).nonzero()[:, 0].tolist():
                h = seen[2 * s + layer][token].abs()
                assert set(found[layer][:, column].nonzero()[:, 0].tolist()) == set(h.argsort(descending=True)[:2].tolist())
                column += 1
        assert found[layer].shape == (20, column)


def test_importance_partition_gives_each_cluster_its_own():
    """Neurons 3 k .. 3 k + 2 matter only on data k; a neuron without any importance goes where there is room."""
    values = torch.zeros(4, 12, dtype=torch.float64)
    for k in range(4):
        values[k, 3 * k : 3 * k + 3] = torch.tensor([1.0, 5.0, 0.1])
    values[2, 8] = 0
    assert calibrate.importance_partition(values).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert calibrate.importance_partition(torch.zeros(1, 4)).tolist() == [[0, 1, 2, 3]]


def test_importance_partition_goes_by_share():
    """Neuron 0 matters ten times as much as the others, a little more on data 0; neurons 1 and 2 matter on data 0 alone, and go there."""
    values = torch.tensor([[10.0, 2.0, 2.0, 0.0], [9.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    assert calibrate.importance_partition(values).tolist() == [[1, 2], [0, 3]]


def test_sequence_clusters(model):
    """As many sequences each, those over go to the nearest; padding counts for nothing."""
    labels = calibrate.sequence_clusters(model, sequences(7), 3, torch.Generator().manual_seed(0))
    assert labels.shape == (7,) and sorted(labels[:6].tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("split", ["contiguous", "random", "cluster", "coactivation", "importance"])
def test_cut_model_is_the_dense_model(split, tmp_path):
    """Every split, all gates at 1 (sigmoid(40) rounds to it), float64; and the same cut when done again."""
    save_stock("llama", tmp_path / "dense", torch.float64)
    router = SigmoidSteRouter(rescale="none", bias=True, bias_init=40.0)
    options = dict(dense=str(tmp_path / "dense"), num_experts=8, router=router, split=split)
    if split in ("coactivation", "importance"):
        options |= dict(calibration=write_data(tmp_path / "text"), calibration_seq_len=20)
    report = upcycle(UpcycleConfig(output=str(tmp_path / "moe"), **options))
    upcycle(UpcycleConfig(output=str(tmp_path / "again"), **options))
    found = []
    for name in ("dense", "moe", "again"):
        model = Transformer(read_config(tmp_path / name)).double().eval()
        model.load_state_dict(dict(read_tensors(tmp_path / name, model.config)))
        found.append(model)
    assert (logits(found[1], random_tokens()) - logits(found[0], random_tokens())).abs().max() <= 1e-10 and report.receipt.logits <= 1e-10
    second = found[2].state_dict()
    assert all(torch.equal(value, second[name]) for name, value in found[1].state_dict().items())
    plain = torch.equal(found[1].layers[0].ffn.experts.down[0], found[0].layers[0].ffn.down_proj.weight[:, :6])
    assert plain == (split == "contiguous")


def test_refusals(tmp_path):
    save_stock("llama", tmp_path / "dense")
    write_data(tmp_path / "short", documents=2)
    write_data(tmp_path / "wide", vocab=600)
    for name, message in (("short", r"2 sequences of 20 tokens can't be shared by num_experts \(8\)"), ("wide", "61"), ("none", "none")):
        with pytest.raises(ValueError, match=message):
            upcycle(
                UpcycleConfig(
                    dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), split="importance",
                    calibration=str(tmp_path / name), calibration_seq_len=20,
                )
            )  # fmt: skip
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("split", ["contiguous", "random", "cluster", "coactivation", "importance"])
def test_shared_neurons_and_the_cut_rest_are_the_dense_model(split, tmp_path):
    """Sharing-Inter: 16 of 48 neurons stay for every token, the rest is cut; all gates at 1, float64. And back: `to_dense` has the same function."""
    save_stock("llama", tmp_path / "dense", torch.float64)
    router = SigmoidSteRouter(rescale="none", bias=True, bias_init=40.0)
    options = dict(calibration=write_data(tmp_path / "text"), calibration_seq_len=20, shared_dim=16, layers=[1], split=split)
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=8, router=router, **options))
    upcycle(UpcycleConfig(dense=str(tmp_path / "moe"), output=str(tmp_path / "again"), method="to_dense"))
    found = {}
    for name in ("dense", "moe", "again"):
        found[name] = Transformer(read_config(tmp_path / name)).double().eval()
        found[name].load_state_dict(dict(read_tensors(tmp_path / name, found[name].config)))
    config = found["moe"].config
    assert config.moe.shared.dim == 16 and config.moe.expert_dim == 4 and config.num_params() == found["dense"].config.num_params() + 8 * 32 + 8
    for name in ("moe", "again"):
        assert (logits(found[name], random_tokens()) - logits(found["dense"], random_tokens())).abs().max() <= 1e-10


def test_the_shared_neurons_are_those_that_matter_most(tmp_path):
    """Ten neurons of each layer are made large; they are the shared ones, bit for bit and in order."""
    model = save_stock("llama", tmp_path / "dense", torch.float64)
    large = torch.tensor([3, 4, 7, 11, 20, 21, 30, 33, 40, 47])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, large] *= 100
    model.save_pretrained(tmp_path / "dense")
    options = dict(calibration=write_data(tmp_path / "text"), calibration_seq_len=20, shared_dim=10, method="llama_moe")
    with pytest.raises(ValueError, match=r"num_experts \(8\) does not divide intermediate_size - shared_dim \(38\)"):
        upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), **options))
    with pytest.raises(ValueError, match=r"shared_dim \(48\) leaves no neuron of intermediate_size \(48\)"):
        upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), **{**options, "shared_dim": 48}))
    report = upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=2, **options))
    assert report.config.moe.router.output_scale == 2.0
    before, after = (dict(read_tensors(tmp_path / name, read_config(tmp_path / name))) for name in ("dense", "moe"))
    for layer in ("layers.0.ffn", "layers.1.ffn"):
        for kind, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            assert torch.equal(after[f"{layer}.shared.{kind}.weight"], before[f"{layer}.{kind}.weight"].index_select(dim, large))
