"""Tokens to experts, equally many to each, at the largest sum of scores: an assignment problem, solved exactly.

Letters: N tokens, E experts.
"""

from __future__ import annotations

import numpy as np

_UNIT = 2.0**-24
"""Scores are compared in steps of it: whole numbers make the search exact and finite, and equal tokens equal however they were rounded."""
_LIMIT = 2.0**12
"""Scores beyond it are cut off, so that sums of a path's steps stay far from overflow; not a number counts as the least."""
_PRICE_STEPS, _PRICE_DECAY = 40, 0.8


def balanced_assignment(scores: np.ndarray) -> np.ndarray:
    """(N,) int64, an expert for each token: floor(N / E) or ceil(N / E) tokens to each, of all such assignments one of the largest sum of scores.
    Which of equally good ones is determined by the scores and the order of tokens alone.

    scores: (N, E) float. It begins with every token at its best expert after prices that make the experts about equally wanted, and then moves
    one surplus token at a time along the cheapest chain of experts (successive shortest paths of a minimum-cost flow; a chain's step e -> f costs
    what the cheapest token of e loses in f). The graph has only the experts and one node for the N mod E places above floor(N / E), of which
    an expert takes at most one: far fewer than a general solver's N x N matrix with a column for each place. Prices change no optimum: an
    expert's is paid floor(N / E) times in every assignment, and the extra places have it taken back.
    """
    tokens, experts = scores.shape
    gains = np.rint(np.clip(np.nan_to_num(scores.astype(np.float64), nan=-_LIMIT), -_LIMIT, _LIMIT) / _UNIT).astype(np.int64)
    prices = _prices(gains)
    gains = gains - prices
    extra_cost = prices.max(initial=0) - prices  # not negative, so that the start is optimal for the places it fills
    owner = gains.argmax(1)
    least, extra_left = divmod(tokens, experts)
    counts = np.bincount(owner, minlength=experts)
    room = np.maximum(least - counts, 0)
    surplus = np.maximum(counts - least, 0)
    has_extra = np.zeros(experts, dtype=bool)

    # Steps between experts and, last, the node of the extra places: what they cost and which token they move.
    far = np.iinfo(np.int64).max // 4
    cost = np.full((experts + 1, experts + 1), far)
    mover = np.full((experts, experts), -1)

    def look_again(e: int) -> None:
        mine = np.flatnonzero(owner == e)
        if len(mine):
            losses = gains[mine, e, None] - gains[mine]
            best = losses.argmin(0)
            cost[e, :experts], mover[e] = losses[best, np.arange(experts)], mine[best]
        else:
            cost[e, :experts] = far
        cost[e, e] = far
        cost[e, experts], cost[experts, e] = (far, -extra_cost[e]) if has_extra[e] else (extra_cost[e], far)

    for e in range(experts):
        look_again(e)
    nodes = np.arange(experts + 1)
    while surplus.any():
        distance = np.full(experts + 1, far)
        distance[:experts][surplus > 0] = 0
        before = np.full(experts + 1, -1)
        while True:  # Bellman-Ford: whole numbers and no negative circle, so that it ends
            through = distance[:, None] + cost
            via = through.argmin(0)
            shorter = through[via, nodes] < distance
            if not shorter.any():
                break
            distance, before = np.where(shorter, through[via, nodes], distance), np.where(shorter, via, before)
        ends = np.append(room > 0, extra_left > 0)
        end = int(np.where(ends, distance, far * 2).argmin())
        chain = [end]
        while before[chain[-1]] >= 0:
            chain.append(int(before[chain[-1]]))
        chain.reverse()
        assert distance[end] < far and surplus[chain[0]] > 0, "there is room for every token"
        moves = [(mover[a, b], b) for a, b in zip(chain, chain[1:]) if a < experts and b < experts]
        for a, b in zip(chain, chain[1:]):
            if b == experts:
                has_extra[a] = True
            elif a == experts:
                has_extra[b] = False
        for token, expert in moves:
            owner[token] = expert
        surplus[chain[0]] -= 1
        if end == experts:
            extra_left -= 1
        else:
            room[end] -= 1
        for e in chain:
            if e < experts:
                look_again(e)
    return owner


def _prices(gains: np.ndarray) -> np.ndarray:
    """(E,) int64, for a good start: subgradient steps on the dual problem, which raise the price of an expert that more than N / E tokens want."""
    tokens, experts = gains.shape
    if tokens == 0 or experts == 1:
        return np.zeros(experts, dtype=np.int64)
    prices, step = np.zeros(experts), float(gains.max() - gains.min())
    for _ in range(_PRICE_STEPS):
        wanted = np.bincount((gains - prices).argmax(1), minlength=experts)
        prices += step * np.clip(wanted * experts / tokens - 1, -1, 1)
        step *= _PRICE_DECAY
    return np.rint(prices).astype(np.int64)
