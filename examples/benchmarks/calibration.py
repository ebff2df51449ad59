# SPDX-License-Identifier: Apache-2.0
"""
What calibration is worth, on real weights: exactness, order, cost, perplexity.

    python examples/benchmarks/calibration.py quantiles --calibration TEXTS --output results.json
    python examples/benchmarks/calibration.py {order,cost,memory,exact,perplexity,modes} ...

TEXTS and --text are .txt or .jsonl files (also .gz); by default the text that ships with Python. Results are added to
the JSON file under the name of the part, with the command that made them, after each measurement: a run that was
ended goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import OutOfTime, Record, to_text

import scap_nncf
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids

PAPER_LLAMA2 = "up,zero,0.35,gate,zero,0.35,down,zero,0.55"
# each layer gets the sparsity that is asked for, so nothing but the histograms is gathered; allocation.py has the rest
ONE_PASS: dict[str, Any] = {"allocation": "uniform", "subset_size": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    add_arguments(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.part](args)))
        return
    record = Record(args.output, args.part, args.seconds)
    try:
        PARTS[args.part](args, record)
    except OutOfTime:
        print(f"{args.seconds} s are over; run the same command again to go on", file=sys.stderr)
        sys.exit(3)
    print(to_text(record.data))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this script and its neighbours understand."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="calibration texts")
    parser.add_argument("--text", help="evaluation text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, help="begin no measurement later than this")


def calibration_batches(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Windows of the calibration texts."""
    texts = read_texts(args.calibration) if args.calibration else list(builtin_text("calibration"))
    return token_batches(tokenizer, texts, length=args.length, count=args.samples, seed=0)


def evaluation_ids(args: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """The first `--tokens` tokens of the evaluation text."""
    return token_ids(tokenizer, read_texts(args.text) if args.text else builtin_text("held_out"))[: args.tokens]


def run_plain(model: Any, batches: list[Any]) -> None:
    """Forward passes without anything else."""
    with torch.no_grad():
        for batch in batches:
            model(**batch)


# -- exactness ---------------------------------------------------------------------------------------------------------


def quantiles(args: argparse.Namespace, record: Record) -> None:
    """Thresholds against a float64 numpy quantile over all collected values: every site, three modes, nine targets."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = calibration_batches(args, tokenizer)
    statistics = scap_nncf.calibrate(model, dataset=batches, **ONE_PASS)
    record.set("sites", len(statistics.sites))
    record.set("tokens", statistics.tokens)
    record.set("bucket_width", 2.0**-7)
    collected: dict[str, list[torch.Tensor]] = {site.name: [] for site in statistics.sites}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, a, values=values: values.append(a[0].detach().reshape(-1))
        )
        for name, values in collected.items()
    ]
    run_plain(model, batches)
    for handle in handles:
        handle.remove()

    def errors(name: str) -> dict[str, list[float]]:
        """Per mode: the worst relative error of τ, and the worst error of the sparsity that it realises."""
        x = torch.cat(collected[name]).double().numpy()
        histogram = statistics.histograms[name]
        result = {}
        for method, mode in (("zero", 0.0), ("median", histogram.median()), ("kde", histogram.kde_mode())):
            distance = np.abs(x - mode)
            targets = np.arange(1, 10) / 10
            truth = np.quantile(distance, targets)
            thresholds = np.array([histogram.quantile(float(s), mode) for s in targets])
            realised = np.array([(distance <= threshold).mean() for threshold in thresholds])
            result[method] = [float(np.max(np.abs(thresholds / truth - 1))), float(np.max(np.abs(realised - targets)))]
        return result

    by_site = {site.name: record.once(site.name, lambda name=site.name: errors(name)) for site in statistics.sites}
    for index, what in enumerate(("worst_relative_threshold_error", "worst_realised_sparsity_error")):
        rows = [(values[method][index], name, method) for name, values in by_site.items() for method in values]
        record.set(what, max(rows))
        record.set(what.replace("worst", "mean"), float(np.mean([row[0] for row in rows])))


def order(args: argparse.Namespace, record: Record) -> None:
    """The same batches in other orders, and merged from four processes: the plan must be equal bit for bit."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = calibration_batches(args, tokenizer)

    def plan_of(data: list[Any]) -> str:
        statistics = scap_nncf.calibrate(model, dataset=data, **ONE_PASS)
        return scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=0.5, allocation="uniform")).to_json()

    def merged() -> str:
        with tempfile.TemporaryDirectory() as folder:
            parts = []
            for share in range(4):
                _child(args, f"{share}:{folder}/{share}")
                parts.append(scap_nncf.CalibrationStatistics.load(f"{folder}/{share}"))
        whole = parts[2].merge(parts[0]).merge(parts[3].merge(parts[1]))
        return scap_nncf.make_plan(whole, scap_nncf.Scap(sparsity=0.5, allocation="uniform")).to_json()

    first = plan_of(batches)
    record.set("layers", first.count('"threshold"'))
    record.once("reversed order: equal plan", lambda: plan_of(batches[::-1]) == first)
    shuffled = random.Random(1).sample(batches, len(batches))
    record.once("shuffled: equal plan", lambda: plan_of(shuffled) == first)
    record.once("merged from four processes: equal plan", lambda: merged() == first)


def _order_child(args: argparse.Namespace) -> None:
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    share, folder = args.child.split(":", 1)
    part = calibration_batches(args, tokenizer)[int(share) :: 4]
    scap_nncf.calibrate(model, dataset=part, **ONE_PASS).save(folder)


def exact(args: argparse.Namespace, record: Record) -> None:
    """Thresholds that drop nothing: bit-identical without a mode, and to rounding with one."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = calibration_batches(args, tokenizer)[:2]
    statistics = scap_nncf.calibrate(model, dataset=batches, **ONE_PASS)
    plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=0.5, mode="mean", allocation="uniform"))
    with torch.no_grad():
        dense = model(**batches[0]).logits

    def compare(threshold: float) -> dict[str, Any]:
        sites = tuple(
            replace(site, mode=0.05, layers=tuple(replace(layer, threshold=threshold) for layer in site.layers))
            for site in plan.sites
        )
        scap_nncf.compress(model, plan=replace(plan, sites=sites))
        with torch.no_grad():
            sparse = model(**batches[0]).logits
        scap_nncf.get_controller(model).strip()
        return {
            "bit_identical": bool(torch.equal(sparse, dense)),
            "relative_error": float((sparse - dense).norm() / dense.norm()),
        }

    record.once("negative threshold", lambda: compare(-1.0))
    record.once("mode 0.05, threshold 0", lambda: compare(0.0))
    with torch.no_grad():
        record.once("stripped is bit-identical", lambda: bool(torch.equal(model(**batches[0]).logits, dense)))


# -- cost --------------------------------------------------------------------------------------------------------------


def cost(args: argparse.Namespace, record: Record) -> None:
    """Time of calibration and planning over plain forward passes of the same tokens, in turns."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = calibration_batches(args, tokenizer)
    run_plain(model, batches[:2])
    record.set("tokens", len(batches) * args.length)

    def timed(work: Any) -> dict[str, float]:
        # processor time as well: on a busy machine the wall clock measures the others
        wall, processor = time.perf_counter(), time.process_time()
        work()
        return {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}

    def calibrate() -> None:
        statistics = scap_nncf.calibrate(model, dataset=batches, **ONE_PASS)
        scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=0.5, allocation="uniform"))

    def pair() -> dict[str, Any]:
        return {"plain": timed(lambda: run_plain(model, batches)), "calibration": timed(calibrate)}

    pairs = [record.once(f"pair {index}", pair) for index in range(2)]
    plain = {clock: float(np.mean([pair["plain"][clock] for pair in pairs])) for clock in pairs[0]["plain"]}
    for clock in plain:
        both = float(np.mean([pair["calibration"][clock] for pair in pairs]))
        record.set(f"ratio of {clock}", both / plain[clock])
    prices = {"sparsity": 0.5, "allocation": "fisher", "allocation_samples": 8, "subset_size": None}
    priced = record.once(
        "with prices of 8 samples", lambda: timed(lambda: scap_nncf.calibrate(model, dataset=batches, **prices))
    )
    for clock in plain:
        record.set(f"ratio of {clock} with prices", priced[clock] / plain[clock])


def memory(args: argparse.Namespace, record: Record) -> None:
    """Peak memory of processes of their own: what calibration adds to a plain forward pass, at 8 and 64 samples."""
    peaks = {
        (kind, count): record.once(f"{kind} {count}", lambda kind=kind, count=count: _child(args, f"{kind}:{count}"))
        for count in (8, 64)
        for kind in ("plain", "scap")
    }
    extra = {count: peaks["scap", count]["peak_mib"] - peaks["plain", count]["peak_mib"] for count in (8, 64)}
    record.set("extra_mib", {str(count): value for count, value in extra.items()})
    record.set("allowed_mib", 100 + peaks["scap", 8]["sites"])


def _memory_child(args: argparse.Namespace) -> dict[str, Any]:
    kind, count = args.child.split(":")
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    args.samples = 64  # the same windows are made whatever the count
    batches = calibration_batches(args, tokenizer)[: int(count)]
    sites = len(scap_nncf.inspect_model(model).sites)
    if kind == "plain":
        run_plain(model, batches)
    else:
        scap_nncf.compress(model, dataset=batches, sparsity=0.5, **ONE_PASS)
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "sites": sites}


def _child(args: argparse.Namespace, what: str) -> Any:
    command = [sys.executable, __file__, args.part, "--child", what, "--model", args.model]
    command += ["--samples", str(args.samples), "--length", str(args.length)]
    command += ["--calibration", args.calibration] if args.calibration else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- quality -----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "paper's Llama-2 (up/gate .35, down .55)": PAPER_LLAMA2,
    "ffn .5": {"ffn": 0.5},
    "all .3": 0.3,
    "all .4": 0.4,
    "all .5": 0.5,
}


class _Quality:
    """The model, its data, and the statistics of the dense model, gathered when first needed."""

    def __init__(self, args: argparse.Namespace, record: Record) -> None:
        self.model, tokenizer = load_model(args.model, dtype=torch.float32)
        self.batches = calibration_batches(args, tokenizer)
        self.ids = evaluation_ids(args, tokenizer)
        self.context = args.context
        self._statistics: Any = None
        record.set("tokens", len(self.ids))
        record.set("context", self.context)
        record.set("calibration_tokens", len(self.batches) * args.length)

    def plan(self, **settings: Any) -> Any:
        """A plan from statistics of the dense model."""
        if self._statistics is None:
            self._statistics = scap_nncf.calibrate(self.model, dataset=self.batches, **ONE_PASS)
        return scap_nncf.make_plan(self._statistics, scap_nncf.Scap(allocation="uniform", **settings))

    def sequential_plan(self, **settings: Any) -> Any:
        """A plan from statistics behind the pruned sites before."""
        scap_nncf.compress(self.model, dataset=self.batches, sequential=True, **ONE_PASS, **settings)
        controller: Any = scap_nncf.get_controller(self.model)
        controller.strip()
        return controller.plan

    def dense(self) -> float:
        return perplexity(self.model, self.ids, self.context).perplexity

    def row(self, plan: Any) -> dict[str, Any]:
        """Perplexity and realised sparsity under a plan."""
        scap_nncf.compress(self.model, plan=plan)
        controller: Any = scap_nncf.get_controller(self.model)
        try:
            value = perplexity(self.model, self.ids, self.context).perplexity
            statistics = controller.statistics()
        finally:
            controller.strip()
        return {
            "perplexity": value,
            "target": statistics.sparsity,
            "realised": statistics.realised_sparsity,
            "realised_by_role": {row.role: row.realised_sparsity for row in statistics.roles()},
            "centred_sites": sum(site.mode != 0.0 for site in plan.sites),
        }


def perplexities(args: argparse.Namespace, record: Record) -> None:
    """Perplexity and realised sparsity of five settings, calibrated on the dense model and in sequence."""
    quality = _Quality(args, record)
    record.once("dense", quality.dense)
    for name, sparsity in SETTINGS.items():
        record.once(f"{name}, one pass", lambda s=sparsity: quality.row(quality.plan(sparsity=s)))
        record.once(f"{name}, sequential", lambda s=sparsity: quality.row(quality.sequential_plan(sparsity=s)))


def modes(args: argparse.Namespace, record: Record) -> None:
    """All roles at 50 %, centred in five ways."""
    quality = _Quality(args, record)
    for mode in ("zero", "auto", "median", "kde", "mean"):
        record.once(mode, lambda mode=mode: quality.row(quality.plan(sparsity=0.5, mode=mode)))


PARTS = {
    "quantiles": quantiles,
    "order": order,
    "cost": cost,
    "memory": memory,
    "exact": exact,
    "perplexity": perplexities,
    "modes": modes,
}
CHILDREN = {"order": _order_child, "memory": _memory_child}

if __name__ == "__main__":
    main()
