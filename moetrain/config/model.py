"""The model: a decoder Transformer, dense or with a mixture of experts."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from moetrain.config.base import NonNegative, Positive, PositiveFloat, Section
from moetrain.config.routers import Router, holds_router

MAX_LAYERS = 4096


class RopeScaling(Section):
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
    mscale: PositiveFloat | None = None
    """`yarn` with `model.mla` only, together with `mscale_all_dim`: m in the default of `attention_factor`, (0.1 m ln(factor) + 1) over the same of
    `mscale_all_dim` (DeepSeek)."""
    mscale_all_dim: PositiveFloat | None = None
    """`yarn` with `model.mla` only: m of the factor (0.1 m ln(factor) + 1)^2 on attention's logits (DeepSeek)."""

    def magnitude(self, m: float) -> float:
        """0.1 m ln(factor) + 1; 1 where nothing is stretched."""
        return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


class MLAConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one small latent vector per token, which
    is what a cache holds; positions are in a part of their own. The names are Hugging Face's."""

    q_lora_rank: Positive | None = None
    """Width of the queries' latent; null: queries come from the input at once."""
    kv_lora_rank: Positive
    """Width of the latent of keys and values."""
    qk_nope_head_dim: Positive
    """Part of a head's query and key without position."""
    qk_rope_head_dim: Positive
    """Part with rotary position; the key's is shared by all heads."""
    v_head_dim: Positive
    rope_interleave: bool = True
    """Rotate neighbours (DeepSeek's weights) instead of halves."""



class LayerRange(Section):
    """Every n-th layer from one on."""

    first: int = 0
    """The first of them; negative: counted from the end, so that -2 alone is the last two layers."""
    every: Positive = 1


def kind_of(value: Any) -> str:
    """Which branch of an option that takes a list or something else: errors then speak of the branch that was meant."""
    return "list" if isinstance(value, list) else "other"


LayerChoice = Annotated[Annotated[LayerRange, Tag("other")] | Annotated[list[int], Tag("list")], Discriminator(kind_of)] | None
"""Some of a model's layers: a range, their numbers from 0, or null for all."""


def chosen_layers(choice: LayerChoice, num_layers: int) -> list[int]:
    """The numbers of the chosen layers, in order."""
    if choice is None:
        return list(range(num_layers))
    if isinstance(choice, list):
        return sorted(choice)
    return list(range(num_layers))[choice.first :: choice.every]


def layer_problems(choice: LayerChoice, num_layers: int) -> list[str]:
    """What is wrong with a choice, each beginning with `.option` or `:`."""
    if isinstance(choice, LayerRange):
        if not -num_layers <= choice.first < num_layers:
            return [f".first ({choice.first}) is outside {-num_layers}..{num_layers - 1}"]
    elif choice is not None:
        if not choice or len(set(choice)) < len(choice):
            return [f": {choice} must name one layer or more, each once; for none leave the section out"]
        outside = [i for i in choice if not 0 <= i < num_layers]
        if outside:
            return [f": {outside} outside 0..{num_layers - 1}"]
    return []


class SharedConfig(Section):
    """A fixed FFN beside the experts, which every token passes: shared experts, residual MoE."""

    dim: Positive
    """Its intermediate size; n shared experts of a size F are one FFN of n F."""
    combine: Literal["sum", "gate", "coefficient"] = "sum"
    """How it joins the experts' sum: added (DeepSeek), added times a sigmoid gate of the token (Qwen2-MoE), or the two weighted by a softmax of
    the token (DeepSpeed's residual MoE)."""

    def num_params(self, hidden_size: int) -> tuple[int, int]:
        """(matrices, others)."""
        outputs = {"sum": 0, "gate": 1, "coefficient": 2}[self.combine]
        return hidden_size * (3 * self.dim + outputs), 2 if self.combine == "coefficient" else 0


class StrataConfig(Section):
    """Stratified MoE (arXiv 2305.02176): see moetrain.moe.strata."""

    sizes: Annotated[list[Positive], Field(min_length=2)]
    """Experts of each stratum, `num_experts` in all; top_k experts per pass."""
    norm: bool = False
    """RMSNorm before every stratum but the first."""

    @property
    def starts(self) -> list[int]:
        """The first expert of each stratum."""
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]


ExpertDim = Annotated[Annotated[Positive, Tag("other")] | Annotated[list[NonNegative], Tag("list")], Discriminator(kind_of)]


@holds_router
class MoEConfig(Section):
    TRAINING: ClassVar[frozenset[str]] = frozenset({"route_budget"})
    """Options that say how the model is trained and not what it computes: they may change when a run goes on."""

    num_experts: Annotated[int, Field(gt=0, le=65536)]
    """E, over all ranks."""
    expert_dim: ExpertDim
    """F: intermediate size of one expert; or a list with the size of each (big and small ones, 0: an expert that does nothing, so that its tokens
    skip)."""
    router: Router
    strata: StrataConfig | None = None
    """Experts in strata, of which a token passes one to all (Stratified MoE); null: all experts side by side."""
    shared: SharedConfig | None = None
    route_budget: PositiveFloat | None = None
    """Room for this many routes per token in the mean of a rank's micro-batch, in training: sizes no longer depend on what the router decides, and
    no layer waits for its device to learn them. Routes without room are dropped, those of the smallest weights first. null: as much room as there
    are routes; none is dropped."""
    layers: LayerChoice = None
    """Which layers are sparse: null all, a list of numbers, or `{first, every}` (`{first: 1, every: 2}`: every second one; `{first: 3}`: all but
    the first three; `{first: -2}`: the last two). The others have a dense FFN of `intermediate_size`."""

    @property
    def expert_dims(self) -> list[int]:
        """The size of each expert."""
        return self.expert_dim if isinstance(self.expert_dim, list) else [self.expert_dim] * self.num_experts

    @property
    def groups(self) -> dict[int, list[int]]:
        """Size -> the experts that have it, in the order in which the sizes appear; without those of size 0, which compute nothing."""
        found: dict[int, list[int]] = {}
        for e, size in enumerate(self.expert_dims):
            if size:
                found.setdefault(size, []).append(e)
        return found

    def router_params(self, hidden_size: int) -> tuple[int, int]:
        """(matrices, others) of a layer's routers, and of the norms between its strata."""
        if self.strata is None:
            return self.router.num_params(self.num_experts, hidden_size)
        each = [self.router.num_params(self.num_experts - start, hidden_size) for start in self.strata.starts]
        norms = hidden_size * (len(each) - 1) * self.strata.norm
        return sum(matrices for matrices, _ in each), sum(others for _, others in each) + norms

    @property
    def default_active(self) -> float:
        """Experts that a token uses as far as the options alone say: all, where it is learned; with strata every pass."""
        passes = 1 if self.strata is None else len(self.strata.sizes)
        return passes * self.router.default_active(self.num_experts)

    def mean_sized(self, load: list[float]) -> float:
        """Routes in experts of the mean size that cost what `load`, the routes of each expert, costs."""
        dims = self.expert_dims
        return sum(n * size for n, size in zip(load, dims, strict=True)) * len(dims) / sum(dims)


class FinedeepConfig(Section):
    """Finedeep (arXiv 2502.12928), a reconstruction: see moetrain.moe.finedeep."""

    sublayers: Positive
    """M, one after the other."""
    experts: Positive
    """K per sub-layer; M K divides intermediate_size."""


@holds_router
class ModelConfig(Section):
    """A decoder Transformer; the names follow Hugging Face's where the thing is the same."""

    vocab_size: Positive
    hidden_size: Positive
    """D."""
    num_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    num_heads: Positive
    num_kv_heads: Positive | None = None
    """Key/value heads (grouped-query attention); null: as many as `num_heads`."""
    head_dim: Positive | None = None
    """null: hidden_size / num_heads."""
    intermediate_size: Positive
    """Intermediate size of the dense FFN; not used where `moe` makes every layer sparse."""
    max_position_embeddings: Positive = 2048
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    mla: MLAConfig | None = None
    """Latent attention instead of heads of keys and values; excludes head_dim, num_kv_heads, qk_norm and sliding_window."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2); with `mla` on those into the latents."""
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
    finedeep: FinedeepConfig | None = None
    """The FFNs of dense layers are stacks of sub-layers of output-gated experts; null: plain FFNs."""
    moe: MoEConfig | None = None

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """C, of a head's query and key."""
        if self.mla is not None:
            return self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def value_size(self) -> int:
        """Of a head's value and output."""
        return self.head_size if self.mla is None else self.mla.v_head_dim

    @property
    def rope_size(self) -> int:
        """The part of a head that is rotated."""
        return self.head_size if self.mla is None else self.mla.qk_rope_head_dim

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the sparse layers, in order."""
        return [] if self.moe is None else chosen_layers(self.moe.layers, self.num_layers)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    def _params(self, experts_per_layer: float) -> tuple[float, float]:
        """(parameters of the matrices a token passes through, all other parameters), with so many experts counted in each MoE layer."""
        D, sparse = self.hidden_size, self.num_moe_layers
        dense = self.num_layers - sparse
        matrices, others = self._attention_params()
        others += 2 * D
        matrices, others = self.num_layers * matrices, self.num_layers * others
        matrices += dense * 3 * D * self.intermediate_size
        others += dense * self.mlp_bias * (2 * self.intermediate_size + D)
        if self.finedeep is not None:
            matrices += dense * self.finedeep.sublayers * self.finedeep.experts * D
            others += dense * (self.finedeep.sublayers - 1) * D
        if self.moe is not None:
            router, small = self.moe.router_params(D)
            shared, own = (0, 0) if self.moe.shared is None else self.moe.shared.num_params(D)
            matrices += sparse * (experts_per_layer * 3 * D * sum(self.moe.expert_dims) / self.moe.num_experts + router + shared)
            others += sparse * (small + own + self.moe.router.numbers_per_token_id() * self.vocab_size)
        # The embedding is looked up, not multiplied with; tied to the head it is the head's matrix.
        return matrices + self.vocab_size * D, others + D + (0 if self.tie_embeddings else self.vocab_size * D)

    def _attention_params(self) -> tuple[int, int]:
        """(matrices, others) of one layer."""
        D, q, kv = self.hidden_size, self.num_heads * self.head_size, self.kv_heads * self.head_size
        if self.mla is not None:
            m, values = self.mla, self.num_heads * self.mla.v_head_dim
            queries = D * q if m.q_lora_rank is None else m.q_lora_rank * (D + q)
            down = m.kv_lora_rank + m.qk_rope_head_dim
            matrices = queries + D * down + m.kv_lora_rank * (self.num_heads * m.qk_nope_head_dim + values) + values * D
            small = m.kv_lora_rank + (m.q_lora_rank or 0)
            return matrices, small + self.qkv_bias * (down + (m.q_lora_rank or 0)) + self.o_bias * D
        norms = 2 * self.head_size if self.qk_norm_over == "head" else q + kv
        return D * q + 2 * D * kv + q * D, self.qkv_bias * (q + 2 * kv) + self.o_bias * D + self.qk_norm * norms

    def num_params(self) -> int:
        """Parameters of the whole model, tied weights counted once."""
        return int(sum(self._params(self.moe.num_experts if self.moe else 1)))

    def num_active_params(self, mean_active: float | None = None) -> float:
        """Parameters a token uses when it takes `mean_active` experts, of the mean size, per MoE layer (all of a dense model)."""
        return sum(self._params(self._active(mean_active)))

    def flops_per_token(self, seq_len: int, mean_active: float | None = None) -> float:
        """FLOPs of one token's forward pass: two per matrix parameter used, and causal attention over `seq_len` positions
        (half of the score matrix). Training is three times as much."""
        matrices, _ = self._params(self._active(mean_active))
        return 2 * matrices + self.num_layers * seq_len * self.num_heads * (self.head_size + self.value_size)

    def _active(self, mean_active: float | None) -> float:
        if self.moe is None:
            return 1
        if mean_active is not None:
            return mean_active
        return self.moe.default_active

    def idle(self) -> set[str]:
        return set() if self.qk_norm else {"qk_norm_over"}
