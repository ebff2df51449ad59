# SPDX-License-Identifier: Apache-2.0
"""
Mamba2: pruning the inputs of in_proj and out_proj of a state-space model.

    python examples/mamba2.py [--model FOLDER] [--seconds 60] [--output mamba2.png]

Trains a tiny Mamba2 over bytes (or loads one that train_tiny.py saved), prints held-out loss against sparsity for each
projection, lets the sparse model write, and draws the distribution of its activations with η and τ.
"""

from __future__ import annotations

import argparse

import nncf
import torch
from train_tiny import calibration, held_out, load_or_train, loss_of

import scap_nncf
from scap_nncf.plots import plot_activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", default="mamba2.png")
    options = parser.parse_args()

    model = load_or_train("mamba2", options.model, options.seconds)
    test = held_out("mamba2", 2)
    print(scap_nncf.inspect_model(model))
    dense = loss_of(model, test)
    statistics = scap_nncf.calibrate(model, dataset=calibration("mamba2", 4))
    print(f"\ndense: {dense:.4f} nats a byte on held-out text")
    for selector in ("in", "out", "all"):
        losses = []
        for sparsity in (0.3, 0.5, 0.7):
            plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity={selector: sparsity}))
            nncf.compress(model, plan=plan)
            losses.append(f"{sparsity:.0%}: {loss_of(model, test):.4f}")
            scap_nncf.get_controller(model).strip()
        print(f"{selector:4} at {', '.join(losses)}")

    model = nncf.compress(model, dataset=calibration("mamba2", 4), sparsity={"in": 0.3, "out": 0.5})
    controller = scap_nncf.get_controller(model)
    prompt = "The function "
    ids = model.generate(torch.tensor([list(prompt.encode())]), max_new_tokens=60, do_sample=False, pad_token_id=0)
    print(controller.statistics())
    print(f"\nsparse model: {bytes(ids[0].tolist()).decode(errors='replace')}")
    plot_activations(controller.plan, controller.histograms, options.output)
    print(f"\nactivations with mode and threshold: {options.output}")


if __name__ == "__main__":
    main()
