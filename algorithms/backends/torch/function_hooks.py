# SPDX-License-Identifier: Apache-2.0
"""
What NNCF multiplies the input of an FC layer with (AWQ, SmoothQuant), for the fused bias b + η·W.

NNCF hangs that multiplication on the *function* call, under a name made of the modules on the call stack and a running
number: the fourth ``mlp.down_proj`` that runs is ``model/mlp/down_proj/linear/3``. The name cannot be told from the
module tree (members of a ``ModuleList`` lose their index, a module whose parent is not called loses its prefix), so one
forward pass is watched, and the result is kept with the model.
"""

from __future__ import annotations

from typing import Any

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.layers import named_fc_layers
from scap_nncf.algorithms.backends.torch.run import evaluation, forward_sample

_KEPT = "_scap_input_scales"
#: Functions that compute an FC layer, and the port of the activation.
_FUNCTIONS = (("linear", 0), ("addmm", 1), ("matmul", 0))


def input_scale(model: nn.Module, name: str) -> torch.Tensor | None:
    """
    :param model: a model wrapped by NNCF.
    :param name: module name of an FC layer.
    :return: what NNCF multiplies the layer's input with, [in_features], or None where it does not.
    :raises nncf.ValidationError: the model has to be watched for that, and cannot be called with its dummy inputs.
    """
    scales = _scales(model)
    if not scales:
        return None
    keys = resolve(model)
    if name not in keys:
        return None
    product: torch.Tensor | None = None
    for hook in scales[keys[name]]:
        scale = hook.scale.detach().reshape(-1)
        product = scale if product is None else product * scale
    return product


def resolve(model: nn.Module, sample: Any = None) -> dict[str, str]:
    """
    The layers whose input NNCF multiplies: layer name → key of the hook. Empty for models that NNCF has not wrapped.

    :param sample: what the model can be called with; default: its dummy inputs.
    :raises nncf.ValidationError: the model cannot take the sample or its dummy inputs.
    """
    scales = _scales(model)
    kept = model.__dict__.get(_KEPT)
    if kept is not None and set(kept.values()) == set(scales):
        return kept
    found = _watch(model, scales, sample) if scales else {}
    model.__dict__[_KEPT] = found
    return found


def keep(model: nn.Module, keys: dict[str, str]) -> None:
    """
    Set what :func:`resolve` returns, where it is known from before (a saved model).

    :raises nncf.ValidationError: a key is none of the model's hooks.
    """
    unknown = sorted(set(keys.values()) - set(_scales(model)))
    if unknown:
        msg = f"No multiplication of NNCF at {', '.join(unknown[:3])} in the model, which the saved description names."
        raise nncf.ValidationError(msg)
    model.__dict__[_KEPT] = dict(keys)


def _watch(model: nn.Module, scales: dict[str, Any], sample: Any) -> dict[str, str]:
    from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode

    from scap_nncf.algorithms.backends.torch.examples import example_inputs

    found: dict[str, str] = {}

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            modes = [m for m in torch.overrides._get_current_function_mode_stack() if isinstance(m, FunctionHookMode)]
            if not modes:
                return
            path = modes[-1].get_current_relative_name()
            for function, port in _FUNCTIONS:
                operation = f"{path}/{function}"
                key = f"{operation}/{modes[-1].op_calls.get(operation, 0)}__{port}"
                if key in scales:
                    found[name] = key

        return hook

    handles = [module.register_forward_pre_hook(make_hook(name)) for name, module, _ in named_fc_layers(model)]
    given = sample if sample is not None else example_inputs(model)
    try:
        with evaluation(model):
            forward_sample(model, given, "the model's dummy inputs" if sample is None else "the first sample")
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(scales) - set(found.values()))
    if missing:
        msg = (
            f"NNCF multiplies the input of {', '.join(missing[:4])}, which is none of the fully connected layers that "
            "ran, so mode*W cannot be computed. Use mode='zero' for this model."
        )
        raise nncf.ValidationError(msg)
    return found


def _scales(model: nn.Module) -> dict[str, list[Any]]:
    from nncf.torch.function_hook.wrapper import get_hook_storage, is_wrapped
    from nncf.torch.quantization.layers import SQMultiply

    if not is_wrapped(model):
        return {}
    result = {}
    for key, hooks in get_hook_storage(model).pre_hooks.items():
        found = [hook for hook in hooks.values() if isinstance(hook, SQMultiply)]
        if found:
            result[key] = found
    return result
