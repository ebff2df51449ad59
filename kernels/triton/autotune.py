# SPDX-License-Identifier: Apache-2.0
"""
Bounded search for a tile, on request, remembered on disk.

Nothing here runs by itself: call :func:`tune` for the shapes of a model once, and every later process on that GPU finds
the result. The file is ``tiles-<family>-<gpu>.json`` in ``$SCAP_NNCF_CACHE``, or ``scap_nncf`` in the user's cache
folder; deleting it is harmless.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import torch

from .tiles import Key, Tile, family, forget_choices, format_entry, parse_entry


def cache_folder() -> Path:
    """Where tuned tiles are kept."""
    own = os.environ.get("SCAP_NNCF_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scap_nncf"


def cache_file(device: torch.device) -> Path:
    """The file for one GPU model."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return cache_folder() / f"tiles-{family(device)}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"


def remembered(key: Key, device: torch.device) -> Tile | None:
    """A tile that an earlier :func:`tune` found for exactly this key, or None."""
    return _read(cache_file(device)).get(key)


@cache
def _read(path: Path) -> dict[Key, Tile]:
    try:
        return dict(parse_entry(entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"Ignoring the tuned tiles in {path}: {error}. Delete the file to tune anew.", stacklevel=2)
        return {}


def remember(key: Key, tile: Tile, device: torch.device) -> None:
    """Add a result to the file, in one step: a reader sees the old file or the new one."""
    path = cache_file(device)
    _read.cache_clear()
    entries = {**_read(path), key: tile}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump([format_entry(k, t) for k, t in entries.items()], file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _read.cache_clear()
    forget_choices()


def candidates(key: Key) -> list[Tile]:
    """
    The tiles worth trying: at most 16, the ones that won somewhere when the table was measured.

    Columns are given in bytes, because a warp reads 512 bytes of a weight row in one step whatever the dtype.
    """
    if key.many_rows:
        return [
            Tile(block_bytes // key.itemsize, rows, stages, step, warps, 168)
            for block_bytes, rows, stages, step, warps in (
                (256, 256, 4, 32, 4),
                (256, 512, 4, 32, 4),
                (256, 1024, 4, 32, 4),
                (512, 256, 4, 32, 4),
                (512, 512, 3, 32, 4),
                (256, 512, 3, 64, 4),
                (1024, 256, 4, 16, 8),
                (1024, 512, 3, 32, 8),
            )
        ]
    halves = 2 if key.op == "glu" else 1
    # enough programs to fill the chip, few enough to be there all at once
    return [
        Tile(row_bytes // key.itemsize, rows, warps * 512 // row_bytes, unroll // halves, warps, 128, early)
        for row_bytes, rows, warps, unroll, early in (
            (2048, 256, 4, 16, False),
            (2048, 512, 4, 16, False),
            (2048, 1024, 4, 16, False),
            (1024, 256, 4, 16, True),
            (1024, 512, 4, 16, True),
            (1024, 512, 4, 16, False),
            (1024, 1024, 4, 16, False),
            (1024, 2048, 4, 16, False),
            (1024, 256, 2, 16, True),
            (1024, 128, 4, 8, False),
            (1024, 256, 4, 8, False),
            (256, 512, 8, 8, True),
            (256, 1024, 8, 8, True),
            (256, 2048, 8, 8, False),
            (512, 512, 4, 8, False),
        )
    ]


def tune(
    op: str,
    k: int,
    n: int,
    dtype: torch.dtype,
    rows: int = 1,
    sparsity: float = 0.5,
    device: torch.device | str = "cuda",
    budget_s: float = 60.0,
) -> Tile:
    """
    Time the candidates for one shape and remember the fastest.

    :param op: fc or glu.
    :param k: input channels.
    :param n: columns of the weight (2N for a GLU).
    :param dtype: of activation and weight.
    :param rows: rows of the activation, 1 to 16; a GLU is tuned for one row.
    :param sparsity: share of dropped inputs to tune for.
    :param budget_s: stop trying after this many seconds; the best so far is kept.
    :return: the fastest tile, which later launches of this shape use, in this process and in later ones.
    """
    from .fc import launch_fc
    from .glu import launch_glu

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    key = Key.of(op, k, n, dtype, rows, sparsity)
    copies = max(2, -(-200_000_000 // (k * n * dtype.itemsize)))  # past any L2
    weights = [torch.randn(k, n, dtype=dtype, device=device) * 0.02 for _ in range(copies)]
    x = torch.randn(rows, k, dtype=dtype, device=device)
    threshold = float(x.float().abs().flatten().quantile(sparsity)) if x.numel() < 1 << 24 else 0.0
    out = torch.empty(rows, n // 2 if op == "glu" else n, dtype=dtype, device=device)
    best, best_us, start = None, float("inf"), time.monotonic()
    for tile in candidates(key):

        def launch(i: int, tile: Tile = tile) -> None:
            if op == "glu":
                launch_glu(x, weights[i % copies], threshold, threshold, 0.0, "silu", None, out, tile)
            else:
                launch_fc(x, weights[i % copies], [(threshold, n)], 0.0, None, None, out, tile)

        us = graph_time_us(launch, max(8, copies))
        if us < best_us:
            best, best_us = tile, us
        if time.monotonic() - start > budget_s:
            break
    assert best is not None
    remember(key, best, device)
    return best


def graph_time_us(launch: Callable[[int], None], launches: int, repeats: int = 7) -> float:
    """Median microseconds of one launch, from replays of a CUDA graph of `launches` launches."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(i)
        graph.replay()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / launches)
    return median(times)
