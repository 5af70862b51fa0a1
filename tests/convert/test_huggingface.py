"""Hugging Face folders: read models compute what transformers computes, written ones are bit-equal and load in transformers, and whatever
does not fit is refused with its name."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from moetrain.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling, SharedConfig, SigmoidSteRouter, TopKRouter, to_dict
from moetrain.convert.huggingface import architecture, parameter_shapes, read_config, read_tensors, write_model
from moetrain.data.tokenizer import load_tokenizer
from moetrain.model import Transformer, init_weights
from moetrain.moe.losses import coefficients
from moetrain.moe.routing import TokenContext

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
DEEPSEEK = dict(
    n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=16, n_shared_experts=2, first_k_dense_replace=1,
    q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, num_key_value_heads=4,
)  # fmt: skip

FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "llama_tied": (hf.LlamaConfig, dict(tie_word_embeddings=True, num_key_value_heads=4)),
    "llama_llama3": (hf.LlamaConfig, dict(rope_parameters=LLAMA3)),
    "llama_linear": (hf.LlamaConfig, dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0))),
    "llama_yarn": (hf.LlamaConfig, dict(rope_parameters=YARN)),
    "llama_yarn_betas": (hf.LlamaConfig, dict(rope_parameters=dict(YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.25))),
    "llama_biases": (hf.LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    "llama_head_dim": (hf.LlamaConfig, dict(head_dim=16)),
    "mistral_window": (hf.MistralConfig, dict(sliding_window=5)),
    "mistral_no_window": (hf.MistralConfig, dict(sliding_window=None, head_dim=16)),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen2_head_dim": (hf.Qwen2Config, dict(head_dim=16)),
    "qwen2_tied": (hf.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2_window": (hf.Qwen2Config, dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": (hf.Qwen3Config, dict(head_dim=16)),
    "qwen3_bias_window": (
        hf.Qwen3Config,
        dict(
            head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
    ),
    "mixtral": (hf.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
    "mixtral_window": (hf.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=5, tie_word_embeddings=True)),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True),
    ),
    "qwen3_moe_every_second": (
        hf.Qwen3MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, decoder_sparse_step=2, num_hidden_layers=4),
    ),
    "qwen3_moe_dense_first": (
        hf.Qwen3MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, mlp_only_layers=[0], norm_topk_prob=True),
    ),
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=20),
    ),
    "qwen2_moe_dense_first": (
        hf.Qwen2MoeConfig,
        dict(
            num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=16, mlp_only_layers=[0],
            norm_topk_prob=True, qkv_bias=False, head_dim=16,
        ),
    ),
    "deepseek_moe": (hf.DeepseekV3Config, DEEPSEEK),
    "deepseek_moe_no_groups": (
        hf.DeepseekV3Config,
        {**DEEPSEEK, **dict(n_group=1, topk_group=1, num_experts_per_tok=3, q_lora_rank=None, rope_interleave=False, attention_bias=True,
                            first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=1, routed_scaling_factor=1.0)},
    ),
    "deepseek_moe_yarn": (hf.DeepseekV3Config, {**DEEPSEEK, "rope_parameters": dict(YARN, mscale=0.7, mscale_all_dim=1.3)}),
    "deepseek_moe_yarn_all_dim": (hf.DeepseekV3Config, {**DEEPSEEK, "rope_parameters": dict(YARN, mscale_all_dim=1.0), "num_hidden_layers": 3}),
    "olmoe": (hf.OlmoeConfig, dict(num_experts=4, num_experts_per_tok=2)),
    "olmoe_normalized_bias": (hf.OlmoeConfig, dict(num_experts=5, num_experts_per_tok=3, norm_topk_prob=True, attention_bias=True)),
    "qwen3_moe_unnormalized": (
        hf.Qwen3MoeConfig,
        dict(
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=6,
        ),
    ),
}


def save_stock(name, folder, dtype=torch.float32, **save):
    cls, options = FAMILIES[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(cls(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            # Norms and biases away from 1 and 0, matrices large enough that positions, windows and routes matter.
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in key else 0.0))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model = model.to(dtype)
    model.save_pretrained(folder, **save)
    return model


def load_ours(folder):
    config = read_config(folder)
    model = Transformer(config)
    model.load_state_dict(dict(read_tensors(folder, config)), strict=True)
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def random_tokens(shape=(2, 21), seed=1):
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_read_model_computes_what_transformers_computes(name, tmp_path):
    stock = save_stock(name, tmp_path)
    ours, tokens = load_ours(tmp_path), random_tokens()
    difference = (logits(ours, tokens) - logits(stock, tokens)).abs().max().item()
    print(f"{name}: max |difference| {difference:.1e}")
    assert difference <= 1e-5
    assert sum(p.numel() for p in ours.parameters()) == ours.config.num_params()


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_equal(name, tmp_path):
    """Read, write, and compare every tensor of the files, and the logits of both folders in transformers (a loaded model's last bits may differ
    from those of one that was just made)."""
    save_stock(name, tmp_path / "a")
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    config = read_config(tmp_path / "a")
    write_model(tmp_path / "b", config, read_tensors(tmp_path / "a", config))
    before, after = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(logits(again, random_tokens()), logits(stock, random_tokens()))
    assert read_config(tmp_path / "b") == config


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_moe"])
def test_a_step_of_training_loses_nothing(name, tmp_path):
    """Import, a step, export: the same tensors as before, the trained values bit for bit, what the step did not touch as it was, and transformers
    computes what we do."""
    save_stock(name, tmp_path / "a")
    model = load_ours(tmp_path / "a").train()
    tokens = random_tokens() % 30
    output = model(tokens, labels=tokens.roll(-1, 1), context=TokenContext(keys=torch.arange(tokens.numel())))
    factors = coefficients(model.config, None)
    (output.loss_sum / tokens.numel() + sum(factors[n][0] * v for r in output.reports for n, v in r.losses.items())).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    write_model(tmp_path / "b", model.config, model.named_parameters())
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "b"))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    frozen = {key for key in before if key.endswith("e_score_correction_bias")}
    idle = {k for k in before if ".experts." in k and int(k.split(".experts.")[1].split(".")[0]) in unused(output, int(k.split(".")[2]))}
    assert frozen <= same <= frozen | idle
    rows = [torch.equal(x, y) for x, y in zip(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])]
    assert [i for i, kept in enumerate(rows) if kept] == sorted(set(range(SIZES["vocab_size"])) - set(tokens.flatten().tolist()))
    trained = dict(model.named_parameters())
    assert all(torch.equal(tensor, trained[key]) for key, tensor in read_tensors(tmp_path / "b", model.config))
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(stock) is type(hf.AutoModelForCausalLM.from_config(FAMILIES[name][0](**{**SIZES, **FAMILIES[name][1]})))
    assert (logits(stock, random_tokens()) - logits(model.eval(), random_tokens())).abs().max() <= 1e-5


def unused(output, layer):
    """Experts of a layer that no token took; none of a dense layer."""
    stats = output.reports[layer].stats
    return (stats["load"] == 0).nonzero().flatten().tolist() if stats else []


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_sharded_and_fused_files(name, tmp_path):
    stock = save_stock(name, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.allclose(logits(load_ours(tmp_path / "sharded"), random_tokens()), logits(stock, random_tokens()), rtol=0, atol=1e-5)
    save_stock(name, tmp_path / "fused", save_original_format=False)
    config = read_config(tmp_path / "fused")
    if config.moe is not None:
        assert any(k.endswith("experts.gate_up_proj") for k in load_file(tmp_path / "fused" / "model.safetensors"))
    a, b = dict(read_tensors(tmp_path / "sharded", config)), dict(read_tensors(tmp_path / "fused", config))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # Our own shards: small ones, the same tensors.
    files = write_model(tmp_path / "ours", config, a.items(), max_shard_bytes=20_000)
    shards = [f for f in files if f.suffix == ".safetensors"]
    assert len(shards) > 2 and all(f.stat().st_size < 25_000 for f in shards)
    c = dict(read_tensors(tmp_path / "ours", config))
    assert all(torch.equal(a[k], c[k]) for k in a)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), random_tokens()), logits(stock, random_tokens()))


def test_dtypes(tmp_path):
    save_stock("qwen2", tmp_path / "a", torch.bfloat16)
    config = read_config(tmp_path / "a")
    assert {t.dtype for _, t in read_tensors(tmp_path / "a", config)} == {torch.bfloat16}
    write_model(tmp_path / "same", config, read_tensors(tmp_path / "a", config))
    write_model(tmp_path / "half", config, read_tensors(tmp_path / "a", config), dtype=torch.float16)
    for folder, dtype in (("same", torch.bfloat16), ("half", torch.float16)):
        assert {t.dtype for t in load_file(tmp_path / folder / "model.safetensors").values()} == {dtype}
        assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto").dtype == dtype


# -------------------------------------------------------------------------------------------------------------------- config


def write_config(folder, **raw):
    folder.mkdir(exist_ok=True)
    base = dict(SIZES, model_type="llama", rms_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps({**base, **raw}))
    return folder


def test_transformers_4_and_5_spellings_are_the_same_config(tmp_path):
    old = dict(LLAMA3)
    theta = old.pop("rope_theta")
    a = read_config(write_config(tmp_path, rope_theta=theta, rope_scaling=old, torch_dtype="bfloat16"))
    b = read_config(write_config(tmp_path, rope_parameters=LLAMA3, dtype="bfloat16"))
    c = read_config(write_config(tmp_path, rope_parameters={"full_attention": LLAMA3}))
    legacy = dict(old, type=old["rope_type"])
    del legacy["rope_type"]
    d = read_config(write_config(tmp_path, rope_theta=theta, rope_scaling=legacy))
    assert a == b == c == d and a.rope_theta == 5e5 and a.rope_scaling.low_freq_factor == 1.0
    plain = [
        read_config(write_config(tmp_path, **raw))
        for raw in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    ]
    assert all(p == plain[0] for p in plain) and plain[0].rope_scaling is None and plain[0].rope_theta == 1e4


def test_sliding_windows_of_every_spelling(tmp_path):
    def window(**raw):
        config = read_config(write_config(tmp_path, **raw))
        return config.sliding_window, config.sliding_layers

    assert window(model_type="mistral") == (4096, None)  # the default of transformers' MistralConfig
    assert window(model_type="mistral", sliding_window=None) == (None, None)
    assert window(model_type="mistral", sliding_window=7) == (7, None)
    assert window(model_type="qwen2", sliding_window=7) == (None, None)
    assert window(model_type="qwen2", sliding_window=7, use_sliding_window=True) == (None, None)  # from layer 28 on
    assert window(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=1) == (7, [1])
    assert window(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=0) == (7, None)
    types = ["sliding_attention", "full_attention"]
    assert window(model_type="qwen3", sliding_window=7, use_sliding_window=True, max_window_layers=2, layer_types=types) == (7, [0])
    assert window(
        model_type="qwen3_moe", sliding_window=7, use_sliding_window=True, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
    ) == (7, None)


REFUSED = {
    "model_type": (dict(model_type="gpt2"), "model_type is 'gpt2'; supported: llama"),
    "act": (dict(hidden_act="gelu"), "hidden_act is 'gelu'; supported: 'silu'"),
    "dropout": (dict(attention_dropout=0.1), "attention_dropout is 0.1"),
    "rope": (
        dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type is 'dynamic'; supported: default, linear, llama3, yarn",
    ),
    "mrope": (dict(rope_parameters={"rope_type": "default", "mrope_section": [1, 2]}), "mrope_section"),
    "mscale": (dict(rope_scaling={"type": "yarn", "factor": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0}), "mscale"),
    "two ropes": (
        dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "linear", "factor": 3.0}),
        "give one of them",
    ),
    "two thetas": (dict(rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 2.0}), "rope_theta"),
    "ropes per layer": (
        dict(rope_parameters={"a": {"rope_type": "default"}, "b": {"rope_type": "linear", "factor": 2.0}}),
        "differs between kinds",
    ),
    "partial": (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "no factor": (dict(rope_scaling={"type": "linear"}), "factor is missing"),
    "layer_types": (dict(model_type="qwen3", layer_types=["chunked_attention", "full_attention"]), "chunked_attention"),
    "layer_types count": (dict(model_type="qwen3", layer_types=["full_attention"]), "1 entries for num_hidden_layers 2"),
    "window unused": (dict(model_type="qwen3", layer_types=["full_attention", "sliding_attention"]), "use_sliding_window"),
    "mistral mix": (
        dict(model_type="mistral", sliding_window=4, layer_types=["full_attention", "sliding_attention"]),
        "one kind of attention",
    ),
    "bias": (dict(model_type="mistral", attention_bias=True), "attention_bias is True"),
    "quantized": (dict(quantization_config={"bits": 4}), "quantization_config"),
    "kv heads": (dict(num_key_value_heads=3), "num_heads (4) must be a multiple of model.num_kv_heads (3)"),
    "type": (dict(hidden_size="32"), "hidden_size"),
    "dense layers": (
        dict(model_type="qwen3_moe", mlp_only_layers=[0, 1], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
        "mlp_only_layers ([0, 1]) leave no sparse layer",
    ),
    "qwen2_moe window": (dict(model_type="qwen2_moe", use_sliding_window=True), "use_sliding_window is True; supported for qwen2_moe: false"),
    "deepseek kv heads": (dict(model_type="deepseek_v3"), "num_key_value_heads is 2; latent attention has as many as heads (4)"),
    "deepseek groups": (
        dict(model_type="deepseek_v3", num_key_value_heads=4, num_experts_per_tok=4, topk_group=4), "num_experts_per_tok is 4 with topk_group 4",
    ),
    "deepseek dense": (dict(model_type="deepseek_v3", num_key_value_heads=4, first_k_dense_replace=2), "leaves none of 2 layers sparse"),
    "deepseek v2": (dict(model_type="deepseek_v3", num_key_value_heads=4, scoring_func="softmax"), "scoring_func is 'softmax'"),
    "missing": (dict(vocab_size=None), "vocab_size is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case, tmp_path):
    raw, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        read_config(write_config(tmp_path, **raw))
    assert message in str(error.value) and "config.json" in str(error.value)


def test_broken_config_files(tmp_path):
    for text, message in (("", "not valid JSON"), ("[1]", "must be a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path)
    with pytest.raises(ValueError, match="can't be read"):
        read_config(tmp_path / "nowhere")


def test_our_key_must_agree_with_the_rest(tmp_path):
    """A tool that edits config.json after export must not be overruled in silence."""
    config = small(moe=MoEConfig(num_experts=4, expert_dim=8, router=TopKRouter(top_k=2, balance_coef=0.5)))
    write_model(tmp_path / "a", config, weights(config))
    assert read_config(tmp_path / "a") == config  # with balance_coef, which no stock key holds
    path = tmp_path / "a" / "config.json"
    raw = json.loads(path.read_text())
    for key, value, message in (("rope_theta", 7.0, "rope_theta is 10000.0"), ("num_experts_per_tok", 3, "moe.router.top_k is 2")):
        path.write_text(json.dumps({**raw, key: value}))
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / "a")


# -------------------------------------------------------------------------------------------------------------------- tensors


def change_file(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def read_all(folder):
    return dict(read_tensors(folder, read_config(folder)))


def test_missing_and_extra_keys_are_errors(tmp_path):
    save_stock("mixtral", tmp_path)
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    change_file(tmp_path, lambda t: t.pop(key))
    with pytest.raises(ValueError, match=rf"missing 1: {key}$"):
        read_all(tmp_path)
    save_stock("mixtral", tmp_path)
    change_file(tmp_path, lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="not used 1: model.layers.0.extra.weight"):
        read_all(tmp_path)
    # An expert too many, and a layer too many.
    save_stock("mixtral", tmp_path)
    change_file(tmp_path, lambda t: t.update({"model.layers.1.block_sparse_moe.experts.4.w1.weight": torch.zeros(48, 32)}))
    with pytest.raises(ValueError, match="not used 1"):
        read_all(tmp_path)


def test_copies_that_say_nothing_new_are_left_out(tmp_path):
    save_stock("llama_tied", tmp_path)
    names = set(read_all(tmp_path))
    change_file(
        tmp_path,
        lambda t: t.update(
            {"lm_head.weight": t["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    assert set(read_all(tmp_path)) == names
    save_stock("llama", tmp_path)
    change_file(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head.weight; tie_word_embeddings"):
        read_all(tmp_path)


def test_shapes_and_dtypes_are_checked(tmp_path):
    save_stock("llama", tmp_path)
    change_file(tmp_path, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(47, 32)}))
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \[47, 32\], config.json makes it \[48, 32\]"):
        read_all(tmp_path)
    save_stock("llama", tmp_path)
    change_file(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    with pytest.raises(ValueError, match="dtype I8"):
        read_all(tmp_path)


def test_strange_folders(tmp_path):
    stock = save_stock("llama", tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    for name in ("../secret.safetensors", "/etc/secret.safetensors", "sub/a.safetensors", "a\\b.safetensors", "model.bin"):
        index.write_text(json.dumps({**raw, "weight_map": {**raw["weight_map"], "x": name}}))
        with pytest.raises(ValueError, match="no plain name"):
            read_all(tmp_path)
    index.write_text(json.dumps({**raw, "weight_map": {**raw["weight_map"], "x": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="gone.safetensors: does not exist"):
        read_all(tmp_path)
    index.write_text(json.dumps(raw))
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    os.truncate(first, first.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{first.name}: can't be read as safetensors"):
        read_all(tmp_path)
    for path in [index, *tmp_path.glob("*.safetensors")]:
        path.unlink()
    with pytest.raises(ValueError, match="has neither"):
        read_all(tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*save_pretrained"):
        read_all(tmp_path)


# --------------------------------------------------------------------------------------------------------------------- export


def small(**options):
    return ModelConfig(
        **{
            **dict(
                vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=32, max_position_embeddings=64
            ),
            **options,
        }
    )


def weights(config, seed=0):
    model = Transformer(config)
    init_weights(model, seed)
    return [(n, p.detach()) for n, p in model.named_parameters()]


LATENT = MLAConfig(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)


def test_architecture_by_features():
    topk = lambda **o: MoEConfig(num_experts=4, expert_dim=8, router=TopKRouter(top_k=2, **o))  # noqa: E731
    some = lambda moe: moe.model_copy(update={"layers": [1]})  # noqa: E731
    sigmoid = MoEConfig(num_experts=4, expert_dim=8, router=SigmoidSteRouter())
    v3 = dict(num_experts=4, expert_dim=8, router=TopKRouter(top_k=2, score="sigmoid", selection_bias=True), shared=SharedConfig(dim=16))
    deepseek = lambda **o: small(num_kv_heads=None, mla=LATENT, moe=MoEConfig(**{**v3, **o}))  # noqa: E731
    table = [
        (small(), "llama"),
        (small(qkv_bias=True, o_bias=True, mlp_bias=True), "llama"),
        (small(sliding_window=4), "mistral"),
        (small(num_heads=3, num_kv_heads=1, head_dim=16), "mistral"),  # LlamaConfig refuses 32 / 3
        (small(qkv_bias=True), "qwen2"),
        (small(qkv_bias=True, sliding_window=4, sliding_layers=[0]), "qwen2"),
        (small(qk_norm=True), "qwen3"),
        (small(sliding_window=4, sliding_layers=[0]), "moetrain"),
        (small(o_bias=True), "moetrain"),
        (small(qk_norm=True, mlp_bias=True), "moetrain"),
        (small(moe=topk()), "mixtral"),
        (small(moe=topk(output_scale=2.0)), "mixtral"),
        (small(moe=topk(normalize=False)), "moetrain"),
        (small(moe=topk(normalize=False), qk_norm=True), "qwen3_moe"),
        (small(moe=topk(), qk_norm=True, qk_norm_over="all"), "olmoe"),
        (small(moe=some(topk())), "moetrain"),
        (small(moe=some(topk()), qk_norm=True), "qwen3_moe"),
        (small(moe=some(topk()), qk_norm=True, qk_norm_over="all"), "moetrain"),
        (small(moe=topk(), qk_norm=True, qk_norm_over="all", head_dim=16), "moetrain"),  # OLMoE's norm is as wide as the model
        (small(moe=topk(), qk_norm=True, qk_norm_over="all", sliding_window=4), "moetrain"),
        (small(qk_norm=True, qk_norm_over="all"), "moetrain"),
        (small(moe=topk(), qk_norm=True, qkv_bias=True), "moetrain"),
        (small(moe=topk(), sliding_window=4, sliding_layers=[1]), "moetrain"),
        (small(moe=sigmoid, qk_norm=True), "moetrain"),
        # What acts in training alone changes nothing.
        (small(moe=topk(jitter=0.1, noise=True, second="random", capacity_factor=1.0, cv_coef=0.1, balance_over="sequence")), "mixtral"),
        (small(moe=topk(capacity_factor=1.0, normalize=False), qk_norm=True), "qwen3_moe"),
        (small(moe=topk(score="sigmoid")), "moetrain"),
        (small(moe=topk(score="sigmoid", selection_bias=True, num_groups=2)), "moetrain"),
        (small(moe=topk(gate="mlp")), "moetrain"),
        (small(moe=topk(normalize=False).model_copy(update={"shared": SharedConfig(dim=8, combine="gate")})), "qwen2_moe"),
        (small(moe=some(topk()).model_copy(update={"shared": SharedConfig(dim=8, combine="gate")}), qkv_bias=True), "qwen2_moe"),
        (small(moe=topk().model_copy(update={"shared": SharedConfig(dim=8)})), "moetrain"),
        (small(moe=topk().model_copy(update={"shared": SharedConfig(dim=8, combine="gate")}), qk_norm=True), "moetrain"),
        (deepseek(), "deepseek_v3"),
        (deepseek(layers=[1]), "deepseek_v3"),
        (deepseek(layers=[0]), "moetrain"),
        (deepseek(shared=None), "moetrain"),
        (deepseek(shared=SharedConfig(dim=12)), "moetrain"),
        (deepseek(router=TopKRouter(top_k=2, score="sigmoid")), "moetrain"),
        (deepseek(router=TopKRouter(top_k=2, score="sigmoid", selection_bias=True, num_groups=2, top_groups=2)), "moetrain"),
        (deepseek(router=SigmoidSteRouter()), "moetrain"),
        (small(num_kv_heads=None, mla=LATENT), "moetrain"),
        (small(moe=topk(gate="cosine"), qk_norm=True), "moetrain"),
    ]
    for config, expected in table:
        assert architecture(config) == expected, config


def test_output_scale_goes_into_the_experts(tmp_path):
    """LLaMA-MoE's E / k: transformers, which has no such scale, computes the same; the config in the folder says 1."""
    config = small(moe=MoEConfig(num_experts=4, expert_dim=8, router=TopKRouter(top_k=2, output_scale=3.0)), init_std=0.2)
    model = Transformer(config)
    init_weights(model, 0)
    write_model(tmp_path / "a", config, model.named_parameters())
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert (logits(stock, random_tokens()) - logits(model, random_tokens())).abs().max() <= 1e-5
    assert read_config(tmp_path / "a").moe.router.output_scale == 1.0
    assert (logits(load_ours(tmp_path / "a"), random_tokens()) - logits(model, random_tokens())).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("router", "stock", "features"),
    [
        (dict(top_k=1, jitter=0.1, capacity_factor=1.0, normalize=False), "Qwen3MoeForCausalLM", dict(qk_norm=True)),
        (dict(top_k=2, second="random", capacity_factor=1.0, balance_count="first"), "MixtralForCausalLM", {}),
        (dict(top_k=2, noise=True, cv_coef=0.01, output_scale=2.0), "MixtralForCausalLM", {}),
    ],
    ids=["switch", "gshard", "noisy"],
)  # fmt: skip
def test_what_acts_in_training_alone_exports_to_stock(router, stock, features, tmp_path):
    """The stock architecture computes our evaluation's logits; the folder read back keeps the options, and the noise's weights start at 0."""
    config = small(moe=MoEConfig(num_experts=4, expert_dim=8, router=TopKRouter(**router)), init_std=0.2, **features)
    model = Transformer(config).eval()
    init_weights(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "router" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    write_model(tmp_path / "a", config, model.named_parameters())
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(theirs).__name__ == stock
    assert (logits(theirs, random_tokens()) - logits(model, random_tokens())).abs().max() <= 1e-5
    ours = load_ours(tmp_path / "a")
    assert ours.config.moe.router == TopKRouter(**router | {"output_scale": 1.0})
    assert (logits(ours, random_tokens()) - logits(model, random_tokens())).abs().max() <= 1e-5
    assert not any(p.any() for n, p in ours.named_parameters() if n.endswith("router.noise"))


def test_the_selection_bias_stays_float32(tmp_path):
    """In a bfloat16 folder, where a step of 0.001 on a bias of 1 would be lost; also as transformers loads it in bfloat16."""
    router = TopKRouter(top_k=2, score="sigmoid", selection_bias=True)
    config = small(moe=MoEConfig(num_experts=4, expert_dim=8, router=router))
    model = Transformer(config)
    init_weights(model, 0)
    name = "layers.1.ffn.router.selection_bias"
    bias = dict(model.named_parameters())[name]
    bias.data.copy_(torch.tensor([1.001, -0.003, 0.5, 0.1234567]))
    write_model(tmp_path / "a", config, model.named_parameters(), dtype=torch.bfloat16)
    read = dict(read_tensors(tmp_path / "a", config))
    assert torch.equal(read[name], bias) and read["embed.weight"].dtype == torch.bfloat16
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True, dtype=torch.bfloat16)
    assert torch.equal(theirs.model.layers[1].mlp.gate.selection_bias, bias) and theirs.lm_head.weight.dtype == torch.bfloat16


def test_a_stock_folder_whose_own_config_says_another_router_is_refused(tmp_path):
    config = small(moe=MoEConfig(num_experts=4, expert_dim=8, router=TopKRouter(top_k=2)))
    model = Transformer(config)
    init_weights(model, 0)
    write_model(tmp_path / "a", config, model.named_parameters())
    file = tmp_path / "a" / "config.json"
    raw = json.loads(file.read_text())
    for key, value in (("score", "sigmoid"), ("gate", "cosine")):
        changed = json.loads(json.dumps(raw))
        changed["moetrain"]["moe"]["router"][key] = value
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"moe.router.{key} is {value}"):
            read_config(tmp_path / "a")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    config = small()
    given = weights(config)

    def interrupted():
        yield from given[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "a", config, interrupted())
    for wrong, message in (
        (given[:-1], "1 tensors were not given: head.weight"),
        (given + given[:1], "given twice"),
        (given + [("x", torch.zeros(1))], "no parameter"),
        ([(n, t[:1]) for n, t in given], "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            write_model(tmp_path / "a", config, wrong)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    write_model(tmp_path / "a", config, given)  # an empty folder is no loss
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_model(tmp_path / "a", config, given)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}


def test_tokenizer_and_special_tokens(tmp_path):
    config = small(vocab_size=259)
    write_model(tmp_path / "a", config, weights(config), tokenizer=load_tokenizer("byte"))
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "a"), hf.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (256, 257, 258)
    assert model.generation_config.eos_token_id == 257
    assert tokenizer("ab")["input_ids"] == [97, 98]
    write_model(tmp_path / "b", config, weights(config))
    assert hf.AutoConfig.from_pretrained(tmp_path / "b").eos_token_id is None  # and not LlamaConfig's 2


def test_stored_config_is_complete(tmp_path):
    """Every field comes back, those that no Hugging Face key holds too."""
    router = SigmoidSteRouter(
        threshold=0.4,
        ste="sampled",
        probe_rate=0.5,
        zero_routes="top1",
        sparsity_coef=0.2,
        target_active=2.0,
        bias=True,
        bias_init=1.0,
        input="residual",
    )
    config = small(
        moe=MoEConfig(num_experts=4, expert_dim=8, router=router), sliding_window=3, sliding_layers=[1], qk_norm=True, init_std=0.07,
        rope_scaling=RopeScaling(type="yarn", factor=2.0, original_max_position_embeddings=32),
    )  # fmt: skip
    write_model(tmp_path / "a", config, weights(config))
    assert to_dict(read_config(tmp_path / "a")) == to_dict(config)
    assert set(read_all(tmp_path / "a")) == set(parameter_shapes(config))
