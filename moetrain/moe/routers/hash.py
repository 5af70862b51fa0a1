"""Hash layers (arXiv 2106.04426, from background knowledge of the paper): the experts of a token follow from its id alone."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor, nn

from moetrain.config import ConfigError, HashRouter, ModelConfig
from moetrain.files import read_json
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, recorded, uniform


@router_for(HashRouter)
class Hash(nn.Module):
    """k different experts for each token id, from a table; weight 1 / k each. Nothing is learned.

    The paper's MultiHash cuts experts into k parts with a hash each; here k whole experts are averaged.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, HashRouter), "needs a hash config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        # Numbers of experts as floats, so that the table is sharded, saved and loaded like any other parameter; never below float32.
        self.table = nn.Parameter(torch.empty(config.vocab_size, self.options.num_hashes), requires_grad=False)

    @staticmethod
    def start_value(config: ModelConfig, layer: int, part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """(V, k) float32. ConfigError if the file of frequencies can't be used."""
        assert config.moe is not None and isinstance(config.moe.router, HashRouter), "needs a hash config"
        options, experts = config.moe.router, config.moe.num_experts
        draws = uniform(torch.arange(shape[0], device="cpu") + options.seed * 0x632BE59BD9B4E019 % 2**62, layer, experts)
        if options.frequencies is None:
            return torch.sort(draws, dim=-1, stable=True).indices[:, : options.num_hashes].float()
        return balanced_table(read_counts(options.frequencies, shape[0]), draws, options.num_hashes)

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D), only counted. context.tokens: token ids. No losses."""
        assert context.tokens is not None, "the model gives the token ids"
        decision: Decision = recorded(lambda: self.decide(context))
        weights = decision.active.to(torch.promote_types(x.dtype, torch.float32)) / self.options.num_hashes
        return Routing(decision, weights)

    def decide(self, context: TokenContext) -> Decision:
        chosen = self.table.detach()[context.tokens].long()
        active = torch.zeros(len(chosen), self.num_experts, dtype=torch.bool, device=chosen.device).scatter(-1, chosen, True)
        return Decision(active if context.valid is None else active & context.valid[:, None])


def balanced_table(counts: list[float], draws: Tensor, num_hashes: int) -> Tensor:
    """(V, k) float32: from the most frequent id to the rarest, each gets the k experts that have the fewest tokens so far.

    counts: of each id. draws: (V, E); what is equal goes by them, so that layers differ.
    """
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], float(draws[i, 0])))
    table = torch.empty(len(counts), num_hashes)
    start = draws[0].tolist()
    heap = [(0.0, tie, e) for e, tie in enumerate(start)]
    heapq.heapify(heap)
    for i in order:
        taken = [heapq.heappop(heap) for _ in range(num_hashes)]
        for j, (load, tie, e) in enumerate(taken):
            table[i, j] = e
            # Ids that never occur are shared out too.
            heapq.heappush(heap, (load + max(counts[i], 1e-6), tie, e))
    return table


def read_counts(path: str, vocab_size: int) -> list[float]:
    """A list of numbers from a JSON file, filled up with 0: a padded vocabulary is longer than its tokenizer's. ConfigError if it is none."""
    try:
        counts = read_json(path)
    except OSError as error:
        raise ConfigError(f"model.moe.router.frequencies ({path}): can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"model.moe.router.frequencies: {error}") from None
    if not isinstance(counts, list) or not all(isinstance(c, (int, float)) and c >= 0 for c in counts) or len(counts) > vocab_size:
        what = f"{len(counts)} entries" if isinstance(counts, list) else type(counts).__name__
        raise ConfigError(
            f"model.moe.router.frequencies ({path}): must be a list of counts, one for each of at most {vocab_size} token ids; found {what}"
        )
    return [float(c) for c in counts] + [0.0] * (vocab_size - len(counts))
