# SPDX-License-Identifier: Apache-2.0
"""
Scores: what is compared with the threshold in place of ``|x − η|``.

``weight_norm`` compares ``|x_i − η|·‖W_i‖₂``, the size of what channel i adds to the output (WINA, arXiv 2505.19427).
Each layer has its own mask then, also where layers read one tensor. For experiments: it is simulated in PyTorch, and
once the allocation is right it is within noise of the plain magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import nncf
import numpy as np

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.plan import Plan, to_float32

SCORES = ("magnitude", "weight_norm")


def check_score(value: str) -> str:
    """
    :raises nncf.ValidationError: not a known score.
    """
    if value not in SCORES:
        msg = f"score must be one of {', '.join(SCORES)}, got {value!r}."
        raise nncf.ValidationError(msg)
    return value


def with_scores(model: Any, plan: Plan, samples: Sequence[Any]) -> Plan:
    """
    The plan with weight norms as scores: the same sparsity of each layer, thresholds calibrated anew.

    :raises nncf.ParameterNotSupportedError: the model is an OpenVINO model.
    """
    backend = backend_of(model)
    scores = {}
    for layer in plan.layers:
        norms = np.linalg.norm(np.asarray(backend.dense_weight(model, layer.name), np.float32), axis=1)  # [IC]
        scores[layer.name, "score"] = norms / max(float(norms.mean()), np.finfo(np.float32).tiny)
    plan = plan.with_vectors(scores)
    histograms = backend.shifted_histograms(model, plan, samples)
    sites = tuple(
        replace(
            site,
            layers=tuple(
                layer
                if layer.threshold < 0
                else replace(layer, threshold=to_float32(histograms[layer.name].quantile(layer.sparsity)))
                for layer in site.layers
            ),
        )
        for site in plan.sites
    )
    return replace(plan, sites=sites)
