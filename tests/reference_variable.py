"""ReMoE, XMoE, DynMoE and MoE++ as loops over tokens and experts; see reference.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moetrain.moe.routing import LayerReport, TokenContext


def variable_layer(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    """layer: a ReferenceMoE."""
    return {"remoe": _remoe, "xmoe": _xmoe, "dynmoe": _dynmoe, "moepp": _moepp}[layer.options.type](layer, x, context)


def _tokens(x: Tensor, context: TokenContext) -> tuple[list[int], Any]:
    tokens = [t for t in range(len(x)) if context.valid is None or context.valid[t]]
    return tokens, len(tokens) if context.num_tokens is None else context.num_tokens


def _by_score(scores: Tensor) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))


def _output(layer: Any, x: Tensor, weights: dict[int, dict[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """weights: of each token, expert -> weight. The outputs and the load."""
    from tests.reference import expert

    outputs, load = [], torch.zeros(layer.config.moe.num_experts, dtype=torch.float64)
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for e, weight in weights.get(t, {}).items():
            y = y + weight * expert(x[t], layer.experts.gate_up[e], layer.experts.down[e])
            load[e] += 1
        outputs.append(y)
    return (torch.stack(outputs) if outputs else x * 0), load


def _remoe(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    o, E, W = layer.options, layer.config.moe.num_experts, layer.router.weight
    tokens, divisor = _tokens(x, context)
    gates = {t: [torch.relu(W[e] @ x[t]) for e in range(E)] for t in tokens}
    y, load = _output(layer, x, {t: {e: r for e, r in enumerate(row) if r > 0} for t, row in gates.items()})
    loss = x.sum() * 0
    for t in tokens:
        for e in range(E):
            budget = float(load.sum()) if o.target_active is None else o.target_active * len(tokens)
            f = E / budget * float(load[e]) if o.load_weighted and budget else 1.0
            loss = loss + f * gates[t][e]
    return y, LayerReport({"sparsity": loss / divisor / layer.config.num_layers}, {"load": load})


def _kept(wanting: dict[int, list[int]], T: int, S: int, E: int, room: list[int], priority: Any) -> dict[int, list[int]]:
    """wanting: of each token, its experts. In each sequence an expert e keeps room[e] tokens, by priority(t, e), then by position."""
    kept = {t: list(experts) for t, experts in wanting.items()}
    for start in range(0, T, S):
        for e in range(E):
            queue = [t for t in range(start, start + S) if e in wanting.get(t, [])]
            for t in sorted(queue, key=lambda t, e=e: (priority(t, e), t))[room[e] :]:
                kept[t].remove(e)
    return kept


def _xmoe(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    o, E, T = layer.options, layer.config.moe.num_experts, len(x)
    tokens, divisor = _tokens(x, context)
    threshold = o.threshold if o.target_active is None else 1 / (1 + math.exp(-float(layer.router.threshold)))
    p, order, chosen = {}, {}, {}
    for t in tokens:
        logits = layer.router.weight @ x[t]
        p[t] = torch.exp(logits) / torch.exp(logits).sum()
        order[t] = _by_score(logits)
        chosen[t], so_far = [], 0.0
        for place, e in enumerate(order[t]):
            if place == 0 or ((so_far < threshold or threshold == 1) and place < (o.max_experts or E)):
                chosen[t].append(e)
            so_far += float(p[t][e].detach())
    kept = chosen
    if layer.training and o.capacity_factor is not None:
        S = context.sequence or T
        room = math.ceil(o.capacity_factor * S / E - 1e-9)
        kept = _kept(chosen, T, S, E, [room] * E, lambda t, e: (order[t].index(e), -float(p[t][e].detach())))
    weights = {t: {e: p[t][e] / (sum(p[t][i] for i in chosen[t]) if o.normalize else 1) for e in kept[t]} for t in tokens}
    y, load = _output(layer, x, weights)
    balance = x.sum() * 0
    for e in range(E):
        first = sum(order[t][0] == e for t in tokens)
        balance = balance + E * first / max(1, len(tokens)) * sum(p[t][e] for t in tokens) / divisor
    return y, LayerReport({"balance": balance}, {"load": load})


def _dynmoe(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    o, E, router = layer.options, layer.config.moe.num_experts, layer.router
    tokens, divisor = _tokens(x, context)
    present = [e for e in range(E) if o.adapt_every is None or router.mask[e] == 1]
    gates, weights = {}, {}
    for t in tokens:
        s = {e: torch.sigmoid(router.weight[e] @ x[t] / router.weight[e].norm() / x[t].norm()) for e in present}
        margin = {e: s[e] - torch.sigmoid(router.threshold[e]) for e in present}
        active = [e for e in present if margin[e] > 0]
        if not active and not layer.training:
            active = [max(present, key=lambda e, s=s: float(s[e].detach()))]
        gates[t] = {e: 1 + margin[e] - margin[e].detach() for e in active}
        weights[t] = {e: g / len(active) for e, g in gates[t].items()}
    y, load = _output(layer, x, weights)
    routed, zero = [t for t in tokens if gates[t]], x.sum() * 0
    balance = zero
    if routed:
        for e in range(E):
            mean_gate = sum((gates[t][e] / sum(gates[t].values()) for t in routed if e in gates[t]), zero) / len(routed)
            balance = balance + E * mean_gate * sum(e in gates[t] for t in routed) / len(routed)
    efficiency = sum((g for t in tokens for g in gates[t].values()), zero) / E
    # A rank's share of what is no sum over tokens; the balance loss is a mean over routed tokens, of as many tokens as there are.
    share = len(tokens) / divisor
    squares = zero
    for i in present:
        for j in present:
            cosine = router.weight[i] @ router.weight[j] / router.weight[i].norm() / router.weight[j].norm()
            squares = squares + (cosine - int(i == j)) ** 2
    norm = sum(router.weight[e].norm() for e in present) / len(present)
    losses = {"balance": balance * share, "efficiency": efficiency / divisor, "orthogonality": squares.sqrt() * share, "norm": norm * share}
    return y, LayerReport(losses, {"load": load})


def _moepp(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    o, E, T, router = layer.options, layer.config.moe.num_experts, len(x), layer.router
    N = E + o.num_zero + o.num_copy + o.num_constant
    tokens, divisor = _tokens(x, context)
    p, order = {}, {}
    for t in tokens:
        logits = router.weight @ x[t]
        if o.gating_residual and context.previous is not None:
            logits = logits + router.residual @ context.previous[t]
        p[t] = torch.exp(logits) / torch.exp(logits).sum()
        order[t] = _by_score(logits)[: o.top_k]
    kept = order
    if layer.training and o.capacity_factor is not None:
        S = context.sequence or T
        unit = o.capacity_factor * o.top_k * S / (o.tau * E + N - E)
        room = [math.ceil((o.tau if e < E else 1) * unit - 1e-9) for e in range(N)]
        kept = _kept(order, T, S, N, room, lambda t, e: order[t].index(e))
    zero_experts = range(E, E + o.num_zero)
    ffn, extra = {}, torch.zeros_like(x)
    for t in tokens:
        divide = sum((p[t][e] for e in order[t] if e not in zero_experts), x.sum() * 0) if o.normalize else 1
        ffn[t] = {e: p[t][e] / divide for e in kept[t] if e < E}
        for e in kept[t]:
            weight, own = p[t][e] / divide if e not in zero_experts else 0, None
            if E + o.num_zero <= e < N - o.num_constant:
                own = x[t]
            elif e >= N - o.num_constant:
                c = e - (N - o.num_constant)
                a = torch.exp(router.mix[c] @ x[t])
                own = (a[0] * x[t] + a[1] * router.constant[c]) / a.sum()
            if own is not None:
                extra = extra + torch.eye(T, dtype=x.dtype)[t][:, None] * (weight * own)
    y, load = _output(layer, x, ffn)
    balance = x.sum() * 0
    for e in range(N):
        f = sum(e in order[t] for t in tokens) / max(1, len(tokens))
        balance = balance + (1 if e < E else o.tau) * f * sum(p[t][e] for t in tokens) / divisor
    return y + extra, LayerReport({"balance": balance}, {"load": load})
