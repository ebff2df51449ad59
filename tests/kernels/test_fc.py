# SPDX-License-Identifier: Apache-2.0
"""The Triton FC kernels against the reference: odd shapes, tails, masks, row counts, dtypes, poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from conftest_kernels import TOLERANCE, relative_error

from scap_nncf.kernels import reference

pytest.importorskip("triton", reason="needs Triton")

from scap_nncf.kernels.triton.fc import launch_fc
from scap_nncf.kernels.triton.tiles import Tile

SMALL = Tile(block_n=32, rows=64, groups=2, unroll=2, num_warps=4, max_registers=96)


def run(x, weight, thresholds, segments, mode, bias=None, residual=None, tile=SMALL, deterministic=True):
    if x.shape[0] > 1:
        tile = Tile(32, 64, groups=1, unroll=16, num_warps=4)
    out = torch.full((x.shape[0], weight.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    launch_fc(x, weight, list(zip(thresholds, segments)), mode, bias, residual, out, tile, deterministic)
    return out


def expected(x, weight, thresholds, segments, mode, bias=None, residual=None):
    wide = [None if t is None else t.cpu().double() for t in (x, weight, bias, residual)]
    # the comparison is float32 for every one of these dtypes
    z = x.cpu().float() - torch.tensor(mode, dtype=torch.float32)
    parts, start = [], 0
    for threshold, size in zip(thresholds, segments):
        kept = torch.where(z.abs() <= torch.tensor(threshold, dtype=torch.float32), 0.0, z).double()
        parts.append(kept @ wide[1][:, start : start + size])
        start += size
    y = torch.cat(parts, 1)
    y = y if bias is None else y + wide[2]
    return y if residual is None else y + wide[3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("deterministic", [True, False])
def test_dtypes_rows_and_both_sums(device, dtype, rows, deterministic):
    k, n = 150, 70
    x, weight = torch.randn(rows, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    bias, residual = torch.randn(n, device=device), torch.randn(rows, n, device=device).to(dtype)
    got = run(x, weight, [0.6], [n], 0.1, bias, residual, deterministic=deterministic)
    assert relative_error(got, expected(x, weight, [0.6], [n], 0.1, bias, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (63, 31), (64, 32), (65, 33), (129, 95)])
@pytest.mark.parametrize("rows", [1, 2])
def test_tails(device, shape, rows):
    k, n = shape
    x, weight = torch.randn(rows, k, device=device) + 2.0, torch.randn(k, n, device=device)
    got = run(x, weight, [1.5], [n], 0.0)
    assert relative_error(got, expected(x, weight, [1.5], [n], 0.0)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("threshold", "zeros"), [(1e9, True), (-1.0, False)])
def test_empty_and_full_masks(device, rows, threshold, zeros):
    x, weight = torch.randn(rows, 100, device=device), torch.randn(100, 50, device=device)
    bias = torch.randn(50, device=device)
    got = run(x, weight, [threshold], [50], 0.3, bias)
    if zeros:
        assert torch.equal(got.cpu(), bias.cpu().expand(rows, 50))
    else:
        assert relative_error(got, (x.double() - 0.3).cpu() @ weight.double().cpu() + bias.double().cpu()) < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("segments", [[40, 20, 20], [37, 0, 3, 41], [1, 1], [33, 32, 31, 1]])
def test_segments(device, rows, segments):
    n = sum(segments)
    thresholds = [0.1, 0.8, 1.4, -1.0][: len(segments)]
    x, weight = torch.randn(rows, 90, device=device), torch.randn(90, n, device=device)
    kept = [(t, s) for t, s in zip(thresholds, segments) if s]
    got = run(x, weight, *zip(*kept), 0.2)
    assert relative_error(got, expected(x, weight, thresholds, segments, 0.2)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [2, 4, 7, 16])
def test_each_row_is_what_it_would_be_alone(device, rows):
    k, n = 80, 40
    x, weight = torch.randn(rows, k, device=device), torch.randn(k, n, device=device)
    x[0] = 0.0  # a row that keeps nothing beside rows that keep something
    together = run(x, weight, [0.9], [n], 0.0)
    assert together[0].abs().max() == 0
    for row in range(1, rows):
        alone = run(x[row : row + 1].contiguous(), weight, [0.9], [n], 0.0)
        assert relative_error(together[row], alone[0]) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_dropped_weights_are_never_read(device, rows):
    """Poison in the weights of dropped channels must not reach the output."""
    x, weight = torch.randn(rows, 96, device=device), torch.randn(96, 48, device=device)
    kept = (x.abs() > 0.8).any(0)
    weight[~kept] = float("nan")
    got = run(x, weight, [0.8], [48], 0.0)
    clean = torch.where(kept[:, None], weight, 0.0)
    assert relative_error(got, expected(x, clean, [0.8], [48], 0.0)) < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
def test_nan_stays_visible(device, rows):
    x, weight = torch.randn(rows, 70, device=device), torch.randn(70, 40, device=device)
    x[0, 33] = float("nan")
    got = run(x, weight, [1e9], [40], 0.0)
    assert got[0].isnan().all()
    assert rows == 1 or got[1].abs().max() == 0


def test_strided_weight(device):
    whole = torch.randn(60, 100, device=device)
    x, weight = torch.randn(1, 60, device=device), whole[:, 13:50]
    assert relative_error(run(x, weight, [0.4], [37], 0.0), expected(x, weight, [0.4], [37], 0.0)) < 1e-5


def test_repeated_launches_agree_to_the_bit(device):
    x, weight = torch.randn(1, 300, device=device), torch.randn(300, 64, device=device)
    first = run(x, weight, [0.5], [64], 0.1)
    for _ in range(3):
        assert torch.equal(run(x, weight, [0.5], [64], 0.1), first)


TILES = [
    Tile(64, 128, 1, 4, 1, 96),
    Tile(16, 64, 8, 1, 8, 96),
    Tile(128, 64, 4, 3, 4, 128),
    Tile(64, 64, 2, 2, 4, 96, splits=5),
]


@pytest.mark.parametrize("tile", TILES)
def test_tiles_change_nothing_but_rounding(device, tile):
    x, weight = torch.randn(1, 170, device=device), torch.randn(170, 90, device=device)
    got = run(x, weight, [0.5], [90], 0.0, tile=tile)
    assert relative_error(got, expected(x, weight, [0.5], [90], 0.0)) < 1e-5


def test_same_mask_as_the_pruner_at_the_threshold(device):
    """Values on the threshold, after centring in float32, fall to the same side as in the simulated model."""
    x = (torch.randint(-8, 9, (1, 256)) / 16).half().to(device)
    mode, threshold = 0.1, float(torch.tensor(0.4625, dtype=torch.float32))
    eye = torch.eye(256, dtype=torch.float16, device=device)
    got = run(x, eye, [threshold], [256], mode)
    assert torch.equal(got.cpu() != 0, reference.prune(x.cpu().float(), mode, threshold) != 0)
