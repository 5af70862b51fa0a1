"""From a config to a model with values, on one rank or many: what train, eval, generate and export share."""

from __future__ import annotations

import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moetrain import config as schema
from moetrain.attention import Attention, LatentAttention, rotate_both_halves
from moetrain.checkpoint import find_steps, read_full, read_meta
from moetrain.config import Config, ConfigError, ModelConfig, NonNegative, TrainConfig
from moetrain.convert import huggingface
from moetrain.model import Transformer, initial_tensor
from moetrain.modules import RMSNorm
from moetrain.moe import sonic
from moetrain.moe.experts import GroupedExperts
from moetrain.parallel.mesh import Meshes
from moetrain.parallel.parallelize import copy_whole, parallelize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def model_from(folder: str, run_dir: str) -> dict[str, Any]:
    """The `model` section of a Hugging Face folder, for `config.load_config`; of the run that started from it, where the folder is gone."""
    saved = Path(run_dir) / "config.yaml"
    if not Path(folder).exists() and saved.is_file():
        run = schema.load_config(saved)
        if run.init_from == folder and run.model is not None:
            return schema.to_dict(run.model)
    return schema.to_dict(huggingface.read_config(Path(folder)))


def need(config: Config, *sections: str) -> None:
    """Raise ConfigError if a section that a command reads is missing."""
    missing = [s for s in sections if getattr(config, s) is None]
    if missing:
        hint = " (or init_from, a Hugging Face folder)" if "model" in missing else ""
        raise ConfigError(f"missing section{'s' if len(missing) > 1 else ''}: {', '.join(missing)}{hint}")


def parameter_dtype(train: TrainConfig) -> torch.dtype:
    """Of the stored parameters: float32 under bfloat16 computation, so that small updates are not lost."""
    return torch.float64 if train.dtype == "float64" else torch.float32


def build_model(config: Config, device: torch.device, meshes: Meshes | None) -> Transformer:
    """The model of `config.model`, spread over `meshes`, with start weights from `init_from` or drawn from `train.seed`."""
    assert config.model is not None and config.train is not None, "checked by need()"
    model = empty_model(config.model, config.train, device, meshes)
    if config.init_from is None:
        named = ((n, initial_tensor(n, p.shape, config.model, config.train.seed)) for n, p in list(model.named_parameters()))
    else:
        folder = Path(config.init_from)
        new = _new_thresholds(config.model, folder)
        started = ((n, initial_tensor(n, shape, config.model, config.train.seed)) for n, shape in new.items())
        named = itertools.chain(huggingface.read_tensors(folder, config.model, without=new), started)
    fill(model, named, config.init_from or "start weights")
    return model


def _new_thresholds(config: ModelConfig, folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the routers' thresholds that the folder has no place for by its own config.json: `target_active` was set after the weights
    were written. They start where the options say."""
    own = huggingface.parameter_shapes(huggingface.read_config(folder))
    return {n: shape for n, shape in huggingface.parameter_shapes(config).items() if n.endswith(".router.threshold") and n not in own}


def empty_model(config: ModelConfig, train: TrainConfig, device: torch.device, meshes: Meshes | None) -> Transformer:
    """Built without memory, spread, then allocated: a rank never holds more than its part."""
    with torch.device("meta"):
        model = Transformer(config).to(parameter_dtype(train))
    parallelize(model, meshes, train)
    return model.to_empty(device=device)


def fill(model: Transformer, named: Iterator[tuple[str, Tensor]], source: str) -> None:
    """Set every parameter from whole tensors. Raises ValueError naming what is missing, unknown or of another shape."""
    parameters = dict(model.named_parameters())
    unset = set(parameters)
    for name, whole in named:
        if name not in parameters:
            raise ValueError(f"{source}: tensor {name} is not in the model")
        try:
            copy_whole(parameters[name], whole)
        except ValueError as error:
            raise ValueError(f"{source}: tensor {name}: {error}; does `model` in the config fit these weights?") from None
        unset.discard(name)
    if unset:
        raise ValueError(f"{source}: no value for {len(unset)} tensors, such as {sorted(unset)[0]}")


def compile_parts(model: Transformer, device: torch.device) -> None:
    """`train.compile`: what lies between the matrix products and has many small operators. Whole blocks would not do: what a router decides
    changes the shapes of every step, and hooks of FSDP and exchanges between ranks would cut them. Raises ConfigError without a compiler."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        missing = f"torch.compile needs a C++ compiler, and {compiler} is not there; install it, name one in CXX, or leave it out"
        raise ConfigError(f"train.compile (true): {missing}")
    # For the shapes that come, and once more for varying ones where others follow: loops of known length are the faster.
    norm, norm_of_sum, rotation = (torch.compile(f) for f in (RMSNorm.compute, RMSNorm.compute_of_sum, rotate_both_halves))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.compute, module.compute_of_sum = norm, norm_of_sum
        elif isinstance(module, Attention | LatentAttention):
            module.rotate = rotation


def use_sonicmoe(model: Transformer, device: torch.device) -> None:
    """`train.experts_backend: sonicmoe`. Raises ConfigError where it can't run, with what is missing."""
    problem = sonic.missing(device)
    if problem is not None:
        raise ConfigError(f"train.experts_backend (sonicmoe) needs {problem}; or set experts_backend: torch")
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.backend = sonic.compute


class ControllerState(BaseModel):
    """As `BudgetController.state` writes it."""

    model_config = ConfigDict(strict=True)

    coefficients: list[float]
    errors: list[float] | None = None
    trends: list[float] | None = None


class RunMeta(BaseModel):
    """What the checkpoint of a run must hold beside tensors; more may be there."""

    model_config = ConfigDict(strict=True)

    step: NonNegative
    consumed_samples: NonNegative
    tokens: NonNegative
    updates: NonNegative
    skipped: NonNegative
    bad_in_a_row: NonNegative
    mean_active: float | None = None
    controller: ControllerState | None = None
    data_fingerprint: str
    tokenizer: str | None = None
    config: dict[str, Any]


def check_meta(meta: dict[str, Any], where: str) -> dict[str, Any]:
    """`meta` itself, if it is that of a run (`RunMeta`); ConfigError with every reason if it is not."""
    schema.validate(RunMeta, meta, where, lambda _: [])
    return meta


@dataclass(frozen=True)
class Trained:
    """A model to use: its config, its whole tensors one at a time (a generator function's call), the tokenizer of its data, where it is from."""

    config: ModelConfig
    tensors: Iterator[tuple[str, Tensor]]
    tokenizer: str | None
    source: str
    mean_active: float | None


def find_trained(config: Config) -> Trained:
    """The newest whole checkpoint of run_dir, else `init_from`. Raises ConfigError if there is neither."""
    folder = Path(config.run_dir) / "checkpoints"
    damaged: list[str] = []
    for step in sorted(find_steps(folder), reverse=True):
        path = folder / f"step-{step:08d}"
        try:
            whole = read_full(path, "model.")
        except ValueError as error:
            damaged.append(str(error))
            warnings.warn(f"{error}; taking an older one", stacklevel=2)
            continue
        meta = check_meta(read_meta(path), f"checkpoint {path}: meta.json")
        model = schema.config_from_dict(meta["config"], f"of checkpoint {path}").model
        if model is None:
            raise ConfigError(f"checkpoint {path}: its config has no model section; is it a training run's?")
        tensors = ((name.removeprefix("model."), tensor) for name, tensor in whole)
        return Trained(model, tensors, meta.get("tokenizer"), str(path), meta.get("mean_active"))
    if damaged:
        # Not init_from: whoever asks for a run's result must not get the weights that it started from.
        raise ConfigError(f"run_dir {config.run_dir}: no whole checkpoint there: {'; '.join(damaged)}")
    if config.init_from is not None and config.model is not None:
        source = Path(config.init_from)
        tokenizer = str(source) if (source / "tokenizer.json").exists() else None
        return Trained(config.model, huggingface.read_tensors(source, config.model), tokenizer, str(source), None)
    raise ConfigError(f"run_dir {config.run_dir}: no checkpoint there; name a training run's run_dir, or set init_from to a Hugging Face folder")


def load_trained(trained: Trained, train: TrainConfig, device: torch.device, meshes: Meshes | None) -> Transformer:
    """The model of `find_trained`, spread over `meshes`, in evaluation mode."""
    model = empty_model(trained.config, train, device, meshes)
    fill(model, trained.tensors, trained.source)
    return model.eval()
