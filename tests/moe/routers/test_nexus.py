"""Nexus: the projection's gradients, a new domain's row, the file of embeddings, awkward inputs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from moetrain.config import ConfigError, ModelConfig, MoEConfig, NexusRouter
from moetrain.model import Transformer, init_weights
from moetrain.moe.routing import TokenContext, replay_contexts
from tests.moe.test_layer import compare, model_config, pair


def tokens(count: int, hidden: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (256, 1), (5, 5), (5, 2)])
def test_against_the_loop(experts, top_k):
    """Output, balance loss and the gradients of both projections; the domains have none."""
    options = NexusRouter(domain_dim=3, projection_dim=4, top_k=top_k)
    ours, loop = pair(model_config(options, num_experts=experts, expert_dim=2), scale=0.7)
    compare(ours, loop, tokens(20), TokenContext(sequence=10), tokens(20))
    assert ours.router.domains.grad is None and not ours.router.domains.requires_grad


def test_all_scores_equal_padding_and_replay():
    ours, _ = pair(model_config(NexusRouter(domain_dim=3)))
    with torch.no_grad():
        ours.router.output.zero_()
    valid = torch.tensor([True, True, False])
    routing = ours.router(tokens(3), TokenContext(valid=valid))
    assert routing.decision.active[:, 0].tolist() == [True, True, False] and routing.decision.active.sum() == 2
    torch.testing.assert_close(routing.weights[:2, 0], torch.full((2,), 0.2, dtype=torch.float64))
    first, again = replay_contexts()
    with first:
        a = ours.router(tokens(10), TokenContext())
    with again:
        b = ours.router(tokens(10, seed=2), TokenContext())
    assert a.decision is b.decision


def model_of(path, experts=3) -> Transformer:
    router = NexusRouter(domain_dim=4, embeddings=None if path is None else str(path))
    moe = MoEConfig(num_experts=experts, expert_dim=4, router=router)
    return Transformer(ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, moe=moe))


def test_the_embeddings_come_from_their_file(tmp_path):
    path = tmp_path / "d.safetensors"
    domains = torch.randn(3, 4)
    save_file({"domains": domains}, path)
    model = model_of(path)
    init_weights(model, 0)
    for layer in model.layers:
        assert torch.equal(layer.ffn.router.domains, domains)
    assert not torch.equal(model.layers[0].ffn.router.weight, model.layers[1].ffn.router.weight)
    assert model.layers[0].ffn.router.output.std() > 0.05
    save_file({"a": domains, "b": domains + 1}, tmp_path / "two.safetensors")
    for file, experts, problem in (
        (None, 3, "embeddings: missing"),
        (tmp_path / "no.safetensors", 3, "can't be read as safetensors"),
        (tmp_path / "two.safetensors", 3, "has 2 tensors; num_experts and domain_dim make it one of \\[3, 4\\]"),
        (path, 5, "has a tensor of shape \\[3, 4\\]; num_experts and domain_dim make it one of \\[5, 4\\]"),
    ):
        with pytest.raises(ConfigError, match=problem):
            init_weights(model_of(file, experts), 0)
