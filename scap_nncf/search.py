# SPDX-License-Identifier: Apache-2.0
"""
Search on true loss: from the calibrated prices to a better plan, with Optuna.

The prices of sparsity (allocation ``fisher``) say which layers can spare their inputs. The search scales them, by role
and along the depth, fills the same budget with the scaled prices, and measures the loss of each plan. It starts from
the prices as they are, so it never returns anything worse than they give on the text it searches on.

A budget of loss is first met with the prices alone (:func:`scap_nncf.budget.most_sparsity`); the trials then look for
less loss at that sparsity, and what they win is turned into sparsity again.

Trials live in an Optuna storage: an sqlite file, a journal file, or a database server for many machines. A search that
was ended is taken up by running it again; at most the trial that ran is lost. Several workers share one storage.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from nncf.common.logging import nncf_logger

from scap_nncf.algorithms.allocation.fisher import Costs
from scap_nncf.algorithms.budget import Budget, KernelTable, Traffic, byte_sparsity, most_sparsity
from scap_nncf.algorithms.plan import Plan, block_index, write_atomically
from scap_nncf.algorithms.scap.builder import make_plan
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.config import Scap
from scap_nncf.budget import BROKEN, least_for_limit
from scap_nncf.extras import require

SAMPLERS = ("tpe", "nsga2", "grid")
SEARCH_FILE = "search.json"
PLANS = "plans"
SCHEMA, _SCHEMA_VERSION = "scap-nncf.search", 1
LOSS_IS = "rise"  # what the loss of a trial is: the relative rise of the metric over that of the dense model
_RANGE = 2.0  # of the base-2 logarithm of a factor of the prices
_POLL = 1.0  # seconds
_SPREAD = 0.15  # of the sparsity, where the search is for a front of loss and sparsity
_GRID = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Search:
    """
    Settings of a search.

    :param trials: plans to try beyond those that meet the budget with the prices alone; 0 for none.
    :param sampler: ``tpe``; ``nsga2``, which looks for the front of loss and sparsity instead; ``grid`` over one factor
        for attention, one for the first and one for the second half of the feed-forward.
    :param patience: stop after so many trials without a better one; None never.
    :param seconds: begin no trial later than this; None for no limit.
    :param storage: ``sqlite:///FILE``, ``journal:FILE`` or another URL that Optuna takes; None keeps trials in memory.
    :param name: of the study in the storage.
    :param leader: False joins a search that another process leads: it takes part in the trials and returns.
    :param seed: of the sampler.
    """

    trials: int = 0
    sampler: str = "tpe"
    patience: int | None = None
    seconds: float | None = None
    storage: str | None = None
    name: str = "scap"
    leader: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            msg = f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}."
            raise nncf.ValidationError(msg)
        for name in ("trials", "patience", "seconds"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value >= 0):
                msg = f"Search: {name} must be a number from 0, got {value!r}."
                raise nncf.ValidationError(msg)


@dataclass
class TrialRecord:
    """
    One measured plan.

    :param method: ``fisher`` for the prices as they are, else the sampler.
    :param byte_sparsity: mean sparsity over all weights of the calibrated layers, from the targets.
    :param loss: relative rise of the metric.
    :param plan: folder of the plan, where it was kept.
    """

    number: int
    method: str
    label: str
    byte_sparsity: float
    loss: float
    plan: str | None
    seconds: float


@dataclass
class SearchResult:
    """What a search found; :meth:`save` writes ``search.json``."""

    about: dict[str, Any]
    metric: str
    dense: float
    trials: list[TrialRecord] = field(default_factory=list)
    best: int | None = None
    held_out: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = field(default=None, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``search.json`` into a folder, atomically."""
        data = {"schema": SCHEMA, "schema_version": _SCHEMA_VERSION, "about": self.about, "metric": self.metric}
        data |= {"dense": self.dense, "trials": [asdict(trial) for trial in self.trials]}
        data |= {"best": self.best, "held_out": self.held_out, "loss_is": LOSS_IS}
        return write_atomically(
            Path(folder) / SEARCH_FILE, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
        )


def search_plan(
    calibration: CalibrationStatistics,
    config: Scap,
    budget: Budget,
    measure: Callable[[Plan | None], float],
    settings: Search,
    *,
    sparsity_for: Callable[[Callable[[float], Plan]], float] | None = None,
    fingerprint: str = "",
    about: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> SearchResult:
    """
    The best plan for a budget.

    :param calibration: statistics with prices.
    :param config: mode and token policy of the plans.
    :param measure: the metric of a plan, and of the dense model for None.
    :param sparsity_for: for budgets of bytes and speed: from "plan at a sparsity" to the least sparsity that suffices.
    :param fingerprint: of the model and the text, beside that of the statistics: a study of others is refused.
    :param about: settings for the record.
    :param folder: gets ``search.json``, after each trial, and the plans of the best trials.
    :param progress: called with trials done, trials in all, and a line.
    :raises nncf.ValidationError: no prices, or the study in the storage is of another model, text or budget.
    :raises BudgetError: the budget cannot be met.
    """
    if calibration.costs is None:
        msg = "A search starts from prices of sparsity; calibrate with allocation='fisher'."
        raise nncf.ValidationError(msg)
    search = _Run(calibration, config, budget, measure, settings, folder, progress)
    key = sha256(calibration.to_bytes() + fingerprint.encode() + repr((budget, settings.sampler)).encode()).hexdigest()
    search.open(key)
    search.result.about = dict(about or {})
    if settings.leader:
        search.lead(sparsity_for)
    else:
        search.follow()
    return search.finish()


class _Run:
    def __init__(
        self,
        calibration: CalibrationStatistics,
        config: Scap,
        budget: Budget,
        measure: Callable[[Plan | None], float],
        settings: Search,
        folder: str | os.PathLike[str] | None,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.calibration, self.config, self.budget, self.settings = calibration, config, budget, settings
        self._measure = measure
        self._folder = None if folder is None else Path(folder)
        self._progress = progress or (lambda done, total, line: None)
        self._optuna: Any = require("optuna", "search", "searching")
        self._started = time.monotonic()
        self.layers = [layer for site in calibration.sites for layer in site.layers]
        blocks = {layer.name: block_index(layer.name) or 0 for layer in self.layers}
        last = max(blocks.values()) or 1
        self._depth = {name: 2 * block / last - 1 for name, block in blocks.items()}  # -1 .. 1
        self.dimensions = self._dimensions()
        self.result = SearchResult({}, budget.metric, math.nan)

    def _dimensions(self) -> dict[str, list[str]]:
        """Parameter → roles that it scales; ``depth`` and ``bend`` scale all."""
        roles = list(dict.fromkeys(layer.role for layer in self.layers))
        if self.settings.sampler == "grid":  # as the paper: one setting for each kind of projection
            attention = [role for role in roles if role in ("q", "k", "v", "o", "qkv")]
            second = [role for role in roles if role in ("down", "fc2")]
            first = [role for role in roles if role not in attention and role not in second]
            return {name: x for name, x in (("attn", attention), ("up", first), ("down", second)) if x}
        return {**{role: [role] for role in roles}, "depth": roles, "bend": roles}

    # -- the study -----------------------------------------------------------------------------------------------

    def open(self, key: str) -> None:
        """Create or load the study."""
        optuna, settings = self._optuna, self.settings
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=None if not settings.leader else settings.seed),
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=None if not settings.leader else settings.seed),
            "grid": lambda: optuna.samplers.RandomSampler(seed=settings.seed),  # each point is asked for
        }[settings.sampler]()
        directions = ["minimize", "maximize"] if settings.sampler == "nsga2" else ["minimize"]
        storage = self._storage()
        try:
            self.study = optuna.create_study(
                storage=storage, study_name=settings.name, sampler=sampler, directions=directions, load_if_exists=True
            )
            found = self.study.user_attrs.get("key")
            if found is None:
                self.study.set_user_attr("key", key)
            elif found != key:
                msg = (
                    f"The study {settings.name!r} in {settings.storage} was made for another model, calibration, text "
                    "or budget. Choose another output folder, storage or name."
                )
                raise nncf.ValidationError(msg)
        except nncf.ValidationError:
            raise
        except Exception as error:  # what a storage may raise depends on the database
            msg = f"The storage {settings.storage} cannot be used: {type(error).__name__}: {error}"
            raise nncf.ValidationError(msg) from error

    def _storage(self) -> Any:
        url = self.settings.storage
        if url is None or not url.startswith("journal:"):
            return url
        journal = self._optuna.storages.journal
        return self._optuna.storages.JournalStorage(journal.JournalFileBackend(url.removeprefix("journal:")))

    def completed(self) -> list[Any]:
        """Finished trials of all workers, in the order of their numbers."""
        states = (self._optuna.trial.TrialState.COMPLETE,)
        trials: list[Any] = self.study.get_trials(deepcopy=False, states=states)
        return sorted(trials, key=lambda trial: trial.number)

    def _attr(self, name: str) -> Any:
        return self.study.user_attrs.get(name)

    # -- plans ---------------------------------------------------------------------------------------------------

    def plan(self, sparsity: float, factors: Mapping[str, float]) -> Plan:
        """The plan that fills a sparsity with scaled prices."""
        costs = self.calibration.costs
        assert costs is not None
        scale = {}
        for layer in self.layers:
            power = sum(factors.get(name, 0.0) for name, roles in self.dimensions.items() if name == layer.role)
            power += sum(
                factors.get(name, 0.0)
                for name, roles in self.dimensions.items()
                if name != layer.role and name not in ("depth", "bend") and layer.role in roles
            )
            depth = self._depth[layer.name]
            power += factors.get("depth", 0.0) * depth + factors.get("bend", 0.0) * (2 * depth * depth - 1)
            scale[layer.name] = 2.0**power
        scaled = Costs({name: np.asarray(sums * scale[name]) for name, sums in costs.sums.items()}, costs.tokens)
        statistics = CalibrationStatistics(
            self.calibration.sites, self.calibration.histograms, self.calibration.samples, scaled
        )
        return make_plan(
            statistics, Scap(sparsity, mode=self.config.mode, prune=self.config.prune, allocation="fisher")
        )

    def evaluate(self, trial: Any, sparsity: float, factors: Mapping[str, float], method: str) -> float:
        """Measure a plan and store it with its trial; the relative loss."""
        start = time.perf_counter()
        plan = self.plan(sparsity, factors)
        rise = self._measure(plan) / self.result.dense - 1
        rise = BROKEN if math.isnan(rise) else min(rise, BROKEN)
        share = byte_sparsity(plan, self.calibration.sites)
        label = ", ".join([f"{share:.3f}", *(f"{k} {v:+.2f}" for k, v in factors.items() if v)])
        for name, value in (
            ("method", method),
            ("label", label),
            ("byte_sparsity", share),
            ("sparsity", sparsity),
            ("loss", rise),
            ("factors", dict(factors)),
            ("seconds", time.perf_counter() - start),
        ):
            trial.set_user_attr(name, value)
        return rise

    def point(self, sparsity: float, factors: Mapping[str, float], method: str) -> float:
        """The loss of one given plan, from the storage where it was measured before."""
        for trial in self.completed():
            known = trial.user_attrs
            same = known.get("method") == method and known.get("factors") == dict(factors)
            if same and abs(known["sparsity"] - sparsity) < 1e-9:
                return float(known["loss"])
        trial = self.study.ask(fixed_distributions={})
        loss = self.evaluate(trial, sparsity, factors, method)
        values = [loss, sparsity] if self.settings.sampler == "nsga2" else loss
        self.study.tell(trial, values)
        self.note(f"sparsity {sparsity:.3f}: {100 * loss:+.2f} %")
        return loss

    # -- the search ----------------------------------------------------------------------------------------------

    def dense(self) -> None:
        value = self._attr("dense")
        if value is None:
            value = self._measure(None)
            self.study.set_user_attr("dense", value)
        self.result.dense = float(value)

    def lead(self, sparsity_for: Callable[[Callable[[float], Plan]], float] | None) -> None:
        """Meet the budget with the prices alone, try others, turn what was won into sparsity."""
        self.dense()
        if self._attr("sparsity") is None:
            self.study.set_user_attr("sparsity", self._meet({}, sparsity_for, "fisher"))
        sparsity = float(self._attr("sparsity"))
        self.point(sparsity, {}, "fisher")
        if self.settings.trials == 0 or sparsity == 0.0:
            self.study.set_user_attr("over", True)
            return
        self.work(sparsity)
        self.study.set_user_attr("over", True)
        if self.budget.max_loss is None or self.settings.sampler == "nsga2":
            return
        tried = [trial for trial in self.completed() if abs(trial.user_attrs["sparsity"] - sparsity) < 1e-9]
        best = min(tried, key=lambda trial: trial.user_attrs["loss"])
        if best.user_attrs["factors"]:
            self._meet(best.user_attrs["factors"], None, f"{self.settings.sampler} again", start=sparsity)

    def _meet(self, factors: Mapping[str, float], sparsity_for: Any, method: str, start: float = 0.3) -> float:
        budget = self.budget
        if budget.max_loss is not None:
            measure = lambda s: self.point(s, factors, method)  # noqa: E731
            return most_sparsity(measure, float(budget.max_loss), budget.tolerance, start)[0]
        assert sparsity_for is not None
        return sparsity_for(lambda s: self.plan(s, factors))

    def follow(self) -> None:
        """Take part in the trials of a search that another process leads."""
        self.dense()
        while self._attr("sparsity") is None and not self._attr("over") and not self._late():
            time.sleep(_POLL)
        if self._attr("sparsity") is not None and not self._attr("over"):
            self.work(float(self._attr("sparsity")))

    def _late(self) -> bool:
        limit = self.settings.seconds
        return limit is not None and time.monotonic() - self._started > limit

    def tried(self) -> list[Any]:
        return [trial for trial in self.completed() if trial.user_attrs.get("method") == self.settings.sampler]

    def work(self, sparsity: float) -> None:
        """Trials, until there are enough, none is better for long, or time is up."""
        optuna, settings = self._optuna, self.settings
        total = (
            min(settings.trials, len(_GRID) ** len(self.dimensions)) if settings.sampler == "grid" else settings.trials
        )
        while len(self.tried()) < total and not self._late() and not self._stale():
            if settings.sampler == "grid":
                point = self._next_point()
                if point is None:
                    return
                self.study.enqueue_trial(point)
                choice = optuna.distributions.CategoricalDistribution(_GRID)
                trial = self.study.ask(dict.fromkeys(self.dimensions, choice))
            else:
                span = optuna.distributions.FloatDistribution(-_RANGE, _RANGE)
                asked = dict.fromkeys(self.dimensions, span)
                if settings.sampler == "nsga2":
                    low, high = max(sparsity - _SPREAD, 0.02), min(sparsity + _SPREAD, 0.9)
                    asked["sparsity"] = optuna.distributions.FloatDistribution(low, high)
                trial = self.study.ask(asked)
            factors = {name: float(trial.params[name]) for name in self.dimensions}
            at = float(trial.params.get("sparsity", sparsity))
            loss = self.evaluate(trial, at, factors, settings.sampler)
            self.study.tell(trial, [loss, at] if settings.sampler == "nsga2" else loss)
            self.note(f"trial {trial.number}: {100 * loss:+.2f} % at {at:.3f}", len(self.tried()), total)

    def _next_point(self) -> dict[str, float] | None:
        """A point of the grid that no worker has taken; a trial that never ended is taken again."""
        states = self._optuna.trial.TrialState
        known = self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.WAITING))
        taken = [trial.params or trial.system_attrs.get("fixed_params") for trial in known]
        points = (
            dict(zip(self.dimensions, values)) for values in itertools.product(_GRID, repeat=len(self.dimensions))
        )
        return next((point for point in points if point not in taken), None)

    def _stale(self) -> bool:
        patience = self.settings.patience
        if patience is None:
            return False
        losses = [trial.user_attrs["loss"] for trial in self.tried()]
        if self.settings.sampler == "nsga2" or len(losses) <= patience:
            return False
        return min(losses[-patience:]) >= min(losses[:-patience])

    # -- results -------------------------------------------------------------------------------------------------

    def note(self, line: str, done: int = 0, total: int = 0) -> None:
        """Write what there is, and show it."""
        nncf_logger.debug(f"Search: {line}")
        self.collect()
        if self._folder is not None and self.settings.leader:
            self.result.save(self._folder)
        self._progress(done, total, line)

    def collect(self) -> None:
        """Trials of all workers, and which is best."""
        kept = {trial.number: trial.plan for trial in self.result.trials}
        trials = self.completed()
        self.result.trials = [
            TrialRecord(
                trial.number,
                trial.user_attrs["method"],
                trial.user_attrs["label"],
                trial.user_attrs["byte_sparsity"],
                trial.user_attrs["loss"],
                kept.get(trial.number),
                trial.user_attrs["seconds"],
            )
            for trial in trials
        ]
        self.result.best = self._best(trials)

    def _best(self, trials: Sequence[Any]) -> int | None:
        if self.budget.max_loss is not None:
            good = [trial for trial in trials if trial.user_attrs["loss"] <= float(self.budget.max_loss)]
            best = max(good, key=lambda t: (t.user_attrs["byte_sparsity"], -t.user_attrs["loss"]), default=None)
        else:
            needed = float(self._attr("sparsity") or 0.0)
            good = [trial for trial in trials if trial.user_attrs["sparsity"] >= needed - 1e-6]
            best = min(good, key=lambda t: t.user_attrs["loss"], default=None)
        return None if best is None else int(best.number)

    def finish(self) -> SearchResult:
        """The best plan, kept with the record."""
        self.collect()
        trials = {trial.number: trial for trial in self.completed()}
        best = None if self.result.best is None else trials[self.result.best].user_attrs
        self.result.plan = self.plan(best["sparsity"], best["factors"]) if best is not None else self.plan(0.0, {})
        if self._folder is not None and self.settings.leader:
            for record in self.result.trials:
                if record.number == self.result.best or record.method == "fisher":
                    known = trials[record.number].user_attrs
                    target = self._folder / PLANS / str(record.number)
                    self.plan(known["sparsity"], known["factors"]).save(target)
                    record.plan = f"{PLANS}/{record.number}"
            self.result.save(self._folder)
        return self.result


def least_for(budget: Budget, traffic: Traffic, table: KernelTable) -> Callable[[Callable[[float], Plan]], float]:
    """
    For :func:`search_plan`: the least sparsity that a budget of bytes or speed asks for.

    The function that is returned raises :class:`scap_nncf.BudgetError`, with what can be reached, where none suffices.
    """

    def sparsity(plan_at: Callable[[float], Plan]) -> float:
        return least_for_limit(budget, traffic, table, plan_at)

    return sparsity
