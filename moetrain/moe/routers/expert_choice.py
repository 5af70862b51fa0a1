"""The experts choose their tokens: Expert Choice (arXiv 2202.09368, from background knowledge of the paper) and its causal relative, Expert
Threshold routing (2603.11535, of which only the outline is known: a running threshold per expert, estimated from the tokens of all ranks; what
it averages and how it warms up is ours). See docs/assigned.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moetrain.config import ExpertChoiceRouter, ModelConfig
from moetrain.moe.choice import largest_of_group, largest_of_sequence
from moetrain.moe.routers.base import router_for
from moetrain.moe.routing import Decision, Routing, TokenContext, recorded
from moetrain.moe.wide import wide_linear


@router_for(ExpertChoiceRouter)
class ExpertChoice(nn.Module):
    """s = softmax(x W) over experts (or sigmoid); expert e takes the ceil(c T / E) tokens of its largest s, with weight s. A token has any number
    of experts, none included; no balance loss is needed.

    The choice is not causal: it depends on tokens behind the one that is chosen. `cut` is a running mean, over steps, of the largest score that
    was not chosen; s > cut is the same choice in the mean and looks at the token alone. Inference (no keys in the context) always uses it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None and isinstance(config.moe.router, ExpertChoiceRouter), "needs an expert_choice config"
        self.options, self.num_experts = config.moe.router, config.moe.num_experts
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        # Parameters, to be sharded, saved and loaded like any other; no gradient reaches them.
        self.cut = nn.Parameter(torch.empty(self.num_experts), requires_grad=False)
        self.updates = nn.Parameter(torch.empty(1), requires_grad=False)

    @staticmethod
    def start_value(config: ModelConfig, layer: int, part: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
        """The cut starts at the score of logits that are all equal: a model that never made a step routes about half of all pairs."""
        assert config.moe is not None and isinstance(config.moe.router, ExpertChoiceRouter), "needs an expert_choice config"
        middle = 0.5 if config.moe.router.score == "sigmoid" else 1 / config.moe.num_experts
        return {"cut": torch.full(shape, middle, device="cpu"), "updates": torch.zeros(shape, device="cpu")}.get(part)

    def forward(self, x: Tensor, context: TokenContext) -> Routing:
        """x: (T, D). No losses. Sums, in training: `cut`, over sequences (or micro-batches) the distance of their cut from the estimate, (E,);
        `groups`, how many; `updates`, the steps so far, once for each of them."""
        logits = wide_linear(x, self.weight)
        scores = torch.sigmoid(logits) if self.options.score == "sigmoid" else torch.softmax(logits, -1)
        decision, sums = recorded(lambda: self.decide(scores.detach(), context))
        return Routing(decision, scores * decision.active, {}, sums)

    def decide(self, scores: Tensor, context: TokenContext) -> tuple[Decision, dict[str, Tensor]]:
        options = self.options
        valid = torch.ones(len(scores), dtype=torch.bool, device=scores.device) if context.valid is None else context.valid
        estimate = self.cut.detach().to(scores.dtype)
        by_cut = (scores > estimate) & valid[:, None]
        if not self.training and (options.evaluation == "threshold" or context.keys is None):
            return Decision(by_cut), {}
        if self.training and options.over == "micro_batch":
            names = torch.arange(len(scores), device=scores.device) if context.keys is None else context.keys
            chosen, cut, tokens = largest_of_group(scores, valid, names, options.capacity_factor, context.group)
            cut, tokens = cut[None], tokens[None]
        else:
            sequence = max(1, len(scores) if context.sequence is None else context.sequence)
            chosen, cut, tokens = largest_of_sequence(scores, valid, options.capacity_factor, sequence)
        if not self.training:
            return Decision(chosen), {}
        updates = self.updates.detach()
        if options.training == "threshold":
            chosen = torch.where(updates >= options.warmup_steps, by_cut, chosen)
        counted = (tokens > 0).double()
        groups = counted.sum()
        moved = ((cut - estimate) * counted[:, None]).sum(0)
        return Decision(chosen), {"cut": moved, "groups": groups, "updates": updates[0] * groups}

    def after_step(self, load: Tensor, sums: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The estimate moves towards the mean cut of the step, over all ranks and micro-batches."""
        groups = float(sums["groups"])
        if groups:
            rate = max(self.options.cut_rate, 1 / (1 + float(sums["updates"]) / groups))
            yield "cut", rate * sums["cut"] / groups
            yield "updates", torch.ones(1)
