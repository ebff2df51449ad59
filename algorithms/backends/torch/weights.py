# SPDX-License-Identifier: Apache-2.0
"""Column sums of weights, for the fused bias b + η·W of mode centring (SCAP paper, equation 6)."""

from __future__ import annotations

import torch
from torch import nn


def column_sums(model: nn.Module, name: str) -> torch.Tensor:
    """
    ``sum over input channels of W[:, n]`` of an FC layer: what the layer adds for an input of ones.

    Plain floating-point weights are summed in float64. Any other weight format is asked for its result,
    ``FC(ones) − FC(zeros)``, which needs no knowledge of the format and takes the weights that will run. Models
    compressed by NNCF decompress weights in hooks that run only inside the model's forward; those are applied here.

    :param name: module name of the layer in the model.
    :return: float32 [out_features] on the layer's device.
    """
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if _is_wrapped(model) and isinstance(weight, torch.Tensor):
        return _nncf_column_sums(model, name, weight)
    if type(module) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point():
        return weight.detach().sum(dim=1, dtype=torch.float64).float()
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.detach().sum(dim=0, dtype=torch.float64).float()
    return _probe(module)


def _probe(module: nn.Module) -> torch.Tensor:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    bias = getattr(module, "bias", None)
    if isinstance(bias, torch.Tensor):
        dtype = bias.dtype
    rows = torch.stack([torch.ones(module.in_features), torch.zeros(module.in_features)])  # type: ignore[arg-type]
    with torch.no_grad():
        ones, zeros = module.forward(rows.to(device, dtype)).float()  # forward: no hooks of ours or others
    return ones - zeros


def _is_wrapped(model: nn.Module) -> bool:
    from nncf.torch.function_hook.wrapper import is_wrapped

    return is_wrapped(model)


def _nncf_column_sums(model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    from scap_nncf.algorithms.backends.torch.function_hooks import input_scale

    with torch.no_grad():
        storage = get_hook_storage(model)
        # NNCF knows a weight that several layers share by one of its names
        names = [key for key, value in model.named_parameters(remove_duplicate=False) if value is weight]
        hooked = (key for key in names if f"{key.replace('.', ':')}__0" in storage.post_hooks)
        dense = storage.execute_post_function_hooks(next(hooked, f"{name}.weight"), 0, weight)
        matrix = dense if type(model.get_submodule(name)).__name__ == "Conv1D" else dense.t()  # [IC, OC]
        # AWQ and SmoothQuant multiply the activation right before the matrix product. Quantisers of the activation
        # that NNCF puts there as well are left out: their range is that of activations, not of ones.
        scale = input_scale(model, name)
        if scale is None:
            return matrix.sum(dim=0, dtype=torch.float64).float()
        return (scale.double() @ matrix.double()).float()
