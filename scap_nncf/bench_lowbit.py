# SPDX-License-Identifier: Apache-2.0
"""
Dense 8- and 4-bit layers to compare with: the fastest that PyTorch itself has.

4 bits: tinygemm (``aten._weight_int4pack_mm``, groups along the input channels, bfloat16). 8 bits: integers times a
scale per output, which ``torch.compile`` fuses into the matrix product. Both as in gpt-fast.
"""

from __future__ import annotations

from collections.abc import Callable

import nncf
import torch
import torch.nn.functional as F
from torch import nn

from scap_nncf.algorithms.plan import block_index

GROUP = 128


class Int8Dense(nn.Module):
    """Weight-only 8-bit layer: ``(x @ W8ᵀ) · scale + b``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        self.register_buffer("values", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.values.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class Int4Dense(nn.Module):
    """
    Weight-only 4-bit layer on tinygemm, asymmetric in groups of input channels.

    :raises nncf.ParameterNotSupportedError: the layer is not bfloat16, or its shape does not fit tinygemm.
    """

    def __init__(self, linear: nn.Linear, group: int = GROUP) -> None:
        super().__init__()
        weight = linear.weight.detach()
        n, k = weight.shape
        if weight.dtype != torch.bfloat16 or n % 8 or k % 128 or group not in (32, 64, 128, 256):
            msg = f"tinygemm takes bfloat16 weights with N % 8 == 0 and K % 128 == 0, got {weight.dtype} [{n}, {k}]."
            raise nncf.ParameterNotSupportedError(msg)
        self.group, self.out_features = group, n
        groups = weight.float().reshape(n, k // group, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-6) / 15
        values = ((groups - low) / scale).round().clamp(0, 15).to(torch.int32).reshape(n, k)
        self.in_features = k
        pairs = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        # w = (q - 8) * scale + zero
        zero = low + 8 * scale
        tables = torch.stack([scale[..., 0].t(), zero[..., 0].t()], dim=-1).to(torch.bfloat16).contiguous()
        self.register_buffer("packed", packed)
        self.register_buffer("tables", tables)  # [K / group, N, 2]
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm(flat, self.packed, self.group, self.tables)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def make_dense(model: nn.Module, bits: int) -> nn.Module:
    """Replace every FC layer of the blocks by a dense low-bit one, in place."""
    layer: Callable[[nn.Linear], nn.Module] = Int4Dense if bits == 4 else Int8Dense
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and block_index(name) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer(module))
            module.weight = None  # type: ignore[assignment]
    return model


def compress(model: nn.Module, bits: int, group: int = GROUP) -> nn.Module:
    """``nncf.compress_weights`` over the FC layers of the blocks: 4 bits in groups, or 8 bits a row; both symmetric."""
    device = next(model.parameters()).device
    sample = {"input_ids": torch.arange(1, 9, device=device).unsqueeze(0)}
    settings = {"mode": nncf.CompressWeightsMode.INT8_SYM}
    if bits == 4:
        settings = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": group, "ratio": 1.0, "all_layers": False}
    outside = nncf.IgnoredScope(patterns=[".*embed_tokens.*", ".*lm_head.*"], validate=False)
    return nncf.compress_weights(model, dataset=nncf.Dataset([sample]), ignored_scope=outside, **settings)
