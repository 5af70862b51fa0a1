"""Which tokens an expert takes when it is the experts that choose: the largest scores of each sequence, or of a micro-batch on many ranks.

Shapes: T tokens, E experts, B sequences. Scores are compared in float32 whatever their dtype, so that equal tokens (such as the first ones of
documents) are equal here too, though their scores were rounded differently.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.moe.routing import group_sum


def room_for(tokens: Tensor, factor: float, num_experts: int) -> Tensor:
    """ceil(factor * tokens / num_experts), at most `tokens`, int64. tokens: of any shape."""
    # Less the rounding of the product: 1.1 * 50 / 5 is 11, not 12.
    return torch.minimum(torch.ceil(tokens.double() * factor / num_experts - 1e-9).long(), tokens.long())


def largest_of_sequence(scores: Tensor, valid: Tensor, factor: float, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every expert's choice in each sequence; among equal scores the earlier token.

    scores: (T, E). valid: (T,) bool, tokens that may be chosen. sequence: tokens per sequence, at least 1. Returns the choice (T, E) bool, the
    largest score that was not chosen (B, E), 0 where all were, and the valid tokens of each sequence (B,).
    """
    T, E = scores.shape
    valid = valid.view(T // sequence, sequence, 1)
    tokens = valid.sum((1, 2))
    ranking = torch.where(valid, scores.float().view(-1, sequence, E), -math.inf)
    order = torch.sort(ranking, dim=1, descending=True, stable=True).indices
    places = torch.arange(sequence, device=scores.device)[None, :, None].expand_as(order)
    ranks = torch.empty_like(order).scatter(1, order, places)
    chosen = (ranks < room_for(tokens, factor, E)[:, None, None]) & valid
    cuts = torch.where(chosen | ~valid, 0, scores.view(-1, sequence, E)).amax(1)
    return chosen.view(T, E), cuts, tokens


def largest_of_group(scores: Tensor, valid: Tensor, names: Tensor, factor: float, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Every expert's choice among the tokens of all ranks; among equal scores the token of the smaller name. Collective over `group`.

    scores: (T, E), non-negative. valid: (T,) bool. names: (T,) int64, not negative where valid, no two alike in the group. Returns the choice
    (T, E) bool, the largest score that was not chosen on any rank (E,), 0 where all were, and the valid tokens of all ranks ().

    No score travels. The k-th largest is found digit by digit (radix selection): of each 8 bits the ranks add up 256 counts per expert, four
    times for the scores and, where equal ones don't all find room, eight times for the names.
    """
    E = scores.shape[1]
    tokens = group_sum(valid.sum(), group)
    room = room_for(tokens, factor, E).expand(E)
    candidates = valid[:, None].expand_as(scores)
    # The bits of a float32 that is not negative grow with it.
    bits = scores.float().contiguous().view(torch.int32).long()
    chosen, tied, room, ties = _select(bits, 32, candidates, room, group)
    if bool((ties > room).any()):  # a host synchronisation; equal on all ranks, as ties and room are
        by_name, last, room, _ = _select((torch.iinfo(torch.int64).max - names)[:, None].expand_as(bits), 64, tied, room, group)
        # Names differ, so that one token is left for the last place.
        chosen = chosen | by_name | (last & (room > 0))
    else:
        chosen = chosen | tied
    cut = torch.where(chosen | ~candidates, 0, scores).amax(0) if len(scores) else scores.new_zeros(E)
    if group is not None:
        dist.all_reduce(cut, op=dist.ReduceOp.MAX, group=group)
    return chosen, cut, tokens


def _select(
    values: Tensor, bits: int, candidates: Tensor, room: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per expert: candidates whose value is above the `room`-th largest (T, E); those that equal it (T, E); the places that are left for them and
    how many there are on all ranks, (E,) each. With `room` for more than all candidates all of them are above.

    values: (T, E) int64, not negative, below 2^bits.
    """
    T, E = values.shape
    above = torch.zeros_like(candidates)
    ties = room
    rows = torch.arange(E, device=values.device).expand(T, E) * 256
    for shift in range(bits - 8, -1, -8):
        digits = (values >> shift) & 255
        counts = group_sum(torch.bincount((rows + digits)[candidates], minlength=256 * E).view(E, 256), group)
        at_least = counts.flip(1).cumsum(1).flip(1)
        # The digit of the room-th largest; -1 where there are fewer.
        digit = (at_least >= room[:, None]).sum(1) - 1
        above = above | (candidates & (digits > digit))
        candidates = candidates & (digits == digit)
        beyond = torch.cat((at_least, at_least.new_zeros(E, 1)), 1)
        room = room - beyond.gather(1, digit[:, None] + 1)[:, 0]
        ties = torch.where(digit < 0, 0, counts.gather(1, digit.clamp(min=0)[:, None])[:, 0])
    return above, candidates, room, ties
