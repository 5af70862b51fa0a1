"""Inference of models trained with moetrain that no stock architecture of transformers computes; needs torch and transformers alone.

Routers are sigmoid_ste (independent gates, those above a threshold route: a token has any number of experts, none included), topk (by
softmax or sigmoid scores of a linear, two-layer or cosine gate, with a bias that only chooses, and groups of experts), remoe (ReLU gates), xmoe
(a share of the softmax), dynmoe (cosines above learned thresholds) and moepp (top-k with zero, copy and constant experts).
Attention has grouped heads, biases, q/k norms, sliding windows and rotary positions with linear, llama3 or yarn scaling. The key `moetrain`
of config.json holds every option.

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
    return frequencies, (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0) if given is None else given


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


class Gate(nn.Module):
    """Logits of a token's experts. output: the second matrix of a two-layer gate. selection_bias: added to what chooses, not to what weighs.
    threshold: xmoe's log-odds, or of each expert (dynmoe). mask: 0 at slots without an expert. residual: from the logits of the layer before.
    mix, constant: of moepp's constant experts."""

    def __init__(self, dim: int, num_experts: int, options: dict) -> None:
        super().__init__()
        kind = options["type"]
        constants = options["num_constant"] if kind == "moepp" else 0
        if kind == "moepp":
            num_experts += options["num_zero"] + options["num_copy"] + constants
        thresholds = num_experts if kind == "dynmoe" else int(kind == "xmoe" and options.get("target_active") is not None)
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

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, D). Returns (T, E), float32 or float64."""
        dtype = _wide(x)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if self.kind == "cosine":
            return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)) / self.temperature
        hidden = F.linear(x, weight, None if self.bias is None else self.bias.to(dtype))
        return hidden if self.output is None else F.linear(torch.tanh(hidden), self.output.to(dtype))


class MoE(nn.Module):
    """Each expert computes the tokens that have a route to it and no others."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        D, moe = config["hidden_size"], config["moe"]
        self.options = moe["router"]
        if self.options["type"] not in _ROUTES:
            raise ValueError(f"moe.router.type is {self.options['type']!r}; supported: {', '.join(_ROUTES)}")
        self.gate = Gate(D, moe["num_experts"], self.options)
        self.experts = nn.ModuleList(FeedForward(D, moe["expert_dim"]) for _ in range(moe["num_experts"]))

    def forward(self, x: Tensor, residual: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x: (B, S, D), normed. residual: the stream before the norm. previous: what the MoE layer before gave as second, None in the first.
        Returns (B, S, D) and the logits that the next MoE layer's router wants."""
        shape, x = x.shape, x.flatten(0, 1)
        seen = residual.flatten(0, 1) if self.options.get("input") == "residual" else x
        weights, active, logits, extra = _ROUTES[self.options["type"]](self.gate, self.options, seen.to(_wide(x)), previous)
        # The outputs of a token's experts are added in float32, as in training.
        y = torch.zeros(x.shape, dtype=_wide(x), device=x.device)
        for e in active.any(0).nonzero().flatten().tolist():
            tokens = active[:, e].nonzero().flatten()
            y.index_add_(0, tokens, self.experts[e](x[tokens]).to(y.dtype) * weights[tokens, e, None].to(y.dtype))
        y = y.to(x.dtype)
        return (y if extra is None else (y + extra).to(x.dtype)).view(shape), logits


# Each router: (gate, options, x (T, D) float32 or float64, logits of the layer before or None) -> weights (T, E), 0 where there is no route, the
# routes (T, E) bool, logits for the next layer or None, and what the router itself adds to the output, (T, D), or None.


def _topk(gate: Gate, options: dict, x: Tensor, previous: Tensor | None) -> tuple:
    sigmoid, logits = options.get("score") == "sigmoid", gate(x)
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ranking = scores if sigmoid else logits
    if gate.selection_bias is not None:
        ranking = ranking + gate.selection_bias.to(x.dtype)
    if options.get("num_groups", 1) > 1:
        ranking = _within_groups(ranking, options["num_groups"], options["top_groups"], options["top_k"])
    chosen = ranking.sort(dim=-1, descending=True, stable=True).indices[:, : options["top_k"]]
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    weights = scores * active
    if options["normalize"]:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return weights * options["output_scale"], active, None, None


def _sigmoid_ste(gate: Gate, options: dict, x: Tensor, previous: Tensor | None) -> tuple:
    gates = gate(x).sigmoid()
    active = gates > options["threshold"]
    if options["zero_routes"] == "top1":
        largest = F.one_hot(gates.argmax(-1), gates.shape[-1]).bool()
        active = active | (largest & ~active.any(-1, keepdim=True))
    weights = torch.where(active, gates, 0)
    if options["rescale"] == "count" and options.get("rescale_in_eval", True):
        weights = weights * (gates.shape[-1] / active.sum(-1, keepdim=True).clamp(min=1).to(x.dtype))
    return weights, active, None, None


def _remoe(gate: Gate, options: dict, x: Tensor, previous: Tensor | None) -> tuple:
    gates = gate(x).relu()
    return gates, gates > 0, None, None


def _xmoe(gate: Gate, options: dict, x: Tensor, previous: Tensor | None) -> tuple:
    logits = gate(x)
    scores = logits.softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    before = F.pad(scores.gather(-1, order).cumsum(-1)[:, :-1], (1, 0))[:, : options.get("max_experts")]
    threshold = scores.new_tensor([options["threshold"]]) if gate.threshold is None else gate.threshold.to(x.dtype).sigmoid()
    taken = (before < threshold) | (before == 0) | (threshold >= 1)
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[:, : before.shape[1]], taken)
    weights = scores * active
    return (weights / weights.sum(-1, keepdim=True) if options["normalize"] else weights), active, None, None


def _dynmoe(gate: Gate, options: dict, x: Tensor, previous: Tensor | None) -> tuple:
    scores = F.linear(F.normalize(x, dim=-1), F.normalize(gate.weight.to(x.dtype), dim=-1)).sigmoid()
    mask = torch.ones_like(scores[0]) if gate.mask is None else gate.mask.to(x.dtype)
    active = (scores > gate.threshold.to(x.dtype).sigmoid()) & (mask > 0)
    largest = F.one_hot((scores * mask).argmax(-1), scores.shape[-1]).bool()
    active = active | (largest & ~active.any(-1, keepdim=True))
    return active / active.sum(-1, keepdim=True).to(x.dtype), active, None, None


def _moepp(gate: Gate, options: dict, x: Tensor, previous: Tensor | None) -> tuple:
    logits = gate(x)
    if gate.residual is not None and previous is not None:
        logits = logits + F.linear(previous, gate.residual.to(x.dtype))
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
    return weights[:, :E], active[:, :E], logits, extra


_ROUTES = {"topk": _topk, "sigmoid_ste": _sigmoid_ste, "remoe": _remoe, "xmoe": _xmoe, "dynmoe": _dynmoe, "moepp": _moepp}


def _within_groups(scores: Tensor, num_groups: int, top_groups: int, top_k: int) -> Tensor:
    """(T, E), -inf for experts outside the groups whose top_k / top_groups best scores add up to most."""
    groups = scores.view(scores.shape[0], num_groups, -1)
    best = groups.topk(min(groups.shape[2], max(1, top_k // top_groups))).values.sum(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_groups]
    seen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
    return torch.where(seen[:, :, None], groups, -math.inf).view_as(scores)


class Layer(nn.Module):
    def __init__(self, config: dict, layer: int) -> None:
        super().__init__()
        D, eps = config["hidden_size"], config["norm_eps"]
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, eps)
        dense = config.get("moe") is None
        self.mlp = FeedForward(D, config["intermediate_size"], config["mlp_bias"]) if dense else MoE(config)

    def forward(self, x: Tensor, previous: Tensor | None, *attention: Any) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        normed = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(normed), previous
        y, logits = self.mlp(normed, x, previous)
        return x + y, logits


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
    _keep_in_fp32_modules_strict = ["selection_bias", "threshold"]
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
        elif isinstance(module, Gate):
            for name, parameter in module.named_parameters():
                zero = "bias" in name or name in ("threshold", "mask")
                nn.init.zeros_(parameter) if zero else nn.init.normal_(parameter, std=self.config.initializer_range)

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As any causal language model of transformers. attention_mask: (B, L), 0 on padding on either side.

        logits: (B, S, V) in the model's dtype; only the last `logits_to_keep` positions when that is positive. labels: (B, S), not shifted,
        -100 where there is none.
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
        previous = None
        for layer in self.model.layers:
            x, previous = layer(x, previous, cos, sin, start, attention_mask, past_key_values)
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
