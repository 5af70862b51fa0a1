"""Rules between options: what a type alone cannot say."""

from __future__ import annotations

import math

from moetrain.config.base import ConfigError, short
from moetrain.config.model import ModelConfig, MoEConfig, RopeScaling, layer_problems
from moetrain.config.routers import SigmoidSteRouter, TaskRouter, TopKRouter
from moetrain.config.sections import UPCYCLE_OPTIONS, Config, ParallelConfig, UpcycleConfig

MAX_EXPERTS = 1 << 20
"""In all layers: some are listed one by one, so numbers from a file must not make those lists endless."""


def check(config: Config) -> list[str]:
    """Cross-field rules; returns every broken one as a line that names the fields, their values and what would do."""
    bad: list[str] = []
    model, train, parallel, data = config.model, config.train, config.parallel, config.data
    if parallel.dp_shard == 0:
        bad.append("parallel.dp_shard: 0 ranks; use -1 for all that are left, or 1 and more")
    if parallel.exchange != "auto" and parallel.ep == 1:
        bad.append(f"parallel.exchange ({parallel.exchange}) has an effect only with parallel.ep above 1; use auto, or spread the experts over ranks")
    if model is not None:
        _check_model(model, parallel, bad)
    if train is not None:
        if train.global_batch_size % train.micro_batch_size:
            bad.append(
                f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size ({train.micro_batch_size}) "
                f"times the number of ranks"
            )
        schedule = train.schedule
        if schedule.warmup_steps > train.steps:
            bad.append(f"train.schedule.warmup_steps ({schedule.warmup_steps}) is more than train.steps ({train.steps})")
        if schedule.decay_steps and schedule.type != "wsd":
            bad.append(f"train.schedule.decay_steps ({schedule.decay_steps}) has an effect only with type: wsd, not {schedule.type}")
        if schedule.type == "constant" and "min_lr_ratio" in schedule.model_fields_set:
            bad.append(f"train.schedule.min_lr_ratio ({schedule.min_lr_ratio}) has no effect with type: constant")
        if schedule.type == "wsd" and not schedule.decay_steps:
            bad.append("train.schedule.decay_steps: type wsd needs the number of steps of its decay")
        if schedule.type == "wsd" and schedule.warmup_steps + schedule.decay_steps > train.steps:
            bad.append(
                f"train.schedule: warmup_steps ({schedule.warmup_steps}) + decay_steps ({schedule.decay_steps}) "
                f"is more than train.steps ({train.steps})"
            )
        for name in ("router_lr", "expert_lr"):
            if model is not None and model.moe is None and getattr(train, name) is not None:
                bad.append(f"train.{name} ({getattr(train, name)}) has an effect only with model.moe: a dense model has neither routers nor experts")
        if model is not None and train.experts_backend == "sonicmoe":
            _check_sonicmoe(train.dtype, model, bad)
        if train.eval_every and not data.eval:
            bad.append(f"train.eval_every ({train.eval_every}) needs at least one set in data.eval")
    if (data.train or data.eval) and model is not None and data.seq_len > model.max_position_embeddings:
        bad.append(f"data.seq_len ({data.seq_len}) is more than model.max_position_embeddings ({model.max_position_embeddings})")
    for name in sorted(config.guard.idle() & config.guard.model_fields_set):
        bad.append(f"guard.{name} ({getattr(config.guard, name)}) has an effect only with guard.every, the steps between checks")
    weights = [s.weight is not None for s in data.train]
    if any(weights) and not all(weights):
        bad.append("data.train: give a weight to every source or to none; missing for " + ", ".join(s.name for s in data.train if s.weight is None))
    if any(weights) and data.temperature is not None:
        bad.append(f"data.temperature ({data.temperature}) excludes weights in data.train: remove one of the two")
    for kind, names in (("data.train", [s.name for s in data.train]), ("data.eval", [s.name for s in data.eval])):
        for name in sorted({n for n in names if names.count(n) > 1}):
            bad.append(f"{kind}: the name {name!r} is given {names.count(name)} times; metrics are kept apart by name")
    for ending in (config.prepare.extensions if config.prepare is not None else None) or []:
        if not ending.startswith("."):
            bad.append(f"prepare.extensions: {ending!r} would match every name that ends so; write .{ending}")
    if model is not None and model.moe is not None and data.train:
        known = {s.name for s in data.train}
        for name in model.moe.router.tag_names():
            if name not in known:
                bad.append(f"model.moe.router: {name!r} is no source in data.train; its names are {', '.join(sorted(known))}")
    if model is not None:
        router = None if model.moe is None else model.moe.router
        tasks = router.tag_names() if isinstance(router, TaskRouter) else []
        for name in [s.name for s in data.train] if tasks else []:
            if name not in tasks:
                bad.append(f"data.train: {name!r} is no task of model.moe.router; its tasks are {', '.join(tasks)}")
        for s in data.eval:
            if tasks and (s.task or s.name) not in tasks:
                bad.append(f"data.eval: {s.task or s.name!r} is no task of model.moe.router; give {s.name} a task, one of {', '.join(tasks)}")
            elif s.task is not None and not tasks:
                bad.append(f"data.eval: the task of {s.name} ({s.task}) has an effect only with model.moe.router.type: task")
    if config.upcycle is not None:
        _check_upcycle(config.upcycle, bad)
    return bad


def _check_model(model: ModelConfig, parallel: ParallelConfig, bad: list[str]) -> None:
    if model.mla is not None:
        _check_mla(model, bad)
    elif model.head_dim is None and model.hidden_size % model.num_heads:
        bad.append(f"model.hidden_size ({model.hidden_size}) is no multiple of model.num_heads ({model.num_heads}); set model.head_dim or change one")
    elif model.head_size % 2:
        bad.append(f"model.head_dim ({model.head_size}) must be even for rotary embeddings")
    if model.num_heads % model.kv_heads:
        bad.append(f"model.num_heads ({model.num_heads}) must be a multiple of model.num_kv_heads ({model.kv_heads})")
    if "qk_norm_over" in model.model_fields_set and not model.qk_norm:
        bad.append(f"model.qk_norm_over ({model.qk_norm_over}) has an effect only with qk_norm: true")
    if model.sliding_layers is not None:
        if model.sliding_window is None:
            bad.append("model.sliding_layers has an effect only with model.sliding_window")
        outside = [i for i in model.sliding_layers if not 0 <= i < model.num_layers]
        if outside:
            bad.append(f"model.sliding_layers: {outside} outside 0..{model.num_layers - 1}")
    scaling = model.rope_scaling
    if scaling is not None:
        wanted = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("original_max_position_embeddings",),
        }
        for name in wanted[scaling.type]:
            if getattr(scaling, name) is None:
                bad.append(f"model.rope_scaling.{name}: missing; type {scaling.type} needs it")
        yarn = ("beta_fast", "beta_slow", "attention_factor", *(("mscale", "mscale_all_dim") if model.mla is not None else ()))
        read = {"type", "factor", *wanted[scaling.type], *(yarn if scaling.type == "yarn" else ())}
        for name in RopeScaling.model_fields:
            if name not in read and getattr(scaling, name) is not None:
                without = "" if model.mla is not None or not name.startswith("mscale") else " and without model.mla"
                bad.append(f"model.rope_scaling.{name} ({getattr(scaling, name)}) has no effect with type: {scaling.type}{without}")
        if scaling.mscale is not None and (scaling.mscale_all_dim is None or scaling.attention_factor is not None):
            bad.append(f"model.rope_scaling.mscale ({scaling.mscale}) has an effect only with mscale_all_dim and without attention_factor")
    if model.finedeep is not None:
        pieces = model.finedeep.sublayers * model.finedeep.experts
        if model.intermediate_size % pieces:
            bad.append(
                f"model.intermediate_size ({model.intermediate_size}) must be a multiple of model.finedeep.sublayers x experts "
                f"({model.finedeep.sublayers} x {model.finedeep.experts} = {pieces})"
            )
        if model.mlp_bias:
            bad.append("model.mlp_bias: the experts of model.finedeep have no bias; set mlp_bias: false")
        if model.num_moe_layers == model.num_layers:
            bad.append("model.finedeep is the kind of FFN of dense layers, and model.moe makes every layer sparse; see model.moe.layers")
    if model.moe is None:
        if parallel.ep > 1:
            bad.append(f"parallel.ep ({parallel.ep}) needs model.moe: a dense model has no experts to share; use dp_shard")
        return
    moe = model.moe
    if model.num_moe_layers * moe.num_experts > MAX_EXPERTS:
        bad.append(
            f"model.moe.num_experts ({moe.num_experts}) in {model.num_moe_layers} sparse layers are more than {MAX_EXPERTS:,} experts; "
            f"use fewer, larger ones, or model.moe.layers for fewer sparse layers"
        )
        return
    if model.mlp_bias:
        bad.append("model.mlp_bias: experts have no bias; a model with model.moe needs mlp_bias: false")
    if moe.num_experts % parallel.ep:
        divisors = [d for d in range(1, moe.num_experts + 1) if moe.num_experts % d == 0]
        near = min(divisors, key=lambda d: abs(d - parallel.ep))
        bad.append(f"model.moe.num_experts ({moe.num_experts}) must be a multiple of parallel.ep ({parallel.ep}); nearest: {near}")
    if isinstance(moe.expert_dim, list):
        if len(moe.expert_dim) != moe.num_experts:
            bad.append(f"model.moe.expert_dim: {len(moe.expert_dim)} sizes for num_experts ({moe.num_experts}); give one for each, or one for all")
        elif not any(moe.expert_dim):
            bad.append("model.moe.expert_dim: every expert has size 0; one at least must compute something")
        for size, members in moe.groups.items():
            if len(members) % parallel.ep:
                bad.append(
                    f"model.moe.expert_dim: {len(members)} experts of size {size} can't be shared equally by parallel.ep ({parallel.ep}) ranks; give "
                    f"each size a multiple of {parallel.ep} experts"
                )
    shard = parallel.dp_shard
    for size in moe.groups:
        if shard > 1 and (model.hidden_size % shard or (2 * size) % shard):
            bad.append(
                f"parallel.dp_shard ({shard}) must divide model.hidden_size ({model.hidden_size}) and twice model.moe.expert_dim ({2 * size})"
            )
    bad += [f"model.moe.router{problem}" for problem in moe.router.problems(moe.num_experts)]
    if moe.strata is not None:
        _check_strata(moe, bad)
    if moe.route_budget is not None:
        _check_route_budget(moe, moe.route_budget, parallel, bad)
    bad += [f"model.moe.layers{problem}" for problem in layer_problems(moe.layers, model.num_layers)]


def _check_strata(moe: MoEConfig, bad: list[str]) -> None:
    assert moe.strata is not None, "asked for"
    sizes, router = moe.strata.sizes, moe.router
    if sum(sizes) != moe.num_experts:
        bad.append(f"model.moe.strata.sizes: {sizes} add up to {sum(sizes)}, not to num_experts ({moe.num_experts})")
    if not isinstance(router, TopKRouter):
        bad.append(f"model.moe.strata: a token goes on from its best expert, so the router is topk, not {router.type}")
        return
    for name in ("selection_bias", "capacity_factor"):
        if getattr(router, name):
            bad.append(f"model.moe.router.{name} ({getattr(router, name)}) does not go with model.moe.strata: each stratum has a router of its own")
    if router.num_groups > 1:
        bad.append(f"model.moe.router.num_groups ({router.num_groups}) does not go with model.moe.strata: later strata see fewer experts")
    if router.top_k > sizes[-1]:
        bad.append(f"model.moe.router.top_k ({router.top_k}) is more than the last stratum has experts ({sizes[-1]})")


def _check_route_budget(moe: MoEConfig, budget: float, parallel: ParallelConfig, bad: list[str]) -> None:
    router = moe.router
    if budget > moe.num_experts:
        bad.append(f"model.moe.route_budget ({budget}) is more than num_experts ({moe.num_experts}), which is room for every route there can be")
    # Where nothing holds the number of routes, `default_active` is all experts, and any room may do.
    target = getattr(router, "target_active", None)
    need = router.default_active(moe.num_experts) if target is None else target
    if budget < need and (target is not None or need < moe.num_experts or router.NEVER_MORE):
        named = [name for name in ("target_active", "top_k", "num_hashes", "capacity_factor") if getattr(router, name, None) is not None]
        which = f"model.moe.router.{named[0]} ({getattr(router, named[0])})" if named else f"model.moe.router.type ({router.type})"
        bad.append(f"model.moe.route_budget ({budget}) has no room for the {need:g} routes per token of {which}; use more")
    if parallel.ep > 1:
        bad.append(
            f"model.moe.route_budget ({budget}) does not go with parallel.ep ({parallel.ep}): ranks tell each other how much they send, and the "
            f"exchange wants those numbers on the host; set route_budget: null or ep: 1"
        )
    several = "strata" if moe.strata is not None else "expert_dim" if len(set(moe.expert_dims)) > 1 else None
    if several is not None:
        bad.append(f"model.moe.route_budget ({budget}) is for one dispatch per layer, and model.moe.{several} makes several; set route_budget: null")


def _check_sonicmoe(dtype: str, model: ModelConfig, bad: list[str]) -> None:
    moe = model.moe
    if moe is None:
        bad.append("train.experts_backend (sonicmoe) has an effect only with model.moe: a dense model has no experts")
        return
    if dtype != "bfloat16":
        bad.append(f"train.experts_backend (sonicmoe) computes in bfloat16, not {dtype}; set train.dtype: bfloat16 or experts_backend: torch")
    if moe.route_budget is not None:
        bad.append(
            f"model.moe.route_budget ({moe.route_budget}) does not go with train.experts_backend (sonicmoe), which knows no padding; set one of the "
            f"two to null or torch"
        )
    for name, size in (("hidden_size", model.hidden_size), *(("moe.expert_dim", size) for size in moe.groups)):
        if size % 8:
            bad.append(f"model.{name} ({size}) must be a multiple of 8 for train.experts_backend (sonicmoe); use torch")


def _check_mla(model: ModelConfig, bad: list[str]) -> None:
    for name in ("head_dim", "num_kv_heads", "qk_norm", "sliding_window"):
        if getattr(model, name):
            bad.append(f"model.{name} ({getattr(model, name)}) does not go with model.mla, which has head sizes of its own; remove one of the two")
    if model.mla is not None and model.mla.qk_rope_head_dim % 2:
        bad.append(f"model.mla.qk_rope_head_dim ({model.mla.qk_rope_head_dim}) must be even for rotary embeddings")


def _check_upcycle(upcycle: UpcycleConfig, bad: list[str]) -> None:
    router, method, experts = upcycle.router, upcycle.method, upcycle.num_experts
    for name in sorted(upcycle.idle() & upcycle.model_fields_set):
        value, methods = getattr(upcycle, name), UPCYCLE_OPTIONS[name]
        if method not in methods:
            if value is not None and value != []:
                bad.append(f"upcycle.{name} ({short(value)}) has no effect with method: {method}; it is for {', '.join(methods)}")
        elif name.startswith("merge"):
            bad.append(f"upcycle.{name} ({value}) has an effect only with merge: ties or dare, not {upcycle.merge}")
        elif value is not None:
            bad.append(f"upcycle.{name} ({value}) has no effect with split: {upcycle.split}")
    if upcycle.needs_calibration and upcycle.calibration is None:
        why = "shared_dim" if upcycle.shared_dim is not None else f"split: {upcycle.split}"
        bad.append(f"upcycle.calibration: {why} needs the prefix of a prepared data set")
    if method in ("btx", "aggregate"):
        least = 2 if method == "btx" else 1
        if len(upcycle.models) < least:
            bad.append(f"upcycle.models: method {method} needs {least} or more Hugging Face folders, found {len(upcycle.models)}")
        experts = len(upcycle.models)
    if method == "aggregate" and upcycle.merge in ("ties", "dare"):
        bad.append(f"upcycle.merge ({upcycle.merge}) needs a common start, which mixtures don't name; use average or base")
    if method == "virtual_groups" and experts % upcycle.granularity:
        bad.append(f"upcycle.num_experts ({experts}) must be a multiple of upcycle.granularity ({upcycle.granularity})")
    if method == "to_dense" or router is None:
        return
    want = {"dsmoe": SigmoidSteRouter, "llama_moe": TopKRouter}.get(method)
    if want is not None and not isinstance(router, want):
        bad.append(f"upcycle.router.type ({router.type}) does not belong to upcycle.method ({method}); use {want.model_fields['type'].default}")
    if method != "aggregate":  # which has more experts than its models, and only the mixtures say how many
        bad += [f"upcycle.router{problem}" for problem in router.problems(experts)]
    if isinstance(router, TopKRouter) and method == "virtual_groups" and router.top_k % upcycle.granularity:
        bad.append(f"upcycle.router.top_k ({router.top_k}) must be a multiple of upcycle.granularity ({upcycle.granularity}): whole groups route")
    if method == "virtual_groups" and not router.ROW_PER_EXPERT:
        bad.append(f"upcycle.router.type ({router.type}) can't route virtual groups: experts share a row of the router; use topk or sigmoid_ste")
    if isinstance(router, SigmoidSteRouter) and router.input == "residual" and upcycle.scales_weights:
        bad.append("upcycle.weight_scaling: with router.input: residual the size of what the gates see is not known; set weight_scaling: false")


def check_world(config: Config, world_size: int) -> ParallelConfig:
    """Fill in dp_shard for so many ranks. Raises ConfigError if the layout or the batch does not fit them."""
    parallel = config.parallel
    fixed = parallel.dp_replicate * parallel.ep
    if parallel.dp_shard == -1:
        if world_size % fixed:
            raise ConfigError(
                f"parallel: dp_replicate ({parallel.dp_replicate}) x ep ({parallel.ep}) = {fixed} does not divide the number of ranks "
                f"({world_size}); start {math.ceil(world_size / fixed) * fixed} ranks or change one of them"
            )
        parallel = parallel.model_copy(update={"dp_shard": world_size // fixed})
    elif fixed * parallel.dp_shard != world_size:
        raise ConfigError(
            f"parallel: dp_replicate ({parallel.dp_replicate}) x dp_shard ({parallel.dp_shard}) x ep ({parallel.ep}) = {fixed * parallel.dp_shard}, "
            f"but {world_size} ranks were started; start {fixed * parallel.dp_shard}, or set dp_shard: -1"
        )
    bad: list[str] = []
    if config.model is not None:
        _check_model(config.model, parallel, bad)
    if config.train is not None:
        unit = config.train.micro_batch_size * world_size
        if config.train.global_batch_size % unit:
            near = max(unit, round(config.train.global_batch_size / unit) * unit)
            bad.append(
                f"train.global_batch_size ({config.train.global_batch_size}) must be a multiple of train.micro_batch_size "
                f"({config.train.micro_batch_size}) x ranks ({world_size}) = {unit}; nearest: {near}"
            )
    if bad:
        raise ConfigError("; ".join(bad))
    return parallel
