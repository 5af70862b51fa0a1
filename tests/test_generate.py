"""Generation: greedy text is the argmax of full passes, draws follow the distribution and the seed, rows end at eos."""

from __future__ import annotations

import pytest
import torch

from moetrain.config import GenerateConfig, ModelConfig, MoEConfig, SigmoidSteRouter
from moetrain.generate import generate, sample
from moetrain.model import Transformer, init_weights


def make(**options):
    moe = MoEConfig(num_experts=4, expert_dim=8, router=SigmoidSteRouter())
    config = ModelConfig(
        vocab_size=31,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        init_std=0.3,
        sliding_window=6,
        moe=moe,
        **options,
    )
    model = Transformer(config)
    init_weights(model, 0)
    return model


def random_tokens(*shape):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_greedy_is_the_argmax_of_full_passes():
    model = make().train()
    tokens = random_tokens(3, 5)
    found = generate(model, tokens, GenerateConfig(max_new_tokens=15))
    assert model.training, "the mode is given back"
    model.eval()
    for _ in range(15):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, tokens)
    # A row does not depend on the others.
    assert torch.equal(generate(model, random_tokens(3, 5)[1:2], GenerateConfig(max_new_tokens=15)), found[1:2])


def test_rows_end_at_eos_and_are_filled_with_it():
    model, tokens = make(), random_tokens(3, 5)
    free = generate(model, tokens, GenerateConfig(max_new_tokens=12))
    eos = int(free[0, 8])
    ended = generate(model, tokens, GenerateConfig(max_new_tokens=12), eos)
    for row in range(3):
        places = (free[row, 5:] == eos).nonzero().flatten()
        stop = 5 + int(places[0]) + 1 if len(places) else 17
        stop = min(stop, ended.shape[1])
        assert torch.equal(ended[row, :stop], free[row, :stop]) and (ended[row, stop:] == eos).all()
    alone = generate(model, tokens[:1], GenerateConfig(max_new_tokens=12), eos)
    assert alone.shape[1] <= 9 and alone[0, -1] == eos


def test_seed_gives_the_draws():
    model, tokens = make(), random_tokens(2, 5)
    a, b, c = (generate(model, tokens, GenerateConfig(max_new_tokens=20, temperature=1.0, seed=s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 1.5]]).expand(20000, 5)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 1e-6)):
        expected = (logits[0].double() / temperature).softmax(0)
        order = expected.argsort(descending=True)
        kept, total = torch.zeros(5, dtype=torch.float64), 0.0
        for i in order:
            if total < top_p:
                kept[i] = expected[i]
                total += expected[i]
        kept /= kept.sum()
        drawn = sample(logits, temperature, top_p, torch.Generator().manual_seed(0))
        share = torch.bincount(drawn, minlength=5) / 20000
        assert (share - kept).abs().max() < 0.015 and (share[kept == 0] == 0).all()
    assert (sample(logits, 0.0, 1.0, torch.Generator()) == 2).all()
    assert (sample(logits, 1e-9, 1.0, torch.Generator().manual_seed(0)) == 2).all(), "a tiny temperature must not overflow"


def test_impossible_lengths():
    model = make()
    with pytest.raises(ValueError, match="prompt has no token"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), GenerateConfig())
    with pytest.raises(
        ValueError, match=r"max_new_tokens \(38\) and the prompt's 5 tokens are more than max_position_embeddings \(40\); at most 35"
    ):
        generate(model, random_tokens(1, 5), GenerateConfig(max_new_tokens=38))
    assert generate(model, random_tokens(1, 5), GenerateConfig(max_new_tokens=35)).shape == (1, 40)
