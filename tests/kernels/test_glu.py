# SPDX-License-Identifier: Apache-2.0
"""The fused gate/up/activation kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from conftest_kernels import TOLERANCE, relative_error

from scap_nncf.kernels import reference

pytest.importorskip("triton", reason="needs Triton")

from scap_nncf.kernels.triton.glu import launch_gate, launch_glu
from scap_nncf.kernels.triton.tiles import Tile

SMALL = Tile(block_n=32, rows=64, groups=2, unroll=2, num_warps=4)


def run(x, weight, gate, up, mode=0.0, activation="silu", bias=None, tile=SMALL, deterministic=True):
    out = torch.full((1, weight.shape[1] // 2), float("nan"), dtype=x.dtype, device=x.device)
    launch_glu(x, weight, gate, up, mode, activation, bias, out, tile, deterministic)
    return out


def expected(x, weight, gate, up, mode=0.0, activation="silu", bias=None):
    wide = [None if t is None else t.cpu().double() for t in (x, weight, bias)]
    return reference.sparse_glu(wide[0], wide[1], gate, up, mode, activation, wide[2])


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize(("gate", "up"), [(0.5, 0.5), (0.3, 1.1), (1.1, 0.3)])
def test_activations_and_thresholds(device, activation, gate, up):
    x, weight = torch.randn(1, 90, device=device), torch.randn(90, 2 * 45, device=device) * 0.1
    bias = torch.randn(90, device=device)
    got = run(x, weight, gate, up, 0.2, activation, bias)
    assert relative_error(got, expected(x, weight, gate, up, 0.2, activation, bias)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("deterministic", [True, False])
def test_dtypes_and_both_sums(device, dtype, deterministic):
    x, weight = torch.randn(1, 140, device=device).to(dtype), (torch.randn(140, 66, device=device) * 0.1).to(dtype)
    got = run(x, weight, 0.6, 0.6, deterministic=deterministic)
    assert relative_error(got, expected(x, weight, 0.6, 0.6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 1), (64, 32), (65, 33), (3, 100)])
def test_tails(device, shape):
    k, n = shape
    x, weight = torch.randn(1, k, device=device) + 2.0, torch.randn(k, 2 * n, device=device)
    assert relative_error(run(x, weight, 0.5, 0.7), expected(x, weight, 0.5, 0.7)) < 1e-5


def test_weights_of_dropped_channels_are_never_read(device):
    """Each half has its own mask, and reads nothing that it drops."""
    x, weight = torch.randn(1, 100, device=device), torch.randn(100, 80, device=device)
    gate, up = 0.4, 0.9
    clean = weight.clone()
    for half, threshold in ((slice(0, 40), gate), (slice(40, 80), up)):
        dropped = x[0].abs() <= threshold
        weight[dropped, half] = float("nan")
        clean[dropped, half] = 0.0
    assert relative_error(run(x, weight, gate, up), expected(x, clean, gate, up)) < 1e-5


def test_nothing_kept_leaves_the_bias(device):
    x, weight, bias = torch.randn(1, 70, device=device), torch.randn(70, 60, device=device), torch.randn(60).to(device)
    got = run(x, weight, 1e9, 1e9, 0.0, "relu2", bias)
    torch.testing.assert_close(got[0], torch.relu(bias[:30]) ** 2 * bias[30:])


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_activation_alone(device, activation):
    h = torch.randn(3, 2 * 37, device=device)
    out = torch.full((3, 37), float("nan"), device=device)
    launch_gate(h, activation, out)
    torch.testing.assert_close(out, reference.activate(h[:, :37], activation) * h[:, 37:], rtol=1e-4, atol=1e-5)
