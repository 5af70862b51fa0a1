"""The sections beside the model, and the whole file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moetrain.config.base import Fraction, Name, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Seed
from moetrain.config.model import LayerChoice, ModelConfig
from moetrain.config.routers import Router, holds_router

# ---------------------------------------------------------------------------------------------------------------------- data


class Source(Section):
    name: Name
    """Domain or language; metrics and evaluation are kept apart by it."""
    path: Name
    """Prefix of a prepared data set: PATH.bin, PATH.idx, PATH.json."""
    weight: PositiveFloat | None = None
    """Share of the training samples; null for all sources: by size (see `temperature`)."""


class EvalSource(Section):
    name: Name
    path: Name
    task: Name | None = None
    """With `router.type: task`: the task of its text; null: that of its own name."""


class DataConfig(Section):
    seq_len: Annotated[int, Field(gt=1)] = 1024
    """Tokens per sample."""
    train: list[Source] = []
    eval: list[EvalSource] = []
    temperature: Fraction | None = None
    """Share of a source ~ size^temperature: 1 by size (the default), 0 all alike. Excludes weights."""
    isolate_documents: bool = True
    """Documents packed into one sample don't see each other and their positions restart at 0."""
    prefetch: Annotated[int, Field(ge=0, le=1024)] = 2
    """Optimizer steps read ahead by a thread; 0 reads when asked."""

    @property
    def eval_tasks(self) -> dict[str, str]:
        """Evaluation set -> its task, by name."""
        return {s.name: s.task or s.name for s in self.eval}


class PrepareConfig(Section):
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
    counts: bool = False
    """Also write PREFIX.counts.json, how often each token id occurs, for `model.moe.router.frequencies`."""
    strict: bool = False
    """End at the first broken line instead of counting it."""
    seed: Seed = 0


# ------------------------------------------------------------------------------------------------------------------ training


class ParallelConfig(Section):
    """Ranks = dp_replicate x dp_shard x ep. Every rank has data of its own. Dense parameters are sharded over dp_shard x ep, experts over
    ep and, inside, over dp_shard; both are replicated dp_replicate times."""

    dp_replicate: Positive = 1
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """-1: the ranks that are left."""
    ep: Positive = 1
    """Ranks that share the experts of a layer between them; divides num_experts."""
    exchange: Literal["auto", "collective", "peers"] = "auto"
    """How tokens get to the ranks of their experts and back, with ep above 1. `collective`: all-to-alls of NCCL or gloo. `peers`: straight into the
    memory of the other ranks, which must be on one machine. `auto`: peers on CPUs where that is possible, else collective."""
    timeout_seconds: Positive = 600
    """A collective that takes longer ends the run."""


class ScheduleConfig(Section):
    type: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 0
    min_lr_ratio: Fraction = 0.1
    """Last learning rate as a share of the first."""
    decay_steps: NonNegative = 0
    """`wsd` only: steps of linear decay at the end."""

    def idle(self) -> set[str]:
        return ({"min_lr_ratio"} if self.type == "constant" else set()) | (set() if self.type == "wsd" else {"decay_steps"})


class TrainConfig(Section):
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
    compile: bool = False
    """Norms and rotary positions by torch.compile, which on a CPU needs a C++ compiler at run time; the first step then takes half a minute more."""
    experts_backend: Literal["torch", "sonicmoe"] = "torch"
    """What multiplies the experts' matrices: torch, or SonicMoE (Hopper and Blackwell, bfloat16; not measured by us, so never chosen by itself)."""
    max_bad_steps: Positive = 10
    """So many steps in a row with a non-finite loss or gradient end the run; each is skipped on all ranks."""
    eval_every: Positive | None = None
    eval_sequences: Positive | None = 64
    """Sequences of each evaluation set used during training; null: all."""


class CheckpointConfig(Section):
    every: Positive | None = None
    """Steps between checkpoints; null: only at the end."""
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Checkpoints of steps divisible by it are kept for good."""
    asynchronous: bool = True
    """Write while training goes on."""
    signals: list[Literal["TERM", "USR1", "USR2", "HUP"]] = ["TERM", "USR2"]
    """After one of these all ranks save at the same step and the run ends; the same command goes on from there."""
    max_failures: Positive = 3
    """So many checkpoints in a row that can't be written (disk full, read-only) end the run; before that the next one is tried in its time."""


class WatchdogConfig(Section):
    """A rank that stays in one place for longer writes all stacks to RUN/watchdog and ends, so that its launcher starts it again. 0: no limit."""

    start_seconds: NonNegativeFloat = 1800.0
    """From the start to the end of the first step, loading and compiling included."""
    step_seconds: NonNegativeFloat = 900.0
    """A step, or a batch of an evaluation. More than parallel.timeout_seconds, as a collective that fails says more."""
    checkpoint_seconds: NonNegativeFloat = 1800.0
    """From the beginning of a checkpoint until it is written, also while training goes on beside it."""
    max_starts: NonNegative = 10
    """Starts in a row, by a launcher or a scheduler, from the same checkpoint; the run does not begin another. 0: no limit."""


class LogConfig(Section):
    every: Positive = 10
    """Steps between console lines; the JSONL has every step."""
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "moetrain"
    wandb_name: str | None = None
    wandb_mode: Literal["online", "offline"] = "online"
    load_every: NonNegative | None = None
    """Steps between records of the load of every expert in the JSONL, for the heat map of `moetrain report`; null: about 100 in the run, 0: none."""
    routing: bool = True
    """Keep RUN/routing.json, the newest load by source and by evaluation set, there also by kind of token (beginning of a word, digit, ...)."""


class GuardConfig(Section):
    """Health checks of a mixture in training (docs/guard.md)."""

    every: Positive | None = None
    """Steps between checks; null: none, at no cost."""
    action: Literal["warn", "stop"] = "warn"
    """On an error: `warn` writes it to events.jsonl and the console; `stop` also ends the run on all ranks, before the step's update."""
    dead_after: Positive = 3
    """Checks in a row without a route after which an expert is named as dead (a note, never an error)."""

    def idle(self) -> set[str]:
        return {"action", "dead_after"} if self.every is None else set()


# Option of an upcycling -> methods for which it counts.
SPLITS, _COPIES = ("slices", "dsmoe", "llama_moe"), ("copy", "drop", "virtual_groups")
UPCYCLE_OPTIONS: dict[str, tuple[str, ...]] = {
    "num_experts": SPLITS + _COPIES,
    "router": (*SPLITS, *_COPIES, "btx", "aggregate"),
    "layers": (*SPLITS, *_COPIES, "btx"),
    "split": SPLITS,
    "shared_dim": SPLITS,
    "cluster_on": SPLITS,
    "cluster_metric": SPLITS,
    "calibration": SPLITS,
    "calibration_sequences": SPLITS,
    "calibration_seq_len": SPLITS,
    "granularity": ("virtual_groups",),
    "noise": ("copy",),
    "drop_ratio": ("drop",),
    "drop_shared": ("drop",),
    "weight_scaling": ("slices", "dsmoe", *_COPIES, "btx"),
    "models": ("btx", "aggregate"),
    "merge": ("btx", "aggregate"),
    "merge_density": ("btx",),
    "merge_scale": ("btx",),
    "join": ("to_dense",),
}


@holds_router
class UpcycleConfig(Section):
    dense: Name
    """Dense Hugging Face checkpoint: LLaMA, Mistral, Qwen2 or Qwen3. `btx`: the model that the others grew from. `aggregate`,
    `to_dense`: a mixture."""
    output: Name
    """Folder to write; a Hugging Face checkpoint too."""
    method: Literal["slices", "dsmoe", "llama_moe", "copy", "drop", "virtual_groups", "btx", "aggregate", "to_dense"] = "slices"
    """`slices`: cut each FFN into equal slices, with any router. `dsmoe`: the same with sigmoid_ste; `llama_moe`: with topk, scaled by E / k.
    `copy`: every expert a copy (sparse upcycling). `drop`: copies with a part drawn anew. `virtual_groups`: copies of slices (granular upcycling).
    `btx`: the FFNs of several dense models, the rest merged. `aggregate`: the experts of several mixtures side by side. `to_dense`: back from a
    mixture, where exact."""
    num_experts: Positive = 8
    """Not for `btx`, `aggregate` and `to_dense`, where the models say it."""
    router: Router | None = None
    """null: the method's own router (`slices`: budget, 3/8 of the experts in the mean; `llama_moe`: top-k of as many; `virtual_groups`: top-k of one
    group; other copies: top 2; `aggregate`: the mixtures')."""
    layers: LayerChoice = None
    """Which layers become sparse, as in `model.moe.layers`; the others keep their FFN (`btx`: merged as all the rest)."""
    split: Literal["contiguous", "random", "cluster", "coactivation", "importance"] = "contiguous"
    """`slices`, `dsmoe`, `llama_moe`: which neurons go together. A seeded permutation, balanced clusters of their weights, of when they fire, or the
    data on which they matter (the last two need `calibration`)."""
    shared_dim: Positive | None = None
    """`dsmoe`, `llama_moe`: the so many neurons that matter most (|h dL/dh| on `calibration`) become a shared FFN, the rest is cut (LLaMA-MoE's
    Sharing-Inter; LLaMA-MoE v2's residual split). null: all are cut."""
    cluster_on: Literal["gate", "up"] = "gate"
    """`split: cluster` only: whose rows describe a neuron."""
    cluster_metric: Literal["l2", "cosine"] = "l2"
    """`split: cluster` only."""
    calibration: Name | None = None
    """`split: coactivation`, `importance`, and `shared_dim`: prefix of a prepared data set."""
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
    """Scale the experts so that the mixture starts as the dense model, or with `slices` so that an active slice weighs 1 in the mean
    (docs/upcycling.md). null: on for the copies, `virtual_groups`, `btx`, and for `slices` where the router has no output_scale; off for `dsmoe`. Not
    for `llama_moe`, whose router has output_scale."""
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
    """`to_dense` only: experts are the slices of one FFN (undoes `slices`, `dsmoe` and `llama_moe`), or all the same FFN."""
    receipt: bool = True
    """Measure how far the result is from `dense` on a sample text; reads both models once more, layer by layer."""
    seed: Seed = 0
    max_shard_bytes: Positive = 5_000_000_000

    @property
    def scales_weights(self) -> bool:
        """`weight_scaling`, with the method's own choice for null."""
        if self.method not in UPCYCLE_OPTIONS["weight_scaling"]:
            return False
        if self.weight_scaling is not None:
            return self.weight_scaling
        if self.method == "slices":
            scaled = self.router is None or "output_scale" in type(self.router).model_fields
            return not scaled and getattr(self.router, "input", "normed") == "normed"
        return self.method != "dsmoe"

    @property
    def needs_calibration(self) -> bool:
        return self.method in SPLITS and (self.split in ("coactivation", "importance") or self.shared_dim is not None)

    def idle(self) -> set[str]:
        idle = {name for name, methods in UPCYCLE_OPTIONS.items() if self.method not in methods}
        idle |= set() if self.split == "cluster" else {"cluster_on", "cluster_metric"}
        idle |= set() if self.needs_calibration else {"calibration", "calibration_sequences", "calibration_seq_len"}
        return idle | (set() if self.merge in ("ties", "dare") else {"merge_density", "merge_scale"})


class EvalConfig(Section):
    sequences: Positive | None = None
    """Per set; null: all."""
    batch_size: Positive = 8
    output: Annotated[str | None, Field(min_length=1)] = None
    """JSON file with the figures that are printed."""
    routing: bool = False
    """Also write the load by set and by kind of token to run_dir's routing.json, which `moetrain report` shows."""


class GenerateConfig(Section):
    prompt: str = ""
    max_new_tokens: Positive = 64
    temperature: NonNegativeFloat = 0.0
    """0: the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = 0
    task: Name | None = None
    """With `router.type: task`: the task of the text."""


class ExportConfig(Section):
    output: Name
    task: Name | None = None
    """With `router.type: task`: write the dense model that this task's experts make up; null: the whole mixture."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null: as the parameters are."""
    max_shard_bytes: Positive = 5_000_000_000


class ReportConfig(Section):
    output: Name | None = None
    """HTML file to write; null: report.html in run_dir."""


@holds_router
class Config(Section):
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
    watchdog: WatchdogConfig = WatchdogConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    prepare: PrepareConfig | None = None
    upcycle: UpcycleConfig | None = None
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()
    export: ExportConfig | None = None
    report: ReportConfig = ReportConfig()
