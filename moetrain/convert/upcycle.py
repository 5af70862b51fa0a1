"""Dense checkpoint -> mixture of experts, tensor by tensor: memory is a layer's FFN and a shard, not a model.

`dsmoe` (DSMoE, arXiv 2502.12455, section 3.1) and `llama_moe` (LLaMA-MoE, arXiv 2406.16554, with contiguous instead of random slices) both
cut every FFN into equal slices; they differ in the router. With every weight 1 the mixture computes the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.config import ModelConfig, MoEConfig, SigmoidSteRouter, TopKRouter, UpcycleConfig
from moetrain.convert.huggingface import architecture, check_output, parameter_shapes, read_config, read_tensors, write_model
from moetrain.convert.split import check_split, split_ffn
from moetrain.model import initial_tensor


@dataclass(frozen=True)
class UpcycleReport:
    output: Path
    config: ModelConfig
    """Of the mixture, as asked for; the folder has the router's output_scale multiplied into the experts."""
    model_type: str
    dense_parameters: int
    parameters: int
    activated: dict[int, int]
    """Mean active experts per token -> parameters that such a token uses, for 1 to all experts (top-k: k)."""
    files: list[str]


def moe_config(dense: ModelConfig, upcycle: UpcycleConfig) -> ModelConfig:
    """Config of the mixture that `upcycle` makes of a dense model. ValueError names the field that can't be."""
    if dense.moe is not None:
        raise ValueError(f"upcycle.dense ({upcycle.dense}) is a mixture of {dense.moe.num_experts} experts already; give a dense model")
    if dense.mlp_bias:
        raise ValueError(
            f"upcycle.dense ({upcycle.dense}) has mlp_bias: true; experts have no bias, and a bias can't be cut into slices that add up"
        )
    try:
        expert_dim = check_split(dense.intermediate_size, upcycle.num_experts)
    except ValueError as error:
        raise ValueError(f"upcycle.{error}") from None
    router = upcycle.router
    if upcycle.method == "dsmoe":
        router = SigmoidSteRouter() if router is None else router
    else:
        # 3/8 of the experts, top 3 of 8, as many as DSMoE's comparison gives LLaMA-MoE (its Table 1).
        router = TopKRouter(top_k=max(1, round(3 / 8 * upcycle.num_experts))) if router is None else router
        assert isinstance(router, TopKRouter), "config.check refuses this"
        if "output_scale" not in router.model_fields_set:
            # k of E slices sum to about k/E of the dense output, and normalised weights divide by k again (LLaMA-MoE's score_scale_factor).
            router = router.model_copy(update={"output_scale": upcycle.num_experts / router.top_k})
    return dense.model_copy(update={"moe": MoEConfig(num_experts=upcycle.num_experts, expert_dim=expert_dim, router=router)})


def upcycle(config: UpcycleConfig, progress: Callable[[int, int], None] | None = None) -> UpcycleReport:
    """Write `config.output`, a Hugging Face folder, from the dense folder `config.dense`.

    Tensors keep the dense checkpoint's dtype, tokenizer files are copied. progress: called with (tensors read, tensors in all).
    ValueError, before anything is written, for a model that can't be cut; a run that is killed leaves no folder of that name.
    """
    check_output(config.output)
    dense = read_config(config.dense)
    mixture = moe_config(dense, config)
    tensors = _mixture_tensors(dense, mixture, config, progress)
    files = write_model(config.output, mixture, tensors, max_shard_bytes=config.max_shard_bytes, source=config.dense)
    assert mixture.moe is not None, "made above"
    router = mixture.moe.router
    active = [router.top_k] if isinstance(router, TopKRouter) else range(1, config.num_experts + 1)
    return UpcycleReport(
        output=Path(config.output),
        config=mixture,
        model_type=architecture(mixture),
        dense_parameters=dense.num_params(),
        parameters=mixture.num_params(),
        activated={n: round(mixture.num_active_params(n)) for n in active},
        files=[f.name for f in files],
    )


def _mixture_tensors(
    dense: ModelConfig, mixture: ModelConfig, config: UpcycleConfig, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    shapes = parameter_shapes(mixture)
    count = len(parameter_shapes(dense))
    ffn: dict[str, Tensor] = {}
    dtype: torch.dtype | None = None
    for done, (name, tensor) in enumerate(read_tensors(config.dense, dense), 1):
        dtype = tensor.dtype if dtype is None else dtype
        if ".ffn." not in name:
            yield name, tensor
        else:
            prefix, kind, _ = name.rsplit(".", 2)
            ffn[kind] = tensor
            if len(ffn) == 3:
                for router in (name for name in shapes if name.startswith(f"{prefix}.router.")):
                    yield router, initial_tensor(router, shapes[router], mixture, config.seed).to(dtype)
                gate_up, down = split_ffn(ffn["gate_proj"], ffn["up_proj"], ffn["down_proj"], config.num_experts)
                yield f"{prefix}.experts.gate_up", gate_up
                yield f"{prefix}.experts.down", down
                ffn = {}
        if progress is not None:
            progress(done, count)
