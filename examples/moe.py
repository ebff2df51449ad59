# SPDX-License-Identifier: Apache-2.0
"""
Mixture of experts: a threshold for every expert, against one for all experts of a block.

    python examples/moe.py [--model FOLDER] [--seconds 45] [--output moe.png]

Trains a tiny Mixtral over bytes (or loads one that train_tiny.py saved), prunes the inputs of its experts, prints what
each expert got and what it costs, lets the sparse model write, and draws the experts' thresholds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import nncf
import torch
from train_tiny import calibration, held_out, load_or_train, loss_of

import scap_nncf
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.pooling import pools
from scap_nncf.algorithms.sites import expert_pool


def pooled(plan: Plan, statistics: Any) -> Plan:
    """The same plan with one threshold for all experts of a block, from the pooled statistics."""
    thresholds = {}
    for name, sites in pools(statistics.sites).items():
        together = statistics.histograms[sites[0].name]
        for site in sites[1:]:
            together = together.merge(statistics.histograms[site.name])
        thresholds[name] = together
    sites = []
    for site in plan.sites:
        histogram = thresholds.get(expert_pool(site.name) or "")
        if histogram is not None:
            layers = tuple(replace(x, threshold=histogram.quantile(x.sparsity, site.mode)) for x in site.layers)
            site = replace(site, layers=layers)
        sites.append(site)
    return replace(plan, sites=tuple(sites))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--output", default="moe.png")
    options = parser.parse_args()

    model = load_or_train("moe", options.model, options.seconds)
    test = held_out("moe", 4)
    dense = loss_of(model, test)
    statistics = scap_nncf.calibrate(model, dataset=calibration("moe"), sparsity={"experts": 0.5})
    print(f"\ndense: {dense:.4f} nats a byte on held-out text")
    for sparsity in (0.3, 0.5, 0.7):
        settings = scap_nncf.Scap(sparsity={"experts": sparsity}, mode="zero")
        own = scap_nncf.make_plan(statistics, settings)
        losses = []
        for plan in (own, pooled(own, statistics)):
            nncf.compress(model, plan=plan)
            losses.append(loss_of(model, test))
            scap_nncf.get_controller(model).strip()
        print(f"experts at {sparsity:.0%}: a threshold per expert {losses[0]:.4f}, one per block {losses[1]:.4f}")

    model = nncf.compress(model, dataset=calibration("moe"), sparsity={"experts": 0.5, "attn": 0.3})
    controller = scap_nncf.get_controller(model)
    loss_of(model, test)
    print(controller.statistics())

    prompt = "The function "
    ids = model.generate(torch.tensor([list(prompt.encode())]), max_new_tokens=120, do_sample=False, pad_token_id=0)
    print(f"\nsparse model: {bytes(ids[0].tolist()).decode(errors='replace')}")
    draw(controller.plan, options.output)
    print(f"\nthresholds of the experts: {options.output}")


def draw(plan: Plan, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, role in zip(figure.subplots(1, 2), ("experts.gate_up", "experts.down")):
        blocks: dict[int, list[float]] = {}
        for site in plan.sites:
            blocks.setdefault(site.block or 0, []).extend(x.threshold for x in site.layers if x.role == role)
        for block, thresholds in blocks.items():
            axes.plot(thresholds, "o-", label=f"block {block}")
        axes.set(title=role, xlabel="expert", ylabel="threshold τ")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
