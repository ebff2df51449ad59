# SPDX-License-Identifier: Apache-2.0
"""
Stand-ins for layers of GPTQ and AWQ checkpoints, from the published formats: packed integers, no ``weight``, a forward
of their own. The packages that run such checkpoints compile for minutes, so the tests take these.
"""

from __future__ import annotations

import torch
from torch import nn

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # place of each of eight neighbouring columns in an int32


def _pack(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """4-bit values [..., 8n] → int32 [..., n], the first of `order` in the lowest bits."""
    groups = values.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    packed = sum(groups[..., place] << (4 * place) for place in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _unpack(packed: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    places = torch.stack([(packed.to(torch.int64) >> (4 * place)) & 15 for place in range(8)], -1)
    values = torch.empty_like(places)
    values[..., list(order)] = places
    return values.flatten(-2)


class _Packed(nn.Module):
    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = linear.in_features, linear.out_features, group
        weight = linear.weight.detach().t()  # [IC, OC]
        groups = weight.unflatten(0, (-1, group))
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)  # [G, OC]
        self.register_buffer("scales", (high - low).clamp(min=1e-8) / 15)
        zeros = (-low / self.scales).round()
        repeat = torch.arange(self.in_features) // group
        self.integers = (weight / self.scales[repeat] + zeros[repeat]).round().clamp(0, 15), zeros
        self.bias = linear.bias

    def matrix(self) -> torch.Tensor:
        """[IC, OC]"""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.matrix().to(x.dtype)
        return y if self.bias is None else y + self.bias


class GptqLinear(_Packed):
    """``qweight`` int32 [IC/8, OC], ``qzeros`` [G, OC/8] less one, ``scales`` [G, OC], ``g_idx`` [IC]."""

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__(linear, group)
        values, zeros = self.__dict__.pop("integers")
        self.register_buffer("qweight", _pack(values.t()).t().contiguous())
        self.register_buffer("qzeros", _pack((zeros - 1) % 16))
        self.register_buffer("g_idx", torch.arange(self.in_features) // group)

    def matrix(self) -> torch.Tensor:
        zeros = (_unpack(self.qzeros) + 1) % 16
        return self.scales[self.g_idx] * (_unpack(self.qweight.t()).t() - zeros[self.g_idx])


class AwqLinear(_Packed):
    """``qweight`` int32 [IC, OC/8] and ``qzeros`` [G, OC/8], columns interleaved; ``scales`` [G, OC]."""

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__(linear, group)
        values, zeros = self.__dict__.pop("integers")
        self.register_buffer("qweight", _pack(values, _AWQ_ORDER))
        self.register_buffer("qzeros", _pack(zeros, _AWQ_ORDER))

    def matrix(self) -> torch.Tensor:
        group = torch.arange(self.in_features) // self.group_size
        return self.scales[group] * (_unpack(self.qweight, _AWQ_ORDER) - _unpack(self.qzeros, _AWQ_ORDER)[group])
