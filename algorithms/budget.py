# SPDX-License-Identifier: Apache-2.0
"""
A budget: what may be lost, or what must be gained, instead of a sparsity.

Bytes and speed follow from the plan by arithmetic (:class:`Traffic`, :class:`KernelTable`); the loss is measured.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from numpy.typing import NDArray

from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.sites import Layer, Site

METRICS = ("perplexity",)
#: No budget is filled beyond this mean sparsity of the pruned layers.
MOST = 0.95
_TABLE = "speed_h100.json"


class BudgetError(nncf.ValidationError):
    """A budget that cannot be met; the message has what can be reached."""


@dataclass(frozen=True)
class Budget:
    """
    .. code-block:: python

        nncf.compress(model, algorithm="scap", dataset=dataset, budget=Budget(max_loss="1%"))

    Give one of the first three. `max_loss` takes the most sparsity that loses no more; `bytes` and `speedup` take the
    least sparsity that suffices.

    :param max_loss: largest relative rise of the metric over the dense model's: ``"1%"`` or ``0.01``.
    :param bytes: largest share of the bytes of weights that a decoded token reads in fully connected layers, of the
        whole model (the output layer included, pruned or not), that may be left: ``0.55`` or ``"55%"``.
    :param speedup: smallest predicted speed-up of these layers at batch 1, from measured kernel times.
    :param metric: ``perplexity``.
    :param kernels: the kernel times for `speedup`: a JSON file written by ``scap-nncf bench kernel``, or None for those
        of an H100 that ship with the package.
    :param tolerance: how close to the budget to go, as a share of sparsity.
    """

    max_loss: float | str | None = None
    bytes: float | str | None = None
    speedup: float | None = None
    metric: str = "perplexity"
    kernels: str | None = None
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        given = [name for name in ("max_loss", "bytes", "speedup") if getattr(self, name) is not None]
        if len(given) != 1:
            msg = f"A budget has one of max_loss, bytes and speedup; given: {', '.join(given) or 'none'}."
            raise nncf.ValidationError(msg)
        if self.metric not in METRICS:
            msg = f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}."
            raise nncf.ValidationError(msg)
        if self.max_loss is not None:
            object.__setattr__(self, "max_loss", _share(self.max_loss, "max_loss", 0.0, 10.0))
        if self.bytes is not None:
            object.__setattr__(self, "bytes", _share(self.bytes, "bytes", 0.0, 1.0))
        if self.speedup is not None and not (
            isinstance(self.speedup, (int, float)) and not isinstance(self.speedup, bool) and 1 <= self.speedup < 100
        ):
            msg = f"speedup must be a number from 1, got {self.speedup!r}."
            raise nncf.ValidationError(msg)
        if not 0 < self.tolerance < 0.2:
            msg = f"tolerance must be a share in (0, 0.2), got {self.tolerance!r}."
            raise nncf.ValidationError(msg)

    def __str__(self) -> str:
        if self.max_loss is not None:
            return f"at most {100 * float(self.max_loss):g} % higher {self.metric}"
        if self.bytes is not None:
            return f"at most {100 * float(self.bytes):g} % of the bytes of weights"
        return f"a predicted speed-up of {self.speedup:g}"


def _share(value: Any, name: str, low: float, high: float) -> float:
    try:
        number = float(value.strip().removesuffix("%")) / 100 if _is_percent(value) else float(value)
    except (TypeError, ValueError, AttributeError):
        number = math.nan
    if isinstance(value, bool) or not low <= number <= high:
        msg = f'{name} must be a share such as 0.01 or "1%", from {low:g} to {high:g}; got {value!r}.'
        raise nncf.ValidationError(msg)
    return number


def _is_percent(value: Any) -> bool:
    return isinstance(value, str) and value.strip().endswith("%")


# -- what a plan costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """
    Bytes of weights that a token reads in the fully connected layers of a model.

    :param sites: what a plan may prune.
    :param others: layers that no plan prunes, such as the output layer.
    :param bytes_of: layer name → bytes of its weights, scales included.
    """

    sites: tuple[Site, ...]
    others: tuple[Layer, ...]
    bytes_of: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes that the dense model reads."""
        return sum(self.bytes_of.values())

    def left(self, plan: Plan) -> float:
        """Share of the dense model's bytes that are left to read at the plan's targets."""
        skipped = sum(self.bytes_of[layer.name] * layer.sparsity for layer in plan.layers)
        return 1 - skipped / self.total


def byte_sparsity(plan: Plan, sites: Iterable[Site]) -> float:
    """Mean sparsity of a plan over all weights of these sites; layers that the plan leaves dense count as 0."""
    sparsity = {layer.name: layer.sparsity for layer in plan.layers}
    layers = [layer for site in sites for layer in site.layers]
    return sum(layer.weights * sparsity.get(layer.name, 0.0) for layer in layers) / sum(x.weights for x in layers)


class KernelTable:
    """
    Measured times of dense and sparse matrix-vector products, to predict those of other shapes.

    Times are interpolated over the bytes of the weight (on a logarithmic scale) and the sparsity; beyond the largest
    and smallest measured weight the time per byte, or the time, is that at the end of the table.

    :param rows: (bytes, sparsity, dense µs, sparse µs) of products of one row.
    """

    def __init__(self, rows: Sequence[tuple[float, float, float, float]], source: str = "the table") -> None:
        if not rows:
            msg = f"{source} has no kernel times of single rows; make it with scap-nncf bench kernel."
            raise nncf.ValidationError(msg)
        self.source = source
        groups: dict[float, dict[float, list[tuple[float, float]]]] = {}
        for size, sparsity, dense, sparse in rows:
            groups.setdefault(float(size), {}).setdefault(float(sparsity), []).append((dense, sparse))
        self._sizes = np.array(sorted(groups))
        # shapes and types of equal bytes are averaged
        self._curves = [
            [(level, *np.mean(times, axis=0).tolist()) for level, times in sorted(groups[size].items())]
            for size in self._sizes
        ]

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> KernelTable:
        """
        :param path: a JSON file of ``scap-nncf bench kernel``; None for an H100's that ships with the package.
        :raises nncf.InvalidPathError: there is no such file.
        :raises nncf.ValidationError: it has no kernel times.
        """
        file = Path(__file__).with_name(_TABLE) if path is None else Path(path)
        if not file.is_file():
            msg = f"No kernel times at {file}; make them with scap-nncf bench kernel."
            raise nncf.InvalidPathError(msg)
        try:
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
            rows = [
                (
                    float(row["k"]) * row["n"] * _WIDTH[row["dtype"]],
                    float(row["sparsity"]),
                    float(row["dense_us"]),
                    float(row["sparse_us"]),
                )
                for row in results
                if row["rows"] == 1 and row["dtype"] in _WIDTH and row.get("op", "fc") in ("fc", "glu")
            ]
        except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            msg = f"{file} has no kernel times as scap-nncf bench kernel writes them: {error!r}."
            raise nncf.ValidationError(msg) from error
        return cls(rows, str(file))

    def predict(self, size: float, sparsity: float) -> tuple[float, float]:
        """
        :param size: bytes of the weight.
        :return: µs dense and sparse.
        """
        at = [self._at(curve, sparsity) for curve in self._curves]
        dense, sparse = np.array([d for d, _ in at]), np.array([s for _, s in at])
        x = np.log(np.clip(size, self._sizes[0], self._sizes[-1]))
        scale = max(size / self._sizes[-1], 1.0)  # beyond the largest, time goes with the bytes
        logs = np.log(self._sizes)
        return float(np.interp(x, logs, dense)) * scale, float(np.interp(x, logs, sparse)) * scale

    @staticmethod
    def _at(curve: list[tuple[float, float, float]], sparsity: float) -> tuple[float, float]:
        levels: NDArray[np.float64] = np.array([row[0] for row in curve])
        return (
            float(np.interp(sparsity, levels, [row[1] for row in curve])),
            float(np.interp(sparsity, levels, [row[2] for row in curve])),
        )

    def speedup(self, plan: Plan, traffic: Traffic) -> float:
        """Predicted time of all fully connected layers, dense over sparse; layers of a site run as one."""
        sparsity = {layer.name: layer.sparsity for layer in plan.layers}
        dense_total = sparse_total = 0.0
        for site in traffic.sites:
            size = sum(traffic.bytes_of[layer.name] for layer in site.layers)
            mean = sum(traffic.bytes_of[x.name] * sparsity.get(x.name, 0.0) for x in site.layers) / size
            dense, sparse = self.predict(size, mean)
            dense_total += dense
            sparse_total += sparse if mean > 0 else dense
        for layer in traffic.others:
            dense, _ = self.predict(traffic.bytes_of[layer.name], 0.0)
            dense_total, sparse_total = dense_total + dense, sparse_total + dense
        return dense_total / sparse_total


_WIDTH = {"fp16": 2, "bf16": 2, "fp32": 4, "float16": 2, "bfloat16": 2, "float32": 4}


# -- the sparsity that a budget asks for -------------------------------------------------------------------------------


def least_sparsity(enough: Callable[[float], bool], tolerance: float = 1e-4) -> float | None:
    """The smallest sparsity in [0, MOST] with `enough`, which must stay true above it; None if there is none."""
    if enough(0.0):
        return 0.0
    if not enough(MOST):
        return None
    low, high = 0.0, MOST
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def most_sparsity(
    loss: Callable[[float], float], max_loss: float, tolerance: float, start: float = 0.3
) -> tuple[float, float]:
    """
    The largest sparsity whose loss is at most `max_loss`, by measurements: first doubling or halving the distance from
    `start`, then regula falsi on log loss over sparsity, which is nearly straight, kept safe by bisection.

    :param loss: relative loss at a sparsity; 0 at 0.
    :return: the sparsity, and its loss.
    """
    best, at_best = 0.0, 0.0
    low, high = (0.0, 0.0), (MOST, math.inf)
    probe = start
    while high[0] - low[0] > tolerance:
        value = loss(probe)
        if value <= max_loss:
            low = (probe, value)
            if probe > best:
                best, at_best = probe, value
        else:
            high = (probe, value)
        if not math.isfinite(high[1]):
            probe = min(probe + 0.15, (probe + MOST) / 2)
        elif low[1] <= 0 or max_loss <= 0:
            probe = (low[0] + high[0]) / 2
        else:
            slope = (math.log(high[1]) - math.log(low[1])) / (high[0] - low[0])
            guess = low[0] + (math.log(max_loss) - math.log(low[1])) / slope - tolerance / 4
            margin = 0.1 * (high[0] - low[0])
            probe = min(max(guess, low[0] + margin), high[0] - margin)
    return best, at_best
