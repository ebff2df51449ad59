# SPDX-License-Identifier: Apache-2.0
"""The definitions themselves, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from scap_nncf.kernels import reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_prune_element_by_element(dtype):
    x, mode, threshold = torch.randn(5, 13).to(dtype), 0.3, 0.7
    pruned = reference.prune(x, mode, threshold)
    assert pruned.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eta, tau = torch.tensor(mode, dtype=wide), torch.tensor(threshold, dtype=wide)
    for value, got in zip(x.flatten(), pruned.flatten()):
        z = value.to(wide) - eta
        assert got == (z.to(dtype) if abs(z) > tau else 0)


def test_prune_drops_at_the_threshold_and_keeps_nan_and_infinity():
    x = torch.tensor([0.5, -0.5, 0.50001, math.nan, math.inf, -math.inf, 0.0])
    got = reference.prune(x, 0.0, 0.5)
    assert got[[0, 1, 6]].tolist() == [0, 0, 0]
    assert got[2] > 0.5
    assert got[3].isnan()
    assert got[4:6].tolist() == [math.inf, -math.inf]


def test_negative_threshold_keeps_everything():
    x = torch.randn(4, 9)
    assert reference.prune(x, 0.0, -1.0) is x
    torch.testing.assert_close(reference.prune(x, 0.25, -1.0), x - 0.25)


def test_fc_is_a_sum_over_kept_channels():
    k, n, mode, threshold = 11, 7, 0.2, 0.6
    x, weight = torch.randn(k, dtype=torch.float64), torch.randn(k, n, dtype=torch.float64)
    bias, residual = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    expected = bias + residual
    for i in range(k):
        if abs(x[i] - mode) > threshold:
            expected = expected + (x[i] - mode) * weight[i]
    got = reference.sparse_fc(x, weight, [threshold], [n], mode, bias, residual)
    torch.testing.assert_close(got, expected)


def test_centring_with_the_fused_bias_changes_nothing_but_the_dropped():
    x, linear = torch.randn(3, 20, dtype=torch.float64), torch.nn.Linear(20, 8, dtype=torch.float64)
    weight = linear.weight.detach().t()
    fused = reference.fuse_bias(weight, linear.bias.detach(), 0.7)
    torch.testing.assert_close(reference.sparse_fc(x, weight, [-1.0], [8], 0.7, fused), linear(x).detach())
    assert reference.fuse_bias(weight, None, 0.0) is None


def test_each_segment_has_its_own_threshold():
    x, weight, thresholds, segments = torch.randn(2, 30), torch.randn(30, 12), [0.2, 1.5, -1.0], [5, 4, 3]
    got = reference.sparse_fc(x, weight, thresholds, segments)
    start = 0
    for threshold, size in zip(thresholds, segments):
        alone = reference.sparse_fc(x, weight[:, start : start + size], [threshold], [size])
        torch.testing.assert_close(got[:, start : start + size], alone)
        start += size


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_glu_is_two_fcs_and_a_product(activation):
    x, weight, bias = torch.randn(2, 15), torch.randn(15, 16), torch.randn(16)
    gate = reference.sparse_fc(x, weight[:, :8], [0.3], [8], 0.1, bias[:8])
    up = reference.sparse_fc(x, weight[:, 8:], [0.9], [8], 0.1, bias[8:])
    got = reference.sparse_glu(x, weight, 0.3, 0.9, 0.1, activation, bias)
    by_hand = {
        "silu": gate / (1 + torch.exp(-gate)),
        "gelu": gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))),
        "gelu_tanh": 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))),
        "relu": gate * (gate > 0),
        "relu2": (gate * (gate > 0)) ** 2,
    }
    torch.testing.assert_close(got, by_hand[activation] * up, rtol=1e-4, atol=1e-5)


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match="silu"):
        reference.activate(torch.zeros(1), "swish2")
