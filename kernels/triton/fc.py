# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005 (Triton compiles tuple concatenation, not unpacking)
"""Sparse FC on one row, and on a few rows through the union of their masks: Triton kernels and their launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .rows import (
    add_partials,
    add_vector,
    arrive,
    follow_producer,
    kept,
    pack,
    segment_of,
    unpack_value,
    write_list,
)
from .tiles import Tile
from .workspace import take

MAX_SEGMENTS = 4


@triton.jit
def fc_row_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, part_ptr, list_ptr, ticket_ptr,
    K, N, stride_wk, splits, span, mode,
    n0, n1, n2, n3, t0, t1, t2, t3,
    SEGMENTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ATOMIC: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, UNROLL: tl.constexpr, SUM_UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """
    y [N] = prune(x [K] - mode) @ w [K, N] + bias + residual.

    Grid (strips of columns, splits of K). A program lists what it keeps of ROWS input channels; GROUPS of warps then
    read a weight row each, UNROLL of them in flight, and meet before anything leaves the program.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    first, end, threshold = segment_of(strip, n0, n1, n2, n3, t0, t1, t2, t3, SEGMENTS, BLOCK_N)
    cols = first + tl.arange(0, BLOCK_N)
    in_cols = cols < end
    group = tl.arange(0, GROUPS)[:, None]  # [G, 1]
    follow_producer(PDL)
    lane = tl.arange(0, ROWS)
    k = split * span + lane  # [ROWS]
    inside_k = (lane < span) & (k < K)
    z = tl.load(x_ptr + k, mask=inside_k, other=0.0, eviction_policy="evict_last").to(tl.float32) - mode
    mine = list_ptr + (strip * splits + split) * ROWS
    count = write_list(mine, kept(z, threshold, inside_k), pack(k, z))
    acc = tl.zeros([GROUPS, BLOCK_N], tl.float32)
    for j in range(0, count, GROUPS * UNROLL):
        entries = ()
        weights = ()
        # All loads first: given enough registers (maxnreg) the compiler keeps them all in flight. Left to itself it
        # prefers occupancy and waits for one row before it asks for the next.
        for r in tl.static_range(UNROLL):
            at = j + r * GROUPS + group
            entry = tl.load(mine + at, mask=at < count, other=0)  # 0: row 0 times 0.0, and not loaded
            entries = entries + (entry,)  # type: ignore[assignment]
            weights = weights + (  # type: ignore[assignment]
                tl.load(
                    w_ptr + (entry >> 32) * stride_wk + cols[None, :],
                    mask=(at < count) & in_cols[None, :],
                    other=0.0,
                    eviction_policy="evict_first",
                ),
            )
        for r in tl.static_range(UNROLL):
            acc += unpack_value(entries[r]) * weights[r].to(tl.float32)
    if GROUPS == 1:
        y = tl.reshape(acc, [BLOCK_N])
    else:
        y = tl.sum(acc, 0)
    if ATOMIC:
        tl.atomic_add(part_ptr + cols, y, mask=in_cols, sem="relaxed")
    else:
        tl.store(part_ptr + split.to(tl.int64) * N + cols, y, mask=in_cols, cache_modifier=".cg")
    if arrive(ticket_ptr + strip) == splits - 1:
        if ATOMIC:
            y = tl.load(part_ptr + cols, mask=in_cols, other=0.0, cache_modifier=".cg")
        else:
            y = add_partials(part_ptr, N, splits, cols, in_cols, BLOCK_N, SUM_UNROLL)
        y = add_vector(y, bias_ptr, cols, in_cols, HAS_BIAS)
        y = add_vector(y, residual_ptr, cols, in_cols, HAS_RESIDUAL)
        tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=in_cols)
        tl.store(ticket_ptr + strip, 0)


@triton.jit
def fc_rows_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, part_ptr, list_ptr, ticket_ptr,
    M, K, N, stride_wk, splits, span, mode,
    n0, n1, n2, n3, t0, t1, t2, t3,
    SEGMENTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ATOMIC: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SUM_UNROLL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    y [M, N] for 2 to 16 rows: a weight row is read once when any of the rows keeps its channel, and each row multiplies
    its own pruned value, so that every row gets what it would get alone. Tensor cores, since 16 rows of plain products
    would cost more than the loads; the pruned values are rounded to the dtype of the weights, as a dense layer would.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    first, end, threshold = segment_of(strip, n0, n1, n2, n3, t0, t1, t2, t3, SEGMENTS, BLOCK_N)
    cols = first + tl.arange(0, BLOCK_N)
    in_cols = cols < end
    m = tl.arange(0, 16)[:, None]  # [16, 1]
    follow_producer(PDL)
    lane = tl.arange(0, ROWS)
    k = split * span + lane  # [ROWS]
    inside_k = (lane < span) & (k < K)
    any_kept = tl.zeros([ROWS], tl.int32)
    for i in range(0, M):
        z = tl.load(x_ptr + i * K + k, mask=inside_k, other=0.0, eviction_policy="evict_last").to(tl.float32) - mode
        any_kept = any_kept | kept(z, threshold, inside_k).to(tl.int32)
    mine = list_ptr + (strip * splits + split) * ROWS
    count = write_list(mine, any_kept != 0, k.to(tl.int64))
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    for j in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        at = j + tl.arange(0, BLOCK_K)
        listed = at < count  # [BLOCK_K]
        row = tl.load(mine + at, mask=listed, other=0)
        w = tl.load(
            w_ptr + row[:, None] * stride_wk + cols[None, :],
            mask=listed[:, None] & in_cols[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )  # [BLOCK_K, BLOCK_N]
        inside = (m < M) & listed[None, :]
        z = tl.load(x_ptr + m * K + row[None, :], mask=inside, other=0.0).to(tl.float32) - mode  # [16, BLOCK_K]
        z = tl.where(kept(z, threshold, inside), z, 0.0)
        z = z.to(w.dtype)
        if WIDEN:  # Triton's interpreter has no product of bfloat16
            acc = tl.dot(z.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(z, w, acc, input_precision=PRECISION)
    at = m * N + cols[None, :]  # [16, BLOCK_N]
    inside = (m < M) & in_cols[None, :]
    if ATOMIC:
        tl.atomic_add(part_ptr + at, acc, mask=inside, sem="relaxed")
    else:
        tl.store(part_ptr + split.to(tl.int64) * M * N + at, acc, mask=inside, cache_modifier=".cg")
    if arrive(ticket_ptr + strip) == splits - 1:
        for i in range(0, M):  # row by row: the registers of one strip are enough
            row_at = i * N + cols
            if ATOMIC:
                y = tl.load(part_ptr + row_at, mask=in_cols, other=0.0, cache_modifier=".cg")
            else:
                y = add_partials(part_ptr, M * N, splits, row_at, in_cols, BLOCK_N, SUM_UNROLL)
            y = add_vector(y, bias_ptr, cols, in_cols, HAS_BIAS)
            y = add_vector(y, residual_ptr, row_at, in_cols, HAS_RESIDUAL)
            tl.store(out_ptr + row_at, y.to(out_ptr.dtype.element_ty), mask=in_cols)
        tl.store(ticket_ptr + strip, 0)


def launch_fc(
    x: torch.Tensor,
    weight: torch.Tensor,
    segments: Sequence[tuple[float, int]],
    mode: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    deterministic: bool = True,
) -> None:
    """
    One launch; nothing is checked here.

    :param x: [M, K] contiguous, 1 <= M <= 16.
    :param weight: [K, N], stride(1) == 1.
    :param segments: (threshold, columns), at most ``MAX_SEGMENTS``, columns sum to N.
    :param bias: [N] contiguous or None.
    :param residual: [M, N] contiguous or None.
    :param out: [M, N] contiguous, every element is written.
    """
    m, k = x.shape
    n = weight.shape[1]
    strips = sum(triton.cdiv(columns, tile.block_n) for _, columns in segments)
    splits = triton.cdiv(k, tile.span(k))
    part, entries, tickets = take(x.device, strips, splits, tile.rows, m * n, deterministic)
    padded = list(segments) + [(0.0, 0)] * (MAX_SEGMENTS - len(segments))
    sizes = [columns for _, columns in padded]
    limits = [threshold for threshold, _ in padded]
    some_bias = x if bias is None else bias  # a pointer that is never read
    some_residual = x if residual is None else residual
    arguments = (x, weight, some_bias, some_residual, out, part, entries, tickets)
    flags = {
        "SEGMENTS": len(segments),
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ATOMIC": not deterministic,
        "BLOCK_N": tile.block_n,
        "ROWS": tile.rows,
        "SUM_UNROLL": tile.sum_unroll(),
        **tile.launch_options(x.device),
    }
    if m == 1:
        fc_row_kernel[(strips, splits)](
            *arguments, k, n, weight.stride(0), splits, tile.span(k), mode, *sizes, *limits,
            GROUPS=tile.groups, UNROLL=tile.unroll, **flags,
        )  # fmt: skip
    else:
        fc_rows_kernel[(strips, splits)](
            *arguments, m, k, n, weight.stride(0), splits, tile.span(k), mode, *sizes, *limits,
            BLOCK_K=tile.unroll, STAGES=tile.groups, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            WIDEN=x.device.type != "cuda", **flags,
        )  # fmt: skip
