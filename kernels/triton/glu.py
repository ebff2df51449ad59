# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005 (Triton compiles tuple concatenation, not unpacking)
"""Gate, up and activation in one launch over one mask: Triton kernels and their launch."""

from __future__ import annotations

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
    unpack_value,
    write_list,
)
from .tiles import Tile
from .workspace import take


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """Activation of a float32 tensor, the definitions of ``kernels.reference.activation``."""
    tl.static_assert(
        ACTIVATION == "silu"
        or ACTIVATION == "gelu"
        or ACTIVATION == "gelu_tanh"
        or ACTIVATION == "relu"
        or ACTIVATION == "relu2",
        "unknown activation",
    )
    if ACTIVATION == "silu":
        g = g * tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))  # 1 / sqrt(2)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (g + 0.044715 g^3)
        g = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        g = tl.where(g <= 0.0, 0.0, g)  # NaN stays
        if ACTIVATION == "relu2":
            g = g * g
    return g


@triton.jit
def glu_row_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, part_ptr, list_ptr, ticket_ptr,
    K, N, stride_wk, splits, span, mode, gate_threshold, up_threshold,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, ATOMIC: tl.constexpr, ONE_THRESHOLD: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, UNROLL: tl.constexpr, SUM_UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """
    out [N] = act(gate [N]) * up [N], gate | up = prune(x [K] - mode) @ w [K, 2N] + bias [2N].

    As ``fc_row_kernel``, with two strips a program: BLOCK_N columns of gate and the same columns of up. The list is
    that of the smaller threshold; where the thresholds differ, each half also tests its own.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    cols = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    group = tl.arange(0, GROUPS)[:, None]  # [G, 1]
    follow_producer(PDL)
    lane = tl.arange(0, ROWS)
    k = split * span + lane  # [ROWS]
    inside_k = (lane < span) & (k < K)
    z = tl.load(x_ptr + k, mask=inside_k, other=0.0, eviction_policy="evict_last").to(tl.float32) - mode
    mine = list_ptr + (strip * splits + split) * ROWS
    count = write_list(mine, kept(z, tl.minimum(gate_threshold, up_threshold), inside_k), pack(k, z))
    gate = tl.zeros([GROUPS, BLOCK_N], tl.float32)
    up = tl.zeros([GROUPS, BLOCK_N], tl.float32)
    for j in range(0, count, GROUPS * UNROLL):
        values = ()
        gates = ()
        ups = ()
        for r in tl.static_range(UNROLL):
            at = j + r * GROUPS + group
            entry = tl.load(mine + at, mask=at < count, other=0)
            value = unpack_value(entry)
            row = w_ptr + (entry >> 32) * stride_wk + cols[None, :]
            if ONE_THRESHOLD:
                gate_mask = (at < count) & in_cols[None, :]
                up_mask = (at < count) & in_cols[None, :]
            else:
                gate_mask = kept(value, gate_threshold, at < count) & in_cols[None, :]
                up_mask = kept(value, up_threshold, at < count) & in_cols[None, :]
            gates = gates + (tl.load(row, mask=gate_mask, other=0.0, eviction_policy="evict_first"),)  # type: ignore[assignment]
            ups = ups + (tl.load(row + N, mask=up_mask, other=0.0, eviction_policy="evict_first"),)  # type: ignore[assignment]
            values = values + (value,)  # type: ignore[assignment]
        for r in tl.static_range(UNROLL):
            # a value below one threshold meets the zeros that stand for that half's unread weights
            gate += values[r] * gates[r].to(tl.float32)
            up += values[r] * ups[r].to(tl.float32)
    if GROUPS == 1:
        g = tl.reshape(gate, [BLOCK_N])
        u = tl.reshape(up, [BLOCK_N])
    else:
        g = tl.sum(gate, 0)
        u = tl.sum(up, 0)
    if ATOMIC:
        tl.atomic_add(part_ptr + cols, g, mask=in_cols, sem="relaxed")
        tl.atomic_add(part_ptr + N + cols, u, mask=in_cols, sem="relaxed")
    else:
        mine = part_ptr + split.to(tl.int64) * 2 * N
        tl.store(mine + cols, g, mask=in_cols, cache_modifier=".cg")
        tl.store(mine + N + cols, u, mask=in_cols, cache_modifier=".cg")
    if arrive(ticket_ptr + strip) == splits - 1:
        if ATOMIC:
            g = tl.load(part_ptr + cols, mask=in_cols, other=0.0, cache_modifier=".cg")
            u = tl.load(part_ptr + N + cols, mask=in_cols, other=0.0, cache_modifier=".cg")
        else:
            g = add_partials(part_ptr, 2 * N, splits, cols, in_cols, BLOCK_N, SUM_UNROLL)
            u = add_partials(part_ptr, 2 * N, splits, N + cols, in_cols, BLOCK_N, SUM_UNROLL)
        g = add_vector(g, bias_ptr, cols, in_cols, HAS_BIAS)
        u = add_vector(u, bias_ptr, N + cols, in_cols, HAS_BIAS)
        tl.store(out_ptr + cols, (activate(g, ACTIVATION) * u).to(out_ptr.dtype.element_ty), mask=in_cols)
        tl.store(ticket_ptr + strip, 0)


@triton.jit
def gate_kernel(h_ptr, out_ptr, N, total, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N] = act(h [M, :N]) * h [M, N:]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    h_at = at // N * (2 * N) + at % N
    g = tl.load(h_ptr + h_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(h_ptr + h_at + N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (activate(g, ACTIVATION) * u).to(out_ptr.dtype.element_ty), mask=mask)


def launch_glu(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate_threshold: float,
    up_threshold: float,
    mode: float,
    activation: str,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    deterministic: bool = True,
) -> None:
    """
    One launch for one row; nothing is checked here.

    :param x: [1, K] contiguous.
    :param weight: [K, 2N], stride(1) == 1.
    :param bias: [2N] contiguous or None.
    :param out: [1, N] contiguous, every element is written.
    """
    k = x.shape[1]
    n = weight.shape[1] // 2
    strips = triton.cdiv(n, tile.block_n)
    splits = triton.cdiv(k, tile.span(k))
    part, entries, tickets = take(x.device, strips, splits, tile.rows, 2 * n, deterministic)
    glu_row_kernel[(strips, splits)](
        x, weight, bias if bias is not None else x, out, part, entries, tickets,
        k, n, weight.stride(0), splits, tile.span(k), mode, gate_threshold, up_threshold,
        ACTIVATION=activation, HAS_BIAS=bias is not None, ATOMIC=not deterministic,
        ONE_THRESHOLD=gate_threshold == up_threshold, BLOCK_N=tile.block_n, ROWS=tile.rows, GROUPS=tile.groups,
        UNROLL=tile.unroll, SUM_UNROLL=tile.sum_unroll(), **tile.launch_options(x.device),
    )  # fmt: skip


def launch_gate(h: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """
    Activation and product alone, for rows that took the dense path.

    :param h: [M, 2N] contiguous.
    :param out: [M, N] contiguous.
    """
    gate_kernel[(triton.cdiv(out.numel(), 1024),)](h, out, out.shape[1], out.numel(), activation, BLOCK=1024)
