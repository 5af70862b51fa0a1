"""Logits in float32 of bfloat16 hidden states: values, gradients, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from moetrain import ops
from moetrain.moe.wide import wide_linear


@pytest.fixture(params=["operator", "pieces"], autouse=True)
def way(request, monkeypatch):
    """Our operator, where this torch and processor have it; and torch's products, piece by piece."""
    if request.param == "pieces":
        monkeypatch.setattr(ops, "has_experts", lambda device, dtype: False)
    elif not ops.has_experts(torch.device("cpu"), torch.float32):
        pytest.skip("this torch or processor has no brgemm for float32")


@pytest.mark.parametrize("rows", [0, 3, 1300])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_linear_layer_of_wide_numbers(rows, bias):
    """float32 sums of products of the bfloat16 numbers as they are, in pieces or not; gradients rounded once, to the type of what they are of."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 40, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(7, 40, generator=generator).requires_grad_()
    offset = torch.randn(7, generator=generator).requires_grad_() if bias else None
    leaves = [x, weight, *([offset] if bias else [])]
    grad = torch.randn(rows, 7, generator=generator)
    logits = wide_linear(*leaves)
    found = torch.autograd.grad(logits, leaves, grad)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(linear(*exact), exact, grad.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), linear(*exact), rtol=1e-5, atol=1e-5)
    for leaf, a, b in zip(leaves, found, expected, strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a.double(), b, rtol=2**-8 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_only_wanted_gradients():
    x, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(3, 8).requires_grad_()
    both = torch.autograd.grad(wide_linear(x, weight).sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(wide_linear(x, weight.detach()).sum(), x)[0], both[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(wide_linear(x.detach(), weight).sum(), weight)[0], both[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_hidden_states_are_kept_as_they_are(dtype):
    """Nothing of the size of x but x itself is kept for backward."""
    x, weight = torch.randn(64, 32, dtype=dtype).requires_grad_(), torch.randn(4, 32, dtype=dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        wide_linear(x, weight)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]
