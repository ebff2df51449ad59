# SPDX-License-Identifier: Apache-2.0
"""What SCAP did to a model, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nncf.common.utils.helpers import create_table

from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.pooling import OWN_TOKENS
from scap_nncf.algorithms.scap.site_plan import NATURAL
from scap_nncf.algorithms.sites import expert_pool


@dataclass(frozen=True)
class LayerStatistics:
    """
    :param sparsity: target.
    :param realised_sparsity: share of zeros that the pruner produced since the counters were reset; None where it has
        not run or is not counted.
    :param pattern: ``N:M`` where there is one.
    :param tokens: calibration tokens that reached the layer; None where the plan came without statistics.
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
    tokens: int | None = None


@dataclass(frozen=True)
class ExpertStatistics:
    """
    The experts of one block's layer.

    :param layer: name of the layer with ``*`` for the expert.
    :param tokens: calibration tokens of each expert, None where the plan came without statistics.
    :param starved: how many experts were planned on their siblings' statistics in part.
    :param silent: how many of these no token reached.
    :param realised_range: smallest and largest realised sparsity of an expert, None where none was counted.
    """

    layer: str
    experts: int
    tokens: tuple[int, ...] | None
    starved: int
    silent: int
    threshold_range: tuple[float, float]
    realised_range: tuple[float, float] | None


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

    def experts(self) -> tuple[ExpertStatistics, ...]:
        """One row for each layer that a mixture-of-experts block has once an expert."""
        pools: dict[str, list[LayerStatistics]] = {}
        for layer in self.layers:
            pool = expert_pool(layer.name)
            if pool is not None:
                pools.setdefault(pool, []).append(layer)
        return tuple(_experts(pool, layers) for pool, layers in pools.items())

    def __str__(self) -> str:
        experts: list[list[Any]] = [
            [
                row.layer,
                row.experts,
                "-" if row.tokens is None else f"{min(row.tokens)} .. {max(row.tokens)}",
                row.starved,
                row.silent,
                _range(row.threshold_range),
                "-" if row.realised_range is None else " .. ".join(map(_percent, row.realised_range)),
            ]
            for row in self.experts()
        ]
        header = ["Experts", "Number", "Tokens", f"Under {OWN_TOKENS}", "Never ran", "Threshold", "Realised"]
        return self._role_table() + ("\n" + create_table(header=header, rows=experts) if experts else "")

    def _role_table(self) -> str:
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
        table = create_table(header=["Role", "Layers", "Target", "Realised", "Mode", selection], rows=rows)
        natural = [layer for layer in self.layers if layer.mode_method == NATURAL]
        if natural:
            roles = ", ".join(dict.fromkeys(layer.role for layer in natural))
            table += f"\n{len(natural)} layers ({roles}) drop only inputs that are zero anyway: no loss (τ = 0)."
        return table


def make_statistics(
    plan: Plan, counts: dict[str, tuple[int, int]], tokens: Mapping[str, int] | None = None
) -> ScapStatistics:
    """
    :param counts: zeros and values counted at the input of each layer.
    :param tokens: calibration tokens of each site.
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
                    tokens=(tokens or {}).get(site.name),
                )
            )
    return ScapStatistics(tuple(layers), plan.prune)


def _weighted(layers: Sequence[LayerStatistics], attribute: str) -> float | None:
    counted = [(layer, getattr(layer, attribute)) for layer in layers if getattr(layer, attribute) is not None]
    weights = sum(layer.in_features * layer.out_features for layer, _ in counted)
    if not weights:
        return None
    return sum(layer.in_features * layer.out_features * value for layer, value in counted) / weights


def _experts(pool: str, layers: Sequence[LayerStatistics]) -> ExpertStatistics:
    tokens = tuple(layer.tokens for layer in layers if layer.tokens is not None)
    thresholds = [layer.threshold for layer in layers]
    realised = [layer.realised_sparsity for layer in layers if layer.realised_sparsity is not None]
    return ExpertStatistics(
        pool,
        len(layers),
        tokens if len(tokens) == len(layers) else None,
        sum(count < OWN_TOKENS for count in tokens),
        sum(count == 0 for count in tokens),
        (min(thresholds), max(thresholds)),
        (min(realised), max(realised)) if realised else None,
    )


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
