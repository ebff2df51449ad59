# SPDX-License-Identifier: Apache-2.0
"""
Pruning behind the gate of a gated feed-forward (CATS): where ``|act(gate(x))| <= τ`` the product with up's output is
zero, so that neither the row of up's weights nor the column of down's is needed.

In the simulation down's input is masked; up's output then does not matter where the gate is closed. Feed-forwards are
recognised by what they compute, not by their class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import nncf
import torch
from nncf.common.logging.track_progress import track
from torch import nn

from scap_nncf.algorithms.backends.torch.collect import _without_padding
from scap_nncf.algorithms.backends.torch.layers import fc_shape, input_argument
from scap_nncf.algorithms.backends.torch.prune import Pruner
from scap_nncf.algorithms.backends.torch.run import attention_mask, evaluation, forward_sample
from scap_nncf.algorithms.plan import Plan, SitePlan
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.statistics import bucket_counts
from scap_nncf.kernels import gated
from scap_nncf.kernels.reference import activate


@dataclass(frozen=True)
class GatedLayers:
    """
    Module names of a gated feed-forward ``down(activation(gate(x)) * up(x))`` and of its layers.

    :param activation: a name of :data:`scap_nncf.kernels.gated.ACTIVATIONS`.
    """

    parent: str
    gate: str
    up: str
    down: str
    activation: str


def gated_layers(model: nn.Module) -> Iterator[GatedLayers]:
    """All gated feed-forwards with a layer of its own for the gate, in the order of registration."""
    for parent, module in model.named_modules():
        children = [name for name, child in module.named_children() if fc_shape(child) is not None]
        if len(children) != 3:
            continue
        found = gated.recognise(module, children)
        if found is not None and len(found.inputs) == 2:
            prefix = f"{parent}." if parent else ""
            gate, up = found.inputs
            yield GatedLayers(parent, prefix + gate, prefix + up, prefix + found.down, found.activation)


def collect_gated(
    model: nn.Module, sites: Sequence[GatedLayers], samples: Sequence[Any]
) -> dict[str, ActivationHistogram]:
    """
    Gate's name → histogram of the activated gate over the samples, padding left out.

    :raises nncf.ValidationError: NaN or Inf behind a gate, or a gate that never ran.
    """
    counts: dict[str, torch.Tensor] = {}
    exact: dict[str, bool] = {}
    current: dict[str, Any] = {"mask": None, "name": ""}
    handles = []

    def make_hook(site: GatedLayers) -> Any:
        def hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            a = _without_padding(activate(output, site.activation), current["mask"])
            if not bool(torch.isfinite(a).all()):
                msg = f"The output of {site.gate} has NaN or Inf values in {current['name']}."
                raise nncf.ValidationError(msg)
            counts[site.gate] = counts.get(site.gate, 0) + bucket_counts(a)
            exact[site.gate] = exact.get(site.gate, True) and a.dtype == torch.bfloat16

        return hook

    try:
        for site in sites:
            handles.append(model.get_submodule(site.gate).register_forward_hook(make_hook(site)))
        with evaluation(model):
            for index, sample in enumerate(track(samples, total=len(samples), description="Calibrating gates")):
                current.update(mask=attention_mask(sample), name=f"sample {index}")
                forward_sample(model, sample, f"sample {index}")
    finally:
        for handle in handles:
            handle.remove()
    silent = [site.gate for site in sites if site.gate not in counts]
    if silent:
        msg = f"{len(silent)} gates never ran during calibration: {', '.join(silent[:5])}. Use samples that reach them."
        raise nncf.ValidationError(msg)
    return {name: ActivationHistogram(value.cpu().numpy(), exact[name]) for name, value in counts.items()}


class GatedPruner(Pruner):
    """
    Closes gates: a hook behind the gate's layer finds which, one before down's layer zeroes what is behind them.

    :param site: layers down, up and gate of one feed-forward.
    """

    def __init__(self, site: SitePlan, activation: str, decode_only: bool) -> None:
        by_role = {layer.role: layer for layer in site.layers}
        super().__init__(by_role["down"], 0.0, decode_only)
        self.names = (by_role["down"].name, by_role["up"].name)
        self.gate = site.name
        self.activation = activation
        self._by_threshold = False  # by the gate, see `_select`
        self._closed: torch.Tensor | None = None

    def gate_hook(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> None:
        """Note which gates of this call are closed; [..., N]."""
        self._closed = None
        if self.active(input_argument(args, kwargs)):
            # NaN compares false: the gate stays open, and NaN visible
            self._closed = activate(output, self.activation).float().abs() <= self.threshold

    def _select(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        closed, self._closed = self._closed, None
        if closed is None or closed.shape != x.shape:
            return x
        return x.masked_fill(closed, 0.0)

    def counts(self) -> dict[str, tuple[int, int]]:
        zeros = int(self.zeros)
        return dict.fromkeys(self.names, (zeros, self.total)) | {self.gate: (0, self.total)}


def insert_gated(model: nn.Module, plan: Plan) -> None:
    """
    Attach the pruners of a CATS plan.

    :raises nncf.ValidationError: a site of the plan is no gated feed-forward of the model.
    """
    found = {layers.gate: layers for layers in gated_layers(model)}
    for site in plan.sites:
        layers = found.get(site.name)
        planned = {layer.role: layer.name for layer in site.layers}
        if layers is None or planned != {"down": layers.down, "up": layers.up, "gate": layers.gate}:
            msg = f"The plan does not fit the model: {site.name} is not the gate of a gated feed-forward there."
            raise nncf.ValidationError(msg)
    for site in plan.sites:
        layers = found[site.name]
        pruner = GatedPruner(site, layers.activation, plan.prune == "decode")
        model.get_submodule(layers.gate).register_forward_hook(pruner.gate_hook, with_kwargs=True)
        model.get_submodule(layers.down).register_forward_pre_hook(pruner.pre_hook, with_kwargs=True)
