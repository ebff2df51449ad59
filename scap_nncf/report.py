# SPDX-License-Identifier: Apache-2.0
"""
One page about a run: what was pruned, what it cost, what it saves, and how to do it again.

The page is a single HTML file that needs no network: styles and pictures are inside of it.

.. code-block:: python

    from scap_nncf.report import write_report

    write_report("run", "report.html")
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nncf

from scap_nncf import plots
from scap_nncf._version import __version__
from scap_nncf.algorithms.plan import PLAN_FILE, Plan, write_atomically
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics, statistics_of_plan
from scap_nncf.evaluation import RESULTS_FILE
from scap_nncf.extras import require
from scap_nncf.search import SCHEMA, SEARCH_FILE

_PICTURE_TYPES = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass
class RunFolder:
    """
    What a run left in its folder and the folders in it.

    :param plan: the plan, with the `statistics` beside it.
    :param evaluation: content of ``evaluation_results.json``.
    :param search: content of ``search.json``.
    :param benches: file name → content of a decode benchmark.
    :param files: what was read, for the reader.
    """

    plan: Plan | None = None
    statistics: CalibrationStatistics | None = None
    evaluation: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    benches: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def realised(self) -> dict[str, float] | None:
        """Layer → realised sparsity, of the run of the evaluation that fits the plan; None where none does."""
        if self.plan is None or self.evaluation is None:
            return None
        targets = {layer.name: layer.sparsity for layer in self.plan.layers}
        for run in reversed(self.evaluation.get("runs", [])):
            layers = run.get("layers") or []
            if {x["layer"]: x["target"] for x in layers} == targets:
                return {x["layer"]: x["realised"] for x in layers if x["realised"] is not None} or None
        return None


def read_run(folder: str | os.PathLike[str]) -> RunFolder:
    """
    Reads what there is of a run: ``plan.json`` (with ``statistics.safetensors``), ``evaluation_results.json``,
    ``search.json`` and results of ``scap-nncf bench decode``; in the folder, or in folders directly in it.

    :raises nncf.InvalidPathError: there is no such folder.
    :raises nncf.ValidationError: nothing of a run is in it, or a file is damaged.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        msg = f"{root} is no folder; expected one with {PLAN_FILE}, {RESULTS_FILE}, {SEARCH_FILE} or benchmark results"
        raise nncf.InvalidPathError(msg)
    places = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    run = RunFolder()
    for place in places:
        if run.plan is None and (place / PLAN_FILE).is_file():
            run.plan = Plan.load(place)
            run.statistics = statistics_of_plan(place, run.plan)
            run.files.append(str((place / PLAN_FILE).relative_to(root)))
        if run.evaluation is None and (place / RESULTS_FILE).is_file():
            run.evaluation = _object(place / RESULTS_FILE)
            if "runs" not in run.evaluation:
                msg = f"{place / RESULTS_FILE} has no 'runs': it was not written by scap-nncf evaluate"
                raise nncf.ValidationError(msg)
            run.files.append(str((place / RESULTS_FILE).relative_to(root)))
        if run.search is None and (place / SEARCH_FILE).is_file():
            run.search = _object(place / SEARCH_FILE)
            if run.search.get("schema") != SCHEMA or not isinstance(run.search.get("trials"), list):
                msg = f"{place / SEARCH_FILE} is no result of a search: expected 'schema': '{SCHEMA}' and 'trials'"
                raise nncf.ValidationError(msg)
            run.files.append(str((place / SEARCH_FILE).relative_to(root)))
        for path in sorted(place.glob("*.json")):
            if path.name in (PLAN_FILE, RESULTS_FILE, SEARCH_FILE) or path.stat().st_size > 64 << 20:
                continue
            data = _bench(path)
            if data is not None:
                run.benches[str(path.relative_to(root))] = data
                run.files.append(str(path.relative_to(root)))
    if not run.files:
        msg = (
            f"{root} holds nothing of a run: expected {PLAN_FILE} (scap-nncf compress --output), {RESULTS_FILE} "
            f"(scap-nncf evaluate --output), {SEARCH_FILE} (scap-nncf search) or a decode benchmark, here or one "
            "folder deeper"
        )
        raise nncf.ValidationError(msg)
    return run


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as JSON ({error}); it may be cut off"
        raise nncf.ValidationError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path}: expected a JSON object, found {type(data).__name__}"
        raise nncf.ValidationError(msg)
    return data


def _bench(path: Path) -> dict[str, Any] | None:
    """A decode benchmark; None where the file is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    rows = data.get("decode") if isinstance(data, dict) else None
    return data if isinstance(rows, list) and rows and all("ms" in row for row in rows) else None


# -- pictures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    name: str
    caption: str
    draw: Callable[[], Any]


def _pictures(run: RunFolder) -> list[_Picture]:
    found: list[_Picture] = []
    evaluation, plan, search, statistics = run.evaluation, run.plan, run.search, run.statistics
    if evaluation is not None and len(evaluation["runs"]) > 1 and (evaluation.get("tasks") or evaluation["perplexity"]):
        found.append(
            _Picture(
                "quality",
                "Change from dense, paired by item, 95 % intervals.",
                lambda: plots.plot_evaluation(evaluation),
            )
        )
    if search is not None and any(trial.get("loss") is not None for trial in search["trials"]):
        found.append(_Picture("pareto", "Loss against bytes, every trial.", lambda: plots.plot_pareto(search)))
    if plan is not None:
        realised = run.realised
        found.append(_Picture("map", "Target sparsity by role and block.", lambda: plots.plot_sparsity_map(plan)))
        if realised is not None:
            found.append(
                _Picture(
                    "map_realised",
                    "Realised sparsity by role and block, counted on what the evaluation read.",
                    lambda: plots.plot_sparsity_map(plan, realised),
                )
            )
        found.append(
            _Picture(
                "targets", "Target and realised sparsity of every layer.", lambda: plots.plot_targets(plan, realised)
            )
        )
    if plan is not None and statistics is not None:
        histograms = statistics.histograms
        caption = "First, middle and last block: log density of each input, mode η, dropped range |x − η| ≤ τ."
        found.append(_Picture("activations", caption, lambda: plots.plot_activations(plan, histograms)))
    if evaluation is not None and any(r.get("weight_bytes") and r.get("layers") for r in evaluation["runs"]):
        found.append(_Picture("bytes", "Weights that a decoded token reads.", lambda: plots.plot_bytes(evaluation)))
    return found


def save_plots(
    run: RunFolder | str | os.PathLike[str], folder: str | os.PathLike[str], kind: str = "png"
) -> list[Path]:
    """
    Writes the pictures of the page as files, one a picture.

    :param run: a run's folder, or what `read_run` gave.
    :param kind: ``png`` or ``svg``.
    :return: the files.
    :raises nncf.ValidationError: unknown kind, or the folder cannot be written.
    """
    if kind not in _PICTURE_TYPES:
        msg = f"kind is {kind!r}; expected {' or '.join(_PICTURE_TYPES)}"
        raise nncf.ValidationError(msg)
    run = run if isinstance(run, RunFolder) else read_run(run)
    target = Path(folder).expanduser()
    return [write_atomically(target / f"{p.name}.{kind}", _rendered(p.draw(), kind)) for p in _pictures(run)]


def _rendered(figure: Any, kind: str) -> bytes:
    matplotlib = require("matplotlib", "report", "the report")
    buffer = io.BytesIO()
    # text stays text, and equal runs give equal files
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scap-nncf", "font.family": "sans-serif"}):
        figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _image(figure: Any, caption: str, kind: str = "svg") -> str:
    data = base64.b64encode(_rendered(figure, kind)).decode()
    text = html.escape(caption)
    return (
        f'<figure><img src="data:{_PICTURE_TYPES[kind]};base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def write_report(
    run: RunFolder | str | os.PathLike[str],
    output: str | os.PathLike[str],
    title: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """
    Writes the page about a run.

    :param run: a run's folder, or what `read_run` gave.
    :param output: the HTML file; written atomically.
    :param title: default: the model's name.
    :param progress: called with (pictures drawn, pictures in all).
    :return: the file.
    :raises nncf.ValidationError: nothing of a run is there, a file is damaged, or `output` cannot be written.
    :raises MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "report", "the report")
    run = run if isinstance(run, RunFolder) else read_run(run)
    page = _page(run, title or _model_name(run), progress)
    return write_atomically(Path(output).expanduser(), page.encode())


def _model_name(run: RunFolder) -> str:
    for about in (
        (run.evaluation or {}).get("about"),
        run.plan.made_by if run.plan is not None else None,
        (run.search or {}).get("about"),
        *(bench.get("about") for bench in run.benches.values()),
    ):
        if isinstance(about, dict) and about.get("model"):
            return Path(str(about["model"])).name
    return "a model"


def _page(run: RunFolder, title: str, progress: Callable[[int, int], None] | None) -> str:
    pictures = _pictures(run)
    blocks = _blocks(run)
    total, images = len(pictures) + len(blocks), {}
    for picture in pictures:
        images[picture.name] = _image(picture.draw(), picture.caption)
        if progress is not None:
            progress(len(images), total)
    details = []
    for number, block in enumerate(blocks):
        assert run.plan is not None  # or there were no blocks
        assert run.statistics is not None
        figure = plots.plot_activations(run.plan, run.statistics.histograms, blocks=[block])
        # many pictures: pixels are smaller than curves here
        details.append(_image(figure, f"Block {block}", "png"))
        if progress is not None:
            progress(len(pictures) + number + 1, total)
    sections = [
        _section("Quality", _quality(run), images.get("quality")),
        _section("Trade-off", _trials(run), images.get("pareto"), first="image"),
        _section("Sparsity", _roles(run), images.get("map"), images.get("map_realised"), images.get("targets")),
        _section(
            "Activations",
            _modes(run),
            images.get("activations"),
            _folded(f"Every block ({len(details)})", details),
            first="image",
        ),
        _section("Bytes and speed", _speed(run), images.get("bytes")),
        _section("To do it again", _settings(run)),
    ]
    missing = _missing(run)
    body = "\n".join(part for part in sections if part)
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}: activation sparsity</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>"
        f"<header><p class=kicker>Activation sparsity</p><h1>{html.escape(title)}</h1>{_cards(run)}</header>\n"
        f"{body}\n"
        f"<footer><p>Read from: {html.escape(', '.join(run.files))}.{missing}</p>"
        f"<p>scap-nncf {html.escape(__version__)}</p></footer></main></body></html>\n"
    )


def _blocks(run: RunFolder) -> list[int]:
    """Blocks whose distributions can be drawn."""
    if run.plan is None or run.statistics is None:
        return []
    histograms = run.statistics.histograms
    return sorted(
        {s.block for s in run.plan.sites if s.block is not None and s.name in histograms and histograms[s.name].total}
    )


def _section(title: str, *parts: str | None, first: str = "text") -> str:
    shown = [part for part in parts if part]
    if not shown:
        return ""
    if first == "image":
        shown = [*(p for p in shown if p.startswith("<figure")), *(p for p in shown if not p.startswith("<figure"))]
    return f"<section><h2>{html.escape(title)}</h2>{''.join(shown)}</section>"


def _folded(title: str, parts: Sequence[str]) -> str | None:
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>" if parts else None


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1) -> str:
    """The first `text_columns` columns are text, the others numbers."""
    head = "".join(f"<th{_align(i, text_columns)}>{html.escape(h)}</th>" for i, h in enumerate(header))
    lines = []
    for row in rows:
        cells = "".join(f"<td{_align(i, text_columns)}>{html.escape(str(c))}</td>" for i, c in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _align(column: int, text_columns: int) -> str:
    return "" if column < text_columns else " class=n"


def _cards(run: RunFolder) -> str:
    cards: list[tuple[str, str]] = []
    if run.plan is not None:
        weights = [(layer.in_features * layer.out_features, layer.sparsity) for layer in run.plan.layers]
        total = sum(w for w, _ in weights)
        if total:
            cards.append((f"{100 * sum(w * s for w, s in weights) / total:.1f} %", "target sparsity, by weights"))
    if run.evaluation is not None:
        last = run.evaluation["runs"][-1]
        if last.get("realised") is not None:
            cards.append((f"{100 * last['realised']:.1f} %", f"realised sparsity of {last['name']}"))
        if last.get("weight_bytes") and last.get("layers"):
            cards.append((f"{100 * last['read_bytes'] / last['weight_bytes']:.0f} %", "of the weights' bytes a token"))
        for text in run.evaluation["perplexity"][:1]:
            change = (text.get("changes") or {}).get(last["name"])
            if change:
                cards.append((f"{100 * math.expm1(change['difference']):+.1f} %", f"perplexity on {text['text']}"))
        mean = (run.evaluation.get("mean_change") or {}).get(last["name"])
        if mean:
            interval = mean.get("interval95")
            error = "" if not interval else f" ± {50 * (interval[1] - interval[0]):.1f}"
            cards.append(
                (f"{100 * mean['difference']:+.1f}{error}", f"points, mean of {len(run.evaluation['tasks'])} tasks")
            )
    speedups = [
        r["speedup"]
        for b in run.benches.values()
        for r in b["decode"]
        if r.get("speedup") and r.get("variant") != "dense"
    ]
    if speedups:
        cards.append((f"{max(speedups):.2f}×", "fastest measured decode over the fastest dense"))
    inner = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in cards)
    return f"<div class=cards>{inner}</div>" if cards else ""


def _quality(run: RunFolder) -> str | None:
    if run.evaluation is None:
        return None
    parts = []
    rows: list[list[Any]] = []
    for task in run.evaluation.get("tasks", []):
        for name, (value, error) in task["values"].items():
            shots = f", {task['shots']} examples" if task["shots"] else ""
            found = f"{100 * value:.1f}{_pm(error, 100)}"
            change = _change_cells(task.get("changes", {}).get(name), 100)
            rows.append([*_once(rows, f"{task['task']}{shots}", task["metric"]), name, task["items"], found, *change])
    for name, mean in (run.evaluation.get("mean_change") or {}).items():
        if mean and len(run.evaluation.get("tasks", [])) > 1:
            rows.append(["mean of tasks", "", name, mean["items"], "", *_change_cells(mean, 100)])
    if rows:
        header = ["Task", "Metric", "Model", "Items", "Value ± s.e.", "Change ± s.e.", "p", "Shown at 5 %"]
        parts.append(_table(header, rows, 3))
    rows = []
    for text in run.evaluation.get("perplexity", []):
        stride = "" if text["stride"] == text["context"] else f", stride {text['stride']}"
        for name, result in text["values"].items():
            change = text.get("changes", {}).get(name)
            cells = ["", "", ""]
            if change:
                ratio = math.exp(change["difference"])
                cells = [
                    f"{100 * (ratio - 1):+.1f}{_pm(change['stderr'], 100 * ratio)} %",
                    *_change_cells(change, 1)[1:],
                ]
            found = f"{result['perplexity']:.2f}" if result["perplexity"] is not None else "infinite"
            title = _once(rows, f"{text['text']}, context {text['context']}{stride}")
            rows.append([*title, name, result["tokens"], found, *cells])
    if rows:
        parts.append(_table(["Text", "Model", "Tokens", "Perplexity", "Change ± s.e.", "p", "Shown at 5 %"], rows, 2))
    if parts and len(run.evaluation["runs"]) > 1:
        tests = "McNemar's exact test where items are right or wrong, else Student's paired t test"
        parts.append(
            f"<p class=note>Both models answer the same items; changes are in points and paired by item ({tests}). A "
            "change that is not shown may still be there: about twice the standard error could be missed. "
            f"Run {html.escape(str(run.evaluation['about'].get('mode', '')))}.</p>"
        )
    return "".join(parts) or None


def _once(rows: list[list[Any]], *cells: str) -> list[str]:
    """The cells, or as many empty ones where the rows above are of the same thing."""
    above = next((row for row in reversed(rows) if row[0]), [""])
    return ["" for _ in cells] if above[0] == cells[0] else list(cells)


def _pm(error: float | None, scale: float) -> str:
    return "" if error is None else f" ± {scale * error:.1f}"


def _change_cells(change: dict[str, Any] | None, scale: float) -> list[str]:
    if not change:
        return ["", "", ""]
    p = change["p_value"]
    shown = "" if p is None else "no" if p >= 0.05 else "higher" if change["difference"] > 0 else "lower"
    text = "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"
    return [f"{scale * change['difference']:+.1f}{_pm(change['stderr'], scale)}", text, shown]


def _trials(run: RunFolder) -> str | None:
    if run.search is None:
        return None
    search = run.search
    trials = [trial for trial in search["trials"] if trial.get("loss") is not None]
    front = {id(trial) for trial in plots.pareto_front(trials)}
    rows = [
        [
            trial.get("number", ""),
            trial.get("method") or "",
            trial.get("label") or "",
            "yes" if id(trial) in front else "",
            f"{100 * trial['byte_sparsity']:.1f} %",
            _rise(search, trial),
            f"{trial['seconds']:.0f} s" if trial.get("seconds") is not None else "",
        ]
        for trial in sorted(trials, key=lambda t: -t["byte_sparsity"])
    ]
    metric = str(search.get("metric") or "loss")
    header = ["Trial", "Method", "Label", "Not beaten", "Bytes saved", f"{metric} over dense", "Took"]
    table = _table(header, rows, 4)
    dense = search.get("dense")
    note = f"{len(trials)} trials; {html.escape(metric)} of the dense model {dense:.4g}." if dense is not None else ""
    held_out = search.get("held_out")
    extra = f"<h3>Held out</h3>{_values(held_out)}" if isinstance(held_out, dict) and held_out else ""
    return f"<p>{note}</p>{extra}{_folded('Every trial', [table])}"


def _rise(search: dict[str, Any], trial: dict[str, Any]) -> str:
    value = plots.rise(search, trial)
    return f"{trial['loss']:.4g}" if value is None else f"{100 * value:+.2f} %"


def _roles(run: RunFolder) -> str | None:
    if run.plan is None:
        return None
    realised = run.realised or {}
    rows = []
    names = list(dict.fromkeys(layer.role for layer in run.plan.layers))
    for role in [*names, None]:
        layers = [layer for layer in run.plan.layers if role in (layer.role, None)]
        weights = [max(layer.in_features * layer.out_features, 1) for layer in layers]
        target = sum(w * layer.sparsity for w, layer in zip(weights, layers)) / sum(weights)
        counted = [(w, realised[layer.name]) for w, layer in zip(weights, layers) if layer.name in realised]
        share = sum(w * v for w, v in counted) / sum(w for w, _ in counted) if counted else None
        low, high = min(layer.sparsity for layer in layers), max(layer.sparsity for layer in layers)
        rows.append(
            [
                role or "all",
                len(layers),
                f"{sum(weights) / 1e6:.2f} M",
                f"{100 * target:.1f} %",
                f"{100 * low:.0f} … {100 * high:.0f} %",
                "not counted" if share is None else f"{100 * share:.1f} %",
                "" if share is None else f"{100 * (share - target):+.1f}",
            ]
        )
    header = ["Role", "Layers", "Weights", "Target", "Range", "Realised", "Off by, points"]
    return _table(header, rows) + f"<p class=note>Token policy: prune={html.escape(run.plan.prune)}.</p>"


def _modes(run: RunFolder) -> str | None:
    if run.plan is None:
        return None
    rows = []
    for site in run.plan.sites:
        for layer in site.layers:
            block = "" if site.block is None else site.block
            rows.append(
                [layer.name, layer.role, block, f"{site.mode:.4g}", site.mode_method, f"{layer.threshold:.4g}",
                 f"{100 * layer.sparsity:.1f} %"]
            )  # fmt: skip
    table = _table(["Layer", "Role", "Block", "Mode η", "Mode's method", "Threshold τ", "Target"], rows, 2)
    note = "" if run.statistics is not None else "<p class=note>The plan came without statistics: no distributions.</p>"
    return note + (_folded(f"Every layer ({len(rows)})", [table]) or "")


def _speed(run: RunFolder) -> str | None:
    parts = []
    if run.evaluation is not None:
        rows = []
        for entry in run.evaluation["runs"]:
            total, read = entry.get("weight_bytes"), entry.get("read_bytes")
            if total and read:
                rows.append(
                    [entry["name"], f"{total / 1e6:,.1f} MB", f"{read / 1e6:,.1f} MB", f"{100 * read / total:.1f} %",
                     f"{total / read:.2f}×"]
                )  # fmt: skip
        if rows:
            header = ["Model", "Weights a token", "Read", "Share", "Speed-up if reading were all"]
            parts.append(_table(header, rows))
            parts.append(
                "<p class=note>Weights of every layer and the output head, without the embedding table; the last "
                "column is a bound from bytes alone, not a measurement. The key-value cache is not in it.</p>"
            )
    predicted = _predicted(run)
    if predicted is not None:
        speedup, kernels = predicted
        parts.append(f"<p>Predicted decode: <b>{speedup:.2f}×</b>, from measured kernel times ({kernels}).</p>")
    for name, bench in run.benches.items():
        about = bench.get("about", {})
        rows = [
            [
                row.get("variant", ""),
                row.get("mode", ""),
                row.get("batch", ""),
                row.get("prompt", ""),
                f"{row['ms']:.3f} ± {row.get('spread') or 0:.3f}"
                if row.get("ms") is not None
                else row.get("error", ""),
                f"{row['speedup']:.2f}×" if row.get("speedup") else "",
                _share(row.get("realised")),
                _bound(row.get("saved")),
            ]
            for row in bench["decode"]
        ]
        what = ", ".join(str(about[key]) for key in ("model", "dtype", "device") if about.get(key))
        parts.append(f"<h3>Measured: {html.escape(what or name)}</h3>")
        header = ["Variant", "Mode", "Batch", "Prompt", "ms a token", "Over best dense", "Realised", "Bound by bytes"]
        parts.append(_table(header, rows, 2))
    return "".join(parts) or None


def _predicted(run: RunFolder) -> tuple[float, str] | None:
    """What the cost model said of the plan, and of which kernels."""
    budget = run.plan.made_by.get("budget") if run.plan is not None else None
    for found in ((run.search or {}).get("held_out"), budget):
        if isinstance(found, dict) and isinstance(found.get("predicted_speedup"), (int, float)):
            return float(found["predicted_speedup"]), html.escape(str(found.get("kernels", "no name")))
    return None


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _bound(saved: float | None) -> str:
    return "" if saved is None or saved >= 1 else f"{1 / (1 - saved):.2f}×"


def _settings(run: RunFolder) -> str | None:
    parts = []
    if run.plan is not None and run.plan.made_by:
        parts.append(f"<h3>The plan</h3>{_values(run.plan.made_by)}")
    if run.evaluation is not None:
        parts.append(f"<h3>The evaluation</h3>{_values({**run.evaluation.get('args', {})})}")
        parts.append(_values(run.evaluation["about"]))
        sources = [
            [t["task"], t["origin"], t["split"], t["shots"], t["shots_from"] or ""]
            for t in run.evaluation.get("tasks", [])
        ]
        if sources:
            parts.append(_table(["Task", "Data", "Split", "Examples", "Examples from"], sources, 3))
    if run.search is not None and run.search.get("about"):
        parts.append(f"<h3>The search</h3>{_values(run.search['about'])}")
    for name, bench in run.benches.items():
        if bench.get("about"):
            parts.append(f"<h3>Benchmark {html.escape(name)}</h3>{_values(bench['about'])}")
    return "".join(parts) or None


def _values(values: Any) -> str:
    rows = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        rows.append([key, text])
    return _table(["Setting", "Value"], rows, 2)


def _missing(run: RunFolder) -> str:
    lacks = []
    if run.plan is None:
        lacks.append("no plan (scap-nncf compress MODEL --output DIR)")
    if run.evaluation is None:
        lacks.append("no evaluation (scap-nncf evaluate MODEL --plan DIR --output DIR)")
    if run.search is None:
        lacks.append("no search (scap-nncf search)")
    if not run.benches:
        lacks.append("no measured speed (scap-nncf bench decode --output DIR)")
    return f" Not there: {html.escape('; '.join(lacks))}." if lacks else ""


_STYLE = """
:root{color-scheme:light;--ink:#1d2733;--soft:#5b6876;--line:#dfe4ea;--paper:#fff;--back:#f4f6f8;--accent:#0072b2}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
header{margin:8px 0 22px}
h1{font-size:30px;line-height:1.2;margin:2px 0 18px;overflow-wrap:anywhere}
h2{font-size:20px;margin:0 0 14px}
h3{font-size:15px;margin:22px 0 8px}
.kicker{margin:0;color:var(--accent);font-weight:600;letter-spacing:.02em}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:22px 24px;margin:0 0 18px}
.cards{display:flex;flex-wrap:wrap;gap:10px}
.cards div{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:12px 16px;flex:1 1 150px}
.cards b{display:block;font-size:22px;line-height:1.25;white-space:nowrap}
.cards span{color:var(--soft);font-size:13px}
.scroll{overflow-x:auto;margin:0 0 12px}
table{border-collapse:collapse;font-size:13.5px;min-width:50%}
th,td{padding:5px 14px 5px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600;white-space:nowrap}
td{overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;overflow-wrap:normal}
figure{margin:16px 0 8px}
figure img{display:block;max-width:100%;height:auto}
figcaption,.note,footer{color:var(--soft);font-size:13px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent);font-weight:600}
details>*:not(summary){margin-top:10px}
@media print{body{background:#fff}section{break-inside:avoid;border:0;padding:0}}
"""
