# SPDX-License-Identifier: Apache-2.0
"""Activation statistics of a PyTorch model: dense in one streaming pass, or site after site (sequential)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import nncf
import torch
from nncf.common.graph.transformations.commands import TargetPoint, TargetType
from nncf.common.logging.track_progress import track
from nncf.common.tensor_statistics.collectors import TensorCollector
from nncf.common.tensor_statistics.statistic_point import StatisticPoint, StatisticPointsContainer
from nncf.tensor import Tensor
from torch import nn

from scap_nncf.algorithms.backends.torch import experts
from scap_nncf.algorithms.backends.torch.blockwise import BlockWalk, Finished, Keeper
from scap_nncf.algorithms.backends.torch.examples import with_decoder_inputs
from scap_nncf.algorithms.backends.torch.layers import input_argument
from scap_nncf.algorithms.backends.torch.prune import correction
from scap_nncf.algorithms.backends.torch.prune_experts import ExpertsPruner
from scap_nncf.algorithms.backends.torch.run import attention_mask, evaluation, forward_sample, without_cache
from scap_nncf.algorithms.plan import SitePlan
from scap_nncf.algorithms.processes import ALONE, Processes
from scap_nncf.algorithms.scap.gather import merge_histograms
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.pooling import shrink
from scap_nncf.algorithms.scap.statistics import HistogramStatistic
from scap_nncf.algorithms.sites import Site, expert_pool
from scap_nncf.kernels.reference import prune

ALGORITHM = "scap"


class SitePoint(TargetPoint):
    """NNCF target point of a site: the input of the module that reads it first."""

    def __init__(self, module_name: str) -> None:
        super().__init__(TargetType.PRE_LAYER_OPERATION)
        self.target_node_name = module_name

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


def collect(
    model: nn.Module, points: StatisticPointsContainer, samples: Iterable[Any], total: int | None = None
) -> int:
    """
    Run the samples through the model and gather statistics at the points, in one streaming pass.

    Positions where the sample's ``attention_mask`` is 0 do not count.

    :param points: gathers are left in its collectors.
    :param samples: what the model can be called with, one after the other.
    :param total: number of samples, for the progress bar.
    :return: number of samples seen.
    :raises nncf.ValidationError: no sample, a sample that the model cannot take, or NaN or Inf at a site.
    """
    recorder = _Recorder(points)
    count = 0
    with evaluation(model), recorder.attached(model):
        for index, sample in enumerate(track(samples, total=total, description="Calibrating activations")):
            recorder.pause()
            sample = with_decoder_inputs(model, sample, f"sample {index}")
            recorder.begin(f"sample {index}", attention_mask(sample))
            forward_sample(model, sample, f"sample {index}")
            count += 1
    if count == 0:
        raise nncf.ValidationError(EMPTY_DATASET)
    return count


EMPTY_DATASET = "The calibration dataset is empty; give at least one sample."


class _Recorder:
    """Feeds the collectors of the points from module pre-hooks."""

    def __init__(self, points: StatisticPointsContainer) -> None:
        self.collectors = {
            point.target_point.target_node_name: collector  # type: ignore[attr-defined]
            for _, point, collector in points.get_tensor_collectors()
        }
        self._current = threading.local()

    def pause(self) -> None:
        """Record nothing until :meth:`begin`."""
        self._current.recording = False

    def begin(self, sample_name: str, mask: torch.Tensor | None) -> None:
        self._current.recording = True
        self._current.sample_name = sample_name
        self._current.mask = mask

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        fused = experts.expert_layers(model)
        observed = {fused[name].module_name for name in self.collectors if name in fused}
        stages = [(model.get_submodule(name), _ExpertsObserver(self, name)) for name in observed]
        try:
            for module, stage in stages:
                experts.attach(module, stage, first=True)
            for name in self.collectors:
                if name in fused:
                    continue
                module = model.get_submodule(name)

                def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                    self.record(name, input_argument(args, kwargs))

                # first of all hooks: statistics are of what arrives, before any pruner
                handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            yield
        finally:
            for module, stage in stages:
                experts.detach(module, stage)
            for handle in handles:
                handle.remove()

    def record_experts(self, module_name: str, projection: str, x: torch.Tensor, rows: experts.Rows) -> list[str]:
        """Add the rows [S, IC] of fused experts; returns the names of the sites that got any."""
        assert rows.experts is not None
        assert rows.tokens is not None
        if not self._current.recording:
            return []
        mask = self._current.mask
        kept = None
        if mask is not None and mask.numel() == rows.total:
            kept = mask.reshape(-1).to(x.device)[rows.tokens] != 0
        reached = []
        for expert in rows.experts.unique().tolist():
            name = f"{module_name}.{expert}.{projection}"
            if name not in self.collectors:
                continue
            reached.append(name)
            chosen = rows.experts == expert
            self._add(name, x[chosen if kept is None else chosen & kept])
        return reached

    def record(self, name: str, x: torch.Tensor) -> None:
        """Add an activation [..., IC] of the current sample to a site's statistic."""
        if self._current.recording:
            self._add(name, _without_padding(x, self._current.mask))

    def _add(self, name: str, x: torch.Tensor) -> None:
        if x.numel() == 0:  # an expert that no token reached
            return
        collector = self.collectors[name]
        collector.register_input_for_all_reducers(Tensor(x))
        if not bool(torch.isfinite(x.sum(dtype=torch.float32))) and not bool(torch.isfinite(x).all()):
            msg = (
                f"The input of {name} has NaN or Inf values in {self._current.sample_name}. Check the model's dtype "
                "and the sample; half precision may overflow (try bfloat16 or float32)."
            )
            raise nncf.ValidationError(msg)


class _ExpertsObserver(experts.Stage):
    """Feeds the collectors of fused experts."""

    def __init__(self, recorder: _Recorder, module_name: str) -> None:
        self._recorder = recorder
        self._module_name = module_name

    def before(self, projection: str, x: torch.Tensor, rows: experts.Rows) -> torch.Tensor:
        self._recorder.record_experts(self._module_name, projection, x, rows)
        return x


def _without_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Rows [n, IC] of an activation [B, T, IC] or [B·T, IC] that the mask [B, T] keeps; all where it does not fit."""
    if mask is None or x.numel() // x.shape[-1] != mask.numel():
        return x
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1).to(x.device) != 0]


def histograms_of(points: StatisticPointsContainer) -> dict[str, ActivationHistogram]:
    """
    Site name → activation histogram.

    :raises nncf.ValidationError: a site never ran. Experts may be silent where another expert of their block ran.
    """
    result = {}
    for _, point, collector in points.get_tensor_collectors():
        result[point.target_point.target_node_name] = _histogram(collector)  # type: ignore[attr-defined]
    alive = {expert_pool(name) for name, histogram in result.items() if histogram.total}
    silent = [
        name
        for name, histogram in result.items()
        if histogram.total == 0 and (expert_pool(name) is None or expert_pool(name) not in alive)
    ]
    if silent:
        msg = (
            f"{len(silent)} of {len(result)} sites never ran during calibration: {', '.join(silent[:5])}"
            f"{' ...' if len(silent) > 5 else ''}. Use samples that reach them, or leave them out with ignored_scope."
        )
        raise nncf.ValidationError(msg)
    return result


# -- sequential ------------------------------------------------------------------------------------------------------


def collect_sequential(
    model: nn.Module,
    sites: Sequence[Site],
    points: StatisticPointsContainer,
    samples: Sequence[Any],
    decide: Callable[[Site, ActivationHistogram], SitePlan],
    processes: Processes = ALONE,
    by_block: bool = False,
    keeper: Keeper | None = None,
) -> int:
    """
    Calibrate site after site, each on the pruned output of the sites before it, as the reference implementation does.

    All samples advance together: every sample's forward pass runs in a thread of its own and waits at each site until
    all samples have reached it; then `decide` sets the site's mode and thresholds, and the threads go on with its
    input pruned. Only one thread runs at a time. So each site is run once a sample, whatever the architecture, and
    what is held between sites are the live activations of each sample (a few hidden states), as in block-by-block
    calibration.

    :param sites: in the order of execution.
    :param points: one statistic point a site; the statistics are left in its collectors.
    :param decide: gives the plan of a site from its histogram.
    :param processes: decide from the histograms of all of them; each has its own samples, or none.
    :param by_block: hold the weights of one block at a time.
    :param keeper: keeps what a later process can go on from, between blocks.
    :return: number of samples.
    :raises nncf.ValidationError: as :func:`collect`.
    """
    if not samples and processes.count == 1:
        raise nncf.ValidationError(EMPTY_DATASET)
    with evaluation(model):
        samples = [with_decoder_inputs(model, sample, f"sample {index}") for index, sample in enumerate(samples)]
    fused = experts.expert_layers(model)
    # experts of a block are decided together: those that few tokens reached draw on the others
    stop_of = {site.name: expert_pool(site.name) or site.name for site in sites}
    members: dict[str, list[Site]] = {}
    for site in sites:
        members.setdefault(stop_of[site.name], []).append(site)
    walk = BlockWalk(model, sites, len(samples), keeper) if by_block else None
    stops = list(members) if walk is None else walk.with_stops(members)
    lockstep = _Lockstep({stop: index for index, stop in enumerate(stops)})
    recorder = _Recorder(points)
    decided: dict[str, SitePlan] = {}
    corrections: dict[str, torch.Tensor] = {}

    def make_hooks(site: Site, position: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        name = site.layers[position].name

        def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_argument(args, kwargs)
            if position == 0 and site.name not in decided:
                recorder.record(site.name, x)
                lockstep.wait_at(stop_of[site.name])
            if site.name not in decided:  # another layer reached the tensor first in this sample
                return None
            z = prune(x, decided[site.name].mode, decided[site.name].layers[position].threshold)
            return ((z, *args[1:]), kwargs) if args else (args, {next(iter(kwargs)): z})

        def post_hook(_module: nn.Module, _args: Any, output: torch.Tensor) -> Any:
            return output + corrections[name].to(output.dtype) if name in corrections else None

        return pre_hook, post_hook

    def run(index: int, sample: Any) -> None:
        with torch.no_grad():
            recorder.begin(f"sample {index}", attention_mask(sample))
            with suppress(Finished):
                forward_sample(model, without_cache(model, sample), f"sample {index}")

    handles = []
    stages: list[tuple[nn.Module, experts.Stage]] = []
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        try:
            if walk is not None:
                walk.resume()
                stack.enter_context(walk.attached(lockstep.current_job, lockstep.wait_at))
            for name in dict.fromkeys(fused[site.name].module_name for site in sites if site.name in fused):
                stages.append((model.get_submodule(name), _ExpertsInSequence(model, name, recorder, lockstep, decided)))
                experts.attach(*stages[-1])
            for site in sites:
                if site.name in fused:
                    continue
                for position, layer in enumerate(site.layers):
                    module = model.get_submodule(layer.name)
                    pre_hook, post_hook = make_hooks(site, position)
                    handles.append(module.register_forward_pre_hook(pre_hook, prepend=True, with_kwargs=True))
                    handles.append(module.register_forward_hook(post_hook))
            jobs = [lambda index=index, sample=sample: run(index, sample) for index, sample in enumerate(samples)]
            exchange = processes.exchange if processes.count > 1 else None
            order = lockstep.run(jobs, exchange)
            for stop in track(order, total=len(stops), description="Calibrating sites in sequence"):
                if stop not in members:
                    assert walk is not None
                    walk.enter(stop)
                    continue
                together = members[stop]
                histograms = {site.name: _histogram(recorder.collectors[site.name]) for site in together}
                histograms = shrink(together, merge_histograms(histograms, processes))
                for site in together:
                    if not histograms[site.name].total:  # a call without rows, or with padding alone
                        continue
                    plan = decide(site, histograms[site.name])
                    if plan.mode != 0.0 and site.name not in fused:
                        corrections.update({layer.name: correction(model, plan, layer) for layer in plan.layers})
                    decided[site.name] = plan
        finally:
            lockstep.stop()
            for module, stage in stages:
                experts.detach(module, stage)
            for handle in handles:
                handle.remove()
    return len(samples)


def collect_by_block(
    model: nn.Module,
    sites: Sequence[Site],
    points: StatisticPointsContainer,
    samples: Sequence[Any],
    keeper: Keeper | None = None,
) -> int:
    """
    As :func:`collect`, with the weights of one block in memory at a time: each is read once for all samples.

    :param keeper: keeps what a later process can go on from, between blocks.
    :return: number of samples.
    :raises nncf.ValidationError: as :func:`collect`.
    """
    if not samples:
        raise nncf.ValidationError(EMPTY_DATASET)
    with evaluation(model):
        samples = [with_decoder_inputs(model, sample, f"sample {index}") for index, sample in enumerate(samples)]
    walk = BlockWalk(model, sites, len(samples), keeper)
    lockstep = _Lockstep({name: index for index, name in enumerate(walk.names)})
    recorder = _Recorder(points)

    def run(index: int, sample: Any) -> None:
        with torch.no_grad(), suppress(Finished):
            recorder.begin(f"sample {index}", attention_mask(sample))
            forward_sample(model, without_cache(model, sample), f"sample {index}")

    start = walk.resume()
    jobs = [lambda index=index, sample=sample: run(index, sample) for index, sample in enumerate(samples)]
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(recorder.attached(model))
        stack.enter_context(walk.attached(lockstep.current_job, lockstep.wait_at))
        stack.callback(lockstep.stop)
        for name in track(lockstep.run(jobs), total=len(walk.names) - start, description="Calibrating block by block"):
            walk.enter(name)
    return len(samples)


class _ExpertsInSequence(experts.Stage):
    """Fused experts in sequential calibration: record, wait for the other samples, go on pruned."""

    def __init__(
        self, model: nn.Module, module_name: str, recorder: _Recorder, lockstep: _Lockstep, decided: dict[str, SitePlan]
    ) -> None:
        self._model, self._name = model, module_name
        self._recorder, self._lockstep, self._decided = recorder, lockstep, decided
        self._pruners: dict[str, ExpertsPruner] = {}
        self._layers = experts.layers_of(module_name, model.get_submodule(module_name))

    def before(self, projection: str, x: torch.Tensor, rows: experts.Rows) -> torch.Tensor:
        pool = f"{self._name}.*.{projection}"
        known = [layer for layer in self._layers if layer.projection == projection]
        undecided = not any(layer.name in self._decided for layer in known)
        if undecided and self._recorder.record_experts(self._name, projection, x, rows):
            self._lockstep.wait_at(pool)
        if projection not in self._pruners:
            planned = [layer for layer in known if layer.name in self._decided]
            found = [(layer, self._decided[layer.name], self._decided[layer.name].layers[0]) for layer in planned]
            self._pruners[projection] = ExpertsPruner.of_plan(self._model, self._name, found, decode_only=False)
        return self._pruners[projection].before(projection, x, rows)

    def after(self, projection: str, y: torch.Tensor, rows: experts.Rows) -> torch.Tensor:
        return self._pruners[projection].after(projection, y, rows)


def _histogram(collector: TensorCollector) -> ActivationHistogram:
    statistic = collector.get_statistics()
    assert isinstance(statistic, HistogramStatistic)
    return statistic.to_histogram()


class _Stopped(BaseException):
    """Unwinds a waiting thread after a failure elsewhere."""


class _Lockstep:
    """Runs jobs in threads, one at a time, that meet at named points."""

    def __init__(self, order: dict[str, int]) -> None:
        self._order = order
        self._lock = threading.Condition()
        self._waiting: dict[int, str] = {}  # job → point where it waits
        self._running: int | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._local = threading.local()

    def wait_at(self, point: str) -> None:
        """Called by a job: hand over to the next job until the point is released."""
        job = self._local.job
        with self._lock:
            self._waiting[job] = point
            self._running = None
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._running == job or self._stopping)
            if self._stopping:
                raise _Stopped
            del self._waiting[job]

    def current_job(self) -> int:
        """The job that calls."""
        return self._local.job

    def run(
        self, jobs: Sequence[Callable[[], None]], exchange: Callable[[Any], list[Any]] | None = None
    ) -> Iterator[str]:
        """
        Yields each point once all jobs that pass it wait there; going on releases them.

        :param exchange: tells other processes the next point of this one: all of them yield the first of all.
        """
        for job, work in enumerate(jobs):
            thread = threading.Thread(target=self._work, args=(job, work), daemon=True)
            self._threads.append(thread)
            with self._lock:
                self._running = job
                thread.start()
                self._lock.wait_for(lambda: self._running is None)
            self._raise()
        points = list(self._order)
        while True:
            position = min((self._order[place] for place in self._waiting.values()), default=len(points))
            if exchange is not None:
                position = min(exchange(position))
            if position == len(points):
                return
            point = points[position]
            yield point
            for job in [job for job, place in self._waiting.items() if place == point]:
                with self._lock:
                    self._running = job
                    self._lock.notify_all()
                    self._lock.wait_for(lambda: self._running is None)
                self._raise()

    def _work(self, job: int, work: Callable[[], None]) -> None:
        self._local.job = job
        error: BaseException | None = None
        try:
            work()
        except _Stopped:
            pass
        except BaseException as raised:  # handed to the main thread
            error = raised
        with self._lock:
            self._waiting.pop(job, None)
            if error is not None:
                self._error = error
            self._running = None
            self._lock.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End all threads, also after a failure."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()
