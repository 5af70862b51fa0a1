"""Tokens to the ranks that hold their experts, and results back.

Two verbs, `dispatch` and `combine`, and a frozen `Plan` between them that holds all that the way back needs; a dispatcher has no weights and
no state. The unit on the wire is the (token, rank) pair: a token with five experts on a rank is sent there once, with its five (expert,
weight) pairs, and that rank sends one row back, the sum of the five weighted outputs (added in float32).

Letters: T tokens of this rank, D model dim, E experts, W ranks of the group, E/W local experts, P (token, rank) pairs this rank sends,
N rows this rank receives, R routes and Q probe routes this rank computes.

Pairs that exist only for probe routes bring a row, send none back, and in backward bring the row's output gradient and send back one number
per probe.

Between ranks there are three exchanges in forward: sizes of what comes, rows with their route lists and weights, and results; and two in backward:
the results' gradients, and the rows' gradients with those of weights and probes. Each is one wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain import ops
from moetrain.moe.exchange import ENTRIES, PAIRS, PROBES, RESULTS, ROUTES, Collective, Numbers, RouteList, Sizes
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
class Sending:
    """pairs: the P (token, rank) pairs this rank sends, by rank, those with a route before those with probes only. back: the same list with
    the former alone, as they come back. sizes: what is sent and received. route_index, probe_index: places in the flat (T, E) weights, in the
    order of the wire."""

    pairs: RouteList
    back: RouteList
    sizes: Sizes
    route_index: Tensor
    probe_index: Tensor


@dataclass(frozen=True)
class ExchangePlan:
    """sending: what this rank sends. routes, probes: what it computes. On the wire they come row by row, in a row by ascending expert: the order of
    their `positions`."""

    sending: Sending
    routes: RouteList
    probes: RouteList | None


class _Dispatch(torch.autograd.Function):
    """x (T, D), weights (T, E) -> rows (N, D), the weights (R,) of `routes`, zeros (Q,) for `probes` or None, and the plan. One exchange each way:
    backward brings back the rows of pairs that have a route, which it adds up by token, and one number for each route and probe. It does so whatever
    gradients this rank needs: the others wait for it."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, decision: Decision, exchange: Collective | Peers):
        sending, lengths, codes = recorded(lambda: _send(decision, exchange))
        sent = [Numbers(lengths, PAIRS), Numbers(codes, ENTRIES), Numbers(weights.reshape(-1)[sending.route_index], ROUTES)]
        # A recomputation has its plan and sends the lists again all the same: they are small, and there is one kind of exchange.
        rows, (lengths, codes, wire) = exchange.send_rows(x, sending.pairs, sending.sizes, sent)
        plan: ExchangePlan = recorded(lambda: _receive(sending, lengths, codes, decision, exchange))

        arrived = torch.empty_like(wire).index_copy_(0, plan.routes.positions.long(), wire)
        probe_weights = importance = None
        if plan.probes is not None and decision.probes is not None:
            # A probe's weight is 0 and is not sent. Its gradient is multiplied by the importance on its way to the router.
            probe_weights = weights.new_zeros(plan.probes.tokens.numel())
            importance = decision.probes.reshape(-1)[sending.probe_index]
        ctx.plan, ctx.exchange, ctx.shape = plan, exchange, weights.shape
        ctx.save_for_backward(importance)
        return rows, arrived, probe_weights, plan

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows: Tensor, grad_weights: Tensor, grad_probes: Tensor | None, _):
        plan, sending, (importance,) = ctx.plan, ctx.plan.sending, ctx.saved_tensors
        sent = [Numbers(grad_weights.index_select(0, plan.routes.positions), ROUTES)]
        if grad_probes is not None:
            sent.append(Numbers(grad_probes.index_select(0, plan.probes.positions), PROBES))
        grad_x, came = ctx.exchange.return_rows(grad_rows, sending.back, sending.sizes, sent)
        grad = grad_weights.new_zeros(ctx.shape.numel()).index_copy_(0, sending.route_index, came[0])
        if grad_probes is not None:
            grad.index_copy_(0, sending.probe_index, came[1] * importance)
        return grad_x, grad.view(ctx.shape), None, None


class _Combine(torch.autograd.Function):
    """(N, D) -> (T, D). Backward sends every pair its token's output gradient, also the pairs that returned nothing: their probes want it."""

    @staticmethod
    def forward(ctx, rows: Tensor, sending: Sending, exchange: Collective | Peers) -> Tensor:
        ctx.sending, ctx.exchange = sending, exchange
        return exchange.return_rows(rows, sending.back, sending.sizes)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.exchange.send_rows(grad, ctx.sending.pairs, ctx.sending.sizes)[0], None, None


class AllToAllDispatcher:
    """Experts are spread over the ranks of an exchange, rank w holding experts w E/W ... (w + 1) E/W - 1."""

    def __init__(self, exchange: Collective | Peers) -> None:
        self.exchange = exchange

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Work, ExchangePlan]:
        """x: (T, D); T may differ between ranks, and be 0."""
        rows, weights, probe_weights, plan = _Dispatch.apply(x, routing.weights, routing.decision, self.exchange)
        return Work(rows, plan.routes, weights, plan.probes, probe_weights), plan

    def combine(self, rows: Tensor, plan: ExchangePlan) -> Tensor:
        """rows: (N, D), the sums of this rank's experts -> (T, D)."""
        return _Combine.apply(rows, plan.sending, self.exchange)


def _send(decision: Decision, exchange: Collective | Peers) -> tuple[Sending, Tensor, Tensor]:
    """What this rank sends, and its route lists: (P,) how many routes and probes each pair has, and (routes + probes,) the local expert of each,
    doubled, plus 1 for a probe; int32, in the order of the wire."""
    ranks = dist.get_world_size(exchange.group)
    tokens, num_experts = decision.active.shape
    local = num_experts // ranks
    active = decision.active.view(tokens, ranks, local)
    probing = torch.zeros_like(active) if decision.probes is None else (decision.probes > 0).view(tokens, ranks, local)
    routed = active.any(-1)
    probed_only = probing.any(-1) & ~routed

    counts = torch.stack([routed.sum(0), probed_only.sum(0), active.sum((0, 2)), probing.sum((0, 2))], -1)
    # The one host synchronisation of the layer: everything below has its size from these numbers.
    sizes = exchange.sizes(counts)
    num_pairs, num_results, num_entries, num_routes = (sum(sizes.sent_of(per)) for per in (PAIRS, RESULTS, ENTRIES, ROUTES))
    pairs = RouteList(*ops.route(torch.stack([routed, probed_only], -1).view(tokens, 2 * ranks), num_pairs))
    back = RouteList(*ops.route(routed, num_results))

    pair_rank = torch.repeat_interleave(pairs.counts.long(), output_size=num_pairs) // 2
    pair_token = pairs.tokens.long()
    kinds = (active.to(torch.uint8) + 2 * probing.to(torch.uint8))[pair_token, pair_rank]
    entries = torch.nonzero_static(kinds, size=num_entries)
    entry_pair, entry_expert = entries[:, 0], entries[:, 1]
    is_probe = kinds[entry_pair, entry_expert] == 2
    place = pair_token[entry_pair] * num_experts + pair_rank[entry_pair] * local + entry_expert
    route_index, probe_index = _split(place, is_probe, num_routes, num_entries - num_routes)
    lengths = torch.count_nonzero(kinds, dim=-1).to(torch.int32)
    return Sending(pairs, back, sizes, route_index, probe_index), lengths, (entry_expert * 2 + is_probe).to(torch.int32)


def _receive(sending: Sending, lengths: Tensor, codes: Tensor, decision: Decision, exchange: Collective | Peers) -> ExchangePlan:
    """The plan, from the route lists of `_send` that came with the rows."""
    sizes, num_rows, codes = sending.sizes, lengths.numel(), codes.long()
    local = decision.active.shape[1] // dist.get_world_size(exchange.group)
    row = torch.repeat_interleave(lengths.long(), output_size=codes.numel())
    kinds = torch.zeros(num_rows * local, dtype=torch.uint8, device=codes.device)
    kinds[row * local + codes // 2] = (codes % 2 + 1).to(torch.uint8)
    kinds = kinds.view(num_rows, local)
    routes = RouteList(*ops.route(kinds == 1, sum(sizes.received_of(ROUTES))))
    # Without a router that probes, no rank builds the list; with one, every rank does, be it empty.
    probes = None if decision.probes is None else RouteList(*ops.route(kinds == 2, sum(sizes.received_of(PROBES))))
    return ExchangePlan(sending, routes, probes)


def _split(place: Tensor, is_probe: Tensor, num_routes: int, num_probes: int) -> tuple[Tensor, Tensor]:
    """The places of routes and those of probes, each in their order, with sizes known beforehand (no synchronisation)."""
    which = torch.nonzero_static(~is_probe, size=num_routes)[:, 0], torch.nonzero_static(is_probe, size=num_probes)[:, 0]
    return place[which[0]], place[which[1]]
