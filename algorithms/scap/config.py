# SPDX-License-Identifier: Apache-2.0
"""Settings of SCAP, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nncf

from scap_nncf.algorithms import sparsity as sparsity_spec
from scap_nncf.algorithms.allocation import check_allocation
from scap_nncf.algorithms.mitigation.config import Mitigation, as_mitigation
from scap_nncf.algorithms.plan import check_prune
from scap_nncf.algorithms.refine import Refine
from scap_nncf.algorithms.scap.score import check_score


@dataclass(frozen=True)
class Scap:
    """
    Statistical Calibrated Activation Pruning (SCAP paper, sections 2 and 3).

    .. code-block:: python

        nncf.compress(model, algorithm=Scap(sparsity={"up": 0.35, "gate": 0.35, "down": 0.55}), dataset=dataset)

    :param sparsity: target sparsity: a number in [0, 1) for every FC layer of every block; a mapping of roles
        (``up``, ``q`` ...), groups (``attn``, ``ffn``, ``all``) or ``re:`` patterns to numbers, which leaves other
        layers dense; or the reference grammar ``up,zero,0.35,gate,zero,0.35,down,zero,0.55``.
    :param mode: how the mode η of a site is found: ``zero``, ``mean``, ``median``, ``kde`` (peak of a kernel density
        estimate), or ``auto``, which centres only where that lowers the pruning error (see
        :func:`scap_nncf.algorithms.scap.mode.choose_mode`).
    :param allocation: how the sparsity is spread over the targeted layers; the weighted mean over the layers of each
        part of `sparsity` stays what that part says. ``uniform`` gives each layer what was asked; ``profile`` follows a
        constant table of roles; ``fisher`` spends the budget where it costs the least loss, measured with one backward
        pass over `allocation_samples` samples (:mod:`scap_nncf.algorithms.allocation`). The last two set q, k and v, or
        gate and up, apart. ``auto`` takes a mapping or the grammar literally and spreads one number by ``fisher`` where
        the model is a language model with gradients, else by ``profile`` on gated feed-forwards, else not.
    :param allocation_samples: number of samples for ``fisher``, chosen by their content; about 2,000 tokens suffice.
    :param allocation_checkpointing: let ``fisher`` run each block a second time instead of keeping its activations: for
        models whose backward pass does not fit into memory.
    :param refine: train one static vector for the output of each pruned layer against the dense model, minutes of work
        that cost nothing at run time (:mod:`scap_nncf.algorithms.refine`); None leaves that out. PyTorch language
        models only; the plan then applies to OpenVINO as well.
    :param score: what is compared with the threshold: ``magnitude``, or ``weight_norm``, the magnitude times the norm
        of the channel's weights (:mod:`scap_nncf.algorithms.scap.score`; simulated in PyTorch only).
    :param prune: ``all`` prunes every token; ``decode`` leaves prompts dense and prunes tokens that come alone.
    :param sequential: calibrate every site with the pruned output of the sites before it, as the reference
        implementation does. False takes all statistics from the dense model in one streaming pass.
    :param block_by_block: calibrate with the weights of one block in memory at a time, all samples advancing from block
        to block. None does so where accelerate keeps weights on disk or in main memory (``device_map``,
        ``cpu_offload``), so that each is fetched once and not once a sample. The plan is the same.
    :param roles: only layers that this selector, or one of these, names may be pruned.
    :param ignored_scope: layers to leave dense, by module name, regular expression or class name.
    :param mitigation: error mitigation on top of the thresholds: a :class:`scap_nncf.Mitigation`, or names such as
        ``"var+l-pts"``. A static shift is what `mode` is for.
    :param subset_size: at most this many samples of the dataset are used; None uses all.
    """

    sparsity: Any = 0.5
    mode: str = "auto"
    allocation: str = "auto"
    allocation_samples: int = 8
    allocation_checkpointing: bool = False
    refine: Refine | None = None
    score: str = "magnitude"
    prune: str = "all"
    sequential: bool = False
    block_by_block: bool | None = None
    roles: str | Sequence[str] | None = None
    ignored_scope: nncf.IgnoredScope | None = None
    subset_size: int | None = 128
    mitigation: Mitigation | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            object.__setattr__(self, "roles", (self.roles,))
        sparsity_spec.parse(self.sparsity)
        check_mode_method(self.mode)
        if self.block_by_block not in (None, True, False):
            msg = f"block_by_block must be True, False or None, got {self.block_by_block!r}."
            raise nncf.ValidationError(msg)
        check_prune(self.prune)
        check_allocation(self.allocation)
        check_score(self.score)
        mitigation = as_mitigation(self.mitigation)
        if mitigation is not None and mitigation.shift == "static":
            msg = "A static shift is the mode of a site: set mode='median', 'mean', 'kde' or 'auto' instead."
            raise nncf.ValidationError(msg)
        if self.refine is not None and not isinstance(self.refine, Refine):
            msg = f"refine must be a Refine object or None, got {self.refine!r}; for example refine=Refine(steps=50)."
            raise nncf.ValidationError(msg)
        if self.subset_size is not None:
            _check_count("subset_size", self.subset_size, " or None")
        _check_count("allocation_samples", self.allocation_samples)


def _check_count(name: str, value: Any, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{name} must be a whole number from 1{otherwise}, got {value!r}."
        raise nncf.ValidationError(msg)


def check_mode_method(value: str) -> str:
    """
    :raises nncf.ValidationError: not a known way to find the mode.
    """
    if value not in sparsity_spec.MODE_METHODS:
        msg = f"mode must be one of {', '.join(sparsity_spec.MODE_METHODS)}, got {value!r}."
        raise nncf.ValidationError(msg)
    return value
