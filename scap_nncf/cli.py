# SPDX-License-Identifier: Apache-2.0
"""
The command `scap-nncf`: thin functions over the Python API.

Results go to stdout; progress, log lines and errors to stderr. With `--json`, stdout holds one JSON object and nothing
else. Exit codes: 0 done, 1 an error in the work, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import nncf
import typer

import scap_nncf
from scap_nncf.algorithms import processes
from scap_nncf.cli_evaluate import evaluate
from scap_nncf.cli_export import CONTEXT_SETTINGS, apply_recipe, export

if TYPE_CHECKING:
    from rich.console import Console

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
_MAX_SPARSITY_FILE = 256 << 10  # bytes


class Mode(str, Enum):
    auto = "auto"
    zero = "zero"
    mean = "mean"
    median = "median"
    kde = "kde"


class Prune(str, Enum):
    all = "all"
    decode = "decode"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class _State:
    """What `main` has to know of the command that ran."""

    debug = False


def _set_debug(value: bool) -> bool:
    _State.debug = _State.debug or value
    return value


_LOADING, _CALIBRATION, _OUTPUT = "Loading", "Calibration", "Output"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or demo.")]
RolesOption = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Only these layers: roles, groups (attn, ffn, all) or re:PATTERN, by commas."),
]
IgnoreOption = Annotated[
    list[str] | None, typer.Option(metavar="REGEX", help="Leave layers dense whose name matches; repeatable.")
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=_OUTPUT, help="Print one JSON object on stdout and nothing else there."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="DTYPE",
        rich_help_panel=_LOADING,
        help="float32, bfloat16, float16, or auto: the checkpoint's own.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", rich_help_panel=_LOADING, help="cpu, cuda, cuda:1, or auto: a GPU if any.")
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=_LOADING, help="Run model code that comes with a checkpoint."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=_OUTPUT, help="Replace a folder that scap-nncf wrote earlier."),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=_set_debug,
        is_eager=True,
        rich_help_panel=_OUTPUT,
        help="Show the traceback of an error.",
    ),
]


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
    with _work(as_json) as out:
        from scap_nncf.models import load_model

        loaded, _ = load_model(model, dtype.value, device, trust_remote_code)
        report = scap_nncf.inspect_model(loaded, roles=_split(roles), ignored_scope=_ignored(ignore))
        layers = [layer for site in report.sites for layer in site.layers]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        total = sum(parameter.numel() for parameter in loaded.parameters())
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
            f"of {total / 1e6:.1f} M parameters.",
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
    roles: RolesOption = None,
    ignore: IgnoreOption = None,
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE", rich_help_panel=_CALIBRATION, help="builtin, or a .txt or .jsonl file (.gz too)."),
    ] = "builtin",
    text_field: Annotated[
        str, typer.Option(metavar="KEY", rich_help_panel=_CALIBRATION, help="Key of the text in a .jsonl file.")
    ] = "text",
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=_CALIBRATION, help="Default: 64, or what the text gives."),
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_CALIBRATION, help="Tokens a sample.")
    ] = 256,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=_CALIBRATION, help="Of the choice of samples.")] = 0,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            rich_help_panel=_CALIBRATION,
            help="Calibrate each block on the pruned output of those before it.",
        ),
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            rich_help_panel=_CALIBRATION,
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
        typer.Option(metavar="DIR", rich_help_panel=_OUTPUT, help="New folder for the plan and its statistics."),
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
        }
        if any(needless.values()):
            given = ", ".join(name for name, present in needless.items() if present)
            msg = f"{given} belongs into the recipe; leave out one of the two"
            raise typer.BadParameter(msg, param_hint="--recipe")
        steps = scap_nncf.load_recipe(recipe)
        with _work(as_json) as out, _launched(output, overwrite):
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
        }
        if any(needless.values()):
            given = ", ".join(name for name, present in needless.items() if present)
            msg = f"{given} has no effect on a plan that is already calibrated; leave out one of the two"
            raise typer.BadParameter(msg, param_hint="--plan")
    with _work(as_json) as out, _launched(output, overwrite), _output(output, overwrite) as folder:
        from scap_nncf.models import load_model

        start = time.perf_counter()
        texts = [] if plan is not None else _calibration_texts(calibration, text_field)
        loaded, tokenizer = load_model(model, dtype.value, device, trust_remote_code)
        record: dict[str, Any] = {"model": model}
        began = time.perf_counter()
        if plan is not None:
            controller = _from_plan(loaded, plan, spec, mode, prune)
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
                    sequential=sequential,
                    roles=_split(roles),
                    ignored_scope=_ignored(ignore),
                    subset_size=None,
                ),
                dataset=batches,
            )
            controller = scap_nncf.get_controller(loaded)
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
    with _work(as_json) as out:
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
    with _work(as_json) as out:
        result = run_demo(output, settings, model, overwrite=overwrite, console=out.console)
        out.result(asdict(result), None)


app.command(name="export", context_settings=CONTEXT_SETTINGS, add_help_option=False)(export)
app.command(name="evaluate")(evaluate)


# -- what commands share -----------------------------------------------------------------------------------------------


class _Output:
    """Where a command's result goes: text on the console, or one JSON object on stdout."""

    def __init__(self, stream: Any, as_json: bool) -> None:
        from rich.console import Console

        self._stream = stream
        self._as_json = as_json
        # tables are wider than the 80 columns that rich takes for a pipe
        width = None if stream.isatty() or "COLUMNS" in os.environ else 120
        self.console: Console = Console(file=sys.stderr if as_json else stream, width=width)

    def result(self, data: Any, text: str | None) -> None:
        if not processes.current().writes:
            return
        if self._as_json:
            # NaN and Infinity are no JSON; a reader would choke on them
            self._stream.write(json.dumps(_finite(data), allow_nan=False) + "\n")
        elif text is not None:
            self._stream.write(text + "\n")
        self._stream.flush()


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    if isinstance(data, float) and data - data != 0:
        return None
    return data


@contextlib.contextmanager
def _work(as_json: bool) -> Iterator[_Output]:
    """Runs the work with everything that prints (progress bars of NNCF, libraries) sent to stderr."""
    out = _Output(sys.stdout, as_json)
    handlers = [h for h in logging.getLogger("nncf").handlers if isinstance(h, logging.StreamHandler)]
    before = [handler.setStream(sys.stderr) for handler in handlers]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield out
    finally:
        for handler, stream in zip(handlers, before):
            if stream is not None:
                handler.setStream(stream)


@contextlib.contextmanager
def _launched(output: Path | None, overwrite: bool) -> Iterator[None]:
    """
    The processes of `torchrun` or `accelerate launch` work together; the first one writes and prints. What they
    calibrated when they are killed lies beside the output, and the same command goes on from there.
    """
    from scap_nncf.storage import check_target

    started = processes.start_from_launcher()
    try:
        with processes.current().together():
            if output is not None and processes.current().writes:
                check_target(output, overwrite)
        if output is None:
            yield
        else:
            target = output.expanduser()
            with scap_nncf.resumable(target.parent / f".{target.name}.unfinished"):
                yield
    finally:
        if started:
            import torch.distributed

            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _output(folder: Path | None, overwrite: bool) -> Iterator[Path | None]:
    from scap_nncf.storage import new_folder

    if folder is None or not processes.current().writes:
        yield None
    else:
        with new_folder(folder, overwrite) as temporary:
            yield temporary


def parse_sparsity(text: str) -> Any:
    """
    A sparsity given on the command line, in a form that `scap_nncf.compress` takes.

    :param text: a number, `role=number` pairs, the reference's grammar, a JSON object, or `@FILE` (YAML or JSON).
    :raises typer.BadParameter: if it has none of these forms.
    """
    try:
        return float(text)
    except ValueError:
        pass
    if text.startswith("@"):
        return _sparsity_file(Path(text[1:]).expanduser())
    if text.lstrip().startswith("{"):
        try:
            return _checked_mapping(json.loads(text), "--sparsity")
        except (ValueError, RecursionError) as error:
            msg = f"--sparsity is no JSON object: {error}"
            raise typer.BadParameter(msg) from None
    if "=" in text:
        pairs = [pair.rpartition("=") for pair in text.split(",")]
        return _checked_mapping({key.strip(): value for key, _, value in pairs}, "--sparsity")
    if "," in text:
        return text  # the reference's grammar; the library checks it
    msg = f"--sparsity {text!r}: expected a number such as 0.5, up=0.4,down=0.6, a grammar string, JSON, or @FILE"
    raise typer.BadParameter(msg)


def _sparsity_file(path: Path) -> Any:
    from scap_nncf.algorithms.documents import parse_json, parse_yaml, read_text

    parse = parse_json if path.suffix.lower() == ".json" else parse_yaml
    try:
        data = parse(read_text(path, _MAX_SPARSITY_FILE, "a sparsity"), f"@{path}")
    except nncf.ValidationError as error:
        raise typer.BadParameter(" ".join(f"--sparsity {error}".split())) from None
    if isinstance(data, dict) and set(data) == {"sparsity"}:
        data = data["sparsity"]
    if isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    return data if isinstance(data, str) else _checked_mapping(data, f"--sparsity @{path}")


def _checked_mapping(data: Any, where: str) -> dict[str, float]:
    try:
        if not isinstance(data, dict) or not data:
            raise ValueError
        return {str(key): float(value) for key, value in data.items()}
    except (TypeError, ValueError, OverflowError):
        msg = f"{where}: expected roles and numbers such as up=0.4,down=0.6, got {str(data)[:200]}"
        raise typer.BadParameter(msg) from None


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _ignored(patterns: list[str] | None) -> Any:
    return nncf.IgnoredScope(patterns=patterns) if patterns else None


def _calibration_texts(calibration: str, field: str) -> Sequence[str]:
    from scap_nncf.text import builtin_text, read_texts

    return builtin_text("calibration") if calibration == "builtin" else read_texts(calibration, field)


def _batches(tokenizer: Any, texts: Sequence[str], length: int, samples: int | None, seed: int) -> list[Any]:
    from scap_nncf.text import token_batches

    if samples is not None:
        return token_batches(tokenizer, texts, length, samples, seed)
    return token_batches(tokenizer, texts, length, None, seed)[:64]


def _from_plan(model: Any, folder: Path, spec: Any, mode: Mode | None, prune: Prune | None) -> Any:
    # by path, not as a Plan: the statistics beside the plan come along
    scap_nncf.compress(model, plan=folder)
    controller: Any = scap_nncf.get_controller(model)
    policy = controller.plan.prune if prune is None else prune.value
    if spec is not None:
        controller.set_sparsity(spec, mode=None if mode is None else mode.value, prune=policy)
    elif policy != controller.plan.prune:
        controller.set_prune(policy)
    return controller


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    :param arguments: without the program's name; None for `sys.argv`.
    :return: the exit code.
    """
    _State.debug = False
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
        if _State.debug:
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
