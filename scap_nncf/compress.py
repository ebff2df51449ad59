# SPDX-License-Identifier: Apache-2.0
"""``nncf.compress``: the one verb."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import nncf

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import builder_for
from scap_nncf.algorithms.budget import Budget
from scap_nncf.algorithms.plan import Plan
from scap_nncf.algorithms.scap.builder import ScapBuilder
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics, statistics_of_plan
from scap_nncf.algorithms.scap.config import Scap
from scap_nncf.algorithms.sites import ModelReport
from scap_nncf.budget import compress_to
from scap_nncf.recipe import apply_steps, builders_of

TModel = TypeVar("TModel")


def compress(
    model: TModel,
    algorithm: Any = "scap",
    *,
    dataset: Any = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    budget: Budget | None = None,
    **settings: Any,
) -> TModel:
    """
    Compress a model with a registered algorithm.

    .. code-block:: python

        import nncf, scap_nncf

        model = nncf.compress(model, algorithm="scap", dataset=nncf.Dataset(batches), sparsity=0.5)
        print(scap_nncf.get_controller(model).statistics())

    A PyTorch model is changed in place and returned (:class:`scap_nncf.Quantization` alone makes a copy); an OpenVINO
    model is copied. If anything fails, the model is as it was.

    :param model: the model to compress.
    :param algorithm: a registered name (its settings are given as keywords), a configuration object such as
        :class:`scap_nncf.Scap`, a list of these, or the path of a recipe file (see :mod:`scap_nncf.recipe`). Of a list,
        quantisation runs before sparsity, whatever the order.
    :param dataset: calibration data: a ``nncf.Dataset``, an iterable of tensors, mappings or tuples, texts with a
        `tokenizer`, or a ``datasets.Dataset``.
    :param plan: a plan, or the folder or file of one, to apply without data. The reference implementation's
        ``calibrated_thresholds.json`` is read as well.
    :param tokenizer: a transformers tokenizer, where the dataset holds texts.
    :param budget: a limit on loss, bytes or time, see :class:`scap_nncf.Budget`; the sparsity follows from it. For a
        limit on loss a quarter of the samples is kept from calibration to judge by. What came out is in
        ``get_controller(model).plan.made_by["budget"]``.
    :param settings: fields of the algorithm's configuration, see :class:`scap_nncf.Scap`.
    :return: the compressed model.
    :raises scap_nncf.BudgetError: the budget cannot be met; the message has what can be reached.
    :raises nncf.ValidationError: bad settings, data or plan, or the model is compressed by this already.
    :raises nncf.ParameterNotSupportedError: unknown algorithm or setting.
    """
    inner = _without_compiler(model)
    backend_of(inner)  # an unsupported model is refused before anything else
    if budget is not None and (plan is not None or "sparsity" in settings):
        given = "a plan" if plan is not None else "a sparsity"
        msg = f"A budget and {given} were given; the sparsity follows from the budget, so leave out one of the two."
        raise nncf.ValidationError(msg)
    if plan is not None:
        result = _apply_plan(inner, algorithm, plan, dataset, settings)
    elif budget is not None:
        builders = builders_of(algorithm, settings)
        sizes = [getattr(builder.config, "subset_size", None) for builder in builders]
        limit = None if None in sizes else max(sizes)  # type: ignore[type-var]
        build = lambda samples: apply_steps(inner, builders, samples, None)  # noqa: E731
        result = compress_to(build, inner, budget, dataset, tokenizer, limit)
    else:
        result = apply_steps(inner, builders_of(algorithm, settings), dataset, tokenizer)
    return model if result is inner else result


def _without_compiler(model: Any) -> Any:
    """The model behind the wrapper of ``torch.compile``: its layers have the names that they have everywhere else."""
    return getattr(model, "_orig_mod", model)


def _apply_plan(model: Any, algorithm: Any, plan: Any, dataset: Any, settings: dict[str, Any]) -> Any:
    if dataset is not None or settings:
        given = ", ".join([*(["dataset"] if dataset is not None else []), *settings])
        msg = f"A plan holds all settings; leave out {given}, or calibrate anew without plan=."
        raise nncf.ValidationError(msg)
    folder: Path | None = None
    if not isinstance(plan, Plan):
        folder = Path(plan) if Path(plan).is_dir() else Path(plan).parent
        plan = Plan.load(plan)
    if isinstance(algorithm, str) and algorithm != plan.algorithm and algorithm != "scap":
        msg = f"The plan was made by algorithm {plan.algorithm!r}, but algorithm={algorithm!r} was asked for."
        raise nncf.ValidationError(msg)
    calibration = statistics_of_plan(folder, plan) if folder is not None else None
    return builder_for(plan.algorithm, {}).build_from_plan(model, plan, calibration)


def calibrate(model: Any, *, dataset: Any, tokenizer: Any = None, **settings: Any) -> CalibrationStatistics:
    """
    Gather activation statistics only; the model is not changed.

    Statistics of several processes merge (:meth:`CalibrationStatistics.merge`), and any number of plans follows from
    them (:func:`make_plan`) without the model.

    .. code-block:: python

        statistics = scap_nncf.calibrate(model, dataset=dataset)
        plan = scap_nncf.make_plan(statistics, scap_nncf.Scap(sparsity={"ffn": 0.5}))
        model = nncf.compress(model, plan=plan)

    :param settings: fields of :class:`scap_nncf.Scap`; the sparsity says which sites are gathered (default: all).
    """
    return ScapBuilder(Scap(**settings)).collect_statistics(_without_compiler(model), dataset, tokenizer)


def inspect_model(
    model: Any,
    sample: Any = None,
    *,
    roles: str | Sequence[str] | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
) -> ModelReport:
    """
    What would be pruned in a model, and what would stay dense and why; nothing is changed.

    :param sample: what the model can be called with; default: the model's dummy inputs or a few token ids.
    :param roles: only layers that this selector, or one of these, names: roles, groups (``attn``, ``ffn``, ``all``) or
        ``re:`` patterns.
    :param ignored_scope: layers to leave dense.
    :return: a report whose ``str()`` is a table.
    :raises nncf.ValidationError: a selector names nothing, or the model cannot take the sample.
    :raises nncf.UnsupportedModelError: the model has no fully connected layer.
    """
    model = _without_compiler(model)
    roles = [roles] if isinstance(roles, str) else roles
    return backend_of(model).inspect_model(model, sample, roles, ignored_scope)


def register() -> None:
    """Make this function ``nncf.compress``, unless NNCF has one of its own."""
    if not hasattr(nncf, "compress"):
        nncf.compress = compress
