# SPDX-License-Identifier: Apache-2.0
"""
Speed of the OpenVINO operation that skips weights beside the stock CPU plugin: ``scap-nncf bench openvino``.

How it measures: stock runs in each of its settings (precision hint default and f32) and the fastest counts; all ways
run in turn, round after round, and medians are compared; layers are rotated so that weights come from memory and not
from a cache; sparsity is that which the operation counted. `best` is the least of all calls, which a busy machine
spoils least.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import nncf
import numpy as np

from scap_nncf.extras import require

#: Weights of the copies of a layer together, bytes: several times a last-level cache.
ROTATED = 160 << 20
FORMATS = ("f32", "bf16", "f16", "i8", "u8", "i4", "u4")
HINTS = ("default", "f32")
THRESHOLD = 1.0  # inputs are scaled to it, so that one model serves all sparsities


@dataclass(frozen=True)
class Row:
    """
    One timed way.

    :param what: ``fc``, ``chain`` or a model's name.
    :param way: ``stock`` or ``sparse``.
    :param hint: ``INFERENCE_PRECISION_HINT``.
    :param tokens: rows of one call; 1 is decoding.
    :param sparsity: target, None for stock.
    :param realised: counted in the operation.
    :param ms: median of the rounds' medians.
    :param best: least of all calls.
    """

    what: str
    weights: str
    way: str
    hint: str
    tokens: int
    sparsity: float | None
    realised: float | None
    ms: float
    best: float


@dataclass(frozen=True)
class LoadRow:
    """
    Reading a model from its folder.

    :param load: seconds to read, compile and run once.
    :param resident: bytes of the process afterwards, minus before.
    :param private: that part of them that is no file.
    """

    what: str
    weights: str
    way: str
    load: float
    resident: int
    private: int


@dataclass
class Result:
    """What a benchmark found; ``str()`` is a table."""

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    loads: list[LoadRow] = field(default_factory=list)

    def speedup(self, row: Row, best: bool = False) -> float | None:
        """Fastest stock setting over this way."""
        stock = [
            other.best if best else other.ms
            for other in self.rows
            if other.way == "stock" and (other.what, other.weights, other.tokens) == (row.what, row.weights, row.tokens)
        ]
        return min(stock) / (row.best if best else row.ms) if stock else None

    def __str__(self) -> str:
        lines = [
            f"{self.about.get('cpu')}, {self.about.get('threads')} threads, OpenVINO {self.about.get('openvino')}, "
            f"{self.about.get('isa')}",
            f"{'what':14} {'weights':8} {'way':7} {'hint':8} {'tokens':>6} {'target':>6} {'real':>5} {'ms':>9} "
            f"{'best':>9} {'x stock':>8} {'x best':>7}",
        ]
        for row in self.rows:
            ratio, best = self.speedup(row), self.speedup(row, True)
            lines.append(
                f"{row.what:14} {row.weights:8} {row.way:7} {row.hint:8} {row.tokens:6} "
                f"{'' if row.sparsity is None else format(row.sparsity, '.2f'):>6} "
                f"{'' if row.realised is None else format(row.realised, '.2f'):>5} {row.ms:9.3f} {row.best:9.3f} "
                f"{'' if ratio is None else format(ratio, '.2f'):>8} {'' if best is None else format(best, '.2f'):>7}"
            )
        for load in self.loads:
            lines.append(
                f"{load.what:14} {load.weights:8} {load.way:7} load {load.load:.2f} s, resident "
                f"{load.resident / 2**20:.0f} MiB, of these private {load.private / 2**20:.0f}"
            )
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str], name: str) -> list[Path]:
        """Write ``<name>.json`` and ``<name>.txt`` (the table) into a folder."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        data = {
            "about": self.about,
            "rows": [
                {**asdict(row), "speedup": self.speedup(row), "speedup_of_best": self.speedup(row, True)}
                for row in self.rows
            ],
            "loads": [asdict(row) for row in self.loads],
        }
        files = [target / f"{name}.json", target / f"{name}.txt"]
        files[0].write_text(json.dumps(data, indent=1) + "\n")
        files[1].write_text(f"{self}\n")
        return files


def about(command: str = "") -> dict[str, Any]:
    """The machine and the versions."""
    openvino = require("openvino", "openvino", "scap-nncf bench openvino")
    from scap_nncf._version import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    handle = _extension()
    handle.scap_isa.restype = ctypes.c_char_p
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "threads": threads,
        "openvino": openvino.__version__,
        "scap_nncf": __version__,
        "isa": handle.scap_isa().decode(),
        "python": sys.version.split()[0],
        "command": command,
    }


# -- layers ------------------------------------------------------------------------------------------------------------


def layers(
    shapes: Sequence[tuple[int, int]] = ((2048, 8192), (4096, 14336)),
    formats: Sequence[str] = ("bf16", "i8", "i4"),
    sparsities: Sequence[float] = (0.0, 0.4, 0.5, 0.7),
    tokens: Sequence[int] = (1, 128, 512),
    *,
    group: int = 128,
    rounds: int = 15,
    say: Callable[[str], None] = lambda _: None,
    command: str = "",
) -> Result:
    """
    A single FC layer.

    :param shapes: (input channels, outputs).
    :param formats: of the weights; 8 bits a scale an output, 4 bits one a group.
    """
    result = Result(about(command))
    for k, n in shapes:
        for weights in formats:
            say(f"{k}x{n} {weights}")
            result.rows += _layer(k, n, weights, sparsities, tokens, group, rounds)
    return result


def _layer(
    k: int, n: int, weights: str, sparsities: Sequence[float], tokens: Sequence[int], group: int, rounds: int
) -> list[Row]:
    from scap_nncf.deploy_openvino import teach

    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    core = ov.Core()
    teach(core)
    bits = {"f32": 32, "bf16": 16, "f16": 16}.get(weights, 8 if weights.endswith("8") else 4)
    copies = min(16, max(2, -(-ROTATED // (k * n * bits // 8))))
    rng = np.random.default_rng(0)
    stock = [layer_model(k, n, weights, group, seed) for seed in range(copies)]
    sparse = [pruned(model, k, n, THRESHOLD) for model in stock]
    ways: dict[tuple[str, str], list[Any]] = {}
    for hint in HINTS:
        for way, models in (("stock", stock), ("sparse", sparse)):
            compiled = [core.compile_model(model, "CPU", _config(hint)) for model in models]
            ways[way, hint] = [item.create_infer_request() for item in compiled]
    del stock, sparse
    rows = []
    for count in tokens:
        x = bfloat(rng.standard_normal((1, count, k), dtype=np.float32))
        inputs: dict[tuple[str, str, float | None], Any] = {}
        for hint in HINTS:
            inputs["stock", hint, None] = x
            for sparsity in sparsities if count == 1 else sparsities[len(sparsities) // 2 :][:1]:
                inputs["sparse", hint, sparsity] = scaled(x, sparsity)
        measured = _measure(ways, inputs, rounds if count == 1 else max(2, rounds // 4), 1 if count > 1 else copies)
        for (way, hint, sparsity), (ms, best, realised) in measured.items():
            rows.append(Row(f"{k}x{n}", weights, way, hint, count, sparsity, realised, ms, best))
    return rows


def _measure(
    ways: dict[tuple[str, str], list[Any]],
    inputs: dict[tuple[str, str, float | None], Any],
    rounds: int,
    calls: int,
) -> dict[tuple[str, str, float | None], tuple[float, float, float | None]]:
    """Way → median and least milliseconds, realised sparsity; ways in turn."""
    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    times: dict[tuple[str, str, float | None], list[float]] = {key: [] for key in inputs}
    least = dict.fromkeys(inputs, float("inf"))
    realised: dict[tuple[str, str, float | None], float | None] = dict.fromkeys(inputs)
    for number in range(rounds + 1):  # the first warms up, and packs the weights
        for key, x in inputs.items():
            requests = ways[key[:2]]
            tensor = ov.Tensor(x)
            spent = []
            reset_counts()
            for request in requests if number == 0 else (requests * calls)[: max(calls, 1)]:
                request.set_input_tensor(tensor)
                start = time.perf_counter()
                request.infer()
                spent.append((time.perf_counter() - start) * 1e3)
            if key[2] is not None and number == 0:
                realised[key] = realised_sparsity()
            if not np.isfinite(requests[0].get_output_tensor().data).all():
                msg = f"{key} gave numbers that are not finite"
                raise nncf.ValidationError(msg)
            if number:
                times[key].append(median(spent))
                least[key] = min(least[key], *spent)
    return {key: (median(times[key]), least[key], realised[key]) for key in inputs}


def scaled(x: Any, sparsity: float) -> Any:
    """An input of which that share is at most the threshold in size."""
    if sparsity == 0:
        return bfloat(np.copysign(np.abs(x) + np.float32(1.01 * THRESHOLD), x))
    return bfloat(x * np.float32(THRESHOLD / np.quantile(np.abs(x), sparsity)))


def bfloat(x: Any) -> Any:
    """Cut to bfloat16 numbers: what layers in a model get under the plugin's default precision on CPUs that have it."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def layer_model(k: int, n: int, weights: str, group: int = 128, seed: int = 0) -> Any:
    """An ``openvino.Model`` of one FC layer with random weights, as NNCF would store them."""
    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    opset = require("openvino.opset13", "openvino")
    x = opset.parameter([-1, -1, k], np.float32, name="x")
    product = opset.matmul(x, random_weight(k, n, weights, group, seed), False, True, name=_matmul("up_proj"))
    return ov.Model([opset.result(product)], [x], "layer")


def random_weight(k: int, n: int, weights: str, group: int = 128, seed: int = 0) -> Any:
    """The output of a constant [N, K] in a format, with what decompresses it."""
    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    opset = require("openvino.opset13", "openvino")
    if weights not in FORMATS:
        msg = f"weights {weights!r}: expected one of {', '.join(FORMATS)}"
        raise nncf.ValidationError(msg)
    rng = np.random.default_rng(seed)
    kind = getattr(ov.Type, weights)
    if weights in ("f32", "f16", "bf16"):
        tensor = ov.Tensor(kind, ov.Shape([n, k]))
        values = rng.standard_normal((n, k), dtype=np.float32) / np.float32(k**0.5)
        if weights == "f32":
            tensor.data[:] = values
            return ov.op.Constant(tensor, shared_memory=True).output(0)
        half = values.astype(np.float16) if weights == "f16" else (values.view(np.uint32) >> 16).astype(np.uint16)
        ctypes.memmove(tensor.data.ctypes.data, np.ascontiguousarray(half).ctypes.data, half.nbytes)
        return opset.convert(ov.op.Constant(tensor, shared_memory=True), np.float32).output(0)
    is_int4 = weights.endswith("4")
    shape = [n, k // group, group] if is_int4 else [n, k]
    tensor = ov.Tensor(kind, ov.Shape(shape))
    size = n * k // 2 if is_int4 else n * k
    raw = rng.integers(0, 256, size, dtype=np.uint8)
    ctypes.memmove(tensor.data.ctypes.data, raw.ctypes.data, size)
    value: Any = opset.convert(ov.op.Constant(tensor, shared_memory=True), np.float16)
    scales = [*shape[:-1], 1]
    if weights.startswith("u"):
        zero = ov.Tensor(kind, ov.Shape(scales))
        count = int(np.prod(scales))
        middle = np.full(-(-count // 2) if is_int4 else count, 0x77 if is_int4 else 127, np.uint8)
        ctypes.memmove(zero.data.ctypes.data, middle.ctypes.data, middle.nbytes)
        value = opset.subtract(value, opset.convert(ov.op.Constant(zero, shared_memory=True), np.float16))
    spread = 2.0 ** (3 if is_int4 else 7) * k**0.5
    factors = ((rng.random(scales, dtype=np.float32) + 0.5) / spread).astype(np.float16)
    value = opset.multiply(value, opset.constant(factors))
    if is_int4:
        value = opset.reshape(value, opset.constant(np.array([n, k], np.int64)), False)
    return opset.convert(value, np.float32).output(0)


def pruned(model: Any, k: int, n: int, threshold: float) -> Any:
    """A deployed copy of :func:`layer_model` with one threshold, whatever its sparsity."""
    from scap_nncf.algorithms.backends import openvino as backend
    from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan
    from scap_nncf.deployment import deploy

    name = "model.layers.0.mlp.up_proj"
    plan = Plan((SitePlan(name, 0, 0.0, "zero", (LayerPlan(name, "up", k, n, threshold, 0.5),)),))
    copy = model.clone()
    backend.insert(copy, plan)
    return deploy(copy, backend="cpu", min_sparsity=0.0)


def _matmul(layer: str, block: int = 0) -> str:
    return f"__module.model.layers.{block}.mlp.{layer}/aten::linear/MatMul"


def _config(hint: str) -> dict[str, Any]:
    return {} if hint == "default" else {"INFERENCE_PRECISION_HINT": hint}


# -- chain of feed-forwards --------------------------------------------------------------------------------------------


def chain(
    hidden: int = 2048,
    wide: int = 5632,
    blocks: int = 8,
    formats: Sequence[str] = ("bf16", "i8", "i4"),
    sparsities: Sequence[float] = (0.5,),
    tokens: Sequence[int] = (1, 128, 512),
    *,
    group: int = 128,
    rounds: int = 8,
    command: str = "",
) -> Result:
    """
    Gated feed-forwards one behind the other: ``x + down(silu(gate(n(x))) * up(n(x)))``, n a normalisation.
    """
    result = Result(about(command))
    for weights in formats:
        result.rows += _chain(hidden, wide, blocks, weights, sparsities, tokens, group, rounds)
    return result


def _chain(
    hidden: int, wide: int, blocks: int, weights: str, sparsities: Sequence[float], tokens: Sequence[int], group: int,
    rounds: int,
) -> list[Row]:  # fmt: skip
    import scap_nncf
    from scap_nncf.deploy_openvino import teach
    from scap_nncf.deployment import deploy

    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    core = ov.Core()
    teach(core)
    model = chain_model(hidden, wide, blocks, weights, group)
    rng = np.random.default_rng(1)
    data = nncf.Dataset([rng.standard_normal((1, 64, hidden), dtype=np.float32)])
    ways: dict[tuple[str, str], list[Any]] = {}
    inputs_of: list[tuple[str, str, float | None]] = []
    for hint in HINTS:
        ways["stock", hint] = [core.compile_model(model, "CPU", _config(hint)).create_infer_request()]
        inputs_of.append(("stock", hint, None))
    for sparsity in sparsities:
        sparse = deploy(scap_nncf.compress(model, dataset=data, sparsity=sparsity, mode="zero"), backend="cpu")
        for hint in HINTS:
            ways[f"sparse {sparsity}", hint] = [core.compile_model(sparse, "CPU", _config(hint)).create_infer_request()]
            inputs_of.append((f"sparse {sparsity}", hint, sparsity))
    rows = []
    for count in tokens:
        x = rng.standard_normal((1, count, hidden), dtype=np.float32)
        measured = _measure(ways, dict.fromkeys(inputs_of, x), rounds if count == 1 else 2, 4 if count == 1 else 1)
        for (way, hint, sparsity), (ms, best, realised) in measured.items():
            name = f"chain {blocks}"
            rows.append(Row(name, weights, way.split()[0], hint, count, sparsity, realised, ms, best))
    return rows


def chain_model(hidden: int, wide: int, blocks: int, weights: str, group: int = 128) -> Any:
    """The ``openvino.Model`` of :func:`chain` with random weights."""
    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    opset = require("openvino.opset13", "openvino")
    x = opset.parameter([-1, -1, hidden], np.float32, name="x")
    state: Any = x
    for block in range(blocks):
        scale = opset.sqrt(opset.reduce_mean(opset.multiply(state, state), opset.constant(np.array([-1])), True))
        normed = opset.divide(state, scale)
        seeds = range(3 * block, 3 * block + 3)
        gate, up = (
            opset.matmul(
                normed, random_weight(hidden, wide, weights, group, seed), False, True, name=_matmul(name, block)
            )
            for name, seed in zip(("gate_proj", "up_proj"), seeds)
        )
        wide_state = opset.multiply(opset.swish(gate), up)
        down = random_weight(wide, hidden, weights, group, seeds[2])
        state = opset.add(state, opset.matmul(wide_state, down, False, True, name=_matmul("down_proj", block)))
    return ov.Model([opset.result(state)], [x], "chain")


# -- whole models ------------------------------------------------------------------------------------------------------


def decode(
    folders: dict[str, str | os.PathLike[str]],
    weights: str,
    name: str,
    prompt: Any,
    *,
    tokens: int = 32,
    rounds: int = 5,
    prefill: Sequence[int] = (128, 512),
    command: str = "",
) -> Result:
    """
    Whole decode of saved causal language models, stock beside deployed.

    :param folders: ``stock`` and ``sparse`` → a folder with ``openvino_model.xml``.
    :param prompt: token ids [T], real text for a real model: the sparsity is that of these tokens.
    :param tokens: decoded in a round, greedy, from a cache that holds half of the prompt.
    """
    from scap_nncf.deploy_openvino import holds_operation, teach

    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    result = Result(about(command))
    core = ov.Core()
    deciders: dict[tuple[str, str], _Decoder] = {}
    for way, folder in folders.items():
        file = Path(folder) / "openvino_model.xml"
        if holds_operation(file):
            teach(core)
        for hint in HINTS:
            model = core.read_model(file)
            deciders[way, hint] = _Decoder(
                core.compile_model(model, "CPU", _config(hint)).create_infer_request(), model
            )
    ids = np.asarray(prompt, dtype=np.int64).reshape(1, -1)
    half = ids[:, : max(1, ids.shape[1] - tokens)]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in deciders}
    least: dict[tuple[str, str], float] = {}
    realised: dict[tuple[str, str], float | None] = {}
    for number in range(rounds + 1):
        for key, decoder in deciders.items():
            decoder.start(half)
            reset_counts()
            spent = []
            for position in range(half.shape[1], ids.shape[1]):
                start = time.perf_counter()
                decoder.step(ids[:, position : position + 1])
                spent.append((time.perf_counter() - start) * 1e3)
            realised[key] = realised_sparsity() if key[0] != "stock" else None
            if number:
                times[key].append(median(spent))
                least[key] = min(least.get(key, float("inf")), *spent)
    for (way, hint), spent in times.items():
        sparsity = None if way == "stock" else 0.0
        result.rows.append(
            Row(name, weights, way, hint, 1, sparsity, realised[way, hint], median(spent), least[way, hint])
        )
    for count in prefill:
        text = np.resize(ids, (1, count))
        spent_by: dict[tuple[str, str], list[float]] = {key: [] for key in deciders}
        for number in range(3):
            for key, decoder in deciders.items():
                start = time.perf_counter()
                decoder.start(text)
                if number:
                    spent_by[key].append((time.perf_counter() - start) * 1e3)
        for (way, hint), spent in spent_by.items():
            sparsity = None if way == "stock" else 0.0
            result.rows.append(Row(name, weights, way, hint, count, sparsity, None, median(spent), min(spent)))
    return result


class _Decoder:
    """A stateful decoder, fed token by token."""

    def __init__(self, request: Any, model: Any) -> None:
        from scap_nncf.algorithms.backends.openvino.feed import input_names

        self.request, self.names, self.length = request, set(input_names(model)), 0

    def start(self, ids: Any) -> None:
        self.request.reset_state()
        self.length = 0
        self.step(ids)

    def step(self, ids: Any) -> None:
        count = ids.shape[1]
        known = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self.length + count), np.int64),
            "position_ids": np.arange(self.length, self.length + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: value for name, value in known.items() if name in self.names}, share_inputs=True)
        self.length += count


def loads(folder: str | os.PathLike[str], weights: str, name: str, way: str, hint: str = "default") -> LoadRow:
    """
    Time and memory of reading a saved model and running one token; meant for a process of its own.
    """
    from scap_nncf.deploy_openvino import holds_operation, teach

    ov = require("openvino", "openvino", "scap-nncf bench openvino")
    core = ov.Core()
    file = Path(folder) / "openvino_model.xml"
    if holds_operation(file):
        teach(core)
    before = _memory()
    start = time.perf_counter()
    model = core.read_model(file)
    decoder = _Decoder(core.compile_model(model, "CPU", _config(hint)).create_infer_request(), model)
    del model
    decoder.start(np.array([[5]], np.int64))
    seconds = time.perf_counter() - start
    decoder.step(np.array([[5]], np.int64))
    after = _memory()
    return LoadRow(name, weights, way, seconds, after[0] - before[0], after[1] - before[1])


def _memory() -> tuple[int, int]:
    """Resident bytes of this process, and those that are no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    resident, anonymous = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    return resident, anonymous


# -- counters of the operation -----------------------------------------------------------------------------------------


@cache
def _extension() -> Any:
    from scap_nncf.kernels.openvino.operation import extension

    require("openvino", "openvino", "scap-nncf bench openvino")
    return ctypes.CDLL(str(extension()))


def reset_counts() -> None:
    """Start the operation's counters anew."""
    _extension().scap_reset_counts()


def counts() -> dict[str, tuple[int, int]]:
    """Dropped and seen inputs by layer name, of all deployed models of the process."""
    handle = _extension()
    handle.scap_counts.restype = ctypes.c_int64
    handle.scap_counts.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    size = handle.scap_counts(None, 0)
    buffer = ctypes.create_string_buffer(size + 1)
    handle.scap_counts(buffer, size)
    result: dict[str, tuple[int, int]] = {}
    for line in buffer.value.decode().splitlines():
        name, dropped, seen = line.split("\t")
        before = result.get(name, (0, 0))
        result[name] = (before[0] + int(dropped), before[1] + int(seen))
    return result


def realised_sparsity() -> float | None:
    """Share of the inputs that was dropped since the counters were reset, over all layers."""
    found: Iterable[tuple[int, int]] = counts().values()
    dropped, seen = (sum(values) for values in zip(*found, strict=True)) if found else (0, 0)
    return dropped / seen if seen else None
