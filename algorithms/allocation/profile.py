# SPDX-License-Identifier: Apache-2.0
"""Allocation by a constant table of roles: no data, no gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

#: Sparsity of each role at a model-wide 50 %: means over the blocks of Llama-3-8B of the greedy search results that
#: TEAL publishes (github.com/FasterDecoding/TEAL, models/*/lookup).
ROLE_SPARSITY = {"q": 0.59, "k": 0.43, "v": 0.36, "o": 0.62, "gate": 0.51, "up": 0.40, "down": 0.54}
#: Fused layers prune one tensor for several roles; what hurts least of them counts most in weights.
ROLE_SPARSITY |= {"qkv": 0.50, "gate_up": 0.455, "fc1": 0.46, "fc2": 0.54}
MAX_SPARSITY = 0.97


def allocate(role_of: Mapping[str, str], weights: Mapping[str, int], budget: float) -> dict[str, float]:
    """
    Sparsity of each layer: its role's value, all shifted equally on the logit scale until the budget is met.

    :param role_of: layer name → role; roles not in the table count as 0.5.
    :param weights: layer name → number of weight elements.
    :param budget: Σ weights · sparsity to reach.
    """
    if budget <= 0:
        return dict.fromkeys(weights, 0.0)
    logits = {name: _logit(ROLE_SPARSITY.get(role.removeprefix("experts."), 0.5)) for name, role in role_of.items()}

    def spread(shift: float) -> dict[str, float]:
        return {name: min(1 / (1 + math.exp(-(value + shift))), MAX_SPARSITY) for name, value in logits.items()}

    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        total = sum(weights[name] * value for name, value in spread(middle).items())
        low, high = (middle, high) if total < budget else (low, middle)
    return spread(high)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
