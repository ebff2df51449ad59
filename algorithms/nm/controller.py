# SPDX-License-Identifier: Apache-2.0
"""The controller of N:M activation sparsity."""

from __future__ import annotations

from typing import Any

import nncf

from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.controller import ScapController


class NmController(ScapController):
    """What a user holds of a model with N:M patterns: as SCAP's, without thresholds to move."""

    def __repr__(self) -> str:
        patterns = dict.fromkeys(f"{n}:{m}" for n, m in (layer.pattern for layer in self.plan.layers if layer.pattern))
        return f"NmController({len(self.plan.sites)} sites, {', '.join(patterns)}, prune={self.plan.prune!r})"

    def set_sparsity(self, *_args: Any, **_settings: Any) -> Plan:
        """
        :raises nncf.ParameterNotSupportedError: always.
        """
        msg = "The sparsity of N:M patterns is the pattern's; take it out with .strip() and compress anew with another."
        raise nncf.ParameterNotSupportedError(msg)
