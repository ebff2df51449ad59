# SPDX-License-Identifier: Apache-2.0
"""
The command ``scap-nncf export``, which is ``optimum-cli export openvino-scap`` with the model as an argument, and what
``scap-nncf compress --recipe`` does.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

import scap_nncf
from scap_nncf.cli_options import ignored_scope, parse_sparsity, split_list
from scap_nncf.cli_output import work
from scap_nncf.extras import MissingExtraError, require
from scap_nncf.recipe import builders_of

#: For ``app.command``: all arguments go to the parser below, which has every flag of Optimum's own command.
CONTEXT_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def export(context: typer.Context) -> None:
    """
    Export a model to OpenVINO IR through Optimum-Intel, quantised as asked, calibrated and pruned.

    Takes every flag of `optimum-cli export openvino` (--weight-format int4, --awq, --task ...) and those of `compress`.
    """
    raise typer.Exit(main(context.args))


def apply_recipe(
    model: Any, tokenizer: Any, steps: list[Any], dataset: Any, output: Path | None, overwrite: bool
) -> tuple[dict[str, Any], str]:
    """
    Apply the steps of a recipe, and save the whole model where an output is given.

    :return: the result as data and as text.
    """
    model = scap_nncf.compress(model, algorithm=steps, dataset=dataset)
    controller = scap_nncf.get_controller(model)
    names = [type(builder.config).__name__ for builder in builders_of(steps, {})]  # in the order in which they ran
    result: dict[str, Any] = {
        "steps": names,
        "samples": len(dataset),
        "output": None if output is None else str(output),
    }
    text = f"Applied {', '.join(names)}."
    if controller is not None:
        statistics = controller.statistics()
        text = f"{statistics}\n{text}"
        result |= {"sparsity": statistics.sparsity, "roles": [asdict(row) for row in statistics.roles()]}
    if output is None:
        return result, f"{text} Nothing was saved: give --output DIR to keep the model."
    scap_nncf.save_pretrained(model, output, tokenizer, overwrite=overwrite)
    return result, f"{text} Saved to {output}."


def main(arguments: list[str]) -> int:
    """
    :param arguments: without the name of the program and the command.
    :return: the exit code.
    """
    parser = make_parser()
    return run_export(parser.parse_args(arguments), parser)


def make_parser() -> argparse.ArgumentParser:
    """Optimum's flags and ours, with the model as the first argument."""
    openvino = require("optimum.commands.export.openvino", "optimum", "scap-nncf export")
    from optimum.commands.register.register_scap import add_scap_arguments

    parser = argparse.ArgumentParser(
        "scap-nncf export",
        description="Export a model to OpenVINO IR through Optimum-Intel, quantised as asked, calibrated and pruned.",
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id, folder of a PyTorch or OpenVINO model, or demo.")
    openvino.parse_args_openvino(parser)
    for action in parser._actions:
        if "--model" in action.option_strings:
            action.required, action.help, action.default = False, argparse.SUPPRESS, argparse.SUPPRESS
    add_scap_arguments(parser)
    return parser


def run_export(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """
    Run the export of parsed flags; errors are one line on stderr.

    :return: the exit code: 0 done, 1 an error in the work, 2 wrong usage.
    """
    from scap_nncf.optimum import default_data, export_arguments

    if given.plan is not None:
        needless = [
            name
            for name, present in {
                "--sparsity": given.sparsity is not None,
                "--mode": given.mode is not None,
                "--prune": given.prune is not None,
                "--roles": given.roles is not None,
                "--ignore": bool(given.ignore),
                "--sequential": given.sequential,
                "--calibration": given.calibration != "builtin",
            }.items()
            if present
        ]
        if needless:
            parser.error(f"{', '.join(needless)} has no effect on a plan that is already calibrated")

    def data(folder: Path, task: str) -> tuple[Any, Any]:
        samples = default_data(
            folder, task, given.calibration, given.text_field, given.length, given.samples, given.seed
        )
        return samples, None

    expected: tuple[type[Exception], ...] = (typer.BadParameter, MissingExtraError, OSError, *_errors())
    try:
        _check_files(given)
        with work(as_json=False):  # progress and tables of NNCF go to stderr; stdout holds the result alone
            folder = export_arguments(given, _scap(given), data, given.plan, given.overwrite, given.runtime)
            controller = scap_nncf.get_controller(scap_nncf.load_openvino(folder))
        assert controller is not None
        print(f"{controller.statistics()}\nSaved to {folder}")
    except expected as error:
        text = " ".join(str(error).split())
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        return 2 if isinstance(error, typer.BadParameter) else 1
    return 0


def _check_files(given: argparse.Namespace) -> None:
    """Read what the user named before the export, which takes minutes; folders of images are looked at after it."""
    from scap_nncf.text import read_texts

    if given.plan is not None:
        scap_nncf.Plan.load(given.plan)
    elif given.calibration != "builtin" and not Path(given.calibration).is_dir():
        read_texts(given.calibration, given.text_field)


def _scap(given: argparse.Namespace) -> Any:
    return scap_nncf.Scap(
        sparsity=0.5 if given.sparsity is None else parse_sparsity(given.sparsity),
        mode=given.mode or "auto",
        prune=given.prune or "all",
        sequential=given.sequential,
        roles=split_list(given.roles),
        ignored_scope=ignored_scope(given.ignore),
        subset_size=None,
    )


def _errors() -> tuple[type[Exception], ...]:
    """NNCF's own exceptions; they share no base class."""
    from nncf import errors

    return tuple(item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception))
