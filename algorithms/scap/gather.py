# SPDX-License-Identifier: Apache-2.0
"""Gathering statistics: in one process or several, from the start or from where a crash ended it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import nncf
import numpy as np
import torch
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer

from scap_nncf.algorithms.backends import Backend
from scap_nncf.algorithms.data import Kept, Samples
from scap_nncf.algorithms.processes import Processes, refuse_sharded
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.journal import Journal, add_to_digest, model_key, unfinished
from scap_nncf.algorithms.scap.statistics import histogram_of, set_histogram
from scap_nncf.algorithms.sites import Site


def share_samples(samples: Samples | Kept, model: Any, sites: Sequence[Site], processes: Processes) -> Iterable[Any]:
    """
    This process's share of the samples: every n-th.

    :raises nncf.ValidationError: the processes were given different data or models.
    """
    if processes.count == 1:
        return samples
    with processes.together():
        refuse_sharded(model)
    digest = hashlib.sha256(repr((samples.total, sites)).encode())
    add_to_digest(digest, samples.first())
    if len(set(processes.exchange(digest.hexdigest()))) > 1:
        msg = (
            "The processes were given different models or data. Give each the whole dataset, in the same order: each "
            "takes its share. To merge statistics of different data, calibrate inside "
            "scap_nncf.single_process() and use CalibrationStatistics.merge."
        )
        raise nncf.ValidationError(msg)
    return processes.share(samples)


def gather(
    backend: Backend,
    model: Any,
    sites: Sequence[Site],
    points: StatisticPointsContainer,
    samples: Iterable[Any],
    total: int | None,
    processes: Processes,
    by_block: bool = False,
) -> int:
    """
    Statistics of the dense model, left in the collectors of `points`: those of all processes in each of them.

    :param samples: this process's share.
    :param total: number of samples of all processes, for the progress bar.
    :param by_block: hold the weights of one block at a time, see :func:`walks_by_block`.
    :return: number of samples of all processes.
    """
    work = unfinished()
    if by_block:
        own = list(samples)
        with processes.together():
            if own or processes.count == 1:
                _collect_by_block(backend, model, sites, points, own, processes)
        merge_points(points, processes)
        return sum(processes.exchange(len(own)))
    counter = _Counter(samples)
    with processes.together():
        stream: Any = iter(counter)
        if work is not None:
            stream = Journal(work, sites, points, model_key(model, sites), processes).remaining(stream)
        first = next(stream, _END)
        # nothing is left where there were fewer samples than processes, or all were counted before a crash
        if first is not _END or (processes.count == 1 and not counter.count):
            rest = itertools.chain([first], stream) if first is not _END else iter(())
            share = None if total is None else -(-total // processes.count)
            with _memory_explained():
                backend.collect(model, points, rest, share)
    merge_points(points, processes)
    return sum(processes.exchange(counter.count))


def _collect_by_block(
    backend: Any,
    model: Any,
    sites: Sequence[Site],
    points: StatisticPointsContainer,
    samples: Sequence[Any],
    processes: Processes,
) -> None:
    work = unfinished()
    keeper = None
    if work is not None:
        key = {**model_key(model, sites), "calibration": "block by block"}
        keeper = Journal(work, sites, points, key, processes).keeper(samples)
    with _memory_explained():
        backend.collect_by_block(model, sites, points, samples, keeper)


def gather_in_sequence(
    backend: Any,
    model: Any,
    sites: Sequence[Site],
    points: StatisticPointsContainer,
    samples: Iterable[Any],
    decide: Callable[[Site, ActivationHistogram], Any],
    processes: Processes,
    by_block: bool,
    key: Mapping[str, Any],
) -> int:
    """
    Statistics of each site on the pruned output of those before it, left in the collectors of `points`.

    :param samples: this process's share.
    :param decide: gives the plan of a site from the histogram of all processes.
    :param key: the settings that `decide` depends on.
    :return: number of samples of all processes.
    """
    own = list(samples)
    keeper = None
    with processes.together():
        work = unfinished()
        # several processes may have been killed at different blocks, and decide together: they start anew
        if work is not None and by_block and processes.count == 1:
            described = {**model_key(model, sites), "calibration": "sequential", **key}
            keeper = Journal(work, sites, points, described, processes).keeper(own)
        with _memory_explained():
            backend.collect_sequential(
                model, sites, points, own, decide, processes=processes, by_block=by_block, keeper=keeper
            )
    merge_points(points, processes)
    return sum(processes.exchange(len(own)))


def walks_by_block(backend: Any, model: Any, asked: bool | None) -> bool:
    """
    Whether to calibrate with the weights of one block at a time.

    :param asked: what the user said; None where weights are not in memory.
    :raises nncf.ParameterNotSupportedError: asked for, and the backend cannot.
    """
    able = hasattr(backend, "collect_by_block")
    if asked and not able:
        msg = "block_by_block=True is for PyTorch models; OpenVINO maps the weights of a model from its file as it is."
        raise nncf.ParameterNotSupportedError(msg)
    return able and (backend.is_offloaded(model) if asked is None else asked)


@contextmanager
def _memory_explained() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(_OUT_OF_MEMORY) from error


_END = object()
_OUT_OF_MEMORY = (
    "The device has not enough memory for a calibration sample. Give samples with fewer rows or tokens, spread the "
    "model (device_map='auto'), or calibrate block by block (block_by_block=True)."
)


class _Counter:
    """Counts what is drawn from it."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self._samples = samples
        self.count = 0

    def __iter__(self) -> Any:
        for sample in self._samples:
            self.count += 1
            yield sample


def merge_points(points: StatisticPointsContainer, processes: Processes) -> None:
    """Give each process's collectors the counts of all; integer sums, so that any number of processes agrees."""
    if processes.count == 1:
        return
    collectors = {
        point.target_point.target_node_name: collector  # type: ignore[attr-defined]
        for _, point, collector in points.get_tensor_collectors()
    }
    merged = merge_histograms({name: histogram_of(c) for name, c in collectors.items()}, processes)
    for name, histogram in merged.items():
        set_histogram(collectors[name], histogram)


def merge_histograms(
    histograms: Mapping[str, ActivationHistogram], processes: Processes
) -> dict[str, ActivationHistogram]:
    """The sum over all processes of histograms under the same names, in the same order."""
    if processes.count == 1:
        return dict(histograms)
    # a histogram of bfloat16 values alone is exact; one without values has no say
    says = processes.exchange([h.exact if h.counts.any() else None for h in histograms.values()])
    merged = {}
    for index, (name, histogram) in enumerate(histograms.items()):
        heard = [flags[index] for flags in says if flags[index] is not None]
        counts = processes.sum_counts(np.ascontiguousarray(histogram.counts))
        merged[name] = ActivationHistogram(counts, bool(heard) and all(heard))
    return merged
