# SPDX-License-Identifier: Apache-2.0
"""What a benchmark of whole models found: rows, a table, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scap_nncf.extras import require


@dataclass(frozen=True)
class DecodeRow:
    """
    One timed way to decode.

    :param variant: ``dense``, or the name of a sparsity.
    :param mode: ``eager``, ``graph`` (eager in a CUDA graph) or ``compiled`` (torch.compile in a CUDA graph; without a
        GPU there is no graph).
    :param ms: median milliseconds a token (a step of the whole batch).
    :param spread: largest minus smallest of the rounds, ms.
    :param realised: dropped share of the inputs of the pruned layers, weighted by weight elements; None for dense.
    :param saved: share of the weights of all FC layers in the blocks that need not be read; None for dense.
    :param error: why there is no figure, or empty.
    """

    variant: str
    mode: str
    batch: int
    prompt: int
    ms: float | None
    spread: float | None
    tokens_per_second: float | None
    realised: float | None
    saved: float | None
    error: str = ""


@dataclass(frozen=True)
class PrefillRow:
    """
    Time to first token: one eager forward over the prompt.

    :param prune: token policy of the deployed model; ``none`` for dense.
    :param ms: median.
    :param spread: distance of the quartiles, ms.
    """

    variant: str
    prune: str
    prompt: int
    ms: float
    spread: float
    error: str = ""


@dataclass(frozen=True)
class MemoryRow:
    """
    Bytes of device memory of one model.

    :param weights: allocated once the model is ready.
    :param deploying: highest while it was deployed.
    :param running: highest while prefilling and decoding.
    """

    variant: str
    weights: int
    deploying: int
    running: int


@dataclass
class DecodeResult:
    """What a benchmark found; ``str()`` is a table."""

    about: dict[str, Any]
    decode: list[DecodeRow] = field(default_factory=list)
    prefill: list[PrefillRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)

    def best_dense(self, batch: int, prompt: int) -> float | None:
        """Milliseconds a token of the fastest dense way."""
        times = [
            row.ms
            for row in self.decode
            if row.variant == "dense" and row.ms is not None and (row.batch, row.prompt) == (batch, prompt)
        ]
        return min(times, default=None)

    def speedup(self, row: DecodeRow) -> float | None:
        """Over the fastest dense way of the same run."""
        best = self.best_dense(row.batch, row.prompt)
        return None if best is None or row.ms is None else best / row.ms

    def __str__(self) -> str:
        lines = [
            f"{self.about.get('model')} {self.about.get('dtype')} on {self.about.get('device')}",
            f"{'variant':12} {'mode':9} {'batch':>5} {'prompt':>6} {'ms/token':>9} {'±':>6} {'tok/s':>8} "
            f"{'x best dense':>12} {'realised':>8}",
        ]
        for row in self.decode:
            speedup = self.speedup(row)
            lines.append(
                f"{row.variant:12} {row.mode:9} {row.batch:5} {row.prompt:6} "
                + (
                    f"{row.ms:9.3f} {row.spread:6.3f} {row.tokens_per_second:8.1f} {speedup or 0:12.2f} "
                    + (f"{row.realised:8.3f}" if row.realised is not None else f"{'':8}")
                    if row.ms is not None
                    else f"failed: {row.error}"
                )
            )
        for prefill in self.prefill:
            lines.append(
                f"prefill {prefill.prompt} {prefill.variant:12} prune={prefill.prune:7} {prefill.ms:9.2f} ms "
                f"± {prefill.spread:.2f} {prefill.error}"
            )
        for memory in self.memory:
            lines.append(
                f"memory {memory.variant:12} weights {memory.weights / 2**20:.0f} MiB, while deploying "
                f"{memory.deploying / 2**20:.0f}, running {memory.running / 2**20:.0f}"
            )
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str], name: str = "decode") -> list[Path]:
        """
        Write NAME.json and NAME.csv, and NAME.png where matplotlib is installed.

        :return: the files.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        data = {
            "about": self.about,
            "decode": [{**asdict(row), "speedup": self.speedup(row)} for row in self.decode],
            "prefill": [asdict(row) for row in self.prefill],
            "memory": [asdict(row) for row in self.memory],
        }
        files = [target / f"{name}.json", target / f"{name}.csv"]
        files[0].write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        with files[1].open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, [*DecodeRow.__dataclass_fields__, "speedup"])
            writer.writeheader()
            writer.writerows(data["decode"])
        try:
            figure = plot(self)
        except ImportError as error:
            print(error, file=sys.stderr)
        else:
            figure.savefig(target / f"{name}.png", dpi=130)
            files.append(target / f"{name}.png")
        return files


def plot(result: DecodeResult) -> Any:
    """
    Milliseconds a token of every way, a panel for each batch size and prompt length; returns the matplotlib figure.

    :raises MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "report", "plotting a benchmark")
    panels = list(dict.fromkeys((row.batch, row.prompt) for row in result.decode))
    figure = figures.Figure(figsize=(1.6 + 3.2 * max(1, len(panels)), 3.6), layout="constrained")
    for axes, (batch, prompt) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels):
        rows = [r for r in result.decode if (r.batch, r.prompt) == (batch, prompt) and r.ms and r.mode != "eager"]
        labels = [f"{row.variant}\n{row.mode}" for row in rows]
        colours = ["#8d99ae" if row.variant == "dense" else "#1a936f" for row in rows]
        bars = axes.bar(range(len(rows)), [row.ms for row in rows], color=colours)
        for bar, row in zip(bars, rows):
            text = f"{row.ms:.2f}" + ("" if row.variant == "dense" else f"\n{result.speedup(row):.2f}x")
            axes.annotate(
                text, (bar.get_x() + bar.get_width() / 2, bar.get_height()), ha="center", va="bottom", fontsize=7
            )
        axes.set_xticks(range(len(rows)), labels, fontsize=7)
        axes.set_title(f"batch {batch}, prompt {prompt}", fontsize=9)
        axes.margins(y=0.18)
        axes.set_ylabel("ms a token" if batch == 1 else "ms a step", fontsize=8)
    about = result.about
    figure.suptitle(f"{about.get('model')}, {about.get('dtype')}, {about.get('device')}", fontsize=10)
    return figure
