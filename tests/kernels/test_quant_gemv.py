# SPDX-License-Identifier: Apache-2.0
"""The sparse kernels on 8- and 4-bit weights against the reference, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest_kernels import TOLERANCE, relative_error

from scap_nncf.kernels import packing, quant_ops
from scap_nncf.kernels.reference import ACTIVATIONS
from scap_nncf.kernels.reference.quantized import sparse_fc_quant_exact, sparse_glu_quant

pytest.importorskip("triton", reason="needs Triton")

from scap_nncf.kernels.triton.quant_launch import dequantize_columns, launch_sparse_quant
from scap_nncf.kernels.triton.quant_tiles import BatchTile, GemvTile, batch_tile, gemv_tile

ROW = GemvTile(block_words=16, warps=2, run=32, rows=2, unroll=2)
BATCH = BatchTile(block_words=16, block_k=32, run=32, warps=4, stages=1)


def make(device, bits, k, n, group, zero=None, dtype=torch.float16):
    u = torch.randint(0, 2**bits, (n, k))
    scale = (torch.rand(n, k // group) * 0.1 + 0.05).to(dtype)
    zeros = None
    if zero == "integer":
        zeros = torch.randint(0, 2**bits, (n, k // group))
    elif zero == "float":
        zeros = torch.randn(n, k // group).to(dtype)
    return packing.from_integers(u, scale, zeros, bits=bits, signed=False, dtype=dtype).to(device)


def parts(w):
    return w.packed, w.scale, w.zero, w.bits


def expected(x, w, thresholds, segments, mode=0.0, bias=None, residual=None):
    """The definition in float64; what is dropped is decided in float32, as for every dtype the kernels take."""
    z = x.float() - torch.tensor(mode, dtype=torch.float32)
    dense = packing.dequantize(*parts(w), rounded=False, dtype=torch.float64)
    out, start = [], 0
    for threshold, size in zip(thresholds, segments, strict=True):
        kept = torch.where(z.abs() <= torch.tensor(threshold, dtype=torch.float32), 0.0, z).double()
        out.append(kept @ dense[:, start : start + size])
        start += size
    y = torch.cat(out, 1)
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


def run(x, w, thresholds, segments, mode=0.0, bias=None, residual=None, tile=None, **options):
    tile = tile or (ROW if x.shape[0] == 1 else BATCH)
    out = torch.full((x.shape[0], w.out_features), float("nan"), dtype=x.dtype, device=x.device)
    return launch_sparse_quant(x, *parts(w), thresholds, segments, mode, bias, residual, tile=tile, out=out, **options)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
def test_dtypes_with_every_extra(device, bits, dtype, rows):
    k, n = 96, 150
    w = make(device, bits, k, n, 32, "integer")
    x, bias = torch.randn(rows, k, device=device).to(dtype), torch.randn(n, device=device)
    residual = torch.randn(rows, n, device=device).to(dtype)
    got = run(x, w, [0.6], [n], 0.1, bias, residual)
    assert relative_error(got, expected(x, w, [0.6], [n], 0.1, bias, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [None, "integer", "float"])
@pytest.mark.parametrize("rows", [1, 2])
def test_zero_points(device, bits, zero, rows):
    w = make(device, bits, 64, 70, 64, zero)
    x = torch.randn(rows, 64, device=device)
    assert relative_error(run(x, w, [0.5], [70]), expected(x, w, [0.5], [70])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (45, 1), (31, 129), (64, 128), (70, 257)])
@pytest.mark.parametrize("rows", [1, 2])
def test_tails(device, bits, shape, rows):
    k, n = shape
    w = make(device, bits, k, n, k)
    x = torch.randn(rows, k, device=device) + 1.5
    assert relative_error(run(x, w, [1.0], [n]), expected(x, w, [1.0], [n])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "tile", [GemvTile(16, 1, 32, 4), GemvTile(32, 2, 64, 2), GemvTile(16, 4, 128, 3), GemvTile(16, 2, 96, 8)]
)
def test_tiles_give_one_answer(device, bits, tile):
    k, n = 160, 140
    w = make(device, bits, k, n, k)
    x = torch.randn(1, k, device=device)
    x[:, 32:100] = 0.0  # whole masks without a kept input
    assert relative_error(run(x, w, [0.4], [n], tile=tile), expected(x, w, [0.4], [n])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("segments", [[150], [40, 70, 40], [1, 100, 0, 49], [30, 30, 30, 30, 30]])
def test_segments_that_cut_words_and_tiles(device, bits, rows, segments):
    w = make(device, bits, 64, 150, 32)
    x = torch.randn(rows, 64, device=device)
    thresholds = [0.2, 0.9, -1.0, 1.4, 0.5][: len(segments)]
    got = run(x, w, thresholds, segments)
    assert relative_error(got, expected(x, w, thresholds, segments)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_masks_empty_full_and_at_the_threshold(device, bits, rows):
    k, n = 64, 40
    w = make(device, bits, k, n, 32, "integer")
    x, bias = torch.randn(rows, k, device=device), torch.randn(n, device=device)
    torch.testing.assert_close(run(x, w, [1e9], [n], 0.0, bias), bias.expand(rows, n))
    assert relative_error(run(x, w, [-1.0], [n]), expected(x, w, [-1.0], [n])) < TOLERANCE[torch.float32]
    ties = torch.full((rows, k), 0.5, device=device)
    assert not run(ties, w, [0.5], [n]).any()  # |z| == threshold is dropped
    zeros = torch.zeros((rows, k), device=device)
    assert not run(zeros, w, [-1.0], [n]).any()


@pytest.mark.parametrize("rows", [1, 2])
def test_nan_stays_visible(device, rows):
    w = make(device, 4, 64, 40, 32)
    x = torch.randn(rows, 64, device=device)
    x[0, 7] = float("nan")
    got = run(x, w, [0.5], [40])
    assert got[0].isnan().all()
    assert rows == 1 or not got[1].isnan().any()


@pytest.mark.parametrize("rows", [2, 5, 16])
def test_rows_do_not_see_each_other(device, rows):
    k, n = 64, 70
    w = make(device, 4, k, n, 32)
    x = torch.randn(rows, k, device=device) * torch.rand(rows, 1, device=device)
    assert relative_error(run(x, w, [0.5], [n]), expected(x, w, [0.5], [n])) < TOLERANCE[torch.float32]
    assert relative_error(run(x, w, [0.5], [n], tile=ROW), expected(x, w, [0.5], [n])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("bits", "rows", "activation"),
    [(4, 1, name) for name in sorted(ACTIVATIONS)] + [(8, 1, "silu"), (4, 3, "gelu"), (8, 3, "relu2")],
)
def test_glu(device, bits, rows, activation):
    half = 128
    w = make(device, bits, 64, 2 * half, 32)
    x, bias = torch.randn(rows, 64, device=device), torch.randn(2 * half, device=device)
    got = launch_sparse_quant(
        x, *parts(w), [0.3, 0.6], [half, half], 0.05, bias, None, activation, tile=ROW if rows == 1 else BATCH
    )
    wide = sparse_glu_quant(x.double(), *parts(w), 0.3, 0.6, 0.05, activation, bias)
    assert relative_error(got, wide) < 5 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [None, "integer", "float"])
def test_dequantised_slice_is_the_source_weight(device, bits, zero):
    n, block = 300, 16 * 32 // bits
    w = make(device, bits, 70, n, 70, zero)
    got = dequantize_columns(*parts(w), block, n - block, torch.float16)
    assert torch.equal(got, w.dequantize()[:, block:])


@pytest.mark.parametrize("group", [32, 64, 128, 96, 4096])
def test_default_tiles_fit_the_group(group):
    for bits in (4, 8):
        for k, n in ((4096, 14336), (4096, 40), (14336, 4096), (96, 70)):
            if k % group == 0 or group > k:
                g = min(group, k)
                for run_length in (gemv_tile(bits, k, n, g).run, batch_tile(bits, k, n, g).run):
                    assert g == k or g % run_length == 0


# -- the torch ops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_for_any_number_of_rows(device, bits, rows, dtype, monkeypatch):
    monkeypatch.setattr(quant_ops, "DENSE_SLICE_BYTES", 20_000)  # so that the dense path cuts the weight
    k, segments, thresholds = 64, [90, 60, 50], [0.5, 0.2, 0.2]
    w = make(device, bits, k, 200, 32, "integer")
    x, bias = torch.randn(*rows, k, device=device).to(dtype), torch.randn(200, device=device)
    residual = torch.randn(*rows, 200, device=device).to(dtype)
    got = quant_ops.sparse_fc_quant(x, *parts(w), thresholds, segments, 0.1, bias, residual)
    assert got.dtype == dtype
    assert got.shape == (*rows, 200)
    wide = expected(x.reshape(-1, k), w, thresholds, segments, 0.1, bias, residual.reshape(-1, 200))
    assert relative_error(got.reshape(-1, 200), wide) < (2e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("half", [128, 50])
def test_glu_op(device, bits, half):
    w = make(device, bits, 64, 2 * half, 32)
    x = torch.randn(2, 64, device=device)
    got = quant_ops.sparse_glu_quant(x, *parts(w), 0.3, 0.6, 0.0, "silu")
    assert relative_error(got, sparse_glu_quant(x.double(), *parts(w), 0.3, 0.6)) < 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_group_that_the_kernels_cannot_serve_runs_dense(device, bits):
    w = make(device, bits, 48, 40, 16)
    x = torch.randn(1, 48, device=device)
    got = quant_ops.sparse_fc_quant(x, *parts(w), [0.5], [40])
    assert relative_error(got, expected(x, w, [0.5], [40])) < 1e-3


def test_op_compiles_without_a_graph_break(device):
    w = make(device, 4, 64, 128, 32)
    x = torch.randn(1, 64, device=device)

    def layer(x):
        y = quant_ops.sparse_fc_quant(x * 2.0, *parts(w), [0.5], [128])
        return quant_ops.sparse_glu_quant(x, *parts(w), 0.5, 0.5) + y[:, :64]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_ops_pass_the_registration_checks(device, bits):
    w = make(device, bits, 64, 40, 32, "integer")
    x = torch.randn(3, 64, device=device)
    op = getattr(torch.ops.scap_nncf, f"sparse_fc_int{bits}").default
    torch.library.opcheck(op, (x, w.packed, w.scale, w.zero, [0.5, 0.1], [30, 10]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_graph_replays_on_new_inputs_and_repeats_bit_for_bit(bits):
    k, n = 1024, 1536
    w = make("cuda", bits, k, n, 128, "integer")
    x = torch.randn(1, k, device="cuda").half()
    quant_ops.sparse_fc_quant(x, *parts(w), [0.5], [n])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = quant_ops.sparse_fc_quant(x, *parts(w), [0.5], [n])
    for _ in range(5):
        x.copy_(torch.randn(1, k).half())
        y.fill_(float("nan"))
        graph.replay()
        first = y.clone()
        assert relative_error(first, expected(x, w, [0.5], [n])) < TOLERANCE[torch.float16]
        graph.replay()
        assert torch.equal(first, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ptx", [True, False])
def test_large_activations_do_not_overflow(bits, ptx):
    """Sums of float16 products are scaled: inputs near the largest float16 stay finite and right."""
    k, n = 256, 128
    w = make("cuda", bits, k, n, k)
    x = torch.randn(1, k, device="cuda").clamp(-2, 2) * 3e4
    x = x.bfloat16()
    got = run(x, w, [1e3], [n], ptx=ptx)
    assert relative_error(got, expected(x, w, [1e3], [n])) < TOLERANCE[torch.bfloat16]


def test_bad_arguments_are_refused(device):
    w = make(device, 4, 64, 40, 32)
    x = torch.randn(1, 64, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        quant_ops.sparse_fc_quant(x[:, :32], *parts(w), [0.5], [40])
    with pytest.raises(ValueError, match="thresholds"):
        quant_ops.sparse_fc_quant(x, *parts(w), [0.5], [39])
    with pytest.raises(ValueError, match="bits"):
        quant_ops.sparse_fc_quant(x, w.packed, w.scale, w.zero, 5, [0.5], [40])
    with pytest.raises(ValueError, match="words a row"):
        quant_ops.sparse_fc_quant(x, w.packed[:, :8], w.scale, w.zero, 4, [0.5], [40])
    with pytest.raises(TypeError, match="expected float16"):
        quant_ops.sparse_fc_quant(x.long(), *parts(w), [0.5], [40])
    with pytest.raises(ValueError, match="bias"):
        quant_ops.sparse_fc_quant(x, *parts(w), [0.5], [40], bias=torch.zeros(39, device=device))
    with pytest.raises(ValueError, match="Unknown activation"):
        quant_ops.sparse_glu_quant(x, *parts(w), 0.5, 0.5, activation="tanh")


def test_reference_matches_a_dense_layer_at_a_negative_threshold():
    w = make("cpu", 8, 64, 40, 64, "integer", torch.float32)
    x = torch.randn(2, 64).double()
    got = sparse_fc_quant_exact(x, *parts(w), [-1.0], [40], 0.3, packing.fuse_bias(w, None, 0.3))
    torch.testing.assert_close(got, x @ w.dequantize().double(), rtol=1e-5, atol=1e-5)
