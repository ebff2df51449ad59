# SPDX-License-Identifier: Apache-2.0
"""Small-batch (2 to 16 rows) sparse product on 8-bit and 4-bit weights, on tensor cores.

The rows of x share one pass over the weights: an input channel is loaded when any row keeps it (union of the masks),
and each row multiplies its own pruned value, zero where that row dropped the channel. Rows are padded to the 16 that
the smallest matrix instruction takes, so the cost hardly depends on their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quant_gemv import UNSPECIALIZED, _activate, _unpack_int4, _unpack_int8, gdc_launch_dependents, gdc_wait


@triton.jit
def _dot(z, a, acc, PRECISION: tl.constexpr):
    return tl.dot(z, a.to(z.dtype), acc, input_precision=PRECISION)


@triton.jit
def _emit(c, cols, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID: tl.constexpr, ZERO: tl.constexpr):
    """Scale one plane of sums [BLOCK_M, BLOCK_WORDS] and store it to the workspace."""
    mask = (cols >= first) & (cols < last)
    s = tl.load(scale_ptr + table + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    if ZERO == 1:
        z = tl.load(zero_ptr + table + cols, mask=mask, other=0).to(tl.float32) - MID
        c = (c - z[None, :] * zsum[:, None]) * s
    elif ZERO == 2:
        z = tl.load(zero_ptr + table + cols, mask=mask, other=0.0).to(tl.float32)
        c = c * s + z[None, :] * zsum[:, None]
    else:
        c = c * s
    tl.store(out + cols[None, :], c, mask=row_mask[:, None] & mask[None, :], cache_modifier=".cg")


@triton.jit
def _sum_splits(part_ptr, rows, N, M, cols, mask, splits, BM: tl.constexpr, BN: tl.constexpr):
    acc = tl.zeros([BM, BN], tl.float32)
    for j in range(0, splits):
        acc += tl.load(
            part_ptr + (j * M + rows)[:, None] * N + cols[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
    return acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sparse_quant_batch_kernel(
    x_ptr,  # [M, K] fp16, bf16 or fp32
    w_ptr,  # [K, 16 * ROW_BLOCKS] int32 words of 32 // BITS columns
    scale_ptr,  # [K // group, N]
    zero_ptr,  # [K // group, N], unused when ZERO == 0
    bias_ptr,  # [N], unused when not HAS_BIAS
    res_ptr,  # [M, N] like y, unused when not HAS_RES
    y_ptr,  # [M, N], or [M, N // 2] for GLU
    part_ptr,  # [splits, M, N] float32
    ticket_ptr,  # [tiles] int32 zeros, zero again at the end
    M,
    K,
    N,
    ROW_BLOCKS,
    GROUP,
    splits,
    mode,
    thr0,
    thr1,
    thr2,
    thr3,
    col0,
    col1,
    col2,
    col3,
    col_end,
    block0,
    block1,
    block2,
    block3,
    tile1,
    tile2,
    tile3,
    BITS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # input channels a step; divides RUN
    RUN: tl.constexpr,  # input channels a program; divides the group, or the group is K
    BLOCK_M: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RES: tl.constexpr,
    ACT: tl.constexpr,
    CENTRED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: the interpreter has no bfloat16 product
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: all rows, ``BLOCK_WORDS * 32 // BITS`` columns, ``RUN`` input channels of one quantisation group."""
    PER: tl.constexpr = 32 // BITS
    MID: tl.constexpr = 1 << (BITS - 1)
    BN: tl.constexpr = BLOCK_WORDS * PER
    tile = tl.program_id(0)
    split = tl.program_id(1)
    thr = thr0
    first = col0
    last = col_end
    block = block0
    t = tile
    if SEGMENTS > 1:
        last = col1
        if tile >= tile1:
            thr = thr1
            first = col1
            block = block1
            last = col_end
            t = tile - tile1
        if SEGMENTS > 2:
            if tile >= tile1 and tile < tile2:
                last = col2
            if tile >= tile2:
                thr = thr2
                first = col2
                block = block2
                last = col_end
                t = tile - tile2
        if SEGMENTS > 3:
            if tile >= tile2 and tile < tile3:
                last = col3
            if tile >= tile3:
                thr = thr3
                first = col3
                block = block3
                last = col_end
                t = tile - tile3
    word0 = block * 16 + t * BLOCK_WORDS
    words = word0 + tl.arange(0, BLOCK_WORDS)
    word_mask = (words < ROW_BLOCKS * 16)[None, :]
    base = (words // 16) * (16 * PER) + words % 16  # column of plane 0 of each word; plane j is 16 * j further
    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < M
    k0 = split * RUN

    c0 = tl.zeros([BLOCK_M, BLOCK_WORDS], tl.float32)
    c1 = c0
    c2 = c0
    c3 = c0
    if BITS == 4:
        c4 = c0
        c5 = c0
        c6 = c0
        c7 = c0
    zsum = tl.zeros([BLOCK_M], tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for s in tl.range(0, RUN, BLOCK_K, num_stages=STAGES):
        k = k0 + s + tl.arange(0, BLOCK_K)
        km = k < K
        x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=row_mask[:, None] & km[None, :], other=0.0)
        z = x.to(tl.float32)
        if CENTRED:
            z -= mode
        keep = ~(tl.abs(z) <= thr) & row_mask[:, None] & km[None, :]
        z = tl.where(keep, z, 0.0)
        live = tl.max(keep.to(tl.int32), 0) != 0
        w = tl.load(
            w_ptr + k[:, None] * (ROW_BLOCKS * 16) + words[None, :],
            mask=live[:, None] & word_mask,
            other=0,
            eviction_policy="evict_first",
        )
        if ZERO != 0:
            zsum += tl.sum(z, 1)
        zx = z if WIDE else z.to(x_ptr.dtype.element_ty)
        if BITS == 4:
            a0, a1, a2, a3, a4, a5, a6, a7 = _unpack_int4(w, PTX)
            c4 = _dot(zx, a4, c4, PRECISION)
            c5 = _dot(zx, a5, c5, PRECISION)
            c6 = _dot(zx, a6, c6, PRECISION)
            c7 = _dot(zx, a7, c7, PRECISION)
        else:
            a0, a1, a2, a3 = _unpack_int8(w, PTX)
        c0 = _dot(zx, a0, c0, PRECISION)
        c1 = _dot(zx, a1, c1, PRECISION)
        c2 = _dot(zx, a2, c2, PRECISION)
        c3 = _dot(zx, a3, c3, PRECISION)

    table = (k0 // GROUP) * N
    out = part_ptr + (split * M + rows)[:, None] * N
    _emit(c0, base, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
    _emit(c1, base + 16, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
    _emit(c2, base + 32, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
    _emit(c3, base + 48, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
    if BITS == 4:
        _emit(c4, base + 64, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
        _emit(c5, base + 80, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
        _emit(c6, base + 96, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)
        _emit(c7, base + 112, table, scale_ptr, zero_ptr, zsum, out, row_mask, first, last, MID, ZERO)

    # Every thread's stores must be visible before the one thread that takes the ticket releases them.
    tl.debug_barrier()
    slot = tile
    expected = splits
    if ACT != "none":
        slot = t
        expected = 2 * splits
    if tl.atomic_add(ticket_ptr + slot, 1, sem="acq_rel") == expected - 1:
        tl.store(ticket_ptr + slot, 0)
        if ACT == "none":
            cols = word0 * PER + tl.arange(0, BN)
            col_mask = (cols >= first) & (cols < last)
            mask = row_mask[:, None] & col_mask[None, :]
            y = _sum_splits(part_ptr, rows, N, M, cols, mask, splits, BLOCK_M, BN)
            if HAS_BIAS:
                y += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            if HAS_RES:
                y += tl.load(res_ptr + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            half = N // 2
            gcols = t * BN + tl.arange(0, BN)
            gcol_mask = gcols < half
            gmask = row_mask[:, None] & gcol_mask[None, :]
            g = _sum_splits(part_ptr, rows, N, M, gcols, gmask, splits, BLOCK_M, BN)
            u = _sum_splits(part_ptr, rows, N, M, gcols + half, gmask, splits, BLOCK_M, BN)
            if HAS_BIAS:
                g += tl.load(bias_ptr + gcols, mask=gcol_mask, other=0.0).to(tl.float32)[None, :]
                u += tl.load(bias_ptr + half + gcols, mask=gcol_mask, other=0.0).to(tl.float32)[None, :]
            h = _activate(g, ACT) * u
            tl.store(y_ptr + rows[:, None] * half + gcols[None, :], h.to(y_ptr.dtype.element_ty), mask=gmask)
