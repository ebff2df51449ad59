# SPDX-License-Identifier: Apache-2.0
"""
Statistics of experts that few tokens reached.

A router sends some experts little or nothing during calibration, and quantiles of a few tokens are noise. Such an
expert is planned on a mixture of its own histogram and the pooled one of the same layer in all experts of the block;
the share of its own grows with its tokens, up to one at :data:`OWN_TOKENS`. What was gathered is left as it is, so
that statistics still merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.sites import Site, expert_pool

#: From this many calibration tokens on, an expert's statistics stand for themselves.
OWN_TOKENS = 256
_RESOLUTION = 1 << 40


def shrink(sites: Sequence[Site], histograms: Mapping[str, ActivationHistogram]) -> dict[str, ActivationHistogram]:
    """
    The histograms to plan with: site name → histogram.

    :param sites: all calibrated sites; pools are made of what is in here.
    """
    result = dict(histograms)
    for members in pools(sites).values():
        few = [site for site in members if histograms[site.name].total < OWN_TOKENS * site.width]
        if not few or len(members) == 1:
            continue
        pooled = ActivationHistogram()
        for site in members:
            pooled = pooled.merge(histograms[site.name])
        if pooled.total:
            result.update({site.name: _mix(histograms[site.name], pooled, site.width) for site in few})
    return result


def pools(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Sites that are the same layer in different experts, by what their names have in common."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        pool = expert_pool(site.name)
        if pool is not None:
            found.setdefault(pool, []).append(site)
    return found


def own_share(tokens: int) -> float:
    """The weight of an expert's own statistics."""
    return min(1.0, tokens / OWN_TOKENS)


def _mix(own: ActivationHistogram, pooled: ActivationHistogram, width: int) -> ActivationHistogram:
    if not own.total:
        return pooled
    share = own_share(own.total // width)
    mixture = share * own.counts / own.total + (1 - share) * pooled.counts / pooled.total
    counts = np.round(mixture * _RESOLUTION).astype(np.int64)  # non-finite values were refused while collecting
    return ActivationHistogram(counts, own.exact and pooled.exact)
