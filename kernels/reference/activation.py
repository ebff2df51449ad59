# SPDX-License-Identifier: Apache-2.0
"""Activations of gated feed-forward blocks, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # erf
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """
    Apply an activation by name.

    :param x: any shape, any floating dtype.
    :param activation: one of ``ACTIVATIONS``.
    :raises ValueError: for another name.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[activation](x)
