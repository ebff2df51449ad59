# SPDX-License-Identifier: Apache-2.0
"""Packed 8/4-bit weight to a dense ``[K, columns]`` slice in one pass, for rows enough to use the matrix library."""

from __future__ import annotations

import triton
import triton.language as tl

from .quant_gemv import _unpack_int4, _unpack_int8


@triton.jit
def _put(a, cols, scale_ptr, zero_ptr, out_ptr, table, out_row, k_mask, first, columns, N, MID, ZERO: tl.constexpr):
    """Scale one plane [BLOCK_K, BLOCK_WORDS] and store it."""
    mask = k_mask[:, None] & (cols < N)[None, :] & (cols < first + columns)[None, :]
    scale = tl.load(scale_ptr + table + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if ZERO == 1:
        a = (a - (tl.load(zero_ptr + table + cols[None, :], mask=mask, other=0).to(tl.float32) - MID)) * scale
    elif ZERO == 2:
        # the source format rounds the product before it adds the offset
        a = (a * scale).to(scale_ptr.dtype.element_ty).to(tl.float32)
        a += tl.load(zero_ptr + table + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        a = a * scale
    tl.store(out_ptr + out_row + (cols - first)[None, :], a.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dequantize_kernel(
    w_ptr,  # [K, 16 * ROW_BLOCKS] int32
    scale_ptr,  # [K // group, N]
    zero_ptr,
    out_ptr,  # [K, columns]
    K,
    N,
    ROW_BLOCKS,
    GROUP,
    first_block,
    columns,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ZERO: tl.constexpr,
    PTX: tl.constexpr,
):
    PER: tl.constexpr = 32 // BITS
    MID: tl.constexpr = 1 << (BITS - 1)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    words = first_block * 16 + tl.program_id(0) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    base = (words // 16) * (16 * PER) + words % 16
    first = first_block * (16 * PER)
    km = k < K
    w = tl.load(
        w_ptr + k[:, None].to(tl.int64) * (ROW_BLOCKS * 16) + words[None, :],
        mask=km[:, None] & (words < ROW_BLOCKS * 16)[None, :],
        other=0,
    )
    table = (k // GROUP)[:, None] * N
    row = k[:, None].to(tl.int64) * columns
    if BITS == 4:
        a0, a1, a2, a3, a4, a5, a6, a7 = _unpack_int4(w, PTX)
        _put(a4, base + 64, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
        _put(a5, base + 80, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
        _put(a6, base + 96, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
        _put(a7, base + 112, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
    else:
        a0, a1, a2, a3 = _unpack_int8(w, PTX)
    _put(a0, base, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
    _put(a1, base + 16, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
    _put(a2, base + 32, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
    _put(a3, base + 48, scale_ptr, zero_ptr, out_ptr, table, row, km, first, columns, N, MID, ZERO)
