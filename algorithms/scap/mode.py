# SPDX-License-Identifier: Apache-2.0
"""Mode centring: which η a site gets (SCAP paper, section 3)."""

from __future__ import annotations

from scap_nncf.algorithms.plan import to_float32
from scap_nncf.algorithms.scap.histogram import ActivationHistogram

#: ``auto`` centres only where the squared pruning error falls at least to this share of the uncentred one.
AUTO_MAX_ERROR_RATIO = 0.9
#: From this share of zeros on, a density peak that all but touches zero is the zeros'.
NATURAL_PEAK = 0.1


def choose_mode(histogram: ActivationHistogram, method: str, sparsity: float) -> tuple[float, str]:
    """
    The mode η of a site.

    ``auto`` compares, at the site's target sparsity, the error that pruning makes in the activation,
    ``E[(x − η)²; |x − η| ≤ τ(η)]``, for η = 0, the median and the KDE peak. It takes the best, and keeps 0 unless the
    error falls by at least 10 %: a peak that is off zero by little buys nothing, and η = 0 costs nothing at run time.

    :param histogram: the site's calibration statistic.
    :param method: ``zero``, ``mean``, ``median``, ``kde`` or ``auto``.
    :param sparsity: target sparsity of the site, used by ``auto`` only.
    :return: η (representable in float32) and the method that gave it.
    """
    if method == "auto":
        candidates = [(0.0, "zero")]
        if sparsity > 0:
            candidates += [choose_mode(histogram, name, sparsity) for name in ("median", "kde")]
        errors = [histogram.dropped_energy(histogram.quantile(sparsity, mode), mode) for mode, _ in candidates]
        best = min(range(len(candidates)), key=errors.__getitem__)
        return candidates[best] if errors[best] < AUTO_MAX_ERROR_RATIO * errors[0] else candidates[0]
    if method == "zero":
        return 0.0, "zero"
    mode = {"mean": histogram.mean, "median": histogram.median, "kde": histogram.kde_mode}[method]()
    return _zero_if_meant(histogram, to_float32(mode), method), method


def _zero_if_meant(histogram: ActivationHistogram, mode: float, method: str) -> float:
    """
    Zero where the mode found is the zeros themselves: they are one value, of which the median's grid gives a neighbour
    and the density's peak, smoothed with the values on one side of it, lies a little off; ``x − η`` would not be zero
    for a single one.
    """
    near = 2.0**-126
    if method == "kde" and histogram.zero_share >= NATURAL_PEAK:
        near = 0.01 * (histogram.value_quantile(0.999) - histogram.value_quantile(0.001))
    return 0.0 if histogram.zero_share and abs(mode) < near else mode
