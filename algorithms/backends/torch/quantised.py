# SPDX-License-Identifier: Apache-2.0
"""
Weights of FC layers that other toolkits quantised, as the floating-point matrix that they stand for.

Where this knows a format, η·W is exact. The answer of a layer to a row of ones is not, where the layer quantises its
input as well (torchao's dynamic int8) or computes in bfloat16 whatever it is given (bitsandbytes in 4 bits on a CPU).
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def dequantised(module: nn.Module) -> torch.Tensor | None:
    """
    W of a layer as a floating-point tensor [in_features, out_features], or None where the format is not known.

    Nothing in the module changes.
    """
    weight = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        return _bitsandbytes_4bit(weight)
    # tensor subclasses of torchao and optimum-quanto
    if isinstance(weight, torch.Tensor) and type(weight) not in (torch.Tensor, nn.Parameter):
        if not hasattr(weight, "dequantize") or type(weight).__module__.partition(".")[0] == "bitsandbytes":
            return None
        return _fitting(module, weight.dequantize().t())
    for method in ("dequantize", "dequantize_weight"):  # HQQ; GPTQ and AWQ of gptqmodel
        function = getattr(module, method, None)
        if callable(function) and not isinstance(module, nn.Linear):
            with torch.no_grad():
                return _fitting(module, function())
    return None


def _fitting(module: nn.Module, matrix: torch.Tensor) -> torch.Tensor | None:
    """The matrix the way round that the layer has; None where its shape is another, or both ways would fit."""
    shape = (module.in_features, module.out_features)
    if tuple(matrix.shape) == shape and (shape[0] != shape[1] or isinstance(module, nn.Linear)):
        return matrix.detach()
    if tuple(matrix.shape) == shape[::-1] and shape[0] != shape[1]:
        return matrix.detach().t()
    return None


def _bitsandbytes_4bit(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional

    data, state = weight.data, weight.quant_state  # type: ignore[attr-defined]
    if getattr(state, "packing_format_for_cpu", False):  # the first forward pass on a CPU packs anew, in place
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return functional.dequantize_4bit(data, state).t()  # [IC, OC]


def foreign_layer(module: nn.Module) -> str | None:
    """
    What of an FC layer another toolkit has made, or None for a layer of torch or transformers: its class, or the class
    of its weight.
    """
    weight = module._parameters.get("weight")
    if weight is not None and type(weight) is not nn.Parameter:
        return type(weight).__name__
    more = sorted(name for name in module._parameters if name.startswith("weight_"))
    if more:  # compressed-tensors, before and after it has decompressed a layer
        return f"{type(module).__name__} with {', '.join(more)}"
    kind = type(module)
    if weight is None or not weight.is_floating_point():
        return kind.__name__ if kind.__module__.partition(".")[0] not in ("torch", "transformers") else None
    return None
