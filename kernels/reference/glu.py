# SPDX-License-Identifier: Apache-2.0
"""The gated input half of a feed-forward block: the definition."""

from __future__ import annotations

import torch

from .activation import activate
from .fc import accumulation_dtype
from .prune import prune


def sparse_glu(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate_threshold: float,
    up_threshold: float,
    mode: float = 0.0,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    ``activation(gate) * up`` with gate and up two FC layers over one centred tensor.

    :param x: [..., K].
    :param weight: [K, 2N], input-channel-major: gate's columns, then up's.
    :param gate_threshold: τ of gate.
    :param up_threshold: τ of up.
    :param mode: η of the tensor.
    :param activation: silu, gelu, gelu_tanh, relu or relu2.
    :param bias: [2N], already fused.
    :return: [..., N] in the dtype of `x`.
    """
    wide = accumulation_dtype(x.dtype)
    w_gate, w_up = weight.to(wide).chunk(2, dim=1)  # [K, N] each
    gate = prune(x.to(wide), mode, gate_threshold) @ w_gate
    up = prune(x.to(wide), mode, up_threshold) @ w_up
    if bias is not None:
        b_gate, b_up = bias.to(wide).chunk(2)
        gate, up = gate + b_gate, up + b_up
    return (activate(gate, activation) * up).to(x.dtype)
