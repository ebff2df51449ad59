# SPDX-License-Identifier: Apache-2.0
"""The pruner: what every kernel means by "dropped" (SCAP paper, equations 1 to 3)."""

from __future__ import annotations

import torch


def centre(x: torch.Tensor, mode: float) -> torch.Tensor:
    """``x - mode`` in the precision of the comparison: float32 for half types and float32, float64 for float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide - mode if mode != 0.0 else wide


def prune(x: torch.Tensor, mode: float, threshold: float) -> torch.Tensor:
    """
    Centre and prune: ``z = x - mode`` where ``|z| > threshold``, zero elsewhere.

    NaN is never dropped, so that a broken activation stays visible. A negative threshold keeps everything.

    :param x: any shape, any floating dtype.
    :param mode: η, subtracted before the comparison.
    :param threshold: τ. Both are compared in float32 (float64 for float64 inputs).
    :return: the kept part of ``x - mode``, same shape and dtype as `x`; `x` itself where nothing can change.
    """
    if threshold < 0 and mode == 0.0:
        return x
    z = centre(x, mode)
    return torch.where(z.abs() <= threshold, torch.zeros((), dtype=z.dtype, device=z.device), z).to(x.dtype)
