# SPDX-License-Identifier: Apache-2.0
"""Fully connected layers of a PyTorch model, recognised by what they compute and not by their class."""

from __future__ import annotations

from collections.abc import Iterator

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.experts import expert_layers

_NOT_FC = (nn.Embedding, nn.EmbeddingBag, nn.Bilinear)


def fc_shape(module: nn.Module) -> tuple[int, int] | None:
    """
    (in_features, out_features) of a module that computes ``x @ W + b``, else None.

    Besides ``nn.Linear`` these are its replacements in quantisation toolkits (which keep `in_features` and
    `out_features`, whatever their weight looks like) and the transposed ``Conv1D`` of GPT-2.
    """
    if isinstance(module, _NOT_FC) or any(True for _ in module.children()):
        return None
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int):
        return in_features, out_features
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            return weight.shape[0], weight.shape[1]
    return None


def named_fc_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    """Name, module and (in_features, out_features) of every FC layer, in the order of registration."""
    for name, module in model.named_modules():
        shape = fc_shape(module)
        if shape is not None and "__nncf_hooks" not in name:
            yield name, module, shape


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every FC layer by module name, those of fused experts included."""
    shapes = {name: shape for name, _, shape in named_fc_layers(model)}
    return shapes | {name: (layer.in_features, layer.out_features) for name, layer in expert_layers(model).items()}


def input_argument(args: tuple[object, ...], kwargs: dict[str, object]) -> torch.Tensor:
    """The activation among the arguments of an FC layer's call."""
    value = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(value, torch.Tensor):
        msg = f"expected a tensor as the first argument of a fully connected layer, got {type(value).__name__}"
        raise TypeError(msg)
    return value


def layer_module(model: nn.Module, name: str) -> nn.Module:
    """
    The module of an FC layer.

    :raises nncf.ParameterNotSupportedError: the layer is an expert that shares a parameter with others, and no module.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        msg = (
            f"{name} is an expert that shares a parameter with others: it takes thresholds, a mode or an N:M pattern "
            "by magnitude, no criterion of weights and no error mitigation. Leave the experts out by role or "
            "ignored_scope."
        )
        raise nncf.ParameterNotSupportedError(msg) from error
