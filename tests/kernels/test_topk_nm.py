# SPDX-License-Identifier: Apache-2.0
"""N:M selection and the definition of a mitigated layer, against slow and obvious code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scap_nncf.kernels.reference import keep_nm, mitigated_fc, prune_nm, sparse_fc

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
patterns = st.integers(2, 80).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def obvious(row: list[float], n: int) -> set[int]:
    """Indices of the n largest, of equals the lower index first."""
    return set(sorted(range(len(row)), key=lambda i: (-row[i], i))[:n])


@settings(max_examples=60, deadline=None)
@given(patterns, st.integers(1, 3), st.integers(1, 4), st.sampled_from(DTYPES), st.integers(0, 2**31), st.booleans())
def test_exactly_n_of_m_and_the_lower_index_of_equals(
    pattern: tuple[int, int], groups: int, rows: int, dtype: torch.dtype, seed: int, tied: bool
) -> None:
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, groups * m, generator=generator)
    u = ((u * 2).round() / 2 if tied else u).to(dtype)  # many equal values, zeros and -0.0 among them
    kept = keep_nm(u.abs(), n, m)
    assert (kept.reshape(rows, groups, m).sum(-1) == n).all()
    for row, flags in zip(u.abs().double().reshape(-1, m).tolist(), kept.reshape(-1, m).tolist()):
        assert {i for i, flag in enumerate(flags) if flag} == obvious(row, n)
    z = prune_nm(u, n, m)
    nonzero = (z.reshape(rows, groups, m) != 0).sum(-1)
    assert (nonzero <= n).all()
    assert (nonzero == torch.minimum((u.reshape(rows, groups, m) != 0).sum(-1), torch.tensor(n))).all()
    assert torch.equal(z[kept], u[kept])
    # a row by itself, and among others
    for index in range(rows):
        assert torch.equal(prune_nm(u[index : index + 1], n, m)[0], z[index])


def test_nan_is_kept_and_takes_a_place() -> None:
    u = torch.randn(5, 64)
    u[:, 3] = torch.nan
    for n, m in ((2, 4), (20, 64)):
        kept = keep_nm(u.abs(), n, m)
        assert kept[:, 3].all()
        assert (kept.reshape(5, -1, m).sum(-1) == n).all()


@pytest.mark.parametrize(("n", "m", "width"), [(4, 4, 8), (0, 4, 8), (2, 4, 10), (5, 4, 8)])
def test_bad_patterns(n: int, m: int, width: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0 < N < M|multiple"):
        keep_nm(torch.rand(3, width), n, m)


def test_scores_rank_and_values_stay() -> None:
    u, score = torch.randn(7, 32), torch.rand(32) + 0.1
    z = prune_nm(u, 3, 8, score)
    assert torch.equal(z != 0, keep_nm((u * score).abs(), 3, 8))
    assert torch.equal(z[z != 0], u[z != 0])


def test_empty_input() -> None:
    assert prune_nm(torch.zeros(0, 32), 2, 4).shape == (0, 32)


def test_definition_without_mitigation_is_the_sparse_layer() -> None:
    x, w, b = torch.randn(3, 5, 24).double(), torch.randn(24, 9).double(), torch.randn(9).double()
    plain = sparse_fc(x, w, [0.4], [9], 0.3, bias=b + 0.3 * w.sum(0))
    assert torch.allclose(mitigated_fc(x, w, threshold=0.4, shift=0.3, bias=b), plain)


@pytest.mark.parametrize("token", [None, "mean", "median"])
@pytest.mark.parametrize("vector_shift", [False, True])
def test_nothing_dropped_means_the_dense_layer(token: str | None, vector_shift: bool) -> None:
    x, w, b = torch.randn(4, 24).double(), torch.randn(24, 9).double(), torch.randn(9).double()
    shift = torch.randn(24).double() if vector_shift else -0.2
    a, c = torch.randn(24, 2).double(), torch.randn(2, 9).double()
    y = mitigated_fc(x, w, shift=shift, token=token, variance=True, low_rank=(a, c), bias=b)
    assert torch.allclose(y, x @ w + b)


def test_full_rank_gives_the_dense_layer_back() -> None:
    x, w = torch.randn(6, 16).double(), torch.randn(16, 12).double()
    y = mitigated_fc(x, w, pattern=(1, 4), low_rank=(w, torch.eye(12).double()))
    assert torch.allclose(y, x @ w)


def test_variance_is_restored_and_scale_leaves_the_bias() -> None:
    x, w, b, gamma = torch.randn(6, 64), torch.eye(64), torch.randn(64), torch.randn(64)
    y = mitigated_fc(x, w, pattern=(2, 4), variance=True)
    assert torch.allclose(y.var(-1), x.var(-1), rtol=1e-4)
    scaled = mitigated_fc(x, w, pattern=(2, 4), scale=gamma, bias=b)
    assert torch.allclose(scaled, (1 + gamma) * mitigated_fc(x, w, pattern=(2, 4)) + b, atol=1e-6)
    constant = mitigated_fc(torch.zeros(2, 64), w, pattern=(2, 4), variance=True)
    assert torch.equal(constant, torch.zeros(2, 64))
