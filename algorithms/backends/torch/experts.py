# SPDX-License-Identifier: Apache-2.0
"""
Experts that a mixture-of-experts block holds as 3-D parameters.

transformers 5 keeps the experts of a block in one module: ``gate_up_proj [E, 2I, H]`` (or ``up_proj``) and
``down_proj [E, H, I]``, transposed for some families. No module is called for a single expert, so hooks cannot see one.
Here the module's ``forward`` is taken over, on the instance alone: it computes what the class computes, in the
implementation that the model is set to (``eager``, ``batched_mm`` or ``grouped_mm``) and with the same operations in
the same order, and shows its stages the rows that each expert reads. A stage that leaves the rows as they are changes
no bit of the output.

Every expert counts as FC layers of its own, ``…experts.3.gate_up_proj`` and ``…experts.3.down_proj``.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

_FORWARD = "forward"


@dataclass(frozen=True)
class ExpertLayer:
    """One projection of one expert."""

    module_name: str
    expert: int
    projection: str
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """The name that sites and plans use."""
        return f"{self.module_name}.{self.expert}.{self.projection}"


@dataclass(frozen=True)
class Rows:
    """
    What the rows of an activation [S, K] belong to.

    :param experts: int64 [S], the expert that reads each row; None while a graph is traced, where the activation is
        [E, T, K] and every expert reads every token.
    :param tokens: int64 [S], the token of each row, an index into the flattened batch; None while traced.
    :param total: number of tokens in the flattened batch.
    """

    experts: torch.Tensor | None
    tokens: torch.Tensor | None
    total: int


class Stage:
    """What looks at or changes the rows at the input of a projection. The base class leaves everything as it is."""

    def active(self, total: int) -> bool:
        """Whether the stage takes part in a call with this many tokens; where none does, the class's forward runs."""
        return True

    def before(self, projection: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The input of a projection."""
        return x

    def after(self, projection: str, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The output of a projection."""
        return y


def projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    """
    Projection → (in_features, out_features) of a module that holds fused experts in transformers' layout; empty for
    other modules.
    """
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        return {}
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    result = {}
    for name in names:
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3:
            return {}
        first, second = weight.shape[1:]
        result[name] = (first, second) if module.is_transposed else (second, first)
    return result


def named_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds fused experts in a layout known here."""
    for name, module in model.named_modules():
        if projections(module):
            yield name, module


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """All projections of all fused experts by name, in the order of execution within a module."""
    return {layer.name: layer for name, module in named_experts(model) for layer in layers_of(name, module)}


def layers_of(name: str, module: nn.Module) -> list[ExpertLayer]:
    """The projections of the experts of one module: all first projections, then all second ones."""
    return [
        ExpertLayer(name, expert, projection, *shape)
        for projection, shape in projections(module).items()
        for expert in range(module._parameters[projection].shape[0])  # type: ignore[union-attr]
    ]


def is_patched(module: nn.Module) -> bool:
    """Whether another tool has replaced the forward of this very module."""
    return _FORWARD in module.__dict__ and run_of(module) is None


def run_of(module: nn.Module) -> ExpertsRun | None:
    """The forward of ours on a module, or None."""
    owner = getattr(module.__dict__.get(_FORWARD), "__self__", None)
    return owner if isinstance(owner, ExpertsRun) else None


def attach(module: nn.Module, stage: Stage, first: bool = False) -> None:
    """
    Put a stage into a module's forward.

    :param first: before the stages that are there.
    """
    run = run_of(module)
    if run is None:
        run = ExpertsRun(module)
        module.__dict__[_FORWARD] = types.MethodType(ExpertsRun.forward, run)
    run.stages.insert(0 if first else len(run.stages), stage)


def detach(module: nn.Module, stage: Stage) -> None:
    """Take a stage out; without stages the module is as it was."""
    run = run_of(module)
    if run is None or stage not in run.stages:
        return
    run.stages.remove(stage)
    if not run.stages:
        del module.__dict__[_FORWARD]


class ExpertsRun:
    """The forward of one experts module, with stages."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.stages: list[Stage] = []

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        module = self.module
        hidden, ids, weights = _arguments(type(module), args, kwargs)
        stages = [stage for stage in self.stages if stage.active(hidden.shape[0])]
        if not stages:
            return type(module).forward(module, *args, **kwargs)
        first, second = projections(module)
        if torch.jit.is_tracing():  # for export: no operation whose shape depends on the data
            return _stacked(module, first, second, stages, hidden, ids, weights)
        implementation = getattr(module.config, "_experts_implementation", None)
        if implementation == "batched_mm":
            return _batched(module, first, second, stages, hidden, ids, weights)
        if implementation in ("grouped_mm", "deepgemm"):
            return _grouped(module, first, second, stages, hidden, ids, weights)
        return _eager(module, first, second, stages, hidden, ids, weights)


def _arguments(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Hidden states [T, H], expert ids [T, k], routing weights [T, k]; families name them differently."""
    if not kwargs:
        return list(args)
    return [*args, *(kwargs[name] for name in _parameter_names(kind)[len(args) :])]


@lru_cache(maxsize=64)
def _parameter_names(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:4]  # type: ignore[attr-defined]


def _through(stages: list[Stage], projection: str, x: torch.Tensor, rows: Rows, linear: Any) -> torch.Tensor:
    for stage in stages:
        x = stage.before(projection, x, rows)
    y = linear(projection, x)
    for stage in stages:
        y = stage.after(projection, y, rows)
    return y


def _gate(module: nn.Module, y: torch.Tensor) -> torch.Tensor:
    return module._apply_gate(y) if module.has_gate else module.act_fn(y)  # type: ignore[operator]


def _weight(module: nn.Module, projection: str) -> torch.Tensor:
    return getattr(module, projection)


def _bias(module: nn.Module, projection: str) -> torch.Tensor | None:
    return getattr(module, f"{projection}_bias") if module.has_bias else None


def _eager(
    module: nn.Module,
    first: str,
    second: str,
    stages: list[Stage],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """One product an expert, in the order of the experts, as the modelling code of each family has it."""
    count = _weight(module, first).shape[0]
    flat = ids.t().reshape(-1)  # [k·T]: within an expert, rows are ordered by rank, then by token
    order = torch.argsort(flat, stable=True)
    order = order[flat[order] < count]  # ids of experts on other devices come as `count`
    experts, tokens = flat[order], order % ids.shape[0]
    scale = weights.t().reshape(-1)[order].unsqueeze(-1)  # [S, 1]
    ends = torch.bincount(experts, minlength=count).cumsum(0).tolist()
    segments = [(expert, start, end) for expert, (start, end) in enumerate(zip([0, *ends], ends)) if end > start]

    def linear(projection: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = _weight(module, projection), _bias(module, projection)
        parts = []
        for expert, start, end in segments:
            part = x[start:end]
            y = part @ weight[expert] if module.is_transposed else nn.functional.linear(part, weight[expert])
            parts.append(y if bias is None else y + bias[expert])
        out_features = weight.shape[2 if module.is_transposed else 1]
        return torch.cat(parts) if parts else x.new_zeros(0, out_features)

    rows = Rows(experts, tokens, hidden.shape[0])
    y = _through(stages, first, hidden[tokens], rows, linear)
    # expert by expert as well: the last bit of an activation function may depend on the place in a vector register
    y = torch.cat([_gate(module, y[start:end]) for _, start, end in segments] or [_gate(module, y)])
    y = _through(stages, second, y, rows, linear) * scale
    result = torch.zeros_like(hidden)
    for _, start, end in segments:
        result.index_add_(0, tokens[start:end], y[start:end].to(hidden.dtype))
    return result


def _batched(
    module: nn.Module,
    first: str,
    second: str,
    stages: list[Stage],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """As ``transformers.integrations.moe.batched_mm_experts_forward``: gathers an expert's weights for each row."""
    from transformers.integrations.moe import _batched_linear

    count, ranks = _weight(module, first).shape[0], ids.shape[-1]
    tokens = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1).expand(-1, ranks).reshape(-1)
    flat = ids.reshape(-1)
    elsewhere = flat >= count
    experts = flat.clamp(0, count - 1)

    def linear(projection: str, x: torch.Tensor) -> torch.Tensor:
        bias = _bias(module, projection)
        selected = None if bias is None else bias[experts]
        return _batched_linear(
            x, _weight(module, projection)[experts], bias=selected, is_transposed=module.is_transposed
        )

    rows = Rows(experts, tokens, hidden.shape[0])
    y = _gate(module, _through(stages, first, hidden[tokens], rows, linear))
    y = _through(stages, second, y, rows, linear) * weights.reshape(-1).unsqueeze(-1)
    y = y.masked_fill(elsewhere.unsqueeze(-1), 0.0)
    return y.view(hidden.shape[0], ranks, hidden.shape[-1]).sum(dim=1).to(hidden.dtype)


def _grouped(
    module: nn.Module,
    first: str,
    second: str,
    stages: list[Stage],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """As ``transformers.integrations.moe.grouped_mm_experts_forward``: rows sorted by expert, one grouped product."""
    from transformers.integrations.moe import _grouped_linear

    count, ranks = _weight(module, first).shape[0], ids.shape[-1]
    tokens = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1).expand(-1, ranks).reshape(-1)
    flat = ids.reshape(-1)
    order = torch.argsort(flat)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    experts, tokens = flat[order], tokens[order]
    histogram = torch.histc(
        experts.float() if hidden.device.type == "cpu" else experts.int(), bins=count, min=0, max=count - 1
    )
    offsets = torch.cumsum(histogram, dim=0, dtype=torch.int32)

    def linear(projection: str, x: torch.Tensor) -> torch.Tensor:
        bias = _bias(module, projection)
        selected = None if bias is None else bias[experts]
        return _grouped_linear(
            x, _weight(module, projection), offsets, bias=selected, is_transposed=module.is_transposed
        )

    rows = Rows(experts, tokens, hidden.shape[0])
    y = _gate(module, _through(stages, first, hidden[tokens], rows, linear))
    y = _through(stages, second, y, rows, linear) * weights.reshape(-1)[order].unsqueeze(-1)
    return y[inverse].view(hidden.shape[0], ranks, hidden.shape[-1]).sum(dim=1).to(hidden.dtype)


def _stacked(
    module: nn.Module,
    first: str,
    second: str,
    stages: list[Stage],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Every expert on every token [E, T, K], weighted by a dense routing matrix: a graph without data-made shapes."""
    count = _weight(module, first).shape[0]
    routing = torch.zeros(hidden.shape[0], count, device=hidden.device, dtype=hidden.dtype)
    routing = routing.scatter(1, ids, weights.to(hidden.dtype))

    def linear(projection: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = _weight(module, projection), _bias(module, projection)
        y = torch.bmm(x, weight if module.is_transposed else weight.transpose(1, 2))
        return y if bias is None else y + bias.unsqueeze(1)

    rows = Rows(None, None, hidden.shape[0])
    x = hidden.unsqueeze(0).repeat(count, 1, 1)
    y = _gate(module, _through(stages, first, x, rows, linear))
    y = _through(stages, second, y, rows, linear)
    return (y * routing.transpose(0, 1).unsqueeze(-1)).sum(dim=0)
