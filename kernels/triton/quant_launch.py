# SPDX-License-Identifier: Apache-2.0
"""Host side of the quantised kernels: tiles, segments, workspace, launch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton

from ..packing import BLOCK_WORDS
from .quant_batch import sparse_quant_batch_kernel
from .quant_dequant import dequantize_kernel
from .quant_gemv import HAS_PDL, sparse_quant_gemv_kernel
from .quant_tiles import BatchTile, GemvTile, batch_tile, gemv_tile, one_row_at_a_time
from .workspace import take_tickets

MAX_ROWS = 16  # rows that the small-batch kernel takes
_MAX_SEGMENTS = 4


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _use_ptx(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and not interpreted()


def _use_pdl(x: torch.Tensor) -> bool:
    return HAS_PDL and _use_ptx(x) and torch.cuda.get_device_capability(x.device)[0] >= 9


def _merge_segments(thresholds: Sequence[float], segments: Sequence[int]) -> list[tuple[float, int, int]]:
    """``(threshold, first column, end column)``, neighbours with equal thresholds joined, empty ones dropped."""
    merged: list[tuple[float, int, int]] = []
    start = 0
    for threshold, width in zip(thresholds, segments, strict=True):
        end = start + width
        if width:
            if merged and merged[-1][0] == threshold:
                merged[-1] = (threshold, merged[-1][1], end)
            else:
                merged.append((threshold, start, end))
        start = end
    return merged


def _segment_args(
    parts: Sequence[tuple[float, int, int]], per: int, block_words: int
) -> tuple[dict[str, float | int], int]:
    """Kernel arguments that say which tile belongs to which segment, and the number of tiles."""
    args: dict[str, float | int] = {}
    tiles = 0
    for i in range(_MAX_SEGMENTS):
        threshold, first, end = parts[i] if i < len(parts) else (0.0, 0, 0)
        block = first // (BLOCK_WORDS * per)
        args[f"thr{i}"] = float(threshold)
        args[f"col{i}"] = first
        args[f"block{i}"] = block
        if i:
            args[f"tile{i}"] = tiles
        if i < len(parts):
            tiles += triton.cdiv(end - block * BLOCK_WORDS * per, block_words * per)
    args["col_end"] = parts[-1][2]
    return args, tiles


def _zero_kind(zero: torch.Tensor | None) -> int:
    if zero is None:
        return 0
    return 2 if zero.is_floating_point() else 1


def launch_sparse_quant(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    thresholds: Sequence[float],
    segments: Sequence[int],
    mode: float,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str = "none",
    tile: GemvTile | BatchTile | None = None,
    pdl: bool | None = None,
    ptx: bool | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the one-row or the small-batch kernel on contiguous tensors.

    :param x: ``[M, K]``, 1 to ``MAX_ROWS`` rows.
    :param activation: "none", or the name of a gated activation; then ``segments`` are the two halves of a GLU and each
        must fill whole 16-word blocks.
    :param tile, pdl, ptx: overrides for measurements and tests.
    :param out: result tensor to fill; made when None.
    :returns: ``[M, N]`` or, for a GLU, ``[M, N / 2]``, in ``x.dtype``.
    """
    m, k = x.shape
    n = scale.shape[1]
    group = k // scale.shape[0]
    per = 32 // bits
    if tile is None:
        if one_row_at_a_time(m):
            tile = gemv_tile(bits, k, n, group, wide=x.dtype == torch.float32)
        else:
            tile = batch_tile(bits, k, n, group)
    one_row = isinstance(tile, GemvTile)
    channels = tile.run * tile.warps if isinstance(tile, GemvTile) else tile.run
    splits = triton.cdiv(k, channels)
    glu = activation != "none"
    y = torch.empty((m, n // 2 if glu else n), dtype=x.dtype, device=x.device) if out is None else out
    split = splits > 1 or glu or not one_row
    part = torch.empty((m * splits * n,) if split else (1,), dtype=torch.float32, device=x.device)
    parts = _merge_segments(thresholds, segments)
    if glu:
        # gate and up tiles must pair up even where one threshold serves both
        parts = [(thresholds[0], 0, n // 2), (thresholds[1], n // 2, n)]
    ptx = _use_ptx(x) if ptx is None else ptx
    pdl = _use_pdl(x) if pdl is None else pdl
    options = {"launch_pdl": True} if pdl else {}
    for at in range(0, len(parts), _MAX_SEGMENTS):
        chunk = parts[at : at + _MAX_SEGMENTS]
        args, tiles = _segment_args(chunk, per, tile.block_words)
        common = {
            "BITS": bits,
            "SEGMENTS": len(chunk),
            "BLOCK_WORDS": tile.block_words,
            "RUN": tile.run,
            "ZERO": _zero_kind(zero),
            "HAS_BIAS": bias is not None,
            "HAS_RES": residual is not None,
            "ACT": activation,
            "CENTRED": mode != 0.0,
            "PTX": ptx,
            "PDL": pdl,
            "num_warps": tile.warps,
            **options,
        }
        tensors = (
            x,
            packed,
            scale,
            scale if zero is None else zero,
            scale if bias is None else bias,
            x if residual is None else residual,
            y,
            part,
        )
        sizes = {
            "M": m,
            "K": k,
            "N": n,
            "ROW_BLOCKS": packed.shape[1] // BLOCK_WORDS,
            "GROUP": group,
            "splits": splits,
            "mode": float(mode),
        }
        if isinstance(tile, GemvTile):
            if ptx and tile.registers:
                common["maxnreg"] = tile.registers
            tickets = take_tickets(x.device, tiles * m)
            sparse_quant_gemv_kernel[(tiles * m, splits)](
                *tensors,
                tickets,
                **sizes,
                **args,
                WARPS=tile.warps,
                ROWS=tile.rows,
                UNROLL=tile.unroll,
                SPLIT=split,
                HALF=ptx and x.dtype != torch.float32,
                **common,
            )
        else:
            tickets = take_tickets(x.device, tiles)
            sparse_quant_batch_kernel[(tiles, splits)](
                *tensors,
                tickets,
                **sizes,
                **args,
                BLOCK_K=tile.block_k,
                BLOCK_M=16,
                STAGES=tile.stages,
                PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee",
                WIDE=interpreted(),
                **common,
            )
    return y


def dequantize_columns(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    first: int,
    columns: int,
    dtype: torch.dtype,
    ptx: bool | None = None,
) -> torch.Tensor:
    """Dense ``[K, columns]`` slice of the weight that starts at output ``first`` (a multiple of 16 words)."""
    k = packed.shape[0]
    n = scale.shape[1]
    per = 32 // bits
    if first % (BLOCK_WORDS * per):
        raise ValueError(f"a slice must start at a multiple of {BLOCK_WORDS * per} outputs, got {first}")
    out = torch.empty((k, columns), dtype=dtype, device=packed.device)
    block_k, block_words = 8, 64
    grid = (triton.cdiv(columns, block_words * per), triton.cdiv(k, block_k))
    dequantize_kernel[grid](
        packed,
        scale,
        scale if zero is None else zero,
        out,
        k,
        n,
        packed.shape[1] // BLOCK_WORDS,
        k // scale.shape[0],
        first // (BLOCK_WORDS * per),
        columns,
        BITS=bits,
        BLOCK_K=block_k,
        BLOCK_WORDS=block_words,
        ZERO=_zero_kind(zero),
        PTX=(packed.is_cuda and torch.version.hip is None and not interpreted()) if ptx is None else ptx,
        num_warps=4,
    )
    return out
