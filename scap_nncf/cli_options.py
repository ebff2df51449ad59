# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import nncf
import typer

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


class Allocation(str, Enum):
    auto = "auto"
    uniform = "uniform"
    profile = "profile"
    fisher = "fisher"
    greedy = "greedy"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class State:
    """What `main` has to know of the command that ran."""

    debug = False


def set_debug(value: bool) -> bool:
    """Ask for tracebacks; a callback of `--debug`."""
    State.debug = State.debug or value
    return value


LOADING, CALIBRATION, OUTPUT = "Loading", "Calibration", "Output"  # panels of --help

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
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object on stdout and nothing else there."),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="DTYPE",
        rich_help_panel=LOADING,
        help="float32, bfloat16, float16, or auto: the checkpoint's own.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", rich_help_panel=LOADING, help="cpu, cuda, cuda:1, or auto: a GPU if any.")
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=LOADING, help="Run model code that comes with a checkpoint."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace a folder that scap-nncf wrote earlier."),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=set_debug,
        is_eager=True,
        rich_help_panel=OUTPUT,
        help="Show the traceback of an error.",
    ),
]


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


def split_list(text: str | None) -> list[str] | None:
    """The parts of a list by commas."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def ignored_scope(patterns: list[str] | None) -> Any:
    """The patterns of `--ignore` as NNCF takes them."""
    return nncf.IgnoredScope(patterns=patterns) if patterns else None
