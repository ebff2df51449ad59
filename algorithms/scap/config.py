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
    :param allocation: how the sparsity is spread over the targeted layers, their weighted mean staying what `sparsity`
        says: ``uniform`` gives each what was asked; ``profile`` follows a constant table of roles; ``fisher`` spends
        the budget where it costs the least loss, measured with one backward pass over `allocation_samples` samples
        (:mod:`scap_nncf.algorithms.allocation`). The last two set q, k and v, or gate and up, apart.
    :param allocation_samples: number of samples for ``fisher``; about 2,000 tokens suffice.
    :param prune: ``all`` prunes every token; ``decode`` leaves prompts dense and prunes tokens that come alone.
    :param sequential: calibrate every site with the pruned output of the sites before it, as the reference
        implementation does. False takes all statistics from the dense model in one streaming pass.
    :param roles: only layers that this selector, or one of these, names may be pruned.
    :param ignored_scope: layers to leave dense, by module name, regular expression or class name.
    :param mitigation: error mitigation on top of the thresholds: a :class:`scap_nncf.Mitigation`, or names such as
        ``"var+l-pts"``. A static shift is what `mode` is for.
    :param subset_size: at most this many samples of the dataset are used; None uses all.
    """

    sparsity: Any = 0.5
    mode: str = "auto"
    allocation: str = "uniform"
    allocation_samples: int = 8
    prune: str = "all"
    sequential: bool = False
    roles: str | Sequence[str] | None = None
    ignored_scope: nncf.IgnoredScope | None = None
    subset_size: int | None = 128
    mitigation: Mitigation | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            object.__setattr__(self, "roles", (self.roles,))
        sparsity_spec.parse(self.sparsity)
        check_mode_method(self.mode)
        check_prune(self.prune)
        check_allocation(self.allocation)
        mitigation = as_mitigation(self.mitigation)
        if mitigation is not None and mitigation.shift == "static":
            msg = "A static shift is the mode of a site: set mode='median', 'mean', 'kde' or 'auto' instead."
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
