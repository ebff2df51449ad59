# SPDX-License-Identifier: Apache-2.0
"""The builder of CATS: finds gated feed-forwards, gathers statistics behind their gates, plans, inserts."""

from __future__ import annotations

from typing import Any, ClassVar

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType, get_backend

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import COMPRESSION_ALGORITHMS, CompressionBuilder
from scap_nncf.algorithms.cats.config import Cats
from scap_nncf.algorithms.cats.controller import CatsController
from scap_nncf.algorithms.cats.site_plan import plan_sites
from scap_nncf.algorithms.data import Samples
from scap_nncf.algorithms.insertion import insert_plan, made_by, refuse_sparse
from scap_nncf.algorithms.plan import Plan, block_index
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scope import ignored_reason
from scap_nncf.algorithms.sites import Layer, Site


@COMPRESSION_ALGORITHMS.register("cats")
class CatsBuilder(CompressionBuilder):
    """Contextually aware thresholding (CATS, arXiv 2404.08763, section 4)."""

    config_type: ClassVar[type] = Cats
    controller_type: ClassVar[type] = CatsController
    config: Cats

    @property
    def available_backends(self) -> list[BackendType]:
        return [BackendType.TORCH]

    def build(self, model: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """
        Calibrate and prune. The model is left as it was if anything fails.

        :raises nncf.UnsupportedModelError: the model has no gated feed-forward with a layer of its own for the gate.
        :raises nncf.UnsupportedBackendError: no PyTorch model.
        """
        from scap_nncf.algorithms.backends.torch.gated import collect_gated, gated_layers

        _refuse_other_backends(model)
        refuse_sparse(model)
        given = Samples(dataset, tokenizer, self.config.subset_size)
        given.first()
        samples = list(given)
        shapes = backend_of(model).shapes_of(model)
        found = list(gated_layers(model))
        if not found:
            msg = (
                f"{type(model).__name__} has no feed-forward down(act(gate(x)) * up(x)) with a layer of its own for "
                "the gate, which CATS needs; algorithm='scap' takes any fully connected layer."
            )
            raise nncf.UnsupportedModelError(msg)
        names = [name for layers in found for name in (layers.gate, layers.up, layers.down)]
        kinds = [(name, type(model.get_submodule(name)).__name__) for name in names]
        ignored = ignored_reason(self.config.ignored_scope, kinds)
        found = [x for x in found if not any(ignored(name) for name in (x.gate, x.up, x.down))]
        if not found:
            msg = "ignored_scope leaves no feed-forward to prune."
            raise nncf.ValidationError(msg)
        sites = tuple(
            Site(
                layers.gate,
                block_index(layers.gate),
                # down first: its width is that of the activated gate
                tuple(
                    Layer(name, role, *shapes[name])
                    for name, role in ((layers.down, "down"), (layers.up, "up"), (layers.gate, "gate"))
                ),
            )
            for layers in found
        )
        calibration = CalibrationStatistics(sites, collect_gated(model, found, samples), len(samples))
        plan = Plan(
            plan_sites(calibration, self.config.sparsity),
            "cats",
            self.config.prune,
            made_by(self.config, len(samples)),
        )
        return insert_plan(model, plan, calibration)

    def build_from_plan(self, model: Any, plan: Plan, calibration: Any = None) -> Any:
        """Prune as a plan says, without data."""
        _refuse_other_backends(model)
        refuse_sparse(model)
        return insert_plan(model, plan.bind(backend_of(model).shapes_of(model)), calibration)

    def get_statistic_points(self, model: Any, graph: NNCFGraph | None = None) -> StatisticPointsContainer:
        """Empty: what is gathered lies behind an activation and is no input of a layer."""
        return StatisticPointsContainer()

    def apply(
        self,
        model: Any,
        graph: NNCFGraph | None = None,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """As :meth:`build`."""
        return self.build(model, dataset)


def _refuse_other_backends(model: Any) -> None:
    if get_backend(model) != BackendType.TORCH:
        msg = "algorithm='cats' exists for PyTorch models only; algorithm='scap' takes OpenVINO models as well."
        raise nncf.UnsupportedBackendError(msg)
