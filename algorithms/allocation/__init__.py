# SPDX-License-Identifier: Apache-2.0
"""
Allocation: from one budget for the model to one sparsity a layer.

An allocation gets the targets as the user wrote them and returns others with the same total, ``Σ weights · sparsity``
over the targeted layers. ``uniform`` changes nothing (the paper's way); ``profile`` follows a constant table of roles;
``fisher`` spends the budget where it costs the least loss (:mod:`scap_nncf.algorithms.allocation.fisher`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import nncf

from scap_nncf.algorithms.allocation.fisher import Costs
from scap_nncf.algorithms.allocation.fisher import allocate as allocate_by_cost
from scap_nncf.algorithms.allocation.profile import allocate as allocate_by_profile
from scap_nncf.algorithms.sites import Site
from scap_nncf.algorithms.sparsity import Target

ALLOCATIONS = ("uniform", "profile", "fisher")


def check_allocation(value: str) -> str:
    """
    :raises nncf.ValidationError: not a known allocation.
    """
    if value not in ALLOCATIONS:
        msg = f"allocation must be one of {', '.join(ALLOCATIONS)}, got {value!r}."
        raise nncf.ValidationError(msg)
    return value


def allocate(
    method: str, targets: Mapping[str, Target], sites: Sequence[Site], costs: Costs | None
) -> dict[str, Target]:
    """
    Targets of the same total, spread over the layers.

    :param targets: layer name → target.
    :param costs: loss of each layer at each sparsity, for ``fisher``.
    :raises nncf.ValidationError: unknown method, or ``fisher`` without costs.
    """
    if check_allocation(method) == "uniform":
        return dict(targets)
    layers = [layer for site in sites for layer in site.layers if layer.name in targets]
    weights = {layer.name: layer.weights for layer in layers}
    budget = sum(weights[name] * target.sparsity for name, target in targets.items())
    if method == "profile":
        values = allocate_by_profile({layer.name: layer.role for layer in layers}, weights, budget)
    else:
        if costs is None:
            msg = (
                "allocation='fisher' needs the loss of each layer, which these statistics do not hold; calibrate with "
                "allocation='fisher', or use 'profile' or 'uniform'."
            )
            raise nncf.ValidationError(msg)
        values = allocate_by_cost(costs, weights, budget)
    return {name: replace(target, sparsity=values[name]) for name, target in targets.items()}
