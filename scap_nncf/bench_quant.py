# SPDX-License-Identifier: Apache-2.0
"""
Latency of the sparse 8- and 4-bit kernels beside dense weight-only products.

Measured as :mod:`.bench_kernels` measures: CUDA graphs, weights rotated past L2, contenders replayed in turn, medians.

========== ========================================================================================================
dense 4    tinygemm, ``torch._weight_int4pack_mm``, group 128, bfloat16
dense 8    ``torch.compile`` of ``linear(x, w.to(x.dtype)) * scale`` with coordinate-descent tuning (Inductor turns it
           into one fused reduction), and ``torch._weight_int8pack_mm`` where the device has it
dense 16   cuBLAS, float16
========== ========================================================================================================
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .bench_kernels import interleaved_us, quantile, read_bandwidth

Launch = Callable[[int], None]
SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (4096, 6144), (4096, 28672))
GROUP = 128  # of the 4-bit weights; 8-bit ones have a scale an output channel
_ROTATED_BYTES = 200_000_000  # weights in rotation, several times the L2 cache


def run(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    bits: Sequence[int] = (4, 8),
    sparsities: Sequence[float] = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    rows: Sequence[int] = (1,),
    out_dir: str | Path = "bench_quant",
    dtype: str = "fp16",
    repeats: int = 9,
    compiled: bool = True,
    command: str | None = None,
) -> list[dict[str, Any]]:
    """
    Measure and write ``quant.json`` and ``quant.csv``.

    :param shapes: (K, N) pairs.
    :param bits: 4, 8 or both.
    :param sparsities: shares of dropped inputs; every row of an activation has its own random mask.
    :param rows: rows of the activation, 1 to 16.
    :param out_dir: folder for the results, made if need be.
    :param dtype: fp16 or bf16, of the activations of the sparse kernels.
    :param repeats: graph replays a contender.
    :param compiled: also measure the compiled dense 8-bit product (compiling takes a while).
    :param command: how this run was started, for the record.
    :return: one dict a measurement.
    :raises ValueError: for an unknown dtype or number of bits.
    :raises RuntimeError: without a CUDA device.
    """
    if dtype not in ("fp16", "bf16") or any(b not in (4, 8) for b in bits):
        raise ValueError(f"expected dtype fp16 or bf16 and bits 4 or 8, got {dtype!r} and {list(bits)}")
    if not torch.cuda.is_available():
        raise RuntimeError("The kernel benchmark needs a CUDA device; none was found.")
    bandwidth = read_bandwidth()
    results: list[dict[str, Any]] = []
    for b in bits:
        for k, n in shapes:
            for m in rows:
                x = torch.randn(m, k, device="cuda", dtype=torch.float16 if dtype == "fp16" else torch.bfloat16)
                weights = [random_weight(b, k, n, x.dtype) for _ in range(copies(k * n * b // 8))]
                dense = dense_launches(b, x, k, n, compiled)
                for sparsity in sparsities:
                    results.append(_measure(b, x, weights, dense, sparsity, bandwidth, dtype, repeats))
                    _print(results[-1])
    write(results, bandwidth, Path(out_dir), command)
    return results


def copies(size: int) -> int:
    """How many weights of `size` bytes to rotate so that none is met in the L2 cache."""
    return max(3, -(-_ROTATED_BYTES // size))


def random_weight(bits: int, k: int, n: int, dtype: torch.dtype) -> Any:
    """A packed weight of random integers and scales near 1 / sqrt(K), symmetric."""
    from .kernels.packing import Int4Weight, Int8Weight, row_words

    packed = torch.randint(-(2**31), 2**31, (k, row_words(n, bits)), dtype=torch.int32, device="cuda")
    groups = k // GROUP if bits == 4 else 1
    scale = ((torch.rand(groups, n, device="cuda") + 0.5) * k**-0.5 / 2 ** (bits - 2)).to(dtype)
    return (Int4Weight if bits == 4 else Int8Weight)(packed, scale, None, dtype)


def dense_launches(bits: int, x: torch.Tensor, k: int, n: int, compiled: bool) -> dict[str, Launch]:
    """Dense contenders by name; one that the device or the PyTorch build lacks is left out with a line."""
    found: dict[str, Launch] = {}
    half = [torch.randn(n, k, device="cuda", dtype=torch.float16) * k**-0.5 for _ in range(copies(k * n * 2))]
    x16 = x.half()
    found["fp16"] = lambda i: torch.nn.functional.linear(x16, half[i % len(half)])
    makers = (_tinygemm,) if bits == 4 else (_compiled_int8, _int8pack) if compiled else (_int8pack,)
    for make in makers:
        try:
            launch = make(x, k, n)
            launch(0)
            torch.cuda.synchronize()
            found[make.__name__.strip("_")] = launch
        except Exception as error:
            print(f"{make.__name__}: not measured, {type(error).__name__}: {error}", file=sys.stderr)
    return found


def _tinygemm(x: torch.Tensor, k: int, n: int) -> Launch:
    x = x.bfloat16()
    packed = [
        torch._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
        for _ in range(copies(k * n // 2))
    ]
    tables = (torch.rand(k // GROUP, n, 2, device="cuda") * 0.01).bfloat16()
    return lambda i: torch._weight_int4pack_mm(x, packed[i % len(packed)], GROUP, tables)


def _int8_weights(k: int, n: int) -> list[torch.Tensor]:
    return [torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(copies(k * n))]


def _compiled_int8(x: torch.Tensor, k: int, n: int) -> Launch:
    weights, scale = _int8_weights(k, n), (torch.rand(n, device="cuda") * 0.01).to(x.dtype)

    def product(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, w.to(x.dtype)) * scale

    torch._dynamo.reset()
    fast = torch.compile(product, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True})
    return lambda i: fast(x, weights[i % len(weights)], scale)


def _int8pack(x: torch.Tensor, k: int, n: int) -> Launch:
    weights, scale = _int8_weights(k, n), (torch.rand(n, device="cuda") * 0.01).bfloat16()
    x = x.bfloat16()
    return lambda i: torch._weight_int8pack_mm(x, weights[i % len(weights)], scale)


def _measure(
    bits: int,
    x: torch.Tensor,
    weights: Sequence[Any],
    dense: dict[str, Launch],
    sparsity: float,
    bandwidth: float,
    dtype: str,
    repeats: int,
) -> dict[str, Any]:
    from .kernels import quant_ops

    first = weights[0]
    k, n = first.in_features, first.out_features
    threshold = quantile(x, sparsity)
    # sparse launches rotate scales and integers alike
    sparse: Launch = lambda i: quant_ops.sparse_fc_quant(  # noqa: E731
        x, weights[i % len(weights)].packed, weights[i % len(weights)].scale, None, bits, [threshold], [n],
        sparsity=sparsity,
    )  # fmt: skip
    count = len(weights) * max(1, 16 // len(weights))
    times = interleaved_us({**dense, "sparse": sparse}, count, repeats)
    skipped = float((x.float().abs() <= threshold).all(0).float().mean()) if sparsity else 0.0
    table_bytes = first.nbytes - first.packed.numel() * 4
    floor = (k * n * bits / 8 * (1 - skipped) + table_bytes) / bandwidth * 1e6
    quantised = {name: us for name, us in times.items() if name not in ("fp16", "sparse")}
    best = min(quantised.values()) if quantised else None
    return {
        "bits": bits,
        "k": k,
        "n": n,
        "rows": x.shape[0],
        "dtype": dtype,
        "sparsity": sparsity,
        "skipped": round(skipped, 4),
        "floor_us": round(floor, 2),
        **{f"{name}_us": round(us, 2) for name, us in times.items()},
        "speedup_over_best_dense": None if best is None else round(best / times["sparse"], 3),
        "speedup_over_fp16": round(times["fp16"] / times["sparse"], 3),
        "floor_share": round(floor / times["sparse"], 3),
    }


def _print(row: dict[str, Any]) -> None:
    times = "  ".join(f"{key[:-3]} {row[key]:.1f}" for key in row if key.endswith("_us"))
    print(
        f"int{row['bits']} {row['k']}x{row['n']} M={row['rows']} {row['sparsity']:.0%}: {times} us, "
        f"{row['speedup_over_best_dense']}x over the best dense, {row['speedup_over_fp16']}x over fp16",
        flush=True,
    )


def write(results: list[dict[str, Any]], bandwidth: float, folder: Path, command: str | None) -> None:
    """JSON with what was run on what, and a CSV of the same rows."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command or "scap_nncf.bench_quant.run(...)",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "method": "CUDA graphs, weights rotated past L2, contenders interleaved, medians, microseconds a call",
    }
    (folder / "quant.json").write_text(json.dumps({"about": about, "results": results}, indent=1), encoding="utf-8")
    columns = list(dict.fromkeys(key for row in results for key in row))
    with open(folder / "quant.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(results)
