"""The Transformer: packed documents, cache, loss in chunks, start weights, dtypes, MoE layers under recomputation. That its logits are
those of transformers is in tests/convert/test_huggingface.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moetrain import model as model_module
from moetrain.attention import KVCache
from moetrain.config import LayerRange, ModelConfig, MoEConfig, RopeScaling, SigmoidSteRouter, TopKRouter
from moetrain.model import Transformer, cross_entropy, init_weights, initial_tensor
from moetrain.moe.losses import coefficients
from moetrain.moe.routing import TokenContext

VOCAB = 61
FEATURES = {
    "plain": {},
    "windows": dict(sliding_window=4, sliding_layers=[1], qk_norm=True),
    "biases_tied_yarn": dict(
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        rope_scaling=RopeScaling(type="yarn", factor=2.0, original_max_position_embeddings=16),
    ),
    "sigmoid": dict(moe=MoEConfig(num_experts=4, expert_dim=8, router=SigmoidSteRouter(bias=True))),
    "topk": dict(moe=MoEConfig(num_experts=4, expert_dim=8, router=TopKRouter(top_k=2)), head_dim=16, sliding_window=5),
}


def make(name="plain", seed=0, dtype=torch.float64, **options):
    base = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        init_std=0.2,
    )
    model = Transformer(ModelConfig(**{**base, **FEATURES[name], **options})).to(dtype)
    init_weights(model, seed)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_packed_documents_are_separate_documents(name):
    model, tokens = make(name).eval(), random_tokens(2, 20)
    ids = torch.tensor([[0] * 7 + [1] * 13, [3] * 2 + [4] * 9 + [3] * 9], dtype=torch.int32)
    packed = model(tokens, document_ids=ids).logits
    for row, start, stop in ((0, 0, 7), (0, 7, 20), (1, 0, 2), (1, 2, 11), (1, 11, 20)):
        alone = model(tokens[row : row + 1, start:stop]).logits[0]
        assert (packed[row, start:stop] - alone).abs().max() < 1e-12
    assert (packed - model(tokens).logits).abs().max() > 1e-3


@torch.no_grad()
def test_positions_given_by_hand():
    """The same positions explicitly; rotary positions are relative, so all of them may be shifted; stretching them is seen."""
    model, tokens = make().eval(), random_tokens(2, 9)
    plain, steps = model(tokens).logits, torch.arange(9).expand(2, 9)
    assert torch.equal(model(tokens, positions=steps).logits, plain)
    assert (model(tokens, positions=steps + 40).logits - plain).abs().max() < 1e-9
    assert (model(tokens, positions=steps * 2).logits - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_cache_is_a_full_pass(name):
    model, tokens = make(name).eval(), random_tokens(2, 20)
    cache = KVCache(model.config, 2, 20, dtype=torch.float64)
    pieces = [model(part, cache=cache).logits for part in tokens.split([6, 1, 4] + [1] * 9, dim=1)]
    assert cache.length == 20
    assert (torch.cat(pieces, 1) - model(tokens).logits).abs().max() < 1e-12
    with pytest.raises(ValueError, match="document_ids can't be given"):
        model(tokens[:, :1], cache=cache, document_ids=torch.zeros(2, 1, dtype=torch.int32))


@pytest.mark.parametrize("name", ["plain", "biases_tied_yarn", "sigmoid"])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(name, monkeypatch):
    """Chunks of 7 tokens, some without a label, one chunk without any."""
    monkeypatch.setattr(model_module, "_CHUNK_NUMEL", 7 * VOCAB)
    model, tokens, labels = make(name).eval(), random_tokens(2, 20), random_tokens(2, 20, seed=2)
    labels[0, 5:16] = -100
    labels[1, 3] = -100
    out = model(tokens, labels=labels)
    (out.loss_sum * 0.37).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(tokens).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(2, 20)
    (losses.sum() * 0.37).backward()
    assert abs(out.loss_sum - losses.sum()) < 1e-10
    assert (out.token_losses - losses).abs().max() < 1e-5 and out.token_losses.dtype == torch.float32 and not out.token_losses.requires_grad
    assert (out.token_losses[labels == -100] == 0).all()
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert (grads[n] - p.grad).abs().max() < 1e-10, n


def test_cross_entropy_gradients_and_extremes():
    """Both gradients, times what comes from above, against torch's own in float64; and inputs that are easily NaN."""
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3, 3])
    ours = torch.autograd.grad(-0.37 * cross_entropy(hidden, weight, labels)[0], (hidden, weight))
    torchs = torch.autograd.grad(-0.37 * F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum"), (hidden, weight))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    # No label at all, no token at all, and logits that overflow a naive exponential.
    for h, y in ((hidden, torch.full((5,), -100)), (hidden[:0], labels[:0])):
        loss, _ = cross_entropy(h, weight, y)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight), allow_unused=True))
    loss, _ = cross_entropy(hidden * 1e4, weight, labels)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("hidden_grad, weight_grad, grad_enabled", [(1, 1, True), (1, 0, True), (0, 1, True), (0, 0, True), (1, 1, False)])
def test_cross_entropy_makes_what_is_wanted(hidden_grad, weight_grad, grad_enabled, monkeypatch):
    """One product for the logits and one for each gradient that is wanted; none of them again in backward."""
    monkeypatch.setattr(model_module, "_CHUNK_NUMEL", 2 * 7)
    hidden = torch.randn(5, 4, dtype=torch.bfloat16, requires_grad=bool(hidden_grad))  # addmm_ of float32 is not counted
    weight = torch.randn(7, 4, requires_grad=bool(weight_grad))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad_enabled):
        loss, _ = cross_entropy(hidden, weight, torch.tensor([0, 6, -100, 3, 3]))
        if loss.requires_grad:
            loss.backward()
    assert loss.requires_grad == (grad_enabled and hidden_grad + weight_grad > 0)
    assert counter.get_total_flops() == 2 * 5 * 4 * 7 * (1 + (hidden_grad + weight_grad) * grad_enabled)
    assert [x.grad is not None for x in (hidden, weight)] == [bool(hidden_grad and grad_enabled), bool(weight_grad and grad_enabled)]


def test_cross_entropy_refuses_a_second_backward():
    """Its gradients are scaled in place: once more would be silently wrong."""
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    loss, _ = cross_entropy(hidden, weight, torch.tensor([0, 6, -100, 3, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy: backward a second time"):
        loss.backward()


def test_weight_gradient_of_many_chunks_in_bfloat16(monkeypatch):
    """The sum over chunks is kept in float32: against float64 the error stays that of one product, however many chunks there are."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(512, 16).bfloat16(), torch.randn(31, 16), torch.randint(0, 31, (512,))

    def grad(chunk):
        monkeypatch.setattr(model_module, "_CHUNK_NUMEL", chunk * 31)
        w = weight.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(hidden, w, labels)[0], w)[0]

    w = weight.double().requires_grad_()
    exact = torch.autograd.grad(cross_entropy(hidden.double(), w, labels)[0], w)[0]
    errors = [(grad(chunk) - exact).norm() / exact.norm() for chunk in (512, 4)]
    assert errors[1] < 1.5 * errors[0] < 0.05


def test_dtype_of_activations():
    """bfloat16 activations with float32 parameters: gradients and losses stay float32, results stay near."""
    model = make("sigmoid", dtype=torch.float32, init_std=0.05)
    tokens, labels = random_tokens(2, 12), random_tokens(2, 12, seed=2)
    exact = model(tokens, labels=labels)
    half = model(tokens, labels=labels, dtype=torch.bfloat16)
    half.loss_sum.backward()
    assert half.loss_sum.dtype == torch.float32 and {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert abs(half.loss_sum - exact.loss_sum) < 0.01 * exact.loss_sum
    assert model(tokens, dtype=torch.bfloat16).logits.dtype == torch.float32
    assert make().forward(tokens).logits.dtype == torch.float64


@pytest.mark.parametrize("name", FEATURES)
def test_blocks_under_recomputation(name):
    """A block can be put under torch's checkpoint; output, reports and gradients are the same."""
    tokens, labels = random_tokens(2, 12), random_tokens(2, 12, seed=2)
    ids = (torch.arange(12)[None].expand(2, 12) // 5).to(torch.int32)
    context = TokenContext(keys=torch.arange(24))
    results = []
    for recompute in (False, True):
        model = make(name)
        if recompute:
            for block in model.layers:
                block.forward = (lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False))(block.forward)
        out = model(tokens, labels=labels, document_ids=ids, context=context)
        (out.loss_sum + sum(sum(r.losses.values()) for r in out.reports)).backward()
        results.append((out.loss_sum, {n: p.grad for n, p in model.named_parameters()}, [r.stats for r in out.reports]))
    (a, grads_a, stats_a), (b, grads_b, stats_b) = results
    assert torch.equal(a, b) and all(torch.equal(grads_a[n], grads_b[n]) for n in grads_a)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(stats_a, stats_b, strict=True) for k in x)


def test_padding_has_no_routes():
    model, tokens = make("topk"), random_tokens(2, 6)
    valid = torch.ones(12, dtype=torch.bool)
    valid[4:6] = False
    stats = model(tokens, context=TokenContext(valid=valid)).reports[0].stats
    assert stats["tokens"] == 10 and stats["load"].sum() == 20


@pytest.mark.parametrize("name", FEATURES)
def test_parameters_and_their_count(name):
    model = make(name)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    names = {n for n, _ in model.named_parameters()}
    assert ("head.weight" in names) == (not model.config.tie_embeddings)
    assert ("layers.1.ffn.experts.gate_up" in names) == (model.config.moe is not None)
    assert set(model.state_dict()) == names, "no buffers: everything but the parameters follows from the config"


def test_start_weights():
    config = make("sigmoid", init_std=0.5).config
    big = initial_tensor("layers.0.attn.q_proj.weight", (200, 300), config, 1)
    assert big.dtype == torch.float32 and abs(big.std() - 0.5) < 0.01 and abs(big.mean()) < 0.01
    assert torch.equal(big, initial_tensor("layers.0.attn.q_proj.weight", (200, 300), config, 1))
    assert not torch.equal(big, initial_tensor("layers.0.attn.q_proj.weight", (200, 300), config, 2))
    assert not torch.equal(big, initial_tensor("layers.1.attn.q_proj.weight", (200, 300), config, 1))
    for name in ("layers.0.attn.o_proj.weight", "layers.1.ffn.down_proj.weight", "layers.1.ffn.experts.down"):
        assert abs(initial_tensor(name, (200, 300), config, 1).std() - 0.25) < 0.01  # 2 layers: / sqrt(4)
    assert abs(initial_tensor("layers.0.ffn.experts.gate_up", (4, 50, 300), config, 1).std() - 0.5) < 0.01
    assert abs(initial_tensor("layers.0.ffn.router.weight", (200, 300), config, 1).std() - 0.02) < 0.001
    assert (initial_tensor("layers.0.attn_norm.weight", (3,), config, 1) == 1).all() and (
        initial_tensor("layers.0.attn.q_norm.weight", (3,), config, 1) == 1
    ).all()
    assert (initial_tensor("layers.0.attn.q_proj.bias", (3,), config, 1) == 0).all()
    opened = MoEConfig(num_experts=4, expert_dim=8, router=SigmoidSteRouter(bias=True, bias_init=4.0))
    assert (initial_tensor("layers.0.ffn.router.bias", (4,), config.model_copy(update={"moe": opened}), 1) == 4).all()


def test_built_on_meta_and_filled_later():
    """As parallelize does; what is not filled shows as NaN instead of passing for weights."""
    with torch.device("meta"):
        empty = Transformer(make("sigmoid").config)
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    init_weights(filled, 0)
    same, tokens = make("sigmoid", dtype=torch.float32), random_tokens(1, 8)
    assert torch.equal(filled(tokens).logits, same(tokens).logits)
    assert Transformer(make().config)(tokens).logits.isnan().all()


def test_losses_and_reports_are_of_the_sparse_layers():
    """DSMoE's sparsity loss (Eq. 19) is a mean over the layers that have gates: with every gate at 1 it is 1, however many layers are dense."""
    for layers in (None, [1], {"first": 1, "every": 2}):
        choice = LayerRange(**layers) if isinstance(layers, dict) else layers
        moe = MoEConfig(num_experts=4, expert_dim=8, router=SigmoidSteRouter(bias=True, bias_init=60.0), layers=choice)
        config = ModelConfig(vocab_size=31, hidden_size=16, num_layers=4, num_heads=2, intermediate_size=24, moe=moe)
        model, tokens = Transformer(config).double(), torch.arange(12)[None]
        init_weights(model, 0)
        reports = model(tokens, labels=tokens, context=TokenContext(num_tokens=12.0)).reports
        assert [bool(r.stats) for r in reports] == [i in config.moe_layers for i in range(4)]
        assert abs(float(sum(r.losses["sparsity"] for r in reports if r.losses)) - 1) < 1e-9
        assert coefficients(config, None) == {"sparsity": [1.0] * len(config.moe_layers)}
