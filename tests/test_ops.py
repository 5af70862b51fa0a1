"""Proves moetrain.ops: each op equals a slow reference in value and gradient, on awkward sizes and dtypes.

Devices: the CPU, and CUDA where there is one (marker `gpu`). The CUDA sources are compiled wherever nvcc is.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import ops
from tests import reference_ops as reference

ROOT = Path(__file__).resolve().parent.parent


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("moetrain::route", "CUDA"):
        return "moetrain was built without CUDA"
    return None


CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(_why_no_cuda() is not None, reason=str(_why_no_cuda()))],
)
on_every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
in_every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)

# name: (T, E, which routes)
MASKS = {
    "no tokens": (0, 3, "random"),
    "no experts": (4, 0, "random"),
    "no routes": (5, 3, "none"),
    "one expert": (9, 1, "random"),
    "one token": (1, 7, "random"),
    "all on one": (17, 4, "all on one"),
    "an idle expert": (33, 8, "an idle expert"),
    "every route": (7, 5, "every"),
    "many experts": (40, 300, "random"),
    "word edge": (130, 33, "random"),
}
DIMS = [1, 7, 33, 129, 64]
on_every_mask = pytest.mark.parametrize("name", MASKS)


def make_mask(name: str) -> torch.Tensor:
    num_tokens, num_experts, kind = MASKS[name]
    generator = torch.Generator().manual_seed(len(name))
    mask = torch.rand(num_tokens, num_experts, generator=generator) < 0.3
    if kind == "none":
        mask[:] = False
    elif kind == "every":
        mask[:] = True
    elif kind == "all on one":
        mask[:] = False
        mask[:, 2] = True
    elif kind == "an idle expert":
        mask[:, 3] = False
    return mask


@functools.cache
def has_float16(device: str) -> bool:
    """CUDA does, the CPU does not; the CUDA kernels emulated on the CPU do (tests/emulation)."""
    try:
        ops.swiglu(torch.empty(0, 2, device=device, dtype=torch.float16))
    except RuntimeError:
        return False
    return True


class Case:
    """The routes of a mask, and random data for them, on one device in one dtype."""

    def __init__(self, mask: torch.Tensor, device: str, dtype: torch.dtype, seed: int = 0):
        if dtype == torch.float16 and not has_float16(device):
            pytest.skip("no float16 on the CPU")
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.num_tokens, self.num_routes = mask.shape[0], int(mask.sum())
        self.route = ops.route(mask.to(device), self.num_routes)
        self.tokens, self.counts, self.row_offsets, self.positions = self.route
        self.index = (self.tokens, self.row_offsets, self.positions)

    def data(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def weights(self) -> torch.Tensor:
        weights = torch.randn(self.num_routes, generator=self.generator)
        return weights.to(self.device, ops.acc_dtype(self.dtype))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` is float64. Allowed: one rounding to the result's dtype, and a few in the sums before it."""
    assert actual.shape == expected.shape
    sums = torch.finfo(ops.acc_dtype(actual.dtype)).eps
    largest = expected.abs().max().item() if expected.numel() else 0.0
    bound = 0.501 * torch.finfo(actual.dtype).eps * expected.abs() + 32 * sums * (1 + largest)
    if actual.dtype == torch.float16:
        bound += 2.0**-24  # subnormals
    error = (actual.detach().cpu().double() - expected).abs()
    worst = (error - bound).max().item() if error.numel() else -1.0
    assert worst <= 0, f"off by {error.max().item()}, {worst} more than allowed"


# --- values ---


@on_every_device
@on_every_mask
def test_route_equals_reference(name, device):
    mask = make_mask(name)
    found = ops.route(mask.to(device), int(mask.sum()))
    expected = reference.route(mask)
    for key, a, b in zip(("tokens", "counts", "row_offsets", "positions"), found, expected, strict=True):
        if key == "counts" and mask.shape[0] == 0:
            b = torch.zeros(mask.shape[1], dtype=torch.int32)  # the reference can't see E in an empty list
        assert a.dtype == torch.int32 and a.device.type == device
        assert torch.equal(a.cpu(), b), key
    tokens, _, row_offsets, positions = found
    lengths = (row_offsets[1:] - row_offsets[:-1]).long()
    owners = torch.repeat_interleave(torch.arange(mask.shape[0], device=device), lengths)
    assert torch.equal(tokens[positions.long()].long(), owners)


@on_every_device
@pytest.mark.parametrize("spare", [0, 1, 300])
@on_every_mask
def test_route_with_room(name, spare, device):
    """The list without padding, then zeros; rows of padding reach no token and no gradient."""
    mask = make_mask(name)
    num_routes = int(mask.sum())
    if not mask.shape[0]:
        with pytest.raises(RuntimeError, match="route: num_routes: expected 0 to 0"):
            ops.route(mask.to(device), 1, padded=True)
        return
    exact, padded = ops.route(mask.to(device), num_routes), ops.route(mask.to(device), num_routes + spare, padded=True)
    for key, a, b in zip(("tokens", "counts", "row_offsets", "positions"), exact, padded, strict=True):
        assert torch.equal(a, b[:num_routes] if key in ("tokens", "positions") else b), key
        assert b.shape[0] - a.shape[0] == (spare if key in ("tokens", "positions") else 0) and not b[a.shape[0] :].any(), key
    x = torch.randn(mask.shape[0], 5, device=device).requires_grad_()
    rows = ops.permute(x, padded[0], *padded[2:])
    assert torch.equal(rows[:num_routes], x[exact[0].long()])
    poisoned = torch.cat([rows[:num_routes].detach(), rows.new_full((spare, 5), float("nan"))])
    y = ops.combine(poisoned, padded[0], *padded[2:])
    assert torch.equal(y, ops.combine(poisoned[:num_routes], exact[0], *exact[2:]))
    (grad,) = torch.autograd.grad(rows, x, poisoned)
    assert torch.equal(grad, y)


def test_route_without_enough_room():
    mask = make_mask("an idle expert")
    found = int(mask.sum())
    with pytest.raises(RuntimeError, match=f"route: num_routes: expected at least {found} .the number of ones in mask., found {found - 1}"):
        ops.route(mask, found - 1, padded=True)
    with pytest.raises(RuntimeError, match=f"route: num_routes: expected {found} .the number of ones in mask., found {found + 1}"):
        ops.route(mask, found + 1)


@on_every_device
@in_every_dtype
@on_every_mask
def test_permute_and_combine_equal_reference(name, dtype, device):
    """Both operators and their gradients, with and without weights; gradients flow to the weights too."""
    case = Case(make_mask(name), device, dtype)
    for dim in DIMS:
        x = case.data(case.num_tokens, dim).requires_grad_()
        rows = ops.permute(x, *case.index)
        assert torch.equal(rows.detach().cpu().double(), reference.permute(x.detach().cpu(), case.tokens))
        grad = case.data(case.num_routes, dim)
        (grad_x,) = torch.autograd.grad(rows, x, grad)
        assert_close(grad_x, reference.combine(grad.cpu(), case.tokens, case.num_tokens, None))

        for weights in (None, case.weights().requires_grad_()):
            rows = case.data(case.num_routes, dim).requires_grad_()
            y = ops.combine(rows, *case.index, weights)
            assert y.dtype == dtype
            assert_close(y, reference.combine(rows.detach().cpu(), case.tokens, case.num_tokens, weights))
            grad = case.data(case.num_tokens, dim)
            inputs = [rows] if weights is None else [rows, weights]
            grads = torch.autograd.grad(y, inputs, grad)
            expected = reference.combine_backward(grad.cpu(), case.tokens, rows.detach().cpu(), weights)
            for found, wanted in zip(grads, expected, strict=False):
                assert_close(found, wanted)
            assert grads[-1].dtype == (dtype if weights is None else ops.acc_dtype(dtype))


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("num_rows", [0, 1, 5, 70])
def test_swiglu_equals_reference(num_rows, dtype, device):
    """Forward, gradients, the recomputed activation and the probe's inner product; weights may be None."""
    case = Case(torch.ones(num_rows, 1, dtype=torch.bool), device, dtype)
    for dim in [*DIMS, 0, 300, 513]:
        for weights in (None, case.weights().requires_grad_()):
            gate_up = (3 * case.data(num_rows, 2 * dim)).requires_grad_()
            y = ops.swiglu(gate_up, weights)
            assert_close(y, reference.swiglu(gate_up.detach().cpu(), weights))
            grad = case.data(num_rows, dim)
            expected = reference.swiglu_backward(grad.cpu(), gate_up.detach().cpu(), weights)
            inputs = [gate_up] if weights is None else [gate_up, weights]
            for found, wanted in zip(torch.autograd.grad(y, inputs, grad), expected, strict=False):
                assert_close(found, wanted)
            with torch.no_grad():
                _, grad_weights, activation = ops.swiglu_backward(grad, gate_up, weights)
                dots = ops.swiglu_dot(grad, gate_up)
            assert torch.equal(activation, y), "the recomputed activation is the forward's, bit for bit"
            assert_close(dots, expected[1])
            if weights is None:
                assert grad_weights.shape == (0,)
            else:
                assert torch.equal(grad_weights, dots)


@on_every_device
@in_every_dtype
def test_swiglu_at_the_ends_of_the_range(dtype, device):
    """Nothing overflows inside: silu(x) is x for large x and 0 for large negative x; NaN comes through."""
    if dtype == torch.float16 and not has_float16(device):
        pytest.skip("no float16 on the CPU")
    gates = torch.tensor([0.0, -0.0, 88.0, 200.0, -88.0, -200.0, 1e4, -1e4, 1e-4, float("inf"), float("nan")])
    gate_up = torch.stack([gates, torch.ones_like(gates)], 1).to(device, dtype)
    expected = torch.nn.functional.silu(gate_up[:, :1].double())
    found = ops.swiglu(gate_up)
    torch.testing.assert_close(
        found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-30, equal_nan=True
    )
    ones = torch.ones_like(found)
    finite = slice(0, 9)
    grads, _, _ = ops.swiglu_backward(ones[finite], gate_up[finite], None)
    s = torch.sigmoid(gate_up[finite].double())
    slope = s[:, :1] * (1 + gate_up[finite, :1].double() * (1 - s[:, :1]))
    torch.testing.assert_close(grads[:, :1].double(), slope, rtol=2 * torch.finfo(dtype).eps, atol=1e-30)


def test_float32_exp_is_accurate():
    """The CPU's own exp: silu is within 4 units in the last place of float64's where it is normal."""
    x = torch.linspace(-86, 86, 400_001)
    found = ops.swiglu(torch.stack([x, torch.ones_like(x)], 1)).flatten().double()
    exact = torch.nn.functional.silu(x.double())
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-37))) - 23)
    assert ((found - exact).abs() / unit).max() < 4


def test_bfloat16_rounds_to_nearest_even():
    """Every float32 in a fine sweep rounds as torch rounds it."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(2)
    rows = torch.ones(len(x), 1, dtype=torch.bfloat16)
    index = ops.route(torch.ones(len(x), 1, dtype=torch.bool), len(x))
    found = ops.combine(rows, index[0], index[2], index[3], x)
    assert torch.equal(found.flatten(), x.to(torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 70),
    num_experts=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    dim=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 999),
)
def test_random_routes(num_tokens, num_experts, density, dim, dtype, seed):
    """permute -> swiglu -> combine on drawn sizes equals the references chained."""
    mask = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)) < density
    case = Case(mask, "cpu", dtype, seed)
    if num_tokens:
        for a, b in zip(case.route, reference.route(mask), strict=True):
            assert torch.equal(a, b)
    x, weights = case.data(num_tokens, 2 * dim), case.weights()
    rows = ops.permute(x, *case.index)
    assert torch.equal(rows.double(), reference.permute(x, case.tokens))
    out = ops.swiglu(rows)
    assert_close(out, reference.swiglu(rows, None))
    assert_close(
        ops.combine(out, *case.index, weights), reference.combine(out, case.tokens, num_tokens, weights)
    )


# --- the experts' block ---

# (N, D, F, E, probability of a route): whole blocks; odd sizes and rows that are no multiple of anything; empty experts; one row; more rows of
# an expert than one chunk or one sum takes; many experts with one route or none; nothing at all.
BLOCKS = [
    (150, 64, 64, 4, 0.5), (50, 33, 7, 6, 0.4), (40, 20, 131, 3, 0.3), (1, 16, 16, 2, 1.0), (1100, 18, 10, 2, 0.95), (64, 130, 32, 256, 0.02),
    (9, 66, 65, 3, 0.0), (0, 8, 8, 3, 1.0), (30, 320, 40, 3, 0.7), (5, 1, 1, 3, 0.9), (1500, 832, 200, 2, 0.9),
]  # fmt: skip
"""(N, D, F, E, density). The last: several chunks of an expert, groups of panels, slices of sums, depths and groups of columns."""


def experts_case(sizes, dtype):
    """(rows, gate_up, down, weights, tokens, counts), grad; the first expert has no route."""
    num_rows, dim, width, num_experts, density = sizes
    generator = torch.Generator().manual_seed(dim)
    mask = torch.rand(num_rows, num_experts, generator=generator) < density
    mask[:, 0] = False
    tokens, counts, _, _ = ops.route(mask, int(mask.sum()))

    def data(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    weights = torch.randn(len(tokens), generator=generator)
    matrices = data(num_experts, 2 * width, dim, std=dim**-0.5), data(num_experts, dim, width, std=width**-0.5)
    return (data(num_rows, dim), *matrices, weights, tokens, counts), data(num_rows, dim)


def needs_experts(dtype):
    if not ops.has_experts(torch.device("cpu"), dtype):
        pytest.skip(f"this torch or processor has no brgemm for {dtype}")


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_experts_equal_reference(sizes, dtype):
    """Output, pre-activations and every gradient, by norm and by the worst element; the probes' products too, on the same list."""
    needs_experts(dtype)
    arguments, grad = experts_case(sizes, dtype)
    rows, gate_up, down, weights, tokens, counts = arguments
    expected = reference.experts(*arguments, grad)
    found = dict(zip(("out", "pre"), ops.experts(*arguments)))
    names = ("grad_rows", "grad_gate_up", "grad_down", "grad_weights")
    found |= zip(names, ops.experts_backward(grad, *arguments[:4], found["pre"], tokens, counts))
    found["probe"], expected["probe"] = ops.experts_probe(grad, rows, gate_up, down, tokens, counts), expected["grad_weights"]
    # bfloat16: pre-activations, activations and results are rounded, each by half of 2^-8 at most; sums are float32.
    typical, worst = (2e-6, 2e-5) if dtype == torch.float32 else (1e-2, 4e-2)
    for name, value in found.items():
        assert value.shape == expected[name].shape and value.dtype == (torch.float32 if name in ("grad_weights", "probe") else dtype), name
        assert value.isfinite().all(), name
        assert relative(value, expected[name]) < typical, (name, relative(value, expected[name]))
        if value.numel():
            assert (value.double() - expected[name]).abs().max() <= worst * expected[name].abs().max(), name
    assert (found["grad_gate_up"][0] == 0).all() and (found["grad_down"][0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_through_autograd(dtype):
    """`ops.experts` under autograd gives what its backward gives; what is not needed is not computed; opcheck."""
    needs_experts(dtype)
    arguments, grad = experts_case((40, 24, 18, 3, 0.6), dtype)
    leaves = [t.clone().requires_grad_() for t in arguments[:4]]
    out, pre = ops.experts(*leaves, *arguments[4:])
    grads = torch.autograd.grad(out, leaves, grad)
    direct = ops.experts_backward(grad, *arguments[:4], pre, *arguments[4:])
    for a, b in zip(grads, direct, strict=True):
        assert torch.equal(a, b)
    for only in range(3):
        needs = tuple(i == only for i in range(3))
        part = ops.experts_backward(grad, *arguments[:4], pre, *arguments[4:], needs)
        assert [p.numel() > 0 for p in part[:3]] == list(needs) and torch.equal(part[only], direct[only]) and torch.equal(part[3], direct[3])
    overload = lambda op: getattr(torch.ops.moetrain, op).default  # noqa: E731
    torch.library.opcheck(overload("experts"), (*leaves, *arguments[4:]))
    torch.library.opcheck(overload("experts_backward"), (grad, *arguments[:4], pre.detach(), *arguments[4:], [True, False, True]))
    torch.library.opcheck(overload("experts_probe"), (grad, *arguments[:3], *arguments[4:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit_of_experts(dtype):
    """One to sixteen threads: other slices of columns and tokens, other chunks and groups, the same sums."""
    needs_experts(dtype)
    arguments, grad = experts_case((900, 576, 80, 5, 0.7), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            out, pre = ops.experts(*arguments)
            backward = ops.experts_backward(grad, *arguments[:4], pre, *arguments[4:])
            results.append([out, pre, *backward, ops.experts_probe(grad, *arguments[:3], *arguments[4:])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_experts_with_padding(sizes, dtype):
    """Routes at the end of the list that no count counts: the same bits, and 0 where a number per route is asked for."""
    needs_experts(dtype)
    (rows, gate_up, down, weights, tokens, counts), grad = experts_case(sizes, dtype)
    spare = 37 if len(rows) else 0
    more = torch.cat([tokens, tokens.new_zeros(spare)])
    heavy = torch.cat([weights, weights.new_full((spare,), float("nan"))])
    out, pre = ops.experts(rows, gate_up, down, weights, tokens, counts)
    found, kept = ops.experts(rows, gate_up, down, heavy, more, counts)
    assert torch.equal(found, out) and torch.equal(kept[: len(tokens)], pre)
    kept[len(tokens) :] = float("nan")
    want = ops.experts_backward(grad, rows, gate_up, down, weights, pre, tokens, counts)
    for a, b in zip(ops.experts_backward(grad, rows, gate_up, down, heavy, kept, more, counts), want, strict=True):
        assert torch.equal(a[: len(b)], b) and not a[len(b) :].any()
    probes, want = ops.experts_probe(grad, rows, gate_up, down, more, counts), ops.experts_probe(grad, rows, gate_up, down, tokens, counts)
    assert torch.equal(probes[: len(tokens)], want) and not probes[len(tokens) :].any()


def test_experts_refuse_wrong_arguments():
    needs_experts(torch.float32)
    arguments, grad = experts_case((12, 6, 4, 3, 0.6), torch.float32)
    rows, gate_up, down, weights, tokens, counts = arguments
    for wrong, message in [
        ((rows, gate_up[:, :6], down, weights, tokens, counts), "experts: gate_up: expected shape (3, 8, 6), found (3, 6, 6)"),
        ((rows, gate_up, down, weights[1:], tokens, counts), "experts: weights: expected shape"),
        ((rows, gate_up, down, weights, tokens + 12, counts), "experts: tokens: expected indices in [0, 12)"),
        ((rows, gate_up, down, weights, tokens.flip(0), counts), "experts: tokens: expected each expert's tokens in ascending order"),
        ((rows, gate_up, down, weights, tokens, counts + 1), f"experts: counts: expected counts >= 0 that add up to at most {len(tokens)}"),
        ((rows.double(), gate_up, down, weights, tokens, counts), "experts: rows: expected float32 or bfloat16"),
        ((rows.bfloat16(), gate_up, down, weights, tokens, counts), "experts: gate_up: expected bfloat16, found float32"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.experts(*wrong)
    assert not ops.has_experts(torch.device("cpu"), torch.float64) and not ops.has_experts(torch.device("meta"), torch.float32)


# --- gradients and the dispatcher ---


@pytest.mark.parametrize("name", ["no routes", "one expert", "an idle expert", "every route"])
def test_gradcheck(name):
    """Numerical differentiation in float64 through each operator, and twice through the linear ones."""
    case = Case(make_mask(name)[:12], "cpu", torch.float64)
    x = case.data(case.num_tokens, 3).requires_grad_()
    rows = case.data(case.num_routes, 3).requires_grad_()
    gate_up = case.data(case.num_routes, 6).requires_grad_()
    weights = case.weights().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, *case.index), (x,))
    assert torch.autograd.gradgradcheck(
        lambda x: ops.permute(ops.combine(x, *case.index), *case.index), (rows,)
    )
    assert torch.autograd.gradcheck(lambda rows: ops.combine(rows, *case.index), (rows,))
    assert torch.autograd.gradcheck(lambda rows, w: ops.combine(rows, *case.index, w), (rows, weights))
    assert torch.autograd.gradcheck(ops.swiglu, (gate_up,))
    assert torch.autograd.gradcheck(ops.swiglu, (gate_up, weights))


def test_second_derivative_is_refused():
    """A derivative that isn't there must not come back as nothing."""
    gate_up = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.swiglu(gate_up).sum(), gate_up, create_graph=True)
    with pytest.raises(NotImplementedError, match="moetrain::swiglu_backward has no gradient"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="moetrain::swiglu_dot has no gradient"):
        ops.swiglu_dot(torch.randn(3, 2), gate_up).sum().backward()


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("name", ["no tokens", "no routes", "an idle expert"])
def test_opcheck(name, dtype, device):
    """Schema, fake kernel, autograd registration and tracing, for each operator."""
    mask = make_mask(name)
    case = Case(mask, device, dtype)
    routes, dim = case.num_routes, 6
    overload = lambda op: getattr(torch.ops.moetrain, op).default  # noqa: E731
    grad = lambda tensor: tensor.requires_grad_()  # noqa: E731
    torch.library.opcheck(overload("route"), (mask.to(device), routes))
    torch.library.opcheck(overload("route"), (mask.to(device), routes + 5 * bool(len(mask)), True))
    torch.library.opcheck(overload("permute"), (grad(case.data(case.num_tokens, dim)), *case.index))
    for weights in (None, case.weights()):
        tracked = None if weights is None else grad(weights.clone())
        rows = case.data(routes, dim)
        torch.library.opcheck(overload("combine"), (grad(rows.clone()), *case.index, tracked))
        torch.library.opcheck(overload("swiglu"), (grad(rows.clone()), tracked))
        upstream = case.data(case.num_tokens, dim)
        torch.library.opcheck(
            overload("combine_backward"), (upstream, case.tokens, None if weights is None else rows, weights)
        )
        torch.library.opcheck(overload("swiglu_backward"), (case.data(routes, dim // 2), rows, weights))
    torch.library.opcheck(overload("swiglu_dot"), (case.data(routes, dim // 2), rows))


@on_every_device
def test_compile_traces_the_whole_layer(device):
    """One graph without breaks, forward and backward, equal to eager; a second number of routes reuses it."""

    def layer(x, weights, tokens, row_offsets, positions):
        rows = ops.permute(x, tokens, row_offsets, positions)
        return ops.combine(ops.swiglu(rows), tokens, row_offsets, positions, weights)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for name in ("an idle expert", "word edge"):
        case = Case(make_mask(name), device, torch.float32)
        x, weights = case.data(case.num_tokens, 10).requires_grad_(), case.weights().requires_grad_()
        grad = case.data(case.num_tokens, 5)
        outputs = []
        for run in (layer, compiled):
            y = run(x, weights, *case.index)
            outputs.append((y, *torch.autograd.grad(y, (x, weights), grad)))
        for eager, traced in zip(*outputs, strict=True):
            assert torch.equal(eager, traced)


def test_strided_arguments():
    """Views with gaps, transposed or expanded, give what their contiguous copies give."""
    case = Case(make_mask("an idle expert"), "cpu", torch.float32)
    x = case.data(6, case.num_tokens).t()
    rows = ops.permute(x, *case.index)
    assert torch.equal(rows, ops.permute(x.contiguous(), *case.index))
    wide = case.data(case.num_routes, 20)
    assert torch.equal(ops.swiglu(wide[:, 3:11]), ops.swiglu(wide[:, 3:11].contiguous()))
    mask = make_mask("an idle expert").t()
    for a, b in zip(
        ops.route(mask, int(mask.sum())), ops.route(mask.contiguous(), int(mask.sum())), strict=True
    ):
        assert torch.equal(a, b)
    gate_up = wide.clone().requires_grad_()
    ops.swiglu(gate_up).sum().backward()  # an expanded gradient
    expected, _, _ = ops.swiglu_backward(torch.ones(case.num_routes, 10), wide, None)
    assert torch.equal(gate_up.grad, expected)


def test_threads_do_not_change_a_bit():
    """One thread and two give identical results; sizes are large enough to be split."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(700, 300, generator=generator) < 0.01
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            case = Case(mask, "cpu", torch.float32)
            x, weights, grad = case.data(700, 130), case.weights(), case.data(700, 65)
            rows = ops.permute(x, *case.index)
            out = ops.swiglu(rows, weights)
            grad_rows, grad_weights = ops.combine_backward(grad, case.tokens, out, weights)
            y = ops.combine(out, *case.index, weights)
            backward = ops.swiglu_backward(grad_rows, rows, weights)
            dots = ops.swiglu_dot(grad_rows, rows)
            results.append([*case.route, rows, out, y, grad_rows, grad_weights, *backward, dots])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# --- errors ---


@pytest.mark.parametrize("off", [-1, 1])
def test_wrong_number_of_routes(off):
    mask = make_mask("an idle expert")
    right = int(mask.sum())
    with pytest.raises(RuntimeError, match=rf"route: num_routes: expected {right} .*found {right + off}"):
        ops.route(mask, right + off)
    with pytest.raises(RuntimeError, match="route: num_routes: expected 0 to 264 .*found -1"):
        ops.route(mask, -1)


def test_wrong_dtypes_and_shapes_name_the_tensor():
    """Each message has the operator, the argument, what was expected and what was found."""
    case = Case(make_mask("an idle expert"), "cpu", torch.float32)
    tokens, row_offsets, positions = case.index
    routes, x = case.num_routes, case.data(case.num_tokens, 4)
    rows = case.data(routes, 4)
    half, weights = case.data(routes, 2), case.weights()
    wrong = [
        (ops.route, (torch.ones(2, 2), 4), "route: mask: expected bool, found float32"),
        (ops.route, (torch.ones(2).bool(), 2), "route: mask: expected shape (any, any), found (2)"),
        (
            ops.permute,
            (x, tokens.long(), row_offsets, positions),
            "permute: tokens: expected int32, found int64",
        ),
        (ops.permute, (x[:-1], *case.index), "permute: row_offsets: expected shape (33), found (34)"),
        (
            ops.permute,
            (x, tokens + 1, row_offsets, positions),
            "permute: tokens: expected indices in [0, 33), found 33",
        ),
        (
            ops.combine,
            (rows[1:], *case.index),
            f"combine: tokens: expected shape ({routes - 1}), found ({routes})",
        ),
        (
            ops.combine,
            (rows, tokens, row_offsets, positions - 1),
            "combine: positions: expected indices in [0",
        ),
        (
            ops.combine,
            (rows, tokens, row_offsets + 1, positions),
            "combine: row_offsets: expected offsets that rise",
        ),
        (
            ops.combine,
            (rows, *case.index, weights[1:]),
            f"weights: expected shape ({routes}), found ({routes - 1})",
        ),
        (
            ops.combine,
            (rows, *case.index, weights.double()),
            "combine: weights: expected float32, found float64",
        ),
        (
            ops.combine_backward,
            (x, tokens, half, None),
            f"rows: expected shape ({routes}, 4), found ({routes}, 2)",
        ),
        (
            ops.swiglu,
            (rows[:, :3],),
            f"gate_up: expected an even number of columns, gate | up, found ({routes}, 3)",
        ),
        (ops.swiglu_backward, (rows, rows, None), f"grad: expected shape ({routes}, 2), found ({routes}, 4)"),
        (ops.swiglu_dot, (half.double(), rows), "swiglu_dot: grad: expected float32, found float64"),
    ]
    for op, arguments, message in wrong:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(*arguments)


def test_float16_is_refused_on_the_cpu():
    message = "swiglu: gate_up: expected float32, bfloat16 or float64 (on the CPU), found float16"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.swiglu(torch.zeros(3, 4, dtype=torch.float16))


# --- the build ---


def test_cuda_sources_compile():
    """Every .cu compiles for every architecture we name, on the stable ABI, whatever torch is installed."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    # The script asks `python` for torch's headers: this one, also when its environment is not the active one.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(["bash", str(ROOT / "csrc" / "compile_cuda.sh")], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        assert f"cuda/{source.name} sm_80 sm_90a sm_100 ok" in result.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_demanding_cuda_without_it_is_one_clear_line():
    environment = {**os.environ, "MOETRAIN_CUDA": "1"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert result.stderr.strip().startswith("moetrain: MOETRAIN_CUDA=1, but torch")
    assert len(result.stderr.strip().splitlines()) == 1
