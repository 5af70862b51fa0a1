"""Routers whose experts are chosen by the other side, by token id, task or domain, as loops over tokens and experts; see reference.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx
import torch
from torch import Tensor

from moetrain.config import BaseLayersRouter, ExpertChoiceRouter, HashRouter, LanguageFamilyRouter, NexusRouter, RouterOptions, TaskRouter
from moetrain.moe.routing import LayerReport, TokenContext

Weights = dict[int, dict[int, Tensor]]
"""Token -> expert -> weight."""

ASSIGNED: dict[type[RouterOptions], Callable[[Any, Tensor, TokenContext, list[list[int]]], Weights]] = {}
"""Options -> what a loop says the routes and their weights are, from (ReferenceMoE, x, context, valid tokens of each sequence). Where there is a
balance loss it leaves each token's shares in `shares`."""


def assigned_layer(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    """layer: a ReferenceMoE."""
    from tests.reference import expert

    T = len(x)
    S = context.sequence or max(1, T)
    valid = [True] * T if context.valid is None else context.valid.tolist()
    sequences = [[t for t in range(start, start + S) if valid[t]] for start in range(0, T, S)]
    layer.shares = {}
    routes = ASSIGNED[type(layer.options)](layer, x, context, sequences)
    y, load = [], torch.zeros(layer.config.moe.num_experts, dtype=torch.float64)
    for t in range(T):
        out = torch.zeros_like(x[t])
        for e, weight in routes.get(t, {}).items():
            out = out + weight * expert(x[t], layer.experts.gate_up[e], layer.experts.down[e])
            load[e] += 1
        y.append(out)
    losses = {}
    if "balance" in layer.options.coefficients():  # E sum_e f_e P_e of this rank's tokens
        count = context.num_tokens or max(1, sum(valid))
        f = load / load.sum().clamp(min=1)
        losses["balance"] = len(f) * (f * sum(layer.shares.values(), x.new_zeros(len(f)))).sum() / count
    return (torch.stack(y) if y else x * 0), LayerReport(losses, {"load": load})


def expert_choice(layer: Any, x: Tensor, context: TokenContext, sequences: list[list[int]]) -> Weights:
    """The experts choose, or the cut does; `over: micro_batch` of one rank."""
    o, E = layer.options, layer.config.moe.num_experts
    scores = {}
    for t in sum(sequences, []):
        logits = layer.router.weight @ x[t]
        scores[t] = 1 / (1 + torch.exp(-logits)) if o.score == "sigmoid" else torch.exp(logits) / torch.exp(logits).sum()
    by_cut = o.evaluation == "threshold" if not layer.training else o.training == "threshold" and float(layer.router.updates) >= o.warmup_steps
    routes: Weights = {t: {} for t in scores}
    if by_cut:
        for t, s in scores.items():
            for e in range(E):
                if s[e].item() > layer.router.cut[e].item():
                    routes[t][e] = s[e]
        return routes
    for among in [sum(sequences, [])] if o.over == "micro_batch" and layer.training else sequences:
        room = -(-round(1e6 * o.capacity_factor * len(among)) // round(1e6 * E))
        for e in range(E):
            for t in sorted(among, key=lambda t, e=e: (-float(scores[t][e].detach()), t))[:room]:
                routes[t][e] = scores[t][e]
    return routes


ASSIGNED[ExpertChoiceRouter] = expert_choice


def base_layers(layer: Any, x: Tensor, context: TokenContext, sequences: list[list[int]]) -> Weights:
    """In training the best assignment of each sequence, else each token's best expert."""
    scores = {t: layer.router.weight @ x[t] for t in sum(sequences, [])}
    routes: Weights = {}
    for among in sequences:
        table = [[s.item() for s in scores[t]] for t in among]
        owner = best_assignment(table) if layer.training else [max(range(len(row)), key=row.__getitem__) for row in table]
        for t, e in zip(among, owner):
            routes[t] = {e: 1 / (1 + torch.exp(-scores[t][e]))}
    return routes


def best_assignment(table: list[list[float]]) -> list[int]:
    """Expert of each token, floor or ceil of the mean to each, at the largest sum: a minimum-cost flow by networkx, in steps of 2^-24."""
    if not table:
        return []
    N, E = len(table), len(table[0])
    graph = networkx.DiGraph()
    graph.add_node("end", demand=N)
    graph.add_edge("extra", "end", capacity=N % E, weight=0)
    for e in range(E):
        graph.add_edge(("expert", e), "end", capacity=N // E, weight=0)
        graph.add_edge(("expert", e), "extra", capacity=1, weight=0)
    for t, row in enumerate(table):
        graph.add_node(("token", t), demand=-1)
        for e, score in enumerate(row):
            graph.add_edge(("token", t), ("expert", e), capacity=1, weight=-round(score * 2**24))
    flow = networkx.min_cost_flow(graph)
    return [next(e for e in range(E) if flow["token", t].get(("expert", e))) for t in range(N)]


ASSIGNED[BaseLayersRouter] = base_layers


def language_family(layer: Any, x: Tensor, context: TokenContext, sequences: list[list[int]]) -> Weights:
    o, routes = layer.options, {}
    for t in sum(sequences, []):
        logits = layer.router.weight @ x[t]
        s = torch.exp(logits) / torch.exp(logits).sum()
        slots = sorted(range(len(s)), key=lambda e, s=s: (-s[e].item(), e))[: o.top_k]
        tag = -1 if context.tags is None else int(context.tags[t])
        if layer.training and tag >= 0:
            own = o.languages[sorted(o.languages)[tag]]
            if own not in slots:
                slots[-1] = own
        routes[t] = {e: s[e] for e in slots}
        layer.shares[t] = s
    return routes


ASSIGNED[LanguageFamilyRouter] = language_family


def nexus(layer: Any, x: Tensor, context: TokenContext, sequences: list[list[int]]) -> Weights:
    o, r, routes = layer.options, layer.router, {}
    rows = []
    for d in r.domains:
        gate, up = (r.weight @ d).chunk(2)
        rows.append(r.output @ (gate / (1 + torch.exp(-gate)) * up))
    for t in sum(sequences, []):
        logits = torch.stack([x[t] @ e for e in rows])
        s = torch.exp(logits) / torch.exp(logits).sum()
        layer.shares[t] = s
        routes[t] = {e: s[e] for e in sorted(range(len(rows)), key=lambda e, s=s: (-s[e].item(), e))[: o.top_k]}
    return routes


ASSIGNED[NexusRouter] = nexus


def hash_layer(layer: Any, x: Tensor, context: TokenContext, sequences: list[list[int]]) -> Weights:
    k = layer.options.num_hashes
    ids = layer.router.table
    return {t: {int(ids[int(context.tokens[t]), j]): torch.tensor(1 / k, dtype=x.dtype) for j in range(k)} for t in sum(sequences, [])}


ASSIGNED[HashRouter] = hash_layer


def task(layer: Any, x: Tensor, context: TokenContext, sequences: list[list[int]]) -> Weights:
    o, routes = layer.options, {}
    for t in sum(sequences, []):
        tag = int(context.tags[t])
        if o.branches:
            experts = o.branches[sorted(o.branches)[tag]]
            routes[t] = {e: torch.tensor(1 / len(experts), dtype=x.dtype) for e in experts}
            continue
        logits = layer.router.weight[tag]
        s = torch.exp(logits) / torch.exp(logits).sum()
        layer.shares[t] = s
        best = sorted(range(len(s)), key=lambda e, s=s: (-s[e].item(), e))[: o.top_k]
        routes[t] = {e: s[e] / (sum(s[i] for i in best) if o.normalize else 1) for e in best}
    return routes


ASSIGNED[TaskRouter] = task
