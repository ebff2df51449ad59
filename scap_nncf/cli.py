# SPDX-License-Identifier: Apache-2.0
"""
The command `scap-nncf`: thin functions over the Python API.

Results go to stdout; progress, log lines and errors to stderr. With `--json`, stdout holds one JSON object and nothing
else. Exit codes: 0 done, 1 an error in the work, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import nncf
import typer

import scap_nncf
from scap_nncf.algorithms import processes
from scap_nncf.cli_bench import bench
from scap_nncf.cli_evaluate import evaluate, report
from scap_nncf.cli_export import CONTEXT_SETTINGS, apply_recipe, export
from scap_nncf.cli_options import (
    CALIBRATION,
    OUTPUT,
    Allocation,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    IgnoreOption,
    JsonOption,
    Mode,
    ModelArgument,
    OverwriteOption,
    Prune,
    RolesOption,
    State,
    TrustOption,
    ignored_scope,
    parse_sparsity,
    split_list,
)
from scap_nncf.cli_output import launched, output_folder, work
from scap_nncf.cli_search import search

app = typer.Typer(
    name="scap-nncf",
    help="Calibrated activation sparsity (SCAP) for language models.\n\n"
    "Start with: scap-nncf demo. MODEL is a local folder, a hub id (org/name), a .gguf file, or demo "
    "(SmolLM2-135M-Instruct).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RESULT_FILE = "result.json"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"scap-nncf {scap_nncf.__version__} (nncf {nncf.__version__})")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    pass


@app.command()
def inspect(
    model: ModelArgument,
    roles: RolesOption = None,
    ignore: IgnoreOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Show which layers would be pruned, and which are left dense and why.

    MODEL is a local folder, a hub id (org/name), a .gguf file, or demo. Nothing is changed.
    """
    with work(as_json) as out:
        from scap_nncf.models import load_model

        loaded, _ = load_model(model, dtype.value, device, trust_remote_code)
        report = scap_nncf.inspect_model(loaded, roles=split_list(roles), ignored_scope=ignored_scope(ignore))
        layers = [layer for site in report.sites for layer in site.layers]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        # an OpenVINO model has constants, of which some are no parameters
        total = sum(parameter.numel() for parameter in loaded.parameters()) if hasattr(loaded, "parameters") else None
        result = {
            "model": model,
            "parameters": total,
            "prunable_weights": weights,
            "sites": [asdict(site) for site in report.sites],
            "left_out": [asdict(item) for item in report.left_out],
        }
        out.result(
            result,
            f"{report}\n{len(layers)} layers at {len(report.sites)} sites hold {weights / 1e6:.1f} M "
            f"{'' if total is None else f'of {total / 1e6:.1f} M '}parameters.",
        )


@app.command()
def compress(
    model: ModelArgument,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="0.5 (the default, for every layer), up=0.4,down=0.6, up,zero,0.35,down,zero,0.55 (the paper's "
            "grammar), a JSON object, or @FILE (YAML or JSON).",
        ),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            metavar="MODE", help="The mode η of a site: auto (default: centre where it pays), zero, mean, median, kde."
        ),
    ] = None,
    prune: Annotated[
        Prune | None,
        typer.Option(metavar="POLICY", help="all (default) prunes every token; decode leaves prompts dense."),
    ] = None,
    allocation: Annotated[
        Allocation | None,
        typer.Option(
            metavar="METHOD",
            help="How one number is spread over layers: auto (default: fisher where it can), uniform, profile, fisher.",
        ),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Train a vector for each layer's output: minutes, and free at run time.")
    ] = False,
    refine_steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of --refine.")] = 50,
    match: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text like that in use: thresholds are set to realise the target on it."),
    ] = None,
    roles: RolesOption = None,
    ignore: IgnoreOption = None,
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE", rich_help_panel=CALIBRATION, help="builtin, or a .txt or .jsonl file (.gz too)."),
    ] = "builtin",
    text_field: Annotated[
        str, typer.Option(metavar="KEY", rich_help_panel=CALIBRATION, help="Key of the text in a .jsonl file.")
    ] = "text",
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=CALIBRATION, help="Default: 64, or what the text gives."),
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=CALIBRATION, help="Tokens a sample.")
    ] = 256,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=CALIBRATION, help="Of the choice of samples.")] = 0,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            rich_help_panel=CALIBRATION,
            help="Calibrate each block on the pruned output of those before it.",
        ),
    ] = False,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            rich_help_panel=CALIBRATION,
            help="Leave the weights on disk and calibrate block by block: for models larger than memory.",
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=CALIBRATION,
            help="Take a saved plan instead of calibrating; with --sparsity, its statistics give new thresholds.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Steps from a YAML or JSON file: quantisation, then sparsity; --output gets the whole model.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=OUTPUT, help="New folder for the plan and its statistics."),
    ] = None,
    overwrite: OverwriteOption = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Calibrate a model and save the plan: for every layer, the mode and the threshold.

    MODEL is a local folder, a hub id (org/name), a .gguf file, or demo. Only the plan is saved, no weights; with
    --recipe the model is saved with its new weights.
    """
    spec = None if sparsity is None else parse_sparsity(sparsity)
    if recipe is not None:
        needless = {
            "--sparsity": spec is not None,
            "--mode": mode is not None,
            "--prune": prune is not None,
            "--roles": roles is not None,
            "--ignore": bool(ignore),
            "--sequential": sequential,
            "--plan": plan is not None,
            "--allocation": allocation is not None,
            "--refine": refine,
            "--match": match is not None,
        }
        if any(needless.values()):
            given = ", ".join(name for name, present in needless.items() if present)
            msg = f"{given} belongs into the recipe; leave out one of the two"
            raise typer.BadParameter(msg, param_hint="--recipe")
        steps = scap_nncf.load_recipe(recipe)
        with work(as_json) as out, launched(output, overwrite):
            from scap_nncf.models import load_model

            texts = _calibration_texts(calibration, text_field)
            loaded, tokenizer = load_model(model, dtype.value, device, trust_remote_code)
            batches = _batches(tokenizer, texts, length, samples, seed)
            target = output if processes.current().writes else None
            out.result(*apply_recipe(loaded, tokenizer, steps, batches, target, overwrite))
        return
    if plan is not None:
        needless = {
            "--calibration": calibration != "builtin",
            "--samples": samples is not None,
            "--sequential": sequential,
            "--roles": roles is not None,
            "--ignore": bool(ignore),
            "--mode": mode is not None and spec is None,
            "--allocation": allocation is not None and spec is None,
        }
        if any(needless.values()):
            given = ", ".join(name for name, present in needless.items() if present)
            msg = f"{given} has no effect on a plan that is already calibrated; leave out one of the two"
            raise typer.BadParameter(msg, param_hint="--plan")
    with work(as_json) as out, launched(output, overwrite), output_folder(output, overwrite) as folder:
        from scap_nncf.models import load_model
        from scap_nncf.text import read_texts, token_batches

        start = time.perf_counter()
        texts = [] if plan is not None and not refine else _calibration_texts(calibration, text_field)
        like = None if match is None else read_texts(match, text_field)
        loaded, tokenizer = load_model(model, dtype.value, device, trust_remote_code, offload)
        record: dict[str, Any] = {"model": model}
        began = time.perf_counter()
        if plan is not None:
            controller = _from_plan(loaded, plan, spec, mode, prune, allocation)
            record["from_plan"] = str(plan)
        else:
            batches = _batches(tokenizer, texts, length, samples, seed)
            record |= {"calibration": calibration, "samples": len(batches), "length": length, "seed": seed}
            scap_nncf.compress(
                loaded,
                algorithm=scap_nncf.Scap(
                    sparsity=0.5 if spec is None else spec,
                    mode=(mode or Mode.auto).value,
                    prune=(prune or Prune.all).value,
                    allocation=(allocation or Allocation.auto).value,
                    sequential=sequential,
                    roles=split_list(roles),
                    ignored_scope=ignored_scope(ignore),
                    subset_size=None,
                ),
                dataset=batches,
            )
            controller = scap_nncf.get_controller(loaded)
        if refine:
            batches = _batches(tokenizer, texts, length, samples, seed)
            report = controller.refine(batches, settings=scap_nncf.Refine(steps=refine_steps))
            record["refine"] = {**asdict(report), "losses": list(report.losses.items())}
        if like is not None:
            controller.match_realised(token_batches(tokenizer, like, length)[:32], subset_size=None)
        controller.reset_counters()
        statistics = controller.statistics()
        record |= {
            "output": None if output is None else str(output),
            "seconds": time.perf_counter() - start,
            "calibration_seconds": time.perf_counter() - began,
            "sparsity": statistics.sparsity,
            "prune": statistics.prune,
            "roles": [asdict(row) for row in statistics.roles()],
            "layers": [asdict(layer) for layer in statistics.layers],
        }
        if folder is not None:
            controller.save(folder)
            (folder / RESULT_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        saved = f"Saved to {output}" if folder is not None else "Nothing was saved: give --output DIR to keep the plan"
        text = f"{statistics}\n{saved} ({record['calibration_seconds']:.1f} s to calibrate)."
        if plan is not None:
            text = f"{statistics}\n{saved}."
    out.result(record, text)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to continue or answer.")],
    plan: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Plan to apply; without one the model runs dense.")
    ] = None,
    prune: Annotated[
        Prune | None, typer.Option(metavar="POLICY", help="all or decode; default: what the plan says.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Length of the answer.")] = 64,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: where there is one.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the most likely token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling, if the temperature is above 0.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Generate text, dense or with a plan; shows speed and realised sparsity.

    MODEL is a local folder, a hub id (org/name), a .gguf file, or demo.
    """
    with work(as_json) as out:
        from scap_nncf.generation import generate_text
        from scap_nncf.models import load_model

        loaded_plan = None
        if plan is not None:
            loaded_plan = scap_nncf.Plan.load(plan)  # before the model: a wrong path should not cost a load
            if prune is not None:
                loaded_plan = loaded_plan.with_prune(prune.value)
        loaded, tokenizer = load_model(model, dtype.value, device, trust_remote_code)
        if loaded_plan is not None:
            scap_nncf.compress(loaded, plan=loaded_plan)
        made = generate_text(loaded, tokenizer, prompt, max_new_tokens, chat, temperature, seed)
        result = {"model": model, "plan": None if plan is None else str(plan), "prompt": prompt, **asdict(made)}
        result["tokens_per_second"] = made.tokens_per_second
        sparse = "dense" if made.realised_sparsity is None else f"realised sparsity {made.realised_sparsity:.1%}"
        if made.realised_sparsity is None and scap_nncf.get_controller(loaded) is not None:
            sparse = "pruned"  # an OpenVINO model, which does not count while it runs
        out.result(result, f"{made.text}\n\n{made.tokens} tokens, {made.tokens_per_second:.1f} tokens/s, {sparse}")


@app.command()
def demo(
    short: Annotated[bool, typer.Option("--short", help="Fewer tokens everywhere: for a quick check.")] = False,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the plan, the picture and the figures.")
    ] = Path("scap-demo"),
    sparsity: Annotated[str | None, typer.Option(metavar="SPEC", help="Another setting; forms as in compress.")] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="Another model: folder, hub id or .gguf file.")] = "demo",
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--no-overwrite", help="Replace the folder of an earlier demo.")
    ] = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Calibrate SmolLM2-135M-Instruct, compare it dense and sparse, and save the plan and a picture.

    Takes two to four minutes on two cores, and once 93 MB of download.
    """
    from dataclasses import replace

    from scap_nncf.demo import DEFAULT, SHORT, run_demo

    settings = SHORT if short else DEFAULT
    if sparsity is not None:
        settings = replace(settings, sparsity=parse_sparsity(sparsity))
    with work(as_json) as out:
        result = run_demo(output, settings, model, overwrite=overwrite, console=out.console)
        out.result(asdict(result), None)


@app.command(name="build-openvino")
def build_openvino(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Build into this folder, to ship it; default: the cache."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """
    Compile the CPU kernels and the OpenVINO operation ahead; otherwise that happens at first use.

    Libraries in a folder are used where SCAP_NNCF_CPU_LIBRARIES names it; they are for this version of OpenVINO.
    """
    from scap_nncf.kernels.cpu.build import build, target

    with work(as_json) as out:
        built = {name: build(name, output) for name in ("cpu", "openvino")}
        result = {name: {"file": str(file), "for": target(name).description} for name, file in built.items()}
        text = "\n".join(f"{row['file']} (for {row['for']})" for row in result.values())
        out.result(result, text)


app.command(name="export", context_settings=CONTEXT_SETTINGS, add_help_option=False)(export)
app.command(name="evaluate")(evaluate)
app.command(name="report")(report)
app.command(name="search")(search)
app.add_typer(bench)


def _calibration_texts(calibration: str, field: str) -> Sequence[str]:
    from scap_nncf.text import builtin_text, read_texts

    return builtin_text("calibration") if calibration == "builtin" else read_texts(calibration, field)


def _batches(tokenizer: Any, texts: Sequence[str], length: int, samples: int | None, seed: int) -> list[Any]:
    from scap_nncf.text import token_batches

    if samples is not None:
        return token_batches(tokenizer, texts, length, samples, seed)
    return token_batches(tokenizer, texts, length, None, seed)[:64]


def _from_plan(
    model: Any, folder: Path, spec: Any, mode: Mode | None, prune: Prune | None, allocation: Allocation | None
) -> Any:
    # by path, not as a Plan: the statistics beside the plan come along
    scap_nncf.compress(model, plan=folder)
    controller: Any = scap_nncf.get_controller(model)
    policy = controller.plan.prune if prune is None else prune.value
    if spec is not None:
        method = None if allocation is None else allocation.value
        controller.set_sparsity(spec, mode=None if mode is None else mode.value, prune=policy, allocation=method)
    elif policy != controller.plan.prune:
        controller.set_prune(policy)
    return controller


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    :param arguments: without the program's name; None for `sys.argv`.
    :return: the exit code.
    """
    State.debug = False
    with contextlib.suppress(ValueError):  # not in the main thread: the caller's own affair
        # so that a half-written folder goes when the command is ended from outside
        signal.signal(signal.SIGTERM, _terminated)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="scap-nncf")
    except SystemExit as leave:
        code = leave.code
        return code if isinstance(code, int) else int(code is not None)
    except KeyboardInterrupt:
        print("scap-nncf: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if State.debug:
            raise
        print(f"scap-nncf: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _terminated(*_: Any) -> None:
    sys.exit(128 + signal.SIGTERM)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    expected = type(error).__module__.startswith(("nncf", "scap_nncf")) or isinstance(error, OSError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"
