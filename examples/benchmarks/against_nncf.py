# SPDX-License-Identifier: Apache-2.0
"""
`nncf.experimental.torch.sparsify_activations` and ours, on the same model, data and scopes.

    python examples/benchmarks/against_nncf.py --calibration TEXTS --text TEXT --output results.json

Both prune the inputs of up and gate at 35 % and of down at 55 %. Measured are the threshold's error (sparsity that it
realises on the very data it was calibrated on), perplexity on other text, time, and what becomes of a model in
bfloat16, of data in another order, and of an empty input. A run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import nncf
import numpy as np
import torch
from calibration import PAPER_LLAMA2, add_arguments, calibration_batches, evaluation_ids, run_plain
from nncf.experimental.torch.sparsify_activations import TargetScope, sparsify_activations
from record import OutOfTime, Record, to_text

import scap_nncf
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity

Thresholds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    record = Record(args.output, "nncf", args.seconds)
    try:
        measure(args, record)
    except OutOfTime:
        print(f"{args.seconds} s are over; run the same command again to go on", file=sys.stderr)
        sys.exit(3)
    print(to_text(record.data))


def measure(args: argparse.Namespace, record: Record) -> None:
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    batches = calibration_batches(args, tokenizer)
    ids = evaluation_ids(args, tokenizer)
    record.set("tokens", len(ids))
    record.set("context", args.context)
    record.set("calibration_tokens", len(batches) * args.length)

    for who, calibrate in TOOLS.items():

        def quality(calibrate: Any = calibrate) -> dict[str, Any]:
            fresh, _ = load_model(args.model, dtype=torch.float32)
            start = time.perf_counter()
            sparse, thresholds = calibrate(fresh, batches)
            seconds = time.perf_counter() - start
            realised = _realised(model, thresholds, batches)
            errors = [abs(realised[name] - (0.55 if "down" in name else 0.35)) for name in thresholds]
            start = time.perf_counter()
            value = perplexity(sparse, ids, args.context).perplexity
            return {
                "layers": len(thresholds),
                "calibration_seconds": seconds,
                "realised_error_on_calibration_data_mean": float(np.mean(errors)),
                "realised_error_on_calibration_data_worst": float(np.max(errors)),
                "perplexity": value,
                "evaluation_seconds": time.perf_counter() - start,
                "thresholds": thresholds,
            }

        record.once(who, quality)
    for who, calibrate in TOOLS.items():
        forwards = record.data[who]["thresholds"]

        def order(calibrate: Any = calibrate, forwards: Thresholds = forwards) -> dict[str, float]:
            fresh, _ = load_model(args.model, dtype=torch.float32)
            _, backwards = calibrate(fresh, batches[::-1])
            return {"largest_relative_change_of_a_threshold": _largest_change(forwards, backwards)}

        record.once(f"{who}: batches in reverse", order)
        record.once(f"{who}: bfloat16", lambda c=calibrate: _outcome(lambda: _bfloat16(c, args.model, batches[:2])))
        record.once(f"{who}: empty input", lambda c=calibrate: _outcome(lambda: _empty(c)))


# -- the two tools: (model, data) to (sparse model, threshold of each layer) -------------------------------------------


def _with_nncf(model: Any, data: list[Any], everything: bool = False) -> tuple[Any, Thresholds]:
    targets = {TargetScope(patterns=[".*(up|gate)_proj.*"]): 0.35, TargetScope(patterns=[".*down_proj.*"]): 0.55}
    if everything:
        targets = {TargetScope(patterns=[".*"]): 0.5}
    sparse = sparsify_activations(model, nncf.Dataset(data), targets)
    return sparse, _nncf_thresholds(sparse)


def _with_scap_nncf(model: Any, data: list[Any], everything: bool = False) -> tuple[Any, Thresholds]:
    sparsity = 0.5 if everything else PAPER_LLAMA2
    sparse = nncf.compress(model, dataset=nncf.Dataset(data), sparsity=sparsity, allocation="uniform")
    plan = scap_nncf.get_controller(sparse).plan
    return sparse, {layer.name: layer.threshold for layer in plan.layers}


TOOLS = {"sparsify_activations": _with_nncf, "scap_nncf": _with_scap_nncf}


def _nncf_thresholds(model: Any) -> Thresholds:
    from nncf.experimental.torch.sparsify_activations.torch_backend import ActivationsSparsifier

    # NNCF names a function call by the modules around it, without lists and indices, and a running number:
    # the fourth ``layers.*.mlp.down_proj`` to run is "model/mlp/down_proj/linear/3"
    modules: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        parts = name.split(".")
        followers = [*parts[1:], ""]
        called = [part for part, follower in zip(parts, followers) if not (part.isdigit() or follower.isdigit())]
        modules.setdefault("/".join(called), []).append(name)
    found = {}
    for key, module in model.named_modules():
        if isinstance(module, ActivationsSparsifier):
            call, number = key.split(".pre_hooks.")[1].split("__")[0].rsplit("/", 1)
            found[modules[call.rsplit("/", 1)[0]][int(number)]] = float(module.running_threshold)
    return found


# -- what is measured --------------------------------------------------------------------------------------------------


def _realised(model: Any, thresholds: Thresholds, batches: list[Any]) -> Thresholds:
    """Share of the dense model's inputs at or below each threshold, on the calibration data."""
    counts = {name: [0, 0] for name in thresholds}

    def hook(name: str) -> Any:
        def run(_module: Any, inputs: Any) -> None:
            counts[name][0] += int((inputs[0].abs() <= thresholds[name]).sum())
            counts[name][1] += inputs[0].numel()

        return run

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in thresholds]
    run_plain(model, batches)
    for handle in handles:
        handle.remove()
    return {name: zeros / total for name, (zeros, total) in counts.items()}


def _largest_change(before: Thresholds, after: Thresholds) -> float:
    return max(abs(before[name] - after[name]) / abs(before[name]) for name in before)


def _bfloat16(calibrate: Any, model: str, batches: list[Any]) -> None:
    calibrate(load_model(model, dtype=torch.bfloat16)[0], batches)


def _empty(calibrate: Any) -> None:
    """Inputs without rows, in calibration and after, as an expert gets them that no token was sent to."""
    sparse, _ = calibrate(_TwoLayers(), [torch.randn(4, 8), torch.empty(0, 8)], everything=True)
    sparse(torch.empty(0, 8))


class _TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _outcome(work: Any) -> str:
    try:
        work()
    except Exception as error:  # which one is the result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return "works"


if __name__ == "__main__":
    main()
