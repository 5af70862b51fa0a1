"""`moetrain upcycle`: from one or more checkpoints to another one, tensor by tensor: memory is a layer's experts and a shard, not a model.

Here is what every method shares: configs, the order of reading and writing, the report. What a method does to a layer is in split.py,
calibrate.py, copy.py, merge.py and collapse.py. docs/upcycling.md lists the methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.config import BudgetRouter, ModelConfig, MoEConfig, Router, SigmoidSteRouter, TopKRouter, UpcycleConfig
from moetrain.config.model import SharedConfig, layer_problems
from moetrain.config.sections import SPLITS
from moetrain.convert.calibrate import Calibration, calibrate, remaining
from moetrain.convert.collapse import collapse, dense_config
from moetrain.convert.copy import copy_ffn, drop_ffn, group_rows, scale_experts, slice_factor, step_0_factor, virtual_groups
from moetrain.convert.huggingface import architecture, check_output, config_differences, parameter_shapes, read_config, read_tensors, write_model
from moetrain.convert.merge import aggregate, merge
from moetrain.convert.receipt import Receipt, compare
from moetrain.convert.split import check_split, cluster_partition, generator, random_partition, split_ffn
from moetrain.model import initial_tensor

RECEIPT = "receipt.json"
Progress = Callable[[int, int], None]
Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class UpcycleReport:
    output: Path
    config: ModelConfig
    """Of the result, as asked for; the folder has the router's output_scale multiplied into the experts."""
    model_type: str
    dense_parameters: int
    """Of `upcycle.dense`, whatever it is."""
    parameters: int
    activated: dict[float, int]
    """Mean active experts per token -> parameters that such a token uses, for 1 to all experts, or for the number that the router
    holds; empty for a dense result."""
    files: list[str]
    receipt: Receipt | None

    def lines(self) -> list[str]:
        """For the console."""
        lines = [f"{self.output} ({self.model_type}): {self.dense_parameters:,} -> {self.parameters:,} parameters"]
        if self.config.moe is not None:
            for active, parameters in self.activated.items():
                share = parameters / self.parameters
                lines.append(f"  {active:g} of {self.config.moe.num_experts} experts: {parameters:,} activated ({share:.1%})")
        return lines + ([] if self.receipt is None else self.receipt.lines())


def target_config(source: ModelConfig, upcycle: UpcycleConfig) -> ModelConfig:
    """Config of what `upcycle` makes of `source`, the model in `upcycle.dense`. ValueError names the field that can't be."""
    if upcycle.method == "to_dense":
        return dense_config(source, upcycle.join, upcycle.dense)
    if upcycle.method == "aggregate":
        return _aggregate_config(source, upcycle)
    if source.moe is not None:
        raise ValueError(f"upcycle.dense ({upcycle.dense}) is a mixture of {source.moe.num_experts} experts already; give a dense model")
    if source.finedeep is not None:
        raise ValueError(f"upcycle.dense ({upcycle.dense}) has model.finedeep; a stack of gated sub-layers can't be cut or copied; give a plain FFN")
    if source.mlp_bias:
        raise ValueError(
            f"upcycle.dense ({upcycle.dense}) has mlp_bias: true; experts have no bias, and a bias can't be cut into slices that add up"
        )
    num_experts = len(upcycle.models) if upcycle.method == "btx" else upcycle.num_experts
    pieces = num_experts if upcycle.method in SPLITS else upcycle.granularity if upcycle.method == "virtual_groups" else 1
    size, shared = source.intermediate_size, upcycle.shared_dim
    if shared is not None and shared >= size:
        raise ValueError(f"upcycle.shared_dim ({shared}) leaves no neuron of intermediate_size ({size}) to cut into experts")
    try:
        expert_dim = check_split(size - (shared or 0), pieces)
    except ValueError as error:
        text = str(error) if upcycle.method != "virtual_groups" else str(error).replace("num_experts", "granularity", 1)
        text = text if shared is None else text.replace("intermediate_size", "intermediate_size - shared_dim", 1)
        raise ValueError(f"upcycle.{text}") from None
    for problem in layer_problems(upcycle.layers, source.num_layers):
        raise ValueError(f"upcycle.layers{problem}, the layers of {upcycle.dense}")
    moe = MoEConfig(
        num_experts=num_experts, expert_dim=expert_dim, router=_router(upcycle, num_experts), layers=upcycle.layers,
        shared=None if shared is None else SharedConfig(dim=shared),
    )  # fmt: skip
    return source.model_copy(update={"moe": moe})


def _router(upcycle: UpcycleConfig, num_experts: int) -> Router:
    router, method = upcycle.router, upcycle.method
    if method == "dsmoe":
        return SigmoidSteRouter() if router is None else router
    # 3/8 of the experts, top 3 of 8, as many as DSMoE's comparison gives LLaMA-MoE (its Table 1).
    if method == "llama_moe":
        router = TopKRouter(top_k=max(1, round(3 / 8 * num_experts))) if router is None else router
        assert isinstance(router, TopKRouter), "config.check refuses this"
        if "output_scale" not in router.model_fields_set:
            # k of E slices sum to about k/E of the dense output, and normalised weights divide by k again (LLaMA-MoE's score_scale_factor).
            router = router.model_copy(update={"output_scale": num_experts / router.top_k})
        return router
    if method == "slices":
        router = BudgetRouter(target_active=3 / 8 * num_experts) if router is None else router
        if isinstance(router, BudgetRouter) and "output_scale" not in router.model_fields_set:
            # A slice weighs 1, as in the dense FFN, in the mean over a token's routes, or, not normalised, where the softmax is uniform.
            router = router.model_copy(update={"output_scale": router.target_active if router.normalize else float(num_experts)})
        return router
    if router is not None:
        return router
    if method == "virtual_groups":
        # Softmax, then top-k: better than the other order once the weights are scaled (arXiv 2410.07524).
        return TopKRouter(top_k=upcycle.granularity, normalize=False)
    return TopKRouter(top_k=min(2, num_experts))


def _aggregate_config(source: ModelConfig, upcycle: UpcycleConfig) -> ModelConfig:
    if source.moe is None:
        raise ValueError(f"upcycle.dense ({upcycle.dense}) is dense; method aggregate wants mixtures")
    if isinstance(source.moe.expert_dim, list) or source.moe.strata is not None:
        raise ValueError(f"upcycle.dense ({upcycle.dense}): its experts differ in size or lie in strata; aggregate wants equal ones side by side")
    num_experts, own = source.moe.num_experts * (1 + len(upcycle.models)), source.moe.router
    router = own if upcycle.router is None else upcycle.router
    # What shapes the router's weights and what they mean is not the user's to change here.
    for name in ("type", "bias", "input"):
        if getattr(router, name, None) != getattr(own, name, None):
            raise ValueError(f"upcycle.router.{name} is {getattr(router, name, None)}, but {getattr(own, name, None)} in the mixtures")
    if isinstance(router, TopKRouter) and router.top_k > num_experts:
        raise ValueError(f"upcycle.router.top_k ({router.top_k}) is more than the experts of all mixtures ({num_experts})")
    return source.model_copy(update={"moe": source.moe.model_copy(update={"num_experts": num_experts, "router": router})})


def upcycle(config: UpcycleConfig, progress: Progress | None = None) -> UpcycleReport:
    """Write `config.output`, a Hugging Face folder.

    Tensors keep the checkpoint's dtype, tokenizer files are copied from `config.dense`. progress: called with (tensors read, tensors in all).
    ValueError, before anything is written, for models that can't be converted; a run that is killed leaves no folder of that name.
    """
    check_output(config.output)
    source = read_config(config.dense)
    target = target_config(source, config)
    others = _read_others(config, source)
    tensors = _tensors(source, target, others, config, progress)
    files = write_model(config.output, target, tensors, max_shard_bytes=config.max_shard_bytes, source=config.dense)
    receipt = None
    if config.receipt:
        receipt = compare(config.dense, source, config.output, read_config(config.output))
        path = Path(config.output) / RECEIPT
        record = {"method": config.method, **receipt.to_dict()}
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files = sorted([*files, path])
    activated: list[float] = []
    if target.moe is not None:
        experts = target.moe.num_experts
        known = target.moe.router.default_active(experts)
        activated = [known] if known < experts or isinstance(target.moe.router, TopKRouter) else list(range(1, experts + 1))
    return UpcycleReport(
        output=Path(config.output),
        config=target,
        model_type=architecture(target),
        dense_parameters=source.num_params(),
        parameters=target.num_params(),
        activated={n: round(target.num_active_params(n)) for n in activated},
        files=[f.name for f in files],
        receipt=receipt,
    )


def _read_others(config: UpcycleConfig, source: ModelConfig) -> list[ModelConfig]:
    """Configs of `config.models`. ValueError for one that is not of the same make as `config.dense`."""
    found = [read_config(folder) for folder in config.models]
    for folder, other in zip(config.models, found):
        for field, ours, theirs in config_differences(source, other):
            raise ValueError(f"upcycle.models: {folder} has {field} {theirs}, but {config.dense} has {ours}; the models must be of one make")
    return found


# ------------------------------------------------------------------------------------------------------------------ tensors


def _tensors(
    source: ModelConfig, target: ModelConfig, others: list[ModelConfig], config: UpcycleConfig, progress: Progress | None
) -> Named:
    if config.method == "to_dense":
        return _dense_tensors(_counted(read_tensors(config.dense, source), source, progress), source, config)
    streams = [read_tensors(folder, other) for folder, other in zip(config.models, others)]
    base = _counted(read_tensors(config.dense, source), source, progress)
    if config.method == "aggregate":
        return _aggregate_tensors(base, streams, source, config)
    if config.method == "btx":
        return _branch_tensors(base, streams, target, config)
    # Before the first tensor is written, so that data that does not fit leaves nothing behind.
    calibration = calibrate(config, source) if config.needs_calibration else None
    return _mixture_tensors(base, target, config, calibration)


def _counted(tensors: Named, model: ModelConfig, progress: Progress | None) -> Named:
    count = len(parameter_shapes(model))
    for done, item in enumerate(tensors, 1):
        yield item
        if progress is not None:
            progress(done, count)


def _mixture_tensors(base: Named, target: ModelConfig, config: UpcycleConfig, calibration: Calibration | None) -> Named:
    shapes = parameter_shapes(target)
    ffn: dict[str, Tensor] = {}
    norm = torch.empty(0)
    for name, tensor in base:
        if ".ffn." not in name or name in shapes:
            norm = tensor if ".ffn_norm." in name else norm
            yield name, tensor
            continue
        prefix, kind, _ = name.rsplit(".", 2)
        ffn[kind] = tensor
        if len(ffn) == 3:
            gate, up, down = ffn["gate_proj"], ffn["up_proj"], ffn["down_proj"]
            partition = None
            if calibration is not None:
                layer = int(prefix.split(".")[1])
                partition = None if calibration.partitions is None else calibration.partitions[layer]
                shared = calibration.shared[layer]
                if config.shared_dim is not None:
                    for part, whole in (("gate", gate[shared]), ("up", up[shared]), ("down", down[:, shared])):
                        yield f"{prefix}.shared.{part}_proj.weight", whole
                rest = remaining(len(gate), shared)
                gate, up, down = gate[rest], up[rest], down[:, rest]
            gate_up, down = _experts(gate, up, down, prefix, config, partition)
            yield from _layer(prefix, gate_up, down, norm, shapes, target, config)
            ffn = {}


def _experts(gate: Tensor, up: Tensor, down: Tensor, prefix: str, config: UpcycleConfig, partition: Tensor | None) -> tuple[Tensor, Tensor]:
    experts, draws = config.num_experts, generator(config.seed, f"{prefix}.{config.method}")
    if config.method == "copy":
        return copy_ffn(gate, up, down, experts, config.noise, draws)
    if config.method == "drop":
        return drop_ffn(gate, up, down, experts, config.drop_ratio, config.drop_shared, draws)
    if config.method == "virtual_groups":
        return virtual_groups(gate, up, down, experts, config.granularity)
    if config.split == "random":
        partition = random_partition(gate.shape[0], experts, draws)
    elif config.split == "cluster":
        partition = cluster_partition(gate if config.cluster_on == "gate" else up, experts, config.cluster_metric, draws)
    return split_ffn(gate, up, down, experts, partition)


def _layer(
    prefix: str, gate_up: Tensor, down: Tensor, norm: Tensor, shapes: dict[str, tuple[int, ...]], target: ModelConfig, config: UpcycleConfig
) -> Named:
    """The parameters of one MoE layer, the experts scaled and the router drawn. norm: the weight of the norm before it. shapes: the target's."""
    moe = target.moe
    assert moe is not None, "made by target_config"
    slices = config.granularity if config.method == "virtual_groups" else 1
    if config.scales_weights:
        if config.method == "slices":
            factor = slice_factor(target, prefix, shapes, norm, config.seed)
        else:
            copies = 1 if config.method == "dsmoe" else moe.num_experts // slices
            factor = step_0_factor(moe.router, copies, slices, norm)
        # Near 1 it is rounding: plain copies stay bit-equal.
        if abs(factor - 1) > 1e-12:
            scale_experts(gate_up, down, factor)
    for name, (rows, *rest) in shapes.items():
        if name.startswith(f"{prefix}.router."):
            yield name, group_rows(initial_tensor(name, (rows // slices, *rest), target, config.seed), slices).to(gate_up.dtype)
    yield f"{prefix}.experts.gate_up", gate_up
    yield f"{prefix}.experts.down", down


def _branch_tensors(base: Named, streams: list[Named], target: ModelConfig, config: UpcycleConfig) -> Named:
    shapes = parameter_shapes(target)
    ffn: dict[str, list[Tensor]] = {}
    norm = torch.empty(0)
    for (name, start), *found in zip(base, *streams, strict=True):
        models = [tensor for _, tensor in found]
        if ".ffn." not in name or name in shapes:
            draws = generator(config.seed, f"{name}/{config.merge}")
            merged = merge(start, models, config.merge, config.merge_density, config.merge_scale, draws)
            norm = merged if ".ffn_norm." in name else norm
            yield name, merged
            continue
        prefix, kind, _ = name.rsplit(".", 2)
        ffn[kind] = [m.to(start.dtype) for m in models]
        if len(ffn) == 3:
            gate_up = torch.stack([torch.cat(pair) for pair in zip(ffn["gate_proj"], ffn["up_proj"])])
            yield from _layer(prefix, gate_up, torch.stack(ffn["down_proj"]), norm, shapes, target, config)
            ffn = {}


def _aggregate_tensors(base: Named, streams: list[Named], source: ModelConfig, config: UpcycleConfig) -> Named:
    for (name, start), *found in zip(base, *streams, strict=True):
        models = [start, *(tensor.to(start.dtype) for _, tensor in found)]
        yield name, aggregate(name, models, source, config.merge, generator(config.seed, name))


def _dense_tensors(base: Named, source: ModelConfig, config: UpcycleConfig) -> Named:
    assert source.moe is not None, "a mixture"
    last = ".experts.down" if source.moe.shared is None else ".shared.down_proj.weight"
    parts: dict[str, Tensor] = {}
    for name, tensor in base:
        prefix, _, part = name.partition(".ffn.")
        if not part.startswith(("router.", "experts.", "shared.")):
            yield name, tensor
            continue
        parts[part] = tensor
        if name.endswith(last):
            where = f"upcycle.dense ({config.dense}), {prefix}"
            gate, up, down = collapse(parts["experts.gate_up"], parts["experts.down"], source, config.join, where)
            if source.moe.shared is not None:
                gate, up = (torch.cat((parts[f"shared.{kind}_proj.weight"], own)) for kind, own in (("gate", gate), ("up", up)))
                down = torch.cat((parts["shared.down_proj.weight"], down), dim=1)
            yield f"{prefix}.ffn.gate_proj.weight", gate.contiguous()
            yield f"{prefix}.ffn.up_proj.weight", up.contiguous()
            yield f"{prefix}.ffn.down_proj.weight", down
            parts = {}
