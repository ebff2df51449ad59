# SPDX-License-Identifier: Apache-2.0
"""The builder of N:M activation sparsity: finds sites, ranks channels, mitigates the error, inserts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import nncf
import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType

from scap_nncf.algorithms.backends import Backend, backend_of
from scap_nncf.algorithms.base import COMPRESSION_ALGORITHMS, CompressionBuilder
from scap_nncf.algorithms.data import Samples
from scap_nncf.algorithms.insertion import insert_plan, made_by, refuse_sparse
from scap_nncf.algorithms.mitigation import as_mitigation, mitigate
from scap_nncf.algorithms.nm import criteria
from scap_nncf.algorithms.nm.config import Nm, Pattern, parse_patterns
from scap_nncf.algorithms.nm.controller import NmController
from scap_nncf.algorithms.nm.statistics import ChannelStatistic, make_collector
from scap_nncf.algorithms.plan import LayerPlan, Plan, SitePlan, Vector
from scap_nncf.algorithms.scap.mode import choose_mode
from scap_nncf.algorithms.scap.statistics import make_collector as make_histogram_collector
from scap_nncf.algorithms.sites import ModelReport, Site
from scap_nncf.algorithms.sparsity import resolve

_KEEP_ALL = -1.0


@COMPRESSION_ALGORITHMS.register("nm")
class NmBuilder(CompressionBuilder):
    """N:M activation sparsity with error mitigation (arXiv 2509.22166)."""

    config_type: ClassVar[type] = Nm
    controller_type: ClassVar[type] = NmController
    config: Nm

    @property
    def available_backends(self) -> list[BackendType]:
        return [BackendType.TORCH, BackendType.OPENVINO]

    def build(self, model: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """
        Select, mitigate and insert. Data is needed for CLACT, a static shift and what is learned; without, the model
        is run once on its dummy inputs to find its sites.

        :raises nncf.ValidationError: bad settings or data, M does not divide a width, or the model is sparse already.
        """
        refuse_sparse(model)
        return insert_plan(model, self.plan(model, dataset, tokenizer))

    def build_from_plan(self, model: Any, plan: Plan, calibration: Any = None) -> Any:
        """Insert what a plan says, without data."""
        refuse_sparse(model)
        return insert_plan(model, plan.bind(backend_of(model).shapes_of(model)), calibration)

    def find_sites(self, model: Any, sample: Any = None) -> ModelReport:
        """What this configuration prunes in the model, and what stays dense."""
        wanted = list(parse_patterns(self.config.pattern))
        return backend_of(model).inspect_model(model, sample, self.config.roles, self.config.ignored_scope, wanted)

    def plan(
        self, model: Any, dataset: Any, tokenizer: Any = None, points: StatisticPointsContainer | None = None
    ) -> Plan:
        """
        What would be inserted; the model is not changed.

        :param points: of :meth:`get_statistic_points`, with what was collected; None collects on the dataset.
        """
        config, backend = self.config, backend_of(model)
        mitigation = as_mitigation(config.mitigation)
        samples: list[Any] = []
        needs_data = config.needs_data and not (points is not None and mitigation is None)
        if dataset is not None or needs_data:
            given = Samples(dataset, tokenizer, config.subset_size)
            first = given.first()
            samples = list(given) if needs_data else [first]
        report = self.find_sites(model, samples[0] if samples else None)
        chosen = _patterns(config.pattern, report.sites)
        sites = [site for site in report.sites if any(layer.name in chosen for layer in site.layers)]
        modes = {site.name: (0.0, "zero") for site in sites}
        if mitigation is not None and mitigation.shift == "static":
            values = backend.statistic_points(sites, make_histogram_collector)
            backend.collect(model, values, samples, len(samples))
            histograms = backend.histograms_of(values)
            modes = {name: choose_mode(h, mitigation.statistic, 0.5) for name, h in histograms.items()}
        plan = Plan(
            tuple(_site_plan(site, chosen, *modes[site.name]) for site in sites),
            "nm",
            config.prune,
            made_by(config, len(samples)),
        )
        if config.criterion == "clact" and points is None:
            points = backend.statistic_points(sites, make_collector)
            backend.collect(model, points, samples, len(samples))
        plan = plan.with_vectors(_scores(backend, model, config.criterion, plan, points))
        return plan if mitigation is None else mitigate(model, plan, mitigation, samples)

    def get_statistic_points(self, model: Any, graph: NNCFGraph | None = None) -> StatisticPointsContainer:
        """Second moments of each site's channels, which CLACT ranks by; empty for the other criteria."""
        if self.config.criterion != "clact":
            return StatisticPointsContainer()
        return backend_of(model).statistic_points(self.find_sites(model).sites, make_collector)

    def apply(
        self,
        model: Any,
        graph: NNCFGraph | None = None,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """As :meth:`build`, with collected statistics where there are any."""
        refuse_sparse(model)
        return insert_plan(model, self.plan(model, dataset, None, statistic_points))


def _patterns(spec: Any, sites: Sequence[Site]) -> dict[str, tuple[Pattern, tuple[int, int]]]:
    """
    Layer name → pattern, as written and for its width.

    :raises nncf.ValidationError: a selector names nothing, or M does not divide a width; all such layers are named.
    """
    parsed = parse_patterns(spec)
    targets = resolve({selector: pattern.sparsity for selector, pattern in parsed.items()}, sites)
    chosen: dict[str, tuple[Pattern, tuple[int, int]]] = {}
    unfit: list[str] = []
    for layer in (layer for site in sites for layer in site.layers if layer.name in targets):
        pattern = parsed[targets[layer.name].selector]
        groups = pattern.of_width(layer.in_features)
        if groups is not None:
            chosen[layer.name] = (pattern, groups)
        elif pattern.groups is not None:
            unfit.append(f"{layer.name} ({layer.in_features} inputs, {pattern.groups[0]}:{pattern.groups[1]})")
    if unfit:
        msg = (
            f"M must divide the width of a layer, which it does not for {len(unfit)} layers: {', '.join(unfit[:4])}"
            f"{' ...' if len(unfit) > 4 else ''}. Take another pattern, give patterns by role, or leave these layers "
            "out with ignored_scope."
        )
        raise nncf.ValidationError(msg)
    if not chosen:
        msg = f"The pattern {spec!r} drops no channel of any layer of this model; its layers are too narrow."
        raise nncf.ValidationError(msg)
    return chosen


def _site_plan(site: Site, chosen: Mapping[str, tuple[Pattern, tuple[int, int]]], mode: float, method: str) -> SitePlan:
    layers = []
    for layer in site.layers:
        if layer.name in chosen:
            n, m = chosen[layer.name][1]
            layers.append(
                LayerPlan(
                    layer.name, layer.role, layer.in_features, layer.out_features, _KEEP_ALL, 1 - n / m, pattern=(n, m)
                )
            )
    return SitePlan(site.name, site.block, mode, method, tuple(layers))


def _scores(
    backend: Backend, model: Any, criterion: str, plan: Plan, points: StatisticPointsContainer | None
) -> dict[tuple[str, str], Vector]:
    """What ranks the channels of each layer besides their magnitude."""
    if criterion == "act":
        return {}
    if criterion in ("wina", "amber"):
        of_weight = getattr(criteria, criterion)
        return {
            (layer.name, "score"): of_weight(torch.from_numpy(backend.dense_weight(model, layer.name))).numpy()
            for layer in plan.layers
        }
    assert points is not None
    moments: dict[str, torch.Tensor] = {}
    for _, point, collector in points.get_tensor_collectors():
        statistic = collector.get_statistics()
        assert isinstance(statistic, ChannelStatistic)
        mean_square = statistic.mean_square()
        if mean_square is not None:
            moments[point.target_point.target_node_name] = mean_square  # type: ignore[attr-defined]
    vectors: dict[tuple[str, str], Vector] = {}
    for site in plan.sites:
        if site.name not in moments:
            msg = f"{site.name} never ran on the calibration data; use samples that reach it, or leave it out."
            raise nncf.ValidationError(msg)
        score = criteria.clact(moments[site.name]).numpy()
        vectors |= {(layer.name, "score"): score for layer in site.layers}
    return vectors
