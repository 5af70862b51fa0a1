"""Inference of models trained with moetrain that no stock architecture of transformers computes; needs torch and transformers alone.

Routers are sigmoid_ste (independent gates, those above a threshold route: a token has any number of experts, none included) and topk (by
softmax or sigmoid scores of a linear, two-layer or cosine gate, with a bias that only chooses, and groups of experts), budget (probabilities
above a cut route), expert_choice (scores above an expert's cut route), base_layers (the best of independent gates), language_family (softmax
top-k, not normalised), nexus (the same, its rows projected from domains' embeddings), hash (by a table of token ids), task (all tokens of a task
alike; `task` is an argument of forward and generate, or a key of config.json), remoe (ReLU gates), xmoe (a share of the softmax), dynmoe (cosines
above learned thresholds) and moepp (top-k with zero, copy and constant experts).
Attention has grouped heads, biases, q/k norms, sliding windows and rotary positions with linear, llama3 or yarn scaling, or latents
(MLA). Beside the experts there may be a fixed FFN. The key `moetrain` of config.json holds every option.

Letters: B rows of a batch, S new positions, L positions in the cache and new ones, T = B*S tokens, D model dim, C head dim, E experts.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast


class MoetrainConfig(PretrainedConfig):
    """`moetrain`: the options of the model, a mapping. What transformers itself wants to know stands beside it."""

    model_type = "moetrain"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, moetrain: dict | None = None, **kwargs: Any) -> None:
        self.moetrain = dict(moetrain or {})
        # Not `sliding_window` nor `layer_types`: a cache that dropped what is outside the window would not fit the mask made here.
        ours = {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "num_key_value_heads": "num_kv_heads",
            "head_dim": "head_dim",
            "intermediate_size": "intermediate_size",
            "max_position_embeddings": "max_position_embeddings",
            "rms_norm_eps": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
            "initializer_range": "init_std",
        }
        for name, key in ours.items():
            if self.moetrain.get(key) is not None:
                kwargs[name] = self.moetrain[key]
        super().__init__(**kwargs)


def _rope_frequencies(config: dict) -> tuple[Tensor, float]:
    """(C/2,) float32 and the factor on cos and sin."""
    dim, base, scaling = _head_dim(config), config["rope_theta"], config.get("rope_scaling")
    if config.get("mla"):
        dim = config["mla"]["qk_rope_head_dim"]
    periods = base ** (torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim)
    frequencies = 1.0 / periods
    if scaling is None:
        return frequencies, 1.0
    factor = scaling["factor"]
    if scaling["type"] == "linear":
        return frequencies / factor, 1.0
    length = scaling["original_max_position_embeddings"]
    if scaling["type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        smooth = (length / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / factor + smooth * frequencies
        stretched = torch.where(wavelengths > length / low, frequencies / factor, between)
        return torch.where(wavelengths < length / high, frequencies, stretched), 1.0
    if scaling["type"] != "yarn":
        raise ValueError(f"rope_scaling.type is {scaling['type']!r}; supported: linear, llama3, yarn")

    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(dimension(scaling.get("beta_fast") or 32.0)), 0)
    last = min(math.ceil(dimension(scaling.get("beta_slow") or 1.0)), dim - 1)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / max(last - first, 1e-3), 0, 1)
    frequencies = 1.0 / (factor * periods) * ramp + frequencies * (1 - ramp)
    given = scaling.get("attention_factor")
    default = _magnitude(factor, 1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        default = _magnitude(factor, scaling["mscale"]) / _magnitude(factor, scaling["mscale_all_dim"])
    return frequencies, default if given is None else given


def _magnitude(factor: float, m: float) -> float:
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_heads"]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: dict, layer: int) -> None:
        super().__init__()
        D, C, H = config["hidden_size"], _head_dim(config), config["num_heads"]
        K = config.get("num_kv_heads") or H
        self.layer, self.head_dim = layer, C
        layers = config.get("sliding_layers")
        self.window = config.get("sliding_window") if layers is None or layer in layers else None
        self.q_proj = nn.Linear(D, H * C, bias=config["qkv_bias"])
        self.k_proj = nn.Linear(D, K * C, bias=config["qkv_bias"])
        self.v_proj = nn.Linear(D, K * C, bias=config["qkv_bias"])
        self.o_proj = nn.Linear(H * C, D, bias=config["o_bias"])
        self.norm_over_all = config["qk_norm"] and config.get("qk_norm_over") == "all"
        widths = (H * C, K * C) if self.norm_over_all else (C, C)
        self.q_norm, self.k_norm = (RMSNorm(width, config["norm_eps"]) if config["qk_norm"] else None for width in widths)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x: (B, S, D). start: positions already in the cache. attention_mask: (B, >= start + S), 0 on padding, or (B, 1, S, L) bool."""
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            if self.norm_over_all:
                q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = _rotate(q, cos, sin).transpose(1, 2), _rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            # transformers 4 wants to be told where a static cache goes on; 5 knows and ignores it.
            k, v = cache.update(k, v, self.layer, {"cache_position": torch.arange(start, start + S, device=x.device)})
        mask = _visible(S, k.shape[2], start, self.window, attention_mask, x.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))


class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent vector per token, which is what the cache holds, with the part that is rotated."""

    def __init__(self, config: dict, layer: int) -> None:
        super().__init__()
        D, H, m = config["hidden_size"], config["num_heads"], config["mla"]
        self.layer, self.rank, self.interleave = layer, m["kv_lora_rank"], m["rope_interleave"]
        self.nope, self.rope, self.value = m["qk_nope_head_dim"], m["qk_rope_head_dim"], m["v_head_dim"]
        width = self.nope + self.rope
        if m.get("q_lora_rank") is None:
            self.q_proj = nn.Linear(D, H * width, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, m["q_lora_rank"], bias=config["qkv_bias"])
            self.q_a_layernorm = RMSNorm(m["q_lora_rank"], 1e-6)
            self.q_b_proj = nn.Linear(m["q_lora_rank"], H * width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.rank + self.rope, bias=config["qkv_bias"])
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = nn.Linear(self.rank, H * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(H * self.value, D, bias=config["o_bias"])
        self.scale = width**-0.5
        scaling = config.get("rope_scaling") or {}
        if scaling.get("mscale_all_dim"):
            self.scale *= _magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """As Attention.forward."""
        B, S, _ = x.shape
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q, q_rope = q.view(B, S, -1, self.nope + self.rope).split([self.nope, self.rope], dim=-1)
        q = torch.cat((q, self._rotate(q_rope, cos, sin)), dim=-1).transpose(1, 2)
        latent, rope = self.kv_a_proj_with_mqa(x).view(B, S, 1, -1).split([self.rank, self.rope], dim=-1)
        latent, rope = self.kv_a_layernorm(latent).transpose(1, 2), self._rotate(rope, cos, sin).transpose(1, 2)
        if cache is not None:
            latent, rope = cache.update(latent, rope, self.layer, {"cache_position": torch.arange(start, start + S, device=x.device)})
        both = self.kv_b_proj(latent[:, 0]).view(B, latent.shape[2], -1, self.nope + self.value).transpose(1, 2)
        k, v = both.split([self.nope, self.value], dim=-1)
        k = torch.cat((k, rope.expand(-1, k.shape[1], -1, -1)), dim=-1)
        mask = _visible(S, k.shape[2], start, None, attention_mask, x.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rotate(torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if self.interleave else x, cos, sin)


def _visible(S: int, L: int, start: int, window: int | None, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, 1, S, L) bool: which keys a query sees. A static cache is longer than start + S; what lies behind is never seen."""
    queries = torch.arange(start, start + S, device=device)[:, None]
    keys = torch.arange(L, device=device)
    seen = queries >= keys
    if window is not None:
        seen = seen & (queries - keys < window)
    if attention_mask is None:
        return seen[None, None]
    real = attention_mask.to(device=device, dtype=torch.bool)
    if real.dim() == 2:
        real = F.pad(real[:, :L], (0, max(0, L - real.shape[1])))[:, None, None]
    # Padding sees itself: a query without any key would be NaN and spoil the layers above through its value.
    return (seen & real) | (queries == keys)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: the FFN of a dense layer, and one expert."""

    def __init__(self, dim: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, inner, bias=bias)
        self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.down_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Sublayer(nn.Module):
    """Of Finedeep: sum_k sigmoid(<y_k, w_k>) y_k over the outputs y_k of small SwiGLU experts."""

    def __init__(self, dim: int, experts: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, inner))
        self.output_gate = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D). Returns (B, S, D)."""
        gate, up = torch.einsum("bsd,kfd->bskf", x, self.gate_up).chunk(2, dim=-1)
        outputs = torch.einsum("bskf,kdf->bskd", F.silu(gate) * up, self.down)
        dtype = _wide(x)
        gates = torch.einsum("bskd,kd->bsk", outputs.to(dtype), self.output_gate.to(dtype)).sigmoid()
        return (gates[..., None] * outputs).sum(-2).to(x.dtype)


class Finedeep(nn.Module):
    """Sub-layers one after the other, with norm and residual; the first one's norm is the layer's own."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        M, K, D = config["finedeep"]["sublayers"], config["finedeep"]["experts"], config["hidden_size"]
        self.sublayers = nn.ModuleList(Sublayer(D, K, config["intermediate_size"] // (M * K)) for _ in range(M))
        self.norms = nn.ModuleList(RMSNorm(D, config["norm_eps"]) for _ in range(M - 1))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: (B, S, D), normed. residual: the stream before the norm. Returns (B, S, D)."""
        y = self.sublayers[0](x)
        for sublayer, norm in zip(self.sublayers[1:], self.norms):
            y = y + sublayer(norm(residual + y))
        return y


class Shared(FeedForward):
    """A fixed FFN beside the experts, added to their sum y, or weighted token by token."""

    def __init__(self, dim: int, options: dict) -> None:
        super().__init__(dim, options["dim"])
        self.combine = options["combine"]
        outputs = {"sum": 0, "gate": 1, "coefficient": 2}[self.combine]
        self.mix = nn.Linear(dim, outputs, bias=self.combine == "coefficient") if outputs else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (T, D). Returns (T, D)."""
        shared = super().forward(x)
        if self.mix is None:
            return y + shared
        dtype = _wide(x)
        bias = None if self.mix.bias is None else self.mix.bias.to(dtype)
        logits = F.linear(x.to(dtype), self.mix.weight.to(dtype), bias)
        if self.combine == "gate":
            return y + (logits.sigmoid() * shared).to(x.dtype)
        share = logits.softmax(-1)
        return (share[:, :1] * y + share[:, 1:] * shared).to(x.dtype)


class Gate(nn.Module):
    """Logits of a token's experts. output: the second matrix of a two-layer gate. selection_bias: added to what chooses, not to what weighs.
    threshold: log-odds of xmoe's and sigmoid_ste's, where it was moved, or of each expert (dynmoe). mask: 0 at slots without an expert.
    residual: from the logits of the layer before. mix, constant: of moepp's constant experts."""

    def __init__(self, dim: int, num_experts: int, options: dict) -> None:
        super().__init__()
        kind = options["type"]
        constants = options["num_constant"] if kind == "moepp" else 0
        if kind == "moepp":
            num_experts += options["num_zero"] + options["num_copy"] + constants
        moved = options.get("target_active") is not None and (kind == "xmoe" or options.get("trim", False))
        thresholds = num_experts if kind == "dynmoe" else int(moved)
        self.threshold = nn.Parameter(torch.empty(thresholds)) if thresholds else None
        self.mask = nn.Parameter(torch.empty(num_experts)) if kind == "dynmoe" and options.get("adapt_every") is not None else None
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts)) if kind == "moepp" and options["gating_residual"] else None
        self.mix = nn.Parameter(torch.empty(constants, 2, dim)) if constants else None
        self.constant = nn.Parameter(torch.empty(constants, dim)) if constants else None
        self.kind, self.temperature = options.get("gate", "linear"), options.get("cosine_temperature", 1.0)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if options.get("bias") else None
        self.output = nn.Parameter(torch.empty(num_experts, num_experts)) if self.kind == "mlp" else None
        self.selection_bias = nn.Parameter(torch.empty(num_experts)) if options.get("selection_bias") else None
        self.cut = nn.Parameter(torch.empty(2)) if options["type"] == "budget" else None
        self.domains = self.table = None
        if options["type"] == "task":
            tasks = options.get("tasks") or []
            self.weight = nn.Parameter(torch.empty(len(tasks), num_experts)) if tasks else None
        if options["type"] == "hash":
            self.table = nn.Parameter(torch.empty(options["vocab_size"], options["num_hashes"]))
            self.weight = None
        if options["type"] == "nexus":
            inner = options.get("projection_dim") or dim
            self.domains = nn.Parameter(torch.empty(num_experts, options["domain_dim"]))
            self.weight = nn.Parameter(torch.empty(2 * inner, options["domain_dim"]))
            self.output = nn.Parameter(torch.empty(dim, inner))
        if options["type"] == "expert_choice":
            # The cut of the scores, by expert; how many steps it was estimated in counts only for training on.
            self.cut, self.updates = nn.Parameter(torch.empty(num_experts)), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, D). Returns (T, E), float32 or float64."""
        dtype = _wide(x)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if self.domains is not None:
            gate, up = F.linear(self.domains.to(dtype), weight).chunk(2, -1)
            return F.linear(x, F.linear(F.silu(gate) * up, self.output.to(dtype)))
        if self.kind == "cosine":
            return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)) / self.temperature
        hidden = F.linear(x, weight, None if self.bias is None else self.bias.to(dtype))
        return hidden if self.output is None else F.linear(torch.tanh(hidden), self.output.to(dtype))


_Routes = tuple[Tensor, Tensor, Tensor | None]


class MoE(nn.Module):
    """Each expert computes the tokens that have a route to it and no others."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        D, moe = config["hidden_size"], config["moe"]
        E = moe["num_experts"]
        self.options = options = {"vocab_size": config["vocab_size"], "num_experts": E, **moe["router"]}
        if self.options["type"] not in _ROUTES:
            raise ValueError(f"moe.router.type is {self.options['type']!r}; supported: {', '.join(_ROUTES)}")
        self.strata = moe["strata"]["sizes"] if moe.get("strata") else None
        if self.strata is None:
            self.gate = Gate(D, E, options)
        else:
            starts = [sum(self.strata[:i]) for i in range(len(self.strata))]
            self.gate = nn.ModuleList(Gate(D, E - start, options) for start in starts)
            self.norms = nn.ModuleList(RMSNorm(D, config["norm_eps"]) for _ in starts[1:] if moe["strata"]["norm"])
        sizes = moe["expert_dim"] if isinstance(moe["expert_dim"], list) else [moe["expert_dim"]] * moe["num_experts"]
        self.experts = nn.ModuleList(FeedForward(D, size) if size else nn.Identity() for size in sizes)
        self.idle = [e for e, size in enumerate(sizes) if not size]
        self.shared = Shared(D, moe["shared"]) if moe.get("shared") else None

    def forward(self, x: Tensor, residual: Tensor, known: dict) -> Tensor:
        """x: (B, S, D), normed. residual: the stream before the norm. known: of the tokens, see `_ROUTES`. Returns (B, S, D)."""
        shape, x = x.shape, x.flatten(0, 1)
        if self.strata is None:
            weights, active, extra = self.route(self.gate, residual.flatten(0, 1) if self.options.get("input") == "residual" else x, known)
            y = self.compute(x, weights, active)
            y = y if extra is None else (y + extra).to(y.dtype)
        else:
            y = self.pass_strata(x, known)
        return (y if self.shared is None else self.shared(x, y)).view(shape)

    def pass_strata(self, x: Tensor, known: dict) -> Tensor:
        """Stratified MoE: the best expert's stratum says where a token goes on, and a pass sees what came before it."""
        y, state = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        stratum = torch.tensor([i for i, size in enumerate(self.strata) for _ in range(size)], device=x.device)
        for i, gate in enumerate(self.gate):
            here = state == i
            seen = x + y if i else x
            seen = self.norms[i - 1](seen) if i and len(self.norms) else seen
            weights, active, _ = self.route(gate, seen, known)
            first = len(stratum) - weights.shape[1]
            weights, active = F.pad(weights * here[:, None], (first, 0)), F.pad(active & here[:, None], (first, 0))
            y = y + self.compute(seen, weights, active)
            state = torch.where(here, stratum[weights.argmax(-1)] + 1, state)
        return y

    def compute(self, x: Tensor, weights: Tensor, active: Tensor) -> Tensor:
        """x: (T, D); weights, active: (T, E). Returns (T, D)."""
        # The outputs of a token's experts are added in float32, as in training.
        y = torch.zeros(x.shape, dtype=_wide(x), device=x.device)
        for e in active.any(0).nonzero().flatten().tolist():
            if e in self.idle:
                continue  # an expert without neurons: its tokens skip
            tokens = active[:, e].nonzero().flatten()
            y.index_add_(0, tokens, self.experts[e](x[tokens]).to(y.dtype) * weights[tokens, e, None].to(y.dtype))
        return y.to(x.dtype)

    def route(self, gate: Gate, x: Tensor, known: dict) -> _Routes:
        return _ROUTES[self.options["type"]](gate, self.options, x.to(_wide(x)), known)


# Each router: (gate, options, x (T, D) float32 or float64, known) -> weights (T, E), 0 where there is no route; the routes (T, E) bool; and what
# the router itself adds to the output, (T, D), or None. known: `tokens`, (T,) ids or None; `tags`, (T,) numbers of tasks or None; `rows`, of the
# batch; `previous`, logits of the MoE layer before, where a router keeps them.


def _topk(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    sigmoid, logits = options.get("score") == "sigmoid", gate(x)
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ranking = scores if sigmoid else logits
    if gate.selection_bias is not None:
        ranking = ranking + gate.selection_bias.to(x.dtype)
    if options.get("num_groups", 1) > 1:
        ranking = _within_groups(ranking, options["num_groups"], options["top_groups"], options["top_k"])
    chosen = ranking.sort(dim=-1, descending=True, stable=True).indices[:, : options["top_k"]]
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    weights = _normalized(scores * active) if options.get("normalize", False) else scores * active
    return weights * options.get("output_scale", 1.0), active, None


def _normalized(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _sigmoid_ste(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    gates = gate(x).sigmoid()
    active = gates > (options["threshold"] if gate.threshold is None else gate.threshold.to(x.dtype).sigmoid())
    if options["zero_routes"] == "top1":
        largest = F.one_hot(gates.argmax(-1), gates.shape[-1]).bool()
        active = active | (largest & ~active.any(-1, keepdim=True))
    weights = torch.where(active, gates, 0)
    if options["rescale"] == "count" and options.get("rescale_in_eval", True):
        weights = weights * (gates.shape[-1] / active.sum(-1, keepdim=True).clamp(min=1).to(x.dtype))
    return weights, active, None


def _budget(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    logits = gate(x)
    weights = logits.softmax(-1)
    ranking = (weights if options["rank_by"] == "probability" else logits).float()
    total, weight = gate.cut.double().unbind()
    if weight > 0:
        active = ranking > (total / weight).float()
    else:  # never trained: the best of each row, as many as the budget says
        flat = ranking.view(known["rows"], -1)
        budget = int(flat.shape[1] * min(1.0, options["target_active"] / logits.shape[-1]) + 0.5)
        best = flat.sort(dim=-1, descending=True, stable=True).indices[:, :budget]
        active = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, best, True).view_as(logits)
    weights = _normalized(weights * active) if options["normalize"] else weights * active
    return weights * options["output_scale"], active, None


def _expert_choice(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    # What an expert chose among all tokens of a sequence it here takes by the estimated cut: later tokens are not known.
    scores = gate(x).sigmoid() if options["score"] == "sigmoid" else gate(x).softmax(-1)
    active = scores > gate.cut.to(x.dtype)
    return scores * active, active, None


def _base_layers(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    logits = gate(x)
    active = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
    return logits.sigmoid() * active, active, None


def _hash(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    if known["tokens"] is None:
        raise ValueError("moe.router.type is 'hash': experts follow from token ids; give input_ids, not inputs_embeds")
    chosen = gate.table[known["tokens"]].long()
    active = torch.zeros(x.shape[0], options["num_experts"], dtype=torch.bool, device=x.device).scatter(-1, chosen, True)
    return active.to(x.dtype) / options["num_hashes"], active, None


def _task(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    names = _task_names(options)
    if gate.weight is None:
        table = torch.zeros(len(names), options["num_experts"], dtype=x.dtype, device=x.device)
        for row, name in enumerate(names):
            table[row, options["branches"][name]] = 1 / len(options["branches"][name])
    else:
        logits = gate.weight.to(x.dtype)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : options["top_k"]]
        table = logits.softmax(-1) * torch.zeros_like(logits).scatter(-1, chosen, 1)
        table = table / table.sum(-1, keepdim=True) if options["normalize"] else table
    weights = table[known["tags"]]
    return weights, weights > 0, None


def _remoe(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    gates = gate(x).relu()
    return gates, gates > 0, None


def _xmoe(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    logits = gate(x)
    scores = logits.softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    before = F.pad(scores.gather(-1, order).cumsum(-1)[:, :-1], (1, 0))[:, : options.get("max_experts")]
    threshold = scores.new_tensor([options["threshold"]]) if gate.threshold is None else gate.threshold.to(x.dtype).sigmoid()
    taken = (before < threshold) | (before == 0) | (threshold >= 1)
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[:, : before.shape[1]], taken)
    weights = scores * active
    return (weights / weights.sum(-1, keepdim=True) if options["normalize"] else weights), active, None


def _dynmoe(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    scores = F.linear(F.normalize(x, dim=-1), F.normalize(gate.weight.to(x.dtype), dim=-1)).sigmoid()
    mask = torch.ones_like(scores[0]) if gate.mask is None else gate.mask.to(x.dtype)
    active = (scores > gate.threshold.to(x.dtype).sigmoid()) & (mask > 0)
    largest = F.one_hot((scores * mask).argmax(-1), scores.shape[-1]).bool()
    active = active | (largest & ~active.any(-1, keepdim=True))
    return active / active.sum(-1, keepdim=True).to(x.dtype), active, None


def _moepp(gate: Gate, options: dict, x: Tensor, known: dict) -> _Routes:
    logits = gate(x)
    if gate.residual is not None and known.get("previous") is not None:
        logits = logits + F.linear(known["previous"], gate.residual.to(x.dtype))
    known["previous"] = logits
    scores = logits.softmax(-1)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : options["top_k"]]
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    weights = scores * active
    zero, copy, constant = options["num_zero"], options["num_copy"], options["num_constant"]
    E = logits.shape[-1] - zero - copy - constant
    if options["normalize"]:
        total = weights.sum(-1, keepdim=True) - weights[:, E : E + zero].sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    light = weights[:, E + zero :]
    extra = light[:, :copy].sum(-1, keepdim=True) * x
    if gate.mix is not None:
        parts = F.linear(x, gate.mix.to(x.dtype).flatten(0, 1)).unflatten(-1, (-1, 2)).softmax(-1) * light[:, copy:, None]
        extra = extra + parts[..., 0].sum(-1, keepdim=True) * x + parts[..., 1] @ gate.constant.to(x.dtype)
    return weights[:, :E], active[:, :E], extra


_ROUTES = {
    "sigmoid_ste": _sigmoid_ste,
    "budget": _budget,
    "topk": _topk,
    "remoe": _remoe,
    "xmoe": _xmoe,
    "dynmoe": _dynmoe,
    "moepp": _moepp,
    "expert_choice": _expert_choice,
    "base_layers": _base_layers,
    "language_family": _topk,
    "nexus": _topk,
    "hash": _hash,
    "task": _task,
}


def _task_names(options: dict) -> list[str]:
    return list(options.get("tasks") or sorted(options.get("branches") or {}))


def _task_numbers(options: dict, task: Any, rows: int) -> list[int]:
    """Number of the task of each row. task: a name, or one for each row."""
    names = _task_names(options)
    given = [task] * rows if task is None or isinstance(task, str) else list(task)
    if len(given) != rows or any(name not in names for name in given):
        raise ValueError(f"task is {task!r}; give forward or generate one of {', '.join(names)}, or a list of one for each row, or set config.task")
    return [names.index(name) for name in given]


def _within_groups(scores: Tensor, num_groups: int, top_groups: int, top_k: int) -> Tensor:
    """(T, E), -inf for experts outside the groups whose top_k / top_groups best scores add up to most."""
    groups = scores.view(scores.shape[0], num_groups, -1)
    best = groups.topk(min(groups.shape[2], max(1, top_k // top_groups))).values.sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    seen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
    return torch.where(seen[:, :, None], groups, -math.inf).view_as(scores)


def _moe_layers(config: dict) -> list[int]:
    """Layers with experts: all, a list of them, or every n-th from one on."""
    layers = list(range(config["num_layers"]))
    if config.get("moe") is None:
        return []
    choice = config["moe"].get("layers")
    if isinstance(choice, dict):
        return layers[choice["first"] :: choice["every"]]
    return layers if choice is None else choice


class Layer(nn.Module):
    def __init__(self, config: dict, layer: int) -> None:
        super().__init__()
        D, eps = config["hidden_size"], config["norm_eps"]
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = LatentAttention(config, layer) if config.get("mla") else Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        if layer in _moe_layers(config):
            self.mlp = MoE(config)
        else:
            self.mlp = Finedeep(config) if config.get("finedeep") else FeedForward(D, config["intermediate_size"], config["mlp_bias"])

    def forward(self, x: Tensor, known: dict, *attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(normed, x, known)
        return x + (self.mlp(normed, x) if isinstance(self.mlp, Finedeep) else self.mlp(normed))


class Decoder(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["norm_eps"])


class MoetrainForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MoetrainConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]
    _keep_in_fp32_modules_strict = ["selection_bias", "threshold", "cut", "updates", "domains", "table"]
    _supports_sdpa = True
    # transformers 5 wants to know what is tied to what, 4 the names alone.
    _tied_weights_keys = (
        {"lm_head.weight": "model.embed_tokens.weight"} if int(transformers.__version__.split(".")[0]) >= 5 else ["lm_head.weight"]
    )

    def __init__(self, config: MoetrainConfig) -> None:
        super().__init__(config)
        if not config.moetrain:
            raise ValueError("config.json has no key `moetrain` with the model's options")
        self.model = Decoder(config.moetrain)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # For parameters that a checkpoint lacks.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Sublayer):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, Gate):
            for name, parameter in module.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.normal_(parameter, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        task: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal language model of transformers. attention_mask: (B, L), 0 on padding on either side.

        logits: (B, S, V) in the model's dtype; only the last `logits_to_keep` positions when that is positive. labels: (B, S), not shifted,
        -100 where there is none. task: of a model whose experts go by task, a name for all rows or a list of one for each; None: `config.task`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and (
            attention_mask.dim() not in (2, 4) or (attention_mask.dim() == 4 and attention_mask.dtype != torch.bool)
        ):
            raise ValueError(
                f"attention_mask must be (B, L), or (B, 1, S, L) bool; found {tuple(attention_mask.shape)} {attention_mask.dtype}"
            )
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        S = x.shape[1]
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache()
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start : start + S].to(x.device)
            else:
                position_ids = torch.arange(start, start + S, device=x.device)[None]
        cos, sin = self._rope(position_ids[:, -S:], x)
        router = (self.config.moetrain.get("moe") or {}).get("router") or {}
        tags = None
        if router.get("type") == "task":
            numbers = _task_numbers(router, getattr(self.config, "task", None) if task is None else task, x.shape[0])
            tags = torch.tensor(numbers, device=x.device).repeat_interleave(S)
        known = {"tokens": None if input_ids is None else input_ids.flatten(), "tags": tags, "rows": x.shape[0]}
        for layer in self.model.layers:
            x = layer(x, known, cos, sin, start, attention_mask, past_key_values)
        x = self.model.norm(x)
        if isinstance(logits_to_keep, int):
            x = x[:, -logits_to_keep:] if logits_to_keep > 0 else x
        else:
            x = x[:, logits_to_keep]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].to(logits.device)
            count = kwargs.get("num_items_in_batch")
            total = F.cross_entropy(
                logits.to(_wide(logits)).flatten(0, 1), shifted.flatten(), reduction="sum" if count is not None else "mean"
            )
            loss = total if count is None else total / count
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)
        return output if return_dict is not False else output.to_tuple()

    def _rope(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, S, 1, C), float32 or float64.

        The frequencies follow from the config and are no buffer: loading would have to fill it.
        """
        dtype = _wide(x)
        frequencies, scale = _rope_frequencies(self.config.moetrain)
        angles = positions.to(dtype)[..., None] * frequencies.to(x.device, dtype)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return angles.cos() * scale, angles.sin() * scale
