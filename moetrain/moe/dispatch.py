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
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import ops
from moetrain.moe.routing import Decision, Routing, recorded, visible


class RouteList(NamedTuple):
    """Routes sorted by expert, and the way back to rows; all int32 (see `ops.route`).

    tokens: (R,) row of each route. counts: (experts,). row_offsets: (rows + 1,). positions: (R,), row by row.
    """

    tokens: Tensor
    counts: Tensor
    row_offsets: Tensor
    positions: Tensor

    def without_counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `ops.permute` and `ops.combine` take."""
        return self.tokens, self.row_offsets, self.positions


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
        weights = _pick(routing.weights, plan.routes)
        probe_weights = None
        if plan.probes is not None and decision.probes is not None:
            # The value is 0; its gradient, the probe's inner product, is multiplied by the importance on its way to the router.
            probe_weights = _pick(routing.weights * decision.probes, plan.probes)
        return Work(x, plan.routes, weights, plan.probes, probe_weights), plan

    def combine(self, rows: Tensor, plan: LocalPlan) -> Tensor:
        """rows: (T, D), the experts' sums."""
        return rows

    @staticmethod
    def _plan(decision: Decision) -> LocalPlan:
        probing = None if decision.probes is None else decision.probes > 0
        # The one host synchronisation of the layer: how many routes there are.
        counts = torch.stack([decision.active.sum(), decision.active.new_zeros((), dtype=torch.int64) if probing is None else probing.sum()]).tolist()
        probes = None if probing is None or not counts[1] else RouteList(*ops.route(probing, counts[1]))
        return LocalPlan(RouteList(*ops.route(decision.active, counts[0])), probes)


def _pick(weights: Tensor, routes: RouteList) -> Tensor:
    """(T, E), routes over the same T and E -> (R,) in expert order."""
    expert = torch.repeat_interleave(routes.counts.long(), output_size=routes.tokens.numel())
    return weights.reshape(-1)[routes.tokens.long() * weights.shape[1] + expert]


# -------------------------------------------------------------------------------------------------------------- all to all


@dataclass(frozen=True)
class ExchangePlan:
    """pairs: the P (token, rank) pairs this rank sends, by rank, those with a route before those with probes only. back: the same list with
    the former alone, as they come back. *_sizes: per rank, how many pairs with a route, pairs with probes only, routes, probes are sent and
    received. route_index, probe_index: places in the flat (T, E) weights, in the order of the wire. routes, probes: what this rank computes;
    route_order, probe_order: from the wire's order to theirs."""

    pairs: RouteList
    back: RouteList
    sent_sizes: list[list[int]]
    received_sizes: list[list[int]]
    route_index: Tensor
    probe_index: Tensor
    routes: RouteList
    probes: RouteList | None
    route_order: Tensor
    probe_order: Tensor

    def sent(self, *columns: int) -> list[int]:
        return [sum(row[c] for c in columns) for row in self.sent_sizes]

    def received(self, *columns: int) -> list[int]:
        return [sum(row[c] for c in columns) for row in self.received_sizes]


_ROUTED, _PROBED, _ROUTES, _PROBES = range(4)


def exchange(tensor: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """(sum(send), ...) -> (sum(receive), ...): the first send[0] rows go to rank 0 of the group, and so on. Every rank takes part, also with
    nothing to send: a rank that left out an empty exchange would leave the others waiting."""
    output = tensor.new_empty((sum(receive), *tensor.shape[1:]))
    dist.all_to_all_single(output, tensor.contiguous(), receive, send, group=group)
    return output


class _SendRows(torch.autograd.Function):
    """(T, D) -> (N, D). Backward brings back the rows of pairs that have a route and adds them up by token."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return exchange(_gather(x, plan.pairs), plan.sent(_ROUTED, _PROBED), plan.received(_ROUTED, _PROBED), group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _return(grad, ctx.plan, ctx.group), None, None


class _ReturnRows(torch.autograd.Function):
    """(N, D) -> (T, D). Backward sends every pair its token's output gradient, also the pairs that returned nothing: their probes want it."""

    @staticmethod
    def forward(ctx, rows: Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return _return(rows, plan, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        plan = ctx.plan
        return exchange(_gather(grad, plan.pairs), plan.sent(_ROUTED, _PROBED), plan.received(_ROUTED, _PROBED), ctx.group), None, None


class _SendWeights(torch.autograd.Function):
    """(routes sent,) -> (R,), one weight per route, in the order of the wire."""

    @staticmethod
    def forward(ctx, weights: Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return exchange(weights, plan.sent(_ROUTES), plan.received(_ROUTES), group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return exchange(grad, ctx.plan.received(_ROUTES), ctx.plan.sent(_ROUTES), ctx.group), None, None


class _SendProbes(torch.autograd.Function):
    """(probes sent,) -> (Q,) zeros. Forward sends nothing, since a probe's weight is 0; backward brings back one number per probe."""

    @staticmethod
    def forward(ctx, weights: Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return weights.new_zeros(sum(plan.received(_PROBES)))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return exchange(grad, ctx.plan.received(_PROBES), ctx.plan.sent(_PROBES), ctx.group), None, None


def _gather(x: Tensor, pairs: RouteList) -> Tensor:
    return ops.permute(x.contiguous(), *pairs.without_counts())


def _return(rows: Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> Tensor:
    """(N, D) -> (T, D): rows of pairs with a route go home, and a token's rows are added in float32."""
    kept, start = [], 0
    for routed, probed, *_ in plan.received_sizes:
        kept.append(rows[start : start + routed])
        start += routed + probed
    home = exchange(torch.cat(kept), plan.received(_ROUTED), plan.sent(_ROUTED), group)
    return ops.combine(home, *plan.back.without_counts())


class AllToAllDispatcher:
    """Experts are spread over a process group, rank w holding experts w E/W ... (w + 1) E/W - 1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Work, ExchangePlan]:
        """x: (T, D); T may differ between ranks, and be 0."""
        decision = routing.decision
        plan: ExchangePlan = recorded(lambda: self._plan(decision))
        rows = _SendRows.apply(x, plan, self.group)
        weights = _SendWeights.apply(routing.weights.reshape(-1)[plan.route_index], plan, self.group)[plan.route_order]
        probe_weights = None
        if decision.probes is not None:
            # Every rank takes part in the exchange of probes, also one that neither sends nor receives any.
            sent = (routing.weights * decision.probes).reshape(-1)[plan.probe_index]
            probe_weights = _SendProbes.apply(sent, plan, self.group)[plan.probe_order]
        return Work(rows, plan.routes, weights, plan.probes, probe_weights), plan

    def combine(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """rows: (N, D), the sums of this rank's experts -> (T, D)."""
        return _ReturnRows.apply(rows, plan, self.group)

    def _plan(self, decision: Decision) -> ExchangePlan:
        group, ranks = self.group, dist.get_world_size(self.group)
        device = decision.active.device
        tokens, num_experts = decision.active.shape
        local = num_experts // ranks
        active = decision.active.view(tokens, ranks, local)
        probing = torch.zeros_like(active) if decision.probes is None else (decision.probes > 0).view(tokens, ranks, local)
        routed = active.any(-1)
        probed_only = probing.any(-1) & ~routed

        sizes = torch.stack([routed.sum(0), probed_only.sum(0), active.sum((0, 2)), probing.sum((0, 2))], -1)
        incoming = torch.empty_like(sizes)
        dist.all_to_all_single(incoming, sizes, group=group)
        # The one host synchronisation of the layer: everything below has its size from these numbers.
        sent, received = torch.stack([sizes, incoming]).tolist()
        total_sent, total_received = [sum(c) for c in zip(*sent)], [sum(c) for c in zip(*received)]

        num_pairs = total_sent[_ROUTED] + total_sent[_PROBED]
        pairs = RouteList(*ops.route(torch.stack([routed, probed_only], -1).view(tokens, 2 * ranks), num_pairs))
        back = RouteList(*ops.route(routed, total_sent[_ROUTED]))

        # The route lists: for each pair how many routes it has, then each route's local expert, doubled, plus 1 for a probe.
        pair_rank = torch.repeat_interleave(pairs.counts.long(), output_size=num_pairs) // 2
        pair_token = pairs.tokens.long()
        kinds = (active.to(torch.uint8) + 2 * probing.to(torch.uint8))[pair_token, pair_rank]
        num_entries = total_sent[_ROUTES] + total_sent[_PROBES]
        entries = torch.nonzero_static(kinds, size=num_entries)
        entry_pair, entry_expert = entries[:, 0], entries[:, 1]
        is_probe = kinds[entry_pair, entry_expert] == 2
        place = pair_token[entry_pair] * num_experts + pair_rank[entry_pair] * local + entry_expert
        num_routes, num_probes = total_sent[_ROUTES], total_sent[_PROBES]
        route_index, probe_index = _split(place, is_probe, num_routes, num_probes)

        send_pairs, send_entries = [r[_ROUTED] + r[_PROBED] for r in sent], [r[_ROUTES] + r[_PROBES] for r in sent]
        receive_pairs, receive_entries = [r[_ROUTED] + r[_PROBED] for r in received], [r[_ROUTES] + r[_PROBES] for r in received]
        lengths = torch.count_nonzero(kinds, dim=-1).to(torch.int32).split(send_pairs)
        codes = (entry_expert * 2 + is_probe).to(torch.int32).split(send_entries)
        message = torch.cat([part for pair in zip(lengths, codes) for part in pair])
        answer = exchange(
            message,
            [p + e for p, e in zip(send_pairs, send_entries)],
            [p + e for p, e in zip(receive_pairs, receive_entries)],
            group,
        ).split([n for pair in zip(receive_pairs, receive_entries) for n in pair])
        lengths_in, codes_in = torch.cat(answer[0::2]).long(), torch.cat(answer[1::2]).long()

        num_rows = sum(receive_pairs)
        row = torch.repeat_interleave(lengths_in, output_size=sum(receive_entries))
        kinds_in = torch.zeros(num_rows * local, dtype=torch.uint8, device=device)
        kinds_in[row * local + codes_in // 2] = (codes_in % 2 + 1).to(torch.uint8)
        kinds_in = kinds_in.view(num_rows, local)
        routes = RouteList(*ops.route(kinds_in == 1, total_received[_ROUTES]))
        # Without a router that probes, no rank builds the list; with one, every rank does, be it empty.
        probes = None if decision.probes is None else RouteList(*ops.route(kinds_in == 2, total_received[_PROBES]))
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return ExchangePlan(
            pairs, back, sent, received, route_index, probe_index, routes, probes,
            _inverse(routes.positions), empty if probes is None else _inverse(probes.positions),
        )  # fmt: skip


def _split(place: Tensor, is_probe: Tensor, num_routes: int, num_probes: int) -> tuple[Tensor, Tensor]:
    """The places of routes and those of probes, each in their order, with sizes known beforehand (no synchronisation)."""
    which = torch.nonzero_static(~is_probe, size=num_routes)[:, 0], torch.nonzero_static(is_probe, size=num_probes)[:, 0]
    return place[which[0]], place[which[1]]
