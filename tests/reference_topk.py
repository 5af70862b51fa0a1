"""The top-k family as loops over tokens, experts and sequences; see reference.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moetrain.moe.routers.topk import DROP, JITTER, NOISE, SECOND, stream
from moetrain.moe.routing import LayerReport, TokenContext, normal, uniform


def topk_layer(layer: Any, x: Tensor, context: TokenContext) -> tuple[Tensor, LayerReport]:
    """layer: a ReferenceMoE."""
    from tests.reference import expert

    o, E, T, router = layer.options, layer.config.moe.num_experts, len(x), layer.router
    valid = [True] * T if context.valid is None else context.valid.tolist()
    tokens = [t for t in range(T) if valid[t]]
    total_tokens = len(tokens) if context.num_tokens is None else context.num_tokens
    S = context.sequence or T
    training = layer.training

    def draw(kind, t, use, n):
        return kind(context.keys[t : t + 1], stream(layer.layer, use), n)[0].to(x.dtype)

    logits, clean, std = {}, {}, {}
    for t in tokens:
        h = x[t]
        if training and o.jitter:
            h = h * (1 - o.jitter + 2 * o.jitter * draw(uniform, t, JITTER, len(h)))
        if o.gate == "cosine":
            clean[t] = torch.stack([h @ w / h.norm() / w.norm() / o.cosine_temperature for w in router.weight])
        elif o.gate == "mlp":
            clean[t] = router.output @ torch.tanh(router.weight @ h)
        else:
            clean[t] = router.weight @ h
        logits[t] = clean[t]
        if training and o.noise:
            std[t] = torch.log(1 + torch.exp(router.noise @ h)) + 0.01
            logits[t] = clean[t] + draw(normal, t, NOISE, E) * std[t]

    scores, order, active = {}, {}, {}
    for t in tokens:
        s = 1 / (1 + torch.exp(-logits[t])) if o.score == "sigmoid" else torch.exp(logits[t]) / torch.exp(logits[t]).sum()
        scores[t] = s
        rank = (logits[t] if o.score == "softmax" else s).detach().tolist()
        if o.selection_bias:
            rank = [r + float(b) for r, b in zip(rank, router.selection_bias)]
        size, candidates = E // o.num_groups, list(range(E))
        if o.num_groups > 1:
            best = [sum(sorted(rank[g * size : (g + 1) * size])[-max(1, o.top_k // o.top_groups) :]) for g in range(o.num_groups)]
            groups = sorted(range(o.num_groups), key=lambda g: (-best[g], g))[: o.top_groups]
            candidates = [e for e in candidates if e // size in groups]
        order[t] = sorted(candidates, key=lambda e: (-rank[e], e))[: o.top_k]
        active[t] = list(order[t])
        if training and o.second == "random":
            first, second = (float(s[e].detach()) for e in order[t])
            if not float(draw(uniform, t, SECOND, 1)) < 2 * second / (first + second):
                active[t] = order[t][:1]

    if training and o.capacity_factor is not None:
        room = math.ceil(o.capacity_factor * o.top_k * S / E - 1e-9)
        for start in range(0, T, S):
            inside = [t for t in range(start, start + S) if valid[t]]
            for e in range(E):
                def priority(t, e=e):
                    return {"position": lambda: order[t].index(e), "probability": lambda: -float(scores[t][e].detach()),
                            "random": lambda: float(draw(uniform, t, DROP, E)[e])}[o.drop]()  # fmt: skip

                wanting = sorted((t for t in inside if e in active[t]), key=lambda t: (priority(t), t))
                for t in wanting[room:]:
                    active[t] = [i for i in active[t] if i != e]

    outputs, load = [], torch.zeros(E, dtype=torch.float64)
    importance, smooth = torch.zeros(E, dtype=x.dtype), torch.zeros(E, dtype=x.dtype)
    for t in range(T):
        y = torch.zeros_like(x[t])
        if valid[t]:
            divisor = sum(scores[t][e] for e in order[t]) if o.normalize else 1
            for e in order[t]:
                weight = scores[t][e] / divisor
                importance = importance + weight * torch.eye(E, dtype=x.dtype)[e]
                if e in active[t]:
                    y = y + o.output_scale * weight * expert(x[t], layer.experts.gate_up[e], layer.experts.down[e])
                    load[e] += 1
            for e in range(E):
                p = torch.tensor(float(e in order[t]), dtype=x.dtype)
                if training and o.noise:
                    if o.top_k < E:
                        others = torch.cat([logits[t][:e], logits[t][e + 1 :]])
                        rival = others.sort(descending=True).values[o.top_k - 1]
                        p = 0.5 * (1 + torch.erf((clean[t][e] - rival) / std[t][e] / math.sqrt(2)))
                    else:
                        p = torch.ones((), dtype=x.dtype)
                smooth = smooth + p * torch.eye(E, dtype=x.dtype)[e]
        outputs.append(y)

    def share(of):
        counts = torch.zeros(E, dtype=torch.float64)
        for t in of:
            for e in order[t] if o.balance_count == "all" else order[t][:1]:
                counts[e] += 1
        return counts

    balance = x.sum() * 0
    wholes = {t: scores[t] / scores[t].sum() for t in tokens}
    if o.balance_over == "sequence":
        for start in range(0, T, S):
            inside = [t for t in range(start, start + S) if valid[t]]
            if inside:
                f = share(inside)
                balance = balance + E * (f / f.sum() * sum(wholes[t] for t in inside)).sum() / total_tokens
    elif tokens:
        f = share(tokens)
        if o.balance_over == "global_batch" and context.counts is not None:
            f = context.counts.add(layer.layer, f)
        balance = E * (f / f.sum() * sum(wholes.values())).sum() / total_tokens
    losses = {"balance": balance, "z": sum((torch.logsumexp(logits[t], 0) ** 2 for t in tokens), x.sum() * 0) / total_tokens}
    if o.cv_coef:
        losses["cv"] = sum(((v - v.mean()) ** 2).mean() / v.mean() ** 2 for v in (importance, smooth)) * len(tokens) / total_tokens
    return (torch.stack(outputs) if outputs else x * 0), LayerReport(losses, {"load": load})
