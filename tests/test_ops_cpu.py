"""Proves the operators of csrc/ops_cpu.cpp that a router is made of: values, gradients, order of sums, refusals. (The experts': test_ops.py.)"""

import re

import pytest
import torch

from moetrain import ops
from moetrain.moe.weights import share

SIZES = [(0, 5, 7), (1, 1, 1), (9, 0, 3), (70, 40, 8), (64, 512, 64), (200, 513, 65), (129, 1100, 130), (300, 130, 1)]  # T, D, E


@pytest.fixture(autouse=True)
def brgemm(request):
    if "wide" in request.node.name and not ops.has_experts(torch.device("cpu"), torch.float32):
        pytest.skip("this torch or processor has no brgemm for float32")


def wide_case(T, D, E):
    generator = torch.Generator().manual_seed(T + D + E)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(T, D).bfloat16(), draw(E, D), draw(T, E)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_wide_linear(sizes):
    """Products of the bfloat16 numbers as they are, summed in float32; grad_x is rounded once."""
    x, weight, grad = wide_case(*sizes)
    depth = max(1, sizes[1])
    torch.testing.assert_close(ops.wide_linear(x, weight).double(), x.double() @ weight.double().T, rtol=1e-5, atol=2e-6 * depth**0.5)
    grad_x, grad_weight = ops.wide_linear_backward(grad, x, weight)
    assert grad_x.dtype == torch.bfloat16
    torch.testing.assert_close(grad_x.double(), grad.double() @ weight.double(), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(grad_weight.double(), grad.double().T @ x.double(), rtol=1e-5, atol=2e-6 * max(1, sizes[0]) ** 0.5)
    for needs in ((True, False), (False, True), (False, False)):
        part = ops.wide_linear_backward(grad, x, weight, needs)
        for found, whole, needed in zip(part, (grad_x, grad_weight), needs, strict=True):
            assert torch.equal(found, whole) if needed else found.shape == (0,)


def test_wide_linear_of_a_row_is_its_own():
    """Whatever other tokens are in the batch, to the bit: decisions can be made again for part of it."""
    x, weight, grad = wide_case(200, 700, 70)
    logits, (grad_x, _) = ops.wide_linear(x, weight), ops.wide_linear_backward(grad, x, weight)
    for part in (slice(0, 1), slice(3, 150), slice(199, 200)):
        assert torch.equal(ops.wide_linear(x[part], weight), logits[part])
        assert torch.equal(ops.wide_linear_backward(grad[part], x[part], weight)[0], grad_x[part])


def test_threads_do_not_change_a_bit():
    x, weight, grad = wide_case(700, 600, 65)
    mask = grad > 0.5
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            both = () if not ops.has_experts(x.device, torch.float32) else (ops.wide_linear(x, weight), *ops.wide_linear_backward(grad, x, weight))
            results.append([*both, ops.largest(grad, 9), ops.share(grad.exp(), mask), ops.share_backward(grad, grad.exp(), mask), *ops.count(mask)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (3, 1), (50, 16), (40, 33), (9, 300)], ids=str)
def test_largest(shape):
    """As a stable sort has them, ties, zeros of both signs, infinities and NaN included; of all k."""
    generator = torch.Generator().manual_seed(shape[1])
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-42, -1e-42, 3e38, torch.nan])
    for scores in (torch.randn(shape, generator=generator), ends[torch.randint(8, shape, generator=generator)]):
        expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        for k in range(0, shape[1] + 1, 1 + shape[1] // 7):
            assert torch.equal(ops.largest(scores, k), expected[:, :k])
    strided = torch.randn(shape[::-1], generator=generator).T
    assert torch.equal(ops.largest(strided, shape[1]), torch.sort(strided, dim=-1, descending=True, stable=True).indices)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (30, 1), (50, 16), (40, 33)], ids=str)
def test_share(shape):
    """Shares of the active scores and their gradient are the formula's; a sum of 0 and rows without a route give 0; what is not active may be
    anything."""
    generator = torch.Generator().manual_seed(shape[0])
    scores, grad = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    active = torch.rand(shape, generator=generator) < 0.4
    active[:1], active[1:2], scores[2:3] = False, True, 0.0
    exact = scores.double().requires_grad_()
    plain = exact * active
    total = plain.sum(-1, keepdim=True)
    expected = plain / torch.where(total > 0, total, 1)
    leaf = torch.where(active, scores, torch.nan).requires_grad_()
    found = share(leaf, active)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected, exact, grad.double())[0]
    torch.testing.assert_close(torch.autograd.grad(found, leaf, grad)[0].double(), wanted, rtol=1e-5, atol=1e-5)
    one = torch.zeros(shape, dtype=torch.bool)
    one[:, :1] = True
    assert ((ops.share(scores.clamp(min=1e-3), one) == 1) == one).all(), "a single share is 1, to the bit"


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (1, 1), (5000, 33)], ids=str)
def test_count(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    of_experts, of_tokens = ops.count(mask)
    assert of_experts.dtype == of_tokens.dtype == torch.int32
    assert of_experts.tolist() == mask.sum(0).tolist() and of_tokens.tolist() == mask.sum(1).tolist()


def test_wide_opcheck():
    """Schema, fake kernel, autograd registration and tracing, for each operator here."""
    x, weight, grad = wide_case(70, 40, 8)
    overload = lambda op: getattr(torch.ops.moetrain, op).default  # noqa: E731
    torch.library.opcheck(overload("wide_linear"), (x, weight))
    torch.library.opcheck(overload("wide_linear_backward"), (grad, x, weight, [True, False]))
    torch.library.opcheck(overload("largest"), (grad, 3))
    torch.library.opcheck(overload("share"), (grad.exp(), grad > 0))
    torch.library.opcheck(overload("share_backward"), (grad, grad.exp(), grad > 0))
    torch.library.opcheck(overload("count"), (grad > 0,))
    leaf = weight.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="moetrain::wide_linear has no gradient"):
        ops.wide_linear(x, leaf).sum().backward()


def test_wide_and_other_refusals():
    x, weight, grad = wide_case(6, 5, 4)
    for call, message in [
        (lambda: ops.wide_linear(x.float(), weight), "wide_linear: x: expected bfloat16, found float32"),
        (lambda: ops.wide_linear(x, weight.bfloat16()), "wide_linear: weight: expected float32, found bfloat16"),
        (lambda: ops.wide_linear(x, weight[:, 1:]), "wide_linear: weight: expected shape (any, 5), found (4, 4)"),
        (lambda: ops.wide_linear(x[0], weight), "wide_linear: x: expected shape (any, any), found (5)"),
        (lambda: ops.wide_linear_backward(grad[1:], x, weight), "wide_linear_backward: grad: expected shape (6, 4), found (5, 4)"),
        (lambda: ops.wide_linear_backward(grad.double(), x, weight), "wide_linear_backward: grad: expected float32, found float64"),
        (lambda: ops.largest(grad, 5), "largest: k: expected 0 to 4, found 5"),
        (lambda: ops.largest(grad, -1), "largest: k: expected 0 to 4, found -1"),
        (lambda: ops.largest(grad.double(), 1), "largest: scores: expected float32, found float64"),
        (lambda: ops.share(grad, grad), "share: active: expected bool, found float32"),
        (lambda: ops.share(grad, (grad > 0)[1:]), "share: active: expected shape (6, 4), found (5, 4)"),
        (lambda: ops.share_backward(grad[:, 1:], grad, grad > 0), "share_backward: grad: expected shape (6, 4), found (6, 3)"),
        (lambda: ops.count(grad), "count: mask: expected bool, found float32"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(f"moetrain::{message}")):
            call()
