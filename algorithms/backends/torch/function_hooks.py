# SPDX-License-Identifier: Apache-2.0
"""
NNCF's names of the matrix products in a model that it has wrapped.

NNCF hangs AWQ's and SmoothQuant's multiplication on the *function* call (``linear``, ``addmm``), under a name made of
the modules on the call stack. A module is named only where the module above it on the stack is its parent, so members
of a ``ModuleList``, which is not called, lose their index: ``model.layers.3.mlp.down_proj`` becomes
``model/mlp/down_proj/linear/3``, the fourth call of that name. FC layers are registered in the order they run, so
counting them gives the number back.
"""

from __future__ import annotations

from collections import defaultdict

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.layers import fc_shape

_FUNCTION_OF = {"Conv1D": "addmm"}  # everything else is F.linear
_INPUT_PORT_OF = {"linear": 0, "addmm": 1}


def input_scale(model: nn.Module, name: str) -> torch.Tensor | None:
    """
    What NNCF multiplies the input of an FC layer with, inside the layer's call.

    :param model: a model wrapped by NNCF.
    :param name: module name of the layer.
    :return: [in_features], or None where nothing is multiplied.
    :raises nncf.InternalError: NNCF has such a multiplication, but on an operation that no layer here can be matched to.
    """
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import SQMultiply

    scales: dict[str, list[SQMultiply]] = {}
    for key, hooks in get_hook_storage(model).pre_hooks.items():
        found = [hook for hook in hooks.values() if isinstance(hook, SQMultiply)]
        if found:
            scales[key] = found
    if not scales:
        return None
    keys = operation_keys(model)
    unmatched = sorted(set(scales) - set(keys.values()))
    if unmatched:
        msg = (
            f"NNCF scales the input of {', '.join(unmatched[:4])}, which is none of the model's fully connected layers; "
            "mode*W cannot be computed. Use mode='zero' for this model."
        )
        raise nncf.InternalError(msg)
    product: torch.Tensor | None = None
    for hook in scales.get(keys[name], ()):
        scale = hook.scale.detach().reshape(-1)
        product = scale if product is None else product * scale
    return product


def operation_keys(model: nn.Module) -> dict[str, str]:
    """Key in NNCF's hook storage of the activation input of every FC layer, by module name."""
    calls: dict[str, int] = defaultdict(int)
    keys = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if fc_shape(module) is None or "__nncf_hooks" in name:
            continue
        function = _FUNCTION_OF.get(type(module).__name__, "linear")
        operation = "/".join([*_called_path(name, modules), function])
        port = _INPUT_PORT_OF[function]
        keys[name] = f"{operation}/{calls[operation]}__{port}"
        calls[operation] += 1
    return keys


def _called_path(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """The parts of a module's name whose parent is called itself."""
    parts = name.split(".")
    return [
        part
        for index, part in enumerate(parts)
        if not isinstance(modules[".".join(parts[:index])], (nn.ModuleList, nn.ModuleDict))
        and not isinstance(modules[".".join(parts[: index + 1])], (nn.ModuleList, nn.ModuleDict))
    ]
