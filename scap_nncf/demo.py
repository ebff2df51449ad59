# SPDX-License-Identifier: Apache-2.0
"""The whole road on a small real model: calibrate, look, measure, generate, save. `scap-nncf demo` prints each step."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scap_nncf
from scap_nncf.extras import require
from scap_nncf.generation import Generation, generate_text
from scap_nncf.models import load_model
from scap_nncf.perplexity import PerplexityResult, perplexity
from scap_nncf.plots import plot_activations
from scap_nncf.progress import progress_bar
from scap_nncf.storage import new_folder
from scap_nncf.text import builtin_text, token_batches, token_ids

if TYPE_CHECKING:
    from rich.console import Console

    from scap_nncf.algorithms.scap.report import RoleStatistics

PLAN_FOLDER = "plan"
PLOT_FILE = "activations.png"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class DemoSettings:
    """
    :param sparsity: any form that `scap_nncf.compress` takes.
    :param samples: calibration windows of `length` tokens.
    :param evaluation_tokens: held-out tokens for each perplexity, in windows of `context`.
    :param new_tokens: length of each generated paragraph.
    """

    sparsity: Any
    mode: str = "auto"
    samples: int = 64
    length: int = 256
    evaluation_tokens: int = 8192
    context: int = 512
    new_tokens: int = 96
    prompt: str = "Why is the sky blue? Explain it in a few sentences."


# As in the paper, down bears more than gate and up. A model of 135 M has less to spare than a 7B one.
DEFAULT = DemoSettings(sparsity={"attn": 0.3, "gate": 0.35, "up": 0.35, "down": 0.5})
SHORT = replace(DEFAULT, samples=12, evaluation_tokens=1536, new_tokens=24)


@dataclass(frozen=True)
class DemoResult:
    settings: DemoSettings
    model: str
    roles: tuple[RoleStatistics, ...]
    sparsity: float
    realised_sparsity: float | None
    dense: PerplexityResult
    sparse: PerplexityResult
    dense_text: Generation
    sparse_text: Generation
    calibration_seconds: float
    seconds: float
    plan: str
    plot: str


def run_demo(
    output: str | Path,
    settings: DemoSettings = DEFAULT,
    model: str = "demo",
    overwrite: bool = False,
    console: Console | None = None,
) -> DemoResult:
    """
    Runs the demo and writes `plan/`, `activations.png` and `result.json` into `output`.

    :param model: what to run it on, as `load_model` takes it; weights are loaded as float32.
    :param overwrite: replace an `output` that an earlier run wrote.
    :param console: where the tables and texts go; None prints nothing.
    :raises nncf.ValidationError: if the model cannot be had or `output` cannot be written; before any work is done.
    """
    from rich.console import Console

    console = console or Console(quiet=True)
    require("matplotlib", "demo", "the demo")
    require("transformers", "demo", "the demo")
    start = time.perf_counter()
    output = Path(output).expanduser()
    with new_folder(output, overwrite=overwrite) as folder:
        say = _Steps(console)
        say(f"Loading {model}")
        torch_model, tokenizer = load_model(model, dtype="float32")
        held_out = token_ids(tokenizer, builtin_text("held_out"))
        batches = token_batches(tokenizer, builtin_text("calibration"), settings.length, settings.samples)
        report = scap_nncf.inspect_model(torch_model)
        layers = sum(len(site.layers) for site in report.sites)
        weights = sum(layer.in_features * layer.out_features for site in report.sites for layer in site.layers)
        console.print(f"  {layers} fully connected layers at {len(report.sites)} sites, {weights / 1e6:.0f} M weights")

        say("The dense model: perplexity on held-out text, and a paragraph")
        dense = _measure(torch_model, held_out, settings)
        dense_text = generate_text(torch_model, tokenizer, settings.prompt, settings.new_tokens)

        say(f"Calibrating on {settings.samples} x {settings.length} tokens of the built-in text")
        began = time.perf_counter()
        scap_nncf.compress(
            torch_model, algorithm="scap", dataset=batches, sparsity=settings.sparsity, mode=settings.mode
        )
        calibration_seconds = time.perf_counter() - began
        controller: Any = scap_nncf.get_controller(torch_model)

        say("The sparse model: the same text, the same question")
        controller.reset_counters()
        sparse = _measure(torch_model, held_out, settings)
        statistics = controller.statistics()
        sparse_text = generate_text(torch_model, tokenizer, settings.prompt, settings.new_tokens)

        controller.save(folder / PLAN_FOLDER)
        plot_activations(controller.plan, controller.histograms, folder / PLOT_FILE)
        result = DemoResult(
            settings=settings,
            model=str(model),
            roles=statistics.roles(),
            sparsity=statistics.sparsity,
            realised_sparsity=statistics.realised_sparsity,
            dense=dense,
            sparse=sparse,
            dense_text=dense_text,
            sparse_text=sparse_text,
            calibration_seconds=calibration_seconds,
            seconds=time.perf_counter() - start,
            plan=str(output / PLAN_FOLDER),
            plot=str(output / PLOT_FILE),
        )
        (folder / RESULT_FILE).write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    print_result(result, console)
    return result


def print_result(result: DemoResult, console: Console) -> None:
    from rich.table import Table

    table = Table(title="Sparsity by role, counted on the held-out text", title_justify="left")
    for name, justify in (("role", "left"), ("layers", "right"), ("target", "right"), ("realised", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("mode η", justify="right")
    table.add_column("threshold τ", justify="right")
    for row in result.roles:
        table.add_row(
            row.role,
            str(row.layers),
            _percent(row.sparsity),
            _percent(row.realised_sparsity),
            _range(row.mode_range),
            _range(row.threshold_range),
        )
    total = sum(row.layers for row in result.roles)
    table.add_section()
    table.add_row("all", str(total), _percent(result.sparsity), _percent(result.realised_sparsity), "", "")
    console.print()
    console.print(table)
    dense, sparse = result.dense, result.sparse
    rise = sparse.perplexity / dense.perplexity - 1
    console.print(
        f"\nPerplexity on {dense.tokens} held-out tokens (context {dense.context}): "
        f"dense [bold]{dense.perplexity:.2f}[/bold], sparse [bold]{sparse.perplexity:.2f}[/bold] ({rise:+.1%})"
    )
    console.print(f"\n[bold]{result.settings.prompt}[/bold]", highlight=False)
    console.print(f"[cyan]dense:[/cyan]  {_escape(result.dense_text.text)}", highlight=False)
    console.print(f"[cyan]sparse:[/cyan] {_escape(result.sparse_text.text)}", highlight=False)
    console.print(f"\nPlan:    {result.plan}\nPicture: {result.plot}", highlight=False, soft_wrap=True)
    console.print(
        f"{result.seconds:.0f} s in all, {result.calibration_seconds:.0f} s of it calibration. "
        "The pruning is simulated here: the zeros are real, the speed is that of the dense model.",
        highlight=False,
    )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _range(values: tuple[float, float]) -> str:
    low, high = values
    return f"{low:.3g}" if low == high else f"{low:.3g} … {high:.3g}"


def _measure(model: Any, ids: Any, settings: DemoSettings) -> PerplexityResult:
    with progress_bar("Perplexity") as advance:
        return perplexity(model, ids, settings.context, settings.evaluation_tokens, progress=advance)


class _Steps:
    """Numbers the steps as they begin."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._number = 0

    def __call__(self, text: str) -> None:
        self._number += 1
        self._console.print(f"[bold green]{self._number}.[/bold green] {text}", highlight=False)
