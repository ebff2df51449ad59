# SPDX-License-Identifier: Apache-2.0
"""Models that other toolkits quantised: sites, calibration, pruning with the right b + η·W, saving and loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from quantised_doubles import AwqLinear, GptqLinear
from quantised_models import TOOLKITS, compressed_tensors, dense, torchao_int8
from tiny_models import make_batches
from torch import nn

import scap_nncf
from scap_nncf import Scap
from scap_nncf.algorithms.backends.torch.weights import column_sums, dense_weight

ROLES = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)] * 2
DOWN = "model.layers.0.mlp.down_proj"


def mode_only(model: Any, data: Any) -> Any:
    """A plan that takes a mode out and puts it back, and drops nothing else."""
    plan = scap_nncf.make_plan(scap_nncf.calibrate(model, dataset=data), Scap(sparsity=0.5))
    sites = [
        replace(site, mode=0.2, layers=tuple(replace(layer, threshold=0.0) for layer in site.layers))
        for site in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


@pytest.mark.parametrize("toolkit", sorted(TOOLKITS))
def test_from_calibration_to_a_reload(toolkit: str, tmp_path: Path) -> None:
    make, tolerance = TOOLKITS[toolkit]
    model, data = make(), make_batches(3)
    report = scap_nncf.inspect_model(model)
    assert [tuple(layer.role for layer in site.layers) for site in report.sites] == ROLES

    quantised = model(**data[0]).logits
    nncf.compress(model, plan=mode_only(model, data))
    moved = (model(**data[0]).logits - quantised).norm() / quantised.norm()
    assert 0 < moved < tolerance
    scap_nncf.get_controller(model).strip()
    assert torch.equal(model(**data[0]).logits, quantised)

    nncf.compress(model, dataset=data, sparsity=0.4, mode="mean", sequential=True, allocation="uniform")
    controller = scap_nncf.get_controller(model)
    sparse = model(**data[0]).logits
    assert 0.05 < (sparse - quantised).norm() / quantised.norm() < 1.0
    for layer in controller.statistics().layers:
        assert layer.realised_sparsity == pytest.approx(0.4, abs=0.06)
    controller.save(tmp_path / "plan")
    with pytest.raises(nncf.ValidationError, match="toolkit"):
        scap_nncf.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    controller.set_sparsity(0.0)
    assert torch.equal(model(**data[0]).logits, quantised)

    again = make()  # what a user does: the toolkit loads the weights, the plan goes on top
    again(**data[0])
    nncf.compress(again, plan=tmp_path / "plan")
    # not bit for bit where a toolkit chooses scales by an iteration of its own; all here are deterministic
    assert torch.equal(again(**data[0]).logits, sparse)


@pytest.mark.parametrize("toolkit", sorted(TOOLKITS))
def test_weights_as_they_run(toolkit: str) -> None:
    """η·W and W itself against the dense weights: off by the quantisation alone, and one fits the other."""
    model, original = TOOLKITS[toolkit][0](), dense()
    for _ in range(2):  # the first forward pass may change how weights are held
        weight = dense_weight(model, DOWN)
        assert weight.shape == (128, 64)
        sums = column_sums(model, DOWN)
        # of a layer that only answers, in bfloat16 or from a quantised input, single weights are less exact
        assert (weight.sum(0) - sums).norm() / sums.norm() < (2e-2 if toolkit == "bitsandbytes_int8" else 1e-5)
        error = (weight - original.get_submodule(DOWN).weight.t()).norm() / weight.norm()
        assert 1e-3 < error < 0.2
        model(**make_batches(1)[0])


@pytest.mark.parametrize("kind", [GptqLinear, AwqLinear])
def test_the_doubles_hold_what_they_say(kind: type) -> None:
    linear = nn.Linear(64, 40)
    double = kind(linear)
    assert not hasattr(double, "weight")
    assert double.qweight.dtype == double.qzeros.dtype == torch.int32
    assert double.qweight.numel() == 64 * 40 // 8
    step = double.scales.repeat_interleave(32, 0)
    assert ((double.matrix() - linear.weight.t()).abs() <= 0.51 * step).all()


def test_half_precision_keeps_mode_correction_small() -> None:
    """η·W as η·(FC(ones) − FC(0)), not FC(η) − FC(0), which cancels in bfloat16."""
    from quantised_models import gptq

    model = gptq().to(torch.bfloat16)
    exact = model.get_submodule(DOWN).matrix().double().sum(0)
    assert (column_sums(model, DOWN).double() - exact).norm() / exact.norm() < 2e-2


def test_layer_that_unpacks_in_the_first_forward_pass() -> None:
    """compressed-tensors holds packed integers and no weight until then."""
    model, data = compressed_tensors(run_compressed=True), make_batches(2)
    plan = mode_only(compressed_tensors(), data)
    if hasattr(model.get_submodule(DOWN), "weight"):
        pytest.skip("this version unpacks when loading")
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(nncf.ValidationError, match="first forward pass"):
        nncf.compress(model, plan=plan)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    quantised = model(**data[0]).logits
    nncf.compress(model, plan=plan)
    assert (model(**data[0]).logits - quantised).norm() / quantised.norm() < 1e-5


def test_workflow_of_torchao(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    from scap_nncf.torchao import ScapConfig

    data = make_batches(2)
    model = nncf.compress(torchao_int8(), dataset=data, sparsity=0.5, mode="mean")
    sparse = model(**data[0]).logits
    scap_nncf.get_controller(model).save(tmp_path)

    again = dense()
    quantization.quantize_(again, quantization.Int8WeightOnlyConfig())
    config = ScapConfig(plan=tmp_path)
    quantization.quantize_(again, config)
    assert torch.equal(again(**data[0]).logits, sparse)
    assert len(scap_nncf.get_controller(again).plan.layers) == 14
    with pytest.raises(nncf.ValidationError, match="already"):
        quantization.quantize_(again, ScapConfig(plan=tmp_path))
    assert torch.equal(again(**data[0]).logits, sparse)

    third = torchao_int8()  # one config, another model; and the whole model as the filter's choice
    quantization.quantize_(third, config, filter_fn=lambda _module, name: name == "")
    assert torch.equal(third(**data[0]).logits, sparse)
    with pytest.raises(nncf.ValidationError, match="does not fit"):
        quantization.quantize_(nn.Sequential(nn.Linear(8, 8)), config)
    with pytest.raises(nncf.ValidationError, match="plan must be"):
        ScapConfig(plan=0.5)
