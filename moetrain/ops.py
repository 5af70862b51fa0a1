"""The operators of csrc/: typed wrappers, shapes without data (fakes) and gradient formulas.

Letters: T tokens, D model dim, F expert dim, E experts, R routes. A route is a (token, expert) pair. Routes
are numbered by expert, then token: this is the order of every (R, ...) tensor, so each expert's rows lie
together.

Index tensors are int32. Data is float32, bfloat16 or float64 (float16 too on CUDA). "acc" is the dtype of
sums and of route weights: float64 for float64 data, float32 for all other. Arguments may have any strides;
results are contiguous. Every size may be 0. Results don't depend on the number of threads. An argument that
doesn't fit raises RuntimeError with the operator, the tensor, what was expected and what was found.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    from moetrain import _C  # noqa: F401  (loading it registers the operators)
except ImportError as error:
    raise ImportError(
        f"moetrain's native operators can't be loaded ({error}): "
        "run `pip install -e . --no-build-isolation` in the project"
    ) from error

__all__ = [
    "acc_dtype",
    "combine",
    "combine_backward",
    "count",
    "experts",
    "experts_backward",
    "experts_probe",
    "has_experts",
    "largest",
    "permute",
    "pull_rows",
    "push_rows",
    "route",
    "share",
    "share_backward",
    "swiglu",
    "swiglu_backward",
    "swiglu_dot",
    "wide_linear",
    "wide_linear_backward",
]

_ops = torch.ops.moetrain


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over, and of route weights for, data of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def route(mask: Tensor, num_routes: int, padded: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists the routes of a mask, by expert and then token.

    mask: (T, E) bool, True where there is a route. num_routes: how many are True; the caller knows it, so
    that a GPU isn't waited for here. A wrong number raises on the CPU; on CUDA it traps in the kernel.
    padded: num_routes is room for at least as many as are True, so that sizes need not follow the mask. What
    is left of `tokens` and `positions` is 0, an index that may be read; `counts` and `row_offsets` speak of
    routes alone. No operator lets a row of padding into the rows of tokens or into a weight of an expert; what
    its own (R, ...) rows of padding hold is of no meaning.

    Returns, all int32:
        tokens: (R,) the token of each route.
        counts: (E,) routes per expert.
        row_offsets: (T + 1,) routes of all earlier tokens.
        positions: (R,) where in `tokens` the routes of token t are, by ascending expert:
            positions[row_offsets[t]:row_offsets[t + 1]]. So tokens[positions] is ascending.
    """
    return _ops.route(mask, num_routes, padded)


def permute(x: Tensor, tokens: Tensor, row_offsets: Tensor, positions: Tensor) -> Tensor:
    """Copies each token's row to its routes: (T, D) -> (R, D), x[tokens]. The rest serves the backward."""
    return _ops.permute(x, tokens, row_offsets, positions)


def combine(
    rows: Tensor, tokens: Tensor, row_offsets: Tensor, positions: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Adds up the rows of each token's routes: (R, D) -> (T, D), y_t = sum_p w[p] * rows[p].

    weights: w, (R,) acc, or None for 1. The sum is taken in acc by ascending expert. A token without routes
    gets 0. Only the backward reads `tokens`.
    """
    return _ops.combine(rows, tokens, row_offsets, positions, weights)


def combine_backward(
    grad: Tensor, tokens: Tensor, rows: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine` for grad (T, D). Not differentiable.

    Returns:
        grad_rows: (R, D), weights[r] * grad[tokens[r]].
        grad_weights: (R,) acc, <grad[tokens[r]], rows[r]>; (0,) if rows is None (not wanted).
    """
    return _ops.combine_backward(grad, tokens, rows, weights)


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """weights * silu(gate) * up: [gate | up] (R, 2 F) -> (R, F). weights: (R,) acc, or None for 1."""
    return _ops.swiglu(gate_up, weights)


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swiglu` for grad (R, F), and its output again. Not differentiable.

    Returns:
        grad_gate_up: (R, 2 F).
        grad_weights: (R,) acc, <grad, silu(gate) * up>; (0,) if weights is None.
        activation: (R, F) = swiglu(gate_up, weights). The weight gradient of the next matrix needs it; it is
            cheap here, so forward need not keep it.
    """
    return _ops.swiglu_backward(grad, gate_up, weights)


def swiglu_dot(grad: Tensor, gate_up: Tensor) -> Tensor:
    """<grad_r, silu(gate_r) * up_r>: (R, F), (R, 2 F) -> (R,) acc, and nothing else. Not differentiable."""
    return _ops.swiglu_dot(grad, gate_up)


def push_rows(x: Tensor, tokens: Tensor | None, begins: Tensor, places: Tensor, buffers: Tensor, capacity: int) -> None:
    """Copies rows straight into the memory of W ranks, which this process can write. Not differentiable.

    x: (N, D) of any dtype. tokens: (P,) the row of x of each of the P rows sent, or None for x's own rows. begins: (W + 1,) int32: rows
    begins[w] .. begins[w + 1] go to rank w, where they become rows places[w] .. of its buffer; places: (W,) int32. buffers: (W,) int64, the
    buffers' addresses, aligned to 16 bytes; on the device of x. capacity: bytes of each buffer. Rows that don't fit raise on the CPU and trap on
    CUDA. Nothing here waits until the others may read: see `moe.peers`.
    """
    _ops.push_rows(x, tokens, begins, places, buffers, capacity)


def pull_rows(
    like: Tensor, row_offsets: Tensor, positions: Tensor, begins: Tensor, places: Tensor, buffers: Tensor, capacity: int
) -> Tensor:
    """Adds up each token's rows where they lie in the memory of W ranks: (T, D), y_t = sum over j in row_offsets[t] .. row_offsets[t + 1] of the
    row that `push_rows` with the same begins, places and buffers would write for p = positions[j]. Not differentiable.

    like: (.., D), of the rows' dtype and on their device. The sum is taken in acc by ascending j.
    """
    return _ops.pull_rows(like, row_offsets, positions, begins, places, buffers, capacity)


def has_experts(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `experts` and its kin can be used: CPU, float32 or bfloat16, and a torch and a processor with oneDNN's brgemm for it."""
    return device.type == "cpu" and dtype in _EXPERTS_DTYPES


# Asked once, here: what only looks at shapes (torch.compile, FakeTensor) can't ask an operator.
_EXPERTS_DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if _ops.has_experts(torch.empty(0, dtype=dtype, device="cpu"))]


def experts(rows: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' SwiGLU FFNs over a route list and their weighted sums per row, in one pass. Where `has_experts` says so.

    rows: (N, D). gate_up: (E, 2 F, D), the gate's rows first. down: (E, D, F). weights: (R,) float32.
    tokens: (R,) int32, the row of each route, sorted by expert, then row, as `route` gives them; RuntimeError if an expert's
    do not ascend. counts: (E,) int32, routes per expert; where they add up to less than R, the rest is padding.

    Returns:
        out: (N, D), sum over the routes r of a row of weights[r] * (silu(x G^T) * (x U^T)) V^T. The sum and all products are in
            float32; only pre-activations and activations are rounded to the dtype before.
        pre: (R, 2 F), the pre-activations, for the backward; rows of padding are not written.
    """
    return _ops.experts(rows, gate_up, down, weights, tokens, counts)


def experts_backward(
    grad: Tensor,
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    pre: Tensor,
    tokens: Tensor,
    counts: Tensor,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `experts` for grad (N, D). Not differentiable.

    needs: which of the first three results are wanted; the others are (0,).

    Returns:
        grad_rows: (N, D). grad_gate_up: (E, 2 F, D). grad_down: (E, D, F). Summed in float32, rounded once.
        grad_weights: (R,) float32, <grad of the route's row, the expert's output for it>; 0 for padding.
    """
    return _ops.experts_backward(grad, rows, gate_up, down, weights, pre, tokens, counts, needs)


def experts_probe(grad: Tensor, rows: Tensor, gate_up: Tensor, down: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """(Q,) float32: <grad of the probe's row, the expert's output for it>, from (N, D) grad and rows; 0 for padding. Not
    differentiable."""
    return _ops.experts_probe(grad, rows, gate_up, down, tokens, counts)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (T, D) bfloat16, weight (E, D) float32 -> (T, E) float32, x W^T computed in float32. On the CPU, where `has_experts` says so for float32.
    A row of the result depends on that row of x alone, whatever T is. `moe.wide.wide_linear` has the gradient."""
    return _ops.wide_linear(x, weight)


def wide_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool] = (True, True)) -> tuple[Tensor, Tensor]:
    """Gradients of `wide_linear` for grad (T, E) float32. Not differentiable.

    needs: which results are wanted; the other is (0,).

    Returns:
        grad_x: (T, D) bfloat16, grad @ W, summed in float32 and rounded once.
        grad_weight: (E, D) float32, grad^T @ x.
    """
    return _ops.wide_linear_backward(grad, x, weight, needs)


def largest(scores: Tensor, k: int) -> Tensor:
    """scores (T, E) float32 -> (T, k) int64: the k largest of each row, the largest first; among equals the lower expert. NaN is beyond the
    infinity of its sign. CPU. Not differentiable, as `count`."""
    return _ops.largest(scores, k)


def share(scores: Tensor, active: Tensor) -> Tensor:
    """scores (T, E) float32, active (T, E) bool -> (T, E): each active score over the sum of its row's active scores; 0 elsewhere. A sum that is not
    positive counts as 1. CPU. `moe.weights.share` has the gradient."""
    return _ops.share(scores, active)


def share_backward(grad: Tensor, scores: Tensor, active: Tensor) -> Tensor:
    """(T, E): the gradient of `share` with respect to the scores, for grad (T, E). Not differentiable."""
    return _ops.share_backward(grad, scores, active)


def count(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask (T, E) bool -> (E,) and (T,) int32: how many are True of each expert, and of each token. CPU."""
    return _ops.count(mask)


# What torch's FLOP counter shall see of the products inside: gate and up, and down.


@register_flop_formula(torch.ops.moetrain.experts)
def _experts_flops(rows, gate_up, down, weights, tokens, counts, *args, **options) -> int:
    return 3 * tokens[0] * gate_up[1] * gate_up[2]


@register_flop_formula(torch.ops.moetrain.experts_backward)
def _experts_backward_flops(grad, rows, gate_up, down, *args, **options) -> int:
    return 6 * args[2][0] * gate_up[1] * gate_up[2]


@register_flop_formula(torch.ops.moetrain.wide_linear)
def _wide_linear_flops(x, weight, *args, **options) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.moetrain.wide_linear_backward)
def _wide_linear_backward_flops(grad, x, weight, needs, *args, **options) -> int:
    return 2 * x[0] * x[1] * weight[0] * sum(needs)


# Fakes: the shapes and dtypes alone, for torch.compile and FakeTensor.


@torch.library.register_fake("moetrain::route")
def _(mask, num_routes, padded=False):
    num_tokens, num_experts = mask.shape
    sizes = (num_routes, num_experts, num_tokens + 1, num_routes)
    return tuple(mask.new_empty((size,), dtype=torch.int32) for size in sizes)


@torch.library.register_fake("moetrain::permute")
def _(x, tokens, row_offsets, positions):
    return x.new_empty((tokens.shape[0], x.shape[1]))


@torch.library.register_fake("moetrain::combine")
def _(rows, tokens, row_offsets, positions, weights):
    return rows.new_empty((row_offsets.shape[0] - 1, rows.shape[1]))


@torch.library.register_fake("moetrain::combine_backward")
def _(grad, tokens, rows, weights):
    num_routes = tokens.shape[0]
    grad_weights = grad.new_empty((0 if rows is None else num_routes,), dtype=acc_dtype(grad.dtype))
    return grad.new_empty((num_routes, grad.shape[1])), grad_weights


@torch.library.register_fake("moetrain::swiglu")
def _(gate_up, weights):
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.register_fake("moetrain::swiglu_backward")
def _(grad, gate_up, weights):
    num_rows, width = gate_up.shape
    grad_weights = gate_up.new_empty((0 if weights is None else num_rows,), dtype=acc_dtype(gate_up.dtype))
    return gate_up.new_empty((num_rows, width)), grad_weights, gate_up.new_empty((num_rows, width // 2))


@torch.library.register_fake("moetrain::swiglu_dot")
def _(grad, gate_up):
    return gate_up.new_empty((gate_up.shape[0],), dtype=acc_dtype(gate_up.dtype))


@torch.library.register_fake("moetrain::push_rows")
def _(x, tokens, begins, places, buffers, capacity):
    return None


@torch.library.register_fake("moetrain::pull_rows")
def _(like, row_offsets, positions, begins, places, buffers, capacity):
    return like.new_empty((row_offsets.shape[0] - 1, like.shape[1]))


@torch.library.register_fake("moetrain::experts")
def _(rows, gate_up, down, weights, tokens, counts):
    return torch.empty_like(rows, memory_format=torch.contiguous_format), rows.new_empty((tokens.shape[0], gate_up.shape[1]))


@torch.library.register_fake("moetrain::experts_backward")
def _(grad, rows, gate_up, down, weights, pre, tokens, counts, needs):
    wanted = (rows.new_empty(t.shape if needed else (0,)) for t, needed in zip((rows, gate_up, down), needs))
    return *wanted, rows.new_empty(tokens.shape, dtype=torch.float32)


@torch.library.register_fake("moetrain::experts_probe")
def _(grad, rows, gate_up, down, tokens, counts):
    return rows.new_empty(tokens.shape, dtype=torch.float32)


@torch.library.register_fake("moetrain::largest")
def _(scores, k):
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)


@torch.library.register_fake("moetrain::share")
def _(scores, active):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.register_fake("moetrain::share_backward")
def _(grad, scores, active):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.register_fake("moetrain::count")
def _(mask):
    return mask.new_empty((mask.shape[1],), dtype=torch.int32), mask.new_empty((mask.shape[0],), dtype=torch.int32)


@torch.library.register_fake("moetrain::wide_linear")
def _(x, weight):
    return weight.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("moetrain::wide_linear_backward")
def _(grad, x, weight, needs):
    wanted = (t.new_empty(t.shape if needed else (0,)) for t, needed in zip((x, weight), needs))
    return tuple(wanted)


# Gradients. Each backward is another operator.


def _save_permute(ctx, inputs, output):
    _, tokens, row_offsets, positions = inputs
    ctx.save_for_backward(tokens, row_offsets, positions)


def _backward_permute(ctx, grad):
    return combine(grad, *ctx.saved_tensors), None, None, None


def _save_combine(ctx, inputs, output):
    rows, tokens, row_offsets, positions, weights = inputs
    # The rows are large and only the weights' gradient reads them.
    needs_rows = weights is not None and ctx.needs_input_grad[4]
    ctx.save_for_backward(rows if needs_rows else None, tokens, row_offsets, positions, weights)


def _backward_combine(ctx, grad):
    rows, tokens, row_offsets, positions, weights = ctx.saved_tensors
    if weights is None:
        return permute(grad, tokens, row_offsets, positions), None, None, None, None
    grad_rows, grad_weights = combine_backward(grad, tokens, rows, weights)
    return grad_rows, None, None, None, None if rows is None else grad_weights


def _save_swiglu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_swiglu(ctx, grad):
    gate_up, weights = ctx.saved_tensors
    grad_gate_up, grad_weights, _ = swiglu_backward(grad, gate_up, weights)
    return grad_gate_up, None if weights is None else grad_weights


torch.library.register_autograd("moetrain::permute", _backward_permute, setup_context=_save_permute)
torch.library.register_autograd("moetrain::combine", _backward_combine, setup_context=_save_combine)
torch.library.register_autograd("moetrain::swiglu", _backward_swiglu, setup_context=_save_swiglu)


def _save_experts(ctx, inputs, output):
    rows, gate_up, down, weights, tokens, counts = inputs
    ctx.save_for_backward(rows, gate_up, down, weights, output[1], tokens, counts)
    ctx.mark_non_differentiable(output[1])


def _backward_experts(ctx, grad, _):
    needs = ctx.needs_input_grad
    grads = experts_backward(grad, *ctx.saved_tensors, needs[:3])
    return *(g if needed else None for g, needed in zip(grads, needs)), None, None


torch.library.register_autograd("moetrain::experts", _backward_experts, setup_context=_save_experts)


def _register_no_gradient(name: str) -> None:
    """Makes a second derivative an error; without a formula torch would return none and only warn."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"moetrain::{name} has no gradient")

    torch.library.register_autograd(f"moetrain::{name}", backward)


for _name in (
    "combine_backward",
    "swiglu_backward",
    "swiglu_dot",
    "experts_backward",
    "experts_probe",
    "pull_rows",
    "share",
    "share_backward",
    "wide_linear",
    "wide_linear_backward",
):
    _register_no_gradient(_name)
