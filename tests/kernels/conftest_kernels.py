# SPDX-License-Identifier: Apache-2.0
"""Tolerances and the error measure of the kernel tests."""

from __future__ import annotations

import torch

# rounding of the stored output dominates for half types (the interpreter truncates to bfloat16); sums are float32
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN never passes a comparison."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
