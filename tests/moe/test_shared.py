"""The fixed FFN beside the experts, against its formula one token at a time: output and every gradient, in float64."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import ModelConfig, MoEConfig, SharedConfig, SigmoidSteRouter, TopKRouter
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import TokenContext
from moetrain.moe.shared import SharedExpert
from tests.moe.test_layer import pair


def formula(shared: SharedExpert, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Plainly, with the options' meaning written out."""
    rows = []
    for token, routed in zip(x, y):
        gate, up = shared.gate_proj.weight @ token, shared.up_proj.weight @ token
        s = shared.down_proj.weight @ (gate / (1 + torch.exp(-gate)) * up)
        if shared.combine == "sum":
            rows.append(routed + s)
        elif shared.combine == "gate":
            rows.append(routed + s / (1 + torch.exp(-(shared.mix.weight[0] @ token))))
        else:
            a, b = torch.exp(shared.mix.weight @ token + shared.mix.bias)
            rows.append((a * routed + b * s) / (a + b))
    return torch.stack(rows)


def filled(options: SharedConfig, hidden: int = 8) -> SharedExpert:
    module, generator = SharedExpert(hidden, options).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.mark.parametrize("combine", ["sum", "gate", "coefficient"])
def test_formula(combine):
    module = filled(SharedConfig(dim=5, combine=combine))
    x, y, grad = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for compute in (module, lambda x, y: formula(module, x, y)):
        xs, ys = x.clone().requires_grad_(), y.clone().requires_grad_()
        out = compute(xs, ys)
        out.backward(grad)
        found.append([out.detach(), xs.grad, ys.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("combine", ["sum", "gate", "coefficient"])
def test_the_layer_adds_it_to_its_experts(combine):
    """Tokens without a route too, which then are the fixed FFN's alone; no tokens at all."""
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=16,
        moe=MoEConfig(num_experts=5, expert_dim=7, router=SigmoidSteRouter(threshold=0.6), shared=SharedConfig(dim=5, combine=combine)),
    )  # fmt: skip
    plain, _ = pair(config.model_copy(update={"moe": config.moe.model_copy(update={"shared": None})}), scale=0.4)
    layer, shared = MoELayer(config, 1).double(), filled(config.moe.shared)
    layer.load_state_dict({**plain.state_dict(), **{f"shared.{name}": p for name, p in shared.state_dict().items()}})
    x = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (y, report), (found, same) = plain(x, TokenContext(), x), layer(x, TokenContext(), x)
    assert report.stats["empty"] > 0 and torch.equal(report.stats["load"], same.stats["load"])
    torch.testing.assert_close(found, formula(shared, x, y), rtol=1e-12, atol=1e-12)
    assert layer(x[:0], TokenContext(), x[:0])[0].shape == (0, 8)


def test_two_shared_experts_are_one_of_twice_the_width():
    """What "n shared experts" means here: FFNs side by side add up to one with their neurons together."""
    a, b = filled(SharedConfig(dim=3)), filled(SharedConfig(dim=4))
    joined = SharedExpert(8, SharedConfig(dim=7)).double()
    with torch.no_grad():
        for kind, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            joined.get_submodule(kind).weight.copy_(torch.cat([m.get_submodule(kind).weight for m in (a, b)], dim))
    x = torch.randn(5, 8, dtype=torch.float64)
    zero = torch.zeros_like(x)
    torch.testing.assert_close(joined(x, zero), a(x, zero) + b(x, zero), rtol=1e-12, atol=1e-12)


def test_bfloat16_keeps_its_dtype():
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16,
        moe=MoEConfig(num_experts=2, expert_dim=4, router=TopKRouter(top_k=1), shared=SharedConfig(dim=4, combine="coefficient")),
    )  # fmt: skip
    layer = MoELayer(config, 0)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(0.1)
    x = torch.randn(3, 8).bfloat16()
    assert layer(x, TokenContext(), x)[0].dtype == torch.bfloat16
