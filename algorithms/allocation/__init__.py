# SPDX-License-Identifier: Apache-2.0
"""
Allocation: from one budget for the model to one sparsity a layer.

An allocation gets the targets as the user wrote them and returns others with the same total, ``Σ weights · sparsity``
over the layers that one part of the specification names: for ``0.5`` over all layers, for ``{"attn": 0.4, "down":
0.6}`` over the layers of each selector by itself.

===========  ==========================================================================================================
``uniform``  gives each layer what was asked (the paper's way)
``profile``  follows a constant table of roles (:mod:`.profile`)
``fisher``   spends the budget where it costs the least loss (:mod:`.fisher`)
``greedy``   TEAL's search on the output error of each block (:mod:`.greedy`), for comparison: slower and worse
``auto``     the default: takes a mapping or the paper's grammar literally (``uniform``); one number is spread by
             ``fisher`` where prices could be measured, else by ``profile`` on gated feed-forwards, else ``uniform``
===========  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import nncf
import numpy as np
from nncf.common.logging import nncf_logger
from numpy.typing import NDArray

from scap_nncf.algorithms.allocation.fisher import Costs
from scap_nncf.algorithms.allocation.fisher import allocate as allocate_by_cost
from scap_nncf.algorithms.allocation.greedy import allocate as allocate_by_path
from scap_nncf.algorithms.allocation.profile import allocate as allocate_by_profile
from scap_nncf.algorithms.sites import Layer, Site
from scap_nncf.algorithms.sparsity import SparsitySpec, Target, is_one_number

ALLOCATIONS = ("auto", "uniform", "profile", "fisher", "greedy")


def check_allocation(value: str) -> str:
    """
    :raises nncf.ValidationError: not a known allocation.
    """
    if value not in ALLOCATIONS:
        msg = f"allocation must be one of {', '.join(ALLOCATIONS)}, got {value!r}."
        raise nncf.ValidationError(msg)
    return value


def wants_prices(method: str, sparsity: SparsitySpec) -> bool:
    """Whether more than histograms is worth gathering for this allocation of this specification."""
    return method in ("fisher", "greedy") or (method == "auto" and is_one_number(sparsity))


def choose(method: str, sparsity: SparsitySpec, sites: Sequence[Site], costs: Costs | None) -> str:
    """What ``auto`` comes to; any other method is itself."""
    if check_allocation(method) != "auto":
        return method
    if not is_one_number(sparsity):
        return "uniform"
    if costs is not None:
        return "fisher"
    # the table was measured on gated feed-forwards; elsewhere nothing is known
    roles = {layer.role for site in sites for layer in site.layers}
    chosen = "profile" if roles & {"gate", "gate_up"} else "uniform"
    nncf_logger.info(f"No prices of sparsity were measured, so allocation='auto' is {chosen!r}.")
    return chosen


def allocate(
    method: str,
    targets: Mapping[str, Target],
    sites: Sequence[Site],
    costs: Costs | None,
    paths: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, Target]:
    """
    Targets of the same total, spread over the layers.

    :param method: one of ALLOCATIONS but ``auto``, see :func:`choose`.
    :param targets: layer name → target; layers of one selector share a budget.
    :param costs: loss of each layer at each sparsity, for ``fisher``.
    :param paths: what the search found, for ``greedy``.
    :raises nncf.ValidationError: unknown method, or ``fisher`` without costs, or ``greedy`` without paths.
    """
    if check_allocation(method) == "uniform":
        return dict(targets)
    if method == "fisher" and costs is None:
        msg = (
            "allocation='fisher' needs the loss of each layer, which these statistics do not hold; calibrate with "
            "allocation='fisher', or use 'profile' or 'uniform'."
        )
        raise nncf.ValidationError(msg)
    if method == "greedy":
        return _follow(targets, paths)
    groups: dict[str, list[Layer]] = {}
    for site in sites:
        for layer in site.layers:
            if layer.name in targets:
                groups.setdefault(targets[layer.name].selector, []).append(layer)
    values: dict[str, float] = {}
    for layers in groups.values():
        weights = {layer.name: layer.weights for layer in layers}
        budget = sum(weights[name] * targets[name].sparsity for name in weights)
        if method == "profile":
            values |= allocate_by_profile({layer.name: layer.role for layer in layers}, weights, budget)
        else:
            assert costs is not None
            values |= allocate_by_cost(costs, weights, budget)
    return {name: replace(target, sparsity=values[name]) for name, target in targets.items()}


def _follow(targets: Mapping[str, Target], paths: Mapping[str, NDArray[np.float64]] | None) -> dict[str, Target]:
    """Each block at the sparsity that was asked of all layers, which has to be one number."""
    asked = {target.sparsity for target in targets.values()}
    if paths is None or not set(targets) <= set(paths):
        msg = "allocation='greedy' needs a search of its own; calibrate with allocation='greedy'."
        raise nncf.ValidationError(msg)
    if len(asked) > 1:
        msg = "allocation='greedy' spreads one sparsity over the layers of each block; give one number."
        raise nncf.ValidationError(msg)
    values = allocate_by_path(paths, asked.pop())
    return {name: replace(target, sparsity=values[name]) for name, target in targets.items()}
