# SPDX-License-Identifier: Apache-2.0
"""
The results of nm_patterns.py as Markdown tables.

    python examples/benchmarks/nm_table.py results/nm_smollm2.json

Changes are of the perplexity against the row's first column, paired by window, with the standard error of the mean over
the windows: the same text in both, so that they tell more than two perplexities by themselves.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

PATTERNS = ("top-k 50 %", "16:32", "8:16", "4:8", "2:4", "top-k 70 %")
MITIGATIONS = ("s-pts", "d-pts", "l-pts", "var", "ls", "var+l-pts", "r-sparse")
CRITERIA = ("clact", "amber", "wina")
WEIGHTS = ("magnitude", "wanda")


def change(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Relative change of the perplexity with its standard error, in percent."""
    if row is None or base is None:
        return ""
    # a part that was measured on less text has the first windows
    differences = [a - b for a, b in zip(row["window_nll"], base["window_nll"])]
    ratio = math.exp(statistics.fmean(differences))
    error = ratio * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{100 * (ratio - 1):+.1f} ± {100 * error:.1f} %"


def perplexity(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['perplexity']:.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(data: dict[str, Any], part: str, columns: tuple[str, ...]) -> str:
    """One row a pattern: magnitude without mitigation, and changes against it."""
    base, found = data["patterns"], data.get(part, {})
    rows = []
    for name in PATTERNS:
        cells = [change(found.get(f"{name}, {column}"), base.get(name)) for column in columns]
        if any(cells):
            rows.append([name, perplexity(base.get(name)), *cells])
    return table(["pattern", "act, none", *columns], rows)


def main() -> None:
    data = json.loads(Path(sys.argv[1]).read_text())
    settings = data["patterns"]["settings"]
    print(
        f"{settings['model']}, {settings['tokens']} tokens of {settings['text']}, windows of {settings['context']}.\n"
    )
    base = data["patterns"]
    rows = [
        [
            name,
            f"{100 * base[name]['realised_sparsity']:.0f} %",
            perplexity(base[name]),
            change(base[name], base["dense"]),
        ]
        for name in PATTERNS
        if name in base
    ]
    print(table(["pattern", "dropped", "perplexity", "against dense"], rows))
    print(f"\nDense: {perplexity(base['dense'])}\n")
    for part, columns in (("criteria", CRITERIA), ("mitigation", MITIGATIONS)):
        if part in data:
            print(compared(data, part, columns), end="\n\n")
    if "weights" in data:
        print(compared(data, "weights", WEIGHTS), end="\n\n")
    for part in ("cats", "training"):
        found = {key: row for key, row in data.get(part, {}).items() if isinstance(row, dict) and "perplexity" in row}
        if found:
            keys = ("realised_sparsity", "seconds", "peak_memory_MiB")
            rows = [
                [key, perplexity(row), change(row, base["dense"]), *(str(row.get(k, "")) for k in keys)]
                for key, row in found.items()
            ]
            print(table([part, "perplexity", "against dense", *keys], rows), end="\n\n")


if __name__ == "__main__":
    main()
