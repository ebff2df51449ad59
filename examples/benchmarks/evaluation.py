# SPDX-License-Identifier: Apache-2.0
"""
Quality of plans on tasks and text, and whether decoding token by token gives the figures of whole texts.

    python examples/benchmarks/evaluation.py plans --calibration TEXTS --output plans
    scap-nncf evaluate demo --plan uniform=plans/uniform --plan fisher=plans/fisher --tasks TASK --limit 500 \
        --data DIR --dtype bfloat16 --resume answers --output tasks/TASK
    python examples/benchmarks/evaluation.py merge --runs tasks --output evaluation_results.json
    python examples/benchmarks/evaluation.py agreement --text TEXT --plans plans --output agreement.json

`plans` calibrates once in float32 and writes plans of equal target sparsity: uniform, and allocated by Fisher
information. `merge` puts the results of single tasks into one file. `agreement` measures perplexity both ways under
both token policies.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import scap_nncf
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity
from scap_nncf.significance import mean_of, paired_outcomes, paired_windows
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="calibration texts; default: the text that ships with Python")
    parser.add_argument("--text", help="text to measure on; default: the held-out part of the built-in text")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--runs", type=Path, help="folder of folders with evaluation_results.json")
    parser.add_argument("--dtype", default="float32", help="of `agreement`")
    parser.add_argument("--models", default="dense,uniform,fisher", help="of `agreement`")
    parser.add_argument("--plans", type=Path, default=Path("plans"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    PARTS[args.part](args)


def plans(args: argparse.Namespace) -> None:
    """Plans `uniform` and `fisher` of one calibration."""
    model, tokenizer = load_model(args.model, dtype=torch.float32, device="cpu")
    texts = read_texts(args.calibration) if args.calibration else list(builtin_text("calibration"))
    batches = token_batches(tokenizer, texts, args.length, args.samples)
    scap_nncf.compress(model, dataset=batches, sparsity=args.sparsity, allocation="fisher")
    controller: Any = scap_nncf.get_controller(model)
    controller.save(args.output / "fisher")
    controller.set_sparsity(args.sparsity, allocation="uniform")
    controller.save(args.output / "uniform")


def agreement(args: argparse.Namespace) -> None:
    """Perplexity at once and token by token, for each plan and both token policies; rows are written as they come."""
    model, tokenizer = load_model(args.model, dtype=args.dtype, device="cpu")
    texts = read_texts(args.text) if args.text else list(builtin_text("held_out"))
    ids = token_ids(tokenizer, texts)[: args.tokens]
    rows: list[dict[str, Any]] = []
    for name in args.models.split(","):
        for prune in ("all", "decode") if name != "dense" else ("all",):
            if name != "dense":
                scap_nncf.compress(model, plan=scap_nncf.Plan.load(args.plans / name).with_prune(prune))
            found, seconds = [], []
            for decode in (False, True):
                start = time.perf_counter()
                found.append(
                    perplexity(
                        model, ids, args.context, stride=args.stride, decode=decode, batch_size=8 if decode else 1
                    )
                )
                seconds.append(time.perf_counter() - start)
            paired = paired_windows(found[0].windows, found[1].windows)
            rows.append(
                {
                    "model": name,
                    "prune": None if name == "dense" else prune,
                    "at_once": found[0].perplexity,
                    "token_by_token": found[1].perplexity,
                    "difference_nats": paired.difference,
                    "stderr_nats": paired.stderr,
                    "largest_window_difference_nats": max(
                        abs(a - b) / n for (a, n), (b, _) in zip(found[0].windows, found[1].windows)
                    ),
                    "tokens": found[0].tokens,
                    "seconds": seconds,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            controller = scap_nncf.get_controller(model)
            if controller is not None:
                controller.strip()
            shown = [Path(part).name if "/" in part else part for part in sys.argv[1:]]
            data = {
                "command": f"python examples/benchmarks/evaluation.py {' '.join(shown)}",
                "about": {
                    "dtype": args.dtype,
                    "context": args.context,
                    "stride": args.stride,
                    "torch": torch.__version__,
                },
                "rows": rows,
            }
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(data, indent=1) + "\n")


def _names(part: dict[str, Any]) -> list[str]:
    return [run["name"] for run in part["runs"]]


def merge(args: argparse.Namespace) -> None:
    """One `evaluation_results.json` from those of single tasks: tasks side by side, sparsity averaged over them."""
    files = sorted(args.runs.glob("*/evaluation_results.json"))
    parts = [json.loads(file.read_text()) for file in files]
    whole = parts[0]
    names = [run["name"] for run in whole["runs"] if all(run["name"] in _names(part) for part in parts)]
    for part in parts:  # what only some of the tasks have is left out
        part["runs"] = [run for run in part["runs"] if run["name"] in names]
        for task in part["tasks"]:
            for key in ("values", "outcomes", "changes"):
                task[key] = {name: value for name, value in task[key].items() if name in names}
    whole["mean_change"] = {}
    whole["tasks"] = [task for part in parts for task in part["tasks"]]
    whole["args"]["tasks"] = [task["task"] for task in whole["tasks"]]
    for index, name in enumerate(names):
        runs = [part["runs"][index] for part in parts]
        merged = whole["runs"][index]
        for place, layer in enumerate(merged["layers"]):
            layer["realised"] = sum(run["layers"][place]["realised"] for run in runs) / len(runs)
        for key in ("realised", "read_bytes", "seconds"):
            values = [run[key] for run in runs if run[key] is not None]
            merged[key] = sum(values) / (1 if key == "seconds" else len(values)) if values else None
        if index:
            changes = [paired_outcomes(task["outcomes"][names[0]], task["outcomes"][name]) for task in whole["tasks"]]
            mean = mean_of(changes)
            whole["mean_change"][name] = {**asdict(mean), "interval95": mean.interval}
    whole["sparsity"] = {layer["layer"]: layer["realised"] for layer in whole["runs"][-1]["layers"]}
    whole["evaluation"] = {"results": {k: v for part in parts for k, v in part["evaluation"]["results"].items()}}
    args.output.write_text(json.dumps(whole, indent=1) + "\n")


PARTS = {"plans": plans, "agreement": agreement, "merge": merge}

if __name__ == "__main__":
    main()
