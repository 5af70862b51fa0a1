"""The model: a decoder Transformer, dense or with a mixture of experts."""

from __future__ import annotations

from typing import Literal

from moetrain.config.base import Positive, PositiveFloat, Section
from moetrain.config.routers import Router, holds_router


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

@holds_router
class MoEConfig(Section):
    num_experts: Positive
    """E, over all ranks."""
    expert_dim: Positive
    """F: intermediate size of one expert."""
    router: Router

@holds_router
class ModelConfig(Section):
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

    @property
    def num_moe_layers(self) -> int:
        return 0 if self.moe is None else self.num_layers

    def _params(self, experts_per_layer: float) -> tuple[float, float]:
        """(parameters of the matrices a token passes through, all other parameters), with so many experts counted in each layer."""
        D, q, kv = self.hidden_size, self.num_heads * self.head_size, self.kv_heads * self.head_size
        attention = D * q + 2 * D * kv + q * D
        if self.moe is None:
            ffn, router, small = 3 * D * self.intermediate_size, 0, self.mlp_bias * (2 * self.intermediate_size + D)
        else:
            ffn = experts_per_layer * 3 * D * self.moe.expert_dim
            router, small = self.moe.router.num_params(self.moe.num_experts, D)
            small += self.moe.router.numbers_per_token_id() * self.vocab_size
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
        return self.moe.router.default_active(self.moe.num_experts)

    def idle(self) -> set[str]:
        return set() if self.qk_norm else {"qk_norm_over"}
