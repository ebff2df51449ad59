# SPDX-License-Identifier: Apache-2.0
"""The torch ops: every path, errors, fake kernels, torch.compile, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from conftest_kernels import TOLERANCE, relative_error

from scap_nncf.kernels import ops, reference

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def reference_fc(x, weight, thresholds, segments, mode=0.0, bias=None, residual=None):
    cpu = [None if t is None else t.cpu().float() for t in (x, weight, bias, residual)]
    return reference.sparse_fc(cpu[0], cpu[1], thresholds, segments, mode, cpu[2], cpu[3])


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (40, 7), (0, 7)])
def test_leading_dimensions(device, shape):
    x, weight = torch.randn(*shape, device=device), torch.randn(7, 5, device=device)
    residual = torch.randn(*shape[:-1], 5, device=device)
    got = ops.sparse_fc(x, weight, [0.5], [5], 0.1, None, residual)
    assert got.shape == (*shape[:-1], 5)
    expected = reference_fc(x, weight, [0.5], [5], 0.1, None, residual)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert ops.sparse_glu(x, weight[:, :4], 0.5, 0.5).shape == (*shape[:-1], 2)


def test_more_segments_than_one_launch_takes(device):
    segments, thresholds = [5, 6, 7, 8, 9, 10], [0.1, 0.9, 0.3, 1.2, -1.0, 0.6]
    x, weight = torch.randn(1, 64, device=device), torch.randn(64, 45, device=device)
    got = ops.sparse_fc(x, weight, thresholds, segments, 0.1, torch.ones(45, device=device))
    expected = reference_fc(x, weight, thresholds, segments, 0.1, torch.ones(45))
    assert relative_error(got, expected) < 1e-5


def test_fused_bias_and_layout_helpers(device):
    linear = torch.nn.Linear(24, 10, device=device)
    x, weight = torch.randn(4, 24, device=device), ops.input_major(linear.weight.detach())
    assert weight.is_contiguous()
    bias = ops.fuse_bias(weight, linear.bias.detach(), 0.4)
    torch.testing.assert_close(
        ops.sparse_fc(x, weight, [-1.0], [10], 0.4, bias), linear(x).detach(), rtol=1e-4, atol=1e-5
    )


def test_prune_is_the_reference_and_a_new_tensor(device):
    x = torch.randn(5, 11, device=device)
    torch.testing.assert_close(ops.prune(x, 0.2, 0.7).cpu(), reference.prune(x.cpu(), 0.2, 0.7))
    same = ops.prune(x, 0.0, -1.0)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda x, w: ops.sparse_fc(x.half(), w, [0.1], [6]), TypeError, "cast one of them"),
        (lambda x, w: ops.sparse_fc(x.int(), w.int(), [0.1], [6]), TypeError, "expected float16"),
        (lambda x, w: ops.sparse_fc(x, w.t(), [0.1], [8]), ValueError, "input channels first"),
        (lambda x, w: ops.sparse_fc(x, w, [0.1], [5]), ValueError, "6 output columns"),
        (lambda x, w: ops.sparse_fc(x, w, [0.1, 0.2], [6]), ValueError, "one threshold a segment"),
        (lambda x, w: ops.sparse_fc(x, w, [0.1], [6], 0.0, x.new_zeros(5)), ValueError, "bias has shape"),
        (lambda x, w: ops.sparse_fc(x, w, [0.1], [6], 0.0, None, x.new_zeros(6)), ValueError, "residual has shape"),
        (lambda x, w: ops.sparse_fc(x, w, [0.1], [6], 0.0, x.new_zeros(6).int()), TypeError, "bias is torch.int32"),
        (lambda x, w: ops.sparse_glu(x, w[:, :5], 0.1, 0.1), ValueError, "even number"),
        (lambda x, w: ops.sparse_glu(x, w, 0.1, 0.1, 0.0, "tanh"), ValueError, "silu"),
    ],
)
def test_errors_say_what_was_given(device, make, error, match):
    with pytest.raises(error, match=match):
        make(torch.randn(2, 8, device=device), torch.randn(8, 6, device=device))


def test_import_needs_no_triton():
    """Neither the package nor the ops import triton before a kernel runs on a GPU."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, importlib.util, types\n"
        "from scap_nncf.kernels import ops\n"
        "print(ops.sparse_fc(torch.ones(1, 4), torch.ones(4, 3), [0.5], [3]).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[[4.0, 4.0, 4.0]]" in done.stdout


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_compiles_without_graph_breaks(device, rows):
    weight, both = torch.randn(32, 20, device=device), torch.randn(20, 24, device=device)
    bias = torch.randn(20, device=device)

    def model(x):
        y = ops.sparse_fc(x * 2, weight, [0.3, 0.8], [12, 8], 0.1, bias)
        return ops.sparse_glu(y, both, 0.4, 0.4, 0.0, "silu") + 1

    x = torch.randn(rows, 32, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_opcheck(device):
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, 12, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.scap_nncf.sparse_fc, (x, weight, [0.3], [12], 0.1), test_utils=tests)
    torch.library.opcheck(torch.ops.scap_nncf.sparse_glu, (x, weight, 0.3, 0.5), test_utils=tests)
    torch.library.opcheck(torch.ops.scap_nncf.prune, (x, 0.1, 0.3), test_utils=tests)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 300])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_every_path_on_a_gpu(dtype, rows, sparsity):
    k, n = 1031, 777
    x = torch.randn(rows, k, device="cuda").to(dtype)
    weight = torch.randn(k, n, device="cuda").to(dtype)
    threshold = float(x.float().abs().quantile(sparsity)) if sparsity else -1.0
    bias, residual = torch.randn(n, device="cuda"), torch.randn(rows, n, device="cuda").to(dtype)
    torch.empty(1 << 22, device="cuda").fill_(float("nan"))  # freed memory that outputs and workspace may get
    got = ops.sparse_fc(x, weight, [threshold], [n], 0.0, bias, residual, True, sparsity)
    assert relative_error(got, reference_fc(x, weight, [threshold], [n], 0.0, bias, residual)) < TOLERANCE[dtype]


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (4096, 4096), (2048, 8192), (100, 60), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_tiles_of_the_table_on_a_gpu(shape, dtype, sparsity):
    k, n = shape
    x, weight = torch.randn(1, k, device="cuda").to(dtype), (torch.randn(k, n, device="cuda") * 0.1).to(dtype)
    threshold = float(x.float().abs().quantile(sparsity)) * 0.99
    got = ops.sparse_fc(x, weight, [threshold], [n], sparsity=sparsity)
    assert torch.equal(got, ops.sparse_fc(x, weight, [threshold], [n], sparsity=sparsity))
    assert relative_error(got, reference_fc(x, weight, [threshold], [n])) < TOLERANCE[dtype]
    if n % 2 == 0:
        glu = ops.sparse_glu(x, weight, threshold, threshold, sparsity=sparsity)
        expected = reference.sparse_glu(x.cpu().float(), weight.cpu().float(), threshold, threshold)
        assert relative_error(glu, expected) < 2 * TOLERANCE[dtype]


@gpu
@needs_gpu
def test_cuda_graph_replays_on_new_inputs():
    weight, both = torch.randn(512, 640, device="cuda") * 0.1, torch.randn(640, 512, device="cuda") * 0.1
    x = torch.randn(1, 512, device="cuda")

    def step():
        return ops.sparse_glu(ops.sparse_fc(x, weight, [0.6], [640]), both, 0.5, 0.5)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, step())


@gpu
@needs_gpu
def test_layers_the_kernels_cannot_serve_run_dense_with_one_warning():
    x, weight = torch.randn(2, 48, device="cuda"), torch.randn(30, 48, device="cuda").t()
    with pytest.warns(RuntimeWarning, match="contiguous"):
        got = ops.sparse_fc(x, weight, [0.5], [30])
    assert relative_error(got, reference_fc(x, weight, [0.5], [30])) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.sparse_fc(x, weight, [0.5], [30])
