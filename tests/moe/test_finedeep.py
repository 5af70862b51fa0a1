"""Finedeep against its equations one token and one expert at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import FinedeepConfig, ModelConfig
from moetrain.model import Transformer, init_weights
from moetrain.moe.finedeep import Finedeep
from moetrain.moe.routing import TokenContext
from tests.reference import expert


def make(M, K, inner=24) -> Finedeep:
    finedeep = FinedeepConfig(sublayers=M, experts=K)
    config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=inner, finedeep=finedeep)
    layer, generator = Finedeep(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer


def formula(layer, x, residual):
    rows = []
    for token, stream in zip(x, residual):
        h, seen = stream, token
        for m, sublayer in enumerate(layer.sublayers):
            if m:
                seen = h / (h.square().mean() + 1e-5).sqrt() * layer.norms[m - 1].weight
            added = torch.zeros_like(h)
            for gate_up, down, w in zip(sublayer.gate_up, sublayer.down, sublayer.output_gate):
                y = expert(seen, gate_up, down)
                added = added + y / (1 + torch.exp(-(y @ w)))
            h = h + added
        rows.append(h - stream)
    return torch.stack(rows)


@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 4), (2, 3), (4, 2), (24, 1)])
def test_formula(M, K):
    layer = make(M, K)
    x, residual, grad = torch.randn(3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    y, report = layer(x, TokenContext(), residual)
    want = formula(layer, x, residual)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    assert not report.stats and not report.losses
    for a, b in zip(*(torch.autograd.grad(out, parameters, grad, allow_unused=M == 1) for out in (y, want)), strict=True):
        a, b = (torch.zeros(()) if g is None or not g.any() else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert layer(x[:0], TokenContext(), residual[:0])[0].shape == (0, 8)


def test_as_many_parameters_as_the_dense_model_but_for_gates_and_norms():
    plain = ModelConfig(vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=24)
    deep = plain.model_copy(update={"finedeep": FinedeepConfig(sublayers=3, experts=4)})
    assert deep.num_params() - plain.num_params() == 2 * (3 * 4 * 8 + 2 * 8)
    model = Transformer(deep)
    init_weights(model, 0)
    assert sum(p.numel() for p in model.parameters()) == deep.num_params()
    assert all((p == 1).all() for name, p in model.named_parameters() if ".norms." in name)
    named = dict(model.named_parameters())
    # 2 layers of 1 + 3 summands each.
    assert named["layers.1.ffn.sublayers.2.down"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.2)
    assert named["layers.1.ffn.sublayers.2.gate_up"].std().item() == pytest.approx(0.02, rel=0.2)
