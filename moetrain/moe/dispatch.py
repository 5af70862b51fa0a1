"""Tokens to the ranks that hold their experts, and results back.

Two verbs, `dispatch` and `combine`, and a frozen `Plan` between them that holds all that the way back needs; a dispatcher has no weights and
no state. The unit on the wire is the (token, rank) pair: a token with five experts on a rank is sent there once, with its five (expert,
weight) pairs, and that rank sends one row back, the sum of the five weighted outputs (added in float32).

Letters: T tokens of this rank, D model dim, E experts, W ranks of the group, E/W local experts, P (token, rank) pairs this rank sends,
N rows this rank receives, R routes and Q probe routes this rank computes.

Pairs that exist only for probe routes bring a row, send none back, and in backward bring the row's output gradient and send back one number
per probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import ops
from moetrain.moe.exchange import PROBED, PROBES, ROUTED, ROUTES, Collective, RouteList, Sizes
from moetrain.moe.peers import Peers
from moetrain.moe.routing import Decision, Routing, recorded, visible
from moetrain.moe.weights import pick


@visible
@dataclass(frozen=True)
class Work:
    """What the experts of this rank compute. rows: (N, D). weights: (R,) in the order of `routes`, differentiable. probe_weights: (Q,) zeros
    in the order of `probes`, through which the probes' inner products flow back; None without probes."""

    rows: Tensor
    routes: RouteList
    weights: Tensor
    probes: RouteList | None
    probe_weights: Tensor | None


def _inverse(positions: Tensor) -> Tensor:
    inverse = torch.empty_like(positions)
    inverse[positions.long()] = torch.arange(positions.numel(), dtype=positions.dtype, device=positions.device)
    return inverse.long()


# ------------------------------------------------------------------------------------------------------------------- local


@dataclass(frozen=True)
class LocalPlan:
    routes: RouteList
    probes: RouteList | None


class LocalDispatcher:
    """Every expert is on this rank: rows are the tokens themselves."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Work, LocalPlan]:
        """x: (T, D)."""
        decision = routing.decision
        plan: LocalPlan = recorded(lambda: self._plan(decision))
        padded = decision.room is not None
        weights = pick(routing.weights, plan.routes.tokens, plan.routes.counts, padded)
        probe_weights = None
        if plan.probes is not None and decision.probes is not None:
            # The value is 0; its gradient, the probe's inner product, is multiplied by the importance on its way to the router.
            probe_weights = pick(routing.weights * decision.probes, plan.probes.tokens, plan.probes.counts, padded)
        return Work(x, plan.routes, weights, plan.probes, probe_weights), plan

    def combine(self, rows: Tensor, plan: LocalPlan) -> Tensor:
        """rows: (T, D), the experts' sums."""
        return rows

    @staticmethod
    def _plan(decision: Decision) -> LocalPlan:
        probing = None if decision.probes is None else decision.probes > 0
        if decision.room is not None:
            rows, probe_rows = decision.room
            return LocalPlan(
                RouteList(*ops.route(decision.active, rows, padded=True)),
                None if probing is None else RouteList(*ops.route(probing, probe_rows, padded=True)),
            )
        # The one host synchronisation of the layer: how many routes there are.
        counts = torch.stack([decision.active.sum(), decision.active.new_zeros((), dtype=torch.int64) if probing is None else probing.sum()]).tolist()
        probes = None if probing is None or not counts[1] else RouteList(*ops.route(probing, counts[1]))
        return LocalPlan(RouteList(*ops.route(decision.active, counts[0])), probes)


# -------------------------------------------------------------------------------------------------------------- all to all


@dataclass(frozen=True)
class ExchangePlan:
    """pairs: the P (token, rank) pairs this rank sends, by rank, those with a route before those with probes only. back: the same list with
    the former alone, as they come back. sizes: what is sent and received. route_index, probe_index: places in the flat (T, E) weights, in the
    order of the wire. routes, probes: what this rank computes; route_order, probe_order: from the wire's order to theirs."""

    pairs: RouteList
    back: RouteList
    sizes: Sizes
    route_index: Tensor
    probe_index: Tensor
    routes: RouteList
    probes: RouteList | None
    route_order: Tensor
    probe_order: Tensor


class _SendRows(torch.autograd.Function):
    """(T, D) -> (N, D). Backward brings back the rows of pairs that have a route and adds them up by token."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: ExchangePlan, exchange: Collective | Peers) -> Tensor:
        ctx.plan, ctx.exchange = plan, exchange
        return exchange.send_rows(x, plan.pairs, plan.sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.exchange.return_rows(grad, ctx.plan.back, ctx.plan.sizes), None, None


class _ReturnRows(torch.autograd.Function):
    """(N, D) -> (T, D). Backward sends every pair its token's output gradient, also the pairs that returned nothing: their probes want it."""

    @staticmethod
    def forward(ctx, rows: Tensor, plan: ExchangePlan, exchange: Collective | Peers) -> Tensor:
        ctx.plan, ctx.exchange = plan, exchange
        return exchange.return_rows(rows, plan.back, plan.sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.exchange.send_rows(grad, ctx.plan.pairs, ctx.plan.sizes), None, None


class _SendWeights(torch.autograd.Function):
    """(routes sent,) -> (R,), one weight per route, in the order of the wire."""

    @staticmethod
    def forward(ctx, weights: Tensor, plan: ExchangePlan, exchange: Collective | Peers) -> Tensor:
        ctx.plan, ctx.exchange = plan, exchange
        return exchange.numbers(weights, plan.sizes, ROUTES)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.exchange.numbers(grad, ctx.plan.sizes, ROUTES, back=True), None, None


class _SendProbes(torch.autograd.Function):
    """(probes sent,) -> (Q,) zeros. Forward sends nothing, since a probe's weight is 0; backward brings back one number per probe."""

    @staticmethod
    def forward(ctx, weights: Tensor, plan: ExchangePlan, exchange: Collective | Peers) -> Tensor:
        ctx.plan, ctx.exchange = plan, exchange
        return weights.new_zeros(sum(plan.sizes.received_of(PROBES)))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.exchange.numbers(grad, ctx.plan.sizes, PROBES, back=True), None, None


class AllToAllDispatcher:
    """Experts are spread over the ranks of an exchange, rank w holding experts w E/W ... (w + 1) E/W - 1."""

    def __init__(self, exchange: Collective | Peers) -> None:
        self.exchange = exchange

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Work, ExchangePlan]:
        """x: (T, D); T may differ between ranks, and be 0."""
        decision = routing.decision
        plan: ExchangePlan = recorded(lambda: self._plan(decision))
        rows = _SendRows.apply(x, plan, self.exchange)
        weights = _SendWeights.apply(routing.weights.reshape(-1)[plan.route_index], plan, self.exchange)[plan.route_order]
        probe_weights = None
        if decision.probes is not None:
            # Every rank takes part in the exchange of probes, also one that neither sends nor receives any.
            sent = (routing.weights * decision.probes).reshape(-1)[plan.probe_index]
            probe_weights = _SendProbes.apply(sent, plan, self.exchange)[plan.probe_order]
        return Work(rows, plan.routes, weights, plan.probes, probe_weights), plan

    def combine(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """rows: (N, D), the sums of this rank's experts -> (T, D)."""
        return _ReturnRows.apply(rows, plan, self.exchange)

    def _plan(self, decision: Decision) -> ExchangePlan:
        ranks = dist.get_world_size(self.exchange.group)
        device = decision.active.device
        tokens, num_experts = decision.active.shape
        local = num_experts // ranks
        active = decision.active.view(tokens, ranks, local)
        probing = torch.zeros_like(active) if decision.probes is None else (decision.probes > 0).view(tokens, ranks, local)
        routed = active.any(-1)
        probed_only = probing.any(-1) & ~routed

        counts = torch.stack([routed.sum(0), probed_only.sum(0), active.sum((0, 2)), probing.sum((0, 2))], -1)
        # The one host synchronisation of the layer: everything below has its size from these numbers.
        sizes = self.exchange.sizes(counts)
        total_sent, total_received = [sum(c) for c in zip(*sizes.sent)], [sum(c) for c in zip(*sizes.received)]

        num_pairs = total_sent[ROUTED] + total_sent[PROBED]
        pairs = RouteList(*ops.route(torch.stack([routed, probed_only], -1).view(tokens, 2 * ranks), num_pairs))
        back = RouteList(*ops.route(routed, total_sent[ROUTED]))

        # The route lists: for each pair how many routes it has, then each route's local expert, doubled, plus 1 for a probe.
        pair_rank = torch.repeat_interleave(pairs.counts.long(), output_size=num_pairs) // 2
        pair_token = pairs.tokens.long()
        kinds = (active.to(torch.uint8) + 2 * probing.to(torch.uint8))[pair_token, pair_rank]
        num_entries = total_sent[ROUTES] + total_sent[PROBES]
        entries = torch.nonzero_static(kinds, size=num_entries)
        entry_pair, entry_expert = entries[:, 0], entries[:, 1]
        is_probe = kinds[entry_pair, entry_expert] == 2
        place = pair_token[entry_pair] * num_experts + pair_rank[entry_pair] * local + entry_expert
        num_routes, num_probes = total_sent[ROUTES], total_sent[PROBES]
        route_index, probe_index = _split(place, is_probe, num_routes, num_probes)

        lengths = torch.count_nonzero(kinds, dim=-1).to(torch.int32).split(sizes.sent_of(ROUTED, PROBED))
        codes = (entry_expert * 2 + is_probe).to(torch.int32).split(sizes.sent_of(ROUTES, PROBES))
        message = torch.cat([part for pair in zip(lengths, codes) for part in pair])
        receive_pairs, receive_entries = sizes.received_of(ROUTED, PROBED), sizes.received_of(ROUTES, PROBES)
        answer = self.exchange.numbers(message, sizes, ROUTED, PROBED, ROUTES, PROBES).split(
            [n for pair in zip(receive_pairs, receive_entries) for n in pair]
        )
        lengths_in, codes_in = torch.cat(answer[0::2]).long(), torch.cat(answer[1::2]).long()

        num_rows = sum(receive_pairs)
        row = torch.repeat_interleave(lengths_in, output_size=sum(receive_entries))
        kinds_in = torch.zeros(num_rows * local, dtype=torch.uint8, device=device)
        kinds_in[row * local + codes_in // 2] = (codes_in % 2 + 1).to(torch.uint8)
        kinds_in = kinds_in.view(num_rows, local)
        routes = RouteList(*ops.route(kinds_in == 1, total_received[ROUTES]))
        # Without a router that probes, no rank builds the list; with one, every rank does, be it empty.
        probes = None if decision.probes is None else RouteList(*ops.route(kinds_in == 2, total_received[PROBES]))
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return ExchangePlan(
            pairs, back, sizes, route_index, probe_index, routes, probes,
            _inverse(routes.positions), empty if probes is None else _inverse(probes.positions),
        )  # fmt: skip


def _split(place: Tensor, is_probe: Tensor, num_routes: int, num_probes: int) -> tuple[Tensor, Tensor]:
    """The places of routes and those of probes, each in their order, with sizes known beforehand (no synchronisation)."""
    which = torch.nonzero_static(~is_probe, size=num_routes)[:, 0], torch.nonzero_static(is_probe, size=num_probes)[:, 0]
    return place[which[0]], place[which[1]]
