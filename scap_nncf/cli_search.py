# SPDX-License-Identifier: Apache-2.0
"""The command `scap-nncf search`: from a limit on loss, bytes or time to a plan."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import nncf
import typer

from scap_nncf.cli_output import work

_TEXTS, _TRIALS, _LOADING, _OUTPUT = "Texts", "Trials", "Loading", "Output"


class Sampler(str, Enum):
    tpe = "tpe"
    nsga2 = "nsga2"
    grid = "grid"


def search(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or demo.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder of the run: plan, statistics, trials. An ended run goes on."
        ),
    ],
    max_loss: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Most rise of the perplexity: 1% or 0.01.")
    ] = None,
    bytes_left: Annotated[
        str | None, typer.Option("--bytes", metavar="SHARE", help="Most share of the bytes of weights left: 0.55.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(metavar="X", help="Least predicted speed-up of the projections.")
    ] = None,
    kernels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Kernel times for --speedup (bench kernel); default: an H100's."),
    ] = None,
    roles: Annotated[
        str | None, typer.Option(metavar="LIST", help="Only these: roles, groups (attn, ffn, all) or re:PATTERN.")
    ] = None,
    calibration: Annotated[
        str, typer.Option(metavar="FILE", rich_help_panel=_TEXTS, help="builtin, or a .txt or .jsonl file (.gz too).")
    ] = "builtin",
    text: Annotated[
        str, typer.Option(metavar="FILE", rich_help_panel=_TEXTS, help="What the loss is measured on while searching.")
    ] = "builtin",
    held_out: Annotated[
        str, typer.Option(metavar="FILE", rich_help_panel=_TEXTS, help="What the result is checked on.")
    ] = "builtin",
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_TEXTS, help="Calibration samples of 512 tokens.")
    ] = 16,
    tokens: Annotated[
        int, typer.Option(min=64, metavar="N", rich_help_panel=_TEXTS, help="Tokens of the search text.")
    ] = 8192,
    held_out_tokens: Annotated[
        int, typer.Option(min=64, metavar="N", rich_help_panel=_TEXTS, help="Tokens of the check.")
    ] = 8192,
    context: Annotated[int, typer.Option(min=2, metavar="N", rich_help_panel=_TEXTS, help="Tokens a window.")] = 512,
    trials: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", rich_help_panel=_TRIALS, help="Plans to try beyond what the prices alone give."
        ),
    ] = 0,
    sampler: Annotated[Sampler, typer.Option(rich_help_panel=_TRIALS, help="How trials are chosen.")] = Sampler.tpe,
    patience: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_TRIALS, help="Stop after so many without gain.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, metavar="S", rich_help_panel=_TRIALS, help="Begin no trial later.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", rich_help_panel=_TRIALS, help="sqlite:///FILE, journal:FILE or a database; default: in DIR."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_TRIALS, help="Processes on this machine.")
    ] = 1,
    join: Annotated[
        bool, typer.Option("--join", rich_help_panel=_TRIALS, help="Help a search that another process leads.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=_TRIALS, help="Of samples and trials.")] = 0,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", rich_help_panel=_LOADING, help="float32, bfloat16, float16, or auto.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", rich_help_panel=_LOADING, help="cpu, cuda, cuda:1, or auto.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", rich_help_panel=_LOADING, help="Run code of the checkpoint."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="One JSON object on stdout and nothing else there.")
    ] = False,
) -> None:
    """
    Find the plan for a limit on loss, bytes or time, and check it on held-out text.

    MODEL is a local folder, a hub id (org/name), a .gguf file, or demo. The folder gets plan.json with its statistics,
    and search.json with every trial for `scap-nncf report`.
    """
    from scap_nncf.algorithms.budget import Budget
    from scap_nncf.search import Search

    limits: dict[str, Any] = {"max_loss": max_loss, "bytes": bytes_left, "speedup": speedup}
    try:
        budget = Budget(**limits, kernels=None if kernels is None else str(kernels))
        url = storage or f"sqlite:///{output / 'search.db'}"
        settings = Search(trials, sampler.value, patience, seconds, url, leader=not join, seed=seed)
    except nncf.ValidationError as error:
        raise typer.BadParameter(str(error)) from error
    texts = {"calibration": calibration, "text": text, "held_out": held_out, "samples": samples, "tokens": tokens}
    texts |= {"held_out_tokens": held_out_tokens, "context": context, "seed": seed}
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    with work(as_json) as out:
        helpers = [_spawn() for _ in range(workers - 1)]
        try:
            result = run_search(model, output, budget, settings, texts, loading, roles)
        except BaseException:
            for helper in helpers:
                helper.terminate()
            raise
        for helper in helpers:
            helper.wait()
        out.result(result, None if join else describe(result))


def _spawn() -> subprocess.Popen[bytes]:
    """Another worker with the same command line."""
    arguments = [*sys.argv[1:]]
    at = next(i for i, part in enumerate(arguments) if part.startswith("--workers"))
    del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    command = [sys.executable, "-m", "scap_nncf", *arguments, "--join"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_search(
    name: str,
    output: Path,
    budget: Any,
    settings: Any,
    texts: dict[str, Any],
    loading: dict[str, Any],
    roles: str | None = None,
) -> dict[str, Any]:
    """
    Calibrate (or take up the statistics of a run that was ended), search, check.

    :return: the record, as JSON data.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    import scap_nncf
    from scap_nncf.algorithms.budget import KernelTable
    from scap_nncf.algorithms.scap.calibration import STATISTICS_FILE
    from scap_nncf.budget import traffic_of
    from scap_nncf.extras import require
    from scap_nncf.models import load_model
    from scap_nncf.perplexity import perplexity
    from scap_nncf.search import least_for, search_plan
    from scap_nncf.text import token_batches

    require("optuna", "search", "searching")
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    _refuse_foreign(output)
    table = KernelTable.load(budget.kernels)
    model, tokenizer = load_model(name, **loading)
    search_ids, check_ids = _text_ids(tokenizer, texts)
    config = scap_nncf.Scap(allocation="fisher", roles=None if roles is None else tuple(roles.split(",")))
    if (output / STATISTICS_FILE).is_file():
        calibration = scap_nncf.CalibrationStatistics.load(output)
    elif settings.leader:
        batches = token_batches(tokenizer, _texts(texts["calibration"], "calibration"), 512, None, texts["seed"])
        batches = batches[: texts["samples"]]
        chosen = {"allocation": "fisher", "subset_size": None, "roles": config.roles}
        calibration = scap_nncf.calibrate(model, dataset=batches, **chosen)
        calibration.save(output)
    else:
        while not (output / STATISTICS_FILE).is_file():
            time.sleep(1.0)
        calibration = scap_nncf.CalibrationStatistics.load(output)
    calibrated = time.perf_counter() - start

    def strip() -> None:
        controller = scap_nncf.get_controller(model)
        if controller is not None:
            controller.strip()

    def measure(plan: Any, ids: torch.Tensor = search_ids) -> float:
        if plan is None:
            return perplexity(model, ids, texts["context"]).perplexity
        scap_nncf.compress(model, plan=plan)
        try:
            return perplexity(model, ids, texts["context"]).perplexity
        finally:
            strip()

    traffic = traffic_of(model, calibration.sites)
    about = {"model": name, "budget": str(budget), **asdict(settings), **texts, "roles": roles}
    about |= {"scap_nncf": scap_nncf.__version__, "nncf": nncf.__version__, "storage": _shown(settings.storage)}
    fingerprint = f"{name} {search_ids.tolist()} {texts['context']}"
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Searching", total=None)

        def progress(done: int, total: int, line: str) -> None:
            bar.update(task, completed=done, total=total or None, description=f"Searching ({line})")

        result = search_plan(
            calibration,
            config,
            budget,
            measure,
            settings,
            sparsity_for=least_for(budget, traffic, table),
            fingerprint=fingerprint,
            about=about,
            folder=output,
            progress=progress,
        )
    plan = result.plan
    assert plan is not None
    if not settings.leader:
        return {"trials": len(result.trials)}
    best = next((trial for trial in result.trials if trial.number == result.best), None)
    dense = measure(None, check_ids)
    loss = measure(plan, check_ids) / dense - 1
    checked: dict[str, Any] = {
        "text": _shown(texts["held_out"]),
        "tokens": len(check_ids),
        "dense": dense,
        "loss": loss,
    }
    if budget.max_loss is not None:
        checked |= {"promised": float(budget.max_loss), "excess": loss - float(budget.max_loss)}
    checked |= {"sparsity": best.byte_sparsity if best else 0.0, "bytes_left": traffic.left(plan)}
    checked |= {"predicted_speedup": table.speedup(plan, traffic), "kernels": "H100" if not budget.kernels else "given"}
    checked |= {"calibration_seconds": calibrated, "seconds": time.perf_counter() - start}
    result.held_out = checked
    result.save(output)
    made_by = {**plan.made_by, "budget": {"budget": str(budget), "trials": len(result.trials), **checked}}
    scap_nncf.compress(model, plan=replace(plan, made_by=made_by))
    controller = scap_nncf.get_controller(model)
    assert controller is not None
    controller.calibration = calibration
    controller.save(output)
    return {
        "output": str(output),
        "budget": str(budget),
        "dense": result.dense,
        "loss": best.loss if best else 0.0,
        "trials": len(result.trials),
        "best": result.best,
        "held_out": checked,
    }


def describe(result: dict[str, Any]) -> str:
    """The outcome of a search in a few lines."""
    checked = result["held_out"]
    lines = [
        f"Budget: {result['budget']}. {result['trials']} plans measured in {checked['seconds']:.0f} s "
        f"({checked['calibration_seconds']:.0f} s of them to load and calibrate).",
        f"Best: sparsity {checked['sparsity']:.1%} of the blocks, {checked['bytes_left']:.1%} of the bytes of all "
        f"projections left, predicted speed-up {checked['predicted_speedup']:.2f} ({checked['kernels']}).",
        f"Loss on the search text {100 * result['loss']:+.2f} %, on the held-out text {100 * checked['loss']:+.2f} % "
        f"({checked['tokens']} tokens, dense {checked['dense']:.2f}).",
    ]
    if checked.get("excess", 0.0) > 0:
        lines.append(
            f"The held-out text loses {100 * checked['excess']:.2f} points more than promised: search on more text, or "
            "on text that is more like it."
        )
    return "\n".join([*lines, f"Saved to {result['output']}."])


def _refuse_foreign(output: Path) -> None:
    if output.is_file():
        msg = f"{output} is a file; expected a folder for the run."
        raise nncf.ValidationError(msg)
    ours = ("statistics.safetensors", "search.db", "search.json", "plan.json")
    if any(output.iterdir()) and not any((output / name).exists() for name in ours):
        msg = f"{output} is not empty and holds no search; give another folder."
        raise nncf.ValidationError(msg)


def _texts(source: str, part: str) -> list[str]:
    from scap_nncf.text import builtin_text, read_texts

    return list(builtin_text(part)) if source == "builtin" else read_texts(source)  # type: ignore[arg-type]


def _text_ids(tokenizer: Any, texts: dict[str, Any]) -> tuple[Any, Any]:
    """Tokens to search on and tokens to check on; of one text, its first and its last part."""
    from scap_nncf.text import token_ids

    search_ids = token_ids(tokenizer, _texts(texts["text"], "held_out"))
    if texts["text"] == texts["held_out"]:
        check_ids = search_ids[len(search_ids) // 2 :]
        search_ids = search_ids[: len(search_ids) // 2]
    else:
        check_ids = token_ids(tokenizer, _texts(texts["held_out"], "held_out"))
    for what, ids in (("search", search_ids), ("held-out", check_ids)):
        if len(ids) < texts["context"]:
            msg = f"The {what} text has {len(ids)} tokens, less than the context of {texts['context']}: give more text."
            raise nncf.ValidationError(msg)
    return search_ids[: texts["tokens"]], check_ids[: texts["held_out_tokens"]]


def _shown(source: str | None) -> str | None:
    """A source without the folders of this machine."""
    return None if source is None else source.rsplit("/", 1)[-1]
