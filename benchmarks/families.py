# SPDX-License-Identifier: Apache-2.0
"""
The table of docs/families.md: every model family at toy size, from inspection to a reload.

    python benchmarks/families.py                 # all families: data, plot and table
    python benchmarks/families.py llama whisper   # some; the others keep the rows they have

Models are random and tiny (tests/families.py): the figures say whether sites are found and thresholds hold what they
promise, not what sparsity costs in quality. Calibrated on 8 samples, sequentially and uniformly; "other" is 8 samples
of another seed. Writes results/families.json and results/families.png, and the table into docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from families import FAMILIES, Family  # noqa: E402

import scap_nncf  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table: python benchmarks/families.py -->", "<!-- end of the table -->"
LEVELS = (0.3, 0.5)
SAMPLES, BATCH = 8, 4


def output_of(model: Any, sample: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**sample)
    return output if isinstance(output, torch.Tensor) else output[0]


def realised(model: Any, samples: list[Any]) -> list[tuple[str, float, float]]:
    """(layer, target, realised) of every layer over the samples; natural zeros are above any target by right."""
    controller = scap_nncf.get_controller(model)
    controller.reset_counters()
    for sample in samples:
        output_of(model, sample)
    layers = controller.statistics().layers
    return [
        (layer.name, layer.sparsity, layer.realised_sparsity) for layer in layers if layer.realised_sparsity is not None
    ]


def measure(family: Family) -> dict[str, Any]:
    started = time.perf_counter()
    model = family.make(0)
    calibration, other = family.samples(SAMPLES, BATCH, 0), family.samples(SAMPLES, BATCH, 1000)
    report = scap_nncf.inspect_model(model, calibration[0])
    found = [[layer.role for layer in site.layers] for site in report.sites]
    dense = output_of(model, calibration[0])
    row: dict[str, Any] = {
        "kind": family.kind,
        "sites": len(found),
        "expected": len(family.roles),
        "roles_as_expected": found == [list(roles) for roles in family.roles],
        "layers": sum(map(len, found)),
    }
    points = []
    for level in LEVELS:
        settings = {"sparsity": level, "mode": "auto", "sequential": True, "allocation": "uniform"}
        scap_nncf.compress(model, dataset=calibration, **settings)
        controller = scap_nncf.get_controller(model)
        same = [abs(got - target) for _, target, got in realised(model, calibration)]
        rest = [(target, got) for _, target, got in realised(model, other)]
        natural = sum(layer.mode_method == "natural" for layer in controller.statistics().layers)
        row[f"at {level}"] = {
            "calibration_data_max": max(same),
            "calibration_data_mean": sum(same) / len(same),
            "other_data_max": max(abs(got - target) for target, got in rest),
            "other_data_mean": sum(abs(got - target) for target, got in rest) / len(rest),
            "natural_layers": natural,
        }
        points += rest
        if level == LEVELS[-1]:
            sparse = output_of(model, calibration[0])
            with tempfile.TemporaryDirectory() as folder:
                scap_nncf.save_pretrained(model, Path(folder) / "model")
                fresh = {} if hasattr(model, "config") else {"model": family.make(1)}
                again = scap_nncf.load_pretrained(Path(folder) / "model", **fresh)
                row["reload_difference"] = float((output_of(again, calibration[0]) - sparse).abs().max())
            row["changes_output"] = float((sparse - dense).norm() / dense.norm())
            controller.set_sparsity(0.0)
            row["exact_when_nothing_is_dropped"] = torch.equal(output_of(model, calibration[0]), dense)
        controller.strip()
    row["strip_is_exact"] = torch.equal(output_of(model, calibration[0]), dense)
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["other_data_points"] = [[round(target, 4), round(got, 4)] for target, got in points]
    return row


def table(rows: dict[str, Any]) -> str:
    lines = [
        "| family | kind | sites found / expected | off target on calibration data: mean, max (30 %; 50 %) "
        "| on other data: mean, max (30 %; 50 %) | τ < 0 exact | reload differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = {
            data: "; ".join(
                f"{100 * row[f'at {level}'][f'{data}_mean']:.1f}, {100 * row[f'at {level}'][f'{data}_max']:.1f}"
                for level in LEVELS
            )
            for data in ("calibration_data", "other_data")
        }
        natural = row["at 0.3"]["natural_layers"]
        note = f" ({natural} layers drop natural zeros only)" if natural else ""
        roles = "" if row["roles_as_expected"] else " (roles differ)"
        lines.append(
            f"| {name} | {row['kind']}{note} | {row['sites']} / {row['expected']}{roles} | {cells['calibration_data']} "
            f"| {cells['other_data']} | {'yes' if row['exact_when_nothing_is_dropped'] else 'NO'} "
            f"| {row['reload_difference']:g} |"
        )
    return "\n".join(lines)


def plot(rows: dict[str, Any]) -> None:
    """Realised sparsity of every layer on data it was not calibrated on, as in the paper's figure 8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    for level, colour in zip(LEVELS, ("tab:blue", "tab:orange")):
        for place, row in enumerate(rows.values()):
            values = [got for target, got in row["other_data_points"] if target == level]
            axes.plot([place] * len(values), values, ".", color=colour, alpha=0.4, markersize=4)
        axes.axhspan(level - 0.04, level + 0.04, color=colour, alpha=0.12, label=f"{level:.0%} ± 4 points")
    axes.set_xticks(range(len(rows)), list(rows), rotation=75)
    axes.set_ylabel("realised sparsity of a layer, other data")
    axes.legend()
    figure.savefig(RESULTS / "families.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", choices=[*FAMILIES, []])
    options = parser.parse_args()
    file = RESULTS / "families.json"
    known = json.loads(file.read_text(encoding="utf-8"))["families"] if file.is_file() else {}
    for name in options.families or FAMILIES:
        known[name] = measure(FAMILIES[name])
        row = known[name]
        print(f"{name:15} {row['sites']}/{row['expected']} sites, {row['seconds']} s", flush=True)
        rows = {key: known[key] for key in FAMILIES if key in known}
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        data = {"command": "python benchmarks/families.py", **versions, "families": rows}
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    plot(rows)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
