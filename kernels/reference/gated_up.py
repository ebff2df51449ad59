# SPDX-License-Identifier: Apache-2.0
"""The second layer of a gated feed-forward, computed where the gate is open alone (CATS): the definition."""

from __future__ import annotations

import torch

from .activation import activate
from .fc import accumulation_dtype


def open_gate(gate: torch.Tensor, threshold: float, activation: str) -> torch.Tensor:
    """
    ``act(gate)`` where its size exceeds `threshold`, zero elsewhere; NaN stays.

    The activation is rounded to the dtype of `gate` before it is compared, as a model computes it.

    :param gate: [..., N], any floating dtype.
    :return: [..., N] in the accumulation dtype.
    """
    wide = accumulation_dtype(gate.dtype)
    opened = activate(gate.to(wide), activation).to(gate.dtype).to(wide)
    return torch.where(opened.abs() <= threshold, torch.zeros((), dtype=wide, device=gate.device), opened)


def gated_up(
    gate: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    threshold: float,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    ``a * (x @ W^T + b)`` with ``a = act(gate)``, and zero where ``|a| <= threshold`` (CATS, arXiv:2404.08763, eq. 3).

    :param gate: [..., N], the first layer's output before its activation.
    :param x: [..., K].
    :param weight: [N, K], output-channel-major as ``torch.nn.Linear`` stores it: a closed gate's row need not be read.
    :param threshold: τ on the size of the activated gate; negative keeps everything.
    :param activation: silu, gelu, gelu_tanh, relu or relu2.
    :param bias: [N] or None.
    :return: [..., N] in the dtype of `x`.
    """
    wide = accumulation_dtype(x.dtype)
    y = x.to(wide) @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    opened = open_gate(gate, threshold, activation).to(wide)
    return torch.where(opened == 0, torch.zeros((), dtype=wide, device=x.device), opened * y).to(x.dtype)
