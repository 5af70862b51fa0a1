"""Continue a prompt, one token at a time, with a key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.attention import KVCache
from moetrain.config import GenerateConfig, ModelConfig, TaskRouter
from moetrain.model import Transformer
from moetrain.moe.routing import TokenContext


@torch.no_grad()
def generate(
    model: Transformer, tokens: Tensor, config: GenerateConfig, eos_id: int | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Continuations of `tokens`.

    tokens: (B, S) int64, prompts of one length, S >= 1. eos_id: a row ends with it and is filled up with it; None: only the length ends it.
    dtype: of the activations; None: that of the embedding. Returns (B, S + N) int64 with N <= config.max_new_tokens. Random draws come from
    `config.seed` alone. ValueError if the prompt is empty, or longer with the new tokens than the model's positions, or `config.task` is needed
    and missing or no task of the model.
    """
    B, S = tokens.shape
    tag = task_tag(model.config, config.task)
    limit = model.config.max_position_embeddings
    if S == 0:
        raise ValueError("generate: the prompt has no token; give a prompt, or a tokenizer with a bos token")
    if S + config.max_new_tokens > limit:
        raise ValueError(
            f"generate.max_new_tokens ({config.max_new_tokens}) and the prompt's {S} tokens are more than "
            f"max_position_embeddings ({limit}); at most {max(0, limit - S)} can be added"
        )
    was_training = model.training
    model.eval()
    try:
        cache = KVCache(model.config, B, S + config.max_new_tokens, dtype=dtype or model.embed.weight.dtype, device=tokens.device)
        # On the CPU, so that a seed gives the same draws whatever device the model is on.
        generator = torch.Generator("cpu").manual_seed(config.seed)
        ended = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        fresh = tokens
        for _ in range(config.max_new_tokens):
            context = None if tag is None else TokenContext(tags=torch.full((fresh.numel(),), tag, device=tokens.device))
            logits = model(fresh, cache=cache, dtype=dtype, context=context).logits[:, -1]
            fresh = sample(logits, config.temperature, config.top_p, generator)[:, None]
            if eos_id is not None:
                fresh = torch.where(ended[:, None], eos_id, fresh)
                ended |= fresh[:, 0] == eos_id
            tokens = torch.cat((tokens, fresh), dim=1)
            if ended.all():
                break
        return tokens
    finally:
        model.train(was_training)


def task_tag(config: ModelConfig, task: str | None) -> int | None:
    """The tag of `generate.task`; None where the router asks for none. ValueError if it is missing, of no use, or no task of the model."""
    router = None if config.moe is None else config.moe.router
    if not isinstance(router, TaskRouter):
        if task is not None:
            raise ValueError(f"generate.task ({task}) has an effect only with model.moe.router.type: task; leave it out")
        return None
    names = router.tag_names()
    if task not in names:
        raise ValueError(f"generate.task ({task}): must be one of the model's tasks, {', '.join(names)}")
    return names.index(task)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row: (B, V) float logits -> (B,) int64.

    temperature 0 takes the likeliest; else a draw from the smallest set of likeliest tokens that holds `top_p` of
    softmax(logits / temperature) (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # The largest logit is taken off first: a small temperature would overflow otherwise.
    shifted = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities, order = shifted.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0)
    kept[:, 0] = probabilities[:, 0]
    drawn = torch.multinomial(kept.cpu(), 1, generator=generator).to(order.device)
    return order.gather(-1, drawn)[:, 0]
