# SPDX-License-Identifier: Apache-2.0
"""
Finding the sites of a PyTorch model.

One short forward pass is watched: FC layers of a block that read the very same tensor form one site. So an unknown
family, parallel attention, or fused projections need no table; the table in :mod:`scap_nncf.algorithms.roles` only
names what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch import experts, function_hooks
from scap_nncf.algorithms.backends.torch.examples import example_inputs, with_decoder_inputs
from scap_nncf.algorithms.backends.torch.layers import fc_shape, input_argument, named_fc_layers
from scap_nncf.algorithms.backends.torch.run import evaluation, forward_sample
from scap_nncf.algorithms.discovery import FoundLayer, make_report
from scap_nncf.algorithms.sites import LeftOut, ModelReport, expert_pool


@dataclass
class _Seen:
    """What the watched forward pass showed of one FC layer."""

    order: int
    tensors: list[tuple[Any, ...]]  # identify the input tensor of each call
    kept: list[torch.Tensor] = field(default_factory=list)  # alive until the end, so that no address is used twice


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
    fused = {name: module for name, module in experts.named_experts(model) if not experts.is_patched(module)}
    if not found and not fused:
        msg = f"{type(model).__name__} has no fully connected layer (no module with in_features and out_features)."
        raise nncf.UnsupportedModelError(msg)
    seen = _watch(model, [*((name, module) for name, module, _ in found), *fused.items()], sample)
    if sample is not None:
        function_hooks.resolve(model, sample)  # mode*W may need it later, where there is no sample
    head = _output_embedding_name(model)
    kinds = {name: type(module).__name__ for name, module, _ in found}
    shapes = {name: shape for name, _, shape in found}
    _lend_to_silent_experts(seen, shapes)
    silent = [name for name in [*shapes, *fused] if name not in seen]
    kinds |= {name: type(module).__name__ for name, module in fused.items()}
    left_out = [LeftOut(name, kinds[name], "did not run in the watched forward pass") for name in silent]
    left_out += _routers(model) + _unknown_experts(model)
    layers = []
    for name in sorted(seen, key=lambda name: seen[name].order):
        if name in fused:
            layers += [
                FoundLayer(layer.name, kinds[name], layer.in_features, layer.out_features, tensor=layer.name)
                for layer in experts.layers_of(name, fused[name])
            ]
        else:
            tensor = tuple(seen[name].tensors)
            layers.append(FoundLayer(name, kinds[name], *shapes[name], tensor=tensor, is_head=name == head))
    report = make_report(type(model).__name__, layers, selected_roles, ignored_scope, wanted, left_out)
    chosen = {layer.name for site in report.sites for layer in site.layers}
    return replace(report, notes=tuple(_notes(seen, chosen)))


def _watch(model: nn.Module, layers: list[tuple[str, nn.Module]], sample: Any) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_argument(args, kwargs)
            # views of one storage with the same layout are the same tensor to an FC layer
            identity = (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.shape[-1], x.dtype)
            # a module that is called several times shares a site with those that read the same tensor each time
            one = seen.setdefault(name, _Seen(len(seen), []))
            one.tensors.append(identity)
            one.kept.append(x)

        return hook

    given = example_inputs(model) if sample is None else with_decoder_inputs(model, sample, "the first sample")
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


def _notes(seen: dict[str, _Seen], chosen: set[str]) -> list[str]:
    several = {name: len(one.tensors) for name, one in seen.items() if name in chosen and len(set(one.tensors)) > 1}
    if not several:
        return []
    first, calls = next(iter(several.items()))
    more = f" and {len(several) - 1} more layers" if len(several) > 1 else ""
    return [
        f"{first}{more} run several times in a forward pass on different tensors ({calls} calls): one mode and "
        "threshold, from the inputs of all calls, serve them all."
    ]


def _output_embedding_name(model: nn.Module) -> str | None:
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def _lend_to_silent_experts(seen: dict[str, _Seen], shapes: dict[str, tuple[int, int]]) -> None:
    """
    Experts that are modules of their own and that no token of the watched pass reached: they read what the experts
    that ran read. Their statistics may be empty as well; planning draws on their siblings.
    """
    examples: dict[str, tuple[str, _Seen]] = {}
    for name, one in seen.items():
        pool = expert_pool(name)
        if pool is not None:
            examples.setdefault(pool, (name, one))
    for name in shapes:
        pool = expert_pool(name)
        if name in seen or pool not in examples:
            continue
        example, one = examples[pool]
        if shapes[example] == shapes[name]:
            expert = name[len(pool.partition("*")[0]) :].partition(".")[0]
            seen[name] = _Seen(one.order, [(expert, *tensor) for tensor in one.tensors])


def _routers(model: nn.Module) -> list[LeftOut]:
    """Routers that are modules with a weight, but no FC layers."""
    return [
        LeftOut(name, type(module).__name__, "router: decides which expert runs")
        for name, module in model.named_modules()
        if "router" in type(module).__name__.lower() and fc_shape(module) is None
        if any(parameter.dim() == 2 for parameter in module.parameters(recurse=False))
    ]


def _unknown_experts(model: nn.Module) -> list[LeftOut]:
    """Experts in parameters that are laid out in a way not known here: no module is called for a single one."""
    return [
        LeftOut(
            name,
            type(module).__name__,
            "its forward is patched (offloading or another tool)"
            if experts.projections(module)
            else "experts fused into parameters of an unknown layout",
        )
        for name, module in model.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower() and fc_shape(module) is None
        if not experts.projections(module) or experts.is_patched(module)
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    ]
