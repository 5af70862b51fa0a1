"""What a router decides, and how a decision is kept, replayed, drawn and counted.

A route is a (token, expert, weight) triple; a token has any number of them, none included. A probe route adds nothing to the output: it only
brings the router the gradient <dL/dy_t, o_te> of an expert that did not fire.

Shapes: T tokens, D model dim, E experts (over all ranks).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree

from moetrain import ops

_T = TypeVar("_T")


def visible(cls: type[_T]) -> type[_T]:
    """Let torch see the tensors inside a dataclass that crosses a module's boundary: FSDP hangs its hooks on the tensors that it finds in
    inputs and outputs, and one that it can't see is computed with before its weights are there."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    _pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], None),
        lambda values, _: cls(*values),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    return cls


class StepCounts:
    """Routes per expert, by layer, in the micro-batches of one optimizer step so far (arXiv 2501.11873, Alg. 1); made anew for each step."""

    def __init__(self) -> None:
        self._by_layer: dict[int, Tensor] = {}

    def add(self, layer: int, counts: Tensor) -> Tensor:
        """counts: (E,), of a micro-batch over all ranks. Returns the sum so far, these included."""
        self._by_layer[layer] = counts if layer not in self._by_layer else self._by_layer[layer] + counts
        return self._by_layer[layer]


@dataclass(frozen=True)
class TokenContext:
    """What layers know of the tokens beside their hidden states.

    keys: (T,) int64, the name of each token whatever rank holds it, from which random draws are made; None: no draws (inference).
    valid: (T,) bool, False on padding, which has no routes and counts in no loss; None: all are valid.
    num_tokens: valid tokens of the whole optimizer step over all ranks, by which sums are divided; None: those of this call.
    group: ranks whose tokens belong to the same micro-batch (for statistics that a loss needs); None: this rank alone.
    sequence: tokens per sample, which lie one after the other; None: all of this call are one sample.
    counts: routes of the earlier micro-batches of this optimizer step; None: a micro-batch stands for itself.
    tokens: (T,) int64, token ids. tags: (T,) int64, which kind of text a token is of: the place of its source in the router's `tag_names`, or in
    `data.train` where it has none; None, or -1 for a token: not known.
    previous: (T, ...) the scores of the MoE layer before this one, with gradient (`Routing.scores`); None: there is none.
    classes: (T,) int64 in 0..num_classes - 1, a sort of token (its source, its kind) by which routes are also counted apart; None: they are not.
    """

    keys: Tensor | None = None
    valid: Tensor | None = None
    num_tokens: float | Tensor | None = None
    group: dist.ProcessGroup | None = None
    sequence: int | None = None
    counts: StepCounts | None = None
    tokens: Tensor | None = None
    tags: Tensor | None = None
    previous: Tensor | None = None
    classes: Tensor | None = None
    num_classes: int = 0


@visible
@dataclass(frozen=True)
class Decision:
    """The part of routing that is not differentiable: made once, replayed when activation checkpointing computes a block again.

    active: (T, E) bool, the routes. probes: (T, E) of the router's dtype, importance of probe routes, 0 elsewhere and on every route; None:
    no probes. load: (E,) share of each expert in the routes of the micro-batch over all ranks, or (B, E) in those of each sequence, where a
    loss needs it; or what else a router's loss multiplies an expert's scores with. chosen: (T, E) bool, the routes before the
    router dropped some; None: it dropped none. dropped: (), routes lost to a full expert or for want of room; None: 0. room: sizes of the lists of
    routes and of probes, which active and probes don't exceed (moetrain.moe.room); None: as many as there are, which only the device knows.
    """

    active: Tensor
    probes: Tensor | None = None
    load: Tensor | None = None
    chosen: Tensor | None = None
    dropped: Tensor | None = None
    room: tuple[int, int] | None = None


@visible
@dataclass(frozen=True)
class Routing:
    """A decision with its weights.

    weights: (T, E) float32 (float64 for float64 inputs), differentiable, 0 where there is no route. Its gradient is taken on routes and, times
    the importance, on probes; elsewhere it is 0.
    losses: scalars, sums over this rank's tokens divided by `TokenContext.num_tokens`, coefficients not applied.
    sums: what the router's `after_step` wants to know, detached sums over this rank's tokens, of any shape; they are added over ranks and
    micro-batches.
    scores: (T, ...) what the router of the next MoE layer gets as `TokenContext.previous`; None: nothing.
    local: (T, D) what experts within the router itself add to the layer's output; None: there are none.
    """

    decision: Decision
    weights: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    local: Tensor | None = None


@visible
@dataclass(frozen=True)
class LayerReport:
    """What a layer tells beside its output. losses: differentiable scalars. stats: detached sums over this rank's tokens, to be added over
    ranks and micro-batches: tokens (), load (E,) routes per expert, active_sq () sum of squared routes per token, empty () tokens without a
    route, probes () probe routes, dropped () routes lost to a full expert or for want of room, no_room () those for want of room, where room is
    fixed, and of each class, where there are classes (C), class_tokens (C,) and class_load (C, E). Nothing accumulates inside forward, since
    recomputation would count it twice.
    sums, scores: of the Routing."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None


def route_counts(active: Tensor) -> tuple[Tensor, Tensor]:
    """active: (T, E) bool, or how many (of strata a token may go to one expert several times) -> (E,) and (T,) float64: the routes of each
    expert, and of each token."""
    if active.device.type == "cpu" and active.dtype == torch.bool:
        of_experts, of_tokens = ops.count(active)
        return of_experts.double(), of_tokens.double()
    return active.sum(0, dtype=torch.float64), active.sum(-1, dtype=torch.float64)


def statistics(decision: Decision, context: TokenContext) -> dict[str, Tensor]:
    """The `stats` of a LayerReport, float64 so that sums over a run stay whole numbers."""
    active, valid, classes = decision.active, context.valid, context.classes
    load, per_token = route_counts(active)
    real = torch.ones_like(per_token) if valid is None else valid.double()
    apart = {}
    if classes is not None:
        # Whole numbers: the order in which index_add adds them does not matter.
        apart["class_tokens"] = real.new_zeros(context.num_classes).index_add_(0, classes, real)
        apart["class_load"] = real.new_zeros(context.num_classes, active.shape[1]).index_add_(0, classes, active.double())
    return apart | {
        "tokens": real.sum(),
        "load": load,
        "active_sq": per_token.square().sum(),
        "empty": ((per_token == 0) * real).sum(),
        "probes": per_token.new_zeros(()) if decision.probes is None else (decision.probes > 0).sum(dtype=torch.float64),
        "dropped": per_token.new_zeros(()) if decision.dropped is None else decision.dropped.double(),
    }


# ------------------------------------------------------------------------------------------------------------------ replay


@dataclass
class _Tape:
    items: list[Any] = field(default_factory=list)
    place: int = 0
    replaying: bool = False


_tape: contextvars.ContextVar[_Tape | None] = contextvars.ContextVar("route_tape", default=None)


@contextlib.contextmanager
def _use(tape: _Tape, replaying: bool) -> Iterator[None]:
    tape.replaying, tape.place = replaying, 0
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)


def replay_contexts() -> tuple[Any, Any]:
    """The `context_fn` for torch.utils.checkpoint: what the first forward decides, the recomputation repeats. A router that ran again could
    fall on the other side of a near tie, and the tensors that backward meets would have other shapes than those that forward saved."""
    tape = _Tape()
    return _use(tape, False), _use(tape, True)


def recorded(make: Any) -> Any:
    """`make()`, or what it gave in the first forward when this is a recomputation. A compiled graph has no tape: what it keeps or computes again
    for its own backward is the compiler's matter."""
    tape = None if torch.compiler.is_compiling() else _tape.get()
    if tape is None:
        return make()
    if not tape.replaying:
        tape.items.append(make())
        return tape.items[-1]
    assert tape.place < len(tape.items), "recomputation asks for more decisions than the first forward made"
    tape.place += 1
    return tape.items[tape.place - 1]


# ------------------------------------------------------------------------------------------------------------------- draws

_MASK = {bits: (1 << bits) - 1 for bits in (33, 34, 37)}


def mix(x: Tensor) -> Tensor:
    """A bijective scramble of int64 (the finalizer of SplitMix64); integer overflow wraps, which torch guarantees on CPU and CUDA."""
    x = (x ^ ((x >> 30) & _MASK[34])) * -4658895280553007687
    x = (x ^ ((x >> 27) & _MASK[37])) * -7723592293110705685
    return x ^ ((x >> 31) & _MASK[33])


def uniform(keys: Tensor, stream: int, n: int) -> Tensor:
    """(T, n) float32 in [0, 1), a function of (key, stream, column) alone: the same on any rank, in any batch, at any resume.

    keys: (T,) int64. stream: which use of randomness this is (for a router: its layer).
    """
    column = torch.arange(n, dtype=torch.int64, device=keys.device) + (stream + 1) * 1_000_003
    bits = mix(mix(keys)[:, None] + column * -7046029254386353131)
    return ((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24


def normal(keys: Tensor, stream: int, n: int) -> Tensor:
    """(T, n) float32, standard normal, made of `uniform` draws (Box-Muller); |z| < 5.8."""
    radius, angle = uniform(keys, stream, 2 * n).chunk(2, -1)
    return torch.sqrt(-2 * torch.log(1 - radius)) * torch.cos(2 * math.pi * angle)


def filled(values: Sequence[float], like: Tensor) -> Tensor:
    """(len(values),) of the dtype and on the device of `like`, written there: a copy from the host would wait for the device, and can't be part of a
    CUDA graph."""
    return torch.cat([like.new_full((len(list(run)),), value) for value, run in itertools.groupby(values)])


def token_count(context: TokenContext, x: Tensor) -> float | Tensor:
    """The divisor of losses: `context.num_tokens`, or the valid tokens of this call (at least 1)."""
    if context.num_tokens is not None:
        return context.num_tokens
    return max(1, x.shape[0]) if context.valid is None else context.valid.sum().clamp(min=1)


def global_load(active: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(E,) share of each expert in all routes of the group's micro-batch; sums to 1, or is 0 when there is no route. float64 inside, so that
    the sum does not depend on how tokens are spread over ranks."""
    return shares(group_sum(route_counts(active)[0], group))


def group_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of a group; None: `values`. Without gradient."""
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


def shares(counts: Tensor) -> Tensor:
    """(..., E) routes per expert -> each one's share; 0 where there is no route."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)
