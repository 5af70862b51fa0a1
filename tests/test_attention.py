"""Attention against a loop over tokens: windows, grouped heads, packed documents, the cache; every back end that runs without a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import attention
from moetrain.attention import (
    KVCache,
    LatentAttention,
    RMSNorm,
    attend,
    choose_backend,
    describe_backends,
    document_positions,
    layer_window,
    make_layout,
    rope_frequencies,
    rope_tables,
    rotate,
    rotate_halves,
)
from moetrain.config import MLAConfig, ModelConfig, RopeScaling


def reference(q, k, v, window, document_ids=None):
    """One query at a time. A document is a run of equal ids."""
    B, S, H, C = q.shape
    out = torch.zeros_like(q)
    for b, i, h in itertools.product(range(B), range(S), range(H)):
        first = i
        while first > 0 and (document_ids is None or document_ids[b, first - 1] == document_ids[b, i]):
            first -= 1
        if window is not None:
            first = max(first, i - window + 1)
        group = h * k.shape[2] // H
        scores = (k[b, first : i + 1, group] @ q[b, i, h]) / C**0.5
        out[b, i, h] = scores.softmax(0) @ v[b, first : i + 1, group]
    return out


def random_qkv(B, S, H, K, C, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, S, heads, C, generator=generator, dtype=dtype) for heads in (H, K, K)]


def tables(B, S, C, dtype=torch.float64):
    return rope_tables(torch.ones(C // 2), 1.0, torch.arange(S).expand(B, S), dtype)


DOCUMENTS = torch.tensor([[5, 5, 5, 5, 5, 5, 7, 5, 5, 5, 0], [1] * 11, [3, 4] * 5 + [9]], dtype=torch.int32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 11, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_against_the_loop(backend, heads, window, packed):
    """`flex` runs here without its compiler, so this shows its mask, not its kernel."""
    q, k, v = random_qkv(3, 11, *heads, 8)
    documents = DOCUMENTS if packed else None
    layout = make_layout(*tables(3, 11, 8), documents, {None, window}, q.dtype, backend)
    assert torch.allclose(attend(q, k, v, layout, window), reference(q, k, v, window, documents), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from([None, 1, 2, 4]))
def test_gradients_of_packed_documents_are_those_of_separate_ones(lengths, window):
    S = sum(lengths)
    inputs = [x.requires_grad_() for x in random_qkv(1, S, 2, 1, 4)]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(torch.int32)
    upstream = torch.randn(1, S, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = attend(*inputs, make_layout(*tables(1, S, 4), ids, {window}, torch.float64), window)
    grads = torch.autograd.grad(out, inputs, upstream)
    parts = []
    for part in range(len(lengths)):
        at = (ids[0] == part).nonzero().flatten()
        alone = [x.detach()[:, at].requires_grad_() for x in inputs]
        y = attend(*alone, make_layout(*tables(1, len(at), 4), None, {window}, torch.float64), window)
        parts.append((y, *torch.autograd.grad(y, alone, upstream[:, at])))
    for ours, theirs in zip((out, *grads), zip(*parts, strict=True), strict=True):
        assert torch.allclose(ours, torch.cat(theirs, dim=1), rtol=0, atol=1e-12)


def test_neighbours_of_one_length_share_a_call(monkeypatch):
    """Rows of one document each, but for the third: it and its neighbours are four calls, and every token gets what it gets alone, bit for bit."""
    q, k, v = random_qkv(4, 6, 4, 2, 8, torch.float32)
    ids = torch.tensor([[0] * 6, [1] * 6, [2] * 2 + [3] * 4, [4] * 6], dtype=torch.int32)
    calls, real = [], attention._scaled_dot_product
    monkeypatch.setattr(attention, "_scaled_dot_product", lambda q, *rest: (calls.append(tuple(q.shape[:2])), real(q, *rest))[1])
    together = attend(q, k, v, make_layout(*tables(4, 6, 8), ids, {None}, torch.float32, "sdpa"), None)
    assert calls == [(2, 6), (1, 2), (1, 4), (1, 6)]
    for i in range(5):
        row, at = ids == i, (ids == i).any(1).nonzero().item()
        alone = [x[at : at + 1, row[at]] for x in (q, k, v)]
        length = alone[0].shape[1]
        assert torch.equal(together[row], attend(*alone, make_layout(*tables(1, length, 8), None, {None}, torch.float32, "sdpa"), None)[0])


def test_document_positions_restart():
    assert document_positions(torch.tensor([[4, 4, 4, 2, 2, 4], [1, 2, 3, 3, 3, 3]])).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("pieces", [[12], [5, 7], [1] * 12, [3, 1, 1, 5, 2]])
def test_cache_sees_what_a_full_pass_sees(window, pieces):
    q, k, v = random_qkv(2, 12, 4, 2, 8)
    config = ModelConfig(vocab_size=2, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=8)
    cache, out, start = KVCache(config, 2, 12, dtype=torch.float64), [], 0
    for n in pieces:
        out.append(cache.attend(1, q[:, start : start + n], k[:, start : start + n], v[:, start : start + n], window))
        start += n
        cache.length = start
    assert torch.allclose(torch.cat(out, 1), reference(q, k, v, window), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"position 13 is beyond max_len \(12\)"):
        cache.attend(1, q[:, :1], k[:, :1], v[:, :1], window)


def test_rotation_depends_on_distance_alone():
    """<R_i q, R_j k> is a function of i - j, positions may be anything, and the table is float32 for half precision."""
    frequencies = torch.tensor([1.0, 0.3, 0.01])
    q, k = (torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def product(i, j):
        cos, sin = rope_tables(frequencies, 1.0, torch.tensor([[i, j]]), torch.float64)
        a, b = rotate(torch.stack((q, k))[None, :, None], cos, sin)[0, :, 0]
        return a @ b

    assert abs(product(7, 3) - product(104, 100)) < 1e-12 and abs(product(7, 3) - product(7, 4)) > 1e-3
    cos, _ = rope_tables(frequencies, 1.0, torch.tensor([[100_000]]), torch.bfloat16)
    assert cos.dtype == torch.float32 and rotate(torch.ones(1, 1, 1, 6, dtype=torch.bfloat16), cos, cos).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_both_ways_to_rotate_are_one(dtype):
    """Output and gradient, bit for bit."""
    cos, sin = rope_tables(torch.tensor([1.0, 0.3, 0.01, 2.0]), 1.5, torch.arange(10).view(2, 5) * 7, dtype)
    x, upstream = (torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    x.requires_grad_()
    plain, halves = rotate(x, cos, sin), rotate_halves(x, cos, sin)
    assert plain.dtype == dtype and torch.equal(plain, halves)
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (plain, halves)))


def test_norm():
    x = torch.randn(3, 8, dtype=torch.float64)
    norm = RMSNorm(8, 1e-3)
    torch.nn.init.uniform_(norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert torch.allclose(norm(x), expected, rtol=0, atol=1e-12)
    # In bfloat16 the mean of squares is taken in float32: bfloat16 sums would be wrong by per cents.
    half = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    norm = RMSNorm(4096, 0.0)
    torch.nn.init.ones_(norm.weight)
    assert torch.equal(norm(half), torch.ones_like(half))


def test_windows_by_layer():
    base = dict(vocab_size=2, hidden_size=4, num_layers=3, num_heads=1, intermediate_size=4)
    assert [layer_window(ModelConfig(**base), i) for i in range(3)] == [None] * 3
    assert [layer_window(ModelConfig(**base, sliding_window=5), i) for i in range(3)] == [5] * 3
    assert [layer_window(ModelConfig(**base, sliding_window=5, sliding_layers=[1]), i) for i in range(3)] == [None, 5, None]


def test_choice_of_back_end(monkeypatch):
    """The choice itself needs no GPU; a back end that could not run is never chosen."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(attention, "_flash_usable", lambda: True)
    assert choose_backend(cpu, torch.bfloat16, 64, masked=True) == "sdpa"
    assert choose_backend(cuda, torch.bfloat16, 64, masked=True) == choose_backend(cuda, torch.float16, 256, masked=False) == "flash"
    assert choose_backend(cuda, torch.float32, 64, masked=True) == choose_backend(cuda, torch.bfloat16, 512, masked=True) == "flex"
    assert choose_backend(cuda, torch.float32, 64, masked=False) == choose_backend(cuda, torch.float64, 64, masked=True) == "sdpa"
    monkeypatch.setattr(attention, "_flash_usable", lambda: False)
    assert choose_backend(cuda, torch.bfloat16, 64, masked=True) == "flex"
    assert choose_backend(cuda, torch.bfloat16, 64, masked=False) == "sdpa"
    assert choose_backend(cuda, torch.bfloat16, 8, masked=True) == "sdpa"


def test_description_gives_a_reason_for_each():
    rows = describe_backends()
    assert [name for name, _ in rows] == ["flash-attn", "FlexAttention", "SDPA"] and all(reason for _, reason in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("backend", ["flash", "flex", "sdpa"])
def test_cuda_back_ends_agree(backend, window):
    """Output and gradients of packed documents in bfloat16 against float64 on the CPU."""
    if backend == "flash" and not attention._flash_usable():
        pytest.skip(f"flash-attn: {attention._flash_problem()}")
    q, k, v = random_qkv(2, 300, 4, 2, 64)
    ids = (torch.arange(300)[None].expand(2, 300) // 70).to(torch.int32)
    upstream = torch.randn_like(q)
    results = []
    for device, dtype, chosen in (("cpu", torch.float64, "sdpa"), ("cuda", torch.bfloat16, backend)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        layout = make_layout(*(t.to(device) for t in tables(2, 300, 64)), ids.to(device), {window}, dtype, chosen)
        out = attend(*inputs, layout, window)
        results.append([t.cpu().double() for t in (out, *torch.autograd.grad(out, inputs, upstream.to(device, dtype)))])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------------- latent attention

YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=1.3)


def latent(**options):
    sizes = dict(q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=2)
    mla = MLAConfig(**{**sizes, **{k: options.pop(k) for k in (*sizes, "rope_interleave") if k in options}})
    config = ModelConfig(vocab_size=7, hidden_size=8, num_layers=1, num_heads=3, intermediate_size=8, mla=mla, **options)
    module, generator = LatentAttention(config, 0).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) + (1.0 if p.ndim == 1 else 0.0))
    return config, module


def norm(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x, position, frequencies, interleave):
    """The rotated part of one vector: pairs of neighbours, or of halves, each by its angle."""
    half, out = len(x) // 2, torch.zeros_like(x)
    for i, frequency in enumerate(frequencies.double().tolist()):
        a, b = (x[2 * i], x[2 * i + 1]) if interleave else (x[i], x[half + i])
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[2 * i], out[2 * i + 1] = a * cos - b * sin, a * sin + b * cos
    return out


def latent_reference(config, module, x):
    """One row, one query, one head at a time: DeepSeek-V2's equations."""
    m, p = config.mla, dict(module.named_parameters())
    frequencies, magnitude = rope_frequencies(config)

    def project(name, token):
        bias = p.get(f"{name}.bias")
        return p[f"{name}.weight"] @ token + (0 if bias is None else bias)

    scale = (m.qk_nope_head_dim + m.qk_rope_head_dim) ** -0.5
    if config.rope_scaling is not None:
        assert magnitude == pytest.approx((0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1))
        scale *= (0.13 * math.log(4) + 1) ** 2
    rows = []
    for t in range(len(x)):
        q = project("q_proj", x[t]) if m.q_lora_rank is None else project("q_b_proj", norm(project("q_a_proj", x[t]), p["q_a_norm.weight"]))
        heads = []
        for h, query in enumerate(q.view(config.num_heads, -1)):
            scores, values = [], []
            for s in range(t + 1):
                down = project("kv_a_proj", x[s])
                c = norm(down[: m.kv_lora_rank], p["kv_a_norm.weight"])
                both = project("kv_b_proj", c).view(config.num_heads, -1)[h]
                key, value = both[: m.qk_nope_head_dim], both[m.qk_nope_head_dim :]
                r = magnitude * turned(down[m.kv_lora_rank :], s, frequencies, m.rope_interleave)
                r_q = magnitude * turned(query[m.qk_nope_head_dim :], t, frequencies, m.rope_interleave)
                scores.append(scale * (query[: m.qk_nope_head_dim] @ key + r_q @ r))
                values.append(value)
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        rows.append(project("o_proj", torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options", [{}, dict(q_lora_rank=None, rope_interleave=False), dict(qkv_bias=True, o_bias=True, v_head_dim=9), dict(rope_scaling=YARN)],
    ids=["plain", "no_query_latent", "biases", "yarn"],
)  # fmt: skip
def test_latent_attention_against_the_loop(options):
    """Output and gradients, packed documents too; and the cache, which holds the latents, in pieces."""
    config, module = latent(**options)
    x = torch.randn(1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    frequencies, magnitude = rope_frequencies(config)

    def layout(positions, ids=None):
        return make_layout(*rope_tables(frequencies, magnitude, positions, x.dtype), ids, {None}, x.dtype, "sdpa", config.head_size)

    want = latent_reference(config, module, x[0])
    got = module(x, layout(torch.arange(9)[None]))[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = torch.randn(want.shape, dtype=torch.float64)
    parameters = [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, parameters, grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    ids = torch.tensor([[4, 4, 4, 4, 2, 2, 2, 2, 2]], dtype=torch.int32)
    packed = module(x, layout(document_positions(ids), ids))[0]
    torch.testing.assert_close(packed, torch.cat([latent_reference(config, module, part) for part in (x[0, :4], x[0, 4:])]), rtol=1e-10, atol=1e-10)
    cache, pieces = KVCache(config, 1, 9, dtype=torch.float64), []
    assert cache.keys.shape == (1, 1, 9, 1, 5) and cache.values.shape == (1, 1, 9, 1, 4)
    for start, end in ((0, 4), (4, 5), (5, 9)):
        with torch.no_grad():
            pieces.append(module(x[:, start:end], layout(torch.arange(start, end)[None]), cache)[0])
        cache.length = end
    torch.testing.assert_close(torch.cat(pieces), want, rtol=1e-10, atol=1e-10)


def test_flex_takes_values_of_another_size():
    q, k, _ = random_qkv(2, 11, 2, 2, 8)
    v = torch.randn(2, 11, 2, 5, dtype=torch.float64)
    found = []
    for backend in ("sdpa", "flex"):
        layout = make_layout(*tables(2, 11, 8), DOCUMENTS[:2], {None}, torch.float64, backend)
        found.append(attend(q, k, v, layout, None, 0.3))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("values", [5, 8, 11])
def test_flash_gets_one_head_dim(values, monkeypatch):
    """Keys and values of different sizes are padded with zeros, which change nothing; flash-attn itself is stood in for."""
    q, k, _ = random_qkv(1, 9, 2, 2, 8)
    v = torch.randn(1, 9, 2, values, dtype=torch.float64)
    plain = make_layout(*tables(1, 9, 8), None, {None}, torch.float64, "sdpa")

    def flash(q, k, v, layout, window, scale):
        assert q.shape == k.shape == v.shape == (9, 2, max(8, values))
        return attend(q[None], k[None], v[None], plain, window, scale)[0]

    monkeypatch.setattr(attention, "_flash", flash)
    layout = make_layout(*tables(1, 9, 8), None, {None}, torch.float64, "flash")
    for scale in (None, 0.3):
        torch.testing.assert_close(attend(q, k, v, layout, None, scale), attend(q, k, v, plain, None, scale), rtol=1e-12, atol=1e-12)
