"""Hugging Face folders both ways: config.json to ModelConfig and back, safetensors to our parameter names and back, tensor by tensor.

Reading refuses whatever this code would not compute as the model's own code does, and whatever it would leave out. Writing takes the stock
architecture that computes the same function where there is one, else `model_type: moetrain` with its modelling code in the folder. A folder
written here also carries our full config under the key `moetrain`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain.config import MAX_LAYERS, ModelConfig, TopKRouter, config_from_dict, short, to_dict
from moetrain.data.tokenizer import TOKENIZER_FILES, Tokenizer, copy_plain, save_tokenizer
from moetrain.files import read_object
from moetrain.model import Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
EXACT = ("router.selection_bias", "router.threshold", "router.cut", "router.updates", "router.domains", "router.table")
"""Ends of the names of parameters that are never stored in less than float32: steps of 0.001, or numbers of experts, are lost in bfloat16."""
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")
_MODELING = Path(__file__).parent / "hf" / "modeling_moetrain.py"


# ------------------------------------------------------------------------------------------------------------------ config in


@dataclass(frozen=True)
class _Family:
    """What transformers assumes for a key that config.json leaves out, and which options the family's code reads."""

    eps: float = 1e-6
    theta: float = 10000.0
    positions: int = 32768
    kv_heads_optional: bool = False
    head_dim: int | None = None
    window: bool = False
    """`sliding_window` alone decides (Mistral)."""
    window_switch: bool = False
    """`use_sliding_window` decides (Qwen)."""
    window_default: int | None = None
    attention_bias: bool = False
    """Reads `attention_bias`."""
    mlp_bias: bool = False
    """Reads `mlp_bias`."""


_FAMILIES = {
    "llama": _Family(positions=2048, kv_heads_optional=True, attention_bias=True, mlp_bias=True),
    "mistral": _Family(positions=131072, window=True, window_default=4096),
    "qwen2": _Family(window_switch=True, window_default=4096),
    "qwen3": _Family(head_dim=128, window_switch=True, window_default=4096, attention_bias=True),
    "olmoe": _Family(eps=1e-5, positions=4096, kv_heads_optional=True, attention_bias=True),
    "mixtral": _Family(eps=1e-5, theta=1e6, positions=131072, window=True),
    "qwen3_moe": _Family(window_switch=True, window_default=4096, attention_bias=True),
    "qwen2_moe": _Family(),
    "deepseek_v3": _Family(positions=4096, kv_heads_optional=True, attention_bias=True),
}

# Keys that change what a model computes and have one value that this code computes. None and a missing key pass too.
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "router_jitter_noise": 0.0,
    "clip_qkv": None,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "is_encoder_decoder": False,
}
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
_MSCALE = ("mscale", "mscale_all_dim")
"""Of yarn too, in DeepSeek's models."""


def read_config(folder: str | Path) -> ModelConfig:
    """Config of a Hugging Face folder. ValueError names the file, the field, its value and what is supported.

    Written by transformers 4 or 5, by hand, or by `write_model` (then the full config, checked against the rest of the file).
    """
    path = Path(folder) / "config.json"
    raw = _read_json(path)
    kind = raw.get("model_type")
    if kind == "moetrain":
        if not isinstance(raw.get("moetrain"), dict):
            raise ValueError(f"{path}: model_type moetrain needs the key `moetrain`, a mapping with the model's config")
        return _validate(raw["moetrain"], path)
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ValueError(f"{path}: model_type is {kind!r}; supported: {', '.join([*_FAMILIES, 'moetrain'])}")
    _check_types(raw, path)
    stock = _validate(_read_stock(raw, kind, path), path)
    if "moetrain" not in raw:
        return stock
    if not isinstance(raw["moetrain"], dict):
        raise ValueError(f"{path}: `moetrain` must be a mapping with the model's config, found {raw['moetrain']!r}")
    full = _validate(raw["moetrain"], path)
    difference = next(config_differences(full, stock), None)
    if difference is not None:
        field, ours, theirs = difference
        raise ValueError(
            f"{path}: {field} is {ours} in the key `moetrain` but {theirs} in the rest of the file; correct one, or remove `moetrain`"
        )
    return full


def _validate(model: dict[str, Any], path: Path) -> ModelConfig:
    config = config_from_dict({"model": model}, str(path)).model
    assert config is not None, "a model section was given"
    return config


def config_differences(full: ModelConfig, stock: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, value, other value) for what acts in inference, where two configs differ."""
    for name in ModelConfig.model_fields:
        if name in ("init_std", "moe") or (name == "intermediate_size" and full.num_moe_layers == full.num_layers):
            continue
        a, b = getattr(full, name), getattr(stock, name)
        if name == "num_kv_heads":
            a, b = full.kv_heads, stock.kv_heads
        elif name == "head_dim":
            a, b = full.head_size, stock.head_size
        elif name == "sliding_window":
            a, b = (c.sliding_window if _sliding_layers(c) else None for c in (full, stock))
        elif name == "sliding_layers":
            a, b = _sliding_layers(full), _sliding_layers(stock)
        elif name == "rope_scaling":
            a, b = _rope_scaling(full), _rope_scaling(stock)
        if a != b:
            yield name, a, b
    if (full.moe is None) != (stock.moe is None):
        yield "moe", full.moe, stock.moe
    elif full.moe is not None and stock.moe is not None:
        if full.moe_layers != stock.moe_layers:
            yield "moe.layers", full.moe_layers, stock.moe_layers
        for name in ("num_experts", "expert_dim", "shared", "strata"):
            if getattr(full.moe, name) != getattr(stock.moe, name):
                yield f"moe.{name}", getattr(full.moe, name), getattr(stock.moe, name)
        if full.moe.router.type != stock.moe.router.type:
            yield "moe.router.type", full.moe.router.type, stock.moe.router.type
            return
        # What a stock architecture has no words for is at its default there, and must be here.
        names = ("top_k", "score", "gate", "normalize", "output_scale", "selection_bias", "num_groups", "top_groups")
        names += ("threshold", "zero_routes", "rescale", "rescale_in_eval", "bias", "input", "target_active")
        for name in names:
            a, b = getattr(full.moe.router, name, None), getattr(stock.moe.router, name, None)
            if a != b:
                yield f"moe.router.{name}", a, b


def _sliding_layers(config: ModelConfig) -> list[int]:
    if config.sliding_window is None:
        return []
    return list(range(config.num_layers)) if config.sliding_layers is None else sorted(set(config.sliding_layers))


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    """The options that its type of scaling reads, under Hugging Face's names."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    options = {name: getattr(scaling, name) for name in (*_ROPE_KEYS[scaling.type], *_MSCALE)}
    return {"rope_type": scaling.type, **{k: v for k, v in options.items() if v is not None}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from None


_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "max_window_layers", "num_experts", "num_local_experts",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "n_shared_experts",
    "first_k_dense_replace", "n_group",
)  # fmt: skip
_DIVISORS = ("topk_group", "decoder_sparse_step")
_NUMBERS = ("rope_theta", "routed_scaling_factor", "rms_norm_eps", "initializer_range")
_LISTS = {"layer_types": str, "mlp_only_layers": int}


def _check_types(raw: dict[str, Any], path: Path) -> None:
    """The values that are computed with on the way to our config, whose own rules come after. ValueError."""
    for name, value in raw.items():
        if value is None:
            continue
        if name in _COUNTS + _DIVISORS and not (type(value) is int and (name in _DIVISORS) <= value < 2**53):
            what = "a whole number"
        elif name == "num_hidden_layers" and value > MAX_LAYERS:
            what = f"at most {MAX_LAYERS}"
        elif name in _NUMBERS and not _is_number(value):
            what = "a number"
        elif name in _LISTS and not (isinstance(value, list) and all(type(v) is _LISTS[name] for v in value)):
            what = "a list of " + {str: "names", int: "whole numbers"}[_LISTS[name]]
        else:
            continue
        raise ValueError(f"{path}: {name} must be {what}, found {short(value)}")


def _is_number(value: Any) -> bool:
    """One that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e300


def _read_stock(raw: dict[str, Any], kind: str, path: Path) -> dict[str, Any]:
    """`model` section for a stock architecture. A key that is null counts as missing."""
    family, given = _FAMILIES[kind], {k: v for k, v in raw.items() if v is not None}

    def need(*names: str) -> Any:
        for name in names:
            if name in given:
                return given[name]
        raise ValueError(f"{path}: {names[0]} is missing")

    for name, supported in _ONLY.items():
        if given.get(name, supported) != supported:
            raise ValueError(f"{path}: {name} is {raw[name]!r}; supported: {supported!r}")
    for name, read in (("attention_bias", family.attention_bias), ("mlp_bias", family.mlp_bias)):
        if given.get(name, False) and not read:
            raise ValueError(f"{path}: {name} is {raw[name]!r}; {kind} models have no such bias; supported: false")
    if kind == "qwen2_moe" and given.get("use_sliding_window", False):
        raise ValueError(f"{path}: use_sliding_window is True; supported for qwen2_moe: false, since versions of transformers differ in its layers")
    if "quantization_config" in given:
        raise ValueError(f"{path}: quantization_config is set; supported: float checkpoints; load the model dequantized and save it again")
    if family.kv_heads_optional or ("num_key_value_heads" in raw and raw["num_key_value_heads"] is None):
        kv_heads = given.get("num_key_value_heads")
    else:
        kv_heads = need("num_key_value_heads")
    layers = need("num_hidden_layers")
    bias = bool(given.get("attention_bias", False))
    window, sliding = _read_window(raw, given, kind, layers, path)
    theta, scaling = _read_rope(raw, given, kind, path)
    model: dict[str, Any] = {
        "vocab_size": need("vocab_size"),
        "hidden_size": need("hidden_size"),
        "num_layers": layers,
        "num_heads": need("num_attention_heads"),
        "num_kv_heads": kv_heads,
        "head_dim": given.get("head_dim", family.head_dim),
        "intermediate_size": need("intermediate_size"),
        "max_position_embeddings": given.get("max_position_embeddings", family.positions),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": given.get("rms_norm_eps", family.eps),
        "tie_embeddings": given.get("tie_word_embeddings", False),
        "qkv_bias": bias or kind == "qwen2" or (kind == "qwen2_moe" and given.get("qkv_bias", True)),
        "o_bias": bias,
        "mlp_bias": given.get("mlp_bias", False),
        "qk_norm": kind in ("qwen3", "qwen3_moe", "olmoe"),
        "sliding_window": window,
        "sliding_layers": sliding,
    }
    if kind == "olmoe":
        model["qk_norm_over"] = "all"
    # 0 is what some configs have that were made without random weights in mind; ours must be positive.
    if given.get("initializer_range"):
        model["init_std"] = given["initializer_range"]
    if kind == "mixtral":
        router = {"type": "topk", "top_k": given.get("num_experts_per_tok", 2), "normalize": True}
        model["moe"] = {"num_experts": need("num_local_experts", "num_experts"), "expert_dim": need("intermediate_size"), "router": router}
    elif kind == "olmoe":
        router = {"type": "topk", "top_k": given.get("num_experts_per_tok", 8), "normalize": given.get("norm_topk_prob", False)}
        model["moe"] = {"num_experts": given.get("num_experts", 64), "expert_dim": need("intermediate_size"), "router": router}
    elif kind == "deepseek_v3":
        model |= _read_deepseek(raw, given, layers, path)
    elif kind in ("qwen2_moe", "qwen3_moe"):
        router = {"type": "topk", "top_k": need("num_experts_per_tok"), "normalize": given.get("norm_topk_prob", False)}
        model["moe"] = {
            "num_experts": need("num_experts", "num_local_experts"),
            "expert_dim": need("moe_intermediate_size"),
            "router": router,
        }
        model["moe"]["layers"] = _read_sparse_layers(given, layers, path)
        if kind == "qwen2_moe":
            model["moe"]["shared"] = {"dim": given.get("shared_expert_intermediate_size", 5632), "combine": "gate"}
    return model


def _read_deepseek(raw: dict[str, Any], given: dict[str, Any], layers: int, path: Path) -> dict[str, Any]:
    """What DeepSeek-V3 has of its own: latent attention, sigmoid routing with a bias and groups, shared experts, dense first layers."""
    heads = given.get("num_attention_heads")
    if given.get("num_key_value_heads", heads) != heads:
        raise ValueError(f"{path}: num_key_value_heads is {raw['num_key_value_heads']!r}; latent attention has as many as heads ({heads})")
    groups, top_groups, top_k = given.get("n_group", 8), given.get("topk_group", 4), given.get("num_experts_per_tok", 8)
    if groups > 1 and top_k // top_groups != 2:
        raise ValueError(
            f"{path}: num_experts_per_tok is {top_k} with topk_group {top_groups}; a group counts by its 2 best scores, which is supported for "
            f"2 experts per group that is used"
        )
    dense = given.get("first_k_dense_replace", 3)
    if dense >= layers:
        raise ValueError(f"{path}: first_k_dense_replace ({dense}) leaves none of {layers} layers sparse; use a dense architecture")
    latent = {name: given.get(name, default) for name, default in _LATENT.items()}
    # null has a meaning of its own here.
    latent["q_lora_rank"] = raw.get("q_lora_rank", _LATENT["q_lora_rank"])
    size = given.get("moe_intermediate_size", 2048)
    router = {
        "type": "topk", "top_k": top_k, "score": "sigmoid", "selection_bias": True, "normalize": given.get("norm_topk_prob", True),
        "output_scale": float(given.get("routed_scaling_factor", 2.5)), "num_groups": groups,
        **({"top_groups": top_groups} if groups > 1 else {}),
    }  # fmt: skip
    moe = {
        "num_experts": given.get("n_routed_experts", given.get("num_local_experts", 256)), "expert_dim": size, "router": router,
        "shared": {"dim": size * given.get("n_shared_experts", 1)}, "layers": {"first": dense} if dense else None,
    }  # fmt: skip
    return {"head_dim": None, "num_kv_heads": None, "mla": latent, "moe": moe}


_LATENT = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_interleave": True,
}  # fmt: skip
"""Options of latent attention and what transformers assumes for them."""


def _read_sparse_layers(given: dict[str, Any], layers: int, path: Path) -> list[int] | None:
    """Qwen's two keys: every `decoder_sparse_step`-th layer, counted from 1, without `mlp_only_layers`. None: all."""
    step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers", [])
    sparse = [i for i in range(layers) if (i + 1) % step == 0 and i not in dense]
    if not sparse:
        raise ValueError(f"{path}: decoder_sparse_step ({step}) and mlp_only_layers ({dense}) leave no sparse layer; use the dense architecture")
    return None if len(sparse) == layers else sparse


def _read_window(raw: dict[str, Any], given: dict[str, Any], kind: str, layers: int, path: Path) -> tuple[int | None, list[int] | None]:
    """(sliding_window, sliding_layers)."""
    family = _FAMILIES[kind]
    if family.window:
        window = raw.get("sliding_window", family.window_default)
    elif family.window_switch and given.get("use_sliding_window", False):
        window = raw.get("sliding_window", family.window_default)
    else:
        window = None
    types = given.get("layer_types")
    if types is not None:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(f"{path}: layer_types has {', '.join(map(repr, unknown))}; supported: full_attention, sliding_attention")
        if len(types) != layers:
            raise ValueError(f"{path}: layer_types has {len(types)} entries for num_hidden_layers {layers}")
        sliding = [i for i, t in enumerate(types) if t == "sliding_attention"]
        if sliding and window is None:
            raise ValueError(f"{path}: layer_types has sliding_attention, but no window is in use (sliding_window, use_sliding_window)")
        if kind not in ("qwen2", "qwen3") and len(sliding) != (layers if window is not None else 0):
            raise ValueError(f"{path}: layer_types: {kind} models have one kind of attention in all layers, found {sliding} sliding")
    elif window is None:
        return None, None
    elif kind in ("qwen2", "qwen3"):
        sliding = list(range(given.get("max_window_layers", 28), layers))
    elif kind == "qwen3_moe" and "max_window_layers" in given:
        raise ValueError(
            f"{path}: max_window_layers is {raw['max_window_layers']!r} with use_sliding_window; "
            f"supported for qwen3_moe: without it (all layers)"
        )
    else:
        sliding = list(range(layers))
    if not sliding:
        return None, None
    return window, None if len(sliding) == layers else sliding


def _read_rope(raw: dict[str, Any], given: dict[str, Any], kind: str, path: Path) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) from transformers 5's `rope_parameters` or 4's `rope_theta` and `rope_scaling`."""
    new, old = given.get("rope_parameters"), given.get("rope_scaling")
    field = "rope_parameters" if new is not None else "rope_scaling"
    if new is not None and old is not None and new != old:
        raise ValueError(f"{path}: rope_parameters is {new!r} and rope_scaling is {old!r}; give one of them")
    parameters = new if new is not None else old if old is not None else {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: {field} must be a mapping, found {parameters!r}")
    if parameters and all(isinstance(v, dict) for v in parameters.values()):
        kinds = list(parameters.values())
        if any(k != kinds[0] for k in kinds):
            raise ValueError(f"{path}: {field} differs between kinds of layers; supported: one for all layers")
        parameters = kinds[0]
    parameters = {k: v for k, v in parameters.items() if v is not None}
    for name in {"rope_theta", "rope_type", "type"} & set(parameters):
        if not (_is_number(parameters[name]) if name == "rope_theta" else isinstance(parameters[name], str)):
            raise ValueError(f"{path}: {field}.{name} must be {'a number' if name == 'rope_theta' else 'a name'}, found {short(parameters[name])}")
    theta = parameters.pop("rope_theta", None)
    if theta is not None and given.get("rope_theta", theta) != theta:
        raise ValueError(f"{path}: rope_theta is {raw['rope_theta']!r}, but {theta!r} in {field}; give one of them")
    theta = theta if theta is not None else given.get("rope_theta", _FAMILIES[kind].theta)
    kinds_given = {parameters.pop(name) for name in ("rope_type", "type") if name in parameters} or {"default"}
    rope_type = sorted(map(str, kinds_given))[0]
    if len(kinds_given) > 1 or rope_type not in _ROPE_KEYS:
        raise ValueError(f"{path}: {field}.rope_type is {' and '.join(sorted(map(repr, kinds_given)))}; supported: {', '.join(_ROPE_KEYS)}")
    if parameters.get("partial_rotary_factor") == 1:
        del parameters["partial_rotary_factor"]
    if rope_type == "yarn" and parameters.get("truncate") is True:
        del parameters["truncate"]
    known = _ROPE_KEYS[rope_type] + (_MSCALE if kind == "deepseek_v3" and rope_type == "yarn" else ())
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"{path}: {field}.{unknown[0]} is {parameters[unknown[0]]!r}; "
            f"supported for rope_type {rope_type}: {', '.join(known) or 'no other key'}"
        )
    if rope_type == "default":
        return float(theta), None
    scaling = {"type": rope_type, **parameters}
    if rope_type in ("llama3", "yarn"):
        # The order in which transformers 5 looks for it.
        fallback = scaling.get("original_max_position_embeddings", given.get("max_position_embeddings", _FAMILIES[kind].positions))
        scaling["original_max_position_embeddings"] = given.get("original_max_position_embeddings", fallback)
    if "factor" not in scaling:
        raise ValueError(f"{path}: {field}.factor is missing; rope_type {rope_type} needs it")
    return float(theta), scaling


# ------------------------------------------------------------------------------------------------------------------ names


@dataclass(frozen=True)
class _Stored:
    """How one of our parameters lies in a file: the concatenation of these keys along dim 0, each of this shape, seen in our shape. No key: it
    is not in the file, and 0 when read."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and shapes, in the order in which they are read and written."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}


def _layouts(name: str, shape: tuple[int, ...], kind: str, config: ModelConfig) -> list[_Stored]:
    """Every layout in which a parameter is found, the one to write in a folder of this model_type first."""
    if name.endswith((".noise", "router.used", "router.unrouted", "router.clock")):
        # Of use in training alone, and no stock architecture has a place for them; they start at 0.
        return [_Stored((), shape)]
    if ".ffn.shared." in name:
        return _shared_layouts(name, shape, kind)
    if ".ffn." not in name or not (".router." in name or ".experts." in name):
        return [_Stored((_dense_key(name),), shape)]
    mixtral, deepseek = kind == "mixtral", kind == "deepseek_v3"
    _, layer, _, part, *rest = name.split(".")
    kind, of_size = rest[-1], rest[:-1]
    blocks = [f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"]
    styles = [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]
    if mixtral:
        blocks.reverse()
        styles.reverse()
    if part == "router" and len(rest) > 1:  # one per stratum
        return [_Stored((f"{blocks[0]}.gate.{'.'.join(rest)}",), shape)]
    if part == "router":
        names = [kind, "e_score_correction_bias"] if kind == "selection_bias" else [kind]
        return [_Stored((f"{block}.gate.{name}",), shape) for name in (reversed(names) if deepseek else names) for block in blocks]
    E, rows, columns = shape
    # Where sizes differ, a parameter holds the experts of one size, and no file has them stacked.
    assert config.moe is not None, "a mixture"
    members = list(config.moe.groups.values())[int(of_size[0])] if of_size else range(E)
    found = []
    for block in blocks:
        for gate, up, down in styles:
            parts = (gate, up) if kind == "gate_up" else (down,)
            keys = tuple(f"{block}.experts.{e}.{p}.weight" for e in members for p in parts)
            found.append(_Stored(keys, (rows // len(parts), columns)))
    return found if of_size else found + [_Stored((f"{block}.experts.{kind}_proj",), shape) for block in blocks]


def _shared_layouts(name: str, shape: tuple[int, ...], kind: str) -> list[_Stored]:
    layer, tail = name.split(".")[1], name.partition(".shared.")[2]
    blocks = {"moetrain": "shared", "qwen2_moe": "shared_expert", "deepseek_v3": "shared_experts"}
    order = sorted(blocks, key=lambda k: k != kind)
    keys = [f"{blocks[k]}.{tail}" if not (tail == "mix.weight" and k == "qwen2_moe") else "shared_expert_gate.weight" for k in order]
    return [_Stored((f"model.layers.{layer}.mlp.{key}",), shape) for key in keys]


def _dense_key(name: str) -> str:
    if not name.startswith("layers."):
        return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}[name]
    _, layer, rest = name.split(".", 2)
    part, _, tail = rest.partition(".")
    part = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn": "self_attn", "ffn": "mlp"}[part]
    for ours, theirs in (("q_a_norm.", "q_a_layernorm."), ("kv_a_norm.", "kv_a_layernorm."), ("kv_a_proj.", "kv_a_proj_with_mqa.")):
        tail = theirs + tail.removeprefix(ours) if tail.startswith(ours) else tail
    return f"model.layers.{layer}.{part}.{tail}"


# ---------------------------------------------------------------------------------------------------------------- tensors in


def read_tensors(folder: str | Path, config: ModelConfig, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every parameter but those of `without`, in the stored dtype, in the order of `parameter_shapes`.

    Files are mapped into memory; one parameter (the experts of a layer: one stacked tensor) exists at a time. All keys and shapes are
    checked before this returns: ValueError lists keys that are missing or that this model has no place for.
    """
    folder = Path(folder)
    files = ExitStack()
    try:
        shapes = {name: shape for name, shape in parameter_shapes(config).items() if name not in without}
        plan, where = _plan(folder, config, shapes, files)
    except BaseException:
        files.close()
        raise
    return _read_planned(plan, where, files)


def _read_planned(
    plan: list[tuple[str, tuple[int, ...], _Stored]], where: dict[str, Any], files: ExitStack
) -> Iterator[tuple[str, Tensor]]:
    with files:
        for name, shape, stored in plan:
            parts = [where[key].get_tensor(key) for key in stored.keys] or [torch.zeros(shape)]
            yield name, (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)


def _plan(
    folder: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]], files: ExitStack
) -> tuple[list[tuple[str, tuple[int, ...], _Stored]], dict[str, Any]]:
    where: dict[str, Any] = {}  # key -> open file
    origin: dict[str, Path] = {}
    for path in _weight_files(folder):
        try:
            handle = files.enter_context(safe_open(path, framework="pt"))
            keys = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: can't be read as safetensors: {error}") from None
        for key in keys:
            if key in where:
                raise ValueError(f"{path}: tensor {key} is in {origin[key].name} too")
            where[key], origin[key] = handle, path
    plan, missing, used = [], [], set()
    for name, shape in shapes.items():
        # Of the layouts the one of which most is there, so that a single lost expert is named and not the whole layer.
        stored = max(_layouts(name, shape, "moetrain", config), key=lambda s: sum(k in where for k in s.keys) / max(1, len(s.keys)))
        missing += [key for key in stored.keys if key not in where]
        used.update(stored.keys)
        plan.append((name, shape, stored))
    extra = [
        k
        for k in where
        if k not in used and not k.endswith("rotary_emb.inv_freq") and not (config.tie_embeddings and k == "lm_head.weight")
    ]
    if missing or extra:
        lines = [
            f"{what} {len(keys)}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            for what, keys in (("missing", missing), ("not used", extra))
            if keys
        ]
        hint = "; tie_word_embeddings: true would take the embedding" if missing == ["lm_head.weight"] else ""
        raise ValueError(f"{folder}: the tensors don't fit config.json: {'; '.join(lines)}{hint}")
    for _, _, stored in plan:
        for key in stored.keys:
            part = where[key].get_slice(key)
            if tuple(part.get_shape()) != stored.shape:
                raise ValueError(
                    f"{origin[key]}: tensor {key} has shape {list(part.get_shape())}, config.json makes it {list(stored.shape)}"
                )
            if part.get_dtype() not in _STORED_DTYPES:
                raise ValueError(f"{origin[key]}: tensor {key} has dtype {part.get_dtype()}; supported: {', '.join(_STORED_DTYPES)}")
    return plan, where


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        weights = _read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
            raise ValueError(f"{index}: weight_map must map tensor names to file names")
        names = sorted(set(weights.values()))
        for name in names:
            # A name from a stranger's file must not reach out of the folder.
            if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {name!r} is no plain name of a .safetensors file in the folder")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: does not exist, but {INDEX} names it")
        return [folder / name for name in names]
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder")
    pickled = sorted(p.name for p in folder.glob("*.bin")) or sorted(p.name for p in folder.glob("*.pt*"))
    if pickled:
        raise ValueError(
            f"{folder}: has only {pickled[0]}, and pickled files can run code when loaded, so they are never read; "
            f"if you trust it, load it with transformers and call save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}")


# --------------------------------------------------------------------------------------------------------------- folder out


def architecture(config: ModelConfig) -> str:
    """model_type of the stock architecture that computes this model, or `moetrain` where there is none."""
    c = config
    sliding = _sliding_layers(c)
    all_or_none = len(sliding) in (0, c.num_layers)
    biased = c.qkv_bias or c.o_bias
    if c.finedeep is not None:
        return "moetrain"
    if c.moe is not None:
        if not isinstance(c.moe.router, TopKRouter) or not all_or_none or c.mlp_bias or isinstance(c.moe.expert_dim, list) or c.moe.strata:
            return "moetrain"
        if c.mla is not None:
            return "deepseek_v3" if _is_deepseek(c) else "moetrain"
        if c.moe.router.score != "softmax" or c.moe.router.gate != "linear":
            return "moetrain"
        if c.moe.shared is not None:
            plain = not c.qk_norm and not c.o_bias and not sliding
            return "qwen2_moe" if plain and c.moe.shared.combine == "gate" else "moetrain"
        if c.num_moe_layers < c.num_layers:  # Mixtral and OLMoE have no dense layers
            return "qwen3_moe" if c.qk_norm and c.qk_norm_over == "head" and c.qkv_bias == c.o_bias else "moetrain"
        if not c.qk_norm and not biased and c.moe.router.normalize:
            return "mixtral"
        if c.qk_norm and c.qk_norm_over == "all":
            plain = not sliding and c.qkv_bias == c.o_bias and c.num_heads * c.head_size == c.hidden_size
            return "olmoe" if plain else "moetrain"
        return "qwen3_moe" if c.qk_norm and c.qkv_bias == c.o_bias else "moetrain"
    if c.mla is not None:
        return "moetrain"
    if c.qk_norm:
        return "qwen3" if c.qk_norm_over == "head" and c.qkv_bias == c.o_bias and not c.mlp_bias else "moetrain"
    # transformers refuses a LLaMA whose hidden size its heads don't divide, head_dim or not.
    if not sliding and c.qkv_bias == c.o_bias and c.hidden_size % c.num_heads == 0:
        return "llama"
    if not biased and not c.mlp_bias and all_or_none:
        return "mistral"
    if c.qkv_bias and not c.o_bias and not c.mlp_bias:
        return "qwen2"
    return "moetrain"


def _is_deepseek(c: ModelConfig) -> bool:
    """Of a model with latent attention and a top-k router."""
    assert c.moe is not None and isinstance(c.moe.router, TopKRouter), "asked by architecture"
    moe, router = c.moe, c.moe.router
    # A group counts by its two best scores there, by top_k / top_groups of them here.
    groups = moe.num_experts // router.num_groups >= 2 and (router.num_groups == 1 or router.top_k // router.top_groups == 2)
    routed = router.score == "sigmoid" and router.gate == "linear" and router.selection_bias and groups
    shared = moe.shared is not None and moe.shared.combine == "sum" and moe.shared.dim % moe.expert_dim == 0
    last_layers = c.moe_layers == list(range(c.num_layers - c.num_moe_layers, c.num_layers))
    return routed and shared and last_layers and c.qkv_bias == c.o_bias


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "moetrain": "MoetrainForCausalLM",
}


def config_json(config: ModelConfig, dtype: torch.dtype, special: dict[str, Any]) -> dict[str, Any]:
    """config.json of this model. special: bos_token_id, eos_token_id, pad_token_id.

    Rotary options are written as transformers 4 does (rope_theta, rope_scaling), which 5 reads too; 4 does not know rope_parameters.
    """
    c, kind = config, architecture(config)
    raw: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
        # Spelled out: a missing id would be read as the architecture's default, 1 and 2.
        **{name: special.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "moetrain": to_dict(c),
    }
    if kind == "moetrain":
        module = _MODELING.stem
        raw["auto_map"] = {"AutoConfig": f"{module}.MoetrainConfig", "AutoModelForCausalLM": f"{module}.MoetrainForCausalLM"}
        return raw
    raw["rope_theta"] = c.rope_theta
    raw["rope_scaling"] = _rope_scaling(c)
    if kind in ("llama", "qwen3", "qwen3_moe", "olmoe", "deepseek_v3"):
        raw["attention_bias"] = c.qkv_bias
    if kind == "qwen2_moe":
        raw["qkv_bias"] = c.qkv_bias
    if kind == "llama":
        raw["mlp_bias"] = c.mlp_bias
    sliding = _sliding_layers(c)
    if kind in ("mistral", "mixtral"):
        raw["sliding_window"] = c.sliding_window if sliding else None
    elif kind.startswith("qwen"):
        raw["use_sliding_window"] = bool(sliding)
        raw["sliding_window"] = c.sliding_window if sliding else None
    if kind in ("qwen2", "qwen3"):
        raw["layer_types"] = ["sliding_attention" if i in sliding else "full_attention" for i in range(c.num_layers)]
        raw["max_window_layers"] = c.num_layers - len(sliding)
    if c.moe is not None and isinstance(c.moe.router, TopKRouter):
        raw["num_experts_per_tok"] = c.moe.router.top_k
        if kind == "mixtral":
            raw["num_local_experts"] = c.moe.num_experts
            raw["intermediate_size"] = c.moe.expert_dim
        elif kind == "olmoe":
            raw["num_experts"] = c.moe.num_experts
            raw["intermediate_size"] = c.moe.expert_dim
            raw["norm_topk_prob"] = c.moe.router.normalize
        elif kind == "deepseek_v3":
            raw |= _deepseek_json(c)
        else:
            raw["num_experts"] = c.moe.num_experts
            raw["moe_intermediate_size"] = c.moe.expert_dim
            raw["norm_topk_prob"] = c.moe.router.normalize
            raw["decoder_sparse_step"], raw["mlp_only_layers"] = 1, sorted(set(range(c.num_layers)) - set(c.moe_layers))
            if kind == "qwen2_moe" and c.moe.shared is not None:
                raw["shared_expert_intermediate_size"] = c.moe.shared.dim
    return raw


def _deepseek_json(c: ModelConfig) -> dict[str, Any]:
    assert c.mla is not None and c.moe is not None and c.moe.shared is not None and isinstance(c.moe.router, TopKRouter), "_is_deepseek"
    moe, router = c.moe, c.moe.router
    return {
        **{name: getattr(c.mla, name) for name in _LATENT},
        "head_dim": c.mla.qk_rope_head_dim,  # so transformers calls the part that is rotated
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": c.moe.shared.dim // moe.expert_dim,
        "first_k_dense_replace": c.num_layers - c.num_moe_layers,
        "n_group": router.num_groups,
        "topk_group": router.top_groups,
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.output_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


def fold_output_scale(config: ModelConfig) -> tuple[ModelConfig, float]:
    """The same model with output_scale 1, and the factor that its experts' down projections must be multiplied by. DeepSeek-V3 has the scale."""
    if config.moe is None or not isinstance(config.moe.router, TopKRouter) or architecture(config) == "deepseek_v3":
        return config, 1.0
    scale = config.moe.router.output_scale
    router = config.moe.router.model_copy(update={"output_scale": 1.0})
    return config.model_copy(update={"moe": config.moe.model_copy(update={"router": router})}), scale


def check_output(folder: str | Path) -> Path:
    """ValueError if the folder exists and is not empty: nothing is written over."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; choose another output or remove it")
    return folder


def write_model(
    folder: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Tokenizer | None = None,
    source: str | Path | None = None,
) -> list[Path]:
    """Write a Hugging Face folder that AutoModelForCausalLM loads; returns its files.

    tensors: (our name, tensor) of every parameter, once, in any order; memory is one shard. dtype: None keeps each tensor's. A top-k
    router's output_scale is multiplied into the experts' down projections, but for DeepSeek-V3, which has it; what only training has, the
    weights of a router's noise and the records of dynmoe, is left out and is 0 when the folder is read. tokenizer: written beside, its special
    tokens named in config.json. source: a Hugging Face folder whose tokenizer files and special tokens are taken over instead.
    The folder appears under its name only when it is whole. ValueError if it exists and is not empty, or for a router that only
    `--import` made known.
    """
    folder = check_output(folder)
    if config.moe is not None and not type(config.moe.router).__module__.startswith("moetrain."):
        raise ValueError(
            f"router {config.moe.router.type} is not moetrain's own: the exported model's code does not know it; "
            f"add it to moetrain/convert/hf/modeling_moetrain.py and its options to moetrain/config/routers.py"
        )
    config, scale = fold_output_scale(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        stored_dtype = _write_weights(partial, config, tensors, scale, dtype, max_shard_bytes)
        special = _write_companions(partial, tokenizer, None if source is None else Path(source))
        raw = config_json(config, stored_dtype, special)
        _write_json(partial / "config.json", raw)
        if not (partial / "generation_config.json").exists():
            _write_json(
                partial / "generation_config.json", {"_from_model_config": True, **{k: v for k, v in special.items() if v is not None}}
            )
        if raw["model_type"] == "moetrain":
            shutil.copyfile(_MODELING, partial / _MODELING.name)
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return sorted(folder.iterdir())


def _write_weights(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], scale: float, dtype: torch.dtype | None, max_shard_bytes: int
) -> torch.dtype:
    """Returns the dtype of the embedding, the one that config.json names."""
    kind = architecture(config)
    shapes, seen = parameter_shapes(config), set()
    shard: dict[str, Tensor] = {}
    shard_bytes, total, weight_map, count = 0, 0, {}, 0
    stored_dtype = dtype

    def flush() -> None:
        nonlocal shard, shard_bytes, count
        count += 1
        save_file(shard, folder / f"shard-{count}", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, count))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if name not in shapes or name in seen:
            raise ValueError(f"{folder}: tensor {name} is {'given twice' if name in seen else 'no parameter of this model'}")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{folder}: tensor {name} has shape {list(tensor.shape)}, the config makes it {list(shapes[name])}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{folder}: tensor {name} has dtype {tensor.dtype}; supported: {', '.join(DTYPES.values())}")
        seen.add(name)
        tensor = tensor.detach()
        if scale != 1.0 and ".ffn.experts." in name and name.endswith(".down"):
            tensor = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale).to(tensor.dtype)
        wanted = dtype or tensor.dtype
        if name.endswith(EXACT):
            wanted = torch.promote_types(wanted, torch.float32)
        tensor = tensor.to("cpu", wanted).contiguous()
        if stored_dtype is None and name == "embed.weight":
            stored_dtype = tensor.dtype
        layout = _layouts(name, shapes[name], kind, config)[0]
        if not layout.keys:
            continue
        for key, part in zip(layout.keys, tensor.view(len(layout.keys), *layout.shape).unbind(), strict=True):
            if shard and shard_bytes + part.nbytes > max_shard_bytes:
                flush()
            shard[key] = part
            shard_bytes += part.nbytes
            total += part.nbytes
    if len(seen) < len(shapes):
        missing = [n for n in shapes if n not in seen]
        raise ValueError(f"{folder}: {len(missing)} tensors were not given: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}")
    flush()
    if count == 1:
        os.rename(folder / "shard-1", folder / SINGLE)
    else:
        names = {i: f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
        for i, name in names.items():
            os.rename(folder / f"shard-{i}", folder / name)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": {k: names[i] for k, i in sorted(weight_map.items())}})
    assert stored_dtype is not None, "embed.weight is a parameter of every model"
    return stored_dtype


def _write_companions(folder: Path, tokenizer: Tokenizer | None, source: Path | None) -> dict[str, Any]:
    """Tokenizer files; returns the ids of the special tokens."""
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if source is None:
        return {}
    for name in (*TOKENIZER_FILES, "chat_template.json", "generation_config.json"):
        if (source / name).is_file():
            copy_plain(source / name, folder / name)
    raw = _read_json(source / "config.json")
    return {name: raw.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # There is no way to ask for it without setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
