"""Every option of moetrain: one typed schema, read from YAML, with dotted overrides.

Plain data only: no device, no process group, no import of ours. `load_config` is the one way in; it refuses unknown keys, wrong types and
impossible combinations at once, names all of them and the nearest known key.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1)]


_File = TypeVar("_File", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that can't be used; the message lists every reason, one per line."""


class _Section(BaseModel):
    # strict: a string is never taken for a number nor 1 for true; numbers such as 3e-4 are made numbers by the YAML reader below.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=())


# --------------------------------------------------------------------------------------------------------------------- model


class RopeScaling(_Section):
    """How rotary frequencies are stretched beyond the length a model was trained on (names and meaning as in Hugging Face configs)."""

    type: Literal["linear", "llama3", "yarn"]
    factor: PositiveFloat
    original_max_position_embeddings: Positive | None = None
    """Length before stretching; `llama3` and `yarn` need it."""
    low_freq_factor: PositiveFloat | None = None
    """`llama3` only."""
    high_freq_factor: PositiveFloat | None = None
    """`llama3` only."""
    beta_fast: PositiveFloat | None = None
    """`yarn` only (32 when null)."""
    beta_slow: PositiveFloat | None = None
    """`yarn` only (1 when null)."""
    attention_factor: PositiveFloat | None = None
    """`yarn` only: scale of cos and sin (0.1 ln(factor) + 1 when null)."""


class SigmoidSteRouter(_Section):
    """DSMoE's router (arXiv 2502.12455): independent sigmoid gates, a threshold, a straight-through estimator, a sparsity loss."""

    type: Literal["sigmoid_ste"] = "sigmoid_ste"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """tau of Eq. 7: a gate routes when it is strictly above."""
    ste: Literal["exact", "sampled", "off"] = "exact"
    """Where the router's gradient comes from: every expert (Eqs. 10-11), a sample of the inactive ones, or the active ones alone."""
    probe_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """`ste: sampled` only: probability q that an inactive (token, expert) pair is probed, with importance 1/q."""
    zero_routes: Literal["skip", "top1"] = "skip"
    """A token whose gates are all closed: its FFN output is 0 (skip), or its largest gate routes all the same (top1)."""
    rescale: Literal["count", "none"] = "count"
    """Eq. 8: multiply by num_experts / number of routes of the token, or do not."""
    rescale_in_eval: bool = True
    """Whether Eq. 8 holds in evaluation too (the paper makes no difference)."""
    rescale_gradient: Literal["detached", "straight_through"] = "detached"
    """The count of Eq. 8 in backward: a constant (Eqs. 13-16), or straight-through like the gates."""
    sparsity_coef: NonNegativeFloat = 1.0
    """Coefficient of the sparsity loss (Eq. 19 has 1); the start value when `target_active` is set."""
    sparsity_on: Literal["active", "all"] = "active"
    """Eq. 18 as printed pushes the gates above the threshold (active); `all` pushes every gate."""
    target_active: PositiveFloat | None = None
    """Mean routes per token to hold by adapting the sparsity coefficient; null keeps the coefficient."""
    controller_factor: Annotated[float, Field(gt=1)] = 1.05
    """Largest factor by which the controller changes the coefficient in a step (ReMoE has 1.2, with 500 times the tokens per step)."""
    bias: bool = False
    """Router bias; the paper has none. It keeps its training without weight decay."""
    bias_init: float = 0.0
    """`bias: true` only. Start value; a large one (such as 4) opens every gate."""
    init_std: PositiveFloat = 0.02
    input: Literal["normed", "residual"] = "normed"
    """What the gates see: the FFN's input after the norm (the paper), or the residual stream before it."""


class TopKRouter(_Section):
    """The k experts of the largest scores route: Switch, GShard, LLaMA-MoE, Mixtral, DeepSeek-V3 (the recipes in configs/ set them up)."""

    type: Literal["topk"] = "topk"
    top_k: Positive
    score: Literal["softmax", "sigmoid"] = "softmax"
    """A token's score of an expert, from the gate's logits: softmax over all experts, or a sigmoid of each (DeepSeek-V3)."""
    gate: Literal["linear", "mlp", "cosine"] = "linear"
    """Logits of a token x: W x; V tanh(W x) (LLaMA-MoE); or cosines of x and the experts' rows over `cosine_temperature`."""
    cosine_temperature: PositiveFloat = 0.3
    """`gate: cosine` only."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training each component of the router's input is multiplied by a draw from [1 - jitter, 1 + jitter] (Switch: 0.01)."""
    noise: bool = False
    """In training logits get normal noise whose size the router learns (noisy top-k, LLaMA-MoE)."""
    second: Literal["always", "random"] = "always"
    """`top_k: 2` only: in training the second expert is used with probability min(1, 2 g2), g2 its share of the two scores (GShard: random)."""
    normalize: bool = True
    """Divide the k weights by their sum (for softmax the same as a softmax over the k logits); false keeps the scores. With one expert per
    token it must be false for the router to learn from the model's loss (Switch)."""
    output_scale: PositiveFloat = 1.0
    """Every weight is multiplied by it; LLaMA-MoE uses num_experts / top_k, DeepSeek-V3 2.5."""
    selection_bias: bool = False
    """`score: sigmoid` only: what chooses is score + bias; after each step a bias rises where the load was below the mean and falls where it
    was above (DeepSeek-V3)."""
    bias_rate: NonNegativeFloat = 1e-3
    """`selection_bias` only: the change of a bias in a step (gamma)."""
    num_groups: Positive = 1
    """`score: sigmoid` only: experts lie in so many equal groups (DeepSeek-V3's nodes), of which a token uses `top_groups` at most."""
    top_groups: Positive = 1
    """`num_groups` above 1 only: the groups with the largest sums of their top_k / top_groups best scores."""
    balance_coef: NonNegativeFloat = 0.01
    """Coefficient of the load-balancing loss E * sum_e f_e P_e (Switch), f the share of the routes, P the mean share of the scores."""
    balance_over: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    """The tokens that f counts: of the micro-batch on all ranks, of each sequence, or of all micro-batches of the step so far on all ranks."""
    balance_count: Literal["all", "first"] = "all"
    """f counts all k choices of a token, or the first alone (GShard). Choices count whether or not they are dropped."""
    cv_coef: NonNegativeFloat = 0.0
    """Coefficient of CV^2(importance) + CV^2(load) over the micro-batch on all ranks (LLaMA-MoE: 0.01)."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes at most ceil(capacity_factor * top_k * tokens / num_experts) routes of each sequence, the others are dropped;
    null drops none."""
    drop: Literal["position", "probability", "random"] = "position"
    """`capacity_factor` only. What a full expert keeps: first choices before second ones, each by position; the largest scores; or random
    routes (Z-code's random token selection)."""
    z_coef: NonNegativeFloat = 0.0
    """Coefficient of the router z-loss, mean of logsumexp(logits)^2 (ST-MoE)."""
    init_std: PositiveFloat = 0.02


Router = Annotated[SigmoidSteRouter | TopKRouter, Field(discriminator="type")]


class MoEConfig(_Section):
    num_experts: Positive
    """E, over all ranks."""
    expert_dim: Positive
    """F: intermediate size of one expert."""
    router: Router


class ModelConfig(_Section):
    """A decoder Transformer; the names follow Hugging Face's where the thing is the same."""

    vocab_size: Positive
    hidden_size: Positive
    """D."""
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive | None = None
    """Key/value heads (grouped-query attention); null: as many as `num_heads`."""
    head_dim: Positive | None = None
    """null: hidden_size / num_heads."""
    intermediate_size: Positive
    """Intermediate size of the dense FFN; not used where `moe` is set."""
    max_position_embeddings: Positive = 2048
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    o_bias: bool = False
    """Bias on the attention's output projection (LLaMA with attention_bias)."""
    mlp_bias: bool = False
    """Bias on the dense FFN's projections (LLaMA with mlp_bias)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation."""
    qk_norm_over: Literal["head", "all"] = "head"
    """`qk_norm` only: over each head by itself (Qwen3), or over all heads together (OLMoE)."""
    sliding_window: Positive | None = None
    """Positions a token sees back, itself included; null: all."""
    sliding_layers: list[int] | None = None
    """Layers with the sliding window; null: all, when `sliding_window` is set."""
    init_std: PositiveFloat = 0.02
    moe: MoEConfig | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def _params(self, experts_per_layer: float) -> tuple[float, float]:
        """(parameters of the matrices a token passes through, all other parameters), with so many experts counted in each layer."""
        D, q, kv = self.hidden_size, self.num_heads * self.head_size, self.kv_heads * self.head_size
        attention = D * q + 2 * D * kv + q * D
        if self.moe is None:
            ffn, router, small = 3 * D * self.intermediate_size, 0, self.mlp_bias * (2 * self.intermediate_size + D)
        else:
            ffn = experts_per_layer * 3 * D * self.moe.expert_dim
            router, small = self.moe.num_experts * D, 0
            if isinstance(self.moe.router, SigmoidSteRouter) and self.moe.router.bias:
                small += self.moe.num_experts
            if isinstance(self.moe.router, TopKRouter):
                router += self.moe.num_experts**2 * (self.moe.router.gate == "mlp")
                # The noise is for training alone: parameters, but no work of a forward pass.
                small += self.moe.num_experts * (self.moe.router.selection_bias + D * self.moe.router.noise)
        norms = 2 * self.head_size if self.qk_norm_over == "head" else q + kv
        small += 2 * D + self.qkv_bias * (q + 2 * kv) + self.o_bias * D + self.qk_norm * norms
        head = self.vocab_size * D
        matrices = self.num_layers * (attention + ffn + router) + head
        others = self.num_layers * small + D + (0 if self.tie_embeddings else self.vocab_size * D)
        return matrices, others

    def num_params(self) -> int:
        """Parameters of the whole model, tied weights counted once."""
        return int(sum(self._params(self.moe.num_experts if self.moe else 1)))

    def num_active_params(self, mean_active: float | None = None) -> float:
        """Parameters a token uses when it takes `mean_active` experts per layer (all of a dense model)."""
        return sum(self._params(self._active(mean_active)))

    def flops_per_token(self, seq_len: int, mean_active: float | None = None) -> float:
        """FLOPs of one token's forward pass: two per matrix parameter used, and causal attention over `seq_len` positions
        (half of the score matrix). Training is three times as much."""
        matrices, _ = self._params(self._active(mean_active))
        return 2 * matrices + self.num_layers * 2 * seq_len * self.num_heads * self.head_size

    def _active(self, mean_active: float | None) -> float:
        if self.moe is None:
            return 1
        if mean_active is not None:
            return mean_active
        return self.moe.router.top_k if isinstance(self.moe.router, TopKRouter) else self.moe.num_experts


# ---------------------------------------------------------------------------------------------------------------------- data


class Source(_Section):
    name: Name
    """Domain or language; metrics and evaluation are kept apart by it."""
    path: Name
    """Prefix of a prepared data set: PATH.bin, PATH.idx, PATH.json."""
    weight: PositiveFloat | None = None
    """Share of the training samples; null for all sources: by size (see `temperature`)."""


class EvalSource(_Section):
    name: Name
    path: Name


class DataConfig(_Section):
    seq_len: Annotated[int, Field(gt=1)] = 1024
    """Tokens per sample."""
    train: list[Source] = []
    eval: list[EvalSource] = []
    temperature: Fraction | None = None
    """Share of a source ~ size^temperature: 1 by size (the default), 0 all alike. Excludes weights."""
    isolate_documents: bool = True
    """Documents packed into one sample don't see each other and their positions restart at 0."""
    prefetch: NonNegative = 2
    """Optimizer steps read ahead by a thread; 0 reads when asked."""


class PrepareConfig(_Section):
    inputs: Annotated[list[str], Field(min_length=1)]
    """Files or folders: text, source code, .jsonl, .jsonl.gz, .jsonl.zst, .parquet."""
    output: Name
    """Prefix of the data set to write."""
    tokenizer: Name = "byte"
    """`byte`, or a Hugging Face tokenizer.json or the folder that holds it."""
    text_key: str = "text"
    extensions: Annotated[list[str] | None, Field(min_length=1)] = None
    """File endings taken from folders; null: text, code, jsonl, parquet."""
    exclude: list[str] = []
    """Glob patterns of paths, relative to their input folder, left out."""
    workers: Positive = 1
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of documents (by hash) set apart as PREFIX_valid; the rest is then PREFIX_train."""
    max_documents: Positive | None = None
    strict: bool = False
    """End at the first broken line instead of counting it."""
    seed: Seed = 0


# ------------------------------------------------------------------------------------------------------------------ training


class ParallelConfig(_Section):
    """Ranks = dp_replicate x dp_shard x ep. Every rank has data of its own. Dense parameters are sharded over dp_shard x ep, experts over
    ep and, inside, over dp_shard; both are replicated dp_replicate times."""

    dp_replicate: Positive = 1
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """-1: the ranks that are left."""
    ep: Positive = 1
    """Ranks that share the experts of a layer between them; divides num_experts."""
    timeout_seconds: Positive = 600
    """A collective that takes longer ends the run."""


class ScheduleConfig(_Section):
    type: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    min_lr_ratio: Fraction = 0.1
    """Last learning rate as a share of the first."""
    decay_steps: NonNegative = 0
    """`wsd` only: steps of linear decay at the end."""


class TrainConfig(_Section):
    steps: Positive
    global_batch_size: Positive
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: Positive
    """Samples per rank and forward pass."""
    lr: PositiveFloat = 3e-4
    router_lr: PositiveFloat | None = None
    """null: lr."""
    expert_lr: PositiveFloat | None = None
    """null: lr."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Matrices only: norms, biases and routers have none."""
    grad_clip: PositiveFloat | None = 1.0
    schedule: ScheduleConfig = ScheduleConfig()
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of activations and matrix products; parameters, router, norms' statistics and losses stay in float32 (float64 when chosen)."""
    seed: Seed = 0
    activation_checkpointing: Literal["none", "block"] = "none"
    """`block` keeps only each block's input and computes the block again in backward, with the routes of the first time."""
    max_bad_steps: Positive = 10
    """So many steps in a row with a non-finite loss or gradient end the run; each is skipped on all ranks."""
    eval_every: Positive | None = None
    eval_sequences: Positive | None = 64
    """Sequences of each evaluation set used during training; null: all."""


class CheckpointConfig(_Section):
    every: Positive | None = None
    """Steps between checkpoints; null: only at the end."""
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Checkpoints of steps divisible by it are kept for good."""
    asynchronous: bool = True
    """Write while training goes on."""
    signals: list[Literal["TERM", "USR1", "USR2", "HUP"]] = ["TERM", "USR2"]
    """After one of these all ranks save at the same step and the run ends; the same command goes on from there."""


class LogConfig(_Section):
    every: Positive = 10
    """Steps between console lines; the JSONL has every step."""
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "moetrain"
    wandb_name: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"


class UpcycleConfig(_Section):
    dense: Name
    """Dense Hugging Face checkpoint: LLaMA, Mistral, Qwen2 or Qwen3. `btx`: the model that the others grew from. `aggregate`,
    `to_dense`: a mixture."""
    output: Name
    """Folder to write; a Hugging Face checkpoint too."""
    method: Literal["dsmoe", "llama_moe", "copy", "drop", "virtual_groups", "btx", "aggregate", "to_dense"] = "dsmoe"
    """`dsmoe`, `llama_moe`: cut each FFN into equal slices, with a sigmoid_ste router, or topk scaled by E / k. `copy`: every expert a copy
    (sparse upcycling). `drop`: copies with a part drawn anew. `virtual_groups`: copies of slices (granular upcycling). `btx`: the FFNs of several
    dense models, the rest merged. `aggregate`: the experts of several mixtures side by side. `to_dense`: back from a mixture, where exact."""
    num_experts: Positive = 8
    """Not for `btx`, `aggregate` and `to_dense`, where the models say it."""
    router: Router | None = None
    """null: the method's own router (`llama_moe`: top 3 of 8, that is 3/8 of the experts; `virtual_groups`: top-k of one group; other copies:
    top 2; `aggregate`: the mixtures')."""
    split: Literal["contiguous", "random", "cluster", "coactivation", "importance"] = "contiguous"
    """`dsmoe`, `llama_moe`: which neurons go together. A seeded permutation, balanced clusters of their weights, of when they fire, or the
    data on which they matter (the last two need `calibration`)."""
    cluster_on: Literal["gate", "up"] = "gate"
    """`split: cluster` only: whose rows describe a neuron."""
    cluster_metric: Literal["l2", "cosine"] = "l2"
    """`split: cluster` only."""
    calibration: Name | None = None
    """`split: coactivation`, `importance`: prefix of a prepared data set."""
    calibration_sequences: Positive = 64
    calibration_seq_len: Annotated[int, Field(gt=1)] = 512
    granularity: Positive = 2
    """`virtual_groups` only: G, slices of each copy; divides num_experts, and top_k is a multiple of it."""
    noise: NonNegativeFloat = 0.0
    """`copy` only: normal noise on every expert weight, in standard deviations of its matrix."""
    drop_ratio: Fraction = 0.5
    """`drop` only: share of each expert's neurons that is drawn anew; 0 is the plain copy."""
    drop_shared: bool = True
    """`drop` only: gate, up and down lose the same neurons (the paper), or each its own (the paper's script)."""
    weight_scaling: bool | None = None
    """Scale the experts so that the mixture starts as the dense model (docs/upcycling.md). null: on for the copies, `virtual_groups` and `btx`,
    off for `dsmoe`. Not for `llama_moe`, whose router has output_scale."""
    models: list[Name] = []
    """`btx`: the dense models that become experts; `aggregate`: the mixtures beside `dense`."""
    merge: Literal["average", "base", "ties", "dare"] = "average"
    """`btx`, `aggregate`: what becomes of all weights but the experts: their mean, those of `dense`, or `dense` and the models' differences from it
    merged by TIES or DARE (`btx` only)."""
    merge_density: Annotated[float, Field(gt=0, le=1)] = 0.8
    """`merge: ties`, `dare`: share of each difference that is kept, by size or at random."""
    merge_scale: PositiveFloat | None = None
    """`merge: ties`, `dare`: lambda, factor of the added differences; null: 1 / number of models."""
    join: Literal["slices", "copies"] = "slices"
    """`to_dense` only: experts are the slices of one FFN (undoes `dsmoe` and `llama_moe`), or all the same FFN."""
    receipt: bool = True
    """Measure how far the result is from `dense` on a sample text; reads both models once more, layer by layer."""
    seed: Seed = 0
    max_shard_bytes: Positive = 5_000_000_000

    @property
    def scales_weights(self) -> bool:
        """`weight_scaling`, with the method's own choice for null."""
        if self.method not in _UPCYCLE_OPTIONS["weight_scaling"]:
            return False
        return self.method != "dsmoe" if self.weight_scaling is None else self.weight_scaling


class EvalConfig(_Section):
    sequences: Positive | None = None
    """Per set; null: all."""
    batch_size: Positive = 8
    output: Annotated[str | None, Field(min_length=1)] = None
    """JSON file with the figures that are printed."""


class GenerateConfig(_Section):
    prompt: str = ""
    max_new_tokens: Positive = 64
    temperature: NonNegativeFloat = 0.0
    """0: the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0


class ExportConfig(_Section):
    output: Name
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null: as the parameters are."""
    max_shard_bytes: Positive = 5_000_000_000


class Config(_Section):
    """The whole file. A command reads the sections it needs and says which is missing."""

    run_dir: Name = "runs/default"
    """Checkpoints, metrics and the resolved config of a training run; eval, generate and export read from it."""
    init_from: Annotated[str | None, Field(min_length=1)] = None
    """Hugging Face folder (dense, upcycled or exported) with the start weights; null: random. Its config is the default of `model`."""
    resume: bool = True
    """Go on from the newest whole checkpoint in run_dir; false refuses a run_dir that has one."""
    model: ModelConfig | None = None
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    prepare: PrepareConfig | None = None
    upcycle: UpcycleConfig | None = None
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    export: ExportConfig | None = None


# ------------------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML with the numbers people write: `3e-4` and `1e6` are numbers, `no` and `12:30` are strings, a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?"
_Loader.add_implicit_resolver("!number", re.compile(rf"^{_NUMBER}$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"), list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would take for a number."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
# PyYAML writes U+0085 and its like bare, where they would be read as ends of lines; between double quotes it escapes them.
_Dumper.add_representer(str, lambda d, v: d.represent_scalar("tag:yaml.org,2002:str", v, style=None if v.isprintable() else '"'))
_Dumper.add_representer(float, lambda d, v: d.represent_scalar("!number", repr(v)))
_Dumper.add_representer(int, lambda d, v: d.represent_scalar("!number", str(v)))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = node.value.replace("_", "").lower()
    if re.fullmatch(r"[-+]?\d+", text) and len(text) < 1000:  # Python's int() refuses thousands of digits
        return int(text)
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    if math.isinf(value) and "inf" not in text:
        raise yaml.constructor.ConstructorError(None, None, f"the number {_short(node.value)} is too large", node.start_mark)
    # 1e6 is a whole number; 3.0 stays a float, since whoever writes the point means one.
    return int(value) if "." not in text and "n" not in text and value == int(value) else value


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("!number", _number)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; `where` names it in errors (ConfigError)."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only, no tags that build objects
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{place}: not valid YAML: {problem}") from None


def _apply_override(tree: dict[str, Any], key: str, text: str) -> None:
    node: Any = tree
    parts = key.split(".")
    # Text stands for itself: the prompt `def main():` would be a mapping in YAML, the folder 2024 a number.
    kind = _keys(Config).get(_generic(parts))
    value = text if text == "" or kind is str or (kind == str | None and text != "null") else parse_yaml(text, f"--{key}")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--{key}: {'.'.join(parts[:i])} is a list of {len(node)}; {part!r} is no place in it")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
        else:
            raise ConfigError(f"--{key}: {'.'.join(parts[:i])} is a value, not a section")
        if last:
            node[index] = value
            return
        if isinstance(node, dict) and node.get(index) is None:
            node[index] = {}
        node = node[index]


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """['--train.lr', '3e-4', '--resume=false'] -> [('train.lr', '3e-4'), ('resume', 'false')]."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}; an override is --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise ConfigError(f"--{key}: a value is missing; write --{key} VALUE or --{key}=VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    model_from: Callable[[str, str], dict[str, Any]] | None = None,
) -> Config:
    """Read, override, check.

    path: YAML file, or None for overrides alone. overrides: (dotted key, YAML text) pairs. model_from: given the folder named by
    `init_from`, returns its `model` section, on which the file's own is laid. Raises ConfigError with every reason.
    """
    where = str(path) if path is not None else "command line"
    tree: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"config {where}: can't be read: {reason}") from None
        tree = parse_yaml(text, f"config {where}")
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise ConfigError(f"config {where}: must be a mapping of sections, found {type(tree).__name__}")
    for key, value in overrides:
        _apply_override(tree, key, value)
    given, folder = tree.get("model") or {}, tree.get("init_from")
    if model_from is not None and isinstance(folder, str) and folder and isinstance(given, dict):
        run_dir = tree.get("run_dir")
        tree["model"] = _merge(model_from(folder, run_dir if isinstance(run_dir, str) else Config.model_fields["run_dir"].default), given)
        _forget_idle(tree["model"], given)
    return config_from_dict(tree, where)


def _forget_idle(model: dict[str, Any], given: dict[str, Any]) -> None:
    """Drop the router options of the start weights' folder that the file's own options leave without effect: the user never wrote them."""
    path = ("moe", "router")
    for key in path:
        model, given = (node.get(key) if isinstance(node, dict) else None for node in (model, given))
    kind = TopKRouter if isinstance(model, dict) and model.get("type") == "topk" else SigmoidSteRouter
    try:
        router = kind.model_validate(model)
    except ValidationError:
        return
    for name in _idle(router) - set(given or {}):
        model.pop(name, None)


def config_from_dict(tree: dict[str, Any], where: str = "given") -> Config:
    """Validate a nested dict. Raises ConfigError with every reason."""
    return validate(Config, tree, f"config {where}", check)


def validate(cls: type[_File], tree: dict[str, Any], where: str, rules: Callable[[_File], list[str]]) -> _File:
    """A file's content as `cls`, whose cross-field `rules` name what they find broken. Raises ConfigError with every reason."""
    try:
        found = cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_lines(where, [_explain(item, cls) for item in error.errors()])) from None
    problems = rules(found)
    if problems:
        raise ConfigError(_lines(where, problems))
    return found


def _lines(where: str, problems: list[str]) -> str:
    head = f"{where}: "
    return head + problems[0] if len(problems) == 1 else head + f"{len(problems)} errors\n" + "\n".join(f"  {p}" for p in problems)


def _explain(item: Any, cls: type[BaseModel]) -> str:
    # pydantic puts the tag of the discriminated union ("topk") behind `router`; it is no key of the user's.
    location = [str(p) for i, p in enumerate(item["loc"]) if i == 0 or item["loc"][i - 1] != "router"]
    name = ".".join(location) or "config"
    kind, value = item["type"], item.get("input")
    if kind == "model_type":
        return f"{name}: must be a section with keys of its own, found {_short(value)}"
    if kind == "extra_forbidden":
        known = sorted(_keys(cls))
        close = difflib.get_close_matches(
            location[-1], [k.rsplit(".", 1)[-1] for k in known if k.rpartition(".")[0] == _generic(location[:-1])], 1, 0.5
        )
        if close:
            return f"{name}: unknown key; did you mean {'.'.join([*location[:-1], close[0]])}?"
        elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == location[-1]] or difflib.get_close_matches(_generic(location), known, 1, 0.6)
        hint = "; `moetrain config --schema` lists all keys" if cls is Config else ""
        return f"{name}: unknown key" + (f"; did you mean {elsewhere[0]}?" if elsewhere else hint)
    if kind == "missing":
        return f"{name}: missing; it has no default"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{name}.type: found {_short((value or {}).get('type') if isinstance(value, dict) else value)}; one of sigmoid_ste, topk"
    return f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, found {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _generic(location: Sequence[str]) -> str:
    return ".".join("*" if p.isdigit() else p for p in location)


def _keys(cls: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """All dotted keys of a section and their types, without bounds; '*' stands for a place in a list."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        found[prefix + name] = field.annotation
        for inner, is_list in _sections(field.annotation):
            found |= _keys(inner, f"{prefix}{name}{'.*' if is_list else ''}.")
    return found


def _sections(annotation: Any, in_list: bool = False) -> list[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, in_list)]
    in_list = in_list or getattr(annotation, "__origin__", None) is list
    return [s for argument in getattr(annotation, "__args__", ()) for s in _sections(argument, in_list)]


def check(config: Config) -> list[str]:
    """Cross-field rules; returns every broken one as a line that names the fields, their values and what would do."""
    bad: list[str] = []
    model, train, parallel, data = config.model, config.train, config.parallel, config.data
    if parallel.dp_shard == 0:
        bad.append("parallel.dp_shard: 0 ranks; use -1 for all that are left, or 1 and more")
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
        if train.eval_every and not data.eval:
            bad.append(f"train.eval_every ({train.eval_every}) needs at least one set in data.eval")
    if (data.train or data.eval) and model is not None and data.seq_len > model.max_position_embeddings:
        bad.append(f"data.seq_len ({data.seq_len}) is more than model.max_position_embeddings ({model.max_position_embeddings})")
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
    if config.upcycle is not None:
        _check_upcycle(config.upcycle, bad)
    return bad


def _check_model(model: ModelConfig, parallel: ParallelConfig, bad: list[str]) -> None:
    if model.head_dim is None and model.hidden_size % model.num_heads:
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
        read = {"type", "factor", *wanted[scaling.type], *(("beta_fast", "beta_slow", "attention_factor") if scaling.type == "yarn" else ())}
        for name in RopeScaling.model_fields:
            if name not in read and getattr(scaling, name) is not None:
                bad.append(f"model.rope_scaling.{name} ({getattr(scaling, name)}) has no effect with type: {scaling.type}")
    if model.moe is None:
        if parallel.ep > 1:
            bad.append(f"parallel.ep ({parallel.ep}) needs model.moe: a dense model has no experts to share; use dp_shard")
        return
    moe = model.moe
    if model.mlp_bias:
        bad.append("model.mlp_bias: experts have no bias; a model with model.moe needs mlp_bias: false")
    if moe.num_experts % parallel.ep:
        divisors = [d for d in range(1, moe.num_experts + 1) if moe.num_experts % d == 0]
        near = min(divisors, key=lambda d: abs(d - parallel.ep))
        bad.append(f"model.moe.num_experts ({moe.num_experts}) must be a multiple of parallel.ep ({parallel.ep}); nearest: {near}")
    shard = parallel.dp_shard
    if shard > 1 and (model.hidden_size % shard or (2 * moe.expert_dim) % shard):
        bad.append(
            f"parallel.dp_shard ({shard}) must divide model.hidden_size ({model.hidden_size}) and twice model.moe.expert_dim ({2 * moe.expert_dim})"
        )
    router = moe.router
    if isinstance(router, TopKRouter):
        if router.top_k > moe.num_experts:
            bad.append(f"model.moe.router.top_k ({router.top_k}) is more than model.moe.num_experts ({moe.num_experts})")
        _check_topk(router, moe.num_experts, "model.moe.router", bad)
    else:
        _check_sigmoid(router, moe.num_experts, "model.moe.router", bad)


def _check_topk(router: TopKRouter, num_experts: int, where: str, bad: list[str]) -> None:
    given, groups = router.model_fields_set, router.num_groups
    if "cosine_temperature" in given and router.gate != "cosine":
        bad.append(f"{where}.cosine_temperature ({router.cosine_temperature}) has an effect only with gate: cosine, not {router.gate}")
    if router.noise and router.score != "softmax":
        bad.append(f"{where}.noise: noisy top-k is for score: softmax, not {router.score}")
    if router.second == "random" and router.top_k != 2:
        bad.append(f"{where}.second: random needs top_k: 2, not {router.top_k}")
    if router.selection_bias and router.score != "sigmoid":
        bad.append(f"{where}.selection_bias needs score: sigmoid, not {router.score}")
    if "bias_rate" in given and not router.selection_bias:
        bad.append(f"{where}.bias_rate ({router.bias_rate}) has an effect only with selection_bias: true")
    if groups > 1 and router.score != "sigmoid":
        bad.append(f"{where}.num_groups ({groups}) needs score: sigmoid, not {router.score}")
    elif num_experts % groups:
        bad.append(f"{where}.num_groups ({groups}) must divide num_experts ({num_experts})")
    if "top_groups" in given and groups == 1:
        bad.append(f"{where}.top_groups ({router.top_groups}) has an effect only with num_groups above 1")
    elif router.top_groups > groups:
        bad.append(f"{where}.top_groups ({router.top_groups}) is more than num_groups ({groups})")
    elif router.top_k <= num_experts and router.top_groups * (num_experts // groups) < router.top_k:
        reach = router.top_groups * (num_experts // groups)
        bad.append(f"{where}.top_groups ({router.top_groups}) groups have {reach} experts, fewer than top_k ({router.top_k})")
    if "drop" in given and router.capacity_factor is None:
        bad.append(f"{where}.drop ({router.drop}) has an effect only with capacity_factor")


def _check_sigmoid(router: SigmoidSteRouter, num_experts: int, where: str, bad: list[str]) -> None:
    given = router.model_fields_set
    if "probe_rate" in given and router.ste != "sampled":
        bad.append(f"{where}.probe_rate ({router.probe_rate}) has an effect only with ste: sampled, not {router.ste}")
    if "bias_init" in given and not router.bias:
        bad.append(f"{where}.bias_init ({router.bias_init}) has an effect only with bias: true")
    if "controller_factor" in given and router.target_active is None:
        bad.append(f"{where}.controller_factor ({router.controller_factor}) has an effect only with target_active")
    if router.target_active is not None:
        if router.target_active > num_experts:
            bad.append(f"{where}.target_active ({router.target_active}) is more than num_experts ({num_experts})")
        if router.sparsity_coef == 0:
            bad.append(f"{where}.sparsity_coef: 0 can't be adapted to hold target_active; use a small positive start such as 1e-3")
    if router.rescale == "none" and ("rescale_gradient" in given or "rescale_in_eval" in given):
        bad.append(f"{where}: rescale_gradient and rescale_in_eval have an effect only with rescale: count")


# Option of an upcycling -> methods for which it counts.
_SPLITS, _COPIES = ("dsmoe", "llama_moe"), ("copy", "drop", "virtual_groups")
_UPCYCLE_OPTIONS: dict[str, tuple[str, ...]] = {
    "num_experts": _SPLITS + _COPIES,
    "router": (*_SPLITS, *_COPIES, "btx", "aggregate"),
    "split": _SPLITS,
    "cluster_on": _SPLITS,
    "cluster_metric": _SPLITS,
    "calibration": _SPLITS,
    "calibration_sequences": _SPLITS,
    "calibration_seq_len": _SPLITS,
    "granularity": ("virtual_groups",),
    "noise": ("copy",),
    "drop_ratio": ("drop",),
    "drop_shared": ("drop",),
    "weight_scaling": ("dsmoe", *_COPIES, "btx"),
    "models": ("btx", "aggregate"),
    "merge": ("btx", "aggregate"),
    "merge_density": ("btx",),
    "merge_scale": ("btx",),
    "join": ("to_dense",),
}


def _check_upcycle(upcycle: UpcycleConfig, bad: list[str]) -> None:
    router, method, experts = upcycle.router, upcycle.method, upcycle.num_experts
    for name in sorted(_idle(upcycle) & upcycle.model_fields_set):
        value, methods = getattr(upcycle, name), _UPCYCLE_OPTIONS[name]
        if method not in methods:
            if value is not None and value != []:
                bad.append(f"upcycle.{name} ({_short(value)}) has no effect with method: {method}; it is for {', '.join(methods)}")
        elif name.startswith("merge"):
            bad.append(f"upcycle.{name} ({value}) has an effect only with merge: ties or dare, not {upcycle.merge}")
        elif value is not None:
            bad.append(f"upcycle.{name} ({value}) has no effect with split: {upcycle.split}")
    if upcycle.split in ("coactivation", "importance") and upcycle.calibration is None and method in _SPLITS:
        bad.append(f"upcycle.calibration: split: {upcycle.split} needs the prefix of a prepared data set")
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
    if isinstance(router, TopKRouter) and method != "aggregate":
        if router.top_k > experts:
            name = "upcycle.num_experts" if method != "btx" else "the number of upcycle.models"
            bad.append(f"upcycle.router.top_k ({router.top_k}) is more than {name} ({experts})")
        elif method == "virtual_groups" and router.top_k % upcycle.granularity:
            bad.append(f"upcycle.router.top_k ({router.top_k}) must be a multiple of upcycle.granularity ({upcycle.granularity}): whole groups route")
        _check_topk(router, experts, "upcycle.router", bad)
    if isinstance(router, SigmoidSteRouter):
        _check_sigmoid(router, experts, "upcycle.router", bad)
        if router.input == "residual" and upcycle.scales_weights:
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
        raise ConfigError("\n".join(bad))
    return parallel


def to_yaml(config: BaseModel) -> str:
    """The resolved config, every default written out, as YAML that `load_config` reads back to an equal config."""
    return yaml.dump(_drop_idle(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _drop_idle(value: Any) -> Any:
    # An option that only counts beside another one would be refused when read back as if the user had set it; it says nothing, so leave it out.
    if isinstance(value, BaseModel):
        idle = _idle(value)
        return {k: _drop_idle(getattr(value, k)) for k in type(value).model_fields if k not in idle}
    if isinstance(value, list):
        return [_drop_idle(v) for v in value]
    return value


def _idle(section: BaseModel) -> set[str]:
    """Options of a section that have no effect beside its others; `check` refuses one that is given."""
    idle: set[str] = set()
    if isinstance(section, SigmoidSteRouter):
        idle |= set() if section.ste == "sampled" else {"probe_rate"}
        idle |= set() if section.bias else {"bias_init"}
        idle |= set() if section.target_active is not None else {"controller_factor"}
        idle |= set() if section.rescale == "count" else {"rescale_gradient", "rescale_in_eval"}
    if isinstance(section, ModelConfig):
        idle |= set() if section.qk_norm else {"qk_norm_over"}
    if isinstance(section, TopKRouter):
        idle |= set() if section.gate == "cosine" else {"cosine_temperature"}
        idle |= set() if section.selection_bias else {"bias_rate"}
        idle |= set() if section.num_groups > 1 else {"top_groups"}
        idle |= set() if section.capacity_factor is not None else {"drop"}
    if isinstance(section, UpcycleConfig):
        idle |= {name for name, methods in _UPCYCLE_OPTIONS.items() if section.method not in methods}
        idle |= set() if section.split == "cluster" else {"cluster_on", "cluster_metric"}
        idle |= set() if section.split in ("coactivation", "importance") else {"calibration", "calibration_sequences", "calibration_seq_len"}
        idle |= set() if section.merge in ("ties", "dare") else {"merge_density", "merge_scale"}
    if isinstance(section, ScheduleConfig):
        idle |= {"min_lr_ratio"} if section.type == "constant" else set()
        idle |= set() if section.type == "wsd" else {"decay_steps"}
    return idle


def to_dict(config: BaseModel) -> dict[str, Any]:
    """As `to_yaml`, as plain dicts and lists."""
    return _drop_idle(config)


def schema() -> str:
    """JSON schema of the file, for editors (`# yaml-language-server: $schema=...`)."""
    return json.dumps(Config.model_json_schema(), indent=2)


def defaults(cls: type[BaseModel]) -> dict[str, Any]:
    """Field -> default of a section; fields without one are left out."""
    return {n: f.default for n, f in cls.model_fields.items() if f.default is not PydanticUndefined}
