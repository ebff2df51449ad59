# SPDX-License-Identifier: Apache-2.0
"""Pictures of a calibration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import nncf
import numpy as np

from scap_nncf.extras import require

if TYPE_CHECKING:
    from scap_nncf.algorithms.plan import Plan, SitePlan
    from scap_nncf.algorithms.scap.histogram import ActivationHistogram

_BINS = 240
# The tails reach tens of standard deviations; this share of the values shows the part where η and τ lie.
_SHOWN = 0.98
_TINY = float(np.finfo(np.float32).tiny)
_DENSITY, _DROPPED, _MODE, _THRESHOLD = "#30475e", "#f2c6b4", "#1a936f", "#c8553d"


def plot_activations(
    plan: Plan,
    histograms: Mapping[str, ActivationHistogram],
    path: str | os.PathLike[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> Any:
    """
    Draws the activation distributions of a calibration: a row for each block, a column for each kind of site, the
    logarithm of the density, the mode η as a line and the dropped range |x - η| <= τ in colour.

    .. code-block:: python

        controller = scap_nncf.get_controller(model)
        plot_activations(controller.plan, controller.histograms, "activations.png")

    :param histograms: site name -> histogram, as `controller.histograms` gives them.
    :param path: where to write the picture; the ending says the format. None writes none.
    :param blocks: blocks to draw; None for the first, the middle and the last one.
    :return: the `matplotlib.figure.Figure`.
    :raises nncf.ValidationError: if there are no statistics for the sites asked for, or `path` cannot be written.
    :raises MissingExtraError: if matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "report", "plotting activations")
    sites = [site for site in plan.sites if site.name in histograms and histograms[site.name].total]
    there = sorted({site.block for site in sites if site.block is not None})
    if blocks is None:
        blocks = sorted({there[0], there[len(there) // 2], there[-1]}) if there else []
    sites = [site for site in sites if site.block in blocks] if there else sites
    if not sites or not set(blocks) <= set(there):
        msg = (
            f"no statistics for the blocks {list(blocks)}; there are some for {there or 'no block'}. A plan that was "
            "saved without statistics cannot be drawn: calibrate, or load it with them"
        )
        raise nncf.ValidationError(msg)
    rows: list[int | None] = list(blocks) if there else [None]
    columns = list(dict.fromkeys(_kind(site) for site in sites))
    # Figure without pyplot: no window, no global state, and the caller's backend stays as it is
    figure = figures.Figure(figsize=(3.3 * len(columns), 2.5 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, block in enumerate(rows):
        for column, kind in enumerate(columns):
            axes = grid[row][column]
            site = next((site for site in sites if site.block == block and _kind(site) == kind), None)
            if site is None:
                axes.set_visible(False)
                continue
            _draw(axes, site, histograms[site.name])
            if row == 0:
                axes.set_title(kind, fontsize=10, fontweight="bold")
            if column == 0:
                axes.set_ylabel("density" if block is None else f"block {block}\ndensity", fontsize=9)
    figure.suptitle("Input activations by role: mode η (line) and dropped range |x − η| ≤ τ (shaded)", fontsize=11)
    if path is not None:
        try:
            figure.savefig(os.fspath(path), dpi=130)
        except (OSError, ValueError) as error:
            msg = f"{os.fspath(path)} cannot be written: {error}"
            raise nncf.ValidationError(msg) from error
    return figure


def _kind(site: SitePlan) -> str:
    return " ".join(dict.fromkeys(layer.role for layer in site.layers))


def _draw(axes: Any, site: SitePlan, histogram: ActivationHistogram) -> None:
    thresholds = sorted({layer.threshold for layer in site.layers})
    # a site that is constant has no width: the smallest positive number keeps the axis from collapsing
    reach = max(histogram.quantile(_SHOWN, site.mode), 1.25 * max(thresholds), _TINY)
    edges = np.linspace(site.mode - reach, site.mode + reach, _BINS + 1)
    density = histogram.density(edges) / np.diff(edges)
    # bins without a value would break the line on a logarithmic axis
    density = np.where(density > 0, density, np.nan)
    centres = (edges[1:] + edges[:-1]) / 2
    for threshold in thresholds:
        if threshold >= 0:
            shade = 0.7 / len(thresholds)
            axes.axvspan(site.mode - threshold, site.mode + threshold, color=_DROPPED, alpha=shade, lw=0)
            for edge in (site.mode - threshold, site.mode + threshold):
                axes.axvline(edge, color=_THRESHOLD, lw=0.8, ls="--")
    axes.plot(centres, density, color=_DENSITY, lw=1.0, drawstyle="steps-mid")
    axes.axvline(site.mode, color=_MODE, lw=1.0)
    axes.set_yscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.tick_params(labelsize=7)
    shown = thresholds if len(thresholds) < 4 else [thresholds[0], thresholds[-1]]
    sparsities = sorted({layer.sparsity for layer in site.layers})
    text = [
        f"η = {site.mode:.3g} ({site.mode_method})",
        "τ = " + (" … " if len(thresholds) > 3 else ", ").join(f"{threshold:.3g}" for threshold in shown),
        "s = " + ", ".join(f"{value:.0%}" for value in sparsities),
    ]
    axes.text(
        0.98,
        0.97,
        "\n".join(text),
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7,
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5},
    )
