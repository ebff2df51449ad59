# SPDX-License-Identifier: Apache-2.0
"""Column sums of weights, for the fused bias b + η·W of mode centring (SCAP paper, equation 6)."""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.layers import layer_module
from scap_nncf.algorithms.backends.torch.quantised import dequantised
from scap_nncf.algorithms.backends.torch.residency import is_offloaded, resident


def column_sums(model: nn.Module, name: str) -> torch.Tensor:
    """
    ``sum over input channels of W[:, n]`` of an FC layer: what the layer adds for an input of ones.

    Plain floating-point weights are summed in float64, and so are those of toolkits whose format is known
    (:mod:`scap_nncf.algorithms.backends.torch.quantised`). Any other layer is asked for its result,
    ``FC(ones) − FC(zeros)``, which needs no knowledge of the format and takes the weights that will run. Models
    compressed by NNCF decompress weights in hooks that run only inside the model's forward; those are applied here.

    :param name: module name of the layer in the model.
    :return: float32 [out_features] on the layer's device.
    """
    module = model.get_submodule(name)
    if is_offloaded(module):
        with resident(module):
            return column_sums(model, name)
    weight = getattr(module, "weight", None)
    if _is_wrapped(model) and isinstance(weight, torch.Tensor):
        return _nncf_column_sums(model, name, weight)
    if type(module) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point():
        return weight.detach().sum(dim=1, dtype=torch.float64).float()
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.detach().sum(dim=0, dtype=torch.float64).float()
    matrix = dequantised(module)
    return _probe(module) if matrix is None else matrix.sum(dim=0, dtype=torch.float64).float()


def project(model: nn.Module, name: str, vector: torch.Tensor) -> torch.Tensor:
    """
    ``vector @ W`` of an FC layer, for a shift of each channel.

    :param vector: float32 [in_features].
    :return: float32 [out_features] on the layer's device.
    """
    module = model.get_submodule(name)
    matrix = _matrix(model, name)
    if matrix is not None:
        return (vector.to(matrix.device, torch.float64) @ matrix.double()).float()
    size = float(vector.abs().max())  # rows near one: small numbers would drown in the bias
    return size * _probe(module, vector / size) if size > 0 else torch.zeros_like(_probe(module))


def dense_weight(model: nn.Module, name: str) -> torch.Tensor:
    """
    The weights that a layer computes with, whatever their format, as float32 [in_features, out_features].

    Of formats that are not known the layer is asked for its result on unit vectors. What AWQ multiplies the layer's
    input with counts as part of the weights.
    """
    module = layer_module(model, name)
    matrix = _matrix(model, name)
    if matrix is not None:
        return matrix.float()
    rows = torch.eye(module.in_features).split(256)  # type: ignore[arg-type]
    return torch.cat([_probe(module, part) for part in rows])


def dense_matrix(model: nn.Module, name: str) -> np.ndarray[Any, Any]:
    """As :func:`dense_weight`, as an array."""
    return dense_weight(model, name).detach().cpu().numpy()


def layer_bias(model: nn.Module, name: str) -> torch.Tensor | None:
    """The bias of an FC layer [out_features], or None where it has none."""
    module = model.get_submodule(name)
    bias = getattr(module, "bias", None)
    if bias is None or isinstance(bias, torch.Tensor):
        return None if bias is None else bias.detach()
    zeros = _floating(torch.zeros(1, module.in_features), module)  # type: ignore[arg-type]
    with torch.no_grad():
        return module.forward(zeros)[0]


def _matrix(model: nn.Module, name: str) -> torch.Tensor | None:
    """W [in_features, out_features] with the scale of AWQ where it can be read; None for an unknown format."""
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return dequantised(module)
    if _is_wrapped(model):
        dense, scale = _nncf_matrix(model, name, weight)
        return dense if scale is None else scale.float()[:, None] * dense.float()
    if type(module) is nn.Linear and type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point():
        return weight.detach().t()
    if type(module).__name__ == "Conv1D" and weight.is_floating_point():
        return weight.detach()
    return dequantised(module)


def expert_column_sums(model: nn.Module, module_name: str, projection: str) -> torch.Tensor:
    """
    Column sums of a projection of all fused experts of a module.

    :return: float32 [E, out_features] on the weight's device.
    """
    module = model.get_submodule(module_name)
    weight = getattr(module, projection)
    if _is_wrapped(model):
        weight = _decompressed(model, f"{module_name}.{projection}", weight)
    return weight.detach().sum(dim=1 if module.is_transposed else 2, dtype=torch.float64).float()


def _floating(rows: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Rows on the device and in the type that a layer computes with."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    bias = getattr(module, "bias", None)
    return rows.to(device, bias.dtype if isinstance(bias, torch.Tensor) else dtype)


def _probe(module: nn.Module, rows: torch.Tensor | None = None) -> torch.Tensor:
    """``FC(rows) − FC(0)``, of ones where no rows are given; float32 [out_features] or [n, out_features]."""
    given = torch.ones(module.in_features) if rows is None else rows  # type: ignore[arg-type]
    stacked = torch.cat([torch.atleast_2d(given.cpu()), torch.zeros(1, given.shape[-1])])
    try:
        with torch.no_grad():
            result = module.forward(_floating(stacked, module)).float()  # forward: no hooks of ours or others
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        msg = (
            f"The weights of a {type(module).__name__} cannot be read, and it does not answer by itself "
            f"({type(error).__name__}: {error}), so mode*W cannot be computed. Some toolkits unpack weights in the "
            "first forward pass: run one before, or use mode='zero'."
        )
        raise nncf.ValidationError(msg) from error
    return (result[:-1] - result[-1]).reshape(*given.shape[:-1], -1)


def _is_wrapped(model: nn.Module) -> bool:
    from nncf.torch.function_hook.wrapper import is_wrapped

    return is_wrapped(model)


def _nncf_column_sums(model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    matrix, scale = _nncf_matrix(model, name, weight)
    if scale is None:
        return matrix.sum(dim=0, dtype=torch.float64).float()
    return (scale.double() @ matrix.double()).float()


def _decompressed(model: nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    storage = get_hook_storage(model)
    # NNCF knows a weight that several layers share by one of its names
    names = [key for key, value in model.named_parameters(remove_duplicate=False) if value is weight]
    hooked = (key for key in names if f"{key.replace('.', ':')}__0" in storage.post_hooks)
    with torch.no_grad():
        return storage.execute_post_function_hooks(next(hooked, name), 0, weight)


def _nncf_matrix(model: nn.Module, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W [in_features, out_features] after NNCF's hooks, and what it multiplies the layer's input with."""
    from scap_nncf.algorithms.backends.torch.function_hooks import input_scale

    with torch.no_grad():
        dense = _decompressed(model, f"{name}.weight", weight)
        matrix = dense if type(model.get_submodule(name)).__name__ == "Conv1D" else dense.t()
        # AWQ and SmoothQuant multiply the activation right before the matrix product. Quantisers of the activation
        # that NNCF puts there as well are left out: their range is that of activations, not of ones.
        return matrix, input_scale(model, name)
