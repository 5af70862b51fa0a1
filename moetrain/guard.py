"""Health checks of a training run: every `guard.every` steps a step is watched, and what a mixture must keep is compared over all ranks.

Nothing here is read off the code that it checks. Each check compares two numbers that come about on different ways:

- gradient: a weight that a result is linear in has <dL/dW, W> = the sum over tokens of <dL/dy, y> (Euler's theorem on homogeneous functions). For
  an expert's `up` and `down` the right side is the sum over its routes of weight times the weight's gradient, known where the tokens are, before
  dispatch; the left side is taken from the gradient that the optimizer will see, after every reduction. A gradient that is ep times too large or
  too small, that a replica lacks, or that was added twice differs by that factor. The norm before attention is held to its outputs likewise, so
  that experts and dense part have one scale.
- routes, rows: what all ranks sent to an expert, and the (token, rank) pairs that its rank was sent, have arrived there.
- replay: a block that is computed again in backward has the routes of the first time.
- replicas: each parameter that several ranks compute with is the same on all of them, bit by bit, as it is used in forward.
- dtype: routers compute in float32 (float64 in float64 runs).

These are errors. Experts without a route in several checks, and the most rows that a rank has received (what its buffers must hold), are notes.

Letters: T tokens of this rank, E experts, L MoE layers, G data-parallel groups (dp_replicate x dp_shard) of `ep` ranks each.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.config import GuardConfig, ParallelConfig, TrainConfig
from moetrain.metrics import Metrics
from moetrain.model import Transformer
from moetrain.moe.dispatch import Work
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import Routing

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""By dtype of computation, of a gradient's scale. A missing or doubled factor is off by a half at least."""
SHOWN = 16
"""Errors, and notes, of one watched step that are written down; the others are counted."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Finding:
    """check: gradient, routes, rows, replay, replicas, dtype; dead or buffer for a note. layer: of the model, from 0. ranks: where it is."""

    check: str
    message: str
    layer: int | None = None
    expert: int | None = None
    ranks: tuple[int, ...] = ()

    @property
    def is_note(self) -> bool:
        return self.check in ("dead", "buffer")

    def __str__(self) -> str:
        where = [] if self.layer is None else [f"layer {self.layer}"]
        where += [] if self.expert is None else [f"expert {self.expert}"]
        where += [f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))}"] if self.ranks else []
        return f"{', '.join(where)}: {self.message}" if where else self.message


class Guard:
    """Watches the model of one rank. Without a watched step there is no hook in the model and no work."""

    def __init__(
        self, model: Transformer, options: GuardConfig, train: TrainConfig, parallel: ParallelConfig, group: dist.ProcessGroup | None,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        """parallel: with dp_shard filled in. group: all ranks; None: this one alone."""
        self.options, self.parallel, self.group, self.model, self.metrics = options, parallel, group, model, metrics
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
        self.exact = torch.float64 if train.dtype == "float64" else torch.float32
        self.compute = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[train.dtype]
        self.recomputes = train.activation_checkpointing == "block"
        self.device = next(model.parameters()).device
        self.parameters = dict(model.named_parameters())
        self.without_route: dict[tuple[int, int], int] = {}
        """(layer, expert) -> checks in a row."""
        self.most_rows = self.step = 0
        self._watch: _Watch | None = None

    def begin(self, step: int) -> bool:
        """Before the forward passes of `step` (from 1): whether it is a watched one, and then `finish` must follow."""
        assert self.options.every is not None, "a guard that is off is not built"
        if step % self.options.every:
            return False
        self.step, self._watch = step, _Watch(self)
        return True

    def finish(self, loads: list[list[float]]) -> dict[str, Any]:
        """After the last backward pass, before gradients are clipped. Collective. loads: as `Totals.loads`.

        Returns figures for the step's record, equal on all ranks. Raises RuntimeError, on all ranks, for an error with `action: stop`.
        """
        watch, self._watch = self._watch, None
        assert watch is not None, "finish follows a begin that said yes"
        watch.remove()
        with torch.no_grad():
            findings, figures = self._judge(watch, loads)
        errors = [f for f in findings if not f.is_note]
        self._tell("guard", errors)
        self._tell("guard_note", [f for f in findings if f.is_note])
        if errors and self.options.action == "stop":
            more = f" (and {len(errors) - 1} more in events.jsonl)" if len(errors) > 1 else ""
            raise RuntimeError(
                f"step {self.step}: guard {errors[0].check}: {errors[0]}{more}; this step's update was not made. docs/guard.md says what each "
                f"check means; guard.action: warn goes on"
            )
        return figures

    def _tell(self, kind: str, findings: list[Finding]) -> None:
        title = kind.replace("_", " ")
        for finding in findings[:SHOWN]:
            where = {"layer": finding.layer, "expert": finding.expert, "ranks": list(finding.ranks) or None}
            where = {key: value for key, value in where.items() if value is not None}
            self.metrics.event(kind, step=self.step, check=finding.check, **where, message=finding.message)
            self.metrics.tell(f"  {title} {finding.check}: {finding}")
        if len(findings) > SHOWN:
            self.metrics.event(kind, step=self.step, check="more", message=f"and {len(findings) - SHOWN} more of this check")
            self.metrics.tell(f"  {title}: and {len(findings) - SHOWN} more of this check")

    def _judge(self, watch: _Watch, loads: list[list[float]]) -> tuple[list[Finding], dict[str, Any]]:
        everything = _Sums(self.group)
        for layer in watch.layers:
            for name, value in layer.sums().items():
                everything.parts[f"{layer.number}.{name}"] = value
            everything.parts[f"{layer.number}.found"] = self._expert_products(layer)
        for i, norm in enumerate(watch.norms):
            everything.parts[f"norm{i}"] = torch.stack([norm.said, norm.squares])
            everything.parts[f"norm{i}.found"] = self._norm_product(i)
        values = everything.reduce()
        findings = [*self._gradients(watch, values), *self._conservation(watch, values), *self._replays(watch, values)]
        findings += [*self._replicas(watch), *self._dtypes(watch, values), *self._dead(watch, loads)]
        figures: dict[str, Any] = {"errors": sum(not f.is_note for f in findings)}
        if self.parallel.ep > 1 and watch.layers:
            rows = [values[f"{layer.number}.most_rows"].tolist() for layer in watch.layers]
            figures["rows_max"] = [int(max(r)) for r in rows]
            figures["rows_max_mean"] = [max(r) * len(r) / sum(r) if sum(r) else 0.0 for r in rows]
            findings += self._buffers(watch, values, rows)
        return findings, figures

    # ------------------------------------------------------------------------------------------------------------- gradients

    def _expert_products(self, layer: _Layer) -> Tensor:
        """(dp_replicate, 2, E) float64: this rank's part of <gradient, weights> of `up` and of `down`."""
        products = torch.zeros(self.parallel.dp_replicate, 2, layer.num_experts, dtype=torch.float64, device=self.device)
        mine = products[self.rank // (self.parallel.dp_shard * self.parallel.ep)]
        for experts, members in layer.groups:
            for kind, (name, parameter) in enumerate(experts.named_parameters()):
                parameter = self.parameters[layer.names[experts, name]]
                if parameter.grad is None:
                    continue
                value, grad, offset = _local(parameter)
                first = max(0, parameter.shape[1] // 2 - offset[1]) if name == "gate_up" else 0  # its upper half is `up`
                product = (value[:, first:].to(self.compute).double() * grad[:, first:].double()).sum((1, 2))
                ids = torch.tensor(members[offset[0] : offset[0] + len(product)], device=self.device)
                mine[kind].index_add_(0, ids, product)
        return products

    def _norm_product(self, number: int) -> Tensor:
        """(dp_replicate,) float64, of the norm before attention in one block."""
        products = torch.zeros(self.parallel.dp_replicate, dtype=torch.float64, device=self.device)
        parameter = self.parameters[f"layers.{number}.attn_norm.weight"]
        if parameter.grad is not None:
            value, grad, _ = _local(parameter)
            products[self.rank // (self.parallel.dp_shard * self.parallel.ep)] = (value.to(self.compute).double() * grad.double()).sum()
        return products

    def _gradients(self, watch: _Watch, values: dict[str, Tensor]) -> Iterable[Finding]:
        for layer in watch.layers:
            said, squares, found = (values[f"{layer.number}.{name}"] for name in ("said", "squares", "found"))
            for replica, kind, e in _where(self._off(found, said, squares)):
                ranks = tuple(r for r in self._holders(layer, e) if r // (self.parallel.dp_shard * self.parallel.ep) == replica)
                what = f"the gradient of its {('up', 'down')[kind]} projection is {_times(found[replica, kind, e], said[e])} what its tokens say"
                yield Finding("gradient", what, layer.number, e, ranks)
        for i in range(len(watch.norms)):
            (said, squares), found = values[f"norm{i}"], values[f"norm{i}.found"]
            for (replica,) in _where(self._off(found, said, squares)):
                what = f"the gradient of the norm before attention is {_times(found[replica], said)} what all tokens say"
                size = self.parallel.dp_shard * self.parallel.ep
                yield Finding("gradient", what, i, ranks=tuple(range(replica * size, (replica + 1) * size)))

    def _off(self, found: Tensor, said: Tensor, squares: Tensor) -> Tensor:
        # Rounding grows with the root of the summed squares, as terms of either sign do. A step that is not finite is skipped anyway.
        judged = torch.isfinite(found) & torch.isfinite(said)
        return judged & ((found - said).abs() > TOLERANCE[self.compute] * (said.abs() + squares.sqrt()))

    # ---------------------------------------------------------------------------------------------------------- conservation

    def _conservation(self, watch: _Watch, values: dict[str, Tensor]) -> Iterable[Finding]:
        ep = self.parallel.ep
        for layer in watch.layers:
            number = layer.number
            for kind, plural in enumerate(("routes", "probe routes")):
                sent, received = values[f"{number}.sent"][:, kind], values[f"{number}.received"][:, kind]
                for group, e in _where(sent != received):
                    ranks = tuple(r for r in self._holders(layer, e) if r // ep == group)
                    whole = f"{int(received[group, e])} {plural} arrived of {int(sent[group, e])} that ranks {group * ep}..{group * ep + ep - 1} sent"
                    yield Finding("routes", whole, number, e, ranks)
            sent, received = values[f"{number}.sent_rows"], values[f"{number}.received_rows"]
            for group, place in _where(sent != received):
                what = f"{int(received[group, place])} rows arrived of {int(sent[group, place])} that were sent there"
                yield Finding("rows", what, number, ranks=(group * ep + place,))

    def _replays(self, watch: _Watch, values: dict[str, Tensor]) -> Iterable[Finding]:
        for layer in watch.layers:
            changed = values[f"{layer.number}.replay"]
            for rank, e in _where(changed > 0):
                what = f"{int(changed[rank, e])} routes were decided otherwise when the block was computed again"
                yield Finding("replay", what, layer.number, e, (rank,))

    def _holders(self, layer: _Layer, expert: int) -> tuple[int, ...]:
        """Ranks that compute an expert."""
        ep = self.parallel.ep
        members = next(members for _, members in layer.groups if expert in members)
        place = members.index(expert) // (len(members) // ep)
        return tuple(range(place, self.world, ep))

    # -------------------------------------------------------------------------------------------------------------- replicas

    def _replicas(self, watch: _Watch) -> Iterable[Finding]:
        own = torch.stack(watch.checksums()) if watch.used else torch.zeros(0, dtype=torch.int64, device=self.device)
        if self.group is None or not len(own):
            return
        found = torch.zeros(self.world, len(own), dtype=torch.int64, device=self.device)
        found[self.rank] = own
        dist.all_reduce(found, group=self.group)
        names, ep = watch.checksum_names(), self.parallel.ep
        # What rank r holds of an expert's parameter is compared with the ranks that hold the same experts.
        steps = [1 if expert is None else ep for *_, expert in names]
        apart = torch.tensor([step > 1 for step in steps], device=self.device)
        own_kind = found[torch.arange(self.world, device=self.device) % ep]
        differs = (found != torch.where(apart, own_kind, found[0])).any(0)
        for place in differs.nonzero().flatten().tolist():
            layer, name, expert = names[place]
            column = found[:, place].tolist()
            for first in range(steps[place]):
                ranks = range(first, self.world, steps[place])
                usual = Counter(column[r] for r in ranks).most_common(1)[0][0]  # of two that differ the first one's
                if other := tuple(r for r in ranks if column[r] != usual):
                    kept = next(r for r in ranks if column[r] == usual)
                    global_id = None if expert is None else watch.global_expert(layer, name, expert, first)
                    yield Finding("replicas", f"{name} is not what rank {kept} computes with", layer, global_id, other)

    def _dtypes(self, watch: _Watch, values: dict[str, Tensor]) -> Iterable[Finding]:
        for layer in watch.layers:
            for rank, place in _where(values[f"{layer.number}.wrong_dtypes"] > 0):
                yield Finding("dtype", f"the router computes in {_FLOATS[place]}, not in {self.exact}", layer.number, ranks=(rank,))

    # ----------------------------------------------------------------------------------------------------------------- notes

    def _dead(self, watch: _Watch, loads: list[list[float]]) -> Iterable[Finding]:
        for layer, load in zip(watch.layers, loads, strict=True):
            for e, routes in enumerate(load):
                key = layer.number, e
                self.without_route[key] = 0 if routes else self.without_route.get(key, 0) + 1
                if self.without_route[key] == self.options.dead_after:
                    what = f"no token has used it in {self.options.dead_after} checks in a row"
                    ranks = self._holders(layer, e) if any(e in members for _, members in layer.groups) else ()
                    yield Finding("dead", what, layer.number, e, ranks)

    def _buffers(self, watch: _Watch, values: dict[str, Tensor], rows: list[list[float]]) -> Iterable[Finding]:
        most, place, rank = max((n, i, r) for i, layer_rows in enumerate(rows) for r, n in enumerate(layer_rows))
        if most <= 1.1 * self.most_rows:
            return
        self.most_rows = int(most)
        layer = watch.layers[place]
        received = values[f"{layer.number}.received"].sum(1)[rank // self.parallel.ep]
        held = [e for _, members in layer.groups for e in members if rank in self._holders(layer, e)]
        busiest = max(held, key=lambda e: float(received[e]))
        mean = sum(rows[place]) / len(rows[place])
        what = f"a dispatch brought {int(most)} rows, the most so far (mean of the ranks {mean:.0f}); the expert named has most of the routes"
        yield Finding("buffer", what, layer.number, busiest, (rank,))


class _Watch:
    """The hooks of one step and what they have seen on this rank. They add up and compare; nothing is communicated."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.handles: list[Any] = []
        self.used: dict[tuple[int | None, str], Tensor] = {}
        """(layer, parameter's name) -> checksum of what forward used; of an expert's parameter one for each expert."""
        self.layers: list[_Layer] = []
        self.norms: list[_Norm] = []
        for i, block in enumerate(guard.model.layers):
            self.norms.append(_Norm(guard))
            self.handles.append(block.attn_norm.register_forward_hook(self.norms[-1].forward))
            if isinstance(block.ffn, MoELayer):
                self.layers.append(_Layer(i, block.ffn, guard))
                self.handles += self.layers[-1].hooks()
        for name, module in guard.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)) and module is not guard.model.head:
                self.handles.append(module.register_forward_pre_hook(self._look(name)))

    def _look(self, name: str) -> Callable[..., None]:
        parts = name.split(".")
        number = int(parts[1]) if parts[0] == "layers" else None

        def look(module: nn.Module, _: Any) -> None:
            # The head is used without a call of its own, when the last norm has been.
            owners = [(name, module)]
            if module is self.guard.model.norm and self.guard.model.head is not None:
                owners.append(("head", self.guard.model.head))
            for prefix, owner in owners:
                for key, parameter in owner.named_parameters(recurse=False):
                    if (number, f"{prefix}.{key}") not in self.used:
                        local = parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()
                        self.used[number, f"{prefix}.{key}"] = _checksum(local, isinstance(owner, GroupedExperts))

        return look

    def checksums(self) -> list[Tensor]:
        return [c for value in self.used.values() for c in value.unbind()]

    def checksum_names(self) -> list[tuple[int | None, str, int | None]]:
        """(layer, parameter, expert among those of this rank or None) of each of `checksums`."""
        found: list[tuple[int | None, str, int | None]] = []
        for (layer, name), value in self.used.items():
            found += [(layer, name, e if ".ffn.experts." in name else None) for e in range(len(value))]
        return found

    def global_expert(self, number: int | None, name: str, expert: int, place: int) -> int:
        layer = next(layer for layer in self.layers if layer.number == number)
        members = next(members for experts, members in layer.groups if name in (layer.names[experts, key] for key in ("gate_up", "down")))
        return members[place * (len(members) // self.guard.parallel.ep) + expert]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            del layer.module.parts  # the class's own is seen again


class _Layer:
    """One MoE layer. Its `parts` is called once in a forward pass, of strata once for each, and as often again where blocks are recomputed."""

    def __init__(self, number: int, module: MoELayer, guard: Guard) -> None:
        self.number, self.module, self.guard = number, module, guard
        parallel = guard.parallel
        moe = guard.model.config.moe
        assert moe is not None, "it has an MoE layer"
        self.num_experts: int = moe.num_experts
        everyone = [list(range(self.num_experts))] if module.members is None else module.members
        self.groups = list(zip(module.expert_groups(), everyone, strict=True))
        inner = "" if module.members is None else "{}."
        self.names = {
            (experts, key): f"layers.{number}.ffn.experts.{inner.format(i)}{key}"
            for i, (experts, _) in enumerate(self.groups) for key, _ in experts.named_parameters()
        }  # fmt: skip
        zeros: Callable[..., Tensor] = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=guard.device)  # noqa: E731
        self.group, self.place = divmod(guard.rank, parallel.ep)
        data_groups = parallel.dp_replicate * parallel.dp_shard
        self.sent, self.received = zeros(data_groups, 2, self.num_experts), zeros(data_groups, 2, self.num_experts)
        self.sent_rows, self.received_rows = zeros(data_groups, parallel.ep), zeros(data_groups, parallel.ep)
        self.said, self.squares = zeros(self.num_experts), zeros(self.num_experts)
        self.replay = zeros(guard.world, self.num_experts)
        self.most_rows = 0
        self.dtypes: set[torch.dtype] = set()
        self.passes, self.calls = len(module.routers()), 0
        self.again = False
        self.decided: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.weights: dict[int, Tensor] = {}

    def sums(self) -> dict[str, Tensor]:
        names = ("sent", "received", "sent_rows", "received_rows", "said", "squares", "replay")
        most_rows, wrong = self.said.new_zeros(self.guard.world), self.said.new_zeros(self.guard.world, len(_FLOATS))
        most_rows[self.guard.rank] = self.most_rows
        for dtype in self.dtypes - {self.guard.exact}:
            wrong[self.guard.rank, _FLOATS.index(dtype)] = 1
        return {"most_rows": most_rows, "wrong_dtypes": wrong, **{name: getattr(self, name) for name in names}}

    def hooks(self) -> list[Any]:
        original = self.module.parts

        def parts(routing: Routing) -> list[Routing]:
            return original(self.enter(routing))

        self.module.parts = parts  # type: ignore[method-assign]
        handles = [experts.register_forward_pre_hook(self._receive(members)) for experts, members in self.groups]
        return handles + [router.register_forward_pre_hook(self._look_at_router) for router in self.module.routers()]

    def enter(self, routing: Routing) -> Routing:
        """At a call of `parts`: notes what is sent; gives the routing back with weights whose gradient is that of the experts alone."""
        turn, number = divmod(self.calls, self.passes)
        self.calls += 1
        self.again = self.guard.recomputes and turn % 2 == 1
        decision = routing.decision
        self.dtypes.add(routing.weights.dtype)
        if self.again or not self.guard.recomputes:
            # With recomputation the weights of the second time: keeping the first ones would cost what recomputation saves.
            self.weights[number] = routing.weights.detach()
        if self.again:
            active, probes = self.decided.pop(number)
            changed = (active != decision.active).sum(0)
            if probes is not None and decision.probes is not None:
                changed = changed + (probes != decision.probes).sum(0)
            self.replay[self.guard.rank] += changed
            return self._apart(routing)
        if self.guard.recomputes:
            self.decided[number] = decision.active, decision.probes
        probing = None if decision.probes is None else decision.probes > 0
        for _, members in self.groups:
            asked = decision.active[:, members]
            self.sent[self.group, 0, members] += asked.sum(0)
            if probing is not None:
                self.sent[self.group, 1, members] += probing[:, members].sum(0)
                asked = asked | probing[:, members]
            if self.guard.parallel.ep > 1:
                self.sent_rows[self.group] += asked.unflatten(1, (self.guard.parallel.ep, -1)).any(-1).sum(0)

        def gradient(grad: Tensor) -> None:
            terms = self.weights.pop(number).double() * grad.double()
            self.said += terms.sum(0)
            self.squares += terms.square().sum(0)

        routing = self._apart(routing)
        routing.weights.register_hook(gradient)
        return routing

    @staticmethod
    def _apart(routing: Routing) -> Routing:
        """With weights of their own: the router's losses may take their gradients through the others, and a table's have none."""
        weights = routing.weights
        return dataclasses.replace(routing, weights=weights.view_as(weights) if weights.requires_grad else weights.detach().requires_grad_())

    def _receive(self, members: list[int]) -> Callable[..., None]:
        def receive(_: nn.Module, inputs: tuple[Work]) -> None:
            if self.again:
                return
            work = inputs[0]
            local = len(members) // self.guard.parallel.ep
            mine = members[self.place * local : (self.place + 1) * local]
            self.received[self.group, 0, mine] += work.routes.counts
            if work.probes is not None:
                self.received[self.group, 1, mine] += work.probes.counts
            if self.guard.parallel.ep > 1:
                rows = len(work.rows)
                self.received_rows[self.group, self.place] += rows
                self.most_rows = max(self.most_rows, rows)

        return receive

    def _look_at_router(self, router: nn.Module, _: Any) -> None:
        self.dtypes.update(p.dtype for p in router.parameters() if p.is_floating_point())


class _Norm:
    """Outputs of the norm before a block's attention, and their gradients."""

    def __init__(self, guard: Guard) -> None:
        self.recomputes, self.calls = guard.recomputes, 0
        self.said, self.squares = torch.zeros(2, dtype=torch.float64, device=guard.device).unbind()
        self.output: Tensor | None = None

    def forward(self, _: nn.Module, __: Any, output: Tensor) -> None:
        again = self.recomputes and self.calls % 2 == 1
        self.calls += 1
        if again or not self.recomputes:
            self.output = output.detach()
        if not again and output.requires_grad:
            output.register_hook(self.gradient)

    def gradient(self, grad: Tensor) -> None:
        assert self.output is not None, "backward follows forward"
        terms = (self.output.double() * grad.double()).sum(-1)
        self.said += terms.sum()
        self.squares += terms.square().sum()
        self.output = None


class _Sums:
    """float64 tensors that are added up over ranks in one collective."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.parts: dict[str, Tensor] = {}

    def reduce(self) -> dict[str, Tensor]:
        flat = torch.cat([p.flatten() for p in self.parts.values()])
        if self.group is not None:
            dist.all_reduce(flat, group=self.group)
        flat = flat.cpu()
        found = flat.split([p.numel() for p in self.parts.values()])
        return {name: part.view(value.shape) for (name, value), part in zip(self.parts.items(), found)}


def _local(parameter: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """This rank's part of a parameter and of its gradient, and where it begins in the whole."""
    grad = parameter.grad
    assert grad is not None, "asked for parameters with a gradient"
    if not isinstance(parameter, DTensor):
        return parameter.detach(), grad, (0,) * parameter.ndim
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.detach().to_local(), grad.to_local() if isinstance(grad, DTensor) else grad, tuple(offset)


def _checksum(parameter: Tensor, by_expert: bool) -> Tensor:
    """(1,) or (experts,) int64: the sum of the bits, read as whole numbers; no rounding, no order."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    bits = parameter.contiguous().view(whole)
    return bits.flatten(1).sum(1, dtype=torch.int64) if by_expert else bits.sum(dtype=torch.int64)[None]


def _where(condition: Tensor) -> list[list[int]]:
    return condition.nonzero().tolist()


def _times(found: Tensor, said: Tensor) -> str:
    return f"{float(found / said):.4g} times" if said else f"{float(found):.3g} and not 0,"
