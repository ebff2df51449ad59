# SPDX-License-Identifier: Apache-2.0
"""Prices of sparsity in a PyTorch language model: one backward pass a sample, no weight gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import nncf
import numpy as np
import torch
from nncf.common.logging.track_progress import track
from torch import nn
from torch.utils.checkpoint import checkpoint

from scap_nncf.algorithms.allocation.fisher import LEVELS, Costs, on_grid
from scap_nncf.algorithms.backends.torch import experts
from scap_nncf.algorithms.backends.torch.examples import with_decoder_inputs
from scap_nncf.algorithms.backends.torch.layers import input_argument
from scap_nncf.algorithms.backends.torch.run import attention_mask, evaluation, forward_sample, without_cache
from scap_nncf.algorithms.data import fingerprint
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.pooling import own_share
from scap_nncf.algorithms.sites import Layer, Site, expert_pool


def collect_costs(
    model: nn.Module,
    sites: Sequence[Site],
    histograms: Mapping[str, ActivationHistogram],
    modes: Mapping[str, float],
    samples: Sequence[Any],
    seed: int = 0,
    checkpointing: bool = False,
) -> Costs:
    """
    F of every layer at every level (:mod:`scap_nncf.algorithms.allocation.fisher`), on the dense model.

    Each layer gets its own view of the tensor it reads, so that the gradient at that view is the layer's own,
    whatever the weight format. Peak memory is that of a training step of one sample without weight gradients and
    optimiser.

    :param histograms: give the thresholds of the levels.
    :param modes: site name → η.
    :param samples: what the model can be called with; its output must have `.logits` [B, T, V].
    :param seed: of the labels drawn from the model; each sample's labels depend on its content, not on its place.
    :param checkpointing: run each block again during the backward pass instead of keeping its activations: memory of
        one block, a third more time.
    :raises nncf.UnsupportedModelError: the output has no logits, or no gradient reaches the layers.
    """
    with evaluation(model):
        samples = [with_decoder_inputs(model, sample, f"sample {index}") for index, sample in enumerate(samples)]
    prices = _Prices(sites, histograms, modes)
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with ExitStack() as stack:
            stack.enter_context(evaluation(model))
            stack.enter_context(torch.enable_grad())
            if checkpointing:
                stack.enter_context(_checkpointed(model, sites, prices))
            stack.enter_context(prices.attached(model))
            for index, sample in enumerate(track(samples, total=len(samples), description="Pricing sparsity")):
                mask = attention_mask(sample)
                prices.begin(mask)
                output = forward_sample(model, without_cache(model, sample), f"sample {index}")
                logits = getattr(output, "logits", None)
                if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or not logits.requires_grad:
                    raise _unsupported(model, "it gives none")
                loss, tokens = _sampled_loss(logits, mask, _label_seed(sample, mask, seed))
                del output, logits
                try:
                    loss.backward()
                except (RuntimeError, NotImplementedError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise _unsupported(model, f"its backward pass fails: {error}") from error
                prices.end(tokens)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return prices.costs(model)


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


def _unsupported(model: nn.Module, why: str) -> nncf.UnsupportedModelError:
    return nncf.UnsupportedModelError(
        f"allocation='fisher' needs a language model whose output has logits [B, T, V] with gradients; for "
        f"{type(model).__name__}, {why}. Use allocation='profile' or 'uniform'."
    )


class _Prices:
    """Sums up F from the gradients that reach the layers' inputs."""

    def __init__(
        self, sites: Sequence[Site], histograms: Mapping[str, ActivationHistogram], modes: Mapping[str, float]
    ) -> None:
        self._site_of = {layer.name: site.name for site in sites for layer in site.layers}
        self._layers: dict[str, Layer] = {layer.name: layer for site in sites for layer in site.layers}
        self._modes = modes
        self._boundaries = {
            site.name: torch.tensor([histograms[site.name].quantile(level, modes[site.name]) for level in LEVELS[1:]])
            for site in sites
        }
        self._sums = {name: np.zeros(len(LEVELS)) for name in self._layers}
        self._sample: dict[str, torch.Tensor] = {}  # of the current sample
        self._inputs: dict[str, Any] = {}  # layer → x, from the forward pass to the gradient
        self._reached: dict[str, int] = {}  # tokens of each expert
        self._levels: tuple[str, torch.Tensor] | None = None  # of the site whose gradient came last
        self._mask: torch.Tensor | None = None
        self._seen: set[str] = set()
        self._tokens = 0
        #: False during a forward pass that a block will repeat: keeping x then would defeat the checkpoint.
        self.keeping = True

    def begin(self, mask: torch.Tensor | None) -> None:
        self._mask = mask
        self._sample = {}
        self._inputs = {}

    def end(self, tokens: int) -> None:
        self._tokens += tokens
        for name, sums in self._sample.items():
            self._sums[name] += on_grid(sums.cpu().numpy())
        self._levels = None

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        fused = experts.expert_layers(model)
        self._reached = {name: 0 for name in self._layers if name in fused}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name in self._layers
            if name not in fused
        ]
        stages = [
            (model.get_submodule(name), _Experts(name, self)) for name in {fused[n].module_name for n in self._reached}
        ]
        try:
            for module, stage in stages:
                experts.attach(module, stage)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, stage in stages:
                experts.detach(module, stage)

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_argument(args, kwargs)
            if self.keeping:
                self._inputs[name] = x.detach()
            own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            own.register_hook(lambda gradient: self._add(name, gradient))
            return ((own, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): own})

        return hook

    def watch_experts(self, module_name: str, projection: str, x: torch.Tensor, rows: experts.Rows) -> torch.Tensor:
        """A view of the rows that experts read; they are sorted out by expert when the gradient comes."""
        key = f"{module_name}.{projection}"
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        if self.keeping:
            kept = None
            if self._mask is not None and self._mask.numel() == rows.total:
                kept = self._mask.reshape(-1).to(x.device)[rows.tokens] != 0
            self._inputs[key] = (x.detach(), rows.experts, kept)

        def add(gradient: torch.Tensor) -> None:
            values, chosen_by, kept = self._inputs.pop(key)
            mask, self._mask = self._mask, None  # rows that count are picked here
            for expert in chosen_by.unique().tolist():
                name = f"{module_name}.{expert}.{projection}"
                if name not in self._reached:
                    continue
                chosen = chosen_by == expert if kept is None else (chosen_by == expert) & kept
                self._levels = None
                self._inputs[name] = values[chosen]
                self._add(name, gradient[chosen])
                self._reached[name] += int(chosen.sum())
            self._levels, self._mask = None, mask

        own.register_hook(add)
        return own

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        """Σ over tokens of the squared change of the log-likelihood, at each level."""
        site = self._site_of[name]
        x = self._inputs.pop(name)
        z = x.reshape(-1, x.shape[-1]).float() - self._modes[site]  # [n, IC]
        if self._levels is None or self._levels[0] != site or self._levels[1].shape != z.shape:
            # level at which a value is first dropped: |z| <= τ_level; values above all fall into the last column
            level = torch.bucketize(z.abs(), self._boundaries[site].to(z.device), out_int32=True).long()
            self._levels = (site, level)
        change = gradient.reshape(z.shape).float() * z
        if self._mask is not None and self._mask.numel() == z.shape[0]:
            change = change * (self._mask.reshape(-1, 1).to(change.device) != 0)
        per_level = torch.zeros(z.shape[0], len(LEVELS), dtype=torch.float32, device=z.device)
        per_level.scatter_add_(1, self._levels[1], change)
        dropped = per_level[:, :-1].double().cumsum(1).square().sum(0)  # [len(LEVELS) - 1]
        sums = torch.cat([dropped.new_zeros(1), dropped])
        self._sample[name] = self._sample[name] + sums if name in self._sample else sums
        self._seen.add(name)

    def costs(self, model: nn.Module) -> Costs:
        """
        The result. A layer that no token reached (an expert) gets the mean curve of its role, a weight at a time: with
        a price of zero it would be pruned first.
        """
        by_role: dict[str, list[np.ndarray[Any, Any]]] = {}
        for name in self._seen:
            layer = self._layers[name]
            by_role.setdefault(layer.role, []).append(self._sums[name] / layer.weights)
        for name, layer in self._layers.items():
            if name in self._seen:
                continue
            if layer.role not in by_role:
                raise _unsupported(model, f"no gradient reaches {name}")
            self._sums[name] = on_grid(np.mean(by_role[layer.role], axis=0) * layer.weights)
        if not all(np.isfinite(sums).all() for sums in self._sums.values()):
            raise _unsupported(model, "gradients are not finite (half precision? try bfloat16 or float32)")
        if self._reached:
            prices = {name: sums / max(self._reached.get(name, 0), 1) for name, sums in self._sums.items()}
            pooled = _of_siblings(prices, self._reached)
            self._sums |= {name: on_grid(pooled[name] * self._tokens) for name in self._reached}
        return Costs(self._sums, self._tokens)


class _Experts(experts.Stage):
    """Each projection of fused experts gets its own view of the rows."""

    def __init__(self, module_name: str, prices: _Prices) -> None:
        self._module_name = module_name
        self._prices = prices

    def before(self, projection: str, x: torch.Tensor, rows: experts.Rows) -> torch.Tensor:
        return self._prices.watch_experts(self._module_name, projection, x, rows)


@contextmanager
def _checkpointed(model: nn.Module, sites: Sequence[Site], prices: _Prices) -> Iterator[None]:
    """Let each block of the model forget its activations and run again in the backward pass."""
    names = sorted({block for site in sites if (block := _block_name(site)) is not None})
    blocks = [model.get_submodule(name) for name in names]
    originals = [block.__dict__.get("forward") for block in blocks]

    def wrap(forward: Any) -> Any:
        def run_in_checkpoint(*args: Any, **kwargs: Any) -> Any:
            runs = 0

            def run(*inner: Any, **named: Any) -> Any:
                nonlocal runs
                runs += 1
                before, prices.keeping = prices.keeping, runs > 1
                try:
                    return forward(*inner, **named)
                finally:
                    prices.keeping = before

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run_in_checkpoint

    try:
        for block in blocks:
            block.forward = wrap(block.forward)  # type: ignore[method-assign]
        yield
    finally:
        for block, original in zip(blocks, originals):
            if original is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = original  # type: ignore[method-assign]


def _block_name(site: Site) -> str | None:
    """Name of the transformer block that a site is in: up to the first number of its name."""
    parts = site.name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if index is None else ".".join(parts[: index + 1])


def _label_seed(sample: Any, mask: torch.Tensor | None, seed: int) -> int:
    """From the tokens that count: neither padding nor the place in the dataset changes the labels drawn."""
    ids: Any = sample
    if mask is not None and isinstance(sample, Mapping) and "input_ids" in sample:
        ids = torch.as_tensor(sample["input_ids"])
        if mask.shape == ids.shape:
            ids = torch.stack([row[kept != 0] for row, kept in zip(ids.cpu(), mask.cpu())]) if _even(mask) else ids
    return (fingerprint(ids) + seed) % (1 << 63)


def _even(mask: torch.Tensor) -> bool:
    """Whether every row keeps as many positions."""
    kept = (mask != 0).sum(1)
    return bool((kept == kept[0]).all())


def _sampled_loss(logits: torch.Tensor, mask: torch.Tensor | None, seed: int) -> tuple[torch.Tensor, int]:
    """Σ −log p(ŷ) over the positions that count, with ŷ drawn from the model's own distribution; and their number."""
    rows = logits.flatten(0, 1)  # [B·T, V]
    if mask is not None and mask.numel() == rows.shape[0]:  # else it is that of an encoder
        rows = rows[mask.reshape(-1).to(rows.device) != 0]
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    with torch.no_grad():
        labels = torch.multinomial(rows.float().softmax(-1), 1, generator=generator).squeeze(-1)
    return nn.functional.cross_entropy(rows.float(), labels, reduction="sum"), rows.shape[0]
