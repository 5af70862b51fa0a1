"""Expert-parallel dispatch in real processes: the same numbers as one process, and no more bytes than pairs and route lists."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moetrain import ops
from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter
from moetrain.moe import exchange
from moetrain.moe.dispatch import AllToAllDispatcher
from moetrain.moe.layer import MoELayer
from moetrain.moe.peers import open_exchange
from moetrain.moe.routing import Decision, Routing, TokenContext, replay_contexts
from tests.distributed import run

ROUTERS = {
    "exact": SigmoidSteRouter(),
    "sampled": SigmoidSteRouter(ste="sampled", probe_rate=0.3),
    "off": SigmoidSteRouter(ste="off"),
    "topk": TopKRouter(top_k=2),
}
D, E, F, T = 8, 8, 6, 24


def build(router: str, skew: str) -> MoELayer:
    config = ModelConfig(
        vocab_size=9, hidden_size=D, num_layers=2, num_heads=2, intermediate_size=16,
        moe=MoEConfig(num_experts=E, expert_dim=F, router=ROUTERS[router]),
    )  # fmt: skip
    layer = MoELayer(config, 0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
        if skew == "closed":
            layer.router.weight[:, 0] = -20
        if skew == "one expert":
            layer.router.weight[:, 0] = -20
            layer.router.weight[5, 0] = 20
        if skew == "one rank":
            layer.router.weight[: E // 2, 0] = -20
    return layer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, T, D, dtype=torch.float64, generator=generator)
    x[:, 0] = 1
    return x, grad


def train(layer: MoELayer, x, grad, keys, group=None, recompute=False):
    x = x.clone().requires_grad_()

    def forward(x):
        return layer(x, TokenContext(keys=keys, num_tokens=T, group=group), x)

    if recompute:
        y, report = checkpoint(forward, x, use_reentrant=False, context_fn=replay_contexts, preserve_rng_state=False)
    else:
        y, report = forward(x)
    ((y * grad).sum() + sum(report.losses.values())).backward()
    return y.detach(), x.grad, report


def rank_main(router: str, skew: str, shares: list[int], way: str = "collective", recompute: bool = False):
    """One rank's part: its tokens, its experts; what is compared is gathered by the parent."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = build(router, skew)
    local = E // world
    mine = slice(rank * local, (rank + 1) * local)
    layer.experts.gate_up = torch.nn.Parameter(layer.experts.gate_up.detach()[mine].clone())
    layer.experts.down = torch.nn.Parameter(layer.experts.down.detach()[mine].clone())
    layer.dispatcher = AllToAllDispatcher(open_exchange(way, dist.group.WORLD, torch.device("cpu"))[0])
    start = sum(shares[:rank])
    tokens = slice(start, start + shares[rank])
    x, grad = inputs()
    sent: list[list[int]] = []
    original = exchange.all_to_all

    def counted(parts, group):
        sent.append([p.tensor.nbytes for p in parts])
        return original(parts, group)

    ours = layer.dispatcher.exchange
    with mock.patch.object(exchange, "all_to_all", counted), mock.patch.object(ours, "sizes", wraps=ours.sizes) as sizes:
        y, dx, report = train(layer, x[tokens], grad[tokens], torch.arange(T)[tokens], dist.group.WORLD, recompute)
    grads = [p.grad.numpy() for p in (layer.router.weight, layer.experts.gate_up, layer.experts.down)]
    losses = {k: float(v.detach()) for k, v in report.losses.items()}
    return y.numpy(), dx.numpy(), *grads, losses, report.stats["load"].numpy(), sizes.call_count, sent


def close(got, want) -> None:
    torch.testing.assert_close(torch.as_tensor(got, dtype=want.dtype), want, rtol=1e-10, atol=1e-12)


def cat(parts, i: int) -> torch.Tensor:
    return torch.cat([torch.as_tensor(p[i]) for p in parts])


@pytest.mark.parametrize("skew", ["mixed", "closed", "one expert", "one rank"])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("way", ["collective", "peers"])
def test_ranks_compute_what_one_rank_computes(way, router, skew):
    """Outputs, input gradients, router and expert gradients, losses: 2 and 4 ranks against 1, in float64; the ranks have different numbers of
    tokens, one of them none. By messages and through shared memory."""
    for shares in ([T, 0], [5, 0, 12, 7]):
        compare(router, skew, shares, way)


@pytest.mark.parametrize("router", ["exact", "topk"])
@pytest.mark.parametrize("way", ["collective", "peers"])
def test_recomputation(way, router):
    """The same when the layer is computed again in backward: with the plan of the first time, for which no rank is asked again, and the same exchange
    of rows as then, after the one of output gradients."""
    for part in compare(router, "mixed", [5, 0, 12, 7], way, recompute=True):
        asked, sent = part[-2:]
        assert asked == 1 and (way == "peers" or (len(sent) == 5 and sent[3] == sent[0]))


def compare(router: str, skew: str, shares: list[int], way: str, recompute: bool = False) -> list:
    layer = build(router, skew)
    x, grad = inputs()
    y, dx, report = train(layer, x, grad, torch.arange(T))
    parts = run(rank_main, len(shares), router, skew, shares, way, recompute)
    close(cat(parts, 0), y)
    close(cat(parts, 1), dx)
    close(sum(torch.as_tensor(p[2]) for p in parts), layer.router.weight.grad)
    close(cat(parts, 3), layer.experts.gate_up.grad)
    close(cat(parts, 4), layer.experts.down.grad)
    for name, value in report.losses.items():
        close(sum(p[5][name] for p in parts), value.detach())
    close(sum(torch.as_tensor(p[6]) for p in parts), report.stats["load"])
    return parts


WANTED = [[(True, True), (True, True)], [(True, False), (False, True)], [(False, True), (False, True)]]
"""For each rank whether gradients of rows and of weights are wanted."""


def without_experts(way: str) -> list:
    """Dispatch and combine alone. An expert returns what it gets, times its weight: small whole numbers, of which every dtype holds the sums."""
    found, rank = [], dist.get_rank()
    for dtype, wanted in itertools.product((torch.float64, torch.float32, torch.bfloat16), WANTED):
        generator, tokens, wide = torch.Generator().manual_seed(rank), (9, 4)[rank], ops.acc_dtype(dtype)
        x, grad = torch.randint(-2, 3, (2, tokens, 6), generator=generator).to(dtype)
        active = torch.rand(tokens, 4, generator=generator) < 0.6
        weights = active * torch.randint(1, 3, (tokens, 4), generator=generator).to(wide)
        sums, products = weights.sum(1, keepdim=True).to(dtype), (x * grad).sum(1, keepdim=True).to(wide) * active
        x.requires_grad_(wanted[rank][0])
        weights.requires_grad_(wanted[rank][1])

        ours = open_exchange(way, dist.group.WORLD, torch.device("cpu"))[0]
        dispatcher, place = AllToAllDispatcher(ours), (exchange, "all_to_all") if way == "collective" else (ours._memory, "wait")
        with mock.patch.object(*place, wraps=getattr(*place)) as waits:
            work, plan = dispatcher.dispatch(x, Routing(Decision(active), weights))
            total = work.weights.new_zeros(len(work.rows)).index_add(0, work.routes.tokens.long(), work.weights)
            y = dispatcher.combine(work.rows * total.to(dtype)[:, None], plan)
            forward = waits.call_count
            y.backward(grad)
        found.append([forward, waits.call_count - forward, torch.equal(y, x * sums)])
        found[-1] += [not x.requires_grad or torch.equal(x.grad, grad * sums), not weights.requires_grad or torch.equal(weights.grad, products)]
    return found


@pytest.mark.parametrize("way", ["collective", "peers"])
def test_one_exchange_each_way(way):
    """Rows, lists and weights travel together: one wait there, one home, and in backward as many, whichever gradients a rank wants; in all dtypes."""
    assert run(without_experts, 2, way) == [[[2, 2, True, True, True]] * 9] * 2


@pytest.mark.parametrize("router", ["sampled", "off", "topk"])
def test_bytes_on_the_wire(router, capsys):
    """One exchange sends the distinct (token, rank) pairs once each, with the route lists and weights beside them; the way back sends one row per
    pair that has a route; backward the same rows, and one number per route and per probe beside those that go home. Counted at the collective."""
    layer, (x, _) = build(router, "mixed"), inputs()
    decision = layer.router(x, TokenContext(keys=torch.arange(T))).decision
    for world in (2, 4):
        active = decision.active.view(T, world, E // world)
        probing = torch.zeros_like(active) if decision.probes is None else (decision.probes > 0).view(active.shape)
        routes, probes = int(active.sum()), int(probing.sum())
        pairs, routed = int((active | probing).any(-1).sum()), int(active.any(-1).sum())
        parts = run(rank_main, world, router, "mixed", [T // world] * world)
        counted = [[sum(sent) for sent in zip(*parts_of_ranks)] for parts_of_ranks in zip(*(p[-1] for p in parts))]
        row, number = D * 8, 8
        lists = 4 * (pairs + routes + probes) + routes * number
        expected = [[lists, pairs * row], [routed * row]]  # there, home
        expected += [[pairs * row], [(routes + probes) * number, routed * row]]  # in backward, in the order in which autograd visits the nodes
        with capsys.disabled():
            print(
                f"\n{router}, {world} ranks: {pairs} (token, rank) pairs x {row} bytes + route lists {lists} bytes = "
                f"{pairs * row + lists}; counted {sum(counted[0])}; rows for {routes} routes would be {routes * row}"
            )
        assert counted == expected
