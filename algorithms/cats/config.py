# SPDX-License-Identifier: Apache-2.0
"""Settings of CATS, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nncf

from scap_nncf.algorithms.plan import check_prune
from scap_nncf.algorithms.sparsity import check_sparsity


@dataclass(frozen=True)
class Cats:
    """
    CATS (arXiv 2404.08763): in a gated feed-forward ``down(act(gate(x)) * up(x))``, channels with
    ``|act(gate(x))| <= τ`` are dropped: rows of up's weights and columns of down's. The gate's own layer stays dense,
    so that 50 % of the channels are a third of the feed-forward. PyTorch models; the baseline that SCAP's paper
    compares with (appendix B).

    .. code-block:: python

        nncf.compress(model, algorithm="cats", sparsity=0.5, dataset=dataset)

    :param sparsity: share of the channels to drop, in [0, 1); τ is that quantile of ``|act(gate)|`` of each block.
    :param prune: ``all`` prunes every token; ``decode`` leaves prompts dense and prunes tokens that come alone.
    :param ignored_scope: layers to leave dense; a feed-forward of which one layer is named stays dense.
    :param subset_size: at most this many samples of the dataset are used; None uses all.
    """

    sparsity: float = 0.5
    prune: str = "all"
    ignored_scope: nncf.IgnoredScope | None = None
    subset_size: int | None = 128

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_prune(self.prune)
        size: Any = self.subset_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            msg = f"subset_size must be a whole number from 1 or None, got {size!r}."
            raise nncf.ValidationError(msg)
