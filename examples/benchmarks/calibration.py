# SPDX-License-Identifier: Apache-2.0
"""
What calibration is worth, on real weights: exactness, order, cost, perplexity, and NNCF's own sparsifier beside it.

    python examples/benchmarks/calibration.py quantiles --calibration TEXTS --output results.json
    python examples/benchmarks/calibration.py {order,cost,exact,perplexity,allocation,nncf} ...

TEXTS and --text are .txt or .jsonl files (also .gz); by default the text that ships with Python. Results are added to
the JSON file under the name of the part, with the command that made them.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import torch

import scap_nncf
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids

PAPER_LLAMA2 = "up,zero,0.35,gate,zero,0.35,down,zero,0.55"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="calibration texts")
    parser.add_argument("--text", help="evaluation text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    result = PARTS[args.part](args)
    if args.child:
        print(json.dumps(result))
        return
    print(json.dumps(result, indent=1))
    if args.output:
        data = json.loads(args.output.read_text()) if args.output.exists() else {}
        shown = [Path(part).name if "/" in part else part for part in sys.argv[1:]]
        data[args.part] = {"command": f"python examples/benchmarks/calibration.py {' '.join(shown)}", **result}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(data, indent=1) + "\n")


def _batches(args: argparse.Namespace, tokenizer: Any, count: int | None = None) -> list[dict[str, torch.Tensor]]:
    texts = read_texts(args.calibration) if args.calibration else list(builtin_text("calibration"))
    return token_batches(tokenizer, texts, length=args.length, count=count or args.samples, seed=0)


def _plain(model: Any, batches: list[Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def quantiles(args: argparse.Namespace) -> dict[str, Any]:
    """Thresholds against a float64 numpy quantile over all collected values, every site, three modes, nine targets."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = _batches(args, tokenizer)
    statistics = scap_nncf.calibrate(model, dataset=batches)
    worst = {"threshold": (0.0, ""), "realised": (0.0, "")}
    collected: dict[str, list[torch.Tensor]] = {site.name: [] for site in statistics.sites}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, a, values=values: values.append(a[0].detach().reshape(-1))
        )
        for name, values in collected.items()
    ]
    _plain(model, batches)
    for handle in handles:
        handle.remove()
    for site in statistics.sites:
        x = torch.cat(collected.pop(site.name)).double().numpy()
        histogram = statistics.histograms[site.name]
        for method in ("zero", "median", "kde"):
            mode = {"zero": lambda: 0.0, "median": histogram.median, "kde": histogram.kde_mode}[method]()
            distance = np.sort(np.abs(x - mode))
            for s in np.arange(1, 10) / 10:
                truth = float(np.quantile(distance, s))
                threshold = histogram.quantile(float(s), mode)
                realised = np.searchsorted(distance, threshold, side="right") / distance.size
                where = f"{site.name} mode {method} s {s:.1f}"
                worst["threshold"] = max(worst["threshold"], (abs(threshold - truth) / truth, where))
                worst["realised"] = max(worst["realised"], (abs(realised - s), where))
    return {
        "sites": len(statistics.sites),
        "tokens": statistics.tokens,
        "worst_relative_threshold_error": worst["threshold"],
        "bucket_width": 2.0**-7,
        "worst_realised_sparsity_error": worst["realised"],
    }


def order(args: argparse.Namespace) -> dict[str, Any]:
    """The same batches in other orders, and merged from four processes: the plan must be equal bit for bit."""
    if args.child:
        model, tokenizer = load_model(args.model, dtype=torch.float32)
        share, folder = args.child.split(":", 1)
        part = _batches(args, tokenizer)[int(share) :: 4]
        scap_nncf.calibrate(model, dataset=part).save(folder)
        return {}
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = _batches(args, tokenizer)
    settings = scap_nncf.Scap(sparsity=0.5)
    plans = {"as given": scap_nncf.make_plan(scap_nncf.calibrate(model, dataset=batches), settings).to_json()}
    for seed in range(3):
        shuffled = batches[::-1] if seed == 0 else random.Random(seed).sample(batches, len(batches))
        plans[f"order {seed}"] = scap_nncf.make_plan(scap_nncf.calibrate(model, dataset=shuffled), settings).to_json()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for share in range(4):
            _child(args, f"{share}:{folder}/{share}")
            parts.append(scap_nncf.CalibrationStatistics.load(f"{folder}/{share}"))
        merged = parts[2].merge(parts[0]).merge(parts[3]).merge(parts[1])
        plans["merged from four processes"] = scap_nncf.make_plan(merged, settings).to_json()
    return {"equal": {name: plan == plans["as given"] for name, plan in plans.items()}}


def _child(args: argparse.Namespace, what: str) -> Any:
    command = [sys.executable, __file__, args.part, "--child", what, "--model", args.model]
    command += ["--samples", str(args.samples), "--length", str(args.length)]
    command += ["--calibration", args.calibration] if args.calibration else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Time of calibration over a plain forward pass, interleaved; peak memory in processes of their own."""
    if args.child:
        kind, count = args.child.split(":")
        model, tokenizer = load_model(args.model, dtype=torch.float32)
        batches = _batches(args, tokenizer, int(count))
        _plain(model, batches[:1])
        if kind == "plain":
            _plain(model, batches)
        else:
            scap_nncf.compress(model, dataset=batches, sparsity=0.5)
        return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = _batches(args, tokenizer)
    _plain(model, batches[:2])
    seconds: dict[str, list[float]] = {"plain": [], "calibrate": []}
    for _ in range(5):
        for name, work in (("plain", _plain), ("calibrate", _calibrate)):
            start = time.perf_counter()
            work(model, batches)
            seconds[name].append(time.perf_counter() - start)
    ratios = [c / p for c, p in zip(seconds["calibrate"], seconds["plain"])]
    sites = len(scap_nncf.inspect_model(model).sites)
    runs = [(kind, count) for kind in ("plain", "scap") for count in (8, 64)]
    peaks = {f"{kind} {count}": _child(args, f"{kind}:{count}")["peak_mib"] for kind, count in runs}
    return {
        "seconds_median": {name: float(np.median(values)) for name, values in seconds.items()},
        "ratio_median": float(np.median(ratios)),
        "ratios": ratios,
        "sites": sites,
        "peak_mib": peaks,
        "extra_mib": {count: peaks[f"scap {count}"] - peaks[f"plain {count}"] for count in (8, 64)},
        "allowed_mib": 100 + sites,
    }


def _calibrate(model: Any, batches: list[Any]) -> None:
    scap_nncf.make_plan(scap_nncf.calibrate(model, dataset=batches), scap_nncf.Scap(sparsity=0.5))


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """Thresholds that drop nothing: bit-identical without a mode, and to rounding with one."""
    from dataclasses import replace

    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = _batches(args, tokenizer, 2)
    with torch.no_grad():
        dense = model(**batches[0]).logits
        statistics = scap_nncf.calibrate(model, dataset=batches)
        plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=0.5, mode="mean"))
        result: dict[str, Any] = {}
        for name, threshold in (("negative threshold", -1.0), ("mode, threshold 0", 0.0)):
            sites = tuple(
                replace(site, mode=0.05, layers=tuple(replace(layer, threshold=threshold) for layer in site.layers))
                for site in plan.sites
            )
            scap_nncf.compress(model, plan=replace(plan, sites=sites))
            sparse = model(**batches[0]).logits
            result[name] = {
                "bit_identical": bool(torch.equal(sparse, dense)),
                "relative_error": float((sparse - dense).norm() / dense.norm()),
            }
            scap_nncf.get_controller(model).strip()
        result["stripped is bit-identical"] = bool(torch.equal(model(**batches[0]).logits, dense))
    return result


SETTINGS: dict[str, Any] = {
    "paper's Llama-2 (up/gate .35, down .55)": PAPER_LLAMA2,
    "ffn .5": {"ffn": 0.5},
    "all .3": 0.3,
    "all .4": 0.4,
    "all .5": 0.5,
}


def perplexities(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and realised sparsity of five settings, calibrated on the dense model and in sequence."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    ids = token_ids(tokenizer, read_texts(args.text) if args.text else builtin_text("held_out"))[: args.tokens]
    batches = _batches(args, tokenizer)
    rows = [{"setting": "dense", "perplexity": perplexity(model, ids, args.context).perplexity}]
    print(rows[-1], file=sys.stderr)
    for name, sparsity in SETTINGS.items():
        for sequential in (False, True):
            start = time.perf_counter()
            scap_nncf.compress(model, dataset=batches, sparsity=sparsity, sequential=sequential, subset_size=None)
            seconds = time.perf_counter() - start
            controller = scap_nncf.get_controller(model)
            value = perplexity(model, ids, args.context).perplexity
            statistics = controller.statistics()
            rows.append(
                {
                    "setting": name,
                    "calibration": "sequential" if sequential else "dense",
                    "perplexity": value,
                    "target": statistics.sparsity,
                    "realised": statistics.realised_sparsity,
                    "calibration_seconds": seconds,
                    "centred_sites": sum(site.mode != 0.0 for site in controller.plan.sites),
                }
            )
            print(rows[-1], file=sys.stderr)
            controller.strip()
    return {"tokens": len(ids), "context": args.context, "calibration_samples": len(batches), "rows": rows}


def allocations(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity at the same budget, spread over the layers in three ways."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    ids = token_ids(tokenizer, read_texts(args.text) if args.text else builtin_text("held_out"))[: args.tokens]
    batches = _batches(args, tokenizer)
    start = time.perf_counter()
    scap_nncf.compress(model, dataset=batches, sparsity=0.5, allocation="fisher", subset_size=None)
    seconds = time.perf_counter() - start
    controller = scap_nncf.get_controller(model)
    rows = []
    for sparsity in (0.4, 0.5):
        for allocation in ("uniform", "profile", "fisher"):
            controller.set_sparsity(sparsity, allocation=allocation)
            controller.reset_counters()
            value = perplexity(model, ids, args.context).perplexity
            statistics = controller.statistics()
            row = {"sparsity": sparsity, "allocation": allocation, "perplexity": value}
            row["realised"] = statistics.realised_sparsity
            row["sparsity by role"] = {role.role: role.sparsity for role in statistics.roles()}
            rows.append(row)
            print(row, file=sys.stderr)
    return {
        "tokens": len(ids),
        "context": args.context,
        "calibration_samples": len(batches),
        "priced_tokens": controller.calibration.costs.tokens,
        "calibration_and_pricing_seconds": seconds,
        "rows": rows,
    }


def against_nncf(args: argparse.Namespace) -> dict[str, Any]:
    """NNCF's experimental sparsify_activations on the same model, data and scopes; and its three failures."""
    from nncf.experimental.torch.sparsify_activations import TargetScope, sparsify_activations

    result: dict[str, Any] = {}
    scopes = {"up,gate .35": (".*(up|gate)_proj.*", 0.35), "down .55": (".*down_proj.*", 0.55)}
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    ids = token_ids(tokenizer, read_texts(args.text) if args.text else builtin_text("held_out"))[: args.tokens]
    batches = _batches(args, tokenizer)

    def measure(sparse: Any, seconds: float, thresholds: dict[str, float]) -> dict[str, Any]:
        realised = _realised(model, thresholds, batches)
        errors = [abs(realised[name] - (0.55 if "down" in name else 0.35)) for name in thresholds]
        return {
            "calibration_seconds": seconds,
            "perplexity": perplexity(sparse, ids, args.context).perplexity,
            "realised_error_on_calibration_data_mean": float(np.mean(errors)),
            "realised_error_on_calibration_data_worst": float(np.max(errors)),
        }

    start = time.perf_counter()
    scap_nncf.compress(model, dataset=batches, sparsity=PAPER_LLAMA2, subset_size=None)
    seconds = time.perf_counter() - start
    controller = scap_nncf.get_controller(model)
    thresholds = {layer.name: layer.threshold for layer in controller.plan.layers}
    value = perplexity(model, ids, args.context).perplexity
    controller.strip()
    ours = measure(model, seconds, thresholds)
    ours["perplexity"] = value
    result["scap_nncf"] = ours

    theirs, _ = load_model(args.model, dtype=torch.float32)
    start = time.perf_counter()
    targets = {TargetScope(patterns=[pattern]): s for pattern, s in scopes.values()}
    sparse = sparsify_activations(theirs, nncf.Dataset(batches), targets)
    seconds = time.perf_counter() - start
    thresholds = _nncf_thresholds(sparse)
    result["nncf"] = measure(sparse, seconds, thresholds)

    # batch order
    result["batch order"] = {}
    for who, run in (("nncf", _nncf_plan), ("scap_nncf", _our_plan)):
        forwards, backwards = run(args, batches, targets), run(args, batches[::-1], targets)
        change = max(abs(forwards[name] - backwards[name]) / abs(forwards[name]) for name in forwards)
        result["batch order"][who] = {"largest_relative_change_of_a_threshold": change}

    # bfloat16, and an empty input after calibration
    result["bfloat16"], result["empty input"] = {}, {}
    for who, run in (("nncf", _nncf_plan), ("scap_nncf", _our_plan)):
        result["bfloat16"][who] = _outcome(lambda run=run: run(args, batches[:2], targets, torch.bfloat16) and None)
    result["empty input"]["nncf"] = _outcome(_nncf_empty)
    result["empty input"]["scap_nncf"] = _outcome(_our_empty)
    return result


def _realised(model: Any, thresholds: dict[str, float], batches: list[Any]) -> dict[str, float]:
    """Share of dense inputs at or below each threshold, on the calibration data."""
    counts = {name: [0, 0] for name in thresholds}

    def hook(name: str) -> Any:
        def run(_module: Any, inputs: Any) -> None:
            counts[name][0] += int((inputs[0].abs() <= thresholds[name]).sum())
            counts[name][1] += inputs[0].numel()

        return run

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in thresholds]
    _plain(model, batches)
    for handle in handles:
        handle.remove()
    return {name: zeros / total for name, (zeros, total) in counts.items()}


def _nncf_thresholds(model: Any) -> dict[str, float]:
    from nncf.experimental.torch.sparsify_activations.torch_backend import ActivationsSparsifier

    found = {}
    for key, module in model.named_modules():
        if isinstance(module, ActivationsSparsifier):
            operation = key.split(".pre_hooks.")[-1].split(".")[0].replace(":", ".")
            found[operation.rsplit("/", 2)[0].replace("/", ".")] = float(module.running_threshold)
    return found


def _nncf_plan(args: Any, batches: Any, targets: Any, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    from nncf.experimental.torch.sparsify_activations import sparsify_activations

    model, _ = load_model(args.model, dtype=dtype)
    return _nncf_thresholds(sparsify_activations(model, nncf.Dataset(batches), targets))


def _our_plan(args: Any, batches: Any, _targets: Any, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    model, _ = load_model(args.model, dtype=dtype)
    statistics = scap_nncf.calibrate(model, dataset=batches, sparsity=PAPER_LLAMA2, subset_size=None)
    plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity=PAPER_LLAMA2))
    return {layer.name: layer.threshold for layer in plan.layers}


class _Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _nncf_empty() -> None:
    from nncf.experimental.torch.sparsify_activations import TargetScope, sparsify_activations

    data = nncf.Dataset([torch.randn(4, 8)])
    sparsify_activations(_Blocks(), data, {TargetScope(patterns=[".*"]): 0.5})(torch.empty(0, 8))


def _our_empty() -> None:
    scap_nncf.compress(_Blocks(), dataset=[torch.randn(4, 8), torch.empty(0, 8)], sparsity=0.5)(torch.empty(0, 8))


def _outcome(work: Any) -> str:
    with suppress(SystemExit):
        try:
            work()
        except Exception as error:  # the point is to see which
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return "works"


PARTS = {
    "quantiles": quantiles,
    "order": order,
    "cost": cost,
    "exact": exact,
    "perplexity": perplexities,
    "allocation": allocations,
    "nncf": against_nncf,
}

if __name__ == "__main__":
    main()
