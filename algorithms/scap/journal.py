# SPDX-License-Identifier: Apache-2.0
"""
Calibration that survives its process: statistics so far, written at bounded intervals, and taken up again.

.. code-block:: python

    with scap_nncf.resumable("unfinished"):
        model = nncf.compress(model, algorithm="scap", dataset=dataset)

After a crash or ``kill -9`` the same lines go on where the last interval ended, and give the same plan bit for bit:
counts are integers, and the samples that were counted are recognised by a digest of their content. A folder of
another model, other settings or other samples is not used. It is removed when the block ends well.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nncf
import numpy as np
import torch
from nncf.common.logging import nncf_logger
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer

from scap_nncf.algorithms.plan import write_atomically
from scap_nncf.algorithms.processes import Processes
from scap_nncf.algorithms.scap.calibration import CalibrationStatistics
from scap_nncf.algorithms.scap.statistics import add_histogram, histogram_of
from scap_nncf.algorithms.sites import Site

if TYPE_CHECKING:
    from scap_nncf.algorithms.backends.torch.blockwise import Keeper

DEFAULT_INTERVAL = 60.0  # seconds; what a crash can cost. Writing 200 sites takes some 50 ms.


@dataclass(frozen=True)
class Resumable:
    """Where unfinished work is kept, and how often it is written."""

    folder: Path
    every: float


_resumable: ContextVar[Resumable | None] = ContextVar("resumable", default=None)


@contextmanager
def resumable(folder: str | os.PathLike[str], every: float = DEFAULT_INTERVAL) -> Iterator[None]:
    """
    Keep unfinished calibration in a folder, and go on from what lies there.

    :param folder: made when the first interval ends, removed when the block ends well; kept if it raises.
    :param every: seconds between two writings: what a crash can cost.
    :raises nncf.ValidationError: `every` is negative, or `folder` holds other things.
    """
    path = Path(folder).expanduser()
    if not every >= 0:
        msg = f"every must be a number of seconds from 0, got {every!r}."
        raise nncf.ValidationError(msg)
    if path.exists() and (not path.is_dir() or any(not _is_ours(item) for item in path.iterdir())):
        msg = f"{path} holds other things than unfinished calibration; give a folder of its own."
        raise nncf.ValidationError(msg)
    token = _resumable.set(Resumable(path, float(every)))
    try:
        yield
    finally:
        _resumable.reset(token)
    shutil.rmtree(path, ignore_errors=True)


def unfinished() -> Resumable | None:
    """Where to keep unfinished work, or None."""
    return _resumable.get()


def _is_ours(item: Path) -> bool:
    return item.name.lstrip(".").startswith("unfinished-")


class Journal:
    """
    The statistics of the samples so far, in one file a process.

    :param work: where and how often.
    :param sites: the calibrated sites.
    :param points: their collectors: read when written, filled when taken up.
    :param key: identifies model and settings; statistics of another one are not taken up.
    """

    def __init__(
        self,
        work: Resumable,
        sites: Sequence[Site],
        points: StatisticPointsContainer,
        key: Mapping[str, Any],
        processes: Processes,
    ) -> None:
        self._sites = tuple(sites)
        self._collectors = {
            point.target_point.target_node_name: collector  # type: ignore[attr-defined]
            for _, point, collector in points.get_tensor_collectors()
        }
        described = {
            **key,
            "sites": [str(site) for site in self._sites],
            "processes": [processes.rank, processes.count],
        }
        self._key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
        self._file = work.folder / f"unfinished-{self._key[:16]}.safetensors"
        self._every = work.every
        self._warned = False

    def remaining(self, samples: Iterable[Any]) -> Iterator[Any]:
        """
        The samples that are not counted yet. When the next one is asked for, the one before must be counted.
        """
        done, expected = self._read()
        digest = hashlib.sha256()
        stream = iter(samples)
        counted = list(itertools.islice(stream, done))  # kept until it is known that they are the same
        for sample in counted:
            add_to_digest(digest, sample)
        if done and (len(counted) < done or digest.hexdigest() != expected):
            nncf_logger.warning(f"The samples are not those of {self._file}; calibrating from the start.")
            stream = itertools.chain(counted, stream)
            digest, done = hashlib.sha256(), 0
        elif done:
            self._restore()
            nncf_logger.info(f"Going on after {done} samples that were calibrated before.")
        del counted
        last = time.monotonic()
        for count, sample in enumerate(stream, done + 1):
            yield sample
            add_to_digest(digest, sample)
            if time.monotonic() - last >= self._every:
                self._write(count, digest.hexdigest())
                last = time.monotonic()

    def keeper(self, samples: Sequence[Any]) -> Keeper:
        """
        What keeps the state of a walk from block to block, and has that of an earlier process: the statistics are those
        of all samples in the blocks before, and the hidden states lie beside them.
        """
        from scap_nncf.algorithms.backends.torch.blockwise import Keeper

        running = hashlib.sha256()
        for sample in samples:
            add_to_digest(running, sample)
        digest = running.hexdigest()
        last = time.monotonic()

        def due() -> bool:
            return time.monotonic() - last >= self._every

        def save(block: int, kind: int) -> None:
            nonlocal last
            self._write(len(samples), digest, block=str(block), kind=str(kind))
            last = time.monotonic()

        folder = self._file.with_suffix("")
        counted, known, note = self._read_note()
        if counted != len(samples) or known != digest or "block" not in note:
            return Keeper(folder, save, due)
        state = (int(note["block"]), int(note["kind"]))
        keeper = Keeper(folder, save, due, state)
        if not keeper.is_complete(len(samples)):
            nncf_logger.warning(f"Hidden states beside {self._file} are missing; calibrating from the start.")
            return Keeper(folder, save, due)
        self._restore()
        nncf_logger.info(f"Going on before block {state[0]}, with what was calibrated before.")
        return keeper

    def _read(self) -> tuple[int, str]:
        return self._read_note()[:2]

    def _read_note(self) -> tuple[int, str, dict[str, str]]:
        """Number of samples, their digest and the note of the unfinished file; (0, "", {}) where there is none."""
        if not self._file.is_file():
            return 0, "", {}
        try:
            statistics, note = CalibrationStatistics.read_unfinished(self._file)
            if note["key"] != self._key or statistics.sites != self._sites:
                return 0, "", {}
            int(note.get("block", 0)), int(note.get("kind", 0))
            return statistics.samples, note["digest"], note
        except (nncf.ValidationError, KeyError, ValueError) as error:
            nncf_logger.warning(f"Unfinished calibration cannot be taken up, calibrating from the start: {error}")
            return 0, "", {}

    def _restore(self) -> None:
        statistics, _ = CalibrationStatistics.read_unfinished(self._file)
        for site in self._sites:
            add_histogram(self._collectors[site.name], statistics.histograms[site.name])

    def _write(self, samples: int, digest: str, **more: str) -> None:
        histograms = {site.name: histogram_of(self._collectors[site.name]) for site in self._sites}
        statistics = CalibrationStatistics(self._sites, histograms, samples)
        try:
            write_atomically(self._file, statistics.to_bytes(note={"key": self._key, "digest": digest, **more}))
        except nncf.ValidationError as error:
            if not self._warned:  # a full disk must not end the work that it could not protect
                nncf_logger.warning(f"Calibration goes on, but could not be resumed: {error}")
            self._warned = True


def add_to_digest(digest: Any, value: Any) -> None:
    """Feed a sample's whole content: tensors, arrays, mappings, sequences."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # bfloat16 has no numpy type
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            add_to_digest(digest, value[key])
    elif isinstance(value, (tuple, list)):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            add_to_digest(digest, item)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())


def model_key(model: Any, sites: Sequence[Site]) -> dict[str, Any]:
    """What tells two models of one shape apart at little cost: a few values of each calibrated layer's weights."""
    found: dict[str, Any] = {"class": type(model).__name__}
    if not hasattr(model, "get_submodule"):
        from scap_nncf.algorithms.backends.openvino.layers import ir_of

        for node in ir_of(model).get_ops():
            if node.get_type_name() == "Constant":
                text = f"{node.get_element_type()} {node.get_output_shape(0)} "
                with suppress(RuntimeError):  # packed types that numpy cannot show
                    text += str(np.asarray(node.data).reshape(-1)[:4].tobytes())
                found[node.get_friendly_name()] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found
    for site in sites:
        for layer in site.layers:
            digest = hashlib.sha256()
            try:
                tensors = [*model.get_submodule(layer.name).named_parameters(recurse=False)]
            except AttributeError:  # an expert inside a fused parameter
                continue
            for name, tensor in tensors:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                if tensor.device.type != "meta" and type(tensor.data) is torch.Tensor:  # subclasses may not be sliced
                    flat = tensor.detach().reshape(-1)
                    add_to_digest(digest, flat[:: max(1, flat.numel() // 16)][:16])
            found[layer.name] = digest.hexdigest()[:16]
    return found
