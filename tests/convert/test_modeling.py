"""The modelling code that travels with an exported model: loaded by AutoModelForCausalLM with trust_remote_code it computes our logits, for
every router option and attention feature, with and without a cache, with padding; and it generates what we generate."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from moetrain.config import (
    BaseLayersRouter,
    BudgetRouter,
    DynMoERouter,
    ExpertChoiceRouter,
    FinedeepConfig,
    GenerateConfig,
    HashRouter,
    LanguageFamilyRouter,
    LayerRange,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    MoEppRouter,
    NexusRouter,
    ReMoERouter,
    RopeScaling,
    SharedConfig,
    SigmoidSteRouter,
    StrataConfig,
    TopKRouter,
    XMoERouter,
)
from moetrain.convert.huggingface import read_config, read_tensors, write_model
from moetrain.generate import generate
from moetrain.model import Transformer, init_weights

VOCAB = 61
YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = RopeScaling(type="llama3", factor=4.0, original_max_position_embeddings=32, low_freq_factor=1.0, high_freq_factor=4.0)
LINEAR = RopeScaling(type="linear", factor=2.0)

LATENT = MLAConfig(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)

MODELS = {
    "dsmoe": dict(router=SigmoidSteRouter()),
    "threshold": dict(router=SigmoidSteRouter(threshold=0.7, rescale="none")),
    "moved_threshold": dict(router=SigmoidSteRouter(threshold=0.6, target_active=2.0)),
    "top1": dict(router=SigmoidSteRouter(threshold=0.8, zero_routes="top1")),
    "no_rescale_in_eval": dict(router=SigmoidSteRouter(rescale_in_eval=False)),
    "bias": dict(router=SigmoidSteRouter(bias=True, bias_init=-0.5)),
    "residual": dict(router=SigmoidSteRouter(input="residual")),
    "topk": dict(router=TopKRouter(top_k=2, normalize=False, output_scale=2.0)),
    "deepseek": dict(
        router=TopKRouter(top_k=2, score="sigmoid", selection_bias=True, output_scale=2.5, num_groups=4, top_groups=3), num_experts=8,
    ),
    "sigmoid_plain": dict(router=TopKRouter(top_k=3, score="sigmoid", normalize=False), qk_norm=True),
    "mlp_noise": dict(router=TopKRouter(top_k=2, gate="mlp", noise=True, cv_coef=0.01, capacity_factor=1.0)),
    "cosine": dict(router=TopKRouter(top_k=2, gate="cosine", cosine_temperature=0.1, second="random")),
    "budget": dict(router=BudgetRouter(target_active=2.3, output_scale=1.7, normalize=False)),
    "budget_normalized": dict(router=BudgetRouter(target_active=2.3, output_scale=1.7, rank_by="logit")),
    "base_layers": dict(router=BaseLayersRouter()),
    "language_family": dict(router=LanguageFamilyRouter(languages={"en": 0, "de": 3})),
    "nexus": dict(router=NexusRouter(domain_dim=6, top_k=2)),
    "hash": dict(router=HashRouter(num_hashes=2)),
    "expert_choice": dict(router=ExpertChoiceRouter()),
    "expert_choice_sigmoid": dict(router=ExpertChoiceRouter(score="sigmoid", evaluation="choice")),
    "remoe": dict(router=ReMoERouter(target_active=2.0)),
    "xmoe": dict(router=XMoERouter(threshold=0.6, capacity_factor=1.0)),
    "xmoe_target": dict(router=XMoERouter(target_active=2.0, max_experts=3, normalize=True)),
    "dynmoe": dict(router=DynMoERouter(), num_experts=8),
    "dynmoe_slots": dict(router=DynMoERouter(adapt_every=10, start_experts=5), num_experts=8),
    "moepp": dict(router=MoEppRouter()),
    "moepp_normalized": dict(router=MoEppRouter(normalize=True, gating_residual=False, num_zero=2, num_copy=2, num_constant=0, top_k=3)),
    "topk_odd_bias": dict(router=TopKRouter(top_k=2), o_bias=True),
    "qk_norm_tied_yarn": dict(router=SigmoidSteRouter(), qk_norm=True, tie_embeddings=True, rope_scaling=YARN),
    "biases_llama3": dict(router=SigmoidSteRouter(), qkv_bias=True, o_bias=True, rope_scaling=LLAMA3),
    "window_all_linear": dict(router=SigmoidSteRouter(), sliding_window=4, rope_scaling=LINEAR),
    "window_some": dict(router=SigmoidSteRouter(), sliding_window=4, sliding_layers=[1], head_dim=16),
    "norm_over_all": dict(router=SigmoidSteRouter(), qk_norm=True, qk_norm_over="all", head_dim=16),
    "shared": dict(router=SigmoidSteRouter(), moe=dict(shared=SharedConfig(dim=12))),
    "shared_gate": dict(router=SigmoidSteRouter(), moe=dict(shared=SharedConfig(dim=12, combine="gate"), layers=[1])),
    "residual_moe": dict(router=TopKRouter(top_k=1, normalize=False), moe=dict(shared=SharedConfig(dim=12, combine="coefficient"))),
    "mla": dict(router=SigmoidSteRouter(), mla=LATENT, num_kv_heads=None, moe=dict(layers=[1], shared=SharedConfig(dim=12))),
    "mla_yarn_bias": dict(
        router=TopKRouter(top_k=2), mla=MLAConfig(**{**LATENT.model_dump(), "q_lora_rank": None, "rope_interleave": False}), num_kv_heads=None,
        qkv_bias=True, o_bias=True, rope_scaling=RopeScaling(**{**YARN.model_dump(), "mscale": 0.8, "mscale_all_dim": 1.2}),
    ),
    "mla_dense": dict(router=None, mla=LATENT, num_kv_heads=None),
    "unequal": dict(router=SigmoidSteRouter(), moe=dict(num_experts=5, expert_dim=[8, 0, 5, 8, 0])),
    "big_or_small": dict(router=TopKRouter(top_k=1, output_scale=2.0), moe=dict(expert_dim=[16, 4, 16, 4])),
    "strata": dict(router=TopKRouter(top_k=1, normalize=False), moe=dict(strata=StrataConfig(sizes=[2, 2]))),
    "strata_norm": dict(
        router=TopKRouter(top_k=2, noise=True), moe=dict(num_experts=6, strata=StrataConfig(sizes=[2, 2, 2], norm=True), shared=SharedConfig(dim=4)),
    ),
    "finedeep": dict(router=None, finedeep=FinedeepConfig(sublayers=2, experts=4)),
    "finedeep_below": dict(router=SigmoidSteRouter(), finedeep=FinedeepConfig(sublayers=4, experts=1), moe=dict(layers=[1])),
    "some_sparse": dict(router=SigmoidSteRouter(), moe=dict(layers=[1])),
    "every_second": dict(router=TopKRouter(top_k=2), moe=dict(layers=LayerRange(first=-2, every=2)), num_layers=3),
    "one_expert": dict(router=SigmoidSteRouter(), num_experts=1),
    "dense": dict(router=None, qk_norm=True, mlp_bias=True, sliding_window=4, sliding_layers=[0]),
}


TRAINING_ONLY = (".noise", "router.used", "router.unrouted", "router.clock")


def make(name, folder, dtype=torch.float64):
    options = dict(MODELS[name])
    router, more = options.pop("router"), {"num_experts": options.pop("num_experts", 4), "expert_dim": 16, **options.pop("moe", {})}
    if isinstance(router, NexusRouter):
        path = folder.with_suffix(".safetensors")
        save_file({"domains": torch.randn(more["num_experts"], router.domain_dim, generator=torch.Generator().manual_seed(5))}, path)
        router = router.model_copy(update={"embeddings": str(path)})
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=32, max_position_embeddings=64)
    config = ModelConfig(**{**sizes, "moe": None if router is None else MoEConfig(router=router, **more), **options})
    model = Transformer(config).to(dtype).eval()
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if not key.endswith(("router.table", "router.mask")):
                p.add_(torch.randn(p.shape, generator=generator, dtype=dtype) * 0.25)
        for block in model.layers:
            if router is not None and router.type == "budget":
                block.ffn.router.cut.copy_(torch.tensor([0.12, 0.5]))  # a cut of 0.24
    write_model(folder, config, model.named_parameters())
    return model, hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def random_tokens(shape=(3, 19), seed=1):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_cache_padding_and_generation(name, tmp_path):
    ours, theirs = make(name, tmp_path / "model")
    assert type(theirs).__name__ == "MoetrainForCausalLM"
    tokens = random_tokens()
    output = ours(tokens)
    expected = output.logits
    if name in ("dsmoe", "threshold", "bias"):
        counts = [int(r.stats["empty"]) for r in output.reports]
        assert sum(counts) > 0 and sum(counts) < tokens.numel() * 2, f"the case must have tokens with and without routes: {counts}"
    found = theirs(tokens)
    difference = (found.logits - expected).abs().max().item()
    print(f"{name}: max |difference| {difference:.1e}")
    assert difference <= 1e-10
    # What was written is read back.
    config = read_config(tmp_path / "model")
    read = dict(read_tensors(tmp_path / "model", config))
    scale = {"topk": 2.0, "big_or_small": 2.0, "deepseek": 2.5}.get(name, 1.0)  # output_scale, multiplied into `down`
    for key, p in ours.named_parameters():
        # What only training uses is left out.
        wanted = p * scale if ".experts." in key and key.endswith(".down") else p * 0 if key.endswith(TRAINING_ONLY) else p
        assert torch.equal(read[key].to(p.dtype), wanted)
    # In pieces through the cache.
    cache, pieces = None, []
    for part in tokens.split([7, 1, 5, 1, 5], dim=1):
        out = theirs(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-10
    # Padding on the left changes nothing for the real tokens.
    mask = torch.ones_like(tokens)
    mask[0, :6] = mask[1, :1] = 0
    padded = theirs(tokens, attention_mask=mask).logits
    for row, start in ((0, 6), (1, 1), (2, 0)):
        assert (padded[row, start:] - ours(tokens[row : row + 1, start:]).logits[0]).abs().max() <= 1e-10
    # Greedy text: with cache, without, and ours.
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    # Without a mask generate() takes a token 0 of the prompt for padding.
    seen = torch.ones_like(tokens)
    cached, plain = (theirs.generate(tokens, attention_mask=seen, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)
    assert torch.equal(cached, generate(ours, tokens, GenerateConfig(max_new_tokens=12)))
    batch = theirs.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(batch[0, 19:], generate(ours, tokens[:1, 6:], GenerateConfig(max_new_tokens=12))[0, 13:])


@torch.no_grad()
def test_loss_bfloat16_and_saving_again(tmp_path):
    ours, theirs = make("dsmoe", tmp_path / "model", torch.float32)
    tokens = random_tokens()
    assert (theirs(tokens).logits - ours(tokens).logits).abs().max() <= 1e-5
    labels = torch.full_like(tokens, -100)
    labels[:, 4:] = tokens[:, 4:]
    shifted = torch.cat((labels[:, 1:], torch.full((3, 1), -100)), dim=1)
    expected = ours(tokens, labels=shifted).loss_sum / (shifted != -100).sum()
    assert abs(theirs(tokens, labels=labels).loss - expected) <= 1e-5
    half = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.bfloat16)
    assert half(tokens).logits.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "again")
    # What transformers wrote is read by us, and the code went along.
    config = read_config(tmp_path / "again")
    assert config == ours.config
    for name, tensor in read_tensors(tmp_path / "again", config):
        assert torch.equal(tensor, ours.state_dict()[name])
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@torch.no_grad()
def test_static_cache(tmp_path):
    """A cache longer than what is in it: the room behind is never seen."""
    _, theirs = make("window_some", tmp_path / "model")
    tokens = random_tokens((1, 9))
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(tokens))
    assert torch.equal(
        theirs.generate(tokens, cache_implementation="static", disable_compile=True, **options), theirs.generate(tokens, **options)
    )
