"""Expert-parallel dispatch in real processes: the same numbers as one process, and no more bytes than pairs and route lists."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter
from moetrain.moe import exchange
from moetrain.moe.dispatch import AllToAllDispatcher
from moetrain.moe.layer import MoELayer
from moetrain.moe.peers import open_exchange
from moetrain.moe.routing import TokenContext
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


def train(layer: MoELayer, x, grad, keys, group=None):
    x = x.clone().requires_grad_()
    y, report = layer(x, TokenContext(keys=keys, num_tokens=T, group=group), x)
    ((y * grad).sum() + sum(report.losses.values())).backward()
    return y.detach(), x.grad, report


def rank_main(router: str, skew: str, shares: list[int], way: str = "collective"):
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
    sent: list[tuple[tuple[int, ...], int]] = []
    original = exchange.exchange

    def counted(tensor, send, receive, group):
        sent.append((tuple(tensor.shape), tensor.nbytes))
        return original(tensor, send, receive, group)

    exchange.exchange = counted
    y, dx, report = train(layer, x[tokens], grad[tokens], torch.arange(T)[tokens], dist.group.WORLD)
    exchange.exchange = original
    grads = [p.grad.numpy() for p in (layer.router.weight, layer.experts.gate_up, layer.experts.down)]
    losses = {k: float(v.detach()) for k, v in report.losses.items()}
    return y.numpy(), dx.numpy(), *grads, losses, report.stats["load"].numpy(), sent


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
    layer = build(router, skew)
    x, grad = inputs()
    y, dx, report = train(layer, x, grad, torch.arange(T))
    for shares in ([T, 0], [5, 0, 12, 7]):
        parts = run(rank_main, len(shares), router, skew, shares, way)
        close(cat(parts, 0), y)
        close(cat(parts, 1), dx)
        close(sum(torch.as_tensor(p[2]) for p in parts), layer.router.weight.grad)
        close(cat(parts, 3), layer.experts.gate_up.grad)
        close(cat(parts, 4), layer.experts.down.grad)
        for name, value in report.losses.items():
            close(sum(p[5][name] for p in parts), value.detach())
        close(sum(torch.as_tensor(p[6]) for p in parts), report.stats["load"])


@pytest.mark.parametrize("router", ["sampled", "off", "topk"])
def test_bytes_on_the_wire(router, capsys):
    """One dispatch sends the distinct (token, rank) pairs once each, plus the route lists; the way back sends one row per pair that has a
    route; backward the same rows, and one number per route and per probe. Counted at the collective."""
    layer, (x, _) = build(router, "mixed"), inputs()
    decision = layer.router(x, TokenContext(keys=torch.arange(T))).decision
    for world in (2, 4):
        active = decision.active.view(T, world, E // world)
        probing = torch.zeros_like(active) if decision.probes is None else (decision.probes > 0).view(active.shape)
        routes, probes = int(active.sum()), int(probing.sum())
        pairs, routed = int((active | probing).any(-1).sum()), int(active.any(-1).sum())
        parts = run(rank_main, world, router, "mixed", [T // world] * world)
        counted = [sum(p[-1][i][1] for p in parts) for i in range(len(parts[0][-1]))]
        row, number = D * 8, 8
        lists = 4 * (pairs + routes + probes)
        expected = [lists, pairs * row, routes * number, routed * row]  # forward: lists, rows, weights; rows back
        # backward, in the order autograd visits the nodes: output gradients, then (probes,) weights, rows
        expected += [pairs * row] + ([probes * number] if decision.probes is not None else []) + [routes * number, routed * row]
        with capsys.disabled():
            print(
                f"\n{router}, {world} ranks: {pairs} (token, rank) pairs x {row} bytes + route lists {lists + routes * number} bytes = "
                f"{pairs * row + lists + routes * number}; counted {sum(counted[:3])}; rows for {routes} routes would be {routes * row}"
            )
        assert counted == expected
