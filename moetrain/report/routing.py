"""What a picture of the routing says: how far apart sources are in each layer, and whether depth has the shape of a W."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(L, E) routes per expert of two sets of tokens -> (L,) Jensen-Shannon divergence of their shares, divided by the entropy of their mean.

    0: the same experts in the same shares; 1: each set has one expert, and not the other's. NaN in a layer in which a set has no route.

    arXiv 2510.04694 looks at the entropy-normalised Jensen-Shannon divergence between languages by layer, since entropy falls with depth and would
    hide or feign a difference. Its exact normaliser was not found (known from notes only); ours, H((p + q) / 2), is the least that keeps the
    quotient within 0..1. There p is the mean of the router's softmax over tokens, for parallel sentences; here it is the share in the routes
    taken, since not every router has a softmax, and of whatever text the sets are.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        p, q = (x / x.sum(-1, keepdims=True) for x in (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)))
        mean = _entropy((p + q) / 2)
        # One expert alone, and the same: nothing could be apart.
        return np.where(mean == 0, 0.0, np.maximum(0.0, mean - (_entropy(p) + _entropy(q)) / 2) / np.where(mean == 0, 1.0, mean))


def has_w_shape(active: Sequence[float]) -> bool:
    """Whether experts per token by layer fall, rise, fall and rise again with depth, each time by a tenth of their range or more.

    That is the W of DSMoE (arXiv 2502.12455, Section 6.3): many experts in the first and last layers, a bump in the middle. The paper shows it in
    heat maps, without numbers; the tenth is ours.
    """
    values = np.asarray(active, dtype=np.float64)
    if len(values) < 5 or not np.isfinite(values).all() or values.max() == values.min():
        return False
    least = (values.max() - values.min()) / 10
    first, last = values[0], values[-1]
    for k in range(2, len(values) - 2):  # the bump
        left, right = values[1:k].min(), values[k + 1 : -1].min()
        if min(first, values[k]) - left >= least and min(last, values[k]) - right >= least:
            return True
    return False


def _entropy(p: np.ndarray) -> np.ndarray:
    """In nats, over the last dim; NaN stays."""
    return -(p * np.log(np.where(p == 0, 1.0, p))).sum(-1)
