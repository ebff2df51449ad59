# SPDX-License-Identifier: Apache-2.0
"""
Latency of the sparse kernels beside the dense library, peers and the read floor: ``scap-nncf bench kernel``.

How it measures: CUDA graphs of many launches, weights rotated past the L2 cache, contenders replayed in turn (so that
clocks and temperature hit all alike), medians. The floor is the time that a kernel which only reads takes for the bytes
of the kept weight rows, at the bandwidth measured in the same run.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

Launch = Callable[[int], None]


@dataclass(frozen=True)
class Shape:
    """
    One measured operation.

    :param name: role in its model.
    :param op: fc, glu (gate, up and activation) or ffn (glu, then down).
    :param k: input channels.
    :param n: columns of the weight; 2N for a glu or ffn.
    """

    name: str
    op: str
    k: int
    n: int


def _decoder(hidden: int, qkv: int, ffn: int) -> tuple[Shape, ...]:
    return (
        Shape("qkv", "fc", hidden, qkv),
        Shape("o", "fc", hidden, hidden),
        Shape("up", "fc", hidden, ffn),
        Shape("down", "fc", ffn, hidden),
        Shape("gate_up", "glu", hidden, 2 * ffn),
        Shape("ffn", "ffn", hidden, 2 * ffn),
    )


SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama-2-7b": _decoder(4096, 12288, 11008),
    "llama-3-8b": _decoder(4096, 6144, 14336),
    "mistral-7b": _decoder(4096, 6144, 14336),
    "llama-3-70b": _decoder(8192, 10240, 28672),
    "mixtral-expert": _decoder(4096, 6144, 14336)[2:],
    "phi-2": (
        Shape("qkv", "fc", 2560, 7680),
        Shape("o", "fc", 2560, 2560),
        Shape("fc1", "fc", 2560, 10240),
        Shape("fc2", "fc", 10240, 2560),
    ),
    "phi-3-mini": _decoder(3072, 9216, 8192),
    "smollm2-135m": _decoder(576, 960, 1536),
}

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def run(
    shapes: Sequence[str] = ("llama-3-8b",),
    dtypes: Sequence[str] = ("fp16",),
    sparsities: Sequence[float] = (0.0, 0.4, 0.5, 0.7, 0.9),
    out_dir: str | Path = "bench_kernel",
    rows: Sequence[int] = (1,),
    ops: Sequence[str] = ("fc", "glu", "ffn"),
    peers_dir: str | Path | None = None,
    tune: bool = False,
    repeats: int = 9,
    command: str | None = None,
) -> list[dict[str, Any]]:
    """
    Measure and write ``kernels.json``, ``kernels.csv`` and, where matplotlib is installed, ``kernels.png``.

    :param shapes: names of ``SHAPES``; ``name:role`` picks one operation.
    :param dtypes: of ``DTYPES``.
    :param sparsities: shares of dropped inputs; every row of an activation has its own random mask.
    :param out_dir: folder for the results, made if need be.
    :param rows: rows of the activation (batch or tokens), 1 to 16.
    :param ops: kinds of operation to keep.
    :param peers_dir: folder that holds peers' kernels (``teal.py``: TEAL's sparse_gemv.py, ``cats.py``: CATS's
        kernels.py); measured where they can be imported.
    :param tune: search tiles first (:func:`scap_nncf.kernels.triton.autotune.tune`).
    :param repeats: graph replays a contender.
    :param command: how this run was started, for the record.
    :return: one dict a measurement.
    :raises ValueError: for an unknown shape or dtype.
    :raises RuntimeError: without a CUDA device.
    """
    chosen = list(select(shapes, ops))
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise ValueError(f"Unknown dtypes {unknown}; expected some of {', '.join(DTYPES)}.")
    if not torch.cuda.is_available():
        raise RuntimeError("The kernel benchmark needs a CUDA device; none was found.")
    peers = load_peers(peers_dir)
    bandwidth = read_bandwidth()
    results: list[dict[str, Any]] = []
    for dtype in dtypes:
        for model, shape in chosen:
            for batch in rows:
                results += measure(model, shape, dtype, batch, sparsities, bandwidth, peers, tune, repeats)
                _print(results[-1]["label"], [r for r in results if r["label"] == results[-1]["label"]])
    write(results, bandwidth, Path(out_dir), command)
    return results


def select(shapes: Iterable[str], ops: Sequence[str]) -> Iterable[tuple[str, Shape]]:
    """(model, shape) for each name ``model`` or ``model:role``."""
    for name in shapes:
        model, _, role = name.partition(":")
        if model not in SHAPES:
            raise ValueError(f"Unknown shape {model!r}; expected one of {', '.join(SHAPES)}.")
        found = [s for s in SHAPES[model] if s.op in ops and role in ("", s.name)]
        if role and not found:
            raise ValueError(f"{model} has no {role!r}; expected one of {', '.join(s.name for s in SHAPES[model])}.")
        for shape in found:
            yield model, shape


# -- contenders -------------------------------------------------------------------------------------------------------


class Case:
    """Operands of one shape: weights past L2, an activation, outputs."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rows: int) -> None:
        self.shape, self.rows = shape, rows
        size = shape.k * shape.n * dtype.itemsize * (1.5 if shape.op == "ffn" else 1)
        copies = max(2, -(-200_000_000 // int(size)))
        scale = shape.k**-0.5
        self.weights = [torch.randn(shape.k, shape.n, device="cuda", dtype=dtype) * scale for _ in range(copies)]
        self.downs = []
        if shape.op == "ffn":
            half = shape.n // 2
            self.downs = [torch.randn(half, shape.k, device="cuda", dtype=dtype) * half**-0.5 for _ in range(copies)]
        self.x = torch.randn(rows, shape.k, device="cuda", dtype=dtype)
        self.launches = max(copies, -(-int(1.5e9 / size) // copies) * copies) if size < 4e8 else 2 * copies

    def w(self, i: int) -> torch.Tensor:
        return self.weights[i % len(self.weights)]

    def down(self, i: int) -> torch.Tensor:
        return self.downs[i % len(self.downs)]


def quantile(x: torch.Tensor, sparsity: float) -> float:
    """The threshold that drops a share `sparsity` of `x`; negative for none."""
    values = x.float().abs().flatten().sort().values
    return -1.0 if sparsity <= 0 else float(values[min(values.numel() - 1, int(sparsity * values.numel()) - 1)])


def contenders(case: Case, sparsity: float, peers: dict[str, Any]) -> dict[str, Launch]:
    """Launches by name. A dense glu or ffn is one matmul for both halves, then a fused activation and product."""
    from .kernels import ops, reference
    from .kernels.triton.glu import launch_gate

    shape, x = case.shape, case.x
    tau = quantile(x, sparsity)
    n = shape.n if shape.op == "fc" else shape.n // 2
    h = torch.empty(case.rows, shape.n, device="cuda", dtype=x.dtype)
    mid = torch.empty(case.rows, n, device="cuda", dtype=x.dtype)
    y = torch.empty(case.rows, shape.k, device="cuda", dtype=x.dtype)
    if shape.op == "fc":
        found: dict[str, Launch] = {
            "dense": lambda i: torch.matmul(x, case.w(i), out=h),
            "sparse": lambda i: ops.sparse_fc(x, case.w(i), [tau], [n], sparsity=sparsity),
            "sparse_atomic": lambda i: ops.sparse_fc(x, case.w(i), [tau], [n], deterministic=False, sparsity=sparsity),
        }
        if case.rows == 1:
            for name, make in peers.items():
                launch = make(x, tau, case)
                if launch is not None:
                    found[name] = launch
        return found
    glu = lambda i: ops.sparse_glu(x, case.w(i), tau, tau, sparsity=sparsity)  # noqa: E731

    def dense_glu(i: int) -> None:
        torch.matmul(x, case.w(i), out=h)
        launch_gate(h, "silu", mid)

    if shape.op == "glu":
        return {"dense_matmul_alone": lambda i: torch.matmul(x, case.w(i), out=h), "dense": dense_glu, "sparse": glu}
    inner = reference.activate(torch.matmul(x, case.w(0))[:, :n].float(), "silu") * torch.matmul(x, case.w(0))[:, n:]
    tau_down = quantile(inner, sparsity)

    def dense_ffn(i: int) -> None:
        dense_glu(i)
        torch.matmul(mid, case.down(i), out=y)

    def sparse_ffn(i: int) -> None:
        ops.sparse_fc(glu(i), case.down(i), [tau_down], [shape.k], sparsity=sparsity)

    return {"dense": dense_ffn, "sparse": sparse_ffn}


def load_peers(folder: str | Path | None) -> dict[str, Callable[[torch.Tensor, float, Case], Launch | None]]:
    """Peers' kernels found in `folder`, as makers of launches."""
    found: dict[str, Callable[[torch.Tensor, float, Case], Launch | None]] = {}
    if folder is None:
        return found
    for name, make in (("teal", _teal), ("cats", _cats)):
        path = Path(folder) / f"{name}.py"
        if not path.exists():
            continue
        try:
            spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found[name] = lambda x, tau, case, make=make, module=module: make(module, x, tau, case)
        except Exception as error:
            print(f"{name}: not measured, {type(error).__name__}: {error}", file=sys.stderr)
    return found


def _teal(module: Any, x: torch.Tensor, tau: float, case: Case) -> Launch | None:
    if x.dtype != torch.float16 or case.shape.n % 1024:
        return None  # fp16 alone; reads past the end where columns do not fill its tiles
    hidden = x.view(1, 1, -1)
    return lambda i: module.splitk_sparse_gemv(hidden, case.w(i).t(), tau, 2)


def _cats(module: Any, x: torch.Tensor, tau: float, case: Case) -> Launch | None:
    hidden = x.view(1, 1, -1)
    kept = (x.abs() > tau).flatten()  # a separate step there, not timed here
    return lambda i: module.gather_transposed_gemv_flag_3d(hidden, case.w(i), kept)


# -- timing -----------------------------------------------------------------------------------------------------------


def read_bandwidth() -> float:
    """Bytes a second of a kernel that only reads, over 2 GB."""
    from .kernels.triton.autotune import graph_time_us
    from .kernels.triton.read import launch_read

    words = torch.randint(-1000, 1000, (1 << 29,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    return words.numel() * 4 / (graph_time_us(lambda _: launch_read(words, out), 3) * 1e-6)


def capture(launch: Launch, launches: int) -> tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]:
    """A graph of many launches, warmed up (compilation, a peer's own tuning)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
        launch(1)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                launch(i)
        graph.replay()
    stream.synchronize()
    return graph, stream


def interleaved_us(launches: dict[str, Launch], count: int, repeats: int) -> dict[str, float]:
    """Median microseconds of one launch of each contender, replayed in turn."""
    graphs = {}
    for name, launch in launches.items():
        try:
            graphs[name] = capture(launch, count)
        except Exception as error:
            torch.cuda.synchronize()
            print(f"{name}: not measured, {type(error).__name__}: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, (graph, stream) in graphs.items():
            with torch.cuda.stream(stream):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / count)
    return {name: median(values) for name, values in times.items()}


def measure(
    model: str,
    shape: Shape,
    dtype: str,
    rows: int,
    sparsities: Sequence[float],
    bandwidth: float,
    peers: dict[str, Any],
    tune: bool,
    repeats: int,
) -> list[dict[str, Any]]:
    """All sparsities of one operation."""
    case = Case(shape, DTYPES[dtype], rows)
    bytes_all = shape.k * shape.n * DTYPES[dtype].itemsize * (1.5 if shape.op == "ffn" else 1)
    found = []
    for sparsity in sparsities:
        if tune and shape.op != "ffn":
            from .kernels.triton.autotune import tune as search

            search(shape.op, shape.k, shape.n, DTYPES[dtype], rows, sparsity)
        tau = quantile(case.x, sparsity)
        skipped = float((case.x.float().abs() <= tau).all(0).float().mean())  # channels that no row keeps
        times = interleaved_us(contenders(case, sparsity, peers), case.launches, repeats)
        floor = bytes_all * (1 - (sparsity if shape.op == "ffn" else skipped)) / bandwidth * 1e6
        found.append(
            {
                "label": f"{model} {shape.name} {shape.k}x{shape.n} {dtype} M={rows}",
                "model": model,
                **asdict(shape),
                "dtype": dtype,
                "rows": rows,
                "sparsity": sparsity,
                "skipped": round(skipped, 4),
                "floor_us": round(floor, 2),
                **{f"{name}_us": round(value, 2) for name, value in times.items()},
                "speedup": round(times["dense"] / times["sparse"], 3),
                "floor_share": round(floor / times["sparse"], 3),
            }
        )
    return found


# -- output -----------------------------------------------------------------------------------------------------------


def _print(label: str, rows: Sequence[dict[str, Any]]) -> None:
    print(label)
    for row in rows:
        times = "  ".join(f"{key[:-3]} {row[key]:.1f}" for key in row if key.endswith("_us"))
        print(f"  {row['sparsity']:.0%}: {times} us, {row['speedup']:.2f}x, {row['floor_share']:.0%} of the floor")


def write(results: list[dict[str, Any]], bandwidth: float, folder: Path, command: str | None) -> None:
    """JSON with what was run on what, CSV of the same rows, PNG."""
    import triton

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command or "scap_nncf.bench_kernels.run(...)",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "read_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "method": "CUDA graphs, weights rotated past L2, contenders interleaved, medians, microseconds a call",
    }
    (folder / "kernels.json").write_text(json.dumps({"about": about, "results": results}, indent=1), encoding="utf-8")
    columns = list(dict.fromkeys(key for row in results for key in row))
    with open(folder / "kernels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(results)
    plot(results, about, folder / "kernels.png")


def plot(results: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Latency against sparsity beside the floor, one panel an operation; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print('No plot: matplotlib is not installed (pip install "scap-nncf[report]").', file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(row["label"] for row in results))
    columns = min(5, len(labels))
    lines = -(-len(labels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.8 * columns, 2.8 * lines), squeeze=False)
    for axis in axes.flat[len(labels) :]:
        axis.set_visible(False)
    for label, axis in zip(labels, axes.flat, strict=False):
        rows = [row for row in results if row["label"] == label]
        x = [100 * row["sparsity"] for row in rows]
        axis.plot(x, [row["floor_us"] for row in rows], "k--", linewidth=1, label="read floor")
        for key in dict.fromkeys(key for row in rows for key in row if key.endswith("_us") and key != "floor_us"):
            axis.plot(x, [row.get(key) for row in rows], marker="o", markersize=3, label=key[:-3].replace("_", " "))
        axis.set_title(label, fontsize=8)
        axis.set_xlabel("dropped inputs, %", fontsize=8)
        axis.set_ylabel("microseconds", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    figure.suptitle(f"{about['gpu']}, read bandwidth {about['read_bandwidth_tb_s']} TB/s", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=80)
    plt.close(figure)
