# SPDX-License-Identifier: Apache-2.0
"""From statistics of the activated gates to plans of feed-forwards."""

from __future__ import annotations

from scap_nncf.algorithms.plan import SitePlan
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.site_plan import plan_site
from scap_nncf.algorithms.sparsity import Target


def plan_sites(calibration: CalibrationStatistics, sparsity: float) -> tuple[SitePlan, ...]:
    """
    One site a feed-forward: down and up with the threshold of the activated gate, and the gate, which stays dense.
    """
    plans = []
    for site in calibration.sites:
        targets = {layer.name: Target(0.0 if layer.role == "gate" else sparsity) for layer in site.layers}
        plan = plan_site(site, calibration.histograms[site.name], targets, "zero")
        assert plan is not None  # every layer has a target
        plans.append(plan)
    return tuple(plans)
