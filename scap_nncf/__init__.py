# SPDX-License-Identifier: Apache-2.0
"""
Activation sparsity for NNCF: Statistical Calibrated Activation Pruning (SCAP).

After ``import nncf, scap_nncf``, ``nncf.compress(model, algorithm="scap", dataset=...)`` calibrates and prunes a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from scap_nncf import versions as versions  # first: it says in one line what is too old

# isort: split
from scap_nncf._version import __version__
from scap_nncf.algorithms.budget import Budget, BudgetError
from scap_nncf.algorithms.cats import Cats
from scap_nncf.algorithms.mitigation import Mitigation
from scap_nncf.algorithms.nm import Nm
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.processes import single_process
from scap_nncf.algorithms.quantization import Quantization, WeightCompression
from scap_nncf.algorithms.refine import Refine
from scap_nncf.algorithms.scap import CalibrationStatistics, Scap, get_controller, make_plan
from scap_nncf.algorithms.scap.journal import resumable
from scap_nncf.compress import calibrate, compress, inspect_model, register
from scap_nncf.recipe import load_recipe

register()

# Functions whose modules need an optional dependency, or are rarely needed: imported at first use.
_LAZY = {
    "deploy": "scap_nncf.deployment",
    "drift": "scap_nncf.deployment",
    "evaluate": "scap_nncf.evaluation",
    "export_openvino": "scap_nncf.export",
    "load_openvino": "scap_nncf.openvino_io",
    "load_pretrained": "scap_nncf.checkpoint",
    "measure_sparsity": "scap_nncf.openvino_io",
    "openvino_extension": "scap_nncf.deploy_openvino",
    "save_openvino": "scap_nncf.openvino_io",
    "save_pretrained": "scap_nncf.checkpoint",
    "undeploy": "scap_nncf.deployment",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


__all__ = [
    "Budget",
    "BudgetError",
    "CalibrationStatistics",
    "Cats",
    "Mitigation",
    "Nm",
    "Plan",
    "Quantization",
    "Refine",
    "Scap",
    "WeightCompression",
    "__version__",
    "calibrate",
    "compress",
    "deploy",
    "drift",
    "evaluate",
    "export_openvino",
    "get_controller",
    "inspect_model",
    "load_openvino",
    "load_pretrained",
    "load_recipe",
    "make_plan",
    "measure_sparsity",
    "openvino_extension",
    "resumable",
    "save_openvino",
    "save_pretrained",
    "single_process",
    "undeploy",
]
