# SPDX-License-Identifier: Apache-2.0
"""A fully connected layer that skips the weights of dropped inputs: the definition (SCAP paper, equation 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .prune import prune


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fuse_bias(weight: torch.Tensor, bias: torch.Tensor | None, mode: float) -> torch.Tensor | None:
    """
    The bias that makes up for centring: ``b + mode * colsum(W)``.

    :param weight: [K, N], input-channel-major.
    :param bias: [N] or None.
    :param mode: η.
    :return: [N] float32 (float64 for float64 weights), or None where there is nothing to add.
    """
    if mode == 0.0:
        return None if bias is None else bias.to(accumulation_dtype(weight.dtype))
    shift = mode * weight.sum(0, dtype=torch.float64)
    if bias is not None:
        shift = shift + bias.double()
    return shift.to(accumulation_dtype(weight.dtype))


def sparse_fc(
    x: torch.Tensor,
    weight: torch.Tensor,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    ``y = prune(x - mode) @ W + bias + residual``, each segment of outputs with its own threshold.

    A single FC has one segment; q, k and v read one tensor and are three segments of one weight.

    :param x: [..., K].
    :param weight: [K, N], input-channel-major.
    :param thresholds: τ of each segment.
    :param segments: number of output columns of each segment; they sum to N.
    :param mode: η of the tensor.
    :param bias: [N], already fused (see :func:`fuse_bias`).
    :param residual: [..., N], added to the result.
    :return: [..., N] in the dtype of `x`; products and sums in float32 (float64 for float64).
    """
    wide = accumulation_dtype(x.dtype)
    columns = weight.to(wide).split(list(segments), dim=1)
    # pruned in the wide dtype: a kernel multiplies z = x - mode as it is, without rounding it to x's dtype
    parts = [prune(x.to(wide), mode, t) @ w for t, w in zip(thresholds, columns, strict=True)]
    y = torch.cat(parts, dim=-1)  # [..., N]
    if bias is not None:
        y = y + bias.to(wide)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype)
