# SPDX-License-Identifier: Apache-2.0
"""
What quantisation and sparsity cost, apart and together: perplexity in PyTorch and in OpenVINO, and the size of the IR.

    python examples/benchmarks/quantise_sparsify_grid.py --eval wikitext2_test.txt.gz --output results.json

The grid is {f32, int8_sym, int8_asym, int4_sym, int4_asym, int4_sym with AWQ and scale estimation} x {dense,
feed-forward inputs 30 % and 50 % (gate and up, down), all inputs 40 %}. Each quantised model is calibrated as it is;
the plan made in PyTorch is applied to its IR. Losses are differences of the mean negative log-likelihood, in nats a
token:

    quantisation loss   quantised and dense   − f32 and dense
    sparsity loss       quantised and sparse  − quantised and dense
    loss together       quantised and sparse  − f32 and dense

Sparsity is realised on the text that the perplexity is measured on. OpenVINO runs twice: with
INFERENCE_PRECISION_HINT=f32 and no dynamic quantisation of activations (what PyTorch computes), and with the CPU
plugin's defaults. The results file is written after every cell, and what is in it is not measured again. A CSV with the
same rows is written beside it.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nncf
import torch

import scap_nncf
from scap_nncf import Scap, WeightCompression
from scap_nncf.models import load_model
from scap_nncf.perplexity import perplexity
from scap_nncf.text import builtin_text, read_texts, token_batches, token_ids

QUANTISATIONS: dict[str, WeightCompression | None] = {
    "f32": None,
    "int8_sym": WeightCompression("int8_sym"),
    "int8_asym": WeightCompression("int8_asym"),
    "int4_sym_g64": WeightCompression("int4_sym", group_size=64),
    "int4_asym_g64": WeightCompression("int4_asym", group_size=64),
    "int4_sym_g64_awq": WeightCompression("int4_sym", group_size=64, awq=True, scale_estimation=True, subset_size=32),
}
SPARSITIES: dict[str, dict[str, float] | float | None] = {
    "dense": None,
    "ffn 30/50": {"gate": 0.3, "up": 0.3, "down": 0.5},
    "all 40": 0.4,
}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--eval", required=True, help="text to measure on: .txt or .jsonl, also .gz")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--calibration-samples", type=int, default=32, help="of 256 tokens of the built-in text")
    parser.add_argument("--only", help="quantisations, by commas")
    parser.add_argument("--output", type=Path, required=True, help="results, .json")
    args = parser.parse_args()

    settings = {
        "model": args.model,
        "text": Path(args.eval).name,
        "tokens": args.tokens,
        "context": args.context,
        "calibration": f"{args.calibration_samples} x 256 tokens of the built-in text",
    }
    results = read_results(args.output, settings)
    wanted = list(QUANTISATIONS) if args.only is None else args.only.split(",")
    for name in wanted:
        missing = [s for s in SPARSITIES if not all(key in cell(results, name, s) for key in MEASURED)]
        if missing:
            measure(args, name, results)
    print(table(results))


MEASURED = ("torch_nll", "ov_f32_nll", "ov_default_nll")


def measure(args: argparse.Namespace, name: str, results: dict[str, Any]) -> None:
    """All sparsities of one quantisation."""
    model, tokenizer = load_model(args.model, dtype="float32", device="cpu")
    ids = token_ids(tokenizer, read_texts(args.eval))[: args.tokens]
    dataset = token_batches(tokenizer, builtin_text("calibration"), length=256, count=args.calibration_samples)
    start = time.perf_counter()
    step = QUANTISATIONS[name]
    if step is not None:
        model = nncf.compress(model, algorithm=step, dataset=dataset)
    quantise_seconds = time.perf_counter() - start
    start = time.perf_counter()
    statistics = scap_nncf.calibrate(model, dataset=dataset, sparsity=0.4, subset_size=None)
    calibrate_seconds = time.perf_counter() - start
    plans = {
        title: None if spec is None else scap_nncf.make_plan(statistics, Scap(sparsity=spec))
        for title, spec in SPARSITIES.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        start = time.perf_counter()
        scap_nncf.export_openvino(model, folder, tokenizer=tokenizer)
        export_seconds = time.perf_counter() - start
        for title, plan in plans.items():
            row = cell(results, name, title)
            row |= {"quantise_seconds": quantise_seconds, "calibrate_seconds": calibrate_seconds}
            row |= {"export_seconds": export_seconds}
            if "torch_nll" not in row:
                if plan is not None:
                    nncf.compress(model, plan=plan)
                result = perplexity(model, ids, args.context)
                row |= {"torch_nll": result.nll, "torch_perplexity": result.perplexity}
                controller = scap_nncf.get_controller(model)
                if controller is not None:
                    row["torch_realised_sparsity"] = controller.statistics().realised_sparsity
                    controller.strip()
                save(args.output, results)
                report(name, title, row)
        del model
        gc.collect()
        for title, plan in plans.items():
            row = cell(results, name, title)
            for key, config in (("ov_f32", EXACT), ("ov_default", {})):
                if f"{key}_nll" not in row:
                    measure_ir(folder, plan, ids, args.context, key, config, row)
                    save(args.output, results)
                    report(name, title, row)


def measure_ir(
    folder: Path, plan: Any, ids: torch.Tensor, context: int, key: str, config: dict[str, str], row: dict[str, Any]
) -> None:
    """Perplexity of an IR with a plan; for the first configuration also its size and realised sparsity."""
    from optimum.intel import OVModelForCausalLM

    model = OVModelForCausalLM.from_pretrained(str(folder), compile=False, ov_config=config)
    if plan is not None:
        model = nncf.compress(model, plan=plan)
    result = perplexity(model, ids, context)
    row |= {f"{key}_nll": result.nll, f"{key}_perplexity": result.perplexity}
    if key == "ov_f32":
        with tempfile.TemporaryDirectory() as scratch:
            saved = scap_nncf.save_openvino(model.model, Path(scratch) / "ir")
            row["ir_megabytes"] = sum((saved / f"openvino_model.{end}").stat().st_size for end in ("xml", "bin")) / 1e6
        if plan is not None:
            windows = [ids[start : start + context].unsqueeze(0) for start in range(0, len(ids), context)]
            counted = scap_nncf.measure_sparsity(model, [{"input_ids": window} for window in windows])
            row["ov_realised_sparsity"] = counted.realised_sparsity


# -- results -----------------------------------------------------------------------------------------------------------


def read_results(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured before with the same settings; other settings are refused."""
    if not path.is_file():
        return {"settings": settings, "environment": environment(), "command": command(), "cells": {}}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise SystemExit(f"{path} was measured with {results['settings']}, not {settings}; choose another --output")
    return results


def command() -> str:
    """What made the results, without the folders of this machine and the split into pieces."""
    words = ["python", "examples/benchmarks/quantise_sparsify_grid.py"]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word == "--only":
            next(arguments)
        else:
            words.append(Path(word).name)
    return " ".join(words)


def environment() -> dict[str, str]:
    import openvino

    return {
        "nncf": nncf.__version__,
        "openvino": openvino.__version__,
        "torch": torch.__version__,
        "scap_nncf": scap_nncf.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def cell(results: dict[str, Any], quantisation: str, sparsity: str) -> dict[str, Any]:
    return results["cells"].setdefault(f"{quantisation} | {sparsity}", {})


def save(path: Path, results: dict[str, Any]) -> None:
    add_losses(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    rows = [
        {"quantisation": k.split(" | ")[0], "sparsity": k.split(" | ")[1], **v} for k, v in results["cells"].items()
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def add_losses(results: dict[str, Any]) -> None:
    base = cell(results, "f32", "dense")
    for key, row in list(results["cells"].items()):
        quantised = cell(results, key.split(" | ")[0], "dense")
        for engine in ("torch", "ov_f32", "ov_default"):
            nll = f"{engine}_nll"
            if nll in base and nll in quantised and nll in row:
                row[f"{engine}_quantisation_loss"] = quantised[nll] - base[nll]
                row[f"{engine}_sparsity_loss"] = row[nll] - quantised[nll]
                row[f"{engine}_loss_together"] = row[nll] - base[nll]


def table(results: dict[str, Any]) -> str:
    head = ["quantisation", "sparsity", "torch ppl", "IR f32 ppl", "IR default ppl", "realised torch / IR", "IR MB"]
    head += ["quantisation loss", "sparsity loss", "together"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, row in results["cells"].items():
        quantisation, sparsity = key.split(" | ")
        ppl = [f"{row[k]:.2f}" if k in row else "-" for k in (f"{m[:-4]}_perplexity" for m in MEASURED)]
        realised = [row.get(f"{engine}_realised_sparsity") for engine in ("torch", "ov")]
        shown = " / ".join("-" if value is None else f"{100 * value:.1f} %" for value in realised)
        losses = [row.get(f"torch_{kind}") for kind in ("quantisation_loss", "sparsity_loss", "loss_together")]
        size = f"{row['ir_megabytes']:.0f}" if "ir_megabytes" in row else "-"
        values = [quantisation, sparsity, *ppl, shown, size, *("-" if v is None else f"{v:+.4f}" for v in losses)]
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def report(name: str, title: str, row: dict[str, Any]) -> None:
    shown = {key: round(value, 3) for key, value in row.items() if key.endswith("perplexity")}
    print(f"{name} | {title}: {shown}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
