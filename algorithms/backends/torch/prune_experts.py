# SPDX-License-Identifier: Apache-2.0
"""Simulated pruning of fused experts: thresholds, modes and η·W of every expert, looked up row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import nncf
import torch
from torch import nn

from scap_nncf.algorithms.backends.torch.experts import ExpertLayer, Rows, Stage, projections
from scap_nncf.algorithms.backends.torch.weights import expert_column_sums
from scap_nncf.algorithms.plan import LayerPlan, SitePlan
from scap_nncf.kernels.reference import prune_nm


class ExpertsPruner(Stage):
    """
    The pruning at the inputs of all experts of one module.

    :param layers: expert layer → its plan and mode; what is missing stays dense.
    :param decode_only: prune only tokens that come alone. Experts see a flattened batch: one token in all.
    :raises nncf.ParameterNotSupportedError: the plan of a layer has vectors or error mitigation, or the experts of one
        projection have different N:M patterns.
    """

    def __init__(
        self,
        model: nn.Module,
        module_name: str,
        layers: Mapping[ExpertLayer, tuple[LayerPlan, float]],
        decode_only: bool,
    ) -> None:
        module = model.get_submodule(module_name)
        self.module_name = module_name
        self.decode_only = decode_only
        self.enabled = True
        self.counting = True
        self.traced = False  # an export has seen this pruning
        self.forced: bool | None = None  # see scap_nncf.algorithms.backends.torch.prune.token_policy
        self.counted: torch.Tensor | None = None
        self._patterns: dict[str, tuple[int, int]] = {}
        _check(layers)
        self.names: dict[str, list[str | None]] = {}  # projection → name of each expert's layer, where it is planned
        self._widths: dict[str, int] = {}
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = {}
        self._counts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for projection, (width, _) in projections(module).items():
            experts = module._parameters[projection].shape[0]  # type: ignore[union-attr]
            thresholds, modes = [-1.0] * experts, [0.0] * experts
            names: list[str | None] = [None] * experts
            for layer, (plan, mode) in layers.items():
                if layer.projection == projection:
                    names[layer.expert] = plan.name
                    thresholds[layer.expert] = plan.threshold
                    # a layer that keeps everything is not centred either
                    modes[layer.expert] = mode if plan.prunes else 0.0
                    if plan.pattern is not None:
                        self._patterns[projection] = plan.pattern
            if not any(threshold >= 0 for threshold in thresholds) and projection not in self._patterns:
                continue
            self.names[projection], self._widths[projection] = names, width
            # float64 holds float32 values exactly; they are compared in the precision of the activation
            mode_table = torch.tensor(modes, dtype=torch.float64) if any(modes) else None
            correction = None
            if mode_table is not None:
                sums = expert_column_sums(model, module_name, projection)
                correction = mode_table.to(sums.device, torch.float32).unsqueeze(1) * sums  # [E, OC]
            self._tables[projection] = torch.tensor(thresholds, dtype=torch.float64), mode_table, correction

    @classmethod
    def of_plan(
        cls,
        model: nn.Module,
        module_name: str,
        layers: Iterable[tuple[ExpertLayer, SitePlan, LayerPlan]],
        decode_only: bool,
    ) -> ExpertsPruner:
        """The pruner of the layers of one module, with the site each belongs to."""
        return cls(model, module_name, {found: (plan, site.mode) for found, site, plan in layers}, decode_only)

    def active(self, total: int) -> bool:
        if not (self.enabled and self._tables):
            return False
        return self.forced if self.forced is not None else not self.decode_only or total == 1

    def before(self, projection: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if projection not in self._tables:
            return x
        thresholds, modes, _ = self._on(projection, x.device)
        wide = x if x.dtype == torch.float64 else x.float()
        if modes is not None:
            wide = wide - self._of_rows(modes, rows).to(wide.dtype)
        self.traced = self.traced or rows.experts is None
        if projection in self._patterns:
            z = prune_nm(wide, *self._patterns[projection], None).to(x.dtype)
        else:
            dropped = wide.abs() <= self._of_rows(thresholds, rows).to(wide.dtype)
            z = torch.where(dropped, torch.zeros((), dtype=wide.dtype, device=x.device), wide).to(x.dtype)
        if self.counting and rows.experts is not None and not torch.compiler.is_compiling():
            self._count(projection, z, rows)
        return z

    def after(self, projection: str, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        if projection not in self._tables:
            return y
        correction = self._on(projection, y.device)[2]
        if correction is None:
            return y
        return y + (correction.unsqueeze(1) if rows.experts is None else correction[rows.experts]).to(y.dtype)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Zeros and values at the input of each planned expert layer since the last reset."""
        result = {}
        for projection, names in self.names.items():
            zeros, tokens = self._counts.get(projection, (None, None))
            for expert, name in enumerate(names):
                if name is not None:
                    seen = 0 if tokens is None else int(tokens[expert]) * self._widths[projection]
                    result[name] = (0 if zeros is None else int(zeros[expert]), seen)
        return result

    def reset(self) -> None:
        """Forget the counts."""
        self._counts = {}

    def _count(self, projection: str, z: torch.Tensor, rows: Rows) -> None:
        assert rows.experts is not None
        if projection not in self._counts or self._counts[projection][0].device != z.device:
            size = len(self.names[projection])
            self._counts[projection] = (
                torch.zeros(size, dtype=torch.int64, device=z.device),
                torch.zeros(size, dtype=torch.int64, device=z.device),
            )
        zeros, tokens = self._counts[projection]
        experts = rows.experts.clamp(max=zeros.shape[0] - 1)
        count = torch.ones_like(experts)
        if self.counted is not None and rows.tokens is not None and self.counted.numel() == rows.total:
            count = self.counted.reshape(-1)[rows.tokens].to(experts.dtype)
        zeros.index_add_(0, experts, (z == 0).sum(-1) * count)
        tokens.index_add_(0, experts, count)

    def _on(
        self, projection: str, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        tables = self._tables[projection]
        if any(table is not None and table.device != device for table in tables):
            tables = tuple(None if table is None else table.to(device) for table in tables)  # type: ignore[assignment]
            self._tables[projection] = tables
        return tables

    @staticmethod
    def _of_rows(table: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Each row's value of a table [E]: [S, 1], or [E, 1, 1] while traced."""
        return table.view(-1, 1, 1) if rows.experts is None else table[rows.experts].unsqueeze(1)


def _check(layers: Mapping[ExpertLayer, tuple[LayerPlan, float]]) -> None:
    patterns: dict[str, set[tuple[int, int] | None]] = {}
    for layer, (plan, _) in layers.items():
        patterns.setdefault(layer.projection, set()).add(plan.pattern)
        if plan.token_shift is not None or plan.variance or plan.vectors:
            msg = (
                f"{plan.name} is an expert that shares a parameter with others: it takes thresholds, a mode or an N:M "
                "pattern by magnitude, no vectors and no error mitigation. Leave the experts out with ignored_scope."
            )
            raise nncf.ParameterNotSupportedError(msg)
    mixed = next((projection for projection, found in patterns.items() if len(found) > 1), None)
    if mixed is not None:
        msg = f"The experts' {mixed} have different N:M patterns, or some have none; give all of them the same."
        raise nncf.ParameterNotSupportedError(msg)
