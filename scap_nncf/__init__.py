# SPDX-License-Identifier: Apache-2.0
"""
Activation sparsity for NNCF: Statistical Calibrated Activation Pruning (SCAP).

After ``import nncf, scap_nncf``, ``nncf.compress(model, algorithm="scap", dataset=...)`` calibrates and prunes a model.
"""

from scap_nncf._version import __version__
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.quantization import Quantization, WeightCompression
from scap_nncf.algorithms.scap import CalibrationStatistics, Scap, get_controller, make_plan
from scap_nncf.compress import calibrate, compress, inspect_model, register
from scap_nncf.recipe import load_recipe

register()

__all__ = [
    "CalibrationStatistics",
    "Plan",
    "Quantization",
    "Scap",
    "WeightCompression",
    "__version__",
    "calibrate",
    "compress",
    "get_controller",
    "inspect_model",
    "load_recipe",
    "make_plan",
]
