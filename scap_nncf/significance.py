# SPDX-License-Identifier: Apache-2.0
"""
Is it a change? Two models are compared on the same items, so what counts is how each item changed.

The difference of two accuracies on 500 items has a standard error of about three points if the items are taken as
independent draws, but most items do not change at all: pairing them makes the error several times smaller, and a change
that is smaller than it is not a change that was shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import nncf
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """
    A paired comparison, the second model minus the first.

    :param items: pairs (items of a task, or windows of a text).
    :param difference: mean over the items of second minus first; for texts the difference in nats a token.
    :param stderr: standard error of `difference`; None with a single item.
    :param p_value: two-sided, of no difference; None where there is no standard error.
    :param test: how `p_value` was found.
    :param lost: items that only the first model got right; None where outcomes are not right or wrong.
    :param gained: items that only the second model got right.
    """

    items: int
    difference: float
    stderr: float | None
    p_value: float | None
    test: str
    lost: int | None = None
    gained: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the difference, from Student's t distribution."""
        if self.stderr is None:
            return None
        half = float(stats.t.ppf(0.975, self.items - 1)) * self.stderr
        return self.difference - half, self.difference + half

    def shown(self, level: float = 0.05) -> bool:
        """Whether a difference was shown at this level of significance."""
        return self.p_value is not None and self.p_value < level


def paired_outcomes(first: Sequence[float], second: Sequence[float]) -> Paired:
    """
    Compares two models by their outcome on each item.

    Where every outcome is 0 or 1 the p-value is McNemar's exact test (a two-sided binomial test on the items that
    changed; McNemar, Psychometrika 12, 1947), else that of Student's paired t test.

    :param first: outcome of each item, e.g. 1 for right and 0 for wrong.
    :param second: outcomes of the same items in the same order.
    :raises nncf.ValidationError: no item, or not the same number of items.
    """
    if len(first) != len(second) or not first:
        msg = f"paired outcomes need the same items twice, got {len(first)} and {len(second)}"
        raise nncf.ValidationError(msg)
    differences = [b - a for a, b in zip(first, second)]
    count = len(differences)
    mean = math.fsum(differences) / count
    stderr = None
    if count > 1:
        stderr = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    if {*first, *second} <= {0, 1}:
        lost, gained = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        return Paired(count, mean, stderr, mcnemar(lost, gained), "McNemar exact", lost, gained)
    return Paired(count, mean, stderr, _student(mean, stderr, count), "paired t")


def paired_windows(first: Sequence[tuple[float, int]], second: Sequence[tuple[float, int]]) -> Paired:
    """
    Compares two models by their loss on each window of a text.

    The difference is that of the mean loss a token, and exp(difference) the ratio of the perplexities. Its standard
    error is that of a ratio estimator over windows: tokens of one window share a context and are not independent.

    :param first: for each window, the summed negative log-likelihood in nats and the number of predicted tokens.
    :param second: the same windows in the same order.
    :raises nncf.ValidationError: no window, or not the same windows.
    """
    if [n for _, n in first] != [n for _, n in second] or not first:
        msg = f"paired losses need the same windows twice, got {len(first)} and {len(second)} windows"
        raise nncf.ValidationError(msg)
    tokens = sum(n for _, n in first)
    changes = [b - a for (a, _), (b, _) in zip(first, second)]
    difference = math.fsum(changes) / tokens
    count = len(changes)
    stderr = None
    if count > 1:
        spread = math.fsum((change - difference * n) ** 2 for change, (_, n) in zip(changes, first))
        stderr = math.sqrt(count / (count - 1) * spread) / tokens
    return Paired(count, difference, stderr, _student(difference, stderr, count), "paired t over windows")


def mean_of(comparisons: Sequence[Paired]) -> Paired:
    """The unweighted mean over tasks of differences, whose errors are independent."""
    if not comparisons:
        msg = "the mean of no comparison was asked for"
        raise nncf.ValidationError(msg)
    count = len(comparisons)
    mean = math.fsum(c.difference for c in comparisons) / count
    errors = [c.stderr for c in comparisons if c.stderr is not None]
    stderr = math.sqrt(math.fsum(error**2 for error in errors)) / count if len(errors) == count else None
    items = sum(c.items for c in comparisons)
    return Paired(items, mean, stderr, _student(mean, stderr, items), "paired t")


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact p-value: two-sided binomial test that as many items were lost as gained."""
    return float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _student(difference: float, stderr: float | None, count: int) -> float | None:
    if stderr is None:
        return None
    if stderr == 0.0:
        return 1.0 if difference == 0.0 else 0.0
    return float(2 * stats.t.sf(abs(difference) / stderr, count - 1))
