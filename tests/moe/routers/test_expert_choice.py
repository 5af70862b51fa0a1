"""Expert choice and its causal threshold: the equation and its gradients, awkward inputs, the running cut, and what sees later tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moetrain.config import ExpertChoiceRouter, ModelConfig, MoEConfig
from moetrain.model import Transformer, init_weights
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers import changes_after_step
from moetrain.moe.routing import TokenContext, replay_contexts
from tests.moe.test_layer import compare, model_config, pair


def tokens(count: int, hidden: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_equation_and_its_gradients():
    """y_t = sum over the experts that chose t of S_te E_e(x_t), S = softmax(x W): by matrices, with a one-hot choice as in the paper."""
    ours, _ = pair(model_config(ExpertChoiceRouter(capacity_factor=2.0)), scale=0.5)
    x, grad = tokens(10), tokens(10, seed=2)
    W, gate_up, down = (p.detach().clone().requires_grad_() for p in (ours.router.weight, ours.experts.gate_up, ours.experts.down))
    S = torch.softmax(x @ W.T, -1)
    I = S.T.topk(4).indices  # noqa: E741  (E, k), k = 2 * 10 / 5
    P = torch.nn.functional.one_hot(I, 10).double()  # (E, k, T)
    hidden = torch.einsum("ekt,td->ekd", P, x) @ gate_up.transpose(1, 2)
    gate, up = hidden.chunk(2, -1)
    out = (torch.nn.functional.silu(gate) * up) @ down.transpose(1, 2)
    y = torch.einsum("ekt,ek,ekd->td", P, S.T.gather(1, I), out)
    (y * grad).sum().backward()
    got, report = ours(x, TokenContext(keys=torch.arange(10)), x)
    (got * grad).sum().backward()
    torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)
    for mine, plain in ((ours.router.weight, W), (ours.experts.gate_up, gate_up), (ours.experts.down, down)):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-11, atol=1e-12)
    assert report.stats["load"].tolist() == [4] * 5 and not report.losses
    per_token = ours.router(x, TokenContext()).decision.active.sum(-1)
    assert per_token.min() < 2 < per_token.max(), "tokens have different numbers of experts"


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
@pytest.mark.parametrize("experts", [1, 256])
def test_one_and_256_experts(over, experts):
    ours, loop = pair(model_config(ExpertChoiceRouter(capacity_factor=1.0, over=over), num_experts=experts, expert_dim=2), scale=0.5)
    compare(ours, loop, tokens(24), TokenContext(keys=torch.arange(24), sequence=12), tokens(24))


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
def test_all_scores_equal(over):
    """The first tokens of each sequence, or those of the smallest names."""
    ours, loop = pair(model_config(ExpertChoiceRouter(capacity_factor=1.0, over=over)))
    with torch.no_grad():
        for layer in (ours, loop):
            layer.router.weight.zero_()
    context = TokenContext(keys=torch.arange(20), sequence=10)
    active = ours.router(tokens(20), context).decision.active
    wanted = torch.zeros(20, dtype=torch.bool)
    wanted[[0, 1, 10, 11] if over == "sequence" else [0, 1, 2, 3]] = True
    assert torch.equal(active, wanted[:, None].expand(20, 5))
    compare(ours, loop, tokens(20), context, tokens(20))
    backwards = dataclasses.replace(context, keys=torch.arange(20).flip(0))
    assert torch.equal(ours.router(tokens(20), backwards).decision.active[:, 0], wanted if over == "sequence" else wanted.flip(0))


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
def test_no_token_has_a_label(over):
    ours, _ = pair(model_config(ExpertChoiceRouter(over=over)))
    x = tokens(6).requires_grad_()
    y, report = ours(x, TokenContext(keys=torch.full((6,), -1), valid=torch.zeros(6, dtype=torch.bool), num_tokens=5.0, sequence=3), x)
    y.sum().backward()
    assert not y.any() and report.stats["load"].sum() == 0 and not ours.router.weight.grad.any()
    assert not any(value.any() for value in report.sums.values())
    assert list(ours.router.after_step(report.stats["load"], report.sums)) == []


def step(ours: MoELayer, context: TokenContext, x: torch.Tensor) -> torch.Tensor:
    """One training step's changes, without gradients. Returns the load."""
    layers = torch.nn.ModuleDict({"ffn": ours})
    wrapped = torch.nn.ModuleDict({"layer": layers})
    routing = ours.router(x, context)
    load = routing.decision.active.sum(0)
    named = {name: value.flatten().tolist() for name, value in routing.sums.items()}
    for name, change in changes_after_step(wrapped, [load.tolist()], [named]):
        parameter = wrapped.get_parameter(name)
        parameter.data += change.to(parameter.dtype)
    return load


def test_the_cut_is_the_mean_of_the_steps_cuts_and_then_follows_them():
    ours, _ = pair(model_config(ExpertChoiceRouter(capacity_factor=1.5, cut_rate=0.25)))
    with torch.no_grad():
        ours.router.updates.zero_()
    wanted = []
    for i in range(9):
        x = tokens(20, seed=i)
        scores = torch.softmax(x @ ours.router.weight.detach().T, -1).view(2, 10, 5)
        cut = scores.sort(1, descending=True).values[:, 3].mean(0)  # ceil(1.5 * 10 / 5) = 3 are taken; of two sequences
        step(ours, TokenContext(keys=torch.arange(20), sequence=10), x)
        wanted.append(cut if i == 0 else wanted[-1] + max(0.25, 1 / (i + 1)) * (cut - wanted[-1]))
        torch.testing.assert_close(ours.router.cut.detach(), wanted[-1], rtol=1e-12, atol=1e-14)
    assert ours.router.updates.item() == 9


@pytest.mark.parametrize("over", ["sequence", "micro_batch"])
def test_the_threshold_holds_the_capacity(over):
    """Tokens with mean loads of their own by expert: after the warm-up the cut takes 1.5 experts per token and every expert its share, by looking
    at each token alone."""
    options = ExpertChoiceRouter(capacity_factor=1.5, over=over, training="threshold", warmup_steps=30, cut_rate=0.05)
    ours, _ = pair(model_config(options), scale=0.7)
    with torch.no_grad():
        ours.router.updates.zero_()
    total = torch.zeros(5)
    for i in range(150):
        load = step(ours, TokenContext(keys=torch.arange(200), sequence=100), tokens(200, seed=i))
        if i < 30:
            assert load.tolist() == [60] * 5
        elif i >= 90:
            total += load
    assert (total / (60 * 60)).sub(1).abs().max() < 0.06, total
    x = tokens(50, seed=999)
    ours.eval()
    whole = ours.router(x, TokenContext(keys=torch.arange(50))).decision.active
    alone = torch.cat([ours.router(x[t : t + 1], TokenContext()).decision.active for t in range(50)])
    assert torch.equal(whole, alone)


def test_a_decision_is_replayed_when_a_block_is_computed_again():
    ours, _ = pair(model_config(ExpertChoiceRouter()))
    first, again = replay_contexts()
    with first:
        a = ours.router(tokens(10), TokenContext(keys=torch.arange(10)))
    with again:
        b = ours.router(tokens(10, seed=2), TokenContext(keys=torch.arange(10)))
    assert a.decision is b.decision and a.sums is b.sums


@torch.no_grad()
def test_what_sees_later_tokens():
    """Routes of a prefix change with what follows in training and in evaluation by choice, never in evaluation and generation by the cut."""
    x = tokens(20)
    other = x.clone()
    other[10:] = tokens(10, seed=5) * 3
    context = TokenContext(keys=torch.arange(20))
    for options, training, causal in (
        (ExpertChoiceRouter(), True, False),
        (ExpertChoiceRouter(), False, True),
        (ExpertChoiceRouter(evaluation="choice"), False, False),
        (ExpertChoiceRouter(training="threshold", warmup_steps=2), True, True),
    ):
        ours, _ = pair(model_config(options))
        ours.train(training)
        a, b = (ours.router(v, context).decision.active[:10] for v in (x, other))
        assert torch.equal(a, b) == causal
        # Without keys it is inference, where the cut decides whatever evaluation does.
        a, b = (ours.eval().router(v, TokenContext()).decision.active[:10] for v in (x, other))
        assert torch.equal(a, b)


def test_who_trains_by_choice_is_told():
    assert "not causal" in ExpertChoiceRouter().caution() and ExpertChoiceRouter(training="threshold").caution() is None


def test_start_values():
    moe = MoEConfig(num_experts=4, expert_dim=4, router=ExpertChoiceRouter(score="sigmoid"))
    config = ModelConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, moe=moe)
    model = Transformer(config)
    init_weights(model, 0)
    router = model.layers[0].ffn.router
    assert router.cut.tolist() == [0.5] * 4 and router.updates.tolist() == [0] and router.weight.std() > 0.01
    assert not router.cut.requires_grad and not router.updates.requires_grad
