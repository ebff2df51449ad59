# SPDX-License-Identifier: Apache-2.0
"""The activation histogram against float64 numpy on the same values."""

from __future__ import annotations

import nncf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scap_nncf.algorithms.scap.histogram import NUM_BUCKETS, ActivationHistogram
from scap_nncf.algorithms.scap.mode import choose_mode
from scap_nncf.algorithms.scap.statistics import bucket_counts

BUCKET = 2.0**-7
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9, 0.99]


def histogram_of(x: torch.Tensor) -> ActivationHistogram:
    return ActivationHistogram(bucket_counts(x).numpy(), x.dtype == torch.bfloat16)


def samples(kind: str, count: int = 40_000) -> torch.Tensor:
    x = torch.randn(count)
    return {
        "normal": x,
        "shifted": x * 0.3 + 2.0,
        "heavy tails": x**3,
        "gelu": torch.nn.functional.gelu(x * 2 - 1),
        "outliers": torch.where(torch.rand(count) < 1e-3, x * 1000, x),
        "tiny": x * 1e-30,
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy tails", "outliers", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantile_of_magnitude_matches_numpy(kind: str, dtype: torch.dtype) -> None:
    x = samples(kind).to(dtype)
    if kind == "tiny" and dtype == torch.float16:
        assert histogram_of(x).quantile(0.5) == 0.0  # underflow: everything is zero
        return
    values = x.double().numpy()
    histogram = histogram_of(x)
    for s in SHARES:
        truth = np.quantile(np.abs(values), s)
        threshold = histogram.quantile(s)
        assert abs(threshold - truth) <= BUCKET * truth
        realised = (np.abs(values) <= np.float32(threshold)).mean()
        # values of a bfloat16 tie: no threshold can do better than half of the largest tie
        ties = np.unique(np.abs(values), return_counts=True)[1].max() / values.size if dtype == torch.bfloat16 else 0
        assert abs(realised - s) < 0.004 + ties
        assert abs(histogram.realised(threshold) - realised) < 0.004


@pytest.mark.parametrize("kind", ["normal", "shifted", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["mean", "median", "kde"])
def test_quantile_around_a_mode_matches_numpy(kind: str, dtype: torch.dtype, method: str) -> None:
    x = samples(kind).to(dtype)
    values = x.double().numpy()
    histogram = histogram_of(x)
    mode, found_by = choose_mode(histogram, method, 0.5)
    assert found_by == method
    for s in SHARES:
        truth = np.quantile(np.abs(values - mode), s)
        # near the mode the resolution is that of the bucket the mode is in
        assert abs(histogram.quantile(s, mode) - truth) <= BUCKET * (truth + abs(mode))
        realised = (np.abs(values - mode) <= histogram.quantile(s, mode)).mean()
        assert abs(realised - s) < (0.03 if kind == "gelu" or dtype == torch.bfloat16 else 0.006)


def test_mean_and_median_match_numpy() -> None:
    x = samples("shifted")
    histogram = histogram_of(x)
    assert histogram.mean() == pytest.approx(x.double().mean().item(), rel=BUCKET)
    assert histogram.median() == pytest.approx(x.double().median().item(), rel=BUCKET)
    exact = x.bfloat16()
    assert histogram_of(exact).median() == exact.median().item()


def test_kde_finds_the_peak_and_not_the_mean() -> None:
    # a narrow peak at 1 with 60 % of the mass, and a wide shoulder that pulls the mean away
    x = torch.cat([1 + 0.05 * torch.randn(60_000), 3 + torch.randn(40_000)])
    assert histogram_of(x).kde_mode() == pytest.approx(1.0, abs=0.02)
    assert histogram_of(x).mean() > 1.7


def test_kde_is_not_led_astray_by_massive_outliers() -> None:
    x = torch.cat([0.5 + 0.1 * torch.randn(100_000), torch.full((20,), 30_000.0)])
    assert histogram_of(x).kde_mode() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5e-5])
def test_constant_input(value: float) -> None:
    x = torch.full((1000,), value)
    histogram = histogram_of(x)
    assert histogram.total == 1000
    assert histogram.median() == pytest.approx(value, rel=BUCKET, abs=1e-38)
    assert histogram.kde_mode() == pytest.approx(value, rel=BUCKET, abs=1e-38)
    assert histogram.quantile(0.5) == pytest.approx(abs(value), rel=BUCKET, abs=1e-38)


def test_natural_zeros_are_always_dropped() -> None:
    x = torch.randn(10_000).relu()
    histogram = histogram_of(x.bfloat16())
    assert histogram.quantile(0.2) == 0.0  # half of the values are zero: dropping them loses nothing
    assert histogram.realised(0.0) == pytest.approx((x == 0).float().mean().item(), abs=1e-3)
    assert histogram.quantile(0.75) > 0


def test_non_finite_values_are_counted_apart() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 2.0])
    histogram = histogram_of(x)
    assert (histogram.total, histogram.non_finite) == (2, 3)
    assert histogram.quantile(0.0) == pytest.approx(1.0, rel=BUCKET)


def test_signed_zeros_and_subnormals() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0])
    histogram = histogram_of(x)
    assert histogram.total == 5
    assert histogram.quantile(0.5) == 0.0
    assert histogram.realised(1e-37) == pytest.approx(0.8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_merge_is_exact_in_any_order(sizes: list[int], random: object) -> None:
    parts = [torch.randn(size) * 10 for size in sizes]
    whole = histogram_of(torch.cat(parts))
    random.shuffle(parts)  # type: ignore[attr-defined]
    merged = ActivationHistogram()
    for part in parts:
        merged = merged.merge(histogram_of(part))
    assert np.array_equal(merged.counts, whole.counts)
    assert merged.quantile(0.37) == whole.quantile(0.37)


def test_merge_of_bfloat16_and_float32_is_no_longer_exact() -> None:
    a, b = histogram_of(torch.randn(10).bfloat16()), histogram_of(torch.randn(10))
    assert a.exact
    assert not a.merge(b).exact
    assert a.merge(ActivationHistogram()).exact


def test_density_sums_to_the_share_inside() -> None:
    x = samples("normal")
    edges = np.linspace(-2, 2, 41)
    density = histogram_of(x).density(edges)
    truth, _ = np.histogram(x.numpy(), edges)
    assert density.sum() == pytest.approx(truth.sum() / len(x), abs=2e-3)
    assert np.abs(density - truth / len(x)).max() < 2e-3


def test_auto_centres_only_where_it_pays() -> None:
    assert choose_mode(histogram_of(samples("normal")), "auto", 0.5) == (0.0, "zero")
    mode, method = choose_mode(histogram_of(samples("shifted")), "auto", 0.5)
    assert method in ("median", "kde")
    assert mode == pytest.approx(2.0, abs=0.1)
    assert choose_mode(histogram_of(samples("shifted")), "auto", 0.0) == (0.0, "zero")


def test_dropped_energy_is_the_error_of_the_pruned_activation() -> None:
    x = samples("shifted")
    histogram = histogram_of(x)
    mode, threshold = 2.0, 0.25
    z = x.double() - mode
    truth = torch.where(z.abs() <= threshold, z, torch.zeros_like(z)).square().mean().item()
    assert histogram.dropped_energy(threshold, mode) == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(nncf.ValidationError, match=r"\[0, 1\)"):
        histogram_of(samples("normal")).quantile(sparsity)


def test_empty_histogram_says_so() -> None:
    with pytest.raises(nncf.ValidationError, match="empty"):
        ActivationHistogram().quantile(0.5)


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(nncf.ValidationError, match="int64"):
        ActivationHistogram(np.zeros(10, dtype=np.int64))
    with pytest.raises(nncf.ValidationError, match="negative"):
        ActivationHistogram(np.full(NUM_BUCKETS, -1, dtype=np.int64))
