# SPDX-License-Identifier: Apache-2.0
"""
Recipes: several compression steps as one, in Python or as a YAML or JSON file.

.. code-block:: yaml

    # quantise the weights to 4 bit, then prune activations
    - weight_compression: {mode: int4_sym, group_size: 64, awq: true, scale_estimation: true}
    - scap:
        sparsity: {up: 0.4, gate: 0.4, down: 0.6}

The same in Python is ``[WeightCompression("int4_sym", group_size=64, awq=True, scale_estimation=True),
Scap(sparsity={...})]``. Steps are put into the order that works, quantisation before sparsity, whatever order they are
written in.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nncf
from nncf.common.logging import nncf_logger

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import COMPRESSION_ALGORITHMS, CompressionBuilder, builder_for
from scap_nncf.algorithms.data import Samples
from scap_nncf.algorithms.documents import parse_json, parse_yaml, read_text
from scap_nncf.algorithms.quantization.config import describe
from scap_nncf.algorithms.quantization.snapshot import Snapshot
from scap_nncf.algorithms.scap.controller import get_controller

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
STAGES = ("quantisation", "sparsity")
_MAX_BYTES = 256 << 10


def load_recipe(path: str | os.PathLike[str]) -> list[Any]:
    """
    Read a recipe file.

    :param path: a YAML or JSON file: a list of steps, or a mapping with the list under ``steps``. Each step is the name
        of a registered algorithm with its settings.
    :return: the configuration objects of the steps, for ``nncf.compress(model, algorithm=...)``.
    :raises nncf.InvalidPathError: there is no such file.
    :raises nncf.ValidationError: the file is no recipe, or a setting has a bad value.
    :raises nncf.ParameterNotSupportedError: unknown algorithm or setting.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        msg = f"No recipe at {file}: expected a YAML or JSON file with a list of steps."
        raise nncf.InvalidPathError(msg)
    parse = parse_json if file.suffix.lower() == ".json" else parse_yaml
    return parse_recipe(parse(read_text(file, _MAX_BYTES, "a recipe"), str(file)), str(file))


def parse_recipe(data: Any, source: str = "the recipe") -> list[Any]:
    """
    Configuration objects from plain data, see :func:`load_recipe`.

    :param source: how to name the recipe in messages.
    """
    if isinstance(data, Mapping) and "steps" in data:
        unknown = sorted(map(str, set(data) - {"steps"}))
        if unknown:
            msg = f"{source}: unknown key {', '.join(unknown)} beside 'steps'."
            raise nncf.ValidationError(msg)
        data = data["steps"]
    if not isinstance(data, Sequence) or isinstance(data, str) or not data:
        msg = f"{source}: expected a list of steps such as '- scap: {{sparsity: 0.5}}', got {_kind(data)}."
        raise nncf.ValidationError(msg)
    return [_step(item, f"{source}, step {number}") for number, item in enumerate(data, 1)]


def builders_of(algorithm: Any, settings: Mapping[str, Any]) -> list[CompressionBuilder]:
    """
    The builders of what a user gave as `algorithm`, in the order in which they run.

    :param algorithm: a name, a configuration object, a list of these, or the path of a recipe file.
    :raises nncf.ValidationError: an empty list, or steps that exclude each other.
    """
    if isinstance(algorithm, os.PathLike) or (isinstance(algorithm, str) and algorithm.endswith(RECIPE_SUFFIXES)):
        algorithm = load_recipe(algorithm)
    if isinstance(algorithm, str) or not isinstance(algorithm, Sequence):
        return [builder_for(algorithm, settings)]
    if not algorithm:
        msg = "The list of algorithms is empty; expected for example algorithm=[Scap(sparsity=0.5)]."
        raise nncf.ValidationError(msg)
    if settings:
        msg = (
            f"Settings {', '.join(map(repr, settings))} beside a list of steps say not which step they belong to; put "
            "them into the step, for example Scap(sparsity=0.5)."
        )
        raise nncf.ParameterNotSupportedError(msg)
    return order([builder_for(step, {}) for step in algorithm])


def order(builders: Sequence[CompressionBuilder]) -> list[CompressionBuilder]:
    """
    Quantisation before sparsity; the order within a stage stays.

    :raises nncf.ValidationError: two steps of one stage, which would be applied to each other's result.
    """
    for stage in STAGES:
        names = [type(builder.config).__name__ for builder in builders if builder.stage == stage]
        if len(names) > 1:
            msg = f"A recipe takes one {stage} step, got {len(names)}: {', '.join(names)}."
            raise nncf.ValidationError(msg)
    ordered = sorted(builders, key=lambda builder: STAGES.index(builder.stage))
    if ordered != list(builders):
        sequence = ", ".join(type(builder.config).__name__ for builder in ordered)
        nncf_logger.warning(
            f"The steps run in the order {sequence}: AWQ finds no pattern in a sparse model, and mode*W must come from "
            "the quantised weights."
        )
    return ordered


def apply_steps(model: Any, builders: Sequence[CompressionBuilder], dataset: Any, tokenizer: Any) -> Any:
    """
    Apply steps one after the other. If one fails, a PyTorch model is what it was before the first.

    :param dataset: used by every step; a dataset that can be gone through only once is kept in memory meanwhile.
    """
    if len(builders) == 1:
        return builders[0].build(model, dataset, tokenizer)
    if get_controller(model) is not None:
        msg = (
            "The model has activation sparsity already, so a recipe of several steps cannot start on it; take it out "
            "first with scap_nncf.get_controller(model).strip()."
        )
        raise nncf.ValidationError(msg)
    if dataset is not None:
        sizes = [getattr(builder.config, "subset_size", None) for builder in builders]
        limit = None if None in sizes else max(sizes)  # type: ignore[type-var]
        dataset, tokenizer = list(Samples(dataset, tokenizer, limit)), None
    snapshot = Snapshot(model)
    try:
        for builder in builders:
            model = builder.build(model, dataset, tokenizer)
    except BaseException:
        snapshot.restore()
        raise
    _record(model, builders)
    return model


def _record(model: Any, builders: Sequence[CompressionBuilder]) -> None:
    """Write the recipe into the plan, so that a saved model says how it was made."""
    controller = get_controller(model)
    if controller is None:
        return
    names = {builder: name for name, builder in COMPRESSION_ALGORITHMS.registry_dict.items()}
    steps = [{names[type(builder)]: describe(builder.config)} for builder in builders]
    made_by = {**controller.plan.made_by, "recipe": steps}
    controller.plan = dataclasses.replace(controller.plan, made_by=made_by)
    note_plan = getattr(backend_of(model), "note_plan", None)
    if note_plan is not None:  # an OpenVINO model carries its plan
        note_plan(model, controller.plan)


# -- from plain data to configuration objects --------------------------------------------------------------------------


def _step(item: Any, source: str) -> Any:
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, Mapping) or len(item) != 1:
        msg = (
            f"{source}: expected one algorithm with its settings, such as 'scap: {{sparsity: 0.5}}', got {_kind(item)}."
        )
        raise nncf.ValidationError(msg)
    (name, settings), *_ = item.items()
    known = COMPRESSION_ALGORITHMS.registry_dict
    if name not in known:
        msg = f"{source}: unknown algorithm {name!r}; there are {', '.join(sorted(known))}."
        raise nncf.ParameterNotSupportedError(msg)
    return from_plain(known[name].config_type, settings or {}, f"{source} ({name})")


def from_plain(kind: type, data: Any, source: str) -> Any:
    """
    A dataclass from a mapping of plain values; enumerations are written by value or name, nested dataclasses (scopes,
    NNCF's advanced parameters) as mappings.
    """
    if not isinstance(data, Mapping):
        msg = f"{source}: expected settings as a mapping, got {_kind(data)}."
        raise nncf.ValidationError(msg)
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(str(key) for key in data if key not in fields)
    if unknown:
        msg = f"{source}: no setting {', '.join(map(repr, unknown))}; there are {', '.join(sorted(fields))}."
        raise nncf.ParameterNotSupportedError(msg)
    hints = typing.get_type_hints(kind)
    values = {key: _value(hints.get(key, Any), item, f"{source}, {key}") for key, item in data.items()}
    try:
        return kind(**values)
    except (nncf.ValidationError, nncf.ParameterNotSupportedError) as error:
        raise type(error)(f"{source}: {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        msg = f"{source}: {error}"
        raise nncf.ValidationError(msg) from error


def _value(hint: Any, value: Any, source: str) -> Any:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    choices = typing.get_args(hint) if is_union else (hint,)
    for choice in choices:
        if isinstance(choice, type) and dataclasses.is_dataclass(choice) and isinstance(value, Mapping):
            return from_plain(choice, value, source)
    for choice in choices:
        if isinstance(choice, type) and issubclass(choice, enum.Enum) and isinstance(value, str) and str not in choices:
            for member in choice:
                if value.lower() in (str(member.value).lower(), member.name.lower()):
                    return member
            known = ", ".join(str(member.value) for member in choice)
            msg = f"{source}: expected one of {known}, got {value!r}."
            raise nncf.ValidationError(msg)
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"
