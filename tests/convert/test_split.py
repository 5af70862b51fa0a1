"""The experts of a cut FFN add up to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moetrain.convert.split import balanced_assignment, cluster_partition, generator, random_partition, split_ffn


@pytest.mark.parametrize("num_experts", [1, 2, 3, 12])
def test_experts_add_up_to_the_dense_ffn(num_experts):
    torch.manual_seed(0)
    D, F0, T = 5, 12, 7
    gate, up, down, x = (torch.randn(*s, dtype=torch.float64) for s in ((F0, D), (F0, D), (D, F0), (T, D)))
    gate_up, down_e = split_ffn(gate, up, down, num_experts)
    f = F0 // num_experts
    assert gate_up.shape == (num_experts, 2 * f, D) and down_e.shape == (num_experts, D, f)
    total = torch.zeros(T, D, dtype=torch.float64)
    for e in range(num_experts):
        g, u = gate_up[e, :f], gate_up[e, f:]
        # Contiguous slices, in order.
        assert (
            torch.equal(g, gate[e * f : (e + 1) * f])
            and torch.equal(u, up[e * f : (e + 1) * f])
            and torch.equal(down_e[e], down[:, e * f : (e + 1) * f])
        )
        total += (F.silu(x @ g.T) * (x @ u.T)) @ down_e[e].T
    assert torch.allclose(total, (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=0, atol=1e-12)


def test_uneven_cut_names_what_would_do():
    with pytest.raises(ValueError, match=r"num_experts \(5\) does not divide intermediate_size \(12\).*nearest that does: 4"):
        split_ffn(torch.zeros(12, 3), torch.zeros(12, 3), torch.zeros(3, 12), 5)


def ffn_sum(gate_up, down, x):
    """Plainly: the experts' outputs added up."""
    f = gate_up.shape[1] // 2
    return sum((F.silu(x @ g[:f].T) * (x @ g[f:].T)) @ d.T for g, d in zip(gate_up, down))


@pytest.mark.parametrize("num_experts", [1, 3, 12, 24])
@pytest.mark.parametrize("kind", ["random", "gate l2", "gate cosine", "up l2", "equal rows"])
def test_every_partition_adds_up(kind, num_experts):
    """All gates at 1: the dense FFN, whichever neurons go together; each neuron once; the same draws give the same cut."""
    torch.manual_seed(1)
    D, F0 = 5, 24
    gate, up, down, x = (torch.randn(*s, dtype=torch.float64) for s in ((F0, D), (F0, D), (D, F0), (7, D)))
    if kind == "equal rows":
        gate = gate[:1].expand(F0, D).contiguous()

    def cut():
        draws = generator(3, "layers.0.ffn")
        if kind == "random":
            return random_partition(F0, num_experts, draws)
        return cluster_partition(up if kind.startswith("up") else gate, num_experts, "cosine" if "cosine" in kind else "l2", draws)

    partition = cut()
    assert partition.shape == (num_experts, F0 // num_experts) and partition.flatten().sort().values.tolist() == list(range(F0))
    assert torch.equal(partition, cut())
    parts = split_ffn(gate, up, down, num_experts, partition)
    assert (ffn_sum(*parts, x) - (F.silu(x @ gate.T) * (x @ up.T)) @ down.T).abs().max() <= 1e-12
    first = partition[-1, 0]
    assert torch.equal(parts[0][-1, 0], gate[first]) and torch.equal(parts[1][-1, :, 0], down[:, first])


def test_clusters_find_what_is_there():
    """Four groups far apart, shuffled: exactly they come out. By cosine also when every row has another length."""
    torch.manual_seed(0)
    centers = torch.eye(4) * 50
    truth = torch.arange(256).remainder(4)[torch.randperm(256)]
    points = centers[truth] + torch.randn(256, 4)
    for metric, rows in (("l2", points), ("cosine", points * torch.rand(256, 1).add(0.1))):
        partition = cluster_partition(rows, 4, metric, generator(0, "x"))
        assert sorted(truth[p].unique().tolist() for p in partition) == [[0], [1], [2], [3]]


def test_balanced_assignment():
    """Everybody's first choice is cluster 0: the two that want it most get it, the others their next best; ties go to the lower point."""
    cost = torch.tensor([[0.3, 1.0, 2.0], [0.1, 1.0, 2.0], [0.2, 9.0, 1.0], [0.4, 1.0, 2.0], [0.5, 5.0, 6.0], [0.6, 5.0, 4.0]])
    assert balanced_assignment(cost).tolist() == [1, 0, 0, 1, 2, 2]
    assert balanced_assignment(torch.zeros(6, 3)).tolist() == [0, 0, 1, 1, 2, 2]
    assert balanced_assignment(torch.zeros(256, 256)).sort().values.tolist() == list(range(256))


def test_clusters_refuse_nan():
    with pytest.raises(ValueError, match="not finite"):
        cluster_partition(torch.full((4, 3), float("nan")), 2, "l2", generator(0, "x"))
