"""Experts by task: weights per task, what is asked for and refused; the tags that training, evaluation and generation give."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import GenerateConfig, ModelConfig, MoEConfig, TaskRouter
from moetrain.generate import generate
from moetrain.microbatch import source_tags
from moetrain.model import Transformer, init_weights
from moetrain.moe.routing import TokenContext
from tests.moe.test_layer import compare, model_config, pair

BRANCHES = TaskRouter(branches={"de": [4], "en": [1, 2], "zh": [0, 1, 2, 3]})


def tokens(count: int, hidden: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_learned_gate(normalize):
    """Every token of a task alike, whatever it is; the gradient of the task's logits is that of softmax, and other tasks have none."""
    ours, _ = pair(model_config(TaskRouter(tasks=["b", "a", "c"], normalize=normalize)))
    context = TokenContext(tags=torch.tensor([0, 1, 1, 0, -1]), valid=torch.tensor([True] * 4 + [False]))
    weights = ours.router(tokens(5), context).weights
    logits = ours.router.weight.detach().clone().requires_grad_()
    s = torch.softmax(logits, -1)
    best = s.topk(2).indices
    wanted = s * torch.zeros_like(s).scatter(1, best, 1)
    wanted = wanted / wanted.sum(-1, keepdim=True) if normalize else wanted
    torch.testing.assert_close(weights[:4], wanted[[0, 1, 1, 0]], rtol=1e-13, atol=0)
    assert not weights[4].any()
    grad = tokens(4, 5)
    (weights[:4] * grad).sum().backward()
    (wanted[[0, 1, 1, 0]] * grad).sum().backward()
    torch.testing.assert_close(ours.router.weight.grad, logits.grad, rtol=1e-12, atol=1e-14)
    assert not ours.router.weight.grad[2].any()


def test_fixed_branches():
    ours, _ = pair(model_config(BRANCHES))
    assert not list(ours.router.parameters()) and not ours.router(tokens(2), TokenContext(tags=torch.tensor([0, 1]))).losses
    weights = ours.router(tokens(3), TokenContext(tags=torch.tensor([2, 0, 1]))).weights
    assert weights.tolist() == [[0.25, 0.25, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.5, 0.5, 0.0, 0.0]]


def test_one_and_256_experts_and_equal_logits():
    for experts in (1, 256):
        ours, loop = pair(model_config(TaskRouter(tasks=["a", "b"], top_k=1, normalize=False), num_experts=experts, expert_dim=2))
        compare(ours, loop, tokens(6), TokenContext(tags=torch.arange(6) % 2), tokens(6))
    with torch.no_grad():
        ours.router.weight.zero_()
    active = ours.router(tokens(2), TokenContext(tags=torch.tensor([0, 1]))).decision.active
    assert active[:, 0].all() and active.sum() == 2


def test_a_token_of_no_task_is_refused():
    ours, _ = pair(model_config(BRANCHES))
    with pytest.raises(ValueError, match="which task the text is of is not known; name one of de, en, zh"):
        ours.router(tokens(2), TokenContext())


def model_of(router=BRANCHES) -> Transformer:
    moe = MoEConfig(num_experts=5, expert_dim=4, router=router)
    config = ModelConfig(vocab_size=31, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, max_position_embeddings=40, moe=moe)
    model = Transformer(config)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    return model


def test_tags_of_sources():
    config, cpu = model_of().config, torch.device("cpu")
    assert source_tags(config, ["zh", "xx", "de"], cpu).tolist() == [2, -1, 0]
    assert source_tags(model_of(TaskRouter(tasks=["zh", "de"])).config, ["zh", "xx", "de"], cpu).tolist() == [0, -1, 1]
    assert source_tags(config.model_copy(update={"moe": None}), ["zh"], cpu) is None


@torch.no_grad()
def test_generation_is_the_argmax_of_full_passes_of_the_task():
    model = model_of().eval()
    prompt = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(1))
    found = {}
    for tag, name in enumerate(["de", "en", "zh"]):
        found[name] = generate(model, prompt, GenerateConfig(max_new_tokens=12, task=name))
        text = prompt
        for _ in range(12):
            context = TokenContext(tags=torch.full((text.numel(),), tag))
            text = torch.cat((text, model(text, context=context).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(found[name], text)
    assert not torch.equal(found["de"], found["zh"])
    for task in (None, "fr"):
        with pytest.raises(ValueError, match=r"generate.task .* must be one of the model's tasks, de, en, zh"):
            generate(model, prompt, GenerateConfig(task=task))
    dense = Transformer(model.config.model_copy(update={"moe": None}))
    init_weights(dense, 0)
    with pytest.raises(ValueError, match=r"generate.task \(de\) has an effect only with"):
        generate(dense, prompt, GenerateConfig(task="de"))
