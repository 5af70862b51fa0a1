"""The receipt's numbers are what whole models give, computed without its streaming; it says where its tokens are from."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from moetrain.config import SigmoidSteRouter, TopKRouter, UpcycleConfig
from moetrain.convert.huggingface import read_config
from moetrain.convert.receipt import SAMPLE_TEXT, compare, sample_tokens
from moetrain.convert.upcycle import upcycle
from moetrain.data.tokenizer import ByteTokenizer, save_tokenizer
from tests.convert.test_huggingface import load_ours, save_stock


@pytest.mark.parametrize("name", ["llama_llama3", "qwen2_window", "qwen3", "mistral_window", "qwen2_tied"])
@pytest.mark.parametrize("router", [SigmoidSteRouter(init_std=0.3), TopKRouter(top_k=2, init_std=0.3)])
def test_numbers(name, router, tmp_path):
    save_stock(name, tmp_path / "dense")
    method = "dsmoe" if isinstance(router, SigmoidSteRouter) else "llama_moe"
    report = upcycle(
        UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), num_experts=8, method=method, router=router, max_shard_bytes=9000)
    )
    tokens, _ = sample_tokens(tmp_path / "dense", read_config(tmp_path / "dense"))
    assert tokens.shape == (1, 64)
    seen = {}
    for folder in ("dense", "moe"):
        model, ffn, stream = load_ours(tmp_path / folder), [], []
        for block in model.layers:
            block.register_forward_hook(lambda _, __, output, stream=stream: stream.append(output[0]))
            block.ffn.register_forward_hook(lambda _, inputs, output, ffn=ffn: ffn.append((inputs, output)))
        with torch.no_grad():
            output = model(tokens)
        seen[folder] = (model, ffn, stream, output)

    def relative(a, b):
        return ((a - b).double().norm() / b.double().norm()).item()

    receipt, (dense, ffn, stream, old), (moe, _, new_stream, new) = report.receipt, seen["dense"], seen["moe"]
    assert receipt.logits == pytest.approx(relative(new.logits, old.logits), rel=1e-4)
    for i, row in enumerate(receipt.layers):
        with torch.no_grad():
            other = moe.layers[i].ffn(*ffn[i][0])[0]
        assert row["ffn"] == pytest.approx(relative(other, ffn[i][1][0]), rel=1e-4)
        assert row["hidden"] == pytest.approx(relative(new_stream[i], stream[i]), rel=1e-4)
        assert row["active"] == pytest.approx((new.reports[i].stats["load"].sum() / 64).item())
        assert row["empty"] == pytest.approx((new.reports[i].stats["empty"] / 64).item())
    for loss, output in zip(receipt.loss, (old, new)):
        assert loss == pytest.approx(F.cross_entropy(output.logits[0, :-1], tokens[0, 1:]).item(), rel=1e-4)
    mean = sum(row["active"] for row in receipt.layers) / 2
    assert receipt.activated == (dense.config.num_params(), moe.config.num_active_params(mean))
    assert receipt.flops_per_token == (dense.config.flops_per_token(64), moe.config.flops_per_token(64, mean))
    written = json.loads((tmp_path / "moe" / "receipt.json").read_text())
    assert written == {"method": method, **json.loads(json.dumps(receipt.to_dict()))}
    assert f"{receipt.logits:.2g}" in "\n".join(report.lines())


def test_same_model_differs_by_nothing(tmp_path):
    save_stock("llama", tmp_path / "dense", torch.bfloat16)
    config = read_config(tmp_path / "dense")
    receipt = compare(tmp_path / "dense", config, tmp_path / "dense", config)
    assert receipt.logits == 0 and receipt.loss[0] == receipt.loss[1] and {row["hidden"] for row in receipt.layers} == {0.0}


def test_sample(tmp_path):
    """The folder's tokenizer where it fits the model; else random ids that do, and why."""
    config = read_config(_saved(tmp_path / "dense"))
    ids, where = sample_tokens(tmp_path / "dense", config)
    assert ids.shape == (1, 64) and ids.max() < 61 and where == "random ids (no tokenizer.json)"
    save_tokenizer(ByteTokenizer(), tmp_path / "dense")
    assert sample_tokens(tmp_path / "dense", config)[1] == "random ids (its tokenizer has ids beyond vocab_size)"
    wide = config.model_copy(update={"vocab_size": 259, "max_position_embeddings": 2000})
    ids, where = sample_tokens(tmp_path / "dense", wide)
    assert where == "the sample text" and ids.shape == (1, 512)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    assert "can't be read" in sample_tokens(tmp_path / "dense", wide)[1]
    assert len(SAMPLE_TEXT.encode()) > 900


def test_skipped(tmp_path):
    _saved(tmp_path / "dense")
    report = upcycle(UpcycleConfig(dense=str(tmp_path / "dense"), output=str(tmp_path / "moe"), method="dsmoe", receipt=False))
    assert report.receipt is None and not (tmp_path / "moe" / "receipt.json").exists() and "receipt.json" not in report.files


def _saved(folder):
    save_stock("llama", folder)
    return folder
