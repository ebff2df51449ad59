# SPDX-License-Identifier: Apache-2.0
"""
Vision: a DeiT with pruned inputs of qkv, o, up and down, as in the last rows of the paper's table 4.

    python examples/vit.py [--model FOLDER] [--seconds 45] [--output vit.png]

Trains a tiny DeiT on shapes that are drawn at run time (or loads one that train_tiny.py saved), prints accuracy against
sparsity for each role, with and without mode centring, labels some pictures with the sparse model, and draws the
distribution of its activations with η and τ.
"""

from __future__ import annotations

import argparse
from typing import Any

import nncf
import torch
from train_tiny import SHAPES, calibration, held_out, load_or_train

import scap_nncf
from scap_nncf.plots import plot_activations


def accuracy(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    with torch.no_grad():
        right = [(model(pixel_values=b["pixel_values"]).logits.argmax(-1) == b["labels"]).float() for b in batches]
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--output", default="vit.png")
    options = parser.parse_args()

    model = load_or_train("deit", options.model, options.seconds)
    test = held_out("deit")
    print(f"\ndense: {accuracy(model, test):.1%} of {64 * len(test)} pictures")
    statistics = scap_nncf.calibrate(model, dataset=calibration("deit"))
    for roles in (("q", "k", "v"), ("o",), ("up",), ("down",)):
        for mode in ("zero", "kde"):
            row = []
            for sparsity in (0.3, 0.5, 0.7, 0.8):
                plan = scap_nncf.make_plan(
                    statistics, scap_nncf.Scap(sparsity=dict.fromkeys(roles, sparsity), mode=mode)
                )
                nncf.compress(model, plan=plan)
                row.append(f"{sparsity:.0%}: {accuracy(model, test):.1%}")
                scap_nncf.get_controller(model).strip()
            print(f"{'/'.join(roles):6} mode {mode:5} {'  '.join(row)}")

    model = nncf.compress(model, dataset=calibration("deit"), sparsity={"attn": 0.4, "up": 0.4, "down": 0.6})
    controller = scap_nncf.get_controller(model)
    some = test[0]
    with torch.no_grad():
        guesses = model(pixel_values=some["pixel_values"][:8]).logits.argmax(-1).tolist()
    print(controller.statistics())
    for guess, truth in zip(guesses, some["labels"][:8].tolist()):
        print(f"  sparse model says {SHAPES[guess]:9} it is {SHAPES[truth]}")
    plot_activations(controller.plan, controller.histograms, options.output)
    print(f"\nactivations with mode and threshold: {options.output}")


if __name__ == "__main__":
    main()
