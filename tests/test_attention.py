"""Attention against a loop over tokens: windows, grouped heads, packed documents, the cache; every back end that runs without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import attention
from moetrain.attention import (
    KVCache,
    RMSNorm,
    attend,
    choose_backend,
    describe_backends,
    document_positions,
    layer_window,
    make_layout,
    rope_tables,
    rotate,
)
from moetrain.config import ModelConfig


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
