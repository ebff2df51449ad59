# SPDX-License-Identifier: Apache-2.0
"""Activation statistics of an OpenVINO model, through NNCF's aggregator for OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import nncf
import numpy as np
import openvino as ov
import torch
from nncf.common.graph.transformations.commands import TargetPoint, TargetType
from nncf.common.logging.track_progress import track
from nncf.common.tensor_statistics.collectors import TensorCollector
from nncf.common.tensor_statistics.statistic_point import StatisticPoint, StatisticPointsContainer
from nncf.openvino.graph.model_transformer import OVModelTransformer
from nncf.openvino.graph.node_utils import get_result_node_name
from nncf.openvino.graph.transformations.commands import OVTargetPoint
from nncf.openvino.statistics.aggregator import OVStatisticsAggregator
from nncf.tensor import Tensor

from scap_nncf.algorithms.backends.openvino.feed import attention_mask, compile_exact, feed
from scap_nncf.algorithms.backends.openvino.layers import FcLayer, find_layers, ir_of
from scap_nncf.algorithms.backends.openvino.prune import attach
from scap_nncf.algorithms.plan import Plan, SitePlan
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.statistics import HistogramStatistic
from scap_nncf.algorithms.sites import Site

if TYPE_CHECKING:
    from scap_nncf.algorithms.allocation.fisher import Costs

ALGORITHM = "scap"
EMPTY_DATASET = "The calibration dataset is empty; give at least one sample."


class SitePoint(TargetPoint):
    """NNCF target point of a site, named by the layer that reads it first."""

    def __init__(self, layer_name: str) -> None:
        super().__init__(TargetType.PRE_LAYER_OPERATION)
        self.target_node_name = layer_name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SitePoint) and other.target_node_name == self.target_node_name

    def __hash__(self) -> int:
        return hash(self.target_node_name)


def statistic_points(sites: Sequence[Site], make_collector: Callable[[], TensorCollector]) -> StatisticPointsContainer:
    """One collector a site, whatever the number of layers that read it."""
    points = StatisticPointsContainer()
    for site in sites:
        points.add_statistic_point(StatisticPoint(SitePoint(site.name), make_collector(), ALGORITHM))
    return points


def collect(model: Any, points: StatisticPointsContainer, samples: Iterable[Any], total: int | None = None) -> int:
    """
    Run the samples and gather statistics at the points, in one streaming pass on the CPU in float32.

    Positions where the ``attention_mask`` is 0 do not count. The state of a stateful model is reset before each sample.
    The activations of all sites are held for one sample at a time.

    :param points: gathers are left in its collectors.
    :param samples: see :func:`scap_nncf.algorithms.backends.openvino.feed.feed`.
    :param total: number of samples, for the progress bar.
    :return: number of samples seen.
    :raises nncf.ValidationError: no sample, a sample that does not fit, or NaN or Inf at a site.
    """
    aggregator = _SiteAggregator(_Source(samples, total))
    aggregator.register_statistic_points(points)
    aggregator.collect_statistics(ir_of(model))
    return aggregator.count


def histograms_of(points: StatisticPointsContainer) -> dict[str, ActivationHistogram]:
    """
    Site name → activation histogram.

    :raises nncf.ValidationError: a site never ran.
    """
    result = {}
    for _, point, collector in points.get_tensor_collectors():
        statistic = collector.get_statistics()
        assert isinstance(statistic, HistogramStatistic)
        result[point.target_point.target_node_name] = statistic.to_histogram()  # type: ignore[attr-defined]
    silent = [name for name, histogram in result.items() if histogram.total == 0]
    if silent:
        msg = (
            f"{len(silent)} of {len(result)} sites never ran during calibration: {', '.join(silent[:5])}"
            f"{' ...' if len(silent) > 5 else ''}. Use samples that reach them, or leave them out with ignored_scope."
        )
        raise nncf.ValidationError(msg)
    return result


def collect_sequential(
    model: Any,
    sites: Sequence[Site],
    points: StatisticPointsContainer,
    samples: Sequence[Any],
    decide: Callable[[Site, ActivationHistogram], SitePlan],
) -> int:
    """
    Calibrate site after site, each on the pruned output of the sites before it.

    A graph cannot wait in the middle as PyTorch's hooks can, so every site runs the samples anew: the cost is the
    number of sites times that of :func:`collect`.

    :param sites: in the order of execution.
    :param decide: gives the plan of a site from its histogram.
    :return: number of samples.
    """
    if not samples:
        raise nncf.ValidationError(EMPTY_DATASET)
    work = ir_of(model).clone()
    by_site = {point.target_point.target_node_name: point for _, point, _ in points.get_tensor_collectors()}  # type: ignore[attr-defined]
    for site in track(sites, total=len(sites), description="Calibrating sites in sequence"):
        one = StatisticPointsContainer()
        one.add_statistic_point(by_site[site.name])
        aggregator = _SiteAggregator(_Source(samples, len(samples)), quiet=True)
        aggregator.register_statistic_points(one)
        aggregator.collect_statistics(work)
        attach(work, Plan((decide(site, histograms_of(one)[site.name]),)))
    return len(samples)


def collect_costs(
    model: Any,
    sites: Sequence[Site],
    histograms: Mapping[str, ActivationHistogram],
    modes: Mapping[str, float],
    samples: Sequence[Any],
    seed: int = 0,
    checkpointing: bool = False,
) -> Costs:
    """
    :raises nncf.ParameterNotSupportedError: always; OpenVINO has no gradients.
    """
    msg = (
        "Allocation 'fisher' needs gradients, which OpenVINO models do not have. Calibrate the PyTorch model with it "
        "and apply its plan here: nncf.compress(ov_model, plan=plan)."
    )
    raise nncf.ParameterNotSupportedError(msg)


def train_mitigation(model: Any, plan: Plan, mitigation: Any, samples: Sequence[Any]) -> dict[Any, Any]:
    """
    :raises nncf.ParameterNotSupportedError: always; OpenVINO has no gradients.
    """
    raise nncf.ParameterNotSupportedError(_ON_PYTORCH.format(what="A learned error mitigation needs gradients, which"))


def shifted_histograms(model: Any, plan: Plan, samples: Sequence[Any]) -> dict[str, ActivationHistogram]:
    """
    :raises nncf.ParameterNotSupportedError: always; such thresholds are found on PyTorch models.
    """
    raise nncf.ParameterNotSupportedError(_ON_PYTORCH.format(what="Thresholds after a shift of each token, which"))


def greedy_paths(model: Any, sites: Sequence[Site], histograms: Any, samples: Sequence[Any]) -> Any:
    """
    :raises nncf.ParameterNotSupportedError: always; the search runs blocks by themselves.
    """
    raise nncf.ParameterNotSupportedError(_ON_PYTORCH.format(what="Blocks that run by themselves, for greedy,"))


def train_biases(model: Any, samples: Sequence[Any], settings: Any) -> Any:
    """
    :raises nncf.ParameterNotSupportedError: always; OpenVINO has no gradients.
    """
    raise nncf.ParameterNotSupportedError(_ON_PYTORCH.format(what="Refining needs gradients, which"))


_ON_PYTORCH = (
    "{what} OpenVINO models do not have. Compress the PyTorch model and export it, or apply its plan here: "
    "nncf.compress(ov_model, plan=plan)."
)


class _Source:
    """Samples in the shape of a ``nncf.Dataset``: they may be a generator, and may have no length."""

    def __init__(self, samples: Iterable[Any], total: int | None) -> None:
        self._samples = samples
        self._total = total

    def get_length(self) -> int | None:
        return self._total

    def get_inference_data(self) -> Iterable[Any]:
        return self._samples


class _SiteAggregator(OVStatisticsAggregator):
    """
    NNCF's aggregator with what language models need: padding does not count, NaN and Inf are reported by site and
    sample, and the outputs of the model itself are not computed.
    """

    def __init__(self, dataset: _Source, quiet: bool = False) -> None:
        super().__init__(dataset)  # type: ignore[arg-type]
        self.count = 0
        self._quiet = quiet
        self._mask: np.ndarray[Any, Any] | None = None
        self._site_names: dict[str, str] = {}  # result name → site, for messages
        self._channel_axes: dict[str, int] = {}

    def collect_statistics(self, model: ov.Model, graph: Any = None) -> None:
        self._name_to_node_mapping = {op.get_friendly_name(): op for op in model.get_ops()}
        located = self._locate(model)
        merged = self._get_merged_statistic_points(located, model, graph)
        layout = self._get_transformation_layout_extra_outputs(merged)
        model_with_outputs = OVModelTransformer(model).transform(layout)
        compiled = compile_exact(_without_outputs(model_with_outputs, len(model.outputs)))
        request = compiled.create_infer_request()
        samples = self.dataset.get_inference_data()
        if not self._quiet:
            samples = track(samples, total=self._get_iterations_number(), description="Calibrating activations")
        for sample in samples:
            arrays = feed(model, sample, f"sample {self.count}")
            self._mask = attention_mask(arrays)
            if model.get_sinks():
                request.reset_state()
            try:
                results = request.infer(arrays, share_inputs=True, share_outputs=True)
            except RuntimeError as error:
                shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
                msg = f"The OpenVINO model cannot run sample {self.count} ({shapes}): {error}"
                raise nncf.ValidationError(msg) from error
            named = {name: value for output, value in results.items() for name in output.get_names()}
            self._register_statistics(self._process_outputs(named), merged)
            self.count += 1
        if self.count == 0:
            raise nncf.ValidationError(EMPTY_DATASET)

    def _locate(self, model: ov.Model) -> StatisticPointsContainer:
        """The points of sites as points at the outputs of nodes."""
        layers = {layer.name: layer for layer in find_layers(model)[0]}
        located = StatisticPointsContainer()
        for _, point, collector in self.statistic_points.get_tensor_collectors():
            name = point.target_point.target_node_name  # type: ignore[attr-defined]
            for node_name, port, axis in _sources(layers[name]):
                result = get_result_node_name(node_name, port)
                self._site_names[result], self._channel_axes[result] = name, axis
                target = OVTargetPoint(TargetType.POST_LAYER_OPERATION, node_name, port)
                located.add_statistic_point(StatisticPoint(target, collector, ALGORITHM))
        return located

    def _register_statistics(self, outputs: dict[str, Tensor], statistic_points: StatisticPointsContainer) -> None:
        for _, point, collector in statistic_points.get_tensor_collectors():
            node_name, port, _ = self._translate_to_post_layer_operation(point)
            result = get_result_node_name(node_name, port)
            values = torch.from_numpy(outputs[result].data)
            values = _without_padding(values, self._mask, self._channel_axes[result])
            if values.numel() == 0:
                continue
            if not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
                msg = (
                    f"The input of {self._site_names[result]} has NaN or Inf values in sample {self.count}. Check the "
                    "sample and the weights; weights stored in half precision may have overflowed."
                )
                raise nncf.ValidationError(msg)
            collector.register_input_for_all_reducers(Tensor(values))


def _sources(layer: FcLayer) -> list[tuple[str, int, int]]:
    found = []
    for call in layer.calls:
        source = call.source
        found.append((source.get_node().get_friendly_name(), source.get_index(), call.channel_axis))
    return found


def _without_outputs(model: ov.Model, count: int) -> ov.Model:
    """The model without its first `count` results: a language model's logits cost more than a block."""
    return ov.Model(model.get_results()[count:], model.get_sinks(), model.get_parameters(), model.friendly_name)


def _without_padding(x: torch.Tensor, mask: np.ndarray[Any, Any] | None, channel_axis: int) -> torch.Tensor:
    """Rows [n, IC] of an activation that the mask [B, T] keeps; all of it, channels last, where it does not fit."""
    x = x.movedim(channel_axis, -1)
    if mask is None or x.numel() // x.shape[-1] != mask.size:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows[torch.from_numpy(mask.reshape(-1))]
