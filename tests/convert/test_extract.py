"""A model whose experts go by task: what transformers computes of it, and each task's dense model, against the mixture's own logits."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from moetrain.config import GenerateConfig, TaskRouter
from moetrain.convert.extract import task_config, task_tensors
from moetrain.convert.huggingface import read_config, read_tensors, write_model
from moetrain.generate import generate
from moetrain.model import Transformer
from moetrain.moe.routing import TokenContext
from tests.moe.routers.test_task import BRANCHES, model_of

ROUTERS = {
    "branches": BRANCHES,
    "tasks": TaskRouter(tasks=["zh", "de", "en"], top_k=3),
    "plain": TaskRouter(tasks=["zh", "en", "de"], top_k=2, normalize=False),
}


def logits_of(model, tokens, names):
    tags = torch.tensor([model.config.moe.router.tag_names().index(n) for n in names]).repeat_interleave(tokens.shape[1])
    return model(tokens, context=TokenContext(tags=tags)).logits


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_transformers_computes_the_mixture(name, tmp_path):
    ours = model_of(ROUTERS[name]).double().eval()
    write_model(tmp_path / "model", ours.config, ours.named_parameters())
    assert read_config(tmp_path / "model") == ours.config
    for key, tensor in read_tensors(tmp_path / "model", ours.config):
        assert torch.equal(tensor, ours.get_parameter(key))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float64).eval()
    tokens = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = logits_of(ours, tokens, ["de", "en", "zh"])
    assert (theirs(tokens, task=["de", "en", "zh"]).logits - expected).abs().max() <= 1e-10
    with pytest.raises(ValueError, match="task is None; give forward or generate one of"):
        theirs(tokens)
    theirs.config.task = "en"
    assert (theirs(tokens).logits - logits_of(ours, tokens, ["en"] * 3)).abs().max() <= 1e-10
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(tokens))
    for task in ("de", "zh"):
        text = theirs.generate(tokens, task=task, **options)
        assert torch.equal(text, generate(ours, tokens, GenerateConfig(max_new_tokens=8, task=task)))


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_a_tasks_dense_model_computes_what_the_mixture_does(name, tmp_path):
    """As a stock LLaMA; tensors in the order of a checkpoint, where experts come before their router."""
    ours = model_of(ROUTERS[name]).double().eval()
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
    for task in ("de", "en", "zh"):
        config = task_config(ours.config, task)
        count = len(BRANCHES.branches[task]) if name == "branches" else ROUTERS[name].top_k
        assert config.moe is None and config.intermediate_size == 4 * count
        write_model(tmp_path / task, config, task_tensors(ours.config, sorted(ours.named_parameters()), task))
        dense = Transformer(config).double()
        dense.load_state_dict(dict(read_tensors(tmp_path / task, config)))
        assert (dense(tokens).logits - logits_of(ours, tokens, [task] * 2)).abs().max() <= 1e-12
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / task, dtype=torch.float64)
        assert type(theirs).__name__ == "LlamaForCausalLM"
        assert (theirs(tokens).logits - dense(tokens).logits).abs().max() <= 1e-5  # its rotary tables are float32


def test_what_has_no_tasks():
    config = model_of().config
    with pytest.raises(ValueError, match=r"export.task \(fr\): is no task of the model; one of de, en, zh"):
        task_config(config, "fr")
    with pytest.raises(ValueError, match="only a model with router.type: task"):
        task_config(config.model_copy(update={"moe": None}), "de")
