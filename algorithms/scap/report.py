# SPDX-License-Identifier: Apache-2.0
"""What SCAP did to a model, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nncf.common.utils.helpers import create_table

from scap_nncf.algorithms.plan import Plan


@dataclass(frozen=True)
class LayerStatistics:
    """
    :param sparsity: target.
    :param realised_sparsity: share of zeros that the pruner produced since the counters were reset; None where it has
        not run or is not counted.
    :param pattern: ``N:M`` where there is one.
    """

    name: str
    role: str
    block: int | None
    site: str
    in_features: int
    out_features: int
    mode: float
    mode_method: str
    threshold: float
    sparsity: float
    realised_sparsity: float | None
    pattern: str | None = None


@dataclass(frozen=True)
class RoleStatistics:
    """Layers of one role together; sparsity is weighted by weight elements."""

    role: str
    layers: int
    sparsity: float
    realised_sparsity: float | None
    mode_range: tuple[float, float]
    threshold_range: tuple[float, float]
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScapStatistics:
    """Statistics of a sparse model; ``str()`` is a table per role."""

    layers: tuple[LayerStatistics, ...]
    prune: str

    @property
    def sparsity(self) -> float:
        """Target sparsity over the pruned layers, weighted by weight elements."""
        return _weighted(self.layers, "sparsity") or 0.0

    @property
    def realised_sparsity(self) -> float | None:
        """Realised sparsity over the layers that were counted, weighted by weight elements; None if none was."""
        return _weighted(self.layers, "realised_sparsity")

    def roles(self) -> tuple[RoleStatistics, ...]:
        """One row a role, in the order of execution."""
        names = list(dict.fromkeys(layer.role for layer in self.layers))
        return tuple(_role(name, [layer for layer in self.layers if layer.role == name]) for name in names)

    def __str__(self) -> str:
        rows: list[list[Any]] = [
            [
                row.role,
                row.layers,
                _percent(row.sparsity),
                _percent(row.realised_sparsity),
                _range(row.mode_range),
                ", ".join(row.patterns) or _range(row.threshold_range),
            ]
            for row in self.roles()
        ]
        rows.append(["all", len(self.layers), _percent(self.sparsity), _percent(self.realised_sparsity), "", ""])
        selection = "Pattern" if any(layer.pattern for layer in self.layers) else "Threshold"
        return create_table(header=["Role", "Layers", "Target", "Realised", "Mode", selection], rows=rows)


def make_statistics(plan: Plan, counts: dict[str, tuple[int, int]]) -> ScapStatistics:
    """
    :param counts: zeros and values counted at the input of each layer.
    """
    layers = []
    for site in plan.sites:
        for layer in site.layers:
            zeros, total = counts.get(layer.name, (0, 0))
            layers.append(
                LayerStatistics(
                    name=layer.name,
                    role=layer.role,
                    block=site.block,
                    site=site.name,
                    in_features=layer.in_features,
                    out_features=layer.out_features,
                    mode=site.mode,
                    mode_method=site.mode_method,
                    threshold=layer.threshold,
                    sparsity=layer.sparsity,
                    realised_sparsity=zeros / total if total else None,
                    pattern=None if layer.pattern is None else "{}:{}".format(*layer.pattern),
                )
            )
    return ScapStatistics(tuple(layers), plan.prune)


def _weighted(layers: Sequence[LayerStatistics], attribute: str) -> float | None:
    counted = [(layer, getattr(layer, attribute)) for layer in layers if getattr(layer, attribute) is not None]
    weights = sum(layer.in_features * layer.out_features for layer, _ in counted)
    if not weights:
        return None
    return sum(layer.in_features * layer.out_features * value for layer, value in counted) / weights


def _role(role: str, layers: Sequence[LayerStatistics]) -> RoleStatistics:
    modes, thresholds = [layer.mode for layer in layers], [layer.threshold for layer in layers]
    return RoleStatistics(
        role,
        len(layers),
        _weighted(layers, "sparsity") or 0.0,
        _weighted(layers, "realised_sparsity"),
        (min(modes), max(modes)),
        (min(thresholds), max(thresholds)),
        tuple(dict.fromkeys(layer.pattern for layer in layers if layer.pattern is not None)),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _range(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
