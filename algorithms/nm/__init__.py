# SPDX-License-Identifier: Apache-2.0
"""N:M activation sparsity, and top-k of each token."""

from scap_nncf.algorithms.nm.builder import NmBuilder
from scap_nncf.algorithms.nm.config import Nm
from scap_nncf.algorithms.nm.controller import NmController

__all__ = ["Nm", "NmBuilder", "NmController"]
