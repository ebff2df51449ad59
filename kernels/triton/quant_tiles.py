# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the quantised kernels: plain host arithmetic on shape and row count, no search at run time."""

from __future__ import annotations

from dataclasses import dataclass


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
    stages: int = 2


def supports_group(group: int, k: int) -> bool:
    """Whether the kernels can serve this group size: a multiple of 32, or one group for the whole input."""
    return group == k or group % 32 == 0


def _largest_run(group: int, k: int, limit: int) -> int:
    """Largest power of two in 32..limit that keeps a run inside one group."""
    run = 32
    while run * 2 <= limit and (group == k or group % (run * 2) == 0):
        run *= 2
    return run


def gemv_tile(bits: int, k: int, n: int, group: int) -> GemvTile:
    """Tile for one row."""
    words = -(-n // (32 // bits))
    block_words = 64
    while block_words > 16 and block_words // 2 >= words:
        block_words //= 2
    return GemvTile(block_words=block_words, warps=8, run=_largest_run(group, k, 32), rows=4)


def batch_tile(bits: int, k: int, n: int, group: int) -> BatchTile:
    """Tile for 2 to 16 rows."""
    run = _largest_run(group, k, 128)
    return BatchTile(block_words=32, block_k=run, run=run, warps=4, stages=1)
