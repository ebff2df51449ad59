# SPDX-License-Identifier: Apache-2.0
"""From a plan and settings to the plan with error mitigation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import nncf
import torch
from nncf.common.logging.track_progress import track

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.mitigation.config import Mitigation
from scap_nncf.algorithms.plan import LayerPlan, Plan, Vector, to_float32

_OVERSAMPLING, _ITERATIONS = 16, 4  # of the randomised factorisation


def mitigate(model: Any, plan: Plan, mitigation: Mitigation, samples: Sequence[Any]) -> Plan:
    """
    The plan with error mitigation; the model is not changed. A static shift is the sites' mode, which the plan has.

    Thresholds of sites that get another shift are calibrated anew, so that the target sparsity holds.

    :param samples: calibration data, where anything is learned or calibrated anew.
    :raises nncf.ValidationError: something has to be learned, and there is no data.
    :raises nncf.ParameterNotSupportedError: something has to be learned in an OpenVINO model.
    """
    backend = backend_of(model)
    has_thresholds = any(layer.threshold >= 0 for layer in plan.layers)
    moves = mitigation.shift in ("token", "learned")
    if not samples and (mitigation.learns or (moves and has_thresholds)):
        what = "A learned error mitigation" if mitigation.learns else "A shift of each token with thresholds"
        msg = f"{what} needs calibration data; pass dataset=."
        raise nncf.ValidationError(msg)
    plan = _map_layers(plan, lambda layer: _with_flags(layer, mitigation))
    if mitigation.low_rank:
        vectors: dict[tuple[str, str], Vector] = {}
        layers = [layer for layer in plan.layers if layer.prunes]
        for layer in track(layers, total=len(layers), description="Factorising weights"):
            a, b = low_rank(torch.from_numpy(backend.dense_weight(model, layer.name)), mitigation.low_rank)
            vectors[layer.name, "low_rank_in"], vectors[layer.name, "low_rank_out"] = a.numpy(), b.numpy()
        plan = plan.with_vectors(vectors)
    if mitigation.learns:
        plan = plan.with_vectors(backend.train_mitigation(model, plan, mitigation, samples))
    if moves and has_thresholds:
        histograms = backend.shifted_histograms(model, plan, samples)
        plan = _map_layers(
            plan,
            lambda layer: (
                replace(layer, threshold=to_float32(histograms[layer.name].quantile(layer.sparsity)))
                if layer.threshold >= 0
                else layer
            ),
        )
    return plan


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The best approximation of a matrix by a product of two of this rank, up to the error of a randomised factorisation
    with a fixed seed.

    :param weight: [IC, OC].
    :return: A [IC, r] and B [r, OC], float32; r is at most the smaller width.
    """
    weight = weight.float()
    rank = min(rank, *weight.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, min(rank + _OVERSAMPLING, *weight.shape), _ITERATIONS)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (v[:, :rank] * root).t().contiguous()


def _with_flags(layer: LayerPlan, mitigation: Mitigation) -> LayerPlan:
    if not layer.prunes:
        return layer
    token = mitigation.statistic if mitigation.shift == "token" else None
    return replace(layer, token_shift=token, variance=mitigation.variance)


def _map_layers(plan: Plan, change: Any) -> Plan:
    sites = tuple(replace(site, layers=tuple(map(change, site.layers))) for site in plan.sites)
    return replace(plan, sites=sites)
