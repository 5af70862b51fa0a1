"""Hash routing: the table by chance and by frequency, what a token's experts depend on, and the files it is made from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moetrain.config import ConfigError, HashRouter, ModelConfig, MoEConfig
from moetrain.data.indexed import IndexedWriter, write_counts
from moetrain.model import initial_tensor
from moetrain.moe.routers import start_value
from moetrain.moe.routing import TokenContext
from tests.moe.test_layer import model_config, pair


def config_of(vocab_size: int = 1000, experts: int = 8, **options) -> ModelConfig:
    moe = MoEConfig(num_experts=experts, expert_dim=4, router=HashRouter(**options))
    return ModelConfig(vocab_size=vocab_size, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, moe=moe)


def table(config: ModelConfig, layer: int = 0) -> torch.Tensor:
    shape = (config.vocab_size, config.moe.router.num_hashes)
    found = start_value(config, f"layers.{layer}.ffn.router.table", shape, torch.Generator())
    assert torch.equal(found, initial_tensor(f"layers.{layer}.ffn.router.table", shape, config, 5))
    assert found.dtype == torch.float32 and found.shape == shape
    return found


def test_a_random_table():
    """k different experts for each id, each as often as chance says; other layers and seeds have others."""
    config = config_of(vocab_size=20000, num_hashes=3)
    found = table(config)
    assert all(len(set(row)) == 3 for row in found.tolist())
    for column in found.T:
        share = torch.bincount(column.long(), minlength=8) / 20000
        assert (share - 1 / 8).abs().max() < 5 * (1 / 8 * 7 / 8 / 20000) ** 0.5
    assert torch.equal(found, table(config)) and (found != table(config, 1)).float().mean() > 0.5
    assert (found != table(config_of(vocab_size=20000, num_hashes=3, seed=7))).float().mean() > 0.5


@pytest.mark.parametrize("hashes", [1, 3])
def test_a_balanced_table(tmp_path, hashes):
    """Frequencies of natural text: the fullest expert has 2 % more than the mean, where a random table is far off."""
    counts = (1e6 / np.arange(8, 1008)).astype(int)
    (tmp_path / "c.json").write_text(json.dumps(np.random.default_rng(0).permutation(counts).tolist()))
    config = config_of(num_hashes=hashes, frequencies=str(tmp_path / "c.json"))
    weight = torch.tensor(json.loads((tmp_path / "c.json").read_text()), dtype=torch.float64)

    def excess(found):
        load = torch.zeros(8, dtype=torch.float64)
        for column in found.T:
            load.index_add_(0, column.long(), weight)
        return load.max() / load.mean() - 1

    found = table(config)
    assert excess(found) < 0.02 and all(len(set(row)) == hashes for row in found.tolist())
    assert hashes > 1 or excess(table(config_of(num_hashes=hashes))) > 0.05
    assert (found != table(config, 1)).any()


def test_ids_that_never_occur_are_shared_out(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([5, 0, 0]))  # shorter than the vocabulary, which was rounded up
    found = table(config_of(vocab_size=801, frequencies=str(tmp_path / "c.json")))
    load = torch.bincount(found[:, 0].long(), minlength=8)
    assert load.max() <= 801 and load[found[0, 0].long()] == 1 and load.sort().values[1:].min() >= 114


def test_counts_of_a_data_set(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(np.array([3, 1, 3], dtype=np.uint16))
        writer.add_document(np.array([0, 3], dtype=np.uint16))
    path = write_counts(tmp_path / "a")
    assert path.name == "a.counts.json" and json.loads(path.read_text()) == [1, 1, 0, 3]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "can't be read: No such file"), ("[1", "is not valid JSON"), ("{}", "must be a list of counts.*found dict"),
        ("[1, -1]", "must be a list of counts"), ("[1, 2, 3, 4]", "at most 3 token ids; found 4 entries"),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError, match=problem):
        table(config_of(vocab_size=3, frequencies=str(tmp_path / "c.json")))


def test_routes_follow_from_the_id_alone():
    ours, _ = pair(model_config(HashRouter(num_hashes=2)))
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids, valid = torch.tensor([3, 7, 3, 3, 10, 7]), torch.tensor([True] * 5 + [False])
    for training in (True, False):
        routing = ours.train(training).router(x, TokenContext(tokens=ids, valid=valid))
        active = routing.decision.active
        assert torch.equal(active[0], active[2]) and not torch.equal(active[0], active[4]) and not active[5].any()
        assert (routing.weights[:5].sum(-1) == 1).all() and (routing.weights[active] == 0.5).all()


def test_one_and_256_experts():
    for experts in (1, 256):
        ours, _ = pair(model_config(HashRouter(), num_experts=experts, expert_dim=2))
        routing = ours.router(torch.zeros(11, 8), TokenContext(tokens=torch.arange(11)))
        assert (routing.decision.active.sum(-1) == 1).all() and routing.weights.sum() == 11
