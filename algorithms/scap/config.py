# SPDX-License-Identifier: Apache-2.0
"""Settings of SCAP, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nncf

from scap_nncf.algorithms import sparsity as sparsity_spec
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
    :param prune: ``all`` prunes every token; ``decode`` leaves prompts dense and prunes tokens that come alone.
    :param sequential: calibrate every site with the pruned output of the sites before it, as the reference
        implementation does. False takes all statistics from the dense model in one streaming pass.
    :param roles: only layers that one of these selectors names may be pruned.
    :param ignored_scope: layers to leave dense, by module name, regular expression or class name.
    :param subset_size: at most this many samples of the dataset are used; None uses all.
    """

    sparsity: Any = 0.5
    mode: str = "auto"
    prune: str = "all"
    sequential: bool = False
    roles: Sequence[str] | None = None
    ignored_scope: nncf.IgnoredScope | None = None
    subset_size: int | None = 128

    def __post_init__(self) -> None:
        sparsity_spec.parse(self.sparsity)
        check_mode_method(self.mode)
        check_prune(self.prune)
        if self.subset_size is not None and (isinstance(self.subset_size, bool) or self.subset_size < 1):
            msg = f"subset_size must be a whole number from 1 or None, got {self.subset_size!r}."
            raise nncf.ValidationError(msg)


def check_mode_method(value: str) -> str:
    """
    :raises nncf.ValidationError: not a known way to find the mode.
    """
    if value not in sparsity_spec.MODE_METHODS:
        msg = f"mode must be one of {', '.join(sparsity_spec.MODE_METHODS)}, got {value!r}."
        raise nncf.ValidationError(msg)
    return value
