"""Nexus (arXiv 2408.15901): rows of the router are projections of domain embeddings, so that an expert for a new domain brings its own row."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moetrain.config import ConfigError, ModelConfig, NexusRouter
from moetrain.moe.routers.base import router_for
from moetrain.moe.routers.softmax import as_mask, decision_of, largest, with_balance
from moetrain.moe.routing import Decision, Routing, TokenContext, recorded
from moetrain.moe.wide import wide_linear


@router_for(NexusRouter)
class Nexus(nn.Module):
    """e_i = W2 swiglu(W1 d_i), d_i the fixed embedding of domain i; s = softmax(x e_i); the k largest (the paper: one) route with weight s.

    The paper's shapes of W1 and W2 don't fit each other; here W1 is (2h, m), its first half the gate, and W2 (D, h).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, NexusRouter), "needs a nexus config"
        self.options = options = config.moe.router
        inner = options.projection_dim or config.hidden_size
        self.domains = nn.Parameter(torch.empty(config.moe.num_experts, options.domain_dim), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(2 * inner, options.domain_dim))
        self.output = nn.Parameter(torch.empty(config.hidden_size, inner))

    @staticmethod
    def start_value(config: ModelConfig, layer: int, part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The domains' embeddings from their file. ConfigError if there is none, or not of this shape."""
        assert config.moe is not None and isinstance(config.moe.router, NexusRouter), "needs a nexus config"
        options = config.moe.router
        path = options.embeddings
        if part != "domains":
            return None
        if path is None:
            raise ConfigError("model.moe.router.embeddings: missing; start weights that are drawn need the domains' embeddings")
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                found = file.get_tensor(names[0]).float() if len(names) == 1 else None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.moe.router.embeddings ({path}): can't be read as safetensors: {error}") from None
        if found is None or tuple(found.shape) != shape:
            what = f"{len(names)} tensors" if found is None else f"a tensor of shape {list(found.shape)}"
            raise ConfigError(f"model.moe.router.embeddings ({path}): has {what}; num_experts and domain_dim make it one of {list(shape)}")
        return found

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). Losses: `balance`, E sum_e f_e P_e."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        gate, up = nn.functional.linear(self.domains.to(dtype), self.weight.to(dtype)).chunk(2, -1)
        rows = nn.functional.linear(nn.functional.silu(gate) * up, self.output.to(dtype))
        logits = wide_linear(x, rows)
        scores = torch.softmax(logits, -1)
        decision: Decision = recorded(lambda: self.decide(logits.detach(), context))
        return with_balance(scores, scores, decision, context)

    def decide(self, logits: Tensor, context: TokenContext) -> Decision:
        return decision_of(as_mask(largest(logits, self.options.top_k), logits.shape[1]), context)
