# SPDX-License-Identifier: Apache-2.0
"""
Pictures of a calibration, an evaluation and a search.

Each function returns a ``matplotlib.figure.Figure`` and, with `path`, writes it; the ending says the format
(``.png``, ``.svg``, ``.pdf``). ``scap-nncf report`` puts them all on one page.
"""

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
# told apart by people with any colour vision, and by shape
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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
    return _written(figure, path)


def plot_targets(
    plan: Plan, realised: Mapping[str, float] | None = None, path: str | os.PathLike[str] | None = None
) -> Any:
    """
    Target sparsity (line) and realised sparsity (dots) of every layer: a panel a role, blocks from left to right.

    :param realised: layer name → realised sparsity, such as `Run.sparsity` of an evaluation.
    """
    figures = require("matplotlib.figure", "report", "plotting sparsity")
    shares = realised or {}
    roles = list(dict.fromkeys(layer.role for layer in plan.layers))
    columns = min(4, len(roles))
    rows = -(-len(roles) // columns)
    figure = figures.Figure(figsize=(3.3 * columns, 2.3 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for index, axes in enumerate(grid.flat):
        if index >= len(roles):
            axes.set_visible(False)
            continue
        role = roles[index]
        layers = [
            (_position(site, i), layer) for i, (site, layer) in enumerate(_with_sites(plan)) if layer.role == role
        ]
        x = [position for position, _ in layers]
        axes.step(x, [100 * layer.sparsity for _, layer in layers], where="mid", color=_DENSITY, lw=1.3, label="target")
        counted = [(position, shares[layer.name]) for position, layer in layers if layer.name in shares]
        if counted:
            axes.plot(*zip(*((p, 100 * v) for p, v in counted)), "o", color=_THRESHOLD, ms=3.2, label="realised")
        axes.set_title(role, fontsize=10, fontweight="bold")
        axes.set_ylim(-2, 102)
        axes.grid(axis="y", lw=0.4, alpha=0.6)
        axes.tick_params(labelsize=7)
        if index % columns == 0:
            axes.set_ylabel("sparsity, %", fontsize=8)
        if index + columns >= len(roles):
            axes.set_xlabel("block", fontsize=8)
    grid.flat[0].legend(fontsize=7, loc="lower left", frameon=False)
    return _written(figure, path)


def plot_sparsity_map(
    plan: Plan, realised: Mapping[str, float] | None = None, path: str | os.PathLike[str] | None = None
) -> Any:
    """
    A map of the sparsity: roles from top to bottom, blocks from left to right; layers that stay dense are white.

    :param realised: layer name → realised sparsity; None draws the targets.
    """
    figures = require("matplotlib.figure", "report", "plotting sparsity")
    roles = list(dict.fromkeys(layer.role for layer in plan.layers))
    blocks = sorted({_position(site, i) for i, (site, _) in enumerate(_with_sites(plan))})
    values = np.full((len(roles), len(blocks)), np.nan)
    for i, (site, layer) in enumerate(_with_sites(plan)):
        value = layer.sparsity if realised is None else realised.get(layer.name, np.nan)
        cell = roles.index(layer.role), blocks.index(_position(site, i))
        # several layers of one role in a block, such as experts: their mean
        values[cell] = value if np.isnan(values[cell]) else (values[cell] + value) / 2
    width = max(5.0, 0.30 * len(blocks) + 2.2)
    figure = figures.Figure(figsize=(width, 0.36 * len(roles) + 1.1), layout="constrained")
    axes = figure.subplots()
    # perceptually even, pale for dense and dark for sparse; no colour reaches black, so that numbers stay readable
    image = axes.imshow(100 * values, aspect="auto", cmap="YlGnBu", vmin=0, vmax=100)
    axes.set_yticks(range(len(roles)), roles, fontsize=8)
    step = max(1, len(blocks) // 32)
    axes.set_xticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]], fontsize=7)
    axes.set_xlabel("block", fontsize=8)
    if len(blocks) <= 40:
        for row, column in zip(*np.nonzero(~np.isnan(values))):
            share = values[row, column]
            colour = "white" if share > 0.6 else "#222"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=5.5, color=colour)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("target, %" if realised is None else "realised, %", fontsize=8)
    return _written(figure, path)


def plot_pareto(search: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
    """
    Every trial of a search, its loss against the bytes that it saves; a line joins those that no other trial beats.

    :param search: the content of ``search.json``: `trials` with `byte_sparsity`, `loss` and `method`; `dense`, `metric`
        and `best`. The loss is a relative rise where `loss_is` says "rise", else the value of the metric.
    :raises nncf.ValidationError: there is no finished trial.
    """
    figures = require("matplotlib.figure", "report", "plotting a search")
    trials = [t for t in search.get("trials", []) if _number(t.get("loss")) and _number(t.get("byte_sparsity"))]
    if not trials:
        msg = "the search has no finished trial to plot"
        raise nncf.ValidationError(msg)
    rises = [rise(search, trial) for trial in trials]
    relative = None not in rises
    loss = {id(t): t["loss"] if r is None or not relative else 100 * r for t, r in zip(trials, rises)}
    figure = figures.Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(str(t.get("method") or "") for t in trials))
    for index, method in enumerate(methods):
        mine = [t for t in trials if str(t.get("method") or "") == method]
        colour, marker = _SERIES[index % len(_SERIES)], _MARKERS[index % len(_MARKERS)]
        x, y = [100 * t["byte_sparsity"] for t in mine], [loss[id(t)] for t in mine]
        axes.scatter(x, y, s=26, color=colour, marker=marker, label=method or "trial", alpha=0.85, lw=0, zorder=3)
    front = pareto_front(trials)
    x, y = [100 * t["byte_sparsity"] for t in front], [loss[id(t)] for t in front]
    axes.plot(x, y, color="#555", lw=1.0, ls="-", zorder=2, label="not beaten")
    best = next((t for t in trials if t.get("number") == search.get("best") and search.get("best") is not None), None)
    if best is not None:
        place = 100 * best["byte_sparsity"], loss[id(best)]
        axes.scatter(*place, s=150, facecolors="none", edgecolors="#222", lw=1.3, zorder=4, label="chosen")
    if relative:
        axes.axhline(0, color="#999", lw=0.8, ls=":")
    spread = [value for value in loss.values() if value > 0]
    if relative and spread and max(spread) > 60 * max(min(spread), 0.1):
        axes.set_yscale("symlog", linthresh=max(1.0, min(spread)))
    metric = str(search.get("metric") or "loss")
    axes.set_ylabel(f"{metric} over dense, %" if relative else metric, fontsize=9)
    axes.set_xlabel("bytes of the layers' weights that need not be read, %", fontsize=9)
    axes.grid(lw=0.4, alpha=0.6)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    return _written(figure, path)


def rise(search: Mapping[str, Any], trial: Mapping[str, Any]) -> float | None:
    """Relative rise of the metric that a trial cost; None where the search does not tell."""
    if search.get("loss_is") == "rise":
        return float(trial["loss"])
    dense = search.get("dense")
    return trial["loss"] / dense - 1 if isinstance(dense, (int, float)) and dense else None


def pareto_front(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials that no other beats in both `byte_sparsity` (more is better) and `loss` (less is), by sparsity."""
    front: list[Mapping[str, Any]] = []
    for trial in sorted(trials, key=lambda t: (-t["byte_sparsity"], t["loss"])):
        if not front or trial["loss"] < front[-1]["loss"]:
            front.append(trial)
    return front[::-1]


def plot_evaluation(evaluation: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
    """
    How each sparse run changed each task (points) and each text (percent of perplexity), with 95 % intervals.

    :param evaluation: the content of ``evaluation_results.json``, or `Evaluation.to_json()`.
    :raises nncf.ValidationError: nothing was compared.
    """
    figures = require("matplotlib.figure", "report", "plotting an evaluation")
    runs = [run["name"] for run in evaluation.get("runs", [])][1:]
    tasks = [task for task in evaluation.get("tasks", []) if task.get("changes")]
    texts = [text for text in evaluation.get("perplexity", []) if text.get("changes")]
    if not runs or not (tasks or texts):
        msg = "the evaluation compared nothing: it has one run only"
        raise nncf.ValidationError(msg)
    rows = [(f"{task['task']} (n={task['items']})", task["changes"], _points) for task in tasks]
    mean = {name: change for name, change in (evaluation.get("mean_change") or {}).items() if change}
    if mean and len(tasks) > 1:
        rows.append(("mean of tasks", mean, _points))
    panels = [(rows, "change of the metric, points (95 % interval, paired by item)")] if rows else []
    lower = [(f"{text['text']}", text["changes"], _percent_of_perplexity) for text in texts]
    panels += [(lower, "change of perplexity, % (95 % interval, paired by window)")] if lower else []
    heights = [len(panel) * (0.16 + 0.17 * len(runs)) + 0.5 for panel, _ in panels]
    figure = figures.Figure(figsize=(7.6, sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (panel, label) in zip(grid, panels):
        for row, (_, changes, scale) in enumerate(panel):
            for index, run in enumerate(runs):
                if not changes.get(run):
                    continue
                low, middle, high = scale(changes[run])
                y = row + (index - (len(runs) - 1) / 2) * 0.8 / max(len(runs), 2)
                axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", ms=4, capsize=2.5, lw=1.2,
                              color=_SERIES[index % len(_SERIES)], label=run if row == 0 else None)  # fmt: skip
        axes.axvline(0, color="#666", lw=0.9)
        axes.set_yticks(range(len(panel)), [name for name, *_ in panel], fontsize=8)
        axes.set_ylim(len(panel) - 0.45, -0.55)
        axes.set_xlabel(label, fontsize=8)
        axes.grid(axis="x", lw=0.4, alpha=0.6)
        axes.tick_params(axis="x", labelsize=8)
    grid[0].legend(fontsize=8, frameon=False, loc="best")
    return _written(figure, path)


def plot_bytes(evaluation: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
    """
    Megabytes of weights that a decoded token reads, run by run: of layers that can be pruned, and of the rest.

    :param evaluation: the content of ``evaluation_results.json``.
    :raises nncf.ValidationError: it does not say.
    """
    figures = require("matplotlib.figure", "report", "plotting bytes")
    runs = [run for run in evaluation.get("runs", []) if run.get("weight_bytes") and run.get("read_bytes") is not None]
    if not runs:
        msg = "the evaluation does not say how many bytes a token reads"
        raise nncf.ValidationError(msg)
    figure = figures.Figure(figsize=(7.6, 0.42 * len(runs) + 0.9), layout="constrained")
    axes = figure.subplots()
    for row, run in enumerate(runs):
        read, total = run["read_bytes"] / 1e6, run["weight_bytes"] / 1e6
        axes.barh(row, read, color=_DENSITY, height=0.6, label="read" if row == 0 else None)
        axes.barh(row, total - read, left=read, color=_DROPPED, height=0.6, label="skipped" if row == 0 else None)
        axes.text(read / 2, row, f"{read:,.0f} MB", ha="center", va="center", fontsize=8, color="white")
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MB of weights a token, embeddings left out", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=7, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return _written(figure, path)


def _points(change: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = change.get("interval95") or (change["difference"], change["difference"])
    return 100 * low, 100 * change["difference"], 100 * high


def _percent_of_perplexity(change: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = change.get("interval95") or (change["difference"], change["difference"])
    return 100 * float(np.expm1(low)), 100 * float(np.expm1(change["difference"])), 100 * float(np.expm1(high))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _with_sites(plan: Plan) -> list[tuple[SitePlan, Any]]:
    return [(site, layer) for site in plan.sites for layer in site.layers]


def _position(site: SitePlan, index: int) -> int:
    return index if site.block is None else site.block


def _written(figure: Any, path: str | os.PathLike[str] | None) -> Any:
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
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the numbers above the curve
    axes.tick_params(which="both", labelsize=6)
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
