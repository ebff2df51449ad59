# SPDX-License-Identifier: Apache-2.0
"""TEAL's greedy search in a PyTorch model: block by block, on the error of the block's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import numpy as np
import torch
from nncf.common.logging.track_progress import track
from torch import nn

from scap_nncf.algorithms.allocation.greedy import LEVELS, MAX_SPARSITY, STEP
from scap_nncf.algorithms.backends.torch.layers import input_argument
from scap_nncf.algorithms.backends.torch.run import evaluation, forward_sample, without_cache
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.sites import Layer, Site
from scap_nncf.kernels.reference import prune

#: Share of the positions, at the end of each sample, where the error is measured (as TEAL does).
TAIL = 0.25


def greedy_paths(
    model: nn.Module,
    sites: Sequence[Site],
    histograms: Mapping[str, ActivationHistogram],
    samples: Sequence[Any],
) -> dict[str, np.ndarray[Any, Any]]:
    """
    The order in which the layers of each block give up their inputs (TEAL, algorithm 1).

    From zero, each step of a block raises the sparsity of that layer by a step of equal bytes which moves the block's
    output least, ``‖Y − Ŷ‖₂`` over the last quarter of the positions, the block being fed by the dense model.

    :param samples: a few; they are run through each block some hundred times.
    :return: layer name → sparsity [len(LEVELS)] when the block as a whole has each of the levels.
    :raises nncf.UnsupportedModelError: the sites are not in numbered blocks that are modules.
    """
    blocks: dict[str, list[tuple[Site, Layer]]] = {}
    for site in sites:
        parts = site.name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if index is None:
            msg = f"allocation='greedy' searches block by block, and {site.name} is in no numbered block."
            raise nncf.UnsupportedModelError(msg)
        blocks.setdefault(".".join(parts[: index + 1]), []).extend((site, layer) for layer in site.layers)
    paths: dict[str, np.ndarray[Any, Any]] = {}
    with evaluation(model):
        calls = _calls(model, list(blocks), samples)
        for name in track(list(blocks), total=len(blocks), description="Searching blocks"):
            paths |= _search(model.get_submodule(name), model, blocks[name], histograms, calls[name])
    return paths


def _calls(model: nn.Module, names: Sequence[str], samples: Sequence[Any]) -> dict[str, list[tuple[Any, Any]]]:
    """What the dense model calls each block with."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}

    def make(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name].append((args, dict(kwargs)))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(make(name), with_kwargs=True) for name in names]
    try:
        for index, sample in enumerate(samples):
            forward_sample(model, without_cache(model, sample), f"sample {index}")
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _search(
    block: nn.Module,
    model: nn.Module,
    layers: Sequence[tuple[Site, Layer]],
    histograms: Mapping[str, ActivationHistogram],
    calls: Sequence[tuple[Any, Any]],
) -> dict[str, np.ndarray[Any, Any]]:
    thresholds = {layer.name: -1.0 for _, layer in layers}
    site_of = {layer.name: site.name for site, layer in layers}
    total = sum(layer.weights for _, layer in layers)
    most = max(layer.weights for _, layer in layers)
    steps = {layer.name: STEP * most / layer.weights for _, layer in layers}
    sparsity = dict.fromkeys(thresholds, 0.0)

    def threshold(name: str, value: float) -> float:
        return histograms[site_of[name]].quantile(value) if value > 0 else -1.0

    def run() -> list[torch.Tensor]:
        outputs = [block(*args, **kwargs) for args, kwargs in calls]
        hidden = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return [h[..., -max(int(h.shape[-2] * TAIL), 1) :, :].float() for h in hidden]

    points: list[tuple[float, dict[str, float]]] = [(0.0, dict(sparsity))]
    with _pruned(model, thresholds):
        dense = run()
        reached = 0.0
        while reached < LEVELS[-1]:
            best: tuple[float, str] | None = None
            for name, step in steps.items():
                if sparsity[name] >= MAX_SPARSITY:
                    continue
                before = thresholds[name]
                thresholds[name] = threshold(name, min(sparsity[name] + step, MAX_SPARSITY))
                error = sum(float((a - b).square().sum()) for a, b in zip(run(), dense))
                thresholds[name] = before
                if best is None or error < best[0]:
                    best = (error, name)
            if best is None:
                break
            name = best[1]
            sparsity[name] = min(sparsity[name] + steps[name], MAX_SPARSITY)
            thresholds[name] = threshold(name, sparsity[name])
            reached = sum(layer.weights * sparsity[layer.name] for _, layer in layers) / total
            points.append((reached, dict(sparsity)))
    levels = [level for level, _ in points]
    return {name: np.interp(LEVELS, levels, [values[name] for _, values in points]) for name in sparsity}


@contextmanager
def _pruned(model: nn.Module, thresholds: Mapping[str, float]) -> Iterator[None]:
    """Prune by thresholds that may change meanwhile."""

    def make(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            z = prune(input_argument(args, kwargs), 0.0, thresholds[name])
            return ((z, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): z})

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(make(n), with_kwargs=True) for n in thresholds]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
