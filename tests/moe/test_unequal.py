"""Experts of different sizes in one layer, one of them without neurons: against a loop over tokens and experts, in float64."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter
from moetrain.model import Transformer, init_weights
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import TokenContext
from tests.reference import expert

ROUTERS = {
    "exact": SigmoidSteRouter(),
    "sampled": SigmoidSteRouter(ste="sampled", probe_rate=0.4),
    "topk": TopKRouter(top_k=2),
    "top1": TopKRouter(top_k=1, normalize=False, capacity_factor=0.8),
}
SIZES = {"big and small": [7, 3, 7, 3, 7, 3], "skip": [0, 4, 0, 2, 5, 4], "one of many": [0, 0, 0, 0, 6, 0], "all alike, listed": [4, 4, 4, 4, 4, 4]}


def make(router, sizes) -> MoELayer:
    config = ModelConfig(
        vocab_size=11, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=16,
        moe=MoEConfig(num_experts=6, expert_dim=sizes, router=router),
    )  # fmt: skip
    layer, generator = MoELayer(config, 1).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def weights_of(layer: MoELayer, sizes: list[int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Expert -> its matrices, by counting: a size's experts lie in the order of their numbers, sizes in the order in which they appear."""
    groups, found = layer.expert_groups(), {}
    order = list(dict.fromkeys(size for size in sizes if size))
    for e, size in enumerate(sizes):
        if size:
            place = sizes[:e].count(size)
            group = groups[order.index(size)]
            found[e] = group.gate_up[place], group.down[place]
    return found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ROUTERS)
def test_matches_the_loop(name, sizes):
    """Output and every gradient; the router's gradient also from probes of experts that did not fire, and from one that has no neurons."""
    layer = make(ROUTERS[name], sizes)
    x, grad = torch.randn(2, 23, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(23, dtype=torch.bool)
    valid[[4, 22]] = False
    context = TokenContext(keys=torch.arange(23), valid=valid)
    parameters = [x.requires_grad_(), *layer.parameters()]
    y, report = layer(x, context, x)
    found = torch.autograd.grad(y, parameters, grad, allow_unused=True)

    routing = layer.router(x, context)
    active, probes = routing.decision.active, routing.decision.probes
    matrices, rows = weights_of(layer, sizes), []
    for t in range(23):
        row = x[t] * 0
        for e in range(6):
            importance = 1.0 if active[t, e] else 0.0 if probes is None else float(probes[t, e])
            w = routing.weights[t, e]
            # A probe weighs nothing and has the importance times the gradient.
            w = w if active[t, e] else importance * (w - w.detach())
            if e in matrices and importance:
                gate_up, down = matrices[e]
                if not active[t, e]:
                    row = row + w * expert(x[t], gate_up, down).detach()
                else:
                    row = row + w * expert(x[t], gate_up, down)
        rows.append(row)
    loop = torch.stack(rows)
    torch.testing.assert_close(y, loop, rtol=1e-11, atol=1e-11)
    wanted = torch.autograd.grad(loop, parameters, grad, allow_unused=True)
    for (key, p), a, b in zip([("x", x), *layer.named_parameters()], found, wanted, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    assert report.stats["load"].tolist() == active.sum(0).tolist()


def test_a_token_on_an_expert_without_neurons_skips():
    layer = make(TopKRouter(top_k=1), [0, 4, 4, 4, 4, 4])
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = 5.0
    x = torch.randn(4, 8, dtype=torch.float64)
    x[:2, 0], x[2:, 0] = 3.0, -3.0
    y, report = layer(x, TokenContext(), x)
    assert not y[:2].any() and y[2:].any(-1).all() and report.stats["load"][0] == 2 and report.stats["empty"] == 0


def test_what_is_built_and_what_it_costs():
    """Parameters by size; two routes on big experts cost what the big ones cost."""
    moe = MoEConfig(num_experts=4, expert_dim=[6, 2, 6, 2], router=TopKRouter(top_k=2))
    config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, moe=moe)
    model = Transformer(config)
    init_weights(model, 0)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("layers.1.ffn.experts")}
    assert shapes == {
        "layers.1.ffn.experts.0.gate_up": (2, 12, 8), "layers.1.ffn.experts.0.down": (2, 8, 6),
        "layers.1.ffn.experts.1.gate_up": (2, 4, 8), "layers.1.ffn.experts.1.down": (2, 8, 2),
    }  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == config.num_params()
    assert moe.mean_sized([1, 0, 1, 0]) == 3.0 and moe.mean_sized([0.5, 0.5, 0.5, 0.5]) == 2.0
    big, small = (config.num_active_params(moe.mean_sized(load)) for load in ([1, 0, 1, 0], [0, 1, 0, 1]))
    assert big - small == 2 * 2 * 3 * 8 * (6 - 2)
    down = dict(model.named_parameters())["layers.0.ffn.experts.0.down"]
    assert down.std() < 0.02 and dict(model.named_parameters())["layers.0.ffn.experts.0.gate_up"].std() > 0.015
