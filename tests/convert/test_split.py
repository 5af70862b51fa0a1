"""The experts of a cut FFN add up to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moetrain.convert.split import split_ffn


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
