# SPDX-License-Identifier: Apache-2.0
"""
Does N:M activation sparsity make anything faster on a GPU? Two ways to use the pattern, beside the dense product.

    python benchmarks/nm_h100.py --output results

``sparse tensor cores``: 2:4 activations, packed, times a dense weight (``torch.sparse.to_sparse_semi_structured``), for
64 to 8192 rows; the product alone, and with the packing that every new activation needs. ``gather``: one row, the GEMV
that skips weight rows, on a mask with exactly N of M in each group and on an unstructured one of the same sparsity.
CUDA graphs where the operation can be captured, else events; contenders in turn; medians, microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

K, N = 4096, 14336


def prune_groups(x: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Keep the n largest of every m neighbours [..., K]."""
    groups = x.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(n, dim=1).indices, True)
    return torch.where(keep, groups, torch.zeros_like(groups)).reshape(x.shape)


def times_us(ways: dict[str, Callable[[], Any]], rounds: int = 9, calls: int = 8) -> dict[str, float]:
    """Median microseconds a call, the ways timed in turn."""
    for way in ways.values():
        for _ in range(3):
            way()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                way()
            end.record()
            torch.cuda.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def tensor_cores(rows: int) -> dict[str, Any]:
    """2:4 activations times a dense weight."""
    x = prune_groups(torch.randn(rows, K, device="cuda", dtype=torch.float16), 2, 4)
    weight = torch.randn(N, K, device="cuda", dtype=torch.float16) * K**-0.5
    packed = torch.sparse.to_sparse_semi_structured(x)
    error = ((packed @ weight.t()).float() - (x @ weight.t()).float()).norm() / (x @ weight.t()).float().norm()
    ways = {
        "dense": lambda: torch.nn.functional.linear(x, weight),
        "packed": lambda: packed @ weight.t(),
        "prune, pack and multiply": lambda: torch.sparse.to_sparse_semi_structured(prune_groups(x, 2, 4)) @ weight.t(),
    }
    return {"rows": rows, "relative_error": float(error), **times_us(ways)}


def gather(pattern: tuple[int, int] | None, sparsity: float) -> dict[str, Any]:
    """One row through the kernel that skips weight rows."""
    from scap_nncf.bench_kernels import interleaved_us
    from scap_nncf.kernels import ops

    x = torch.randn(1, K, device="cuda", dtype=torch.float16)
    if pattern is None:
        threshold = x.abs().float().quantile(sparsity).item()
        x = torch.where(x.abs() <= threshold, torch.zeros_like(x), x)
    else:
        x = prune_groups(x, *pattern)
    weights = [torch.randn(K, N, device="cuda", dtype=torch.float16) * K**-0.5 for _ in range(3)]
    turned = [w.t().contiguous() for w in weights]
    ways = {
        "dense": lambda i: torch.nn.functional.linear(x, turned[i % 3]),
        "gather": lambda i: ops.sparse_fc(x, weights[i % 3], [0.0], [N], sparsity=sparsity),
    }
    found = interleaved_us(ways, 15, 9)
    name = "unstructured" if pattern is None else f"{pattern[0]}:{pattern[1]}"
    return {"pattern": name, "sparsity": float((x == 0).float().mean()), **{k: round(v, 2) for k, v in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description="N:M activation sparsity on a GPU.")
    parser.add_argument("--output", type=Path, default=Path("."))
    given = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "about": {
            "command": "python benchmarks/nm_h100.py",
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "shape": [K, N],
            "dtype": "float16",
        },
        "gather": [gather((2, 4), 0.5), gather((8, 16), 0.5), gather((16, 32), 0.5), gather(None, 0.5)],
        "sparse tensor cores": [],
    }
    given.output.mkdir(parents=True, exist_ok=True)
    for rows in (64, 256, 1024, 4096, 8192):
        try:
            result["sparse tensor cores"].append(tensor_cores(rows))
        except Exception as error:  # a build without these kernels
            result["sparse tensor cores"].append({"rows": rows, "error": f"{type(error).__name__}: {error}"[:300]})
        (given.output / "nm.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for part in ("gather", "sparse tensor cores"):
        for row in result[part]:
            print(row)


if __name__ == "__main__":
    main()
