# SPDX-License-Identifier: Apache-2.0
"""
The calibration statistic of a site: a histogram over the 65,536 bfloat16 bit patterns.

Why this histogram: it needs no range, so one pass suffices; integer counts add exactly, so batches, processes
and machines may come in any order and give the same plan bit for bit; its size does not depend on the number of
samples (512 KiB a site); and mean, median, density peak and every quantile of ``|x - mode|`` follow from it, so a
new sparsity or mode needs no new pass. A bucket spans 1/128 of its power of two: 0.4 to 0.8 % of the value.
Quantiles are interpolated inside the bucket, and are exact for data that already was bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import nncf
import numpy as np
from numpy.typing import NDArray

NUM_BUCKETS = 1 << 16
_SIGN = 0x8000
_FIRST_NON_FINITE = 0x7F80  # +Inf; NaNs follow
_SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class _Grid:
    """Buckets in ascending order of value. B = number of finite patterns."""

    order: NDArray[np.int64]  # [B] bit pattern of each bucket
    edges: NDArray[np.float64]  # [B + 1]
    centres: NDArray[np.float64]  # [B] the value that stands for the bucket


@lru_cache(maxsize=2)
def _grid(exact: bool) -> _Grid:
    patterns = np.arange(_FIRST_NON_FINITE, dtype=np.uint32)
    lower = (patterns << 16).view(np.float32).astype(np.float64)  # [32640] magnitudes, lower edge
    upper = np.append(lower[1:], np.float64(2.0**128))
    order = np.concatenate([(patterns[::-1] | _SIGN), patterns]).astype(np.int64)
    if exact:  # values sit on the patterns: edges half-way between neighbours
        half = np.append(0.0, (lower[1:] + lower[:-1]) / 2)
        edges = np.concatenate([[-upper[-1]], -half[::-1], half[1:], [upper[-1]]])
        centres = np.concatenate([-lower[::-1], lower])
    else:  # values were truncated towards zero: bucket = [lower, upper)
        edges = np.concatenate([-upper[::-1], [0.0], upper])
        centres = np.concatenate([-(lower + upper)[::-1] / 2, (lower + upper) / 2])
    return _Grid(order, edges, centres)


@dataclass
class ActivationHistogram:
    """
    Counts of activation values of one site.

    :param counts: int64 [65536], indexed by the upper 16 bits of the value's float32 pattern.
    :param exact: True if every value was bfloat16, so that a bucket holds one value only.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BUCKETS, dtype=np.int64))
    exact: bool = False

    def __post_init__(self) -> None:
        if self.counts.shape != (NUM_BUCKETS,) or self.counts.dtype != np.int64:
            msg = (
                f"An activation histogram needs int64 counts of shape ({NUM_BUCKETS},), "
                f"got {self.counts.dtype} {self.counts.shape}."
            )
            raise nncf.ValidationError(msg)
        if self.counts.min() < 0:
            msg = "An activation histogram has negative counts: the statistics file is damaged."
            raise nncf.ValidationError(msg)

    @property
    def total(self) -> int:
        """Number of finite values seen."""
        return int(self.counts.sum()) - self.non_finite

    @property
    def non_finite(self) -> int:
        """Number of NaN and Inf values seen."""
        return int(self.counts[_FIRST_NON_FINITE:_SIGN].sum() + self.counts[_SIGN | _FIRST_NON_FINITE :].sum())

    @property
    def zero_share(self) -> float:
        """Share of values that are zero, as ReLU leaves them (or below 1e-40)."""
        zeros = int(self.counts[0] + self.counts[_SIGN])
        return zeros / self.total if self.total else 0.0

    def merge(self, other: ActivationHistogram) -> ActivationHistogram:
        """The histogram of both data sets; commutative and associative, exact."""
        if not self.total:
            return ActivationHistogram(other.counts.copy(), other.exact)
        if not other.total:
            return ActivationHistogram(self.counts.copy(), self.exact)
        return ActivationHistogram(self.counts + other.counts, self.exact and other.exact)

    # -- statistics of x ----------------------------------------------------------------------------------------

    def mean(self) -> float:
        """Mean of x, with each bucket at its centre."""
        grid, counts = self._sorted()
        return float((grid.centres * counts).sum() / counts.sum())

    def median(self) -> float:
        """Median of x (lower median where the data is bfloat16)."""
        grid, counts = self._sorted()
        cumulative = np.cumsum(counts)
        middle = (int(cumulative[-1]) - 1) // 2
        bucket = int(np.searchsorted(cumulative, middle, side="right"))
        if self.exact:
            return float(grid.centres[bucket])
        inside = (middle - (cumulative[bucket] - counts[bucket]) + 0.5) / counts[bucket]
        return float(grid.edges[bucket] + inside * (grid.edges[bucket + 1] - grid.edges[bucket]))

    def value_quantile(self, share: float) -> float:
        """Quantile of x itself (not of its magnitude)."""
        return float(np.interp(share * self.total, *self._cumulative()[::-1]))

    def kde_mode(self, bandwidth_scale: float = 0.5, points: int = 8192) -> float:
        """
        Peak of a Gaussian kernel density estimate of x (SCAP paper, section 3).

        The grid covers the central 99.8 % of the values, so that massive outliers do not coarsen it. Bandwidth:
        Scott's rule times `bandwidth_scale` for at most 100,000 values, with min(std, IQR / 1.349) as the spread,
        following the setting of the reference implementation (which draws subsamples of that size).
        """
        low, high = self.value_quantile(0.001), self.value_quantile(0.999)
        if not high > low:
            return self.median()
        edges, cumulative = self._cumulative()
        grid = np.linspace(low, high, points + 1)
        mass = np.diff(np.interp(grid, edges, cumulative))
        centres = (grid[1:] + grid[:-1]) / 2
        mean = float((mass * centres).sum() / mass.sum())
        std = float(np.sqrt((mass * (centres - mean) ** 2).sum() / mass.sum()))
        iqr = self.value_quantile(0.75) - self.value_quantile(0.25)
        spread = min(std, iqr / 1.349) if iqr > 0 else std
        step = (high - low) / points
        sigma = bandwidth_scale * spread * min(self.total, 100_000) ** -0.2 / step  # in grid steps
        reach = int(np.ceil(4 * sigma))
        if 0 < reach < points // 2:
            offsets = np.arange(-reach, reach + 1)
            kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
            mass = np.convolve(mass, kernel / kernel.sum(), mode="same")
        return float(centres[int(np.argmax(mass))])

    def density(self, edges: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of the values in each bin between consecutive `edges`; for plots."""
        bucket_edges, cumulative = self._cumulative()
        return np.diff(np.interp(edges, bucket_edges, cumulative)) / cumulative[-1]

    # -- statistics of |x - mode| --------------------------------------------------------------------------------

    def quantile(self, sparsity: float, mode: float = 0.0) -> float:
        """
        τ = Quantile(|x − η|, s), equation 2 of the SCAP paper: dropping ``|x − mode| <= τ`` gives `sparsity`.

        For bfloat16 data the candidate value whose realised share is nearest to `sparsity` is chosen, since a whole
        bucket ties. The result is never below 0: dropping values equal to the mode loses nothing.

        :param sparsity: target share s in [0, 1).
        :param mode: η.
        :return: the threshold τ ≥ 0.
        """
        if not 0.0 <= sparsity < 1.0:
            msg = f"Sparsity must be in [0, 1), got {sparsity}."
            raise nncf.ValidationError(msg)
        if self.exact:
            distance, dropped = self._atoms(mode)
            wanted = sparsity * dropped[-1]
            index = int(np.searchsorted(dropped, wanted))
            if index > 0 and wanted - dropped[index - 1] < dropped[index] - wanted:
                index -= 1
            return float(distance[index])
        distance, dropped = self._continuous(mode)
        total = dropped[-1]
        wanted = (total - 1) * sparsity + 0.5  # numpy's linear rule, values spread evenly inside a bucket
        index = min(max(int(np.searchsorted(dropped, wanted)), 1), len(dropped) - 1)
        rise = dropped[index] - dropped[index - 1]
        inside = (wanted - dropped[index - 1]) / rise if rise > 0 else 1.0
        threshold = float(distance[index - 1] + min(max(inside, 0.0), 1.0) * (distance[index] - distance[index - 1]))
        return threshold if threshold >= _SMALLEST_NORMAL else 0.0  # inside the bucket of exact zeros

    def realised(self, threshold: float, mode: float = 0.0) -> float:
        """Share of the values with ``|x − mode| <= threshold``, as far as the buckets tell."""
        if threshold < 0:
            return 0.0
        distance, dropped = self._atoms(mode) if self.exact else self._continuous(mode)
        if self.exact:
            index = int(np.searchsorted(distance, threshold, side="right"))
            return float(dropped[index - 1] / dropped[-1]) if index else 0.0
        return float(np.interp(threshold, distance, dropped) / dropped[-1])

    def dropped_energy(self, threshold: float, mode: float = 0.0) -> float:
        """Mean over all values of ``(x − mode)²`` where it is at or below τ²: the error that pruning makes in x."""
        grid, counts = self._sorted()
        distance = np.abs(grid.centres - mode)
        kept_out = np.where(distance <= threshold, distance * distance, 0.0)
        return float((kept_out * counts).sum() / counts.sum())

    # -- helpers -------------------------------------------------------------------------------------------------

    def _sorted(self) -> tuple[_Grid, NDArray[np.int64]]:
        if self.total == 0:
            msg = "The histogram is empty: no finite value reached this site during calibration."
            raise nncf.ValidationError(msg)
        grid = _grid(self.exact)
        return grid, self.counts[grid.order]

    def _cumulative(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bucket edges of the occupied range and the number of values below each."""
        grid, counts = self._sorted()
        occupied = np.flatnonzero(counts)
        first, last = occupied[0], occupied[-1] + 1
        cumulative = np.concatenate([[0], np.cumsum(counts[first:last])]).astype(np.float64)
        return grid.edges[first : last + 1], cumulative

    def _continuous(self, mode: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Break points t and the number of values with |x − mode| <= t; linear in between."""
        edges, cumulative = self._cumulative()
        distance = np.unique(np.abs(edges - mode))
        if edges[0] < mode < edges[-1]:
            distance = np.concatenate([[0.0], distance])
        dropped = np.interp(mode + distance, edges, cumulative) - np.interp(mode - distance, edges, cumulative)
        return distance, dropped

    def _atoms(self, mode: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Distances of the occupied bfloat16 values from the mode, ascending, and the running count."""
        grid, counts = self._sorted()
        occupied = counts > 0
        # float32, as the pruner computes it
        distance = np.abs(grid.centres[occupied].astype(np.float32) - np.float32(mode)).astype(np.float64)
        order = np.argsort(distance, kind="stable")
        distance, dropped = distance[order], np.cumsum(counts[occupied][order]).astype(np.float64)
        last_of_tie = np.append(distance[1:] != distance[:-1], True)
        return distance[last_of_tie], dropped[last_of_tie]
