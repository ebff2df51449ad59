# SPDX-License-Identifier: Apache-2.0
"""The controller of CATS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scap_nncf.algorithms.cats.site_plan import plan_sites
from scap_nncf.algorithms.plan import Plan, check_prune
from scap_nncf.algorithms.scap.controller import ScapController
from scap_nncf.algorithms.sparsity import check_sparsity


class CatsController(ScapController):
    """What a user holds of a model with closed gates."""

    def __repr__(self) -> str:
        return f"CatsController({len(self.plan.sites)} feed-forwards, prune={self.plan.prune!r})"

    def set_sparsity(  # type: ignore[override]
        self, sparsity: float, prune: str | None = None, **_settings: Any
    ) -> Plan:
        """
        Change the share of closed gates from the calibration statistics, without new data.

        :return: the new plan.
        :raises nncf.ValidationError: there are no statistics, or the number is outside of [0, 1).
        """
        if self.calibration is None:
            return super().set_sparsity(sparsity)  # says what is missing
        sites = plan_sites(self.calibration, check_sparsity(sparsity))
        settings = {**(self.plan.made_by.get("settings") or {}), "sparsity": sparsity}
        made_by = {**self.plan.made_by, "settings": settings}
        policy = check_prune(prune or self.plan.prune)
        return self._change(replace(self.plan, sites=sites, prune=policy, made_by=made_by))
