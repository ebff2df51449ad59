# SPDX-License-Identifier: Apache-2.0
"""
What a calibration pass leaves behind: the sites and their histograms, mergeable and on disk.

Statistics from several processes or machines merge into those of all data, bit for bit, and any number of plans follows
from them without the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nncf
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from scap_nncf.algorithms.allocation.fisher import Costs
from scap_nncf.algorithms.allocation.greedy import LEVELS as GREEDY_LEVELS
from scap_nncf.algorithms.documents import parse_json
from scap_nncf.algorithms.plan import STATISTICS_FILE, Plan, read_companion, write_atomically
from scap_nncf.algorithms.scap.histogram import NUM_BUCKETS, ActivationHistogram
from scap_nncf.algorithms.scap.pooling import shrink
from scap_nncf.algorithms.sites import Layer, Site

_FORMAT = "scap-nncf.statistics.1"
_MAX_BYTES = 8 << 30
_MAX_SITES = 1 << 15  # histograms are 512 KiB each: 16 GiB; a mixture with 256 experts in 60 blocks has half of that
_MAX_COUNT = 1 << 46  # of one bucket: all 65,536 of them still add up in int64


@dataclass(frozen=True)
class CalibrationStatistics:
    """
    :param sites: the calibrated sites, in the order of execution.
    :param histograms: site name → activation histogram.
    :param samples: number of samples seen.
    :param costs: price of sparsity in each layer, where it was measured (allocation ``fisher``).
    :param paths: layer name → what a greedy search found, where there was one (allocation ``greedy``).
    """

    sites: tuple[Site, ...]
    histograms: Mapping[str, ActivationHistogram] = field(repr=False)
    samples: int = 0
    costs: Costs | None = field(default=None, repr=False)
    paths: Mapping[str, np.ndarray[Any, Any]] | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens seen by the first site."""
        return self.histograms[self.sites[0].name].total // self.sites[0].width if self.sites else 0

    def planning_histograms(self) -> dict[str, ActivationHistogram]:
        """What thresholds and modes are planned with: experts that few tokens reached draw on their siblings."""
        return shrink(self.sites, self.histograms)

    def tokens_at(self, site: Site) -> int:
        """Tokens that reached a site; an expert sees a part of them only."""
        return self.histograms[site.name].total // site.width

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """
        The statistics of both data sets; the order does not matter. Prices are kept where both sides have them.

        :raises nncf.ValidationError: the statistics are of different sites.
        """
        if self.sites != other.sites:
            ours, theirs = {s.name for s in self.sites}, {s.name for s in other.sites}
            msg = (
                "Statistics of different sites cannot be merged: "
                f"{len(ours - theirs)} sites are only in the first, {len(theirs - ours)} only in the second"
                f"{'' if ours != theirs else ', and shapes or roles differ'}. Calibrate the same model and layers."
            )
            raise nncf.ValidationError(msg)
        merged = {name: self.histograms[name].merge(other.histograms[name]) for name in self.histograms}
        costs = self.costs.merge(other.costs) if self.costs is not None and other.costs is not None else None
        return CalibrationStatistics(self.sites, merged, self.samples + other.samples, costs)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """
        Write ``statistics.safetensors`` into a folder, atomically.

        :raises nncf.ValidationError: the folder cannot be written.
        """
        return write_atomically(Path(folder) / STATISTICS_FILE, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationStatistics:
        """
        :param path: a folder with ``statistics.safetensors``, or the file.
        :raises nncf.InvalidPathError: there is no such file.
        :raises nncf.ValidationError: the file is damaged.
        """
        return cls.from_bytes(_read(Path(path)), str(path))

    def to_bytes(self, note: Mapping[str, str] | None = None) -> bytes:
        """
        As safetensors: of each site the occupied bucket numbers (uint16) and their counts (int64); the sites themselves
        are JSON in the metadata. Equal statistics give equal bytes.

        :param note: is kept in the metadata, see :meth:`read_unfinished`.
        """
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        for index, site in enumerate(self.sites):
            occupied = np.flatnonzero(self.histograms[site.name].counts)
            tensors[f"{index}.buckets"] = occupied.astype(np.uint16)
            tensors[f"{index}.counts"] = self.histograms[site.name].counts[occupied]
        if self.costs is not None:
            for index, layer in enumerate(layer for site in self.sites for layer in site.layers):
                tensors[f"{index}.prices"] = self.costs.sums[layer.name]
        if self.paths is not None:
            for index, layer in enumerate(layer for site in self.sites for layer in site.layers):
                tensors[f"{index}.path"] = self.paths[layer.name]
        described = [
            {
                "name": site.name,
                "block": site.block,
                "layers": [[layer.name, layer.role, layer.in_features, layer.out_features] for layer in site.layers],
                "exact": self.histograms[site.name].exact,
            }
            for site in self.sites
        ]
        header = {
            "format": _FORMAT,
            "samples": self.samples,
            "sites": described,
            "priced_tokens": None if self.costs is None else self.costs.tokens,
        }
        metadata = {"scap_nncf": json.dumps(header)}
        return save_tensors(tensors, metadata=metadata if note is None else {**metadata, "note": json.dumps(note)})

    @classmethod
    def read_unfinished(cls, file: Path) -> tuple[CalibrationStatistics, dict[str, str]]:
        """
        Statistics of an unfinished run and their note.

        :raises nncf.ValidationError: the file is damaged, or has no note.
        """
        content = _read(file)
        statistics = cls.from_bytes(content, str(file))
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        note = parse_json(metadata.get("note", "null"), str(file))
        if not isinstance(note, dict) or not all(isinstance(value, str) for value in note.values()):
            msg = f"{file} is no unfinished calibration of scap-nncf."
            raise nncf.ValidationError(msg)
        return statistics, note

    @classmethod
    def from_bytes(cls, content: bytes, source: str) -> CalibrationStatistics:
        """
        :param source: how to name the content in an error.
        :raises nncf.ValidationError: the content is damaged.
        """
        try:
            tensors = load_tensors(content)
            header_size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
            described = parse_json(metadata["scap_nncf"], "the metadata")
            if described["format"] != _FORMAT:
                msg = f"format is {described['format']!r}, expected {_FORMAT!r}"
                raise ValueError(msg)
            if len(described["sites"]) > _MAX_SITES:
                msg = f"{len(described['sites'])} sites, more than the {_MAX_SITES} that statistics may have"
                raise ValueError(msg)
            sites = [_read_site(item) for item in described["sites"]]
            if len({site.name for site in sites}) < len(sites):
                msg = "a site is there twice"
                raise ValueError(msg)
            histograms = {}
            for index, (site, item) in enumerate(zip(sites, described["sites"])):
                counts = _read_counts(tensors[f"{index}.buckets"], tensors[f"{index}.counts"])
                histograms[site.name] = ActivationHistogram(counts, item["exact"] is True)
            costs = None
            if described["priced_tokens"] is not None:
                names = [layer.name for site in sites for layer in site.layers]
                sums = {name: tensors[f"{index}.prices"] for index, name in enumerate(names)}
                costs = Costs(sums, _count(described["priced_tokens"]))
            paths = None
            if sites and "0.path" in tensors:
                every = [layer.name for site in sites for layer in site.layers]
                paths = {name: tensors[f"{index}.path"] for index, name in enumerate(every)}
                if any(path.shape != (len(GREEDY_LEVELS),) or not np.isfinite(path).all() for path in paths.values()):
                    msg = f"a greedy search's path is not {len(GREEDY_LEVELS)} finite numbers"
                    raise ValueError(msg)
            return cls(tuple(sites), histograms, _count(described["samples"]), costs, paths)
        except (
            SafetensorError,
            nncf.ValidationError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            OverflowError,
            RecursionError,
        ) as error:
            msg = f"{source} is no calibration statistics of scap-nncf, or damaged: {error!r}."
            raise nncf.ValidationError(msg) from error


def _read_site(item: Mapping[str, Any]) -> Site:
    layers = tuple(Layer(_name(n), _name(r), _count(i, 1), _count(o, 1)) for n, r, i, o in item["layers"])
    if not layers:
        msg = f"site {item['name']!r} has no layers"
        raise ValueError(msg)
    return Site(_name(item["name"]), None if item["block"] is None else _count(item["block"]), layers)


def _read_counts(buckets: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if buckets.dtype != np.uint16 or counts.dtype != np.int64 or buckets.ndim != 1 or buckets.shape != counts.shape:
        msg = f"expected buckets uint16 [n] and counts int64 [n], got {buckets.dtype} and {counts.dtype}"
        raise ValueError(msg)
    if counts.size and not (counts.min() > 0 and counts.max() <= _MAX_COUNT and (buckets[1:] > buckets[:-1]).all()):
        msg = "buckets must ascend and hold positive counts"
        raise ValueError(msg)
    full = np.zeros(NUM_BUCKETS, dtype=np.int64)
    full[buckets] = counts
    return full


def _name(value: Any) -> str:
    if not isinstance(value, str):
        msg = f"expected text, got {value!r}"
        raise TypeError(msg)
    return value


def _count(value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_COUNT:
        msg = f"expected a whole number from {least} to {_MAX_COUNT}, got {str(value)[:80]}"
        raise ValueError(msg)
    return value


def statistics_of_plan(folder: str | os.PathLike[str], plan: Plan) -> CalibrationStatistics | None:
    """
    The statistics that lie beside a plan, or None where the plan has none.

    :raises nncf.ValidationError: the file is missing, damaged, or belongs to another plan.
    """
    if not plan.statistics:
        return None
    path = Path(folder) / STATISTICS_FILE  # the file's name is ours whatever the plan says
    content = read_companion(path, plan.statistics.get("sha256"), _MAX_BYTES)
    if content is None:
        msg = f"{path} is damaged or belongs to another plan: its checksum differs from the plan's."
        raise nncf.ValidationError(msg)
    return CalibrationStatistics.from_bytes(content, str(path))


def _read(path: Path) -> bytes:
    file = path / STATISTICS_FILE if path.is_dir() else path
    if not file.is_file():
        msg = f"No calibration statistics at {file}."
        raise nncf.InvalidPathError(msg)
    if file.stat().st_size > _MAX_BYTES:
        msg = f"{file} has {file.stat().st_size} bytes, more than statistics may have ({_MAX_BYTES})."
        raise nncf.ValidationError(msg)
    return file.read_bytes()
