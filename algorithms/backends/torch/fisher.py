# SPDX-License-Identifier: Apache-2.0
"""Prices of sparsity in a PyTorch causal language model: one backward pass a sample, no weight gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import nncf
import numpy as np
import torch
from nncf.common.logging.track_progress import track
from torch import nn

from scap_nncf.algorithms.allocation.fisher import LEVELS, Costs
from scap_nncf.algorithms.backends.torch import experts
from scap_nncf.algorithms.backends.torch.examples import with_decoder_inputs
from scap_nncf.algorithms.backends.torch.layers import input_argument
from scap_nncf.algorithms.backends.torch.run import attention_mask, evaluation, forward_sample
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.pooling import own_share
from scap_nncf.algorithms.sites import Site, expert_pool


def collect_costs(
    model: nn.Module,
    sites: Sequence[Site],
    histograms: Mapping[str, ActivationHistogram],
    modes: Mapping[str, float],
    samples: Sequence[Any],
    seed: int = 0,
) -> Costs:
    """
    F of every layer at every level (:mod:`scap_nncf.algorithms.allocation.fisher`), on the dense model.

    Each layer gets its own view of the tensor it reads, so that the gradient at that view is the layer's own,
    whatever the weight format. Peak memory is that of a training step without weight gradients.

    :param histograms: give the thresholds of the levels.
    :param modes: site name → η.
    :param samples: what the model can be called with; its output must have `.logits` [B, T, V].
    :param seed: of the labels drawn from the model.
    :raises nncf.UnsupportedModelError: the output has no logits, or a layer gives no gradient.
    """
    with evaluation(model):
        samples = [with_decoder_inputs(model, sample, f"sample {index}") for index, sample in enumerate(samples)]
    layers = [(layer.name, site.name) for site in sites for layer in site.layers]
    boundaries = {
        site.name: torch.tensor([histograms[site.name].quantile(level, modes[site.name]) for level in LEVELS[1:]])
        for site in sites
    }
    sums = {name: torch.zeros(len(LEVELS), dtype=torch.float64) for name, _ in layers}
    fused = experts.expert_layers(model)
    reached = {name: 0 for name, _ in layers if name in fused}  # tokens of each expert
    state: dict[str, Any] = {"mask": None}
    tokens = 0

    def make_hook(name: str, site: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_argument(args, kwargs)
            own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            mask = state["mask"]

            def add(gradient: torch.Tensor) -> None:
                sums[name] += _prices(x.detach(), gradient, modes[site], boundaries[site], mask)

            own.register_hook(add)
            return ((own, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): own})

        return hook

    class Experts(experts.Stage):
        """Each projection gets its own view of the rows; rows are sorted out by expert when the gradient comes."""

        def __init__(self, module_name: str) -> None:
            self.module_name = module_name

        def before(self, projection: str, x: torch.Tensor, rows: experts.Rows) -> torch.Tensor:
            own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            mask = state["mask"]
            kept = None
            if mask is not None and mask.numel() == rows.total:
                kept = mask.reshape(-1).to(x.device)[rows.tokens] != 0

            def add(gradient: torch.Tensor) -> None:
                assert rows.experts is not None
                for expert in rows.experts.unique().tolist():
                    name = f"{self.module_name}.{expert}.{projection}"
                    if name not in reached:
                        continue
                    chosen = rows.experts == expert if kept is None else (rows.experts == expert) & kept
                    sums[name] += _prices(x.detach()[chosen], gradient[chosen], modes[name], boundaries[name], None)
                    reached[name] += int(chosen.sum())

            own.register_hook(add)
            return own

    handles = [
        model.get_submodule(name).register_forward_pre_hook(make_hook(name, site), with_kwargs=True)
        for name, site in layers
        if name not in fused
    ]
    stages = [
        (model.get_submodule(name), Experts(name)) for name in {fused[name].module_name for name in reached}
    ]
    for module, stage in stages:
        experts.attach(module, stage)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with evaluation(model), torch.enable_grad():
            for index, sample in enumerate(track(samples, total=len(samples), description="Pricing sparsity")):
                state["mask"] = mask = attention_mask(sample)
                output = forward_sample(model, sample, f"sample {index}")
                logits = getattr(output, "logits", None)
                if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or not logits.requires_grad:
                    msg = (
                        f"allocation='fisher' needs a language model whose output has logits [B, T, V] with gradients; "
                        f"{type(model).__name__} gives none. Use allocation='profile' or 'uniform'."
                    )
                    raise nncf.UnsupportedModelError(msg)
                loss = _sampled_loss(logits, mask, seed, index)
                loss.backward()
                tokens += int(mask.sum()) if mask is not None else logits.shape[0] * logits.shape[1]
    finally:
        for handle in handles:
            handle.remove()
        for module, stage in stages:
            experts.detach(module, stage)
        for parameter in frozen:
            parameter.requires_grad_(True)
    prices = {name: np.asarray(total / max(reached.get(name, tokens), 1)) for name, total in sums.items()}
    return Costs(_of_siblings(prices, reached), tokens)


def _of_siblings(prices: dict[str, np.ndarray[Any, Any]], reached: Mapping[str, int]) -> dict[str, Any]:
    """
    Prices of experts are per token that reached them: a weight that is skipped saves a read only then. Experts that
    few tokens reached draw on the others of their block, as their thresholds do.
    """
    pools: dict[str, list[str]] = {}
    for name in reached:
        pools.setdefault(str(expert_pool(name)), []).append(name)
    result = dict(prices)
    for members in pools.values():
        total = sum(reached[name] for name in members)
        pooled = sum(prices[name] * reached[name] for name in members) / max(total, 1)
        for name in members:
            share = own_share(reached[name])
            result[name] = share * prices[name] + (1 - share) * pooled
    return result


def _sampled_loss(logits: torch.Tensor, mask: torch.Tensor | None, seed: int, index: int) -> torch.Tensor:
    """Σ −log p(ŷ) over the positions that count, with ŷ drawn from the model's own distribution."""
    rows = logits.flatten(0, 1)  # [B·T, V]
    if mask is not None:
        rows = rows[mask.reshape(-1).to(rows.device) != 0]
    generator = torch.Generator(device=rows.device).manual_seed(seed * 1_000_003 + index)
    labels = torch.multinomial(rows.detach().float().softmax(-1), 1, generator=generator).squeeze(-1)
    return nn.functional.cross_entropy(rows.float(), labels, reduction="sum")


def _prices(
    x: torch.Tensor, gradient: torch.Tensor, mode: float, boundaries: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Σ over tokens of the squared change of the log-likelihood, for each level; float64 [len(LEVELS)]."""
    z = x.reshape(-1, x.shape[-1]).float() - mode  # [n, IC]
    change = gradient.reshape(z.shape).float() * z
    if mask is not None and mask.numel() == z.shape[0]:
        change = change * (mask.reshape(-1, 1).to(change.device) != 0)
    # level at which a value is first dropped: |z| <= τ_level; values above all levels land in the last column
    level = torch.bucketize(z.abs(), boundaries.to(z.device), right=False)
    per_level = torch.zeros(z.shape[0], len(LEVELS), dtype=torch.float32, device=z.device)
    per_level.scatter_add_(1, level, change)
    dropped = per_level[:, :-1].cumsum(1).double().square().sum(0)  # [len(LEVELS) - 1]
    return torch.cat([torch.zeros(1, dtype=torch.float64), dropped.cpu()])
