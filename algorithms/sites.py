# SPDX-License-Identifier: Apache-2.0
"""What can be pruned in a model, independent of the backend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nncf.common.utils.helpers import create_table

_EXPERT = re.compile(r"^(?P<before>(?:.*\.)?experts)\.(?:expert_)?(?P<index>\d+)\.(?P<after>.+)$")


def expert_pool(name: str) -> str | None:
    """
    What a layer of a mixture-of-experts expert has in common with the same layer of the block's other experts:
    its name with ``*`` for the number of the expert. None for other layers.
    """
    found = _EXPERT.match(name)
    return None if found is None else f"{found['before']}.*.{found['after']}"


@dataclass(frozen=True)
class Layer:
    """
    A fully connected (FC) layer.

    :param name: module name (torch) or node name without the operation suffix (OpenVINO).
    :param role: canonical name of the projection in its block, see :mod:`scap_nncf.algorithms.roles`.
    :param in_features: input channels IC.
    :param out_features: output channels OC.
    """

    name: str
    role: str
    in_features: int
    out_features: int

    @property
    def weights(self) -> int:
        """Number of weight elements, the unit in which sparsity is weighted over layers."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Site:
    """
    An activation tensor that is pruned once and read by one or more FC layers.

    :param name: name of the first layer that reads it.
    :param block: index of the transformer block, or None outside of blocks.
    :param layers: the layers that read the tensor, in the order of execution.
    """

    name: str
    block: int | None
    layers: tuple[Layer, ...]

    @property
    def width(self) -> int:
        """Input channels."""
        return self.layers[0].in_features


@dataclass(frozen=True)
class LeftOut:
    """An FC-like module that stays dense, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class ModelReport:
    """
    What would be pruned in a model and what would not; ``str()`` is a table.

    :param notes: what else is worth knowing, a sentence each.
    """

    sites: tuple[Site, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows: list[list[Any]] = []
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            key = tuple((layer.role, layer.in_features, layer.out_features) for layer in site.layers)
            groups.setdefault(key, []).append(site)
        for key, sites in groups.items():
            blocks = [site.block for site in sites if site.block is not None]
            where = f"{min(blocks)}-{max(blocks)}" if blocks else "-"
            shapes = " ".join(f"{in_features}x{out}" for _, in_features, out in key)
            rows.append([" ".join(role for role, _, _ in key), shapes, len(sites), where, sites[0].name])
        text = create_table(header=["Roles", "Shapes (IC x OC)", "Sites", "Blocks", "First layer"], rows=rows)
        if self.left_out:
            rows = [[item.name, item.kind, item.reason] for item in self.left_out]
            text += "\nLeft dense:\n" + create_table(header=["Module", "Kind", "Reason"], rows=rows)
        if self.notes:
            text += "\n" + "\n".join(self.notes)
        return text
