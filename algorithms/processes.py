# SPDX-License-Identifier: Apache-2.0
"""
Calibration by several processes: each takes its share of the samples, and their integer counts add up to the same
statistics as one process has, bit for bit.

Processes are those of ``torch.distributed``: start them with ``torchrun`` or ``accelerate launch``, and initialise a
process group (the command line does). Exchange goes over gloo on the CPU, whatever the group of the models uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import nncf
import numpy as np
import torch
import torch.distributed as dist

_PATIENCE = timedelta(hours=12)  # one process may wait long for another that calibrates more slowly
_single: ContextVar[bool] = ContextVar("single", default=False)


class OtherProcessError(nncf.ValidationError):
    """Another process failed, so this one ends as well."""


@dataclass(frozen=True)
class Processes:
    """
    The processes that calibrate together.

    :param rank: number of this one, from 0.
    :param count: how many there are.
    :param group: a process group for tensors on the CPU; None where this process is alone.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """
        What each process gave, by rank. All must call.

        :raises OtherProcessError: a process has failed.
        """
        return [value] if self.count == 1 else self._gather(None, value)

    def sum_counts(self, counts: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The sum over all processes of int64 arrays of one shape. All must call."""
        if self.count == 1:
            return counts
        tensor = torch.from_numpy(np.array(counts, dtype=np.int64))
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor.numpy()

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one process fails inside, all fail; nobody waits for one that is gone."""
        if self.count == 1:
            yield
            return
        try:
            yield
        except OtherProcessError:
            raise
        except Exception as error:
            with _ignored():
                self._gather(f"{type(error).__name__}: {error}", None)
            raise
        self._gather(None, None)

    def _gather(self, failure: str | None, value: Any) -> list[Any]:
        box: list[Any] = [None] * self.count
        dist.all_gather_object(box, (failure, value), group=self.group)
        failures = [f"process {rank}: {why}" for rank, (why, _) in enumerate(box) if why is not None]
        if failures:
            raise OtherProcessError(f"Calibration ended because another process failed ({'; '.join(failures)}).")
        return [given for _, given in box]

    def share(self, samples: Iterable[Any]) -> Iterator[Any]:
        """This process's samples: every `count`-th, from its rank on."""
        return (sample for index, sample in enumerate(samples) if index % self.count == self.rank)


ALONE = Processes()


def current() -> Processes:
    """
    The processes of ``torch.distributed``'s default group; alone where none was initialised, or inside
    :func:`single_process`.
    """
    if _single.get() or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ALONE
    return _processes(id(dist.group.WORLD))


@cache
def _processes(_world: int) -> Processes:
    # a group of its own: exchange never meets the user's collectives, and works for models on any device
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size(), group)


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this process calibrates on all samples that it is given, whatever process group there is."""
    token = _single.set(True)
    try:
        yield
    finally:
        _single.reset(token)


def start_from_launcher() -> bool:
    """
    Initialise the process group where a launcher (``torchrun``, ``accelerate launch``) started this process.

    :return: whether there is one now that was not there before.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if not launched or not dist.is_available() or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    return True


def refuse_sharded(model: Any) -> None:
    """
    :raises nncf.UnsupportedModelError: the model's weights are spread over the processes, which then must all run the
        same samples.
    """
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    sharded = (getattr(model, "_tp_size", None) or 1) > 1 or any(hasattr(p, "device_mesh") for p in parameters)
    if sharded:
        msg = (
            "The model's weights are spread over the processes (tensor parallel or FSDP), so each process sees part of "
            "an activation. Calibrate the unsharded model, block by block where it is larger than a device "
            "(block_by_block=True), and apply the plan to the sharded one."
        )
        raise nncf.UnsupportedModelError(msg)


@contextmanager
def _ignored() -> Iterator[None]:
    try:
        yield
    except Exception:  # the first failure is what counts; the others learn of it if they still can
        return
