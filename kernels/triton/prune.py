# SPDX-License-Identifier: Apache-2.0
"""The pruner alone, one pass: for rows whose product runs dense."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def prune_kernel(x_ptr, out_ptr, total, mode, threshold, BLOCK: tl.constexpr):
    """out = x - mode where |x - mode| > threshold, else 0; NaN stays."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    z = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mode
    z = tl.where(tl.abs(z) <= threshold, 0.0, z)
    tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=mask)


def launch_prune(x: torch.Tensor, mode: float, threshold: float, out: torch.Tensor) -> None:
    """
    :param x: contiguous, any shape.
    :param out: contiguous, same shape and dtype.
    """
    prune_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), mode, threshold, BLOCK=1024)
