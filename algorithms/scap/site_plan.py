# SPDX-License-Identifier: Apache-2.0
"""From statistics and targets to a plan: the mode of each site, the threshold of each layer."""

from __future__ import annotations

from collections.abc import Mapping

from scap_nncf.algorithms.plan import LayerPlan, SitePlan, to_float32
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.mode import choose_mode
from scap_nncf.algorithms.sites import Site
from scap_nncf.algorithms.sparsity import Target

KEEP_EVERYTHING = -1.0
#: ``mode_method`` of a site where nothing but zeros is dropped.
NATURAL = "natural"
MAX_NATURAL = 0.9999  # a target is below 1


def plan_site(
    site: Site, histogram: ActivationHistogram, targets: Mapping[str, Target], mode_method: str
) -> SitePlan | None:
    """
    Mode and thresholds of one site (SCAP paper, equation 2 applied to x − η).

    Where at least the target share of the inputs is zero anyway, the site is marked ``natural``: τ = 0 loses nothing.

    :param targets: layer name → target; layers of the site that are not in it stay dense.
    :param mode_method: used where the target names none.
    :return: None where no layer of the site has a target.
    """
    layers = [layer for layer in site.layers if layer.name in targets]
    if not layers:
        return None
    mode, found_by = site_mode(site, histogram, targets, mode_method)
    asked = {targets[layer.name].sparsity for layer in layers}
    found = {sparsity: _threshold(histogram, sparsity, mode) for sparsity in asked}  # mostly one for all of them
    planned = []
    for layer in layers:
        threshold, sparsity = found[targets[layer.name].sparsity]
        planned.append(LayerPlan(layer.name, layer.role, layer.in_features, layer.out_features, threshold, sparsity))
    if all(layer.threshold == 0.0 for layer in planned) and mode == 0.0:
        found_by = NATURAL
    return SitePlan(site.name, site.block, mode, found_by, tuple(planned))


def site_mode(
    site: Site, histogram: ActivationHistogram, targets: Mapping[str, Target], mode_method: str
) -> tuple[float, str]:
    """The mode of a site that has a target, and the method that gave it."""
    layers = [layer for layer in site.layers if layer.name in targets]
    method = targets[layers[0].name].mode_method or mode_method
    weights = sum(layer.weights for layer in layers)
    mean_sparsity = sum(targets[layer.name].sparsity * layer.weights for layer in layers) / weights
    return choose_mode(histogram, method, mean_sparsity)


def _threshold(histogram: ActivationHistogram, sparsity: float, mode: float) -> tuple[float, float]:
    """
    τ and the sparsity that it gives. Inputs that are zero by themselves (behind a ReLU) are dropped without loss, so
    where their share is above the target, τ is 0 and the sparsity is that share.
    """
    if sparsity == 0.0:
        return KEEP_EVERYTHING, 0.0
    if mode == 0.0 and histogram.zero_share >= sparsity:
        return 0.0, min(histogram.zero_share, MAX_NATURAL)
    return to_float32(histogram.quantile(sparsity, mode)), sparsity
