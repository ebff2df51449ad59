# SPDX-License-Identifier: Apache-2.0
"""Sparse kernel or dense matmul: decided on the host from the shape, never from data."""

from __future__ import annotations

import math
from functools import cache

import torch

from .tiles import family, measurements

MAX_ROWS = 16  # rows that the sparse kernels take; longer inputs are prefill and run dense
MAX_GATED_ROWS = 2  # of the gated layer: with four rows half open at random, decoding was 8 % slower than dense (H100)


@cache
def prefer_dense(device: torch.device, k: int, n: int, dtype: torch.dtype, rows: int, sparsity: float) -> bool:
    """
    Whether pruning and a dense matmul are expected to be faster than the sparse kernel.

    A weight row is read when any of the rows keeps its channel. With independent masks a share ``sparsity ** rows`` of
    the weights is skipped; real masks overlap more, so this errs to the dense side. One row never runs dense: pruning
    apart costs a launch, and the sparse kernel is as fast as the library at 0 % already.

    :param k: input channels.
    :param n: columns of the weight.
    :param rows: rows of the activation, 1 to ``MAX_ROWS``.
    :param sparsity: expected share of dropped inputs in one row.
    """
    return rows > 1 and max(sparsity, 0.0) ** rows < crossover(family(device), k, n, dtype.itemsize, rows)


def crossover(gpu: str, k: int, n: int, itemsize: int, rows: int) -> float:
    """Share of skipped weights from which on the sparse kernel wins: the measured one of the nearest shape."""
    table = measurements()["crossover"]
    measured = 1 << (rows - 1).bit_length()  # measured at 2, 4, 8 and 16 rows

    def distance(entry: dict[str, float]) -> tuple[float, ...]:
        shape = abs(math.log2(k / entry["k"])) + abs(math.log2(n / entry["n"]))
        return abs(entry["itemsize"] - itemsize), abs(entry["rows"] - measured), shape

    return float(min(table.get(gpu) or table["sm_90"], key=distance)["skipped"])
