"""The divergence between sets and the W, on cases that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moetrain.report.routing import divergence, has_w_shape


def plain(a: list[float], b: list[float]) -> float:
    """The definition as a loop: JSD(p, q) / H((p + q) / 2)."""
    p, q = ([x / sum(v) for x in v] for v in (a, b))
    m = [(x + y) / 2 for x, y in zip(p, q)]
    apart = sum(x * math.log(x / z) for x, z in zip(p, m) if x) / 2 + sum(y * math.log(y / z) for y, z in zip(q, m) if y) / 2
    return apart / -sum(z * math.log(z) for z in m if z)


def test_divergence():
    """Against the loop; 0 for equal shares whatever the counts, 1 for two single experts, symmetric; NaN without routes, 0 for one expert alone."""
    a = np.array([[5, 3, 0, 2], [1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0], [7, 0, 0, 0]])
    b = np.array([[1, 1, 7, 1], [3, 3, 3, 3], [0, 9, 0, 0], [1, 2, 3, 4], [2, 0, 0, 0]])
    found = divergence(a, b)
    assert found[0] == pytest.approx(plain([5, 3, 0, 2], [1, 1, 7, 1]), rel=1e-12) and 0.2 < found[0] < 0.5
    assert found[1] == pytest.approx(0, abs=1e-12) and found[2] == pytest.approx(1) and math.isnan(found[3]) and found[4] == 0
    np.testing.assert_array_equal(found, divergence(b, a))


@pytest.mark.parametrize(
    ("active", "there"),
    [
        ([5, 2, 4, 2, 5], True), ([5, 1, 1, 2.5, 3, 1, 6], True), ([5, 2, 2.1, 2, 5], False), ([5, 2, 1, 2, 5], False), ([1, 2, 4, 2, 1], False),
        ([5, 2, 4, 2, 2], False), ([5, 2, 4, 5], False), ([3] * 6, False), ([5, 2, math.nan, 2, 5], False),
    ],
)  # fmt: skip
def test_w_shape(active: list[float], there: bool):
    """Both ends high and a bump of a tenth of the range; a U, a hill, a bump that is noise, four layers and a flat line are none."""
    assert has_w_shape(active) is there
