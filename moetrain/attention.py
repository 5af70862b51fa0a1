"""Causal attention with grouped key/value heads, rotary positions, sliding windows and packed documents, and the back ends that compute it.

Letters: B rows of a batch, S positions of a row, H query heads, K key/value heads, C head dim.

Three back ends compute the same function. `flash`: the flash-attn package, CUDA, half precision. `flex`: torch's FlexAttention, CUDA, for
batches that need a mask. `sdpa`: torch's scaled_dot_product_attention, everywhere; packed documents apart, neighbours of one length in one
call, so that work grows with the documents and not with the row.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.config import ModelConfig
from moetrain.modules import Linear, RMSNorm

Backend = Literal["flash", "flex", "sdpa"]


# ------------------------------------------------------------------------------------------------------------------ positions


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Rotary frequencies (C/2,), float32 on the CPU, and the factor on cos and sin; C is the part of a head that is rotated.

    RoFormer (arXiv 2104.09864); `llama3` as in LLaMA 3.1's release; `yarn` is NTK-by-parts, YaRN (arXiv 2309.00071) Eqs. 17-23. Float32
    throughout, since released checkpoints were trained with frequencies rounded to it.
    """
    dim, base, scaling = config.rope_size, config.rope_theta, config.rope_scaling
    periods = base ** (torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim)
    frequencies = 1.0 / periods
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, 1.0
    length = scaling.original_max_position_embeddings
    assert length is not None, "check_model refuses this"
    if scaling.type == "llama3":
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None, "check_model refuses this"
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        wavelengths = 2 * math.pi / frequencies
        smooth = (length / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        stretched = torch.where(wavelengths > length / low, frequencies / scaling.factor, between)
        return torch.where(wavelengths < length / high, frequencies, stretched), 1.0

    # yarn: a dimension that turns beta_fast times or more within the original length keeps its frequency, one that turns beta_slow times
    # or fewer is slowed by the whole factor, with a linear ramp over the dimensions between.
    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(dimension(scaling.beta_fast or 32.0)), 0)
    last = min(math.ceil(dimension(scaling.beta_slow or 1.0)), dim - 1)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - first) / max(last - first, 1e-3), 0, 1)
    keep = 1 - ramp
    frequencies = 1.0 / (scaling.factor * periods) * (1 - keep) + frequencies * keep
    default = scaling.magnitude(1.0)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        default = scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)
    return frequencies, default if scaling.attention_factor is None else scaling.attention_factor


def rope_tables(frequencies: Tensor, scale: float, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, S, 1, C) of positions (B, S), float32, or float64 when `dtype` is."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = (positions.to(wide)[..., None] * frequencies.to(wide))[:, :, None]
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, S, heads, C) by the tables; computed in their dtype, returned in x's. Pairs are (i, i + C/2), as in Hugging Face's
    weights."""
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate`, to the bit, written for torch.compile: it stores what is concatenated, here the result, there a tensor in between. One operator
    after the other `rotate` is the faster."""
    (first, second), cos, sin = x.to(cos.dtype).chunk(2, dim=-1), cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[0]
    return torch.cat(((first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)), dim=-1)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of q (B, S, heads, C) and of k, which may have fewer heads."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate_both_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate_both` for torch.compile: one call, since its own cost is that of rotating a small tensor."""
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)


# -------------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """What attention must know of a batch beside q, k and v; made once per forward pass and shared by the layers.

    A plain dataclass on purpose: FSDP casts the tensors it finds among a block's inputs, and cos and sin must stay float32.
    """

    cos: Tensor
    """(B, S, 1, C)"""
    sin: Tensor
    backend: Backend
    runs: tuple[tuple[int, int], ...] | None = None
    """`sdpa`: (how many, of which length) documents follow each other in the flattened (B*S) tokens; None when each row is one document."""
    bounds: Tensor | None = None
    """`flash`: (documents + 1,) int32, where each document starts in the flattened tokens."""
    longest: int = 0
    """`flash`: length of the longest document."""
    block_masks: dict[int | None, object] | None = None
    """`flex`: window -> BlockMask."""
    bands: dict[int, Tensor] | None = None
    """`sdpa`: window -> (longest, longest) bool, True where a query sees a key."""


def document_starts(document_ids: Tensor) -> Tensor:
    """(B, S) bool: where a new document starts. A document is a run of equal ids, so an id may be used again later in the row."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: Tensor) -> Tensor:
    """(B, S) int64: positions that restart at 0 with each document."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    return index - torch.where(document_starts(document_ids), index, 0).cummax(dim=1).values


def make_layout(
    cos: Tensor,
    sin: Tensor,
    document_ids: Tensor | None,
    windows: set[int | None],
    dtype: torch.dtype,
    backend: Backend | None = None,
    head_dim: int | None = None,
) -> Layout:
    """Layout of one batch.

    cos, sin: (B, S, 1, C). document_ids: (B, S) int32 or None (one document per row). windows: those that the layers have. backend: null
    chooses. head_dim: the larger of keys' and values'; null: C, all of it rotated.
    """
    B, S, _, C = cos.shape
    windows = {None if w is None or w >= S else w for w in windows}
    if backend is None:
        backend = choose_backend(cos.device, dtype, head_dim or C, masked=document_ids is not None or windows != {None})
    if backend == "flex":
        return Layout(cos, sin, backend, block_masks={w: _block_mask(B, S, document_ids, w, cos.device) for w in windows})
    lengths: tuple[int, ...] | None = None
    if document_ids is not None:
        starts = document_starts(document_ids).flatten().nonzero().flatten()
        edges = [*starts.tolist(), B * S]  # the one host synchronisation of attention's set-up
        lengths = tuple(b - a for a, b in zip(edges, edges[1:], strict=False))
        if len(lengths) == B:
            lengths = None
    longest = S if lengths is None else max(lengths)
    if backend == "flash":
        if lengths is None:
            bounds = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=cos.device)
        else:
            bounds = torch.cat((starts, starts.new_tensor([B * S]))).to(torch.int32)
        return Layout(cos, sin, backend, bounds=bounds, longest=longest)
    index = torch.arange(longest, device=cos.device)
    distance = index[:, None] - index
    bands = {w: (distance >= 0) & (distance < w) for w in windows if w is not None and w < longest}
    runs = None if lengths is None else tuple((len(list(run)), length) for length, run in itertools.groupby(lengths))
    return Layout(cos, sin, backend, runs=runs, bands=bands)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the keys of the same document at the same position or before, at most `window` of them.

    q: (B, S, H, C); k: (B, S, K, C), v: (B, S, K, C') with K dividing H. scale: None: 1 / sqrt(C). Returns (B, S, H, C').
    """
    B, S, H, C = q.shape
    if layout.backend == "flash":
        # flash-attn has one head dim for all three; zeros add nothing to a product.
        width, values = max(C, v.shape[-1]), v.shape[-1]
        if values != C:
            q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
            scale = C**-0.5 if scale is None else scale
        return _flash(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, window, scale).view(B, S, H, width)[..., :values]
    if layout.backend == "flex":
        assert layout.block_masks is not None, "made by make_layout"
        mask = layout.block_masks[None if window is None or window >= S else window]
        call = _compiled("flex_attention") if q.is_cuda else _flex("flex_attention")
        out = call(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=True, scale=scale)
        return out.transpose(1, 2)
    if layout.runs is None:
        return _sdpa(q, k, v, layout, window, scale)
    # `split` and not slices: its backward is one concatenation instead of one full-size zero tensor per run.
    sizes = [number * length for number, length in layout.runs]
    parts = zip(layout.runs, *(x.flatten(0, 1).split(sizes) for x in (q, k, v)), strict=True)
    outputs = [_sdpa(*(x.unflatten(0, run) for x in part), layout, window, scale).flatten(0, 1) for run, *part in parts]
    return torch.cat(outputs).view(B, S, H, v.shape[-1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float | None) -> Tensor:
    S = q.shape[1]
    mask = None
    if window is not None and window < S:
        assert layout.bands is not None, "made by make_layout"
        mask = layout.bands[window][:S, :S]
    return _scaled_dot_product(q, k, v, mask, mask is None, scale)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    bounds, longest = layout.bounds, layout.longest
    # flash-attn counts the positions to the left without the query's own.
    size = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, window_size=size)


def _flex(name: str) -> Callable:
    import torch.nn.attention.flex_attention as flex

    return getattr(flex, name)


@functools.cache
def _compiled(name: str) -> Callable:
    return torch.compile(_flex(name), dynamic=False)


def _block_mask(B: int, S: int, document_ids: Tensor | None, window: int | None, device: torch.device) -> object:
    document = None if document_ids is None else document_starts(document_ids).cumsum(dim=1, dtype=torch.int32)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if document is not None:
            seen = seen & (document[b, query] == document[b, key])
        return seen

    return _flex("create_block_mask")(sees, None if document is None else B, None, S, S, device=device)


# ------------------------------------------------------------------------------------------------------------------ back ends


def _flash_problem() -> str | None:
    """Why flash-attn can't be used on this machine; None if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed (pip install flash-attn --no-build-isolation)"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"needs compute capability 8.0, this device has {'.'.join(map(str, torch.cuda.get_device_capability()))}"
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return f"installed but can't be imported: {error}"
    return None


@functools.cache
def _flash_usable() -> bool:
    return _flash_problem() is None


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> Backend:
    """The fastest back end for tensors of this kind. masked: the batch has packed documents or windows shorter than a row."""
    if device.type == "cuda":
        if dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 8 == 0 and _flash_usable():
            return "flash"
        # Without a mask SDPA has a fused kernel of its own; FlexAttention has no float64 and needs 16 numbers per head.
        if masked and dtype != torch.float64 and head_dim >= 16:
            return "flex"
    return "sdpa"


def describe_backends() -> list[tuple[str, str]]:
    """(back end, what it is used for here or why not), best first."""
    cuda = torch.cuda.is_available()
    problem = _flash_problem()
    flash = problem or "used on CUDA with float16 and bfloat16"
    flex = "used on CUDA for packed documents and sliding windows" + ("" if problem else " in float32") if cuda else "needs a CUDA device"
    sdpa = "used for everything else" if cuda else "used for everything; packed documents apart"
    return [("flash-attn", flash), ("FlexAttention", flex), ("SDPA", sdpa)]


# ---------------------------------------------------------------------------------------------------------------------- cache


class KVCache:
    """Keys and values of the positions seen so far, for generation without gradients; room for all of them is taken at the start. Of latent
    attention, in their place, the latents and the rotated part that all heads' keys share.

    Windows are kept by masking, so a cache holds `max_len` positions whatever the window.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        heads, key, value = config.kv_heads, config.head_size, config.head_size
        if config.mla is not None:
            heads, key, value = 1, config.mla.kv_lora_rank, config.mla.qk_rope_head_dim
        room = (config.num_layers, batch_size, max_len, heads)
        self.keys = torch.zeros((*room, key), dtype=dtype, device=device)
        self.values = torch.zeros((*room, value), dtype=dtype, device=device)
        self.length = 0
        """Positions that every layer has stored; the model moves it forward at the end of a pass."""

    @property
    def max_len(self) -> int:
        return self.keys.shape[2]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Store k and v (B, S, K, C) behind what is there and let q (B, S, H, C) see all of it. Returns (B, S, H, C)."""
        return self.look(q, *self.store(layer, k, v), window)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, S, K, C) behind what is there. Returns all of it, (B, positions, K, C)."""
        start, end = self.length, self.length + k.shape[1]
        if end > self.max_len:
            raise ValueError(f"KVCache: position {end} is beyond max_len ({self.max_len}); make a longer cache")
        self.keys[layer, :, start:end] = k
        self.values[layer, :, start:end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def look(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float | None = None) -> Tensor:
        """Attention of the newest positions' q (B, S, H, C) to all positions' keys (B, positions, K, C) and values. Returns (B, S, H, C')."""
        start, S, end = self.length, q.shape[1], keys.shape[1]
        first = 0 if window is None else max(0, start + 1 - window)
        keys, values = keys[:, first:], values[:, first:]
        mask = None
        if S > 1 and (start > 0 or (window is not None and window < S)):
            distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
            mask = (distance >= 0) & (distance < (window or end))
        return _scaled_dot_product(q, keys, values, mask, S > 1 and mask is None, scale)


# ----------------------------------------------------------------------------------------------------------------- the module


class Attention(nn.Module):
    """Self-attention of one layer: projections, optional norms of queries and keys, rotary positions."""

    rotate = staticmethod(rotate_both)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, C = config.hidden_size, config.head_size
        self.layer = layer
        self.head_dim = C
        self.window = layer_window(config, layer)
        self.q_proj = Linear(D, config.num_heads * C, config.qkv_bias)
        self.k_proj = Linear(D, config.kv_heads * C, config.qkv_bias)
        self.v_proj = Linear(D, config.kv_heads * C, config.qkv_bias)
        self.o_proj = Linear(config.num_heads * C, D, config.o_bias)
        self.norm_over_all = config.qk_norm_over == "all"
        widths = (config.num_heads * C, config.kv_heads * C) if self.norm_over_all else (C, C)
        self.q_norm, self.k_norm = (RMSNorm(width, config.norm_eps) if config.qk_norm else None for width in widths)

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """x: (B, S, D), normed. Returns (B, S, D) in the dtype of x."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            if self.norm_over_all:
                q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
            else:
                q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, layout.cos, layout.sin)
        out = attend(q, k, v, layout, self.window) if cache is None else cache.attend(self.layer, q, k, v, self.window)
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class LatentAttention(nn.Module):
    """Multi-head latent attention of one layer (DeepSeek-V2, arXiv 2405.04434, section 2.1; written after transformers' DeepSeek-V3).

    c = norm(x W_a) (R), r = rope(x W_r), one for all heads; k_h = [c W_k,h; r], v_h = c W_v,h; queries likewise from a latent of their own, or from
    x. The logits are divided by sqrt(nope + rope), and multiplied by the square of YaRN's magnitude where `mscale_all_dim` is set.
    """

    NORM_EPS = 1e-6  # of the latents' norms, whatever the model's `norm_eps`: so in DeepSeek's code and in transformers'

    rotate = staticmethod(rotate_both)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.mla is not None, "Attention computes a model without latents"
        self.layer, self.mla = layer, config.mla
        D, H, m = config.hidden_size, config.num_heads, config.mla
        if m.q_lora_rank is None:
            self.q_proj = Linear(D, H * config.head_size)
        else:
            self.q_a_proj = Linear(D, m.q_lora_rank, config.qkv_bias)
            self.q_a_norm = RMSNorm(m.q_lora_rank, self.NORM_EPS)
            self.q_b_proj = Linear(m.q_lora_rank, H * config.head_size)
        self.kv_a_proj = Linear(D, m.kv_lora_rank + m.qk_rope_head_dim, config.qkv_bias)
        self.kv_a_norm = RMSNorm(m.kv_lora_rank, self.NORM_EPS)
        self.kv_b_proj = Linear(m.kv_lora_rank, H * (m.qk_nope_head_dim + m.v_head_dim))
        self.o_proj = Linear(H * m.v_head_dim, D, config.o_bias)
        self.scale = config.head_size**-0.5
        if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim is not None:
            self.scale *= config.rope_scaling.magnitude(config.rope_scaling.mscale_all_dim) ** 2

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """x: (B, S, D), normed. Returns (B, S, D) in the dtype of x."""
        m, (B, S, _) = self.mla, x.shape
        q = self.q_proj(x) if m.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q, q_rope = q.view(B, S, -1, m.qk_nope_head_dim + m.qk_rope_head_dim).split([m.qk_nope_head_dim, m.qk_rope_head_dim], dim=-1)
        latent, rope = self.kv_a_proj(x)[:, :, None].split([m.kv_lora_rank, m.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_norm(latent)
        q_rope, rope = self.rotate(self._halves(q_rope), self._halves(rope), layout.cos, layout.sin)
        q = torch.cat((q, q_rope), dim=-1)
        if cache is None:
            out = attend(q, *self._expand(latent, rope), layout, None, self.scale)
        else:
            out = cache.look(q, *self._expand(*cache.store(self.layer, latent, rope)), None, self.scale)
        return self.o_proj(out.reshape(B, S, -1))

    def _expand(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """latent (B, L, 1, R), rope (B, L, 1, C_r) -> every head's keys (B, L, H, C) and values (B, L, H, C')."""
        m = self.mla
        both = self.kv_b_proj(latent[:, :, 0]).view(*latent.shape[:2], -1, m.qk_nope_head_dim + m.v_head_dim)
        k, v = both.split([m.qk_nope_head_dim, m.v_head_dim], dim=-1)
        return torch.cat((k, rope.expand(-1, -1, k.shape[2], -1)), dim=-1), v

    def _halves(self, x: Tensor) -> Tensor:
        # Pairs of neighbours become halves; queries and keys alike, so that their product is the same.
        return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) if self.mla.rope_interleave else x


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """Sliding window of a layer; None: all positions."""
    if config.sliding_layers is not None and layer not in config.sliding_layers:
        return None
    return config.sliding_window
