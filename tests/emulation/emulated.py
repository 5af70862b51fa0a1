"""What is asked of the emulated kernels alone. tests/test_emulation.py runs it, with tests.emulation.plugin, and the operators' own tests."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moetrain import ops
from tests import reference_ops as reference
from tests.test_ops import Case, assert_close, make_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LIBRARY = ctypes.CDLL(sys.modules["moetrain._C"].__file__)
LIBRARY.emulator_seed.argtypes = [ctypes.c_uint64]


def everything(case: Case, mask: Tensor, dim: int) -> Iterator[tuple[str, Tensor]]:
    """What all kernels compute of a case, by name."""
    case.generator.manual_seed(1)
    x, weights, grad = case.data(case.num_tokens, 2 * dim), case.weights(), case.data(case.num_tokens, dim)
    yield from zip(("tokens", "counts", "row_offsets", "positions"), ops.route(mask, case.num_routes))
    rows = ops.permute(x, *case.index)
    yield "permute", rows
    out = ops.swiglu(rows, weights)
    yield "swiglu", out
    yield "combine", ops.combine(out, *case.index, weights)
    grad_rows, grad_weights = ops.combine_backward(grad, case.tokens, out, weights)
    yield "grad_rows", grad_rows
    yield "grad_weights", grad_weights
    yield from zip(("grad_gate_up", "grad_route", "activation"), ops.swiglu_backward(grad_rows, rows, weights))
    yield "swiglu_dot", ops.swiglu_dot(grad_rows, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, dim", [("no tokens", 7), ("an idle expert", 130), ("an idle expert", 7), ("word edge", 9)])
def test_the_order_of_blocks_and_threads_changes_no_bit(name: str, dim: int, dtype: torch.dtype) -> None:
    """dim 130: more packs than lanes, several blocks across in some dtypes, and a tail in others; 7 and 9: no packs."""
    mask = make_mask(name)
    case = Case(mask, "cpu", dtype)
    found = []
    for seed in (1, 2, 3):
        LIBRARY.emulator_seed(seed)
        found.append(dict(everything(case, mask, dim)))
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_and_their_edges(dtype: torch.dtype) -> None:
    """Rows of whole packs, one element more or less, and wider than 64 blocks of packs; each from an aligned address and from one element past it."""
    generator = torch.Generator().manual_seed(0)
    case = Case(torch.rand(5, 3, generator=generator) < 0.6, "cpu", dtype)
    pack = 16 // dtype.itemsize
    for dim in (pack, 32 * pack, 32 * pack + 1, 32 * pack - 1, 33 * pack, 64 * 32 * pack + pack, 3 * pack + 2):
        for shift in (0, 1):

            def data(rows: int, columns: int) -> Tensor:
                return case.data(rows * columns + shift)[shift:].view(rows, columns)  # noqa: B023  (used at once)

            x, rows, weights = data(case.num_tokens, dim), data(case.num_routes, dim), case.weights()
            assert (x.data_ptr() % 16 == 0) == (shift == 0)
            assert torch.equal(ops.permute(x, *case.index).double(), reference.permute(x, case.tokens))
            assert_close(ops.combine(rows, *case.index, weights), reference.combine(rows, case.tokens, case.num_tokens, weights))
            expected = reference.combine_backward(x, case.tokens, rows, weights)
            for a, b in zip(ops.combine_backward(x, case.tokens, rows, weights), expected, strict=True):
                assert_close(a, b)
            gate_up = data(case.num_routes, 2 * dim)
            out = ops.swiglu(gate_up, weights)
            assert_close(out, reference.swiglu(gate_up, weights))
            grad_gate_up, grad_weights, activation = ops.swiglu_backward(rows, gate_up, weights)
            expected = reference.swiglu_backward(rows, gate_up, weights)
            assert_close(grad_gate_up, expected[0])
            assert_close(grad_weights, expected[1])
            assert torch.equal(activation, out)
            assert_close(ops.swiglu_dot(rows, gate_up), expected[1])


# --- wrong indices, which the operators refuse before a CPU kernel is called ---


def arguments(*fields: tuple[str, object]) -> ctypes.Structure:
    """A struct of csrc/kernels.h: addresses of tensors or null, int64, or a number of ctypes."""
    values = [v.data_ptr() if isinstance(v, Tensor) else v.value if isinstance(v, ctypes.c_int | ctypes.c_bool) else v for _, v in fields]
    kinds = [ctypes.c_void_p if v is None or isinstance(v, Tensor) else ctypes.c_int64 if isinstance(v, int) else type(v) for _, v in fields]
    made = type("Args", (ctypes.Structure,), {"_fields_": [(name, kind) for (name, _), kind in zip(fields, kinds)]})
    return made(*values)


def says(kernel: str, args: ctypes.Structure) -> str | None:
    function: Callable[..., bytes | None] = getattr(LIBRARY, f"emulated_{kernel}")
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    text = function(ctypes.addressof(args))
    return text.decode() if text else None


F32 = ctypes.c_int(0)  # DType::f32
ROWS, TOKENS, DIM = 6, 4, 40


def permute_of(tokens: list[int]) -> str | None:
    index, x, out = torch.tensor(tokens, dtype=torch.int32), torch.randn(TOKENS, DIM), torch.empty(ROWS, DIM)
    sizes = [("num_tokens", TOKENS), ("num_routes", ROWS), ("dim", DIM)]
    return says("permute", arguments(("dtype", F32), ("x", x), ("tokens", index), *sizes, ("out", out)))


def combine_of(offsets: list[int], positions: list[int]) -> str | None:
    offset, position = torch.tensor(offsets, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)
    rows, out = torch.randn(ROWS, DIM), torch.empty(TOKENS, DIM)
    sizes = [("num_tokens", TOKENS), ("num_routes", ROWS), ("dim", DIM)]
    data = [("rows", rows), ("row_offsets", offset), ("positions", position), ("weights", None)]
    return says("combine", arguments(("dtype", F32), *data, *sizes, ("out", out)))


def combine_backward_of(tokens: list[int]) -> str | None:
    index, grad, rows = torch.tensor(tokens, dtype=torch.int32), torch.randn(TOKENS, DIM), torch.randn(ROWS, DIM)
    sizes = [("num_tokens", TOKENS), ("num_routes", ROWS), ("dim", DIM)]
    data = [("grad", grad), ("rows", rows), ("tokens", index), ("weights", None)]
    out = [("grad_rows", torch.empty(ROWS, DIM)), ("grad_weights", torch.empty(ROWS))]
    return says("combine_backward", arguments(("dtype", F32), *data, *sizes, *out))


def route_of(num_routes: int, padded: bool = False) -> str | None:
    mask = torch.ones(3, 5, dtype=torch.bool)
    counts, offsets = torch.empty(5, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    tokens, positions = torch.empty(max(1, num_routes), dtype=torch.int32), torch.empty(max(1, num_routes), dtype=torch.int32)
    sizes = [("mask", mask), ("num_tokens", 3), ("num_experts", 5), ("num_routes", num_routes), ("padded", ctypes.c_bool(padded))]
    out = [("tokens", tokens), ("counts", counts), ("row_offsets", offsets), ("positions", positions), ("workspace", None)]
    return says("route", arguments(*sizes, *out))


def push_of(begins: list[int], places: list[int], tokens: list[int] | None) -> str | None:
    """ROWS rows to two ranks whose buffers hold as many."""
    index = None if tokens is None else torch.tensor(tokens, dtype=torch.int32)
    begin, place, buffers = torch.tensor(begins, dtype=torch.int32), torch.tensor(places, dtype=torch.int32), torch.empty(2, ROWS, DIM)
    addresses, x = torch.tensor([b.data_ptr() for b in buffers]), torch.randn(ROWS, DIM)
    where = [("begins", begin), ("places", place), ("buffers", addresses)]
    sizes = [("num_rows", ROWS), ("num_pairs", ROWS), ("num_ranks", 2), ("row_bytes", DIM * 4), ("capacity", ROWS * DIM * 4)]
    return says("push_rows", arguments(("x", x), ("tokens", index), *where, *sizes))


def pull_of(offsets: list[int], positions: list[int], places: list[int]) -> str | None:
    offset, position = torch.tensor(offsets, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)
    begin, place, buffers = torch.tensor([0, 4, 6], dtype=torch.int32), torch.tensor(places, dtype=torch.int32), torch.randn(2, ROWS, DIM)
    addresses, out = torch.tensor([b.data_ptr() for b in buffers]), torch.empty(TOKENS, DIM)
    where = [("row_offsets", offset), ("positions", position), ("begins", begin), ("places", place), ("buffers", addresses)]
    sizes = [("num_tokens", TOKENS), ("num_pairs", ROWS), ("num_ranks", 2), ("dim", DIM), ("capacity", ROWS * DIM * 4)]
    return says("pull_rows", arguments(("dtype", F32), *where, *sizes, ("out", out)))


def test_rows_of_peers_stay_in_their_buffers() -> None:
    """The buffers are other ranks' memory: what does not fit is not written."""
    assert push_of([0, 4, 6], [2, 4], None) is None and push_of([0, 0, 6], [0, 0], [5, 4, 3, 2, 1, 0]) is None
    for places in ([3, 0], [0, 5], [-1, 0], [2**31 - 1, 0]):
        assert "peers: places: a row outside its buffer" in push_of([0, 4, 6], places, None)
    for begins in ([0, 4, 5], [1, 4, 6]):
        assert "peers: " in push_of(begins, [0, 0], None)
    assert "push_rows: tokens: index out of range" in push_of([0, 4, 6], [0, 0], [0, 1, 2, 3, 4, ROWS])
    right = [0, 2, 2, 5, 6], [0, 3, 1, 2, 5, 4]
    assert pull_of(*right, [2, 4]) is None
    assert "peers: places: a row outside its buffer" in pull_of(*right, [3, 4])
    assert "pull_rows: positions: index out of range" in pull_of(right[0], [0, 3, 1, 2, 5, ROWS], [2, 4])
    assert "pull_rows: row_offsets: not rising within the rows" in pull_of([0, 3, 2, 5, 6], right[1], [2, 4])


def test_wrong_indices_trap() -> None:
    """On CUDA nobody looks at indices before the kernel does: it stops, says which, and has touched nothing out of bounds until then."""
    right = [0, 1, 2, 3, 3, 0]
    assert permute_of(right) is None and combine_backward_of(right) is None
    for wrong in (TOKENS, -1, 2**31 - 1, -(2**31)):
        tokens = [0, 1, 2, wrong, 3, 0]
        assert "permute: tokens: index out of range" in permute_of(tokens)
        assert "combine_backward: tokens: index out of range" in combine_backward_of(tokens)
    assert combine_of([0, 2, 2, 5, 6], [0, 3, 1, 2, 5, 4]) is None
    for wrong in (ROWS, -1, 2**31 - 1):
        assert "combine: positions: index out of range" in combine_of([0, 2, 2, 5, 6], [0, 3, 1, 2, 5, wrong])
    for offsets in ([0, 2, 2, 5, 7], [-1, 2, 2, 5, 6], [0, 3, 2, 5, 6]):
        assert "combine: row_offsets: not rising within the routes" in combine_of(offsets, [0, 1, 2, 3, 4, 5])
    assert route_of(15) is None and route_of(15, padded=True) is None and route_of(21, padded=True) is None
    assert "num_routes is less than the number of ones" in route_of(14, padded=True)
    assert "num_routes is less than the number of ones" in route_of(14)
    assert "num_routes is less than the number of ones" in route_of(0)
    assert "num_routes is not the number of ones" in route_of(16)
