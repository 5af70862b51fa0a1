"""Copies: exact ones, noisy ones, partly redrawn ones, virtual groups; and the factors with which a mixture starts as the dense model, held
against the dense FFN and against plainly written sums in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter, UpcycleConfig
from moetrain.convert.copy import copy_ffn, drop_ffn, group_rows, open_gates, scale_experts, step_0_factor, virtual_groups
from moetrain.convert.huggingface import read_config, read_tensors
from moetrain.convert.split import generator, split_ffn
from moetrain.convert.upcycle import upcycle
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import TokenContext
from tests.convert.test_huggingface import load_ours, logits, random_tokens, save_stock

D, F0 = 6, 24


def weights(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return tuple(torch.randn(*s, dtype=dtype) for s in ((F0, D), (F0, D), (D, F0)))


def dense(gate, up, down, x):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def draws(name="x"):
    return generator(5, name)


# ---------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("num_experts", [1, 3])
def test_copies_and_noise(num_experts):
    gate, up, down = weights()
    gate_up, copies = copy_ffn(gate, up, down, num_experts, 0.0, draws())
    assert all(torch.equal(g, torch.cat((gate, up))) and torch.equal(d, down) for g, d in zip(gate_up, copies))
    large = tuple(torch.randn(300, 200) * s + 3 for s in (1, 2)) + (torch.randn(200, 300) * 5,)
    gate_up, copies = copy_ffn(*large, num_experts, 0.1, draws())
    for e in range(num_experts):
        for matrix, old, std in ((gate_up[e, :300], large[0], 0.1), (gate_up[e, 300:], large[1], 0.2), (copies[e], large[2], 0.5)):
            assert (matrix - old).std().item() == pytest.approx(std, rel=0.05) and abs((matrix - old).mean()) < std / 50
        assert e == 0 or not torch.equal(gate_up[e], gate_up[0])


@pytest.mark.parametrize("shared", [True, False])
def test_drop_redraws_a_part(shared):
    """floor(r F0) rows of gate and up and columns of down are new, with the mean and spread of the old ones; the same ones if shared."""
    torch.manual_seed(0)
    size = 401
    gate, up, down = torch.randn(size, 300) * 2 + 7, torch.randn(size, 300) - 3, torch.randn(300, size) * 0.5
    gate_up, copies = drop_ffn(gate, up, down, 3, 0.5, shared, draws())
    lost = []
    for e in range(3):
        parts = [(gate_up[e, :size], gate), (gate_up[e, size:], up), (copies[e].T, down.T)]
        changed = [(new != old).any(1) for new, old in parts]
        for (new, old), rows in zip(parts, changed):
            assert rows.sum() == 200 and (new[rows] != old[rows]).all()
            assert new[rows].mean().item() == pytest.approx(old[rows].mean().item(), abs=0.05)
            assert new[rows].std().item() == pytest.approx(old[rows].std().item(), rel=0.02)
        assert (torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])) == shared
        lost.append(changed[0])
    assert not torch.equal(lost[0], lost[1]) and not torch.equal(lost[1], lost[2])


def test_drop_of_nothing_and_of_all():
    """Ratio 0, and one that rounds down to no neuron, is the plain copy to the last bit; ratio 1 leaves nothing."""
    gate, up, down = weights()
    plain = copy_ffn(gate, up, down, 4, 0.0, draws())
    for ratio in (0.0, 0.99 / F0):
        assert all(torch.equal(a, b) for a, b in zip(drop_ffn(gate, up, down, 4, ratio, True, draws()), plain))
    gate_up, copies = drop_ffn(gate, up, down, 4, 1.0, True, draws())
    assert (gate_up != plain[0]).all() and (copies != plain[1]).all()


# -------------------------------------------------------------------------------------------------------- the step-0 factors


def layer(router, gate_up, down, rows, bias=None):
    """Our layer in evaluation with these weights."""
    moe = MoEConfig(num_experts=gate_up.shape[0], expert_dim=down.shape[2], router=router)
    model = ModelConfig(vocab_size=4, hidden_size=D, num_layers=1, num_heads=1, intermediate_size=F0, moe=moe)
    built = MoELayer(model, 0).double().eval()
    state = {"router.weight": rows, "experts.gate_up": gate_up, "experts.down": down}
    built.load_state_dict(state if bias is None else {**state, "router.bias": bias})

    def run(x):
        with torch.no_grad():
            return built(x, TokenContext(), x)[0]

    return run


# groups, granularity, routes
SHAPES = [(8, 8, 8), (8, 1, 2), (4, 2, 4), (1, 4, 4), (32, 8, 8), (3, 1, 1)]


@pytest.mark.parametrize("groups,granularity,top_k", SHAPES)
def test_normalized_top_k_of_groups_is_the_dense_ffn(groups, granularity, top_k):
    """Top-k then softmax: whole groups route, whatever the router says, so it is exact for any router where one group routes."""
    gate, up, down = weights()
    router = TopKRouter(top_k=top_k, normalize=True)
    parts = virtual_groups(gate, up, down, groups * granularity, granularity)
    scale_experts(*parts, step_0_factor(router, groups, granularity, torch.ones(D, dtype=torch.float64)))
    rows = group_rows(torch.randn(groups, D, dtype=torch.float64), granularity)
    x = torch.randn(50, D, dtype=torch.float64)
    assert (layer(router, *parts, rows)(x) - dense(gate, up, down, x)).abs().max() <= 1e-10


@pytest.mark.parametrize("groups,granularity,top_k", SHAPES)
def test_softmax_top_k_of_groups_is_the_dense_ffn(groups, granularity, top_k):
    """Softmax then top-k: the uniform router (all scores tied) is exact; any other is the dense output times A p(groups that route)."""
    gate, up, down = weights()
    router = TopKRouter(top_k=top_k, normalize=False, output_scale=1.7)
    parts = virtual_groups(gate, up, down, groups * granularity, granularity)
    factor = step_0_factor(router, groups, granularity, torch.ones(D, dtype=torch.float64))
    assert factor == pytest.approx(groups * granularity**2 / top_k / 1.7)
    scale_experts(*parts, factor)
    x = torch.randn(50, D, dtype=torch.float64)
    y = dense(gate, up, down, x)
    assert (layer(router, *parts, torch.zeros(groups * granularity, D, dtype=torch.float64))(x) - y).abs().max() <= 1e-10
    rows = torch.randn(groups, D, dtype=torch.float64)
    share = torch.softmax(x @ rows.T, -1).topk(top_k // granularity).values.sum(-1, keepdim=True)
    expected = y * share * groups * granularity / top_k
    assert (layer(router, *parts, group_rows(rows, granularity))(x) - expected).abs().max() <= 1e-10


def test_factor_of_the_paper():
    """E8G8T8: 64, spread over three matrices as the paper does it, 4 each."""
    factor = step_0_factor(TopKRouter(top_k=8, normalize=False), 8, 8, torch.ones(4))
    assert factor == 64 and factor ** (1 / 3) == pytest.approx(4)


@pytest.mark.parametrize("groups,granularity", [(8, 4), (3, 1), (1, 5), (128, 2)])
@pytest.mark.parametrize("bias", [None, 2.0])
def test_sigmoid_of_groups(groups, granularity, bias):
    """Eq. 8 divides the number of open groups out: what is left is A times the mean open gate, which a router of small rows makes constant."""
    gate, up, down = weights()
    options = {} if bias is None else {"bias": True, "bias_init": bias}
    router = SigmoidSteRouter(init_std=1e-13, **options)
    parts = virtual_groups(gate, up, down, groups * granularity, granularity) if F0 % granularity == 0 else None
    if parts is None:
        with pytest.raises(ValueError, match="nearest that does"):
            virtual_groups(gate, up, down, groups * granularity, granularity)
        return
    norm = torch.ones(D, dtype=torch.float64)
    scale_experts(*parts, step_0_factor(router, groups, granularity, norm))
    rows = torch.randn(groups, D, dtype=torch.float64) * 1e-13
    b = None if bias is None else torch.full((groups * granularity,), bias, dtype=torch.float64)
    x = torch.randn(60, D, dtype=torch.float64)
    y = layer(router, *parts, group_rows(rows, granularity), b)(x)
    routed = (torch.sigmoid(x @ rows.T + (bias or 0.0)) > 0.5).any(-1)
    assert routed.sum() > 40 and (y - dense(gate, up, down, x))[routed].abs().max() <= 1e-10
    assert (y[~routed] == 0).all()


@pytest.mark.parametrize("bias,threshold,rescale", [(None, 0.5, "count"), (1.0, 0.5, "count"), (0.3, 0.4, "none"), (-1.0, 0.3, "count")])
def test_sigmoid_with_spread_gates_is_right_in_the_mean(bias, threshold, rescale):
    """Gates that differ: the slope of the mixture's output on the dense one is 1 within the noise of the draws, for copies and for slices."""
    gate, up, down = weights()
    options = {} if bias is None else {"bias": True, "bias_init": bias}
    router = SigmoidSteRouter(init_std=0.6, threshold=threshold, rescale=rescale, **options)
    norm = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3, 1.5], dtype=torch.float64)
    torch.manual_seed(3)
    x = torch.randn(400, D, dtype=torch.float64)
    # As after RMSNorm: the size of x is the norm's weight's.
    x = x / x.norm(dim=1, keepdim=True) * norm.norm()
    y = dense(gate, up, down, x)
    for copies, experts in ((16, 16), (1, 8)):
        parts = copy_ffn(gate, up, down, experts, 0.0, draws()) if copies > 1 else split_ffn(gate, up, down, experts)
        scale_experts(*parts, step_0_factor(router, copies, 1, norm))
        slopes = []
        for seed in range(40):
            rows = torch.randn(experts, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.6
            b = None if bias is None else torch.full((experts,), bias, dtype=torch.float64)
            out = layer(router, *parts, rows, b)(x)
            gates = x @ rows.T + (bias or 0.0) > math.log(threshold / (1 - threshold))
            used = gates.any(-1) if rescale == "count" else torch.ones(len(x), dtype=torch.bool)
            slopes.append(((out * y)[used].sum() / y[used].square().sum()).item())
        slopes = torch.tensor(slopes)
        assert abs(slopes.mean() - 1) <= 4 * slopes.std() / math.sqrt(len(slopes)) + 0.005, slopes.mean()
        assert slopes.std() / math.sqrt(len(slopes)) < 0.05


@pytest.mark.parametrize("bias,std,threshold", [(0.0, 0.5, 0.5), (4.0, 0.1, 0.5), (-2.0, 0.7, 0.3), (0.0, 1e-13, 0.5), (3.0, 2.0, 0.9)])
def test_open_gates_is_the_integral(bias, std, threshold):
    z = bias + std * torch.randn(2_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.sigmoid(z)
    share, mean = open_gates(bias, std, threshold)
    assert share == pytest.approx((g > threshold).double().mean().item(), abs=2e-3)
    assert mean == pytest.approx(g[g > threshold].mean().item(), abs=2e-3)


def test_gates_that_never_open_are_refused():
    with pytest.raises(ValueError, match="no gate opens above threshold 0.5"):
        step_0_factor(SigmoidSteRouter(bias=True, bias_init=-9.0), 8, 1, torch.ones(4))


# ------------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize(
    "method,options",
    [
        ("copy", dict(num_experts=4)),
        ("copy", dict(num_experts=4, router=TopKRouter(top_k=3, normalize=False, init_std=1e-13))),
        ("drop", dict(num_experts=4, drop_ratio=0.0)),
        ("virtual_groups", dict(num_experts=64, granularity=8, router=TopKRouter(top_k=8))),
        ("virtual_groups", dict(num_experts=256, granularity=2, router=TopKRouter(top_k=4, normalize=False, init_std=1e-13))),
        ("virtual_groups", dict(num_experts=32, granularity=4, router=SigmoidSteRouter(bias=True, bias_init=1.0, init_std=1e-13))),
        ("virtual_groups", dict(num_experts=8, granularity=4, router=SigmoidSteRouter(bias=True, bias_init=1.0, init_std=1e-13, rescale="none"))),
    ],
)
def test_step_0_is_the_dense_model(method, options, tmp_path):
    """Whole model, float64, 1e-10; the receipt says the same."""
    save_stock("qwen3", tmp_path / "dense", torch.float64)
    report = upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method=method, **options))
    found = []
    for folder in ("dense", "moe"):
        # Not transformers' dense model, whose norms are in float32 whatever its dtype.
        model = load_ours(tmp_path / folder).double()
        model.load_state_dict(dict(read_tensors(tmp_path / folder, model.config)))
        found.append(logits(model, random_tokens()))
    assert found[0].dtype == torch.float64 and (found[0] - found[1]).abs().max() <= 1e-10
    assert report.receipt.logits <= 1e-10 and max(row["ffn"] for row in report.receipt.layers) <= 1e-10


def test_plain_copy_is_bit_equal(tmp_path):
    """No factor, no noise, no drop: every expert is the dense FFN's bytes, in bfloat16 too."""
    save_stock("llama", tmp_path / "dense", torch.bfloat16)
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "copy"), method="copy", num_experts=3))
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "drop"), method="drop", num_experts=3, drop_ratio=0.0))
    dense_tensors = dict(read_tensors(tmp_path / "dense", read_config(tmp_path / "dense")))
    copied, dropped = (dict(read_tensors(tmp_path / n, read_config(tmp_path / n))) for n in ("copy", "drop"))
    assert copied.keys() == dropped.keys() and all(torch.equal(copied[k], dropped[k]) for k in copied)
    for i in range(2):
        for e in range(3):
            old = [dense_tensors[f"layers.{i}.ffn.{k}_proj.weight"] for k in ("gate", "up", "down")]
            assert torch.equal(copied[f"layers.{i}.ffn.experts.gate_up"][e], torch.cat(old[:2]))
            assert torch.equal(copied[f"layers.{i}.ffn.experts.down"][e], old[2])


@pytest.mark.parametrize("method,copies,slices", [("copy", 8, 1), ("drop", 8, 1), ("virtual_groups", 4, 2), ("dsmoe", 1, 8)])
def test_each_layer_is_scaled_by_its_own_norm(method, copies, slices, tmp_path):
    """up and down of every expert are the dense ones times the square root of that layer's factor, gate is untouched."""
    save_stock("llama", tmp_path / "dense")
    router = SigmoidSteRouter(init_std=0.4)
    options = {"drop_ratio": 0.0} if method == "drop" else {"weight_scaling": True} if method == "dsmoe" else {}
    upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method=method, router=router, **options))
    old, new = (dict(read_tensors(tmp_path / n, read_config(tmp_path / n))) for n in ("dense", "moe"))
    roots = []
    for i in range(2):
        roots.append(step_0_factor(router, copies, 1 if method == "dsmoe" else slices, old[f"layers.{i}.ffn_norm.weight"]) ** 0.5)
        gate_up, down = new[f"layers.{i}.ffn.experts.gate_up"], new[f"layers.{i}.ffn.experts.down"]
        size = down.shape[2]
        for e in range(8):
            part = slice(e % slices * size, (e % slices + 1) * size)
            gate, up = gate_up[e].chunk(2)
            assert torch.equal(gate, old[f"layers.{i}.ffn.gate_proj.weight"][part])
            assert torch.allclose(up, old[f"layers.{i}.ffn.up_proj.weight"][part] * roots[i], rtol=1e-6)
            assert torch.allclose(down[e], old[f"layers.{i}.ffn.down_proj.weight"][:, part] * roots[i], rtol=1e-6)
    assert abs(roots[0] - roots[1]) > 1e-4
