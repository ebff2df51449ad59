# SPDX-License-Identifier: Apache-2.0
"""
Finding the sites of a PyTorch model.

One short forward pass is watched: FC layers of a block that read the very same tensor form one site. So an unknown
family, parallel attention, or fused projections need no table; the table in :mod:`scap_nncf.algorithms.roles` only
names what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch import function_hooks
from scap_nncf.algorithms.backends.torch.layers import fc_shape, input_argument, named_fc_layers
from scap_nncf.algorithms.backends.torch.run import evaluation, forward_sample
from scap_nncf.algorithms.discovery import FoundLayer, make_report
from scap_nncf.algorithms.sites import LeftOut, ModelReport


@dataclass
class _Seen:
    """What the watched forward pass showed of one FC layer."""

    order: int
    tensor: tuple[Any, ...]  # identifies the input tensor
    calls: int = 1
    kept: list[torch.Tensor] = field(default_factory=list)  # alive until the end, so that no address is used twice


def example_inputs(model: nn.Module) -> Any:
    """
    A sample to watch, where the user gave none: the model's ``dummy_inputs``, else a few token ids.
    """
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, dict) and dummy:
        return dummy
    return {"input_ids": torch.arange(1, 9).unsqueeze(0)}


def inspect_model(
    model: nn.Module,
    sample: Any = None,
    selected_roles: Sequence[str] | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    wanted: Sequence[str] = (),
) -> ModelReport:
    """
    Sites of a model and what stays dense; nothing is changed.

    :param model: a PyTorch model.
    :param sample: what the model can be called with, to watch one forward pass; default: its dummy inputs.
    :param selected_roles: only layers named by one of these selectors count.
    :param ignored_scope: layers to leave dense.
    :param wanted: selectors that the user wrote; layers outside of blocks, such as ``lm_head``, count only if named
        here or in `selected_roles` by their role or a ``re:`` pattern.
    :raises nncf.UnsupportedModelError: the model has no FC layer in a block.
    :raises nncf.ValidationError: a selector or scope names nothing, or the model cannot take the sample.
    """
    found = list(named_fc_layers(model))
    if not found:
        msg = f"{type(model).__name__} has no fully connected layer (no module with in_features and out_features)."
        raise nncf.UnsupportedModelError(msg)
    seen = _watch(model, [(name, module) for name, module, _ in found], sample)
    if sample is not None:
        function_hooks.resolve(model, sample)  # mode*W may need it later, where there is no sample
    head = _output_embedding_name(model)
    kinds = {name: type(module).__name__ for name, module, _ in found}
    shapes = {name: shape for name, _, shape in found}
    silent = [name for name in shapes if name not in seen]
    left_out = [LeftOut(name, kinds[name], "did not run in the watched forward pass") for name in silent]
    left_out += _fused_experts(model)
    layers = [
        FoundLayer(name, kinds[name], *shapes[name], tensor=seen[name].tensor, is_head=name == head)
        for name in sorted(seen, key=lambda name: seen[name].order)
    ]
    return make_report(type(model).__name__, layers, selected_roles, ignored_scope, wanted, left_out)


def _watch(model: nn.Module, layers: list[tuple[str, nn.Module]], sample: Any) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_argument(args, kwargs)
            if name in seen:
                seen[name].calls += 1
                return
            # views of one storage with the same layout are the same tensor to an FC layer
            identity = (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.shape[-1], x.dtype)
            seen[name] = _Seen(len(seen), identity, kept=[x])

        return hook

    given = sample if sample is not None else example_inputs(model)
    # first of all hooks: layers of a sparse model read one tensor as well, before each prunes it for itself
    handles = [
        module.register_forward_pre_hook(make_hook(name), prepend=True, with_kwargs=True) for name, module in layers
    ]
    try:
        with evaluation(model):
            forward_sample(model, given, "the first sample" if sample is not None else "the model's dummy inputs")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _output_embedding_name(model: nn.Module) -> str | None:
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _fused_experts(model: nn.Module) -> list[LeftOut]:
    """Experts held as 3-D parameters: no module is called for them, so pre-hooks cannot see them."""
    return [
        LeftOut(name, type(module).__name__, "experts fused into 3-D parameters are not supported yet")
        for name, module in model.named_modules()
        if "experts" in name and fc_shape(module) is None
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    ]
