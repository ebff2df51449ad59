# SPDX-License-Identifier: Apache-2.0
"""The controller of SCAP: what a user holds of a sparse model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from scap_nncf.algorithms.backends import backend_of
from scap_nncf.algorithms.base import CompressionController
from scap_nncf.algorithms.plan import Plan, sha256, sites_of, write_atomically
from scap_nncf.algorithms.scap.allocate import plan_sites
from scap_nncf.algorithms.scap.config import check_mode_method
from scap_nncf.algorithms.scap.histogram import NUM_BUCKETS, ActivationHistogram
from scap_nncf.algorithms.scap.report import ScapStatistics, make_statistics
from scap_nncf.algorithms.sites import Site
from scap_nncf.algorithms.sparsity import SparsitySpec, resolve

STATISTICS_FILE = "statistics.safetensors"


class ScapController(CompressionController):
    """
    :param model: the sparse model.
    :param plan: what was inserted.
    :param sites: all sites that were calibrated; a later sparsity may name other layers than the first.
    :param histograms: calibration statistic of each site; empty where the plan came without.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        sites: tuple[Site, ...] | None = None,
        histograms: Mapping[str, ActivationHistogram] | None = None,
    ) -> None:
        self._model = model
        self.plan = plan
        self.sites = sites if sites is not None else sites_of(plan)
        self.histograms = dict(histograms or {})

    def __repr__(self) -> str:
        return f"ScapController({len(self.plan.sites)} sites, {len(self.plan.layers)} layers, prune={self.plan.prune!r})"

    @property
    def model(self) -> Any:
        """The sparse model."""
        return self._model

    def statistics(self) -> ScapStatistics:
        """Targets, modes, thresholds and the realised sparsity since the counters were reset."""
        return make_statistics(self.plan, backend_of(self._model).counts(self._model))

    def reset_counters(self) -> None:
        """Start counting the realised sparsity anew."""
        backend_of(self._model).reset_counts(self._model)

    def enable(self) -> None:
        """Prune again after :meth:`disable`."""
        backend_of(self._model).set_enabled(self._model, True)

    def disable(self) -> None:
        """Run dense until :meth:`enable`; nothing is counted meanwhile."""
        backend_of(self._model).set_enabled(self._model, False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run dense inside the context."""
        self.disable()
        try:
            yield
        finally:
            self.enable()

    def set_sparsity(self, sparsity: SparsitySpec, mode: str | None = None, prune: str | None = None) -> Plan:
        """
        Change the targets from the calibration statistics, without new data.

        :param sparsity: as in :class:`scap_nncf.Scap`.
        :param mode: how modes are found; None keeps each site's method.
        :param prune: token policy; None keeps it.
        :return: the new plan.
        :raises nncf.ValidationError: there are no statistics, or the specification does not fit.
        """
        if not self.histograms:
            msg = (
                "This plan came without calibration statistics, so its thresholds cannot be recomputed; calibrate with "
                "dataset=, or load a folder that has statistics.safetensors."
            )
            raise nncf.ValidationError(msg)
        targets = resolve(sparsity, self.sites)
        if mode is not None:
            sites = plan_sites(self.sites, self.histograms, targets, check_mode_method(mode))
        else:
            methods = {site.name: site.mode_method for site in self.plan.sites}
            sites = tuple(
                plan
                for site in self.sites
                for plan in plan_sites([site], self.histograms, targets, _again(methods.get(site.name)))
            )
        plan = replace(self.plan, sites=sites, prune=self.plan.prune if prune is None else prune)
        plan = plan.with_prune(plan.prune)
        backend = backend_of(self._model)
        backend.remove(self._model)
        try:
            backend.insert(self._model, plan)
        except BaseException:
            backend.insert(self._model, self.plan)
            raise
        self.plan = plan
        return plan

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """
        Write the plan (``plan.json``) and, where there are any, the statistics (``statistics.safetensors``).

        :return: the folder.
        :raises nncf.ValidationError: the folder cannot be written.
        """
        target = Path(folder)
        plan = replace(self.plan, statistics=None)
        if self.histograms:
            content = dump_statistics(self.sites, self.histograms)
            write_atomically(target / STATISTICS_FILE, content)
            plan = replace(plan, statistics={"file": STATISTICS_FILE, "sha256": sha256(content)})
        plan.save(target)
        return target

    def strip(self) -> Any:
        """Take all pruning out; returns the model as it was before compression."""
        backend = backend_of(self._model)
        backend.remove(self._model)
        backend.store_controller(self._model, None)
        return self._model


def _again(method: str | None) -> str:
    """The method to find a site's mode again; an imported mode has none, so the choice is automatic."""
    return method if method in ("zero", "mean", "median", "kde") else "auto"


def get_controller(model: Any) -> ScapController | None:
    """The controller of a sparse model, or None where the model has no activation sparsity."""
    return backend_of(model).stored_controller(model)


# -- statistics on disk ------------------------------------------------------------------------------------------------


def dump_statistics(sites: tuple[Site, ...], histograms: Mapping[str, ActivationHistogram]) -> bytes:
    """
    Histograms as safetensors: of each site the occupied bucket numbers (uint16) and their counts (int64). The sites go
    into the metadata, as JSON.
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, histogram in histograms.items():
        occupied = np.flatnonzero(histogram.counts)
        tensors[f"{name}:buckets"] = occupied.astype(np.uint16)
        tensors[f"{name}:counts"] = histogram.counts[occupied]
    described = [
        {
            "name": site.name,
            "block": site.block,
            "layers": [[layer.name, layer.role, layer.in_features, layer.out_features] for layer in site.layers],
            "exact": site.name in histograms and histograms[site.name].exact,
        }
        for site in sites
    ]
    return save_tensors(tensors, metadata={"format": "scap-nncf.statistics.1", "sites": json.dumps(described)})


def load_statistics(
    folder: str | os.PathLike[str], plan: Plan
) -> tuple[tuple[Site, ...], dict[str, ActivationHistogram]]:
    """
    The calibrated sites and their histograms that belong to a plan in a folder; empty where the plan has none.

    :raises nncf.ValidationError: the file is missing, damaged, or belongs to another plan.
    """
    if not plan.statistics:
        return (), {}
    # the file's name is ours whatever the plan says: no path from a plan is followed
    path = Path(folder) / STATISTICS_FILE
    if not path.is_file():
        msg = f"The plan refers to statistics, but {path} is missing. Copy the whole folder, or calibrate again."
        raise nncf.ValidationError(msg)
    content = path.read_bytes()
    if sha256(content) != plan.statistics.get("sha256"):
        msg = f"{path} is damaged or belongs to another plan: its checksum differs from the plan's."
        raise nncf.ValidationError(msg)
    return parse_statistics(content, str(path))


def parse_statistics(content: bytes, source: str) -> tuple[tuple[Site, ...], dict[str, ActivationHistogram]]:
    """
    Inverse of :func:`dump_statistics`.

    :raises nncf.ValidationError: the content is damaged.
    """
    from scap_nncf.algorithms.sites import Layer

    try:
        tensors = load_tensors(content)
        header_size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
        described = json.loads(metadata["sites"])
        sites, histograms = [], {}
        for item in described:
            layers = tuple(Layer(str(n), str(r), int(i), int(o)) for n, r, i, o in item["layers"])
            sites.append(Site(str(item["name"]), item["block"], layers))
            if f"{item['name']}:buckets" in tensors:
                counts = np.zeros(NUM_BUCKETS, dtype=np.int64)
                counts[tensors[f"{item['name']}:buckets"]] = tensors[f"{item['name']}:counts"]
                histograms[str(item["name"])] = ActivationHistogram(counts, bool(item["exact"]))
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        msg = f"{source} is not a statistics file of scap-nncf: {error!r}."
        raise nncf.ValidationError(msg) from error
    return tuple(sites), histograms
