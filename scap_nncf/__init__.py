# SPDX-License-Identifier: Apache-2.0
"""
Activation sparsity for NNCF: Statistical Calibrated Activation Pruning (SCAP).

After ``import nncf, scap_nncf``, ``nncf.compress(model, algorithm="scap", dataset=...)`` calibrates and prunes a model.
"""

from scap_nncf._version import __version__
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap import Scap, get_controller
from scap_nncf.compress import compress, inspect_model, register

register()

__all__ = ["Plan", "Scap", "__version__", "compress", "get_controller", "inspect_model"]
