# SPDX-License-Identifier: Apache-2.0
"""
What allocations, scores and refining are worth: perplexity at equal realised sparsity, on real weights.

    python examples/benchmarks/allocation.py --model demo --calibration c4.jsonl.gz --text wikitext.txt.gz \
        --methods uniform,profile,fisher --sparsity 0.4,0.5,0.6 --output results/allocation.json --part smollm2

Sparsity is that of all weights in the blocks, as realised on the text, where every token is pruned. Realised sparsity
differs a little from the target, so methods are compared on the curve through their points: the logarithm of the rise
in perplexity, linear in the realised sparsity. Matrix products run in bfloat16 (autocast), all else in
float32. Results are added to the JSON file one by one, so that a long run can be taken up again.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import torch
from record import OutOfTime, Record

import scap_nncf
from scap_nncf.algorithms.backends.torch.greedy import greedy_paths
from scap_nncf.algorithms.backends.torch.weights import dense_matrix
from scap_nncf.algorithms.plan import Plan, to_float32
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.statistics import bucket_counts
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity
from scap_nncf.significance import paired_windows
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids


class Bench:
    """A model, its calibration, and the text."""

    def __init__(self, args: argparse.Namespace, record: Record) -> None:
        self.args, self.record = args, record
        self.model, self.tokenizer = load_model(args.model, dtype=torch.float32)
        texts = read_texts(args.calibration) if args.calibration else list(builtin_text("calibration"))
        self.samples = token_batches(self.tokenizer, texts, length=args.length, count=args.samples, seed=0)
        text = read_texts(args.text) if args.text else builtin_text("held_out")
        self.ids = token_ids(self.tokenizer, text)[: args.tokens]
        record.set("about", {"tokens": len(self.ids), "context": args.context, "samples": len(self.samples),
                             "tokens a sample": args.length})  # fmt: skip
        self.settings: dict[str, Any] = {"subset_size": None, "allocation": "fisher"}
        self.settings |= {"allocation_samples": args.priced, "mode": "zero"}
        self._statistics: Any = None

    def statistics(self) -> Any:
        """Histograms and prices, kept in the work folder."""
        if self._statistics is None:
            if self.args.work and (self.args.work / "statistics.safetensors").is_file():
                self._statistics = scap_nncf.CalibrationStatistics.load(self.args.work)
            else:
                plain_settings = self.settings | {"allocation": "uniform"}
                with torch.autocast("cpu", torch.bfloat16, enabled=self.args.autocast):
                    start = time.process_time()
                    plain = scap_nncf.calibrate(self.model, dataset=self.samples, **plain_settings)
                    middle, before = time.process_time(), _peak()
                    priced = scap_nncf.calibrate(self.model, dataset=self.samples[: self.args.priced], **self.settings)
                seconds = time.process_time() - middle  # of calibration and pricing of a few samples
                per_token = (middle - start) / plain.tokens
                price = seconds / priced.tokens - per_token
                cost = {"calibration seconds a token": per_token, "pricing seconds a token": price}
                cost |= {"ratio": price / per_token, "peak GiB before": before, "peak GiB after": _peak()}
                cost |= {"calibrated tokens": plain.tokens, "priced tokens": priced.costs.tokens, "seconds are": "CPU"}
                self.record.set("cost", cost)
                self._statistics = dataclasses.replace(plain, costs=priced.costs)
                if self.args.work:
                    self._statistics.save(self.args.work)
        return self._statistics

    def plan(self, sparsity: Any, allocation: str) -> Plan:
        return scap_nncf.make_plan(self.statistics(), scap_nncf.Scap(sparsity, mode="zero", allocation=allocation))

    def measure(self, ids: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.autocast):
            return perplexity(self.model, ids, self.args.context)

    def realised(self, plan: Plan, ids: torch.Tensor) -> tuple[float, Any]:
        """Realised sparsity over all weights of the blocks, and the perplexity."""
        scap_nncf.compress(self.model, plan=plan)
        controller = scap_nncf.get_controller(self.model)
        try:
            result = self.measure(ids)
            counted = {layer.name: layer for layer in controller.statistics().layers}
        finally:
            controller.strip()
        layers = [layer for site in self.statistics().sites for layer in site.layers]
        skipped = sum(
            layer.weights * (counted[layer.name].realised_sparsity or 0.0) for layer in layers if layer.name in counted
        )
        return skipped / sum(layer.weights for layer in layers), result

    def at(self, sparsity: float, make: Callable[[float], Plan]) -> dict[str, Any]:
        """Perplexity and realised sparsity of a method at a target."""
        plan = make(sparsity)
        start = time.perf_counter()
        found, result = self.realised(plan, self.ids)
        return self.row(result, found, sparsity, time.perf_counter() - start)

    def row(self, result: Any, realised: float, target: float, seconds: float) -> dict[str, Any]:
        row = {"perplexity": result.perplexity, "realised": realised, "target": target, "seconds": seconds}
        row["windows"] = [loss for loss, _ in result.windows]
        return row


def _peak() -> float:
    """Peak memory of the process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- methods: sparsity → plan ------------------------------------------------------------------------------------------


def allocated(name: str) -> Callable[[Bench], Callable[[float], Plan]]:
    return lambda bench: lambda target: bench.plan(target, name)


def ffn_only(bench: Bench) -> Callable[[float], Plan]:
    layers = [layer for site in bench.statistics().sites for layer in site.layers]
    share = sum(layer.weights for layer in layers if layer.role in ("gate", "up", "down"))
    share /= sum(layer.weights for layer in layers)
    return lambda target: bench.plan({"ffn": min(target / share, 0.98)}, "uniform")


def sequential(bench: Bench) -> Callable[[float], Plan]:
    def make(target: float) -> Plan:
        scap_nncf.compress(bench.model, dataset=bench.samples[:8], sparsity=target, sequential=True, mode="zero",
                           allocation="uniform", subset_size=None)  # fmt: skip
        controller = scap_nncf.get_controller(bench.model)
        controller.strip()
        return controller.plan

    return make


def greedy(bench: Bench) -> Callable[[float], Plan]:
    from scap_nncf.algorithms.allocation.greedy import allocate

    statistics = bench.statistics()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bench.args.autocast):
        paths = greedy_paths(bench.model, statistics.sites, statistics.histograms, bench.samples[:1])
    bench.record.set("greedy seconds", time.perf_counter() - start)
    return lambda target: bench.plan({f"re:^{n}$": s for n, s in allocate(paths, target).items()}, "uniform")


def wina(allocation: str) -> Callable[[Bench], Callable[[float], Plan]]:
    """Thresholds on ``|x_i|·‖W_i‖₂``, each layer its own; a diagonal scale beside pruning at equal thresholds."""

    def prepare(bench: Bench) -> Callable[[float], Plan]:
        layers = [(site, layer) for site in bench.statistics().sites for layer in site.layers]
        norms = {}
        for _, layer in layers:
            norm = torch.as_tensor(dense_matrix(bench.model, layer.name)).float().norm(dim=1)  # [IC]
            norms[layer.name] = norm / norm.mean()
        counts: dict[str, Any] = {}

        def make_hook(name: str) -> Any:
            def hook(_module: Any, args: Any) -> None:
                counts[name] = counts.get(name, 0) + bucket_counts(args[0].float() * norms[name])

            return hook

        modules = {layer.name: bench.model.get_submodule(layer.name) for _, layer in layers}
        handles = [module.register_forward_pre_hook(make_hook(name)) for name, module in modules.items()]
        with torch.no_grad():
            for sample in bench.samples[:8]:
                bench.model(**sample)
        for handle in handles:
            handle.remove()
        histograms = {name: ActivationHistogram(value.cpu().numpy(), False) for name, value in counts.items()}

        def make(target: float) -> Plan:
            plan = bench.plan(target, allocation)
            sites = tuple(
                dataclasses.replace(
                    site,
                    layers=tuple(
                        dataclasses.replace(
                            layer,
                            threshold=to_float32(histograms[layer.name].quantile(layer.sparsity))
                            if layer.threshold >= 0
                            else layer.threshold,
                        )
                        for layer in site.layers
                    ),
                )
                for site in plan.sites
            )
            scores = {(layer.name, "score"): norms[layer.name].numpy() for layer in plan.layers}
            return dataclasses.replace(plan, sites=sites).with_vectors(scores)

        return make

    return prepare


METHODS: dict[str, Callable[[Bench], Callable[[float], Plan]]] = {
    "uniform": allocated("uniform"),
    "profile": allocated("profile"),
    "fisher": allocated("fisher"),
    "ffn only": ffn_only,
    "sequential": sequential,
    "greedy": greedy,
    "wina": wina("uniform"),
    "fisher wina": wina("fisher"),
}


def refined(bench: Bench, sparsity: float) -> dict[str, Any]:
    """Fisher, with vectors trained on the calibration text."""
    scap_nncf.compress(bench.model, plan=bench.plan(sparsity, "fisher"))
    controller = scap_nncf.get_controller(bench.model)
    try:
        report = controller.refine(bench.samples, settings=scap_nncf.Refine(steps=bench.args.steps))
        plan = controller.plan
    finally:
        controller.strip()
    if bench.args.work:
        plan.save(bench.args.work / f"refined-{sparsity}")
    start = time.perf_counter()
    realised, result = bench.realised(plan, bench.ids)
    row = bench.row(result, realised, sparsity, time.perf_counter() - start)
    return {**row, "refine": {**dataclasses.asdict(report), "losses": list(report.losses.items())}}


def in_tree(bench: Bench, sparsity: float) -> dict[str, Any]:
    """NNCF's experimental sparsify_activations on a copy of its own; the realised sparsity is counted by hooks."""
    from nncf.experimental.torch.sparsify_activations import TargetScope, sparsify_activations
    from nncf.experimental.torch.sparsify_activations.torch_backend import ActivationsSparsifier

    layers = [layer for site in bench.statistics().sites for layer in site.layers]
    model, _ = load_model(bench.args.model, dtype=torch.float32)
    counts: dict[int, list[int]] = {}

    def count(module: Any, _inputs: Any, output: torch.Tensor) -> None:
        entry = counts.setdefault(id(module), [0, 0, 0])
        entry[0] += int((output == 0).sum())
        entry[1] += output.numel()

    scope = {TargetScope(patterns=[".*"]): sparsity}
    ignored = nncf.IgnoredScope(patterns=[".*lm_head.*", ".*rotary.*"])
    sparse = sparsify_activations(model, nncf.Dataset(bench.samples[:8]), scope, ignored)
    pruners = [module for module in sparse.modules() if isinstance(module, ActivationsSparsifier)]
    for module in pruners:
        module.register_forward_hook(count)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bench.args.autocast):
        result = perplexity(sparse, bench.ids, bench.args.context)
    realised = [zeros / total for zeros, total, _ in counts.values()]
    row = bench.row(result, sum(realised) / max(len(realised), 1), sparsity, time.perf_counter() - start)
    return {**row, "pruners": len(pruners), "layers": len(layers), "realised is": "a mean over layers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="texts; default: the built-in ones")
    parser.add_argument("--text", help="measured on; default: the built-in one")
    parser.add_argument("--methods", default="uniform,profile,fisher")
    parser.add_argument("--sparsity", default="0.4,0.5,0.6")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--priced", type=int, default=8, help="samples behind the prices")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50, help="of refining")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seconds", type=float, help="begin no measurement later than this")
    parser.add_argument("--work", type=Path, help="folder for statistics, to be used again")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", default="smollm2")
    args = parser.parse_args()
    record = Record(args.output, args.part, args.seconds)
    try:
        bench = Bench(args, record)
        bench.statistics()
        record.once("dense", lambda: bench.row(bench.measure(bench.ids), 0.0, 0.0, 0.0))
        for method in args.methods.split(","):
            make: Any = None
            for sparsity in map(float, args.sparsity.split(",")):
                key = f"{method} {sparsity}"
                if key in record.data:
                    continue
                if method == "refine":
                    record.once(key, lambda s=sparsity: refined(bench, s))
                elif method == "nncf":
                    record.once(key, lambda s=sparsity: in_tree(bench, s))
                else:
                    make = make or METHODS[method](bench)
                    record.once(key, lambda s=sparsity, m=make: bench.at(s, m))
    except OutOfTime:
        print("Out of time; run again to go on.")
    summary(record)


def summary(record: Record) -> None:
    """Perplexities at equal realised sparsity, and how much of uniform's increase each method takes back."""
    dense = record.data["dense"]
    points: dict[str, list[tuple[float, float]]] = {}
    for key, row in record.data.items():
        if isinstance(row, dict) and "windows" in row and key != "dense":
            rise = math.log(max(row["perplexity"] - dense["perplexity"], 1e-6))
            points.setdefault(key.rpartition(" ")[0], []).append((row["realised"], rise))
    rows: dict[str, Any] = {}
    for sparsity in (0.3, 0.4, 0.5, 0.6, 0.65):
        rises = {
            m: at for m, curve in points.items() if (at := _on_curve(curve, sparsity, points["uniform"])) is not None
        }
        for method, rise in rises.items():
            entry: dict[str, Any] = {"perplexity": round(dense["perplexity"] + rise, 2)}
            if method != "uniform" and "uniform" in rises:
                entry["share of uniform's increase removed"] = round(1 - rise / rises["uniform"], 3)
                one, other = (record.data.get(f"{m} {sparsity}") for m in ("uniform", method))
                if one and other:
                    tokens = record.data["about"]["context"] - 1
                    pairs = [[(loss, tokens) for loss in row["windows"]] for row in (one, other)]
                    entry["standard error of the log ratio"] = round(paired_windows(*pairs).stderr or 0.0, 4)
            rows[f"{method} at {sparsity}"] = entry
    record.set("summary", rows)


def _on_curve(curve: list[tuple[float, float]], at: float, like: list[tuple[float, float]]) -> float | None:
    """The rise at a realised sparsity, from a point at most 0.04 away; a single point moves as another curve goes."""
    curve = sorted(curve)
    near = min(curve, key=lambda point: abs(point[0] - at))
    if abs(near[0] - at) > 0.04:
        return None
    others = sorted(curve if len(curve) > 1 else like)
    if len(others) < 2:
        return math.exp(near[1])
    left = max((p for p in others[:-1] if p[0] <= at), default=others[0])
    right = others[others.index(left) + 1]
    slope = (right[1] - left[1]) / (right[0] - left[0])
    return math.exp(near[1] + slope * (at - near[0]))


if __name__ == "__main__":
    main()
