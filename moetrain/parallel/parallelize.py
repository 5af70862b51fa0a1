"""Spreads a model over ranks, in one order: experts over ep -> activation checkpointing -> FSDP.

Experts first, since they change which parameters there are. Checkpointing next, so that the recomputed region has FSDP's hooks outside and a
block's parameters are gathered once for recomputation and backward together. FSDP last: it takes the parameters as it finds them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from moetrain.config import TrainConfig
from moetrain.model import Block, Transformer
from moetrain.moe.dispatch import AllToAllDispatcher
from moetrain.moe.exchange import Collective
from moetrain.moe.layer import MoELayer
from moetrain.moe.peers import open_exchange
from moetrain.moe.routing import replay_contexts
from moetrain.parallel.mesh import Meshes


def parallelize(model: Transformer, meshes: Meshes | None, train: TrainConfig) -> None:
    """In place. model: on the meta device, or filled with whole weights when meshes is None."""
    if meshes is not None and meshes.ep is not None:
        for module in model.modules():
            if isinstance(module, MoELayer):
                _spread_experts(module, meshes)
    if train.activation_checkpointing == "block":
        for block in model.layers:
            _checkpoint(block)
    if meshes is not None:
        _shard(model, meshes, train)


def _spread_experts(layer: MoELayer, meshes: Meshes) -> None:
    ep = meshes.ep
    assert ep is not None, "experts are spread over the ep axis"
    for experts in layer.expert_groups():
        for name, parameter in list(experts.named_parameters()):
            assert parameter.is_meta, "experts are spread before they have values: a rank never holds all of them"
            local = parameter.new_empty(parameter.shape[0] // ep.size(), *parameter.shape[1:])
            setattr(experts, name, nn.Parameter(DTensor.from_local(local, ep, [Shard(0)], run_check=False)))
    layer.dispatcher = AllToAllDispatcher(Collective(ep.get_group()))


def choose_exchange(model: Transformer, meshes: Meshes | None, choice: str, device: torch.device) -> str | None:
    """Let all layers' dispatchers exchange by `choice` (`parallel.exchange`). Collective. Returns what is used and why, None where nothing is
    exchanged. ValueError if `peers` is asked for and impossible."""
    dispatchers = [m.dispatcher for m in model.modules() if isinstance(m, MoELayer) and isinstance(m.dispatcher, AllToAllDispatcher)]
    if meshes is None or meshes.ep_group is None or not dispatchers:
        return None
    exchange, reason = open_exchange(choice, meshes.ep_group, device)
    for dispatcher in dispatchers:
        dispatcher.exchange = exchange
    return f"{exchange.name} ({reason})"


def _checkpoint(block: Block) -> None:
    forward = block.forward
    # Non-reentrant, with the routes of the first forward replayed. The model draws no random numbers of torch's, so no RNG state is kept.
    block.forward = lambda *args: checkpoint(  # type: ignore[method-assign]
        forward, *args, use_reentrant=False, context_fn=replay_contexts, preserve_rng_state=False
    )


def _shard(model: Transformer, meshes: Meshes, train: TrainConfig) -> None:
    compute = torch.bfloat16 if train.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    sharded: list[nn.Module] = []
    for block in model.layers:
        if isinstance(block.ffn, MoELayer):
            if meshes.experts is not None:
                # Dim 1 (2F or D), not the experts': the placements on ep and dp_shard then never share a dim, and few experts per rank still
                # spread over many ranks.
                for experts in block.ffn.expert_groups():
                    fully_shard(experts, mesh=meshes.experts, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
                    sharded.append(experts)
            # The router stays float32 under any policy; it is small, so it is not given back between forward and backward.
            for router in block.ffn.routers():
                fully_shard(router, mesh=meshes.dense, mp_policy=exact, reshard_after_forward=False)
                sharded.append(router)
        ignored = _ignored(block, meshes)
        fully_shard(block, mesh=meshes.dense, mp_policy=policy, ignored_params=ignored)
        sharded.append(block)
    fully_shard(model, mesh=meshes.dense, mp_policy=policy, ignored_params=_ignored(model, meshes))
    sharded.append(model)
    for module in sharded:
        assert isinstance(module, FSDPModule)
        # Losses are sums divided once by the global count, so gradients are added and nothing else. "Force sum": gloo has no pre-multiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _ignored(module: nn.Module, meshes: Meshes) -> set[nn.Parameter]:
    """Experts that no axis but ep shards keep their own gradients; FSDP must not touch them."""
    if meshes.experts is not None:
        return set()
    return {p for m in module.modules() if isinstance(m, MoELayer) for p in m.experts.parameters()}


# ------------------------------------------------------------------------------------------------------- values of parameters


@torch.no_grad()
def copy_whole(parameter: Tensor, whole: Tensor) -> None:
    """Set a parameter, sharded or not, from its whole value: every rank takes its part, without communication."""
    local, part = _own_part(parameter, whole)
    local.copy_(part)


@torch.no_grad()
def add_whole(parameter: Tensor, whole: Tensor) -> None:
    """Add to a parameter, sharded or not, as `copy_whole` sets it."""
    local, part = _own_part(parameter, whole)
    local.add_(part.to(local))


@torch.no_grad()
def clear_where(tensor: Tensor, changed: Tensor) -> None:
    """Set to 0, sharded or not, the entries at which the whole tensor `changed` is not 0."""
    local, part = _own_part(tensor, changed)
    local.masked_fill_((part != 0).to(local.device), 0)


def _own_part(parameter: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank holds of a parameter, and the same part of `whole`."""
    if parameter.shape != whole.shape:
        raise ValueError(f"shape {tuple(whole.shape)} given, {tuple(parameter.shape)} wanted")
    if not isinstance(parameter, DTensor):
        return parameter, whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    part = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape))]
    local = parameter.to_local()
    assert local.shape == part.shape, f"local part {tuple(local.shape)}, computed {tuple(part.shape)}"
    return local, part


def wholes(named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor or DTensor) -> (name, whole tensor on the CPU), one at a time. Collective over the tensors' meshes."""
    for name, tensor in named:
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
