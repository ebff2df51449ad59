# SPDX-License-Identifier: Apache-2.0
"""
Allocation by per-token Fisher information.

Pruning the input x of a layer to x̂ changes the log-likelihood of a token, to first order, by ``g · (x − x̂)``, g being
the gradient of the log-likelihood at that input. For labels drawn from the model itself its mean is zero and its mean
square is twice the Kullback-Leibler divergence from the dense model (the Fisher information along the change). So

    F(s) = E_token[(Σ_{i: |x_i − η| ≤ τ(s)} g_i (x_i − η))²]

is the price of sparsity s in a layer. A budget of weights to skip is then filled from the smallest price per weight,
all layers of the model together, along the lower convex hull of each layer's F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import nncf
import numpy as np
from numpy.typing import NDArray

#: Sparsities at which prices are measured.
LEVELS: tuple[float, ...] = (*(round(0.05 * step, 2) for step in range(20)), 0.98)
#: No layer gets more than this.
MAX_SPARSITY = 0.97


#: Sums of squares are kept on this grid. Multiples of 2^-24 below 2^29 add in float64 without rounding, so that samples
#: and processes may come in any order and give the same plan bit for bit, as the histograms do.
_GRID = 2.0**24


def on_grid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values rounded so that sums of them do not depend on the order."""
    return np.round(values * _GRID) / _GRID


@dataclass(frozen=True)
class Costs:
    """
    :param sums: layer name → float64 [len(LEVELS)], Σ over tokens of F at each level; F at sparsity 0 is 0.
    :param tokens: number of tokens behind the sums.
    """

    sums: Mapping[str, NDArray[np.float64]]
    tokens: int

    def __post_init__(self) -> None:
        for name, values in self.sums.items():
            if values.shape != (len(LEVELS),) or not np.isfinite(values).all():
                msg = f"The prices of {name} are not {len(LEVELS)} finite numbers."
                raise nncf.ValidationError(msg)

    @property
    def prices(self) -> dict[str, NDArray[np.float64]]:
        """Layer name → F at each level, a mean over tokens."""
        return {name: values / max(self.tokens, 1) for name, values in self.sums.items()}

    def merge(self, other: Costs) -> Costs:
        """The costs over the tokens of both."""
        if self.sums.keys() != other.sums.keys():
            msg = "Costs of different layers cannot be merged."
            raise nncf.ValidationError(msg)
        return Costs(
            {name: values + other.sums[name] for name, values in self.sums.items()}, self.tokens + other.tokens
        )


def allocate(costs: Costs, weights: Mapping[str, int], budget: float) -> dict[str, float]:
    """
    Sparsity of each layer for a budget.

    :param weights: layer name → number of weight elements.
    :param budget: Σ weights · sparsity to reach.
    :raises nncf.ValidationError: a layer has no price, or the budget is above what all layers can give.
    """
    prices = costs.prices
    missing = [name for name in weights if name not in prices]
    if missing:
        msg = (
            f"No price was measured for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; calibrate again."
        )
        raise nncf.ValidationError(msg)
    most = MAX_SPARSITY * sum(weights.values())
    if budget > most:
        msg = (
            f"A mean sparsity of {budget / sum(weights.values()):.3f} cannot be reached with at most {MAX_SPARSITY} "
            "a layer; ask for less."
        )
        raise nncf.ValidationError(msg)
    segments = [
        (price / weights[name], name, start, end)
        for name in weights
        for price, start, end in _hull_segments(prices[name])
    ]
    # ties and layers are taken in a fixed order, so that equal costs give equal plans
    segments.sort(key=lambda segment: (segment[0], segment[1], segment[2]))
    sparsity = dict.fromkeys(weights, 0.0)
    left = budget
    for _, name, start, end in segments:
        if left <= 0:
            break
        taken = min(left, weights[name] * (end - start))
        sparsity[name] = start + taken / weights[name]
        left -= taken
    return sparsity


def _hull_segments(prices: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """Segments (slope, start, end) of the lower convex hull of price over sparsity, up to MAX_SPARSITY."""
    points = [*(level for level in LEVELS if level < MAX_SPARSITY), MAX_SPARSITY]
    values = np.interp(points, LEVELS, np.maximum.accumulate(prices))  # more sparsity is never worth less
    hull: list[int] = []
    for index in range(len(points)):
        while len(hull) >= 2 and _slope(points, values, hull[-1], index) <= _slope(points, values, hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return [(_slope(points, values, a, b), points[a], points[b]) for a, b in pairwise(hull)]


def _slope(points: list[float], values: NDArray[np.float64], a: int, b: int) -> float:
    return float((values[b] - values[a]) / (points[b] - points[a]))
