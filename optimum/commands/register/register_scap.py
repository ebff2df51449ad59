# SPDX-License-Identifier: Apache-2.0
"""
``optimum-cli export openvino-scap``: ``optimum-cli export openvino`` with every flag it has, then activation sparsity.

Optimum imports this module at each start of its command line, so nothing heavy is imported here. This folder belongs to
Optimum's namespace package and must have no ``__init__.py``.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand
from optimum.commands.export.openvino import parse_args_openvino


def add_scap_arguments(parser: ArgumentParser) -> None:
    """The flags of activation sparsity; their names are those of ``scap-nncf compress``."""
    group = parser.add_argument_group("Activation sparsity (SCAP)")
    group.add_argument(
        "--sparsity",
        metavar="SPEC",
        help="0.5 (the default, for every layer), up=0.4,down=0.6, up,zero,0.35,down,zero,0.55 (the paper's grammar), "
        "a JSON object, or @FILE (YAML or JSON).",
    )
    group.add_argument(
        "--mode",
        choices=["auto", "zero", "mean", "median", "kde"],
        help="How the mode of a tensor is found; auto (the default) centres where it pays.",
    )
    group.add_argument(
        "--prune", choices=["all", "decode"], help="all (the default) prunes every token; decode leaves prompts dense."
    )
    group.add_argument(
        "--roles", metavar="LIST", help="Only these layers: roles, groups (attn, ffn, all) or re:PATTERN, by commas."
    )
    group.add_argument(
        "--ignore", metavar="REGEX", action="append", help="Leave layers dense whose name matches; repeatable."
    )
    group.add_argument(
        "--sequential", action="store_true", help="Calibrate each block on the pruned output of those before it."
    )
    group.add_argument(
        "--calibration",
        metavar="PATH",
        default="builtin",
        help="Calibration data of the sparsity: builtin, a .txt or .jsonl file (.gz too), or for image models a folder "
        "of images. (--dataset is that of the quantisation.)",
    )
    group.add_argument("--text-field", metavar="KEY", default="text", help="Key of the text in a .jsonl file.")
    group.add_argument("--samples", metavar="N", type=int, default=64, help="Samples of the calibration. Default: 64.")
    group.add_argument("--length", metavar="N", type=int, default=256, help="Tokens a sample. Default: 256.")
    group.add_argument("--seed", metavar="N", type=int, default=0, help="Of the choice of samples.")
    group.add_argument("--plan", metavar="DIR", help="Take a saved plan instead of calibrating.")
    group.add_argument(
        "--runtime",
        choices=["any", "cpu"],
        default="any",
        help="any (the default): plain operations, which every device runs; cpu: the operation that skips weights.",
    )
    group.add_argument("--overwrite", action="store_true", help="Replace a folder that scap-nncf wrote earlier.")


class ScapExportCommand(BaseOptimumCLICommand):
    """Export to OpenVINO IR, quantise as asked, calibrate the quantised model, and insert the pruning."""

    COMMAND = CommandInfo(
        name="openvino-scap", help="Export PyTorch models to OpenVINO IR with calibrated activation sparsity (SCAP)."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parse_args_openvino(parser)
        add_scap_arguments(parser)

    def run(self) -> None:
        from scap_nncf.cli_export import run_export

        raise SystemExit(run_export(self.args, self.parser))


REGISTER_COMMANDS = [(ScapExportCommand, ExportCommand)]
