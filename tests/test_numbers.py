# SPDX-License-Identifier: Apache-2.0
"""Numbers at their edges, and the same bits every time."""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import pytest
import torch
from tiny_models import build_tiny_model, make_batches
from torch import nn

import scap_nncf
from scap_nncf.algorithms.scap.histogram import ActivationHistogram
from scap_nncf.algorithms.scap.statistics import bucket_counts

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32]


def histogram(values: torch.Tensor) -> ActivationHistogram:
    return ActivationHistogram(bucket_counts(values).numpy(), values.dtype == torch.bfloat16)


class Chain(nn.Module):
    def __init__(self, width: int, out: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, out)])
        self.to(dtype).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def compress(width: int, data: list[torch.Tensor], dtype: torch.dtype = torch.float32, **settings: Any) -> Chain:
    model = Chain(width, dtype=dtype)
    return scap_nncf.compress(model, dataset=data, allocation="uniform", **settings)


def threshold(model: nn.Module) -> float:
    return scap_nncf.get_controller(model).plan.layers[0].threshold


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_special_value_has_its_bucket(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal / 4  # a subnormal
    special = [0.0, -0.0, tiny, -tiny, info.tiny, info.max, info.min, 1.0]
    values = torch.tensor([*special, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    counts = bucket_counts(values)
    assert int(counts.sum()) == len(values)
    found = histogram(values)
    assert found.non_finite == 3
    assert found.total == len(special)
    finite = histogram(values[: len(special)])
    assert np.isfinite([finite.mean(), finite.median(), finite.quantile(0.5), finite.value_quantile(0.99)]).all()
    if dtype != torch.float16:  # whose subnormals are normal numbers of float32
        assert counts[0] + counts[0x8000] >= 2  # both zeros
    assert finite.quantile(0.99) <= 2.0**128


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """Sums of a few thousand large values are beyond float16, and rounding stops a bfloat16 sum at 256 equal ones."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 31)))
    data = [(torch.randn(1, 512, 64, generator=generator) * 20_000).clamp(-60_000, 60_000).to(dtype) for _ in range(3)]
    model = compress(64, data, dtype, sparsity=0.5, mode="auto")
    values = torch.cat(data).float().abs().flatten()
    assert threshold(model) == pytest.approx(float(values.quantile(0.5)), rel=0.02)
    statistics = scap_nncf.get_controller(model).calibration.histograms["layers.0"]
    assert statistics.total == values.numel()
    assert statistics.mean() == pytest.approx(float(torch.cat(data).double().mean()), abs=200)


def test_massive_outliers_do_not_move_the_quantiles() -> None:
    """Attention sinks: a few values ten thousand times the rest."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng().integers(1 << 31)))
    usual = torch.randn(1, 400, 64, generator=generator)
    extreme = usual.clone()
    extreme[0, 0, :3] = torch.tensor([3e4, -2e4, 1e38])
    for mode in ("zero", "median", "kde", "auto"):
        plain, outliers = (compress(64, [data], sparsity=0.5, mode=mode) for data in (usual, extreme))
        assert threshold(outliers) == pytest.approx(threshold(plain), rel=0.02)
        sites = [scap_nncf.get_controller(model).plan.sites[0] for model in (plain, outliers)]
        assert sites[1].mode == pytest.approx(sites[0].mode, abs=0.05)
    with torch.no_grad():
        assert not torch.isnan(outliers(extreme)).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.75, -3.0])
def test_constant_input(value: float, dtype: torch.dtype) -> None:
    data = [torch.full((1, 9, 16), value, dtype=dtype)]
    dense = Chain(16, dtype=dtype)
    for mode in ("zero", "mean", "median", "kde", "auto"):
        sparse = Chain(16, dtype=dtype)
        sparse.load_state_dict(dense.state_dict())
        scap_nncf.compress(sparse, dataset=data, sparsity=0.5, mode=mode, allocation="uniform")
        plan = scap_nncf.get_controller(sparse).plan
        assert np.isfinite([plan.sites[0].mode, plan.layers[0].threshold]).all()
        with torch.no_grad():
            out = sparse(data[0])
            assert torch.isfinite(out).all()
            if plan.sites[0].mode == value:  # all of it is in the bias then
                torch.testing.assert_close(out, dense(data[0]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("width", [1, 2])
def test_narrow_layers(width: int) -> None:
    data = [torch.randn(1, 33, width)]
    model = compress(width, data, sparsity=0.5, mode="median")
    with torch.no_grad():
        out = model(data[0])
    assert out.shape == (1, 33, 8)
    assert torch.isfinite(out).all()
    assert scap_nncf.get_controller(model).statistics().realised_sparsity == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sparsity_zero_is_the_dense_model_bit_for_bit(dtype: torch.dtype) -> None:
    data = [torch.randn(1, 12, 16).to(dtype) + 1]
    dense = Chain(16, dtype=dtype)
    sparse = Chain(16, dtype=dtype)
    sparse.load_state_dict(dense.state_dict())
    scap_nncf.compress(sparse, dataset=data, sparsity=0.0, mode="mean", allocation="uniform")
    with torch.no_grad():
        assert torch.equal(sparse(data[0]), dense(data[0]))


@pytest.mark.parametrize("sparsity", [0.999, 0.999999, np.nextafter(1.0, 0.0).item()])
def test_sparsity_close_to_one(sparsity: float) -> None:
    data = [torch.randn(1, 64, 32)]
    model = compress(32, data, sparsity=sparsity, mode="zero")
    with torch.no_grad():
        out = model(data[0])
    assert torch.isfinite(out).all()
    assert scap_nncf.get_controller(model).statistics().realised_sparsity >= min(sparsity, 0.9985)
    assert 0 < threshold(model) <= 1.01 * float(data[0].abs().max())


def test_a_token_that_is_pruned_altogether_gives_the_bias() -> None:
    data = [torch.randn(1, 64, 32)]
    model = compress(32, data, sparsity=0.5, mode="median")
    plan = scap_nncf.get_controller(model).plan
    quiet = torch.full((1, 1, 32), plan.sites[0].mode)
    with torch.no_grad():
        linear = model.layers[0]
        expected = linear.bias + plan.sites[0].mode * linear.weight.sum(dim=1)
        torch.testing.assert_close(model(quiet)[0, 0], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(bad: float) -> None:
    data = [torch.randn(1, 8, 16), torch.randn(1, 8, 16)]
    data[1][0, 3, 5] = bad
    model = Chain(16)
    with pytest.raises(nncf.ValidationError, match=r"layers\.0 has NaN or Inf values in sample 1"):
        scap_nncf.compress(model, dataset=data, sparsity=0.5, allocation="uniform")
    assert scap_nncf.get_controller(model) is None
    assert not model.layers[0]._forward_pre_hooks


@pytest.mark.parametrize("dtype", FLOATS)
def test_counts_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    values = torch.randn(1 << 18).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(bucket_counts(values))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    bits = values.float().view(torch.int32).numpy().view(np.uint32) >> 16
    assert np.array_equal(found[0].numpy(), np.bincount(bits, minlength=1 << 16))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"allocation": "fisher"}),
        ("gpt2", {"allocation": "uniform"}),
        ("gpt2", {"allocation": "uniform", "sequential": True}),
    ],
)
def test_the_same_plan_every_time(family: str, settings: dict[str, Any]) -> None:
    plans = set()
    for order in (slice(None), slice(None), slice(None, None, -1)):
        model = build_tiny_model(family)
        scap_nncf.compress(model, dataset=make_batches(4)[order], sparsity=0.5, mode="auto", **settings)
        controller = scap_nncf.get_controller(model)
        plans.add(controller.plan.to_json().encode() + controller.calibration.to_bytes())
    assert len(plans) == 1


def test_the_same_plan_whatever_the_threads() -> None:
    """Products of this size are not split among threads; larger ones torch may round differently (docs/scale.md)."""
    before, plans = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            model = build_tiny_model("llama")
            scap_nncf.compress(model, dataset=make_batches(3), sparsity=0.5, allocation="uniform")
            plans.add(scap_nncf.get_controller(model).plan.to_json())
    finally:
        torch.set_num_threads(before)
    assert len(plans) == 1
