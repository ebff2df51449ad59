# SPDX-License-Identifier: Apache-2.0
"""Meaning of the quantised sparse operations, in plain torch; float64 when the input is float64.

``z = x - mode``; an element is dropped where ``|z| <= threshold`` (compared in float32 for float16, bfloat16 and
float32 inputs, in float64 for float64; NaN is never dropped); ``y = kept(z) @ W + bias (+ residual)``, W being the
numbers that integers, scales and zero points stand for, and ``bias`` the fused one, ``b + mode * colsum(W)``.
SCAP, arXiv 2412.07174, section 3 (thresholds) and 3.3 (mode centring).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..packing import dequantize
from .activation import activate
from .fc import accumulation_dtype
from .prune import prune


def pruned_input(x: torch.Tensor, threshold: float, mode: float) -> torch.Tensor:
    """``x - mode`` where its size exceeds ``threshold``, else 0; same shape, not rounded back to half types."""
    return prune(x.to(accumulation_dtype(x.dtype)), mode, threshold)


def sparse_fc_quant_exact(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sparse FC on packed weights, result ``[..., N]`` in the compute dtype (not rounded to ``x.dtype``).

    :param x: ``[..., K]`` floating.
    :param packed, scale, zero: see :mod:`scap_nncf.kernels.packing`.
    :param thresholds, segments: one threshold for each run of neighbouring outputs; ``sum(segments) == N``.
    :param bias: ``[N]``, already fused with ``mode * colsum(W)``.
    :param residual: ``[..., N]`` added to the result.
    """
    work = accumulation_dtype(x.dtype)
    w = dequantize(packed, scale, zero, bits, rounded=False, dtype=work)
    parts = []
    start = 0
    for threshold, width in zip(thresholds, segments, strict=True):
        parts.append(pruned_input(x, threshold, mode) @ w[:, start : start + width])
        start += width
    y = torch.cat(parts, -1)
    if bias is not None:
        y = y + bias.to(work)
    if residual is not None:
        y = y + residual.to(work)
    return y


def sparse_fc_quant(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`sparse_fc_quant_exact`, rounded to ``x.dtype``."""
    y = sparse_fc_quant_exact(x, packed, scale, zero, bits, thresholds, segments, mode, bias, residual)
    return y.to(x.dtype)


def sparse_glu_quant(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    gate_threshold: float,
    up_threshold: float,
    mode: float = 0.0,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(gate(x)) * up(x)`` on packed weights gate | up (``[K, 2N]``), result ``[..., N]`` in ``x.dtype``."""
    half = scale.shape[1] // 2
    y = sparse_fc_quant_exact(
        x, packed, scale, zero, bits, [gate_threshold, up_threshold], [half, half], mode, bias, None
    )
    return (activate(y[..., :half], activation) * y[..., half:]).to(x.dtype)
