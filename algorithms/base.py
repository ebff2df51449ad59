# SPDX-License-Identifier: Apache-2.0
"""
The registry of compression algorithms and what each entry provides.

NNCF 3 has no registry, builder or controller of compression algorithms any more; this one is made of NNCF's
``Registry`` class and keeps the two roles: a *builder* turns a model and data into a compressed model, and the
*controller* is what a user holds afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.registry import Registry
from nncf.quantization.algorithms.algorithm import Algorithm

from scap_nncf.algorithms.plan import Plan

#: name → builder class. Register with ``@COMPRESSION_ALGORITHMS.register("name")``.
COMPRESSION_ALGORITHMS: Registry[str, type[CompressionBuilder]] = Registry("compression algorithms")


class CompressionController(ABC):
    """What a user holds of a compressed model."""

    plan: Plan

    @abstractmethod
    def statistics(self) -> Any:
        """A dataclass whose ``str()`` is a table."""

    @abstractmethod
    def strip(self) -> Any:
        """Undo the compression; returns the untouched model."""


class CompressionBuilder(Algorithm):
    """
    Makes a compressed model from a model, a configuration and data.

    A subclass is registered under a name, and says which configuration class it takes in `config_type`. It also is a
    NNCF ``Algorithm``: ``get_statistic_points`` says what to collect and ``apply`` uses what was collected.
    """

    config_type: ClassVar[type]
    #: Made of (model, plan, calibration); what :func:`scap_nncf.get_controller` returns.
    controller_type: ClassVar[type[Any]]
    #: When a recipe runs this: "quantisation" steps come before "sparsity" steps.
    stage: ClassVar[str] = "sparsity"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def build(self, model: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """
        Calibrate and compress.

        :param dataset: calibration data, see :class:`scap_nncf.algorithms.data.Samples`.
        :param tokenizer: a transformers tokenizer, where the dataset holds texts.
        :return: the compressed model.
        """

    @abstractmethod
    def build_from_plan(self, model: Any, plan: Plan, calibration: Any = None) -> Any:
        """
        Compress as the plan says, without data; returns the compressed model.

        :param calibration: the statistics behind the plan, where they are at hand.
        """

    # Part of NNCF's interface; the graph is not needed by algorithms that attach to modules.
    @abstractmethod
    def get_statistic_points(self, model: Any, graph: NNCFGraph | None = None) -> StatisticPointsContainer: ...

    @abstractmethod
    def apply(
        self,
        model: Any,
        graph: NNCFGraph | None = None,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any: ...


def controller_for(plan: Plan) -> type[Any]:
    """
    The class of the controller of a plan.

    :raises nncf.ParameterNotSupportedError: the plan is of an algorithm that is not registered.
    """
    known = COMPRESSION_ALGORITHMS.registry_dict
    if plan.algorithm not in known:
        msg = f"The plan is of algorithm {plan.algorithm!r}; registered are {', '.join(sorted(known))}."
        raise nncf.ParameterNotSupportedError(msg)
    return known[plan.algorithm].controller_type


def builder_for(algorithm: Any, settings: Mapping[str, Any]) -> CompressionBuilder:
    """
    The builder of an algorithm.

    :param algorithm: a registered name, whose configuration is made of `settings`, or a configuration object.
    :raises nncf.ParameterNotSupportedError: unknown algorithm or setting.
    """
    known = COMPRESSION_ALGORITHMS.registry_dict
    if isinstance(algorithm, str):
        if algorithm not in known:
            msg = f"Unknown algorithm {algorithm!r}; registered are {', '.join(sorted(known))}."
            raise nncf.ParameterNotSupportedError(msg)
        builder = known[algorithm]
        fields = builder.config_type.__dataclass_fields__  # type: ignore[attr-defined]
        unknown = sorted(set(settings) - set(fields))
        if unknown:
            msg = (
                f"Algorithm {algorithm!r} has no setting {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(sorted(fields))}."
            )
            raise nncf.ParameterNotSupportedError(msg)
        return builder(builder.config_type(**settings))
    for builder in known.values():
        if type(algorithm) is builder.config_type:
            if settings:
                msg = (
                    f"Settings {', '.join(map(repr, settings))} were given beside the configuration object "
                    f"{type(algorithm).__name__}; put them into the object."
                )
                raise nncf.ParameterNotSupportedError(msg)
            return builder(algorithm)
    names = ", ".join(sorted({b.config_type.__name__ for b in known.values()}))
    msg = f"algorithm must be a registered name or a configuration object ({names}), got {type(algorithm).__name__}."
    raise nncf.ParameterNotSupportedError(msg)
