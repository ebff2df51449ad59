# SPDX-License-Identifier: Apache-2.0
"""Second moments of the channels of a site, for CLACT, built on NNCF's reducer / aggregator / collector classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from nncf.common.tensor_statistics.collectors import AggregatorBase, TensorCollector, TensorReducerBase
from nncf.common.tensor_statistics.statistics import TensorStatistic
from nncf.tensor import Tensor


class SquaresReducer(TensorReducerBase):
    """Activation [..., IC] → [sums of squares float64 [IC], number of tokens]."""

    def _reduce_out_of_place(self, x: list[Tensor]) -> list[Tensor]:
        rows = torch.as_tensor(x[0].data)
        rows = rows.detach().reshape(-1, rows.shape[-1]).double()
        return [Tensor(rows.square().sum(0)), Tensor(torch.tensor(rows.shape[0]))]


class SumAggregator(AggregatorBase):
    """Sum over samples."""

    def __init__(self, num_samples: int | None = None) -> None:
        super().__init__(num_samples=num_samples)
        self._sum: Any = None

    def _register_reduced_input_impl(self, x: Tensor) -> None:
        self._sum = x.data if self._sum is None else self._sum + x.data

    def _aggregate_impl(self) -> Any:
        return self._sum.cpu()

    def reset(self) -> None:
        super().reset()
        self._sum = None


@dataclass
class ChannelStatistic(TensorStatistic):
    """Either field is None where no value was seen."""

    SQUARES_STAT: ClassVar[str] = "squares"
    TOKENS_STAT: ClassVar[str] = "tokens"

    squares: Any = None
    tokens: Any = None

    def mean_square(self) -> torch.Tensor | None:
        """Of each channel, float64 [IC]."""
        return None if self.squares is None else self.squares / self.tokens


def make_collector(num_samples: int | None = None) -> TensorCollector:
    """A NNCF collector that gathers the second moments of one site."""
    collector = TensorCollector(ChannelStatistic)
    reducer = SquaresReducer()
    collector.register_statistic_branch(ChannelStatistic.SQUARES_STAT, reducer, SumAggregator(num_samples), 0)
    collector.register_statistic_branch(ChannelStatistic.TOKENS_STAT, reducer, SumAggregator(num_samples), 1)
    return collector
