# SPDX-License-Identifier: Apache-2.0
"""Paired comparisons against exact sums, scipy and resampling."""

from __future__ import annotations

import math
import random

import nncf
import numpy as np
import pytest
from scipy import stats

from scap_nncf.significance import mcnemar, mean_of, paired_outcomes, paired_windows


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 12), (40, 40), (7, 6), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    changed, fewer = lost + gained, min(lost, gained)
    expected = min(1.0, 2 * sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed)
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_outcomes():
    rng = random.Random()
    first = [int(rng.random() < 0.6) for _ in range(400)]
    second = [b if rng.random() < 0.9 else 1 - b for b in first]
    result = paired_outcomes(first, second)
    assert result.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert result.stderr == pytest.approx(np.std(np.subtract(second, first), ddof=1) / 20)
    assert result.gained - result.lost == sum(second) - sum(first)
    assert (result.test, result.items) == ("McNemar exact", 400)
    # pairing pays: independent draws would have an error of about 3.5 points
    assert result.stderr < math.sqrt(np.var(first) / 400 + np.var(second) / 400)


def test_graded_outcomes_and_one_item():
    result = paired_outcomes([0.1, 0.4, 0.2], [0.2, 0.3, 0.7])
    assert result.lost is None
    assert result.test == "paired t"
    assert result.p_value == pytest.approx(stats.ttest_rel([0.2, 0.3, 0.7], [0.1, 0.4, 0.2]).pvalue)
    assert 0 < result.p_value < 1
    alone = paired_outcomes([1], [0])
    assert (alone.difference, alone.stderr, alone.interval) == (-1, None, None)
    same = paired_outcomes([0.5, 0.5], [0.5, 0.5])
    assert (same.p_value, same.shown()) == (1.0, False)


def test_a_small_change_is_not_sold_as_a_change():
    """0.3 points on 1,000 items: 20 items lost, 23 gained."""
    first = [1] * 520 + [0] * 480
    second = [0] * 20 + [1] * 500 + [1] * 23 + [0] * 457
    result = paired_outcomes(first, second)
    assert result.difference == pytest.approx(0.003)
    assert not result.shown()
    assert result.interval[0] < 0 < result.interval[1]


def test_windows_error_agrees_with_resampling():
    rng = np.random.default_rng()
    counts = rng.integers(100, 512, 60)
    first = [(float(n * rng.normal(3.0, 0.3)), int(n)) for n in counts]
    second = [(loss + float(n * rng.normal(0.05, 0.04)), n) for loss, n in first]
    result = paired_windows(first, second)
    assert result.difference == pytest.approx(
        sum(b for b, _ in second) / counts.sum() - sum(a for a, _ in first) / counts.sum()
    )
    change = np.array([b - a for (a, _), (b, _) in zip(first, second)])
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(0, 60, 60)
        drawn.append(change[chosen].sum() / counts[chosen].sum())
    assert result.stderr == pytest.approx(np.std(drawn), rel=0.15)
    assert result.shown()


def test_false_alarms_are_as_rare_as_promised():
    """No difference between the models: about 5 % of comparisons may claim one; McNemar's exact test fewer."""
    rng = np.random.default_rng()
    claims = 0
    for _ in range(1000):
        changed = rng.random(300) < 0.2
        first = rng.integers(0, 2, 300)
        second = np.where(changed & (rng.random(300) < 0.5), 1 - first, first)
        claims += paired_outcomes(first.tolist(), second.tolist()).shown()
    assert claims < 75


def test_two_windows_prove_nothing():
    """With one degree of freedom even ten standard errors are little."""
    result = paired_windows([(100.0, 50), (100.0, 50)], [(110.0, 50), (112.0, 50)])
    assert result.difference / result.stderr > 10
    assert not result.shown(0.05)
    assert result.interval[0] < 0


def test_mean_of_tasks():
    parts = [paired_outcomes([1, 0, 1, 0, 1], [1, 0, 0, 0, 1]), paired_outcomes([0.0, 0.5, 1.0], [0.5, 0.5, 0.9])]
    result = mean_of(parts)
    assert result.difference == pytest.approx(sum(p.difference for p in parts) / 2)
    assert result.stderr == pytest.approx(math.hypot(*(p.stderr for p in parts)) / 2)
    assert result.items == 8


@pytest.mark.parametrize("call", [lambda: paired_outcomes([1], []), lambda: paired_outcomes([], []),
                                  lambda: paired_windows([(1.0, 3)], [(1.0, 4)]), lambda: mean_of([])])  # fmt: skip
def test_bad_input(call):
    with pytest.raises(nncf.ValidationError):
        call()
