"""The layer on one device against the loop: outputs, losses and every gradient, on ordinary and on awkward inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import (
    BaseLayersRouter,
    BudgetRouter,
    DynMoERouter,
    ExpertChoiceRouter,
    HashRouter,
    LanguageFamilyRouter,
    ModelConfig,
    MoEConfig,
    MoEppRouter,
    NexusRouter,
    ReMoERouter,
    SigmoidSteRouter,
    TaskRouter,
    TopKRouter,
    XMoERouter,
)
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import start_value
from moetrain.moe.routing import TokenContext
from tests.reference import ReferenceMoE

ROUTERS = {
    "exact": SigmoidSteRouter(),
    "sampled": SigmoidSteRouter(ste="sampled", probe_rate=0.3),
    "off": SigmoidSteRouter(ste="off"),
    "top1": SigmoidSteRouter(zero_routes="top1", threshold=0.6),
    "straight_through": SigmoidSteRouter(rescale_gradient="straight_through", sparsity_on="all"),
    "no_rescale": SigmoidSteRouter(rescale="none", bias=True, bias_init=0.3, input="residual", threshold=0.4),
    "topk": TopKRouter(top_k=2, z_coef=1e-3),
    "topk_plain": TopKRouter(top_k=3, normalize=False, output_scale=2.0),
    "topk_all": TopKRouter(top_k=5),
    "switch": TopKRouter(top_k=1, normalize=False, jitter=0.2, capacity_factor=1.0, balance_over="sequence"),
    "gshard": TopKRouter(top_k=2, second="random", capacity_factor=0.9, balance_count="first"),
    "noisy": TopKRouter(top_k=2, gate="mlp", noise=True, cv_coef=1.0, output_scale=2.5),
    "noisy_all": TopKRouter(top_k=5, noise=True, cv_coef=1.0, normalize=False),
    "importance": TopKRouter(top_k=2, cv_coef=1.0, capacity_factor=0.5, drop="random"),
    "sigmoid": TopKRouter(top_k=2, score="sigmoid", output_scale=2.5, selection_bias=True, balance_over="sequence"),
    "sigmoid_plain": TopKRouter(top_k=3, score="sigmoid", normalize=False, num_groups=5, top_groups=4),
    "cosine": TopKRouter(top_k=2, gate="cosine", capacity_factor=0.6, drop="probability"),
    "base_layers": BaseLayersRouter(),
    "expert_choice": ExpertChoiceRouter(capacity_factor=1.3),
    "expert_choice_batch": ExpertChoiceRouter(over="micro_batch", score="sigmoid", evaluation="choice"),
    "language_family": LanguageFamilyRouter(languages={"xx": 4, "aa": 0, "mm": 1}),
    "hash": HashRouter(num_hashes=2),
    "task": TaskRouter(tasks=["xx", "aa"]),
    "task_branches": TaskRouter(branches={"xx": [0], "aa": [4, 1]}),
    "nexus": NexusRouter(domain_dim=4, projection_dim=6),
    "language_all": LanguageFamilyRouter(top_k=1, languages={"xx": 2, "yy": 0}),
    "expert_threshold": ExpertChoiceRouter(training="threshold", warmup_steps=0, score="sigmoid"),
    "remoe": ReMoERouter(),
    "remoe_budget": ReMoERouter(target_active=1.5),
    "remoe_plain": ReMoERouter(load_weighted=False),
    "xmoe": XMoERouter(threshold=0.7),
    "xmoe_all": XMoERouter(threshold=1.0, normalize=True, max_experts=4),
    "xmoe_first": XMoERouter(threshold=0.0, capacity_factor=1.0),
    "xmoe_capacity": XMoERouter(target_active=2.0, capacity_factor=1.5, normalize=True),
    "dynmoe": DynMoERouter(),
    "moepp": MoEppRouter(),
    "moepp_normalized": MoEppRouter(normalize=True, tau=0.5, capacity_factor=0.8, num_copy=2, num_constant=1, top_k=3),
    "moepp_zero": MoEppRouter(num_copy=0, num_constant=0, num_zero=3, gating_residual=False, capacity_factor=None),
}


def model_config(router, num_experts=5, hidden=8, expert_dim=7) -> ModelConfig:
    return ModelConfig(
        vocab_size=11, hidden_size=hidden, num_layers=3, num_heads=2, intermediate_size=16,
        moe=MoEConfig(num_experts=num_experts, expert_dim=expert_dim, router=router),
    )  # fmt: skip


def pair(config: ModelConfig, seed: int = 0, scale: float = 1.0, shift: float = 0.0):
    """The layer and the loop with the same float64 weights. shift moves every logit of the router (through a constant input)."""
    generator = torch.Generator().manual_seed(seed)
    ours, loop = MoELayer(config, 1).double(), ReferenceMoE(config, 1).double()
    with torch.no_grad():
        for p in loop.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
        if hasattr(loop.router, "updates"):
            loop.router.updates.fill_(3)
        if hasattr(loop.router, "table"):
            loop.router.table.copy_(start_value(config, "layers.1.ffn.router.table", loop.router.table.shape, torch.Generator()))
        if shift:
            loop.router.weight[:, 0] += shift
    ours.load_state_dict(loop.state_dict())
    return ours, loop


def compare(ours, loop, x, context, residual, tolerance=1e-11):
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results, learned = [], None
    for layer in (ours, loop):
        xs, rs = x.clone().requires_grad_(), residual.clone().requires_grad_()
        y, report = layer(xs, context, rs)
        # A loss whose coefficient is 0 may be a figure only.
        learned = {name for name, v in report.losses.items() if v.requires_grad} if learned is None else learned
        (y * grad).sum().add(sum((i + 1) * v for i, (name, v) in enumerate(report.losses.items()) if name in learned)).backward()
        grads = {n: p.grad for n, p in layer.named_parameters()} | {"x": xs.grad, "residual": rs.grad}
        results.append((y, report, grads))
        layer.zero_grad()
    (y, report, grads), (y_ref, report_ref, grads_ref) = results
    torch.testing.assert_close(y, y_ref, rtol=tolerance, atol=tolerance)
    assert report.losses.keys() == report_ref.losses.keys()
    for name, value in report.losses.items():
        torch.testing.assert_close(value, report_ref.losses[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(report.stats["load"], report_ref.stats["load"])
    for name, value in grads_ref.items():
        value = torch.zeros_like(grads[name]) if value is None and grads[name] is not None else value
        if value is None:
            assert grads[name] is None, name
            continue
        got = torch.zeros_like(value) if grads[name] is None else grads[name]
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ROUTERS)
def test_matches_the_loop(name):
    config = model_config(ROUTERS[name])
    ours, loop = pair(config)
    x, residual = torch.randn(2, 17, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(17, dtype=torch.bool)
    valid[[3, 16]] = False
    known = dict(tokens=torch.arange(17) % 11, tags=torch.arange(17) % 2)  # of routers by token id and by source
    compare(ours, loop, x, TokenContext(keys=torch.arange(17) + 100, valid=valid, num_tokens=40.0, **known), residual)
    x, residual = x[:15], residual[:15]
    known = {name: value[:15] for name, value in known.items()}
    context = TokenContext(keys=torch.arange(15), valid=valid[:15], num_tokens=20.0, sequence=5, **known)  # three sequences
    compare(ours, loop, x, context, residual)
    if not isinstance(ROUTERS[name], SigmoidSteRouter):  # evaluation: nothing is drawn or dropped; the loop has no sigmoid_ste without probes
        compare(ours.eval(), loop.eval(), x, context, residual)


@pytest.mark.parametrize("coefficient", [0.0, 1e-3])
@pytest.mark.parametrize("router", [TopKRouter(top_k=2), BudgetRouter()])
def test_z_is_a_figure_without_a_coefficient(router, coefficient):
    """The z-loss always has its value, and a gradient, for which the logits are kept, only where it counts."""
    layer = MoELayer(model_config(router.model_copy(update={"z_coef": coefficient})), 0).double()
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = layer(x, TokenContext(keys=torch.arange(7)), x)[1].losses["z"]
    torch.testing.assert_close(z, torch.logsumexp(x @ layer.router.weight.T, -1).square().mean())
    assert z.requires_grad == (coefficient > 0)


@pytest.mark.parametrize("name", ["exact", "sampled", "off", "top1"])
@pytest.mark.parametrize("shift", [-9.0, 9.0])
def test_no_gate_open_and_all_gates_open(name, shift):
    """Tokens without an expert have output 0 and finite gradients; tokens with all experts are computed by all."""
    config = model_config(ROUTERS[name])
    ours, loop = pair(config, scale=0.1, shift=shift)
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.1
    x[:, 0] = 1.0
    load = ours(x, TokenContext(keys=torch.arange(9)), x)[1].stats["load"]
    assert load.sum() == (45 if shift > 0 else 9 if name == "top1" else 0)
    compare(ours, loop, x, TokenContext(keys=torch.arange(9)), x)


@pytest.mark.parametrize("name", ["exact", "sampled", "topk"])
def test_all_tokens_on_one_expert(name):
    config = model_config(ROUTERS[name] if name != "topk" else TopKRouter(top_k=1))
    ours, loop = pair(config, scale=0.05)
    with torch.no_grad():
        for layer in (ours, loop):
            layer.router.weight[:, 0] = -8
            layer.router.weight[3, 0] = 8
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 0.1
    x[:, 0] = 1.0
    load = ours(x, TokenContext(keys=torch.arange(9)), x)[1].stats["load"]
    assert load.tolist() == [0, 0, 0, 9, 0]
    compare(ours, loop, x, TokenContext(keys=torch.arange(9)), x)


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name):
    ours, _ = pair(model_config(ROUTERS[name]))
    x = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    y, report = ours(x, TokenContext(keys=nothing, tokens=nothing, tags=nothing), x)
    (y.sum() + sum(report.losses.values())).backward()
    assert y.shape == (0, 8)
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters() if p.requires_grad)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 12), experts=st.integers(1, 9), hidden=st.sampled_from([2, 3, 8]), dim=st.sampled_from([1, 2, 5]),
    name=st.sampled_from(["exact", "sampled", "off", "topk"]), seed=st.integers(0, 99), shift=st.floats(-2, 2),
)  # fmt: skip
def test_any_shape(tokens, experts, hidden, dim, name, seed, shift):
    router = ROUTERS[name] if name != "topk" else TopKRouter(top_k=1 + seed % experts)
    config = model_config(router, experts, hidden, dim)
    ours, loop = pair(config, seed, shift=shift)
    x = torch.randn(tokens, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    compare(ours, loop, x, TokenContext(keys=torch.arange(tokens)), x, 1e-10)


def test_probes_cost_no_memory_between_forward_and_backward():
    """What the layer keeps for backward does not depend on the probes: exact and off keep the same bytes, but for the probes' own lists."""
    kept = {}
    for name in ("exact", "off"):
        ours, _ = pair(model_config(ROUTERS[name], hidden=64, expert_dim=32), scale=0.1)
        sizes: dict[int, int] = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.randn(200, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            ours(x, TokenContext(), x)
        kept[name] = sum(size for size in sizes.values() if size >= 200 * 32 * 8)
    assert 0 < kept["exact"] == kept["off"], kept
