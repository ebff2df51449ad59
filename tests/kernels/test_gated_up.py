# SPDX-License-Identifier: Apache-2.0
"""The layer behind an open gate (CATS) against its float64 definition."""

from __future__ import annotations

import pytest
import torch
from conftest_kernels import TOLERANCE, relative_error

from scap_nncf.kernels import ops, reference

pytest.importorskip("triton", reason="needs Triton")

from scap_nncf.kernels.triton.gated_up import launch_gated_up


def run(gate, x, weight, threshold, activation="silu", bias=None):
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    launch_gated_up(gate, x, weight, threshold, activation, bias, out)
    return out


def expected(gate, x, weight, threshold, activation="silu", bias=None):
    """float64 products under the mask that the dtype of the gate gives."""
    opened = reference.open_gate(gate.cpu(), threshold, activation).double()
    y = x.cpu().double() @ weight.cpu().double().t()
    return opened * (y if bias is None else y + bias.cpu().double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "shape"), [(1, (37, 150)), (2, (5, 64)), (3, (1, 33)), (4, (18, 1))])
def test_dtypes_rows_and_tails(device, dtype, rows, shape):
    n, k = shape
    gate, x = torch.randn(rows, n, device=device).to(dtype), torch.randn(rows, k, device=device).to(dtype)
    weight, bias = torch.randn(n, k, device=device).to(dtype), torch.randn(n, device=device).to(dtype)
    got = run(gate, x, weight, 0.15, bias=bias)
    want = expected(gate, x, weight, 0.15, bias=bias)
    assert torch.equal(got.cpu() == 0, want == 0)
    assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(device, activation):
    gate, x, weight = (torch.randn(*s, device=device) for s in ((2, 20), (2, 40), (20, 40)))
    got = run(gate, x, weight, 0.1, activation)
    assert relative_error(got, expected(gate, x, weight, 0.1, activation)) < TOLERANCE[torch.float32]


def test_closed_open_and_nan(device):
    gate, x, weight = (torch.randn(*s, device=device) for s in ((1, 16), (1, 24), (16, 24)))
    poisoned = weight.clone()
    poisoned[gate[0] < 0.5] = float("nan")  # rows of closed gates must not be read
    limit = float(torch.nn.functional.silu(torch.tensor(0.5)))
    assert torch.isfinite(run(gate, x, poisoned, limit)).all()
    assert not run(gate, x, weight, 1e9).any()
    dense = torch.nn.functional.silu(gate) * (x @ weight.t())
    torch.testing.assert_close(run(gate, x, weight, -1.0), dense, rtol=1e-4, atol=1e-4)
    gate[0, 3] = float("nan")
    assert torch.isnan(run(gate, x, weight, 1e9)[0, 3])


def test_rows_do_not_meet(device):
    gate, x, weight = (torch.randn(*s, device=device) for s in ((4, 30), (4, 50), (30, 50)))
    together = run(gate, x, weight, 0.2)
    alone = torch.cat([run(gate[i : i + 1], x[i : i + 1], weight, 0.2) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_op(device, rows):
    gate, x, weight = (torch.randn(*s, device=device) for s in ((1, rows, 20), (1, rows, 40), (20, 40)))
    got = ops.gated_up(gate, x, weight, 0.1)
    want = expected(gate[0], x[0], weight, 0.1).reshape(1, rows, 20)
    assert relative_error(got, want) < TOLERANCE[torch.float32]
    compiled = torch.compile(lambda *a: ops.gated_up(*a, 0.1) + 1.0, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, x, weight), got + 1.0)
    torch.library.opcheck(torch.ops.scap_nncf.gated_up, (gate, x, weight, 0.1, "gelu", None))


def test_bad_arguments():
    gate, x, weight = torch.randn(1, 4), torch.randn(1, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match="gate has shape"):
        ops.gated_up(gate[:, :2], x, weight, 0.1)
    with pytest.raises(TypeError, match="gate is"):
        ops.gated_up(gate.half(), x, weight, 0.1)
    with pytest.raises(ValueError, match="Unknown activation"):
        ops.gated_up(gate, x, weight, 0.1, "tanh")
    with pytest.raises(ValueError, match="do not fit"):
        ops.gated_up(gate, x, weight.t(), 0.1)
