"""Splits that look at data: one pass of the dense model over a few sequences, one sequence at a time.

Memory: the whole dense model (importance: and the activations of one sequence for backward), and what is collected. Everything else in
convert/ streams; this does not, since importance needs a backward pass. Letters: T tokens, D model dim, F0 intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import ModelConfig, UpcycleConfig
from moetrain.convert.huggingface import read_tensors
from moetrain.convert.split import balanced_assignment, balanced_kmeans, cluster_partition, generator, groups
from moetrain.data.dataset import EvalSet
from moetrain.model import Transformer

FIRING_SHARE = 0.1
"""A SwiGLU neuron is never exactly 0; it counts as firing when |h| is among this share of the token's largest."""


@dataclass(frozen=True)
class Calibration:
    """By layer. shared: (F_s,) the neurons that become a shared FFN, in order; empty without `shared_dim`. partitions: (E, F) neurons of each
    expert, numbered among those that are left; None where the split does not look at data."""

    shared: list[Tensor]
    partitions: list[Tensor] | None


def calibrate(config: UpcycleConfig, dense: ModelConfig) -> Calibration:
    """What the data says of each layer. ValueError for data that is missing, too short, or of another vocabulary."""
    assert config.calibration is not None, "config.check refuses this"
    seq_len = min(config.calibration_seq_len, dense.max_position_embeddings)
    data = EvalSet("calibration", config.calibration, seq_len, True, config.calibration_sequences, vocab_size=dense.vocab_size)
    if config.split == "importance" and len(data) < config.num_experts:
        raise ValueError(
            f"upcycle.calibration ({config.calibration}): {len(data)} sequences of {seq_len} tokens can't be shared by num_experts "
            f"({config.num_experts}); give more data, or a smaller calibration_seq_len"
        )
    model = Transformer(dense)
    for name, tensor in read_tensors(config.dense, dense):
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.data = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    model.eval()
    samples = [data[i] for i in range(len(data))]
    sequences = [
        {field: torch.from_numpy(getattr(s, field).copy())[None] for field in ("tokens", "labels", "positions", "document_ids")} for s in samples
    ]
    clusters, num_clusters = torch.zeros(len(sequences), dtype=torch.int64), 1
    if config.split == "importance":
        num_clusters = config.num_experts
        clusters = sequence_clusters(model, sequences, num_clusters, generator(config.seed, "calibration"))
    values: list[Tensor] = []
    if config.split == "importance" or config.shared_dim is not None:
        values = importance(model, sequences, clusters, num_clusters)
    shared = [torch.empty(0, dtype=torch.int64)] * dense.num_layers
    if config.shared_dim is not None:
        shared = [most_important(v, config.shared_dim) for v in values]
    rest = [remaining(dense.intermediate_size, s) for s in shared]
    partitions = None
    if config.split == "importance":
        partitions = [importance_partition(v[:, r]) for v, r in zip(values, rest)]
    elif config.split == "coactivation":
        draws = [generator(config.seed, f"layers.{i}.ffn.partition") for i in range(dense.num_layers)]
        fired = firing(model, sequences)
        partitions = [cluster_partition(f[r], config.num_experts, "cosine", d) for f, r, d in zip(fired, rest, draws)]
    return Calibration(shared, partitions)


def most_important(values: Tensor, count: int) -> Tensor:
    """(count,) neurons in order. values: (C, F0), the importance in each cluster of the data, of which the mean counts (clusters are of about
    one size)."""
    order = torch.sort(values.mean(0), descending=True, stable=True).indices
    return order[:count].sort().values


def remaining(intermediate_size: int, shared: Tensor) -> Tensor:
    """The neurons that are not shared, in order."""
    left = torch.ones(intermediate_size, dtype=torch.bool)
    left[shared] = False
    return left.nonzero()[:, 0]


def firing(model: Transformer, sequences: list[dict[str, Tensor]]) -> list[Tensor]:
    """(F0, T) bool by layer: on which tokens a neuron fires. The cosine of two rows is their co-activation count over the geometric mean of
    their own counts, the graph that LLaMA-MoE cuts (algorithms: METIS there, balanced k-means here)."""
    found: list[list[Tensor]] = [[] for _ in model.layers]
    count = max(1, round(FIRING_SHARE * model.config.intermediate_size))

    def see(layer: int, h: Tensor, valid: Tensor) -> None:
        size = h.abs()[valid]
        top = torch.topk(size, count, dim=1).indices
        found[layer].append(torch.zeros_like(size, dtype=torch.bool).scatter(1, top, True).T)

    with torch.no_grad():
        for sequence in sequences:
            with _neurons(model, sequence, see):
                _run(model, sequence, labels=False)
    return [torch.cat(parts, dim=1) for parts in found]


def importance(model: Transformer, sequences: list[dict[str, Tensor]], clusters: Tensor, num_clusters: int) -> list[Tensor]:
    """(C, F0) by layer: mean over the tokens of each cluster of sequences of |h . dL/dh|, the loss's first-order change when the neuron is
    removed (LLaMA-MoE's feature change, per token; L the summed cross-entropy). clusters: (sequences,)."""
    size = (num_clusters, model.config.intermediate_size)
    found = [torch.zeros(size, dtype=torch.float64) for _ in model.layers]
    tokens = torch.zeros(num_clusters, dtype=torch.float64)
    for sequence, cluster in zip(sequences, clusters.tolist()):

        def see(layer: int, h: Tensor, valid: Tensor, cluster: int = cluster) -> None:
            def add(grad: Tensor) -> None:
                found[layer][cluster] += (h.detach() * grad)[valid].abs().sum(0, dtype=torch.float64)

            h.register_hook(add)

        with _neurons(model, sequence, see), torch.enable_grad():
            loss = _run(model, sequence, labels=True)
            assert loss is not None, "a run with labels"
            loss.backward()
        tokens[cluster] += _valid(sequence).sum()
    return [f / tokens.clamp(min=1)[:, None] for f in found]


def sequence_clusters(model: Transformer, sequences: list[dict[str, Tensor]], count: int, draws: torch.Generator) -> Tensor:
    """(sequences,) int64: groups of equal size (up to one) by the mean embedding of their tokens."""
    means = torch.stack([model.embed.weight[s["tokens"][0][_valid(s)]].mean(0).nan_to_num() for s in sequences])
    # Balanced clusters need a multiple; the last ones join the nearest mean of the others.
    whole = len(sequences) // count * count
    labels = balanced_kmeans(means[:whole], count, "cosine", draws)
    centers = means[:whole][groups(labels, count)].mean(1)
    rest = torch.cdist(means[whole:], centers).argmin(1)
    return torch.cat((labels, rest))


def importance_partition(values: Tensor) -> Tensor:
    """(E, F): each neuron to the cluster of data that has the greatest share in its importance, experts of equal size.

    values: (E, F0). LLaMA-MoE's Sharing-Inner lets each cluster take its most important neurons, several of them the same; here each goes to
    one, so that the experts still add up to the dense FFN.
    """
    values = values / values.sum(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    share = values / values.sum(0).clamp(min=torch.finfo(values.dtype).tiny)
    return groups(balanced_assignment(-share.T), values.shape[0])


def _valid(sequence: dict[str, Tensor]) -> Tensor:
    """(S,) bool: padding is a document of its own without labels; the last token of a document is left out with it."""
    return sequence["labels"][0] >= 0


def _run(model: Transformer, sequence: dict[str, Tensor], labels: bool) -> Tensor | None:
    given = {"labels": sequence["labels"]} if labels else {}
    return model(sequence["tokens"], positions=sequence["positions"], document_ids=sequence["document_ids"], **given).loss_sum


@contextmanager
def _neurons(model: Transformer, sequence: dict[str, Tensor], see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While it is open, `see` gets (layer, h (S, F0), counting tokens (S,)) of a forward pass; h has a gradient where gradients are on."""
    valid = _valid(sequence)
    hooks = [
        block.ffn.down_proj.register_forward_pre_hook(lambda _, inputs, i=i: see(i, inputs[0], valid)) for i, block in enumerate(model.layers)
    ]
    # Weights have no gradient, so the first tensor of the graph must ask for one.
    hooks.append(model.embed.register_forward_hook(lambda _, __, output: output.requires_grad_(torch.is_grad_enabled())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
