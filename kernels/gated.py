# SPDX-License-Identifier: Apache-2.0
"""Gated feed-forwards, recognised by what they compute: ``down(activation(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import nn

from . import reference

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class GatedFeedForward:
    """
    :param inputs: child names of (gate, up), or of the one layer whose outputs are gate | up.
    :param down: child name of the last layer.
    :param activation: a name that the kernels know.
    """

    inputs: tuple[str, ...]
    down: str
    activation: str


def recognise(module: nn.Module, layers: Sequence[str]) -> GatedFeedForward | None:
    """
    Whether a module is a gated feed-forward and nothing else.

    Its FC layers are replaced, for one call, by cheap known functions; the result tells which of them is which, which
    activation it is, and that nothing else happens. No class name is looked at, and no weight is touched.

    :param module: the candidate. It must hold no parameters but those of its FC layers.
    :param layers: names of its children that are FC layers.
    :return: None where the module is something else.
    """
    own = {id(p) for name in layers for p in module.get_submodule(name).parameters()}
    if len(layers) not in (2, 3) or any(id(p) not in own for p in module.parameters()):
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    for roles in permutations(layers):
        *inputs, down = roles
        activation = _activation(module, tuple(inputs), down)
        if activation is not None:
            return GatedFeedForward(tuple(inputs), down, activation)
    return None


class _Known(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _gate(x: torch.Tensor) -> torch.Tensor:
    return 0.7 * x + 0.1


def _up(x: torch.Tensor) -> torch.Tensor:
    return 1.3 * x - 0.2


def _down(x: torch.Tensor) -> torch.Tensor:
    return 0.9 * x + 0.3


def _activation(module: nn.Module, inputs: tuple[str, ...], down: str) -> str | None:
    # dense around zero, where activations differ, and far out, where some models clamp
    x = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([-300.0, -40.0, -12.0, 12.0, 40.0, 300.0])]).reshape(
        1, 1, -1
    )
    functions = {down: _down}
    if len(inputs) == 1:
        functions[inputs[0]] = lambda v: torch.cat([_gate(v), _up(v)], dim=-1)
    else:
        functions |= {inputs[0]: _gate, inputs[1]: _up}
    children, training = module._modules, [m for m in module.modules() if m.training]
    before = {name: children[name] for name in functions}
    try:
        module.eval()
        children.update({name: _Known(function) for name, function in functions.items()})
        with torch.no_grad():
            result = module.forward(x)
    except Exception:  # whatever it is, it is no plain gated feed-forward
        return None
    finally:
        children.update(before)
        for m in training:
            m.training = True
    if not isinstance(result, torch.Tensor) or result.shape != x.shape:
        return None
    for name in ACTIVATIONS:
        if torch.allclose(result, _down(reference.activate(_gate(x), name) * _up(x)), rtol=1e-5, atol=1e-5):
            return name
    return None
