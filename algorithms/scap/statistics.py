# SPDX-License-Identifier: Apache-2.0
"""
Statistic collectors of SCAP, built on NNCF's reducer / aggregator / collector classes.

``HistogramReducer`` turns an activation into bucket counts, ``HistogramAggregator`` adds counts up. Both backends use
them: PyTorch through module hooks, OpenVINO through NNCF's ``OVStatisticsAggregator``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from nncf.common.tensor_statistics.collectors import AggregatorBase, TensorCollector, TensorReducerBase
from nncf.common.tensor_statistics.statistics import TensorStatistic
from nncf.tensor import Tensor

from scap_nncf.algorithms.scap.histogram import NUM_BUCKETS, ActivationHistogram

HISTOGRAM_KEY = "histogram"


def bucket_counts(values: torch.Tensor) -> torch.Tensor:
    """
    Counts of the upper 16 bits of every value's float32 pattern.

    :param values: floating-point tensor of any shape and device.
    :return: int64 [65536] on the same device.
    """
    values = values.detach().reshape(-1)
    if values.dtype == torch.bfloat16:
        index = values.view(torch.int16).to(torch.int32) & 0xFFFF
    else:
        index = (values.to(torch.float32).view(torch.int32) >> 16) & 0xFFFF
    return torch.bincount(index, minlength=NUM_BUCKETS)


class HistogramReducer(TensorReducerBase):
    """Activation of any shape → [counts int64 [65536], exact flag]."""

    def _reduce_out_of_place(self, x: list[Tensor]) -> list[Tensor]:
        data = x[0].data
        if isinstance(data, torch.Tensor):
            return [Tensor(bucket_counts(data)), Tensor(torch.tensor(data.dtype == torch.bfloat16))]
        exact = str(data.dtype) == "bfloat16"
        counts = bucket_counts(torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)))
        return [Tensor(counts.numpy()), Tensor(np.array(exact))]


class HistogramAggregator(AggregatorBase):
    """Sum of bucket counts; integer addition, so the order of the samples does not matter."""

    def __init__(self, num_samples: int | None = None) -> None:
        super().__init__(num_samples=num_samples)
        self._counts: Any = None

    def _register_reduced_input_impl(self, x: Tensor) -> None:
        if self._counts is None:
            self._counts = x.data
            return
        if isinstance(self._counts, torch.Tensor) and isinstance(x.data, torch.Tensor):
            self._counts = self._counts.to(x.data.device)  # counts of an earlier run start on the CPU
        self._counts += x.data

    def _aggregate_impl(self) -> Any:
        return self._counts.cpu().numpy() if isinstance(self._counts, torch.Tensor) else self._counts

    def reset(self) -> None:
        super().reset()
        self._counts = None


class ExactAggregator(AggregatorBase):
    """True while every registered activation was bfloat16."""

    def __init__(self, num_samples: int | None = None) -> None:
        super().__init__(num_samples=num_samples)
        self._exact = True

    def _register_reduced_input_impl(self, x: Tensor) -> None:
        self._exact = self._exact and bool(x.data)

    def _aggregate_impl(self) -> bool:
        return self._exact

    def reset(self) -> None:
        super().reset()
        self._exact = True


@dataclass
class HistogramStatistic(TensorStatistic):
    """What a collector of this module returns; either field is None where no value was seen."""

    HISTOGRAM_STAT: ClassVar[str] = HISTOGRAM_KEY
    EXACT_STAT: ClassVar[str] = "exact"

    histogram: Any = None
    exact: Any = None

    def to_histogram(self) -> ActivationHistogram:
        if self.histogram is None:
            return ActivationHistogram()
        return ActivationHistogram(np.asarray(self.histogram, dtype=np.int64), bool(self.exact))


def make_collector(num_samples: int | None = None) -> TensorCollector:
    """A NNCF collector that gathers one site's activation histogram."""
    collector = TensorCollector(HistogramStatistic)
    reducer = HistogramReducer()
    collector.register_statistic_branch(HistogramStatistic.HISTOGRAM_STAT, reducer, HistogramAggregator(num_samples), 0)
    collector.register_statistic_branch(HistogramStatistic.EXACT_STAT, reducer, ExactAggregator(num_samples), 1)
    return collector


def histogram_of(collector: TensorCollector) -> ActivationHistogram:
    """What a collector of this module has gathered so far."""
    statistic = collector.get_statistics()
    assert isinstance(statistic, HistogramStatistic)
    return statistic.to_histogram()


def add_histogram(collector: TensorCollector, histogram: ActivationHistogram) -> None:
    """Add what was gathered elsewhere, by another process or an earlier run, to a collector of this module."""
    if not histogram.counts.any():
        return
    for aggregator in collector.aggregators.values():
        if isinstance(aggregator, HistogramAggregator):
            aggregator.register_reduced_input(Tensor(torch.from_numpy(histogram.counts.copy())))
        elif isinstance(aggregator, ExactAggregator):
            aggregator.register_reduced_input(Tensor(np.array(histogram.exact)))


def set_histogram(collector: TensorCollector, histogram: ActivationHistogram) -> None:
    """Replace what a collector of this module has gathered."""
    for aggregator in collector.aggregators.values():
        aggregator.reset()
    add_histogram(collector, histogram)
