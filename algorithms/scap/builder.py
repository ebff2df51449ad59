# SPDX-License-Identifier: Apache-2.0
"""The builder of SCAP: finds sites, gathers statistics, plans, inserts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import nncf
import numpy as np
from nncf.common.graph.graph import NNCFGraph
from nncf.common.logging import nncf_logger
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from numpy.typing import NDArray

from scap_nncf.algorithms import sparsity as sparsity_spec
from scap_nncf.algorithms.allocation import allocate, choose, wants_prices
from scap_nncf.algorithms.allocation.fisher import Costs
from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import COMPRESSION_ALGORITHMS, CompressionBuilder
from scap_nncf.algorithms.data import Kept, Samples
from scap_nncf.algorithms.insertion import insert_plan, refuse_sparse
from scap_nncf.algorithms.mitigation import as_mitigation, mitigate
from scap_nncf.algorithms.plan import Plan, SitePlan
from scap_nncf.algorithms.processes import current as current_processes
from scap_nncf.algorithms.quantization.config import describe
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.config import Scap
from scap_nncf.algorithms.scap.controller import ScapController
from scap_nncf.algorithms.scap.gather import gather, gather_in_sequence, share_samples, walks_by_block
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.pooling import shrink
from scap_nncf.algorithms.scap.score import with_scores
from scap_nncf.algorithms.scap.site_plan import plan_site, site_mode
from scap_nncf.algorithms.scap.statistics import make_collector
from scap_nncf.algorithms.sites import ModelReport, Site
from scap_nncf.algorithms.sparsity import Target

#: TEAL's search runs these through every block some hundred times.
_GREEDY_SAMPLES = 2


@COMPRESSION_ALGORITHMS.register("scap")
class ScapBuilder(CompressionBuilder):
    """Statistical Calibrated Activation Pruning (SCAP paper, sections 2 and 3)."""

    config_type: ClassVar[type] = Scap
    controller_type: ClassVar[type] = ScapController
    config: Scap

    @property
    def available_backends(self) -> list[BackendType]:
        return [BackendType.TORCH, BackendType.OPENVINO]

    def build(self, model: Any, dataset: Any, tokenizer: Any = None) -> Any:
        """
        Calibrate and prune. The model is left as it was if anything fails.

        :raises nncf.ValidationError: bad settings or data, or the model is sparse already.
        """
        config = self.config
        if config.refine is None:
            return insert_plan(model, *self.calibrate(model, dataset, tokenizer))
        if not backend_of(model).GRADIENTS:
            backend_of(model).train_biases(model, [], config.refine)  # says why not, before any work is done
        refuse_sparse(model)
        samples = list(Samples(dataset, tokenizer, config.subset_size))
        model = insert_plan(model, *self.calibrate(model, samples))
        controller = backend_of(model).stored_controller(model)
        try:
            controller.refine(samples, settings=config.refine)
        except BaseException:
            controller.strip()
            raise
        return model

    def build_from_plan(self, model: Any, plan: Plan, calibration: CalibrationStatistics | None = None) -> Any:
        """Prune as a plan says, without data."""
        refuse_sparse(model)
        return insert_plan(model, plan.bind(backend_of(model).shapes_of(model)), calibration)

    def find_sites(self, model: Any, sample: Any = None) -> ModelReport:
        """What this configuration prunes in the model, and what stays dense."""
        wanted = list(sparsity_spec.parse(self.config.sparsity))
        return backend_of(model).inspect_model(model, sample, self.config.roles, self.config.ignored_scope, wanted)

    def calibrate(self, model: Any, dataset: Any, tokenizer: Any = None) -> tuple[Plan, CalibrationStatistics]:
        """
        Gather statistics and plan; the model is not changed.

        :raises nncf.ValidationError: as :meth:`build`.
        """
        calibration, data = self._gather(model, dataset, tokenizer)
        plan, mitigation = make_plan(calibration, self.config), as_mitigation(self.config.mitigation)
        if self.config.score != "magnitude":
            plan = with_scores(model, plan, data)
        return (plan if mitigation is None else mitigate(model, plan, mitigation, data)), calibration

    def collect_statistics(self, model: Any, dataset: Any, tokenizer: Any = None) -> CalibrationStatistics:
        """As :meth:`calibrate`, without a plan."""
        return self._gather(model, dataset, tokenizer)[0]

    def _gather(self, model: Any, dataset: Any, tokenizer: Any) -> tuple[CalibrationStatistics, list[Any]]:
        """Statistics, and the samples where planning goes through them again."""
        refuse_sparse(model)
        config = self.config
        samples: Any = Samples(dataset, tokenizer, config.subset_size)
        first = samples.first()
        data: list[Any] = []
        mitigated = as_mitigation(config.mitigation) is not None
        if mitigated or config.sequential or config.score != "magnitude":  # they go through the data again
            data = list(samples)
            samples = Samples(data)
        sites = self.find_sites(model, first).sites
        targets = sparsity_spec.resolve(config.sparsity, sites)
        sites = tuple(site for site in sites if any(layer.name in targets for layer in site.layers))
        backend = backend_of(model)
        priced = wants_prices(config.allocation, config.sparsity) and not self._does_without_prices(backend, model)
        costs = paths = None
        if priced:
            points, count, costs, paths = self._gather_with_prices(model, sites, targets, samples)
        elif not config.sequential:
            points, count = self._gather_dense(model, sites, samples)
        targets = allocate(choose(config.allocation, config.sparsity, sites, costs), targets, sites, costs, paths)
        if config.sequential:
            points, count = self._gather_in_sequence(model, sites, targets, data)
        return CalibrationStatistics(sites, backend.histograms_of(points), count, costs, paths), data

    def _gather_dense(
        self, model: Any, sites: Sequence[Site], samples: Samples | Kept
    ) -> tuple[StatisticPointsContainer, int]:
        """Statistics of the dense model in one pass, and the number of samples."""
        backend, processes = backend_of(model), current_processes()
        points = backend.statistic_points(sites, make_collector)
        share = share_samples(samples, model, sites, processes)
        by_block = walks_by_block(backend, model, self.config.block_by_block)
        return points, gather(backend, model, sites, points, share, samples.total, processes, by_block)

    def _gather_with_prices(
        self, model: Any, sites: Sequence[Site], targets: Mapping[str, Target], samples: Samples
    ) -> tuple[StatisticPointsContainer, int, Costs | None, dict[str, NDArray[np.float64]] | None]:
        """As :meth:`_gather_dense`, and what sparsity costs in each layer, or the paths of the greedy search."""
        backend, config = backend_of(model), self.config
        kept = Kept(samples, config.allocation_samples)
        points, count = self._gather_dense(model, sites, kept)
        dense = shrink(sites, backend.histograms_of(points))
        if config.allocation == "greedy":
            paths = backend.greedy_paths(model, sites, dense, kept.kept()[:_GREEDY_SAMPLES])
            return points, count, None, paths
        modes = {site.name: site_mode(site, dense[site.name], targets, config.mode)[0] for site in sites}
        return points, count, self._prices(model, sites, dense, modes, kept.kept()), None

    def _gather_in_sequence(
        self, model: Any, sites: Sequence[Site], targets: Mapping[str, Target], data: Sequence[Any]
    ) -> tuple[StatisticPointsContainer, int]:
        """Statistics of each site behind the pruned sites before it, and the number of samples."""
        backend, processes, config = backend_of(model), current_processes(), self.config
        points = backend.statistic_points(sites, make_collector)

        def decide(site: Site, histogram: ActivationHistogram) -> SitePlan:
            plan = plan_site(site, histogram, targets, config.mode)
            assert plan is not None  # sites without a target were left out before
            return plan

        if not hasattr(backend, "collect_by_block"):
            # each process runs all samples: a graph cannot wait for the others at a site
            return points, backend.collect_sequential(model, sites, points, data, decide)
        share = share_samples(Samples(data), model, sites, processes)
        by_block = walks_by_block(backend, model, config.block_by_block)
        key = {"targets": targets, "mode": config.mode}
        return points, gather_in_sequence(backend, model, sites, points, share, decide, processes, by_block, key)

    def _does_without_prices(self, backend: Any, model: Any) -> bool:
        """
        Whether weights are fetched for each call, so that no gradient flows through them.

        :raises nncf.UnsupportedModelError: prices were asked for by name.
        """
        if not getattr(backend, "is_offloaded", lambda _model: False)(model):
            return False
        if self.config.allocation == "fisher":
            msg = (
                "allocation='fisher' needs gradients, which do not flow through weights that accelerate fetches from "
                "disk or main memory. Use allocation='profile' or 'uniform', or a plan made where the model fits."
            )
            raise nncf.UnsupportedModelError(msg)
        return True

    def _prices(
        self,
        model: Any,
        sites: Sequence[Site],
        histograms: Mapping[str, ActivationHistogram],
        modes: Mapping[str, float],
        samples: Sequence[Any],
    ) -> Costs | None:
        """Prices of sparsity; None where ``auto`` has to do without."""
        try:
            return backend_of(model).collect_costs(
                model, sites, histograms, modes, samples, checkpointing=self.config.allocation_checkpointing
            )
        except (nncf.UnsupportedModelError, nncf.ParameterNotSupportedError) as error:
            if self.config.allocation == "fisher":
                raise
            nncf_logger.debug(f"allocation='auto' does without prices: {error}")
        except Exception as error:  # the plain pass went well; a default must not fail where it can do without
            if self.config.allocation == "fisher":
                raise
            nncf_logger.warning(
                f"The prices of sparsity cannot be measured ({type(error).__name__}: {error}), so allocation='auto' "
                "does without. Where memory is short, allocation_checkpointing=True needs less."
            )
        return None

    def get_statistic_points(self, model: Any, graph: NNCFGraph | None = None) -> StatisticPointsContainer:
        """One collector for each site that has a target; gather with the backend's ``collect``."""
        sites = self.find_sites(model).sites
        targets = sparsity_spec.resolve(self.config.sparsity, sites)
        wanted = [site for site in sites if any(layer.name in targets for layer in site.layers)]
        return backend_of(model).statistic_points(wanted, make_collector)

    def apply(
        self,
        model: Any,
        graph: NNCFGraph | None = None,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """Plan and prune from collected statistics, or calibrate on the dataset where there are none."""
        if statistic_points is None:
            return self.build(model, dataset)
        refuse_sparse(model)
        histograms = backend_of(model).histograms_of(statistic_points)
        sites = tuple(site for site in self.find_sites(model).sites if site.name in histograms)
        calibration = CalibrationStatistics(sites, histograms)
        plan, mitigation = make_plan(calibration, self.config), as_mitigation(self.config.mitigation)
        if mitigation is not None:
            samples = [] if dataset is None else list(Samples(dataset, None, self.config.subset_size))
            plan = mitigate(model, plan, mitigation, samples)
        return insert_plan(model, plan, calibration)


def make_plan(calibration: CalibrationStatistics, config: Scap) -> Plan:
    """
    A plan from statistics; neither the model nor data is needed. Error mitigation, which needs them, is left out.

    :raises nncf.ValidationError: the configuration names layers that were not calibrated.
    """
    targets = sparsity_spec.resolve(config.sparsity, calibration.sites)
    method = choose(config.allocation, config.sparsity, calibration.sites, calibration.costs)
    targets = allocate(method, targets, calibration.sites, calibration.costs, calibration.paths)
    histograms = calibration.planning_histograms()
    plans = (plan_site(site, histograms[site.name], targets, config.mode) for site in calibration.sites)
    sites = tuple(site_plan for site_plan in plans if site_plan is not None)
    return Plan(sites, "scap", config.prune, {**_made_by(config, calibration), "allocation": method})


def _made_by(config: Scap, calibration: CalibrationStatistics) -> dict[str, Any]:
    from scap_nncf._version import __version__

    settings: dict[str, Any] = {
        "sparsity": dict(config.sparsity) if isinstance(config.sparsity, Mapping) else config.sparsity,
        "mode": config.mode,
        "allocation": config.allocation,
        "allocation_samples": config.allocation_samples,
        "allocation_checkpointing": config.allocation_checkpointing,
        "refine": None if config.refine is None else asdict(config.refine),
        "score": config.score,
        "prune": config.prune,
        "sequential": config.sequential,
        "roles": None if config.roles is None else list(config.roles),
        "subset_size": config.subset_size,
    }
    mitigation = as_mitigation(config.mitigation)
    if mitigation is not None:
        settings["mitigation"] = describe(mitigation)
    if config.ignored_scope is not None:
        scope = config.ignored_scope
        settings["ignored_scope"] = {"names": scope.names, "patterns": scope.patterns, "types": scope.types}
    return {
        "scap_nncf": __version__,
        "nncf": nncf.__version__,
        "settings": settings,
        "samples": calibration.samples,
        "tokens": calibration.tokens,
    }
