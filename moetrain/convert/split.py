"""Cut a dense SwiGLU FFN into experts whose outputs add up to it (DSMoE, arXiv 2502.12455, Eq. 6; LLaMA-MoE, arXiv 2406.16554).

Which neurons go together is a partition, an (E, F) table of neurons; any partition adds up to the dense FFN. Letters: D model dim, F0
intermediate size of the dense FFN, E experts, F = F0 / E, C clusters, N points.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_ROUNDS = 20
"""Of k-means; it mostly stands still after ten."""


def check_split(intermediate_size: int, num_experts: int) -> int:
    """Intermediate size of one expert. ValueError if the cut is uneven, with the nearest number of experts that would do."""
    if intermediate_size % num_experts:
        divisors = [n for n in range(1, intermediate_size + 1) if intermediate_size % n == 0]
        near = min(divisors, key=lambda n: (abs(n - num_experts), n))
        raise ValueError(
            f"num_experts ({num_experts}) does not divide intermediate_size ({intermediate_size}) into equal slices; "
            f"nearest that does: {near}"
        )
    return intermediate_size // num_experts


def split_ffn(gate: Tensor, up: Tensor, down: Tensor, num_experts: int, partition: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Equal slices along the intermediate dim.

    gate, up: (F0, D). down: (D, F0). partition: (E, F) int64, the neurons of each expert; None: contiguous slices. Returns gate_up (E, 2F, D),
    each expert's gate rows first, and down (E, D, F), in the inputs' dtype. ValueError if E does not divide F0.
    """
    hidden_size = gate.shape[1]
    expert_dim = check_split(gate.shape[0], num_experts)
    if partition is not None:
        order = partition.flatten()
        assert torch.equal(order.sort().values, torch.arange(gate.shape[0])), "a partition has every neuron once"
        gate, up, down = gate[order], up[order], down[:, order]
    slices = (num_experts, expert_dim, hidden_size)
    gate_up = torch.cat((gate.reshape(slices), up.reshape(slices)), dim=1)
    return gate_up, down.reshape(hidden_size, num_experts, expert_dim).transpose(0, 1).contiguous()


def generator(seed: int, name: str) -> torch.Generator:
    """For the draws of one tensor: a function of seed and name, so that no order of reading matters."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_partition(intermediate_size: int, num_experts: int, draws: torch.Generator) -> Tensor:
    """(E, F): LLaMA-MoE's Independent-Random, the split of its released models."""
    return torch.randperm(intermediate_size, generator=draws).view(num_experts, -1)


def cluster_partition(features: Tensor, num_experts: int, metric: str, draws: torch.Generator) -> Tensor:
    """(E, F): equal clusters of neurons, LLaMA-MoE's Independent-Clustering when features are gate or up rows.

    features: (F0, anything). metric: l2, or cosine (rows are divided by their lengths first).
    """
    return groups(balanced_kmeans(features, num_experts, metric, draws), num_experts)


def groups(labels: Tensor, num_groups: int) -> Tensor:
    """(num_groups, N / num_groups): the points of each label, in order. labels: (N,), each label equally often."""
    return torch.sort(labels, stable=True).indices.view(num_groups, -1)


def balanced_kmeans(points: Tensor, num_clusters: int, metric: str, draws: torch.Generator) -> Tensor:
    """(N,) int64: k-means (Lloyd, k-means++ start) whose clusters all have N / C points. The best of its rounds.

    The paper's code solves each assignment as a minimum-cost flow; here it is `balanced_assignment`, which needs no solver.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if metric == "cosine":
        points = points / points.norm(dim=1, keepdim=True).clamp(min=torch.finfo(points.dtype).tiny)
    squares = points.square().sum(1)
    centers = points[_plus_plus(points, squares, num_clusters, draws)]
    best, least, labels = None, float("inf"), None
    for _ in range(_ROUNDS):
        distances = _squared_distances(points, squares, centers)
        previous, labels = labels, balanced_assignment(distances)
        total = float(distances.gather(1, labels[:, None]).sum(dtype=torch.float64))
        if total < least:
            best, least = labels, total
        if previous is not None and torch.equal(previous, labels):
            break
        centers = one_hot(labels, num_clusters).to(points.dtype).T @ points / (len(labels) // num_clusters)
        if metric == "cosine":
            centers = centers / centers.norm(dim=1, keepdim=True).clamp(min=torch.finfo(points.dtype).tiny)
    if best is None:
        raise ValueError("clusters: the weights or activations have values that are not finite")
    return best


def balanced_assignment(cost: Tensor) -> Tensor:
    """(N,) int64: a cluster for each point, each cluster N / C times, at small cost. cost: (N, C).

    In rounds: every free point asks for its cheapest open cluster, which takes the cheapest of those that ask, as many as it has room for.
    Every round fills a cluster or places everybody, so there are at most C. Among equals the lower point wins: the result is determined.
    """
    num_points, num_clusters = cost.shape
    room = [num_points // num_clusters] * num_clusters
    labels = torch.full((num_points,), -1)
    cost = cost.clone()
    while (free := (labels < 0).nonzero()[:, 0]).numel():
        price, choice = cost[free].min(1)
        for cluster in choice.unique().tolist():
            asking = choice == cluster
            order = torch.sort(price[asking], stable=True).indices[: room[cluster]]
            labels[free[asking][order]] = cluster
            room[cluster] -= order.numel()
            if room[cluster] == 0:
                cost[:, cluster] = float("inf")
    return labels


def _plus_plus(points: Tensor, squares: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """(count,) points to start from, each drawn in proportion to its squared distance from those before it."""
    chosen = [int(torch.randint(points.shape[0], (1,), generator=draws))]
    nearest = _squared_distances(points, squares, points[chosen])[:, 0]
    for _ in range(count - 1):
        weight = nearest.double().clamp(min=0)
        weight[chosen] = 0
        if not torch.isfinite(weight).all():
            raise ValueError("clusters: the weights or activations have values that are not finite")
        if weight.sum() == 0:  # only repetitions are left
            weight = torch.ones_like(weight)
            weight[chosen] = 0
        # A draw by hand: torch.multinomial takes no more than 2^24 points.
        place = torch.rand((), generator=draws, dtype=torch.float64) * weight.sum()
        chosen.append(min(int(torch.searchsorted(weight.cumsum(0), place, right=True)), points.shape[0] - 1))
        nearest = torch.minimum(nearest, _squared_distances(points, squares, points[chosen[-1:]])[:, 0])
    return torch.tensor(chosen)


def _squared_distances(points: Tensor, squares: Tensor, centers: Tensor) -> Tensor:
    """(N, C). squares: (N,), of the points' lengths."""
    return (squares[:, None] - 2 * points @ centers.T + centers.square().sum(1)).clamp(min=0)
