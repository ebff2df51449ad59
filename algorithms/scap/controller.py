# SPDX-License-Identifier: Apache-2.0
"""The controller of SCAP: what a user holds of a sparse model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nncf
from nncf.common.logging import nncf_logger

from scap_nncf.algorithms.allocation import allocate, choose
from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import CompressionController
from scap_nncf.algorithms.data import Samples
from scap_nncf.algorithms.plan import STATISTICS_FILE, Plan, sha256, sites_of, to_float32
from scap_nncf.algorithms.refine import Refine, RefineReport
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.config import check_mode_method
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.report import ScapStatistics, make_statistics
from scap_nncf.algorithms.scap.site_plan import plan_site
from scap_nncf.algorithms.scap.statistics import make_collector
from scap_nncf.algorithms.sparsity import SparsitySpec, resolve


class ScapController(CompressionController):
    """
    :param model: the sparse model.
    :param plan: what was inserted.
    :param calibration: the statistics behind the plan, or None where it came without.
    """

    def __init__(self, model: Any, plan: Plan, calibration: CalibrationStatistics | None = None) -> None:
        self._model = model
        self.plan = plan
        self.calibration = calibration
        self._stripped = False

    def __repr__(self) -> str:
        plan = self.plan
        return f"ScapController({len(plan.sites)} sites, {len(plan.layers)} layers, prune={plan.prune!r})"

    @property
    def model(self) -> Any:
        """The sparse model."""
        return self._model

    @property
    def histograms(self) -> Mapping[str, ActivationHistogram]:
        """Site name → activation histogram; empty where the plan came without statistics."""
        return self.calibration.histograms if self.calibration is not None else {}

    def statistics(self) -> ScapStatistics:
        """Targets, modes, thresholds and the realised sparsity since the counters were reset."""
        calibration = self.calibration
        tokens = {} if calibration is None else {site.name: calibration.tokens_at(site) for site in calibration.sites}
        return make_statistics(self.plan, backend_of(self._model).counts(self._model), tokens)

    def reset_counters(self) -> None:
        """Start counting the realised sparsity anew."""
        self._check_not_stripped()
        backend_of(self._model).reset_counts(self._model)

    def enable(self) -> None:
        """Prune again after :meth:`disable`."""
        self._check_not_stripped()
        backend_of(self._model).set_enabled(self._model, True)

    def disable(self) -> None:
        """Run dense until :meth:`enable`; nothing is counted meanwhile."""
        self._check_not_stripped()
        backend_of(self._model).set_enabled(self._model, False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run dense inside the context."""
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def set_sparsity(
        self,
        sparsity: SparsitySpec,
        mode: str | None = None,
        prune: str | None = None,
        allocation: str | None = None,
    ) -> Plan:
        """
        Change the targets from the calibration statistics, without new data.

        :param sparsity: as in :class:`scap_nncf.Scap`.
        :param mode: how modes are found; None keeps each site's method.
        :param prune: token policy; None keeps it.
        :param allocation: how the sparsity is spread over layers; None keeps the plan's.
        :return: the new plan.
        :raises nncf.ValidationError: there are no statistics, or the specification does not fit.
        """
        return self._change(self.plan_for(sparsity, mode, prune, allocation))

    def plan_for(
        self,
        sparsity: SparsitySpec,
        mode: str | None = None,
        prune: str | None = None,
        allocation: str | None = None,
    ) -> Plan:
        """The plan that :meth:`set_sparsity` would put in the place of the present one; nothing changes."""
        if self.calibration is None:
            msg = (
                "This plan came without calibration statistics, so its thresholds cannot be recomputed; calibrate with "
                "dataset=, or load a folder that has statistics.safetensors."
            )
            raise nncf.ValidationError(msg)
        if any(not layer.is_folded for layer in self.plan.layers):
            msg = (
                "The error mitigation of this plan was made for its thresholds; take it out with .strip() and compress "
                "anew with the other sparsity."
            )
            raise nncf.ValidationError(msg)
        settings = dict(self.plan.made_by.get("settings") or {})
        settings["allocation"] = allocation or settings.get("allocation", "uniform")
        sites, costs = self.calibration.sites, self.calibration.costs
        targets = resolve(sparsity, sites)
        method = choose(settings["allocation"], sparsity, sites, costs)
        targets = allocate(method, targets, sites, costs, self.calibration.paths)
        if mode is not None:
            check_mode_method(mode)
        methods = {site.name: site.mode_method for site in self.plan.sites}
        histograms = self.calibration.planning_histograms()
        plans = (
            plan_site(site, histograms[site.name], targets, mode or _again(methods.get(site.name)))
            for site in self.calibration.sites
        )
        site_plans = tuple(site_plan for site_plan in plans if site_plan is not None)
        settings["sparsity"] = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        settings["prune"] = prune or self.plan.prune
        made_by = {**self.plan.made_by, "settings": settings, "allocation": method}
        names = {layer.name for site in site_plans for layer in site.layers}
        biases = {key: vector for key, vector in self.plan.vectors.items() if key[0] in names}
        plan = replace(self.plan, sites=site_plans, made_by=made_by, vectors={}).with_prune(prune or self.plan.prune)
        return plan.with_vectors(biases)  # trained at one sparsity, vectors help at others

    def note(self, **entries: Any) -> None:
        """Add to the plan's record of how it was made."""
        self.plan = replace(self.plan, made_by={**self.plan.made_by, **entries})
        note_plan = getattr(backend_of(self._model), "note_plan", None)
        if note_plan is not None:  # an OpenVINO model carries its plan
            note_plan(self._model, self.plan)

    def set_prune(self, prune: str) -> Plan:
        """
        Change the token policy, ``all`` or ``decode``.

        :return: the new plan.
        :raises nncf.ValidationError: no such policy.
        """
        settings = {**(self.plan.made_by.get("settings") or {}), "prune": prune}
        return self._change(replace(self.plan.with_prune(prune), made_by={**self.plan.made_by, "settings": settings}))

    def match_realised(self, dataset: Any, tokenizer: Any = None, subset_size: int | None = 16) -> Plan:
        """
        Set every threshold anew so that the realised sparsity is the target on this data, with all pruning active.

        Thresholds are quantiles of what the dense model computed on the calibration data. Pruning of earlier layers
        and text of another kind move the activations; a pass over text like that in use puts it right. Where a plan is
        refined this has been done already, on the data it was refined with.

        :param dataset: as for calibration; a few thousand tokens suffice.
        :param subset_size: at most this many samples are used; None uses all.
        :return: the new plan; targets and modes stay.
        """
        return self._match_realised(list(Samples(dataset, tokenizer, subset_size)))

    def _match_realised(self, samples: Sequence[Any]) -> Plan:
        backend = backend_of(self._model)
        points = backend.statistic_points(sites_of(self.plan), make_collector)
        with self._pruning_all_tokens():
            backend.collect(self._model, points, samples, len(samples))
        histograms = backend.histograms_of(points)
        sites = tuple(
            replace(
                site,
                layers=tuple(
                    layer
                    if layer.threshold < 0
                    else replace(layer, threshold=to_float32(histograms[site.name].quantile(layer.sparsity, site.mode)))
                    for layer in site.layers
                ),
            )
            for site in self.plan.sites
        )
        made_by = {**self.plan.made_by, "thresholds_matched": {"samples": len(samples)}}
        return self._change(replace(self.plan, sites=sites, made_by=made_by))

    @contextmanager
    def _pruning_all_tokens(self) -> Iterator[None]:
        """Samples are prompts: under the policy ``decode`` nothing of them would be pruned."""
        plan = self.plan
        if plan.prune == "all":
            yield
            return
        self._change(plan.with_prune("all"))
        try:
            yield
        finally:
            self._change(plan)

    def refine(self, dataset: Any, tokenizer: Any = None, settings: Refine | None = None) -> RefineReport:
        """
        Train one static vector for the output of each pruned layer against the dense model, then match the thresholds
        to the realised sparsity (:mod:`scap_nncf.algorithms.refine`). The vectors are part of the plan, are folded into
        biases by ``deploy`` and in OpenVINO, and stay when the sparsity is changed.

        :param dataset: as for calibration; with the defaults 50 steps of 1024 tokens are taken from it.
        :return: how the training went; ``str()`` is a line.
        :raises nncf.ValidationError: fewer than two samples.
        :raises nncf.UnsupportedModelError: the model is no language model with gradients.
        :raises nncf.ParameterNotSupportedError: the model is an OpenVINO model.
        """
        settings = settings or Refine()
        samples = list(Samples(dataset, tokenizer))
        biases, report = backend_of(self._model).train_biases(self._model, samples, settings)
        nncf_logger.info(f"Refine: {report}")

        held = self.plan.vectors
        vectors = {(name, "bias"): held.get((name, "bias"), 0.0) + values for name, values in biases.items()}
        record = {"settings": asdict(settings), **asdict(report), "losses": list(report.losses.items())}
        made_by = {**self.plan.made_by, "refined": record}
        self._change(replace(self.plan, made_by=made_by).with_vectors(vectors))
        self._match_realised(samples[:16])
        self.reset_counters()
        return report

    def _change(self, plan: Plan) -> Plan:
        """Prune by another plan; by the old one still, if that fails."""
        self._check_not_stripped()
        backend = backend_of(self._model)
        backend.remove(self._model)
        try:
            backend.insert(self._model, plan)
        except BaseException:
            backend.insert(self._model, self.plan)
            raise
        self.plan = plan
        return plan

    def _check_not_stripped(self) -> None:
        if self._stripped:
            msg = "The pruning was stripped; put it back with nncf.compress(model, plan=controller.plan)."
            raise nncf.ValidationError(msg)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """
        Write the plan (``plan.json``) and, where there are any, the statistics (``statistics.safetensors``).

        :return: the folder.
        :raises nncf.ValidationError: the folder cannot be written.
        """
        target = Path(folder)
        plan = replace(self.plan, statistics=None)
        beside: dict[str, bytes] = {}
        if self.calibration is not None:
            content = self.calibration.to_bytes()
            plan = replace(plan, statistics={"file": STATISTICS_FILE, "sha256": sha256(content)})
            beside[STATISTICS_FILE] = content
        plan.save(target, beside)
        return target

    def strip(self) -> Any:
        """Take all pruning out; returns the model as it was before compression. The controller keeps its plan only."""
        if not self._stripped:
            backend = backend_of(self._model)
            backend.remove(self._model)
            backend.store_controller(self._model, None)
            self._stripped = True
        return self._model


def _again(method: str | None) -> str:
    """The method to find a site's mode again; an imported mode has none, so the choice is automatic."""
    return method if method in ("zero", "mean", "median", "kde") else "auto"


def get_controller(model: Any) -> ScapController | None:
    """The controller of a sparse model, or None where the model has no activation sparsity."""
    return backend_of(model).stored_controller(model)
