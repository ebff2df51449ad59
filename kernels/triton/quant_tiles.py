# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the quantised kernels: plain host arithmetic on shape and row count, no search at run time."""

from __future__ import annotations

from dataclasses import dataclass

from ..packing import row_words


@dataclass(frozen=True)
class GemvTile:
    """Tile of the one-row kernel; see ``quant_gemv``."""

    block_words: int  # int32 words a program covers in a row
    warps: int  # warps a program, each on its own input channels
    run: int  # input channels a warp; a multiple of 32
    rows: int  # kept rows loaded before the first is used
    unroll: int = 16  # partial sums loaded at once by the program that finishes a tile
    registers: int = 0  # most registers a thread may use; 0 leaves it to the compiler


@dataclass(frozen=True)
class BatchTile:
    """Tile of the small-batch kernel; see ``quant_batch``."""

    block_words: int
    block_k: int
    run: int
    warps: int
    stages: int = 1


def supports_group(group: int, k: int) -> bool:
    """Whether the kernels can serve this group size: a multiple of 32, or one group for the whole input."""
    return group == k or group % 32 == 0


def _largest_run(group: int, k: int, limit: int) -> int:
    """Largest power of two in 32..limit that keeps a run inside one group."""
    run = 32
    while run * 2 <= limit and (group == k or group % (run * 2) == 0):
        run *= 2
    return run


# Fewest programs worth having: about four on each of the 132 multiprocessors of an H100. With fewer, latency shows;
# with more and shorter runs, the sums that programs exchange do.
_PROGRAMS = 512


def gemv_tile(bits: int, k: int, n: int, group: int, wide: bool = False) -> GemvTile:
    """
    Tile of the one-row kernel, from sweeps on an H100 (4096x14336, 14336x4096 and 4096x4096, 0 to 90 % sparsity).

    4-bit weights like narrow tiles with eight rows in flight, 8-bit ones twice the width with four. The register limits
    are those at which all programs of the large shapes are resident at once.

    :param wide: activations are float32, which needs registers for exact sums.
    """
    words = row_words(n, bits)

    def programs(block_words: int, run: int) -> int:
        return -(-words // block_words) * -(-k // (4 * run))

    if bits == 8 and programs(64, _largest_run(group, k, 64)) >= _PROGRAMS:
        run = _largest_run(group, k, 128)
        while run > 64 and programs(64, run) < _PROGRAMS:
            run //= 2
        return GemvTile(block_words=64, warps=4, run=run, rows=4, registers=0 if wide else 96)
    run = _largest_run(group, k, 128)
    while run > 32 and programs(32, run) < _PROGRAMS:
        run //= 2
    block_words = 16 if words <= 16 else 32
    return GemvTile(block_words, warps=4, run=run, rows=8, registers=0 if wide else 72 if run > 32 else 64)


def batch_tile(bits: int, k: int, n: int, group: int) -> BatchTile:
    """Tile of the small-batch kernel."""
    run = _largest_run(group, k, 128)
    if bits == 8:
        return BatchTile(block_words=64, block_k=run, run=run, warps=8)
    return BatchTile(block_words=32, block_k=min(run, 64), run=run, warps=4)


def one_row_at_a_time(rows: int) -> bool:
    """Whether a few rows are served best by the one-row kernel, each with its own mask: up to five on an H100.

    The rows' programs run side by side and meet each other's weights in the L2 cache, and no row multiplies what only
    another keeps.
    """
    return rows <= 5
