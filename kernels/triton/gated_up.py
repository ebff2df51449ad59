# SPDX-License-Identifier: Apache-2.0
"""The second layer of a gated feed-forward where the gate is open alone (CATS): Triton kernel and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .glu import activate
from .rows import add_vector, kept


@triton.jit
def gated_up_kernel(
    gate_ptr, x_ptr, w_ptr, bias_ptr, out_ptr, M, N, K, stride_wn, threshold,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """
    out [M, N] = a * (x [M, K] @ w [N, K]^T + bias), a = act(gate [M, N]), zero where |a| <= threshold.

    A program an output channel. Its weight row is read once, and only when the gate of any row is open; each row
    multiplies its own gate, so that it gets what it would get alone.
    """
    n = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, ROWS)  # [ROWS]
    in_rows = m < M
    gate = tl.load(gate_ptr + m * N + n, mask=in_rows, other=0.0)
    a = activate(gate.to(tl.float32), ACTIVATION).to(gate_ptr.dtype.element_ty).to(tl.float32)
    is_open = kept(a, threshold, in_rows)
    if tl.sum(is_open.to(tl.int32), 0) > 0:
        acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            w = tl.load(w_ptr + n * stride_wn + k, mask=k < K, other=0.0, eviction_policy="evict_first")
            x = tl.load(
                x_ptr + m[:, None] * K + k[None, :],
                mask=in_rows[:, None] & (k < K)[None, :],
                other=0.0,
                eviction_policy="evict_last",
            )  # [ROWS, BLOCK_K]
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
        y = add_vector(tl.sum(acc, 1), bias_ptr, n + m * 0, in_rows, HAS_BIAS)
        y = tl.where(is_open, a * y, 0.0)
        tl.store(out_ptr + m * N + n, y.to(out_ptr.dtype.element_ty), mask=in_rows)
    else:
        tl.store(out_ptr + m * N + n, tl.zeros([ROWS], out_ptr.dtype.element_ty), mask=in_rows)


def launch_gated_up(
    gate: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    threshold: float,
    activation: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """
    One launch; nothing is checked here.

    :param gate: [M, N] contiguous, 1 <= M <= 4 (which of these are worth it: ``dispatch``).
    :param x: [M, K] contiguous.
    :param weight: [N, K], stride(1) == 1.
    :param bias: [N] contiguous or None.
    :param out: [M, N] contiguous, every element is written.
    """
    m, k = x.shape
    n = weight.shape[0]
    block = min(2048, triton.next_power_of_2(k))  # a row of 4096 halves is two loads of 16 bytes a thread of 128
    gated_up_kernel[(n,)](
        gate, x, weight, x if bias is None else bias, out, m, n, k, weight.stride(0), threshold,
        ACTIVATION=activation, HAS_BIAS=bias is not None, ROWS=triton.next_power_of_2(m), BLOCK_K=block, num_warps=4,
    )  # fmt: skip
